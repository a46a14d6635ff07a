//! Reading rows into a polars frame and asking it. Nothing of polars leaves this file.
//!
//! All `*.jsonl` of the folder are read, in the order of their names: ledgers of several machines merge by copying
//! files together. Where two rows tell of one thing, the later time counts, and of one second the later line.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use cotk_run::files::{self, Op, fault_point};
use polars::prelude::*;

use crate::{Error, Result, Row};

/// A row of ours has some hundred bytes; one beyond this is not a row.
const LINE_LIMIT_BYTES: u64 = 1 << 16;
/// Rows turned into columns at once: bounds what stands in memory twice.
const CHUNK_ROWS: usize = 1 << 16;

/// All rows of a ledger, in memory.
#[derive(Debug, Clone)]
pub struct Ledger {
    folder: PathBuf,
    frame: DataFrame,
}

impl Ledger {
    /// Reads every row of a folder. A folder that is not there is an empty ledger.
    ///
    /// # Errors
    /// [`Error::Run`] with the file; [`Error::Row`] with file and line, for a line that is no row and not a torn last one.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let mut frame = to_frame(&[], 0)?;
        let mut rows = Vec::new();
        for file in row_files(folder)? {
            read_rows(&file, |row| {
                rows.push(row);
                if rows.len() == CHUNK_ROWS {
                    append(&mut frame, &mut rows)?;
                }
                Ok(())
            })?;
        }
        append(&mut frame, &mut rows)?;
        Ok(Self {
            folder: folder.to_owned(),
            frame,
        })
    }

    /// Where it was read from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Rows of all commits.
    pub fn row_count(&self) -> usize {
        self.frame.height()
    }

    /// The latest row of each (subject, metric, seed, build, recipe, inputs) that a commit recorded, oldest first.
    ///
    /// # Errors
    /// [`Error::Query`], a bug.
    pub fn latest(&self, commit: &str) -> Result<Vec<Row>> {
        let latest = self
            .frame
            .clone()
            .lazy()
            .filter(col("commit").eq(lit(commit)))
            .sort(["time", "order"], SortMultipleOptions::default())
            .group_by_stable(["subject", "metric", "seed", "build", "recipe_hash", "inputs"].map(col))
            .agg([all().as_expr().last()])
            .sort(["time", "order"], SortMultipleOptions::default())
            .collect()
            .map_err(query)?;
        from_frame(&latest)
    }

    /// Every row of one (subject, metric), whatever the commit, oldest first: the series' own history.
    ///
    /// # Errors
    /// [`Error::Query`], a bug.
    pub fn history(&self, subject: &str, metric: &str) -> Result<Vec<Row>> {
        let history = self
            .frame
            .clone()
            .lazy()
            .filter(col("subject").eq(lit(subject)).and(col("metric").eq(lit(metric))))
            .sort(["time", "order"], SortMultipleOptions::default())
            .collect()
            .map_err(query)?;
        from_frame(&history)
    }
}

