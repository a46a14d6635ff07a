//! Few-shot transfer of whole networks (reference 6.3): what source models and a few counts say of every network, and a
//! handful of times on a machine that none of the sources is. Chooses which networks to measure (without any time of the
//! target) and predicts the rest. Pure; what a network is, its caller knows.

use super::gaussian::{self, alike};
use super::mix;
use crate::probe::median;

/// Noise and weight of counts while networks are chosen.
const NOISE: f64 = 0.5;
const COUNTS: f64 = 0.25;
/// Times outside this many times the median of the handful are broken rows, not networks.
const BROKEN: f64 = 10.0;

/// What is known of every network before the target is touched.
#[derive(Debug, Clone)]
pub struct Known {
    sources: usize,
    /// Source models, then counts, each divided by its mean over the pool: `[network][column]`.
    by_mean: Vec<Vec<f64>>,
    /// The same, standardised over the pool.
    standard_sources: Vec<Vec<f64>>,
    standard_counts: Vec<Vec<f64>>,
}

/// Times of a few networks on the target: `(network, ms)`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rows(pub(super) Vec<(usize, f64)>);

impl Rows {
    pub(super) fn median(&self) -> f64 {
        median(&self.0.iter().map(|r| r.1).collect::<Vec<_>>())
    }
}

impl Known {
    /// `sources[network]` has the time that each source model gives it (any unit, one per source), `counts[network]` a few
    /// physical counts; `pool` are the networks that scales are taken from.
    ///
    /// # Panics
    /// For rows of unequal lengths or a pool outside of them: the caller's own tables.
    pub fn new(sources: &[Vec<f64>], counts: &[Vec<f64>], pool: &[usize]) -> Self {
        assert_eq!(sources.len(), counts.len(), "one row of each a network");
        let joined: Vec<Vec<f64>> = sources
            .iter()
            .zip(counts)
            .map(|(s, c)| [s.as_slice(), c].concat())
            .collect();
        let width = sources.first().map_or(0, Vec::len);
        let columns = joined.first().map_or(0, Vec::len);
        #[expect(clippy::cast_precision_loss, reason = "thousands of networks")]
        let n = pool.len().max(1) as f64;
        let moments: Vec<(f64, f64)> = (0..columns)
            .map(|c| {
                let mean = pool.iter().map(|&i| joined[i][c]).sum::<f64>() / n;
                let variance = pool.iter().map(|&i| (joined[i][c] - mean).powi(2)).sum::<f64>() / n;
                (mean, variance.sqrt())
            })
            .collect();
        let positive = |x: f64| if x.abs() > 1e-12 { x } else { 1.0 };
        let scaled = |of: &dyn Fn(f64, (f64, f64)) -> f64| -> Vec<Vec<f64>> {
            let row = |row: &Vec<f64>| row.iter().zip(&moments).map(|(&x, &m)| of(x, m)).collect();
            joined.iter().map(row).collect()
        };
        let by_mean = scaled(&|x, (mean, _)| x / positive(mean));
        let standard = scaled(&|x, (mean, deviation)| (x - mean) / positive(deviation));
        Self {
            sources: width,
            by_mean,
            standard_sources: standard.iter().map(|row| row[..width].to_vec()).collect(),
            standard_counts: standard.iter().map(|row| row[width..].to_vec()).collect(),
        }
    }

    /// Networks worth measuring, best first: greedily those whose time would tell most of all others' in `from` (reference
    /// 6.3). Needs no time of the target. Ties go to the earlier network.
    pub fn choose(&self, from: &[usize], count: usize) -> Vec<usize> {
        let kernel = |i: usize, j: usize| {
            alike(&self.standard_sources[i], &self.standard_sources[j])
                + COUNTS * alike(&self.standard_counts[i], &self.standard_counts[j])
                + 1.0
        };
        let mut k: Vec<Vec<f64>> = from
            .iter()
            .map(|&i| from.iter().map(|&j| kernel(i, j)).collect())
            .collect();
        let mut chosen: Vec<usize> = Vec::new();
        while chosen.len() < count.min(from.len()) {
            let told = |j: usize| k[j].iter().map(|x| x * x).sum::<f64>() / (k[j][j] + NOISE);
            let mut best = (f64::NEG_INFINITY, 0);
            for j in (0..from.len()).filter(|j| !chosen.contains(j)) {
                let tells = told(j);
                if tells > best.0 {
                    best = (tells, j);
                }
            }
            let at = best.1;
            chosen.push(at);
            let (column, whole) = (k[at].clone(), k[at][at] + NOISE);
            for (row, &own) in k.iter_mut().zip(&column) {
                for (x, &other) in row.iter_mut().zip(&column) {
                    *x -= own * other / whole;
                }
            }
        }
        chosen.into_iter().map(|j| from[j]).collect()
    }

    /// Times of every network, from `(network, ms)` of a few. Broken rows are left aside. `None` with fewer than 3 good ones.
    pub fn predict(&self, measured: &[(usize, f64)]) -> Option<Vec<f64>> {
        let rows = guarded(measured)?;
        let a = mix::predict(&self.by_mean, self.sources, &rows);
        let b = gaussian::predict(&self.standard_sources, &self.standard_counts, &rows);
        // The process knows no sign: keep the mean of both real.
        let least = 0.01 * rows.median();
        Some(
            a.iter()
                .zip(&b)
                .map(|(a, b)| (a.max(least) * b.max(least)).sqrt())
                .collect(),
        )
    }

