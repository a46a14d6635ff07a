//! Reading speed of a disk: direct, aligned reads of regions in random order from a file that this probe writes and that has no name,
//! each region for the first time, and once more right behind. Where direct reads are refused the page cache is told to
//! forget the file, and the tier says so. What was read is held against what the system counts.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use cotk_run::seeds::{Seeds, Stream};
use cotk_run::system::forget_pages;
use rand::seq::SliceRandom;

use super::{Prepared, Probe};
use crate::Result;
use crate::work::{Key, ReadKey, Tier};

/// Direct reads must begin and end at multiples of this.
const ALIGN: usize = 4096;
/// The file is handed out in pieces of this size, in random order.
const PIECE: u64 = 16 << 20;
/// Reads in a row of each request in flight, where there are several: starting them together takes its time too.
const BURST: usize = 2;
/// Bytes in flight at most, where several requests are.
const IN_FLIGHT: u64 = 4 << 20;

/// Reads a file of its own in one folder.
#[derive(Debug)]
pub struct DiskProbe {
    /// The file under a name that only this process has: it has none in its folder, so that nothing is left of it.
    file: PathBuf,
    /// Keeps it.
    _held: File,
    bytes: u64,
    is_direct: bool,
    sizes: Vec<u64>,
    depths: Vec<u32>,
    regions: Arc<Mutex<Regions>>,
    asked: Arc<AtomicU64>,
    /// What the system had counted when the file was whole.
    counted: Option<u64>,
}

/// What of the file no read has touched yet.
#[derive(Debug)]
struct Regions {
    /// Offsets of pieces, in random order.
    pieces: Vec<u64>,
    at: usize,
    /// Bytes of the present piece that are handed out.
    used: u64,
    /// How often all of it was handed out.
    again: u64,
}

impl Regions {
    fn new(bytes: u64) -> Self {
        let mut pieces: Vec<u64> = (0..bytes / PIECE).map(|i| i * PIECE).collect();
        pieces.shuffle(&mut Seeds::new(0).stream("disk regions"));
        Self {
            pieces,
            at: 0,
            used: 0,
            again: 0,
        }
    }

    /// A region of `size` bytes (a piece at most) that was not handed out before; when all were, from the beginning.
    fn next(&mut self, size: u64) -> u64 {
        if self.used + size > PIECE {
            (self.at, self.used) = (self.at + 1, 0);
        }
        if self.at == self.pieces.len() {
            (self.at, self.again) = (0, self.again + 1);
        }
        let offset = self.pieces[self.at] + self.used;
        self.used += size;
        offset
    }
}

impl DiskProbe {
    /// Writes a file of `bytes` bytes into `folder`; it lives as long as the probe, and its name goes at once. Reads of `sizes` bytes with `depths`
    /// requests in flight.
    ///
    /// # Errors
    /// [`crate::Error::Run`] when the folder does not take the file.
    pub fn new(folder: &Path, bytes: u64, sizes: Vec<u64>, depths: Vec<u32>) -> Result<Self> {
        let name = folder.join(format!("disk-probe-{}.partial", std::process::id()));
        let mut writer = cotk_run::files::AtomicFile::create(&name)?;
        // Not compressible and not constant: file systems shorten both.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut block = vec![0u8; 1 << 20];
        let bytes = bytes.max(PIECE) / PIECE * PIECE;
        for _ in 0..bytes >> 20 {
            for word in block.as_chunks_mut::<8>().0 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *word = state.to_le_bytes();
            }
            writer.write_all(&block).map_err(cotk_run::Error::io("write", &name))?;
        }
        writer.commit()?;
        let held = cotk_run::files::open(&name);
        std::fs::remove_file(&name).map_err(cotk_run::Error::io("remove", &name))?;
        let held = held?;
        let file = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
        let is_direct = open_direct(&file).is_ok();
        Ok(Self {
            file,
            _held: held,
            bytes,
            is_direct,
            sizes,
            depths,
            regions: Arc::new(Mutex::new(Regions::new(bytes))),
            asked: Arc::default(),
            counted: counted(),
        })
    }

    /// As if direct reads were refused.
    #[must_use]
    pub fn buffered(self) -> Self {
        Self {
            is_direct: false,
            ..self
        }
    }

    /// `Disk`, or `DiskBuffered` where direct reads are refused.
    pub fn tier(&self) -> Tier {
        if self.is_direct { Tier::Disk } else { Tier::DiskBuffered }
    }

    /// Bytes that reads have asked for, and how many the system says have come from a device since the file was written;
    /// `None` where it does not count.
    pub fn asked_and_counted(&self) -> (u64, Option<u64>) {
        let grown = self
            .counted
            .zip(counted())
            .map(|(before, now)| now.saturating_sub(before));
        (self.asked.load(Ordering::Relaxed), grown)
    }
}

fn open_direct(file: &Path) -> std::io::Result<File> {
    std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(file)
}

/// Bytes that this process has caused to be fetched from devices; `None` where the system does not count them.
fn counted() -> Option<u64> {
    let text = cotk_run::files::read_text("/proc/self/io", 1 << 16).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("read_bytes: ")?.trim().parse().ok())
}

