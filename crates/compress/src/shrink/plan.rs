//! How much of which expert goes under one total. Law: the weights that a plan leaves are at most those that the ratio
//! allows; sums of costs are as good as the knapsack's gap says.

use cotk_linalg::break_even;
use cotk_quant::allocate::{Allocator, Budgets, Candidate, Knapsack};
use serde::{Deserialize, Serialize};

use super::slim::{Slim, rank_weights};
use super::survey::{ShrinkExpert, ShrinkLayer};
use crate::{CompressError, Result};

/// Exponent of MoE-I²'s ranks.
const PAPER_ALPHA: f64 = 0.15;
/// Rounds in which a layer's slope follows its loss along the measured curve.
const ROUNDS: usize = 4;

/// How experts become smaller.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// They stay as they are.
    #[default]
    Whole,
    /// Inner channels by OBS.
    Channels,
    /// Whitened low rank of all three matrices.
    Rank,
    /// Plain low rank by MoE-I²'s rule of ranks.
    PlainRank,
}

impl Way {
    /// As tables spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Whole => "experts",
            Self::Channels => "channels",
            Self::Rank => "rank",
            Self::PlainRank => "plain rank",
        }
    }
}

/// What a layer's loss costs at the model's end: points of measured loss and KL, straight between them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Ascending by loss, without the origin.
    pub points: Vec<(f64, f64)>,
}

impl Curve {
    /// Of measured points; what does not rise is lifted to what stands before it.
    pub fn new(mut points: Vec<(f64, f64)>) -> Self {
        points.retain(|(loss, kl)| *loss > 0.0 && loss.is_finite() && kl.is_finite());
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut most = 0.0f64;
        for (_, kl) in &mut points {
            most = most.max(*kl);
            *kl = most;
        }
        Self { points }
    }

    /// KL at a loss; beyond the last point as steep as to it.
    pub fn kl(&self, loss: f64) -> f64 {
        let mut from = (0.0, 0.0);
        for &to in &self.points {
            if loss <= to.0 {
                let share = if to.0 > from.0 {
                    (loss - from.0) / (to.0 - from.0)
                } else {
                    1.0
                };
                return from.1 + share * (to.1 - from.1);
            }
            from = to;
        }
        let before = match self.points.len() {
            0 => return 0.0,
            1 => (0.0, 0.0),
            n => self.points[n - 2],
        };
        let slope = if from.0 > before.0 {
            (from.1 - before.1) / (from.0 - before.0)
        } else {
            0.0
        };
        from.1 + (loss - from.0) * slope
    }

    /// KL per unit of loss around a loss.
    pub fn slope(&self, loss: f64) -> f64 {
        let last = self.points.last().map_or(0.0, |p| p.0);
        let step = (0.1 * loss).max(0.02 * last).max(f64::MIN_POSITIVE);
        (self.kl(loss + step) - self.kl((loss - step).max(0.0))) / (loss + step - (loss - step).max(0.0))
    }
}

/// Sizes of a model's experts.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub hidden: usize,
    pub inner: usize,
    /// Inner sizes are multiples of this.
    pub multiple: usize,
    /// Weights that may be left of the experts that stay, over all layers.
    pub weights: usize,
}

impl Sizes {
    fn whole(&self) -> usize {
        3 * self.hidden * self.inner
    }
}

/// The same share of each living expert. `alive[layer][expert]`.
pub fn equal(way: Way, alive: &[Vec<bool>], sizes: &Sizes) -> Vec<Vec<Slim>> {
    let living: usize = alive.iter().flatten().filter(|alive| **alive).count();
    let each = sizes.weights / living.max(1);
    let how = if each >= sizes.whole() {
        Slim::Whole
    } else {
        match way {
            Way::Whole => Slim::Whole,
            Way::Channels => {
                let kept = each / (3 * sizes.hidden) / sizes.multiple * sizes.multiple;
                Slim::Channels(kept.max(sizes.multiple.min(sizes.inner)))
            }
            Way::Rank | Way::PlainRank => {
                let rank = (each / 3 / (sizes.hidden + sizes.inner)).clamp(1, break_even(sizes.inner, sizes.hidden));
                if way == Way::Rank {
                    Slim::Ranks([rank; 3])
                } else {
                    Slim::PlainRanks([rank; 3])
                }
            }
        }
    };
    (alive.iter())
        .map(|layer| {
            layer
                .iter()
                .map(|&alive| if alive { how.clone() } else { Slim::Channels(0) })
                .collect()
        })
        .collect()
}

