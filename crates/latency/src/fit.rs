//! From measured rows to coefficients: per kernel path a non-negative least-squares fit of few physical terms, on relative
//! errors, with the error on shape families left out of it. Pure: reads no clock and no file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::moe::fit as engine;
use crate::probe::{median, quantile};
use crate::work::{Block, Features, Key, Path, Term};

pub mod joint;
pub mod team;

use self::team::Team;

/// One measured key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    pub key: Key,
    /// Median time of a call.
    pub us: f64,
    /// Spread of repeats over the time.
    pub relative_spread: f64,
}

/// The coefficient of one term.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coefficient {
    pub term: Term,
    /// Never negative: the model stays monotone.
    pub us_per_unit: f64,
    /// Smallest and largest count that was measured.
    pub min: f64,
    pub max: f64,
    /// Half of the interval that holds nine in ten of what other samples would have given, by leaving out families of shapes
    /// (`jackknife`); absent where too few are there to leave some out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread_us: Option<f64>,
}

/// Half a 90 % interval of an estimate from its values without each of `g` groups: the delete-a-group jackknife,
/// `se² = (g − 1)/g · Σ (c_i − c̄)²` (Kott 2001), times 1.645. `None` of fewer than three groups.
pub(crate) fn jackknife(without: &[f64]) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "a handful of groups")]
    let groups = without.len() as f64;
    if without.len() < 3 {
        return None;
    }
    let mean = without.iter().sum::<f64>() / groups;
    let squares: f64 = without.iter().map(|c| (c - mean).powi(2)).sum();
    Some(1.645 * ((groups - 1.0) / groups * squares).sqrt())
}

/// The fitted terms of one kernel path.
#[derive(Debug, Clone, PartialEq)]
pub struct PathFit {
    pub path: Path,
    pub coefficients: Vec<Coefficient>,
    /// Measured keys behind it.
    pub rows: usize,
    /// Mean absolute percentage error on shape families that were left out; on the fitted rows when there is one family.
    pub cv_mape_pct: f64,
    /// Nine in ten left-out errors beside measured keys are below this: |ln(measured / predicted)|.
    pub spread_ln: f64,
    /// Of several threads: the terms are those of one thread, and this is what sharing makes of their sum.
    pub team: Option<Team>,
    /// How far computing and weights overlap, of our engine: the power of `S_p` (reference 2.4); absent: they add up.
    pub overlap: Option<f64>,
}

/// The spread assumed of a fit that nothing could be left out of.
pub(crate) const UNTESTED_LN: f64 = 0.5;

impl PathFit {
    /// Time of one call in µs, and what each term adds.
    pub fn us(&self, features: &Features) -> f64 {
        self.parts(features).map(|(_, us)| us).sum()
    }

    /// µs by term.
    pub fn parts<'a>(&'a self, features: &'a Features) -> impl Iterator<Item = (Term, f64)> + 'a {
        let alone = self.alone(features);
        let (scale, call_us) = match &self.team {
            Some(team) => {
                let alone_us: f64 = self.alone(features).map(|(_, us)| us).sum();
                let shared_us = team.us(alone_us) - team.call_us;
                let scale = if alone_us > 0.0 { shared_us / alone_us } else { 1.0 };
                (scale, team.call_us)
            }
            None => (1.0, 0.0),
        };
        let overlapped = { self.overlap }.map(|power| crate::moe::fit::overlapped(power, self.alone(features)));
        alone.map(move |(term, us)| {
            let call_us = if term == Term::Call { call_us } else { 0.0 };
            let share = overlapped.as_ref().map_or(1.0, |of| of(term));
            (term, scale * share * us + call_us)
        })
    }

    /// The terms as they are fitted.
    fn alone<'a>(&'a self, features: &'a Features) -> impl Iterator<Item = (Term, f64)> + 'a {
        features.terms().iter().map(|&(term, count)| {
            let coefficient = self.coefficients.iter().find(|c| c.term == term);
            (term, coefficient.map_or(0.0, |c| c.us_per_unit * count))
        })
    }

