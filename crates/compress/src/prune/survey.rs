//! What pruning wants to know of a layer, in one walk of the uncompressed stream through it: how each expert is used and
//! what it adds, its mean answer, and Gram samples of two disjoint halves of the calibration windows. One half chooses
//! masks, the other says what they lose. Law: neither batches nor threads change a byte.

use cotk_model::layers::Layer;
use cotk_model::moe::{Routed, RoutingRule, route};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::experts::{Answers, Experts};
use super::gram::{Gram, Tokens};
use crate::Result;
use crate::pipeline::Job;
use crate::states::{Stream, attend};
use crate::walk::add;

/// Tokens whose state is this many times the median's norm or more are attention sinks: they would own the loss.
const SINK_TIMES: f64 = 20.0;

/// What one expert does, over the calibration tokens that choose it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpertScores {
    pub tokens: u64,
    /// Σ g.
    pub gate: f64,
    /// Σ g ‖y‖: over `tokens`, REAP's score (CerebrasResearch/reap, gates as the router gives them).
    pub gated_norm: f64,
    /// Σ g' ‖y‖ with g' = g over the sum of the token's chosen gates: REAP as published in 2026.
    pub renormalised_norm: f64,
    /// Σ w g² ‖y‖², w = 1 / mean square of the layer's output state.
    pub energy: f64,
    /// Largest ‖y‖.
    pub largest_norm: f64,
}

/// Of a layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Survey {
    pub(crate) scores: Vec<ExpertScores>,
    /// Chooses.
    pub(crate) choose: Gram,
    /// Reports.
    pub(crate) report: Gram,
    /// Mean answer of each expert weighted by squared gates, `[experts, hidden]`; 0 where nothing came.
    pub(crate) constants: Vec<f32>,
}

/// Which tokens of a stream are sampled, by half: positions in stream order, ascending.
pub(crate) fn sampled(windows: &[usize], tokens_per_half: usize) -> [Vec<usize>; 2] {
    // The first token of a window is where attention sinks; windows are spread over the text already.
    let mut halves = [Vec::new(), Vec::new()];
    let mut start = 0;
    for (index, &window) in windows.iter().enumerate() {
        halves[index % 2].extend(start + 1..start + window.max(1));
        start += window;
    }
    halves.map(|all| {
        let count = tokens_per_half.min(all.len());
        (0..count).map(|i| all[(2 * i + 1) * all.len() / (2 * count)]).collect()
    })
}

/// Rows of the sampled tokens.
#[derive(Default)]
struct Rows {
    /// `[tokens, hidden]`, as experts see them.
    normed: Vec<f32>,
    /// `[tokens, experts]`.
    scores: Vec<f32>,
    weights: Vec<f64>,
}

/// Sums over the stream.
struct Sums {
    scores: Vec<ExpertScores>,
    /// Σ g² y, `[experts][hidden]`, and Σ g².
    answers: Vec<(Vec<f64>, f64)>,
}

