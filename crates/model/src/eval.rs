//! Quality on a text: perplexity by sliding windows, KL divergence and top-1 agreement against another model.
//! Laws: every target is scored once; sums run in the order of the text, whatever the threads.

use std::ops::Range;
use std::time::Instant;

use cotk_run::cancel::Cancel;
use cotk_run::progress::Progress;
use cotk_run::units::LayerId;
use rayon::prelude::*;

use crate::ModelError;
use crate::generate::MoeTotals;
use crate::layers::router::{argmax, log_sum_exp};
use crate::model::{Hidden, Model, Sequence};
use crate::moe::{Mode, MoeRecord};

/// Tokens of one forward pass: windows are batched up to it, so that experts see many tokens at once.
const BATCH_TOKENS: usize = 4096;
/// Rows whose logits are in memory at once, per model.
const LOGIT_ROWS: usize = 512;
/// Consecutive targets of one block of the confidence interval.
const BLOCK_TARGETS: usize = 256;

/// How a text is scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvalOptions {
    /// Tokens that a target sees at most; `None`: the context, at most 1,024.
    pub window: Option<usize>,
    /// How far the window moves; `None`: half of it.
    pub stride: Option<usize>,
    /// Put before the text.
    pub bos: Option<u32>,
    /// Targets scored at most.
    pub max_tokens: Option<usize>,
    /// Of the model; a reference runs [`Mode::Exact`].
    pub mode: Mode,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            window: None,
            stride: None,
            bos: None,
            max_tokens: None,
            mode: Mode::Exact,
        }
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Targets scored.
    pub tokens: usize,
    pub window: usize,
    pub stride: usize,
    /// Mean over targets.
    pub nll_nats: f64,
    /// exp(nll).
    pub perplexity: f64,
    pub perplexity_ci95: [f64; 2],
    /// Share of targets that are the most likely token.
    pub top1_accuracy: f64,
    pub reference: Option<Divergence>,
    pub low_bit_fraction: f64,
    pub skipped_mass: f64,
    pub seconds: f64,
}

/// Against the reference model, on the same positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    /// Mean KL(reference ‖ model).
    pub kl_nats: f64,
    pub kl_ci95: [f64; 2],
    /// Share of positions where both have the same most likely token.
    pub top1_agreement: f64,
    /// Perplexity of the reference itself.
    pub perplexity: f64,
    /// Share of the reference's choices of experts, over (token, layer), that the model chose too. `None`: the two
    /// have other layers or other numbers of experts, or none.
    pub routing_overlap: Option<f64>,
}

/// One window: positions of the tokens that go in, and of those whose next token is scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    pub inputs: Range<usize>,
    pub scored: Range<usize>,
}

/// Windows over `count` tokens, of which the last `count − 1` are targets: each is scored once, in the first window
/// that reaches it.
pub fn windows(count: usize, window: usize, stride: usize) -> Vec<Window> {
    let targets = count.saturating_sub(1);
    let mut windows = Vec::new();
    let (mut start, mut done) = (0, 0);
    while done < targets {
        let end = targets.min(start + window);
        windows.push(Window {
            inputs: start..end,
            scored: done..end,
        });
        done = end;
        start += stride;
    }
    windows
}

