//! Baseline against ledger: one verdict per guarded fact. Pure. Law: a fact that this build has not recorded, of the
//! recipe and inputs that the baseline pins, is `missing`, never passed over; a timing is judged as a ratio to what was timed in the same run, beyond its own noise.

use crate::baseline::{Baseline, BaselineRow, Better, Kind, MeasuredGate, Pin, Tolerance};
use crate::{Error, Ledger, Result, Row};

/// Whether `measured` rows are gated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timings {
    Ignored,
    Gated,
}

/// Which rows are current: those of this commit and this build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Current<'a> {
    pub commit: &'a str,
    /// Another build of the same commit had other sources.
    pub build: &'a str,
}

/// What a pinned hash does to rows of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pins {
    /// They do not count.
    Strict,
    /// They count where there is none of the pinned hash: the baseline is about to be written anew.
    Renewed,
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
    /// No row of this commit, build, recipe and inputs.
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
    /// Of a missing one: what this commit recorded instead.
    pub note: Option<String>,
    /// Recipe of the row that was taken.
    pub recipe_hash: Option<String>,
    /// Inputs of the row that was taken.
    pub inputs: Option<String>,
    /// Index of its row in [`Baseline::rows`].
    pub index: usize,
}

/// Compares the latest current rows with the baseline, in the order of the baseline.
///
/// # Errors
/// [`Error::NothingToCheck`] when no row is left to gate; [`Error::Query`], a bug.
pub fn check(
    baseline: &Baseline,
    ledger: &Ledger,
    current: Current<'_>,
    pins: Pins,
    timings: Timings,
) -> Result<Vec<Checked>> {
    let (latest, other_builds): (Vec<Row>, Vec<Row>) = ledger
        .latest(current.commit)?
        .into_iter()
        .partition(|row| row.build.as_deref() == Some(current.build));
    let mut checked = Vec::new();
    for (index, row) in baseline.rows().iter().enumerate() {
        if row.kind == Kind::Measured && timings == Timings::Ignored {
            continue;
        }
        let found = find(&latest, row, pins);
        let mut one = if row.kind == Kind::Measured {
            judge_timing(index, row, ledger, found, baseline.measured())?
        } else {
            judge(index, row, found)
        };
        if let Some(found) = found.filter(|_| one.current.is_some()) {
            (one.recipe_hash, one.inputs) = (found.recipe_hash.clone(), found.inputs.clone());
        } else {
            one.note = note(row, found, &latest, &other_builds, current);
        }
        checked.push(one);
    }
    if checked.is_empty() {
        return Err(Error::NothingToCheck {
            file: baseline.file().to_owned(),
        });
    }
    Ok(checked)
}

fn is_of(row: &Row, wanted: &BaselineRow) -> bool {
    row.subject == wanted.subject && row.metric == wanted.metric && (wanted.seed.is_none() || row.seed == wanted.seed)
}

/// The last of them in time: [`Ledger::latest`] sorts.
fn find<'a>(rows: &'a [Row], wanted: &BaselineRow, pins: Pins) -> Option<&'a Row> {
    let is_pinned = |row: &&Row| {
        wanted.recipe_hash().admits(row.recipe_hash.as_deref()) && wanted.inputs().admits(row.inputs.as_deref())
    };
    let of_pins = rows.iter().rfind(|row| is_of(row, wanted) && is_pinned(row));
    of_pins.or_else(|| {
        let any = || rows.iter().rfind(|row| is_of(row, wanted));
        (pins == Pins::Renewed).then(any).flatten()
    })
}

/// Why a fact is missing although this commit recorded something like it.
fn note(
    wanted: &BaselineRow,
    found: Option<&Row>,
    latest: &[Row],
    other_builds: &[Row],
    current: Current<'_>,
) -> Option<String> {
    if found.is_some() {
        return Some("its run has no row of the reference".to_owned());
    }
    let last = |rows: &[Row]| rows.iter().rfind(|row| is_of(row, wanted)).cloned();
    if let Some(row) = last(latest) {
        let said = [
            ("recipe", wanted.recipe_hash(), row.recipe_hash.as_deref()),
            ("inputs", wanted.inputs(), row.inputs.as_deref()),
        ];
        let (what, pinned, hash) = said.into_iter().find_map(|(what, pin, hash)| match pin {
            Pin::Hash(pinned) if !pin.admits(hash) => Some((what, pinned, hash.unwrap_or("none"))),
            _ => None,
        })?;
        return Some(format!(
            "rows of this build are of {what} {hash}, the baseline's is {pinned}"
        ));
    }
    let row = last(other_builds)?;
    Some(format!(
        "rows of this commit are of build {}, this is build {}",
        row.build.as_deref().unwrap_or("unknown"),
        current.build
    ))
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
    newest: Option<&Row>,
    gate: MeasuredGate,
) -> Result<Checked> {
    let Some(reference) = &row.reference else {
        return Ok(verdict(index, row, None, 0.0)); // the baseline's reader lets none through
    };
    let (timings, references) = (
        ledger.history(&row.subject, &row.metric)?,
        ledger.history(&reference.subject, &reference.metric)?,
    );
    let ratios = ratios(&timings, &references, row.seed);
    let current = newest.and_then(|newest| ratios.iter().rfind(|ratio| ratio.timing == newest));
    // Another machine or another recipe is another series.
    let series: Vec<f64> = ratios
        .iter()
        .filter(|r| newest.is_some_and(|n| (&n.device, &n.recipe_hash) == (&r.timing.device, &r.timing.recipe_hash)))
        .map(|r| r.value)
        .collect();
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
struct Ratio<'a> {
    value: f64,
    /// Of timing and reference together, as a fraction.
    relative_spread: f64,
    timing: &'a Row,
}

