//! Operators and whole networks as rows of one linear system: a network's counts are the sums of its operators' counts, so
//! its time says what they cost *inside* a network, edges and launches included, without differences of noisy slopes. Other
//! paths (experts, reads) are fitted one by one. Law: coefficients are never negative; what judges a row never saw it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::team::{Team, Teams};
use super::{Coefficient, PathFit, Sample, UNTESTED_LN, family, fit, jackknife, nnls};
use crate::graph::Graph;
use crate::predict::{Correlation, Errors};
use crate::probe::{median, quantile};
use crate::smooth::{self, Place, Smoother};
use crate::walk;
use crate::work::{Block, Family, Key, Path, Term, TermGroup, Tier};

/// Something that was timed, as a sum of operators.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The operator that the row is about; `None`: a whole network.
    pub key: Option<Key>,
    /// What the time holds, and how often.
    pub parts: Vec<(Key, f64)>,
    pub us: f64,
    pub relative_spread: f64,
    /// How much the row counts: 1, or more for what was measured because a prediction failed.
    pub weight: f64,
}

impl Measured {
    /// A row that is one operator and nothing else.
    pub fn operator(sample: &Sample) -> Self {
        Self {
            key: Some(sample.key),
            parts: vec![(sample.key, 1.0)],
            us: sample.us,
            relative_spread: sample.relative_spread,
            weight: 1.0,
        }
    }

    /// A row of a table: one operator, or a triple as the chain that it stands in.
    pub fn of_table(sample: &Sample, block: Block) -> Self {
        let mut row = Self::operator(sample);
        if let Key::LowRank(triple) = sample.key {
            row.parts = triple.keys(block).into_iter().map(|key| (key, 1.0)).collect();
        }
        row
    }

    /// One inference of a network.
    pub fn network(graph: &Graph, threads: u32, block: Block, us: f64, relative_spread: f64) -> Self {
        Self {
            key: None,
            parts: walk::operators(graph, threads, block)
                .into_iter()
                .map(|key| (key, 1.0))
                .collect(),
            us,
            relative_spread,
            weight: 1.0,
        }
    }
}

/// How sure sums are for one number of threads, from networks that their own fit had not seen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    pub threads: u32,
    /// Networks behind it.
    pub networks: usize,
    /// The spread of a sum is multiplied by this: nine in ten left-out networks then lie inside.
    pub network_factor: f64,
    /// Mean absolute percentage error on left-out networks.
    pub network_mape_pct: f64,
    /// How far errors of operators go together in a network, as left-out networks say.
    #[serde(default = "usual")]
    pub correlation: Correlation,
}

fn usual() -> Correlation {
    Correlation::USUAL
}

/// All paths of a machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Fitted {
    pub paths: Vec<PathFit>,
    /// One for each number of threads that has networks enough.
    pub calibrations: Vec<Calibration>,
}

impl Fitted {
    /// The time of a row's own operator: what it measured less its other parts, never below a tenth of the whole. µs.
    pub fn own_us(&self, row: &Measured, block: Block) -> f64 {
        let Some(key) = row.key else { return row.us };
        let us = |key: &Key| {
            let features = key.features(block);
            let path = self.paths.iter().find(|fit| fit.path == features.path);
            path.map_or(0.0, |fit| fit.us(&features))
        };
        let (own, others): (Vec<_>, Vec<_>) = row.parts.iter().partition(|part| part.0 == key);
        let times: f64 = own.iter().map(|part: &(Key, f64)| part.1).sum();
        let others: f64 = others.iter().map(|(key, times)| times * us(key)).sum();
        (row.us - others).max(0.1 * row.us) / if times > 0.0 { times } else { 1.0 }
    }
}

/// Columns of the system, and one row of it.
type Column = (Path, Term);
type Row = Vec<(usize, f64)>;

