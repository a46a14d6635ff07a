//! What judges rows of a comparison, of masks and of budgets alike: windows of several texts, scored against the
//! uncompressed model. Laws: no document both calibrates and judges; rows differ in what was compressed alone, so that
//! differences are paired window by window, and intervals draw documents, not tokens.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use cotk_data::text::{MARKER, documents, split};
use cotk_model::eval::score;
use cotk_model::model::{Model, Sequence};
use cotk_model::moe::Mode;
use cotk_run::files;
use cotk_run::seeds::Seeds;
use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::pipeline::Job;
use crate::states::{Rows, Stream};
use crate::{CompressError, Result};

/// Targets of a window and its first token.
const WINDOW: usize = 512;
/// Fewer tokens judge nothing.
const SHORTEST: usize = 16;
/// Rows whose states are in memory at once: experts want company.
const STATE_ROWS: usize = 4096;
/// Rows whose logits are in memory at once, per model.
const LOGIT_ROWS: usize = 512;
const RESAMPLES: usize = 1000;
const TEXT_LIMIT_BYTES: u64 = 1 << 30;

/// Sums over the scored targets of one window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct WindowScore {
    pub targets: usize,
    /// Σ KL(teacher ‖ student), nats.
    pub kl: f64,
    /// Σ −ln p of the token that came, nats: the student's.
    pub nll: f64,
    /// The teacher's.
    pub teacher_nll: f64,
    /// Targets whose most likely token is the same for both; a mean over seeds need not be whole.
    #[serde(default)]
    pub same_top1: f64,
}

/// One figure of one text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextFigure {
    pub text: String,
    pub kl_nats: f64,
    pub perplexity: f64,
}

/// Texts to judge by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bench<'a> {
    /// Make up the figure that decides; shown one by one too.
    pub(crate) texts: &'a [PathBuf],
    /// Shown beside it.
    pub(crate) second_texts: &'a [PathBuf],
    /// Of each text, at most, in windows spread over it.
    pub(crate) text_tokens: usize,
    /// Its documents judge nothing.
    pub(crate) calibration: &'a Path,
}

impl Bench<'_> {
    /// What makes two comparisons judge alike.
    pub(crate) fn identity(&self) -> Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec(&self.text_tokens).expect("a number");
        for text in self.texts.iter().chain(self.second_texts) {
            bytes.extend(files::checksum_file(text)?.to_le_bytes());
        }
        bytes.push(u8::try_from(self.texts.len()).unwrap_or(u8::MAX));
        Ok(bytes)
    }
}

/// The windows that judge.
#[derive(Debug)]
pub(crate) struct Judges {
    pub(crate) names: Vec<String>,
    /// Windows of each text.
    pub(crate) counts: Vec<usize>,
    /// Texts that decide come first.
    pub(crate) texts_deciding: usize,
    pub(crate) windows: Vec<Vec<u32>>,
    /// The document that each window's middle lies in, numbered over all texts.
    pub(crate) documents: Vec<usize>,
}

impl Judges {
    /// Windows that decide; they come first.
    pub(crate) fn deciding(&self) -> usize {
        self.counts[..self.texts_deciding].iter().sum()
    }

    /// All of them.
    pub(crate) fn slices(&self) -> Vec<&[u32]> {
        self.windows.iter().map(Vec::as_slice).collect()
    }

    /// Figures text by text.
    pub(crate) fn by_text(&self, scores: &[WindowScore]) -> Vec<TextFigure> {
        let mut rest = scores;
        let of = |(name, &count): (&String, &usize)| {
            let (own, after) = rest.split_at(count.min(rest.len()));
            rest = after;
            TextFigure {
                text: name.clone(),
                kl_nats: kl(own),
                perplexity: perplexity(own),
            }
        };
        self.names.iter().zip(&self.counts).map(of).collect()
    }

    /// [`resample`] over the documents of the windows that decide.
    pub(crate) fn resample(&self, own: &[WindowScore], reference: Option<&[WindowScore]>) -> Vec<(f64, f64)> {
        let deciding = self.deciding();
        let reference = reference.map(|reference| &reference[..deciding]);
        resample(&own[..deciding], reference, &self.documents[..deciding])
    }
}