/// Pairs each timing with the reference that the same run of the program recorded: same run, command, build, recipe
/// and so on, and the nearest of these in the order of recording.
fn ratios<'a>(timings: &'a [Row], references: &[Row], seed: Option<u64>) -> Vec<Ratio<'a>> {
    let same_run = |a: &Row, b: &Row| {
        (&a.run, &a.command, &a.commit, a.seed, &a.device) == (&b.run, &b.command, &b.commit, b.seed, &b.device)
            && (&a.build, &a.recipe_hash, &a.inputs) == (&b.build, &b.recipe_hash, &b.inputs)
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
                timing,
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
        note: None,
        recipe_hash: None,
        inputs: None,
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

    const NOW: Current<'_> = Current {
        commit: "now",
        build: "this",
    };

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
            self.record_of(commit, "this", None, run, facts);
        }

        fn record_of(
            &self,
            commit: &str,
            build: &str,
            recipe: Option<u64>,
            run: &str,
            facts: &[(&str, &str, f64, f64)],
        ) {
            let provenance = Provenance {
                commit: commit.into(),
                build: Some(build.into()),
                recipe_hash: recipe,
                inputs: recipe,
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

        fn checked(&self, pins: Pins, timings: Timings) -> Vec<Checked> {
            let baseline = Baseline::load(self.dir.path().join("baseline.toml")).unwrap();
            let ledger = Ledger::open(self.dir.path()).unwrap();
            check(&baseline, &ledger, NOW, pins, timings).unwrap()
        }

        fn check(&self, timings: Timings) -> Vec<(Status, Option<f64>)> {
            let checked = self.checked(Pins::Strict, timings);
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
    fn rows_of_another_build_are_not_current_and_are_said() {
        let bench = Bench::new();
        bench.record_of("now", "before the edit", None, "r", &good(10.0, 0.9));
        for one in bench.checked(Pins::Strict, Timings::Ignored) {
            let note = one.note.unwrap();
            assert_eq!(one.status, Status::Missing);
            assert!(note.contains("before the edit") && note.contains("this"), "{note}");
        }
        bench.record("now", "r", &good(10.0, 0.9));
        bench.record_of("now", "after the edit", None, "r", &good(11.0, 0.9));
        assert_eq!(bench.check(Timings::Ignored)[0], (Status::Ok, Some(10.0)));
    }

    #[test]
    fn rows_of_another_recipe_or_other_inputs_are_not_current() {
        for key in ["recipe_hash", "inputs"] {
            let bench = Bench::new();
            let pinned = BASELINE.replacen("value", &format!("{key} = \"00000000000000aa\"\nvalue"), 1);
            files::write_atomic(bench.dir.path().join("baseline.toml"), pinned.as_bytes()).unwrap();
            assert!(bench.checked(Pins::Strict, Timings::Ignored)[0].note.is_none());
            bench.record_of("now", "this", Some(0xbb), "r", &good(10.0, 0.9));
            let one = bench.checked(Pins::Strict, Timings::Ignored).swap_remove(0);
            let note = one.note.unwrap();
            assert_eq!(one.status, Status::Missing);
            assert!(
                note.contains("00000000000000aa") && note.contains("00000000000000bb"),
                "{note}"
            );
            // To be written anew, the other one will do, but never in place of the pinned one.
            let one = bench.checked(Pins::Renewed, Timings::Ignored).swap_remove(0);
            assert_eq!(one.recipe_hash.as_deref(), Some("00000000000000bb"));
            bench.record_of("now", "this", Some(0xaa), "r", &good(10.0, 0.9));
            bench.record_of("now", "this", Some(0xbb), "r", &good(11.0, 0.9));
            for pins in [Pins::Strict, Pins::Renewed] {
                let one = bench.checked(pins, Timings::Ignored).swap_remove(0);
                assert_eq!((one.status, one.current), (Status::Ok, Some(10.0)));
            }
        }
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
            let found = check(
                &Baseline::load(&file).unwrap(),
                &ledger,
                NOW,
                Pins::Strict,
                Timings::Ignored,
            );
            assert!(matches!(found, Err(Error::NothingToCheck { .. })), "{found:?}");
        }
    }
}
