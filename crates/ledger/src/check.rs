//! Baseline against ledger: one verdict per guarded fact. Pure. Law: a fact that this commit has not recorded is
//! `missing`, never passed over; a timing is judged as a ratio to what was timed in the same run, beyond its own noise.

use crate::baseline::{Baseline, BaselineRow, Better, Kind, MeasuredGate, Tolerance};
use crate::{Error, Ledger, Result, Row};

/// Whether `measured` rows are gated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timings {
    Ignored,
    Gated,
}

/// The verdict on one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Within the tolerance.
    Ok,
    /// Better by more than the tolerance: time to commit a new baseline.
    Better,
    /// Worse by more than the tolerance.
    Regression,
    /// No row of this commit.
    Missing,
}

impl Status {
    /// As `--json` writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Better => "better",
            Self::Regression => "regression",
            Self::Missing => "missing",
        }
    }

    /// Whether `check` may exit 0 with it.
    pub fn passes(self) -> bool {
        matches!(self, Self::Ok | Self::Better)
    }
}

/// One guarded fact, judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Checked {
    pub subject: String,
    pub metric: String,
    pub kind: Kind,
    /// Unit of `baseline`, `current` and `tolerance`; `ratio` for timings. Empty when the row is missing.
    pub unit: String,
    pub baseline: f64,
    /// Absent when missing.
    pub current: Option<f64>,
    /// How much worse is still the same, in the unit of the value.
    pub tolerance: f64,
    pub status: Status,
    /// Index of its row in [`Baseline::rows`].
    pub index: usize,
}

/// Compares the latest rows of `commit` with the baseline, in the order of the baseline.
///
/// # Errors
/// [`Error::NothingToCheck`] when no row is left to gate; [`Error::Query`], a bug.
pub fn check(baseline: &Baseline, ledger: &Ledger, commit: &str, timings: Timings) -> Result<Vec<Checked>> {
    let latest = ledger.latest(commit)?;
    let mut checked = Vec::new();
    for (index, row) in baseline.rows().iter().enumerate() {
        if row.kind == Kind::Measured {
            if timings == Timings::Gated {
                checked.push(judge_timing(index, row, ledger, &latest, commit, baseline.measured())?);
            }
        } else {
            checked.push(judge(index, row, find(&latest, &row.subject, &row.metric, row.seed)));
        }
    }
    if checked.is_empty() {
        return Err(Error::NothingToCheck {
            file: baseline.file().to_owned(),
        });
    }
    Ok(checked)
}

/// The last of them in time: [`Ledger::latest`] sorts.
fn find<'a>(rows: &'a [Row], subject: &str, metric: &str, seed: Option<u64>) -> Option<&'a Row> {
    rows.iter()
        .rfind(|row| row.subject == subject && row.metric == metric && (seed.is_none() || row.seed == seed))
}

fn judge(index: usize, row: &BaselineRow, current: Option<&Row>) -> Checked {
    let tolerance = match row.tolerance {
        Some(Tolerance::Absolute(amount)) => amount,
        Some(Tolerance::Relative(fraction)) => fraction * row.value().abs(),
        None => 0.0,
    };
    verdict(index, row, current.map(|r| (r.value, r.unit.clone())), tolerance)
}

/// `value / reference` of one run against the committed ratio. Flagged beyond max(floor, k × noise) alone.
fn judge_timing(
    index: usize,
    row: &BaselineRow,
    ledger: &Ledger,
    latest: &[Row],
    commit: &str,
    gate: MeasuredGate,
) -> Result<Checked> {
    let Some(reference) = &row.reference else {
        return Ok(verdict(index, row, None, 0.0)); // the baseline's reader lets none through
    };
    let ratios = ratios(
        &ledger.history(&row.subject, &row.metric)?,
        &ledger.history(&reference.subject, &reference.metric)?,
        row.seed,
    );
    let newest = find(latest, &row.subject, &row.metric, row.seed);
    let current = newest.and_then(|newest| {
        let is_newest =
            |ratio: &&Ratio| ratio.commit == commit && ratio.time == newest.time && ratio.of == newest.value;
        ratios.iter().rfind(is_newest)
    });
    let device = newest.map_or("", |row| row.device.as_str());
    let series: Vec<f64> = ratios.iter().filter(|r| r.device == device).map(|r| r.value).collect();
    let noise = noise_of(&series).max(current.map_or(0.0, |ratio| ratio.relative_spread));
    let tolerance = gate.floor.max(gate.noise_factor * noise) * row.value();
    Ok(verdict(
        index,
        row,
        current.map(|ratio| (ratio.value, "ratio".to_owned())),
        tolerance,
    ))
}