impl Job<'_> {
    /// Walks the stream through one MoE layer (its states behind the layer are written too) and gathers.
    pub(crate) fn survey(
        &self,
        layer: &Layer,
        experts: &Experts,
        stream: &Stream,
        index: usize,
        tokens_per_half: usize,
    ) -> Result<Survey> {
        let spec = &self.source.files.spec;
        let (hidden, count) = (spec.hidden, spec.routing.experts);
        let halves = sampled(stream.windows(), tokens_per_half);
        let mut rows = [Rows::default(), Rows::default()];
        let mut mean_squares: Vec<f64> = Vec::with_capacity(stream.tokens());
        let mut bias = Vec::new();
        let mut sums = Sums {
            scores: vec![ExpertScores::default(); count],
            answers: vec![(vec![0.0; hidden], 0.0); count],
        };
        stream.step(index, self.with.cancel, |states, windows| {
            attend(spec, &self.rope, layer, states, windows);
            let normed = layer.mixer_input(states);
            let scores = layer.router_scores(&normed).expect("a MoE layer has a router");
            let router = layer.routing(&scores)?;
            let routed = route(&router, cotk_model::moe::Alive::All);
            if bias.is_empty() {
                bias.extend_from_slice(router.bias());
            }
            let answers = experts.answers(&routed, &normed, None);
            add(states, &experts.mixed(&routed, &answers, normed.len() / hidden));
            layer.add_dense(&normed, states);

            let first = mean_squares.len();
            let tokens = normed.len() / hidden;
            mean_squares.extend(states.chunks_exact(hidden).map(mean_square));
            let weights: Vec<f64> = mean_squares[first..].iter().map(|&square| weight(square)).collect();
            sums.add(&routed, &answers, &weights, hidden);
            for (rows, half) in rows.iter_mut().zip(&halves) {
                let from = half.partition_point(|&token| token < first);
                for &token in half[from..].iter().take_while(|&&token| token < first + tokens) {
                    let at = token - first;
                    rows.normed.extend_from_slice(&normed[at * hidden..][..hidden]);
                    rows.scores.extend_from_slice(&scores[at * count..][..count]);
                    rows.weights.push(weights[at]);
                }
            }
            Ok(())
        })?;
        let limit = sink_limit(&mean_squares);
        let constants = sums.constants();
        let gram = |rows: Rows| {
            self.gram(
                rows.without_sinks(limit, hidden, count),
                spec.routing,
                &bias,
                &constants,
                experts,
            )
        };
        let [choose, report] = rows.map(gram);
        Ok(Survey {
            choose: choose?,
            report: report?,
            scores: sums.scores,
            constants,
        })
    }

    fn gram(&self, rows: Rows, rule: RoutingRule, bias: &[f32], constants: &[f32], experts: &Experts) -> Result<Gram> {
        let tokens = Tokens {
            rule,
            bias,
            scores: &rows.scores,
            weights: &rows.weights,
        };
        Gram::build(&tokens, constants, experts.hidden, |from, to| {
            self.with.cancel.check()?;
            let block = &rows.normed[from * experts.hidden..to * experts.hidden];
            Ok(experts.mlps.par_iter().map(|mlp| mlp.apply(block)).collect())
        })
    }
}

impl Rows {
    /// Weights say how large a token's state is: sinks have the least.
    fn without_sinks(self, limit: f64, hidden: usize, experts: usize) -> Self {
        let stays: Vec<bool> = self.weights.iter().map(|&w| w > weight(limit)).collect();
        fn of<T: Copy>(values: &[T], width: usize, stays: &[bool]) -> Vec<T> {
            let rows = values.chunks_exact(width).zip(stays);
            rows.filter(|(_, stays)| **stays)
                .flat_map(|(row, _)| row.iter().copied())
                .collect()
        }
        Self {
            normed: of(&self.normed, hidden, &stays),
            scores: of(&self.scores, experts, &stays),
            weights: of(&self.weights, 1, &stays),
        }
    }
}

impl Sums {
    /// Experts side by side, each over its tokens in order.
    fn add(&mut self, routed: &Routed, answers: &[Answers], weights: &[f64], hidden: usize) {
        let chosen: Vec<f64> = routed
            .gates
            .chunks_exact(routed.slots)
            .map(|gates| gates.iter().map(|&g| f64::from(g)).sum())
            .collect();
        let mut of: Vec<Option<&Answers>> = vec![None; self.scores.len()];
        answers.iter().for_each(|answers| of[answers.expert] = Some(answers));
        let sums = self.scores.par_iter_mut().zip(&mut self.answers).zip(of);
        sums.for_each(|((scores, (sum, squares)), answers)| {
            for (&slot, row) in answers
                .iter()
                .flat_map(|a| a.slots.iter().zip(a.rows.chunks_exact(hidden)))
            {
                let (token, gate) = (slot / routed.slots, f64::from(routed.gates[slot]));
                let square: f64 = row.iter().map(|&y| f64::from(y) * f64::from(y)).sum();
                scores.tokens += 1;
                scores.gate += gate;
                scores.gated_norm += gate * square.sqrt();
                scores.renormalised_norm += gate / chosen[token].max(f64::MIN_POSITIVE) * square.sqrt();
                scores.energy += weights[token] * gate * gate * square;
                scores.largest_norm = scores.largest_norm.max(square.sqrt());
                sum.iter_mut()
                    .zip(row)
                    .for_each(|(sum, &y)| *sum += gate * gate * f64::from(y));
                *squares += gate * gate;
            }
        });
    }

