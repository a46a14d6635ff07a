//! What a layer loses as its experts become smaller, expert by expert: the order in which channels go with the loss after
//! each, and the gain of every rank of every matrix. Law: losses are relative to the layer's mixed output, under the same
//! weights of tokens as the losses of masks, so that both can be weighed by one sensitivity.

use cotk_container::manifest::Checksum;
use cotk_model::layers::Layer;
use cotk_model::moe::{Alive, Routed, route};
use cotk_run::files;
use cotk_run::units::LayerId;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::moments::{Moments, middle, moments};
use super::slim::{self, matrix, seen};
use crate::Result;
use crate::pipeline::Job;
use crate::prune::experts::Experts;
use crate::states::{Stream, attend};

/// States of this many times the median's norm are attention sinks.
const SINK_TIMES: f64 = 20.0;
/// Tokens on which it is measured what an error of gate or up becomes behind silu and down.
const PROBE_ROWS: usize = 256;

/// What one expert loses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShrinkExpert {
    pub tokens: u64,
    /// Channels in the order in which they go.
    pub order: Vec<u32>,
    /// Relative loss of the layer once each of them is gone.
    pub losses: Vec<f32>,
    /// What each rank of gate, up and down gains, descending: the relative loss of rank r is the sum from r on.
    pub gains: [Vec<f32>; 3],
}

/// Of a MoE layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShrinkLayer {
    pub experts: Vec<ShrinkExpert>,
}

/// Journal entry: a layer's survey.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shrunk {
    pub layer: LayerId,
    pub found: ShrinkLayer,
}

/// One MoE layer's tokens in memory, in stream order.
pub(crate) struct LayerTokens {
    pub(crate) hidden: usize,
    /// `[tokens, hidden]`, what experts see.
    pub(crate) inputs: Vec<f32>,
    /// What the routed experts should add so that the stream meets the teacher's behind this layer, `[tokens, hidden]`.
    pub(crate) targets: Vec<f32>,
    pub(crate) routed: Routed,
    /// 1 / mean square of the teacher's state behind the layer; 0 for sinks and first tokens.
    pub(crate) weights: Vec<f64>,
    pub(crate) windows: Vec<usize>,
    pub(crate) held_out: Vec<bool>,
}

impl LayerTokens {
    /// Rows and weights (gate² · token weight) of each expert's tokens, those that are fitted.
    fn rows_of(&self, expert: usize) -> (Vec<f32>, Vec<f64>) {
        let (mut rows, mut weights) = (Vec::new(), Vec::new());
        for (slot, chosen) in self.routed.experts.iter().enumerate() {
            let token = slot / self.routed.slots;
            if chosen.index() == expert && self.weights[token] > 0.0 {
                rows.extend_from_slice(&self.inputs[token * self.hidden..][..self.hidden]);
                weights.push(f64::from(self.routed.gates[slot]).powi(2) * self.weights[token]);
            }
        }
        (rows, weights)
    }

    /// Moments of one expert.
    pub(crate) fn moments(&self, experts: &Experts, expert: usize, with_input: bool) -> Moments {
        let (rows, weights) = self.rows_of(expert);
        moments(&experts.mlps[expert], &rows, &weights, with_input)
    }

    /// Σ w ‖target‖².
    fn size(&self) -> f64 {
        let rows = self.targets.chunks_exact(self.hidden).zip(&self.weights);
        rows.map(|(row, weight)| weight * square(row)).sum()
    }
}

