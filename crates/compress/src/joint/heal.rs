//! Codes of a layer that is healed on the way: gate and up are coded first, every down projection is refitted jointly to
//! what the layer should add, codes of down follow, and a factor for each expert gives its size back. Law: a step stands
//! only where held-out tokens agree, and a refit only where they still do once it is coded.

use cotk_model::layers::linear::Linear;
use cotk_model::layers::{Layer, Mlp};
use cotk_model::moe::Alive;
use cotk_run::units::ExpertId;
use rayon::prelude::*;

use super::build::CodedExperts;
use super::code::{self, Fed, How};
use super::recipe::Rounding;
use super::rows::LayerRows;
use super::stored::{self, Stored};
use crate::Result;
use crate::choice::{Fate, Kind};
use crate::heal::{HealOptions, HealTokens, Part, Step, heal_down, heal_scales};
use crate::pipeline::Job;
use crate::shrink::survey::LayerTokens;

/// An expert with its first two matrices in codes.
struct Begun {
    expert: ExpertId,
    gate: Stored,
    up: Stored,
    fed: Fed,
    /// Gate and up as coded; down as the source has it, then as it was refitted.
    mlp: Mlp,
}

/// Codes of all down projections of a layer.
struct Downs {
    coded: Vec<Option<Stored>>,
    /// What stands in the place of experts that are not there.
    constants: Vec<Option<Vec<f32>>>,
    scales: Step,
}

impl Downs {
    /// Of the layer's output on held-out tokens, relative.
    fn error(&self) -> f64 {
        match self.scales.is_kept {
            true => self.scales.held_out_after,
            false => self.scales.held_out_before,
        }
    }
}

