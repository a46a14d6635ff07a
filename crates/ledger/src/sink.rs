//! Writing rows: one synced line each, appended to `rows.jsonl` under a file lock, so that several programs may write
//! at once. Law: whatever stops a writer, every line but a torn last one is whole, and the next writer drops that one.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use cotk_run::facts::{Fact, FactSink};
use cotk_run::files::{self, Op, fault_point};
use cotk_run::folder::{runs_root, utc_rfc3339};
use cotk_run::{Error, Result};

use crate::{Provenance, Row};

/// `$COTK_RUNS/ledger`, else `runs/ledger`.
pub fn default_folder() -> PathBuf {
    runs_root().join("ledger")
}

/// Appends the facts of one run to a ledger.
#[derive(Debug)]
pub struct LedgerSink {
    path: PathBuf,
    provenance: Provenance,
    /// Locked between programs by the file lock, between threads of this one by the mutex.
    file: Mutex<File>,
}

impl LedgerSink {
    /// Opens or creates `folder/rows.jsonl`.
    ///
    /// # Errors
    /// [`Error::Io`] with the file or folder.
    pub fn open(folder: impl AsRef<Path>, provenance: Provenance) -> Result<Self> {
        files::create_folder(folder.as_ref())?;
        let path = folder.as_ref().join("rows.jsonl");
        let is_new = !path.exists();
        let file = fault_point(Op::Open)
            .and_then(|()| {
                File::options()
                    .create(true)
                    .read(true)
                    .write(true)
                    .truncate(false)
                    .open(&path)
            })
            .map_err(Error::io("open", &path))?;
        if is_new {
            files::sync_folder(folder.as_ref())?;
        }
        Ok(Self {
            path,
            provenance,
            file: Mutex::new(file),
        })
    }

    /// Where the rows go.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl FactSink for LedgerSink {
    /// # Errors
    /// [`Error::Io`]: a full disk, or a value or spread that is not finite (no number to compare with later).
    fn record(&self, fact: Fact) -> Result<()> {
        for (name, number) in [("value", Some(fact.value)), ("spread", fact.spread)] {
            if let Some(number) = number.filter(|x| !x.is_finite()) {
                let text = format!(
                    "{name} of {} {} is {number}, expected a finite number",
                    fact.subject, fact.metric
                );
                return Err(Error::io("record in", &self.path)(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    text,
                )));
            }
        }
        let row = Row::new(&self.provenance, utc_rfc3339(SystemTime::now()), fact);
        let mut line = serde_json::to_vec(&row).map_err(|e| Error::io("encode a row of", &self.path)(e.into()))?;
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.lock().map_err(Error::io("lock", &self.path))?;
        let appended = append(&mut file, &line);
        let unlocked = file.unlock().map_err(Error::io("unlock", &self.path));
        appended.map_err(Error::io("write", &self.path))?;
        unlocked
    }
}

/// The caller holds the lock. On failure the file ends where it ended before.
fn append(file: &mut File, line: &[u8]) -> io::Result<()> {
    let end = end_of_last_line(file)?;
    let written = fault_point(Op::Write)
        .and_then(|()| file.seek(SeekFrom::Start(end)))
        .and_then(|_| file.write_all(line))
        .and_then(|()| file.set_len(end + line.len() as u64))
        .and_then(|()| fault_point(Op::Sync))
        .and_then(|()| file.sync_data());
    if written.is_err() {
        let _ = file.set_len(end); // the first error is the one to tell; a torn line is tolerated anyway
    }
    written
}