    /// How far a call lies outside of what was measured, in ln of the worst term; 0 inside.
    pub fn outside_ln(&self, features: &Features) -> f64 {
        let of = |&(term, count): &(Term, f64)| {
            let Some(c) = self.coefficients.iter().find(|c| c.term == term) else {
                return 0.0;
            };
            // A term that costs nothing cannot mislead by being large.
            if c.us_per_unit == 0.0 || count <= 0.0 {
                return 0.0;
            }
            (count / c.max).ln().max((c.min / count).ln()).max(0.0)
        };
        features.terms().iter().map(of).fold(0.0, f64::max)
    }
}

/// Fits every path that has rows, in path order. `noise_floor` is the relative error of a repeat.
pub fn fit(samples: &[Sample], block: Block, noise_floor: f64) -> Vec<PathFit> {
    let mut by_path: BTreeMap<Path, Vec<(Features, Sample)>> = BTreeMap::new();
    for sample in samples.iter().filter(|s| !engine::is_engine(&s.key)) {
        let features = sample.key.features(block);
        // A cost below what can be measured is a cost of (nearly) nothing, not a bad row: keep it off zero.
        let sample = Sample {
            us: sample.us.max(1e-3),
            ..*sample
        };
        by_path.entry(features.path).or_default().push((features, sample));
    }
    let mut fits: Vec<PathFit> = { by_path.into_iter() }
        .map(|(path, rows)| fit_path(path, &rows, noise_floor))
        .collect();
    fits.extend(engine::fit(samples, block, noise_floor));
    fits.sort_by_key(|fit| fit.path);
    fits
}

fn fit_path(path: Path, rows: &[(Features, Sample)], noise_floor: f64) -> PathFit {
    let all: Vec<&(Features, Sample)> = rows.iter().collect();
    let coefficients = solve(&all, noise_floor);
    let mut others: Vec<Vec<Coefficient>> = Vec::new();
    let mut whole = PathFit {
        path,
        coefficients,
        rows: rows.len(),
        cv_mape_pct: 0.0,
        spread_ln: UNTESTED_LN,
        team: None,
        overlap: None,
    };
    // Rows of one shape family (all but batch, size and tokens) leave together: copies of a shape must not leak.
    let mut families: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (index, (_, sample)) in rows.iter().enumerate() {
        families.entry(family(&sample.key)).or_default().push(index);
    }
    let left_out: Vec<f64> = if families.len() < 3 {
        rows.iter()
            .map(|(features, sample)| (sample.us / whole.us(features)).ln())
            .collect()
    } else {
        families
            .values()
            .flat_map(|out| {
                let kept: Vec<_> = rows
                    .iter()
                    .enumerate()
                    .filter(|(i, _)| !out.contains(i))
                    .map(|(_, row)| row)
                    .collect();
                let without = PathFit {
                    coefficients: solve(&kept, noise_floor),
                    ..whole.clone()
                };
                let errors: Vec<f64> = out
                    .iter()
                    .map(|&i| (rows[i].1.us / without.us(&rows[i].0)).ln())
                    .collect();
                others.push(without.coefficients);
                errors
            })
            .collect()
    };
    for coefficient in &mut whole.coefficients {
        let of = |fit: &Vec<Coefficient>| fit.iter().find(|c| c.term == coefficient.term).map(|c| c.us_per_unit);
        // A family that alone has a term says nothing of how sure it is.
        let without: Option<Vec<f64>> = others.iter().map(of).collect();
        coefficient.spread_us = without.and_then(|without| jackknife(&without));
    }
    let usable: Vec<f64> = left_out.into_iter().filter(|e| e.is_finite()).map(f64::abs).collect();
    #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
    let cv_mape_pct = 100.0 * usable.iter().map(|e| 1.0 - (-e).exp()).sum::<f64>() / usable.len().max(1) as f64;
    let spread_ln = match () {
        () if usable.is_empty() => UNTESTED_LN,
        // Fitted rows flatter: no smaller than a tenth.
        () if families.len() < 3 => quantile(&usable, 0.9).max(0.1),
        () => quantile(&usable, 0.9),
    };
    PathFit {
        cv_mape_pct,
        spread_ln: spread_ln.max(noise_floor),
        ..whole
    }
}

