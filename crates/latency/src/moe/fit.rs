//! The fit of our engine's operators. All paths of one kernel (from memory and from cache, one thread and several) are one
//! system: computing costs the same in all of them, a byte of weights costs what its level and its readers make of it.
//! `t = serial + S_p(compute, weights)`, `S_p(a, b) = (aᵖ + bᵖ)^(1/p)` (reference 2.4), p and what several threads lose
//! chosen by rows left out. Law: coefficients are never negative, so that the model grows with every size.

use std::collections::{BTreeMap, BTreeSet};

use crate::fit::{Coefficient, PathFit, Sample, UNTESTED_LN, family, jackknife, nnls};
use crate::probe::{median, quantile};
use crate::work::{Block, Family, Features, Form, Heat, Key, Path, Term, TermGroup};

/// Whether our engine runs it.
pub(crate) fn is_engine(key: &Key) -> bool {
    matches!(key, Key::Expert(_) | Key::Dense(_) | Key::Attention(_) | Key::Glue(_))
}

/// The family whose computing a family shares.
pub(crate) fn kernel(family: Family) -> Family {
    match family {
        Family::Expert { codes, .. } => Family::Expert {
            codes,
            heat: Heat::Cold,
        },
        // The kernels of experts.
        Family::Dense { form: Form::Codes, .. } => Family::Expert {
            codes: true,
            heat: Heat::Cold,
        },
        Family::Dense { form, many, .. } => Family::Dense {
            form,
            many,
            heat: Heat::Cold,
        },
        Family::Attention { kv_bits, .. } => Family::Attention {
            kv_bits,
            heat: Heat::Cold,
        },
        other => other,
    }
}

/// How terms add up where computing and memory overlap.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Part {
    /// Before or after the rest.
    Serial,
    Compute,
    Weights,
}

fn part_of(term: Term) -> Part {
    match term {
        Term::WeightKib | Term::KiloRuns => Part::Weights,
        _ if term.group() == TermGroup::Compute => Part::Compute,
        _ => Part::Serial,
    }
}

/// What `S_p` leaves of computing and of weights: their shares add up to it (Euler, degree one).
pub(crate) fn shares(power: f64, compute_us: f64, weights_us: f64) -> (f64, f64) {
    let most = compute_us.max(weights_us);
    if most <= 0.0 {
        return (1.0, 1.0);
    }
    // Over the larger one: no power overflows.
    let (c, m) = (compute_us / most, weights_us / most);
    let sum = (c.powf(power) + m.powf(power)).powf(1.0 / power);
    ((c / sum).powf(power - 1.0), (m / sum).powf(power - 1.0))
}

/// `S_p` over terms: what to multiply each by.
pub(crate) fn overlapped(power: f64, parts: impl Iterator<Item = (Term, f64)>) -> impl Fn(Term) -> f64 {
    let (mut compute_us, mut weights_us) = (0.0, 0.0);
    for (term, us) in parts {
        match part_of(term) {
            Part::Serial => {}
            Part::Compute => compute_us += us,
            Part::Weights => weights_us += us,
        }
    }
    let (compute, weights) = shares(power, compute_us, weights_us);
    move |term| match part_of(term) {
        Part::Serial => 1.0,
        Part::Compute => compute,
        Part::Weights => weights,
    }
}

/// One unknown: shared by all paths of a kernel, or a path's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Column {
    Shared(Term),
    /// Handing work to threads.
    OfThreads(Term, u32),
    OfPath(Term, Path),
}

fn column(term: Term, path: Path) -> Column {
    match term {
        Term::WeightKib | Term::KiloRuns => Column::OfPath(term, path),
        // The first bytes of cold weights come late, and an expert begins three matrices: whatever the number of threads.
        Term::Call => Column::OfPath(term, Path { threads: 1, ..path }),
        Term::KernelCalls => Column::OfThreads(term, path.threads),
        _ => Column::Shared(term),
    }
}

struct Row {
    key: Key,
    features: Features,
    us: f64,
    weight: f64,
}

/// What is chosen rather than solved for.
#[derive(Debug, Clone, PartialEq)]
struct Choice {
    power: f64,
    /// By number of threads: how much longer a thread computes when the others do, too.
    crowded: BTreeMap<u32, f64>,
}

impl Choice {
    fn crowded(&self, threads: u32) -> f64 {
        self.crowded.get(&threads).copied().unwrap_or(1.0)
    }
}

