//! From proposals to one choice per expert: what the stages offer, what the allocator picks. Law: more budget never
//! costs loss; ties by layer and expert.

use cotk_quant::QuantError;
use cotk_quant::allocate::{Allocator, Budgets, Candidate, Greedy};
use cotk_run::units::{ExpertId, LayerId};
use serde::{Deserialize, Serialize};

use crate::layer::Usage;
use crate::prune::mask::Mask;
use crate::prune::plan::{Pruned, Surveyed};
use crate::recipe::{Compress, DropShape};
use crate::stage::{Change, Proposal};
use crate::{CompressError, Result};

/// What was found out about one layer in the first pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    pub layer: LayerId,
    pub usage: Usage,
    /// Codes for every expert, and drops for those that may go.
    pub proposals: Vec<Proposal>,
    /// Where `[compress.prune]` chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prune: Option<Surveyed>,
}

/// What becomes of each expert.
#[derive(Debug, Clone, PartialEq)]
pub struct Decisions {
    /// Per MoE layer, per expert.
    pub layers: Vec<(LayerId, Vec<Change>)>,
    /// Sum over the choices, in the unit of [`Proposal::loss`].
    pub loss: f64,
}

/// How many experts of each layer go.
pub fn drops(recipe: &Compress, usages: &[&Usage], top_k: usize) -> Vec<usize> {
    let uniform = |usage: &&Usage| recipe.drop_ratio.count(usage.experts.len(), top_k);
    let counts: Vec<usize> = usages.iter().map(uniform).collect();
    match recipe.drop_shape {
        DropShape::Uniform => counts,
        DropShape::Usage => {
            let mut shares: Vec<(f64, usize)> = Vec::new();
            for (layer, usage) in usages.iter().enumerate() {
                let most = usage.experts.len().saturating_sub(top_k);
                let least = usage.least_used().into_iter().take(most);
                #[expect(clippy::cast_precision_loss, reason = "expert counts are small")]
                shares.extend(least.map(|e| (usage.share(e) * usage.experts.len() as f64, layer)));
            }
            shares.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            let mut unequal = vec![0; usages.len()];
            for (_, layer) in shares.into_iter().take(counts.iter().sum()) {
                unequal[layer] += 1;
            }
            unequal
        }
    }
}

/// By counts of use alone.
fn least_used(recipe: &Compress, measured: &[Measured], top_k: usize) -> Vec<Mask> {
    let usages: Vec<&Usage> = measured.iter().map(|m| &m.usage).collect();
    let counts = drops(recipe, &usages, top_k);
    let mask = |(usage, count): (&&Usage, usize)| {
        let least = usage.least_used();
        Mask::of(least.len(), least[..count].iter().map(|expert| expert.index()))
    };
    usages.iter().zip(counts).map(mask).collect()
}

/// Chooses under the byte budget of the records; `gone_bytes`: what stands in the place of an expert that goes.
///
/// # Errors
/// [`CompressError::Budget`] when even the narrowest codes are too large.
pub fn decide(
    recipe: &Compress,
    measured: &[Measured],
    pruned: Option<&Pruned>,
    top_k: usize,
    record_budget: Option<u64>,
    gone_bytes: u64,
) -> Result<Decisions> {
    let masks: Vec<Mask> = match pruned {
        Some(pruned) => pruned.layers.iter().map(|layer| layer.mask.clone()).collect(),
        None => least_used(recipe, measured, top_k),
    };
    let mut items = Vec::new();
    for (layer, mask) in measured.iter().zip(masks) {
        for expert in (0..).map(ExpertId).take(mask.experts()) {
            let is_dropped = mask.is_dropped(expert.index());
            if is_dropped && pruned.is_some() {
                // Its loss is the mask's, not its own.
                items.push(vec![Proposal::free(expert, Change::Drop)]);
                continue;
            }
            let offered = layer.proposals.iter().filter(|p| p.expert == expert);
            let wanted = |p: &&Proposal| (p.change == Change::Drop) == is_dropped;
            items.push(offered.filter(wanted).copied().collect::<Vec<Proposal>>());
        }
    }
    let candidates: Vec<Vec<Candidate>> = items
        .iter()
        .map(|item| {
            let candidate = |p: &Proposal| Candidate {
                loss: p.loss,
                bytes: match p.change {
                    Change::Drop => gone_bytes,
                    Change::Code(_) => p.bytes,
                },
                ms: p.ms,
            };
            item.iter().map(candidate).collect()
        })
        .collect();
    let budgets = Budgets {
        bytes: record_budget,
        ms: None,
    };
    let allocation = Greedy.allocate(&candidates, &budgets).map_err(|error| match error {
        QuantError::NothingFits { .. } => CompressError::Budget {
            budget: record_budget.unwrap_or(0),
            least: candidates.iter().filter_map(|c| c.iter().map(|c| c.bytes).min()).sum(),
        },
        other => CompressError::Allocation(other),
    })?;
    let mut choices = items
        .iter()
        .zip(&allocation.choice)
        .map(|(item, &choice)| item[choice].change);
    let layers = measured
        .iter()
        .map(|m| (m.layer, choices.by_ref().take(m.usage.experts.len()).collect()))
        .collect();
    Ok(Decisions {
        layers,
        loss: allocation.loss,
    })
}

