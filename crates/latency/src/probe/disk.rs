//! Reading speed of a disk: direct, aligned reads of regions in random order from a file that this probe writes and
//! removes. Where direct reads are refused the same is read through the page cache, under a tier that says so.

use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use cotk_run::seeds::{Seeds, Stream};
use rand::seq::SliceRandom;

use super::{Prepared, Probe};
use crate::Result;
use crate::work::{Key, ReadKey, Tier};

/// Direct reads must begin and end at multiples of this.
const ALIGN: usize = 4096;

/// Reads a file of its own in one folder.
#[derive(Debug)]
pub struct DiskProbe {
    file: PathBuf,
    bytes: u64,
    tier: Tier,
    sizes: Vec<u64>,
    depths: Vec<u32>,
}

impl DiskProbe {
    /// Writes a file of `bytes` bytes into `folder`; it lives as long as the probe. Reads of `sizes` bytes with `depths`
    /// requests in flight.
    ///
    /// # Errors
    /// [`crate::Error::Run`] when the folder does not take the file.
    pub fn new(folder: &Path, bytes: u64, sizes: Vec<u64>, depths: Vec<u32>) -> Result<Self> {
        let file = folder.join("disk-probe.partial");
        let mut writer = cotk_run::files::AtomicFile::create(&file)?;
        // Not compressible and not constant: file systems shorten both.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut block = vec![0u8; 1 << 20];
        for _ in 0..bytes >> 20 {
            for word in block.as_chunks_mut::<8>().0 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *word = state.to_le_bytes();
            }
            writer.write_all(&block).map_err(cotk_run::Error::io("write", &file))?;
        }
        writer.commit()?;
        let tier = if open_direct(&file).is_ok() {
            Tier::Disk
        } else {
            Tier::DiskBuffered
        };
        Ok(Self {
            file,
            bytes: bytes >> 20 << 20,
            tier,
            sizes,
            depths,
        })
    }

    /// `Disk`, or `DiskBuffered` where direct reads are refused.
    pub fn tier(&self) -> Tier {
        self.tier
    }
}

impl Drop for DiskProbe {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

fn open_direct(file: &Path) -> std::io::Result<std::fs::File> {
    std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(file)
}

impl Probe for DiskProbe {
    fn name(&self) -> &str {
        "disk"
    }

    fn candidates(&self, count: usize, _rng: &mut Stream) -> Vec<Key> {
        let tier = self.tier;
        let keys = self.depths.iter().flat_map(|&threads| {
            self.sizes
                .iter()
                .map(move |&bytes| Key::Read(ReadKey { tier, bytes, threads }))
        });
        keys.take(count).collect()
    }

    fn measures(&self, key: &Key) -> bool {
        matches!(key, Key::Read(read) if read.tier == self.tier)
    }

    fn prepare(&self, key: &Key, session: u32) -> Result<Box<dyn Prepared>> {
        let fail = |what: String| super::refused(self.name(), key, &what);
        let Key::Read(read) = *key else {
            return Err(fail("not a read".into()));
        };
        let size = usize::try_from(read.bytes).map_err(|e| fail(e.to_string()))?;
        if size == 0 || !size.is_multiple_of(ALIGN) || read.bytes > self.bytes {
            return Err(fail(format!("expected a multiple of {ALIGN} up to {}", self.bytes)));
        }
        let file = match self.tier {
            Tier::Disk => open_direct(&self.file).map_err(|e| fail(e.to_string()))?,
            _ => cotk_run::files::open(&self.file)?,
        };
        let mut regions: Vec<u64> = (0..self.bytes / read.bytes).map(|i| i * read.bytes).collect();
        regions.shuffle(&mut Seeds::new(u64::from(session)).stream("disk regions"));
        Ok(Box::new(Regions {
            file,
            regions,
            next: 0,
            buffers: (0..read.threads.max(1)).map(|_| vec![0u8; size + ALIGN]).collect(),
            size,
            fail: super::refused(self.name(), key, "a read failed").to_string(),
        }))
    }
}

struct Regions {
    file: std::fs::File,
    /// Offsets in random order; each once before any comes again.
    regions: Vec<u64>,
    next: usize,
    /// One per request in flight, with room to begin at an aligned address.
    buffers: Vec<Vec<u8>>,
    size: usize,
    fail: String,
}

impl Prepared for Regions {
    fn is_hot(&self) -> bool {
        false
    }

    /// The mean of `depth` requests in flight stands for one: the weight divides.
    fn weights(&self) -> Vec<f64> {
        #[expect(clippy::cast_precision_loss, reason = "a handful of requests")]
        let depth = self.buffers.len() as f64;
        vec![1.0 / depth]
    }

    fn run(&mut self, _piece: usize) -> Result<()> {
        let (file, size, fail) = (&self.file, self.size, &self.fail);
        let first = self.next;
        let count = self.regions.len();
        self.next += self.buffers.len();
        let offset = |i: usize| self.regions[(first + i) % count];
        let read = |buffer: &mut Vec<u8>, offset: u64| -> Result<()> {
            let start = buffer.as_ptr().align_offset(ALIGN).min(ALIGN);
            file.read_exact_at(&mut buffer[start..start + size], offset)
                .map_err(|source| crate::Error::Probe {
                    probe: "disk".into(),
                    key: fail.clone(),
                    detail: source.to_string(),
                })
        };
        if let [buffer] = self.buffers.as_mut_slice() {
            return read(buffer, offset(0));
        }
        let offsets: Vec<u64> = (0..self.buffers.len()).map(offset).collect();
        std::thread::scope(|scope| {
            let read = &read;
            let threads: Vec<_> = self
                .buffers
                .iter_mut()
                .zip(offsets)
                .map(|(b, o)| scope.spawn(move || read(b, o)))
                .collect();
            threads
                .into_iter()
                .try_for_each(|t| t.join().expect("a read returns its error"))
        })
    }
}
