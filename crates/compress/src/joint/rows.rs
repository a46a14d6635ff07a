//! What the experts of one MoE layer see: normed inputs on disk, the routing in memory, one expert's rows at a time.
//!
//! Tokens are split by section of the text: most of them fit, the others judge what was fitted. Law: rows come in stream
//! order, whatever the batches and threads; memory holds scores and choices of all tokens, inputs of those asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use cotk_model::layers::Layer;
use cotk_model::moe::{Alive, Routed, route};
use cotk_run::Error;
use cotk_run::files::{self, Op, fault_point};
use cotk_run::units::{ExpertId, LayerId};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::layer::{Observer, Usage};
use crate::partial::Partial;
use crate::pipeline::Job;
use crate::states::{Stream, attend};

/// Which tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Those that codes are fitted to.
    Fit,
    /// Those that judge.
    Held,
}

/// Tokens of one expert, ascending, and what each counts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Picked {
    pub tokens: Vec<u32>,
    /// What the expert's output is multiplied by, or would be.
    pub gates: Vec<f32>,
    /// Of a squared error of the expert's output: gate² over the mean square of the state it is added to.
    pub weights: Vec<f64>,
}

impl Picked {
    /// Every `len / count`-th, where there are more than `count`; weights are scaled so that their sum stays.
    #[must_use]
    pub fn thinned(self, count: usize) -> Self {
        let all = self.tokens.len();
        if all <= count {
            return self;
        }
        let at: Vec<usize> = (0..count).map(|i| (2 * i + 1) * all / (2 * count)).collect();
        Self {
            tokens: at.iter().map(|&i| self.tokens[i]).collect(),
            gates: at.iter().map(|&i| self.gates[i]).collect(),
            weights: at.iter().map(|&i| self.weights[i]).collect(),
        }
    }
}

/// How much of a layer's weighted error one expert can make: what its tokens weigh (see [`Picked::weights`]), per token of
/// the layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// Over all tokens.
    pub mean: f64,
    /// Standard deviation between sections of the text, each counted by its tokens: 0 where all kinds of text use the
    /// expert alike.
    pub deviation: f64,
}

/// One MoE layer's rows.
#[derive(Debug)]
pub struct LayerRows {
    pub layer: LayerId,
    pub usage: Usage,
    hidden: usize,
    file: File,
    path: PathBuf,
    experts: usize,
    /// `[tokens, experts]`
    scores: Vec<f32>,
    routed: Routed,
    /// By expert: places in [`Routed::experts`], ascending.
    slots_of: Vec<Vec<u32>>,
    /// By token: 1 / mean square of the state after attention.
    weights: Vec<f32>,
    held_out: Vec<bool>,
}

impl Job<'_> {
    /// Walks a stream up to the experts of a MoE layer and keeps what they see; `alive`: which of them may be chosen.
    pub(crate) fn gather(
        &self,
        partial: &Partial,
        layer: &Layer,
        stream: &Stream,
        index: usize,
        alive: Alive<'_>,
    ) -> Result<LayerRows> {
        self.gather_parts(partial, layer, stream, index, alive, &self.texts.held_out)
    }

    /// The same for a stream of windows of its own: `held_out` says which of them judge.
    pub(crate) fn gather_parts(
        &self,
        partial: &Partial,
        layer: &Layer,
        stream: &Stream,
        index: usize,
        alive: Alive<'_>,
        held_out: &[bool],
    ) -> Result<LayerRows> {
        let spec = &self.source.files.spec;
        let (hidden, experts) = (spec.hidden, spec.routing.experts);
        let path = partial.states().join("rows.f32");
        let file = std::fs::OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(true)
            .open(&path)
            .map_err(Error::io("create", &path))?;
        let mut writer = BufWriter::with_capacity(1 << 20, &file);
        let mut observer = Observer::new(hidden, experts);
        let (mut scores, mut weights) = (Vec::new(), Vec::with_capacity(stream.tokens()));
        let mut routed = Routed::default();
        stream.read(index, self.with.cancel, |mut states, windows| {
            attend(spec, &self.rope, layer, &mut states, windows);
            let normed = layer.mixer_input(&states);
            let own = layer.router_scores(&normed).expect("a MoE layer has a router");
            let chosen = route(&layer.routing(&own)?, alive);
            observer.see(&states, &normed, &chosen);
            weights.extend(states.chunks_exact(hidden).map(inverse_mean_square));
            let bytes: Vec<u8> = normed.iter().flat_map(|x| x.to_le_bytes()).collect();
            fault_point(Op::Write)
                .and_then(|()| writer.write_all(&bytes))
                .map_err(Error::io("write", &path))?;
            scores.extend(own);
            routed.slots = chosen.slots;
            routed.experts.extend(chosen.experts);
            routed.gates.extend(chosen.gates);
            Ok(())
        })?;
        writer.flush().map_err(Error::io("write", &path))?;
        drop(writer);
        let mut slots_of = vec![Vec::new(); experts];
        for (slot, expert) in (0u32..).zip(&routed.experts) {
            slots_of[expert.index()].push(slot);
        }
        let windows = stream.windows().iter().zip(held_out);
        Ok(LayerRows {
            layer: layer.id(),
            usage: observer.finish().0,
            hidden,
            file,
            path,
            experts,
            scores,
            routed,
            slots_of,
            weights,
            held_out: windows.flat_map(|(&tokens, &held)| vec![held; tokens]).collect(),
        })
    }
}

