//! The exact loss of a mask, from inner products of all experts' outputs on a sample of tokens: no expert runs again.
//! Per token the experts lie in router order, so that what a mask touches is the front of a triangle.
//!
//! With δ the change of the gates over the experts chosen before or after, a token loses δᵀGδ, G_ij = ⟨y_i, y_j⟩:
//! exactly 0 where nothing changes, and free of cancellation (reference: moe-compression 3). Law: equal to mixing the
//! outputs anew under the mask, as `moe::route` would, for every meaning of a dropped expert.

use cotk_model::moe::{Alive, RouterScores, RoutingRule, Scoring, route};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::mask::Mask;

/// What a dropped expert does: loss, runtime and exports read the same word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Semantics {
    /// Its router row is gone: softmax over the kept, top-k of them.
    Removed,
    /// Its router row is kept, its selection forbidden: gates of the softmax over all.
    Masked,
    /// It stays selectable and answers with its mean output; routing and gates are as before.
    Novice,
}

impl Semantics {
    /// As recipes and tables spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Removed => "removed",
            Self::Masked => "masked",
            Self::Novice => "novice",
        }
    }
}

/// How the losses of tokens add up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Each by its weight, relative to the mixed outputs: what the next layer sees.
    Weighted,
    /// The Frobenius norm of the change of the output, as MoE-I² has it; novices know the weighted sum alone.
    Frobenius,
}

/// What a sample is made of, one token after the other.
pub struct Tokens<'a> {
    pub rule: RoutingRule,
    /// `[experts]`, or empty: added to scores for the choice.
    pub bias: &'a [f32],
    /// `[tokens, experts]`.
    pub scores: &'a [f32],
    /// Weight of each token's loss.
    pub weights: &'a [f64],
}

/// Inner products of all experts' outputs on some tokens, and how these tokens are routed.
#[derive(Debug, Clone, PartialEq)]
pub struct Gram {
    rule: RoutingRule,
    /// For the choice under group limits; empty for other rules, which need ranks alone.
    grouped: Option<Grouped>,
    tokens: usize,
    /// Experts per token in the full model.
    slots: usize,
    /// Expert of each rank, best first, `[tokens, experts]`.
    ids: Vec<u16>,
    /// Score of each rank, `[tokens, experts]`.
    scores: Vec<f32>,
    /// Packed lower triangles of G in rank order, `[tokens, experts (experts + 1) / 2]`.
    triangles: Vec<f32>,
    /// Ranks that the full model chooses, `[tokens, slots]`; 0, 1, … but for group limits.
    teacher_ranks: Vec<u16>,
    /// Their gates.
    teacher_gates: Vec<f32>,
    weights: Vec<f64>,
    /// Σ w ‖o‖² of the full model's mixed outputs: what losses are relative to.
    size: f64,
    /// Σ w g_i g_j ⟨y_i − c_i, y_j − c_j⟩ over the tokens that choose both, `[experts, experts]`: the whole loss of
    /// `novice`, since routing does not change.
    novice: Vec<f64>,
}

/// What choosing within groups needs beside ranks.
#[derive(Debug, Clone, PartialEq)]
struct Grouped {
    /// `[tokens, experts]`, in original numbering.
    scores: Vec<f32>,
    bias: Vec<f32>,
    /// Rank of each expert, `[tokens, experts]`.
    rank_of: Vec<u16>,
}

/// What a token's outputs say.
struct Row {
    triangle: Vec<f32>,
    size: f64,
    /// ⟨y_i − c_i, y_j − c_j⟩ g_i g_j of the chosen, `[slots, slots]`.
    novice: Vec<f64>,
}

