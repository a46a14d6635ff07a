//! The joint allocation: one form for each matrix of each expert of all layers, by the knapsack of what each loses times
//! what its layer weighs; where offered, an expert may also go, answer with a constant, or give up inner channels. Laws:
//! limits are met, or refused with the least that can be reached; no expert goes unless that loses less in all.

use cotk_quant::QuantError;
use cotk_quant::allocate::{Allocation, Allocator, Budgets, Candidate, Knapsack};
use cotk_run::units::ExpertId;

use crate::choice::{Chooser, Fate, Instead, Kind, LayerFates, LayerOffers, Limits, MatrixChoice, Offer, Variant};
use crate::{CompressError, Result};

/// Rounds of choosing variants at the knapsack's prices and solving it anew: prices settle in two or three.
const ROUNDS: usize = 8;

/// Chooses per matrix over all layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Joint {
    /// What sensitivities are raised to: 1 as measured, 0 all the same.
    pub trust: f64,
    /// Routed experts of a token.
    pub top_k: usize,
    /// Share of a layer's experts that may go or become constants, at most; those that a token is routed to stay.
    pub max_dropped: f64,
}

/// One matrix with what it may become.
struct Item<'a> {
    layer: usize,
    expert: ExpertId,
    kind: Kind,
    offers: Vec<&'a Offer>,
}

/// One expert: all of it first, then what it may become instead.
struct Whole<'a> {
    layer: usize,
    expert: ExpertId,
    ways: Vec<Way<'a>>,
}

/// One way to keep an expert, or not to.
struct Way<'a> {
    variant: Option<&'a Variant>,
    /// Loss and bytes apart from the matrices'.
    fixed: Candidate,
    matrices: Vec<Item<'a>>,
}

impl Way<'_> {
    fn is_gone(&self) -> bool {
        self.variant
            .is_some_and(|variant| !matches!(variant.instead, Instead::Channels(_)))
    }

    /// Fewest bytes.
    fn least_bytes(&self) -> u64 {
        let of = |item: &Item<'_>| item.offers.iter().map(|offer| offer.bytes).min().unwrap_or(0);
        self.fixed.bytes + self.matrices.iter().map(of).sum::<u64>()
    }
}

/// A whole choice: the way of each expert, and what the knapsack gives its matrices.
struct Solved {
    ways: Vec<usize>,
    allocation: Allocation,
    loss: f64,
}

impl Chooser for Joint {
    fn name(&self) -> String {
        "joint".to_owned()
    }

    fn choose(&self, layers: &[LayerOffers], limits: &Limits, _seed: u64) -> Result<(Vec<LayerFates>, f64)> {
        let wholes = self.wholes(layers);
        let budgets = Budgets {
            bytes: limits.record_bytes,
            ms: limits.ms,
        };
        let mut best = match self.solve(layers, &wholes, vec![0; wholes.len()], &budgets) {
            Ok(solved) => solved,
            // Smaller than all experts at their narrowest: from what is smallest, prices lead back.
            Err(QuantError::NothingFits { .. }) if wholes.iter().any(|whole| whole.ways.len() > 1) => {
                let smallest = self.smallest(layers, &wholes);
                self.solve(layers, &wholes, smallest, &budgets).map_err(refused)?
            }
            Err(error) => return Err(refused(error)),
        };
        let mut ways = best.ways.clone();
        let mut prices = (best.allocation.loss_per_byte, best.allocation.loss_per_ms);
        for _ in 0..ROUNDS {
            let next = self.at_prices(layers, &wholes, prices);
            if next == ways {
                break;
            }
            ways.clone_from(&next);
            let Ok(solved) = self.solve(layers, &wholes, next, &budgets) else {
                break;
            };
            prices = (solved.allocation.loss_per_byte, solved.allocation.loss_per_ms);
            if solved.loss < best.loss {
                best = solved;
            }
        }
        Ok((fates(layers, &wholes, &best), self.expected(layers, &wholes, &best)))
    }
}