/// Choices beside one.
type Alternatives = dyn Fn(&Choice) -> Vec<Choice>;

const POWERS: [f64; 5] = [1.0, 1.5, 2.5, 5.0, 16.0];
const CROWDED: [f64; 6] = [1.0, 1.07, 1.15, 1.25, 1.4, 1.6];
const FOLDS: u64 = 6;
/// Rounds of the linearised overlap, and of Huber's weights within.
const ROUNDS: usize = 6;
/// Ridge over each column's own diagonal.
const RIDGE: f64 = 1e-6;
/// Times below this are the timer's.
const RESOLUTION_US: f64 = 0.3;
/// Rows that a path's own bias counts against: none of its own yet.
const BIAS_ROWS: f64 = 6.0;

/// The rows of one kernel.
struct System {
    columns: Vec<Column>,
    rows: Vec<Row>,
}

impl System {
    fn new(samples: &[Sample], block: Block, noise_floor: f64) -> Self {
        let row = |sample: &Sample| Row {
            key: sample.key,
            features: sample.key.features(block),
            us: sample.us.max(1e-3),
            weight: {
                let spread = sample.relative_spread.max(noise_floor).clamp(0.02, 0.5);
                1.0 / spread.max(RESOLUTION_US / sample.us.max(1e-3))
            },
        };
        let rows: Vec<Row> = samples.iter().map(row).collect();
        let columns: BTreeSet<Column> = rows
            .iter()
            .flat_map(|row| {
                let terms = row.features.terms().iter().filter(|(_, count)| *count > 0.0);
                terms.map(|(term, _)| column(*term, row.features.path))
            })
            .collect();
        Self {
            columns: columns.into_iter().collect(),
            rows,
        }
    }

    fn at(&self, column: Column) -> Option<usize> {
        self.columns.binary_search(&column).ok()
    }

    /// `(column, µs per unit of its coefficient, part)` of a row.
    fn cells(&self, row: &Row, choice: &Choice) -> Vec<(usize, f64, Part)> {
        let path = row.features.path;
        let cell = |&(term, count): &(Term, f64)| {
            let part = part_of(term);
            let crowded = if part == Part::Compute {
                choice.crowded(path.threads)
            } else {
                1.0
            };
            Some((self.at(column(term, path))?, count * crowded, part))
        };
        row.features.terms().iter().filter_map(cell).collect()
    }

    fn predict(cells: &[(usize, f64, Part)], found: &[f64], power: f64) -> (f64, (f64, f64)) {
        let of = |wanted: Part| -> f64 {
            let those = cells.iter().filter(|c| c.2 == wanted);
            those.map(|(at, count, _)| found[*at] * count).sum()
        };
        let (serial, compute, weights) = (of(Part::Serial), of(Part::Compute), of(Part::Weights));
        let (c, w) = shares(power, compute, weights);
        (serial + c * compute + w * weights, (c, w))
    }

    /// Coefficients of the chosen rows: relative errors, Huber's weights, the overlap linearised around the last round.
    fn solve(&self, chosen: &[usize], choice: &Choice) -> Vec<f64> {
        let n = self.columns.len();
        let cells: Vec<_> = chosen.iter().map(|&i| self.cells(&self.rows[i], choice)).collect();
        let mut slopes = vec![(1.0, 1.0); chosen.len()];
        let mut bends = vec![1.0; chosen.len()];
        let mut found = vec![0.0; n];
        let rounds = if choice.power > 1.0 { ROUNDS } else { 3 };
        for round in 0..rounds {
            let mut gram = vec![vec![0.0; n]; n];
            let mut right = vec![0.0; n];
            for (k, cells) in cells.iter().enumerate() {
                let row = &self.rows[chosen[k]];
                let scale = row.weight * bends[k] / row.us;
                let scaled: Vec<(usize, f64)> = cells
                    .iter()
                    .map(|&(at, count, part)| {
                        let slope = match part {
                            Part::Serial => 1.0,
                            Part::Compute => slopes[k].0,
                            Part::Weights => slopes[k].1,
                        };
                        (at, slope * count * scale)
                    })
                    .collect();
                for &(i, x) in &scaled {
                    right[i] += x * row.us * scale;
                    for &(j, y) in &scaled {
                        gram[i][j] += x * y;
                    }
                }
            }
            for (i, row) in gram.iter_mut().enumerate() {
                row[i] = row[i] * (1.0 + RIDGE) + f64::MIN_POSITIVE;
            }
            found = nnls(&gram, &right);
            let mut errors = Vec::with_capacity(chosen.len());
            for (k, cells) in cells.iter().enumerate() {
                let (us, (c, w)) = Self::predict(cells, &found, choice.power);
                let slope = &mut slopes[k];
                // Half a step: whole ones swing.
                let step = if round == 0 { 1.0 } else { 0.5 };
                *slope = (slope.0 + step * (c - slope.0), slope.1 + step * (w - slope.1));
                errors.push((us / self.rows[chosen[k]].us).max(1e-9).ln().abs());
            }
            let bend = 1.5 * 1.48 * median(&errors);
            for (weight, error) in bends.iter_mut().zip(&errors) {
                *weight = if *error > bend && bend > 0.0 {
                    (bend / error).sqrt()
                } else {
                    1.0
                };
            }
        }
        found
    }

