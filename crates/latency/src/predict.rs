//! From work to milliseconds: an exact row of the table wins, else the fitted terms of its path, flagged where they reach
//! beyond what was measured. Pure: no clock, no file. Laws: fitted predictions grow with every size; a sum's terms add up.

use std::collections::{BTreeMap, HashMap};

use crate::correct::Correction;
use crate::fit::PathFit;
use crate::fit::joint::Calibration;
use crate::moe::neighbours::Neighbours;
use crate::smooth::Smoother;
use crate::transfer::profile::Transfer;
use crate::walk::{self, Network};
use crate::work::{
    Block, EdgeKind, ElementwiseKind, Family, Heat, Key, LowRankKey, Path, ReadKey, TermGroup, Tier, Work,
};
use crate::{Error, Result};

/// Where a prediction comes from, strongest first; a sum is as strong as its weakest part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// This very key was measured.
    Table,
    /// Fitted terms of its kernel path.
    Fit,
    /// Another machine's profile, scaled by a few measurements here.
    Transfer,
    /// Nominal figures of the hardware.
    Datasheet,
}

/// What a reader of a prediction must know.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Flag {
    /// A count lies outside what was measured on this path: the spread is widened.
    Extrapolated { path: String },
    /// A kind of pass over bytes that was never measured: a similar one stands in.
    StandIn { path: String, by: String },
    /// Never measured with this number of threads: another number stands in.
    OtherThreads { path: String, measured: u32 },
    /// The profile's own noise floor is above 5 %.
    Noisy,
    /// The profile was taken with `--quick`.
    Quick,
    /// A committed reference profile: comparable between commits, not this machine's own times.
    Reference,
    /// Used on another machine with `--force`.
    OtherMachine,
    /// What reads memory takes so much longer now than when the profile was taken, in percent; it is counted in.
    MemoryNow { threads: u32, longer_pct: i32 },
    /// Another machine's profile, scaled by a few networks measured here.
    Transferred { from: String, networks: usize },
    /// `profile.toml` was edited by hand, here first.
    Edited { line: u64 },
}

impl std::fmt::Display for Flag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Extrapolated { path } => write!(f, "extrapolated: {path}"),
            Self::StandIn { path, by } => write!(f, "{path}: never measured, taken for {by}"),
            Self::OtherThreads { path, measured } => write!(f, "{path}: measured with {measured} threads only"),
            Self::Noisy => write!(f, "noisy profile"),
            Self::Quick => write!(f, "quick profile"),
            Self::Reference => write!(f, "reference profile, not this machine's"),
            Self::OtherMachine => write!(f, "profile of another machine, forced"),
            Self::MemoryNow { threads, longer_pct } => {
                write!(
                    f,
                    "memory takes {longer_pct:+} % with {threads} threads now, beside the profile"
                )
            }
            Self::Transferred { from, networks } => write!(f, "carried over from {from} by {networks} networks"),
            Self::Edited { line } => write!(f, "profile.toml was edited by hand, line {line}"),
        }
    }
}

/// Predicted time by what it is spent on, in ms.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Terms {
    pub launch_ms: f64,
    pub layout_ms: f64,
    pub memory_ms: f64,
    pub compute_ms: f64,
    pub link_ms: f64,
}

impl Terms {
    fn slot(&mut self, group: TermGroup) -> &mut f64 {
        match group {
            TermGroup::Launch => &mut self.launch_ms,
            TermGroup::Layout => &mut self.layout_ms,
            TermGroup::Memory => &mut self.memory_ms,
            TermGroup::Compute => &mut self.compute_ms,
            TermGroup::Link => &mut self.link_ms,
        }
    }

    /// Sum of all five.
    pub fn sum_ms(&self) -> f64 {
        self.launch_ms + self.layout_ms + self.memory_ms + self.compute_ms + self.link_ms
    }

    pub(crate) fn add(&mut self, other: &Self, times: f64) {
        self.launch_ms += times * other.launch_ms;
        self.layout_ms += times * other.layout_ms;
        self.memory_ms += times * other.memory_ms;
        self.compute_ms += times * other.compute_ms;
        self.link_ms += times * other.link_ms;
    }
}

/// How long something will take.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// Median time of one call.
    pub ms: f64,
    /// Nine in ten medians lie between these two.
    pub lo_ms: f64,
    pub hi_ms: f64,
    /// Sums to `ms`.
    pub terms: Terms,
    pub origin: Origin,
    /// Sorted, each once.
    pub flags: Vec<Flag>,
}

