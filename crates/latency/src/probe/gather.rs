//! Sessions: what one process measures ([`Job`]), in batches that live at once, and what all sessions of a thing say
//! together. Rounds and slices are `rounds`'s; which jobs there are, `measure`'s.

use std::time::{Duration, Instant};

use cotk_run::cancel::Cancel;
use cotk_run::seeds::Seeds;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::core::{stolen_and_total, stolen_share};
use super::rounds::{self, Pace, Timed};
use super::{NetworkProbe, Probe, median, quantile};
use crate::graph::Graph;
use crate::profile::{NetworkRow, Row, Taken};
use crate::work::{Key, Tier};
use crate::{Error, Result};

/// How much of everything.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Independent builds of each thing, each in a process of its own.
    pub sessions: u32,
    /// Keys of each kernel path at least, see [`Probe::spread`].
    pub per_path: usize,
    /// For operators.
    pub pace: Pace,
    /// For whole networks.
    pub network_pace: Pace,
    /// All of it together takes about this long; no limit without.
    pub budget: Option<Duration>,
}

impl Settings {
    /// `--quick`: fewer slices; as few sessions as a table may have.
    pub const QUICK: Self = Self {
        sessions: 3,
        per_path: 4,
        pace: Pace {
            rounds: 4,
            slice: Duration::from_micros(120),
            patience: Duration::from_millis(12),
        },
        network_pace: Pace {
            rounds: 5,
            slice: Duration::from_micros(150),
            patience: Duration::from_millis(60),
        },
        budget: Some(Duration::from_secs(56)),
    };
    /// The whole measurement.
    pub const FULL: Self = Self {
        sessions: 3,
        per_path: 12,
        pace: Pace {
            rounds: 5,
            slice: Duration::from_micros(120),
            patience: Duration::from_millis(40),
        },
        network_pace: Pace {
            rounds: 6,
            slice: Duration::from_micros(150),
            patience: Duration::from_millis(200),
        },
        budget: Some(Duration::from_secs(570)),
    };
}

/// One thing that is measured: an operator, or a network by its place in the plan's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    Key(Key),
    Network(usize),
}

/// One session of one thing: a line of the journal.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Session {
    pub subject: Subject,
    pub session: u32,
    /// Which process of the measurement took it.
    pub process: u32,
    /// Seconds of measuring until then, those of earlier starts included.
    pub at_s: f64,
    pub timed: Timed,
    /// Share of the time that the hypervisor took from all cores while this and what lived beside it were timed, in percent.
    #[serde(default)]
    pub steal_pct: f64,
}

/// A network with the threads that it runs on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Threaded {
    pub graph: Graph,
    pub threads: u32,
}

/// What one process measures, in this order of batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub session: u32,
    pub process: u32,
    pub seed: u64,
    pub settings: Settings,
    /// In groups: a group is done before the next begins.
    pub subjects: Vec<Vec<Subject>>,
    /// The plan's list.
    pub networks: Vec<Threaded>,
    /// No batch begins after this much time.
    pub limit: Option<Duration>,
    /// How many of the first groups are needed: these have until `needed_limit` instead.
    pub needed: usize,
    pub needed_limit: Option<Duration>,
}

impl Job {
    /// After how much time no batch of this group begins.
    pub fn limit_of(&self, group: usize) -> Option<Duration> {
        if group < self.needed {
            self.needed_limit
        } else {
            self.limit
        }
    }
}

/// What a process measures with.
pub struct Tools<'a> {
    pub probes: &'a [Box<dyn Probe>],
    /// Keys that are prepared at once, by probe: what they hold in memory adds up.
    pub live: &'a [usize],
    pub networks: Option<&'a dyn NetworkProbe>,
}

/// Networks that are prepared at once.
const LIVE_NETWORKS: usize = 16;

/// Where jobs run.
pub trait Runner {
    /// Runs one job, handing over each session as it is done.
    ///
    /// # Errors
    /// What a probe reports; what `each` returns; [`cotk_run::Error::Cancelled`] between batches.
    fn run(
        &self,
        job: &Job,
        tools: &Tools<'_>,
        cancel: &Cancel,
        each: &mut dyn FnMut(Session) -> Result<()>,
    ) -> Result<()>;
}

/// Runs jobs where it is called: for tests and for measurements of seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct InProcess;

