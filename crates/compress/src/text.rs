//! Which tokens calibrate and which judge. Law: what judges is never used to choose; the seed draws the calibration.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use cotk_data::text::{MARKER, documents, split};
use cotk_model::tokenizer::Tokenizer;
use cotk_run::files;
use cotk_run::seeds::Seeds;
use rand::RngExt;

use crate::recipe::Compress;
use crate::{CompressError, Result};

/// Targets of the quality measurement at most.
pub const QUALITY_TOKENS: usize = 16_384;
/// Shorter pieces of documents teach nothing about attention.
const SHORTEST_WINDOW: usize = 16;
/// Tokens of a section: whole short documents, or a piece of a long one. What is fitted on one section is judged on
/// others.
const SECTION_TOKENS: usize = 1024;
/// One section in so many is held out.
const HELD_OUT_ONE_IN: u64 = 8;
/// No text of ours comes near this.
const LIMIT_BYTES: u64 = 1 << 30;

/// Tokens of both purposes.
#[derive(Debug, Clone, PartialEq)]
pub struct Texts {
    /// Pieces of documents, seen one by one.
    pub calibration: Vec<Vec<u32>>,
    /// For each of them whether it judges what the others were fitted to: whole sections of the text, spread over it.
    pub held_out: Vec<bool>,
    /// For each of them the section of the text that it comes from: about a thousand tokens that are likely of one kind.
    pub sections: Vec<u64>,
    /// One text, scored by sliding windows.
    pub quality: Vec<u32>,
    /// What the quality text is, for tables.
    pub quality_name: String,
    pub warnings: Vec<String>,
}

impl Texts {
    /// Tokens that calibrate.
    pub fn calibration_tokens(&self) -> usize {
        self.calibration.iter().map(Vec::len).sum()
    }
}

/// Reads and draws. Without `eval_text` the last fifth of the calibration documents judges, and does nothing else.
/// Documents of the calibration text that the judging text has too are left out, with a warning.
///
/// # Errors
/// Texts that cannot be read, are too short, or are the same.
pub fn draw(
    tokenizer: &Tokenizer,
    calibration: &Path,
    eval_text: Option<&Path>,
    context: usize,
    recipe: &Compress,
    seeds: Seeds,
) -> Result<Texts> {
    let mut documents = documents(calibration)?;
    let (quality, quality_name) = match eval_text {
        Some(path) => {
            if files::checksum_file(path)? == files::checksum_file(calibration)? {
                return Err(same_text(calibration, path));
            }
            (files::read_text(path, LIMIT_BYTES)?, name_of(path))
        }
        None => {
            let judging = split_off_fifth(&mut documents);
            (judging, format!("last fifth of {}", name_of(calibration)))
        }
    };
    let mut warnings = Vec::new();
    let shared = leave_out_shared(&mut documents, &quality);
    if documents.is_empty() {
        return Err(same_text(calibration, eval_text.unwrap_or(calibration)));
    }
    if shared > 0 {
        warnings.push(format!(
            "{shared} documents of {} also stand in {quality_name}: they judge, and do not calibrate",
            name_of(calibration)
        ));
    }
    let mut quality = tokenizer.encode(&quality)?;
    quality.truncate(QUALITY_TOKENS + 1);
    let enough = |file: &Path, purpose, found: usize| {
        let expected = SHORTEST_WINDOW;
        if found >= expected {
            return Ok(());
        }
        let file = file.to_owned();
        Err(CompressError::ShortText {
            file,
            purpose,
            found,
            expected,
        })
    };
    enough(eval_text.unwrap_or(calibration), "measuring", quality.len())?;

    let window = recipe
        .calibration_window
        .get()
        .min(context)
        .max(SHORTEST_WINDOW.min(context));
    let mut stream = seeds.stream("calibration");
    let mut windows: Vec<(u64, Vec<u32>)> = Vec::new();
    let mut sections = Sections::default();
    for document in &documents {
        let tokens = tokenizer.encode_bare(document)?;
        // The first cut is drawn too: two seeds differ even where every token is used.
        let first = stream.random_range(1..=window).min(tokens.len());
        let (head, rest) = tokens.split_at(first);
        sections.begin_document();
        for piece in [head].into_iter().chain(rest.chunks(window)) {
            windows.push((sections.of(piece.len()), piece.to_vec()));
        }
    }
    windows.retain(|(_, w)| w.len() >= SHORTEST_WINDOW.min(window));
    spread(&mut windows, stream.random());
    let wanted = recipe.calibration_tokens.get();
    let mut total = 0;
    let (mut drawn, mut sections) = (Vec::new(), Vec::new());
    for (section, mut piece) in windows {
        piece.truncate(wanted - total);
        total += piece.len();
        drawn.push(piece);
        sections.push(section);
        if total == wanted {
            break;
        }
    }
    enough(calibration, "calibration", total)?;
    if total < wanted {
        warnings.push(format!(
            "calibration text has {total} usable tokens, {wanted} were asked for"
        ));
    }
    let mut held_out = held_out(&sections);
    if held_out.iter().all(|held| *held) || !held_out.contains(&true) {
        // Too few sections: windows then, of which the first fits.
        held_out = (1u64..).take(drawn.len()).map(|i| i % HELD_OUT_ONE_IN == 0).collect();
    }
    Ok(Texts {
        calibration: drawn,
        held_out,
        sections,
        quality,
        quality_name,
        warnings,
    })
}