/// A timing over its reference of the same run.
struct Ratio {
    value: f64,
    /// Of timing and reference together, as a fraction.
    relative_spread: f64,
    of: f64,
    time: String,
    commit: String,
    device: String,
}

/// Pairs each timing with the reference that the same run of the program recorded: same run, command and commit, and
/// the nearest of these in the order of recording.
fn ratios(timings: &[Row], references: &[Row], seed: Option<u64>) -> Vec<Ratio> {
    let same_run = |a: &Row, b: &Row| {
        (&a.run, &a.command, &a.commit, a.seed, &a.device) == (&b.run, &b.command, &b.commit, b.seed, &b.device)
    };
    let spread = |row: &Row| row.spread.unwrap_or(0.0) / row.value.abs();
    timings
        .iter()
        .filter(|timing| seed.is_none() || timing.seed == seed)
        .filter_map(|timing| {
            let reference = references
                .iter()
                .filter(|r| r.value > 0.0 && same_run(r, timing))
                .min_by_key(|r| seconds(&r.time).abs_diff(seconds(&timing.time)))?;
            Some(Ratio {
                value: timing.value / reference.value,
                relative_spread: spread(timing).hypot(spread(reference)),
                of: timing.value,
                time: timing.time.clone(),
                commit: timing.commit.clone(),
                device: timing.device.clone(),
            })
        })
        .collect()
}

/// Seconds of an RFC 3339 time since some instant; months count as 31 days, which distance within a run never sees.
fn seconds(time: &str) -> u64 {
    let mut parts = time
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse::<u64>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    let (year, month, day) = (next(), next(), next());
    (((year * 12 + month) * 31 + day) * 24 + next()) * 3600 + next() * 60 + next()
}

/// Median of |ln(rₜ / rₜ₋₁)| over a series' neighbours (latency.md 4.6 takes the same over repeated processes); 0 with
/// fewer than three.
fn noise_of(series: &[f64]) -> f64 {
    let mut steps: Vec<f64> = series.windows(2).map(|pair| (pair[1] / pair[0]).ln().abs()).collect();
    steps.retain(|step| step.is_finite());
    steps.sort_by(f64::total_cmp);
    if steps.len() < 2 { 0.0 } else { steps[steps.len() / 2] }
}

fn verdict(index: usize, row: &BaselineRow, current: Option<(f64, String)>, tolerance: f64) -> Checked {
    let status = match &current {
        None => Status::Missing,
        Some((value, _)) => {
            let worse_by = match row.better {
                Better::Lower => value - row.value(),
                Better::Higher => row.value() - value,
            };
            if worse_by > tolerance {
                Status::Regression
            } else if worse_by < -tolerance {
                Status::Better
            } else if worse_by.is_nan() {
                Status::Regression
            } else {
                Status::Ok
            }
        }
    };
    let (current, unit) = current.map_or((None, String::new()), |(value, unit)| (Some(value), unit));
    Checked {
        subject: row.subject.clone(),
        metric: row.metric.clone(),
        kind: row.kind,
        unit,
        baseline: row.value(),
        current,
        tolerance,
        status,
        index,
    }
}

#[cfg(test)]
mod tests {
    use cotk_run::facts::{Fact, FactSink};
    use cotk_run::files;

    use super::*;
    use crate::{LedgerSink, Provenance};

    const BASELINE: &str = r#"
[[row]]
subject = "compress:x"
metric = "perplexity_after"
kind = "accuracy"
better = "lower"
value = 10.0
tolerance = { relative = 0.01 }

[[row]]
subject = "search:x"
metric = "accuracy_test"
kind = "accuracy"
better = "higher"
value = 0.9
tolerance = { absolute = 0.005 }
seed = 0

[[row]]
subject = "search:x"
metric = "measured_ms"
kind = "measured"
better = "lower"
value = 2.0
reference = { subject = "search:x", metric = "reference_ms" }
"#;

    struct Bench {
        dir: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            files::write_atomic(dir.path().join("baseline.toml"), BASELINE.as_bytes()).unwrap();
            Self { dir }
        }

        fn record(&self, commit: &str, run: &str, facts: &[(&str, &str, f64, f64)]) {
            let provenance = Provenance {
                commit: commit.into(),
                command: "cotk search".into(),
                device: "cpu".into(),
                run: Some(run.into()),
                seed: Some(0),
                ..Provenance::default()
            };
            let sink = LedgerSink::open(self.dir.path(), provenance).unwrap();
            for &(subject, metric, value, spread) in facts {
                sink.record(Fact::new(subject, metric, value, "ms").spread(spread))
                    .unwrap();
            }
        }

