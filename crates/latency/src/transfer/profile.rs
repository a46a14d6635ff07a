//! A profile of this machine (or of this number of threads) from another one and about ten whole networks timed here
//! (reference 6.4): the source's time of a network by groups of terms, one scale a group. Covers CNNs only: nothing that a
//! network does not run is rescaled, so kernels of experts, memory and disk are left out. Pure; law: at scales of one the
//! source's own predictions come back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::few_shot::Known;
use crate::fit::team::{self, Team};
use crate::fit::{PathFit, nnls};
use crate::graph::{Graph, Numerics};
use crate::identity::Identity;
use crate::predict::{CostModel, Model, Part, Terms};
use crate::probe::{median, quantile};
use crate::profile::Profile;
use crate::walk::operators;
use crate::work::{EdgeKey, EdgeKind, Family, Features, Key, Term, TermGroup, Work};
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

/// What became of a transfer: a part of the profile's head. Rows and fits of a carried profile are the source's, under the
/// target's threads: predictions apply this to them.
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
    /// What a convolution or matrix product costs more here, whatever its size: threads are woken and waited for.
    pub split_us: f64,
    /// Operators shorter than this over there are split less often: they cost that share of it.
    pub split_above_us: f64,
    /// More threads than over there: what they make of each operator, where that fits the networks better than scales do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<Team>,
}

impl Transfer {
    /// Time and terms here of an operator that takes `part` over there.
    pub(crate) fn apply(&self, key: &Key, features: &Features, fit: Option<&PathFit>, part: Part) -> Part {
        if let Some(team) = self.team.filter(|_| is_shared(key)) {
            let ms = team.us(1e3 * part.ms) / 1e3;
            let call_ms = team.call_us / 1e3;
            let mut terms = Terms::default();
            terms.add(&part.terms, (ms - call_ms) / part.ms.max(f64::MIN_POSITIVE));
            terms.launch_ms += call_ms;
            return Part { ms, terms, ..part };
        }
        let shares = shares(features, fit, &part.terms);
        let scale: f64 = Group::ALL
            .iter()
            .zip(shares)
            .map(|(group, share)| share * self.scales.get(group).copied().unwrap_or(1.0))
            .sum();
        let split_ms = self.split_us / 1e3 * splits(key, part.ms);
        let mut terms = Terms::default();
        terms.add(&part.terms, scale);
        terms.launch_ms += split_ms;
        Part {
            ms: scale * part.ms + split_ms,
            terms,
            ..part
        }
    }

    /// What is wrong with numbers from a file, if anything.
    pub(crate) fn complaint(&self) -> Option<String> {
        let all = self.scales.values().chain([&self.split_us, &self.spread_ln]);
        match all.copied().find(|x| !(x.is_finite() && *x >= 0.0)) {
            Some(wrong) => Some(format!("transfer: found {wrong}, expected numbers of 0 or more")),
            None => self.team.as_ref().and_then(Team::complaint),
        }
    }
}

/// See [`Transfer::split_above_us`]. From 48 networks timed with one thread and with two, none of which judges: 20 to 30 µs
/// left 6.4 % on others, 10 µs 8.6 %, 50 µs 9.1 %, 2 µs twice as much.
const SPLIT_ABOVE_MS: f64 = 0.02;

/// How much of a split an operator pays: none where there is nothing to split.
fn splits(key: &Key, ms: f64) -> f64 {
    match key {
        Key::Conv(_) | Key::Linear(_) | Key::LowRank(_) => (ms / SPLIT_ABOVE_MS).min(1.0),
        Key::Session { .. }
        | Key::Add(_)
        | Key::GlobalAvgPool(_)
        | Key::Entry(_)
        | Key::Edge(_)
        | Key::Pool(_)
        | Key::Elementwise(_)
        | Key::Expert(_)
        | Key::Dense(_)
        | Key::Attention(_)
        | Key::Glue(_)
        | Key::Read(_) => 0.0,
    }
}

