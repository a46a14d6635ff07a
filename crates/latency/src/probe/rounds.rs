//! Rounds of short slices over things that are ready to run, interleaved: the inner loop of every measurement (reference
//! section 4, points 2 to 8). A slice counts when the core was undisturbed before and after it; who shares the core (a
//! neighbour on its other hyperthread, another clock) shows in a canary. Which things, sessions and processes: `gather`'s.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cotk_run::seeds::Stream;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::{Prepared, Statistics, quantile};
use crate::Result;

/// How long and how often.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Pace {
    /// Undisturbed slices wanted of each piece.
    pub rounds: u32,
    /// Length of a slice; a call that is longer is a slice by itself.
    pub slice: Duration,
    /// How long a piece may wait in all for its core to become quiet.
    pub patience: Duration,
}

impl Pace {
    /// For figures that are quoted: whole networks, decode steps.
    pub const CAREFUL: Self = Self {
        rounds: 12,
        slice: Duration::from_micros(400),
        patience: Duration::from_millis(300),
    };
}

/// What a list of rounds said about one thing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Timed {
    /// Slices that were kept.
    pub count: u32,
    /// Slices that were dropped: disturbed or preempted.
    pub dropped: u32,
    /// Whether the kept slices were undisturbed; else they are the fastest ones of all.
    pub quiet: bool,
    /// Of the kept slices.
    pub median_us: f64,
    pub q10_us: f64,
    pub mad_us: f64,
    /// Median of all slices: what the machine gave, disturbances included.
    pub all_us: f64,
}

/// A slice is undisturbed when the canaries at its ends are within this of the fastest ones.
const SLACK: f64 = 0.06;
/// A slice is preempted when its thread waited for a core for more than this share of it.
const WAIT_SHARE: f64 = 0.005;
/// Calls longer than this find no quiet moment.
const LONG: Duration = Duration::from_millis(5);
/// Slices tried for each one wanted.
const TRIES: u32 = 6;
/// Fewer undisturbed slices than this say nothing: then the fastest of all count.
const FEWEST: usize = 3;
/// The share that counts as the fastest.
const FASTEST: f64 = 0.15;

/// One slice of one piece.
#[derive(Debug, Clone, Copy)]
struct Slice {
    /// µs per call.
    us: f64,
    is_quiet: bool,
}

/// One thing that is measured, with its slices so far.
struct Live<'a> {
    prepared: Box<dyn Prepared + 'a>,
    weights: Vec<f64>,
    /// Calls in a slice, per piece; and whether one call is longer than quiet moments are.
    calls: Vec<u32>,
    is_long: Vec<bool>,
    slices: Vec<Vec<Slice>>,
}

/// Times everything in `prepared`: every round runs each thing once, in fresh random order. One result each, in order.
///
/// # Errors
/// What a run reports.
pub fn time<'a>(prepared: Vec<Box<dyn Prepared + 'a>>, pace: &Pace, order: &mut Stream) -> Result<Vec<Timed>> {
    let mut core = Core::new();
    let mut live = prepared
        .into_iter()
        .map(|p| Live::new(p, pace.slice))
        .collect::<Result<Vec<_>>>()?;
    let pieces: usize = live.iter().map(|l| l.weights.len()).sum();
    let mut patience = pace.patience * u32::try_from(pieces).unwrap_or(u32::MAX);
    for _ in 0..TRIES * pace.rounds.max(1) {
        let mut turns: Vec<(usize, usize)> = live
            .iter()
            .enumerate()
            .flat_map(|(at, l)| (0..l.weights.len()).map(move |piece| (at, piece)))
            .filter(|&(at, piece)| live[at].wants(piece, pace.rounds))
            .collect();
        if turns.is_empty() {
            break;
        }
        turns.shuffle(order);
        for (at, piece) in turns {
            live[at].slice(piece, &mut core, &mut patience)?;
        }
    }
    Ok(live.iter().map(Live::timed).collect())
}

impl<'a> Live<'a> {
    /// Warms up (5 calls or 2 ms of each piece, whichever is more, at most 50) and sizes the slices.
    fn new(mut prepared: Box<dyn Prepared + 'a>, slice: Duration) -> Result<Self> {
        let weights = prepared.weights();
        let mut calls = Vec::with_capacity(weights.len());
        let mut is_long = Vec::with_capacity(weights.len());
        for piece in 0..weights.len() {
            let begin = Instant::now();
            let mut warm = 0u32;
            let mut fastest = Duration::MAX;
            while warm < 2
                || (warm < 5 && begin.elapsed() < Duration::from_millis(50))
                || (warm < 50 && begin.elapsed() < Duration::from_millis(2))
            {
                let call = Instant::now();
                prepared.run(piece)?;
                fastest = fastest.min(call.elapsed());
                warm += 1;
            }
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
            let count = (slice.as_secs_f64() / fastest.as_secs_f64().max(1e-9))
                .ceil()
                .clamp(1.0, 1e5) as u32;
            calls.push(count);
            is_long.push(fastest > LONG);
        }
        Ok(Self {
            slices: vec![Vec::new(); weights.len()],
            prepared,
            weights,
            calls,
            is_long,
        })
    }