impl Job<'_> {
    /// As [`code_layer`](Self::code_layer), healed; `tokens` are those of the compressed stream, with what the layer should
    /// add to each.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn code_healed_layer(
        &self,
        layer: &Layer,
        fates: &[Fate],
        (rows, tokens, alive): (&LayerRows, &LayerTokens, Alive<'_>),
        how: &How,
        options: &HealOptions,
    ) -> Result<CodedExperts> {
        let mut begun = self.begin_experts(layer, fates, rows, how)?;
        let heal = tokens.to_heal();
        let mut constants = self.constants(layer.id(), fates, rows)?;
        let plain = self.downs(layer, fates, rows, (&mut begun, &constants), (&heal, options), how)?;
        let mlps: Vec<Option<Mlp>> = begun
            .iter()
            .map(|begun| begun.as_ref().map(|b| b.mlp.clone()))
            .collect();
        let healed = heal_down(&heal, &Part::all(&mlps, &constants), options)?;
        drop(mlps);
        let mut ridge = healed.step;
        let mut best = plain;
        if ridge.is_kept {
            for ((begun, constant), down) in begun.iter_mut().zip(&mut constants).zip(healed.downs) {
                match (begun, constant, down) {
                    (Some(begun), _, Some(down)) => {
                        begun.mlp.down = Linear::new(down, begun.mlp.down.outputs(), begun.mlp.down.inputs());
                    }
                    (None, Some(constant), Some(refitted)) => *constant = refitted,
                    _ => {}
                }
            }
            let refitted = self.downs(layer, fates, rows, (&mut begun, &constants), (&heal, options), how)?;
            // What is better before codes are chosen may be harder to code: what stands decides.
            ridge.held_out_before = best.error();
            ridge.held_out_after = refitted.error();
            ridge.is_kept = refitted.error() < best.error();
            if ridge.is_kept {
                best = refitted;
            }
        }
        let Downs {
            coded: downs,
            constants,
            scales,
        } = best;
        let mut steps = vec![ridge, scales];
        let decoded: Vec<Option<Mlp>> = begun.iter().zip(&downs).map(|(b, down)| as_coded(b, down)).collect();
        let mut router = None;
        if options.router {
            let found = self.recalibrated(layer, &heal, alive, &Part::all(&decoded, &constants), options)?;
            if let Some((rows, step)) = found {
                router = rows;
                steps.push(step);
            }
        }
        drop(decoded);
        let notes = begun.iter().flatten().map(|begun| begun.fed.note).collect();
        let whole = |(begun, down): (Option<Begun>, Option<Stored>)| {
            let (begun, down) = (begun?, down?);
            Some(stored::expert(begun.gate, begun.up, down))
        };
        let constants = constants.into_iter().enumerate();
        let constants = constants.map(|(expert, values)| self.coded_constant(layer.id(), expert, values));
        Ok(CodedExperts {
            constants: constants.collect::<Result<_>>()?,
            experts: begun.into_iter().zip(downs).map(whole).collect(),
            notes,
            steps,
            router,
        })
    }

    /// Codes of the down projections as they are now, and of each times its factor where held-out tokens want one.
    fn downs(
        &self,
        layer: &Layer,
        fates: &[Fate],
        rows: &LayerRows,
        (begun, constants): (&mut [Option<Begun>], &[Option<Vec<f32>>]),
        (heal, options): (&HealTokens<'_>, &HealOptions),
        how: &How,
    ) -> Result<Downs> {
        let all = vec![1.0; fates.len()];
        let coded = self.code_downs(layer, fates, rows, begun, &all, how)?;
        let decoded: Vec<Option<Mlp>> = begun.iter().zip(&coded).map(|(b, down)| as_coded(b, down)).collect();
        let (factors, scales) = heal_scales(heal, &Part::all(&decoded, constants), options)?;
        let mut constants = constants.to_vec();
        let coded = match scales.is_kept {
            true => {
                for (constant, factor) in constants.iter_mut().zip(&factors) {
                    constant.iter_mut().flatten().for_each(|value| *value *= factor);
                }
                self.code_downs(layer, fates, rows, begun, &factors, how)?
            }
            false => coded,
        };
        Ok(Downs {
            coded,
            constants,
            scales,
        })
    }

    /// Codes of gate and up of what is kept.
    fn begin_experts(&self, layer: &Layer, fates: &[Fate], rows: &LayerRows, how: &How) -> Result<Vec<Option<Begun>>> {
        let hidden = self.source.files.spec.hidden;
        let pool = match how.rounding {
            Rounding::Gptq => code::pool(rows, hidden)?,
            Rounding::Nearest => None,
        };
        let begin = |(expert, fate): (ExpertId, &Fate)| -> Result<Option<Begun>> {
            self.with.cancel.check()?;
            let Fate::Coded { matrices, channels } = fate else {
                return Ok(None);
            };
            let mut outer = code::outer(rows, expert, hidden, pool.as_ref(), how)?;
            let mut mlp = self.staying_weights(layer.id(), expert, channels.as_deref(), (rows, &mut outer), how)?;
            let (gate, up) = self.code_outer(layer.id(), expert, &mlp, matrices, &outer, how)?;
            mlp.gate = Linear::new(gate.decoded(), mlp.gate.outputs(), hidden);
            mlp.up = Linear::new(up.decoded(), mlp.up.outputs(), hidden);
            let fed = outer.fed;
            Ok(Some(Begun {
                expert,
                gate,
                up,
                fed,
                mlp,
            }))
        };
        let experts: Vec<(ExpertId, &Fate)> = (0..).map(ExpertId).zip(fates).collect();
        experts.into_par_iter().map(begin).collect()
    }

    /// Codes of the down projections, each times its scale.
    fn code_downs(
        &self,
        layer: &Layer,
        fates: &[Fate],
        rows: &LayerRows,
        begun: &mut [Option<Begun>],
        scales: &[f32],
        how: &How,
    ) -> Result<Vec<Option<Stored>>> {
        let hidden = self.source.files.spec.hidden;
        let code = |((begun, fate), scale): ((&mut Option<Begun>, &Fate), &f32)| -> Result<Option<Stored>> {
            self.with.cancel.check()?;
            let (Some(begun), Fate::Coded { matrices, .. }) = (begun, fate) else {
                return Ok(None);
            };
            let (gate, up) = (begun.mlp.gate.weights(), begun.mlp.up.weights());
            let factor = code::inner(rows, &mut begun.fed, hidden, (&gate, &up), how)?;
            let weights: Vec<f32> = begun.mlp.down.weights().iter().map(|w| w * scale).collect();
            self.code_one(layer.id(), begun.expert, Kind::Down, &weights, matrices, &factor, how)
                .map(Some)
        };
        begun
            .par_iter_mut()
            .zip(fates)
            .zip(scales)
            .map(code)
            .collect::<Result<Vec<_>>>()
    }
}

/// The expert that the codes say.
fn as_coded(begun: &Option<Begun>, down: &Option<Stored>) -> Option<Mlp> {
    let (begun, down) = (begun.as_ref()?, down.as_ref()?);
    let mut mlp = begun.mlp.clone();
    mlp.down = Linear::new(down.decoded(), mlp.down.outputs(), mlp.down.inputs());
    Some(mlp)
}
