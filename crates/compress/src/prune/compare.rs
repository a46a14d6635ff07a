//! `cotk compress --compare`: several ways to choose experts at the same ratios, the same calibration tokens and the same
//! code path, judged on the same windows before anything is coded. Law: rows differ by their masks alone; differences
//! are paired window by window.

use std::path::PathBuf;
use std::time::Instant;

use cotk_run::files;
use serde::{Deserialize, Serialize};

use super::experts::Dropped;
use super::gram::Semantics;
use super::mask::Mask;
use super::plan::{Pruned, Wish};
use super::ratios::Spread;
use super::recipe::{PAPER_FIELD, Prune};
use super::search::Method;
pub use crate::contest::judge::TextFigure;
use crate::contest::judge::{Bench, Judges, WindowScore, interval, kl, mean_scores, perplexity, uncompressed};
use crate::decide::Measured;
use crate::partial::{Begun, Entry, Partial};
use crate::pipeline::{Job, Request, Surroundings};
use crate::states::Stream;
use crate::{CompressError, Result};

/// Seeds of a method that draws.
const SEEDS: u64 = 3;

/// What is compared with what, on which texts.
#[derive(Debug, Clone)]
pub struct Compare {
    /// Its `eval_text` is not read: `texts` judge.
    pub request: Request,
    pub rows: Vec<RowWish>,
    /// Shares of experts to drop; each row at each.
    pub ratios: Vec<f64>,
    /// Make up the figure that decides; shown one by one too.
    pub texts: Vec<PathBuf>,
    /// Shown beside it.
    pub second_texts: Vec<PathBuf>,
    /// Of each text, at most, in windows spread over it.
    pub text_tokens: usize,
}

/// One way to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowWish {
    pub method: Method,
    pub spread: Spread,
    /// Whether reception fields choose among three masks per layer.
    pub has_field: bool,
}

impl RowWish {
    /// `reap`, `swap:unequal`, `genetic:equal:field`.
    ///
    /// # Errors
    /// What is not known, and what is.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let method = Method::named(name).ok_or_else(|| {
            let names: Vec<&str> = Method::ALL.iter().map(|method| method.name()).collect();
            format!("`{name}` is not a method: expected one of {}", names.join(", "))
        })?;
        let is_paper = method == Method::Paper;
        let mut wish = Self {
            method,
            spread: if is_paper { Spread::Paper } else { Spread::Equal },
            has_field: is_paper,
        };
        for part in parts {
            match part {
                "equal" => wish.spread = Spread::Equal,
                "unequal" => wish.spread = Spread::Unequal,
                "paper" => wish.spread = Spread::Paper,
                "field" => wish.has_field = true,
                "layers" => wish.has_field = false,
                other => {
                    return Err(format!(
                        "`{other}` in `{text}`: expected equal, unequal, paper, field or layers"
                    ));
                }
            }
        }
        Ok(wish)
    }

    /// All of one ratio by default.
    pub fn usual() -> Vec<Self> {
        [
            "random",
            "frequency",
            "reap",
            "reap-renormalised",
            "energy",
            "single",
            "greedy",
            "swap",
            "genetic",
            "genetic:equal:field",
            "reap:unequal",
            "energy:unequal",
            "greedy:unequal",
            "swap:unequal",
            "genetic:unequal",
            "paper",
        ]
        .iter()
        .map(|text| Self::parse(text).expect("these are known"))
        .collect()
    }

    /// In tables: `genetic unequal field`.
    pub fn name(&self) -> String {
        let field = if self.has_field { " field" } else { "" };
        match (self.method, self.spread) {
            (Method::Paper, Spread::Paper) => format!("paper{field}"),
            (method, spread) => format!("{} {}{field}", method.name(), spread.name()),
        }
    }

    fn seeds(&self) -> u64 {
        match self.method {
            Method::Random => SEEDS,
            // Drawn too, but its swaps end in the same place; one seed a figure, in the recipe.
            _ => 1,
        }
    }
}