/// A text that judges, without the documents that the calibration has too, and how many those were.
///
/// # Errors
/// [`CompressError::SameText`] where nothing else is in it.
fn unshared(calibration: &Path, judge: &Path) -> Result<(String, usize)> {
    let known = documents(calibration)?;
    let known: HashSet<&str> = known.iter().map(|document| document.trim()).collect();
    let text = files::read_text(judge, TEXT_LIMIT_BYTES)?;
    let all = split(&text);
    let own: Vec<&str> = (all.iter().map(String::as_str))
        .filter(|document| !known.contains(document.trim()))
        .collect();
    match all.len() - own.len() {
        0 => Ok((text, 0)),
        _ if own.is_empty() => Err(CompressError::SameText {
            calibration: calibration.to_owned(),
            eval_text: judge.to_owned(),
        }),
        shared => Ok((own.join(MARKER), shared)),
    }
}

impl Job<'_> {
    pub(crate) fn judges(&self, bench: &Bench<'_>) -> Result<Judges> {
        let mut judges = Judges {
            names: Vec::new(),
            counts: Vec::new(),
            texts_deciding: bench.texts.len(),
            windows: Vec::new(),
            documents: Vec::new(),
        };
        let window = WINDOW.min(self.source.files.spec.context);
        for (i, path) in bench.texts.iter().chain(bench.second_texts).enumerate() {
            // What the first text shares with the calibration is left out there.
            let text = if i == 0 {
                files::read_text(path, TEXT_LIMIT_BYTES)?
            } else {
                let (text, shared) = unshared(bench.calibration, path)?;
                if shared > 0 {
                    let warning = format!(
                        "{shared} documents of {} also calibrate: they do not judge",
                        path.display()
                    );
                    self.with.progress.note(&warning);
                }
                text
            };
            let tokens = self.source.files.tokenizer.encode(&text)?;
            let all: Vec<&[u32]> = tokens
                .chunks(window)
                .filter(|w| w.len() >= window.min(SHORTEST))
                .collect();
            if all.is_empty() {
                return Err(CompressError::ShortText {
                    file: path.clone(),
                    purpose: "measuring",
                    found: tokens.len(),
                    expected: window.min(SHORTEST),
                });
            }
            let ends = self.document_ends(&text)?;
            let before = judges.documents.last().map_or(0, |last| last + 1);
            let count = (bench.text_tokens / window).clamp(1, all.len());
            for i in 0..count {
                let at = (2 * i + 1) * all.len() / (2 * count);
                let middle = at * window + all[at].len() / 2;
                let document = match ends.len() {
                    // A text of one piece: each window stands for itself.
                    0 | 1 => i,
                    _ => ends.partition_point(|&end| end <= middle).min(ends.len() - 1),
                };
                judges.windows.push(all[at].to_vec());
                judges.documents.push(before + document);
            }
            judges.counts.push(count);
            let stem = path.file_stem();
            judges
                .names
                .push(stem.map_or_else(String::new, |n| n.to_string_lossy().into_owned()));
        }
        Ok(judges)
    }

    /// Where each document of a text ends, in tokens; a marker is one.
    fn document_ends(&self, text: &str) -> Result<Vec<usize>> {
        let mut end = 0;
        let ends = split(text).into_iter().map(|document| {
            end += self.source.files.tokenizer.encode_bare(&document)?.len() + 1;
            Ok(end)
        });
        ends.collect()
    }

    /// The states behind the last layer of both streams, scored window by window.
    pub(crate) fn score_windows(
        &self,
        windows: &[&[u32]],
        teacher: &Stream,
        student: &Stream,
    ) -> Result<Vec<WindowScore>> {
        let last = self.layers();
        let mut student = student.rows(last)?;
        let rows = |windows: &[&[u32]]| student.next(windows.iter().map(|w| w.len()).sum());
        self.score_against(windows, teacher.rows(last)?, rows, &|states| self.ends.logits(states))
    }

    /// A finished model, run as it will be served.
    pub(crate) fn score_model(&self, windows: &[&[u32]], teacher: &Stream, model: &Model) -> Result<Vec<WindowScore>> {
        let run = |windows: &[&[u32]]| -> Result<Vec<f32>> {
            let mut caches: Vec<_> = windows.iter().map(|_| model.new_cache()).collect();
            let pairs = windows.iter().zip(&mut caches);
            let mut sequences: Vec<Sequence<'_>> = pairs.map(|(tokens, cache)| Sequence { tokens, cache }).collect();
            Ok(model.hidden(&mut sequences, Mode::Exact)?.states)
        };
        let teacher = teacher.rows(self.layers())?;
        self.score_against(windows, teacher, run, &|states| model.logits(states))
    }

    /// `student` turns windows into the rows behind the last layer, `head` those into logits.
    fn score_against(
        &self,
        windows: &[&[u32]],
        mut teacher: Rows,
        mut student: impl FnMut(&[&[u32]]) -> Result<Vec<f32>>,
        head: &dyn Fn(&[f32]) -> Vec<f32>,
    ) -> Result<Vec<WindowScore>> {
        let spec = &self.source.files.spec;
        let mut scores = Vec::with_capacity(windows.len());
        let mut rest = windows;
        while !rest.is_empty() {
            self.with.cancel.check()?;
            let mut rows = 0;
            let count = rest
                .iter()
                .take_while(|window| {
                    let is_first = rows == 0;
                    rows += window.len();
                    is_first || rows <= STATE_ROWS
                })
                .count();
            let (batch, after) = rest.split_at(count);
            rest = after;
            let (before, own) = (teacher.next(batch.iter().map(|w| w.len()).sum())?, student(batch)?);
            // The last row of a window has nobody to predict: it is scored against token 0 and left out below.
            let next: Vec<u32> = batch.iter().flat_map(|w| w[1..].iter().copied().chain([0])).collect();
            let mut targets = Vec::with_capacity(next.len());
            for (chunk, next) in next.chunks(LOGIT_ROWS).enumerate() {
                let rows = chunk * LOGIT_ROWS * spec.hidden..(chunk * LOGIT_ROWS + next.len()) * spec.hidden;
                let truth = self.ends.logits(&before[rows.clone()]);
                let teacher_nll: Vec<f64> = score(&truth, None, next, spec.vocab)
                    .iter()
                    .map(|t| t.nll_nats())
                    .collect();
                let own = score(&head(&own[rows]), Some(&truth), next, spec.vocab);
                targets.extend(own.into_iter().zip(teacher_nll));
            }
            let mut rest = targets.as_slice();
            for window in batch {
                let (own, after) = rest.split_at(window.len());
                rest = after;
                let scored = &own[..window.len() - 1];
                scores.push(WindowScore {
                    targets: scored.len(),
                    kl: scored.iter().filter_map(|(t, _)| t.kl_nats()).sum(),
                    nll: scored.iter().map(|(t, _)| t.nll_nats()).sum(),
                    teacher_nll: scored.iter().map(|(_, nll)| nll).sum(),
                    same_top1: scored.iter().map(|(t, _)| f64::from(u8::from(t.is_same_top1()))).sum(),
                });
            }
        }
        Ok(scores)
    }
}

