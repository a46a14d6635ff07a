//! Masks of one layer: scores that rank experts, and searches on the exact loss. Decides for one layer and one count; how
//! many go per layer is `ratios`'. Law: the same sample, count and seed give the same mask, whatever the threads.

use std::collections::HashMap;

use cotk_run::seeds::Stream;
use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::genetic;
use super::gram::{Gram, Measure, Semantics};
use super::mask::Mask;
use super::survey::ExpertScores;

/// Masks that an exhaustive search may try, NAEE's way.
pub const EXHAUSTIVE_MASKS: u64 = 200_000;

/// How masks are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Drawn.
    Random,
    /// The least selected go.
    Frequency,
    /// REAP: the lowest mean of g ‖y‖ over the tokens that select an expert, gates as the router gives them.
    Reap,
    /// REAP with gates over the sum of the chosen ones, as its code of 2026 has it.
    ReapRenormalised,
    /// The lowest Σ w g² ‖y‖².
    Energy,
    /// Those whose removal alone loses least.
    Single,
    /// One after the other, each time the one that loses least.
    Greedy,
    /// Greedy, then swaps until none helps.
    Swap,
    /// A genetic search that begins from all of the above, then swaps until none helps.
    Genetic,
    /// MoE-I²'s own search: no seeds, no polish, the Frobenius norm.
    Paper,
    /// Every mask (NAEE), where there are few.
    Exhaustive,
}

impl Method {
    /// All, in the order of tables.
    pub const ALL: [Self; 11] = [
        Self::Random,
        Self::Frequency,
        Self::Reap,
        Self::ReapRenormalised,
        Self::Energy,
        Self::Single,
        Self::Greedy,
        Self::Swap,
        Self::Genetic,
        Self::Paper,
        Self::Exhaustive,
    ];

    /// As recipes and tables spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Frequency => "frequency",
            Self::Reap => "reap",
            Self::ReapRenormalised => "reap-renormalised",
            Self::Energy => "energy",
            Self::Single => "single",
            Self::Greedy => "greedy",
            Self::Swap => "swap",
            Self::Genetic => "genetic",
            Self::Paper => "paper",
            Self::Exhaustive => "exhaustive",
        }
    }

    /// Of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }
}

/// What a search may know of a layer.
pub struct Known<'a> {
    pub scores: &'a [ExpertScores],
    /// The half that chooses.
    pub gram: &'a Gram,
    pub semantics: Semantics,
}

/// Masks of one count, best first, with their loss on the half that chose them.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    pub masks: Vec<(Mask, f64)>,
    /// Masks whose loss was worked out.
    pub tried: usize,
}

/// `count` experts to drop by `method`; up to `candidates` masks, where the method has looked at several.
///
/// # Errors
/// [`TooManyMasks`] of an exhaustive search.
pub fn search(
    known: &Known<'_>,
    method: Method,
    count: usize,
    candidates: usize,
    stream: &mut Stream,
) -> Result<Found, TooManyMasks> {
    let measure = match method {
        Method::Paper => Measure::Frobenius,
        _ => Measure::Weighted,
    };
    let mut tried = Tried::new(known.gram, known.semantics, measure);
    let experts = known.scores.len();
    assert!(count <= experts, "{count} of {experts} experts to drop");
    match method {
        Method::Random | Method::Frequency | Method::Reap | Method::ReapRenormalised | Method::Energy => {
            tried.one(&ranked(known, method, count, stream));
        }
        Method::Single => {
            let mask = single(&mut tried, experts, count);
            tried.forget();
            tried.one(&mask);
        }
        Method::Greedy => {
            let path = greedy_path(&mut tried, experts, count);
            tried.forget();
            tried.one(&Mask::of(experts, path));
        }
        Method::Swap => {
            let path = greedy_path(&mut tried, experts, count);
            swap_descent(&mut tried, Mask::of(experts, path));
        }
        Method::Genetic => {
            let seeds = seeds(known, &mut tried, count, stream);
            let best = genetic::evolve(&mut tried, experts, count, &seeds, &genetic::OURS, stream);
            swap_descent(&mut tried, best);
        }
        Method::Paper => {
            genetic::evolve(&mut tried, experts, count, &[], &genetic::PAPER, stream);
        }
        Method::Exhaustive => exhaustive(&mut tried, experts, count, candidates)?,
    }
    Ok(tried.found(count, candidates))
}