impl Prediction {
    /// Half of the interval.
    pub fn spread_ms(&self) -> f64 {
        (self.hi_ms - self.lo_ms) / 2.0
    }
}

/// Anything that can say how long work takes on one machine. Pure, cheap, no I/O.
pub trait CostModel: Send + Sync {
    /// # Errors
    /// [`crate::Error::NotMeasured`] when nothing at all is known about a kind of operator.
    fn predict(&self, work: &Work<'_>) -> Result<Prediction>;
}

/// A measured machine: rows by key and fitted paths.
#[derive(Debug, Clone)]
pub struct Model {
    name: String,
    block: Block,
    /// µs and relative spread of a repeat.
    table: HashMap<Key, (f64, f64)>,
    fits: BTreeMap<Path, PathFit>,
    noise_floor: f64,
    flags: Vec<Flag>,
    /// Of a profile that was carried over.
    transfer: Option<Transfer>,
    /// What use has taught about sums, by number of threads.
    corrections: Vec<Correction>,
    /// Last-level cache; 0 where it is not known.
    cache_bytes: u64,
    /// How sure sums over networks are, by number of threads.
    calibrations: Vec<Calibration>,
    /// What measured neighbours say about fitted operators.
    smoother: Smoother,
    /// The same of our engine's.
    neighbours: Neighbours,
    /// How many times as long memory takes now as in the profile, by number of threads.
    memory_now: BTreeMap<u32, f64>,
}

/// One operator's part in a sum.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) path: Path,
    pub(crate) ms: f64,
    /// ln of the half interval that holds nine in ten.
    pub(crate) spread_ln: f64,
    /// The same without a row of its own, as left-out networks judge sums.
    pub(crate) unseen_ln: f64,
    pub(crate) terms: Terms,
    pub(crate) origin: Origin,
}

impl Model {
    /// From measured rows `(key, µs, relative spread)` and fitted paths. `noise_floor` is a fraction; `flags` go with every
    /// prediction.
    pub fn new(
        name: impl Into<String>,
        block: Block,
        rows: impl IntoIterator<Item = (Key, f64, f64)>,
        fits: impl IntoIterator<Item = PathFit>,
        noise_floor: f64,
        flags: Vec<Flag>,
    ) -> Self {
        let table: HashMap<Key, (f64, f64)> = rows.into_iter().map(|(key, us, spread)| (key, (us, spread))).collect();
        let fits: BTreeMap<Path, PathFit> = fits.into_iter().map(|fit| (fit.path, fit)).collect();
        let mut model = Self {
            name: name.into(),
            block,
            table,
            fits,
            smoother: Smoother::default(),
            neighbours: Neighbours::default(),
            noise_floor,
            flags,
            transfer: None,
            corrections: Vec::new(),
            cache_bytes: 0,
            calibrations: Vec::new(),
            memory_now: BTreeMap::new(),
        };
        // What several threads make of one thread's time rests on what the rows of one thread say: those first.
        for of_teams in [false, true] {
            let is_next = |key: &Key| {
                let fit = model.fits.get(&key.path(block));
                of_teams || fit.is_none_or(|fit| fit.team.is_none())
            };
            let rows = model.table.iter().filter(|(key, _)| is_next(key));
            let rows: Vec<(Key, f64, f64)> = rows.map(|(key, (us, _))| (*key, *us, model.bare_us(key))).collect();
            model.smoother = Smoother::new(rows.into_iter(), block);
        }
        let rows = model.table.iter().map(|(key, (us, _))| (*key, *us, model.bare_us(key)));
        model.neighbours = Neighbours::new(rows, block);
        model
    }

    /// What a key's path says, neighbours of its own number of threads aside. µs; 0 without a fit.
    fn bare_us(&self, key: &Key) -> f64 {
        let fit = self.fits.get(&key.path(self.block));
        fit.map_or(0.0, |fit| self.by_us(fit, key))
    }

    /// What a fit says of a key, be it the fit of its path or of another number of threads: of several threads by what one
    /// thread takes, which is known better than by its terms alone. µs.
    fn by_us(&self, fit: &PathFit, key: &Key) -> f64 {
        let features = key.features(self.block);
        match (fit.team, key.with_threads(1)) {
            (Some(team), Some(one)) => {
                let alone = self.own_part(&one, &mut Vec::new());
                alone.map_or_else(|_| fit.us(&features), |alone| team.us(1e3 * alone.ms))
            }
            _ => fit.us(&features),
        }
    }

