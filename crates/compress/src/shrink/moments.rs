//! Second moments of what an expert's matrices see, over the tokens that are routed to it: weighted by squared gates and
//! by the tokens' own weights. Law: one expert's are in memory at a time, on one thread.

use cotk_model::layers::{Mlp, silu};
use ndarray::Array2;

/// Rows of one matrix product.
const ROWS: usize = 512;

/// What one expert's matrices see.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Σ ω·x·xᵀ of the expert's inputs, `[hidden, hidden]`; absent where nobody asked.
    pub input: Option<Array2<f64>>,
    /// Σ ω·h·hᵀ of what its down projection sees, `[inner, inner]`.
    pub middle: Array2<f64>,
    /// Tokens.
    pub tokens: usize,
}

/// `silu(gate · x) · up · x`, `[rows, inner]`.
pub(crate) fn middle(mlp: &Mlp, x: &[f32]) -> Vec<f32> {
    let mut middle = mlp.gate.apply(x);
    middle
        .iter_mut()
        .zip(mlp.up.apply(x))
        .for_each(|(g, u)| *g = silu(*g) * u);
    middle
}

/// Of rows `x` `[rows, hidden]`, each of which counts `weights[row]`.
#[expect(clippy::cast_possible_truncation, reason = "rows are f32")]
pub(crate) fn moments(mlp: &Mlp, x: &[f32], weights: &[f64], with_input: bool) -> Moments {
    let (hidden, inner) = (mlp.gate.inputs(), mlp.gate.outputs());
    let mut input = with_input.then(|| Array2::zeros((hidden, hidden)));
    let mut of_middle = Array2::zeros((inner, inner));
    let add = |sum: &mut Array2<f64>, mut rows: Vec<f32>, width: usize, weights: &[f64]| {
        for (row, weight) in rows.chunks_exact_mut(width).zip(weights) {
            let root = weight.max(0.0).sqrt() as f32;
            row.iter_mut().for_each(|x| *x *= root);
        }
        let rows = Array2::from_shape_vec((weights.len(), width), rows).expect("whole rows");
        sum.zip_mut_with(&rows.t().dot(&rows), |sum, &x| *sum += f64::from(x));
    };
    for (x, weights) in x.chunks(ROWS * hidden).zip(weights.chunks(ROWS)) {
        add(&mut of_middle, middle(mlp, x), inner, weights);
        if let Some(input) = &mut input {
            add(input, x.to_vec(), hidden, weights);
        }
    }
    Moments {
        input,
        middle: of_middle,
        tokens: weights.len(),
    }
}
