//! Rounds of short slices over things that are ready to run, interleaved: the inner loop of every measurement (reference
//! section 4, points 2 to 8). A slice counts when the core was undisturbed before and after it; who shares the core (a
//! neighbour on its other hyperthread, another clock) shows in a canary. Which things, sessions and processes: `gather`'s.

use std::time::{Duration, Instant};

use cotk_run::seeds::Stream;
use cotk_run::system::involuntary_switches;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

pub use super::core::{Core, stolen_and_total};
use super::core::{Cores, LONG, Loss};
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
    /// Share of the time of all slices that went to others, in percent; and involuntary switches in them.
    #[serde(default)]
    pub lost_pct: f64,
    #[serde(default)]
    pub switches: u32,
}

/// Slices tried for each one wanted.
pub(super) const TRIES: u32 = 6;
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
    loss: Loss,
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
    let several = prepared.iter().any(|p| p.threads() > 1);
    let mut cores = Cores::new(several);
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
            live[at].slice(piece, &mut cores, &mut patience)?;
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
            if prepared.is_each_once() {
                // Nothing to warm, and nothing to spare.
                calls.push(1);
                is_long.push(false);
                continue;
            }
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

    /// Whether a piece has too few undisturbed slices. No call of many milliseconds waits long for a quiet moment, and what is
    /// done once only is not done in vain.
    fn wants(&self, piece: usize, rounds: u32) -> bool {
        let slices = &self.slices[piece];
        let most = if self.prepared.is_each_once() || self.is_long[piece] {
            2
        } else {
            TRIES
        };
        slices.len() < (most * rounds) as usize && slices.iter().filter(|s| s.is_quiet).count() < rounds as usize
    }

    /// One slice of a piece, behind one call that is not timed: what ran before has taken the caches.
    fn slice(&mut self, piece: usize, cores: &mut Cores, patience: &mut Duration) -> Result<()> {
        let (is_hot, is_once) = (self.prepared.is_hot(), self.prepared.is_each_once());
        let several = self.prepared.threads() > 1;
        cores.stay(!several && !is_once);
        if !is_once {
            cores.wait(several, patience);
        }
        let calls = self.calls[piece];
        // Looking at several cores takes longer than caches stay warm.
        let early = several.then(|| cores.disturbance(true));
        if is_hot {
            self.prepared.run(piece)?;
        }
        let before = early.unwrap_or_else(|| cores.disturbance(false));
        let stolen = self.is_long[piece].then(stolen_and_total);
        let (waited, switches) = (cores.waited_ns(), involuntary_switches());
        let begin = Instant::now();
        let mut own_us = 0.0;
        let mut has_own = false;
        for _ in 0..calls {
            self.prepared.run(piece)?;
            if let Some(us) = self.prepared.own_us() {
                own_us += us;
                has_own = true;
            }
        }
        let took_s = begin.elapsed().as_secs_f64();
        let switches = involuntary_switches() - switches;
        #[expect(clippy::cast_precision_loss, reason = "nanoseconds of a slice")]
        let waited_s = (cores.waited_ns() - waited) as f64 / 1e9;
        let stolen_s = stolen.map_or(0.0, |before| {
            took_s * super::core::stolen_share(before, stolen_and_total())
        });
        let loss = Loss {
            took_s,
            waited_s,
            stolen_s,
            switches: u32::try_from(switches).unwrap_or(u32::MAX),
            before,
            after: cores.disturbance(several),
        };
        self.slices[piece].push(Slice {
            us: if has_own { own_us } else { took_s * 1e6 } / f64::from(calls),
            // What waits for a device is not what a core is to be quiet for.
            is_quiet: is_once || has_own || loss.is_quiet(),
            loss,
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
            lost_pct: 0.0,
            switches: 0,
        };
        let all = self.slices.iter().flatten();
        let (lost_s, took_s, switches) = all.fold((0.0, 0.0, 0u32), |(lost, took, switches), s| {
            let slice_s = s.loss.took_s;
            (
                lost + s.loss.share().min(1.0) * slice_s,
                took + slice_s,
                switches.saturating_add(s.loss.switches),
            )
        });
        timed.lost_pct = 100.0 * lost_s / f64::max(took_s, 1e-9);
        timed.switches = switches;
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

/// The undisturbed slices, or where they are too few (a machine that is never quiet for that long) the fastest of all, which
/// come nearest; and which of the two.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn undisturbed_slices_count_and_without_them_the_fastest() {
        let slice = |us, is_quiet| Slice {
            us,
            is_quiet,
            loss: Loss::default(),
        };
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
}
