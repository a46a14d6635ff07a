//! The seam [`MoeRuntime`]: a layer, hidden states and router scores go in, the mixed expert output and a record of
//! what was done come out. The model does not know where expert weights live; the laws of every runtime are `laws`.
//! Not here: the shared expert, which is dense and belongs to the model.

use std::cell::RefCell;

use cotk_run::units::{ExpertId, LayerId};
use serde::{Deserialize, Serialize};

/// How a token's logits become scores, experts and gates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoutingRule {
    /// Routed experts of a layer, in the original numbering.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Whether the chosen gates are divided by their sum.
    pub norm_topk: bool,
    pub scoring: Scoring,
    /// Choose within the best groups of experts only.
    pub groups: Option<GroupLimit>,
    /// Gates are multiplied by this at last.
    pub scale: f32,
}

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over *all* experts of the original model.
    Softmax,
    /// The sigmoid of each.
    Sigmoid,
}

/// Groups of neighbouring experts, of equal size, of which a token may use only the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLimit {
    /// Divides the number of experts.
    pub groups: usize,
    /// Groups that a token may choose from.
    pub kept: usize,
    pub score: GroupScore,
}

/// What a group is worth to a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert's score (DeepSeek-V2).
    Best,
    /// The sum of its two best (DeepSeek-V3).
    BestTwo,
}

impl RoutingRule {
    /// The plain rule: softmax, the `top_k` best of all experts, gates as they are.
    pub fn softmax(experts: usize, top_k: usize) -> Self {
        Self {
            experts,
            top_k,
            norm_topk: false,
            scoring: Scoring::Softmax,
            groups: None,
            scale: 1.0,
        }
    }
}

/// Router scores of a batch of tokens in f32, see [`Scoring`], and what is added to them for the choice.
#[derive(Debug, Clone, Copy)]
pub struct RouterScores<'a> {
    scores: &'a [f32],
    /// `[experts]`, or empty.
    bias: &'a [f32],
    rule: &'a RoutingRule,
}

impl<'a> RouterScores<'a> {
    /// `scores` is `[tokens, experts]`, row major.
    ///
    /// # Errors
    /// [`RuntimeError::Shape`] when its length is no multiple of the number of experts.
    pub fn new(scores: &'a [f32], rule: &'a RoutingRule) -> Result<Self, RuntimeError> {
        if rule.experts == 0 || !scores.len().is_multiple_of(rule.experts) {
            return Err(RuntimeError::Shape {
                what: "router scores",
                found: scores.len(),
                expected: format!("a multiple of {} experts", rule.experts),
            });
        }
        Ok(Self {
            scores,
            bias: &[],
            rule,
        })
    }

    /// The same with `bias` `[experts]`: added to scores when experts are chosen, not to gates.
    ///
    /// # Errors
    /// [`RuntimeError::Shape`] when its length is another.
    pub fn with_bias(self, bias: &'a [f32]) -> Result<Self, RuntimeError> {
        if bias.len() != self.rule.experts {
            return Err(RuntimeError::Shape {
                what: "router bias",
                found: bias.len(),
                expected: format!("{} experts", self.rule.experts),
            });
        }
        Ok(Self { bias, ..self })
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.scores.len() / self.rule.experts
    }

    /// `[tokens, experts]`.
    pub fn scores(&self) -> &'a [f32] {
        self.scores
    }

    /// The scores of one token, `[experts]`.
    pub fn of(&self, token: usize) -> &'a [f32] {
        &self.scores[token * self.rule.experts..][..self.rule.experts]
    }

    /// What is added to scores for the choice, `[experts]`; empty where there is none.
    pub fn bias(&self) -> &'a [f32] {
        self.bias
    }

    /// The rule that turns them into gates.
    pub fn rule(&self) -> &'a RoutingRule {
        self.rule
    }
}

/// Which experts may be chosen, and what their absence does to the gates (`true` = there; original numbering).
#[derive(Debug, Clone, Copy)]
pub enum Alive<'a> {
    All,
    /// Router rows kept, selection forbidden: gates stay those of the softmax over all experts.
    Masked(&'a [bool]),
    /// Router rows deleted: the softmax runs over the living, so gates are divided by their mass.
    Removed(&'a [bool]),
}

/// Chosen experts and their gates, best first, `[tokens, slots]` each.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Routed {
    /// Experts per token: `top_k`, or the number of living experts where that is less.
    pub slots: usize,
    pub experts: Vec<ExpertId>,
    pub gates: Vec<f32>,
}

