//! What measured neighbours say about an operator of our engine: a Gaussian process over ln sizes on the ln ratios of time to
//! fit, one per kernel (Rasmussen and Williams, *Gaussian Processes for Machine Learning*, 2006, ch. 2 and 5). Its
//! spread grows with the distance to what was measured and is stretched until nine in ten left-out rows lie inside.
//! Exempt from monotonicity, as all residuals are. Law: far from all rows it says nothing.

use std::collections::{BTreeMap, HashMap};

use super::fit::{is_engine, kernel};
use crate::cholesky::{cholesky, solve};
use crate::probe::quantile;
use crate::work::{Block, Family, Heat, Key, Path};

/// ln of the sizes of an operator, each over the length on which times of such operators change together.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Place {
    sizes: [f64; 6],
    /// Operator, width, whole or in factors, cache or memory, threads: rows that differ in some of them say less.
    kinds: [u32; 5],
}

fn place(key: &Key, threads: u32) -> Option<Place> {
    let ln = |size: u32| f64::from(size.max(1)).ln();
    let (sizes, operator, width, is_split, heat) = match key {
        Key::Expert(e) => (
            [
                ln(e.hidden),
                ln(e.inner),
                0.7 * ln(e.experts),
                ln(e.tokens),
                0.7 * ln(e.group),
                ln(e.rank),
            ],
            0,
            (e.bits << 8) | e.planes,
            e.rank > 0,
            e.heat,
        ),
        Key::Dense(d) => (
            [ln(d.inputs), ln(d.outputs), ln(d.tokens), 0.7 * ln(d.group), 0.0, 0.0],
            1,
            (d.bits << 8) | 1,
            false,
            d.heat,
        ),
        Key::Attention(a) => (
            [
                ln(a.heads),
                ln(a.kv_heads),
                ln(a.head_dim),
                ln(a.keys),
                ln(a.tokens),
                ln(a.sequences),
            ],
            2,
            0,
            a.values_in_keys,
            a.heat,
        ),
        Key::Glue(g) => (
            [
                ln(g.hidden),
                0.5 * ln(g.experts),
                0.5 * ln(g.inner),
                ln(g.tokens),
                0.3 * ln(g.top_k),
                0.0,
            ],
            3,
            0,
            g.inner > 0,
            Heat::Hot,
        ),
        _ => return None,
    };
    Some(Place {
        sizes,
        kinds: [
            operator,
            width,
            u32::from(is_split),
            u32::from(heat == Heat::Hot),
            threads,
        ],
    })
}

/// How alike residuals are by distance: `alike` for each kind in which two differ at one place, `length` in units of [`Place`], `noise` the
/// variance of a row's own error over that of what rows share.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Kernel {
    length: f64,
    alike: f64,
    noise: f64,
}

impl Kernel {
    fn of(self, a: &Place, b: &Place) -> f64 {
        let square: f64 = a.sizes.iter().zip(&b.sizes).map(|(x, y)| (x - y) * (x - y)).sum();
        let apart = a.kinds.iter().zip(&b.kinds).filter(|(x, y)| x != y).count();
        self.alike.powi(i32::try_from(apart).expect("five")) * (-square / (2.0 * self.length * self.length)).exp()
    }
}

const LENGTHS: [f64; 3] = [0.6, 1.1, 2.0];
const ALIKE: [f64; 2] = [0.4, 0.8];
const NOISES: [f64; 4] = [0.03, 0.12, 0.5, 2.0];
/// What is thought of residuals before rows say more: their deviation, and for how many rows that counts.
const USUAL_LN: f64 = 0.1;
const USUAL_ROWS: f64 = 4.0;
/// Fewer rows than this say nothing of their neighbours.
const FEWEST: usize = 6;
/// Fewer than this say nothing of a ninth decile: then that of the normal distribution.
const FEWEST_DECILE: usize = 12;
const NORMAL_DECILE: f64 = 1.645;
/// Rows that a spread is taken from.
const NEAREST: usize = 16;
/// A residual beyond this is a bad row rather than a lesson.
const MOST_LN: f64 = 0.7;

/// Of one kernel, all its paths.
#[derive(Debug, Clone)]
struct Process {
    places: Vec<Place>,
    kernel: Kernel,
    /// Variance of what rows share.
    variance: f64,
    /// `K⁻¹ y`, with the noise on the diagonal of `K`.
    weights: Vec<f64>,
    /// Deviations that hold nine in ten.
    stretch: f64,
}

