//! What a wrong prediction teaches: a network whose measured time is more than a tenth off its prediction joins the profile,
//! and what corrects sums is fitted anew, so that the next search begins from a better model. Times nothing. Law: adding the
//! same time again changes nothing, so a run that was stopped in between ends alike.

use std::path::{Path, PathBuf};

use cotk_latency::graph::Graph;
use cotk_latency::identity::Identity;
use cotk_latency::predict::CostModel;
use cotk_latency::profile::{NetworkRow, Profile, Purpose};
use cotk_latency::work::Work;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::cost::THREADS;

/// A prediction this far from the measurement is one to learn from.
pub const DISAGREEMENT: f64 = 0.10;

/// A measured network beside what was predicted for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judged {
    pub predicted_ms: f64,
    pub measured_ms: f64,
    pub spread_ms: f64,
    pub q10_ms: f64,
    /// Sessions and slices behind the median.
    pub sessions: u32,
    pub count: u32,
}

impl Judged {
    /// Whether there is something to learn: off by more than a tenth, and by more than twice what the measurement itself
    /// spreads.
    pub fn disagrees(&self) -> bool {
        let off = (self.measured_ms / self.predicted_ms - 1.0).abs();
        off > DISAGREEMENT && off > 2.0 * self.spread_ms / self.measured_ms
    }
}

/// What was learnt, as journaled and in the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Refit {
    /// Measured over predicted, less one, in percent: before the network was in the profile, and with it.
    pub before_pct: f64,
    pub after_pct: f64,
    /// The profile that has the network now.
    pub profile: PathBuf,
    /// Whether that is the one that later runs read; else a copy in the run's folder, since the profile is a reference or
    /// another machine's.
    pub is_shared: bool,
}

/// Adds the network to the profile in `folder` (to a copy at `copy`, if it is not this machine's own) and fits anew. Two
/// searches that do so at once take turns: both networks are in it then.
///
/// # Errors
/// [`crate::SearchError::Latency`] for a profile that is gone or damaged; the old one then stands.
pub fn refit(folder: &Path, copy: &Path, here: &Identity, graph: &Graph, judged: &Judged) -> Result<Refit> {
    let learn = |profile: &mut Profile| -> Result<f64> {
        profile.learn(NetworkRow {
            graph: graph.clone(),
            threads: THREADS,
            sessions: judged.sessions,
            count: judged.count,
            median_us: 1e3 * judged.measured_ms,
            q10_us: 1e3 * judged.q10_ms,
            mad_us: 1e3 * judged.spread_ms,
            is_from_use: true,
        });
        profile.refit();
        let work = Work::Graph {
            graph,
            threads: THREADS,
        };
        Ok(profile.model(&[]).predict(&work)?.ms)
    };
    let mut profile = Profile::load(folder)?;
    let is_shared = profile.head.purpose == Purpose::Machine && profile.head.identity.differences(here).is_empty();
    let (after_ms, to) = if is_shared {
        (Profile::update(folder, learn)?, folder)
    } else {
        let after_ms = learn(&mut profile)?;
        profile.save(copy)?;
        (after_ms, copy)
    };
    let off_pct = |predicted_ms: f64| 100.0 * (judged.measured_ms / predicted_ms - 1.0);
    Ok(Refit {
        before_pct: off_pct(judged.predicted_ms),
        after_pct: off_pct(after_ms),
        profile: to.to_owned(),
        is_shared,
    })
}

#[cfg(test)]
mod tests;