/// An exhaustive search would take too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooManyMasks {
    pub experts: usize,
    pub dropped: usize,
    pub masks: u64,
}

/// The order in which experts go one by one, each time the one that loses least, and the loss after each: `count` long.
pub fn path(known: &Known<'_>, count: usize) -> Vec<(usize, f64)> {
    let mut tried = Tried::new(known.gram, known.semantics, Measure::Weighted);
    let experts = known.scores.len();
    let order = greedy_path(&mut tried, experts, count);
    let mut mask = Mask::none(experts);
    order
        .into_iter()
        .map(|expert| {
            mask.drop(expert);
            (expert, tried.one(&mask))
        })
        .collect()
}

/// Losses of the masks that a search has seen.
pub(super) struct Tried<'a> {
    gram: &'a Gram,
    semantics: Semantics,
    measure: Measure,
    losses: HashMap<Mask, f64>,
    forgotten: usize,
}

impl<'a> Tried<'a> {
    fn new(gram: &'a Gram, semantics: Semantics, measure: Measure) -> Self {
        Self {
            gram,
            semantics,
            measure,
            losses: HashMap::new(),
            forgotten: 0,
        }
    }

    fn one(&mut self, mask: &Mask) -> f64 {
        self.all(std::slice::from_ref(mask))[0]
    }

    /// Each mask's loss; what was seen before costs nothing.
    pub(super) fn all(&mut self, masks: &[Mask]) -> Vec<f64> {
        let mut new: Vec<Mask> = masks
            .iter()
            .filter(|mask| !self.losses.contains_key(mask))
            .cloned()
            .collect();
        new.sort_unstable();
        new.dedup();
        let losses = self.gram.losses(&new, self.semantics, self.measure);
        self.losses.extend(new.into_iter().zip(losses));
        masks.iter().map(|mask| self.losses[mask]).collect()
    }

    /// The best of `masks`; ties go to the first.
    pub(super) fn best<'m>(&mut self, masks: &'m [Mask]) -> Option<(&'m Mask, f64)> {
        let losses = self.all(masks);
        masks.iter().zip(losses).min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// Steps on the way are no candidates.
    fn forget(&mut self) {
        self.forgotten += self.losses.len();
        self.losses.clear();
    }

    fn found(self, count: usize, candidates: usize) -> Found {
        let tried = self.forgotten + self.losses.len();
        let mut masks: Vec<(Mask, f64)> = self
            .losses
            .into_iter()
            .filter(|(mask, _)| mask.count() == count)
            .collect();
        masks.sort_by(|a, b| a.1.total_cmp(&b.1).then_with(|| a.0.cmp(&b.0)));
        masks.truncate(candidates.max(1));
        Found { masks, tried }
    }
}

/// The `count` lowest by a score that each expert has for itself; ties go to the lower index.
fn ranked(known: &Known<'_>, method: Method, count: usize, stream: &mut Stream) -> Mask {
    let experts = known.scores.len();
    if method == Method::Random {
        return genetic::drawn(&(0..experts).collect::<Vec<_>>(), experts, count, stream);
    }
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let score = |scores: &ExpertScores| match method {
        Method::Frequency => scores.tokens as f64,
        Method::Reap => scores.gated_norm / scores.tokens.max(1) as f64,
        Method::ReapRenormalised => scores.renormalised_norm / scores.tokens.max(1) as f64,
        _ => scores.energy,
    };
    lowest(known.scores.iter().map(score).collect(), count)
}

fn lowest(scores: Vec<f64>, count: usize) -> Mask {
    let experts = scores.len();
    let mut order: Vec<usize> = (0..experts).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    Mask::of(experts, order.into_iter().take(count))
}

fn single(tried: &mut Tried<'_>, experts: usize, count: usize) -> Mask {
    let alone: Vec<Mask> = (0..experts).map(|expert| Mask::of(experts, [expert])).collect();
    lowest(tried.all(&alone), count)
}

