//! Scales of a sum's parts from a few measured sums: `argmin Σ w·((Σ_g s_g·t_g − y) / y)² + λ Σ_g (ln s_g − prior_g)²`, by
//! Gauss and Newton in ln s with Levenberg's damping (Nocedal and Wright, *Numerical Optimization*, 2006, ch. 10). Scales stay
//! above 0; a part that no row has stays at its prior.

use crate::cholesky::{cholesky, solve};

/// One measured sum.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    /// ms of each part, as predicted.
    pub(crate) parts: Vec<f64>,
    /// Measured.
    pub(crate) ms: f64,
    /// Counts as so many rows.
    pub(crate) weight: f64,
}

impl Row {
    /// Predicted over measured.
    pub(crate) fn ratio(&self, scales: &[f64]) -> f64 {
        scales.iter().zip(&self.parts).map(|(s, t)| s * t).sum::<f64>() / self.ms
    }
}

/// The scales.
pub(crate) fn fit(rows: &[Row], prior: &[f64], doubt: f64) -> Vec<f64> {
    let n = prior.len();
    let exp = |logs: &[f64]| logs.iter().map(|u| u.exp()).collect::<Vec<f64>>();
    let cost = |logs: &[f64]| {
        let scales = exp(logs);
        let misfit: f64 = rows
            .iter()
            .map(|row| row.weight * (row.ratio(&scales) - 1.0).powi(2))
            .sum();
        misfit + doubt * logs.iter().zip(prior).map(|(u, p)| (u - p).powi(2)).sum::<f64>()
    };
    let mut logs = prior.to_vec();
    let mut damping = 1e-3;
    let mut now = cost(&logs);
    for _ in 0..300 {
        let scales = exp(&logs);
        let mut gram = vec![vec![0.0; n]; n];
        let mut down: Vec<f64> = logs.iter().zip(prior).map(|(u, p)| -doubt * (u - p)).collect();
        for row in rows {
            let residual = row.ratio(&scales) - 1.0;
            let slopes: Vec<f64> = scales.iter().zip(&row.parts).map(|(s, t)| s * t / row.ms).collect();
            for (i, slope) in slopes.iter().enumerate().filter(|s| *s.1 != 0.0) {
                down[i] -= row.weight * slope * residual;
                for (x, other) in gram[i].iter_mut().zip(&slopes) {
                    *x += row.weight * slope * other;
                }
            }
        }
        for (i, row) in gram.iter_mut().enumerate() {
            row[i] += doubt + damping;
        }
        let Some(factor) = cholesky(&gram) else { break };
        let step = solve(&factor, &down);
        let mut next = logs.clone();
        next.iter_mut().zip(&step).for_each(|(u, s)| *u += s.clamp(-1.0, 1.0));
        let then = cost(&next);
        if then < now {
            (logs, now) = (next, then);
            damping = (damping / 4.0).max(1e-9);
            if step.iter().all(|s| s.abs() < 1e-10) {
                break;
            }
        } else {
            damping *= 8.0;
            if damping > 1e9 {
                break;
            }
        }
    }
    exp(&logs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows(scales: &[f64], parts: &[Vec<f64>]) -> Vec<Row> {
        let row = |parts: &Vec<f64>| {
            let ms = scales.iter().zip(parts).map(|(s, t)| s * t).sum();
            Row {
                parts: parts.clone(),
                ms,
                weight: 1.0,
            }
        };
        parts.iter().map(row).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Law: what the rows say is found where they say enough.
        #[test]
        fn scales_are_found(scales in prop::collection::vec(0.3f64..3.0, 4), parts in prop::collection::vec(prop::collection::vec(0.1f64..2.0, 4), 20)) {
            let rows = rows(&scales, &parts);
            let found = fit(&rows, &[0.0; 4], 1e-9);
            prop_assert!(rows.iter().all(|row| (row.ratio(&found) - 1.0).abs() < 1e-3));
        }

        /// Law: the found scales are no worse than any near them.
        #[test]
        fn no_scale_near_by_is_better(parts in prop::collection::vec(prop::collection::vec(0.1f64..2.0, 3), 8), times in prop::collection::vec(0.5f64..4.0, 8), at in 0usize..3, by in -0.1f64..0.1) {
            let rows: Vec<Row> = parts.into_iter().zip(times).map(|(parts, ms)| Row { parts, ms, weight: 1.0 }).collect();
            let cost = |scales: &[f64]| {
                let fit: f64 = rows.iter().map(|r| (r.ratio(scales) - 1.0).powi(2)).sum();
                fit + 0.1 * scales.iter().map(|s| s.ln().powi(2)).sum::<f64>()
            };
            let found = fit(&rows, &[0.0; 3], 0.1);
            let mut moved = found.clone();
            moved[at] *= by.exp();
            prop_assert!(cost(&found) <= cost(&moved) * (1.0 + 1e-3));
        }
    }

    #[test]
    fn a_part_that_no_row_has_stays_at_its_prior() {
        let rows = rows(&[2.0, 1.0], &[vec![1.0, 0.0], vec![3.0, 0.0]]);
        let found = fit(&rows, &[0.0, 0.7f64.ln()], 0.01);
        assert!((found[1] - 0.7).abs() < 1e-12 && (found[0] - 2.0).abs() < 0.05);
    }
}