        fn check(&self, timings: Timings) -> Vec<(Status, Option<f64>)> {
            let baseline = Baseline::load(self.dir.path().join("baseline.toml")).unwrap();
            let ledger = Ledger::open(self.dir.path()).unwrap();
            let checked = check(&baseline, &ledger, "now", timings).unwrap();
            checked.into_iter().map(|c| (c.status, c.current)).collect()
        }
    }

    fn good(perplexity: f64, accuracy: f64) -> [(&'static str, &'static str, f64, f64); 2] {
        [
            ("compress:x", "perplexity_after", perplexity, 0.0),
            ("search:x", "accuracy_test", accuracy, 0.0),
        ]
    }

    #[test]
    fn worse_beyond_the_tolerance_is_a_regression_in_either_direction() {
        for (perplexity, accuracy, expected) in [
            (10.0, 0.9, [Status::Ok, Status::Ok]),
            (10.099, 0.8951, [Status::Ok, Status::Ok]),
            (10.101, 0.9, [Status::Regression, Status::Ok]),
            (10.0, 0.8949, [Status::Ok, Status::Regression]),
            (9.0, 0.95, [Status::Better, Status::Better]),
        ] {
            let bench = Bench::new();
            bench.record("now", "r", &good(perplexity, accuracy));
            let found: Vec<Status> = bench.check(Timings::Ignored).into_iter().map(|c| c.0).collect();
            assert_eq!(found, expected, "{perplexity} {accuracy}");
        }
    }

    #[test]
    fn what_this_commit_has_not_recorded_is_missing() {
        let bench = Bench::new();
        assert_eq!(bench.check(Timings::Ignored), [(Status::Missing, None); 2]);
        bench.record("before", "r", &good(10.0, 0.9));
        assert_eq!(bench.check(Timings::Ignored), [(Status::Missing, None); 2]);
        bench.record("now", "r", &good(10.0, 0.9)[..1]);
        assert_eq!(
            bench.check(Timings::Ignored),
            [(Status::Ok, Some(10.0)), (Status::Missing, None)]
        );
        assert_eq!(bench.check(Timings::Gated)[2], (Status::Missing, None));
    }

    #[test]
    fn a_timing_is_judged_by_its_ratio_to_its_own_run() {
        let timing = |ms, reference| {
            [
                ("search:x", "reference_ms", reference, 0.0),
                ("search:x", "measured_ms", ms, 0.0),
            ]
        };
        for (ms, reference, expected) in [
            (2.0, 1.0, Status::Ok),
            (20.0, 10.0, Status::Ok), // a machine ten times as slow
            (2.09, 1.0, Status::Ok),  // below the floor of 5 %
            (2.11, 1.0, Status::Regression),
            (2.0, 0.9, Status::Regression),
            (1.5, 1.0, Status::Better),
        ] {
            let bench = Bench::new();
            bench.record("now", "other", &timing(1.0, 1000.0)[..1]); // another run's reference must not be taken
            bench.record("now", "r", &timing(ms, reference));
            assert_eq!(bench.check(Timings::Gated)[2].0, expected, "{ms} / {reference}");
        }
    }

    #[test]
    fn a_timing_is_flagged_beyond_its_own_noise_alone() {
        let timing = |ms, spread| {
            [
                ("search:x", "reference_ms", 1.0, 0.0),
                ("search:x", "measured_ms", ms, spread),
            ]
        };
        let spread_wide = Bench::new();
        spread_wide.record("now", "r", &timing(2.3, 0.2)); // 3 x 8.7 % > 15 %
        assert_eq!(spread_wide.check(Timings::Gated)[2].0, Status::Ok);
        let noisy = Bench::new();
        for (i, ms) in [2.0, 2.2, 2.0, 2.2].into_iter().enumerate() {
            noisy.record("before", &format!("r{i}"), &timing(ms, 0.0)); // steps of 9.5 %
        }
        noisy.record("now", "r", &timing(2.3, 0.0));
        assert_eq!(noisy.check(Timings::Gated)[2].0, Status::Ok);
        noisy.record("now", "r2", &timing(3.0, 0.0));
        assert_eq!(noisy.check(Timings::Gated)[2].0, Status::Regression);
    }

    #[test]
    fn nothing_to_check_is_no_pass() {
        let bench = Bench::new();
        let ledger = Ledger::open(bench.dir.path()).unwrap();
        for text in ["", &BASELINE[BASELINE.rfind("[[row]]").unwrap()..]] {
            let file = bench.dir.path().join("other.toml");
            files::write_atomic(&file, text.as_bytes()).unwrap();
            let found = check(&Baseline::load(&file).unwrap(), &ledger, "now", Timings::Ignored);
            assert!(matches!(found, Err(Error::NothingToCheck { .. })), "{found:?}");
        }
    }
}
