//! One layer's experts in f32 with every answer in sight: what statistics read, and how a layer mixes under a mask
//! before anything is coded. Law: with every expert there, equal to `PlainMoe`, bit for bit.

use cotk_model::layers::{Layer, Mlp};
use cotk_model::moe::{Alive, Routed, route};
use rayon::prelude::*;

use super::gram::Semantics;
use super::mask::Mask;
use crate::Result;

/// One layer's experts, in original numbering.
pub(crate) struct Experts {
    pub(crate) mlps: Vec<Mlp>,
    pub(crate) hidden: usize,
}

/// What one expert said to the tokens that chose it.
pub(crate) struct Answers {
    pub(crate) expert: usize,
    /// Places in [`Routed::experts`], ascending.
    pub(crate) slots: Vec<usize>,
    /// `[slots, hidden]`.
    pub(crate) rows: Vec<f32>,
}

/// What is dropped of a layer, and what that means.
#[derive(Clone, Copy)]
pub(crate) struct Dropped<'a> {
    pub(crate) mask: &'a Mask,
    pub(crate) semantics: Semantics,
    /// `[experts, hidden]`: what a novice answers.
    pub(crate) constants: &'a [f32],
}

impl Experts {
    /// Runs each chosen expert on its tokens; `normed` is `[tokens, hidden]`. Experts that nothing chose are left out.
    pub(crate) fn answers(&self, routed: &Routed, normed: &[f32], dropped: Option<Dropped<'_>>) -> Vec<Answers> {
        let mut slots_of: Vec<Vec<usize>> = vec![Vec::new(); self.mlps.len()];
        for (slot, expert) in routed.experts.iter().enumerate() {
            slots_of[expert.index()].push(slot);
        }
        let novices = dropped.filter(|dropped| dropped.semantics == Semantics::Novice);
        let run = |(expert, slots): (usize, Vec<usize>)| {
            let novice = novices.filter(|dropped| dropped.mask.is_dropped(expert));
            let rows = match novice {
                Some(dropped) => dropped.constants[expert * self.hidden..][..self.hidden].repeat(slots.len()),
                None => {
                    let row = |&slot: &usize| &normed[slot / routed.slots * self.hidden..][..self.hidden];
                    self.mlps[expert].apply(&slots.iter().map(row).collect::<Vec<_>>().concat())
                }
            };
            Answers { expert, slots, rows }
        };
        let busy: Vec<(usize, Vec<usize>)> = slots_of
            .into_iter()
            .enumerate()
            .filter(|(_, s)| !s.is_empty())
            .collect();
        busy.into_par_iter().map(run).collect()
    }

    /// Σ gate · answer of each token, in slot order whoever computed them; `[tokens, hidden]`.
    pub(crate) fn mixed(&self, routed: &Routed, answers: &[Answers], tokens: usize) -> Vec<f32> {
        let mut row_of = vec![&[][..]; routed.experts.len()];
        for answers in answers {
            for (&slot, row) in answers.slots.iter().zip(answers.rows.chunks_exact(self.hidden)) {
                row_of[slot] = row;
            }
        }
        let mut out = vec![0.0; tokens * self.hidden];
        for (slot, (row, gate)) in row_of.iter().zip(&routed.gates).enumerate() {
            let out = &mut out[slot / routed.slots * self.hidden..][..self.hidden];
            out.iter_mut().zip(*row).for_each(|(out, value)| *out += gate * value);
        }
        out
    }

    /// The routed experts' mixed output under a mask, `[tokens, hidden]`.
    pub(crate) fn mix(&self, layer: &Layer, normed: &[f32], dropped: Option<Dropped<'_>>) -> Result<Vec<f32>> {
        let scores = layer.router_scores(normed).expect("a MoE layer has a router");
        let router = layer.routing(&scores)?;
        let living = dropped.map(|dropped| dropped.mask.living());
        let alive = match (&living, dropped.map(|dropped| dropped.semantics)) {
            (Some(living), Some(Semantics::Removed)) => Alive::Removed(living),
            (Some(living), Some(Semantics::Masked)) => Alive::Masked(living),
            (_, Some(Semantics::Novice) | None) | (None, _) => Alive::All,
        };
        let routed = route(&router, alive);
        let answers = self.answers(&routed, normed, dropped);
        Ok(self.mixed(&routed, &answers, normed.len() / self.hidden))
    }
}
