//! A profile of this machine (or of this number of threads) from another one and about ten whole networks timed here
//! (reference 6.4): the source's time of a network by groups of terms, one scale a group. Covers CNNs only: nothing that a
//! network does not run is rescaled, so kernels of experts, memory and disk are left out. Pure; law: at scales of one the
//! source's own predictions come back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::few_shot::Known;
use crate::graph::{Graph, Numerics};
use crate::identity::Identity;
use crate::predict::{CostModel, Model};
use crate::probe::{median, quantile};
use crate::profile::Profile;
use crate::scales::{self, Row};
use crate::walk::operators;
use crate::work::{Family, Key, Term, TermGroup, Work};
use crate::{Error, Result};

/// What time goes into, as far as machines differ in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// One call of a session.
    Fixed,
    /// One operator more.
    Launch,
    /// f32 convolutions larger than 1x1.
    Dense,
    /// f32 depthwise and 1x1 convolutions, linear layers.
    Light,
    /// int8 arithmetic.
    Int8,
    /// Weights and activations through memory.
    Bytes,
    /// Changes of layout and number format.
    Edges,
}

const GROUPS: usize = 7;

impl Group {
    /// All of them, in the order of files.
    pub const ALL: [Self; GROUPS] = [
        Self::Fixed,
        Self::Launch,
        Self::Dense,
        Self::Light,
        Self::Int8,
        Self::Bytes,
        Self::Edges,
    ];

    /// Of a term of a path; `None` where it is no part of a CNN.
    fn of(family: Family, term: Term) -> Option<Self> {
        let numerics = match family {
            Family::Expert { .. }
            | Family::Dense { .. }
            | Family::Attention { .. }
            | Family::Glue
            | Family::Read(_) => {
                return None;
            }
            Family::ConvInt8
            | Family::ConvInt8Pointwise
            | Family::ConvInt8Patches
            | Family::ConvInt8PatchesPointwise
            | Family::DepthwiseInt8
            | Family::DepthwiseInt8Plain => Numerics::Int8,
            Family::Session
            | Family::ConvBlocked
            | Family::ConvFromNchw
            | Family::ConvPatches
            | Family::DepthwiseBlocked
            | Family::DepthwisePlain
            | Family::ConvGrouped
            | Family::ConvPointwise
            | Family::ConvPatchesPointwise
            | Family::PoolPlain
            | Family::Edge(_) => Numerics::F32,
            Family::ConvAlone(n)
            | Family::Linear(n)
            | Family::Add(n)
            | Family::Pool(n)
            | Family::Entry(n)
            | Family::Window(_, n)
            | Family::Elementwise(_, n)
            | Family::LowRank(n) => n,
        };
        let is_light = term == Term::MegaMacsPointwise
            || matches!(
                family,
                Family::DepthwiseBlocked
                    | Family::DepthwisePlain
                    | Family::ConvPointwise
                    | Family::ConvPatchesPointwise
                    | Family::Linear(_)
            );
        Some(match term.group() {
            TermGroup::Launch if family == Family::Session => Self::Fixed,
            TermGroup::Launch => Self::Launch,
            TermGroup::Layout => Self::Edges,
            TermGroup::Memory | TermGroup::Link => Self::Bytes,
            TermGroup::Compute if numerics == Numerics::Int8 => Self::Int8,
            TermGroup::Compute if is_light => Self::Light,
            TermGroup::Compute => Self::Dense,
        })
    }
}

/// A whole network timed on the target.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub graph: Graph,
    pub ms: f64,
}

/// What became of a transfer: a part of the profile's head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// The machine of the source.
    pub from: String,
    pub from_threads: u32,
    pub threads: u32,
    /// Networks that were measured here, and those left aside as broken.
    pub networks: usize,
    pub broken: usize,
    /// Mean error of a measured network when it is left out.
    pub left_out_mape_pct: f64,
    /// Nine in ten errors are below this: |ln(measured / predicted)|.
    pub spread_ln: f64,
    /// Here over there, by group.
    pub scales: BTreeMap<Group, f64>,
}

/// The number of threads nearest to `threads` with which a profile has CNN operators; the smaller of two.
pub fn nearest_threads(profile: &Profile, threads: u32) -> Option<u32> {
    let cnn = profile
        .fits
        .iter()
        .filter(|fit| Group::of(fit.path.family, Term::Call).is_some());
    cnn.map(|fit| fit.path.threads)
        .min_by_key(|&t| (t.abs_diff(threads), t))
}

/// A source, seen as the machine that it is carried to.
#[derive(Debug, Clone)]
pub struct Source {
    profile: Profile,
    model: Model,
    from: String,
    from_threads: u32,
    threads: u32,
}