/// Chooses `top_k` living experts per token by score and bias, ties by the lower index; within the best groups where
/// the rule has groups. Gates are the scores without bias; divided by their sum and scaled as the rule says.
pub fn route(router: &RouterScores<'_>, alive: Alive<'_>) -> Routed {
    let mut routed = Routed::default();
    route_to(router, alive, &mut routed);
    routed
}

/// What a thread keeps between choices.
#[derive(Default)]
struct RouteScratch {
    choice: Vec<f32>,
    may: Vec<bool>,
    best: Vec<(f32, usize)>,
    /// Worth, number and living experts of groups.
    groups: Vec<(f32, usize, usize)>,
}

thread_local! {
    static SCRATCH: RefCell<RouteScratch> = RefCell::default();
}

/// [`route`] into `routed`, which is overwritten. Nothing is allocated once a thread has routed as many tokens.
pub fn route_to(router: &RouterScores<'_>, alive: Alive<'_>, routed: &mut Routed) {
    let mut scratch = SCRATCH.take();
    route_with(router, alive, routed, &mut scratch);
    SCRATCH.set(scratch);
}

fn route_with(router: &RouterScores<'_>, alive: Alive<'_>, routed: &mut Routed, scratch: &mut RouteScratch) {
    let rule = router.rule();
    let living = match alive {
        Alive::All => None,
        Alive::Masked(living) | Alive::Removed(living) => {
            assert_eq!(living.len(), rule.experts, "one flag per expert");
            Some(living)
        }
    };
    let count = living.map_or(rule.experts, |l| l.iter().filter(|&&a| a).count());
    let slots = rule.top_k.min(count);
    let Routed {
        slots: routed_slots,
        experts,
        gates,
    } = routed;
    *routed_slots = slots;
    experts.clear();
    gates.clear();
    let RouteScratch {
        choice,
        may,
        best,
        groups,
    } = scratch;
    choice.resize(rule.experts, 0.0);
    may.resize(rule.experts, true);
    for token in 0..router.tokens() {
        let scores = router.of(token);
        choice.copy_from_slice(scores);
        choice
            .iter_mut()
            .zip(router.bias)
            .for_each(|(choice, bias)| *choice += bias);
        match living {
            Some(living) => may.copy_from_slice(living),
            None => may.fill(true),
        }
        if let Some(limit) = &rule.groups {
            keep_best_groups(limit, choice, slots, may, groups);
        }
        best.clear();
        for (expert, (&score, may)) in choice.iter().zip(&*may).enumerate() {
            if !may {
                continue;
            }
            // A later expert must be strictly better: ties go to the lower index.
            let at = best.partition_point(|(other, _)| other.total_cmp(&score).is_ge());
            if at < slots {
                best.insert(at, (score, expert));
                best.truncate(slots);
            }
        }
        let divisor = if rule.norm_topk {
            // As published for sigmoids, which may all be 0; far below what changes a sum of softmax.
            best.iter().map(|&(_, expert)| scores[expert]).sum::<f32>() + 1e-20
        } else {
            match (rule.scoring, alive) {
                (Scoring::Softmax, Alive::Removed(living)) => {
                    scores.iter().zip(living).filter(|(_, a)| **a).map(|(s, _)| s).sum()
                }
                (Scoring::Softmax, Alive::All | Alive::Masked(_)) | (Scoring::Sigmoid, _) => 1.0,
            }
        };
        for &(_, expert) in &*best {
            experts.push(ExpertId(u32::try_from(expert).expect("expert counts fit 32 bits")));
            gates.push(scores[expert] / divisor * rule.scale);
        }
    }
}

/// Calls `f` with experts and gates of all tokens, chosen in memory that this thread keeps.
pub fn with_routed<R>(router: &RouterScores<'_>, alive: Alive<'_>, f: impl FnOnce(&Routed) -> R) -> R {
    thread_local! {
        static ROUTED: RefCell<Routed> = RefCell::default();
    }
    // Taken, not borrowed: whoever runs inside has its own.
    let mut routed = ROUTED.take();
    route_to(router, alive, &mut routed);
    let result = f(&routed);
    ROUTED.set(routed);
    result
}

/// Replaces `order` by the numbers of all pairs of a token and a slot, by what each asks for (`asked`: an expert, say),
/// pairs that ask for the same in token order: experts run once for all their tokens.
pub fn order_pairs<K: Ord + Copy>(asked: &[K], order: &mut Vec<usize>) {
    order.clear();
    order.extend(0..asked.len());
    // (A stable sort may allocate.)
    order.sort_unstable_by_key(|&pair| (asked[pair], pair));
}