    /// The same, carried over from another machine: rows and fits stay those of its source, predictions are
    /// scaled, and none is surer than whole networks were here.
    pub fn carried_over(self, transfer: Transfer) -> Self {
        Self {
            transfer: Some(transfer),
            ..self
        }
    }

    /// The same with what use has taught about sums over networks.
    pub fn corrected(self, corrections: Vec<Correction>) -> Self {
        Self { corrections, ..self }
    }

    /// The same on a machine whose largest cache holds so many bytes: what fits it is not read from memory.
    pub fn with_cache(self, cache_bytes: u64) -> Self {
        Self { cache_bytes, ..self }
    }

    /// The same with what left-out networks say of the spread of sums.
    pub fn calibrated(self, calibrations: Vec<Calibration>) -> Self {
        Self { calibrations, ..self }
    }

    /// The same at a minute when reading memory takes `ratio` times as long as in the profile with so many threads: what our
    /// engine reads from memory does, too.
    #[must_use]
    pub fn with_memory_now(mut self, threads: u32, ratio: f64) -> Self {
        self.memory_now.insert(threads, ratio);
        #[expect(clippy::cast_possible_truncation, reason = "a percentage")]
        let longer_pct = (100.0 * (ratio - 1.0)).round() as i32;
        if longer_pct != 0 {
            self.flags.push(Flag::MemoryNow { threads, longer_pct });
        }
        self
    }

    /// The longest pass over memory in the table with so many threads, and what it took. µs.
    pub fn memory_pass(&self, threads: u32) -> Option<(ReadKey, f64)> {
        let passes = self.table.iter().filter_map(|(key, (us, _))| match key {
            Key::Read(read) if read.tier == Tier::Memory && read.threads == threads => Some((*read, *us)),
            _ => None,
        });
        passes.max_by_key(|pass| pass.0.bytes)
    }

    /// Bytes of the largest cache; 0 where it is not known.
    pub fn cache_bytes(&self) -> u64 {
        self.cache_bytes
    }

    /// Whether this very key was measured.
    pub fn has(&self, key: &Key) -> bool {
        self.table.contains_key(key)
    }

    /// What goes with every prediction.
    pub fn flags(&self) -> &[Flag] {
        &self.flags
    }

    /// Reading speed of a tier in bytes per second, from the fitted slope.
    ///
    /// # Errors
    /// [`Error::NotMeasured`].
    pub fn bytes_per_s(&self, tier: Tier, threads: u32) -> Result<f64> {
        let key = |bytes| Key::Read(ReadKey { tier, bytes, threads });
        let mut flags = Vec::new();
        let fit = self.fit(&key(1 << 20), &mut flags)?;
        let one_kib = key(1 << 10).features(self.block);
        let us: f64 = fit
            .parts(&one_kib)
            .filter(|(t, _)| t.group() != TermGroup::Launch)
            .map(|(_, us)| us)
            .sum();
        let now = self.memory_now.get(&threads).filter(|_| tier == Tier::Memory);
        Ok(1024.0 / (us * now.unwrap_or(&1.0)).max(1e-12) * 1e6)
    }

    /// The fit of a key's path; of the nearest number of threads when this one was never measured.
    pub(crate) fn fit(&self, key: &Key, flags: &mut Vec<Flag>) -> Result<&PathFit> {
        let path = key.path(self.block);
        if let Some(fit) = self.fits.get(&path) {
            return Ok(fit);
        }
        let same_family = self.fits.values().filter(|fit| fit.path.family == path.family);
        match same_family.min_by_key(|fit| fit.path.threads.abs_diff(path.threads)) {
            Some(fit) => {
                flags.push(Flag::OtherThreads {
                    path: path.to_string(),
                    measured: fit.path.threads,
                });
                Ok(fit)
            }
            None if stand_in(path.family).is_some() => self.stand_in(key, path, flags),
            None => Err(Error::NotMeasured {
                profile: self.name.clone(),
                path: path.to_string(),
                key: key.to_string(),
            }),
        }
    }

