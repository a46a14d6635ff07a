//! What measured neighbours say about a fitted operator: the mean log ratio of time to fit over the nearest table rows of its
//! kernel path, weighted by distance and drawn towards none where there are no neighbours (reference 2.7, tier 2). Exempt
//! from monotonicity: real staircases are real. Law: far from all rows it is nothing, beside a row it is nearly that row's.

use std::collections::HashMap;

use crate::fit::PathFit;
use crate::work::{Block, Key, Path};

/// Log ratios by path, with the places where they were measured.
#[derive(Debug, Clone, Default)]
pub(crate) struct Smoother {
    rows: HashMap<Path, Vec<(Place, f64)>>,
}

/// ln of the sizes of an operator, as far apart as they matter.
type Place = [f64; 6];

/// Two rows this far apart (in units of [`Place`]) share little.
const PER_UNIT: f64 = 2.5;
/// Weight of "no correction".
const DOUBT: f64 = 0.5;
/// A ratio beyond this is a bad row rather than a neighbour's lesson.
const MOST_LN: f64 = 0.5;
/// Neighbours beyond this many standard widths weigh next to nothing.
const FAR: f64 = 3.0;

impl Smoother {
    /// From table rows `(key, µs)` and the fits of their paths.
    pub(crate) fn new<'a>(
        rows: impl Iterator<Item = (&'a Key, f64)>,
        fit: impl Fn(&Path) -> Option<&'a PathFit>,
        block: Block,
    ) -> Self {
        let mut by_path: HashMap<Path, Vec<(Place, f64)>> = HashMap::new();
        for (key, us) in rows {
            let Some(place) = place(key) else { continue };
            let features = key.features(block);
            let predicted = fit(&features.path).map_or(0.0, |fit| fit.us(&features));
            if us > 0.0 && predicted > 0.0 {
                let ratio = (us / predicted).ln().clamp(-MOST_LN, MOST_LN);
                by_path.entry(features.path).or_default().push((place, ratio));
            }
        }
        // The order of a hash map must not reach a sum.
        for rows in by_path.values_mut() {
            rows.sort_by(|a, b| {
                let places = a.0.iter().zip(&b.0).map(|(x, y)| x.total_cmp(y));
                places.fold(std::cmp::Ordering::Equal, std::cmp::Ordering::then)
            });
        }
        Self { rows: by_path }
    }

    /// What to multiply a fitted time by.
    pub(crate) fn factor(&self, key: &Key, path: &Path) -> f64 {
        let (Some(rows), Some(at)) = (self.rows.get(path), place(key)) else {
            return 1.0;
        };
        let (mut weights, mut sum) = (DOUBT, 0.0);
        for (place, ratio) in rows {
            let square: f64 = place.iter().zip(&at).map(|(x, y)| (x - y) * (x - y)).sum();
            let far = PER_UNIT * PER_UNIT * square;
            if far < FAR * FAR {
                let weight = (-far / 2.0).exp();
                weights += weight;
                sum += weight * ratio;
            }
        }
        (sum / weights).exp()
    }

    #[cfg(test)]
    pub(crate) fn clear(&mut self) {
        self.rows.clear();
    }
}

/// Where an operator lies; `None` for those whose times are counts of bytes and nothing else.
fn place(key: &Key) -> Option<Place> {
    let ln = |size: u32| f64::from(size.max(1)).ln();
    match key {
        Key::Conv(c) => Some([
            ln(c.cin),
            ln(c.cout),
            2.0 * ln(c.kernel),
            ln(c.height),
            ln(c.batch),
            2.0 * ln(c.stride),
        ]),
        Key::Linear(l) => Some([ln(l.inputs), ln(l.outputs), 0.0, 0.0, ln(l.batch), 0.0]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::Coefficient;
    use crate::graph::Numerics;
    use crate::work::{LinearKey, Term};

    fn linear(inputs: u32, outputs: u32) -> Key {
        Key::Linear(LinearKey {
            batch: 1,
            inputs,
            outputs,
            numerics: Numerics::F32,
            threads: 1,
        })
    }

    #[test]
    fn neighbours_teach_and_strangers_do_not() {
        let path = linear(1, 1).path(Block(16));
        let call = Coefficient {
            term: Term::Call,
            us_per_unit: 10.0,
            min: 1.0,
            max: 1.0,
        };
        let fit = PathFit {
            path,
            coefficients: vec![call],
            rows: 2,
            cv_mape_pct: 0.0,
            spread_ln: 0.1,
        };
        // Small layers take a fifth longer than the fit, one wild row is far beyond belief.
        let rows = [(linear(64, 10), 12.0), (linear(72, 10), 12.0), (linear(4096, 10), 1e6)];
        let smoother = Smoother::new(rows.iter().map(|(key, us)| (key, *us)), |_| Some(&fit), Block(16));
        let near = smoother.factor(&linear(68, 10), &path);
        assert!(near > 1.1 && near < 1.2, "{near}");
        assert!((smoother.factor(&linear(700, 10), &path) - 1.0).abs() < 0.01);
        assert!(smoother.factor(&linear(4096, 10), &path) < MOST_LN.exp());
        assert_eq!(smoother.factor(&Key::Session { threads: 1 }, &path), 1.0);
    }
}
