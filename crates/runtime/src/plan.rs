//! What is where: experts in memory or on disk under a budget of bytes, and the choices beside it. Predicts through the
//! shared hardware model; moves nothing. Laws: what is held fits the budget; a larger budget holds what a smaller one does;
//! a budget that cannot hold one step is refused with the numbers.

use cotk_latency::moe::{Home, MoeStep, RoutedExpert, StepPrediction};
use cotk_latency::predict::Model;
use cotk_model::model::KvCache;
use cotk_model::spec::ModelSpec;

use crate::cost::{self, Held};
use crate::{Error, Result};

/// Where the bytes of a model are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// What may be held in memory; absent: everything is.
    pub budget_bytes: Option<u64>,
    /// Dense part as the engine holds it, the embedding too.
    pub dense_bytes: u64,
    /// Keys and values of all sequences at the context that is asked about.
    pub kv_bytes: u64,
    /// Routed experts in memory, and all of them.
    pub expert_bytes: u64,
    pub all_expert_bytes: u64,
    /// Experts in memory and on disk, per layer with experts.
    pub layers: Vec<LayerPlacement>,
}

/// Experts of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerPlacement {
    pub layer: usize,
    pub in_memory: usize,
    pub on_disk: usize,
}

impl Placement {
    /// All that is held in memory.
    pub fn memory_bytes(&self) -> u64 {
        self.dense_bytes + self.kv_bytes + self.expert_bytes
    }
}

/// Header and alignment of a record, at most.
const RECORD_EXTRA: u64 = 512;

/// Bytes of an expert's record.
fn record_bytes(expert: &RoutedExpert) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bytes of an expert"
    )]
    let bytes = expert.key.weight_bytes().ceil() as u64;
    bytes + RECORD_EXTRA
}

/// Bytes that are in memory whatever happens to experts: dense part and cache.
pub fn held_bytes(spec: &ModelSpec, held: &Held<'_>, context: usize, sequences: usize) -> (u64, u64) {
    (
        cost::held_bytes(spec, held),
        sequences as u64 * KvCache::bytes_for(spec, held.kv, context),
    )
}

/// Puts experts where they belong: those that tokens use most per byte into memory, until the budget is full (the static
/// optimum: no step knows which tokens come). Without a budget everything is in memory.
///
/// # Errors
/// [`Error::Budget`]: less than the dense part, the cache and the largest set of experts that one step can touch in a layer.
pub fn place(step: &mut MoeStep, (dense_bytes, kv_bytes): (u64, u64), budget_bytes: Option<u64>) -> Result<Placement> {
    let experts = || step.layers.iter().flat_map(|layer| &layer.experts);
    let all_expert_bytes: u64 = experts().map(record_bytes).sum();
    let mut expert_bytes = all_expert_bytes;
    if let Some(budget) = budget_bytes {
        let touched = |layer: &cotk_latency::moe::LayerStep| -> u64 {
            let mut bytes: Vec<u64> = layer.experts.iter().map(record_bytes).collect();
            bytes.sort_unstable_by(|a, b| b.cmp(a));
            let most = (layer.top_k as usize).saturating_mul(step.tokens as usize);
            bytes.iter().take(most).sum()
        };
        let largest_set_bytes = step.layers.iter().map(touched).max().unwrap_or(0);
        let least = dense_bytes + kv_bytes + largest_set_bytes;
        if budget < least {
            return Err(Error::Budget {
                found: budget,
                least,
                dense_bytes,
                kv_bytes,
                largest_set_bytes,
            });
        }
        // Room for the set of a step stays free: what is fetched must land somewhere.
        let room = if budget >= dense_bytes + kv_bytes + all_expert_bytes {
            all_expert_bytes
        } else {
            budget - least
        };
        let mut order: Vec<(f64, usize, usize)> = Vec::new();
        for (l, layer) in step.layers.iter().enumerate() {
            for (e, expert) in layer.experts.iter().enumerate() {
                #[expect(clippy::cast_precision_loss, reason = "a ratio")]
                let worth = expert.share / record_bytes(expert) as f64;
                order.push((worth, l, e));
            }
        }
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        expert_bytes = 0;
        let mut is_full = false;
        for (_, l, e) in order {
            let expert = &mut step.layers[l].experts[e];
            let bytes = record_bytes(expert);
            // The first that does not fit ends it: a larger budget then holds all that this one does.
            is_full |= expert_bytes + bytes > room;
            expert.home = if is_full {
                Home::Disk { bytes }
            } else {
                expert_bytes += bytes;
                Home::Memory
            };
        }
        step.working_set_bytes = step.working_set_bytes.saturating_sub(all_expert_bytes - expert_bytes);
    }
    let in_memory = |experts: &[RoutedExpert]| experts.iter().filter(|e| e.home == Home::Memory).count();
    let layers = step
        .layers
        .iter()
        .enumerate()
        .filter(|(_, layer)| !layer.experts.is_empty());
    Ok(Placement {
        budget_bytes,
        dense_bytes,
        kv_bytes,
        expert_bytes,
        all_expert_bytes,
        layers: layers
            .map(|(index, layer)| LayerPlacement {
                layer: index,
                in_memory: in_memory(&layer.experts),
                on_disk: layer.experts.len() - in_memory(&layer.experts),
            })
            .collect(),
    })
}

/// One choice of width and budget.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Widest bits of its experts.
    pub bits: u32,
    pub placement: Placement,
    pub prediction: StepPrediction,
    pub tokens_per_s: f64,
}

/// Parts of the experts that are held, for the table of choices.
const HELD: [f64; 5] = [1.0, 0.75, 0.5, 0.25, 0.0];

