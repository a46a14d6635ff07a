//! Method A of few-shot transfer: a non-negative mix of source models and physical counts, four strengths of doubt mixed by
//! their leave-one-out errors. Law: every part costs at least nothing, so the mix is monotone in them.

use super::few_shot::Rows;
use crate::fit::nnls;

/// `(λ of sources, λ of counts)`: from "sources only" to "counts only" (reference 6.3).
const DOUBTS: [(f64, f64); 4] = [(0.02, 1e4), (0.02, 0.5), (0.03, 0.03), (1e4, 0.02)];
/// λ of the constant.
const CONSTANT: f64 = 0.02;
/// Mixing weight of a fit with leave-one-out error `r`: `(r + FLOOR)^-SHARPNESS`.
const FLOOR: f64 = 0.01;
const SHARPNESS: i32 = -10;

/// Predictions of every network in `all`, from the times of `rows` (indices into `all`, times above 0).
/// `sources` columns come first in a row of `all`, then counts; each has mean 1 over the pool.
pub(super) fn predict(all: &[Vec<f64>], sources: usize, rows: &Rows) -> Vec<f64> {
    let scale = rows.median();
    let measured: Vec<(usize, f64)> = rows.0.iter().map(|&(i, ms)| (i, ms / scale)).collect();
    let fits = DOUBTS.map(|doubt| {
        let rms = left_out(all, sources, &measured, doubt);
        (solve(all, sources, &measured, doubt), (rms + FLOOR).powi(SHARPNESS))
    });
    let weights: f64 = fits.iter().map(|f| f.1).sum();
    let of = |row: &Vec<f64>| {
        let mixed: f64 = fits.iter().map(|(c, weight)| weight * value(c, row)).sum();
        scale * mixed / weights
    };
    all.iter().map(of).collect()
}

/// Relative rms error of each measured network when it is left out.
fn left_out(all: &[Vec<f64>], sources: usize, measured: &[(usize, f64)], doubt: (f64, f64)) -> f64 {
    let error = |out: usize| {
        let kept: Vec<(usize, f64)> = [&measured[..out], &measured[out + 1..]].concat();
        let (index, time) = measured[out];
        (value(&solve(all, sources, &kept, doubt), &all[index]) / time - 1.0).powi(2)
    };
    #[expect(clippy::cast_precision_loss, reason = "ten or so")]
    let n = measured.len() as f64;
    ((0..measured.len()).map(error).sum::<f64>() / n).sqrt()
}

/// Constant, then one coefficient a column.
fn value(coefficients: &[f64], row: &[f64]) -> f64 {
    coefficients[0] + coefficients[1..].iter().zip(row).map(|(c, x)| c * x).sum::<f64>()
}

/// `argmin_{c ≥ 0} Σ ((c·f − y) / y)² + Σ λ c²`.
fn solve(all: &[Vec<f64>], sources: usize, measured: &[(usize, f64)], (of_sources, of_counts): (f64, f64)) -> Vec<f64> {
    let n = all.first().map_or(0, Vec::len) + 1;
    let mut gram = vec![vec![0.0; n]; n];
    let mut right = vec![0.0; n];
    for &(index, time) in measured {
        let features: Vec<f64> = std::iter::once(&1.0).chain(&all[index]).map(|x| x / time).collect();
        for i in 0..n {
            right[i] += features[i];
            for j in 0..n {
                gram[i][j] += features[i] * features[j];
            }
        }
    }
    for (i, row) in gram.iter_mut().enumerate() {
        row[i] += match i {
            0 => CONSTANT,
            i if i <= sources => of_sources,
            _ => of_counts,
        };
    }
    nnls(&gram, &right)
}