    fn constants(&self) -> Vec<f32> {
        let of = |(sum, squares): &(Vec<f64>, f64)| -> Vec<f32> {
            #[expect(clippy::cast_possible_truncation, reason = "summed in f64, kept in f32")]
            let mean = |sum: &f64| if *squares > 0.0 { (sum / squares) as f32 } else { 0.0 };
            sum.iter().map(mean).collect()
        };
        self.answers.iter().flat_map(of).collect()
    }
}

#[expect(clippy::cast_precision_loss, reason = "hidden sizes are small")]
fn mean_square(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / row.len() as f64
}

/// Of a token's loss, from the mean square of its state: what the next norm divides by. 0 for a state of zeros.
fn weight(mean_square: f64) -> f64 {
    if mean_square > 0.0 { 1.0 / mean_square } else { 0.0 }
}

/// Mean square from which on a state is a sink's.
fn sink_limit(mean_squares: &[f64]) -> f64 {
    let mut sorted = mean_squares.to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    SINK_TIMES * SINK_TIMES * median
}

impl Survey {
    /// As it lies on disk: the two samples with their lengths, then the constants.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for gram in [&self.choose, &self.report] {
            let gram = gram.to_bytes();
            bytes.extend((gram.len() as u64).to_le_bytes());
            bytes.extend(gram);
        }
        bytes.extend(self.constants.iter().flat_map(|c| c.to_le_bytes()));
        bytes
    }

    /// What [`to_bytes`](Self::to_bytes) wrote; the scores lie in the journal.
    pub(crate) fn from_bytes(
        scores: Vec<ExpertScores>,
        rule: RoutingRule,
        has_bias: bool,
        hidden: usize,
        mut bytes: &[u8],
    ) -> Option<Self> {
        let mut gram = || {
            let (length, rest) = bytes.split_first_chunk::<8>()?;
            let (gram, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
            bytes = rest;
            Gram::from_bytes(rule, has_bias, gram)
        };
        let (choose, report) = (gram()?, gram()?);
        let constants: Vec<f32> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        (bytes.len() == rule.experts * hidden * 4).then_some(Self {
            scores,
            choose,
            report,
            constants,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_share_no_window_and_leave_first_tokens_out() {
        let windows = [5, 1, 4, 7, 3];
        let [a, b] = sampled(&windows, 100);
        assert_eq!(a, [1, 2, 3, 4, 7, 8, 9, 18, 19]);
        assert_eq!(b, [11, 12, 13, 14, 15, 16]);
        let [a, b] = sampled(&windows, 3);
        assert_eq!((a, b), (vec![2, 7, 18], vec![12, 14, 16]));
        assert_eq!(sampled(&[], 3), [Vec::<usize>::new(), vec![]]);
        assert_eq!(sampled(&[1, 1], 3), [Vec::<usize>::new(), vec![]]);
    }

    #[test]
    fn sinks_are_left_out() {
        let limit = sink_limit(&[1.0, 1.0, 1.2, 0.9, 500.0]);
        let rows = Rows {
            normed: vec![1.0, 2.0, 3.0],
            scores: vec![0.1, 0.2, 0.3],
            weights: [1.0, 500.0, 1.2].map(weight).to_vec(),
        };
        let rows = rows.without_sinks(limit, 1, 1);
        assert_eq!((rows.normed, rows.weights.len()), (vec![1.0, 3.0], 2));
    }
}