/// What costs least at the model's end: `curves` say what each layer's loss costs.
///
/// # Errors
/// [`CompressError::Allocation`]: losses that are not finite.
pub fn unequal(
    way: Way,
    surveyed: &[&ShrinkLayer],
    alive: &[Vec<bool>],
    curves: &[Curve],
    sizes: &Sizes,
) -> Result<Vec<Vec<Slim>>> {
    // Offers of each living expert (channels) or of each of its matrices (ranks).
    let mut items: Vec<(usize, usize, usize, Offers)> = Vec::new();
    for (layer, (surveyed, alive)) in surveyed.iter().zip(alive).enumerate() {
        for (expert, found) in surveyed.experts.iter().enumerate().filter(|(expert, _)| alive[*expert]) {
            match way {
                Way::Whole => {}
                Way::Channels => items.push((layer, expert, 0, channel_offers(found, sizes))),
                Way::Rank | Way::PlainRank => {
                    items.extend((0..3).map(|kind| (layer, expert, kind, rank_offers(found, kind, sizes))));
                }
            }
        }
    }
    let budgets = Budgets {
        bytes: Some(sizes.weights as u64),
        ms: None,
    };
    let mut slopes: Vec<f64> = curves.iter().map(|curve| curve.slope(0.0)).collect();
    let mut choice = Vec::new();
    for _ in 0..ROUNDS {
        let candidates: Vec<Vec<Candidate>> = (items.iter())
            .map(|(layer, _, _, offers)| {
                let candidate = |&(_, loss, weights): &(usize, f64, usize)| Candidate {
                    loss: loss.max(0.0) * slopes[*layer],
                    bytes: weights as u64,
                    ms: 0.0,
                };
                offers.iter().map(candidate).collect()
            })
            .collect();
        choice = Knapsack
            .allocate(&candidates, &budgets)
            .map_err(CompressError::Allocation)?
            .choice;
        let mut losses = vec![0.0; curves.len()];
        for ((layer, _, _, offers), &at) in items.iter().zip(&choice) {
            losses[*layer] += offers[at].1;
        }
        for ((slope, curve), loss) in slopes.iter_mut().zip(curves).zip(losses) {
            // Half the way: layers would else swap places from round to round.
            *slope = 0.5 * (*slope + curve.slope(loss));
        }
    }
    let mut plan: Vec<Vec<Slim>> = (alive.iter())
        .map(|layer| {
            layer
                .iter()
                .map(|&alive| if alive { Slim::Whole } else { Slim::Channels(0) })
                .collect()
        })
        .collect();
    for ((layer, expert, kind, offers), at) in items.iter().zip(choice) {
        let size = offers[at].0;
        let slot = &mut plan[*layer][*expert];
        match way {
            Way::Whole => {}
            Way::Channels if size >= sizes.inner => {}
            Way::Channels => *slot = Slim::Channels(size),
            Way::Rank | Way::PlainRank => {
                if let Slim::Whole = slot {
                    *slot = if way == Way::Rank {
                        Slim::Ranks([0; 3])
                    } else {
                        Slim::PlainRanks([0; 3])
                    };
                }
                if let Slim::Ranks(ranks) | Slim::PlainRanks(ranks) = slot {
                    ranks[*kind] = size;
                }
            }
        }
    }
    Ok(plan)
}

/// Size (channels or rank), loss, weights.
type Offers = Vec<(usize, f64, usize)>;

/// Channels that stay, loss, weights.
fn channel_offers(found: &ShrinkExpert, sizes: &Sizes) -> Offers {
    // An expert of nothing would still be routed to: that is what dropping is for.
    let kept = (1..=sizes.inner).filter(|kept| kept % sizes.multiple == 0 || *kept == sizes.inner);
    kept.map(|kept| {
        let gone = sizes.inner - kept;
        let loss = if gone == 0 {
            0.0
        } else {
            f64::from(found.losses[gone - 1])
        };
        (kept, loss, 3 * sizes.hidden * kept)
    })
    .collect()
}

/// Rank (0: whole), loss, weights.
fn rank_offers(found: &ShrinkExpert, kind: usize, sizes: &Sizes) -> Offers {
    let gains = &found.gains[kind];
    let most = break_even(sizes.inner, sizes.hidden).min(gains.len());
    let ranks = (1..=most).filter(|rank| rank % 4 == 0 || *rank == 1);
    let mut offers: Offers = ranks
        .map(|rank| {
            let tail: f64 = gains[rank..].iter().rev().map(|&g| f64::from(g)).sum();
            (rank, tail, rank_weights(rank, sizes.hidden, sizes.inner))
        })
        .collect();
    offers.push((0, 0.0, sizes.hidden * sizes.inner));
    offers
}

