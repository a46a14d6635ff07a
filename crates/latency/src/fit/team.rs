//! How several threads share one operator: `t_N = call + share·w + min((1 − share)·w, late)`, `w` the time of one thread
//! (reference 1: serial + parallel / (N·e) + sync). The caller works alone until the others have woken: a small operator is
//! over by then and only loses the call. Law: never faster than an equal split, and grows with `w`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::PathFit;
use super::joint::Measured;
use crate::work::{Block, Family, Key};

/// What a number of threads makes of the time of one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Team {
    /// Handing out the work and waiting at its end, whatever its size.
    pub call_us: f64,
    /// The busiest thread's share of the work: 1 / N where it splits evenly, 1 where it does not split.
    pub share: f64,
    /// Until the others have woken.
    pub late_us: f64,
}

impl Team {
    /// Time of what takes one thread `alone_us`.
    pub fn us(&self, alone_us: f64) -> f64 {
        let rest = (1.0 - self.share) * alone_us;
        self.call_us + self.share * alone_us + rest.min(self.late_us)
    }

    /// What is wrong with numbers from a file, if anything.
    pub(crate) fn complaint(&self) -> Option<String> {
        let all = [self.call_us, self.share, self.late_us];
        let wrong = all.into_iter().find(|x| !(x.is_finite() && *x >= 0.0));
        wrong.map(|x| format!("team: found {x}, expected numbers of 0 or more"))
    }

    /// Distance from another one, in units in which 1 is much.
    fn apart(&self, other: &Self) -> f64 {
        let square = |x: f64| x * x;
        square((self.share - other.share) / 0.15)
            + square((self.late_us - other.late_us) / (0.5 * other.late_us + 5.0))
            + square((self.call_us - other.call_us) / (other.call_us + 0.5))
    }
}

/// A row with the one-thread times of its parts, by the place of their family.
struct Row {
    us: f64,
    weight: f64,
    /// Family, µs of one thread, how often.
    parts: Vec<(usize, f64, f64)>,
}

/// Rows of several threads beside the fits of one.
pub(super) struct Teams {
    families: Vec<Family>,
    threads: u32,
    /// `None`: a row with a part that one thread was never timed with.
    rows: Vec<Option<Row>>,
}

/// Relative errors beyond this count by their size, not their square.
const BEND: f64 = 0.15;
/// How much being unlike the other paths counts, in squared relative errors of whole networks.
const ALIKE: f64 = 0.01;
/// What is taken for a machine that nothing is known of, and how little that counts.
const USUAL_LATE_US: f64 = 15.0;
const USUAL_CALL_US: f64 = 1.0;
const HARDLY: f64 = 1e-4;
/// Tried values.
const LATE_US: [f64; 11] = [0.0, 2.0, 5.0, 8.0, 12.0, 16.0, 20.0, 25.0, 32.0, 45.0, 60.0];
const CALL_US: [f64; 9] = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0];
/// Of the way from an even split to none.
const UNEVEN: [f64; 10] = [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0];

impl Teams {
    /// `weights`: how much each row counts. `one`: the fits of one thread.
    pub(super) fn new(
        measured: &[&Measured],
        weights: &[f64],
        one: &BTreeMap<Family, PathFit>,
        threads: u32,
        block: Block,
    ) -> Self {
        let families: Vec<Family> = one.keys().copied().collect();
        let part = |key: &Key, times: f64| {
            let features = key.features(block);
            let at = families.binary_search(&features.path.family).ok()?;
            Some((at, one[&families[at]].us(&features), times))
        };
        let row = |(m, weight): (&&Measured, &f64)| {
            let parts = m.parts.iter().map(|(key, times)| part(key, *times));
            Some(Row {
                us: m.us,
                weight: *weight,
                parts: parts.collect::<Option<Vec<_>>>()?,
            })
        };
        let rows = measured.iter().zip(weights).map(row).collect();
        Self {
            families,
            threads,
            rows,
        }
    }