    fn folds(&self) -> Vec<u64> {
        let fold = |row: &Row| cotk_run::files::checksum(family(&row.key).as_bytes()) % FOLDS;
        self.rows.iter().map(fold).collect()
    }

    /// ln(measured / predicted) of every row by a fit that had not seen its family, and what each of these fits found.
    fn left_out(&self, folds: &[u64], choice: &Choice) -> (Vec<f64>, Vec<Vec<f64>>) {
        let mut others = Vec::new();
        let mut errors = vec![f64::NAN; self.rows.len()];
        for fold in 0..FOLDS {
            let (test, train): (Vec<usize>, Vec<usize>) = (0..self.rows.len()).partition(|&i| folds[i] == fold);
            if test.is_empty() || train.is_empty() {
                continue;
            }
            let found = self.solve(&train, choice);
            for i in test {
                let (us, _) = Self::predict(&self.cells(&self.rows[i], choice), &found, choice.power);
                errors[i] = (self.rows[i].us / us.max(1e-6)).ln();
            }
            others.push(found);
        }
        (errors, others)
    }

    fn loss(&self, folds: &[u64], choice: &Choice) -> f64 {
        let (errors, _) = self.left_out(folds, choice);
        // One wild row must not choose.
        let of: Vec<f64> = errors
            .iter()
            .filter(|e| e.is_finite())
            .map(|e| e.abs().min(0.7))
            .collect();
        #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
        let mean = of.iter().sum::<f64>() / of.len().max(1) as f64;
        mean
    }

    /// One choice after the other, each by rows left out.
    fn choose(&self, folds: &[u64]) -> Choice {
        let mut best = Choice {
            power: 1.0,
            crowded: BTreeMap::new(),
        };
        if self.rows.len() < 2 * self.columns.len().max(6) {
            return best;
        }
        let mut least = self.loss(folds, &best);
        let several: BTreeSet<u32> = self
            .rows
            .iter()
            .map(|r| r.features.path.threads)
            .filter(|t| *t > 1)
            .collect();
        let mut tries: Vec<Box<Alternatives>> = Vec::new();
        let powers = |from: &Choice| POWERS.map(|power| Choice { power, ..from.clone() }).to_vec();
        tries.push(Box::new(powers));
        for threads in several {
            tries.push(Box::new(move |from: &Choice| {
                let with = |crowded: f64| {
                    let mut choice = from.clone();
                    choice.crowded.insert(threads, crowded);
                    choice
                };
                CROWDED.map(with).to_vec()
            }));
        }
        tries.push(Box::new(powers));
        for alternatives in tries {
            for choice in alternatives(&best.clone()) {
                let loss = self.loss(folds, &choice);
                // What hardly helps is chance.
                if loss < 0.99 * least {
                    (least, best) = (loss, choice);
                }
            }
        }
        best
    }

