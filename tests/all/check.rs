//! `cotk check` as CI runs it: worse accuracy, bytes or predicted latency exits 3, and so does a fact that this
//! commit has not recorded; timings count on request alone.

use cotk_ledger::baseline::{Baseline, BaselineRow, Better, Kind, Pin, Tolerance};
use cotk_ledger::{LedgerSink, Provenance};
use cotk_program::sibling;
use cotk_run::facts::{Fact, FactSink};
use serde_json::Value;

use crate::program::{Ran, Workplace, in_repository};

const BASELINE: &str = r#"# Three kinds and a timing.
[[row]]
subject = "compress:moe-int4:tiny"
metric = "perplexity_after"
kind = "accuracy"
better = "lower"
value = 12.5 # trained for a minute
tolerance = { relative = 0.01 }

[[row]]
subject = "search:quickstart:glyphs"
metric = "accuracy_test"
kind = "accuracy"
better = "higher"
value = 0.97
tolerance = { absolute = 0.005 }

[[row]]
subject = "compress:moe-int4:tiny"
metric = "bytes_after"
kind = "bytes"
better = "lower"
value = 1048576
tolerance = { absolute = 0 }

[[row]]
subject = "search:quickstart:glyphs"
metric = "predicted_ms"
kind = "predicted"
better = "lower"
value = 0.25
tolerance = { relative = 0.02 }

[[row]]
subject = "search:quickstart:glyphs"
metric = "measured_ms"
kind = "measured"
better = "lower"
value = 0.5
reference = { subject = "search:quickstart:glyphs", metric = "baseline_measured_ms" }
"#;

struct Ledger {
    place: Workplace,
}

/// A row to be: subject, metric, value, and the hashes that the baseline pins.
#[derive(Clone)]
struct Wanted {
    subject: String,
    metric: String,
    value: f64,
    recipe_hash: Option<u64>,
    inputs: Option<u64>,
}

impl Wanted {
    /// Of the origin that a baseline row asks for.
    fn of(row: &BaselineRow, subject: &str, metric: &str, value: f64) -> Self {
        let hash = |pin| match pin {
            Pin::Hash(hash) => Some(u64::from_str_radix(hash, 16).unwrap()),
            Pin::Absent | Pin::Auto => None,
        };
        Self {
            subject: subject.into(),
            metric: metric.into(),
            value,
            recipe_hash: hash(row.recipe_hash()),
            inputs: hash(row.inputs()),
        }
    }
}

impl Ledger {
    /// A workplace whose ledger has the rows of some commit and build.
    fn of_build(baseline: &str, commit: &str, build: &str, rows: impl IntoIterator<Item = Wanted>) -> Self {
        let place = Workplace::new();
        fs_err::write(place.join("baseline.toml"), baseline).unwrap();
        let ledger = Self { place };
        for row in rows {
            ledger.record_of(commit, build, row);
        }
        ledger
    }

    fn of(baseline: &str, commit: &str, rows: impl IntoIterator<Item = Wanted>) -> Self {
        Self::of_build(baseline, commit, sibling::build_id(), rows)
    }

    /// As guarded, of the commit that the program was built from.
    fn unchanged(baseline: &str) -> Self {
        Self::of(baseline, sibling::commit(), values(&parse(baseline)))
    }

    fn record_of(&self, commit: &str, build: &str, row: Wanted) {
        let provenance = Provenance {
            commit: commit.into(),
            build: Some(build.into()),
            command: "cotk test".into(),
            seed: Some(0),
            recipe_hash: row.recipe_hash,
            inputs: row.inputs,
            ..Provenance::default()
        };
        let sink = LedgerSink::open(self.place.join("runs/ledger"), provenance).unwrap();
        sink.record(Fact::new(row.subject, row.metric, row.value, "unit"))
            .unwrap();
    }

    fn record_wanted(&self, row: Wanted) {
        self.record_of(sibling::commit(), sibling::build_id(), row);
    }

    fn record(&self, subject: &str, metric: &str, value: f64) {
        self.record_wanted(Wanted {
            subject: subject.into(),
            metric: metric.into(),
            value,
            recipe_hash: None,
            inputs: None,
        });
    }