/// Window by window, means over rows that differ in their seed alone.
#[expect(clippy::cast_precision_loss, reason = "counts are small")]
pub(crate) fn mean_scores(seeds: &[&[WindowScore]]) -> Vec<WindowScore> {
    let mut scores = seeds[0].to_vec();
    let count = seeds.len() as f64;
    for (at, score) in scores.iter_mut().enumerate() {
        let mean = |of: &dyn Fn(&WindowScore) -> f64| seeds.iter().map(|row| of(&row[at])).sum::<f64>() / count;
        score.kl = mean(&|s| s.kl);
        score.nll = mean(&|s| s.nll);
        score.same_top1 = mean(&|s| s.same_top1);
    }
    scores
}

/// The same windows as the uncompressed model itself would score them.
pub(crate) fn uncompressed(scores: &[WindowScore]) -> Vec<WindowScore> {
    let of = |score: &WindowScore| WindowScore {
        kl: 0.0,
        nll: score.teacher_nll,
        ..*score
    };
    scores.iter().map(of).collect()
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn per_target(scores: &[WindowScore], of: impl Fn(&WindowScore) -> f64) -> f64 {
    let targets: usize = scores.iter().map(|s| s.targets).sum();
    scores.iter().map(of).sum::<f64>() / targets.max(1) as f64
}

/// Mean KL over all targets, nats.
pub fn mean_kl(scores: &[WindowScore]) -> f64 {
    per_target(scores, |s| s.kl)
}

pub(crate) use mean_kl as kl;

pub(crate) fn perplexity(scores: &[WindowScore]) -> f64 {
    per_target(scores, |s| s.nll).exp()
}

/// Share of targets where both models' most likely token is the same.
pub(crate) fn top1(scores: &[WindowScore]) -> f64 {
    per_target(scores, |s| s.same_top1)
}

/// KL and its ratio to the reference's over documents drawn with replacement, all windows of a document together, the
/// same ones for both.
pub(crate) fn resample(own: &[WindowScore], reference: Option<&[WindowScore]>, documents: &[usize]) -> Vec<(f64, f64)> {
    let mut by_document: BTreeMap<usize, (usize, f64, f64)> = BTreeMap::new();
    for (at, (score, document)) in own.iter().zip(documents).enumerate() {
        let sums = by_document.entry(*document).or_default();
        sums.0 += score.targets;
        sums.1 += score.kl;
        sums.2 += reference.map_or(0.0, |reference| reference[at].kl);
    }
    let documents: Vec<_> = by_document.into_values().collect();
    let mut stream = Seeds::new(0).stream("bootstrap");
    let draw = |_| {
        let (mut targets, mut sum, mut base) = (0usize, 0.0, 0.0);
        for _ in 0..documents.len() {
            let (some, kl, other) = documents[stream.random_range(0..documents.len())];
            targets += some;
            sum += kl;
            base += other;
        }
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let kl = sum / targets.max(1) as f64;
        (kl, if base > 0.0 { sum / base } else { f64::NAN })
    };
    (0..RESAMPLES).map(draw).collect()
}

/// 95 %, by percentiles.
pub(crate) fn interval(values: impl Iterator<Item = f64>) -> [f64; 2] {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    [sorted[RESAMPLES / 40], sorted[RESAMPLES - 1 - RESAMPLES / 40]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_hold_the_mean_and_pairing_takes_common_spread_away() {
        let score = |kl: f64| WindowScore {
            targets: 10,
            kl,
            nll: 20.0,
            teacher_nll: 19.0,
            same_top1: 9.0,
        };
        let reference: Vec<WindowScore> = (0..50).map(|i| score(1.0 + f64::from(i % 7))).collect();
        let own: Vec<WindowScore> = reference.iter().map(|s| score(s.kl * 0.5)).collect();
        let alone: Vec<usize> = (0..50).collect();
        let width = |documents: &[usize]| {
            let resampled = resample(&own, Some(&reference), documents);
            let [lo, hi] = interval(resampled.iter().map(|(_, ratio)| *ratio));
            assert!((lo - 0.5).abs() < 1e-12 && (hi - 0.5).abs() < 1e-12);
            let [lo, hi] = interval(resampled.iter().map(|(kl, _)| *kl));
            assert!(lo < kl(&own) && kl(&own) < hi && hi - lo > 0.01);
            hi - lo
        };
        // Windows of a document that are alike say less than as many that are drawn each for itself.
        let sorted: Vec<usize> = (0..50).map(|i| i % 7).collect();
        assert!(width(&sorted) > 1.5 * width(&alone));
        assert!((top1(&own) - 0.9).abs() < 1e-12 && (perplexity(&own) - 2f64.exp()).abs() < 1e-9);
    }
}
