//! `cotk check`: the ledger's latest rows of this commit and build against the committed baseline. Reads the ledger and
//! the baseline, nothing else; the verdicts are `cotk_ledger::check`'s.

use std::path::PathBuf;

use cotk_ledger::Ledger;
use cotk_ledger::baseline::{Baseline, Kind, Pin, Update};
use cotk_ledger::check::{Checked, Current, Pins, Status, Timings, check};
use cotk_run::files;
use cotk_run::units::significant;
use serde_json::json;

use crate::context::{Context, Outcome};
use crate::fault::{Fault, REGRESSION};
use crate::sibling;
use crate::table::Table;

/// Compare the ledger's latest figures of this build with the committed baseline; exit 3 when one got worse
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk check\n  cotk check --baseline benches/baseline.toml --ledger runs/ledger --measured"
)]
pub struct Args {
    /// What is guarded, at which value, with which tolerance
    #[arg(long, value_name = "FILE", default_value = "benches/baseline.toml")]
    pub baseline: PathBuf,
    /// Folder of ledger rows (default: $COTK_RUNS/ledger, else runs/ledger)
    #[arg(long, value_name = "DIR")]
    pub ledger: Option<PathBuf>,
    /// Gate measured timings too, each as a ratio to a reference timed in the same run
    #[arg(long)]
    pub measured: bool,
    /// Write the current values, and the hashes where a row has one or `auto`, into the baseline; refused while one is
    /// missing
    #[arg(long)]
    pub update: bool,
}

/// Exit code 3 for a regression or a missing row.
///
/// # Errors
/// A baseline or ledger that cannot be read, or has nothing to check.
pub fn run(args: &Args, _cx: &Context) -> Result<Outcome, Fault> {
    let folder = args.ledger.clone().unwrap_or_else(cotk_ledger::default_folder);
    let timings = if args.measured {
        Timings::Gated
    } else {
        Timings::Ignored
    };
    let baseline = Baseline::load(&args.baseline)?;
    let ledger = Ledger::open(&folder)?;
    let (commit, build) = (sibling::commit(), sibling::build_id());
    let pins = if args.update { Pins::Renewed } else { Pins::Strict };
    let rows = check(&baseline, &ledger, Current { commit, build }, pins, timings)?;

    let missing = count(&rows, Status::Missing);
    let failed = rows.iter().filter(|row| !row.status.passes()).count();
    let mut warnings = Vec::new();
    if missing > 0 {
        warnings.push(format!(
            "{missing} of {} guarded facts have no row of commit {commit}, build {build} in {} ({} rows in all): `cargo xtask demo` records them",
            rows.len(),
            folder.display(),
            ledger.row_count(),
        ));
    }
    warnings.extend(pin_warnings(&baseline, &rows, args.update && missing == 0));
    let mut text = table(&rows);
    text.push_str(&format!(
        "\n{} facts of commit {commit}: {} ok, {} better, {} worse, {missing} missing\n",
        rows.len(),
        count(&rows, Status::Ok),
        count(&rows, Status::Better),
        count(&rows, Status::Regression),
    ));
    let is_updated = args.update && missing == 0;
    if is_updated {
        update(&baseline, &rows)?;
        text.push_str(&format!("{}: values updated\n", baseline.file().display()));
    }
    let result = json!({
        "baseline": baseline.file(),
        "ledger": folder,
        "commit": commit,
        "build": build,
        "rows": rows.iter().map(|row| json!({
            "subject": row.subject,
            "metric": row.metric,
            "kind": row.kind.name(),
            "unit": row.unit,
            "baseline": row.baseline,
            "current": row.current,
            "tolerance": row.tolerance,
            "status": row.status.name(),
            "note": row.note,
            "recipe_hash": row.recipe_hash,
            "inputs": row.inputs,
        })).collect::<Vec<_>>(),
        // Everything that fails the check: worse and missing alike.
        "regressions": failed,
        "missing": missing,
        "updated": is_updated,
    });
    let mut outcome = Outcome::new(result, text).warn(warnings);
    outcome.exit_code = if failed == 0 || is_updated { 0 } else { REGRESSION };
    Ok(outcome)
}

