//! What the joint allocation is compared with: published ways to give experts their bits, as choosers over the same
//! offers. [`Uniform`]: one form for all. [`Mc`]: MC-MoE's integer program. [`MixtureOfPrecisions`]: a random mix of two
//! widths. Laws: a budget is met or refused with the least that can be reached; the same offers and seed, the same fates.

mod mc;
mod mop;
mod uniform;

#[cfg(test)]
mod laws;

pub use self::mc::Mc;
pub use self::mop::MixtureOfPrecisions;
pub use self::uniform::Uniform;

use std::collections::{BTreeSet, HashMap};

use cotk_quant::code::{Bits, Code};
use cotk_run::units::ExpertId;

use crate::choice::{Fate, Form, Kind, LayerFates, LayerOffers};
use crate::{CompressError, Result};

/// The group that both published mixes of widths use.
pub const PUBLISHED_GROUP: usize = 128;

/// What a whole expert in one form loses and takes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Whole {
    /// Σ over its matrices, before the layer's sensitivity.
    pub(crate) error: f64,
    /// The same, each times the layer's sensitivity to its kind.
    pub(crate) loss: f64,
    pub(crate) bytes: u64,
}

/// Loss and bytes of gate, up and down.
type ByKind = [Option<(f64, u64)>; 3];

/// One layer's offers by expert and form; those with corrections are left out.
pub(crate) struct Offered<'a> {
    pub(crate) layer: &'a LayerOffers,
    by_kind: HashMap<(ExpertId, Form), ByKind>,
}

impl<'a> Offered<'a> {
    pub(crate) fn new(layer: &'a LayerOffers) -> Self {
        let mut by_kind: HashMap<_, ByKind> = HashMap::new();
        for offer in layer.offers.iter().filter(|offer| offer.choice.rank == 0) {
            let slot = by_kind.entry((offer.expert, offer.choice.form)).or_default();
            slot[offer.kind as usize] = Some((offer.error, offer.bytes));
        }
        Self { layer, by_kind }
    }

    pub(crate) fn all(layers: &'a [LayerOffers]) -> Vec<Self> {
        layers.iter().map(Self::new).collect()
    }

    pub(crate) fn experts(&self) -> impl Iterator<Item = ExpertId> + use<> {
        (0..).map(ExpertId).take(self.layer.usage.experts.len())
    }

    /// Forms that anything is offered in.
    pub(crate) fn forms(&self) -> BTreeSet<Form> {
        self.by_kind.keys().map(|(_, form)| *form).collect()
    }

    /// `None` unless all three matrices are offered in this form.
    pub(crate) fn whole(&self, expert: ExpertId, form: Form) -> Option<Whole> {
        let matrices = self.by_kind.get(&(expert, form))?;
        let mut whole = Whole::default();
        for kind in Kind::ALL {
            let (error, bytes) = matrices[kind as usize]?;
            whole.error += error;
            whole.loss += error * self.layer.sensitivity[kind as usize];
            whole.bytes += bytes;
        }
        Some(whole)
    }

    /// All experts in this form; `None` unless each is offered in it.
    pub(crate) fn all_in(&self, form: Form) -> Option<Vec<Whole>> {
        self.experts().map(|expert| self.whole(expert, form)).collect()
    }

    /// One fate per expert.
    pub(crate) fn fates(&self, forms: impl IntoIterator<Item = Form>) -> LayerFates {
        LayerFates {
            layer: self.layer.layer,
            experts: forms.into_iter().map(Fate::uniform).collect(),
        }
    }
}

/// Forms of one group and every plain width that all experts of all layers are offered in, narrow to wide.
fn widths(layers: &[Offered<'_>], group: usize) -> Vec<(Bits, Form)> {
    let form = |bits| (bits, Form::plain(Code::Plain(bits), group));
    let is_offered = |(_, form): &(Bits, Form)| layers.iter().all(|layer| layer.all_in(*form).is_some());
    Bits::ALL.into_iter().map(form).filter(is_offered).collect()
}

/// Nothing that is offered fits.
fn too_small(budget: Option<u64>, least: Option<u64>) -> CompressError {
    CompressError::Budget {
        budget: budget.unwrap_or(0),
        least: least.unwrap_or(u64::MAX),
    }
}

/// Σ bytes.
fn bytes<'w>(wholes: impl IntoIterator<Item = &'w Whole>) -> u64 {
    wholes.into_iter().map(|whole| whole.bytes).sum()
}

/// A sum of chosen wholes: fates' expected loss.
fn loss<'w>(wholes: impl IntoIterator<Item = &'w Whole>) -> f64 {
    wholes.into_iter().map(|whole| whole.loss).sum()
}

/// What a chooser returns.
type Chosen = Result<(Vec<LayerFates>, f64)>;