    /// Nothing honest can be said of this key.
    pub(crate) fn not_measured(&self, key: &Key) -> Error {
        Error::NotMeasured {
            profile: self.name.clone(),
            path: key.path(self.block).to_string(),
            key: key.to_string(),
        }
    }

    /// The machine's.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Channels in a block of the machine's layout.
    pub(crate) fn block(&self) -> Block {
        self.block
    }

    /// A pass over bytes that was never measured is like another one that was.
    fn stand_in(&self, key: &Key, path: Path, flags: &mut Vec<Flag>) -> Result<&PathFit> {
        let by = stand_in(path.family).into_iter().flatten();
        let of = |family: Family| {
            let fits = self.fits.values().filter(move |fit| fit.path.family == family);
            fits.min_by_key(|fit| fit.path.threads.abs_diff(path.threads))
        };
        let fit = by.copied().find_map(of).ok_or_else(|| Error::NotMeasured {
            profile: self.name.clone(),
            path: path.to_string(),
            key: key.to_string(),
        })?;
        flags.push(Flag::StandIn {
            path: path.to_string(),
            by: fit.path.to_string(),
        });
        Ok(fit)
    }

    pub(crate) fn part(&self, key: &Key, flags: &mut Vec<Flag>) -> Result<Part> {
        let part = self.by_memory(key, self.own_part(key, flags)?);
        Ok(match &self.transfer {
            Some(transfer) => {
                let features = key.features(self.block);
                transfer.apply(key, &features, self.fits.get(&features.path), part)
            }
            None => part,
        })
    }

    /// A part that reads memory, as memory is now.
    fn by_memory(&self, key: &Key, part: Part) -> Part {
        let reads = match key {
            Key::Expert(e) => e.heat == Heat::Cold,
            Key::Dense(d) => d.heat == Heat::Cold,
            Key::Attention(a) => a.heat == Heat::Cold,
            Key::Read(read) => read.tier == Tier::Memory,
            _ => false,
        };
        let ratio = { self.memory_now.get(&part.path.threads) }.filter(|_| reads);
        ratio.map_or(part, |ratio| part.with_memory(*ratio))
    }

    /// By rows and fits as they stand, on the machine where they were measured.
    fn own_part(&self, key: &Key, flags: &mut Vec<Flag>) -> Result<Part> {
        let features = key.features(self.block);
        let mut terms = Terms::default();
        let fit = self.fits.get(&features.path);
        let predicted = fit.map_or(0.0, |fit| fit.us(&features));
        let row = self.table.get(key).filter(|(us, spread)| match fit {
            Some(fit) => !is_unresolved(key, *us, *spread, fit),
            None => true,
        });
        if let Some(&(us, spread)) = row {
            // The row's time, split as its path's terms would have it.
            match fit.filter(|_| predicted > 0.0) {
                Some(fit) => fit
                    .parts(&features)
                    .for_each(|(t, part)| *terms.slot(t.group()) += us / 1e3 * part / predicted),
                None => *terms.slot(TermGroup::Launch) += us / 1e3,
            }
            let spread_ln = NINE_IN_TEN * spread.max(self.noise_floor);
            return Ok(Part {
                path: features.path,
                ms: us / 1e3,
                spread_ln,
                unseen_ln: fit.map_or(spread_ln, |fit| fit.spread_ln),
                terms,
                origin: Origin::Table,
            });
        }
        if let Key::LowRank(triple) = key {
            return self.triple(triple, features.path, flags);
        }
        let before = flags.len();
        let fit = self.fit(key, flags)?;
        fit.parts(&features)
            .for_each(|(t, us)| *terms.slot(t.group()) += us / 1e3);
        let doubt = if fit.team.is_some() {
            1.0
        } else {
            self.smoother.doubt(key, &features.path)
        };
        let mut spread_ln = fit.spread_ln * doubt;
        if flags.len() > before {
            spread_ln = spread_ln.max(1.0); // another number of threads: hardly more than the order of magnitude
        }
        let said_us = self.by_us(fit, key);
        let mut learnt = self.smoother.factor(key, &features.path) * said_us / fit.us(&features).max(f64::MIN_POSITIVE);
        let mut beside_ln = fit.spread_ln;
        if let Some((ln, half_ln)) = self.neighbours.at(key, &fit.path).filter(|_| flags.len() == before) {
            learnt = ln.exp();
            (spread_ln, beside_ln) = (half_ln, half_ln);
        }
        terms = {
            let mut scaled = Terms::default();
            scaled.add(&terms, learnt);
            scaled
        };
        let outside_ln = fit.outside_ln(&features);
        if outside_ln > 0.0 {
            flags.push(Flag::Extrapolated {
                path: features.path.to_string(),
            });
            spread_ln = spread_ln.max(beside_ln + 0.5 * outside_ln);
        }
        Ok(Part {
            path: features.path,
            ms: terms.sum_ms(),
            spread_ln,
            unseen_ln: spread_ln,
            terms,
            origin: Origin::Fit,
        })
    }