/// Clears `may` outside the best groups. Groups without a living expert do not count; where the kept ones have fewer
/// than `slots`, the next best are let in: a token has as many experts as any other.
fn keep_best_groups(
    limit: &GroupLimit,
    choice: &[f32],
    slots: usize,
    may: &mut [bool],
    order: &mut Vec<(f32, usize, usize)>,
) {
    let size = choice.len() / limit.groups;
    order.clear();
    for (group, (choice, may)) in choice.chunks_exact(size).zip(may.chunks_exact(size)).enumerate() {
        let (mut best, mut second, mut living) = (f32::NEG_INFINITY, f32::NEG_INFINITY, 0);
        for (&score, _) in choice.iter().zip(may).filter(|(_, may)| **may) {
            living += 1;
            if score > best {
                (best, second) = (score, best);
            } else if score > second {
                second = score;
            }
        }
        if living > 0 {
            let worth = match limit.score {
                GroupScore::BestTwo if living > 1 => best + second,
                GroupScore::Best | GroupScore::BestTwo => best,
            };
            order.push((worth, group, living));
        }
    }
    // Equal groups stay by the lower index. (A stable sort may allocate.)
    order.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut room = 0;
    let mut kept = 0;
    for &mut (_, group, living) in order {
        if kept < limit.kept || room < slots {
            kept += 1;
            room += living;
        } else {
            may[group * size..][..size].fill(false);
        }
    }
}

/// Which computation a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Every expert at its full stored width.
    Exact,
    /// Every expert by its short prefix.
    Little,
}

impl Mode {
    /// As requests and tables spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Little => "little",
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How one chosen expert was computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// At its full stored width.
    Full,
    /// By a prefix of its planes.
    Prefix,
    /// By a stored constant in its place.
    Constant,
    /// Not at all.
    Skipped,
}

/// One chosen expert of one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertUse {
    pub expert: ExpertId,
    /// What its output was multiplied by.
    pub gate: f32,
    /// Bits per weight that were read: 32 for f32, 0 for nothing.
    pub bits: u8,
    pub precision: Precision,
}

/// What a runtime did in one layer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MoeRecord {
    /// Experts per token.
    pub slots: usize,
    /// `[tokens, slots]`, best first.
    pub uses: Vec<ExpertUse>,
}

impl MoeRecord {
    /// Share of the gate mass that ran below full width: by a prefix or by a constant. 0 without any mass.
    pub fn low_bit_fraction(&self) -> f64 {
        self.fraction(|p| matches!(p, Precision::Prefix | Precision::Constant))
    }

    /// Share of the gate mass that was not computed at all.
    pub fn skipped_mass(&self) -> f64 {
        self.fraction(|p| matches!(p, Precision::Skipped))
    }

    fn fraction(&self, is_counted: impl Fn(Precision) -> bool) -> f64 {
        let mass: f64 = self.uses.iter().map(|u| f64::from(u.gate)).sum();
        let counted: f64 = self
            .uses
            .iter()
            .filter(|u| is_counted(u.precision))
            .map(|u| f64::from(u.gate))
            .sum();
        if mass > 0.0 { counted / mass } else { 0.0 }
    }
}

/// What a runtime serves.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeShape {
    /// Width of hidden states.
    pub hidden: usize,
    pub rule: RoutingRule,
    /// Layers with routed experts, ascending.
    pub layers: Vec<LayerId>,
}