    /// The time of a row; `None` where it holds what nothing is known of.
    pub(super) fn predict(&self, row: usize, teams: &BTreeMap<Family, Team>) -> Option<f64> {
        let of = |&(at, alone_us, times): &(usize, f64, f64)| times * teams[&self.families[at]].us(alone_us);
        Some(self.rows[row].as_ref()?.parts.iter().map(of).sum())
    }

    /// One team for all paths first, then one a path that stays near it as far as its rows do not say otherwise.
    pub(super) fn fit(&self, chosen: &[usize]) -> BTreeMap<Family, Team> {
        let rows: Vec<&Row> = chosen.iter().filter_map(|&row| self.rows[row].as_ref()).collect();
        let common = self.common(&rows);
        let mut teams = vec![common; self.families.len()];
        let mut predicted: Vec<f64> = rows
            .iter()
            .map(|row| row.parts.iter().map(|p| p.2 * common.us(p.1)).sum())
            .collect();
        let mut of_family: Vec<Vec<usize>> = vec![Vec::new(); self.families.len()];
        for (index, row) in rows.iter().enumerate() {
            for part in &row.parts {
                if of_family[part.0].last() != Some(&index) {
                    of_family[part.0].push(index);
                }
            }
        }
        for _ in 0..2 {
            for (at, touched) in of_family.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
                let own = |row: &Row, team: &Team| -> f64 {
                    let parts = row.parts.iter().filter(|p| p.0 == at);
                    parts.map(|p| p.2 * team.us(p.1)).sum()
                };
                let rest: Vec<f64> = { touched.iter() }
                    .map(|&i| predicted[i] - own(rows[i], &teams[at]))
                    .collect();
                let loss = |team: &Team| -> f64 {
                    let rows = touched.iter().zip(&rest).map(|(&i, rest)| {
                        let row = rows[i];
                        row.weight * row.weight * bent((rest + own(row, team)) / row.us - 1.0)
                    });
                    rows.sum::<f64>() + ALIKE * team.apart(&common)
                };
                teams[at] = best(self.threads, loss);
                for (&i, rest) in touched.iter().zip(&rest) {
                    predicted[i] = rest + own(rows[i], &teams[at]);
                }
            }
        }
        self.families.iter().copied().zip(teams).collect()
    }

    fn common(&self, rows: &[&Row]) -> Team {
        common(self.threads, |team| {
            let rows = rows.iter().map(|row| {
                let us: f64 = row.parts.iter().map(|p| p.2 * team.us(p.1)).sum();
                row.weight * row.weight * bent(us / row.us - 1.0)
            });
            rows.sum()
        })
    }
}

/// The tried team of least loss, `loss` in squared relative errors; what nothing is known of is as usual.
pub(crate) fn common(threads: u32, loss: impl Fn(&Team) -> f64) -> Team {
    let usual = Team {
        call_us: USUAL_CALL_US,
        share: 1.0 / f64::from(threads),
        late_us: USUAL_LATE_US,
    };
    best(threads, |team| loss(team) + HARDLY * team.apart(&usual))
}

/// The tried team of least loss, the earliest of equals.
fn best(threads: u32, loss: impl Fn(&Team) -> f64) -> Team {
    let even = 1.0 / f64::from(threads);
    let shares = UNEVEN.iter().map(|x| even + (1.0 - even) * x);
    let all = shares.flat_map(|share| {
        LATE_US.iter().flat_map(move |&late_us| {
            CALL_US.iter().map(move |&call_us| Team {
                call_us,
                share,
                late_us,
            })
        })
    });
    let scored = all.map(|team| (loss(&team), team));
    scored.min_by(|a, b| a.0.total_cmp(&b.0)).expect("a grid").1
}

