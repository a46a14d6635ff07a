//! From weights to codes: the Hessian of what each matrix of an expert sees, GPTQ under it, counted where it had to lean
//! on others. Law: a matrix is fitted to the fitting part of the tokens alone.

use cotk_model::layers::silu;
use cotk_quant::QuantError;
use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::CodedMatrix;
use cotk_quant::encode::encode;
use cotk_quant::gptq::{self, Factor, Settings};
use cotk_quant::hessian::{Accumulator, Moment, shrink};
use cotk_run::units::ExpertId;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::recipe::{Joint, Rounding};
use super::rows::{LayerRows, Part, Picked};
use crate::Result;
use crate::choice::Form;
use crate::heal::HealOptions;

/// Rows of inputs in memory at once, per expert.
const CHUNK_ROWS: usize = 4096;
/// Effective tokens per input below which a Hessian leans on others.
const FED_TIMES: f64 = 4.0;
/// Tokens that are let in beside too few, per input.
const SOFT_TIMES: usize = 4;
/// Between the scale that is best for rounding and those that are best where errors are fed back at few bits.
const COMPARED_FACTOR: f32 = 1.1;
/// Of tokens that did not come: the square of this is what they count.
const SOFT_ETA: f64 = 0.3;
/// Tokens of the layer that the pooled Hessian is made of, per input.
const POOL_TIMES: usize = 16;

/// How codes are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct How {
    pub rounding: Rounding,
    pub scale_factors: Vec<f32>,
    pub refit_rounds: usize,
    pub damping: f64,
    /// Whether several first widths and zero points are tried.
    pub tries_starts: bool,
    /// Refit down projections to what the layer should add, and each expert's size after its codes stand.
    pub heal: Option<HealOptions>,
}

impl How {
    /// As a recipe says.
    pub fn of(joint: &Joint) -> Self {
        Self {
            rounding: joint.rounding,
            scale_factors: joint.scale_factors.iter().map(|f| f.get()).collect(),
            refit_rounds: joint.refit_rounds,
            damping: joint.damping.get(),
            tries_starts: true,
            heal: joint.heal.then(|| HealOptions {
                router: joint.heal_router,
                ..HealOptions::default()
            }),
        }
    }

    /// Near enough to compare forms by: one scale, one start.
    #[must_use]
    pub fn to_compare(mut self) -> Self {
        self.scale_factors = vec![COMPARED_FACTOR];
        self.tries_starts = false;
        self
    }

    /// Each weight's nearest.
    pub fn nearest() -> Self {
        Self {
            rounding: Rounding::Nearest,
            scale_factors: vec![1.0],
            refit_rounds: 0,
            damping: gptq::DAMPING,
            tries_starts: false,
            heal: None,
        }
    }
}

/// What the Hessians of one expert stand on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HessianNote {
    pub expert: ExpertId,
    /// Fitting tokens that came.
    pub tokens: u64,
    /// `(Σ w)² / Σ w²` of them.
    pub effective_tokens: f64,
    /// Share of the target in the Hessian of gate and up, and in that of down; 0: enough tokens came.
    pub lambda: [f64; 2],
    /// Tokens that did not come but were let in.
    pub soft_tokens: u64,
    /// Inputs of gate and up, and of down, that never moved.
    pub dead: [usize; 2],
}

impl HessianNote {
    /// Whether it leaned on others.
    pub fn is_shrunk(&self) -> bool {
        self.lambda.iter().any(|&lambda| lambda > 0.0)
    }
}

/// Ready to code one expert.
pub(crate) struct Outer {
    pub(crate) factor: Factor,
    pub(crate) fed: Fed,
}

/// What an expert is fitted to.
pub(crate) struct Fed {
    pub(crate) note: HessianNote,
    /// Fitting tokens, and those let in.
    pub(crate) own: Picked,
    pub(crate) soft: Picked,
}

/// Second moments of all tokens of the layer, which starved experts lean on; `None` where all are fed.
pub(crate) fn pool(rows: &LayerRows, hidden: usize) -> Result<Option<Moment>> {
    let starved = |expert| effective(&rows.of(expert, Part::Fit).weights) < FED_TIMES * count(hidden);
    let experts = u32::try_from(rows.usage.experts.len()).expect("expert counts fit 32 bits");
    if !(0..experts).map(ExpertId).any(starved) {
        return Ok(None);
    }
    moment(rows, &[&rows.all(Part::Fit, POOL_TIMES * hidden)], hidden, Ok).map(Some)
}

/// The Hessian that gate and up of one expert share.
pub(crate) fn outer(
    rows: &LayerRows,
    expert: ExpertId,
    hidden: usize,
    pool: Option<&Moment>,
    how: &How,
) -> Result<Outer> {
    let own = rows.of(expert, Part::Fit);
    let effective_tokens = effective(&own.weights);
    let is_starved = effective_tokens < FED_TIMES * count(hidden);
    let soft = if is_starved {
        rows.likely(expert, Part::Fit, SOFT_TIMES * hidden, SOFT_ETA)
    } else {
        Picked::default()
    };
    let moment = moment(rows, &[&own], hidden, Ok)?;
    let mut note = HessianNote {
        expert,
        tokens: own.tokens.len() as u64,
        effective_tokens,
        lambda: [0.0; 2],
        soft_tokens: soft.tokens.len() as u64,
        dead: [0; 2],
    };
    let hessian = match pool {
        Some(pool) if is_starved => {
            let shrunk = shrink(&moment, pool.second.view(), 1.0)?;
            note.lambda[0] = shrunk.lambda;
            shrunk.hessian
        }
        _ => moment.second,
    };
    let factor = Factor::try_new(hessian.view(), how.damping)?;
    note.dead[0] = factor.dead();
    Ok(Outer {
        factor,
        fed: Fed { note, own, soft },
    })
}