fn greedy_path(tried: &mut Tried<'_>, experts: usize, count: usize) -> Vec<usize> {
    let mut mask = Mask::none(experts);
    let mut order = Vec::with_capacity(count);
    for _ in 0..count {
        let kept = mask.kept();
        let next: Vec<Mask> = kept.iter().map(|&expert| with(&mask, expert)).collect();
        let losses = tried.all(&next);
        let best = (0..kept.len()).min_by(|&a, &b| losses[a].total_cmp(&losses[b]));
        let expert = kept[best.expect("count is at most the number of experts")];
        mask.drop(expert);
        order.push(expert);
    }
    order
}

fn with(mask: &Mask, expert: usize) -> Mask {
    let mut mask = mask.clone();
    mask.drop(expert);
    mask
}

/// Exchanges one dropped for one kept expert, the best exchange of all, until none helps.
fn swap_descent(tried: &mut Tried<'_>, mut mask: Mask) -> Mask {
    let mut loss = tried.one(&mask);
    loop {
        let kept = mask.kept();
        let swaps: Vec<Mask> = mask
            .dropped()
            .into_iter()
            .flat_map(|out| kept.iter().map(move |&into| (out, into)))
            .map(|(out, into)| mask.swapped(out, into))
            .collect();
        match tried.best(&swaps) {
            Some((better, found)) if found < loss => (mask, loss) = (better.clone(), found),
            _ => return mask,
        }
    }
}

/// What the genetic search begins from.
fn seeds(known: &Known<'_>, tried: &mut Tried<'_>, count: usize, stream: &mut Stream) -> Vec<Mask> {
    let experts = known.scores.len();
    let ranked = [Method::Frequency, Method::Reap, Method::Energy].map(|method| ranked(known, method, count, stream));
    let single = single(tried, experts, count);
    let greedy = Mask::of(experts, greedy_path(tried, experts, count));
    ranked.into_iter().chain([single, greedy]).collect()
}

fn exhaustive(tried: &mut Tried<'_>, experts: usize, count: usize, candidates: usize) -> Result<(), TooManyMasks> {
    /// Masks at once.
    const BLOCK: usize = 4096;
    let masks = combinations(experts, count);
    if masks > EXHAUSTIVE_MASKS {
        return Err(TooManyMasks {
            experts,
            dropped: count,
            masks,
        });
    }
    let mut chosen: Vec<usize> = (0..count).collect();
    let mut is_more = true;
    let mut best: Vec<(Mask, f64)> = Vec::new();
    while is_more {
        let mut block = Vec::with_capacity(BLOCK);
        while is_more && block.len() < BLOCK {
            block.push(Mask::of(experts, chosen.iter().copied()));
            is_more = next_combination(&mut chosen, experts);
        }
        let losses = tried.all(&block);
        best.extend(block.into_iter().zip(losses));
        best.sort_by(|a, b| a.1.total_cmp(&b.1).then_with(|| a.0.cmp(&b.0)));
        best.truncate(candidates.max(1));
        tried.forget();
    }
    tried.forgotten -= best.len();
    tried.losses.extend(best);
    Ok(())
}

/// C(n, k), or the largest number there is.
pub fn combinations(n: usize, k: usize) -> u64 {
    let k = k.min(n - k.min(n));
    let mut result: u128 = 1;
    for i in 0..k {
        result = result * (n - i) as u128 / (i + 1) as u128;
        if result > u128::from(u64::MAX) {
            return u64::MAX;
        }
    }
    u64::try_from(result).expect("checked above")
}

/// The next in lexicographic order; `false` after the last.
fn next_combination(chosen: &mut [usize], n: usize) -> bool {
    let k = chosen.len();
    let Some(at) = (0..k).rev().find(|&i| chosen[i] < n - k + i) else {
        return false;
    };
    chosen[at] += 1;
    for i in at + 1..k {
        chosen[i] = chosen[i - 1] + 1;
    }
    true
}

/// Draws `below` `n`.
pub(super) fn below(stream: &mut Stream, n: usize) -> usize {
    stream.random_range(0..n)
}

#[cfg(test)]
#[path = "search_tests.rs"]
mod tests;
