//! Why each matrix is stored as it is, for the manifest: what it was measured to lose, what its neighbours on the menu would
//! have, and how much its Hessian leaned on others. Law: nothing is told that was not measured.

use cotk_container::decision::{Alternative, Channels, Decision, MatrixDecision};
use cotk_run::units::{ExpertId, LayerId};

use super::code::HessianNote;
use crate::choice::{Fate, Instead, Kind, Offer};
use crate::partial::Partial;
use crate::pipeline::Job;
use crate::report::ENOUGH_TOKENS;

impl Job<'_> {
    /// What the first pass found of one expert, beside the fate that was chosen.
    pub(crate) fn decision(
        &self,
        partial: &Partial,
        (layer, expert): (LayerId, ExpertId),
        fate: &Fate,
        note: Option<&HessianNote>,
    ) -> Decision {
        let measured = partial.measured();
        let index = measured
            .iter()
            .filter_map(|m| m.offered.as_deref())
            .position(|offered| offered.offers.layer == layer);
        let offered = index.and_then(|index| measured.iter().filter_map(|m| m.offered.as_deref()).nth(index));
        let weighed = offered
            .zip(self.request.recipe.compress.joint.as_ref())
            .map(|(offered, joint)| offered.weighed(joint.traffic_prior.get(), joint.traffic_spread.get()));
        let own = || {
            let all = weighed.iter().flat_map(|offers| &offers.variants);
            all.filter(|variant| variant.expert == expert)
        };
        let gone = own().find(|variant| !matches!(variant.instead, Instead::Channels(_)));
        let gone = gone.map(|variant| variant.error);
        let cut = match fate {
            Fate::Coded { channels, .. } => channels.as_ref(),
            Fate::Constant | Fate::Dropped => None,
        };
        let inner = cut.map_or(self.source.files.spec.moe_intermediate, Vec::len);
        let cut = cut.and_then(|cut| own().find(|v| matches!(&v.instead, Instead::Channels(stay) if stay == cut)));
        let kl = index.and_then(|index| partial.kind_sensitivity()?.kl_nats.get(index).copied());
        let chosen = weighed.as_ref().zip(offered).zip(as_coded(fate));
        let matrices = chosen.and_then(|((offers, offered), chosen)| {
            let all = cut.map_or(&offers.offers, |cut| &cut.offers);
            let of = |kind: Kind| -> Option<MatrixDecision> {
                let menu: Vec<&Offer> = all
                    .iter()
                    .filter(|offer| (offer.expert, offer.kind) == (expert, kind))
                    .collect();
                let at = menu.iter().position(|offer| offer.choice == chosen[kind as usize])?;
                let probed = offered.probed[kind as usize];
                let bytes = menu[at].bytes;
                let narrower = menu[..at].iter().rev().find(|offer| offer.bytes < bytes);
                let wider = menu[at + 1..].iter().find(|offer| offer.bytes > bytes);
                Some(MatrixDecision {
                    error: menu[at].error,
                    sensitivity: kl
                        .filter(|_| probed > 0.0)
                        .map(|kl| kl[kind as usize].max(0.0) / probed),
                    lambda: note.map(|note| note.lambda[usize::from(kind == Kind::Down)]),
                    narrower: narrower.and_then(|offer| self.alternative(offer, inner)),
                    wider: wider.and_then(|offer| self.alternative(offer, inner)),
                })
            };
            Some([of(Kind::Gate)?, of(Kind::Up)?, of(Kind::Down)?])
        });
        let tokens = note.map_or(0, |note| note.tokens);
        Decision {
            chosen_by: offered.map(|_| "joint".to_owned()),
            starved: (note.is_some() && tokens < ENOUGH_TOKENS).then(|| ENOUGH_TOKENS - tokens),
            dropped_alone: gone,
            channels: cut.map(|cut| Channels {
                of: self.source.files.spec.moe_intermediate,
                error: Some(cut.error),
            }),
            matrices,
            ..Decision::default()
        }
    }

    fn alternative(&self, offer: &Offer, inner: usize) -> Option<Alternative> {
        let spec = &self.source.files.spec;
        let (rows, cols) = offer.kind.shape(spec.hidden, inner);
        Some(Alternative {
            format: offer.choice.form.format(rows, cols).ok()?,
            rank: offer.choice.rank,
            bytes: offer.bytes,
            error: offer.error,
        })
    }
}

fn as_coded(fate: &Fate) -> Option<[crate::choice::MatrixChoice; 3]> {
    match fate {
        Fate::Coded { matrices, .. } => Some(*matrices),
        Fate::Constant | Fate::Dropped => None,
    }
}