/// MoE-I²'s ranks: `R_ij = ⌊R̄·M_i·(I_ij + ε)^α / Σ_j (I_ij + ε)^α⌋` over the living experts of each layer, clipped to 1
/// and break-even; R̄ is the largest that the total allows. `importances[layer][expert]`.
pub fn paper(importances: &[Vec<f64>], alive: &[Vec<bool>], sizes: &Sizes) -> Vec<Vec<Slim>> {
    let most = break_even(sizes.inner, sizes.hidden);
    let ranks = |mean: f64| -> Vec<Vec<usize>> {
        let of = |(importances, alive): (&Vec<f64>, &Vec<bool>)| -> Vec<usize> {
            let power = |importance: f64| (importance + f64::EPSILON).powf(PAPER_ALPHA);
            let living = || importances.iter().zip(alive).filter(|(_, alive)| **alive);
            let (count, sum) = (living().count(), living().map(|(&i, _)| power(i)).sum::<f64>());
            #[expect(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "ranks are small"
            )]
            let rank = |importance: f64| (mean * count as f64 * power(importance) / sum).floor() as usize;
            (importances.iter().zip(alive))
                .map(|(&i, &alive)| if alive { rank(i).clamp(1, most) } else { 0 })
                .collect()
        };
        importances.iter().zip(alive).map(of).collect()
    };
    let weights = |ranks: &[Vec<usize>]| -> usize {
        ranks
            .iter()
            .flatten()
            .map(|&rank| 3 * rank * (sizes.hidden + sizes.inner))
            .sum()
    };
    #[expect(clippy::cast_precision_loss, reason = "ranks are small")]
    let (mut low, mut high) = (1.0, 4.0 * most as f64);
    for _ in 0..60 {
        let mean = 0.5 * (low + high);
        if weights(&ranks(mean)) <= sizes.weights {
            low = mean
        } else {
            high = mean
        }
    }
    let slim = |rank: usize| {
        if rank == 0 {
            Slim::Channels(0)
        } else {
            Slim::PlainRanks([rank; 3])
        }
    };
    (ranks(low).into_iter())
        .map(|layer| layer.into_iter().map(slim).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes {
        hidden: 16,
        inner: 12,
        multiple: 2,
        weights: 4 * 3 * 16 * 6,
    };

    fn left(plan: &[Vec<Slim>]) -> usize {
        plan.iter().flatten().map(|slim| slim.weights(16, 12)).sum()
    }

    #[test]
    fn the_papers_ranks_are_within_break_even_and_budget_and_rise_with_importance() {
        let importances = [vec![1.0, 50.0, 3.0], vec![1e-9, 2.0, 0.0]];
        let alive = [vec![true, true, false], vec![true, true, true]];
        for weights in [1000, 2000, 3000, 100_000] {
            let plan = paper(&importances, &alive, &Sizes { weights, ..SIZES });
            assert!(left(&plan) <= weights, "{plan:?}");
            assert_eq!(plan[0][2], Slim::Channels(0));
            let rank = |slim: &Slim| match slim {
                Slim::PlainRanks([rank, ..]) => *rank,
                other => panic!("{other:?}"),
            };
            assert!(
                plan.iter()
                    .flatten()
                    .filter(|s| **s != Slim::Channels(0))
                    .all(|s| (1..=break_even(12, 16)).contains(&rank(s)))
            );
            assert!(rank(&plan[0][1]) >= rank(&plan[0][0]) && rank(&plan[1][1]) >= rank(&plan[1][0]));
        }
    }

    #[test]
    fn dear_layers_and_experts_stay_larger() {
        let expert = |scale: f64| ShrinkExpert {
            tokens: 10,
            order: (0..12).collect(),
            losses: (1..=12).map(|n| (scale * f64::from(n * n)) as f32).collect(),
            gains: [(); 3].map(|()| (0..12).map(|n| (scale / f64::from(1 + n)) as f32).collect()),
        };
        let layers = [
            ShrinkLayer {
                experts: vec![expert(1.0), expert(4.0)],
            },
            ShrinkLayer {
                experts: vec![expert(1.0), expert(1.0)],
            },
        ];
        let alive = vec![vec![true; 2]; 2];
        let curves = [Curve::new(vec![(100.0, 1.0)]), Curve::new(vec![(100.0, 0.25)])];
        let all: Vec<&ShrinkLayer> = layers.iter().collect();
        for way in [Way::Channels, Way::Rank] {
            let plan = unequal(way, &all, &alive, &curves, &SIZES).unwrap();
            let weights = |slim: &Slim| slim.weights(16, 12);
            assert!(
                left(&plan) <= SIZES.weights && left(&plan) * 10 > SIZES.weights * 8,
                "{plan:?}"
            );
            assert!(weights(&plan[0][1]) >= weights(&plan[0][0]), "{plan:?}");
            assert!(weights(&plan[0][0]) >= weights(&plan[1][0]), "{plan:?}");
        }
        assert!(left(&equal(Way::Channels, &alive, &SIZES)) <= SIZES.weights);
    }

    #[test]
    fn a_curve_meets_its_points_and_never_falls() {
        let curve = Curve::new(vec![(2.0, 4.0), (1.0, 1.0), (3.0, 3.5)]);
        for (loss, kl) in [
            (0.0, 0.0),
            (0.5, 0.5),
            (1.0, 1.0),
            (1.5, 2.5),
            (2.0, 4.0),
            (3.0, 4.0),
            (9.0, 4.0),
        ] {
            assert!((curve.kl(loss) - kl).abs() < 1e-12, "{loss}");
        }
        assert_eq!(Curve::new(vec![]).kl(1.0), 0.0);
        assert!((Curve::new(vec![(0.5, 1.0)]).kl(1.0) - 2.0).abs() < 1e-12);
    }
}
