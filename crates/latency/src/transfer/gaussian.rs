//! Method B of few-shot transfer: a Gaussian process over standardised source models and counts, averaged over a grid of
//! kernels and noises by their marginal likelihood (Rasmussen and Williams, *Gaussian Processes for Machine Learning*,
//! 2006, ch. 2 and 5). Knows no networks: rows of numbers.

use super::few_shot::Rows;
use crate::cholesky::{cholesky, solve};

/// Weights of sources and counts in the kernel.
const KERNELS: [(f64, f64); 5] = [(1.0, 0.0), (1.0, 0.1), (1.0, 0.3), (1.0, 1.0), (0.1, 1.0)];
const NOISES: [f64; 5] = [0.005, 0.02, 0.06, 0.2, 0.6];
/// Variance of the mean.
const MEAN: f64 = 10.0;

/// `⟨a, b⟩ / length`.
pub(super) fn alike(a: &[f64], b: &[f64]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a few dozen")]
    let n = a.len().max(1) as f64;
    a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / n
}

/// Predictions of every network, from the times of `rows`: `sources` and `counts` are standardised, one row a network.
pub(super) fn predict(sources: &[Vec<f64>], counts: &[Vec<f64>], rows: &Rows) -> Vec<f64> {
    let median = rows.median();
    #[expect(clippy::cast_precision_loss, reason = "ten or so")]
    let n = rows.0.len() as f64;
    let mean = rows.0.iter().map(|r| r.1).sum::<f64>() / n;
    let deviation = (rows.0.iter().map(|r| (r.1 - mean).powi(2)).sum::<f64>() / n).sqrt();
    if deviation <= 0.0 {
        return vec![median; sources.len()];
    }
    let targets: Vec<f64> = rows.0.iter().map(|r| (r.1 - median) / deviation).collect();
    let indices: Vec<usize> = rows.0.iter().map(|r| r.0).collect();
    // (log weight, kernel, K⁻¹t)
    let mut fits: Vec<(f64, (f64, f64), Vec<f64>)> = Vec::new();
    for (a, b) in KERNELS {
        let kernel =
            |i: usize, j: usize| a * alike(&sources[i], &sources[j]) + b * alike(&counts[i], &counts[j]) + MEAN;
        for noise in NOISES {
            let gram: Vec<Vec<f64>> = indices
                .iter()
                .map(|&i| {
                    indices
                        .iter()
                        .map(|&j| kernel(i, j) + if i == j { noise } else { 0.0 })
                        .collect()
                })
                .collect();
            let Some(l) = cholesky(&gram) else { continue };
            let alpha = solve(&l, &targets);
            let fit: f64 = targets.iter().zip(&alpha).map(|(t, a)| t * a).sum::<f64>() / n;
            let volume: f64 = l.iter().enumerate().map(|(i, row)| row[i].ln()).sum();
            fits.push((-n / 2.0 * fit.max(1e-300).ln() - volume, (a, b), alpha));
        }
    }
    let best = fits.iter().map(|f| f.0).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = fits.iter().map(|f| (f.0 - best).exp()).sum();
    // One weight a measured network for each kernel, summed over noises.
    let mut by_network = vec![(0.0, 0.0, 0.0); indices.len()];
    for (log_weight, (a, b), alpha) in &fits {
        let weight = (log_weight - best).exp() / total;
        for (slot, alpha) in by_network.iter_mut().zip(alpha) {
            slot.0 += weight * alpha * a;
            slot.1 += weight * alpha * b;
            slot.2 += weight * alpha * MEAN;
        }
    }
    let of = |network: usize| {
        let standard: f64 = indices
            .iter()
            .zip(&by_network)
            .map(|(&i, w)| {
                w.0 * alike(&sources[i], &sources[network]) + w.1 * alike(&counts[i], &counts[network]) + w.2
            })
            .sum();
        median + deviation * standard
    };
    (0..sources.len()).map(of).collect()
}