impl Probe for DiskProbe {
    fn name(&self) -> &str {
        "disk"
    }

    fn candidates(&self, count: usize, _rng: &mut Stream) -> Vec<Key> {
        let key = |tier, bytes, threads| Key::Read(ReadKey { tier, bytes, threads });
        let first = self.depths.iter().flat_map(|&depth| {
            let sizes = self
                .sizes
                .iter()
                .filter(move |&&bytes| depth == 1 || bytes * u64::from(depth) <= IN_FLIGHT);
            sizes.map(move |&bytes| key(self.tier(), bytes, depth))
        });
        // Through the page cache a second touch is a copy in memory.
        let again = self
            .sizes
            .iter()
            .filter(|_| self.is_direct)
            .map(|&bytes| key(Tier::DiskAgain, bytes, 1));
        first.chain(again).take(count).collect()
    }

    fn measures(&self, key: &Key) -> bool {
        matches!(key, Key::Read(read) if read.tier.is_disk())
    }

    fn facts(&self) -> Vec<(String, String)> {
        let how = if self.is_direct {
            "direct"
        } else {
            "direct reads are refused: through the page cache, which was told to forget the file"
        };
        let (asked, counted) = self.asked_and_counted();
        let check = match counted {
            None => "the system does not count what comes from devices".to_owned(),
            Some(counted) if counted >= asked => format!("{asked} bytes asked for, {counted} counted by the system"),
            Some(counted) => {
                format!("{asked} bytes asked for, only {counted} came from a device: a cache was in between")
            }
        };
        let again = self.regions.lock().unwrap_or_else(PoisonError::into_inner).again;
        let mut facts = vec![
            ("disk reads".to_owned(), how.to_owned()),
            ("disk check".to_owned(), check),
        ];
        if again > 0 {
            facts.push((
                "disk regions".to_owned(),
                format!("the file was too small: all of it was read {again} times before"),
            ));
        }
        facts
    }

    fn prepare(&self, key: &Key, _session: u32) -> Result<Box<dyn Prepared>> {
        let fail = |what: String| super::refused(self.name(), key, &what);
        let Key::Read(read) = *key else {
            return Err(fail("not a read".into()));
        };
        let size = usize::try_from(read.bytes).map_err(|e| fail(e.to_string()))?;
        if size == 0 || !size.is_multiple_of(ALIGN) || read.bytes > self.bytes.min(PIECE) {
            return Err(fail(format!(
                "expected a multiple of {ALIGN} up to {}",
                self.bytes.min(PIECE)
            )));
        }
        let open = || -> Result<File> {
            if self.is_direct {
                return open_direct(&self.file).map_err(|e| fail(e.to_string()));
            }
            let file = cotk_run::files::open(&self.file)?;
            // A file system that keeps its pages all the same shows in `facts`.
            let _ = forget_pages(&file);
            Ok(file)
        };
        let depth = read.threads.max(1) as usize;
        let reader = || -> Result<Buffered> {
            Ok(Buffered {
                file: open()?,
                buffer: vec![0u8; size + ALIGN],
                size,
            })
        };
        let others = if depth == 1 {
            Vec::new()
        } else {
            (0..depth)
                .map(|_| Ok(InFlight::new(reader()?)))
                .collect::<Result<_>>()?
        };
        Ok(Box::new(Reads {
            regions: Arc::clone(&self.regions),
            asked: Arc::clone(&self.asked),
            own: reader()?,
            others,
            size: read.bytes,
            is_again: read.tier == Tier::DiskAgain,
            last: None,
            fail: super::refused(self.name(), key, "a read failed").to_string(),
        }))
    }
}

/// An open file with room for one read at an aligned address.
struct Buffered {
    file: File,
    buffer: Vec<u8>,
    size: usize,
}

impl Buffered {
    fn read(&mut self, offset: u64) -> std::io::Result<()> {
        let start = self.buffer.as_ptr().align_offset(ALIGN).min(ALIGN);
        self.file
            .read_exact_at(&mut self.buffer[start..start + self.size], offset)
    }
}

/// A thread with one request in flight at a time.
struct InFlight {
    /// Dropped first: that ends the thread.
    ask: Option<Sender<Vec<u64>>>,
    tell: Receiver<std::io::Result<()>>,
    thread: Option<JoinHandle<()>>,
}

