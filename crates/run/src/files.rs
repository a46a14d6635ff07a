//! File access with names in its errors, atomic replacement, and injected faults. Law: a file under its final name
//! is whole: temporary file in the same folder, sync, rename, sync of the folder.
//!
//! `COTK_IO_FAULT=<op>:<n>[:<errno>]` makes the n-th operation of that kind (`read`, `open`, `write`, `sync`,
//! `rename`) of the process fail, by default with "no space left on device": tests walk n until a run meets no fault.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// The kinds of operation that a fault can be injected into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Open,
    Read,
    Write,
    Sync,
    Rename,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Read => "read",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Rename => "rename",
        }
    }
}

struct Injected {
    op: String,
    at: u64,
    errno: i32,
    seen: AtomicU64,
}

/// Fails if the environment asks for a fault at this operation. For code with file handles of its own.
///
/// # Errors
/// The injected error, never in production.
pub fn fault_point(op: Op) -> io::Result<()> {
    static INJECTED: OnceLock<Option<Injected>> = OnceLock::new();
    let Some(fault) = INJECTED.get_or_init(|| parse_fault(&std::env::var("COTK_IO_FAULT").ok()?)) else {
        return Ok(());
    };
    if fault.op == op.name() && fault.seen.fetch_add(1, Ordering::Relaxed) + 1 == fault.at {
        return Err(io::Error::from_raw_os_error(fault.errno));
    }
    Ok(())
}

fn parse_fault(text: &str) -> Option<Injected> {
    let mut parts = text.split(':');
    Some(Injected {
        op: parts.next()?.to_owned(),
        at: parts.next()?.parse().ok()?,
        errno: parts.next().map_or(Some(libc::ENOSPC), |errno| errno.parse().ok())?,
        seen: AtomicU64::new(0),
    })
}

/// Reads a whole file of at most `limit_bytes`.
///
/// # Errors
/// [`Error::Io`], or [`Error::TooLarge`] before anything is read.
pub fn read(path: impl AsRef<Path>, limit_bytes: u64) -> Result<Vec<u8>> {
    let path = path.as_ref();
    let fail = |source| Error::Io {
        action: "read",
        file: path.to_owned(),
        source,
    };
    fault_point(Op::Read).map_err(fail)?;
    let file = open(path)?;
    let found = file.metadata().map_err(fail)?;
    if found.is_dir() {
        return Err(fail(io::Error::new(
            io::ErrorKind::IsADirectory,
            "is a folder, expected a file",
        )));
    }
    if found.len() > limit_bytes {
        return Err(Error::TooLarge {
            file: path.to_owned(),
            found: found.len(),
            limit: limit_bytes,
        });
    }
    let mut bytes = Vec::new();
    // A pipe or a growing file has no true length: the limit holds for what is read too.
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > limit_bytes {
        return Err(Error::TooLarge {
            file: path.to_owned(),
            found: bytes.len() as u64,
            limit: limit_bytes,
        });
    }
    Ok(bytes)
}

/// Reads a UTF-8 text file of at most `limit_bytes`.
///
/// # Errors
/// As [`read`], and for bytes that are not UTF-8 (with their offset).
pub fn read_text(path: impl AsRef<Path>, limit_bytes: u64) -> Result<String> {
    let path = path.as_ref();
    String::from_utf8(read(path, limit_bytes)?).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::Io {
            action: "read",
            file: path.to_owned(),
            source: io::Error::new(io::ErrorKind::InvalidData, format!("not UTF-8 at byte {at}")),
        }
    })
}

/// Opens a file for reading.
///
/// # Errors
/// [`Error::Io`] with the file's name.
#[expect(clippy::disallowed_methods, reason = "the one place that adds the name itself")]
pub fn open(path: impl AsRef<Path>) -> Result<std::fs::File> {
    let path = path.as_ref();
    fault_point(Op::Open)
        .and_then(|()| std::fs::File::open(path))
        .map_err(Error::io("open", path))
}

/// Replaces `path` by `bytes`, whole or not at all. A link is followed; a device or a pipe cannot be replaced and is
/// written to as it is.
///
/// # Errors
/// [`Error::Io`]; the old file then stands, and no temporary file is left.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    if is_device_or_pipe(path) {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(Error::io("open", path))?;
        return file.write_all(bytes).map_err(Error::io("write", path));
    }
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).map_err(Error::io("write", file.path.clone()))?;
    file.commit()
}