fn row_files(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let list = || cotk_run::Error::io("list", folder);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(list())? {
        let path = entry.map_err(list())?.path();
        if path.extension().is_some_and(|e| e == "jsonl") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read_rows(file: &Path, mut take: impl FnMut(Row) -> Result<()>) -> Result<()> {
    let fail = || cotk_run::Error::io("read", file);
    let mut reader = BufReader::with_capacity(1 << 20, files::open(file)?);
    let mut line = Vec::new();
    for number in 1u64.. {
        line.clear();
        fault_point(Op::Read).map_err(fail())?;
        std::io::Read::take(&mut reader, LINE_LIMIT_BYTES)
            .read_until(b'\n', &mut line)
            .map_err(fail())?;
        let bad = |detail: String| Error::Row {
            file: file.to_owned(),
            line: number,
            detail,
        };
        if line.last() != Some(&b'\n') {
            if line.len() as u64 == LINE_LIMIT_BYTES {
                return Err(bad(format!("more than {LINE_LIMIT_BYTES} bytes without an end")));
            }
            return Ok(()); // the end, or the torn line of a writer that died or is still at it
        }
        let row: Row = serde_json::from_slice(&line).map_err(|e| bad(e.to_string()))?;
        take(row)?;
    }
    Ok(())
}

fn append(frame: &mut DataFrame, rows: &mut Vec<Row>) -> Result<()> {
    if !rows.is_empty() {
        frame
            .vstack_mut_owned(to_frame(rows, frame.height() as u64)?)
            .map_err(query)?;
        rows.clear();
    }
    Ok(())
}

fn to_frame(rows: &[Row], first: u64) -> Result<DataFrame> {
    fn text<'a>(name: &str, rows: &'a [Row], get: impl Fn(&'a Row) -> Option<&'a str>) -> Column {
        Column::new(name.into(), rows.iter().map(get).collect::<Vec<_>>())
    }
    let numbers = |name: &str, get: &dyn Fn(&Row) -> Option<f64>| {
        Column::new(name.into(), rows.iter().map(get).collect::<Vec<_>>())
    };
    let counts = |name: &str, get: &dyn Fn(&Row) -> Option<u64>| {
        Column::new(name.into(), rows.iter().map(get).collect::<Vec<_>>())
    };
    let columns = vec![
        Column::new("order".into(), (first..first + rows.len() as u64).collect::<Vec<_>>()),
        text("time", rows, |r| Some(&r.time)),
        text("cotk_version", rows, |r| Some(&r.cotk_version)),
        text("commit", rows, |r| Some(&r.commit)),
        text("build", rows, |r| r.build.as_deref()),
        text("command", rows, |r| Some(&r.command)),
        text("recipe_hash", rows, |r| r.recipe_hash.as_deref()),
        text("inputs", rows, |r| r.inputs.as_deref()),
        counts("seed", &|r| r.seed),
        text("device", rows, |r| Some(&r.device)),
        text("subject", rows, |r| Some(&r.subject)),
        text("metric", rows, |r| Some(&r.metric)),
        numbers("value", &|r| Some(r.value)),
        text("unit", rows, |r| Some(&r.unit)),
        numbers("spread", &|r| r.spread),
        counts("count", &|r| r.count),
        text("run", rows, |r| r.run.as_deref()),
    ];
    DataFrame::new(rows.len(), columns).map_err(query)
}

fn from_frame(frame: &DataFrame) -> Result<Vec<Row>> {
    let text = |name: &str| frame.column(name).and_then(|c| c.str()).map_err(query);
    let number = |name: &str| frame.column(name).and_then(|c| c.f64()).map_err(query);
    let count = |name: &str| frame.column(name).and_then(|c| c.u64()).map_err(query);
    let (time, cotk_version, commit, command) =
        (text("time")?, text("cotk_version")?, text("commit")?, text("command")?);
    let (recipe_hash, device, subject, metric) =
        (text("recipe_hash")?, text("device")?, text("subject")?, text("metric")?);
    let (unit, run, build, inputs) = (text("unit")?, text("run")?, text("build")?, text("inputs")?);
    let (value, spread) = (number("value")?, number("spread")?);
    let (seed, samples) = (count("seed")?, count("count")?);
    let owned = |column: &StringChunked, i: usize| column.get(i).map(str::to_owned);
    let must = |column: &StringChunked, i: usize| owned(column, i).unwrap_or_default();
    Ok((0..frame.height())
        .map(|i| Row {
            time: must(time, i),
            cotk_version: must(cotk_version, i),
            commit: must(commit, i),
            build: owned(build, i),
            command: must(command, i),
            recipe_hash: owned(recipe_hash, i),
            inputs: owned(inputs, i),
            seed: seed.get(i),
            device: must(device, i),
            subject: must(subject, i),
            metric: must(metric, i),
            value: value.get(i).unwrap_or(f64::NAN),
            unit: must(unit, i),
            spread: spread.get(i),
            count: samples.get(i),
            run: owned(run, i),
        })
        .collect())
}

fn query(error: PolarsError) -> Error {
    Error::Query(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    fn line(time: u32, commit: &str, subject: &str, value: f64) -> String {
        format!(
            r#"{{"time":"2026-11-21T13:{:02}:{:02}Z","cotk_version":"0.1.0","commit":"{commit}","command":"cotk eval MODEL --text F --json","recipe_hash":null,"seed":0,"device":"an-ordinary-cpu-2c","subject":"{subject}","metric":"perplexity","value":{value:?},"unit":"nats","spread":null,"count":16384,"run":null}}"#,
            time / 60,
            time % 60
        ) + "\n"
    }

    fn folder(files: &[(&str, String)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            cotk_run::files::write_atomic(dir.path().join(name), text.as_bytes()).unwrap();
        }
        dir
    }

    #[test]
    fn the_latest_row_of_a_commit_wins_by_time_then_by_line() {
        let one = line(5, "a", "x", 1.0) + &line(4, "a", "x", 2.0) + &line(9, "b", "x", 3.0) + &line(1, "a", "y", 4.0);
        let two = line(5, "a", "x", 5.0) + &line(2, "a", "z", 6.0);
        let dir = folder(&[("rows.jsonl", one), ("zz.jsonl", two), ("notes.txt", "no row".into())]);
        let ledger = Ledger::open(dir.path()).unwrap();
        let latest = |commit| {
            let rows = ledger.latest(commit).unwrap();
            rows.into_iter().map(|r| (r.subject, r.value)).collect::<Vec<_>>()
        };
        assert_eq!(latest("a"), [("y".into(), 4.0), ("z".into(), 6.0), ("x".into(), 5.0)]);
        assert_eq!(latest("b"), [("x".into(), 3.0)]);
        assert_eq!(latest("c"), []);
        let history: Vec<f64> = ledger
            .history("x", "perplexity")
            .unwrap()
            .iter()
            .map(|r| r.value)
            .collect();
        assert_eq!(history, [2.0, 1.0, 5.0, 3.0]);
    }

    #[test]
    fn a_broken_line_in_the_middle_is_an_error_with_its_number() {
        let good = line(1, "a", "x", 1.0);
        let unknown = good.replace("\"unit\"", "\"units\"");
        for broken in [
            "{\n".to_owned(),
            "\n".to_owned(),
            "[]\n".to_owned(),
            unknown,
            "\u{0}\n".to_owned(),
        ] {
            let dir = folder(&[("rows.jsonl", format!("{good}{broken}{good}"))]);
            let text = Ledger::open(dir.path()).unwrap_err().to_string();
            assert!(text.contains("rows.jsonl:2"), "{text}");
        }
        let endless = folder(&[("rows.jsonl", good + &"x".repeat(70_000))]);
        assert!(
            Ledger::open(endless.path())
                .unwrap_err()
                .to_string()
                .contains("rows.jsonl:2")
        );
    }

    #[test]
    fn nothing_is_an_empty_ledger() {
        let dir = tempfile::tempdir().unwrap();
        for folder in [dir.path().to_owned(), dir.path().join("not there")] {
            let ledger = Ledger::open(folder).unwrap();
            assert_eq!((ledger.row_count(), ledger.latest("a").unwrap().len()), (0, 0));
            assert!(ledger.history("x", "perplexity").unwrap().is_empty());
        }
    }

    /// Many chunks; sized so that an accidental square in the reader or the query is felt.
    #[test]
    fn a_hundred_thousand_rows_read_and_answer() {
        let mut text = String::new();
        for i in 0..100_000u32 {
            let commit = if i % 2 == 0 { "even" } else { "odd" };
            let _ = write!(
                text,
                "{}",
                line(i % 3600, commit, &format!("subject {}", i % 1000), f64::from(i))
            );
        }
        let dir = folder(&[("rows.jsonl", text)]);
        let ledger = Ledger::open(dir.path()).unwrap();
        assert_eq!(ledger.row_count(), 100_000);
        let rows = ledger.latest("odd").unwrap();
        assert_eq!(rows.len(), 500);
        for row in rows {
            let own: u32 = row.subject.trim_start_matches("subject ").parse().unwrap();
            let expected = (0..100_000u32)
                .filter(|i| i % 1000 == own)
                .max_by_key(|i| (i % 3600, *i))
                .unwrap();
            assert_eq!(row.value, f64::from(expected), "{own}");
        }
    }
}