pub(crate) fn family(key: &Key) -> String {
    match key {
        Key::Conv(c) => format!("{} {} {} {} {}", c.cin, c.cout, c.kernel, c.stride, c.groups),
        Key::Linear(l) => format!("{} {}", l.inputs, l.outputs),
        Key::Add(p) | Key::GlobalAvgPool(p) | Key::Entry(p) => format!("{} {}", p.channels, p.height),
        Key::Edge(e) => format!("{} {}", e.channels, e.height),
        Key::Pool(p) => format!("{} {} {} {}", p.channels, p.height, p.kernel, p.stride),
        Key::Elementwise(e) => format!("{} {}", e.channels, e.height),
        Key::LowRank(l) => format!("{} {} {} {}", l.conv.cin, l.conv.cout, l.rank_in, l.rank_out),
        Key::Expert(e) => format!("{} {}", e.hidden, e.inner),
        Key::Dense(d) => format!("{} {}", d.inputs, d.outputs),
        Key::Attention(a) => format!("{} {} {} {}", a.heads, a.kv_heads, a.head_dim, a.keys),
        Key::Glue(g) => format!("{} {}", g.hidden, g.experts),
        Key::Session { threads } => threads.to_string(),
        Key::Read(r) => r.bytes.to_string(),
    }
}

/// Weighted non-negative least squares with two rounds of Huber's weights (reference 2.7).
fn solve(rows: &[&(Features, Sample)], noise_floor: f64) -> Vec<Coefficient> {
    let Some(first) = rows.first() else {
        return Vec::new();
    };
    let terms: Vec<Term> = first.0.terms().iter().map(|t| t.0).collect();
    // A path of convolutions has 1x1 and larger kernels: the union of their terms.
    let terms = rows
        .iter()
        .flat_map(|r| r.0.terms())
        .fold(terms, |mut terms, (term, _)| {
            if !terms.contains(term) {
                terms.push(*term);
            }
            terms
        });
    let count = |features: &Features, term: Term| features.terms().iter().find(|t| t.0 == term).map_or(0.0, |t| t.1);
    let range = |term: Term| {
        let measured = rows.iter().map(|r| count(&r.0, term)).filter(|&c| c > 0.0);
        measured.fold((f64::INFINITY, 0.0f64), |(lo, hi), c| (lo.min(c), hi.max(c)))
    };
    let scales: Vec<f64> = terms.iter().map(|&t| range(t).1.max(f64::MIN_POSITIVE)).collect();
    let matrix: Vec<Vec<f64>> = rows
        .iter()
        .map(|(features, _)| {
            terms
                .iter()
                .zip(&scales)
                .map(|(&t, s)| count(features, t) / s)
                .collect()
        })
        .collect();
    let times: Vec<f64> = rows.iter().map(|r| r.1.us).collect();
    let mut weights: Vec<f64> = rows
        .iter()
        .map(|r| 1.0 / (r.1.us * r.1.relative_spread.max(noise_floor).max(0.005)))
        .collect();
    let predicted = |c: &[f64]| -> Vec<f64> {
        matrix
            .iter()
            .map(|row| row.iter().zip(c).map(|(f, c)| f * c).sum::<f64>().max(1e-9))
            .collect()
    };
    let mut found = weighted_nnls(&matrix, &times, &weights);
    for _ in 0..2 {
        let residuals: Vec<f64> = predicted(&found)
            .iter()
            .zip(&times)
            .map(|(p, t)| ((p - t) / t).abs())
            .collect();
        let bend = 1.5 * 1.48 * median(&residuals);
        for ((weight, row), residual) in weights.iter_mut().zip(rows).zip(&residuals) {
            let base = 1.0 / (row.1.us * row.1.relative_spread.max(noise_floor).max(0.005));
            *weight = if *residual > bend && bend > 0.0 {
                base * (bend / residual).sqrt()
            } else {
                base
            };
        }
        found = weighted_nnls(&matrix, &times, &weights);
    }
    // Weights of 1/t bias low: take out the mean log ratio (but not what single wild rows say).
    let ratios: Vec<f64> = predicted(&found)
        .iter()
        .zip(&times)
        .map(|(p, t)| (t / p).ln())
        .collect();
    let bias = median(&ratios).clamp(-0.5, 0.5).exp();
    let coefficient = |((&term, &scaled), &scale): ((&Term, &f64), &f64)| {
        let (min, max) = range(term);
        Coefficient {
            term,
            us_per_unit: bias * scaled / scale,
            min: if min.is_finite() { min } else { 0.0 },
            max,
            spread_us: None,
        }
    };
    terms.iter().zip(&found).zip(&scales).map(coefficient).collect()
}