    fn fit(&self, noise_floor: f64) -> Vec<PathFit> {
        let folds = self.folds();
        let choice = self.choose(&folds);
        let all: Vec<usize> = (0..self.rows.len()).collect();
        let found = self.solve(&all, &choice);
        let families: BTreeSet<String> = self.rows.iter().map(|row| family(&row.key)).collect();
        // Two shapes leave nothing to leave out.
        let (left_out, others) = if families.len() < 3 {
            let error = |row: &Row| {
                let (us, _) = Self::predict(&self.cells(row, &choice), &found, choice.power);
                (row.us / us.max(1e-6)).ln()
            };
            (self.rows.iter().map(error).collect(), Vec::new())
        } else {
            self.left_out(&folds, &choice)
        };
        let mut of_path: BTreeMap<Path, Vec<usize>> = BTreeMap::new();
        for (i, row) in self.rows.iter().enumerate() {
            of_path.entry(row.features.path).or_default().push(i);
        }
        let range = |column: Column, term: Term| {
            let counts = self
                .rows
                .iter()
                .filter(|row| self::column(term, row.features.path) == column);
            let counts = counts.flat_map(|row| row.features.terms().iter().filter(|t| t.0 == term).map(|t| t.1));
            let counts = counts.filter(|count| *count > 0.0);
            counts.fold((f64::INFINITY, 0.0f64), |(lo, hi), c| (lo.min(c), hi.max(c)))
        };
        let path_fit = |(path, rows): (Path, Vec<usize>)| {
            let bias = self.bias(&rows, &choice, &found);
            let terms: BTreeSet<Term> = { rows.iter() }
                .flat_map(|&i| self.rows[i].features.terms().iter().map(|t| t.0))
                .collect();
            let terms = terms
                .into_iter()
                .chain(self.columns.iter().filter_map(|column| match column {
                    Column::Shared(term) => Some(*term),
                    _ => None,
                }));
            let mut coefficients: Vec<Coefficient> = Vec::new();
            for term in terms {
                let column = column(term, path);
                let at = self.at(column);
                if coefficients.iter().any(|c| c.term == term) {
                    continue;
                }
                let crowded = if part_of(term) == Part::Compute {
                    choice.crowded(path.threads)
                } else {
                    1.0
                };
                let (min, max) = range(column, term);
                let without: Option<Vec<f64>> = at.map(|at| others.iter().map(|other| other[at]).collect());
                coefficients.push(Coefficient {
                    term,
                    us_per_unit: at.map_or(0.0, |at| bias * crowded * found[at]),
                    spread_us: without
                        .and_then(|w| jackknife(&w))
                        .map(|spread| bias * crowded * spread),
                    min: if min.is_finite() { min } else { 0.0 },
                    max,
                });
            }
            let errors: Vec<f64> = rows
                .iter()
                .map(|&i| left_out[i].abs())
                .filter(|e| e.is_finite())
                .collect();
            #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
            let count = errors.len() as f64;
            let spread_ln = match () {
                () if errors.is_empty() => UNTESTED_LN,
                // Fitted rows flatter: no smaller than a tenth.
                () if families.len() < 3 => quantile(&errors, 0.9).max(0.1),
                () => quantile(&errors, 0.9),
            };
            PathFit {
                path,
                coefficients,
                rows: rows.len(),
                cv_mape_pct: 100.0 * errors.iter().map(|e| 1.0 - (-e).exp()).sum::<f64>() / count.max(1.0),
                spread_ln: spread_ln.max(noise_floor),
                team: None,
                overlap: (choice.power > 1.0).then_some(choice.power),
            }
        };
        of_path.into_iter().map(path_fit).collect()
    }

    /// Weights of 1 / t bias low, and what a path has of its own no shared coefficient says.
    fn bias(&self, rows: &[usize], choice: &Choice, found: &[f64]) -> f64 {
        let ratio = |&i: &usize| {
            let (us, _) = Self::predict(&self.cells(&self.rows[i], choice), found, choice.power);
            (self.rows[i].us / us.max(1e-6)).ln()
        };
        let ratios: Vec<f64> = rows.iter().map(ratio).collect();
        #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
        let count = ratios.len() as f64;
        (median(&ratios).clamp(-0.5, 0.5) * count / (count + BIAS_ROWS)).exp()
    }
}