impl LayerRows {
    /// Of the layer.
    pub fn tokens(&self) -> usize {
        self.weights.len()
    }

    /// All choices, in stream order.
    pub fn routed(&self) -> &Routed {
        &self.routed
    }

    /// Of a token's squared error: 1 / mean square of the state after attention.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Whether a token judges.
    pub fn held_out(&self) -> &[bool] {
        &self.held_out
    }

    /// Of every expert; `sections`: of every token, in stream order, those of a section in any order.
    pub fn traffic(&self, sections: &[u64]) -> Vec<Traffic> {
        let mut tokens: BTreeMap<u64, f64> = BTreeMap::new();
        for section in sections {
            *tokens.entry(*section).or_default() += 1.0;
        }
        let all: f64 = tokens.values().sum();
        let of = |slots: &Vec<u32>| {
            let mut weights: BTreeMap<u64, f64> = BTreeMap::new();
            for &slot in slots {
                let (token, gate) = (
                    slot as usize / self.routed.slots,
                    f64::from(self.routed.gates[slot as usize]),
                );
                *weights.entry(sections[token]).or_default() += gate * gate * f64::from(self.weights[token]);
            }
            let mean = weights.values().sum::<f64>() / all.max(1.0);
            let squares = tokens.iter().map(|(section, tokens)| {
                let own = weights.get(section).copied().unwrap_or(0.0) / tokens;
                tokens * (own - mean) * (own - mean)
            });
            Traffic {
                mean,
                deviation: (squares.sum::<f64>() / all.max(1.0)).sqrt(),
            }
        };
        self.slots_of.iter().map(of).collect()
    }

    /// Tokens of one part that came to an expert.
    pub fn of(&self, expert: ExpertId, part: Part) -> Picked {
        let mut picked = Picked::default();
        for &slot in &self.slots_of[expert.index()] {
            let token = slot as usize / self.routed.slots;
            if self.is_in(token, part) {
                self.pick(&mut picked, token, self.routed.gates[slot as usize], 1.0);
            }
        }
        picked
    }

    /// The `count` tokens of one part that would have come to an expert first of those that did not: by the gate that
    /// they would have had, weights times `eta`² (soft routing).
    pub fn likely(&self, expert: ExpertId, part: Part, count: usize, eta: f64) -> Picked {
        let mut came = vec![false; self.tokens()];
        for &slot in &self.slots_of[expert.index()] {
            came[slot as usize / self.routed.slots] = true;
        }
        let mut others: Vec<(f32, usize)> = (0..self.tokens())
            .filter(|&token| !came[token] && self.is_in(token, part))
            .map(|token| (self.would_be_gate(token, expert), token))
            .collect();
        others.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        others.truncate(count);
        others.sort_by_key(|(_, token)| *token);
        let mut picked = Picked::default();
        for (gate, token) in others {
            self.pick(&mut picked, token, gate, eta);
        }
        picked
    }

    /// Tokens that judge an expert: held-out ones that came, and where they are fewer than `few`, those that would have; where
    /// none of these says anything, the same of the tokens that are fitted to, and true.
    pub fn judging(&self, expert: ExpertId, few: usize) -> (Picked, bool) {
        let of = |part| {
            let mut picked = self.of(expert, part);
            if picked.tokens.len() < few {
                let more = self.likely(expert, part, few - picked.tokens.len(), 1.0);
                picked.tokens.extend(more.tokens);
                picked.gates.extend(more.gates);
                picked.weights.extend(more.weights);
            }
            picked
        };
        let says = |picked: &Picked| picked.weights.iter().sum::<f64>() > 0.0;
        let held = of(Part::Held);
        if says(&held) {
            return (held, false);
        }
        let fitted = of(Part::Fit);
        match says(&fitted) {
            true => (fitted, true),
            // It speaks nowhere: what it would lose if it did.
            false => (self.all(Part::Fit, few), true),
        }
    }

    /// Evenly spread tokens of one part and what each counts for the layer as a whole: Σ gate² over its choices.
    pub fn all(&self, part: Part, count: usize) -> Picked {
        let mut picked = Picked::default();
        for token in (0..self.tokens()).filter(|&token| self.is_in(token, part)) {
            let gates = &self.routed.gates[token * self.routed.slots..][..self.routed.slots];
            let all: f32 = gates.iter().map(|g| g * g).sum();
            self.pick(&mut picked, token, all.sqrt(), 1.0);
        }
        picked.thinned(count)
    }