/// Ridge on columns of largest relative count 1: breaks ties between collinear terms.
const RIDGE: f64 = 1e-4;
/// Operators count less than networks: their slopes are differences, and there are more of them. A compromise: left out of 160
/// networks and 825 operators, 0.1 gave 2.4 and 11.1 %, 0.3 gave 2.6 and 9.8 %, 1 gave 3.1 and 9.6 %. The terms were chosen on
/// the same networks, so these figures flatter; a held-out list judges.
const OPERATOR_WEIGHT: f64 = 0.3;
/// What the timer and a slope cannot resolve.
const RESOLUTION_US: f64 = 1.0;
const FOLDS: u64 = 8;
/// Rows of a path from which it is well known, and rows of a term of such a path below which nothing is said of the term.
const WELL_KNOWN: usize = 20;
const FEWEST_ROWS: usize = 5;

/// Fits everything that has rows.
pub fn fit_all(measured: &[Measured], block: Block, noise_floor: f64) -> Fitted {
    let is_cnn = |key: &Key| crate::predict::kind(key.path(block).family) == "cnn";
    let (cnn, other): (Vec<&Measured>, Vec<&Measured>) = measured
        .iter()
        .filter(|m| m.us > 0.0 && m.us.is_finite())
        .partition(|m| m.key.is_none_or(|key| is_cnn(&key)));
    let samples = other.iter().filter_map(|m| {
        Some(Sample {
            key: m.key?,
            us: m.us,
            relative_spread: m.relative_spread,
        })
    });
    let mut paths = fit(&samples.collect::<Vec<_>>(), block, noise_floor);
    let reads = { paths.iter() }.find(|fit| fit.path.family == Family::Read(Tier::Memory) && fit.path.threads == 1);
    let read_us = reads.and_then(|fit| fit.coefficients.iter().find(|c| c.term == Term::ReadKib));
    let read_us = read_us.map(|c| c.us_per_unit).filter(|us| *us > 0.0);
    // Numbers of threads share no path: one system each.
    let mut by_threads: BTreeMap<u32, Vec<&Measured>> = BTreeMap::new();
    for row in cnn {
        if let Some((key, _)) = row.parts.first() {
            by_threads.entry(key.path(block).threads).or_default().push(row);
        }
    }
    let mut calibrations = Vec::new();
    let mut one: BTreeMap<Family, PathFit> = BTreeMap::new();
    for (threads, rows) in by_threads {
        let (fits, judged) = if one.is_empty() {
            fit_system(&rows, block, noise_floor, read_us)
        } else {
            fit_teams(&rows, &one, threads, block, noise_floor)
        };
        if threads == 1 {
            one = fits.iter().map(|fit| (fit.path.family, fit.clone())).collect();
        }
        paths.extend(fits);
        calibrations.extend(calibrate(threads, &judged));
    }
    paths.sort_by_key(|fit| fit.path);
    Fitted { paths, calibrations }
}

/// A left-out network: |ln(measured / predicted)| and what its parts say of the spread.
struct Judged {
    error_ln: f64,
    errors: Errors,
}

/// Correlations that are tried: within a path, across paths. Never none: a network of many equal layers is wrong by one error.
const WITHIN: [f64; 4] = [0.1, 0.25, 0.5, 1.0];
const ACROSS: [f64; 4] = [0.05, 0.1, 0.2, 0.4];

/// Nothing from fewer than ten: they say nothing about a ninth decile.
fn calibrate(threads: u32, judged: &[Judged]) -> Option<Calibration> {
    if judged.len() < 10 {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "counts of networks")]
    let count = judged.len() as f64;
    // A little beyond the decile: that of a finite sample (conformal prediction).
    let decile = (0.9 * (count + 1.0) / count).min(1.0);
    let factor = |correlation: Correlation| {
        let ratio = |j: &Judged| j.error_ln / j.errors.spread_ln(correlation).max(1e-6);
        quantile(&judged.iter().map(ratio).collect::<Vec<_>>(), decile)
    };
    // All of them cover nine in ten: the best is the one whose intervals are narrowest, by their mean logarithm.
    let width = |correlation: &Correlation| {
        let own = judged.iter().map(|j| j.errors.spread_ln(*correlation).max(1e-6).ln());
        factor(*correlation).max(1e-6).ln() + own.sum::<f64>() / count
    };
    let tried = WITHIN.iter().flat_map(|&within| {
        let across = ACROSS.iter().filter(move |&&across| across <= within);
        across.map(move |&across| Correlation { within, across })
    });
    let correlation = if judged.len() < FEW_NETWORKS {
        Correlation::USUAL
    } else {
        tried.min_by(|a, b| width(a).total_cmp(&width(b))).expect("a list")
    };
    let errors = judged.iter().map(|j| 1.0 - (-j.error_ln).exp());
    Some(Calibration {
        threads,
        networks: judged.len(),
        network_factor: factor(correlation),
        network_mape_pct: 100.0 * errors.sum::<f64>() / count,
        correlation,
    })
}

