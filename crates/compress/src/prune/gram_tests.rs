//! Gram loss against the definition: outputs mixed anew under the mask, in f64, routed by `route` itself.

use cotk_model::moe::{GroupLimit, GroupScore};
use cotk_run::seeds::Seeds;
use proptest::prelude::*;
use rand::RngExt;

use super::*;

const HIDDEN: usize = 24;

/// A layer's worth of tokens, drawn.
struct Case {
    rule: RoutingRule,
    bias: Vec<f32>,
    scores: Vec<f32>,
    weights: Vec<f64>,
    /// `[experts][tokens, hidden]`.
    outputs: Vec<Vec<f32>>,
    constants: Vec<f32>,
}

impl Case {
    fn drawn(rule: RoutingRule, tokens: usize, seed: u64) -> Self {
        let mut stream = Seeds::new(seed).stream("gram");
        let mut numbers =
            |count: usize, lo: f32, hi: f32| -> Vec<f32> { (0..count).map(|_| stream.random_range(lo..hi)).collect() };
        let experts = rule.experts;
        let mut scores = numbers(tokens * experts, 0.01, 1.0);
        if rule.scoring == Scoring::Softmax {
            for row in scores.chunks_exact_mut(experts) {
                let sum: f32 = row.iter().sum();
                row.iter_mut().for_each(|s| *s /= sum);
            }
        }
        // Outputs that share a direction, as trained experts' do: not all orthogonal.
        let common = numbers(tokens * HIDDEN, -1.0, 1.0);
        let outputs = (0..experts)
            .map(|_| {
                numbers(tokens * HIDDEN, -1.0, 1.0)
                    .iter()
                    .zip(&common)
                    .map(|(a, b)| a + 0.5 * b)
                    .collect()
            })
            .collect();
        Self {
            bias: if rule.groups.is_some() {
                numbers(experts, -0.3, 0.3)
            } else {
                Vec::new()
            },
            weights: numbers(tokens, 0.1, 2.0).into_iter().map(f64::from).collect(),
            constants: numbers(experts * HIDDEN, -0.5, 0.5),
            scores,
            outputs,
            rule,
        }
    }

    fn gram(&self) -> Gram {
        let tokens = Tokens {
            rule: self.rule,
            bias: &self.bias,
            scores: &self.scores,
            weights: &self.weights,
        };
        let outputs = |from: usize, to: usize| -> Result<Vec<Vec<f32>>, ()> {
            Ok(self
                .outputs
                .iter()
                .map(|rows| rows[from * HIDDEN..to * HIDDEN].to_vec())
                .collect())
        };
        Gram::build(&tokens, &self.constants, HIDDEN, outputs).unwrap()
    }

    fn mixed(&self, alive: Alive<'_>, constant: impl Fn(usize) -> bool) -> Vec<Vec<f64>> {
        let router = RouterScores::new(&self.scores, &self.rule).unwrap();
        let router = if self.bias.is_empty() {
            router
        } else {
            router.with_bias(&self.bias).unwrap()
        };
        let routed = route(&router, alive);
        let output = |token: usize, expert: usize, i: usize| {
            f64::from(if constant(expert) {
                self.constants[expert * HIDDEN + i]
            } else {
                self.outputs[expert][token * HIDDEN + i]
            })
        };
        let row = |token: usize| {
            let slots = token * routed.slots..(token + 1) * routed.slots;
            let value = |i| {
                slots
                    .clone()
                    .map(|s| f64::from(routed.gates[s]) * output(token, routed.experts[s].index(), i))
                    .sum()
            };
            (0..HIDDEN).map(value).collect()
        };
        (0..self.weights.len()).map(row).collect()
    }

    fn direct(&self, mask: &Mask, semantics: Semantics) -> f64 {
        let living = mask.living();
        let truth = self.mixed(Alive::All, |_| false);
        let own = match semantics {
            Semantics::Removed => self.mixed(Alive::Removed(&living), |_| false),
            Semantics::Masked => self.mixed(Alive::Masked(&living), |_| false),
            Semantics::Novice => self.mixed(Alive::All, |expert| mask.is_dropped(expert)),
        };
        let square = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>();
        let size: f64 = truth.iter().zip(&self.weights).map(|(row, w)| w * square(row)).sum();
        let lost = truth
            .iter()
            .zip(&own)
            .zip(&self.weights)
            .map(|((truth, own), w)| w * square(&truth.iter().zip(own).map(|(a, b)| a - b).collect::<Vec<f64>>()));
        lost.sum::<f64>() / size
    }
}

