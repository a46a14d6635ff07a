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
use super::plan::{Pruned, PrunedLayer, Wish};
use super::recipe::{PAPER_FIELD, Prune};
pub use super::rows::RowWish;
use crate::attention::refuse_beside_comparison;
pub use crate::contest::judge::TextFigure;
use crate::contest::judge::{Bench, Judges, WindowScore, interval, kl, mean_scores, perplexity, uncompressed};
use crate::decide::Measured;
use crate::heal::HealOptions;
use crate::partial::{Begun, Entry, Partial};
use crate::pipeline::{Job, Request, Surroundings};
use crate::shrink::judge::{MULTIPLE, Steps};
use crate::shrink::plan::Way;
use crate::shrink::slim::Slim;
use crate::states::Stream;
use crate::{CompressError, Result};

/// What is compared with what, on which texts.
#[derive(Debug, Clone)]
pub struct Compare {
    /// Its `eval_text` is not read: `texts` judge.
    pub request: Request,
    pub rows: Vec<RowWish>,
    /// Shares of the experts' weights to take away; each row at each.
    pub ratios: Vec<f64>,
    /// Make up the figure that decides; shown one by one too.
    pub texts: Vec<PathBuf>,
    /// Shown beside it.
    pub second_texts: Vec<PathBuf>,
    /// Of each text, at most, in windows spread over it.
    pub text_tokens: usize,
}