/// Whether threads can share an operator at all: a session's own call and a view are nobody's work.
fn is_shared(key: &Key) -> bool {
    !matches!(
        key,
        Key::Session { .. }
            | Key::Edge(EdgeKey {
                kind: EdgeKind::View,
                ..
            })
    )
}

/// Shares of an operator's time by group: by its path's terms; without a fit of its own by what its prediction says.
fn shares(features: &Features, fit: Option<&PathFit>, terms: &Terms) -> [f64; GROUPS] {
    let mut shares = [0.0; GROUPS];
    let mut add = |term: Term, part: f64| {
        if let Some(group) = Group::of(features.path.family, term) {
            shares[group as usize] += part;
        }
    };
    match fit {
        Some(fit) => fit.parts(features).for_each(|(term, us)| add(term, us)),
        None => {
            add(Term::Call, terms.launch_ms);
            add(Term::EdgeKib, terms.layout_ms);
            add(Term::ActivationKib, terms.memory_ms + terms.link_ms);
            add(Term::MegaMacs, terms.compute_ms);
        }
    }
    let whole: f64 = shares.iter().sum();
    if whole > 0.0 {
        return shares.map(|share| share / whole);
    }
    // Costs nothing there by its terms: whatever it costs is a call.
    let mut launch = [0.0; GROUPS];
    launch[Group::Launch as usize] = 1.0;
    launch
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
            .retain(|row| same_block && row.key.with_threads(from_threads) == Some(row.key));
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
        let total = |parts: &[f64; COLUMNS]| parts[..GROUPS].iter().sum::<f64>();
        let smallest = (0..graphs.len()).min_by(|&a, &b| total(&parts[a]).total_cmp(&total(&parts[b])));
        let Some(smallest) = smallest.filter(|_| count > 0) else {
            return Ok(Vec::new());
        };
        let shares: Vec<Vec<f64>> = parts
            .iter()
            .map(|p| {
                p[..GROUPS]
                    .iter()
                    .map(|x| x / total(p))
                    .chain([total(p).ln(), p[GROUPS]])
                    .collect()
            })
            .collect();
        let rest: Vec<usize> = (0..graphs.len()).filter(|&i| i != smallest).collect();
        let known = Known::new(&shares, &vec![Vec::new(); graphs.len()], &rest);
        let mut chosen = vec![smallest];
        chosen.extend(known.choose(&rest, count - 1));
        Ok(chosen)
    }

    /// ms by group, as the source has it, and how many operators are split.
    fn parts(&self, graph: &Graph) -> Result<[f64; COLUMNS]> {
        Ok(self.whole(graph, 1.0)?.parts)
    }

    fn whole(&self, graph: &Graph, ms: f64) -> Result<Whole> {
        let block = self.profile.head.identity.block();
        let mut sum = [0.0; COLUMNS];
        let (mut fixed_ms, mut shared_ms) = (0.0, Vec::new());
        for key in operators(graph, self.from_threads, block) {
            let prediction = self.model.predict(&Work::Operator(key))?;
            let features = key.features(block);
            let fit = self.profile.fits.iter().find(|fit| fit.path == features.path);
            for (slot, share) in sum.iter_mut().zip(shares(&features, fit, &prediction.terms)) {
                *slot += prediction.ms * share;
            }
            sum[GROUPS] += splits(&key, prediction.ms);
            if is_shared(&key) {
                shared_ms.push(prediction.ms);
            } else {
                fixed_ms += prediction.ms;
            }
        }
        Ok(Whole {
            parts: sum,
            fixed_ms,
            shared_ms,
            ms,
        })
    }

    /// The profile of the target: scales fitted on `samples`, kept near their common one by leave-one-out. The caller fills
    /// in date, version, seed and noise of the head.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] for a graph that the source cannot predict, or with fewer than 3 whole samples.
    pub fn carry(&self, samples: &[Sample]) -> Result<Profile> {
        let mut rows = Vec::new();
        for sample in samples.iter().filter(|s| s.ms.is_finite() && s.ms > 0.0) {
            rows.push(self.whole(&sample.graph, sample.ms)?);
        }
        let ratios: Vec<f64> = rows.iter().map(|row| row.ms / row.source_ms()).collect();
        let middle = median(&ratios);
        let mut ratios = ratios.iter();
        rows.retain(|_| {
            ratios
                .next()
                .is_some_and(|r| (middle / BROKEN..=middle * BROKEN).contains(r))
        });
        if rows.len() < 3 {
            return Err(Error::NotMeasured {
                profile: self.from.clone(),
                path: format!("three networks here ({} whole of {})", rows.len(), samples.len()),
                key: "a transfer".to_owned(),
            });
        }
        let misfit = |ratios: &[f64]| ratios.iter().map(|r| (r - 1.0).powi(2)).sum::<f64>();
        let (doubt, ratios) = DOUBTS
            .iter()
            .map(|&doubt| (doubt, left_out(&rows, doubt)))
            .min_by(|a, b| misfit(&a.1).total_cmp(&misfit(&b.1)))
            .expect("a list");
        let mut found = fit(&rows, doubt);
        let mut ratios = ratios;
        let mut team = None;
        if self.threads > self.from_threads {
            let shared = left_out_team(&rows, self.threads);
            let loss = |ratios: &[f64]| ratios.iter().map(|r| team::bent(r - 1.0)).sum::<f64>();
            // Three numbers that stand for what happens are trusted before eight that stand for anything.
            if CLEARLY * loss(&shared) < loss(&ratios) {
                team = Some(fit_team(&rows, self.threads));
                (ratios, found) = (shared, [1.0; COLUMNS]);
                found[GROUPS] = 0.0;
            }
        }
        let mut off: Vec<f64> = ratios.iter().map(|r| r.max(1e-3).ln().abs()).collect();
        off.sort_by(f64::total_cmp);
        #[expect(clippy::cast_precision_loss, reason = "ten or so")]
        let count = off.len() as f64;
        let transfer = Transfer {
            from: self.from.clone(),
            from_threads: self.from_threads,
            threads: self.threads,
            networks: rows.len(),
            broken: samples.len() - rows.len(),
            left_out_mape_pct: 100.0 * ratios.iter().map(|r| (r - 1.0).abs()).sum::<f64>() / count,
            // Conformal: with ten networks, the worst of them.
            spread_ln: quantile(&off, (0.9 * (count + 1.0) / count).min(1.0)),
            scales: Group::ALL.iter().map(|&g| (g, found[g as usize])).collect(),
            split_us: 1e3 * found[GROUPS],
            split_above_us: 1e3 * SPLIT_ABOVE_MS,
            team,
        };
        Ok(self.renamed(transfer))
    }

    /// The source's rows and fits under the target's threads; predictions apply the transfer to them.
    fn renamed(&self, transfer: Transfer) -> Profile {
        let mut profile = self.profile.clone();
        for row in &mut profile.rows {
            row.key = row
                .key
                .with_threads(self.threads)
                .expect("only rows with threads were kept");
        }
        profile.rows.sort_by_key(|row| row.key);
        profile.fits.iter_mut().for_each(|fit| fit.path.threads = self.threads);
        profile.heldout.clear();
        profile.head.transfer = Some(transfer);
        profile
    }
}

