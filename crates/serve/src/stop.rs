//! Finds stop strings in text that arrives in pieces. Law: however the text is cut, what comes out is the text before
//! the stop string that is complete first, and nothing that could still become one leaves early.

/// Watches one generated text.
#[derive(Debug, Default)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    /// The end of the text so far that could be the beginning of a stop string.
    held: String,
}

/// What one piece of text gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Released {
    /// May be sent.
    pub(crate) text: String,
    /// A stop string is complete: the text ends here.
    pub(crate) is_stopped: bool,
}

impl StopMatcher {
    /// For these strings; empty ones are ignored.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            held: String::new(),
        }
    }

    /// Takes the next piece.
    pub(crate) fn push(&mut self, piece: &str) -> Released {
        self.held.push_str(piece);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start + stop.len(), start)))
            .min();
        if let Some((_, start)) = first {
            self.held.truncate(start);
            return Released {
                text: std::mem::take(&mut self.held),
                is_stopped: true,
            };
        }
        let kept = self.held.split_off(self.held.len() - self.undecided_bytes());
        Released {
            text: std::mem::replace(&mut self.held, kept),
            is_stopped: false,
        }
    }

    /// The text is over: what was held back is text after all.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest end of `held` that begins a stop string.
    fn undecided_bytes(&self) -> usize {
        let longest = |stop: &String| {
            stop.char_indices()
                .map(|(at, _)| at)
                .rev()
                .find(|&at| self.held.as_bytes().ends_with(&stop.as_bytes()[..at]))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition: the shortest beginning that ends with a stop string, without it (the longest, of several).
    fn reference(text: &str, stops: &[String]) -> (String, bool) {
        for (end, _) in text.char_indices().skip(1).chain([(text.len(), ' ')]) {
            let whole = &text[..end];
            let ending = stops.iter().filter(|s| !s.is_empty() && whole.ends_with(s.as_str()));
            if let Some(stop) = ending.max_by_key(|s| s.len()) {
                return (whole[..end - stop.len()].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn however_the_text_is_cut_it_ends_before_the_first_stop(
            pieces in prop::collection::vec("[abé]{0,3}", 0..12),
            stops in prop::collection::vec("[abé]{1,3}", 0..4),
        ) {
            let mut matcher = StopMatcher::new(stops.clone());
            let (mut out, mut is_stopped) = (String::new(), false);
            for piece in &pieces {
                let released = matcher.push(piece);
                out.push_str(&released.text);
                if released.is_stopped {
                    is_stopped = true;
                    break;
                }
            }
            if !is_stopped {
                out.push_str(&matcher.finish());
            }
            prop_assert_eq!((out, is_stopped), reference(&pieces.concat(), &stops));
        }
    }

    #[test]
    fn what_cannot_become_a_stop_leaves_at_once() {
        let mut matcher = StopMatcher::new(vec!["###".into()]);
        assert_eq!(matcher.push("a#b").text, "a#b");
        assert_eq!(matcher.push("c##").text, "c");
        assert_eq!(matcher.push("d").text, "##d");
        assert!(matcher.push("x###y").is_stopped);
    }
}