fn weighted_nnls(matrix: &[Vec<f64>], times: &[f64], weights: &[f64]) -> Vec<f64> {
    let n = matrix[0].len();
    let mut gram = vec![vec![0.0; n]; n];
    let mut right = vec![0.0; n];
    for ((row, t), w) in matrix.iter().zip(times).zip(weights) {
        for i in 0..n {
            right[i] += w * w * row[i] * t;
            for j in 0..n {
                gram[i][j] += w * w * row[i] * row[j];
            }
        }
    }
    // A tiny ridge breaks ties between collinear terms: 1e-6 of each term's own diagonal. (Of the largest one it would
    // bend large shapes: rows weigh 1/t², so the diagonal of calls is millions of times that of multiply-adds.)
    for (i, row) in gram.iter_mut().enumerate() {
        row[i] = row[i] * (1.0 + 1e-6) + f64::MIN_POSITIVE;
    }
    nnls(&gram, &right)
}

/// `argmin_{x ≥ 0} ½·xᵀGx − rᵀx` for a positive definite `G`: Lawson and Hanson, *Solving Least Squares Problems* (1974),
/// ch. 23, on the normal equations (Bro and de Jong, 1997).
pub fn nnls(gram: &[Vec<f64>], right: &[f64]) -> Vec<f64> {
    let n = right.len();
    let mut x = vec![0.0; n];
    let mut free = vec![false; n];
    let tolerance = 1e-12 * right.iter().fold(0.0f64, |m, r| m.max(r.abs()));
    for _ in 0..3 * n + 3 {
        let slack = |x: &[f64], i: usize| right[i] - gram[i].iter().zip(x).map(|(g, x)| g * x).sum::<f64>();
        let steepest = (0..n)
            .filter(|&i| !free[i])
            .map(|i| (slack(&x, i), i))
            .max_by(|a, b| a.0.total_cmp(&b.0));
        let Some((_, enter)) = steepest.filter(|s| s.0 > tolerance) else {
            break;
        };
        free[enter] = true;
        loop {
            let active: Vec<usize> = (0..n).filter(|&i| free[i]).collect();
            let step = solve_on(gram, right, &active);
            if step.iter().all(|&s| s > 0.0) {
                x.fill(0.0);
                for (&i, &s) in active.iter().zip(&step) {
                    x[i] = s;
                }
                break;
            }
            // Walk towards the solution until the first coefficient meets zero, and fix that one there.
            let blocking = active.iter().zip(&step).filter(|(_, s)| **s <= 0.0);
            let alpha = blocking.map(|(&i, &s)| x[i] / (x[i] - s)).fold(1.0, f64::min);
            for (&i, &s) in active.iter().zip(&step) {
                x[i] += alpha * (s - x[i]);
                if s <= 0.0 && x[i] <= 1e-14 {
                    x[i] = 0.0;
                    free[i] = false;
                }
            }
            if active.iter().all(|&i| free[i]) {
                // Rounding kept all of them a hair above zero: fix the smallest.
                let smallest = active
                    .iter()
                    .copied()
                    .min_by(|&a, &b| x[a].total_cmp(&x[b]))
                    .expect("not empty");
                x[smallest] = 0.0;
                free[smallest] = false;
            }
        }
    }
    x
}

