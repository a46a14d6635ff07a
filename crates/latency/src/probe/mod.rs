//! What is timed: the [`Probe`] that kernels and runtimes register, and the loop that gathers their times. The only
//! room with a clock.

pub mod adapt;
pub mod core;
pub mod disk;
pub mod gather;
pub mod measure;
pub mod memory;
pub mod now;
pub mod order;
pub mod rounds;

use cotk_run::seeds::Stream;

use crate::graph::Graph;
use crate::work::Key;
use crate::{Error, Result};

/// A kind of operator that can be measured. Its features are its keys' own ([`Key::features`]): `predict` must know them
/// where no kernel and no runtime is at hand.
pub trait Probe {
    /// Short name for progress and errors: `onnx`, `experts`, `memory`, `disk`.
    fn name(&self) -> &str;

    /// `count` keys to measure: the seeds of its table first, then draws from its distribution of use. May return fewer.
    fn candidates(&self, count: usize, rng: &mut Stream) -> Vec<Key>;

    /// Keys of every kernel path, `per_path` of each or more, over all sizes: where use draws few, a fit still needs some.
    fn spread(&self, _per_path: usize, _rng: &mut Stream) -> Vec<Key> {
        Vec::new()
    }

    /// Whether the time of this key is a difference of times, which may come out as nothing.
    fn is_slope(&self, _key: &Key) -> bool {
        false
    }

    /// Whether it can measure this key.
    fn measures(&self, key: &Key) -> bool;

    /// What a time of this key is the sum of, itself included: a slope whose copies bring a change of layout along holds that
    /// too.
    ///
    /// # Errors
    /// [`crate::Error::Probe`] with what failed.
    fn parts(&self, key: &Key) -> Result<Vec<(Key, f64)>> {
        Ok(vec![(*key, 1.0)])
    }

    /// What it noticed that is no time, by a short name: goes into the profile as it is.
    fn facts(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Builds what one key needs. `session` numbers independent builds of the same key: fresh allocations, fresh
    /// placement.
    ///
    /// # Errors
    /// [`crate::Error::Probe`] with what failed.
    fn prepare(&self, key: &Key, session: u32) -> Result<Box<dyn Prepared>>;
}

/// A key that is ready to run. Its time is `Σ weight[i] · time(piece i)`: one piece of weight 1 for a plain operator;
/// for what one more copy in a network costs, long minus short chain, divided by the copies.
pub trait Prepared {
    /// One weight per piece.
    fn weights(&self) -> Vec<f64> {
        vec![1.0]
    }

    /// Whether the time is that of a call behind another call of its own; cold things rotate instead.
    fn is_hot(&self) -> bool {
        true
    }

    /// Cores that it keeps busy.
    fn threads(&self) -> u32 {
        1
    }

    /// Whether each call touches what no call has touched before: nothing is warmed up, one call is a slice, and all count.
    fn is_each_once(&self) -> bool {
        false
    }

    /// µs of the last call by a clock of its own (events of a GPU's stream), where it has one.
    fn own_us(&mut self) -> Option<f64> {
        None
    }

    /// One call of one piece. Nothing but the call: it is timed.
    ///
    /// # Errors
    /// [`crate::Error::Probe`] with what failed.
    fn run(&mut self, piece: usize) -> Result<()>;
}

/// Whoever can run whole networks.
pub trait NetworkProbe {
    /// Builds what one network needs; sessions as in [`Probe::prepare`].
    ///
    /// # Errors
    /// [`crate::Error::Probe`] with what failed.
    fn prepare(&self, graph: &Graph, threads: u32, session: u32) -> Result<Box<dyn Prepared>>;
}

/// A probe with a list of its own seeds, and draws of one kind behind them.
pub struct Listed {
    probe: Box<dyn Probe>,
    seeds: Vec<Key>,
    like: fn(&Key) -> bool,
}

impl Listed {
    /// `seeds` first, then what `probe` draws and `like` accepts.
    pub fn new(probe: Box<dyn Probe>, seeds: Vec<Key>, like: fn(&Key) -> bool) -> Self {
        Self { probe, seeds, like }
    }
}

impl Probe for Listed {
    fn name(&self) -> &str {
        self.probe.name()
    }

    fn candidates(&self, count: usize, rng: &mut Stream) -> Vec<Key> {
        let mut keys: Vec<Key> = self.seeds.iter().copied().take(count).collect();
        if keys.len() < count {
            // Its own seeds come first there too: ask for more than are wanted, take the last ones.
            let drawn = self.probe.candidates(8 * count + 1000, rng);
            let new: Vec<Key> = drawn
                .into_iter()
                .rev()
                .filter(|k| (self.like)(k) && !keys.contains(k))
                .collect();
            keys.extend(new.into_iter().take(count - keys.len()));
        }
        keys
    }

    fn measures(&self, key: &Key) -> bool {
        self.probe.measures(key)
    }

    fn facts(&self) -> Vec<(String, String)> {
        self.probe.facts()
    }

    fn prepare(&self, key: &Key, session: u32) -> Result<Box<dyn Prepared>> {
        self.probe.prepare(key, session)
    }
}

/// A probe's error about one key.
pub fn refused(probe: &str, key: &Key, detail: &str) -> Error {
    Error::Probe {
        probe: probe.to_owned(),
        key: key.to_string(),
        detail: detail.to_owned(),
    }
}

/// What a list of times says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Statistics {
    pub median: f64,
    /// Median absolute deviation from the median.
    pub mad: f64,
    /// Tenth percentile.
    pub q10: f64,
}

impl Statistics {
    /// Of at least one value; an even count takes the mean of the middle two.
    pub fn of(values: &[f64]) -> Self {
        let middle = median(values);
        let deviations: Vec<f64> = values.iter().map(|v| (v - middle).abs()).collect();
        Self {
            median: middle,
            mad: median(&deviations),
            q10: quantile(values, 0.1),
        }
    }
}

/// The middle value; of an even count the mean of the middle two; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The quantile `q` in 0..=1, linear between the two nearest values; NaN of none.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    #[expect(clippy::cast_precision_loss, reason = "counts of measurements")]
    let at = q.clamp(0.0, 1.0) * last as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the last index"
    )]
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * at.fract()
}

#[cfg(test)]
mod tests;