/// Fewer say nothing about correlations.
const FEW_NETWORKS: usize = 40;

/// How much a row counts.
fn weight(row: &Measured) -> f64 {
    row.weight
        * match row.key {
            None => 1.0,
            Some(_) => OPERATOR_WEIGHT * row.us / (row.us + RESOLUTION_US),
        }
}

struct System {
    columns: Vec<Column>,
    rows: Vec<Row>,
    us: Vec<f64>,
    weights: Vec<f64>,
    /// Most that a unit of each column may cost; infinite where nothing is known.
    most: Vec<f64>,
}

/// What a KiB may cost that is fetched from afar, in readings of a KiB from memory: nothing is farther than memory, and what
/// is written is read first.
fn most_readings(term: Term) -> Option<f64> {
    match term {
        Term::FarWeightKib => Some(2.0),
        Term::FarOutputKib => Some(4.0),
        _ => None,
    }
}

impl System {
    /// `read_us`: what a KiB from memory takes one thread, where that was measured.
    fn new(measured: &[&Measured], block: Block, read_us: Option<f64>) -> Self {
        let mut columns: BTreeMap<Column, usize> = BTreeMap::new();
        let mut rows = Vec::with_capacity(measured.len());
        for row in measured {
            let mut sums: BTreeMap<usize, f64> = BTreeMap::new();
            for (key, times) in &row.parts {
                let features = key.features(block);
                for &(term, count) in features.terms() {
                    let next = columns.len();
                    let at = *columns.entry((features.path, term)).or_insert(next);
                    *sums.entry(at).or_default() += times * count;
                }
            }
            rows.push(sums.into_iter().filter(|(_, count)| *count != 0.0).collect());
        }
        let mut in_order: Vec<(Column, usize)> = columns.into_iter().collect();
        in_order.sort_by_key(|c| c.1);
        let columns: Vec<Column> = in_order.into_iter().map(|c| c.0).collect();
        let most = |column: &Column| {
            read_us
                .zip(most_readings(column.1))
                .map_or(f64::INFINITY, |(us, n)| us * n)
        };
        Self {
            most: columns.iter().map(most).collect(),
            columns,
            rows,
            us: measured.iter().map(|m| m.us).collect(),
            weights: measured.iter().map(|m| weight(m)).collect(),
        }
    }

