//! One form for every matrix of every expert. Law: nothing else that is offered to all, and fits, loses less.

use cotk_quant::layout::ScaleForm;

use super::{Chosen, Offered, bytes, loss, too_small};
use crate::choice::{Chooser, Form, LayerOffers, Limits};

/// The one form that fits and loses least.
#[derive(Debug, Clone, PartialEq)]
pub struct Uniform {
    name: String,
    rule: Rule,
}

#[derive(Debug, Clone, PartialEq)]
enum Rule {
    /// Of all forms on offer, by their summed measured loss.
    LeastLoss,
    /// Of the forms with one f16 a group, the widest code, then the smallest group: nothing is measured.
    Finest,
    /// The widest code with these scales.
    Scales { group: usize, scales: ScaleForm },
}

impl Uniform {
    /// The strongest that is on offer: scale form and group by the loss that was measured on held-out tokens.
    pub fn strongest(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            rule: Rule::LeastLoss,
        }
    }

    /// The finest with plain scales that fits, without a look at any measurement.
    pub fn finest(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            rule: Rule::Finest,
        }
    }

    /// The widest plain code that fits with these scales.
    pub fn of(name: impl Into<String>, group: usize, scales: ScaleForm) -> Self {
        Self {
            name: name.into(),
            rule: Rule::Scales { group, scales },
        }
    }
}

impl Chooser for Uniform {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn choose(&self, layers: &[LayerOffers], limits: &Limits, _: u64) -> Chosen {
        let layers = Offered::all(layers);
        let mut least: Option<u64> = None;
        let mut best: Option<(f64, Form)> = None;
        let forms = layers.first().map(Offered::forms).unwrap_or_default();
        for form in forms {
            let is_asked = match &self.rule {
                Rule::LeastLoss => true,
                Rule::Finest => form.scales == ScaleForm::F16 && form.code.planes() == 1,
                Rule::Scales { group, scales } => {
                    (form.group, form.scales) == (*group, *scales) && form.code.planes() == 1
                }
            };
            let wholes: Option<Vec<_>> = layers.iter().map(|layer| layer.all_in(form)).collect();
            let (true, Some(wholes)) = (is_asked, wholes) else {
                continue;
            };
            let taken = bytes(wholes.iter().flatten());
            least = Some(least.map_or(taken, |least| least.min(taken)));
            if limits.record_bytes.is_some_and(|limit| taken > limit) {
                continue;
            }
            let order = match self.rule {
                Rule::LeastLoss => loss(wholes.iter().flatten()),
                Rule::Finest | Rule::Scales { .. } => coarseness(form),
            };
            if best.is_none_or(|(least, _)| order < least) {
                best = Some((order, form));
            }
        }
        let (_, form) = best.ok_or_else(|| too_small(limits.record_bytes, least))?;
        let wholes = layers.iter().filter_map(|layer| layer.all_in(form)).flatten();
        let expected = loss(&wholes.collect::<Vec<_>>());
        let fates = |layer: &Offered<'_>| layer.fates(layer.experts().map(|_| form));
        Ok((layers.iter().map(fates).collect(), expected))
    }
}

/// Falls with the width first, then with finer groups.
#[expect(clippy::cast_precision_loss, reason = "a group is at most 2^24")]
fn coarseness(form: Form) -> f64 {
    form.group as f64 / (1u64 << 30) as f64 - f64::from(form.code.full().get())
}
