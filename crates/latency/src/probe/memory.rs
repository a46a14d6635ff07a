//! Reading speed of caches and memory: a sum over a working set, with one thread and with several, and where its levels end.
//! Plain code: eight sums in flight are enough to wait for nothing but the memory.

use std::hint::{black_box, spin_loop};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cotk_run::seeds::Stream;
use cotk_run::system::{self, Pinned};

use super::{Prepared, Probe};
use crate::Result;
use crate::profile::{Level, Row};
use crate::work::{Key, ReadKey, Tier};

/// No working set is larger.
const MOST_BYTES: u64 = 4 << 30;

/// Reads working sets of the sizes in its keys.
#[derive(Debug, Clone)]
pub struct MemoryProbe {
    threads: Vec<u32>,
    /// Largest cache, 0 if not known.
    cache_bytes: u64,
    /// Working sets of every size.
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

    /// Working sets of every size too, from 16 KiB to eight times the largest cache, three to an octave.
    #[must_use]
    pub fn sweep(self) -> Self {
        Self { sweep: true, ..self }
    }

    /// Far beyond every cache, but no more than a small machine can spare.
    fn far(&self) -> u64 {
        (8 * self.cache_bytes).clamp(1 << 27, 1 << 28)
    }
}

impl Probe for MemoryProbe {
    fn name(&self) -> &str {
        "memory"
    }

    fn candidates(&self, count: usize, _rng: &mut Stream) -> Vec<Key> {
        let far = self.far();
        // Two of each: one says nothing of what a call costs and what a byte.
        let mut caches = vec![
            (Tier::L2, 1u64 << 17),
            (Tier::L2, 1 << 18),
            (Tier::L3, 2 << 20),
            (Tier::L3, 4 << 20),
        ];
        let mut memory = vec![(Tier::Memory, far / 4), (Tier::Memory, far / 2)];
        let mut sweep = Vec::new();
        if self.sweep {
            // Inside a tier, never near its end: what lies between two is a mixture of both.
            caches.push((Tier::L2, 1 << 19));
            let last = self.cache_bytes / 2;
            caches.extend(
                [8 << 20, 16 << 20]
                    .into_iter()
                    .filter(|b| *b <= last)
                    .map(|b| (Tier::L3, b)),
            );
            memory.push((Tier::Memory, far));
            sweep = sizes(16 << 10, far);
        }
        let key = |tier, bytes, threads| Key::Read(ReadKey { tier, bytes, threads });
        let of_caches = caches.into_iter().map(|(tier, bytes)| key(tier, bytes, 1));
        let by_threads = memory
            .into_iter()
            .chain(sweep.into_iter().map(|bytes| (Tier::WorkingSet, bytes)));
        let by_threads = by_threads.flat_map(|(tier, bytes)| self.threads.iter().map(move |&t| key(tier, bytes, t)));
        of_caches.chain(by_threads).take(count).collect()
    }

    fn measures(&self, key: &Key) -> bool {
        matches!(
            key,
            Key::Read(ReadKey {
                tier: Tier::L2 | Tier::L3 | Tier::Memory | Tier::WorkingSet,
                ..
            })
        )
    }

    fn prepare(&self, key: &Key, _session: u32) -> Result<Box<dyn Prepared>> {
        let Key::Read(read) = *key else {
            return Err(super::refused(self.name(), key, "not a read"));
        };
        let words = usize::try_from(read.bytes / 8).map_err(|_| super::refused(self.name(), key, "too large"))?;
        let threads = read.threads.max(1) as usize;
        if words < 8 * threads || read.bytes > MOST_BYTES {
            return Err(super::refused(
                self.name(),
                key,
                "expected 64 bytes a thread, and 4 GiB at most",
            ));
        }
        Ok(Box::new(WorkingSet::new(words, threads)))
    }
}

/// Three to an octave, whole KiB, both ends included.
fn sizes(from: u64, to: u64) -> Vec<u64> {
    let mut sizes = Vec::new();
    let mut octave = from;
    while octave < to {
        sizes.extend([octave, octave * 5 / 4, octave * 8 / 5].map(|bytes| bytes >> 12 << 12));
        octave *= 2;
    }
    sizes.retain(|bytes| *bytes < to);
    sizes.push(to);
    sizes.dedup();
    sizes
}

/// A working set, cut into equal shares, each written and read by one thread only.
struct WorkingSet {
    words: Vec<u64>,
    readers: Vec<Reader>,
    bytes: usize,
    turn: Arc<Turn>,
}

