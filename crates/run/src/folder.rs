//! Run folders (`runs/<name>-<utc>-<short hash>/`) and locks on folders.

use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::files;
use crate::{Error, Result};

/// `$COTK_RUNS`, else `runs` in the current folder.
pub fn runs_root() -> PathBuf {
    std::env::var_os("COTK_RUNS")
        .filter(|v| !v.is_empty())
        .map_or_else(|| "runs".into(), PathBuf::from)
}

/// One run's folder, locked while this value lives.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: FolderLock,
}

impl RunFolder {
    /// Makes `runs/<name>-<utc>-<short hash>/` with its resolved recipe in it.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be made.
    pub fn create(root: &Path, name: &str, hash: u64, resolved_recipe: &str) -> Result<Self> {
        let stem = format!("{name}-{}-{:08x}", utc_compact(SystemTime::now()), hash >> 32);
        // Two runs of one recipe in one second: the second gets a suffix.
        let path = (0..)
            .map(|i| root.join(if i == 0 { stem.clone() } else { format!("{stem}-{i}") }))
            .find(|path| !path.exists())
            .expect("some number is free");
        files::create_folder(&path)?;
        let lock = FolderLock::take(&path)?;
        files::write_atomic(path.join("recipe.toml"), resolved_recipe.as_bytes())?;
        Ok(Self { path, _lock: lock })
    }

    /// Opens an existing run to go on with it.
    ///
    /// # Errors
    /// [`Error::Locked`] when another process works in it.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            _lock: FolderLock::take(path)?,
        })
    }

    /// Unfinished runs (no `result.json`) of this name and hash, newest first.
    ///
    /// # Errors
    /// [`Error::Io`] when the root cannot be listed.
    pub fn unfinished(root: &Path, name: &str, hash: u64) -> Result<Vec<PathBuf>> {
        if !root.exists() {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        for entry in std::fs::read_dir(root).map_err(Error::io("list", root))? {
            let path = entry.map_err(Error::io("list", root))?.path();
            let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let hash = format!("{:08x}", hash >> 32);
            let is_ours = file_name
                .strip_prefix(name)
                .and_then(|rest| rest.strip_prefix('-'))
                .is_some_and(|rest| {
                    let mut parts = rest.split('-');
                    parts.next().is_some_and(|utc| utc.len() == 16) && parts.next() == Some(&hash)
                });
            if is_ours && path.join("recipe.toml").exists() && !path.join("result.json").exists() {
                found.push(path);
            }
        }
        found.sort();
        found.reverse();
        Ok(found)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// An exclusive lock on a folder (`.lock` in it holds the process id); released when dropped or when the process dies.
#[derive(Debug)]
pub struct FolderLock(#[expect(dead_code, reason = "the lock lives as long as the open file")] std::fs::File);

impl FolderLock {
    /// Takes the lock without waiting.
    ///
    /// # Errors
    /// [`Error::Locked`] with the holder's process id.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(".lock");
        let mut file = loop {
            let mut file = std::fs::OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)
                .map_err(Error::io("open", &path))?;
            // SAFETY: `file` is open, so its descriptor is valid for the call.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
                let mut holder = String::new();
                let _ = (&mut file).take(32).read_to_string(&mut holder);
                return Err(Error::Locked {
                    file: folder.to_owned(),
                    holder: holder.trim().to_owned(),
                });
            }
            // The last holder may have removed the folder between the two steps: its lock then guards nothing.
            let held = file.metadata().map_err(Error::io("read", &path))?.ino();
            if path.metadata().is_ok_and(|found| found.ino() == held) {
                break file;
            }
        };
        let fail = |source| Error::Io {
            action: "write",
            file: path.clone(),
            source,
        };
        file.set_len(0).map_err(fail)?;
        file.rewind().map_err(fail)?;
        write!(file, "{}", std::process::id()).map_err(fail)?;
        Ok(Self(file))
    }
}

/// `20261121T134500Z`: sorts by time, fits a file name.
pub fn utc_compact(time: SystemTime) -> String {
    let [year, month, day, hour, minute, second] = civil(time);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}

/// `2026-11-21T13:45:00Z` (RFC 3339).
pub fn utc_rfc3339(time: SystemTime) -> String {
    let [year, month, day, hour, minute, second] = civil(time);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Days to civil date: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn civil(time: SystemTime) -> [i64; 6] {
    let seconds = time
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX));
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let mp = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    [year, month, day, rest / 3600, rest / 60 % 60, rest % 60]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_match_known_ones() {
        let at = |seconds| utc_rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_795_268_727), "2026-11-21T13:45:27Z");
    }

    #[test]
    fn unfinished_runs_are_those_of_this_name_and_hash_without_a_result() {
        let dir = tempfile::tempdir().unwrap();
        let one = RunFolder::create(dir.path(), "quick-start", 7 << 32, "seed = 1").unwrap();
        let two = RunFolder::create(dir.path(), "quick-start", 7 << 32, "seed = 1").unwrap();
        RunFolder::create(dir.path(), "quick", 7 << 32, "").unwrap();
        RunFolder::create(dir.path(), "quick-start", 8 << 32, "").unwrap();
        files::write_atomic(two.path().join("result.json"), b"{}").unwrap();
        assert_eq!(
            RunFolder::unfinished(dir.path(), "quick-start", 7 << 32).unwrap(),
            [one.path()]
        );
    }

    #[test]
    fn a_folder_has_one_holder() {
        let dir = tempfile::tempdir().unwrap();
        let held = FolderLock::take(dir.path()).unwrap();
        let text = FolderLock::take(dir.path()).unwrap_err().to_string();
        assert!(text.contains(&std::process::id().to_string()), "{text}");
        drop(held);
        FolderLock::take(dir.path()).unwrap();
    }
}