impl Joint {
    /// All experts of all layers.
    fn wholes<'a>(&self, layers: &'a [LayerOffers]) -> Vec<Whole<'a>> {
        let mut wholes = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            let weight = self.weight(worst(layer));
            let mut of_layer: Vec<Whole<'a>> = (0..)
                .map(ExpertId)
                .take(layer.usage.experts.len())
                .map(|expert| Whole {
                    layer: index,
                    expert,
                    ways: vec![Way {
                        variant: None,
                        fixed: Candidate {
                            loss: 0.0,
                            bytes: 0,
                            ms: 0.0,
                        },
                        matrices: Vec::new(),
                    }],
                })
                .collect();
            for item in items(index, &layer.offers) {
                of_layer[item.expert.index()].ways[0].matrices.push(item);
            }
            for variant in &layer.variants {
                of_layer[variant.expert.index()].ways.push(Way {
                    variant: Some(variant),
                    fixed: Candidate {
                        loss: variant.error * weight,
                        bytes: variant.bytes,
                        ms: 0.0,
                    },
                    matrices: items(index, &variant.offers),
                });
            }
            wholes.append(&mut of_layer);
        }
        wholes
    }

    /// A sensitivity to the power of `trust`; 0 where nothing was found at the model's end.
    fn weight(&self, sensitivity: f64) -> f64 {
        if sensitivity > 0.0 {
            sensitivity.powf(self.trust)
        } else {
            0.0
        }
    }

    fn candidates(&self, layer: &LayerOffers, item: &Item<'_>) -> Vec<Candidate> {
        #[expect(clippy::cast_precision_loss, reason = "a count of experts")]
        let visits = self.top_k as f64 * layer.usage.share(item.expert);
        let weight = self.weight(layer.sensitivity[item.kind as usize]);
        let of = |offer: &&Offer| Candidate {
            loss: offer.error * weight,
            bytes: offer.bytes,
            ms: offer.ms * visits,
        };
        item.offers.iter().map(of).collect()
    }

    /// The knapsack over what stays.
    fn solve(
        &self,
        layers: &[LayerOffers],
        wholes: &[Whole<'_>],
        ways: Vec<usize>,
        budgets: &Budgets,
    ) -> std::result::Result<Solved, QuantError> {
        let chosen = || wholes.iter().zip(&ways).map(|(whole, &way)| &whole.ways[way]);
        let candidates: Vec<Vec<Candidate>> = chosen()
            .flat_map(|way| &way.matrices)
            .map(|item| self.candidates(&layers[item.layer], item))
            .collect();
        let fixed: u64 = chosen().map(|way| way.fixed.bytes).sum();
        let left = Budgets {
            bytes: budgets.bytes.map(|bytes| bytes.saturating_sub(fixed)),
            ..*budgets
        };
        #[expect(clippy::cast_precision_loss, reason = "bytes below 2^53")]
        let whole = |error| match error {
            QuantError::NothingFits {
                least,
                budget,
                unit: unit @ "bytes",
            } => QuantError::NothingFits {
                least: least + fixed as f64,
                // As it was asked for: what is left of it may be nothing.
                budget: budgets.bytes.map_or(budget, |bytes| bytes as f64),
                unit,
            },
            other => other,
        };
        let allocation = Knapsack.allocate(&candidates, &left).map_err(whole)?;
        let loss = allocation.loss + chosen().map(|way| way.fixed.loss).sum::<f64>();
        Ok(Solved { ways, allocation, loss })
    }

    /// The way of each expert that loses least once bytes and time have a price; the first of equals.
    fn at_prices(&self, layers: &[LayerOffers], wholes: &[Whole<'_>], (per_byte, per_ms): (f64, f64)) -> Vec<usize> {
        #[expect(clippy::cast_precision_loss, reason = "bytes below 2^53")]
        let price = |c: &Candidate| c.loss + per_byte * c.bytes as f64 + per_ms * c.ms;
        let value = |way: &Way<'_>| {
            let matrix = |item: &Item<'_>| {
                let candidates = self.candidates(&layers[item.layer], item);
                candidates.iter().map(price).fold(f64::INFINITY, f64::min)
            };
            price(&way.fixed) + way.matrices.iter().map(matrix).sum::<f64>()
        };
        self.capped(layers, wholes, value)
    }

    /// The way of each expert with the fewest bytes.
    fn smallest(&self, layers: &[LayerOffers], wholes: &[Whole<'_>]) -> Vec<usize> {
        #[expect(clippy::cast_precision_loss, reason = "bytes below 2^53")]
        self.capped(layers, wholes, |way| way.least_bytes() as f64)
    }

    /// Bytes of the smallest choice, with whatever may go gone, and of all experts whole at their widest.
    pub(crate) fn range_bytes(&self, layers: &[LayerOffers]) -> (u64, u64) {
        let wholes = self.wholes(layers);
        let smallest = self.smallest(layers, &wholes);
        let least = wholes
            .iter()
            .zip(smallest)
            .map(|(whole, way)| whole.ways[way].least_bytes());
        let widest = |item: &Item<'_>| item.offers.iter().map(|offer| offer.bytes).max().unwrap_or(0);
        let most = wholes.iter().flat_map(|whole| &whole.ways[0].matrices).map(widest);
        (least.sum(), most.sum())
    }

    /// The way of least value for each expert; of those that would go, no more of a layer than the cap allows: those that
    /// gain most.
    fn capped(&self, layers: &[LayerOffers], wholes: &[Whole<'_>], value: impl Fn(&Way<'_>) -> f64) -> Vec<usize> {
        let mut chosen = Vec::with_capacity(wholes.len());
        // Of those that would go: what that gains, where, and the way to stay.
        let mut going: Vec<Vec<(f64, usize, usize)>> = vec![Vec::new(); layers.len()];
        for (at, whole) in wholes.iter().enumerate() {
            let values: Vec<f64> = whole.ways.iter().map(&value).collect();
            let best = |may_go: bool| {
                let ways = (0..values.len()).filter(|&way| may_go || !whole.ways[way].is_gone());
                ways.min_by(|&a, &b| values[a].total_cmp(&values[b]))
                    .expect("all of it is a way")
            };
            let (any, staying) = (best(true), best(false));
            if any != staying {
                going[whole.layer].push((values[staying] - values[any], at, staying));
            }
            chosen.push(any);
        }
        for (layer, mut going) in layers.iter().zip(going) {
            going.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            for &(_, at, staying) in
                going
                    .iter()
                    .skip(most_gone(self.max_dropped, layer.usage.experts.len(), self.top_k))
            {
                chosen[at] = staying;
            }
        }
        chosen
    }

    /// Σ of what was chosen, with sensitivities as they were measured.
    fn expected(&self, layers: &[LayerOffers], wholes: &[Whole<'_>], solved: &Solved) -> f64 {
        let mut choices = solved.allocation.choice.iter();
        let mut loss = 0.0;
        for (whole, &way) in wholes.iter().zip(&solved.ways) {
            let (way, layer) = (&whole.ways[way], &layers[whole.layer]);
            loss += way.variant.map_or(0.0, |variant| variant.error * worst(layer));
            for (item, &choice) in way.matrices.iter().zip(choices.by_ref()) {
                loss += item.offers[choice].error * layer.sensitivity[item.kind as usize];
            }
        }
        loss
    }
}

/// Experts of a layer that may go: a share, but those that a token is routed to stay.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share of a count of experts"
)]
pub(crate) fn most_gone(share: f64, experts: usize, top_k: usize) -> usize {
    ((share * experts as f64) as usize).min(experts.saturating_sub(top_k))
}