/// What readers wait for: they spin for a moment, since waking one takes longer than reading a first-level cache, and sleep
/// when no turn comes: a core must be quiet when it is looked at.
#[derive(Default)]
struct Turn {
    number: AtomicU64,
    done: AtomicU64,
    is_over: AtomicBool,
}

/// How long a reader waits awake.
const SPIN: Duration = Duration::from_micros(30);

/// A thread with a share of its own.
struct Reader(Option<JoinHandle<()>>);

impl WorkingSet {
    fn new(words: usize, threads: usize) -> Self {
        let share = words / threads;
        let turn = Arc::new(Turn::default());
        // This thread is where the scheduler has put it; each other one has a core of its own, where there are enough.
        let cores = system::cores();
        let readers = (1..threads).map(|at| {
            let turn = Arc::clone(&turn);
            let core = (cores.len() >= threads).then(|| cores[at]);
            Reader(Some(std::thread::spawn(move || {
                let _stays = core.and_then(|core| Pinned::to(core).ok());
                // Written, so that every page exists, and near its reader.
                let words: Vec<u64> = (0..share as u64).collect();
                let mut seen = 0;
                loop {
                    let begin = Instant::now();
                    while turn.number.load(Ordering::Acquire) == seen {
                        if turn.is_over.load(Ordering::Relaxed) {
                            return;
                        }
                        if begin.elapsed() > SPIN {
                            std::thread::park();
                        }
                        spin_loop();
                    }
                    seen += 1;
                    black_box(sum(&words));
                    turn.done.fetch_add(1, Ordering::Release);
                }
            })))
        });
        Self {
            readers: readers.collect(),
            words: (0..share as u64).collect(),
            bytes: 8 * words,
            turn,
        }
    }
}

impl Drop for WorkingSet {
    fn drop(&mut self) {
        self.turn.is_over.store(true, Ordering::Relaxed);
        for reader in &mut self.readers {
            if let Some(thread) = reader.0.take() {
                thread.thread().unpark();
                let _ = thread.join();
            }
        }
    }
}

impl Prepared for WorkingSet {
    /// What is larger than the caches is cold whatever ran before.
    fn is_hot(&self) -> bool {
        self.bytes < 1 << 25
    }

    fn threads(&self) -> u32 {
        u32::try_from(1 + self.readers.len()).unwrap_or(u32::MAX)
    }

    fn run(&mut self, _piece: usize) -> Result<()> {
        let before = self.turn.done.load(Ordering::Relaxed);
        self.turn.number.fetch_add(1, Ordering::Release);
        for reader in &self.readers {
            reader.0.iter().for_each(|thread| thread.thread().unpark());
        }
        black_box(sum(&self.words));
        let wanted = before + self.readers.len() as u64;
        while self.turn.done.load(Ordering::Acquire) < wanted {
            spin_loop();
        }
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

/// Levels more than this are none: three caches and the memory.
const MOST_LEVELS: usize = 4;
/// What another level must explain of a sum of squares of ln(speed), per point, to be one: 3 % each.
const WORTH: f64 = 0.03 * 0.03;

/// The levels that a sweep shows with so many threads: working sets, ascending, cut where speed falls, each part as one
/// speed (the median of its own); as few parts as explain the points. The last level has no end.
pub fn levels(rows: &[Row], threads: u32) -> Vec<Level> {
    let mut points: Vec<(u64, f64)> = { rows.iter() }
        .filter_map(|row| match row.key {
            Key::Read(read) if read.tier == Tier::WorkingSet && read.threads == threads && row.median_us > 0.0 => {
                #[expect(clippy::cast_precision_loss, reason = "sizes of working sets stay far below 2^52")]
                let gb_per_s = read.bytes as f64 / row.median_us / 1e3;
                Some((read.bytes, gb_per_s))
            }
            _ => None,
        })
        .collect();
    points.sort_by_key(|point| point.0);
    let cuts = cuts(&points.iter().map(|p| p.1.ln()).collect::<Vec<_>>());
    let mut from = 0;
    let mut found = Vec::new();
    for to in cuts {
        let speeds: Vec<f64> = points[from..to].iter().map(|p| p.1).collect();
        found.push(Level {
            threads,
            bytes: (to < points.len()).then(|| points[to - 1].0),
            gb_per_s: super::median(&speeds),
        });
        from = to;
    }
    found
}

/// Ends of the parts of a list of numbers that is constant in parts: least squares, with a price for each part.
fn cuts(values: &[f64]) -> Vec<usize> {
    let count = values.len();
    if count == 0 {
        return Vec::new();
    }
    let mut sums = vec![(0.0, 0.0)];
    for v in values {
        let (sum, squares) = sums[sums.len() - 1];
        sums.push((sum + v, squares + v * v));
    }
    #[expect(clippy::cast_precision_loss, reason = "a hundred points")]
    let misfit = |from: usize, to: usize| {
        let (sum, squares) = (sums[to].0 - sums[from].0, sums[to].1 - sums[from].1);
        (squares - sum * sum / (to - from) as f64).max(0.0)
    };
    // best[k][to]: least misfit of the first `to` values in k + 1 parts, and where its last part begins.
    let mut best: Vec<Vec<(f64, usize)>> = vec![
        (0..=count)
            .map(|to| (if to > 0 { misfit(0, to) } else { 0.0 }, 0))
            .collect(),
    ];
    for parts in 1..MOST_LEVELS.min(count) {
        let row = (0..=count).map(|to| {
            let tries = (parts..to).map(|from| (best[parts - 1][from].0 + misfit(from, to), from));
            tries.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::INFINITY, 0))
        });
        let row = row.collect();
        best.push(row);
    }
    #[expect(clippy::cast_precision_loss, reason = "a hundred points")]
    let cost = |parts: usize| best[parts][count].0 + parts as f64 * WORTH * count as f64;
    let parts = (0..best.len())
        .min_by(|&a, &b| cost(a).total_cmp(&cost(b)))
        .unwrap_or(0);
    let mut ends = vec![count];
    for part in (1..=parts).rev() {
        ends.push(best[part][ends[ends.len() - 1]].1);
    }
    ends.reverse();
    ends
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::Taken;