impl Runner for InProcess {
    fn run(
        &self,
        job: &Job,
        tools: &Tools<'_>,
        cancel: &Cancel,
        each: &mut dyn FnMut(Session) -> Result<()>,
    ) -> Result<()> {
        let begin = Instant::now();
        let mut order = Seeds::new(job.seed).stream(&format!("order of process {}", job.process));
        for (at_group, group) in job.subjects.iter().enumerate() {
            let limit = job.limit_of(at_group);
            // Probes apart, each in batches of what may live at once: a large cold buffer of one would evict what another keeps
            // hot. Batches in random order, so that a limit cuts all probes alike.
            let mut of_probe: Vec<Vec<Subject>> = vec![Vec::new(); tools.probes.len() + 1];
            for subject in group {
                let at = match subject {
                    Subject::Key(key) => tools.probes.iter().position(|p| p.measures(key)),
                    Subject::Network(_) => Some(tools.probes.len()),
                };
                let at = at.ok_or_else(|| failed(subject, job, "nobody measures it"))?;
                of_probe[at].push(*subject);
            }
            let mut batches: Vec<(usize, Vec<Subject>)> = Vec::new();
            for (at, mut subjects) in of_probe.into_iter().enumerate() {
                let live = tools.live.get(at).copied().unwrap_or(LIVE_NETWORKS).max(1);
                subjects.shuffle(&mut order);
                batches.extend(subjects.chunks(live).map(|batch| (at, batch.to_vec())));
            }
            batches.shuffle(&mut order);
            for (at, batch) in batches {
                cancel.check()?;
                if limit.is_some_and(|limit| begin.elapsed() > limit) {
                    break;
                }
                let prepare = |subject: &Subject| match subject {
                    Subject::Key(key) => tools.probes[at].prepare(key, job.session),
                    Subject::Network(index) => {
                        let network = job.networks.get(*index);
                        let (network, probe) = network
                            .zip(tools.networks)
                            .ok_or_else(|| failed(subject, job, "nobody runs whole networks here"))?;
                        probe.prepare(&network.graph, network.threads, job.session)
                    }
                };
                let prepared = batch.iter().map(prepare).collect::<Result<Vec<_>>>()?;
                let pace = if at == tools.probes.len() {
                    &job.settings.network_pace
                } else {
                    &job.settings.pace
                };
                let before = stolen_and_total();
                let timed = rounds::time(prepared, pace, &mut order)?;
                let steal_pct = 100.0 * stolen_share(before, stolen_and_total());
                for (subject, timed) in batch.iter().zip(timed) {
                    each(Session {
                        subject: *subject,
                        session: job.session,
                        process: job.process,
                        at_s: begin.elapsed().as_secs_f64(),
                        timed,
                        steal_pct,
                    })?;
                }
            }
        }
        Ok(())
    }
}

fn failed(subject: &Subject, job: &Job, detail: &str) -> Error {
    let key = match subject {
        Subject::Key(key) => key.to_string(),
        Subject::Network(index) => {
            let network = job.networks.get(*index);
            network.map_or_else(|| format!("network {index}"), |n| n.graph.name().to_owned())
        }
    };
    Error::Probe {
        probe: "all".into(),
        key,
        detail: detail.into(),
    }
}

/// Sessions of one thing that differ by more than this are measured once more.
const APART: f64 = 0.10;

/// Whether the least disturbed session counts, not the middle one: what reads weights or a working set from shared caches
/// and memory is slowed by neighbours for tens of seconds at a time, which no canary in a first-level cache shows, and is
/// never hastened. (40 keys of the engine, six processes: medians of three sessions differ from those of the other three by
/// 14.5 %, their smallest by 5 %.)
pub fn takes_best(subject: Subject) -> bool {
    match subject {
        Subject::Key(Key::Expert(_) | Key::Dense(_) | Key::Attention(_) | Key::Glue(_)) => true,
        Subject::Key(Key::Read(read)) => matches!(read.tier, Tier::L2 | Tier::L3 | Tier::Memory | Tier::WorkingSet),
        Subject::Key(_) | Subject::Network(_) => false,
    }
}

/// Whether a thing is timed in twice as many sessions: what neighbours slow for long, where one of them meets a quiet time; and
/// differences of what several threads take, which a thread that wakes late spoils for a whole session.
pub fn is_unsteady(subject: Subject) -> bool {
    let several = |key: &Key| match key {
        Key::Conv(c) => c.threads > 1,
        Key::LowRank(l) => l.conv.threads > 1,
        Key::Linear(l) => l.threads > 1,
        Key::Add(p) | Key::GlobalAvgPool(p) | Key::Entry(p) => p.threads > 1,
        Key::Edge(e) => e.threads > 1,
        Key::Pool(p) => p.threads > 1,
        Key::Elementwise(e) => e.threads > 1,
        _ => false,
    };
    takes_best(subject) || matches!(subject, Subject::Key(key) if several(&key))
}

/// Whether the sessions of a thing disagree. Times below a µs are within the timer's own noise.
pub fn is_apart(sessions: &[Session], subject: Subject) -> bool {
    let medians = sessions
        .iter()
        .filter(|s| s.subject == subject)
        .map(|s| s.timed.median_us);
    let (low, high) = medians.fold((f64::INFINITY, 0.0f64), |(lo, hi), m| (lo.min(m), hi.max(m)));
    !takes_best(subject) && high >= 1.0 && high / low.max(1e-3) - 1.0 > APART
}

/// What all sessions of a thing say together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Together {
    pub sessions: u32,
    pub count: u32,
    /// Median over sessions of the median over slices; of the least disturbed session where that counts ([`takes_best`]).
    pub median_us: f64,
    /// Tenth percentile of slices, smallest session.
    pub q10_us: f64,
    /// Median absolute deviation of slices, or half the range of the sessions' medians if that is larger; how far the next
    /// session is where the best one counts.
    pub mad_us: f64,
    pub taken: Taken,
}