    /// A triple that was never measured as one: its three convolutions and the edges between them, in a chain of its kind.
    fn triple(&self, triple: &LowRankKey, path: Path, flags: &mut Vec<Flag>) -> Result<Part> {
        let keys = triple.keys(self.block);
        let parts = keys.iter().map(|key| Ok((self.own_part(key, flags)?, 1.0)));
        let sum = self.sum(&parts.collect::<Result<Vec<_>>>()?, Vec::new());
        let spread_ln = if sum.ms > 0.0 { (sum.hi_ms / sum.ms).ln() } else { 0.0 };
        Ok(Part {
            path,
            ms: sum.ms,
            spread_ln,
            unseen_ln: spread_ln,
            terms: sum.terms,
            origin: Origin::Fit,
        })
    }

    /// `(part, how often)`, in sum. Errors of parts are correlated: fully with themselves, by half within a kernel path, by a
    /// fifth across (reference 2.8); independence would look far too sure.
    pub(crate) fn sum(&self, parts: &[(Part, f64)], flags: Vec<Flag>) -> Prediction {
        let (mut ms, mut terms, mut origin) = (0.0, Terms::default(), Origin::Table);
        for (part, times) in parts {
            ms += times * part.ms;
            terms.add(&part.terms, *times);
            origin = origin.max(part.origin);
        }
        let spread_ln = Errors::of(parts).spread_ln(Correlation::USUAL);
        self.finish(ms, terms, origin, spread_ln, flags)
    }

    /// A prediction, with what holds for the whole profile.
    fn finish(
        &self,
        ms: f64,
        terms: Terms,
        mut origin: Origin,
        mut spread_ln: f64,
        mut flags: Vec<Flag>,
    ) -> Prediction {
        if let Some(transfer) = &self.transfer {
            (spread_ln, origin) = (spread_ln.max(transfer.spread_ln), origin.max(Origin::Transfer));
        }
        flags.extend(self.flags.iter().cloned());
        flags.sort();
        flags.dedup();
        Prediction {
            ms,
            lo_ms: ms * (-spread_ln).exp(),
            hi_ms: ms * spread_ln.exp(),
            terms,
            origin,
            flags,
        }
    }

    /// Parts of a whole network, with what use has taught about sums.
    pub(crate) fn network(&self, network: &Network, threads: u32, flags: &mut Vec<Flag>) -> Result<Vec<(Part, f64)>> {
        let correction = self.corrections.iter().find(|c| c.threads == threads);
        let one = |step: &walk::Step, flags: &mut Vec<Flag>| -> Result<(Part, f64)> {
            let part = self.part(&step.key, flags)?;
            Ok((correction.map_or(part, |c| part.scaled(c.scales(part.path))), 1.0))
        };
        let steps = walk::walk(network, threads, self.block).steps;
        steps.iter().map(|step| one(step, flags)).collect()
    }

    /// A network's operators in sum, with the interval that left-out networks ask for.
    fn whole(&self, network: &Network, threads: u32) -> Result<Prediction> {
        let mut flags = Vec::new();
        let parts = self.network(network, threads, &mut flags)?;
        let sum = self.sum(&parts, flags);
        let Some(calibration) = self.calibrations.iter().find(|c| c.threads == threads) else {
            return Ok(sum);
        };
        let mut spread_ln = calibration.network_factor * Errors::unseen(&parts).spread_ln(calibration.correlation);
        // Left-out networks were timed in the same minutes as the others: another day adds what repeats differ by.
        spread_ln = spread_ln.hypot(NINE_IN_TEN * self.noise_floor);
        if let Some(transfer) = &self.transfer {
            spread_ln = spread_ln.max(transfer.spread_ln);
        }
        Ok(Prediction {
            lo_ms: sum.ms * (-spread_ln).exp(),
            hi_ms: sum.ms * spread_ln.exp(),
            ..sum
        })
    }
}