    fn row(bytes: u64, threads: u32, gb_per_s: f64) -> Row {
        #[expect(clippy::cast_precision_loss, reason = "a test's sizes")]
        let median_us = bytes as f64 / gb_per_s / 1e3;
        Row {
            key: Key::Read(ReadKey {
                tier: Tier::WorkingSet,
                bytes,
                threads,
            }),
            sessions: 1,
            count: 5,
            median_us,
            q10_us: median_us,
            mad_us: 0.0,
            taken: Taken::default(),
        }
    }

    /// Law: the levels of a made-up machine are found where they end, in spite of 5 % of noise and of soft edges.
    #[test]
    fn levels_are_found_where_speed_falls() {
        let speed = |bytes: u64| match bytes >> 10 {
            0..=32 => 100.0,
            33..=1024 => 60.0,
            1025..=32_768 => 30.0,
            _ => 10.0,
        };
        let sizes = sizes(16 << 10, 256 << 20);
        let noise = |i: usize| 1.0 + 0.05 * ((i * 7919 % 13) as f64 / 6.0 - 1.0);
        let mut rows: Vec<Row> = sizes
            .iter()
            .enumerate()
            .map(|(i, &b)| row(b, 1, speed(b) * noise(i)))
            .collect();
        rows.reverse();
        rows.push(row(1 << 20, 2, 1.0));
        let found = levels(&rows, 1);
        let ends: Vec<_> = found.iter().map(|l| l.bytes.map(|b| b >> 10)).collect();
        assert_eq!(ends, [Some(32), Some(1024), Some(32_768), None], "{found:?}");
        for (level, truth) in found.iter().zip([100.0, 60.0, 30.0, 10.0]) {
            assert!((level.gb_per_s / truth - 1.0).abs() < 0.05, "{level:?}");
        }
        assert_eq!(levels(&rows, 2).len(), 1);
        assert!(levels(&rows, 3).is_empty());
    }

    #[test]
    fn one_speed_is_one_level() {
        let noise = |i: usize| 1.0 + 0.02 * ((i * 7919 % 13) as f64 / 6.0 - 1.0);
        let rows: Vec<Row> = sizes(1 << 14, 1 << 24)
            .iter()
            .enumerate()
            .map(|(i, &b)| row(b, 1, 40.0 * noise(i)))
            .collect();
        assert_eq!(levels(&rows, 1).len(), 1);
    }

    #[test]
    fn sizes_rise_and_hold_both_ends() {
        let sizes = sizes(16 << 10, 1 << 28);
        assert!(sizes.windows(2).all(|w| w[0] < w[1]), "{sizes:?}");
        assert_eq!((sizes[0], sizes[sizes.len() - 1]), (16 << 10, 1 << 28));
    }

    #[test]
    fn several_threads_read_all_of_it_in_every_turn() {
        let mut set = WorkingSet::new(1000, 3);
        for turn in 1..50 {
            set.run(0).unwrap();
            assert_eq!(set.turn.done.load(Ordering::Relaxed), 2 * turn);
        }
    }
}