impl Gram {
    /// Of tokens whose experts' outputs are `outputs(from, to)`: for tokens `from..to` all experts' outputs,
    /// `[experts][to - from, hidden]`; called for blocks in order. `constants` `[experts, hidden]`: what novices say.
    ///
    /// # Errors
    /// Those of `outputs`.
    pub fn build<E>(
        tokens: &Tokens<'_>,
        constants: &[f32],
        hidden: usize,
        mut outputs: impl FnMut(usize, usize) -> Result<Vec<Vec<f32>>, E>,
    ) -> Result<Self, E> {
        /// Tokens whose outputs are in memory at once.
        const BLOCK: usize = 64;
        let mut gram = Self::routed(tokens);
        let experts = gram.rule.experts;
        let mut from = 0;
        while from < gram.tokens {
            let to = (from + BLOCK).min(gram.tokens);
            let block = outputs(from, to)?;
            let rows: Vec<Row> = (from..to)
                .into_par_iter()
                .map(|token| {
                    let of = |expert: usize| &block[expert][(token - from) * hidden..][..hidden];
                    gram.row(token, constants, hidden, &of)
                })
                .collect();
            for (token, row) in (from..).zip(rows) {
                gram.triangles.extend_from_slice(&row.triangle);
                gram.size += gram.weights[token] * row.size;
                let chosen: Vec<usize> = gram.chosen(token).map(|(rank, _)| gram.expert(token, rank)).collect();
                for (i, &a) in chosen.iter().enumerate() {
                    for (j, &b) in chosen.iter().enumerate() {
                        gram.novice[a * experts + b] += gram.weights[token] * row.novice[i * gram.slots + j];
                    }
                }
            }
            from = to;
        }
        Ok(gram)
    }

    /// Ranks, scores and the full model's choice; no outputs yet.
    fn routed(tokens: &Tokens<'_>) -> Self {
        let rule = tokens.rule;
        let experts = rule.experts;
        assert!(experts <= usize::from(u16::MAX), "expert numbers fit 16 bits");
        let with_bias = |rule| {
            let router = RouterScores::new(tokens.scores, rule).expect("whole rows of scores");
            match tokens.bias {
                [] => router,
                bias => router.with_bias(bias).expect("one bias per expert"),
            }
        };
        // Everybody in order: the same comparison as routing's own.
        let all = RoutingRule {
            top_k: experts,
            norm_topk: false,
            groups: None,
            scale: 1.0,
            ..rule
        };
        let ranked = route(&with_bias(&all), Alive::All);
        let count = tokens.weights.len();
        let narrow = |expert: usize| u16::try_from(expert).expect("checked above");
        let ids: Vec<u16> = ranked.experts.iter().map(|expert| narrow(expert.index())).collect();
        let chosen = route(&with_bias(&rule), Alive::All);
        let mut rank_of = vec![0; ids.len()];
        for (row, ids) in rank_of.chunks_exact_mut(experts).zip(ids.chunks_exact(experts)) {
            ids.iter().zip(0..).for_each(|(&id, rank)| row[usize::from(id)] = rank);
        }
        let slot_rank = |(slot, expert): (usize, &cotk_run::units::ExpertId)| {
            rank_of[slot / chosen.slots * experts + expert.index()]
        };
        Self {
            tokens: count,
            slots: chosen.slots,
            teacher_ranks: chosen.experts.iter().enumerate().map(slot_rank).collect(),
            teacher_gates: chosen.gates,
            ids,
            scores: ranked.gates,
            triangles: Vec::with_capacity(count * experts * (experts + 1) / 2),
            weights: tokens.weights.to_vec(),
            size: 0.0,
            novice: vec![0.0; experts * experts],
            grouped: rule.groups.map(|_| Grouped {
                scores: tokens.scores.to_vec(),
                bias: tokens.bias.to_vec(),
                rank_of,
            }),
            rule,
        }
    }