/// Scores `tokens` (without BOS) under `model`, and against `reference` if there is one.
///
/// # Errors
/// A text of fewer than two targets, a window that does not fit, a reference of another vocabulary, what the
/// runtimes refuse, [`cotk_run::Error::Cancelled`].
pub fn evaluate(
    model: &Model,
    tokens: &[u32],
    options: &EvalOptions,
    reference: Option<&Model>,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Evaluation, ModelError> {
    let (window, stride) = check(model, options, reference)?;
    let mut ids: Vec<u32> = options.bos.into_iter().chain(tokens.iter().copied()).collect();
    if let Some(limit) = options.max_tokens {
        ids.truncate(limit.saturating_add(1));
    }
    if ids.len() < 3 {
        return Err(ModelError::Setting {
            what: "tokens of the text",
            found: ids.len().to_string(),
            expected: "at least 3".into(),
        });
    }

    let clock = Instant::now();
    let windows = windows(ids.len(), window, stride);
    progress.begin("evaluating", (ids.len() - 1) as u64, "tokens");
    let mut targets: Vec<Target> = Vec::with_capacity(ids.len() - 1);
    let mut totals = MoeTotals::default();
    let mut overlap = Overlap::default();
    for batch in windows.chunks((BATCH_TOKENS / window).max(1)) {
        cancel.check()?;
        let Hidden { states, records } = scored_states(model, &ids, batch, options.mode)?;
        totals.add(&records);
        let truth = match reference {
            None => None,
            Some(reference) => {
                let truth = scored_states(reference, &ids, batch, Mode::Exact)?;
                overlap.add(&records, &truth.records);
                Some((reference, truth.states))
            }
        };
        let nexts: Vec<u32> = batch
            .iter()
            .flat_map(|w| &ids[w.scored.start + 1..=w.scored.end])
            .copied()
            .collect();
        for (chunk, next) in nexts.chunks(LOGIT_ROWS).enumerate() {
            let rows = chunk * LOGIT_ROWS..chunk * LOGIT_ROWS + next.len();
            let logits = logits_of(model, &states, &rows);
            let truth = truth.as_ref().map(|(model, states)| logits_of(model, states, &rows));
            targets.extend(score(&logits, truth.as_deref(), next, model.spec().vocab));
        }
        progress.advance(nexts.len() as u64);
    }
    progress.end();
    let mut found = summary(&targets, window, stride, &totals, clock.elapsed().as_secs_f64());
    if let (Some(divergence), Some(reference)) = (&mut found.reference, reference)
        && reference.spec().moe_layers() == model.spec().moe_layers()
        && reference.spec().routing.experts == model.spec().routing.experts
    {
        divergence.routing_overlap = overlap.fraction();
    }
    Ok(found)
}

fn check(model: &Model, options: &EvalOptions, reference: Option<&Model>) -> Result<(usize, usize), ModelError> {
    let setting = |what, found: usize, expected: String| {
        Err(ModelError::Setting {
            what,
            found: found.to_string(),
            expected,
        })
    };
    let context = model
        .spec()
        .context
        .min(reference.map_or(usize::MAX, |r| r.spec().context));
    let window = options.window.unwrap_or(context.min(1024));
    if window == 0 || window > context {
        return setting("window", window, format!("1 to {context}, the context"));
    }
    let stride = options.stride.unwrap_or((window / 2).max(1));
    if stride == 0 || stride > window {
        return setting("stride", stride, format!("1 to {window}, the window"));
    }
    if let Some(reference) = reference
        && reference.spec().vocab != model.spec().vocab
    {
        return setting(
            "vocabulary of the reference",
            reference.spec().vocab,
            format!("{}, that of the model", model.spec().vocab),
        );
    }
    Ok((window, stride))
}

/// Hidden states of the scored positions of a batch of windows, `[scored, hidden]`, and what was done for them.
fn scored_states(model: &Model, ids: &[u32], batch: &[Window], mode: Mode) -> Result<Hidden, ModelError> {
    let mut caches: Vec<_> = batch.iter().map(|_| model.new_cache()).collect();
    let mut sequences: Vec<Sequence<'_>> = batch
        .iter()
        .zip(&mut caches)
        .map(|(window, cache)| Sequence {
            tokens: &ids[window.inputs.clone()],
            cache,
        })
        .collect();
    let all = model.hidden(&mut sequences, mode)?;
    let width = model.spec().hidden;
    let mut rows = Vec::with_capacity(batch.len());
    let mut row = 0;
    for Window { inputs, scored } in batch {
        let from = row + (scored.start - inputs.start);
        row += inputs.len();
        rows.push(from..row);
    }
    let states = rows.iter().flat_map(|r| &all.states[r.start * width..r.end * width]);
    let of_scored = |record: &MoeRecord| MoeRecord {
        slots: record.slots,
        uses: (rows.iter())
            .flat_map(|r| &record.uses[r.start * record.slots..r.end * record.slots])
            .copied()
            .collect(),
    };
    Ok(Hidden {
        states: states.copied().collect(),
        records: all
            .records
            .iter()
            .map(|(layer, record)| (*layer, of_scored(record)))
            .collect(),
    })
}

/// Counts choices of experts that two models share, layer by layer and token by token.
#[derive(Debug, Default)]
struct Overlap {
    shared: usize,
    of: usize,
}

impl Overlap {
    /// Records of the same tokens by both.
    fn add(&mut self, model: &[(LayerId, MoeRecord)], truth: &[(LayerId, MoeRecord)]) {
        for ((layer, model), (truth_layer, truth)) in model.iter().zip(truth) {
            if layer != truth_layer || model.slots == 0 || truth.slots == 0 {
                continue;
            }
            for (model, truth) in model.uses.chunks(model.slots).zip(truth.uses.chunks(truth.slots)) {
                self.of += truth.len();
                self.shared += (truth.iter())
                    .filter(|t| model.iter().any(|m| m.expert == t.expert))
                    .count();
            }
        }
    }

    fn fraction(&self) -> Option<f64> {
        (self.of > 0).then(|| fraction(self.shared, self.of))
    }
}

fn logits_of(model: &Model, states: &[f32], rows: &Range<usize>) -> Vec<f32> {
    let width = model.spec().hidden;
    model.logits(&states[rows.start * width..rows.end * width])
}

/// One scored position. [`score`] makes them, [`summary`] sums them up.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    nll: f64,
    is_top1: bool,
    truth: Option<Truth>,
}

