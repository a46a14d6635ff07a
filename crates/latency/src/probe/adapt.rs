//! Which keys to measure next: those that use draws, where the fit is worst, far from what is known, cheap to measure
//! (reference section 4). Error is taken from the residuals of the nearest measured keys rather than from bootstrap fits: a
//! term that is missing shows in residuals, and not in how much refits differ. Pure.

use std::collections::{BTreeMap, HashMap};

use crate::fit::PathFit;
use crate::profile::Row;
use crate::work::{Block, Features, Key, Path};

/// Neighbours whose residuals count.
const NEIGHBOURS: usize = 4;
/// Closer than this in ln of a term's count, two keys of a round say the same.
const APART_LN: f64 = 0.15;
/// What measuring a key takes beside its calls, in µs of a call: building sessions, or filling memory with weights that are
/// to be cold.
fn fixed_us(key: &Key) -> f64 {
    match key {
        Key::Expert(_) | Key::Dense(_) | Key::Attention(_) | Key::Glue(_) | Key::Read(_) => 1500.0,
        _ => 200.0,
    }
}

/// At most `count` of `wishes`, best first: expected error over the cost of measuring.
pub fn best(wishes: &[Key], rows: &[Row], fits: &[PathFit], block: Block, count: usize) -> Vec<Key> {
    let fits: HashMap<Path, &PathFit> = fits.iter().map(|f| (f.path, f)).collect();
    let mut known: HashMap<Path, Vec<(Features, f64)>> = HashMap::new();
    for row in rows {
        let features = row.key.features(block);
        let Some(fit) = fits.get(&features.path) else { continue };
        let residual = (row.median_us.max(1e-3) / fit.us(&features).max(1e-3)).ln().abs();
        known.entry(features.path).or_default().push((features, residual));
    }
    let score = |key: &Key| {
        let features = key.features(block);
        let fit = fits.get(&features.path);
        let near = known.get(&features.path).map(|rows| nearest(&features, rows));
        // A path without a row: nothing is known, and nothing is worse.
        let (error, us) = match (fit, near) {
            (Some(fit), Some((distance, residual))) => (
                residual + fit.cv_mape_pct / 100.0 * distance.min(1.0),
                fit.us(&features),
            ),
            _ => (1.0, fixed_us(key)),
        };
        error / (fixed_us(key) + us)
    };
    let mut scored: Vec<(f64, Key)> = wishes.iter().map(|key| (score(key), *key)).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut chosen: Vec<(Features, Key)> = Vec::new();
    for (_, key) in scored {
        let features = key.features(block);
        let is_new = chosen
            .iter()
            .all(|(other, _)| other.path != features.path || distance(other, &features) > APART_LN);
        if is_new {
            chosen.push((features, key));
        }
        if chosen.len() == count {
            break;
        }
    }
    chosen.into_iter().map(|(_, key)| key).collect()
}

/// More keys than this and a path is not thin.
const THICK: usize = 80;

/// At most `count` of `wishes`, of the paths that rest on the fewest keys, none beside a known one.
pub fn thinnest(wishes: &[Key], rows: &[Row], block: Block, count: usize) -> Vec<Key> {
    let mut known: HashMap<Path, Vec<Features>> = HashMap::new();
    for row in rows {
        let features = row.key.features(block);
        known.entry(features.path).or_default().push(features);
    }
    let mut left: BTreeMap<String, Vec<(Features, Key)>> = BTreeMap::new();
    for key in wishes.iter().rev() {
        let features = key.features(block);
        left.entry(features.path.to_string())
            .or_default()
            .push((features, *key));
    }
    let mut chosen = Vec::new();
    while chosen.len() < count {
        let size = |wishes: &[(Features, Key)]| {
            let path = wishes.first().map(|(features, _)| features.path);
            path.and_then(|path| known.get(&path)).map_or(0, Vec::len)
        };
        // In order of names where they are equal: the same choice every time.
        let thinnest = left
            .iter_mut()
            .min_by_key(|(_, wishes)| size(wishes))
            .filter(|(_, wishes)| size(wishes) < THICK);
        let Some((name, wishes)) = thinnest else { break };
        let Some((features, key)) = wishes.pop() else {
            let name = name.clone();
            left.remove(&name);
            continue;
        };
        let of_path = known.entry(features.path).or_default();
        if of_path.iter().all(|other| distance(other, &features) > APART_LN) {
            of_path.push(features);
            chosen.push(key);
        }
    }
    chosen
}