/// One row, one ratio, one seed, as the journal keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    pub wish: RowWish,
    pub ratio: f64,
    pub seed: u64,
    pub pruned: Pruned,
    pub search_seconds: f64,
    /// All windows of all texts, in order.
    pub scores: Vec<WindowScore>,
}

/// One line of the table: means over seeds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    pub ratio: f64,
    pub name: String,
    pub seeds: u64,
    /// Over all of [`Compare::texts`].
    pub kl_nats: f64,
    pub kl_ci95: [f64; 2],
    /// KL over that of `reap equal` at this ratio, paired by windows; absent where that is not a row.
    pub kl_ratio: Option<f64>,
    pub kl_ratio_ci95: Option<[f64; 2]>,
    pub perplexity: f64,
    /// Mean over layers of the relative loss on the half of the tokens that chose.
    pub chosen_loss: f64,
    /// On the other half.
    pub loss: f64,
    /// Experts dropped per layer, of the first seed.
    pub dropped: Vec<usize>,
    /// Of all weights, experts as the source stores them.
    pub bytes: u64,
    pub masks_tried: usize,
    pub field_runs: usize,
    pub search_seconds: f64,
    /// Each text, the second ones last.
    pub texts: Vec<TextFigure>,
}

/// The whole table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    pub semantics: Semantics,
    pub calibration_tokens: usize,
    /// Targets that decide.
    pub targets: usize,
    pub windows: usize,
    pub perplexity_before: f64,
    pub bytes_before: u64,
    /// Without any drops, per text.
    pub texts_before: Vec<TextFigure>,
    pub lines: Vec<Line>,
    pub seconds: f64,
    pub peak_rss_bytes: u64,
    pub warnings: Vec<String>,
}

/// Compares; the table also lies in OUT as `comparison.json`.
///
/// # Errors
/// As [`crate::pipeline::compress`]; a text that judges and calibrates; what stays unfinished in `OUT.partial/` is gone on
/// with by the same request.
pub fn compare(compare: &Compare, with: &Surroundings<'_>) -> Result<Comparison> {
    let clock = Instant::now();
    let first = compare.texts.first().cloned();
    let request = Request {
        eval_text: first,
        ..compare.request.clone()
    };
    let job = Job::open(&request, with)?;
    let judges = job.judges(&compare.bench())?;
    let identity = job.identity_with(&compare.identity()?)?;
    let mut partial = match Partial::begin(&request.out, &identity)? {
        Begun::Compared(comparison) => return Ok(*comparison),
        Begun::Working(partial) => *partial,
        Begun::Finished(_) => return Err(CompressError::OutputExists { folder: request.out }),
    };
    let streams = job.streams(&partial);
    job.recover(&mut partial, &streams)?;
    let measured = job.measure(&mut partial, &streams.calibration)?;
    let rows = job.judge(&mut partial, &measured, &judges, compare)?;
    let mut comparison = job.table(compare, &judges, &rows);
    comparison.seconds = clock.elapsed().as_secs_f64();
    comparison.peak_rss_bytes = files::peak_rss_bytes();
    let json = serde_json::to_vec_pretty(&comparison).expect("numbers and strings have a JSON form");
    files::write_atomic(partial.out().join("comparison.json"), &json)?;
    partial.finished(Entry::Compared(Box::new(comparison.clone())))?;
    partial.publish(&request.out)?;
    Ok(comparison)
}

impl Compare {
    fn bench(&self) -> Bench<'_> {
        Bench {
            texts: &self.texts,
            second_texts: &self.second_texts,
            text_tokens: self.text_tokens,
            calibration: &self.request.calibration,
        }
    }

    /// What makes two comparisons the same.
    fn identity(&self) -> Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec(&(&self.rows, &self.ratios)).expect("numbers and names");
        bytes.extend(self.bench().identity()?);
        Ok(bytes)
    }
}

