//! What is known of one MoE layer while it is decided about: how its experts are used, and a sample of what they see.
//! Law: counts and sums run in token order, so that they depend neither on batches nor on threads.

use cotk_model::checkpoint::TensorSource;
use cotk_model::layers::Mlp;
use cotk_model::moe::Routed;
use cotk_model::reference::load_expert;
use cotk_model::spec::ModelSpec;
use cotk_run::units::{ExpertId, LayerId};
use serde::{Deserialize, Serialize};

use crate::Result;

/// Rows kept per expert: enough to tell errors of a few per cent apart.
const SAMPLE_ROWS: usize = 128;
/// Rows of the layer that stand in for an expert that no token came to.
const POOLED_ROWS: usize = 32;

/// How one expert is used by the calibration tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpertUsage {
    pub tokens: u64,
    /// Sum of gates.
    pub gate: f64,
    /// Sum of squared gates.
    pub gate_squares: f64,
}

/// How a layer's experts are used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens that passed the layer.
    pub tokens: u64,
    /// In original numbering.
    pub experts: Vec<ExpertUsage>,
    /// Mean square of the residual stream where the experts' output is added: what the next norm divides by.
    pub state_square: f64,
}

impl Usage {
    /// Share of the layer's selections that went to one expert.
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    pub fn share(&self, expert: ExpertId) -> f64 {
        let all: u64 = self.experts.iter().map(|e| e.tokens).sum();
        self.experts[expert.index()].tokens as f64 / all.max(1) as f64
    }

    /// Share of the layer's gate mass that went to one expert.
    pub fn gate_share(&self, expert: ExpertId) -> f64 {
        let all: f64 = self.experts.iter().map(|e| e.gate).sum();
        if all > 0.0 {
            self.experts[expert.index()].gate / all
        } else {
            0.0
        }
    }

    /// Experts from the least used on; ties by gate mass, then by the lower index.
    pub fn least_used(&self) -> Vec<ExpertId> {
        let mut order: Vec<ExpertId> = (0..).map(ExpertId).take(self.experts.len()).collect();
        order.sort_by(|a, b| {
            let (a, b) = (&self.experts[a.index()], &self.experts[b.index()]);
            a.tokens.cmp(&b.tokens).then(a.gate.total_cmp(&b.gate))
        });
        order
    }
}

/// Rows that went to one expert, and their gates.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// `[rows, hidden]`, normed.
    pub rows: Vec<f32>,
    pub gates: Vec<f32>,
}

/// Gathers usage and samples batch by batch.
#[derive(Debug)]
pub struct Observer {
    hidden: usize,
    squares: f64,
    usage: Usage,
    samples: Vec<Sample>,
    /// First rows of the layer, whoever they went to.
    pooled: Vec<f32>,
}

impl Observer {
    /// Nothing seen yet.
    pub fn new(hidden: usize, experts: usize) -> Self {
        Self {
            hidden,
            squares: 0.0,
            usage: Usage {
                experts: vec![ExpertUsage::default(); experts],
                ..Usage::default()
            },
            samples: vec![Sample::default(); experts],
            pooled: Vec::new(),
        }
    }

    /// `state` and `normed` are `[tokens, hidden]`: the residual stream after attention, and what experts see of it.
    pub fn see(&mut self, state: &[f32], normed: &[f32], routed: &Routed) {
        self.squares += state.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
        self.usage.tokens += (normed.len() / self.hidden) as u64;
        let room = (POOLED_ROWS * self.hidden)
            .saturating_sub(self.pooled.len())
            .min(normed.len());
        self.pooled.extend_from_slice(&normed[..room]);
        for (pair, (expert, &gate)) in routed.experts.iter().zip(&routed.gates).enumerate() {
            let used = &mut self.usage.experts[expert.index()];
            used.tokens += 1;
            used.gate += f64::from(gate);
            used.gate_squares += f64::from(gate) * f64::from(gate);
            let sample = &mut self.samples[expert.index()];
            if sample.gates.len() < SAMPLE_ROWS {
                let row = &normed[pair / routed.slots * self.hidden..][..self.hidden];
                sample.rows.extend_from_slice(row);
                sample.gates.push(gate);
            }
        }
    }

    /// What was seen.
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    pub fn finish(mut self) -> (Usage, Samples) {
        let values = self.usage.tokens as f64 * self.hidden as f64;
        self.usage.state_square = if values > 0.0 { self.squares / values } else { 0.0 };
        let samples = Samples {
            hidden: self.hidden,
            experts: self.samples,
            pooled: self.pooled,
        };
        (self.usage, samples)
    }
}