fn count(rows: &[Checked], status: Status) -> usize {
    rows.iter().filter(|row| row.status == status).count()
}

fn update(baseline: &Baseline, rows: &[Checked]) -> Result<(), Fault> {
    let mut updates = vec![Update::default(); baseline.rows().len()];
    for row in rows {
        updates[row.index] = Update {
            value: row.current,
            recipe_hash: row.recipe_hash.clone(),
            inputs: row.inputs.clone(),
        };
    }
    Ok(files::write_atomic(
        baseline.file(),
        baseline.with_updates(&updates).as_bytes(),
    )?)
}

/// One line per subject and key: `auto` admits any row, and an update pins another hash.
fn pin_warnings(baseline: &Baseline, rows: &[Checked], is_updated: bool) -> Vec<String> {
    let mut warnings = Vec::new();
    for row in rows {
        let guarded = &baseline.rows()[row.index];
        for (key, pin, hash) in [
            ("recipe_hash", guarded.recipe_hash(), &row.recipe_hash),
            ("inputs", guarded.inputs(), &row.inputs),
        ] {
            let subject = &row.subject;
            let warning = match (pin, hash) {
                (Pin::Auto, None) => format!("{subject}: {key} is `auto`, rows of any count"),
                (Pin::Auto, Some(hash)) if !is_updated => {
                    format!("{subject}: {key} is `auto`, rows of any count: `cotk check --update` pins {hash}")
                }
                (Pin::Hash(old), Some(new)) if old != new => format!("{subject}: {key} was {old}, is {new} now"),
                _ => continue,
            };
            if !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
    }
    warnings
}

/// Metrics below a line with their subject, which is too long for a column.
fn table(rows: &[Checked]) -> String {
    let mut table = Table::new(&["metric", "unit", "baseline", "current", "change", "tolerance", "status"]);
    let mut subjects: Vec<&str> = Vec::new();
    for row in rows {
        if !subjects.contains(&row.subject.as_str()) {
            subjects.push(&row.subject);
        }
    }
    let groups = subjects
        .iter()
        .map(|&subject| (subject, rows.iter().filter(move |row| row.subject == subject)));
    for row in groups.clone().flat_map(|(_, rows)| rows) {
        let show = |value: f64| match row.kind {
            Kind::Bytes => format!("{value}"),
            Kind::Accuracy | Kind::Predicted | Kind::Measured => significant(value, 5),
        };
        let change = row.current.map_or_else(String::new, |current| {
            let relative = 100.0 * (current - row.baseline) / row.baseline.abs();
            if relative.is_finite() {
                format!("{relative:+.2} %")
            } else {
                String::new()
            }
        });
        table.row([
            format!("  {}", row.metric),
            row.unit.clone(),
            show(row.baseline),
            row.current.map_or_else(String::new, show),
            change,
            format!("±{}", significant(row.tolerance, 3)),
            row.status.name().to_owned(),
        ]);
    }
    let rendered = table.render();
    let mut lines = rendered.lines();
    let mut text: String = lines.by_ref().take(2).flat_map(|line| [line, "\n"]).collect(); // head and rule
    for (subject, rows) in groups {
        let subject: Vec<char> = subject.chars().collect();
        for part in subject.chunks(100) {
            text.extend(part);
            text.push('\n');
        }
        for line in lines.by_ref().take(rows.clone().count()) {
            text.push_str(line);
            text.push('\n');
        }
        let mut notes: Vec<&str> = rows.filter_map(|row| row.note.as_deref()).collect();
        notes.dedup();
        for note in notes {
            text.push_str(&format!("  missing: {note}\n"));
        }
    }
    text
}