impl Target {
    /// −ln of the probability of the token that came, nats.
    pub fn nll_nats(&self) -> f64 {
        self.nll
    }

    /// KL(reference ‖ model) at this position, nats; `None` without a reference.
    pub fn kl_nats(&self) -> Option<f64> {
        self.truth.map(|truth| truth.kl)
    }

    /// Whether the reference's most likely token is the model's, too; false without a reference.
    pub fn is_same_top1(&self) -> bool {
        self.truth.is_some_and(|truth| truth.is_same_top1)
    }
}

#[derive(Debug, Clone, Copy)]
struct Truth {
    nll: f64,
    kl: f64,
    is_same_top1: bool,
}

/// Scores rows of logits `[rows, vocab]` against the tokens that came next, and against the logits of a reference.
pub fn score(logits: &[f32], truth: Option<&[f32]>, next: &[u32], vocab: usize) -> Vec<Target> {
    (0..next.len())
        .into_par_iter()
        .map(|row| {
            let of = |all: &[f32]| all[row * vocab..][..vocab].to_vec();
            let (model, next) = (of(logits), next[row] as usize);
            let norm = log_sum_exp(&model);
            let best = argmax(&model);
            Target {
                nll: norm - f64::from(model[next]),
                is_top1: best == next,
                truth: truth.map(|truth| {
                    let truth = of(truth);
                    let truth_norm = log_sum_exp(&truth);
                    Truth {
                        nll: truth_norm - f64::from(truth[next]),
                        kl: kl(&truth, truth_norm, &model, norm),
                        is_same_top1: argmax(&truth) == best,
                    }
                }),
            }
        })
        .collect()
}

/// KL(p ‖ q) of two rows of logits with their log-sum-exps. Not below 0 but for rounding, which is cut off.
fn kl(p: &[f32], p_norm: f64, q: &[f32], q_norm: f64) -> f64 {
    let sum: f64 = p
        .iter()
        .zip(q)
        .map(|(&p, &q)| {
            let log_p = f64::from(p) - p_norm;
            #[expect(clippy::cast_possible_truncation, reason = "a probability needs no f64 exp")]
            let weight = f64::from((log_p as f32).exp());
            weight * (log_p - (f64::from(q) - q_norm))
        })
        .sum();
    sum.max(0.0)
}