/// Rows of a layer's experts.
#[derive(Debug)]
pub struct Samples {
    hidden: usize,
    experts: Vec<Sample>,
    pooled: Vec<f32>,
}

impl Samples {
    /// Of a layer that nothing was seen of.
    pub(crate) fn none(hidden: usize, experts: usize) -> Self {
        Self {
            hidden,
            experts: vec![Sample::default(); experts],
            pooled: Vec::new(),
        }
    }

    /// Rows that were routed to this expert; may be empty.
    pub fn routed(&self, expert: ExpertId) -> &Sample {
        &self.experts[expert.index()]
    }

    /// The same, or, for an expert that nothing came to, the first rows of the layer at an equal gate.
    #[expect(clippy::cast_precision_loss, reason = "expert counts are small")]
    pub fn at_least_pooled(&self, expert: ExpertId) -> Sample {
        let routed = self.routed(expert);
        if !routed.gates.is_empty() {
            return routed.clone();
        }
        Sample {
            rows: self.pooled.clone(),
            gates: vec![1.0 / self.experts.len() as f32; self.pooled.len() / self.hidden],
        }
    }
}

/// One MoE layer as a stage sees it.
pub struct LayerView<'a> {
    pub layer: LayerId,
    pub spec: &'a ModelSpec,
    pub source: &'a dyn TensorSource,
    pub usage: &'a Usage,
    pub samples: &'a Samples,
}

impl LayerView<'_> {
    /// All experts, in order.
    pub fn experts(&self) -> Vec<ExpertId> {
        (0..).map(ExpertId).take(self.usage.experts.len()).collect()
    }

    /// The source's weights of one expert.
    ///
    /// # Errors
    /// A missing or ill-shaped tensor.
    pub fn weights(&self, expert: ExpertId) -> Result<Mlp> {
        Ok(load_expert(self.spec, self.source, self.layer, expert)?)
    }

    /// What an error of this expert costs the model: Σ g²‖error‖² over the tokens that will come, relative to the
    /// state it is added to. `errors` are squared norms of the sample's rows.
    ///
    /// Traffic is that of the calibration text plus the layer's mean: without this prior the choice fits the text's
    /// mix of kinds, and other kinds pay (reference: moe-compression 12.1, point 4).
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    pub fn loss(&self, expert: ExpertId, gates: &[f32], errors: &[f64]) -> f64 {
        let weighted: f64 = gates
            .iter()
            .zip(errors)
            .map(|(&g, e)| f64::from(g) * f64::from(g) * e)
            .sum();
        let mean = weighted / gates.len().max(1) as f64;
        let all: u64 = self.usage.experts.iter().map(|e| e.tokens).sum();
        let traffic = self.usage.experts[expert.index()].tokens as f64 + all as f64 / self.usage.experts.len() as f64;
        let state = self.usage.state_square * self.spec.hidden as f64 * self.usage.tokens.max(1) as f64;
        if state > 0.0 { mean * traffic / state } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routed(experts: &[u32], gates: &[f32]) -> Routed {
        Routed {
            slots: 2,
            experts: experts.iter().map(|&e| ExpertId(e)).collect(),
            gates: gates.to_vec(),
        }
    }

    #[test]
    fn batches_do_not_matter() {
        let normed: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let all = routed(&[0, 2, 2, 0, 2, 1], &[0.5, 0.25, 0.5, 0.25, 0.5, 0.25]);
        let mut whole = Observer::new(4, 4);
        whole.see(&normed, &normed, &all);
        let mut split = Observer::new(4, 4);
        for token in 0..3 {
            let part = routed(
                &all.experts[token * 2..][..2].iter().map(|e| e.0).collect::<Vec<_>>(),
                &all.gates[token * 2..][..2],
            );
            split.see(&normed[token * 4..][..4], &normed[token * 4..][..4], &part);
        }
        let ((whole, rows), (split, split_rows)) = (whole.finish(), split.finish());
        assert_eq!(whole, split);
        assert_eq!(rows.routed(ExpertId(2)).rows, split_rows.routed(ExpertId(2)).rows);
        assert_eq!(whole.experts[2].tokens, 3);
        assert_eq!(whole.least_used(), [3, 1, 0, 2].map(ExpertId));
        assert_eq!(whole.share(ExpertId(2)), 0.5);
        assert!(rows.routed(ExpertId(3)).gates.is_empty());
        assert_eq!(rows.at_least_pooled(ExpertId(3)).rows, normed);
    }
}