/// Choices over widths and budgets that no other one beats: with at least as many bits, in as few bytes, as fast. A part
/// that nothing is known about (no disk was measured) is left out.
///
/// # Errors
/// What predicting everything in memory meets.
pub fn choices(steps: &[(u32, MoeStep)], held: (u64, u64), sequences: usize, model: &Model) -> Result<Vec<Choice>> {
    let mut found: Vec<Choice> = Vec::new();
    for (bits, whole) in steps {
        let all: u64 = whole.layers.iter().flat_map(|l| &l.experts).map(record_bytes).sum();
        for part in HELD {
            let mut step = whole.clone();
            let placement = if part == 1.0 {
                place(&mut step, held, None)?
            } else {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    clippy::cast_precision_loss,
                    reason = "a part of a size"
                )]
                let experts = (part * all as f64) as u64;
                match place(&mut step, held, Some(held.0 + held.1 + experts)) {
                    Ok(placement) => placement,
                    Err(Error::Budget { least, .. }) => place(&mut step, held, Some(least))?,
                    Err(error) => return Err(error),
                }
            };
            let prediction = match model.step(&step) {
                Ok(prediction) => prediction,
                Err(_) if part < 1.0 => continue,
                Err(error) => return Err(error.into()),
            };
            #[expect(clippy::cast_precision_loss, reason = "a batch")]
            let tokens_per_s = sequences as f64 * 1e3 / prediction.whole.ms;
            found.push(Choice {
                bits: *bits,
                placement,
                prediction,
                tokens_per_s,
            });
        }
    }
    let memory = |choice: &Choice| choice.placement.budget_bytes.unwrap_or(choice.placement.memory_bytes());
    let beats = |a: &Choice, b: &Choice| {
        let as_good = a.bits >= b.bits && memory(a) <= memory(b) && a.tokens_per_s >= b.tokens_per_s;
        as_good && (a.bits > b.bits || memory(a) < memory(b) || a.tokens_per_s > b.tokens_per_s)
    };
    let mut kept: Vec<Choice> = Vec::new();
    for choice in &found {
        if !found.iter().any(|other| beats(other, choice)) && !kept.iter().any(|k| k.placement == choice.placement) {
            kept.push(choice.clone());
        }
    }
    kept.sort_by(|a, b| memory(a).cmp(&memory(b)).then(a.bits.cmp(&b.bits)));
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{self, Pass};
    use crate::synthetic;

    fn step() -> (ModelSpec, MoeStep) {
        let spec = synthetic::spec("olmoe-1b-7b", Some(3)).unwrap();
        let pass = Pass::Decode { context: 64, batch: 1 };
        let mut step = cost::step(&spec, pass, 1, &cost::Held::F32, |_| cost::uniform_experts(&spec, 4, 1));
        for (i, expert) in step.layers.iter_mut().flat_map(|l| &mut l.experts).enumerate() {
            expert.share = 0.01 + 0.2 * ((i * 37) % 64) as f64 / 64.0;
        }
        (spec, step)
    }

    fn in_memory(step: &MoeStep) -> Vec<bool> {
        step.layers
            .iter()
            .flat_map(|l| &l.experts)
            .map(|e| e.home == Home::Memory)
            .collect()
    }

    #[test]
    fn a_budget_is_kept_and_a_larger_one_holds_what_a_smaller_one_does() {
        let (spec, whole) = step();
        let held = held_bytes(&spec, &Held::F32, 64, 1);
        let all = place(&mut whole.clone(), held, None).unwrap();
        assert_eq!((all.expert_bytes, all.layers.len()), (all.all_expert_bytes, 3));
        let mut smaller: Option<Vec<bool>> = None;
        let least = held.0 + held.1 + 8 * (all.all_expert_bytes / 192);
        for part in 0..=20 {
            let budget = least + part * (all.memory_bytes() - least) / 20;
            let mut step = whole.clone();
            let placed = place(&mut step, held, Some(budget)).unwrap();
            assert!(placed.memory_bytes() <= budget);
            let now = in_memory(&step);
            assert_eq!(
                now.iter().filter(|m| **m).count(),
                placed.layers.iter().map(|l| l.in_memory).sum::<usize>()
            );
            if let Some(before) = smaller {
                assert!(before.iter().zip(&now).all(|(before, now)| !before || *now));
            }
            // The busiest go first.
            let share = |is: bool| {
                let experts = step
                    .layers
                    .iter()
                    .flat_map(|l| &l.experts)
                    .filter(move |e| (e.home == Home::Memory) == is);
                experts.map(|e| e.share).collect::<Vec<_>>()
            };
            let coldest_held = share(true).into_iter().fold(1.0, f64::min);
            assert!(share(false).into_iter().all(|s| s <= coldest_held));
            smaller = Some(now);
        }
        assert!(smaller.unwrap().iter().all(|m| *m));
    }

    #[test]
    fn a_budget_below_one_step_is_refused_with_the_numbers() {
        let (spec, mut step) = step();
        let held = held_bytes(&spec, &Held::F32, 64, 1);
        let error = place(&mut step, held, Some(held.0)).unwrap_err();
        let Error::Budget {
            found,
            least,
            dense_bytes,
            kv_bytes,
            largest_set_bytes,
        } = error
        else {
            panic!("{error}")
        };
        assert_eq!((found, dense_bytes, kv_bytes), (held.0, held.0, held.1));
        assert_eq!(least, dense_bytes + kv_bytes + largest_set_bytes);
        assert!(
            place(&mut step.clone(), held, Some(least)).is_ok() && place(&mut step, held, Some(least - 1)).is_err()
        );
    }
}
