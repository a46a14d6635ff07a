//! Reading speed of caches and memory: a sum over a working set, with one thread and with several. Plain code: eight sums
//! in flight are enough to wait for nothing but the memory.

use std::hint::black_box;

use cotk_run::seeds::Stream;

use super::{Prepared, Probe};
use crate::Result;
use crate::work::{Key, ReadKey, Tier};

/// Reads working sets of the sizes in its keys.
#[derive(Debug, Clone)]
pub struct MemoryProbe {
    threads: Vec<u32>,
    /// Largest cache, 0 if not known.
    cache_bytes: u64,
    /// Several sizes of each tier.
    sweep: bool,
}

impl MemoryProbe {
    /// For these numbers of threads; `cache_bytes` is the largest cache, as the system tells it.
    pub fn new(threads: Vec<u32>, cache_bytes: u64) -> Self {
        Self {
            threads,
            cache_bytes,
            sweep: false,
        }
    }

    /// Several sizes of each tier, from 128 KiB to eight times the largest cache.
    #[must_use]
    pub fn sweep(self) -> Self {
        Self { sweep: true, ..self }
    }
}

impl Probe for MemoryProbe {
    fn name(&self) -> &str {
        "memory"
    }

    fn candidates(&self, count: usize, _rng: &mut Stream) -> Vec<Key> {
        // Far beyond every cache, but no more than a small machine can spare.
        let far = (8 * self.cache_bytes).clamp(1 << 27, 1 << 28);
        let mut caches = vec![(Tier::L2, 1u64 << 18), (Tier::L3, 4 << 20)];
        let mut memory = vec![(Tier::Memory, far / 2)];
        if self.sweep {
            // Inside a tier, never near its end: what lies between two is a mixture of both.
            caches.extend([1 << 17, 1 << 19].map(|bytes| (Tier::L2, bytes)));
            let last = self.cache_bytes / 2;
            caches.extend(
                [2 << 20, 8 << 20, 16 << 20]
                    .into_iter()
                    .filter(|b| *b <= last)
                    .map(|b| (Tier::L3, b)),
            );
            memory.extend([far / 4, far].map(|bytes| (Tier::Memory, bytes)));
        }
        let key = |tier, bytes, threads| Key::Read(ReadKey { tier, bytes, threads });
        // Starting threads takes longer than reading a cache: those with one thread.
        let keys = caches.into_iter().map(|(tier, bytes)| key(tier, bytes, 1));
        let far = memory
            .into_iter()
            .flat_map(|(tier, bytes)| self.threads.iter().map(move |&t| key(tier, bytes, t)));
        let keys = keys.chain(far);
        keys.take(count).collect()
    }

    fn measures(&self, key: &Key) -> bool {
        matches!(
            key,
            Key::Read(ReadKey {
                tier: Tier::L2 | Tier::L3 | Tier::Memory,
                ..
            })
        )
    }

    fn prepare(&self, key: &Key, _session: u32) -> Result<Box<dyn Prepared>> {
        let Key::Read(read) = *key else {
            return Err(super::refused(self.name(), key, "not a read"));
        };
        let words = usize::try_from(read.bytes / 8).map_err(|_| super::refused(self.name(), key, "too large"))?;
        // Written, so that every page exists.
        let words: Vec<u64> = (0..words as u64).collect();
        Ok(Box::new(WorkingSet {
            words,
            threads: read.threads.max(1) as usize,
        }))
    }
}

struct WorkingSet {
    words: Vec<u64>,
    threads: usize,
}

impl Prepared for WorkingSet {
    /// What is larger than the caches is cold whatever ran before.
    fn is_hot(&self) -> bool {
        self.words.len() < 1 << 22
    }

    fn threads(&self) -> u32 {
        u32::try_from(self.threads).unwrap_or(u32::MAX)
    }

    fn run(&mut self, _piece: usize) -> Result<()> {
        if self.threads == 1 {
            black_box(sum(&self.words));
            return Ok(());
        }
        let share = self.words.len().div_ceil(self.threads);
        std::thread::scope(|scope| {
            for part in self.words.chunks(share) {
                scope.spawn(move || black_box(sum(part)));
            }
        });
        Ok(())
    }
}

/// Wrapping sum, eight lanes at once.
fn sum(words: &[u64]) -> u64 {
    let (chunks, rest) = words.as_chunks::<8>();
    let mut lanes = [0u64; 8];
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().chain(rest).fold(0, |sum, word| sum.wrapping_add(*word))
}
