//! What measured neighbours say about a fitted operator: the mean log ratio of time to fit over the nearest table rows of its
//! kernel path, weighted by distance and drawn towards none where there are no neighbours (reference 2.7, tier 2). Exempt
//! from monotonicity: real staircases are real. Law: far from all rows it is nothing, beside a row it is nearly that row's.

use std::collections::HashMap;

use crate::work::{Block, Key, Path};

/// Log ratios by path, with the places where they were measured.
#[derive(Debug, Clone, Default)]
pub(crate) struct Smoother {
    rows: HashMap<Path, Vec<(Place, f64)>>,
}

/// ln of the sizes of an operator, as far apart as they matter.
pub(crate) type Place = [f64; 6];

/// Two rows this far apart (in units of [`Place`]) share little.
const PER_UNIT: f64 = 2.5;
/// Weight of "no correction".
const DOUBT: f64 = 0.5;
/// A ratio beyond this is a bad row rather than a neighbour's lesson.
const MOST_LN: f64 = 0.5;
/// Neighbours beyond this many standard widths weigh next to nothing.
const FAR: f64 = 3.0;

impl Smoother {
    /// From table rows `(key, µs, what its fit says)`.
    pub(crate) fn new(rows: impl Iterator<Item = (Key, f64, f64)>, block: Block) -> Self {
        let mut by_path: HashMap<Path, Vec<(Place, f64)>> = HashMap::new();
        for (key, us, predicted_us) in rows {
            let Some(place) = place(&key) else { continue };
            if us > 0.0 && predicted_us > 0.0 {
                let ratio = (us / predicted_us).ln().clamp(-MOST_LN, MOST_LN);
                by_path.entry(key.path(block)).or_default().push((place, ratio));
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
            let far = (PER_UNIT * apart(place, &at)).powi(2);
            if far < FAR * FAR {
                let weight = (-far / 2.0).exp();
                weights += weight;
                sum += weight * ratio;
            }
        }
        (sum / weights).exp()
    }

    /// How much less sure a fit is here than beside a measured key of its path: 1 beside one.
    pub(crate) fn doubt(&self, key: &Key, path: &Path) -> f64 {
        let (Some(rows), Some(at)) = (self.rows.get(path), place(key)) else {
            return 1.0;
        };
        doubt(nearest(&at, rows.iter().map(|row| &row.0)))
    }

    #[cfg(test)]
    pub(crate) fn clear(&mut self) {
        self.rows.clear();
    }
}

/// Distance to the nearest of some places; infinite where there are none.
pub(crate) fn nearest<'a>(at: &Place, places: impl Iterator<Item = &'a Place>) -> f64 {
    places.map(|place| apart(place, at)).fold(f64::INFINITY, f64::min)
}

fn apart(a: &Place, b: &Place) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum::<f64>().sqrt()
}

/// How errors grow with the distance to what was measured. Left out of 1,277 rows, nine in ten errors were below 2.5 medians
/// of their path up to a distance of 0.7, 3.7 at 1.25, 5.9 at 2: as this root does.
pub(crate) fn doubt(distance: f64) -> f64 {
    1.0f64.hypot(distance.min(MOST_DISTANCE))
}

/// Beyond this, features out of range say it better.
const MOST_DISTANCE: f64 = 4.0;

/// Where an operator lies; `None` for those whose times are counts of bytes and nothing else.
pub(crate) fn place(key: &Key) -> Option<Place> {
    let ln = |size: u32| f64::from(size.max(1)).ln();
    let plane = |channels, height, batch| [ln(channels), 0.0, 0.0, ln(height), ln(batch), 0.0];
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
        Key::Add(p) | Key::GlobalAvgPool(p) => Some(plane(p.channels, p.height, p.batch)),
        Key::Edge(e) => Some(plane(e.channels, e.height, e.batch)),
        Key::Elementwise(e) => Some(plane(e.channels, e.height, e.batch)),
        Key::Pool(p) => {
            let [channels, _, _, height, batch, _] = plane(p.channels, p.height, p.batch);
            Some([channels, 0.0, 2.0 * ln(p.kernel), height, batch, 2.0 * ln(p.stride)])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::{Coefficient, PathFit};
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
            spread_us: None,
            min: 1.0,
            max: 1.0,
        };
        let fit = PathFit {
            path,
            coefficients: vec![call],
            rows: 2,
            cv_mape_pct: 0.0,
            spread_ln: 0.1,
            team: None,
            overlap: None,
        };
        // Small layers take a fifth longer than the fit, one wild row is far beyond belief.
        let rows = [(linear(64, 10), 12.0), (linear(72, 10), 12.0), (linear(4096, 10), 1e6)];
        let says = |key: &Key| fit.us(&key.features(Block(16)));
        let smoother = Smoother::new(rows.iter().map(|(key, us)| (*key, *us, says(key))), Block(16));
        let near = smoother.factor(&linear(68, 10), &path);
        assert!(near > 1.1 && near < 1.2, "{near}");
        assert!((smoother.factor(&linear(700, 10), &path) - 1.0).abs() < 0.01);
        assert!(smoother.factor(&linear(4096, 10), &path) < MOST_LN.exp());
        assert_eq!(smoother.factor(&Key::Session { threads: 1 }, &path), 1.0);
        // And beside a neighbour a prediction is surer.
        assert_eq!(smoother.doubt(&linear(64, 10), &path), 1.0);
        assert!(smoother.doubt(&linear(128, 10), &path) < smoother.doubt(&linear(700, 10), &path));
    }
}