    /// How far a prediction of each measured network is off when that one is left out: `predicted / measured`.
    pub fn left_out(&self, measured: &[(usize, f64)]) -> Vec<f64> {
        let Some(rows) = guarded(measured) else {
            return Vec::new();
        };
        let ratio = |out: usize| {
            let kept = [&rows.0[..out], &rows.0[out + 1..]].concat();
            Some(self.predict(&kept)?[rows.0[out].0] / rows.0[out].1)
        };
        (0..rows.0.len()).filter_map(ratio).collect()
    }
}

/// Rows within a factor of ten of their median; `None` when fewer than 3 are left.
fn guarded(measured: &[(usize, f64)]) -> Option<Rows> {
    let finite: Vec<(usize, f64)> = measured
        .iter()
        .copied()
        .filter(|r| r.1.is_finite() && r.1 > 0.0)
        .collect();
    let middle = median(&finite.iter().map(|r| r.1).collect::<Vec<_>>());
    let good: Vec<(usize, f64)> = finite
        .into_iter()
        .filter(|r| (middle / BROKEN..=middle * BROKEN).contains(&r.1))
        .collect();
    (good.len() >= 3).then_some(Rows(good))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 networks by two counts; two sources that price them differently, one of them with a quirk.
    fn known() -> (Known, Vec<Vec<f64>>) {
        let counts: Vec<Vec<f64>> = (0..64u32).map(|i| vec![f64::from(i % 8), f64::from(i / 8)]).collect();
        let quirk = |i: usize| if i.is_multiple_of(5) { 3.0 } else { 0.0 };
        let sources: Vec<Vec<f64>> = counts
            .iter()
            .enumerate()
            .map(|(i, c)| vec![5.0 + c[0] + 4.0 * c[1], 20.0 + 9.0 * c[0] + 2.0 * c[1] + quirk(i)])
            .collect();
        let pool: Vec<usize> = (0..64).collect();
        (Known::new(&sources, &counts, &pool), sources)
    }

    fn measured(networks: &[usize], ms: impl Fn(usize) -> f64) -> Vec<(usize, f64)> {
        networks.iter().map(|&i| (i, ms(i))).collect()
    }

    #[test]
    fn a_mix_of_the_sources_is_found_at_any_scale() {
        let (known, sources) = known();
        let pool: Vec<usize> = (0..64).collect();
        let chosen = known.choose(&pool, 10);
        for scale in [1e-3, 1.0, 40.0] {
            let target = |i: usize| scale * (0.7 * sources[i][0] + 0.1 * sources[i][1]);
            let predicted = known.predict(&measured(&chosen, target)).unwrap();
            for (i, p) in predicted.iter().enumerate() {
                assert!((p / target(i) - 1.0).abs() < 0.05, "{i}: {p} {}", target(i));
            }
        }
    }

    #[test]
    fn a_machine_like_no_source_is_priced_by_counts() {
        let (known, _) = known();
        // Only the first count costs here, and all sources disagree.
        let target = |i: usize| 1.0 + (i % 8) as f64;
        let predicted = known
            .predict(&measured(&[0, 7, 9, 20, 27, 35, 42, 50, 60, 63], target))
            .unwrap();
        let truth: Vec<f64> = (0..64).map(target).collect();
        assert!(crate::judge::spearman(&predicted, &truth) > 0.95);
    }

    #[test]
    fn a_broken_row_changes_nothing() {
        let (known, sources) = known();
        let networks = [1, 8, 15, 22, 29, 36, 43, 50, 57];
        let good = measured(&networks, |i| sources[i][0]);
        let mut broken = good.clone();
        broken.extend([(3, 0.01), (4, f64::NAN), (5, 1e6), (6, 0.0)]);
        assert_eq!(known.predict(&broken), known.predict(&good));
        assert_eq!(known.predict(&good[..2]), None);
    }

    #[test]
    fn chosen_networks_differ_and_do_not_depend_on_any_time() {
        let (known, _) = known();
        let pool: Vec<usize> = (10..64).collect();
        let chosen = known.choose(&pool, 20);
        let mut sorted = chosen.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!((sorted.len(), chosen.iter().all(|c| pool.contains(c))), (20, true));
        // Greedy: fewer are the first of more.
        assert_eq!(known.choose(&pool, 5), chosen[..5]);
        assert_eq!(known.choose(&pool, 99).len(), pool.len());
    }

    #[test]
    fn errors_of_left_out_rows_say_how_good_it_is() {
        let (known, sources) = known();
        let networks: Vec<usize> = (0..10).map(|i| 6 * i + 2).collect();
        let worst = |ms: &dyn Fn(usize) -> f64| {
            let ratios = known.left_out(&measured(&networks, ms));
            assert_eq!(ratios.len(), 10);
            ratios.into_iter().map(|r| r.ln().abs()).fold(0.0, f64::max)
        };
        let clean = worst(&|i| sources[i][0]);
        let noisy = worst(&|i| sources[i][0] * if i.is_multiple_of(4) { 1.3 } else { 0.8 });
        assert!(clean < 0.1 && noisy > 2.0 * clean, "{clean} {noisy}");
    }
}