/// Every path of our engine that has rows, in path order.
pub(crate) fn fit(samples: &[Sample], block: Block, noise_floor: f64) -> Vec<PathFit> {
    let mut kernels: BTreeMap<Family, Vec<Sample>> = BTreeMap::new();
    for sample in samples.iter().filter(|s| is_engine(&s.key)) {
        let family = sample.key.path(block).family;
        kernels.entry(kernel(family)).or_default().push(*sample);
    }
    let fits = kernels
        .values()
        .map(|samples| System::new(samples, block, noise_floor).fit(noise_floor));
    let mut fits: Vec<PathFit> = fits.flatten().collect();
    fits.sort_by_key(|fit| fit.path);
    fits
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::work::DenseKey;

    const BLOCK: Block = Block(16);

    fn dense(inputs: u32, outputs: u32, tokens: u32, threads: u32, heat: Heat) -> Key {
        Key::Dense(DenseKey {
            inputs,
            outputs,
            bits: 16,
            group: 0,
            tokens,
            threads,
            heat,
        })
    }

    /// A machine that reads while it computes, and whose two threads share one memory.
    fn truth(key: &Key) -> f64 {
        let features = key.features(BLOCK);
        let count = |term: Term| features.terms().iter().find(|t| t.0 == term).map_or(0.0, |t| t.1);
        let is_cold = matches!(key, Key::Dense(d) if d.heat == Heat::Cold);
        let kib_us = match (is_cold, features.path.threads) {
            (true, 1) => 0.08,
            (true, _) => 0.06,
            (false, 1) => 0.02,
            (false, _) => 0.01,
        };
        let compute = 50.0 * count(Term::MegaWeights) + 30.0 * count(Term::MegaMacsPointwise);
        1.0 + 2.0 * count(Term::KernelCalls) + compute.max(kib_us * count(Term::WeightKib))
    }

    fn samples() -> Vec<Sample> {
        let sizes = [96u32, 400, 1024, 3072];
        let mut samples = Vec::new();
        for (i, inputs) in sizes.into_iter().enumerate() {
            for (o, outputs) in sizes.into_iter().enumerate() {
                for (threads, heat) in [(1, Heat::Cold), (1, Heat::Hot), (2, Heat::Cold), (2, Heat::Hot)] {
                    let key = dense(inputs, outputs, [1, 2, 4, 8][(i + o) % 4], threads, heat);
                    samples.push(Sample {
                        key,
                        us: truth(&key),
                        relative_spread: 0.01,
                    });
                }
            }
        }
        samples
    }

    #[test]
    fn what_overlaps_is_found_to_overlap() {
        let fits = fit(&samples(), BLOCK, 0.01);
        assert_eq!(fits.len(), 4);
        for (inputs, outputs, tokens) in [(700, 700, 1), (500, 2000, 8), (2000, 200, 4)] {
            for (threads, heat) in [(1, Heat::Cold), (1, Heat::Hot), (2, Heat::Cold), (2, Heat::Hot)] {
                let key = dense(inputs, outputs, tokens, threads, heat);
                let features = key.features(BLOCK);
                let fit = fits.iter().find(|fit| fit.path == features.path).unwrap();
                assert!(fit.overlap.is_some(), "{fit:?}");
                let (found, expected) = (fit.us(&features), truth(&key));
                assert!((found / expected).ln().abs() < 0.12, "{key}: {found} {expected}");
            }
        }
    }

    #[test]
    fn a_path_of_few_rows_computes_as_the_others_do() {
        let mut few = samples();
        let is_rare = |key: &Key| matches!(key, Key::Dense(d) if d.threads == 2 && d.heat == Heat::Hot);
        let mut kept = 0;
        few.retain(|sample| {
            !is_rare(&sample.key) || {
                kept += 1;
                kept % 8 == 0
            }
        });
        let fits = fit(&few, BLOCK, 0.01);
        let key = dense(1500, 1500, 2, 2, Heat::Hot);
        let features = key.features(BLOCK);
        let found = fits.iter().find(|fit| fit.path == features.path).unwrap();
        assert_eq!(found.rows, 2);
        assert!((found.us(&features) / truth(&key)).ln().abs() < 0.1);
    }

    proptest! {
        /// Law: between the larger one and the sum, and growing with both.
        #[test]
        fn an_overlap_lies_between_the_larger_and_the_sum(a in 0.0f64..1e5, b in 0.0f64..1e5, more in 0.0f64..10.0, power in 1.0f64..16.0) {
            let sum = |a: f64, b: f64| {
                let (x, y) = shares(power, a, b);
                a * x + b * y
            };
            let found = sum(a, b);
            prop_assert!(found >= a.max(b) * (1.0 - 1e-9) && found <= (a + b) * (1.0 + 1e-9));
            prop_assert!(sum(a + more, b) >= found * (1.0 - 1e-9));
        }
    }
}