/// What becomes of every expert.
fn fates(layers: &[LayerOffers], wholes: &[Whole<'_>], solved: &Solved) -> Vec<LayerFates> {
    let mut all: Vec<LayerFates> = layers
        .iter()
        .map(|layer| LayerFates {
            layer: layer.layer,
            experts: Vec::with_capacity(layer.usage.experts.len()),
        })
        .collect();
    let mut choices = solved.allocation.choice.iter();
    for (whole, &way) in wholes.iter().zip(&solved.ways) {
        let way = &whole.ways[way];
        let chosen: Vec<MatrixChoice> = (way.matrices.iter().zip(choices.by_ref()))
            .map(|(item, &choice)| item.offers[choice].choice)
            .collect();
        let fate = match way.variant.map(|variant| &variant.instead) {
            Some(Instead::Dropped) => Fate::Dropped,
            Some(Instead::Constant) => Fate::Constant,
            kept => Fate::Coded {
                matrices: chosen.try_into().expect("gate, up and down have offers"),
                channels: match kept {
                    Some(Instead::Channels(channels)) => Some(channels.clone()),
                    _ => None,
                },
            },
        };
        debug_assert_eq!(all[whole.layer].experts.len(), whole.expert.index());
        all[whole.layer].experts.push(fate);
    }
    all
}

/// Matrices in order of expert and kind.
fn items(layer: usize, offers: &[Offer]) -> Vec<Item<'_>> {
    let mut items: Vec<Item<'_>> = Vec::new();
    for offer in offers {
        let (expert, kind) = (offer.expert, offer.kind);
        match items.last_mut() {
            Some(last) if (last.expert, last.kind) == (expert, kind) => last.offers.push(offer),
            _ => items.push(Item {
                layer,
                expert,
                kind,
                offers: vec![offer],
            }),
        }
    }
    items
}

