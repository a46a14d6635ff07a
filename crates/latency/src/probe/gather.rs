//! The timing loop (reference section 4): keys live in batches, each round runs each piece once in fresh random order, a
//! slice is several calls; sessions (fresh builds) lie far apart in time; medians of medians. Short slices, so that most of
//! them fall between preemptions.

use std::time::{Duration, Instant};

use cotk_run::cancel::Cancel;
use cotk_run::journal::Journal;
use cotk_run::progress::Progress;
use cotk_run::seeds::Stream;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::{Prepared, Probe, Statistics, median, quantile};
use crate::Result;
use crate::profile::Row;
use crate::work::Key;

/// How long and how often.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Independent builds of each key.
    pub sessions: u32,
    /// Slices of each piece in a session.
    pub rounds: u32,
    /// Length of a slice; a call that is longer is a slice by itself.
    pub slice: Duration,
}

impl Settings {
    /// `--quick`: two sessions.
    pub const QUICK: Self = Self {
        sessions: 2,
        rounds: 15,
        slice: Duration::from_micros(300),
    };
    /// The whole measurement.
    pub const FULL: Self = Self {
        sessions: 4,
        rounds: 30,
        slice: Duration::from_micros(400),
    };
}

/// One session of one key: a line of the journal.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Session {
    pub key: Key,
    pub session: u32,
    pub count: u32,
    pub median_us: f64,
    pub q10_us: f64,
    pub mad_us: f64,
}

/// Sessions that differ by more than this are measured once more.
const APART: f64 = 0.10;

/// What the loop needs around it.
pub struct Surroundings<'a> {
    pub cancel: &'a Cancel,
    pub progress: &'a dyn Progress,
    /// Keys that are prepared at once, by probe: what they hold in memory adds up.
    pub live: &'a [usize],
    pub journal: &'a mut Journal<Session>,
    /// Sessions of an earlier start that are not measured again.
    pub done: Vec<Session>,
}

/// Measures every key in every session. Keys are `(index into probes, key)`.
///
/// # Errors
/// What a probe reports, with its key; [`cotk_run::Error::Cancelled`] between batches: what is done stays in the journal.
pub fn gather(
    probes: &[Box<dyn Probe>],
    keys: &[(usize, Key)],
    settings: &Settings,
    order: &mut Stream,
    around: &mut Surroundings<'_>,
) -> Result<Vec<Session>> {
    let mut sessions: Vec<Session> = around
        .done
        .iter()
        .filter(|s| keys.iter().any(|k| k.1 == s.key))
        .copied()
        .collect();
    around
        .progress
        .begin("measuring", keys.len() as u64 * u64::from(settings.sessions), "timings");
    around.progress.advance(sessions.len() as u64);
    for session in 0..settings.sessions {
        let mut left: Vec<(usize, Key)> = keys.to_vec();
        left.retain(|(_, key)| !sessions.iter().any(|s| s.key == *key && s.session == session));
        measure(probes, left, session, settings, order, around, &mut sessions)?;
    }
    // One more session for those whose sessions disagree: an unlucky placement stays for a whole session.
    let apart: Vec<(usize, Key)> = keys
        .iter()
        .filter(|(_, key)| range(&sessions, key) > APART)
        .copied()
        .collect();
    around.progress.begin("measuring again", apart.len() as u64, "timings");
    measure(probes, apart, settings.sessions, settings, order, around, &mut sessions)?;
    around.progress.end();
    Ok(sessions)
}

fn measure(
    probes: &[Box<dyn Probe>],
    mut keys: Vec<(usize, Key)>,
    session: u32,
    settings: &Settings,
    order: &mut Stream,
    around: &mut Surroundings<'_>,
    sessions: &mut Vec<Session>,
) -> Result<()> {
    keys.retain(|(_, key)| !sessions.iter().any(|s| s.key == *key && s.session == session));
    keys.shuffle(order);
    // Probes apart: a large cold buffer of one would evict what another keeps hot. Stable, so the order stays random.
    keys.sort_by_key(|(probe, _)| *probe);
    for batch in keys
        .chunk_by(|a, b| a.0 == b.0)
        .flat_map(|same| same.chunks(around.live[same[0].0].max(1)))
    {
        around.cancel.check()?;
        let mut live = Vec::with_capacity(batch.len());
        for (probe, key) in batch {
            live.push((*key, Live::new(probes[*probe].prepare(key, session)?, settings)?));
        }
        for _ in 0..settings.rounds {
            let mut turns: Vec<usize> = (0..live.len()).collect();
            turns.shuffle(order);
            for turn in turns {
                live[turn].1.round()?;
            }
        }
        for (key, live) in live {
            let done = live.session(key, session);
            around.journal.append(&done)?;
            sessions.push(done);
            around.progress.advance(1);
        }
    }
    Ok(())
}