/// The Hessian of an expert's down projection behind these gate and up projections.
pub(crate) fn inner(
    rows: &LayerRows,
    fed: &mut Fed,
    hidden: usize,
    (gate, up): (&[f32], &[f32]),
    how: &How,
) -> Result<Factor> {
    let inner = gate.len() / hidden;
    let middle = |x: Vec<f32>| Ok(middle(&x, gate, up, hidden));
    let own = moment(rows, &[&fed.own], inner, middle)?;
    let hessian = if fed.note.effective_tokens < FED_TIMES * count(inner) {
        let soft = moment(rows, &[&fed.soft], inner, middle)?;
        let shrunk = shrink(&own, soft.second.view(), 1.0)?;
        fed.note.lambda[1] = shrunk.lambda;
        shrunk.hessian
    } else {
        own.second
    };
    let factor = Factor::try_new(hessian.view(), how.damping)?;
    fed.note.dead[1] = factor.dead();
    Ok(factor)
}

/// Second moments `[cols, cols]` over these tokens of what `see` makes of their inputs.
fn moment(
    rows: &LayerRows,
    picked: &[&Picked],
    cols: usize,
    see: impl Fn(Vec<f32>) -> Result<Vec<f32>>,
) -> Result<Moment> {
    let mut sums = Accumulator::new(cols);
    for picked in picked {
        for (tokens, weights) in picked.tokens.chunks(CHUNK_ROWS).zip(picked.weights.chunks(CHUNK_ROWS)) {
            sums.add(&see(rows.inputs(tokens)?)?, weights)?;
        }
    }
    Ok(sums.finish())
}

/// `silu(gate·x) · (up·x)`, `[tokens, inner]`.
pub(crate) fn middle(x: &[f32], gate: &[f32], up: &[f32], hidden: usize) -> Vec<f32> {
    let mut h = times(x, gate, hidden);
    let up = times(x, up, hidden);
    h.iter_mut().zip(up).for_each(|(g, u)| *g = silu(*g) * u);
    h
}

/// `x · Wᵀ`: `x` `[tokens, cols]`, `weights` `[rows, cols]`.
pub(crate) fn times(x: &[f32], weights: &[f32], cols: usize) -> Vec<f32> {
    let x = ArrayView2::from_shape((x.len() / cols, cols), x).expect("whole rows");
    let weights = ArrayView2::from_shape((weights.len() / cols, cols), weights).expect("whole rows");
    let mut product = Array2::<f32>::zeros((x.nrows(), weights.nrows()));
    general_mat_mul(1.0, &x, &weights.t(), 0.0, &mut product);
    product.into_raw_vec_and_offset().0
}

/// Codes of one matrix `[rows, cols]`; without a factor, or where rounding says so, to the nearest.
///
/// # Errors
/// A format that does not exist; weights that no scale reaches.
pub(crate) fn code_matrix(
    weights: &[f32],
    rows: usize,
    form: Form,
    factor: &Factor,
    how: &How,
) -> std::result::Result<CodedMatrix, QuantError> {
    let format = form.format(rows, weights.len() / rows)?;
    if how.rounding == Rounding::Nearest {
        return encode(weights, format);
    }
    let mut best: Option<(f64, CodedMatrix)> = None;
    let starts = starts(form.code);
    let tried = if how.tries_starts { starts.len() } else { 1 };
    for &(first, zero_point) in &starts[..tried] {
        let settings = Settings {
            first,
            zero_point,
            scale_factors: how.scale_factors.clone(),
            refit_rounds: how.refit_rounds,
        };
        let solution = gptq::solve(weights, format, factor, &settings)?;
        let score = score(&solution);
        if best.as_ref().is_none_or(|(least, _)| score < *least) {
            best = Some((score, solution.coded));
        }
    }
    Ok(best.expect("every code has a start").1)
}

/// First widths and zero points that are tried.
fn starts(code: Code) -> Vec<(Bits, Option<f32>)> {
    match code {
        // Two levels on each side of zero, or zero itself and one more on one side.
        Code::Plain(Bits::B2) => vec![(Bits::B2, None), (Bits::B2, Some(1.5))],
        // In the middle first: near the best at every width.
        Code::Nested224 => vec![(Bits::B4, None), (Bits::B8, None), (Bits::B2, None)],
        _ => code.prefixes().iter().map(|&bits| (bits, None)).collect(),
    }
}

/// What a solution loses over its widths: each in units of what that many bits usually lose, so that none is sacrificed.
fn score(solution: &gptq::Solution) -> f64 {
    let per_width = |loss: &gptq::WidthLoss| loss.loss * 4f64.powi(i32::try_from(loss.bits.get()).expect("at most 8"));
    solution.losses.iter().map(per_width).sum()
}

/// `(Σ w)² / Σ w²`.
fn effective(weights: &[f64]) -> f64 {
    let (sum, squares): (f64, f64) = (weights.iter().sum(), weights.iter().map(|w| w * w).sum());
    if squares > 0.0 { sum * sum / squares } else { 0.0 }
}

#[expect(clippy::cast_precision_loss, reason = "sizes are small")]
fn count(size: usize) -> f64 {
    size as f64
}