/// The sessions of one thing, `None` when there are none.
pub fn together(sessions: &[Session], subject: Subject) -> Option<Together> {
    let of: Vec<&Session> = sessions.iter().filter(|s| s.subject == subject).collect();
    let steals: Vec<f64> = of.iter().map(|s| s.steal_pct).collect();
    let of: Vec<&Timed> = of.into_iter().map(|s| &s.timed).collect();
    let medians: Vec<f64> = of.iter().map(|t| t.median_us).collect();
    let mads: Vec<f64> = of.iter().map(|t| t.mad_us).collect();
    let (median_us, mad_us) = if takes_best(subject) {
        let mut best: Vec<f64> = of
            .iter()
            .map(|t| if t.quiet { t.median_us } else { t.q10_us })
            .collect();
        best.sort_by(f64::total_cmp);
        let best = (best.first().copied().unwrap_or_default(), best.get(1).copied());
        // How well it repeats is how near the next session comes.
        (best.0, best.1.map_or_else(|| median(&mads), |next| next - best.0))
    } else {
        let half_range = (quantile(&medians, 1.0) - quantile(&medians, 0.0)) / 2.0;
        (median(&medians), median(&mads).max(half_range))
    };
    (!of.is_empty()).then(|| Together {
        sessions: u32::try_from(of.len()).unwrap_or(u32::MAX),
        count: of.iter().map(|t| t.count).sum(),
        median_us,
        q10_us: of.iter().map(|t| t.q10_us).fold(f64::INFINITY, f64::min),
        mad_us,
        taken: Taken {
            dropped: Some(of.iter().map(|t| t.dropped).sum()),
            is_quiet: Some(of.iter().all(|t| t.quiet)),
            steal_pct: Some(mean(&steals)),
            lost_pct: Some(mean(&of.iter().map(|t| t.lost_pct).collect::<Vec<_>>())),
            switches: Some(of.iter().map(|t| t.switches).fold(0, u32::saturating_add)),
        },
    })
}

fn mean(values: &[f64]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a handful of sessions")]
    let count = values.len().max(1) as f64;
    values.iter().sum::<f64>() / count
}

/// One row per key, in key order.
pub fn rows(sessions: &[Session]) -> Vec<Row> {
    let mut keys: Vec<Key> = sessions
        .iter()
        .filter_map(|s| match s.subject {
            Subject::Key(key) => Some(key),
            Subject::Network(_) => None,
        })
        .collect();
    keys.sort_unstable();
    keys.dedup();
    let row = |key: Key| {
        together(sessions, Subject::Key(key)).map(|t| Row {
            key,
            sessions: t.sessions,
            count: t.count,
            median_us: t.median_us,
            q10_us: t.q10_us,
            mad_us: t.mad_us,
            taken: t.taken,
        })
    };
    keys.into_iter().filter_map(row).collect()
}

/// One row per network that was measured, in the plan's order.
pub fn network_rows(sessions: &[Session], networks: &[Threaded]) -> Vec<NetworkRow> {
    let row = |(at, network): (usize, &Threaded)| {
        together(sessions, Subject::Network(at))
            .filter(|t| t.median_us > 0.0)
            .map(|t| NetworkRow {
                graph: network.graph.clone(),
                threads: network.threads,
                sessions: t.sessions,
                count: t.count,
                median_us: t.median_us,
                q10_us: t.q10_us,
                mad_us: t.mad_us,
                is_from_use: false,
            })
    };
    networks.iter().enumerate().filter_map(row).collect()
}

/// Share of slices that were kept, and the median of all slices over that of the kept ones; of things that found a quiet core.
pub fn disturbance(sessions: &[Session]) -> (f64, f64) {
    let quiet: Vec<&Timed> = { sessions.iter() }
        .map(|s| &s.timed)
        .filter(|t| t.quiet && t.median_us > 0.0)
        .collect();
    let kept: u32 = quiet.iter().map(|t| t.count).sum();
    let all: u32 = quiet.iter().map(|t| t.count + t.dropped).sum();
    let slower: Vec<f64> = quiet.iter().map(|t| t.all_us / t.median_us).collect();
    if quiet.is_empty() {
        return (0.0, 1.0);
    }
    (f64::from(kept) / f64::from(all.max(1)), median(&slower))
}

/// Median and 90th percentile of |ln(a / b)| over all pairs of sessions of these keys, as fractions; NaN without a pair.
pub fn noise_floor(sessions: &[Session], canaries: &[Key]) -> (f64, f64) {
    let mut repeats = Vec::new();
    for key in canaries {
        let of: Vec<f64> = sessions
            .iter()
            .filter(|s| s.subject == Subject::Key(*key))
            .map(|s| s.timed.median_us.max(1e-3))
            .collect();
        for (i, a) in of.iter().enumerate() {
            repeats.extend(of[..i].iter().map(|b| (a / b).ln().abs()));
        }
    }
    (median(&repeats), quantile(&repeats, 0.9))
}