/// For each piece whether its section judges: one in so many of those that were drawn, spread evenly over the text.
fn held_out(sections: &[u64]) -> Vec<bool> {
    let drawn: BTreeSet<u64> = sections.iter().copied().collect();
    let numbered = drawn.into_iter().zip(1u64..);
    let judging: HashSet<u64> = numbered
        .filter(|(_, number)| number.wrapping_mul(GOLDEN) < u64::MAX / HELD_OUT_ONE_IN)
        .map(|(section, _)| section)
        .collect();
    sections.iter().map(|section| judging.contains(section)).collect()
}

/// Which section a piece of text belongs to.
#[derive(Default)]
struct Sections {
    section: u64,
    /// Tokens of the section, and those of them that are of the document in hand.
    tokens: usize,
    own_tokens: usize,
}

impl Sections {
    fn begin_document(&mut self) {
        self.own_tokens = 0;
        if self.tokens >= SECTION_TOKENS {
            self.begin_section();
        }
    }

    fn begin_section(&mut self) {
        self.section += 1;
        (self.tokens, self.own_tokens) = (0, 0);
    }

    /// Of the next piece of the document.
    fn of(&mut self, tokens: usize) -> u64 {
        if self.own_tokens >= SECTION_TOKENS {
            self.begin_section();
        }
        self.tokens += tokens;
        self.own_tokens += tokens;
        self.section
    }
}

/// 2^64 / φ, odd: no two multiples are equal, and they are spread evenly.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Orders windows so that every prefix is spread evenly over the text (multiples of the golden ratio, modulo 1, from a
/// drawn start): kinds of text that lie together come in their proportion. A plain shuffle of the few dozen windows that
/// calibrate left kinds out: KL of `ref-qwen2moe` by seed .03, .03 and .096.
fn spread<T>(windows: &mut Vec<T>, start: u64) {
    let keys = (0u64..).map(|i| i.wrapping_mul(GOLDEN).wrapping_add(start));
    let mut keyed: Vec<(u64, T)> = keys.zip(windows.drain(..)).collect();
    keyed.sort_by_key(|(key, _)| *key);
    windows.extend(keyed.into_iter().map(|(_, window)| window));
}

/// Removes the documents that the judging text holds too, space around them apart; returns how many.
fn leave_out_shared(documents: &mut Vec<String>, quality: &str) -> usize {
    let judging = split(quality);
    let judging: HashSet<&str> = judging.iter().map(|document| document.trim()).collect();
    let before = documents.len();
    documents.retain(|document| !judging.contains(document.trim()));
    before - documents.len()
}