    /// Whether a piece has too few undisturbed slices. Whether several cores are all quiet is not known, and no call of many
    /// milliseconds finds a quiet moment: such pieces are simply tried twice as often.
    fn wants(&self, piece: usize, rounds: u32) -> bool {
        let slices = &self.slices[piece];
        if !self.can_wait(piece) {
            return slices.len() < 2 * rounds as usize;
        }
        slices.iter().filter(|s| s.is_quiet).count() < rounds as usize
    }

    fn can_wait(&self, piece: usize) -> bool {
        self.prepared.threads() <= 1 && !self.is_long[piece]
    }

    /// One slice of a piece, behind one call that is not timed: what ran before has taken the caches.
    fn slice(&mut self, piece: usize, core: &mut Core, patience: &mut Duration) -> Result<()> {
        if self.can_wait(piece) {
            core.wait(patience);
        }
        if self.prepared.is_hot() {
            self.prepared.run(piece)?;
        }
        let calls = self.calls[piece];
        let before = core.disturbance();
        let waited = core.waited_ns();
        let begin = Instant::now();
        for _ in 0..calls {
            self.prepared.run(piece)?;
        }
        let took = begin.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "nanoseconds of a slice")]
        let waited = (core.waited_ns() - waited) as f64 / 1e9;
        let disturbance = before.max(core.disturbance());
        let can_be_quiet = self.can_wait(piece);
        self.slices[piece].push(Slice {
            us: took * 1e6 / f64::from(calls),
            is_quiet: can_be_quiet && disturbance <= SLACK && waited <= WAIT_SHARE * took,
        });
        Ok(())
    }

    /// Statistics of each piece first, then their sum: a disturbance in one slice of six must not spoil the other five.
    fn timed(&self) -> Timed {
        let mut timed = Timed {
            count: 0,
            dropped: 0,
            quiet: true,
            median_us: 0.0,
            q10_us: 0.0,
            mad_us: 0.0,
            all_us: 0.0,
        };
        let (mut variance, mut count, mut dropped) = (0.0, 0, 0);
        for (slices, weight) in self.slices.iter().zip(&self.weights) {
            let (kept, is_quiet) = kept(slices);
            let statistics = Statistics::of(&kept);
            timed.quiet &= is_quiet;
            timed.median_us += weight * statistics.median;
            timed.q10_us += weight * statistics.q10;
            timed.all_us += weight * quantile(&slices.iter().map(|s| s.us).collect::<Vec<_>>(), 0.5);
            variance += (weight * statistics.mad).powi(2);
            count += kept.len();
            dropped += slices.len() - kept.len();
        }
        let pieces = self.weights.len().max(1);
        let per_piece = |n: usize| u32::try_from(n / pieces).unwrap_or(u32::MAX);
        (timed.count, timed.dropped, timed.mad_us) = (per_piece(count).max(1), per_piece(dropped), variance.sqrt());
        // What one more copy adds may come out below zero when it is hardly anything.
        for us in [&mut timed.median_us, &mut timed.q10_us, &mut timed.all_us] {
            *us = us.max(0.0);
        }
        timed
    }
}

/// The undisturbed slices, or where they are too few (a call longer than any quiet moment, several cores) the fastest of
/// all, which come nearest; and which of the two.
fn kept(slices: &[Slice]) -> (Vec<f64>, bool) {
    let quiet: Vec<f64> = slices.iter().filter(|s| s.is_quiet).map(|s| s.us).collect();
    if quiet.len() >= FEWEST {
        return (quiet, true);
    }
    let mut all: Vec<f64> = slices.iter().map(|s| s.us).collect();
    all.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a share of a few slices"
    )]
    let share = (FASTEST * all.len() as f64).round() as usize;
    all.truncate(share.max(FEWEST));
    (all, false)
}

/// The core that this thread runs on: how quiet it is, and how long the thread had to wait for it.
pub struct Core {
    buffer: Vec<u64>,
    waits: Option<File>,
}

/// Canaries of this process: what is fast here. A single fast one may be a fluke, so a low quantile counts.
struct Canaries {
    /// By time, in steps of half a percent from a tenth of a µs on.
    counts: Vec<u32>,
    total: u32,
    fastest_us: f64,
}

static CANARIES: Mutex<Canaries> = Mutex::new(Canaries {
    counts: Vec::new(),
    total: 0,
    fastest_us: f64::INFINITY,
});
/// The share of canaries that is faster than the reference.
const FLUKES: f64 = 0.001;
/// How long the first canaries of a process look for a quiet moment.
const CALIBRATION: Duration = Duration::from_millis(300);
const STEP: f64 = 0.005;
const STEPS: usize = 3000;

