//! The codes of one layer for the fates that were chosen: gate and up first, then down behind the coded ones. Law: what
//! stands depends on fates, rows and settings alone, whatever the threads.

use cotk_container::writer::{CodedExpert, Constant};
use cotk_model::layers::Mlp;
use cotk_run::units::{ExpertId, LayerId};
use rayon::prelude::*;

use super::code::{self, HessianNote, How, Outer};
use super::recipe::Rounding;
use super::rows::{LayerRows, Part};
use super::stored::{self, Stored};
use super::variants::{constant, shrunk};
use crate::choice::{Fate, Kind, MatrixChoice};
use crate::heal::Step;
use crate::layer::Sample;
use crate::pipeline::Job;
use crate::{CompressError, Result};

/// Held-out rows of an expert that its prefixes are measured on.
const PREFIX_ROWS: usize = 256;

/// A layer's experts in codes, in original numbering, and what stands behind them.
#[derive(Debug)]
pub(crate) struct CodedExperts {
    /// Prefixes are not measured yet.
    pub(crate) experts: Vec<Option<CodedExpert>>,
    /// In the place of some that are not there.
    pub(crate) constants: Vec<Option<Constant>>,
    /// Of kept experts.
    pub(crate) notes: Vec<HessianNote>,
    /// What healing did.
    pub(crate) steps: Vec<Step>,
    /// Rows of the router, where healing fitted them anew.
    pub(crate) router: Option<Vec<f32>>,
}

