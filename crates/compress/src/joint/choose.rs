//! The joint allocation: one form for each matrix of each expert of all layers, by the knapsack of what each loses times
//! what its layer weighs. Law: limits are met, or refused with the least that can be reached.

use cotk_quant::QuantError;
use cotk_quant::allocate::{Allocator, Budgets, Candidate, Knapsack};
use cotk_run::units::ExpertId;

use crate::choice::{Chooser, Fate, Kind, LayerFates, LayerOffers, Limits, MatrixChoice, Offer};
use crate::{CompressError, Result};

/// Chooses per matrix over all layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Joint {
    /// What sensitivities are raised to: 1 as measured, 0 all the same.
    pub trust: f64,
    /// Routed experts of a token.
    pub top_k: usize,
}

/// One matrix with what it may become.
struct Item<'a> {
    layer: usize,
    expert: ExpertId,
    kind: Kind,
    offers: Vec<&'a Offer>,
}

impl Chooser for Joint {
    fn name(&self) -> String {
        "joint".to_owned()
    }

    fn choose(&self, layers: &[LayerOffers], limits: &Limits, _seed: u64) -> Result<(Vec<LayerFates>, f64)> {
        let items = items(layers);
        let weights = self.weights(layers);
        #[expect(clippy::cast_precision_loss, reason = "a count of experts")]
        let per_token = self.top_k as f64;
        let candidates: Vec<Vec<Candidate>> = items
            .iter()
            .map(|item| {
                let visits = per_token * layers[item.layer].usage.share(item.expert);
                let of = |offer: &&Offer| Candidate {
                    loss: offer.error * weights[item.layer][item.kind as usize],
                    bytes: offer.bytes,
                    ms: offer.ms * visits,
                };
                item.offers.iter().map(of).collect()
            })
            .collect();
        let budgets = Budgets {
            bytes: limits.record_bytes,
            ms: limits.ms,
        };
        let allocation = Knapsack.allocate(&candidates, &budgets).map_err(refused)?;
        let mut fates: Vec<Vec<Option<[MatrixChoice; 3]>>> = layers
            .iter()
            .map(|layer| vec![None; layer.usage.experts.len()])
            .collect();
        let mut loss = 0.0;
        for (item, &choice) in items.iter().zip(&allocation.choice) {
            let offer = item.offers[choice];
            loss += offer.error * layers[item.layer].sensitivity[item.kind as usize];
            let matrices = fates[item.layer][item.expert.index()].get_or_insert([offer.choice; 3]);
            matrices[item.kind as usize] = offer.choice;
        }
        let fates = fates.into_iter().zip(layers).map(|(fates, layer)| LayerFates {
            layer: layer.layer,
            experts: fates
                .into_iter()
                .map(|matrices| Fate::Coded {
                    matrices: matrices.expect("every expert has offers"),
                    channels: None,
                })
                .collect(),
        });
        Ok((fates.collect(), loss))
    }
}

impl Joint {
    /// Sensitivities, each the mean where nothing was found at the model's end, to the power of `trust`.
    fn weights(&self, layers: &[LayerOffers]) -> Vec<[f64; 3]> {
        let raised = |s: f64| if s > 0.0 { s.powf(self.trust) } else { 0.0 };
        layers.iter().map(|layer| layer.sensitivity.map(raised)).collect()
    }
}

/// Matrices in order of layer, expert, kind.
fn items(layers: &[LayerOffers]) -> Vec<Item<'_>> {
    let mut items: Vec<Item<'_>> = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        for offer in &layer.offers {
            let (expert, kind) = (offer.expert, offer.kind);
            match items.last_mut() {
                Some(last) if (last.layer, last.expert, last.kind) == (index, expert, kind) => last.offers.push(offer),
                _ => items.push(Item {
                    layer: index,
                    expert,
                    kind,
                    offers: vec![offer],
                }),
            }
        }
    }
    items
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

/// Bytes of the smallest and of the largest choice.
pub(crate) fn range_bytes(layers: &[LayerOffers]) -> (u64, u64) {
    let items = items(layers);
    let bytes = |item: &Item<'_>| {
        let bytes = item.offers.iter().map(|offer| offer.bytes);
        (bytes.clone().min().unwrap_or(0), bytes.max().unwrap_or(0))
    };
    let sum = |(least, most), (l, m)| (least + l, most + m);
    items.iter().map(bytes).fold((0, 0), sum)
}