impl Job<'_> {
    fn prune_recipe(&self) -> &Prune {
        let prune = self.request.recipe.compress.prune.as_ref();
        prune.expect("the command gives a comparison its section")
    }

    /// Every row at every ratio; what the journal has is not done again.
    fn judge(
        &self,
        partial: &mut Partial,
        measured: &[Measured],
        judges: &Judges,
        compare: &Compare,
    ) -> Result<Vec<Judged>> {
        let windows = judges.slices();
        let lengths: Vec<usize> = windows.iter().map(|w| w.len()).collect();
        let hidden = self.source.files.spec.hidden;
        let stream = |name| Stream::new(&partial.states(), name, hidden, lengths.clone());
        let (teacher, student) = (stream("judge-teacher"), stream("judge-student"));
        self.embed(&teacher, &windows)?;
        self.walk_under(partial, measured, None, &teacher)?;
        let mut done: Vec<Judged> = partial.judged();
        for &ratio in &compare.ratios {
            for &wish in &compare.rows {
                for seed in 0..wish.seeds() {
                    let is_this = |row: &&Judged| row.wish == wish && row.ratio == ratio && row.seed == seed;
                    if done.iter().any(|row| is_this(&row)) {
                        continue;
                    }
                    let clock = Instant::now();
                    let pruned = match self.prune(partial, measured, &self.wish(wish, ratio, seed)) {
                        // An exhaustive search where there are too many masks is said, not fatal to the others.
                        Err(error @ CompressError::TooManyMasks { .. }) if compare.rows.len() > 1 => {
                            self.with.progress.note(&format!("{} at {ratio}: {error}", wish.name()));
                            continue;
                        }
                        found => found?,
                    };
                    let search_seconds = clock.elapsed().as_secs_f64();
                    let masks =
                        |pruned: &Pruned| -> Vec<Mask> { pruned.layers.iter().map(|l| l.mask.clone()).collect() };
                    let known = done.iter().find(|row| masks(&row.pruned) == masks(&pruned));
                    let scores = match known {
                        Some(row) => row.scores.clone(),
                        None => {
                            self.embed(&student, &windows)?;
                            self.walk_under(partial, measured, Some(&pruned), &student)?;
                            self.score_windows(&windows, &teacher, &student)?
                        }
                    };
                    let row = Judged {
                        wish,
                        ratio,
                        seed,
                        pruned,
                        search_seconds,
                        scores,
                    };
                    partial.finished(Entry::Judged(Box::new(row.clone())))?;
                    done.push(row);
                }
            }
        }
        Ok(done)
    }

    fn wish(&self, row: RowWish, ratio: f64, seed: u64) -> Wish {
        let recipe = &self.request.recipe;
        let prune = self.prune_recipe();
        Wish {
            method: row.method,
            spread: row.spread,
            ratio,
            field_masks: if row.has_field { PAPER_FIELD.get() } else { 1 },
            ..Wish::of(prune, recipe.compress.semantics(), recipe.seed + seed)
        }
    }

    /// A stream through all layers under masks.
    fn walk_under(
        &self,
        partial: &Partial,
        measured: &[Measured],
        pruned: Option<&Pruned>,
        stream: &Stream,
    ) -> Result<()> {
        self.with.progress.begin("judging", self.layers() as u64, "layers");
        let mut moe = measured.iter().enumerate();
        for index in 0..self.layers() {
            let (layer, experts) = self.load_whole(index)?;
            let at = experts.as_ref().and_then(|_| moe.next());
            let survey = match (pruned, at) {
                (Some(pruned), Some((_, found))) if pruned.semantics == Semantics::Novice => {
                    let surveyed = found.prune.as_ref().expect("surveyed before it is judged");
                    Some(self.read_survey(partial, found.layer, surveyed)?)
                }
                _ => None,
            };
            let dropped = pruned.zip(at).map(|(pruned, (at, _))| Dropped {
                mask: &pruned.layers[at].mask,
                semantics: pruned.semantics,
                constants: survey.as_ref().map_or(&[], |survey| &survey.constants),
            });
            self.step_under(&layer, experts.as_ref(), dropped, index, stream, stream)?;
            stream.forget(index);
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        Ok(())
    }

    fn table(&self, compare: &Compare, judges: &Judges, rows: &[Judged]) -> Comparison {
        let deciding = judges.deciding();
        let mut lines = Vec::new();
        for &ratio in &compare.ratios {
            let of = |wish: &RowWish| -> Vec<&Judged> {
                rows.iter()
                    .filter(|row| row.wish == *wish && row.ratio == ratio)
                    .collect()
            };
            let reap = RowWish {
                method: Method::Reap,
                spread: Spread::Equal,
                has_field: false,
            };
            let reference = of(&reap);
            let reference = reference.first().map(|row| row.scores.as_slice());
            for wish in &compare.rows {
                let seeds = of(wish);
                if !seeds.is_empty() {
                    lines.push(self.line(wish, ratio, &seeds, judges, reference));
                }
            }
        }
        let before = uncompressed(rows.first().map_or(&[], |row| &row.scores));
        Comparison {
            semantics: self.request.recipe.compress.semantics(),
            calibration_tokens: self.texts.calibration_tokens(),
            targets: before.iter().take(deciding).map(|s| s.targets).sum(),
            windows: deciding,
            perplexity_before: perplexity(&before[..deciding.min(before.len())]),
            bytes_before: self.source.origin.bytes,
            texts_before: judges.by_text(&before),
            lines,
            seconds: 0.0,
            peak_rss_bytes: 0,
            warnings: self.texts.warnings.clone(),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "counts are small")]
    fn line(
        &self,
        wish: &RowWish,
        ratio: f64,
        seeds: &[&Judged],
        judges: &Judges,
        reference: Option<&[WindowScore]>,
    ) -> Line {
        let deciding = judges.deciding();
        let scores = mean_scores(&seeds.iter().map(|row| row.scores.as_slice()).collect::<Vec<_>>());
        let own = &scores[..deciding];
        let resampled = judges.resample(&scores, reference);
        let layers: Vec<_> = seeds.iter().flat_map(|row| &row.pruned.layers).collect();
        let mean = |of: &dyn Fn(&super::plan::PrunedLayer) -> f64| {
            layers.iter().map(|layer| of(layer)).sum::<f64>() / layers.len().max(1) as f64
        };
        let dropped: Vec<usize> = seeds[0].pruned.layers.iter().map(|layer| layer.mask.count()).collect();
        let experts = self.source.files.spec.routing.experts * dropped.len();
        let gone = dropped.iter().sum::<usize>() as u64;
        let kl_nats = kl(own);
        let kl_ratio = reference.map(|reference| kl_nats / kl(&reference[..deciding]));
        Line {
            ratio,
            name: wish.name(),
            seeds: seeds.len() as u64,
            kl_nats,
            kl_ci95: interval(resampled.iter().map(|(kl, _)| *kl)),
            kl_ratio_ci95: kl_ratio.map(|_| interval(resampled.iter().map(|(_, ratio)| *ratio))),
            kl_ratio,
            perplexity: perplexity(own),
            chosen_loss: mean(&|layer| layer.chosen_loss),
            loss: mean(&|layer| layer.loss),
            bytes: self.source.origin.bytes - self.source.origin.expert_bytes * gone / experts.max(1) as u64,
            dropped,
            masks_tried: seeds[0].pruned.layers.iter().map(|layer| layer.tried).sum(),
            field_runs: seeds[0].pruned.field_runs,
            search_seconds: seeds.iter().map(|row| row.search_seconds).sum::<f64>() / seeds.len() as f64,
            texts: judges.by_text(&scores),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_spelled_as_they_are_named() {
        for (text, name) in [
            ("reap", "reap equal"),
            ("swap:unequal", "swap unequal"),
            ("genetic:equal:field", "genetic equal field"),
            ("paper", "paper field"),
            ("paper:layers", "paper"),
        ] {
            assert_eq!(RowWish::parse(text).unwrap().name(), name);
        }
        for (text, wanted) in [
            ("reep", "expected one of"),
            ("reap:even", "`even`"),
            ("", "not a method"),
        ] {
            assert!(RowWish::parse(text).unwrap_err().contains(wanted), "{text}");
        }
        assert!(RowWish::usual().len() > 10);
    }
}