impl Source {
    /// `profile` for `threads` threads of the machine `here`, from its times with `from_threads`.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] when it has no CNN operator with that many threads.
    pub fn new(profile: &Profile, from_threads: u32, here: &Identity, threads: u32) -> Result<Self> {
        let mut kept = profile.clone();
        let from = profile.head.identity.id();
        let same_block = profile.head.identity.block() == here.block();
        kept.fits
            .retain(|fit| fit.path.threads == from_threads && Group::of(fit.path.family, Term::Call).is_some());
        // Ratios of rows to the fit are the kernels' own staircase: another block has another one.
        kept.rows
            .retain(|row| same_block && with_threads(&row.key, from_threads) == Some(row.key));
        kept.head.identity = here.clone();
        // They correct sums of the source's.
        kept.networks.clear();
        kept.corrections.clear();
        kept.calibrations.clear();
        if kept.fits.is_empty() {
            return Err(Error::NotMeasured {
                profile: from,
                path: format!("any CNN operator with {from_threads} threads"),
                key: "a transfer".to_owned(),
            });
        }
        let model = kept.model(&[]);
        Ok(Self {
            profile: kept,
            model,
            from,
            from_threads,
            threads,
        })
    }

    /// Which of `graphs` to measure: the smallest, for what a call costs, then those that differ most in what their time
    /// goes into. No time of the target is needed.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] for a graph that the source cannot predict.
    pub fn choose(&self, graphs: &[Graph], count: usize) -> Result<Vec<usize>> {
        let parts = graphs
            .iter()
            .map(|graph| self.parts(graph))
            .collect::<Result<Vec<_>>>()?;
        let total = |parts: &[f64; GROUPS]| parts.iter().sum::<f64>();
        let smallest = (0..graphs.len()).min_by(|&a, &b| total(&parts[a]).total_cmp(&total(&parts[b])));
        let Some(smallest) = smallest.filter(|_| count > 0) else {
            return Ok(Vec::new());
        };
        let shares: Vec<Vec<f64>> = parts.iter().map(|p| p.iter().map(|x| x / total(p)).collect()).collect();
        let rest: Vec<usize> = (0..graphs.len()).filter(|&i| i != smallest).collect();
        let known = Known::new(&shares, &vec![Vec::new(); graphs.len()], &rest);
        let mut chosen = vec![smallest];
        chosen.extend(known.choose(&rest, count - 1));
        Ok(chosen)
    }

    /// ms by group, as the source has it.
    fn parts(&self, graph: &Graph) -> Result<[f64; GROUPS]> {
        let block = self.profile.head.identity.block();
        let mut sum = [0.0; GROUPS];
        for key in operators(graph, self.from_threads, block) {
            let prediction = self.model.predict(&Work::Operator(key))?;
            for (slot, share) in sum.iter_mut().zip(self.shares(&key, &prediction.terms)) {
                *slot += prediction.ms * share;
            }
        }
        Ok(sum)
    }

    /// Shares of an operator's time by group: by its path's terms; without a fit of its own by what `predict` says.
    fn shares(&self, key: &Key, terms: &crate::predict::Terms) -> [f64; GROUPS] {
        let features = key.features(self.profile.head.identity.block());
        let mut shares = [0.0; GROUPS];
        let mut add = |term: Term, part: f64| {
            if let Some(group) = Group::of(features.path.family, term) {
                shares[group as usize] += part;
            }
        };
        match self.profile.fits.iter().find(|fit| fit.path == features.path) {
            Some(fit) => fit.parts(&features).for_each(|(term, us)| add(term, us)),
            None => {
                add(Term::Call, terms.launch_ms);
                add(Term::EdgeKib, terms.layout_ms);
                add(Term::ActivationKib, terms.memory_ms + terms.link_ms);
                add(Term::MegaMacs, terms.compute_ms);
            }
        }
        let whole: f64 = shares.iter().sum();
        if whole > 0.0 {
            shares.map(|share| share / whole)
        } else {
            // Costs nothing there by its terms: whatever it costs is a call.
            let mut launch = [0.0; GROUPS];
            launch[Group::Launch as usize] = 1.0;
            launch
        }
    }