fn is_device_or_pipe(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// Where a link points, so that its target is replaced and the link stays.
fn behind_links(path: &Path) -> Result<PathBuf> {
    if path.is_symlink() {
        path.canonicalize().map_err(Error::io("follow the link", path))
    } else {
        Ok(path.to_owned())
    }
}

/// A file under construction: appears under its name on [`commit`](Self::commit), is removed when dropped before.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    file: Option<io::BufWriter<std::fs::File>>,
    written: u64,
}

impl AtomicFile {
    /// Begins `path` as a temporary file beside it. A link is followed.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder does not take a file, or `path` is there and no regular file.
    #[expect(clippy::disallowed_methods, reason = "the one writer")]
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let path = behind_links(path.as_ref())?;
        if path.exists() && !path.is_file() {
            let source = io::Error::new(
                io::ErrorKind::InvalidInput,
                "is there, and no regular file that could be replaced",
            );
            return Err(Error::Io {
                action: "replace",
                file: path,
                source,
            });
        }
        let mut name = path.as_os_str().to_owned();
        name.push(format!(
            ".tmp-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        ));
        let temporary = PathBuf::from(name);
        let file = fault_point(Op::Open)
            .and_then(|()| std::fs::File::create(&temporary))
            .map_err(Error::io("create", &path))?;
        Ok(Self {
            path,
            temporary,
            file: Some(io::BufWriter::with_capacity(1 << 20, file)),
            written: 0,
        })
    }

    /// Bytes written so far: the offset of the next one.
    pub fn position(&self) -> u64 {
        self.written
    }

    /// The final name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes, syncs, renames to the final name, syncs the folder.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is then left under the temporary name, and the final name is as it was.
    #[expect(clippy::disallowed_methods, reason = "the one writer")]
    pub fn commit(mut self) -> Result<()> {
        let fail = |action, source| Error::Io {
            action,
            file: self.path.clone(),
            source,
        };
        let mut writer = self.file.take().expect("taken only here and in drop");
        writer.flush().map_err(|e| fail("write", e))?;
        let file = writer.into_inner().map_err(|e| fail("write", e.into_error()))?;
        fault_point(Op::Sync)
            .and_then(|()| file.sync_all())
            .map_err(|e| fail("sync", e))?;
        drop(file);
        fault_point(Op::Rename)
            .and_then(|()| std::fs::rename(&self.temporary, &self.path))
            .map_err(|e| fail("rename into place", e))?;
        sync_folder(self.path.parent().unwrap_or(Path::new(".")))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        fault_point(Op::Write)?;
        let count = self.file.as_mut().expect("open until commit").write(bytes)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().expect("open until commit").flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        // After a commit the temporary name is gone and this finds nothing.
        drop(self.file.take());
        let _ = std::fs::remove_file(&self.temporary);
    }
}

/// Makes renames and new files in `folder` durable.
///
/// # Errors
/// [`Error::Io`] with the folder's name.
pub fn sync_folder(folder: &Path) -> Result<()> {
    let folder = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    fault_point(Op::Sync)
        .and_then(|()| open_folder(folder)?.sync_all())
        .map_err(Error::io("sync", folder))
}

#[expect(clippy::disallowed_methods, reason = "named by its caller")]
fn open_folder(folder: &Path) -> io::Result<std::fs::File> {
    std::fs::File::open(folder)
}

/// Renames a finished folder into place and syncs its parent.
///
/// # Errors
/// [`Error::Io`] with the final name.
#[expect(clippy::disallowed_methods, reason = "the one place that renames")]
pub fn publish_folder(partial: &Path, folder: &Path) -> Result<()> {
    fault_point(Op::Rename)
        .and_then(|()| std::fs::rename(partial, folder))
        .map_err(Error::io("rename into place", folder))?;
    sync_folder(folder.parent().unwrap_or(Path::new(".")))
}

/// Creates a folder and its parents.
///
/// # Errors
/// [`Error::Io`] with the folder's name.
pub fn create_folder(folder: &Path) -> Result<()> {
    fault_point(Op::Open)
        .and_then(|()| std::fs::create_dir_all(folder))
        .map_err(Error::io("create folder", folder))
}

/// Free bytes for this user on the file system that holds `path` (or its nearest existing parent).
///
/// # Errors
/// [`Error::Io`] when the file system cannot be asked.
pub fn free_bytes(path: &Path) -> Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let absolute = std::path::absolute(path).map_err(Error::io("resolve", path))?;
    let existing = absolute.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let name = std::ffi::CString::new(existing.as_os_str().as_bytes()).map_err(|e| Error::Io {
        action: "resolve",
        file: path.to_owned(),
        source: e.into(),
    })?;
    // SAFETY: all-zero is a valid `statvfs` for the system to fill.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `name` is NUL-terminated and `stat` lives through the call.
    if unsafe { libc::statvfs(name.as_ptr(), &mut stat) } != 0 {
        return Err(Error::Io {
            action: "ask for free space of",
            file: existing.to_owned(),
            source: io::Error::last_os_error(),
        });
    }
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Peak resident memory of this process in bytes; 0 where `/proc` does not tell.
pub fn peak_rss_bytes() -> u64 {
    let Ok(status) = read_text("/proc/self/status", 1 << 20) else {
        return 0;
    };
    let kib = status.lines().find_map(|line| {
        line.strip_prefix("VmHWM:")?
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()
    });
    kib.unwrap_or(0) * 1024
}

/// `$XDG_CACHE_HOME/cotk`, else `~/.cache/cotk`; `None` without a home.
pub fn cache_folder() -> Option<PathBuf> {
    home_folder("XDG_CACHE_HOME", ".cache")
}

/// `$XDG_DATA_HOME/cotk`, else `~/.local/share/cotk`; `None` without a home.
pub fn data_folder() -> Option<PathBuf> {
    home_folder("XDG_DATA_HOME", ".local/share")
}

fn home_folder(variable: &str, below_home: &str) -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    Some(
        set(variable)
            .or_else(|| Some(set("HOME")?.join(below_home)))?
            .join("cotk"),
    )
}

