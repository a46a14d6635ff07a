//! What a process may ask of the operating system beyond files' bytes: the core that a thread stays on, pages that a cache
//! forgets, two folders exchanged in one step. Law: what is refused is an error or `false`, never silently something else.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::files::{Op, fault_point, sync_folder};
use crate::{Error, Result};

/// A thread that stays on one core until this is dropped. Threads that it starts meanwhile stay there too.
#[derive(Debug)]
pub struct Pinned {
    before: libc::cpu_set_t,
    core: usize,
    /// A mask is a thread's own.
    of_this_thread: PhantomData<*const ()>,
}

impl Pinned {
    /// Keeps this thread on the core that it runs on.
    ///
    /// # Errors
    /// The system refuses: in some containers it does.
    pub fn here() -> io::Result<Self> {
        // SAFETY: takes nothing and touches no memory of ours.
        let core = unsafe { libc::sched_getcpu() };
        let core = usize::try_from(core).map_err(|_| io::Error::last_os_error())?;
        Self::to(core)
    }

    /// Keeps this thread on `core`.
    ///
    /// # Errors
    /// As [`here`](Self::here); a core that this process may not use.
    pub fn to(core: usize) -> io::Result<Self> {
        let before = mask()?;
        if core >= libc::CPU_SETSIZE as usize {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut only = no_cores();
        // SAFETY: `core` is below the number of bits in the set.
        unsafe { libc::CPU_SET(core, &mut only) };
        set_mask(&only)?;
        Ok(Self {
            before,
            core,
            of_this_thread: PhantomData,
        })
    }

    /// Which core.
    pub fn core(&self) -> usize {
        self.core
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // It was this thread's mask a moment ago; a group that has shrunk since takes what is left of it.
        let _ = set_mask(&self.before);
    }
}

/// The cores that this thread may run on, ascending; none where the system does not tell.
pub fn cores() -> Vec<usize> {
    let Ok(mask) = mask() else { return Vec::new() };
    // SAFETY: every index is below the number of bits in the set.
    let is_allowed = |core: &usize| unsafe { libc::CPU_ISSET(*core, &mask) };
    (0..libc::CPU_SETSIZE as usize).filter(is_allowed).collect()
}

fn no_cores() -> libc::cpu_set_t {
    // SAFETY: a set of bits; all of them zero is a value of it.
    unsafe { std::mem::zeroed() }
}

fn mask() -> io::Result<libc::cpu_set_t> {
    let mut mask = no_cores();
    // SAFETY: 0 is this thread; the size is that of the set behind the pointer.
    let status = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut mask) };
    if status == 0 {
        Ok(mask)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn set_mask(mask: &libc::cpu_set_t) -> io::Result<()> {
    // SAFETY: 0 is this thread; the size is that of the set behind the pointer.
    let status = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), mask) };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Keeps memory that this process frees for its next use: whoever allocates hundreds of MiB again and again spends more time
/// on fresh pages than on filling them. For processes that end soon; elsewhere than on glibc nothing happens.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for parameter in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: takes two numbers; one that it does not know it refuses.
        unsafe { libc::mallopt(parameter, i32::MAX) };
    }
}

/// Asks that a file's clean pages leave the page cache, and that reads fetch nothing around them.
///
/// # Errors
/// The file system does not do that.
pub fn forget_pages(file: &File) -> io::Result<()> {
    for advice in [libc::POSIX_FADV_RANDOM, libc::POSIX_FADV_DONTNEED] {
        // SAFETY: the descriptor is open; the call takes no pointer.
        let status = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) };
        if status != 0 {
            return Err(io::Error::from_raw_os_error(status));
        }
    }
    Ok(())
}

/// Involuntary switches of this thread so far; 0 where the system does not tell.
pub fn involuntary_switches() -> u64 {
    // SAFETY: plain numbers; all of them zero is a value of it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is whole and lives for the call.
    let status = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    if status == 0 {
        u64::try_from(usage.ru_nivcsw).unwrap_or(0)
    } else {
        0
    }
}

/// Exchanges two folders in one step, so that both names stand at every moment, and syncs their parents. `false` where the
/// file system cannot: nothing has happened then.
///
/// # Errors
/// [`Error::Io`] with the second name.
pub fn exchange_folders(new: &Path, folder: &Path) -> Result<bool> {
    use std::os::unix::ffi::OsStrExt;
    let fail = |source| Error::io("rename into place", folder)(source);
    fault_point(Op::Rename).map_err(fail)?;
    let text = |path: &Path| std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(|e| fail(e.into()));
    let (a, b) = (text(new)?, text(folder)?);
    // SAFETY: both are strings that end in zero and live for the call.
    let status = unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            a.as_ptr(),
            libc::AT_FDCWD,
            b.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    if status != 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::EINVAL | libc::ENOSYS | libc::ENOTSUP) => Ok(false),
            _ => Err(fail(error)),
        };
    }
    for path in [new, folder] {
        sync_folder(path.parent().unwrap_or(Path::new(".")))?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_stays_where_it_is_and_is_free_again() {
        let before = cores();
        assert!(!before.is_empty());
        if let Ok(pinned) = Pinned::here() {
            assert_eq!(cores(), [pinned.core()]);
            // What it starts meanwhile stays there as well.
            assert_eq!(std::thread::spawn(cores).join().unwrap(), [pinned.core()]);
            drop(pinned);
            assert_eq!(cores(), before);
        }
        assert!(Pinned::to(1 << 20).is_err());
        assert_eq!(cores(), before);
    }

    #[test]
    fn folders_are_exchanged_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for folder in [&a, &b] {
            crate::files::create_folder(folder).unwrap();
            crate::files::write_atomic(folder.join("name"), folder.as_os_str().as_encoded_bytes()).unwrap();
        }
        let was = crate::files::read_text(a.join("name"), 4096).unwrap();
        if exchange_folders(&a, &b).unwrap() {
            assert_eq!(crate::files::read_text(b.join("name"), 4096).unwrap(), was);
        }
        assert!(exchange_folders(&dir.path().join("nothing"), &b).is_err());
        assert!(b.join("name").exists());
    }

    #[test]
    fn switches_are_counted_and_pages_forgotten() {
        assert!(involuntary_switches() <= involuntary_switches());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        crate::files::write_atomic(&path, b"text").unwrap();
        forget_pages(&crate::files::open(&path).unwrap()).unwrap();
    }
}