impl Job<'_> {
    /// Codes what is kept of a layer.
    ///
    /// # Errors
    /// Weights that cannot be read or coded; the file system's.
    pub(crate) fn code_layer(
        &self,
        layer: LayerId,
        fates: &[Fate],
        rows: &LayerRows,
        how: &How,
    ) -> Result<CodedExperts> {
        let hidden = self.source.files.spec.hidden;
        let pool = match how.rounding {
            Rounding::Gptq => code::pool(rows, hidden)?,
            Rounding::Nearest => None,
        };
        let experts = (0..).map(ExpertId).take(fates.len()).collect::<Vec<_>>();
        let code = |(expert, fate): (ExpertId, &Fate)| -> Result<Option<(CodedExpert, HessianNote)>> {
            self.with.cancel.check()?;
            let Fate::Coded { matrices, channels } = fate else {
                return Ok(None);
            };
            let mut outer = code::outer(rows, expert, hidden, pool.as_ref(), how)?;
            let weights = self.staying_weights(layer, expert, channels.as_deref(), (rows, &mut outer), how)?;
            let (gate, up) = self.code_outer(layer, expert, &weights, matrices, &outer, how)?;
            let seen = (gate.decoded(), up.decoded());
            let factor = code::inner(rows, &mut outer.fed, hidden, (&seen.0, &seen.1), how)?;
            let down = self.code_one(
                layer,
                expert,
                Kind::Down,
                &weights.down.weights(),
                matrices,
                &factor,
                how,
            )?;
            Ok(Some((stored::expert(gate, up, down), outer.fed.note)))
        };
        let coded: Vec<_> = experts
            .into_par_iter()
            .zip(fates)
            .map(code)
            .collect::<Result<Vec<_>>>()?;
        let notes = coded.iter().flatten().map(|(_, note)| *note).collect();
        let experts = coded.into_iter().map(|coded| coded.map(|(coded, _)| coded)).collect();
        let constants = self.constants(layer, fates, rows)?.into_iter().enumerate();
        Ok(CodedExperts {
            experts,
            constants: constants
                .map(|(e, values)| self.coded_constant(layer, e, values))
                .collect::<Result<_>>()?,
            notes,
            steps: Vec::new(),
            router: None,
        })
    }

    pub(super) fn code_outer(
        &self,
        layer: LayerId,
        expert: ExpertId,
        weights: &Mlp,
        matrices: &[MatrixChoice; 3],
        outer: &Outer,
        how: &How,
    ) -> Result<(Stored, Stored)> {
        let one = |kind, weights: &[f32]| self.code_one(layer, expert, kind, weights, matrices, &outer.factor, how);
        Ok((
            one(Kind::Gate, &weights.gate.weights())?,
            one(Kind::Up, &weights.up.weights())?,
        ))
    }

    #[expect(clippy::too_many_arguments, reason = "where, what, how")]
    pub(super) fn code_one(
        &self,
        layer: LayerId,
        expert: ExpertId,
        kind: Kind,
        weights: &[f32],
        matrices: &[MatrixChoice; 3],
        factor: &cotk_quant::gptq::Factor,
        how: &How,
    ) -> Result<Stored> {
        let rows = match kind {
            Kind::Gate | Kind::Up => weights.len() / self.source.files.spec.hidden,
            Kind::Down => self.source.files.spec.hidden,
        };
        let MatrixChoice { form, rank } = matrices[kind as usize];
        let coded = code::code_matrix(weights, rows, form, factor, how);
        let coded = coded.map_err(|source| self.unfit(layer, expert, kind, source))?;
        Stored::corrected(coded, weights, factor, rank)
    }

    /// What each expert that is a constant answers, as f32; the experts are in original numbering.
    pub(super) fn constants(&self, layer: LayerId, fates: &[Fate], rows: &LayerRows) -> Result<Vec<Option<Vec<f32>>>> {
        let of = |(expert, fate): (ExpertId, &Fate)| match fate {
            Fate::Constant => constant(rows, expert, &self.kept_weights(layer, expert, None)?).map(Some),
            Fate::Dropped | Fate::Coded { .. } => Ok(None),
        };
        let experts: Vec<_> = (0..).map(ExpertId).zip(fates).collect();
        experts.into_par_iter().map(of).collect()
    }

    /// As it is stored.
    pub(super) fn coded_constant(
        &self,
        layer: LayerId,
        expert: usize,
        values: Option<Vec<f32>>,
    ) -> Result<Option<Constant>> {
        let Some(values) = values else { return Ok(None) };
        let constant = Constant::new(&values).map_err(|source| CompressError::Weights {
            file: self.source.files.source.file("").to_owned(),
            layer,
            expert: ExpertId(u32::try_from(expert).expect("expert counts fit 32 bits")),
            matrix: "the constant",
            source,
        })?;
        Ok(Some(constant))
    }

    /// The source's weights of an expert; where channels go, those that stay have taken over under the Hessian of the rows.
    pub(super) fn staying_weights(
        &self,
        layer: LayerId,
        expert: ExpertId,
        channels: Option<&[u32]>,
        (rows, outer): (&LayerRows, &mut Outer),
        how: &How,
    ) -> Result<Mlp> {
        let whole = self.kept_weights(layer, expert, None)?;
        let Some(channels) = channels else { return Ok(whole) };
        let hidden = self.source.files.spec.hidden;
        let (gate, up) = (whole.gate.weights(), whole.up.weights());
        let inner = code::inner(rows, &mut outer.fed, hidden, (&gate, &up), how)?;
        shrunk(&whole, &inner, channels)
    }

    /// The source's weights of an expert, or of the inner channels that stay.
    pub(crate) fn kept_weights(&self, layer: LayerId, expert: ExpertId, channels: Option<&[u32]>) -> Result<Mlp> {
        let (spec, source) = (&self.source.files.spec, self.source.files.source.as_ref());
        let weights = cotk_model::reference::load_expert(spec, source, layer, expert)?;
        Ok(match channels {
            None => weights,
            Some(channels) => keep_channels(&weights, channels),
        })
    }
}

/// Held-out rows for measuring prefixes; all that came where none is held out.
///
/// # Errors
/// The file system's.
pub(crate) fn held_sample(rows: &LayerRows, expert: ExpertId) -> Result<Sample> {
    let picked = rows.of(expert, Part::Held).thinned(PREFIX_ROWS);
    Ok(Sample {
        rows: rows.inputs(&picked.tokens)?,
        gates: picked.gates,
    })
}

/// Rows of gate and up, columns of down.
pub(super) fn keep_channels(weights: &Mlp, channels: &[u32]) -> Mlp {
    use cotk_model::layers::linear::Linear;
    let hidden = weights.gate.inputs();
    let inner = weights.down.inputs();
    let rows = |linear: &Linear| {
        let all = linear.weights();
        let kept = channels.iter().flat_map(|&c| &all[c as usize * hidden..][..hidden]);
        Linear::new(kept.copied().collect(), channels.len(), hidden)
    };
    let down = weights.down.weights();
    let kept = down
        .chunks_exact(inner)
        .flat_map(|row| channels.iter().map(|&c| row[c as usize]));
    Mlp {
        gate: rows(&weights.gate),
        up: rows(&weights.up),
        down: Linear::new(kept.collect(), weights.down.outputs(), channels.len()),
    }
}