    /// µs per unit of each column from the chosen rows: relative errors, two rounds of Huber's weights, bias taken out.
    fn solve(&self, chosen: &[usize]) -> Vec<f64> {
        let n = self.columns.len();
        let mut scales = vec![0.0f64; n];
        let mut support = vec![0usize; n];
        for &row in chosen {
            for &(column, count) in &self.rows[row] {
                scales[column] = scales[column].max((count / self.us[row]).abs());
                support[column] += 1;
            }
        }
        // What next to no row of a well known path has says nothing: its price would be those rows' noise.
        for (column, scale) in scales.iter_mut().enumerate() {
            let of_path = { self.columns.iter().zip(&support) }.filter(|(c, _)| c.0 == self.columns[column].0);
            let known = of_path.map(|(_, rows)| *rows).max().unwrap_or(0);
            if known >= WELL_KNOWN && support[column] < FEWEST_ROWS {
                *scale = 0.0;
            }
        }
        let mut weights: Vec<f64> = chosen.iter().map(|&row| self.weights[row]).collect();
        let mut found = vec![0.0; n];
        for round in 0..3 {
            if round > 0 {
                let errors: Vec<f64> = chosen
                    .iter()
                    .map(|&row| (self.predict(row, &found) / self.us[row] - 1.0).abs())
                    .collect();
                let bend = 1.5 * 1.48 * median(&errors);
                for ((weight, &row), error) in weights.iter_mut().zip(chosen).zip(&errors) {
                    let bent = *error > bend && bend > 0.0;
                    *weight = self.weights[row] * if bent { (bend / error).sqrt() } else { 1.0 };
                }
            }
            let mut gram = vec![vec![0.0; n]; n];
            let mut right = vec![0.0; n];
            for (&row, weight) in chosen.iter().zip(&weights) {
                let square = weight * weight;
                let scaled = |&(column, count): &(usize, f64)| {
                    let scale = scales[column];
                    (scale > 0.0).then(|| (column, count / self.us[row] / scale))
                };
                let cells: Vec<(usize, f64)> = self.rows[row].iter().filter_map(scaled).collect();
                for &(i, x) in &cells {
                    right[i] += square * x;
                    for &(j, y) in &cells {
                        gram[i][j] += square * x * y;
                    }
                }
            }
            for (i, row) in gram.iter_mut().enumerate() {
                row[i] += RIDGE;
            }
            let solved = self.within(&gram, &right, &scales);
            let unscaled = solved.iter().zip(&scales);
            found = unscaled.map(|(x, s)| if *s > 0.0 { x / s } else { 0.0 }).collect();
        }
        let ratios: Vec<f64> = chosen
            .iter()
            .map(|&row| (self.us[row] / self.predict(row, &found).max(1e-9)).ln())
            .collect();
        let bias = median(&ratios).clamp(-0.5, 0.5).exp();
        found.iter_mut().for_each(|x| *x *= bias);
        found
    }

    /// Least squares whose coefficients are neither negative nor dearer than they can be: what is too dear is held at its most,
    /// and the others are solved for again.
    fn within(&self, gram: &[Vec<f64>], right: &[f64], scales: &[f64]) -> Vec<f64> {
        let n = right.len();
        let mut held: Vec<Option<f64>> = vec![None; n];
        loop {
            // A held column leaves the system: its share goes to the right side, and its own row says nothing.
            let mut gram = gram.to_vec();
            let mut right = right.to_vec();
            for (j, most) in held.iter().enumerate().filter_map(|(j, h)| Some((j, (*h)?))) {
                for i in 0..n {
                    right[i] -= gram[i][j] * most;
                    (gram[i][j], gram[j][i]) = (0.0, 0.0);
                }
                (gram[j][j], right[j]) = (1.0, 0.0);
            }
            let mut solved = nnls(&gram, &right);
            let mut is_new = false;
            for j in 0..n {
                let most = self.most[j] * scales[j];
                if held[j].is_none() && most.is_finite() && solved[j] > most {
                    held[j] = Some(most);
                    is_new = true;
                }
            }
            if !is_new {
                held.iter().zip(&mut solved).for_each(|(h, x)| *x = h.unwrap_or(*x));
                return solved;
            }
        }
    }

    fn predict(&self, row: usize, coefficients: &[f64]) -> f64 {
        self.rows[row]
            .iter()
            .map(|&(column, count)| coefficients[column] * count)
            .sum()
    }
}

/// The fold that a row leaves with: families of operators and single networks leave together.
fn fold(index: usize, row: &Measured) -> u64 {
    match row.key {
        Some(key) => cotk_run::files::checksum(family(&key).as_bytes()) % FOLDS,
        None => index as u64 % FOLDS,
    }
}

/// What each row is predicted at by a fit of the others; NaN where there are too few for folds, or nothing is known of it.
struct LeftOut {
    /// By the terms alone: what sums of operators are made of.
    bare: Vec<f64>,
    /// With what the neighbours that are left say, as single operators are predicted.
    beside: Vec<f64>,
}

/// `predict` takes the rows of a fit and returns what it says of every row.
fn left_out(measured: &[&Measured], block: Block, mut predict: impl FnMut(&[usize]) -> Vec<f64>) -> LeftOut {
    let mut left_out = LeftOut {
        bare: vec![f64::NAN; measured.len()],
        beside: vec![f64::NAN; measured.len()],
    };
    if measured.len() < 3 * usize::try_from(FOLDS).expect("eight") {
        return left_out;
    }
    for out in 0..FOLDS {
        let of_fold = |&i: &usize| fold(i, measured[i]) == out;
        let (test, train): (Vec<usize>, Vec<usize>) = (0..measured.len()).partition(of_fold);
        let predicted = predict(&train);
        let known = { train.iter() }.filter_map(|&i| Some((measured[i].key?, measured[i].us, predicted[i])));
        let known = known.filter(|row| row.2.is_finite());
        let smoother = Smoother::new(known, block);
        for row in test {
            let factor = measured[row]
                .key
                .map_or(1.0, |key| smoother.factor(&key, &key.path(block)));
            left_out.bare[row] = predicted[row];
            left_out.beside[row] = factor * predicted[row];
        }
    }
    left_out
}