fn rule() -> impl Strategy<Value = RoutingRule> {
    let groups = proptest::sample::select(vec![None, None, Some(2), Some(3), Some(4)]);
    (1usize..5, any::<bool>(), groups, 1usize..3, any::<bool>()).prop_map(|(top_k, norm_topk, groups, kept, is_sum)| {
        let groups = groups.map(|groups| GroupLimit {
            groups,
            kept,
            score: if is_sum { GroupScore::BestTwo } else { GroupScore::Best },
        });
        RoutingRule {
            norm_topk,
            scoring: if groups.is_some() {
                Scoring::Sigmoid
            } else {
                Scoring::Softmax
            },
            scale: if groups.is_some() { 2.5 } else { 1.0 },
            groups,
            ..RoutingRule::softmax(12, top_k)
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    /// Law: Gram loss = direct loss to 1e-5, for each meaning of a dropped expert, from one expert per token to masks
    /// that leave exactly as many as a token chooses.
    #[test]
    fn gram_loss_equals_direct_loss(rule in rule(), seed: u64, order in Just((0..12).collect::<Vec<usize>>()).prop_shuffle(), share in 0.0f64..=1.0) {
        let most = 12 - rule.top_k;
        let count = ((most as f64 * share).round() as usize).max(1);
        let case = Case::drawn(rule, 40, seed);
        let gram = case.gram();
        for count in [count, most] {
            let mask = Mask::of(12, order[..count].iter().copied());
            for semantics in [Semantics::Removed, Semantics::Masked, Semantics::Novice] {
                let (found, expected) = (gram.loss(&mask, semantics), case.direct(&mask, semantics));
                prop_assert!(
                    (found - expected).abs() <= 1e-5 * expected,
                    "{} of {count}: {found}, expected {expected}", semantics.name()
                );
            }
        }
    }

    /// Law: what lies on disk is the sample; any cut is refused.
    #[test]
    fn bytes_round_trip_and_cuts_are_refused(rule in rule(), seed: u64, cut in 0.0f64..1.0) {
        let gram = Case::drawn(rule, 5, seed).gram();
        let bytes = gram.to_bytes();
        let has_bias = rule.groups.is_some();
        let read = Gram::from_bytes(rule, has_bias, &bytes);
        prop_assert_eq!(read.as_ref(), Some(&gram));
        let cut = (bytes.len() as f64 * cut) as usize;
        prop_assert!(Gram::from_bytes(rule, has_bias, &bytes[..cut]).is_none());
        let other = RoutingRule { experts: 11, ..rule };
        prop_assert!(Gram::from_bytes(other, has_bias, &bytes).is_none());
    }
}

#[test]
fn no_mask_no_loss_and_losses_of_many_are_those_of_each() {
    let case = Case::drawn(RoutingRule::softmax(12, 3), 30, 1);
    let gram = case.gram();
    for semantics in [Semantics::Removed, Semantics::Masked, Semantics::Novice] {
        assert_eq!(gram.loss(&Mask::none(12), semantics), 0.0, "{}", semantics.name());
        let masks: Vec<Mask> = (0..12).map(|expert| Mask::of(12, [expert])).collect();
        let each: Vec<f64> = masks.iter().map(|mask| gram.loss(mask, semantics)).collect();
        assert_eq!(gram.losses(&masks, semantics, Measure::Weighted), each);
    }
}

#[test]
fn more_living_experts_than_a_token_chooses_are_not_needed() {
    // Fewer experts live than a token chooses: gates of those that are left, as routing does it.
    let case = Case::drawn(RoutingRule::softmax(12, 4), 20, 2);
    let mask = Mask::of(12, 0..10);
    for semantics in [Semantics::Removed, Semantics::Masked] {
        let (found, expected) = (case.gram().loss(&mask, semantics), case.direct(&mask, semantics));
        assert!((found - expected).abs() <= 1e-5 * expected, "{found} {expected}");
    }
}
