//! What an expert may become instead of codes for all of its weights: nothing, a constant, or itself with fewer inner
//! channels, the others having taken over (OBS; reference: moe-compression 7, 12.2). Law: what it would lose is measured on
//! held-out tokens, in the unit of every other offer.

use cotk_container::layout::aligned_constant_bytes;
use cotk_model::layers::Mlp;
use cotk_model::layers::linear::Linear;
use cotk_quant::gptq::Factor;
use cotk_run::units::{ExpertId, LayerId};
use ndarray::ArrayView2;

use super::build::keep_channels;
use super::code::{middle, times};
use super::offers::{Judge, Menu};
use super::rows::{LayerRows, Part, Picked};
use crate::Result;
use crate::choice::{Instead, Variant};
use crate::pipeline::Job;

/// Tokens that a constant is the mean over, at most.
const CONSTANT_ROWS: usize = 2048;
/// Share of the Hessian's mean diagonal that is added to it where channels go.
const DAMPING: f64 = 1e-3;

/// What is offered beside codes.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Others {
    /// What going means: nothing is offered where it changes the gates of those that stay.
    pub(crate) gone: Option<Instead>,
    /// Inner channels that stay.
    pub(crate) channels: Vec<usize>,
}

impl Job<'_> {
    /// All of one expert, in the order of fewer and fewer bytes.
    pub(super) fn variants(
        &self,
        place: (LayerId, ExpertId),
        whole: &Mlp,
        rows: &LayerRows,
        (judge, [outer, inner]): (&Judge<'_>, [&Factor; 2]),
        menu: &Menu,
    ) -> Result<Vec<Variant>> {
        let hidden = self.source.files.spec.hidden;
        let mut variants = Vec::new();
        for &count in menu
            .others
            .channels
            .iter()
            .filter(|&&count| count < whole.gate.outputs())
        {
            let channels = staying(whole, inner, count)?;
            let smaller = shrunk(whole, inner, &channels)?;
            let error = judge.whole_error(&outputs(&judge.inputs, &smaller, hidden));
            let at: Vec<usize> = channels.iter().map(|&c| c as usize).collect();
            let axis = ndarray::Axis(0);
            let seen = inner.hessian().select(axis, &at).select(ndarray::Axis(1), &at);
            let factor = Factor::try_new(seen.view(), menu.how.damping)?;
            let judge = Judge::new(&smaller, place.1, rows, hidden)?;
            variants.push(Variant {
                expert: place.1,
                instead: Instead::Channels(channels),
                error,
                bytes: 0,
                offers: self.matrix_offers(place, &smaller, [outer, &factor], &judge, menu)?,
            });
        }
        if let Some(gone) = &menu.others.gone {
            let (answer, bytes) = match gone {
                Instead::Constant => (constant(rows, place.1, whole)?, aligned_constant_bytes(hidden)),
                _ => (vec![0.0; hidden], 0),
            };
            let answers = answer.repeat(judge.picked.tokens.len());
            variants.push(Variant {
                expert: place.1,
                instead: gone.clone(),
                error: judge.whole_error(&answers),
                bytes,
                offers: Vec::new(),
            });
        }
        Ok(variants)
    }
}

/// The mean of what an expert answers over fitting tokens that came to it, each counted by its weight: no constant loses
/// less on them (novices: MoNE). Zeros where no token came.
pub(crate) fn constant(rows: &LayerRows, expert: ExpertId, whole: &Mlp) -> Result<Vec<f32>> {
    let Picked { tokens, weights, .. } = rows.of(expert, Part::Fit).thinned(CONSTANT_ROWS);
    let hidden = whole.gate.inputs();
    let answers = outputs(&rows.inputs(&tokens)?, whole, hidden);
    let mut sums = vec![0.0f64; hidden];
    for (answer, weight) in answers.chunks_exact(hidden).zip(&weights) {
        sums.iter_mut()
            .zip(answer)
            .for_each(|(sum, &y)| *sum += weight * f64::from(y));
    }
    let all: f64 = weights.iter().sum();
    #[expect(clippy::cast_possible_truncation, reason = "a mean of f32")]
    let mean = |sum: f64| if all > 0.0 { (sum / all) as f32 } else { 0.0 };
    Ok(sums.into_iter().map(mean).collect())
}

/// The expert on some of its channels, down refitted so that they take over from the others under the Hessian of all of
/// them.
pub(crate) fn shrunk(whole: &Mlp, inner: &Factor, channels: &[u32]) -> Result<Mlp> {
    let mut smaller = keep_channels(whole, channels);
    let down = wide(&whole.down);
    let at: Vec<usize> = channels.iter().map(|&c| c as usize).collect();
    let (fitted, _) = cotk_linalg::keep_columns(down.view(), inner.hessian(), DAMPING, &at)?;
    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
    let fitted: Vec<f32> = fitted.iter().map(|&w| w as f32).collect();
    smaller.down = Linear::new(fitted, whole.down.outputs(), channels.len());
    Ok(smaller)
}

/// The channels that stay, ascending.
fn staying(whole: &Mlp, inner: &Factor, count: usize) -> Result<Vec<u32>> {
    let order = cotk_linalg::removal_order(wide(&whole.down).view(), inner.hessian(), DAMPING, count)?;
    let gone: std::collections::HashSet<usize> = order.iter().map(|removal| removal.column).collect();
    let all = 0..u32::try_from(whole.down.inputs()).expect("inner sizes fit 32 bits");
    Ok(all.filter(|&c| !gone.contains(&(c as usize))).collect())
}

/// `[tokens, hidden]`.
fn outputs(inputs: &[f32], mlp: &Mlp, hidden: usize) -> Vec<f32> {
    let middle = middle(inputs, &mlp.gate.weights(), &mlp.up.weights(), hidden);
    times(&middle, &mlp.down.weights(), mlp.down.inputs())
}

fn wide(linear: &Linear) -> ndarray::Array2<f64> {
    let weights = linear.weights();
    let view = ArrayView2::from_shape((linear.outputs(), linear.inputs()), &weights);
    view.expect("rows and columns").mapv(f64::from)
}