/// One row, one ratio, one seed, as the journal keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    pub wish: RowWish,
    pub ratio: f64,
    pub seed: u64,
    pub pruned: Pruned,
    /// What becomes of each expert of each layer, where not all that stay are whole.
    #[serde(default)]
    pub plan: Option<Vec<Vec<Slim>>>,
    /// What healing did to each layer.
    #[serde(default)]
    pub steps: Steps,
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
    /// KL over that of `reap equal` at this ratio, healed as this one is, paired by windows; absent where that is not a row.
    pub kl_ratio: Option<f64>,
    pub kl_ratio_ci95: Option<[f64; 2]>,
    /// The same over MoE-I²'s own settings (`paper field`), healed as this one is.
    pub kl_of_paper: Option<f64>,
    pub kl_of_paper_ci95: Option<[f64; 2]>,
    /// Share of the experts' weights that is gone.
    pub gone: f64,
    /// Layers whose healing was kept on held-out tokens: down projections, scales, router.
    pub healed: Option<[usize; 3]>,
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
    refuse_beside_comparison(&compare.request.recipe)?;
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
        Begun::Finished(_) | Begun::Stood(_) => return Err(CompressError::OutputExists { folder: request.out }),
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
        let shrinking = if compare.rows.iter().any(RowWish::needs_tokens) {
            let whole = self.whole_stream(partial, &self.calibration_windows())?;
            let is_smaller = compare.rows.iter().any(|row| row.way != Way::Whole);
            let surveys = if is_smaller {
                self.shrink_surveys(partial, measured, &whole)?
            } else {
                Vec::new()
            };
            Some((whole, surveys))
        } else {
            None
        };
        let mut done: Vec<Judged> = partial.judged();
        for &ratio in &compare.ratios {
            for &wish in &compare.rows {
                for seed in 0..wish.seeds() {
                    let is_this = |row: &&Judged| row.wish == wish && row.ratio == ratio && row.seed == seed;
                    if done.iter().any(|row| is_this(&row)) {
                        continue;
                    }
                    let clock = Instant::now();
                    let chosen = match self.pruned(partial, measured, wish, ratio, seed) {
                        // An exhaustive search where there are too many masks is said, not fatal to the others.
                        Err(error @ CompressError::TooManyMasks { .. }) if compare.rows.len() > 1 => {
                            self.with.progress.note(&format!("{} at {ratio}: {error}", wish.name()));
                            continue;
                        }
                        found => found?,
                    };
                    let mut row = Judged {
                        wish,
                        ratio,
                        seed,
                        pruned: chosen,
                        plan: None,
                        steps: Vec::new(),
                        search_seconds: 0.0,
                        scores: Vec::new(),
                    };
                    if let (Some((whole, surveys)), true) = (&shrinking, wish.needs_tokens()) {
                        let how = (wish.way, wish.spread, MULTIPLE);
                        let much = (ratio, self.prune_recipe().end_tokens.get());
                        let plan = self.shrink_plan(partial, measured, surveys, whole, how, &row.pruned, much)?;
                        row.search_seconds = clock.elapsed().as_secs_f64();
                        self.embed(&student, &windows)?;
                        let healing = wish.is_healed.then(|| HealOptions {
                            router: wish.has_router,
                            ..HealOptions::default()
                        });
                        let built = (&row.pruned, plan.as_slice());
                        row.steps = self.walk_slim(partial, measured, whole, built, healing.as_ref(), &student)?;
                        row.plan = Some(plan);
                        row.scores = self.score_windows(&windows, &teacher, &student)?;
                    } else {
                        row.search_seconds = clock.elapsed().as_secs_f64();
                        let masks =
                            |pruned: &Pruned| -> Vec<Mask> { pruned.layers.iter().map(|l| l.mask.clone()).collect() };
                        let is_known =
                            |known: &&Judged| known.plan.is_none() && masks(&known.pruned) == masks(&row.pruned);
                        row.scores = match done.iter().find(is_known) {
                            Some(known) => known.scores.clone(),
                            None => {
                                self.embed(&student, &windows)?;
                                self.walk_under(partial, measured, Some(&row.pruned), &student)?;
                                self.score_windows(&windows, &teacher, &student)?
                            }
                        };
                    }
                    partial.finished(Entry::Judged(Box::new(row.clone())))?;
                    done.push(row);
                }
            }
        }
        Ok(done)
    }

    /// Which experts a row drops: none, half of what goes, or all of it.
    fn pruned(
        &self,
        partial: &mut Partial,
        measured: &[Measured],
        row: RowWish,
        ratio: f64,
        seed: u64,
    ) -> Result<Pruned> {
        let (recipe, prune) = (&self.request.recipe, self.prune_recipe());
        let wish = Wish {
            method: row.method,
            spread: row.spread,
            ratio: match (row.way, row.has_both) {
                (Way::Whole, _) => ratio,
                (_, true) => 0.5 * ratio,
                (_, false) => 0.0,
            },
            field_masks: if row.has_field { PAPER_FIELD.get() } else { 1 },
            ..Wish::of(prune, recipe.compress.semantics(), recipe.seed + seed)
        };
        if wish.ratio > 0.0 {
            return self.prune(partial, measured, &wish);
        }
        let experts = self.source.files.spec.routing.experts;
        let layer = |measured: &Measured| PrunedLayer {
            layer: measured.layer,
            mask: Mask::none(experts),
            chosen_loss: 0.0,
            loss: 0.0,
            tried: 0,
            kl_per_loss: None,
        };
        Ok(Pruned {
            method: wish.method,
            semantics: wish.semantics,
            spread: wish.spread,
            layers: measured.iter().map(layer).collect(),
            field_runs: 0,
        })
    }

    /// Share of the experts' weights that a row takes away.
    #[expect(clippy::cast_precision_loss, reason = "weights are far below 2^53")]
    fn gone(&self, row: &Judged) -> f64 {
        let spec = &self.source.files.spec;
        let whole = 3 * spec.hidden * spec.moe_intermediate;
        let all = whole * spec.routing.experts * row.pruned.layers.len();
        let left: usize = match &row.plan {
            Some(plan) => (plan.iter().flatten())
                .map(|slim| slim.weights(spec.hidden, spec.moe_intermediate))
                .sum(),
            None => row
                .pruned
                .layers
                .iter()
                .map(|layer| layer.mask.kept().len() * whole)
                .sum(),
        };
        1.0 - left as f64 / all.max(1) as f64
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
            let like = |text: &str, wish: &RowWish| RowWish {
                is_healed: wish.is_healed,
                has_router: wish.has_router,
                ..RowWish::parse(text).expect("this row is known")
            };
            let scores =
                |wish: RowWish| -> Option<Vec<WindowScore>> { of(&wish).first().map(|row| row.scores.clone()) };
            for wish in &compare.rows {
                let seeds = of(wish);
                if !seeds.is_empty() {
                    let references = [scores(like("reap", wish)), scores(like("paper", wish))];
                    lines.push(self.line(wish, ratio, &seeds, judges, &references));
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

    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counts are small, bytes far below 2^53"
    )]
    fn line(
        &self,
        wish: &RowWish,
        ratio: f64,
        seeds: &[&Judged],
        judges: &Judges,
        references: &[Option<Vec<WindowScore>>; 2],
    ) -> Line {
        let deciding = judges.deciding();
        let scores = mean_scores(&seeds.iter().map(|row| row.scores.as_slice()).collect::<Vec<_>>());
        let own = &scores[..deciding];
        let compared = references.each_ref().map(|reference| {
            let reference = reference.as_deref()?;
            let ratios = judges
                .resample(&scores, Some(reference))
                .into_iter()
                .map(|(_, ratio)| ratio);
            Some((kl(own) / kl(&reference[..deciding]), interval(ratios)))
        });
        let [reap, paper] = compared;
        let resampled = judges.resample(&scores, None);
        let layers: Vec<_> = seeds.iter().flat_map(|row| &row.pruned.layers).collect();
        let mean = |of: &dyn Fn(&super::plan::PrunedLayer) -> f64| {
            layers.iter().map(|layer| of(layer)).sum::<f64>() / layers.len().max(1) as f64
        };
        let dropped: Vec<usize> = seeds[0].pruned.layers.iter().map(|layer| layer.mask.count()).collect();
        let gone = self.gone(seeds[0]);
        let kept = |name: &str| {
            let steps = seeds[0].steps.iter().flatten();
            steps.filter(|step| step.name == name && step.is_kept).count()
        };
        Line {
            ratio,
            name: wish.name(),
            seeds: seeds.len() as u64,
            kl_nats: kl(own),
            kl_ci95: interval(resampled.iter().map(|(kl, _)| *kl)),
            kl_ratio: reap.map(|(ratio, _)| ratio),
            kl_ratio_ci95: reap.map(|(_, interval)| interval),
            kl_of_paper: paper.map(|(ratio, _)| ratio),
            kl_of_paper_ci95: paper.map(|(_, interval)| interval),
            gone,
            healed: wish.is_healed.then(|| [kept("down"), kept("scales"), kept("router")]),
            perplexity: perplexity(own),
            chosen_loss: mean(&|layer| layer.chosen_loss),
            loss: mean(&|layer| layer.loss),
            bytes: self.source.origin.bytes - (self.source.origin.expert_bytes as f64 * gone).round() as u64,
            dropped,
            masks_tried: seeds[0].pruned.layers.iter().map(|layer| layer.tried).sum(),
            field_runs: seeds[0].pruned.field_runs,
            search_seconds: seeds.iter().map(|row| row.search_seconds).sum::<f64>() / seeds.len() as f64,
            texts: judges.by_text(&scores),
        }
    }
}