/// xxh3-64 of some bytes: the checksum of every format of ours.
pub fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}

/// xxh3-64 of a file, read in pieces.
///
/// # Errors
/// [`Error::Io`] with the file's name.
pub fn checksum_file(path: &Path) -> Result<u64> {
    let mut file = open(path)?;
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let count = fault_point(Op::Read)
            .and_then(|()| file.read(&mut buffer))
            .map_err(Error::io("read", path))?;
        if count == 0 {
            return Ok(hash.digest());
        }
        hash.update(&buffer[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_file_leaves_the_old_one_and_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"new, but not whole").unwrap();
        drop(file);
        assert_eq!(read(&path, 100).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_stays_and_its_target_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        write_atomic(&target, b"old").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        write_atomic(&link, b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!(read(&target, 100).unwrap(), b"new");
        assert!(AtomicFile::create(dir.path()).is_err(), "a folder is not replaced");
    }

    #[test]
    fn a_pipe_is_written_to_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: `name` is NUL-terminated.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let reader = std::thread::spawn({
            let path = path.clone();
            move || std::io::read_to_string(std::fs::OpenOptions::new().read(true).open(path).unwrap()).unwrap()
        });
        write_atomic(&path, b"through").unwrap();
        assert_eq!(reader.join().unwrap(), "through");
        assert!(is_device_or_pipe(&path));
    }

    #[test]
    fn commit_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&path, b"old").unwrap();
        write_atomic(&path, b"new").unwrap();
        assert_eq!(read(&path, 100).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_above_the_limit_is_refused_with_both_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&path, b"12345").unwrap();
        let text = read(&path, 4).unwrap_err().to_string();
        assert!(text.contains("5 bytes, expected at most 4"), "{text}");
    }

    #[test]
    fn errors_name_the_file() {
        assert!(
            read("/nowhere/at/all", 1)
                .unwrap_err()
                .to_string()
                .contains("/nowhere/at/all")
        );
    }

    #[test]
    fn a_file_and_its_bytes_have_one_checksum() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| i.to_le_bytes()[1]).collect();
        write_atomic(&path, &bytes).unwrap();
        assert_eq!(checksum_file(&path).unwrap(), checksum(&bytes));
    }
}