/// What an error of an expert's output weighs that no single kind of matrix makes: as the worst kind.
fn worst(layer: &LayerOffers) -> f64 {
    layer.sensitivity.iter().copied().fold(0.0, f64::max)
}

/// What the knapsack cannot do, in the pipeline's words.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sums of bytes, below 2^53"
)]
fn refused(error: QuantError) -> CompressError {
    match error {
        QuantError::NothingFits {
            least,
            budget,
            unit: "bytes",
        } => CompressError::Budget {
            budget: budget as u64,
            least: least as u64,
        },
        QuantError::NothingFits { least, budget, .. } => CompressError::TargetTime { budget, least },
        other => CompressError::Allocation(other),
    }
}

#[cfg(test)]
mod tests {
    use cotk_quant::code::{Bits, Code};
    use cotk_run::units::LayerId;

    use super::*;
    use crate::choice::Form;
    use crate::layer::{ExpertUsage, Usage};

    const WIDTHS: [Bits; 3] = [Bits::B1, Bits::B2, Bits::B4];

    /// Offers of an expert whose whole output has this size: each bit a quarter of the error, 100 bytes.
    fn offers(expert: ExpertId, size: f64) -> Vec<Offer> {
        let of = |kind, bits: Bits| Offer {
            expert,
            kind,
            choice: MatrixChoice {
                form: Form::plain(Code::Plain(bits), 32),
                rank: 0,
            },
            error: size * 0.25f64.powi(i32::try_from(bits.get()).unwrap()),
            bytes: u64::from(bits.get()) * 100,
            ms: 0.0,
        };
        Kind::ALL
            .into_iter()
            .flat_map(|kind| WIDTHS.map(|bits| of(kind, bits)))
            .collect()
    }

    fn layer(index: u32, sizes: &[f64], gone: &[f64]) -> LayerOffers {
        let experts = || (0..).map(ExpertId).zip(sizes);
        LayerOffers {
            layer: LayerId(index),
            usage: Usage {
                tokens: 100,
                experts: vec![
                    ExpertUsage {
                        tokens: 100,
                        ..ExpertUsage::default()
                    };
                    sizes.len()
                ],
                state_square: 1.0,
            },
            offers: experts().flat_map(|(expert, size)| offers(expert, *size)).collect(),
            variants: (experts().zip(gone))
                .map(|((expert, size), share)| Variant {
                    expert,
                    instead: Instead::Dropped,
                    error: size * share,
                    bytes: 0,
                    offers: Vec::new(),
                })
                .collect(),
            sensitivity: [1.0, 2.0, 0.5],
        }
    }

    fn joint(max_dropped: f64) -> Joint {
        Joint {
            trust: 1.0,
            top_k: 1,
            max_dropped,
        }
    }

    fn bytes(bytes: u64) -> Limits {
        Limits {
            record_bytes: Some(bytes),
            ms: None,
        }
    }