impl Canaries {
    /// Takes one in and returns how much slower than the reference it is.
    fn add(&mut self, us: f64) -> f64 {
        self.counts.resize(STEPS, 0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        let bin = ((us / 0.1).max(1.0).ln() / STEP).min(STEPS as f64 - 1.0) as usize;
        self.counts[bin] += 1;
        self.total += 1;
        if self.total.is_multiple_of(1024) || self.total < 64 {
            let wanted = (FLUKES * f64::from(self.total)).max(3.0);
            let mut seen = 0.0;
            let at = self.counts.iter().position(|&count| {
                seen += f64::from(count);
                seen >= wanted
            });
            self.fastest_us = at.map_or(us, |bin| 0.1 * (STEP * (bin as f64 + 0.5)).exp());
            if self.total > 1 << 24 {
                // What was long ago counts less.
                self.counts.iter_mut().for_each(|count| *count /= 2);
                self.total = self.counts.iter().sum();
            }
        }
        us / self.fastest_us - 1.0
    }
}

impl Core {
    /// The first one of a process looks for quiet moments for a third of a second.
    pub fn new() -> Self {
        let core = Self {
            // Half of a usual first-level cache.
            buffer: (0..2048).collect(),
            waits: cotk_run::files::open("/proc/thread-self/schedstat").ok(),
        };
        let is_first = CANARIES.lock().unwrap_or_else(PoisonError::into_inner).total == 0;
        let begin = Instant::now();
        while is_first && begin.elapsed() < CALIBRATION {
            core.disturbance();
        }
        core
    }

    /// How much slower than at its best the core runs code that uses all its ports and its first-level cache, right now.
    /// A chain of dependent steps would see the clock alone, not a neighbour on the other hyperthread.
    pub fn disturbance(&self) -> f64 {
        let begin = Instant::now();
        for _ in 0..16 {
            let mut lanes = [0u64; 16];
            for chunk in black_box(&self.buffer[..]).as_chunks::<16>().0 {
                for (lane, x) in lanes.iter_mut().zip(chunk) {
                    *lane = lane.wrapping_add(*x);
                }
            }
            black_box(lanes);
        }
        let us = begin.elapsed().as_secs_f64() * 1e6;
        CANARIES.lock().unwrap_or_else(PoisonError::into_inner).add(us)
    }

    /// Waits until the core is quiet, or until patience is at its end.
    pub fn wait(&self, patience: &mut Duration) {
        let begin = Instant::now();
        // Two in a row: most quiet moments are shorter than a slice.
        while (self.disturbance() > SLACK || self.disturbance() > SLACK) && begin.elapsed() < *patience {}
        *patience = patience.saturating_sub(begin.elapsed());
    }

    /// How long this thread has waited for a core, as the scheduler counts it; zero where it does not tell.
    fn waited_ns(&self) -> u64 {
        let mut text = [0u8; 96];
        let read = self.waits.as_ref().and_then(|f| f.read_at(&mut text, 0).ok());
        // Time on a core, time waiting for one, number of turns.
        let fields = std::str::from_utf8(&text[..read.unwrap_or(0)]).unwrap_or_default();
        fields
            .split_whitespace()
            .nth(1)
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    }
}

impl Default for Core {
    fn default() -> Self {
        Self::new()
    }
}

/// Stolen and total jiffies of all cores since boot; zeros where the system does not tell.
pub fn stolen_and_total() -> (u64, u64) {
    let stat = cotk_run::files::read_text("/proc/stat", 1 << 24).unwrap_or_default();
    let numbers: Vec<u64> = stat
        .lines()
        .find(|line| line.starts_with("cpu "))
        .map(|line| line.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect())
        .unwrap_or_default();
    // user nice system idle iowait irq softirq steal; guest times are part of user and nice.
    (numbers.get(7).copied().unwrap_or(0), numbers.iter().take(8).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn undisturbed_slices_count_and_without_them_the_fastest() {
        let slice = |us, is_quiet| Slice { us, is_quiet };
        let mut slices: Vec<Slice> = (0u32..20).map(|i| slice(10.0 + f64::from(i), false)).collect();
        assert_eq!(kept(&slices), (vec![10.0, 11.0, 12.0], false));
        for us in [15.0, 14.0] {
            slices.push(slice(us, true));
        }
        // Two say nothing yet.
        assert!(!kept(&slices).1);
        slices.push(slice(16.0, true));
        assert_eq!(kept(&slices), (vec![15.0, 14.0, 16.0], true));
        assert_eq!(kept(&slices[..1]), (vec![10.0], false));
    }

    #[test]
    fn a_core_is_never_faster_than_its_best_and_patience_ends() {
        let core = Core::new();
        let least = (0..100).map(|_| core.disturbance()).fold(f64::INFINITY, f64::min);
        assert!(least > -0.9);
        let mut patience = Duration::from_millis(1);
        for _ in 0..3 {
            core.wait(&mut patience);
        }
        assert!(patience <= Duration::from_millis(1));
    }
}