/// Huber's loss of a relative error.
pub(crate) fn bent(error: f64) -> f64 {
    let size = error.abs();
    if size < BEND {
        size * size
    } else {
        2.0 * BEND * size - BEND * BEND
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::{Coefficient, PathFit};
    use crate::graph::Numerics;
    use crate::work::{Context, ConvKey, LinearKey, Path, Term};

    const BLOCK: Block = Block(16);

    #[test]
    fn a_team_is_no_faster_than_an_equal_split_and_grows_with_the_work() {
        let team = Team {
            call_us: 1.0,
            share: 0.5,
            late_us: 20.0,
        };
        // Over before anybody woke; an even split behind the wait.
        assert_eq!(team.us(10.0), 11.0);
        assert_eq!(team.us(1000.0), 521.0);
        let times: Vec<f64> = (0..100).map(|i| team.us(f64::from(i))).collect();
        assert!(times.is_sorted() && times.iter().zip(0..).all(|(t, i)| *t >= f64::from(i) / 2.0));
    }

    #[test]
    fn what_rows_say_of_a_team_is_found_again() {
        let conv = |cin: u32, height: u32| {
            Key::Conv(ConvKey {
                batch: 1,
                cin,
                cout: 32,
                kernel: 3,
                stride: 1,
                groups: 1,
                height,
                width: height,
                numerics: Numerics::Int8,
                threads: 2,
                context: Context::Chain,
            })
        };
        let linear = |inputs: u32| {
            Key::Linear(LinearKey {
                batch: 1,
                inputs,
                outputs: 100,
                numerics: Numerics::F32,
                threads: 2,
            })
        };
        let one = |key: Key, term: Term, us_per_unit: f64| {
            let family = key.path(BLOCK).family;
            let of = |term, us_per_unit| Coefficient {
                term,
                us_per_unit,
                spread_us: None,
                min: 0.0,
                max: 1e6,
            };
            let fit = PathFit {
                path: Path { family, threads: 1 },
                coefficients: vec![of(Term::Call, 1.0), of(term, us_per_unit)],
                rows: 9,
                cv_mape_pct: 1.0,
                spread_ln: 0.1,
                team: None,
                overlap: None,
            };
            (family, fit)
        };
        let one: BTreeMap<Family, PathFit> = [
            one(conv(16, 8), Term::MegaMacs, 20.0),
            one(linear(64), Term::MegaMacsPointwise, 50.0),
        ]
        .into();
        // Convolutions split, linear layers do not.
        let truth = |key: &Key| {
            let features = key.features(BLOCK);
            let alone_us = one[&features.path.family].us(&features);
            let team = match key {
                Key::Conv(_) => Team {
                    call_us: 1.0,
                    share: 0.5,
                    late_us: 12.0,
                },
                _ => Team {
                    call_us: 0.5,
                    share: 1.0,
                    late_us: 0.0,
                },
            };
            team.us(alone_us)
        };
        let sizes = [4, 6, 8, 12, 16, 24, 32];
        let convs = sizes.iter().flat_map(|&h| [16, 32, 64, 128].map(|c| conv(c, h)));
        let keys: Vec<Key> = convs.chain([64, 256, 1024, 4096].map(linear)).collect();
        let rows: Vec<Measured> = keys
            .iter()
            .map(|&key| {
                Measured::operator(&crate::fit::Sample {
                    key,
                    us: truth(&key),
                    relative_spread: 0.01,
                })
            })
            .collect();
        let rows: Vec<&Measured> = rows.iter().collect();
        let teams = Teams::new(&rows, &vec![1.0; rows.len()], &one, 2, BLOCK);
        let found = teams.fit(&(0..rows.len()).collect::<Vec<_>>());
        for (at, row) in rows.iter().enumerate() {
            let predicted = teams.predict(at, &found).unwrap();
            assert!(
                (predicted / row.us - 1.0).abs() < 0.05,
                "{:?} {predicted} {}",
                row.key,
                row.us
            );
        }
        // A path without a row is taken for what the others are.
        let few = teams.fit(&(0..8).collect::<Vec<_>>());
        assert_eq!(few.len(), 2);
    }
}
