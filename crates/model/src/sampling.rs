//! Choosing the next token: greedy, or by temperature and nucleus. Law: temperature 0 is the arg-max, and one seed
//! gives one text.

use cotk_run::seeds::Stream;
use rand::RngExt;

use crate::ModelError;
use crate::layers::router::argmax;

/// How to choose. Made by [`new`](Self::new), which refuses what is out of range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    temperature: f32,
    top_p: f32,
}

impl Sampling {
    /// The most likely token, always.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
    };

    /// `temperature` from 0 (greedy) to 100, `top_p` above 0 up to 1.
    ///
    /// # Errors
    /// [`ModelError::Setting`] with the range.
    pub fn new(temperature: f32, top_p: f32) -> Result<Self, ModelError> {
        let wrong = |what, found: f32, expected: &str| {
            Err(ModelError::Setting {
                what,
                found: found.to_string(),
                expected: expected.to_owned(),
            })
        };
        if !(0.0..=100.0).contains(&temperature) {
            return wrong("temperature", temperature, "0 (greedy) to 100");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return wrong("top_p", top_p, "above 0, up to 1");
        }
        Ok(Self { temperature, top_p })
    }

    /// Whether chance plays no part.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}

/// A way to choose with its own random numbers.
pub struct Sampler {
    sampling: Sampling,
    stream: Stream,
}

impl Sampler {
    /// `stream` is the run's for this purpose: `seeds.stream("sampling")`.
    pub fn new(sampling: Sampling, stream: Stream) -> Self {
        Self { sampling, stream }
    }

    /// One token from `[vocab]` logits.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        let id = |index: usize| u32::try_from(index).expect("vocabularies fit 32 bits");
        if self.sampling.is_greedy() {
            return id(argmax(logits));
        }
        let nucleus = nucleus(logits, self.sampling);
        let mass: f64 = nucleus.iter().map(|(_, p)| p).sum();
        let mut at = self.stream.random::<f64>() * mass;
        for (index, p) in &nucleus {
            at -= p;
            if at < 0.0 {
                return id(*index);
            }
        }
        id(nucleus[nucleus.len() - 1].0)
    }
}

/// The fewest most likely tokens whose probability reaches `top_p`, best first, ties by index. A nucleus is small and a
/// vocabulary is not: only the best are sorted, as many as it takes.
fn nucleus(logits: &[f32], sampling: Sampling) -> Vec<(usize, f64)> {
    /// Sorted first; then eight times as many.
    const FIRST: usize = 64;
    let best = logits[argmax(logits)];
    let weigh = |logit: f32| (f64::from(logit - best) / f64::from(sampling.temperature)).exp();
    let mut weights: Vec<(usize, f64)> = logits.iter().map(|&l| weigh(l)).enumerate().collect();
    if sampling.top_p < 1.0 {
        let enough = f64::from(sampling.top_p) * weights.iter().map(|(_, w)| w).sum::<f64>();
        let by_rank = |a: &(usize, f64), b: &(usize, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let (mut sum, mut sorted, mut width) = (0.0, 0, FIRST);
        while sorted < weights.len() {
            let rest = &mut weights[sorted..];
            let count = width.min(rest.len());
            if count < rest.len() {
                rest.select_nth_unstable_by(count - 1, by_rank);
            }
            rest[..count].sort_unstable_by(by_rank);
            let reached = rest[..count].iter().position(|(_, w)| {
                sum += w;
                sum >= enough
            });
            if let Some(at) = reached {
                weights.truncate(sorted + at + 1);
                break;
            }
            sorted += count;
            width *= 8;
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use cotk_run::seeds::Seeds;

    use super::*;

    fn draw(sampling: Sampling, logits: &[f32], seed: u64) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling, Seeds::new(seed).stream("sampling"));
        (0..4000).map(|_| sampler.choose(logits)).collect()
    }

    #[test]
    fn greedy_is_the_first_arg_max() {
        assert_eq!(draw(Sampling::GREEDY, &[0.0, 2.0, 2.0], 1)[..3], [1, 1, 1]);
    }

    #[test]
    fn shares_follow_the_probabilities() {
        let logits = [0.7f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
        let share = |drawn: &[u32], id| drawn.iter().filter(|&&d| d == id).count() as f64 / drawn.len() as f64;
        let drawn = draw(Sampling::new(1.0, 1.0).unwrap(), &logits, 1);
        for (id, p) in [(0, 0.7), (1, 0.2), (2, 0.1)] {
            assert!((share(&drawn, id) - p).abs() < 0.03);
        }
        // Temperature 1/2 squares them: .49, .04, .01 of .54.
        let drawn = draw(Sampling::new(0.5, 1.0).unwrap(), &logits, 1);
        assert!((share(&drawn, 0) - 0.49 / 0.54).abs() < 0.03);
        // 0.7 + 0.2 reaches 0.8: the third is never drawn.
        let drawn = draw(Sampling::new(1.0, 0.8).unwrap(), &logits, 1);
        assert_eq!(share(&drawn, 2), 0.0);
        assert!((share(&drawn, 0) - 7.0 / 9.0).abs() < 0.03);
    }

    /// Law: sorting only the best gives what sorting the whole vocabulary gives, to the last bit.
    #[test]
    fn a_nucleus_is_a_beginning_of_the_sorted_vocabulary() {
        let mut stream = Seeds::new(3).stream("logits");
        for count in [1, 2, 63, 64, 65, 5000] {
            for spread in [0.0f32, 1.0, 30.0] {
                // Rounded, so that some are equal.
                let logits: Vec<f32> = (0..count)
                    .map(|_| (spread * stream.random_range(-1.0f32..1.0) * 4.0).round() / 4.0)
                    .collect();
                let best = logits.iter().copied().fold(f32::MIN, f32::max);
                let mut whole: Vec<(usize, f64)> =
                    logits.iter().map(|&l| f64::from(l - best).exp()).enumerate().collect();
                let total: f64 = whole.iter().map(|(_, w)| w).sum();
                whole.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                for top_p in [1e-6, 0.3, 0.9, 0.999_999] {
                    let found = nucleus(&logits, Sampling::new(1.0, top_p).unwrap());
                    let mass = |of: &[(usize, f64)]| of.iter().map(|(_, w)| w).sum::<f64>();
                    assert_eq!(found[..], whole[..found.len()], "{count} {spread} {top_p}");
                    let enough = f64::from(top_p) * total;
                    assert!(mass(&found[..found.len() - 1]) < enough);
                    assert!(mass(&found) >= enough || found.len() == count);
                }
            }
        }
    }

    #[test]
    fn one_seed_gives_one_text() {
        let sampling = Sampling::new(1.0, 1.0).unwrap();
        let logits = [0.0; 50];
        assert_eq!(draw(sampling, &logits, 4), draw(sampling, &logits, 4));
        assert_ne!(draw(sampling, &logits, 4), draw(sampling, &logits, 5));
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        for (temperature, top_p) in [
            (-1.0, 1.0),
            (f32::NAN, 1.0),
            (101.0, 1.0),
            (1.0, 0.0),
            (1.0, 1.1),
            (1.0, f32::NAN),
        ] {
            assert!(Sampling::new(temperature, top_p).is_err());
        }
    }
}