/// Likelihood, kernel, variance, weights, factor of `K`.
type Found = (f64, Kernel, f64, Vec<f64>, Vec<Vec<f64>>);

impl Process {
    fn new(rows: &[(Place, f64)]) -> Option<Self> {
        if rows.len() < FEWEST {
            return None;
        }
        let places: Vec<Place> = rows.iter().map(|row| row.0).collect();
        let ln_ratios: Vec<f64> = rows.iter().map(|row| row.1).collect();
        #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
        let count = rows.len() as f64;
        let mut best: Option<Found> = None;
        for length in LENGTHS {
            for alike in ALIKE {
                for noise in NOISES {
                    let kernel = Kernel { length, alike, noise };
                    let row = |(i, a): (usize, &Place)| -> Vec<f64> {
                        let mut row: Vec<f64> = places[..=i].iter().map(|b| kernel.of(a, b)).collect();
                        row[i] += noise;
                        row
                    };
                    let gram: Vec<Vec<f64>> = places.iter().enumerate().map(row).collect();
                    let Some(lower) = cholesky(&gram) else { continue };
                    let weights = solve(&lower, &ln_ratios);
                    let fit: f64 = ln_ratios.iter().zip(&weights).map(|(y, w)| y * w).sum();
                    let variance = (fit + USUAL_ROWS * USUAL_LN * USUAL_LN) / (count + USUAL_ROWS);
                    let volume: f64 = lower.iter().enumerate().map(|(i, row)| row[i].ln()).sum();
                    let likelihood = -0.5 * (count + USUAL_ROWS) * variance.ln() - volume;
                    if best.as_ref().is_none_or(|found| likelihood > found.0) {
                        best = Some((likelihood, kernel, variance, weights, lower));
                    }
                }
            }
        }
        let (_, kernel, variance, weights, lower) = best?;
        Some(Self {
            stretch: stretched(&weights, &lower, variance),
            places,
            kernel,
            variance,
            weights,
        })
    }

    /// ln of what to multiply the fit by, and the half interval that holds nine in ten.
    fn at(&self, place: &Place) -> (f64, f64) {
        let near: Vec<f64> = self.places.iter().map(|row| self.kernel.of(place, row)).collect();
        let mean: f64 = near.iter().zip(&self.weights).map(|(k, w)| k * w).sum();
        // What the nearest rows explain; the others are behind them.
        let mut nearest: Vec<usize> = (0..near.len()).collect();
        let count = NEAREST.min(near.len());
        nearest.select_nth_unstable_by(count - 1, |&i, &j| near[j].total_cmp(&near[i]).then(i.cmp(&j)));
        nearest.truncate(count);
        nearest.sort_unstable();
        let row = |(n, &i): (usize, &usize)| -> Vec<f64> {
            let others = nearest[..=n]
                .iter()
                .map(|&j| self.kernel.of(&self.places[i], &self.places[j]));
            let mut row: Vec<f64> = others.collect();
            row[n] += self.kernel.noise;
            row
        };
        let gram: Vec<Vec<f64>> = nearest.iter().enumerate().map(row).collect();
        let near: Vec<f64> = nearest.iter().map(|&i| near[i]).collect();
        let explained: f64 = cholesky(&gram).map_or(0.0, |lower| {
            let weights = solve(&lower, &near);
            weights.iter().zip(&near).map(|(w, k)| w * k).sum()
        });
        let variance = self.variance * (1.0 + self.kernel.noise - explained).max(self.kernel.noise);
        (mean.clamp(-MOST_LN, MOST_LN), self.stretch * variance.sqrt())
    }
}

/// From every row left out in turn: its error is `w_i / (K⁻¹)_ii`, of variance `σ² / (K⁻¹)_ii` (ch. 5.4.2).
fn stretched(weights: &[f64], lower: &[Vec<f64>], variance: f64) -> f64 {
    let n = weights.len();
    if n < FEWEST_DECILE {
        return NORMAL_DECILE;
    }
    let ratio = |i: usize| {
        // (K⁻¹)_ii = |L⁻¹ e_i|².
        let mut column = vec![0.0; n];
        let mut inverse = 0.0;
        for r in i..n {
            let known: f64 = (i..r).map(|c| lower[r][c] * column[c]).sum();
            let unit = if r == i { 1.0 } else { 0.0 };
            column[r] = (unit - known) / lower[r][r];
            inverse += column[r] * column[r];
        }
        (weights[i] / inverse).abs() / (variance / inverse).sqrt()
    };
    let ratios: Vec<f64> = (0..n).map(ratio).collect();
    #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
    let share = (0.9 * (n as f64 + 1.0) / n as f64).min(1.0);
    quantile(&ratios, share)
}

