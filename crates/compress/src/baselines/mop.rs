//! Mixture of Precisions ("Mixture of Experts with Mixture of Precisions for Tuning Quality of Service", 2024): n experts
//! of the model at one width, the rest at the next wider one, which is at random. Law: one expert more at the wider width
//! would not fit.

use cotk_run::seeds::Seeds;
use rand::RngExt;

use super::{Chosen, Offered, PUBLISHED_GROUP, Whole, bytes, too_small, widths};
use crate::choice::{Chooser, LayerOffers, Limits};

/// Widths that the mix knows: each twice the one before.
const LADDER: [u32; 4] = [1, 2, 4, 8];

/// Two neighbouring widths of the ladder, drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MixtureOfPrecisions {
    /// Weights per f16 scale.
    pub group: usize,
}

impl Default for MixtureOfPrecisions {
    fn default() -> Self {
        Self { group: PUBLISHED_GROUP }
    }
}

impl Chooser for MixtureOfPrecisions {
    fn name(&self) -> String {
        "mop".to_owned()
    }

    fn choose(&self, layers: &[LayerOffers], limits: &Limits, seed: u64) -> Chosen {
        let layers = Offered::all(layers);
        let mut ladder = widths(&layers, self.group);
        ladder.retain(|(bits, _)| LADDER.contains(&bits.get()));
        let at = |rung: usize| -> Vec<Vec<Whole>> {
            let form = ladder[rung].1;
            layers.iter().filter_map(|layer| layer.all_in(form)).collect()
        };
        let limit = limits.record_bytes.unwrap_or(u64::MAX);
        let totals: Vec<u64> = (0..ladder.len()).map(|rung| bytes(at(rung).iter().flatten())).collect();
        let Some(low) = totals.iter().rposition(|&total| total <= limit) else {
            return Err(too_small(limits.record_bytes, totals.first().copied()));
        };
        let high = (low + 1).min(ladder.len() - 1);
        let (narrow, wide) = (at(low), at(high));
        let mut order: Vec<(usize, usize)> = (0..layers.len())
            .flat_map(|layer| (0..narrow[layer].len()).map(move |expert| (layer, expert)))
            .collect();
        let mut stream = Seeds::new(seed).stream("mixture-of-precisions");
        for last in (1..order.len()).rev() {
            order.swap(last, stream.random_range(0..=last));
        }
        let mut is_wide: Vec<Vec<bool>> = narrow.iter().map(|experts| vec![false; experts.len()]).collect();
        let mut taken = totals[low];
        for (layer, expert) in order {
            let more = wide[layer][expert].bytes - narrow[layer][expert].bytes;
            if taken.saturating_add(more) > limit {
                break;
            }
            taken += more;
            is_wide[layer][expert] = true;
        }
        let mut expected = 0.0;
        let fates = layers
            .iter()
            .zip(&is_wide)
            .enumerate()
            .map(|(layer, (offered, is_wide))| {
                let mix = |expert: usize| if is_wide[expert] { &wide } else { &narrow }[layer][expert].loss;
                expected += (0..is_wide.len()).map(mix).sum::<f64>();
                offered.fates(
                    is_wide
                        .iter()
                        .map(|&is_wide| ladder[if is_wide { high } else { low }].1),
                )
            })
            .collect();
        Ok((fates, expected))
    }
}