struct Live {
    prepared: Box<dyn Prepared>,
    weights: Vec<f64>,
    /// Calls in a slice, per piece.
    calls: Vec<u32>,
    /// Slices, by piece.
    slices_us: Vec<Vec<f64>>,
}

impl Live {
    /// Warms up (5 calls or 5 ms of each piece, whichever is more, at most 100) and sizes the slices.
    fn new(mut prepared: Box<dyn Prepared>, settings: &Settings) -> Result<Self> {
        let weights = prepared.weights();
        let mut calls = Vec::with_capacity(weights.len());
        for piece in 0..weights.len() {
            let begin = Instant::now();
            let mut warm = 0u32;
            let mut fastest = Duration::MAX;
            while warm < 2
                || (warm < 5 && begin.elapsed() < Duration::from_millis(50))
                || (warm < 100 && begin.elapsed() < Duration::from_millis(5))
            {
                let call = Instant::now();
                prepared.run(piece)?;
                fastest = fastest.min(call.elapsed());
                warm += 1;
            }
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
            let count = (settings.slice.as_secs_f64() / fastest.as_secs_f64().max(1e-9))
                .ceil()
                .clamp(1.0, 1e5) as u32;
            calls.push(count);
        }
        Ok(Self {
            prepared,
            slices_us: vec![Vec::new(); weights.len()],
            weights,
            calls,
        })
    }

    /// One slice of each piece.
    fn round(&mut self) -> Result<()> {
        for (piece, (slices, &calls)) in self.slices_us.iter_mut().zip(&self.calls).enumerate() {
            let begin = Instant::now();
            for _ in 0..calls {
                self.prepared.run(piece)?;
            }
            slices.push(begin.elapsed().as_secs_f64() * 1e6 / f64::from(calls));
        }
        Ok(())
    }

    /// Statistics of each piece first, then their sum: a preemption inside one slice of six must not spoil the other five.
    fn session(&self, key: Key, session: u32) -> Session {
        let (mut median_us, mut q10_us, mut variance) = (0.0, 0.0, 0.0);
        for (slices, weight) in self.slices_us.iter().zip(&self.weights) {
            let statistics = Statistics::of(slices);
            median_us += weight * statistics.median;
            q10_us += weight * statistics.q10;
            variance += (weight * statistics.mad).powi(2);
        }
        Session {
            key,
            session,
            count: u32::try_from(self.slices_us.first().map_or(0, Vec::len)).unwrap_or(u32::MAX),
            // What one more copy adds may come out below zero when it is hardly anything.
            median_us: median_us.max(0.0),
            q10_us: q10_us.max(0.0),
            mad_us: variance.sqrt(),
        }
    }
}

/// Largest over smallest median of a key's sessions, minus one. Times below a µs are within the timer's own noise.
fn range(sessions: &[Session], key: &Key) -> f64 {
    let medians = sessions.iter().filter(|s| s.key == *key).map(|s| s.median_us);
    let (low, high) = medians.fold((f64::INFINITY, 0.0f64), |(lo, hi), m| (lo.min(m), hi.max(m)));
    if high < 1.0 { 0.0 } else { high / low.max(1e-3) - 1.0 }
}

/// One row per key, in key order.
pub fn rows(sessions: &[Session]) -> Vec<Row> {
    let mut keys: Vec<Key> = sessions.iter().map(|s| s.key).collect();
    keys.sort_unstable();
    keys.dedup();
    let row = |key: Key| {
        let of: Vec<&Session> = sessions.iter().filter(|s| s.key == key).collect();
        let medians: Vec<f64> = of.iter().map(|s| s.median_us).collect();
        let half_range = (quantile(&medians, 1.0) - quantile(&medians, 0.0)) / 2.0;
        let mads: Vec<f64> = of.iter().map(|s| s.mad_us).collect();
        Row {
            key,
            sessions: u32::try_from(of.len()).unwrap_or(u32::MAX),
            count: of.iter().map(|s| s.count).sum(),
            median_us: median(&medians),
            q10_us: of.iter().map(|s| s.q10_us).fold(f64::INFINITY, f64::min),
            mad_us: median(&mads).max(half_range),
        }
    };
    keys.into_iter().map(row).collect()
}

/// Median and 90th percentile of |ln(a / b)| over all pairs of sessions of these keys, as fractions; NaN without a pair.
pub fn noise_floor(sessions: &[Session], canaries: &[Key]) -> (f64, f64) {
    let mut repeats = Vec::new();
    for key in canaries {
        let of: Vec<f64> = sessions
            .iter()
            .filter(|s| s.key == *key)
            .map(|s| s.median_us.max(1e-3))
            .collect();
        for (i, a) in of.iter().enumerate() {
            repeats.extend(of[..i].iter().map(|b| (a / b).ln().abs()));
        }
    }
    (median(&repeats), quantile(&repeats, 0.9))
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
