//! MC-MoE's pre-loading mixed precision (PMQ; Huang et al., ICLR 2025): per layer, three neighbouring widths are given to
//! experts so that Σ φ^α · w^β · ε is least under a fixed sum of bits, at least one expert at the widest and one at the
//! middle width; φ an expert's share of selections, w its share of gate mass, ε the Frobenius norm of what quantizing it
//! alone changes in the layer's output. Law: no other assignment of a layer that meets the same constraints costs less.

use cotk_quant::code::Bits;

use super::{Chosen, Offered, PUBLISHED_GROUP, Whole, loss, too_small, widths};
use crate::choice::{Chooser, Form, LayerFates, LayerOffers, Limits};

/// The integer program of each layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mc {
    /// Exponent of the share of selections.
    pub alpha: f64,
    /// Exponent of the share of gate mass.
    pub beta: f64,
    /// Weights per f16 scale.
    pub group: usize,
}

impl Mc {
    /// α 1, β 1.5, groups of 128: the authors' code.
    pub const PUBLISHED: Self = Self {
        alpha: 1.0,
        beta: 1.5,
        group: PUBLISHED_GROUP,
    };

    /// What the program minimises, for one expert: `[width]`.
    fn costs(&self, layer: &Offered<'_>, expert: cotk_run::units::ExpertId, wholes: &[Whole]) -> Vec<f64> {
        let usage = &layer.layer.usage;
        let weight = usage.share(expert).powf(self.alpha) * usage.gate_share(expert).powf(self.beta);
        // Offers state squares.
        wholes
            .iter()
            .map(|whole| weight * whole.error.max(0.0).sqrt())
            .collect()
    }
}

impl Chooser for Mc {
    fn name(&self) -> String {
        "mc".to_owned()
    }

    fn choose(&self, layers: &[LayerOffers], limits: &Limits, _: u64) -> Chosen {
        let layers = Offered::all(layers);
        let all = widths(&layers, self.group);
        let bytes_at = |form: Form| -> u64 {
            let wholes = layers.iter().filter_map(|layer| layer.all_in(form)).flatten();
            wholes.map(|whole| whole.bytes).sum()
        };
        let totals: Vec<u64> = all.iter().map(|(_, form)| bytes_at(*form)).collect();
        let limit = limits.record_bytes.unwrap_or(u64::MAX);
        // The middle of the three is the widest that fits for all.
        let Some(middle) = totals.iter().rposition(|&total| total <= limit) else {
            return Err(too_small(limits.record_bytes, totals.first().copied()));
        };
        let three = &all[middle.saturating_sub(1)..(middle + 2).min(all.len())];
        let middle = middle.min(1);
        let mut chosen: Vec<LayerFates> = Vec::with_capacity(layers.len());
        let mut expected = 0.0;
        for layer in &layers {
            // Every layer has the same share: its part of what all experts at one width take.
            let by_width: Vec<Vec<Whole>> = three.iter().filter_map(|(_, form)| layer.all_in(*form)).collect();
            let bits = bits_within(limit, &totals, &all, three, layer.experts().count());
            let costs: Vec<Vec<f64>> = layer
                .experts()
                .map(|expert| {
                    let of_expert: Vec<Whole> = by_width.iter().map(|wholes| wholes[expert.index()]).collect();
                    self.costs(layer, expert, &of_expert)
                })
                .collect();
            let widths: Vec<usize> = three.iter().map(|(bits, _)| bits.get() as usize).collect();
            let picked = assign(&costs, &widths, bits, middle);
            expected += loss(
                picked
                    .iter()
                    .enumerate()
                    .map(|(expert, &width)| &by_width[width][expert]),
            );
            chosen.push(layer.fates(picked.iter().map(|&width| three[width].1)));
        }
        Ok((chosen, expected))
    }
}

/// The largest sum of bits of one layer's experts that the budget leaves: bytes grow evenly with bits, scales alike at
/// every width.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "byte counts are far below 2^52, the result is a small count"
)]
fn bits_within(limit: u64, totals: &[u64], all: &[(Bits, Form)], three: &[(Bits, Form)], experts: usize) -> usize {
    let total = |bits: Bits| {
        let at = all.iter().position(|(other, _)| *other == bits);
        totals[at.expect("one of all")] as f64
    };
    let (narrow, wide) = (three[0].0, three[three.len() - 1].0);
    let most = wide.get() as usize * experts;
    let spread = total(wide) - total(narrow);
    if spread <= 0.0 || limit as f64 >= total(wide) {
        return most;
    }
    let mean = f64::from(narrow.get()) + (limit as f64 - total(narrow)) / spread * f64::from(wide.get() - narrow.get());
    ((mean * experts as f64 + 1e-9).floor() as usize).min(most)
}

/// The cheapest width of each expert, `costs[expert][width]`, with Σ `widths` ≤ `bits`; where it can be met, at least one
/// expert has the last width and one the `middle`. Exact: a table over sums of bits.
pub(super) fn assign(costs: &[Vec<f64>], widths: &[usize], bits: usize, middle: usize) -> Vec<usize> {
    let top = widths.len() - 1;
    for is_strict in [true, false] {
        let needs = if is_strict { 3 } else { 0 };
        // By which of the two demands are met, and the sum so far: the least cost, and by which width it came.
        let mut table = vec![vec![f64::INFINITY; bits + 1]; 4];
        table[0][0] = 0.0;
        let mut came: Vec<Vec<Vec<(u8, u8)>>> = Vec::with_capacity(costs.len());
        for of_expert in costs {
            let mut next = vec![vec![f64::INFINITY; bits + 1]; 4];
            let mut from = vec![vec![(0, 0); bits + 1]; 4];
            for state in 0..4u8 {
                for (sum, &so_far) in table[usize::from(state)].iter().enumerate() {
                    if so_far == f64::INFINITY {
                        continue;
                    }
                    for (width, &taken) in widths.iter().enumerate() {
                        let met = state | u8::from(width == top) | (u8::from(width == middle) << 1);
                        let at = sum + taken;
                        if at <= bits && so_far + of_expert[width] < next[usize::from(met)][at] {
                            next[usize::from(met)][at] = so_far + of_expert[width];
                            from[usize::from(met)][at] = (u8::try_from(width).expect("three widths"), state);
                        }
                    }
                }
            }
            table = next;
            came.push(from);
        }
        let ends = (needs..4).flat_map(|state| (0..=bits).map(move |sum| (state, sum)));
        // Of equal costs the most bits: an expert that nothing came to costs nothing at any width.
        let best = ends
            .filter(|&(state, sum)| table[state][sum] < f64::INFINITY)
            .min_by(|&(a, x), &(b, y)| table[a][x].total_cmp(&table[b][y]).then(y.cmp(&x)));
        let Some((mut state, mut sum)) = best else { continue };
        let mut picked = vec![0; costs.len()];
        for (expert, from) in came.iter().enumerate().rev() {
            let (width, before) = from[state][sum];
            picked[expert] = usize::from(width);
            sum -= widths[usize::from(width)];
            state = usize::from(before);
        }
        return picked;
    }
    // Fewer bits than the narrowest width for all: the caller has seen to it that this does not happen.
    vec![0; costs.len()]
}