    fn check(&self, more: &[&str]) -> Ran {
        let args = ["check", "--json", "--baseline", "baseline.toml"];
        self.place.run(args.iter().chain(more))
    }
}

fn parse(baseline: &str) -> Baseline {
    let place = Workplace::new();
    fs_err::write(place.join("b.toml"), baseline).unwrap();
    Baseline::load(place.join("b.toml")).unwrap()
}

/// What a run that reaches the baseline exactly would record; the reference of a timing is 1.
fn values(baseline: &Baseline) -> Vec<Wanted> {
    let mut found = Vec::new();
    for row in baseline.rows() {
        if let Some(reference) = &row.reference {
            found.push(Wanted::of(row, &reference.subject, &reference.metric, 1.0));
        }
        found.push(Wanted::of(row, &row.subject, &row.metric, row.value()));
    }
    found
}

/// A little beyond the tolerance.
fn worse(row: &BaselineRow) -> f64 {
    let tolerance = match row.tolerance {
        Some(Tolerance::Absolute(amount)) => amount,
        Some(Tolerance::Relative(fraction)) => fraction * row.value().abs(),
        None => panic!("a timing"),
    };
    let step = 1.001 * tolerance + 1e-6 * row.value().abs().max(1e-6);
    match row.better {
        Better::Lower => row.value() + step,
        Better::Higher => row.value() - step,
    }
}