impl Part {
    /// Bytes by a scale: to first order, where computing and reading overlap.
    fn with_memory(self, scale: f64) -> Self {
        let mut terms = self.terms;
        terms.memory_ms *= scale;
        // A part that is read and nothing else has no share.
        let (before, after) = (self.terms.sum_ms(), terms.sum_ms());
        let ms = if before > 0.0 {
            self.ms * after / before
        } else {
            self.ms
        };
        Self { ms, terms, ..self }
    }

    /// Calls and the rest by a scale each.
    fn scaled(self, (calls, rest): (f64, f64)) -> Self {
        let before = self.terms.sum_ms();
        let mut terms = Terms::default();
        terms.add(&self.terms, rest);
        terms.launch_ms = calls * self.terms.launch_ms;
        let scale = if before > 0.0 { terms.sum_ms() / before } else { calls };
        Self {
            ms: scale * self.ms,
            terms,
            ..self
        }
    }
}

/// How far errors of a sum's parts go together.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Correlation {
    /// Of two parts of one kernel path, and of two paths.
    pub within: f64,
    pub across: f64,
}

impl Correlation {
    /// Before measured networks say better (reference 2.8); independence would look far too sure.
    pub const USUAL: Self = Self {
        within: 0.5,
        across: 0.2,
    };
}

/// Errors of a sum's parts, added up in the three ways that a spread needs.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Errors {
    whole: f64,
    squares: f64,
    within: f64,
    all: f64,
}

impl Errors {
    fn of(parts: &[(Part, f64)]) -> Self {
        Self::sum(parts.iter().map(|(p, times)| (p.path, times * p.ms, p.spread_ln)))
    }

    /// As if no part had a row of its own: what was left out had none.
    fn unseen(parts: &[(Part, f64)]) -> Self {
        Self::sum(parts.iter().map(|(p, times)| (p.path, times * p.ms, p.unseen_ln)))
    }

    /// From path, time and half interval (ln) of each part.
    pub(crate) fn sum(parts: impl Iterator<Item = (Path, f64, f64)>) -> Self {
        let mut sum = Self::default();
        let mut by_path: BTreeMap<Path, f64> = BTreeMap::new();
        for (path, time, spread_ln) in parts {
            let error = time * spread_ln;
            sum.whole += time;
            sum.squares += error * error;
            sum.all += error;
            *by_path.entry(path).or_default() += error;
        }
        sum.within = by_path.values().map(|e| e * e).sum();
        sum
    }

    /// Half interval of the sum, in ln.
    pub(crate) fn spread_ln(&self, correlation: Correlation) -> f64 {
        let Correlation { within, across } = correlation;
        let variance = across * self.all * self.all + (within - across) * self.within + (1.0 - within) * self.squares;
        if self.whole > 0.0 {
            variance.max(0.0).sqrt() / self.whole
        } else {
            0.0
        }
    }
}

/// Whether a row says less than the fit of its path: the call of an empty session is not what a session costs a network, and
/// a slope of a few µs may be smaller than its own repeat.
fn is_unresolved(key: &Key, us: f64, spread: f64, fit: &PathFit) -> bool {
    const SHORT_US: f64 = 3.0;
    matches!(key, Key::Session { .. }) || (us < SHORT_US && NINE_IN_TEN * spread > fit.spread_ln)
}

/// Half width of a normal 90 % interval in standard deviations.
const NINE_IN_TEN: f64 = 1.645;

impl CostModel for Model {
    fn predict(&self, work: &Work<'_>) -> Result<Prediction> {
        let key = match work {
            Work::Operator(key) => *key,
            Work::Read(key) => Key::Read(*key),
            Work::Graph { graph, threads } => return self.whole(&Network::from(*graph), *threads),
            Work::Network { network, threads } => return self.whole(network, *threads),
            Work::Step(step) => return Ok(self.step(step)?.whole),
        };
        let mut flags = Vec::new();
        let part = self.part(&key, &mut flags)?;
        Ok(self.finish(part.ms, part.terms, part.origin, part.spread_ln, flags))
    }
}