/// All kernels of our engine.
#[derive(Debug, Clone, Default)]
pub(crate) struct Neighbours {
    kernels: HashMap<Family, Process>,
}

impl Neighbours {
    /// From table rows `(key, µs, what its fit says)`.
    pub(crate) fn new(rows: impl Iterator<Item = (Key, f64, f64)>, block: Block) -> Self {
        // In key order: that of a hash map must not reach a sum.
        let mut by_kernel: BTreeMap<Family, BTreeMap<Key, (Place, f64)>> = BTreeMap::new();
        for (key, us, predicted_us) in rows {
            let path = key.path(block);
            if !is_engine(&key) || us <= 0.0 || predicted_us <= 0.0 {
                continue;
            }
            if let Some(place) = place(&key, path.threads) {
                let ln_ratio = (us / predicted_us).ln().clamp(-MOST_LN, MOST_LN);
                let rows = by_kernel.entry(kernel(path.family)).or_default();
                rows.insert(key, (place, ln_ratio));
            }
        }
        let process = |(family, rows): (Family, BTreeMap<Key, (Place, f64)>)| {
            let rows: Vec<(Place, f64)> = rows.into_values().collect();
            Some((family, Process::new(&rows)?))
        };
        Self {
            kernels: by_kernel.into_iter().filter_map(process).collect(),
        }
    }

    /// ln of what to multiply a fitted time by and its half interval of nine in ten, in ln; `None` where neighbours say
    /// nothing.
    pub(crate) fn at(&self, key: &Key, path: &Path) -> Option<(f64, f64)> {
        Some(self.kernels.get(&kernel(path.family))?.at(&place(key, path.threads)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::{DenseKey, Heat};

    fn dense(inputs: u32, outputs: u32) -> Key {
        Key::Dense(DenseKey {
            inputs,
            outputs,
            bits: 16,
            group: 0,
            tokens: 1,
            threads: 1,
            heat: Heat::Cold,
        })
    }

    /// A fit that is wrong where matrices are small, smoothly.
    fn wrong(key: &Key) -> f64 {
        let Key::Dense(d) = key else { unreachable!() };
        0.4 / (1.0 + f64::from(d.inputs) * f64::from(d.outputs) / 1e5)
    }

    fn rows() -> Vec<(Key, f64, f64)> {
        let sizes = [64u32, 128, 256, 512, 1024];
        let keys = sizes.iter().flat_map(|i| sizes.map(|o| dense(*i, o)));
        keys.map(|key| (key, 10.0 * wrong(&key).exp(), 10.0)).collect()
    }

    #[test]
    fn neighbours_teach_and_strangers_do_not() {
        let block = Block(16);
        let neighbours = Neighbours::new(rows().into_iter(), block);
        let path = dense(64, 64).path(block);
        let mut worst = 0.0f64;
        for (i, o) in [(90, 90), (180, 700), (400, 300), (800, 150)] {
            let key = dense(i, o);
            let (mean, spread) = neighbours.at(&key, &path).unwrap();
            worst = worst.max((mean - wrong(&key)).abs());
            assert!((mean - wrong(&key)).abs() < 2.0 * spread, "{mean} {spread}");
        }
        assert!(worst < 0.04, "{worst}");
        let (far, wide) = neighbours.at(&dense(4_000_000, 4_000_000), &path).unwrap();
        let (_, near) = neighbours.at(&dense(128, 256), &path).unwrap();
        assert!(far.abs() < 0.01 && wide > 2.0 * near, "{far} {wide} {near}");
        assert_eq!(neighbours.at(&Key::Session { threads: 1 }, &path), None);
    }

    #[test]
    fn the_order_of_rows_changes_nothing() {
        let block = Block(16);
        let key = dense(333, 444);
        let at = |rows: Vec<(Key, f64, f64)>| Neighbours::new(rows.into_iter(), block).at(&key, &key.path(block));
        let forwards = at(rows());
        assert_eq!(forwards, at(rows().into_iter().rev().collect()));
        assert_eq!(at(rows().into_iter().take(FEWEST - 1).collect()), None);
    }
}