/// Why a runtime cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("no experts in {layer}, expected one of {} layers", offered.len())]
    Layer { layer: LayerId, offered: Vec<LayerId> },
    #[error("{what}: {found} values, expected {expected}")]
    Shape {
        what: &'static str,
        found: usize,
        expected: String,
    },
    #[error("mode `{mode}` is not offered, expected one of: {}", offered.iter().map(|m| m.name()).collect::<Vec<_>>().join(", "))]
    Mode { mode: Mode, offered: Vec<Mode> },
    /// An expert's weights cannot be had: a checksum, a read.
    #[error("{layer}, {expert}: {source}")]
    Expert {
        layer: LayerId,
        expert: ExpertId,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Where routed experts live and how they are computed.
pub trait MoeRuntime: Send + Sync {
    /// What it serves.
    fn shape(&self) -> &MoeShape;

    /// The modes it offers, [`Mode::Exact`] first.
    fn modes(&self) -> &[Mode];

    /// Mixes the routed experts of one layer: `out[t] = Σ gate · expert(hidden[t])` over the chosen experts, in slot
    /// order. `hidden` (normed) and `out` are `[tokens, hidden]`; `out` is overwritten.
    ///
    /// # Errors
    /// [`RuntimeError`]; `out` then holds nothing of use.
    fn forward(
        &self,
        layer: LayerId,
        hidden: &[f32],
        router: RouterScores<'_>,
        mode: Mode,
        out: &mut [f32],
    ) -> Result<MoeRecord, RuntimeError> {
        let mut record = MoeRecord::default();
        self.forward_into(layer, hidden, router, mode, out, &mut record)?;
        Ok(record)
    }

    /// [`forward`](Self::forward) into a record that its owner keeps: coded runtimes allocate nothing for a few tokens once
    /// they have served the like.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); the record then says nothing.
    fn forward_into(
        &self,
        layer: LayerId,
        hidden: &[f32],
        router: RouterScores<'_>,
        mode: Mode,
        out: &mut [f32],
        record: &mut MoeRecord,
    ) -> Result<(), RuntimeError>;

    /// The gate for every implementation of [`forward_into`](Self::forward_into): refuses what it cannot serve, and says
    /// which of the shape's layers it is.
    ///
    /// # Errors
    /// An unknown layer, a mode that is not offered, lengths that do not fit each other.
    fn check_call(
        &self,
        layer: LayerId,
        hidden: &[f32],
        router: &RouterScores<'_>,
        mode: Mode,
        out: &[f32],
    ) -> Result<usize, RuntimeError> {
        let shape = self.shape();
        let wrong = |what, found, expected: String| Err(RuntimeError::Shape { what, found, expected });
        let Some(at) = shape.layers.iter().position(|l| *l == layer) else {
            return Err(RuntimeError::Layer {
                layer,
                offered: shape.layers.clone(),
            });
        };
        if !self.modes().contains(&mode) {
            return Err(RuntimeError::Mode {
                mode,
                offered: self.modes().to_vec(),
            });
        }
        if *router.rule() != shape.rule {
            return wrong(
                "router scores",
                router.rule().experts,
                format!("those of {:?}", shape.rule),
            );
        }
        let expected = router.tokens() * shape.hidden;
        if hidden.len() != expected {
            return wrong(
                "hidden states",
                hidden.len(),
                format!("{expected} ({} tokens)", router.tokens()),
            );
        }
        if out.len() != expected {
            return wrong("output", out.len(), format!("{expected} ({} tokens)", router.tokens()));
        }
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(experts: usize, top_k: usize, norm_topk: bool) -> RoutingRule {
        RoutingRule {
            norm_topk,
            ..RoutingRule::softmax(experts, top_k)
        }
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        let rule = rule(4, 2, false);
        let routed = route(&RouterScores::new(&[0.2, 0.3, 0.2, 0.3], &rule).unwrap(), Alive::All);
        assert_eq!(routed.experts, [ExpertId(1), ExpertId(3)]);
        let routed = route(&RouterScores::new(&[0.25; 4], &rule).unwrap(), Alive::All);
        assert_eq!(routed.experts, [ExpertId(0), ExpertId(1)]);
    }

    proptest! {
        /// Law: selection equals a stable sort by falling score, whatever is alive.
        #[test]
        fn selection_equals_a_stable_sort(
            levels in proptest::collection::vec(0u8..6, 1..20),
            dead in proptest::collection::vec(any::<bool>(), 20),
            top_k in 1usize..6,
            norm_topk: bool,
        ) {
            let mass: f32 = levels.iter().map(|&l| f32::from(l) + 0.5).sum();
            let scores: Vec<f32> = levels.iter().map(|&l| (f32::from(l) + 0.5) / mass).collect();
            let rule = rule(scores.len(), top_k, norm_topk);
            let alive: Vec<bool> = dead[..scores.len()].iter().map(|d| !d).collect();
            let router = RouterScores::new(&scores, &rule).unwrap();
            let routed = route(&router, Alive::Masked(&alive));
            let mut order: Vec<usize> = (0..scores.len()).filter(|&e| alive[e]).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            order.truncate(top_k);
            let found: Vec<usize> = routed.experts.iter().map(|e| e.index()).collect();
            prop_assert_eq!(&found, &order);
            // `masked` and `removed` differ by the living mass, and not at all when gates are normalised.
            let removed = route(&router, Alive::Removed(&alive));
            prop_assert_eq!(&removed.experts, &routed.experts);
            let living: f32 = scores.iter().zip(&alive).filter(|(_, a)| **a).map(|(s, _)| s).sum();
            for (masked, removed) in routed.gates.iter().zip(&removed.gates) {
                let expected = if norm_topk { *masked } else { masked / living };
                prop_assert!((removed - expected).abs() <= 1e-6 * expected.abs());
            }
            if norm_topk && !found.is_empty() {
                prop_assert!((routed.gates.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            }
        }
    }

    proptest! {
        /// Law: groups, bias and scale equal the published steps done one after the other: bias, group scores, mask,
        /// top-k, gates of the scores.
        #[test]
        fn grouped_choice_equals_the_published_steps(
            levels in proptest::collection::vec(0u16..1000, 12),
            biases in proptest::collection::vec(-500i16..500, 12),
            dead in proptest::collection::vec(proptest::bool::weighted(0.3), 12),
            groups in proptest::sample::select(vec![1usize, 2, 3, 4, 6]),
            kept in 1usize..6, top_k in 1usize..6, is_sum: bool, norm_topk: bool,
        ) {
            // Steps of 2⁻¹⁰: sums are exact, so equal groups are equal on both sides.
            let scores: Vec<f32> = levels.iter().map(|&l| (f32::from(l) + 1.0) / 1024.0).collect();
            let bias: Vec<f32> = biases.iter().map(|&b| f32::from(b) / 1024.0).collect();
            let alive: Vec<bool> = dead.iter().map(|d| !d).collect();
            let score = if is_sum { GroupScore::BestTwo } else { GroupScore::Best };
            let rule = RoutingRule {
                norm_topk,
                scoring: Scoring::Sigmoid,
                groups: Some(GroupLimit { groups, kept, score }),
                scale: 2.5,
                ..RoutingRule::softmax(12, top_k)
            };
            let router = RouterScores::new(&scores, &rule).unwrap().with_bias(&bias).unwrap();
            let routed = route(&router, Alive::Masked(&alive));

            let choice: Vec<f32> = scores.iter().zip(&bias).map(|(s, b)| s + b).collect();
            let falling = |mut list: Vec<usize>, key: &dyn Fn(usize) -> f32| {
                list.sort_by(|&a, &b| key(b).total_cmp(&key(a)));
                list
            };
            let members = |group: usize| -> Vec<usize> {
                let size = 12 / groups;
                let living = (group * size..(group + 1) * size).filter(|&e| alive[e]).collect();
                falling(living, &|e| choice[e])
            };
            let worth = |group: usize| members(group).iter().take(1 + usize::from(is_sum)).map(|&e| choice[e]).sum();
            let order = falling((0..groups).filter(|&g| !members(g).is_empty()).collect(), &worth);
            let slots = top_k.min(alive.iter().filter(|a| **a).count());
            let mut allowed = Vec::new();
            for (rank, group) in order.into_iter().enumerate() {
                if rank < kept || allowed.len() < slots {
                    allowed.extend(members(group));
                }
            }
            allowed.sort_unstable();
            let mut chosen = falling(allowed, &|e| choice[e]);
            chosen.truncate(slots);
            let found: Vec<usize> = routed.experts.iter().map(|e| e.index()).collect();
            prop_assert_eq!(&found, &chosen);
            let sum: f32 = if norm_topk { chosen.iter().map(|&e| scores[e]).sum() } else { 1.0 };
            for (gate, &expert) in routed.gates.iter().zip(&chosen) {
                prop_assert!((gate - scores[expert] / sum * 2.5).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn a_bias_of_another_length_is_refused() {
        let rule = rule(3, 2, true);
        let router = RouterScores::new(&[0.2, 0.3, 0.5], &rule).unwrap();
        assert!(router.with_bias(&[0.0; 2]).is_err());
    }

    #[test]
    fn fractions_count_gate_mass() {
        let used = |gate, precision| ExpertUse {
            expert: ExpertId(0),
            gate,
            bits: 4,
            precision,
        };
        let record = MoeRecord {
            slots: 4,
            uses: vec![
                used(0.5, Precision::Full),
                used(0.25, Precision::Prefix),
                used(0.125, Precision::Constant),
                used(0.125, Precision::Skipped),
            ],
        };
        assert_eq!((record.low_bit_fraction(), record.skipped_mass()), (0.375, 0.125));
        assert_eq!(MoeRecord::default().low_bit_fraction(), 0.0);
    }
}