/// Offset behind the last newline: what stands after it is the torn line of a writer that died.
fn end_of_last_line(file: &mut File) -> io::Result<u64> {
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut block = [0u8; 4096];
    while end > 0 {
        let count = end.min(block.len() as u64);
        file.seek(SeekFrom::Start(end - count))?;
        let block = &mut block[..usize::try_from(count).expect("at most 4096")];
        file.read_exact(block)?;
        if let Some(at) = block.iter().rposition(|&b| b == b'\n') {
            return Ok(end - count + at as u64 + 1);
        }
        end -= count;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ledger;

    fn sink(folder: &Path) -> LedgerSink {
        let provenance = Provenance {
            cotk_version: "0.1.0".into(),
            commit: "abc".into(),
            build: Some("b1".into()),
            command: "cotk eval".into(),
            recipe_hash: Some(0x12),
            inputs: Some(0xab),
            seed: Some(u64::MAX),
            device: "cpu".into(),
            run: None,
        };
        LedgerSink::open(folder, provenance).unwrap()
    }

    #[test]
    fn a_recorded_row_reads_back_to_the_same_bits() {
        let dir = tempfile::tempdir().unwrap();
        let values = [0.1 + 0.2, -0.0, 1e-300, f64::MAX, 2.0f64.powi(53) - 1.0, 1.0 / 3.0];
        for (i, &value) in values.iter().enumerate() {
            let fact = Fact::new("s\n\"ü", format!("m{i}"), value, "nats")
                .spread(value.abs())
                .count(7);
            sink(dir.path()).record(fact).unwrap();
        }
        let rows = Ledger::open(dir.path()).unwrap().latest("abc").unwrap();
        assert_eq!(rows.len(), values.len());
        for (row, value) in rows.iter().zip(values) {
            assert_eq!(row.value.to_bits(), value.to_bits());
            assert_eq!(row.spread, Some(value.abs()));
            assert_eq!(
                (row.seed, row.count, row.run.as_deref()),
                (Some(u64::MAX), Some(7), None)
            );
            assert_eq!(
                (row.subject.as_str(), row.recipe_hash.as_deref()),
                ("s\n\"ü", Some("0000000000000012"))
            );
        }
    }

    #[test]
    fn a_torn_last_line_is_dropped_wherever_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let one = sink(dir.path());
        one.record(Fact::new("s", "a", 1.0, "ms")).unwrap();
        let first = files::read(one.path(), 1 << 20).unwrap().len();
        one.record(Fact::new("s", "b", 2.0, "ms")).unwrap();
        let whole = files::read(one.path(), 1 << 20).unwrap();
        for cut in (first..whole.len()).step_by(9).chain([whole.len() - 1]) {
            let torn = tempfile::tempdir().unwrap();
            files::write_atomic(torn.path().join("rows.jsonl"), &whole[..cut]).unwrap();
            assert_eq!(Ledger::open(torn.path()).unwrap().row_count(), 1, "cut at {cut}");
            sink(torn.path()).record(Fact::new("s", "c", 3.0, "ms")).unwrap();
            let rows = Ledger::open(torn.path()).unwrap().latest("abc").unwrap();
            assert_eq!(
                rows.iter().map(|r| r.value).collect::<Vec<_>>(),
                [1.0, 3.0],
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn writers_at_once_lose_no_row() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let sink = sink(dir.path()); // a handle of its own, as another program would have
                scope.spawn(move || {
                    for i in 0..25 {
                        sink.record(Fact::new(format!("s{writer}"), format!("m{i}"), 1.0, "ms"))
                            .unwrap();
                    }
                });
            }
        });
        assert_eq!(Ledger::open(dir.path()).unwrap().latest("abc").unwrap().len(), 100);
    }

    #[test]
    fn what_is_not_a_number_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let sink = sink(dir.path());
        for fact in [
            Fact::new("s", "m", f64::NAN, "ms"),
            Fact::new("s", "m", 1.0, "ms").spread(f64::INFINITY),
        ] {
            let text = sink.record(fact).unwrap_err().to_string();
            assert!(text.contains("s m is") && text.contains("rows.jsonl"), "{text}");
        }
        assert_eq!(Ledger::open(dir.path()).unwrap().row_count(), 0);
    }
}