    /// The least loss of all choices that fit: by trying them.
    fn brute_force(layer: &LayerOffers, limit: u64) -> f64 {
        let mut sums = vec![(0.0, 0u64)];
        for (expert, variant) in (0..).map(ExpertId).zip(&layer.variants) {
            let mut own = vec![(variant.error * 2.0, 0)];
            let of = |kind: Kind| -> Vec<(f64, u64)> {
                let all = layer.offers.iter().filter(|o| (o.expert, o.kind) == (expert, kind));
                all.map(|o| (o.error * layer.sensitivity[kind as usize], o.bytes))
                    .collect()
            };
            for gate in of(Kind::Gate) {
                for up in of(Kind::Up) {
                    for down in of(Kind::Down) {
                        own.push((gate.0 + up.0 + down.0, gate.1 + up.1 + down.1));
                    }
                }
            }
            sums = (sums.iter())
                .flat_map(|sum| own.iter().map(|o| (sum.0 + o.0, sum.1 + o.1)))
                .filter(|sum| sum.1 <= limit)
                .collect();
        }
        sums.iter().map(|sum| sum.0).fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn an_expert_goes_only_where_that_loses_less_in_all() {
        let sizes = [1.0, 8.0, 0.02];
        // What the last one does can be left out; the others are needed.
        let layers = [layer(0, &sizes, &[3.0, 3.0, 0.5])];
        for limit in [1000, 1500, 2400] {
            let (fates, loss) = joint(0.5).choose(&layers, &bytes(limit), 0).unwrap();
            let gone: Vec<bool> = fates[0].experts.iter().map(|fate| *fate == Fate::Dropped).collect();
            assert!(!gone[0] && !gone[1], "{limit}: {gone:?}");
            let (_, all_kept) = joint(0.0).choose(&layers, &bytes(limit), 0).unwrap();
            assert!(loss <= all_kept);
            let least = brute_force(&layers[0], limit);
            assert!(
                loss >= least - 1e-12 && loss <= 1.25 * least,
                "{limit}: {loss} of {least}"
            );
        }
        // Little room: it goes. All the room there is: it stays.
        let dropped = |limit: u64| {
            let (fates, _) = joint(0.5).choose(&layers, &bytes(limit), 0).unwrap();
            fates[0].experts[2] == Fate::Dropped
        };
        assert!(dropped(1000) && !dropped(100_000));
    }

    #[test]
    fn no_more_go_than_the_cap_allows_and_a_budget_below_all_codes_is_met_by_it() {
        let layers = [layer(0, &[1.0; 4], &[0.3; 4]), layer(1, &[1.0; 4], &[0.3; 4])];
        let gone = |limit: u64, cap: f64| {
            let (fates, _) = joint(cap).choose(&layers, &bytes(limit), 0)?;
            let count = |layer: &LayerFates| layer.experts.iter().filter(|fate| **fate == Fate::Dropped).count();
            Ok::<_, CompressError>(fates.iter().map(count).collect::<Vec<_>>())
        };
        // All eight at one bit take 2400 bytes.
        assert_eq!(gone(1200, 0.5).unwrap(), [2, 2]);
        assert_eq!(gone(600, 1.0).unwrap(), [3, 3], "a token is routed to one: that stays");
        for (limit, cap, smallest) in [(1000, 0.5, 1200), (1000, 0.0, 2400)] {
            match gone(limit, cap).unwrap_err() {
                CompressError::Budget { budget, least } => assert_eq!((budget, least), (limit, smallest)),
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn the_range_of_bytes_ends_where_nothing_smaller_fits_and_a_refusal_shows_the_budget_that_was_asked_for() {
        let mut layers = [layer(0, &[1.0; 4], &[0.3; 4])];
        assert_eq!(joint(0.5).range_bytes(&layers), (600, 4800));
        assert_eq!(joint(0.0).range_bytes(&layers), (1200, 4800));
        // Constants alone take more than there is.
        for variant in &mut layers[0].variants {
            (variant.instead, variant.bytes) = (Instead::Constant, 50);
        }
        assert_eq!(joint(0.5).range_bytes(&layers).0, 700);
        for limit in [60, 699] {
            match joint(0.5).choose(&layers, &bytes(limit), 0).unwrap_err() {
                CompressError::Budget { budget, least } => assert_eq!((budget, least), (limit, 700)),
                other => panic!("{other}"),
            }
        }
        joint(0.5).choose(&layers, &bytes(700), 0).unwrap();
    }
}