fn same_text(calibration: &Path, eval_text: &Path) -> CompressError {
    CompressError::SameText {
        calibration: calibration.to_owned(),
        eval_text: eval_text.to_owned(),
    }
}

/// Takes the last fifth of the documents away and joins it; of a single document, its last fifth by characters.
fn split_off_fifth(documents: &mut Vec<String>) -> String {
    if let [only] = documents.as_mut_slice() {
        let characters = only.chars().count();
        let from = only
            .char_indices()
            .nth(characters - characters / 5)
            .map_or(only.len(), |(at, _)| at);
        return only.split_off(from);
    }
    let keep = documents.len() - documents.len().div_ceil(5);
    documents.split_off(keep).join(MARKER)
}

/// File name alone: tables and manifests hold no folders.
fn name_of(path: &Path) -> String {
    path.file_name()
        .map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prefix_is_spread_over_the_text() {
        for start in [0, 1 << 63, 12_345] {
            let mut windows: Vec<usize> = (0..1000).collect();
            spread(&mut windows, start);
            for prefix in [20, 50, 200] {
                // Each fifth of the text has a fifth of the prefix, but for two.
                let in_fifth = |fifth: usize| windows[..prefix].iter().filter(|&&w| w / 200 == fifth).count();
                assert!(
                    (0..5).all(|fifth| in_fifth(fifth).abs_diff(prefix / 5) <= 2),
                    "{start} {prefix}"
                );
            }
            windows.sort_unstable();
            assert!(windows.into_iter().eq(0..1000));
        }
    }

    #[test]
    fn sections_hold_whole_short_documents_and_an_eighth_is_held_out_all_over_the_text() {
        let mut sections = Sections::default();
        let mut all = Vec::new();
        for document in 0..2000usize {
            sections.begin_document();
            let section = sections.section;
            let pieces = if document % 10 == 0 { 40 } else { 2 };
            for _ in 0..pieces {
                all.push(sections.of(100));
            }
            assert!(pieces > 2 || sections.section == section);
        }
        // Of a text that is drawn whole, and of every ninth piece of it.
        for by in [1, 9] {
            let drawn: Vec<u64> = all.iter().step_by(by).copied().collect();
            let held = held_out(&drawn);
            for part in held.chunks_exact(held.len() / 4) {
                let count = part.iter().filter(|held| **held).count();
                assert!(
                    (part.len() / 11..part.len() / 6).contains(&count),
                    "{count} of {}",
                    part.len()
                );
            }
            let pieces: Vec<(&u64, &bool)> = drawn.iter().zip(&held).collect();
            let is_whole = |pair: &[(&u64, &bool)]| pair[0].0 != pair[1].0 || pair[0].1 == pair[1].1;
            assert!(pieces.windows(2).all(is_whole), "a section is held out whole");
        }
    }

    #[test]
    fn shared_documents_are_left_out_and_counted() {
        let mut documents: Vec<String> = ["a\n", "b", "c", "b"].map(str::to_owned).to_vec();
        assert_eq!(leave_out_shared(&mut documents, "b\n<|endoftext|>d<|endoftext|> a"), 3);
        assert_eq!(documents, ["c"]);
        assert_eq!(leave_out_shared(&mut documents, "cc<|endoftext|>d"), 0);
    }

    #[test]
    fn the_last_fifth_is_taken_away() {
        let mut documents: Vec<String> = (0..11).map(|i| format!("d{i}")).collect();
        assert_eq!(split_off_fifth(&mut documents), ["d8", "d9", "d10"].join(MARKER));
        assert_eq!(documents.len(), 8);
        let mut one = vec!["0123456789".to_owned()];
        assert_eq!(split_off_fifth(&mut one), "89");
        assert_eq!(one, ["01234567"]);
        let mut two = vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(split_off_fifth(&mut two), "b");
    }
}
