//! The cores that a measurement runs on: how disturbed each of them is (a canary), how long a thread waited for one, and
//! keeping a thread on its own. What a slice lost to others is a share of its time, decided in one pure place ([`Loss`]).

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cotk_run::system::{self, Pinned};

/// A slice is undisturbed when the canaries at its ends are within this of the fastest ones.
pub const SLACK: f64 = 0.06;
/// A slice is undisturbed when others took less than this share of it.
pub const LOST_SHARE: f64 = 0.02;
/// What an involuntary switch costs beside the waiting: caches and predictors that are somebody else's now.
const SWITCH_S: f64 = 2e-6;
/// Longer than this, the moments at its two ends say little about a call.
pub const LONG: Duration = Duration::from_millis(5);
/// Cores that are watched at most.
const MOST_CORES: usize = 64;
/// Canaries of a watcher, of which the best counts: the first ones may meet a thread that is about to sleep.
const LOOKS: usize = 3;

/// What one slice lost to others.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Loss {
    pub took_s: f64,
    /// Waiting for a core, as the scheduler counts it.
    pub waited_s: f64,
    /// Taken by the hypervisor.
    pub stolen_s: f64,
    pub switches: u32,
    /// How much slower than at their best the cores were just before and just after; the worst of them.
    pub before: f64,
    pub after: f64,
}

impl Loss {
    /// Share of the slice's time that went to others. A switch counts by what it costs, not as an event: every call of
    /// several ms meets some, and loses next to nothing.
    pub fn share(&self) -> f64 {
        let lost = self.waited_s + self.stolen_s + f64::from(self.switches) * SWITCH_S;
        lost / self.took_s.max(1e-9)
    }

    /// Whether the slice says how long the thing takes.
    pub fn is_quiet(&self) -> bool {
        // One unlucky look of a µs does not condemn a call of many ms; both ends slow is a neighbour who stayed.
        let disturbance = if self.took_s > LONG.as_secs_f64() {
            self.before.min(self.after)
        } else {
            self.before.max(self.after)
        };
        disturbance <= SLACK && self.share() <= LOST_SHARE
    }
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