#[cfg(test)]
mod tests {
    use cotk_quant::code::{Bits, Code};

    use super::*;
    use crate::layer::ExpertUsage;
    use crate::recipe::Recipe;

    fn usage(tokens: &[u64]) -> Usage {
        let of = |&tokens: &u64| ExpertUsage {
            tokens,
            gate: tokens as f64,
            gate_squares: tokens as f64,
        };
        Usage {
            tokens: tokens.iter().sum(),
            experts: tokens.iter().map(of).collect(),
            state_square: 1.0,
        }
    }

    fn recipe(ratio: f64, shape: &str) -> Compress {
        let sets = [
            format!("compress.drop_ratio={ratio}"),
            format!("compress.drop_shape={shape}"),
        ];
        Recipe::load("moe-int4", &sets, None, None).unwrap().compress
    }

    /// Two layers of four experts, all codes and drops on offer.
    fn measured() -> Vec<Measured> {
        let codes = [(Bits::B2, 4.0, 10), (Bits::B4, 1.0, 20), (Bits::B8, 0.1, 40)];
        [(LayerId(0), [1, 50, 60, 70]), (LayerId(2), [2, 3, 4, 500])]
            .map(|(layer, tokens)| {
                let proposals = (0..4).map(ExpertId).flat_map(|expert| {
                    let weight = tokens[expert.index()] as f64;
                    let of_code = move |(bits, loss, bytes): (Bits, f64, u64)| Proposal {
                        expert,
                        change: Change::Code(Code::Plain(bits)),
                        loss: loss * weight,
                        bytes,
                        ms: 0.0,
                    };
                    let dropped = Proposal {
                        expert,
                        change: Change::Drop,
                        loss: 9.0 * weight,
                        bytes: 0,
                        ms: 0.0,
                    };
                    codes.map(of_code).into_iter().chain([dropped])
                });
                Measured {
                    layer,
                    usage: usage(&tokens),
                    prune: None,
                    proposals: proposals.collect(),
                }
            })
            .to_vec()
    }

    fn dropped(decisions: &Decisions) -> Vec<usize> {
        let count = |(_, changes): &(LayerId, Vec<Change>)| changes.iter().filter(|&&c| c == Change::Drop).count();
        decisions.layers.iter().map(count).collect()
    }

    #[test]
    fn drops_follow_ratio_and_shape_and_leave_top_k() {
        let measured = measured();
        let of = |ratio, shape| dropped(&decide(&recipe(ratio, shape), &measured, None, 1, None, 0).unwrap());
        assert_eq!(of(0.0, "uniform"), [0, 0]);
        assert_eq!(of(0.25, "uniform"), [1, 1]);
        assert_eq!(of(0.5, "usage"), [1, 3]);
        assert_eq!(of(0.9, "usage"), [3, 3]);
    }

    #[test]
    fn more_budget_never_costs_loss_and_is_kept() {
        let (measured, recipe) = (measured(), recipe(0.25, "uniform"));
        let mut last = f64::INFINITY;
        for budget in (60..=240).step_by(5) {
            let decisions = decide(&recipe, &measured, None, 1, Some(budget), 0).unwrap();
            assert!(decisions.loss <= last);
            last = decisions.loss;
        }
        let error = decide(&recipe, &measured, None, 1, Some(59), 0).unwrap_err();
        assert!(matches!(error, CompressError::Budget { budget: 59, least: 60 }));
        // A constant in the place of each of the two that go.
        let error = decide(&recipe, &measured, None, 1, Some(65), 3).unwrap_err();
        assert!(matches!(error, CompressError::Budget { budget: 65, least: 66 }));
    }
}