impl InFlight {
    fn new(mut reader: Buffered) -> Self {
        let (ask, asked) = channel::<Vec<u64>>();
        let (telling, tell) = channel();
        let thread = std::thread::spawn(move || {
            while let Ok(offsets) = asked.recv() {
                let read = offsets.into_iter().try_for_each(|offset| reader.read(offset));
                if telling.send(read).is_err() {
                    return;
                }
            }
        });
        Self {
            ask: Some(ask),
            tell,
            thread: Some(thread),
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.ask = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Reads of one size at one depth.
struct Reads {
    regions: Arc<Mutex<Regions>>,
    asked: Arc<AtomicU64>,
    own: Buffered,
    others: Vec<InFlight>,
    size: u64,
    /// Every second read is of the region of the one before.
    is_again: bool,
    last: Option<u64>,
    fail: String,
}

impl Reads {
    fn next(&self) -> u64 {
        self.asked.fetch_add(self.size, Ordering::Relaxed);
        self.regions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .next(self.size)
    }

    fn all(&mut self) -> std::io::Result<()> {
        if self.others.is_empty() {
            let offset = match self.last.take() {
                Some(last) if self.is_again => {
                    self.asked.fetch_add(self.size, Ordering::Relaxed);
                    last
                }
                _ => {
                    let first = self.next();
                    self.last = Some(first);
                    first
                }
            };
            return self.own.read(offset);
        }
        for at in 0..self.others.len() {
            let offsets = (0..BURST).map(|_| self.next()).collect();
            let is_sent = self.others[at]
                .ask
                .as_ref()
                .is_some_and(|ask| ask.send(offsets).is_ok());
            if !is_sent {
                return Err(std::io::Error::other("a reader is gone"));
            }
        }
        let gone = |_| std::io::Error::other("a reader is gone");
        self.others
            .iter()
            .try_for_each(|reader| reader.tell.recv().map_err(gone)?)
    }
}

impl Prepared for Reads {
    /// Behind one read of the same region, where that is what is asked.
    fn is_hot(&self) -> bool {
        self.is_again
    }

    fn is_each_once(&self) -> bool {
        true
    }

    /// Requests in flight are no cores: all of them wait.
    fn threads(&self) -> u32 {
        1
    }

    /// The mean over all reads of a call stands for one: the weight divides.
    fn weights(&self) -> Vec<f64> {
        #[expect(clippy::cast_precision_loss, reason = "a handful of requests")]
        let reads = if self.others.is_empty() {
            1.0
        } else {
            (self.others.len() * BURST) as f64
        };
        vec![1.0 / reads]
    }

    fn run(&mut self, _piece: usize) -> Result<()> {
        self.all().map_err(|source| crate::Error::Probe {
            probe: "disk".into(),
            key: self.fail.clone(),
            detail: source.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Law: no region is handed out twice before all were, and none overlaps another.
    #[test]
    fn every_region_is_the_first_touch_of_its_bytes() {
        let mut regions = Regions::new(4 * PIECE);
        let mut seen: Vec<(u64, u64)> = Vec::new();
        let sizes = [1 << 16, 1 << 20, 8 << 20, 3 << 20, 4096];
        for at in 0.. {
            let size = sizes[at % sizes.len()];
            let offset = regions.next(size);
            if regions.again > 0 {
                break;
            }
            assert!(offset + size <= 4 * PIECE);
            assert!(
                seen.iter().all(|&(o, s)| offset + size <= o || o + s <= offset),
                "{offset}"
            );
            seen.push((offset, size));
        }
        assert!(seen.len() > 8);
    }

    #[test]
    fn first_touches_advance_and_second_ones_repeat() {
        let dir = tempfile::tempdir().unwrap();
        let probe = DiskProbe::new(dir.path(), 2 * PIECE, vec![1 << 16], vec![1, 2]).unwrap();
        let key = |tier, threads| {
            Key::Read(ReadKey {
                tier,
                bytes: 1 << 16,
                threads,
            })
        };
        let used = || probe.regions.lock().unwrap().used >> 16;
        let mut first = probe.prepare(&key(probe.tier(), 1), 0).unwrap();
        (0..4).for_each(|_| first.run(0).unwrap());
        assert_eq!(used(), 4);
        let mut again = probe.prepare(&key(Tier::DiskAgain, 1), 0).unwrap();
        assert!(again.is_hot() && again.is_each_once());
        (0..4).for_each(|_| again.run(0).unwrap());
        assert_eq!(used(), 6);
        let mut deep = probe.prepare(&key(probe.tier(), 2), 0).unwrap();
        assert_eq!(deep.weights(), [1.0 / 4.0]);
        deep.run(0).unwrap();
        assert_eq!(used(), 10);
        let (asked, counted) = probe.asked_and_counted();
        assert_eq!(asked, 12 << 16);
        // Where direct reads work and are counted, all of them came from the device.
        assert!(probe.tier() != Tier::Disk || counted.is_none_or(|counted| counted == 0 || counted >= asked));
    }

    #[test]
    fn without_direct_reads_the_tier_and_the_facts_say_so() {
        let dir = tempfile::tempdir().unwrap();
        let probe = DiskProbe::new(dir.path(), PIECE, vec![1 << 16], vec![1])
            .unwrap()
            .buffered();
        assert_eq!(probe.tier(), Tier::DiskBuffered);
        let keys = probe.candidates(9, &mut Seeds::new(0).stream("test"));
        assert_eq!(keys.len(), 1, "no second touch: {keys:?}");
        probe.prepare(&keys[0], 0).unwrap().run(0).unwrap();
        let facts = probe.facts();
        assert!(facts.iter().any(|(_, fact)| fact.contains("refused")), "{facts:?}");
        assert!(
            facts.iter().any(|(name, fact)| name == "disk check"
                && fact.contains("65536 bytes asked for") | fact.contains("does not count")),
            "{facts:?}"
        );
    }
}