    /// Normed inputs `[tokens, hidden]` of ascending tokens.
    ///
    /// # Errors
    /// The file system's.
    pub fn inputs(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let row = self.hidden * 4;
        let mut bytes = vec![0u8; tokens.len() * row];
        let mut from = 0;
        // Neighbours in one read.
        while from < tokens.len() {
            let mut to = from + 1;
            while to < tokens.len() && tokens[to] as usize == tokens[from] as usize + (to - from) {
                to += 1;
            }
            fault_point(Op::Read)
                .and_then(|()| {
                    let at = u64::from(tokens[from]) * row as u64;
                    self.file.read_exact_at(&mut bytes[from * row..to * row], at)
                })
                .map_err(Error::io("read", &self.path))?;
            from = to;
        }
        Ok(bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect())
    }

    /// All normed inputs, `[tokens, hidden]`.
    ///
    /// # Errors
    /// The file system's.
    pub fn all_inputs(&self) -> Result<Vec<f32>> {
        let limit = (self.tokens() * self.hidden * 4) as u64;
        let bytes = files::read(&self.path, limit)?;
        Ok(bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect())
    }

    /// The file is not needed any more.
    pub fn forget(self) {
        // Space alone is lost if this fails; the folder goes at the end.
        let _ = std::fs::remove_file(&self.path);
    }

    /// Where nothing is held out, all tokens judge.
    fn is_in(&self, token: usize, part: Part) -> bool {
        match part {
            Part::Fit => !self.held_out[token],
            Part::Held => self.held_out[token],
        }
    }

    fn pick(&self, picked: &mut Picked, token: usize, gate: f32, eta: f64) {
        picked.tokens.push(u32::try_from(token).expect("2^30 tokens at most"));
        picked.gates.push(gate);
        let gate = f64::from(gate) * eta;
        picked.weights.push(gate * gate * f64::from(self.weights[token]));
    }

    /// The score in the unit of the token's gates.
    fn would_be_gate(&self, token: usize, expert: ExpertId) -> f32 {
        let score = |expert: ExpertId| self.scores[token * self.experts + expert.index()];
        let first = token * self.routed.slots;
        let chosen = score(self.routed.experts[first]);
        if chosen > 0.0 {
            score(expert) * self.routed.gates[first] / chosen
        } else {
            score(expert)
        }
    }
}

#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "a weight")]
fn inverse_mean_square(row: &[f32]) -> f32 {
    let square: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    if square > 0.0 {
        (row.len() as f64 / square) as f32
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_that_no_held_out_token_says_anything_of_is_judged_by_those_that_were_fitted_to() {
        // Two experts, one choice; the second one's score on tokens of the other is nothing.
        let rows = |held_out: [bool; 4]| LayerRows {
            layer: LayerId(0),
            usage: Observer::new(1, 2).finish().0,
            hidden: 1,
            file: tempfile::tempfile().unwrap(),
            path: PathBuf::new(),
            experts: 2,
            scores: vec![1.0, 0.0, 1.0, 0.0, 0.5, 0.5, 1.0, 0.0],
            routed: Routed {
                slots: 1,
                experts: [0, 0, 1, 0].map(ExpertId).to_vec(),
                gates: vec![1.0, 1.0, 0.5, 1.0],
            },
            slots_of: vec![vec![0, 1, 3], vec![2]],
            weights: vec![1.0; 4],
            held_out: held_out.to_vec(),
        };
        let (picked, by_fit) = rows([false, true, true, false]).judging(ExpertId(1), 1);
        assert!(!by_fit && picked.tokens == [2]);
        let (picked, by_fit) = rows([false, true, false, false]).judging(ExpertId(1), 1);
        assert!(by_fit && picked.tokens == [2] && picked.weights == [0.25]);
        // Nothing is held out.
        let (picked, by_fit) = rows([false; 4]).judging(ExpertId(0), 1);
        assert!(by_fit && picked.tokens == [0, 1, 3]);
        // It speaks nowhere.
        let (picked, by_fit) = rows([false, true, true, false]).judging(ExpertId(0), 1);
        assert!(!by_fit && picked.tokens == [1]);
        let mut silent = rows([false, true, true, false]);
        (silent.slots_of, silent.routed.experts) = (vec![vec![0, 1, 2, 3], vec![]], [0; 4].map(ExpertId).to_vec());
        silent.scores = [1.0, 0.0].repeat(4);
        let (picked, by_fit) = silent.judging(ExpertId(1), 2);
        assert!(by_fit && picked.weights.iter().sum::<f64>() > 0.0);
    }
}
