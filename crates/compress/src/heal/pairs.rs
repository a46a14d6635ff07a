//! Tokens and the experts they chose as rows for least squares: features times gate times the root of the token's
//! weight, so that errors are plain sums of squares. Law: rows of an expert ascend by token, those that are fitted first.

use cotk_model::layers::linear::Linear;
use cotk_model::layers::silu;
use ndarray::{Array2, ArrayView2, Axis};
use rayon::prelude::*;

use super::{HealTokens, Part};

/// Rows of one matrix product.
pub(super) const ROWS: usize = 512;

/// What one expert's last matrix sees.
pub(super) struct Features {
    /// Token of each row.
    pub(super) tokens: Vec<usize>,
    /// Rows that are fitted; the others are held out.
    pub(super) fitted: usize,
    /// `[rows, width]`, scaled.
    pub(super) rows: Array2<f32>,
}

/// Root of what a token's squared error counts.
#[expect(clippy::cast_possible_truncation, reason = "a scale of rows in f32")]
pub(super) fn root(weight: f64) -> f32 {
    weight.max(0.0).sqrt() as f32
}

/// Of each expert; those without rows or without a last matrix have none.
pub(super) fn features(tokens: &HealTokens<'_>, parts: &[Part<'_>]) -> Vec<Option<Features>> {
    let slots_of = slots_of(tokens, parts.len());
    let of = |(part, slots): (&Part<'_>, Vec<usize>)| {
        let slots = (slots.iter()).filter(|&&slot| tokens.weights[slot / tokens.routed.slots] > 0.0);
        let (held, mut order): (Vec<usize>, Vec<usize>) =
            slots.partition(|&&slot| tokens.held_out[slot / tokens.routed.slots]);
        let fitted = order.len();
        order.extend(held);
        if order.is_empty() {
            return None;
        }
        let token_of: Vec<usize> = order.iter().map(|slot| slot / tokens.routed.slots).collect();
        let mut rows = middles(part, tokens, &token_of)?;
        for ((mut row, &slot), &token) in rows.axis_iter_mut(Axis(0)).zip(&order).zip(&token_of) {
            let scale = tokens.routed.gates[slot] * root(tokens.weights[token]);
            row.map_inplace(|x| *x *= scale);
        }
        Some(Features {
            tokens: token_of,
            fitted,
            rows,
        })
    };
    parts.par_iter().zip(slots_of).map(of).collect()
}

/// Places in [`cotk_model::moe::Routed::experts`] of each expert, ascending.
pub(super) fn slots_of(tokens: &HealTokens<'_>, experts: usize) -> Vec<Vec<usize>> {
    let mut slots_of = vec![Vec::new(); experts];
    for (slot, expert) in tokens.routed.experts.iter().enumerate() {
        slots_of[expert.index()].push(slot);
    }
    slots_of
}

/// What the last matrix sees of these tokens, `[tokens, width]`; `None` where there is none.
fn middles(part: &Part<'_>, tokens: &HealTokens<'_>, order: &[usize]) -> Option<Array2<f32>> {
    let (gate, up, right) = match part {
        Part::Mlp(mlp) => (&mlp.gate, &mlp.up, None),
        Part::LowRank { gate, up, right, .. } => (*gate, *up, Some(*right)),
        Part::Constant(_) => return Some(Array2::ones((order.len(), 1))),
        Part::Absent => return None,
    };
    let width = right.map_or(gate.outputs(), Linear::outputs);
    let mut rows = Vec::with_capacity(order.len() * width);
    for block in order.chunks(ROWS) {
        let x = gather(tokens.inputs, tokens.hidden, block);
        let mut middle = gate.apply(&x);
        middle.iter_mut().zip(up.apply(&x)).for_each(|(g, u)| *g = silu(*g) * u);
        match right {
            Some(right) => rows.extend(right.apply(&middle)),
            None => rows.extend(middle),
        }
    }
    Some(Array2::from_shape_vec((order.len(), width), rows).expect("as many rows as tokens"))
}

/// Rows of these tokens, one after the other.
pub(super) fn gather(values: &[f32], width: usize, tokens: &[usize]) -> Vec<f32> {
    let mut rows = Vec::with_capacity(tokens.len() * width);
    for &token in tokens {
        rows.extend_from_slice(&values[token * width..][..width]);
    }
    rows
}

/// `aᵀ·b` in f64: products of a few hundred rows in f32, their sums in order whatever the threads.
pub(super) fn gram(rows: usize, block: impl Fn(usize, usize) -> Array2<f32> + Sync) -> Array2<f64> {
    let starts: Vec<usize> = (0..rows).step_by(ROWS).collect();
    let blocks: Vec<Array2<f32>> = starts
        .into_par_iter()
        .map(|start| block(start, (start + ROWS).min(rows)))
        .collect();
    let mut blocks = blocks.into_iter();
    let mut sum = blocks.next().map(|first| first.mapv(f64::from)).unwrap_or_default();
    for block in blocks {
        sum.zip_mut_with(&block, |sum, &x| *sum += f64::from(x));
    }
    sum
}

/// Down projections as `[hidden, width]`.
pub(super) fn last(part: &Part<'_>) -> Option<Array2<f64>> {
    let of = |linear: &Linear| {
        let weights = linear.weights();
        let view = ArrayView2::from_shape((linear.outputs(), linear.inputs()), &weights);
        view.expect("a linear knows its shape").mapv(f64::from)
    };
    match part {
        Part::Mlp(mlp) => Some(of(&mlp.down)),
        Part::LowRank { left, .. } => Some(of(left)),
        Part::Constant(constant) => Some(Array2::from_shape_fn((constant.len(), 1), |(at, _)| {
            f64::from(constant[at])
        })),
        Part::Absent => None,
    }
}
