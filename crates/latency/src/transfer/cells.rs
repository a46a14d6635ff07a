//! Cells of NAS-Bench-201 (Dong and Yang, 2020) as rows of numbers, and one source model a device: the public tables on which
//! few-shot transfer is judged. Edges in the order 0→1, 0→2, 1→2, 0→3, 1→3, 2→3. Reads no file.

use crate::cholesky::{cholesky, solve};
use crate::probe::quantile;

/// Operation of each edge: 0 none, 1 identity, 2 1x1 convolution, 3 3x3 convolution, 4 3x3 average pooling.
pub type Cell = [u8; 6];

/// Number of operations, and of edges.
const OPS: usize = 5;
const EDGES: [(usize, usize); 6] = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)];
/// Edges of every path from input to output.
const PATHS: [&[usize]; 4] = [&[3], &[0, 4], &[1, 5], &[0, 2, 5]];
/// What an operation adds to the longest path, as a 3x3 convolution has it.
const LENGTHS: [f64; OPS] = [0.0, 0.0, 0.15, 1.0, 0.2];
/// Penalty on standardised coefficients.
const RIDGE: f64 = 10.0;

/// Number of edges with identity, 1x1, 3x3, pooling.
pub fn counts(cell: &Cell) -> Vec<f64> {
    let count = |op: u8| cell.iter().filter(|&&o| o == op).count();
    #[expect(clippy::cast_precision_loss, reason = "at most six")]
    [1, 2, 3, 4].map(|op| count(op) as f64).to_vec()
}

/// 65 numbers of a cell (reference 6.3): operations by edge, the same for edges that data passes on its way from input to
/// output, the longest such way by work and by length, and joins.
pub fn features(cell: &Cell) -> Vec<f64> {
    let open: Vec<&&[usize]> = PATHS.iter().filter(|path| path.iter().all(|&e| cell[e] != 0)).collect();
    let live: Vec<bool> = (0..6)
        .map(|edge| open.iter().any(|path| path.contains(&edge)))
        .collect();
    let mut row = vec![0.0; 2 * OPS * EDGES.len()];
    for (edge, &op) in cell.iter().enumerate() {
        row[OPS * edge + usize::from(op)] = 1.0;
        if live[edge] {
            row[OPS * (6 + edge) + usize::from(op)] = 1.0;
        }
    }
    let longest = |of: &dyn Fn(u8) -> f64| {
        let length = |path: &&&[usize]| path.iter().map(|&e| of(cell[e])).sum::<f64>();
        open.iter().map(length).fold(0.0, f64::max)
    };
    row.push(longest(&|op| LENGTHS[usize::from(op)]));
    row.push(longest(&|op| f64::from(u8::from(op > 1))));
    let joined = |node: usize| {
        EDGES
            .iter()
            .zip(&live)
            .filter(|(edge, live)| edge.1 == node && **live)
            .count()
    };
    row.extend([joined(2) > 1, joined(3) > 1, joined(3) > 2].map(|yes| f64::from(u8::from(yes))));
    row
}

/// Features of many cells, standardised over a pool, with the factor of their ridge regression: shared by every device.
#[derive(Debug, Clone)]
pub struct Regression {
    /// `[cell][feature]`.
    rows: Vec<Vec<f64>>,
    pool: Vec<usize>,
    factor: Vec<Vec<f64>>,
}

impl Regression {
    /// For all `cells`, learnt on those in `pool`.
    pub fn new(cells: &[Cell], pool: &[usize]) -> Self {
        let mut rows: Vec<Vec<f64>> = cells.iter().map(features).collect();
        let width = rows.first().map_or(0, Vec::len);
        #[expect(clippy::cast_precision_loss, reason = "thousands of cells")]
        let n = pool.len().max(1) as f64;
        for c in 0..width {
            let mean = pool.iter().map(|&i| rows[i][c]).sum::<f64>() / n;
            let deviation = (pool.iter().map(|&i| (rows[i][c] - mean).powi(2)).sum::<f64>() / n).sqrt();
            for row in &mut rows {
                // A feature that the pool never shows says nothing.
                row[c] = if deviation > 1e-12 {
                    (row[c] - mean) / deviation
                } else {
                    0.0
                };
            }
        }
        let mut gram = vec![vec![0.0; width]; width];
        for &i in pool {
            for (a, row) in gram.iter_mut().enumerate() {
                for (b, x) in row.iter_mut().enumerate() {
                    *x += rows[i][a] * rows[i][b];
                }
            }
        }
        for (i, row) in gram.iter_mut().enumerate() {
            row[i] += RIDGE;
        }
        let factor = cholesky(&gram).expect("a Gram matrix with a ridge is positive definite");
        Self {
            rows,
            pool: pool.to_vec(),
            factor,
        }
    }

    /// One device's source model: its time of every cell, learnt from its times of the pool, which are first cut to their
    /// 2nd and 98th percentile (the tables hold broken rows).
    pub fn learn(&self, ms: impl Fn(usize) -> f64) -> Vec<f64> {
        let times: Vec<f64> = self.pool.iter().map(|&i| ms(i)).collect();
        let (low, high) = (quantile(&times, 0.02), quantile(&times, 0.98));
        let times: Vec<f64> = times.into_iter().map(|t| t.clamp(low, high)).collect();
        #[expect(clippy::cast_precision_loss, reason = "thousands of cells")]
        let mean = times.iter().sum::<f64>() / times.len().max(1) as f64;
        let mut right = vec![0.0; self.factor.len()];
        for (&i, t) in self.pool.iter().zip(&times) {
            for (slot, x) in right.iter_mut().zip(&self.rows[i]) {
                *slot += x * (t - mean);
            }
        }
        let coefficients = solve(&self.factor, &right);
        let of = |row: &Vec<f64>| mean + row.iter().zip(&coefficients).map(|(x, c)| x * c).sum::<f64>();
        self.rows.iter().map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_ends_are_not_on_the_way() {
        // 0→1 is a 3x3, but node 1 leads nowhere; 0→3 is pooling.
        let row = features(&[3, 0, 0, 4, 0, 0]);
        assert_eq!(row.len(), 65);
        assert_eq!(row[3], 1.0);
        assert_eq!(row[30..60].iter().sum::<f64>(), 1.0);
        assert_eq!(row[60..], [0.2, 1.0, 0.0, 0.0, 0.0]);
        // All 3x3: the longest way has three of them; both joins are joins.
        assert_eq!(features(&[3; 6])[60..], [3.0, 3.0, 1.0, 1.0, 1.0]);
        assert_eq!(counts(&[3, 0, 1, 4, 4, 2]), [1.0, 1.0, 1.0, 2.0]);
    }

    #[test]
    fn an_additive_device_is_learnt() {
        // All over the space: 4,001 has no divisor in common with 5^6.
        let cells: Vec<Cell> = (0..2000u32)
            .map(|i| [1, 5, 25, 125, 625, 3125].map(|d| (i * 4001 % 15625 / d % 5) as u8))
            .collect();
        let pool: Vec<usize> = (0..900).collect();
        let ms = |i: usize| {
            2.0 + counts(&cells[i])
                .iter()
                .zip([0.1, 0.4, 2.0, 0.7])
                .map(|(n, c)| n * c)
                .sum::<f64>()
        };
        let learnt = Regression::new(&cells, &pool).learn(ms);
        let truth: Vec<f64> = (0..cells.len()).map(ms).collect();
        assert!(crate::judge::spearman(&learnt[900..], &truth[900..]) > 0.999);
    }
}