fn fit_system(
    measured: &[&Measured],
    block: Block,
    noise_floor: f64,
    read_us: Option<f64>,
) -> (Vec<PathFit>, Vec<Judged>) {
    let system = System::new(measured, block, read_us);
    let found = system.solve(&(0..measured.len()).collect::<Vec<_>>());
    let mut others: Vec<Vec<f64>> = Vec::new();
    let left_out = left_out(measured, block, |train| {
        let without = system.solve(train);
        let predicted = (0..measured.len()).map(|row| system.predict(row, &without)).collect();
        others.push(without);
        predicted
    });
    let ranges = ranges(measured, block);
    let mut paths: BTreeMap<Path, Vec<Coefficient>> = BTreeMap::new();
    for (at, (&(path, term), &us_per_unit)) in system.columns.iter().zip(&found).enumerate() {
        let without: Vec<f64> = others.iter().map(|other| other[at]).collect();
        let (min, max) = ranges.get(&(path, term)).copied().unwrap_or((0.0, 0.0));
        paths.entry(path).or_default().push(Coefficient {
            term,
            us_per_unit,
            min,
            max,
            spread_us: jackknife(&without),
        });
    }
    let fits = paths
        .into_iter()
        .map(|(path, coefficients)| untested(path, coefficients, None));
    tested(fits.collect(), measured, &left_out, block, noise_floor)
}

/// Several threads, from what one thread takes.
fn fit_teams(
    measured: &[&Measured],
    one: &BTreeMap<Family, PathFit>,
    threads: u32,
    block: Block,
    noise_floor: f64,
) -> (Vec<PathFit>, Vec<Judged>) {
    let weights: Vec<f64> = measured.iter().map(|m| weight(m)).collect();
    let teams = Teams::new(measured, &weights, one, threads, block);
    let found = teams.fit(&(0..measured.len()).collect::<Vec<_>>());
    let left_out = left_out(measured, block, |train| {
        let without = teams.fit(train);
        (0..measured.len())
            .map(|row| teams.predict(row, &without).unwrap_or(f64::NAN))
            .collect()
    });
    let fits = one.values().map(|fit| {
        let path = Path {
            family: fit.path.family,
            threads,
        };
        untested(path, fit.coefficients.clone(), Some(found[&path.family]))
    });
    tested(fits.collect(), measured, &left_out, block, noise_floor)
}

fn untested(path: Path, coefficients: Vec<Coefficient>, team: Option<Team>) -> PathFit {
    PathFit {
        path,
        coefficients,
        rows: 0,
        cv_mape_pct: 0.0,
        spread_ln: UNTESTED_LN,
        team,
        overlap: None,
    }
}