    fn row<'y>(&self, token: usize, constants: &[f32], hidden: usize, output: &dyn Fn(usize) -> &'y [f32]) -> Row {
        let experts = self.rule.experts;
        let mut triangle = Vec::with_capacity(experts * (experts + 1) / 2);
        let ids = &self.ids[token * experts..][..experts];
        for (rank, &id) in ids.iter().enumerate() {
            let own = output(usize::from(id));
            #[expect(clippy::cast_possible_truncation, reason = "summed in f64, kept in f32")]
            triangle.extend(
                ids[..=rank]
                    .iter()
                    .map(|&other| dot(own, output(usize::from(other))) as f32),
            );
        }
        let chosen: Vec<(usize, f32)> = self
            .chosen(token)
            .map(|(rank, gate)| (self.expert(token, rank), gate))
            .collect();
        let mixed: Vec<f64> = (0..hidden)
            .map(|i| {
                chosen
                    .iter()
                    .map(|&(e, gate)| f64::from(gate) * f64::from(output(e)[i]))
                    .sum()
            })
            .collect();
        let away: Vec<Vec<f64>> = chosen
            .iter()
            .map(|&(e, gate)| {
                let constant = &constants[e * hidden..][..hidden];
                let away = output(e).iter().zip(constant);
                away.map(|(y, c)| f64::from(gate) * (f64::from(*y) - f64::from(*c)))
                    .collect()
            })
            .collect();
        let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut novice = vec![0.0; self.slots * self.slots];
        for (i, a) in away.iter().enumerate() {
            for (j, b) in away.iter().enumerate() {
                novice[i * self.slots + j] = inner(a, b);
            }
        }
        Row {
            triangle,
            size: inner(&mixed, &mixed),
            novice,
        }
    }

    /// Rank and gate of what the full model chooses.
    fn chosen(&self, token: usize) -> impl Iterator<Item = (usize, f32)> {
        let slots = token * self.slots..(token + 1) * self.slots;
        let ranks = self.teacher_ranks[slots.clone()].iter().map(|&rank| usize::from(rank));
        ranks.zip(self.teacher_gates[slots].iter().copied())
    }

    fn expert(&self, token: usize, rank: usize) -> usize {
        usize::from(self.ids[token * self.rule.experts + rank])
    }

    /// Tokens of the sample.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How the layer routes.
    pub fn rule(&self) -> &RoutingRule {
        &self.rule
    }

    /// Σ w ‖o − o'‖² over Σ w ‖o‖², where o' is the mixed output under the mask; 0 where the layer says nothing.
    pub fn loss(&self, mask: &Mask, semantics: Semantics) -> f64 {
        self.measured(mask, semantics, Measure::Weighted)
    }

    /// The loss as [`Measure`] says.
    pub fn measured(&self, mask: &Mask, semantics: Semantics, measure: Measure) -> f64 {
        debug_assert_eq!(mask.experts(), self.rule.experts);
        if mask.count() == 0 {
            return 0.0; // exactly, although scores add up to 1 but for rounding
        }
        let lost = match (semantics, measure) {
            (Semantics::Novice, _) => self.novice_loss(mask),
            (_, Measure::Weighted) => self.rerouted_loss(mask, semantics, |token| self.weights[token]),
            (_, Measure::Frobenius) => return self.rerouted_loss(mask, semantics, |_| 1.0).sqrt(),
        };
        if self.size > 0.0 { lost / self.size } else { 0.0 }
    }

    /// Losses of many masks, on all threads; each as [`measured`](Self::measured) gives it.
    pub fn losses(&self, masks: &[Mask], semantics: Semantics, measure: Measure) -> Vec<f64> {
        masks
            .par_iter()
            .map(|mask| self.measured(mask, semantics, measure))
            .collect()
    }

    /// Σ over pairs of dropped experts of w g_i g_j ⟨y_i − c_i, y_j − c_j⟩.
    fn novice_loss(&self, mask: &Mask) -> f64 {
        let (experts, dropped) = (self.rule.experts, mask.dropped());
        let row = |&i: &usize| dropped.iter().map(|&j| self.novice[i * experts + j]).sum::<f64>();
        dropped.iter().map(row).sum::<f64>().max(0.0)
    }

    fn rerouted_loss(&self, mask: &Mask, semantics: Semantics, weight: impl Fn(usize) -> f64) -> f64 {
        let experts = self.rule.experts;
        let living = mask.living();
        // Where the choice stays, gates stay too, unless they are divided by the mass of the living.
        let keeps_gates = !self.is_divided_by_living(semantics);
        let slots = self.rule.top_k.min(living.iter().filter(|alive| **alive).count());
        let regrouped = self.grouped.as_ref().map(|grouped| self.regroup(grouped, &living));
        let mut chosen: Vec<usize> = Vec::with_capacity(slots);
        let mut change: Vec<(usize, f64)> = Vec::with_capacity(slots + self.slots);
        let mut lost = 0.0;
        for token in 0..self.tokens {
            let ids = &self.ids[token * experts..][..experts];
            chosen.clear();
            match &regrouped {
                Some(ranks) => chosen.extend(ranks[token * slots..][..slots].iter().map(|&r| usize::from(r))),
                None => {
                    let alive = ids.iter().enumerate().filter(|(_, id)| living[usize::from(**id)]);
                    chosen.extend(alive.map(|(rank, _)| rank).take(slots));
                }
            }
            let before = &self.teacher_ranks[token * self.slots..][..self.slots];
            let is_same = chosen.len() == before.len()
                && before
                    .iter()
                    .zip(&chosen)
                    .all(|(before, now)| usize::from(*before) == *now);
            if is_same && keeps_gates {
                continue;
            }
            self.change(token, &chosen, &living, semantics, &mut change);
            lost += weight(token) * self.quadratic(token, &change);
        }
        lost
    }

    /// Gates after less gates before, by ascending rank.
    fn change(
        &self,
        token: usize,
        chosen: &[usize],
        living: &[bool],
        semantics: Semantics,
        change: &mut Vec<(usize, f64)>,
    ) {
        let experts = self.rule.experts;
        let scores = &self.scores[token * experts..][..experts];
        let divisor = if self.rule.norm_topk {
            chosen.iter().map(|&rank| f64::from(scores[rank])).sum::<f64>() + 1e-20
        } else if self.is_divided_by_living(semantics) {
            let ids = &self.ids[token * experts..][..experts];
            let alive = ids.iter().zip(scores).filter(|(id, _)| living[usize::from(**id)]);
            alive.map(|(_, &score)| f64::from(score)).sum()
        } else {
            1.0
        };
        change.clear();
        change.extend(self.chosen(token).map(|(rank, gate)| (rank, -f64::from(gate))));
        for &rank in chosen {
            let gate = f64::from(scores[rank]) / divisor * f64::from(self.rule.scale);
            match change[..self.slots].iter_mut().find(|(before, _)| *before == rank) {
                Some((_, change)) => *change += gate,
                None => change.push((rank, gate)),
            }
        }
        if self.grouped.is_some() {
            change.sort_unstable_by_key(|(rank, _)| *rank);
        }
    }

    /// δᵀGδ of one token; `change` by ascending rank.
    fn quadratic(&self, token: usize, change: &[(usize, f64)]) -> f64 {
        let size = self.rule.experts * (self.rule.experts + 1) / 2;
        let triangle = &self.triangles[token * size..][..size];
        let mut sum = 0.0;
        for (at, &(rank, own)) in change.iter().enumerate() {
            let row = &triangle[rank * (rank + 1) / 2..][..=rank];
            let beside: f64 = change[..at]
                .iter()
                .map(|&(other, change)| change * f64::from(row[other]))
                .sum();
            sum += own * (own * f64::from(row[rank]) + 2.0 * beside);
        }
        sum
    }

    fn is_divided_by_living(&self, semantics: Semantics) -> bool {
        semantics == Semantics::Removed && !self.rule.norm_topk && self.rule.scoring == Scoring::Softmax
    }

    /// Ranks chosen within groups of the living, `[tokens, slots]`.
    fn regroup(&self, grouped: &Grouped, living: &[bool]) -> Vec<u16> {
        let router = RouterScores::new(&grouped.scores, &self.rule).expect("whole rows of scores");
        let router = match grouped.bias.as_slice() {
            [] => router,
            bias => router.with_bias(bias).expect("one bias per expert"),
        };
        let routed = route(&router, Alive::Masked(living));
        let rank = |(slot, expert): (usize, &cotk_run::units::ExpertId)| {
            grouped.rank_of[slot / routed.slots * self.rule.experts + expert.index()]
        };
        routed.experts.iter().enumerate().map(rank).collect()
    }

    /// Bytes of the arrays, for plans of memory.
    pub fn bytes_for(experts: usize, slots: usize, tokens: usize) -> u64 {
        let per_token = 2 * experts + 4 * experts + 2 * experts * (experts + 1) + 6 * slots + 8;
        (per_token * tokens + 8 * experts * experts) as u64
    }

    /// As it lies on disk, little endian: tokens, slots, size; then each array.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for number in [MAGIC, self.tokens as u64, self.slots as u64, self.size.to_bits()] {
            bytes.extend(number.to_le_bytes());
        }
        let grouped = self.grouped.as_ref();
        bytes.extend(self.ids.iter().flat_map(|x| x.to_le_bytes()));
        bytes.extend(self.teacher_ranks.iter().flat_map(|x| x.to_le_bytes()));
        bytes.extend(self.scores.iter().flat_map(|x| x.to_le_bytes()));
        bytes.extend(self.teacher_gates.iter().flat_map(|x| x.to_le_bytes()));
        bytes.extend(self.triangles.iter().flat_map(|x| x.to_le_bytes()));
        bytes.extend(self.weights.iter().flat_map(|x| x.to_le_bytes()));
        bytes.extend(self.novice.iter().flat_map(|x| x.to_le_bytes()));
        bytes.extend(grouped.iter().flat_map(|g| &g.scores).flat_map(|x| x.to_le_bytes()));
        bytes.extend(grouped.iter().flat_map(|g| &g.bias).flat_map(|x| x.to_le_bytes()));
        bytes.extend(grouped.iter().flat_map(|g| &g.rank_of).flat_map(|x| x.to_le_bytes()));
        bytes
    }

    /// What [`to_bytes`](Self::to_bytes) wrote for a layer of this rule; `None` where the bytes are not that. The caller
    /// holds a checksum over them: numbers inside are not judged again.
    pub fn from_bytes(rule: RoutingRule, has_bias: bool, bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        if reader.numbers::<8>(1)?.first().map(|b| u64::from_le_bytes(*b)) != Some(MAGIC) {
            return None;
        }
        let head = reader.numbers::<8>(3)?;
        let [tokens, slots, size] = [head[0], head[1], head[2]].map(u64::from_le_bytes);
        let (tokens, slots) = (usize::try_from(tokens).ok()?, usize::try_from(slots).ok()?);
        // Every array below is at most this many numbers: no length that the bytes cannot hold is taken up.
        let experts = rule.experts;
        if tokens.checked_mul(experts)? > bytes.len() || slots > experts {
            return None;
        }
        let (all, chosen) = (tokens * experts, tokens * slots);
        let ids = reader.u16s(all)?;
        let teacher_ranks = reader.u16s(chosen)?;
        if ids.iter().chain(&teacher_ranks).any(|&id| usize::from(id) >= experts) {
            return None;
        }
        let gram = Self {
            tokens,
            slots,
            size: f64::from_bits(size),
            ids,
            teacher_ranks,
            scores: reader.f32s(all)?,
            teacher_gates: reader.f32s(chosen)?,
            triangles: reader.f32s(tokens.checked_mul(experts * (experts + 1) / 2)?)?,
            weights: reader.f64s(tokens)?,
            novice: reader.f64s(experts * experts)?,
            grouped: match rule.groups {
                None => None,
                Some(_) => Some(Grouped {
                    scores: reader.f32s(all)?,
                    bias: reader.f32s(if has_bias { experts } else { 0 })?,
                    rank_of: reader.u16s(all)?,
                }),
            },
            rule,
        };
        reader.0.is_empty().then_some(gram)
    }
}

/// "cotkgrm1".
const MAGIC: u64 = u64::from_le_bytes(*b"cotkgrm1");

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn numbers<const N: usize>(&mut self, count: usize) -> Option<&'a [[u8; N]]> {
        let (numbers, rest) = self.0.split_at_checked(count.checked_mul(N)?)?;
        self.0 = rest;
        Some(numbers.as_chunks::<N>().0)
    }

    fn u16s(&mut self, count: usize) -> Option<Vec<u16>> {
        Some(self.numbers(count)?.iter().map(|b| u16::from_le_bytes(*b)).collect())
    }

    fn f32s(&mut self, count: usize) -> Option<Vec<f32>> {
        Some(self.numbers(count)?.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    fn f64s(&mut self, count: usize) -> Option<Vec<f64>> {
        Some(self.numbers(count)?.iter().map(|b| f64::from_le_bytes(*b)).collect())
    }
}

/// In f64, on eight sums that a compiler may keep in registers; the order is fixed.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0f64; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    let rest: f64 = a_rest
        .iter()
        .zip(b_rest)
        .map(|(a, b)| f64::from(*a) * f64::from(*b))
        .sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
#[path = "gram_tests.rs"]
mod tests;