/// Distance to the nearest row, and the mean residual of a few near ones.
fn nearest(features: &Features, rows: &[(Features, f64)]) -> (f64, f64) {
    let mut near: Vec<(f64, f64)> = rows.iter().map(|(f, r)| (distance(f, features), *r)).collect();
    near.sort_by(|a, b| a.0.total_cmp(&b.0));
    near.truncate(NEIGHBOURS);
    #[expect(clippy::cast_precision_loss, reason = "a handful")]
    let mean = near.iter().map(|n| n.1).sum::<f64>() / near.len().max(1) as f64;
    (near.first().map_or(1.0, |n| n.0), mean)
}

/// Largest difference of ln of a count, over all terms.
fn distance(a: &Features, b: &Features) -> f64 {
    let of = |x: f64| x.max(1e-6).ln();
    let pairs = a.terms().iter().zip(b.terms());
    pairs.map(|(x, y)| (of(x.1) - of(y.1)).abs()).fold(0.0, f64::max)
}

const ROUNDS: u32 = 8;

/// When adding keys stops helping: some rounds without 3 % less error on shapes left out. Rounds aim at what is worst, so
/// that their own keys raise this error at first.
#[derive(Debug, Clone, Default)]
pub struct Stopping {
    best: Option<f64>,
    rounds: u32,
}

impl Stopping {
    /// Takes in the fits after a round.
    pub fn is_over(&mut self, fits: &[PathFit]) -> bool {
        let rows: usize = fits.iter().map(|f| f.rows).sum();
        #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
        let error = fits.iter().map(|f| f.cv_mape_pct * f.rows as f64).sum::<f64>() / rows.max(1) as f64;
        match self.best {
            Some(best) if error > 0.97 * best => self.rounds += 1,
            _ => (self.best, self.rounds) = (Some(error), 0),
        }
        self.rounds >= ROUNDS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::{Sample, fit};
    use crate::graph::Numerics;
    use crate::work::LinearKey;

    fn key(inputs: u32, outputs: u32) -> Key {
        Key::Linear(LinearKey {
            batch: 1,
            inputs,
            outputs,
            numerics: Numerics::F32,
            threads: 1,
        })
    }

    /// Law: what is chosen lies where the fit is wrong, not beside what it predicts well, and never twice at one place.
    #[test]
    fn the_worst_place_is_chosen_first() {
        let block = Block(16);
        // Linear everywhere but around 300 inputs, where it takes three times as long.
        let us = |i: u32, o: u32| f64::from(i * o) / 1000.0 * if (250..400).contains(&i) { 3.0 } else { 1.0 };
        let shapes = [16, 32, 64, 128, 300, 700]
            .into_iter()
            .flat_map(|i| [64, 128, 256].map(|o| (i, o)));
        let rows: Vec<Row> = shapes
            .map(|(i, o)| Row {
                key: key(i, o),
                sessions: 1,
                count: 5,
                median_us: us(i, o),
                q10_us: us(i, o),
                mad_us: 0.0,
                taken: crate::profile::Taken::default(),
            })
            .collect();
        let samples: Vec<Sample> = rows.iter().map(Row::sample).collect();
        let fits = fit(&samples, block, 0.01);
        let wishes = [key(18, 70), key(320, 150), key(321, 150), key(20, 80)];
        let chosen = best(&wishes, &rows, &fits, block, 3);
        assert!(chosen[0] == key(320, 150) || chosen[0] == key(321, 150), "{:?}", chosen);
        let at_300 = chosen
            .iter()
            .filter(|k| matches!(k, Key::Linear(l) if l.inputs > 300))
            .count();
        assert_eq!(at_300, 1);
        // The path that has fewer keys comes first, and no two keys of one place.
        let threaded = |key: Key, threads| match key {
            Key::Linear(l) => Key::Linear(LinearKey { threads, ..l }),
            other => other,
        };
        let wishes: Vec<Key> = wishes.iter().flat_map(|k| [*k, threaded(*k, 2)]).collect();
        let thin = thinnest(&wishes, &rows, block, 2);
        assert_eq!(thin.len(), 2);
        assert!(
            thin.iter().all(|k| matches!(k, Key::Linear(l) if l.threads == 2)),
            "{thin:?}"
        );
        let all = thinnest(&wishes, &rows, block, 100);
        assert!(
            all.contains(&threaded(key(320, 150), 2)) != all.contains(&threaded(key(321, 150), 2)),
            "{all:?}"
        );
        let mut stopping = Stopping::default();
        let over = (0..=ROUNDS)
            .map(|_| stopping.is_over(&fits))
            .filter(|over| *over)
            .count();
        assert_eq!(over, 1);
    }
}