fn square(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

impl Job<'_> {
    /// What a stream's tokens are at a layer's experts, with `alive` to choose from; `teacher` holds its states behind
    /// the layer.
    pub(crate) fn layer_tokens(
        &self,
        layer: &Layer,
        stream: &Stream,
        teacher: &Stream,
        index: usize,
        alive: Alive<'_>,
    ) -> Result<LayerTokens> {
        let spec = &self.source.files.spec;
        let hidden = spec.hidden;
        let mut behind = teacher.rows(index + 1)?;
        let mut found = LayerTokens {
            hidden,
            inputs: Vec::with_capacity(stream.tokens() * hidden),
            targets: Vec::with_capacity(stream.tokens() * hidden),
            routed: Routed::default(),
            weights: Vec::with_capacity(stream.tokens()),
            windows: stream.windows().to_vec(),
            held_out: Vec::with_capacity(stream.tokens()),
        };
        stream.read(index, self.with.cancel, |mut states, windows| {
            attend(spec, &self.rope, layer, &mut states, windows);
            let normed = layer.mixer_input(&states);
            let scores = layer.router_scores(&normed).expect("a MoE layer has a router");
            let routed = route(&layer.routing(&scores)?, alive);
            layer.add_dense(&normed, &mut states);
            let behind = behind.next(states.len() / hidden)?;
            #[expect(clippy::cast_precision_loss, reason = "hidden sizes are small")]
            let mean_square = |row: &[f32]| square(row) / hidden as f64;
            found.weights.extend(behind.chunks_exact(hidden).map(mean_square));
            found
                .targets
                .extend(behind.iter().zip(&states).map(|(behind, state)| behind - state));
            found.inputs.extend(normed);
            found.routed.slots = routed.slots;
            found.routed.experts.extend(routed.experts);
            found.routed.gates.extend(routed.gates);
            Ok(())
        })?;
        let mut sorted = found.weights.clone();
        sorted.sort_by(f64::total_cmp);
        let limit = SINK_TIMES * SINK_TIMES * sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
        let weight = |square: &f64| {
            if *square > 0.0 && *square < limit {
                1.0 / square
            } else {
                0.0
            }
        };
        found.weights = found.weights.iter().map(weight).collect();
        let mut start = 0;
        for (&window, &held) in stream.windows().iter().zip(&self.texts.held_out) {
            if window > 0 {
                found.weights[start] = 0.0;
            }
            found.held_out.extend(std::iter::repeat_n(held, window));
            start += window;
        }
        Ok(found)
    }

    /// What the experts of one layer lose on the teacher's own stream.
    pub(crate) fn survey_shrinking(
        &self,
        layer: &Layer,
        experts: &Experts,
        teacher: &Stream,
        index: usize,
        with_ranks: bool,
    ) -> Result<ShrinkLayer> {
        let tokens = self.layer_tokens(layer, teacher, teacher, index, Alive::All)?;
        let size = tokens.size();
        let size = if size > 0.0 { size } else { 1.0 };
        let of = |expert: usize| -> Result<ShrinkExpert> {
            let (rows, weights) = tokens.rows_of(expert);
            let mlp = &experts.mlps[expert];
            let found = moments(mlp, &rows, &weights, with_ranks);
            let removals = slim::order(mlp, &found)?;
            let came = if weights.is_empty() { 0.0 } else { 1.0 / size };
            #[expect(clippy::cast_possible_truncation, reason = "losses are held in f32")]
            let narrow = |loss: f64| (loss * came) as f32;
            let gains = if with_ranks {
                let factors = error_factors(mlp, &rows, &weights);
                let input = found.input.as_ref().expect("asked for");
                let mut gains: [Vec<f32>; 3] = Default::default();
                for (kind, (linear, second)) in [(&mlp.gate, input), (&mlp.up, input), (&mlp.down, &found.middle)]
                    .into_iter()
                    .enumerate()
                {
                    let whitened = cotk_linalg::whiten(matrix(linear).view(), seen(second).view(), slim::DAMPING)?;
                    gains[kind] = whitened
                        .gains()
                        .into_iter()
                        .map(|gain| narrow(gain * factors[kind]))
                        .collect();
                }
                gains
            } else {
                Default::default()
            };
            Ok(ShrinkExpert {
                tokens: weights.len() as u64,
                order: (removals.iter())
                    .map(|removal| u32::try_from(removal.column).expect("inner sizes fit 32 bits"))
                    .collect(),
                losses: removals.iter().map(|removal| narrow(removal.loss)).collect(),
                gains,
            })
        };
        let experts = (0..experts.mlps.len()).into_par_iter().map(of).collect::<Result<_>>()?;
        Ok(ShrinkLayer { experts })
    }

    /// The teacher's calibration stream with its states before every layer kept on disk: `[layers + 1]` files.
    pub(crate) fn whole_stream(&self, partial: &crate::partial::Partial, windows: &[&[u32]]) -> Result<Stream> {
        let lengths: Vec<usize> = windows.iter().map(|w| w.len()).collect();
        let stream = Stream::new(&partial.states(), "whole", self.source.files.spec.hidden, lengths);
        let mark = partial.states().join("whole.done");
        if mark.is_file() && stream.checksum(self.layers()).is_ok_and(|sum| is_mark(&mark, sum)) {
            return Ok(stream);
        }
        self.with
            .progress
            .begin("walking the source", self.layers() as u64, "layers");
        self.embed(&stream, windows)?;
        for index in 0..self.layers() {
            let (layer, experts) = self.load_whole(index)?;
            self.step_under(&layer, experts.as_ref(), None, index, &stream, &stream)?;
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        files::write_atomic(&mark, &stream.checksum(self.layers())?.0.to_le_bytes())?;
        Ok(stream)
    }
}

fn is_mark(mark: &std::path::Path, sum: Checksum) -> bool {
    files::read(mark, 64).is_ok_and(|bytes| bytes == sum.0.to_le_bytes())
}

/// What one unit of a matrix's own squared error becomes in the expert's output, measured where half the ranks that could
/// be left are gone; 1 for down.
fn error_factors(mlp: &cotk_model::layers::Mlp, rows: &[f32], weights: &[f64]) -> [f64; 3] {
    let hidden = mlp.gate.inputs();
    let count = weights.len().min(PROBE_ROWS);
    let x = &rows[..count * hidden];
    if count == 0 {
        return [1.0; 3];
    }
    let error = |a: &[f32], b: &[f32], width: usize| -> f64 {
        (a.chunks_exact(width).zip(b.chunks_exact(width)).zip(weights))
            .map(|((a, b), weight)| {
                weight
                    * a.iter()
                        .zip(b)
                        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
                        .sum::<f64>()
            })
            .sum()
    };
    let truth = mlp.down.apply(&middle(mlp, x));
    let factor = |changed: cotk_model::layers::Mlp, own: f64| {
        let said = changed.down.apply(&middle(&changed, x));
        if own > 0.0 {
            error(&truth, &said, hidden) / own
        } else {
            1.0
        }
    };
    let less = |from: &cotk_model::layers::linear::Linear| {
        let rank = cotk_linalg::break_even(from.outputs(), from.inputs()).div_ceil(2);
        cotk_linalg::svd(matrix(from).view()).map_or_else(|_| from.clone(), |svd| slim::linear(&svd.reconstruct(rank)))
    };
    let inner = mlp.gate.outputs();
    let (gate, up) = (less(&mlp.gate), less(&mlp.up));
    let own = |from: &cotk_model::layers::linear::Linear, to: &cotk_model::layers::linear::Linear| {
        error(&from.apply(x), &to.apply(x), inner)
    };
    let (own_gate, own_up) = (own(&mlp.gate, &gate), own(&mlp.up, &up));
    [
        factor(cotk_model::layers::Mlp { gate, ..mlp.clone() }, own_gate),
        factor(cotk_model::layers::Mlp { up, ..mlp.clone() }, own_up),
        1.0,
    ]
}