/// Rows, errors and spreads of fits, from what was left out of them; and the networks among that.
fn tested(
    fits: Vec<PathFit>,
    measured: &[&Measured],
    left_out: &LeftOut,
    block: Block,
    noise_floor: f64,
) -> (Vec<PathFit>, Vec<Judged>) {
    let error = |row: usize, predicted: &[f64]| (measured[row].us / predicted[row].max(1e-9)).ln().abs();
    let mut places: BTreeMap<Path, Vec<(u64, Place)>> = BTreeMap::new();
    // What several threads make of a time is no matter of places.
    let is_placed = |path: &Path| !fits.iter().any(|fit| fit.path == *path && fit.team.is_some());
    for (index, row) in measured.iter().enumerate() {
        if let Some((key, place)) = row.key.and_then(|key| Some((key, smooth::place(&key)?))) {
            let path = key.path(block);
            if is_placed(&path) {
                places.entry(path).or_default().push((fold(index, row), place));
            }
        }
    }
    // How far a key lies from what was measured, as its own prediction was made: without its fold.
    let doubt = |key: &Key, without: Option<u64>| match (smooth::place(key), places.get(&key.path(block))) {
        (Some(at), Some(rows)) => {
            let others = rows.iter().filter(|row| Some(row.0) != without).map(|row| &row.1);
            smooth::doubt(smooth::nearest(&at, others))
        }
        _ => 1.0,
    };
    // Errors, and errors as they would be beside a measured key.
    let mut by_path: BTreeMap<Path, Vec<(f64, f64)>> = BTreeMap::new();
    let mut rows_of: BTreeMap<Path, usize> = BTreeMap::new();
    for (row, m) in measured.iter().enumerate() {
        let Some(key) = m.key else { continue };
        let path = key.path(block);
        *rows_of.entry(path).or_default() += 1;
        if left_out.beside[row].is_finite() {
            let error = error(row, &left_out.beside);
            let near = error / doubt(&key, Some(fold(row, m)));
            by_path.entry(path).or_default().push((error, near));
        }
    }
    let near = |errors: &[(f64, f64)]| -> Vec<f64> { errors.iter().map(|e| e.1).collect() };
    let errors: Vec<f64> = by_path.values().flat_map(|errors| near(errors)).collect();
    let typical = if errors.len() < 20 {
        UNTESTED_LN
    } else {
        quantile(&errors, 0.9)
    };
    let test = |fit: PathFit| {
        let own = by_path.get(&fit.path).map_or(&[][..], Vec::as_slice);
        #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
        let (count, mape) = (own.len() as f64, own.iter().map(|e| 1.0 - (-e.0).exp()).sum::<f64>());
        // A decile of few is no decile: what all paths say counts like ten rows of this one.
        let decile = if own.is_empty() {
            typical
        } else {
            quantile(&near(own), 0.9)
        };
        let spread = (count * decile + 10.0 * typical) / (count + 10.0);
        PathFit {
            rows: rows_of.get(&fit.path).copied().unwrap_or(0),
            cv_mape_pct: 100.0 * mape / count.max(1.0),
            spread_ln: spread.max(noise_floor),
            ..fit
        }
    };
    let fits: Vec<PathFit> = fits.into_iter().map(test).filter(|fit| !says_nothing(fit)).collect();
    let of_path: BTreeMap<Path, &PathFit> = fits.iter().map(|fit| (fit.path, fit)).collect();
    let judge = |(row, m): (usize, &&Measured)| {
        let parts = m.parts.iter().filter_map(|(key, times)| {
            let features = key.features(block);
            let fit = of_path.get(&features.path)?;
            Some((
                features.path,
                times * fit.us(&features),
                fit.spread_ln * doubt(key, None),
            ))
        });
        (m.key.is_none() && left_out.bare[row].is_finite()).then(|| Judged {
            error_ln: error(row, &left_out.bare),
            errors: Errors::sum(parts),
        })
    };
    let judged = measured.iter().enumerate().filter_map(judge).collect();
    (fits, judged)
}

/// A path whose arithmetic came out free: its rows could not tell it from the others. No answer is better than 0 ms: what
/// stands in for it is said.
fn says_nothing(fit: &PathFit) -> bool {
    let mut arithmetic = fit
        .coefficients
        .iter()
        .filter(|c| c.term.group() == TermGroup::Compute)
        .peekable();
    arithmetic.peek().is_some() && fit.coefficients.iter().all(|c| c.us_per_unit == 0.0)
}

/// Smallest and largest count of one operator, by column.
fn ranges(measured: &[&Measured], block: Block) -> BTreeMap<Column, (f64, f64)> {
    let mut ranges: BTreeMap<Column, (f64, f64)> = BTreeMap::new();
    for (key, _) in measured.iter().flat_map(|m| &m.parts) {
        let features = key.features(block);
        for &(term, count) in features.terms().iter().filter(|t| t.1 > 0.0) {
            let range = ranges.entry((features.path, term)).or_insert((count, count));
            *range = (range.0.min(count), range.1.max(count));
        }
    }
    ranges
}

#[cfg(test)]
mod tests;