fn statuses(result: &Value) -> Vec<&str> {
    result["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["status"].as_str().unwrap())
        .collect()
}

/// Both the rows above and the committed baseline: each fact made worse must fail alone.
fn each_worse_fact_fails_alone(text: &str) {
    let baseline = parse(text);
    let gated: Vec<&BaselineRow> = baseline
        .rows()
        .iter()
        .filter(|row| row.kind != Kind::Measured)
        .collect();
    for kind in [Kind::Accuracy, Kind::Bytes, Kind::Predicted] {
        assert!(
            gated.iter().any(|row| row.kind == kind),
            "nothing of kind {} is guarded",
            kind.name()
        );
    }
    let result = Ledger::unchanged(text).check(&[]).result(0);
    assert_eq!(result["regressions"], 0);
    assert!(statuses(&result).iter().all(|status| *status == "ok"), "{result}");
    for (index, row) in gated.iter().enumerate() {
        let ledger = Ledger::unchanged(text);
        ledger.record_wanted(Wanted::of(row, &row.subject, &row.metric, worse(row)));
        let result = ledger.check(&[]).result(3);
        let found = statuses(&result);
        assert_eq!(found[index], "regression", "{} {}: {result}", row.subject, row.metric);
        assert_eq!(
            found.iter().filter(|status| **status == "ok").count(),
            gated.len() - 1,
            "{result}"
        );
        assert_eq!(result["regressions"], 1);
    }
}

#[test]
fn each_of_accuracy_bytes_and_predicted_latency_made_worse_exits_3() {
    each_worse_fact_fails_alone(BASELINE);
}

#[test]
fn a_fact_that_this_commit_has_not_recorded_exits_3() {
    let baseline = parse(BASELINE);
    for left_out in baseline.rows().iter().filter(|row| row.kind != Kind::Measured) {
        let rows = values(&baseline)
            .into_iter()
            .filter(|row| row.metric != left_out.metric);
        let result = Ledger::of(BASELINE, sibling::commit(), rows).check(&[]).result(3);
        let missing: Vec<&Value> = result["rows"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|row| row["status"] == "missing")
            .collect();
        assert_eq!(missing.len(), 1);
        assert_eq!(missing[0]["metric"], left_out.metric.as_str());
        assert!(missing[0]["current"].is_null());
    }
    // Rows of another commit do not count, and an empty or absent ledger cannot pass.
    let other = Ledger::of(BASELINE, "0123456789ab", values(&baseline));
    let empty = Ledger::of(BASELINE, sibling::commit(), []);
    for (ledger, more) in [(&other, &[][..]), (&empty, &[]), (&empty, &["--ledger", "nowhere"])] {
        let ran = ledger.check(more);
        assert!(ran.json()["warnings"][0].as_str().unwrap().contains("cargo xtask demo"));
        assert_eq!(statuses(&ran.result(3)), ["missing"; 4]);
    }
}

#[test]
fn rows_of_another_build_of_this_commit_do_not_count() {
    let other = Ledger::of_build(BASELINE, sibling::commit(), "before", values(&parse(BASELINE)));
    let result = other.check(&[]).result(3);
    assert_eq!(statuses(&result), ["missing"; 4]);
    let note = result["rows"][0]["note"].as_str().unwrap();
    assert!(
        note.contains("build before") && note.contains(sibling::build_id()),
        "{note}"
    );
}

#[test]
fn rows_of_another_recipe_do_not_count_until_update_pins_them() {
    let pinned = |hash: &str| BASELINE.replacen("value = 12.5", &format!("recipe_hash = \"{hash}\"\nvalue = 12.5"), 1);
    let other_recipe = |baseline: &str| {
        let rows = values(&parse(BASELINE)).into_iter().map(|row| Wanted {
            recipe_hash: Some(0xbb),
            ..row
        });
        Ledger::of(baseline, sibling::commit(), rows)
    };

    let ledger = other_recipe(&pinned("00000000000000aa"));
    let result = ledger.check(&[]).result(3);
    assert_eq!(statuses(&result), ["missing", "ok", "ok", "ok"]);
    let note = result["rows"][0]["note"].as_str().unwrap();
    assert!(
        note.contains("00000000000000aa") && note.contains("00000000000000bb"),
        "{note}"
    );

    let auto = other_recipe(&pinned("auto"));
    let ran = auto.check(&[]);
    assert!(
        ran.json()["warnings"][0].as_str().unwrap().contains("`auto`"),
        "{ran:?}"
    );
    assert_eq!(statuses(&ran.result(0)), ["ok"; 4]);

    for ledger in [ledger, auto] {
        assert_eq!(ledger.check(&["--update"]).result(0)["updated"], true);
        assert_eq!(
            fs_err::read_to_string(ledger.place.join("baseline.toml")).unwrap(),
            pinned("00000000000000bb").replace("1048576", "1048576.0")
        );
        let ran = ledger.check(&[]);
        assert_eq!(ran.json()["warnings"].as_array().unwrap().len(), 0, "{ran:?}");
        assert_eq!(statuses(&ran.result(0)), ["ok"; 4]);
    }
}

#[test]
fn better_is_said_and_passes() {
    let ledger = Ledger::unchanged(BASELINE);
    ledger.record("compress:moe-int4:tiny", "perplexity_after", 11.0);
    let result = ledger.check(&[]).result(0);
    assert_eq!(statuses(&result), ["better", "ok", "ok", "ok"]);
    assert_eq!(result["rows"][0]["current"], 11.0);
    assert_eq!(result["rows"][0]["tolerance"], 0.125);
}

#[test]
fn timings_are_gated_on_request_as_a_ratio_beyond_the_noise() {
    let subject = "search:quickstart:glyphs";
    for (measured, reference, code) in [
        (0.5, 1.0, 0),
        (50.0, 100.0, 0), // a slow machine is slow at the reference too
        (0.52, 1.0, 0),   // below the floor
        (0.6, 1.0, 3),
    ] {
        let rows = values(&parse(BASELINE))
            .into_iter()
            .filter(|row| !row.metric.ends_with("measured_ms"));
        let ledger = Ledger::of(BASELINE, sibling::commit(), rows);
        ledger.record(subject, "baseline_measured_ms", reference);
        ledger.record(subject, "measured_ms", measured);
        assert_eq!(ledger.check(&[]).result(0)["rows"].as_array().unwrap().len(), 4);
        let result = ledger.check(&["--measured"]).result(code);
        assert_eq!(result["rows"][4]["unit"], "ratio");
        assert_eq!(result["rows"][4]["current"], measured / reference);
    }
    let rows = values(&parse(BASELINE))
        .into_iter()
        .filter(|row| row.metric != "baseline_measured_ms");
    let without_reference = Ledger::of(BASELINE, sibling::commit(), rows);
    assert_eq!(
        statuses(&without_reference.check(&["--measured"]).result(3))[4],
        "missing"
    );
}

#[test]
fn update_writes_the_values_alone_and_only_when_none_is_missing() {
    let ledger = Ledger::unchanged(BASELINE);
    ledger.record("compress:moe-int4:tiny", "perplexity_after", 13.5);
    let result = ledger.check(&["--update"]).result(0);
    assert_eq!(result["updated"], true);
    let text = fs_err::read_to_string(ledger.place.join("baseline.toml")).unwrap();
    assert_eq!(
        text,
        BASELINE.replace("12.5 #", "13.5 #").replace("1048576", "1048576.0")
    );
    assert_eq!(statuses(&ledger.check(&[]).result(0)), ["ok"; 4]);

    let empty = Ledger::of(BASELINE, sibling::commit(), []);
    assert_eq!(empty.check(&["--update"]).result(3)["updated"], false);
    assert_eq!(
        fs_err::read_to_string(empty.place.join("baseline.toml")).unwrap(),
        BASELINE
    );
}

#[test]
fn the_table_shows_every_row_in_100_columns() {
    let ledger = Ledger::unchanged(BASELINE);
    let ran = ledger.place.run(["check", "--baseline", "baseline.toml"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.stdout.lines().all(|line| line.chars().count() <= 100),
        "{}",
        ran.stdout
    );
    let build = "0123456789abcdef";
    let other = Ledger::of_build(BASELINE, sibling::commit(), build, values(&parse(BASELINE)));
    let missing = other.place.run(["check", "--baseline", "baseline.toml"]);
    assert_eq!(
        missing.stdout.matches(build).count(),
        2,
        "once per subject: {missing:?}"
    );
    assert!(missing.stdout.lines().all(|line| line.chars().count() <= 100));
    let line = |text: &str| ran.stdout.lines().position(|line| line.starts_with(text));
    // Subjects in full, each once, their metrics below them.
    assert!(line("compress:moe-int4:tiny").unwrap() < line("  bytes_after").unwrap());
    assert!(line("  bytes_after").unwrap() < line("search:quickstart:glyphs").unwrap());
    assert_eq!(ran.stdout.matches("search:quickstart:glyphs").count(), 1);
    assert!(
        ran.stdout.contains("perplexity_after") && ran.stdout.contains("4 ok, 0 better, 0 worse, 0 missing"),
        "{}",
        ran.stdout
    );
}

#[test]
fn what_cannot_be_checked_is_refused_with_its_place() {
    let ledger = Ledger::unchanged(BASELINE);
    let fault = ledger
        .place
        .run(["check", "--json", "--baseline", "nowhere.toml"])
        .fault(2);
    assert_eq!(
        (&fault["kind"], &fault["file"]),
        (&"no-such-file".into(), &"nowhere.toml".into())
    );

    let bad = |text: &str| {
        fs_err::write(ledger.place.join("bad.toml"), text).unwrap();
        ledger.place.run(["check", "--json", "--baseline", "bad.toml"]).fault(2)
    };
    assert_eq!(bad("")["kind"], "nothing-to-check");
    let fault = bad(&BASELINE.replacen("better", "beter", 1));
    assert_eq!(
        (&fault["key"], &fault["help"]),
        (&"beter".into(), &"did you mean `better`?".into())
    );
    assert_eq!(
        bad(&BASELINE.replacen("tolerance = { relative = 0.01 }", "", 1))["key"],
        "tolerance"
    );

    fs_err::write(ledger.place.join("runs/ledger/rows.jsonl"), "{}\n{}\n").unwrap();
    let fault = ledger.check(&[]).fault(2);
    assert_eq!(fault["kind"], "ledger-row");
    assert!(fault["message"].as_str().unwrap().contains("rows.jsonl:1"), "{fault}");
}

#[test]
fn the_committed_baseline_guards_all_three_and_catches_each() {
    each_worse_fact_fails_alone(&fs_err::read_to_string(in_repository("benches/baseline.toml")).unwrap());
}