/// Families that move bytes much as this one does, nearest first.
fn stand_in(family: Family) -> Option<&'static [Family]> {
    use crate::graph::Numerics::{F32, Int8};
    match family {
        Family::Edge(EdgeKind::ReorderIn | EdgeKind::ReorderOut | EdgeKind::TransposeF32 | EdgeKind::View) => Some(&[
            Family::Edge(EdgeKind::ReorderIn),
            Family::Edge(EdgeKind::ReorderOut),
            Family::Entry(F32),
            // A space of int8 networks alone measures none of these.
            Family::Edge(EdgeKind::Quantize),
            Family::Edge(EdgeKind::TransposeInt8),
            Family::Add(Int8),
            Family::Pool(Int8),
        ]),
        Family::Edge(EdgeKind::Quantize | EdgeKind::Dequantize | EdgeKind::TransposeInt8) => Some(&[
            Family::Edge(EdgeKind::Quantize),
            Family::Edge(EdgeKind::TransposeInt8),
            Family::Entry(Int8),
            Family::Edge(EdgeKind::ReorderIn),
            Family::Add(Int8),
            Family::Pool(Int8),
        ]),
        Family::Window(_, F32) | Family::Elementwise(_, F32) => Some(&[
            Family::Elementwise(ElementwiseKind::Unary, F32),
            Family::Pool(F32),
            Family::Add(F32),
        ]),
        Family::Window(_, Int8) | Family::Elementwise(_, Int8) => Some(&[
            Family::Add(Int8),
            Family::Pool(Int8),
            Family::Elementwise(ElementwiseKind::Unary, F32),
        ]),
        // Convolutions that another kernel runs: nearest in kind.
        Family::ConvPointwise | Family::ConvPatches | Family::ConvGrouped => Some(&[Family::ConvBlocked]),
        Family::ConvPatchesPointwise => Some(&[Family::ConvPatches, Family::ConvPointwise, Family::ConvBlocked]),
        Family::ConvInt8Pointwise | Family::ConvInt8Patches => Some(&[Family::ConvInt8]),
        Family::ConvInt8 => Some(&[Family::ConvInt8Patches]),
        Family::ConvInt8PatchesPointwise => {
            Some(&[Family::ConvInt8Patches, Family::ConvInt8Pointwise, Family::ConvInt8])
        }
        Family::DepthwiseInt8 => Some(&[Family::DepthwiseInt8Plain]),
        Family::DepthwiseInt8Plain => Some(&[Family::DepthwiseInt8]),
        Family::PoolPlain => Some(&[Family::Pool(F32), Family::Add(F32)]),
        Family::DepthwisePlain => Some(&[Family::DepthwiseBlocked]),
        Family::Session
        | Family::ConvAlone(_)
        | Family::ConvBlocked
        | Family::ConvFromNchw
        | Family::DepthwiseBlocked
        | Family::Linear(_)
        | Family::Add(_)
        | Family::Pool(_)
        | Family::Entry(_)
        | Family::LowRank(_)
        | Family::Expert { .. }
        | Family::Dense { .. }
        | Family::Attention { .. }
        | Family::Glue
        | Family::Read(_) => None,
    }
}

/// The family's name for messages that list what a profile is good for.
pub(crate) fn kind(family: Family) -> &'static str {
    match family {
        Family::Session
        | Family::ConvAlone(_)
        | Family::ConvBlocked
        | Family::ConvFromNchw
        | Family::ConvPatches
        | Family::DepthwiseBlocked
        | Family::DepthwisePlain
        | Family::ConvGrouped
        | Family::ConvPointwise
        | Family::ConvPatchesPointwise
        | Family::ConvInt8
        | Family::ConvInt8Pointwise
        | Family::ConvInt8Patches
        | Family::ConvInt8PatchesPointwise
        | Family::DepthwiseInt8Plain
        | Family::DepthwiseInt8
        | Family::Linear(_)
        | Family::Add(_)
        | Family::Pool(_)
        | Family::PoolPlain
        | Family::Entry(_)
        | Family::Edge(_)
        | Family::Window(..)
        | Family::Elementwise(..)
        | Family::LowRank(_) => "cnn",
        Family::Expert { .. } | Family::Dense { .. } | Family::Attention { .. } | Family::Glue => "experts",
        Family::Read(tier) if tier.is_disk() => "disk",
        Family::Read(tier) if tier.is_of_a_gpu() => "gpu",
        Family::Read(_) => "memory",
    }
}

#[cfg(test)]
mod tests;
