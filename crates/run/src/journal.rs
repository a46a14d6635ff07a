//! What is finished, one JSON line each, synced before the next step begins. Law: a torn last line (the process died
//! while writing) is dropped on open; a broken line before it is an error with its number.

use std::io::{Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::files::{self, Op, fault_point};
use crate::{Error, Result};

/// No journal of ours comes near this.
const LIMIT_BYTES: u64 = 1 << 30;

/// An append-only list of entries of one type on disk.
#[derive(Debug)]
pub struct Journal<T> {
    path: PathBuf,
    file: std::fs::File,
    entry: PhantomData<fn(&T)>,
}

impl<T: Serialize + DeserializeOwned> Journal<T> {
    /// Opens or creates the journal and returns what is already finished.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Journal`] for a line that is not an entry and not the torn last one.
    pub fn open(path: impl AsRef<Path>) -> Result<(Self, Vec<T>)> {
        let path = path.as_ref().to_owned();
        let bytes = if path.exists() {
            files::read(&path, LIMIT_BYTES)?
        } else {
            Vec::new()
        };
        let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        let mut entries = Vec::new();
        for (index, line) in bytes[..whole]
            .split(|&b| b == b'\n')
            .filter(|line| !line.is_empty())
            .enumerate()
        {
            let entry = serde_json::from_slice(line).map_err(|e| Error::Journal {
                file: path.clone(),
                line: index + 1,
                detail: e.to_string(),
            })?;
            entries.push(entry);
        }
        let fail = |source| Error::Io {
            action: "open",
            file: path.clone(),
            source,
        };
        fault_point(Op::Open).map_err(fail)?;
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(fail)?;
        file.set_len(whole as u64).map_err(fail)?;
        file.seek(SeekFrom::End(0)).map_err(fail)?;
        Ok((
            Self {
                path,
                file,
                entry: PhantomData,
            },
            entries,
        ))
    }

    /// Appends one entry and syncs it.
    ///
    /// # Errors
    /// [`Error::Io`]; what stood before is not touched.
    pub fn append(&mut self, entry: &T) -> Result<()> {
        let mut line = serde_json::to_vec(entry).map_err(|e| Error::Io {
            action: "encode an entry of",
            file: self.path.clone(),
            source: e.into(),
        })?;
        line.push(b'\n');
        fault_point(Op::Write)
            .and_then(|()| self.file.write_all(&line))
            .map_err(Error::io("write", &self.path))?;
        fault_point(Op::Sync)
            .and_then(|()| self.file.sync_data())
            .map_err(Error::io("sync", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_last_line_is_dropped_at_every_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.jsonl");
        let whole = b"[1]\n[2]\n[3]\n";
        for cut in 0..=whole.len() {
            files::write_atomic(&path, &whole[..cut]).unwrap();
            let (mut journal, entries) = Journal::<Vec<u32>>::open(&path).unwrap();
            assert_eq!(entries.len(), cut / 4);
            journal.append(&vec![9]).unwrap();
            let (_, again) = Journal::<Vec<u32>>::open(&path).unwrap();
            assert_eq!(again.len(), cut / 4 + 1);
            assert_eq!(again.last(), Some(&vec![9]));
        }
    }

    #[test]
    fn a_broken_line_in_the_middle_is_an_error_with_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.jsonl");
        files::write_atomic(&path, b"[1]\n[oops\n[3]\n").unwrap();
        assert!(
            Journal::<Vec<u32>>::open(&path)
                .unwrap_err()
                .to_string()
                .contains("journal.jsonl:2")
        );
    }
}