/// Means and intervals over all targets of a text, in its order.
pub fn summary(targets: &[Target], window: usize, stride: usize, totals: &MoeTotals, seconds: f64) -> Evaluation {
    let share = |is: &dyn Fn(&Target) -> bool| fraction(targets.iter().filter(|t| is(t)).count(), targets.len());
    let (nll_nats, half) = mean_with_ci95(targets.iter().map(|t| t.nll));
    let truths: Vec<Truth> = targets.iter().filter_map(|t| t.truth).collect();
    let reference = (!truths.is_empty()).then(|| {
        let (kl_nats, half) = mean_with_ci95(truths.iter().map(|t| t.kl));
        Divergence {
            kl_nats,
            kl_ci95: [(kl_nats - half).max(0.0), kl_nats + half],
            top1_agreement: fraction(truths.iter().filter(|t| t.is_same_top1).count(), truths.len()),
            perplexity: mean_with_ci95(truths.iter().map(|t| t.nll)).0.exp(),
            routing_overlap: None,
        }
    });
    Evaluation {
        tokens: targets.len(),
        window,
        stride,
        nll_nats,
        perplexity: nll_nats.exp(),
        perplexity_ci95: [(nll_nats - half).exp(), (nll_nats + half).exp()],
        top1_accuracy: share(&|t| t.is_top1),
        reference,
        low_bit_fraction: totals.low_bit_fraction(),
        skipped_mass: totals.skipped_mass(),
        seconds,
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn fraction(count: usize, of: usize) -> f64 {
    count as f64 / of as f64
}

/// Mean and half width of its 95 % interval, by batch means: neighbours of a text are not independent, blocks of
/// 256 nearly are. Short texts get at least two smaller blocks.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
pub fn mean_with_ci95(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let values: Vec<f64> = values.collect();
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let block = BLOCK_TARGETS.min(values.len().div_ceil(8)).max(1);
    let blocks = values.chunks(block).len() as f64;
    if blocks < 2.0 {
        return (mean, f64::INFINITY);
    }
    // Ratio estimator: the last block may be shorter.
    let square = |x: f64| x * x;
    let spread: f64 = values
        .chunks(block)
        .map(|b| square(b.iter().sum::<f64>() - mean * b.len() as f64))
        .sum();
    let error = (spread * blocks / (blocks - 1.0)).sqrt() / count;
    // Student's t at 0.975 by Cornish–Fisher (Abramowitz and Stegun, 26.7.5), two terms.
    let (z, df) = (1.959_964, blocks - 1.0);
    let z3 = z * z * z;
    let t = z + (z3 + z) / (4.0 * df) + (5.0 * z3 * z * z + 16.0 * z3 + 3.0 * z) / (96.0 * df * df);
    (mean, t * error)
}

#[cfg(test)]
mod tests {
    use cotk_run::seeds::Seeds;
    use cotk_run::units::ExpertId;
    use proptest::prelude::*;
    use rand::RngExt;

    use super::*;
    use crate::moe::{ExpertUse, Precision};

    proptest! {
        /// Law: every target is scored once, none sees more than a window, and all but the first see half or more.
        #[test]
        fn every_target_is_scored_once(count in 0usize..300, window in 1usize..50, part in 1usize..50) {
            let stride = part.min(window);
            let mut next = 0;
            for (index, w) in windows(count, window, stride).into_iter().enumerate() {
                prop_assert_eq!(w.scored.start, next);
                prop_assert!(!w.scored.is_empty() && w.inputs.len() <= window);
                prop_assert!(w.inputs.start <= w.scored.start && w.inputs.end == w.scored.end);
                prop_assert!(index == 0 || w.scored.start - w.inputs.start >= window - stride);
                next = w.scored.end;
            }
            prop_assert_eq!(next, count.saturating_sub(1));
        }

        /// Law: KL is 0 for equal rows, whatever is added to all logits, and positive otherwise.
        #[test]
        fn kl_is_a_divergence(p in proptest::collection::vec(-5.0f32..5.0, 2..30), shift in -3.0f32..3.0) {
            let shifted: Vec<f32> = p.iter().map(|x| x + shift).collect();
            let of = |p: &[f32], q: &[f32]| kl(p, log_sum_exp(p), q, log_sum_exp(q));
            prop_assert!(of(&p, &shifted) < 1e-5);
            let mut other = p.clone();
            other[0] += 1.0;
            prop_assert!(of(&p, &other) > 0.0);
        }
    }

    #[test]
    fn overlap_counts_the_choices_of_the_reference_that_both_made() {
        let record = |slots: usize, experts: &[u32]| {
            let uses = experts.iter().map(|&expert| ExpertUse {
                expert: ExpertId(expert),
                gate: 1.0,
                bits: 32,
                precision: Precision::Full,
            });
            vec![(
                LayerId(0),
                MoeRecord {
                    slots,
                    uses: uses.collect(),
                },
            )]
        };
        let mut overlap = Overlap::default();
        assert_eq!(overlap.fraction(), None);
        overlap.add(&record(2, &[0, 1, 2, 3]), &record(2, &[1, 0, 3, 4]));
        assert_eq!(overlap.fraction(), Some(0.75));
        // A model with one expert left can share one of two choices at most.
        let mut fewer = Overlap::default();
        fewer.add(&record(1, &[5, 5]), &record(2, &[5, 1, 2, 3]));
        assert_eq!(fewer.fraction(), Some(0.25));
    }

    #[test]
    fn the_interval_covers_the_mean_about_95_times_in_100() {
        let mut stream = Seeds::new(1).stream("ci");
        let covered = (0..400)
            .filter(|_| {
                let (mean, half) = mean_with_ci95((0..3000).map(|_| stream.random::<f64>()));
                (mean - 0.5).abs() <= half
            })
            .count();
        assert!((360..=396).contains(&covered), "{covered} of 400");
    }
}