    /// How long this thread has waited for a core, as the scheduler counts it; zero where it does not tell.
    pub fn waited_ns(&self) -> u64 {
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

/// A thread that stays on another core and looks how disturbed it is, when asked.
struct Watcher {
    core: usize,
    /// Dropped first: that ends the thread.
    ask: Option<Sender<()>>,
    tell: Receiver<f64>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    fn new(core: usize) -> Option<Self> {
        let (ask, asked) = channel();
        let (telling, tell) = channel();
        let thread = std::thread::Builder::new()
            .name(format!("watch {core}"))
            .spawn(move || {
                let Ok(_stays) = Pinned::to(core) else { return };
                let here = Core::new();
                while asked.recv().is_ok() {
                    let best = (0..LOOKS).map(|_| here.disturbance()).fold(f64::INFINITY, f64::min);
                    if telling.send(best).is_err() {
                        return;
                    }
                }
            });
        Some(Self {
            core,
            ask: Some(ask),
            tell,
            thread: Some(thread.ok()?),
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.ask = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// All cores of a measurement: this thread's, and watchers on the others where things with several threads are timed.
pub struct Cores {
    here: Core,
    watchers: Vec<Watcher>,
    /// While what is timed has one thread.
    pinned: Option<Pinned>,
}

impl Cores {
    /// With watchers on the other cores if `several` are needed. Where threads may not be pinned there are none: then only
    /// this thread's core is watched.
    pub fn new(several: bool) -> Self {
        let here = Core::new();
        let cores = if several { system::cores() } else { Vec::new() };
        let cores = cores.into_iter().take(MOST_CORES);
        Self {
            here,
            watchers: cores.filter_map(Watcher::new).collect(),
            pinned: None,
        }
    }

    /// Keeps this thread on its core, or lets it go: threads that it wakes must be free to go elsewhere.
    pub fn stay(&mut self, stays: bool) {
        match (&self.pinned, stays) {
            (None, true) => self.pinned = Pinned::here().ok(),
            (Some(_), false) => self.pinned = None,
            _ => {}
        }
    }

    /// How disturbed this core is, or with `several` the worst of all, looked at in the same moment.
    pub fn disturbance(&self, several: bool) -> f64 {
        if !several || self.watchers.is_empty() {
            return self.here.disturbance();
        }
        // This thread must not be where a watcher is.
        let Ok(stays) = Pinned::here() else {
            return self.here.disturbance();
        };
        let others = self.watchers.iter().filter(|w| w.core != stays.core());
        let asked: Vec<&Watcher> = others
            .filter(|w| w.ask.as_ref().is_some_and(|ask| ask.send(()).is_ok()))
            .collect();
        let mine = (0..LOOKS)
            .map(|_| self.here.disturbance())
            .fold(f64::INFINITY, f64::min);
        // One that may not be pinned is gone, and says nothing.
        let theirs = asked.into_iter().filter_map(|w| w.tell.recv().ok());
        theirs.fold(mine, f64::max)
    }

    /// Waits until the cores are quiet, or until patience is at its end.
    pub fn wait(&self, several: bool, patience: &mut Duration) {
        let begin = Instant::now();
        // Two in a row: most quiet moments are shorter than a slice.
        while (self.disturbance(several) > SLACK || self.disturbance(several) > SLACK) && begin.elapsed() < *patience {}
        *patience = patience.saturating_sub(begin.elapsed());
    }

    /// How long this thread has waited for a core.
    pub fn waited_ns(&self) -> u64 {
        self.here.waited_ns()
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

/// Share of the time between two readings of [`stolen_and_total`] that was stolen, 0 to 1.
pub fn stolen_share(before: (u64, u64), after: (u64, u64)) -> f64 {
    let (stolen, total) = (after.0.saturating_sub(before.0), after.1.saturating_sub(before.1));
    #[expect(clippy::cast_precision_loss, reason = "a share of jiffies")]
    let share = stolen as f64 / total.max(1) as f64;
    share.min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_never_faster_than_its_best_and_patience_ends() {
        let core = Core::new();
        let least = (0..100).map(|_| core.disturbance()).fold(f64::INFINITY, f64::min);
        assert!(least > -0.9);
        for several in [false, true] {
            let cores = Cores::new(several);
            let mut patience = Duration::from_millis(1);
            for _ in 0..3 {
                cores.wait(several, &mut patience);
            }
            assert!(patience <= Duration::from_millis(1));
        }
    }

    /// Law: what counts is the share of time that was lost, not whether anything happened.
    #[test]
    fn a_long_call_is_not_spoilt_by_one_switch_and_a_short_one_is() {
        let of = |took_ms: f64, switches| Loss {
            took_s: took_ms / 1e3,
            waited_s: f64::from(switches) * 20e-6,
            switches,
            ..Loss::default()
        };
        // 20 µs of waiting and 2 µs of other caches: 18 % of 120 µs, 2.2 % of 1 ms, 0.2 % of 10 ms.
        assert!(!of(0.12, 1).is_quiet() && !of(1.0, 1).is_quiet());
        assert!(of(1.2, 1).is_quiet() && of(10.0, 1).is_quiet() && of(10.0, 8).is_quiet());
        assert!(!of(10.0, 12).is_quiet());
        assert!(of(0.12, 0).is_quiet());
        assert!((of(10.0, 1).share() - 0.0022).abs() < 1e-12);
        // A stolen jiffy of a call of 100 ms is a tenth of it.
        let stolen = |took_s| Loss {
            took_s,
            stolen_s: 0.01,
            ..Loss::default()
        };
        assert!(!stolen(0.1).is_quiet() && stolen(1.0).is_quiet());
    }

    #[test]
    fn a_neighbour_shows_at_either_end_of_a_short_call_and_at_both_of_a_long_one() {
        let of = |took_s, before, after| Loss {
            took_s,
            before,
            after,
            ..Loss::default()
        };
        assert!(of(1e-4, 0.05, 0.05).is_quiet());
        assert!(!of(1e-4, 0.05, 0.5).is_quiet() && !of(1e-4, 0.5, 0.0).is_quiet());
        assert!(of(1e-2, 0.05, 0.5).is_quiet() && !of(1e-2, 0.5, 0.5).is_quiet());
    }

    #[test]
    fn shares_of_stolen_time() {
        assert_eq!(stolen_share((10, 1000), (10, 1000)), 0.0);
        assert_eq!(stolen_share((10, 1000), (20, 1100)), 0.1);
        // Counters that went backwards (another machine after a move) say nothing.
        assert_eq!(stolen_share((10, 1000), (5, 900)), 0.0);
    }
}