/// Networks whose ratio to the source is this many times off the others' are broken rows.
const BROKEN: f64 = 10.0;
/// How strongly scales are held together, tried by leave-one-out.
const DOUBTS: [f64; 7] = [3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003];
/// Scales must be better than a team by this factor of their squared errors on left-out networks.
const CLEARLY: f64 = 0.6;
/// Groups, then splits.
const COLUMNS: usize = GROUPS + 1;

/// One network: ms by group over there and its splits, the same by operator, ms here.
#[derive(Debug, Clone)]
struct Whole {
    parts: [f64; COLUMNS],
    /// Operators that no number of threads makes faster, in sum; each of the others.
    fixed_ms: f64,
    shared_ms: Vec<f64>,
    ms: f64,
}

impl Whole {
    fn source_ms(&self) -> f64 {
        self.parts[..GROUPS].iter().sum()
    }

    /// Predicted over measured.
    fn ratio(&self, scales: &[f64; COLUMNS]) -> f64 {
        scales.iter().zip(&self.parts).map(|(s, t)| s * t).sum::<f64>() / self.ms
    }
}

impl Whole {
    /// Predicted over measured when a team does the work.
    fn shared_ratio(&self, team: &Team) -> f64 {
        let shared: f64 = self.shared_ms.iter().map(|ms| team.us(1e3 * ms) / 1e3).sum();
        (self.fixed_ms + shared) / self.ms
    }
}