    /// The profile of the target: scales fitted on `samples`, kept near their common one by leave-one-out. The caller fills
    /// in date, version, seed and noise of the head.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] for a graph that the source cannot predict, or with fewer than 3 whole samples.
    pub fn carry(&self, samples: &[Sample]) -> Result<Profile> {
        let mut rows = Vec::new();
        for sample in samples.iter().filter(|s| s.ms.is_finite() && s.ms > 0.0) {
            rows.push((self.parts(&sample.graph)?, sample.ms));
        }
        let ratios: Vec<f64> = rows.iter().map(|(parts, ms)| ms / parts.iter().sum::<f64>()).collect();
        let middle = median(&ratios);
        let whole: Vec<Row> = rows
            .into_iter()
            .zip(&ratios)
            .filter(|(_, ratio)| (middle / BROKEN..=middle * BROKEN).contains(*ratio))
            .map(|((parts, ms), _)| Row {
                parts: parts.to_vec(),
                ms,
                weight: 1.0,
            })
            .collect();
        if whole.len() < 3 {
            return Err(Error::NotMeasured {
                profile: self.from.clone(),
                path: format!("three networks here ({} whole of {})", whole.len(), samples.len()),
                key: "a transfer".to_owned(),
            });
        }
        // Near their common one: a group that none of the networks has stays there.
        let prior = [median(
            &whole
                .iter()
                .map(|row| 1.0 / row.ratio(&[1.0; GROUPS]))
                .collect::<Vec<_>>(),
        )
        .ln(); GROUPS];
        let (doubt, ratios) = DOUBTS
            .iter()
            .map(|&doubt| (doubt, scales::left_out(&whole, &prior, doubt, whole.len())))
            .min_by(|a, b| scales::misfit(&a.1).total_cmp(&scales::misfit(&b.1)))
            .expect("a list");
        let scales = scales::fit(&whole, &prior, doubt);
        let mut off: Vec<f64> = ratios.iter().map(|r| r.ln().abs()).collect();
        off.sort_by(f64::total_cmp);
        #[expect(clippy::cast_precision_loss, reason = "ten or so")]
        let count = off.len() as f64;
        let transfer = Transfer {
            from: self.from.clone(),
            from_threads: self.from_threads,
            threads: self.threads,
            networks: whole.len(),
            broken: samples.len() - whole.len(),
            left_out_mape_pct: 100.0 * ratios.iter().map(|r| (r - 1.0).abs()).sum::<f64>() / count,
            // Conformal: with ten networks, the worst of them.
            spread_ln: quantile(&off, (0.9 * (count + 1.0) / count).min(1.0)),
            scales: Group::ALL.iter().map(|&g| (g, scales[g as usize])).collect(),
        };
        Ok(self.scaled(&scales, transfer))
    }

    fn scaled(&self, scales: &[f64], transfer: Transfer) -> Profile {
        let mut profile = self.profile.clone();
        for row in &mut profile.rows {
            let key = row.key;
            let terms = self
                .model
                .predict(&Work::Operator(key))
                .map(|p| p.terms)
                .unwrap_or_default();
            let scale: f64 = self
                .shares(&key, &terms)
                .iter()
                .zip(scales)
                .map(|(share, s)| share * s)
                .sum();
            row.key = with_threads(&key, self.threads).expect("only rows with threads were kept");
            row.median_us *= scale;
            row.q10_us *= scale;
            row.mad_us *= scale;
        }
        profile.rows.sort_by_key(|row| row.key);
        for fit in &mut profile.fits {
            let family = fit.path.family;
            fit.path.threads = self.threads;
            for coefficient in &mut fit.coefficients {
                if let Some(group) = Group::of(family, coefficient.term) {
                    coefficient.us_per_unit *= scales[group as usize];
                }
            }
        }
        profile.heldout.clear();
        profile.head.transfer = Some(transfer);
        profile
    }
}

/// Networks whose ratio to the source is this many times off the others' are broken rows.
const BROKEN: f64 = 10.0;
/// How strongly scales are held together, tried by leave-one-out.
const DOUBTS: [f64; 7] = [3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003];

/// A CNN operator with another number of threads; `None` for what is no part of a CNN.
fn with_threads(key: &Key, threads: u32) -> Option<Key> {
    let mut key = *key;
    let slot = match &mut key {
        Key::Session { threads } => threads,
        Key::Conv(c) => &mut c.threads,
        Key::Linear(l) => &mut l.threads,
        Key::Add(p) | Key::GlobalAvgPool(p) | Key::Entry(p) => &mut p.threads,
        Key::Edge(e) => &mut e.threads,
        Key::Pool(p) => &mut p.threads,
        Key::Elementwise(e) => &mut e.threads,
        Key::LowRank(l) => &mut l.conv.threads,
        Key::Expert(_) | Key::Dense(_) | Key::Attention(_) | Key::Glue(_) | Key::Read(_) => return None,
    };
    *slot = threads;
    Some(key)
}

#[cfg(test)]
mod tests;
