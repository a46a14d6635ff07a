//! A layer made smaller and mended, in f32: what comparisons walk through and what a container's codes begin from. Law:
//! unhealed, it depends on the teacher's stream alone; healed, on the student's own.

use cotk_model::layers::linear::Linear;
use cotk_model::layers::{Layer, Mlp};
use cotk_model::moe::Alive;
use rayon::prelude::*;

use super::slim::{Slim, Slimmed, slim};
use super::survey::LayerTokens;
use crate::Result;
use crate::heal::{HealOptions, HealTokens, Part, Step, heal_down, heal_scales};
use crate::pipeline::Job;
use crate::prune::experts::Experts;

/// One layer's experts, smaller; `None`: nothing stays of that one.
pub(crate) struct SlimLayer {
    pub(crate) experts: Vec<Option<Slimmed>>,
    /// `[hidden]` of each that is gone and answers with a constant.
    pub(crate) constants: Vec<Option<Vec<f32>>>,
    pub(crate) steps: Vec<Step>,
    /// Rows of the router, where they were fitted anew, `[experts, hidden]`.
    pub(crate) router: Option<Vec<f32>>,
}

impl LayerTokens {
    pub(crate) fn to_heal(&self) -> HealTokens<'_> {
        HealTokens {
            hidden: self.hidden,
            inputs: &self.inputs,
            targets: &self.targets,
            routed: &self.routed,
            weights: &self.weights,
            held_out: &self.held_out,
            windows: &self.windows,
        }
    }
}

impl SlimLayer {
    /// Makes each expert smaller on these tokens.
    pub(crate) fn build(experts: &Experts, how: &[Slim], tokens: &LayerTokens) -> Result<Self> {
        let of = |(expert, how): (usize, &Slim)| {
            let with_input = matches!(how, Slim::Ranks(_));
            match how {
                Slim::Whole => Ok(Some(Slimmed::whole(experts.mlps[expert].clone()))),
                Slim::Channels(0) => Ok(None),
                _ => slim(&experts.mlps[expert], how, &tokens.moments(experts, expert, with_input)),
            }
        };
        let smaller: Vec<Option<Slimmed>> = how.par_iter().enumerate().map(of).collect::<Result<_>>()?;
        Ok(Self {
            constants: vec![None; smaller.len()],
            experts: smaller,
            steps: Vec::new(),
            router: None,
        })
    }

    /// Refits what may be refitted to the layer's targets.
    pub(crate) fn heal(&mut self, tokens: &LayerTokens, options: &HealOptions) -> Result<()> {
        let heal = tokens.to_heal();
        let healed = heal_down(&heal, &self.parts(), options)?;
        let (experts, constants) = (&mut self.experts, &mut self.constants);
        for ((slot, constant), down) in experts.iter_mut().zip(constants).zip(healed.downs) {
            match (slot, down) {
                (Some(slimmed), Some(down)) => slimmed.set_last(down),
                (None, Some(found)) => *constant = Some(found),
                (_, None) => {}
            }
        }
        self.steps.push(healed.step);
        let (scales, step) = heal_scales(&heal, &self.parts(), options)?;
        if step.is_kept {
            for (slot, scale) in self.experts.iter_mut().zip(&scales) {
                if let Some(slimmed) = slot {
                    slimmed.scale(*scale);
                }
            }
            for (constant, scale) in self.constants.iter_mut().zip(&scales) {
                constant.iter_mut().flatten().for_each(|x| *x *= scale);
            }
        }
        self.steps.push(step);
        Ok(())
    }

    /// Fits the layer's router to what the experts have become, where `options` have it.
    pub(crate) fn recalibrate(
        &mut self,
        job: &Job<'_>,
        layer: &Layer,
        (tokens, alive): (&LayerTokens, Alive<'_>),
        options: &HealOptions,
    ) -> Result<()> {
        if !options.router {
            return Ok(());
        }
        let found = job.recalibrated(layer, &tokens.to_heal(), alive, &self.parts(), options)?;
        if let Some((rows, step)) = found {
            self.router = rows;
            self.steps.push(step);
        }
        Ok(())
    }

    fn parts(&self) -> Vec<Part<'_>> {
        let constants = self.constants.iter().map(Option::as_deref);
        let both = self.experts.iter().zip(constants);
        both.map(|(slimmed, constant)| match (slimmed, constant) {
            (Some(slimmed), _) => slimmed.part(),
            (None, Some(constant)) => Part::Constant(constant),
            (None, None) => Part::Absent,
        })
        .collect()
    }

    /// As a layer that can be walked through: what is gone answers with zeros, or with its constant.
    pub(crate) fn into_experts(self, hidden: usize) -> (Experts, Vec<f32>) {
        let nothing = || Mlp {
            gate: Linear::new(vec![0.0; hidden], 1, hidden),
            up: Linear::new(vec![0.0; hidden], 1, hidden),
            down: Linear::new(vec![0.0; hidden], hidden, 1),
        };
        let constants = (self.constants.into_iter())
            .flat_map(|constant| constant.unwrap_or_else(|| vec![0.0; hidden]))
            .collect();
        let mlps = (self.experts.into_iter())
            .map(|slimmed| slimmed.map_or_else(nothing, |slimmed| slimmed.mlp))
            .collect();
        (Experts { mlps, hidden }, constants)
    }
}

impl Slimmed {
    fn part(&self) -> Part<'_> {
        match &self.factors {
            Some((right, left)) => Part::LowRank {
                gate: &self.mlp.gate,
                up: &self.mlp.up,
                right,
                left,
            },
            None => Part::Mlp(&self.mlp),
        }
    }

    /// Its down projection, or the left factor of that.
    fn set_last(&mut self, weights: Vec<f32>) {
        match &mut self.factors {
            Some((right, left)) => {
                *left = Linear::new(weights, left.outputs(), left.inputs());
                self.mlp.down = super::slim::linear(&super::slim::matrix(left).dot(&super::slim::matrix(right)));
            }
            None => self.mlp.down = Linear::new(weights, self.mlp.down.outputs(), self.mlp.down.inputs()),
        }
    }

    fn scale(&mut self, scale: f32) {
        let scaled = |linear: &Linear| {
            let weights = linear.weights().iter().map(|w| w * scale).collect();
            Linear::new(weights, linear.outputs(), linear.inputs())
        };
        self.mlp.down = scaled(&self.mlp.down);
        if let Some((_, left)) = &mut self.factors {
            *left = scaled(left);
        }
    }
}