/// The team that explains the networks best.
fn fit_team(rows: &[Whole], threads: u32) -> Team {
    team::common(threads, |team| {
        rows.iter().map(|row| team::bent(row.shared_ratio(team) - 1.0)).sum()
    })
}

fn left_out_team(rows: &[Whole], threads: u32) -> Vec<f64> {
    let ratio = |out: usize| {
        let others = [&rows[..out], &rows[out + 1..]].concat();
        rows[out].shared_ratio(&fit_team(&others, threads))
    };
    (0..rows.len()).map(ratio).collect()
}

/// `predicted / measured` of each network when it is left out.
fn left_out(rows: &[Whole], doubt: f64) -> Vec<f64> {
    let ratio = |out: usize| rows[out].ratio(&fit(&[&rows[..out], &rows[out + 1..]].concat(), doubt));
    (0..rows.len()).map(ratio).collect()
}

/// `argmin_{s, c ≥ 0} Σ ((Σ_g s_g·t_g + c·n − y) / y)² + λ (Σ_g (s_g/s̄ − 1)² + (c/c̄ − 1)²)`; s̄ and c̄ are the same with
/// one scale for all groups and no λ. (Reference 6.4 holds the logarithms together and has no c: from one thread to two, what
/// splitting costs is an offset of every operator that no scale of its terms can be; the error of ten samples fell from 19 to
/// 7 %.) A group that no network has stays at s̄.
fn fit(rows: &[Whole], doubt: f64) -> [f64; COLUMNS] {
    let two: Vec<(Vec<f64>, f64)> = rows
        .iter()
        .map(|r| (vec![r.source_ms(), r.parts[GROUPS]], r.ms))
        .collect();
    let common = relative(&two, &[0.0; 2], &[0.0; 2]);
    let (scale, split) = (common[0].max(0.02), common[1]);
    let all: Vec<(Vec<f64>, f64)> = rows.iter().map(|r| (r.parts.to_vec(), r.ms)).collect();
    let (mut prior, mut width) = ([scale; COLUMNS], [scale; COLUMNS]);
    // Half a microsecond where the two-number fit sees no split at all.
    (prior[GROUPS], width[GROUPS]) = (split, split.max(5e-4));
    relative(&all, &prior, &width.map(|w| doubt / (w * w)))
        .try_into()
        .expect("as many columns as parts")
}

/// Non-negative least squares of relative errors with `Σ λ (x − prior)²`.
fn relative(rows: &[(Vec<f64>, f64)], prior: &[f64], doubts: &[f64]) -> Vec<f64> {
    let n = prior.len();
    let mut gram = vec![vec![0.0; n]; n];
    let mut right: Vec<f64> = prior.iter().zip(doubts).map(|(p, d)| p * d).collect();
    for (parts, ms) in rows {
        for i in 0..n {
            right[i] += parts[i] / ms;
            for j in 0..n {
                gram[i][j] += parts[i] * parts[j] / (ms * ms);
            }
        }
    }
    for (i, row) in gram.iter_mut().enumerate() {
        row[i] = row[i] * (1.0 + 1e-9) + doubts[i] + f64::MIN_POSITIVE;
    }
    nnls(&gram, &right)
}

#[cfg(test)]
mod tests;