/// Gaussian elimination with partial pivots on the chosen rows and columns.
fn solve_on(gram: &[Vec<f64>], right: &[f64], chosen: &[usize]) -> Vec<f64> {
    let n = chosen.len();
    let mut a: Vec<Vec<f64>> = chosen
        .iter()
        .map(|&i| chosen.iter().map(|&j| gram[i][j]).chain([right[i]]).collect())
        .collect();
    for column in 0..n {
        let pivot = (column..n)
            .max_by(|&p, &q| a[p][column].abs().total_cmp(&a[q][column].abs()))
            .expect("not empty");
        a.swap(column, pivot);
        for row in column + 1..n {
            let factor = a[row][column] / a[column][column];
            let (above, below) = a.split_at_mut(row);
            for (x, y) in below[0].iter_mut().zip(&above[column]).skip(column) {
                *x -= factor * y;
            }
        }
    }
    let mut x = vec![0.0; n];
    for row in (0..n).rev() {
        let known: f64 = (row + 1..n).map(|k| a[row][k] * x[k]).sum();
        x[row] = (a[row][n] - known) / a[row][row];
    }
    x
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::graph::Numerics;
    use crate::work::{Context, ConvKey};

    /// Law: of a mean, the jackknife is the textbook's standard error; and what is exact has an interval of nothing.
    #[test]
    fn intervals_of_a_mean_are_the_textbooks() {
        let values = [3.0f64, 5.0, 4.0, 9.0, 7.0];
        let sum: f64 = values.iter().sum();
        let without: Vec<f64> = values.iter().map(|v| (sum - v) / 4.0).collect();
        let mean = sum / 5.0;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 4.0;
        let expected = 1.645 * (variance / 5.0).sqrt();
        assert!((jackknife(&without).unwrap() - expected).abs() < 1e-12);
        assert_eq!(jackknife(&[2.0; 4]), Some(0.0));
        assert_eq!(jackknife(&[1.0, 2.0]), None);
    }

    proptest! {
        /// Law: Karush-Kuhn-Tucker. Coefficients are never negative, the slope is 0 where they are positive, and points
        /// downhill nowhere.
        #[test]
        fn nnls_is_optimal(rows in prop::collection::vec((prop::collection::vec(-1.0f64..1.0, 5), -2.0f64..2.0), 5..30)) {
            let mut gram = vec![vec![0.0; 5]; 5];
            let mut right = vec![0.0; 5];
            for (row, t) in &rows {
                for i in 0..5 {
                    right[i] += row[i] * t;
                    for j in 0..5 {
                        gram[i][j] += row[i] * row[j];
                    }
                }
            }
            for (i, row) in gram.iter_mut().enumerate() {
                row[i] += 1e-6;
            }
            let x = nnls(&gram, &right);
            for i in 0..5 {
                let slope: f64 = gram[i].iter().zip(&x).map(|(g, x)| g * x).sum::<f64>() - right[i];
                prop_assert!(x[i] >= 0.0);
                prop_assert!(slope >= -1e-6, "{slope}");
                prop_assert!(x[i] == 0.0 || slope.abs() <= 1e-6, "{} {slope}", x[i]);
            }
        }
    }

    pub(crate) fn conv(cin: u32, cout: u32, kernel: u32, height: u32) -> Key {
        Key::Conv(ConvKey {
            batch: 1,
            cin,
            cout,
            kernel,
            stride: 1,
            groups: 1,
            height,
            width: height,
            numerics: Numerics::Int8,
            threads: 1,
            context: Context::Chain,
        })
    }

    #[test]
    fn a_machine_made_of_the_terms_is_found_again() {
        let truth = |key: &Key| -> f64 {
            let cost = |term| match term {
                Term::Call => 2.0,
                Term::MegaMacs | Term::MegaMacsPointwise => 20.0,
                Term::ActivationKib => 0.05,
                _ => 0.0,
            };
            key.features(Block(16)).terms().iter().map(|(t, c)| cost(*t) * c).sum()
        };
        let mut samples = Vec::new();
        for c in [16, 20, 24, 32, 48, 64] {
            for h in [4, 8, 16] {
                for k in [3, 5] {
                    let key = conv(c, 2 * c, k, h);
                    // One session in seven is spoilt by half.
                    let spoilt = if samples.len() % 7 == 4 { 1.5 } else { 1.0 };
                    samples.push(Sample {
                        key,
                        us: truth(&key) * spoilt,
                        relative_spread: 0.01,
                    });
                }
            }
        }
        let fits = fit(&samples, Block(16), 0.01);
        assert_eq!(fits.len(), 1);
        for (cin, cout, k, h) in [(12, 20, 3, 12), (48, 48, 5, 8), (32, 16, 3, 10)] {
            let key = conv(cin, cout, k, h);
            let (found, expected) = (fits[0].us(&key.features(Block(16))), truth(&key));
            assert!((found / expected).ln().abs() < 0.1, "{key}: {found} {expected}");
        }
        let huge = conv(512, 512, 3, 64).features(Block(16));
        assert!(fits[0].outside_ln(&huge) > 1.0);
        assert_eq!(fits[0].outside_ln(&conv(16, 32, 3, 8).features(Block(16))), 0.0);
    }
}
