//! Smaller experts on their way into a container: the plan of the whole model first, then each layer on the compressed
//! model's own stream. Law: what is coded has the plan's inner sizes.

use cotk_container::decision::{Channels, Decision, HealStep, Healed};
use cotk_model::layers::{Layer, Mlp};
use cotk_run::units::LayerId;
use cotk_runtime::store::alive;

use super::apply::SlimLayer;
use super::plan::Way;
use super::slim::Slim;
use crate::Result;
use crate::decide::Measured;
use crate::heal::{HealOptions, Step};
use crate::partial::Partial;
use crate::pipeline::Job;
use crate::prune::mask::Mask;
use crate::prune::plan::{Pruned, PrunedLayer};
use crate::prune::ratios::Spread;
use crate::prune::search::Method;
use crate::states::Stream;

/// What is to become smaller, and on what.
pub(crate) struct Smaller {
    /// The teacher's calibration stream before every layer.
    whole: Stream,
    /// Of each MoE layer.
    layers: Vec<(LayerId, Vec<Slim>)>,
    healing: Option<HealOptions>,
}

/// One layer's experts, smaller, in original numbering.
pub(crate) struct SmallerLayer {
    /// `None`: dropped.
    pub(crate) experts: Vec<Option<Mlp>>,
    /// Of each: what to say of it.
    pub(crate) decisions: Vec<Decision>,
    pub(crate) healed: Vec<Healed>,
    /// Rows of the router, where they were fitted anew.
    pub(crate) router: Option<Vec<f32>>,
}

impl Job<'_> {
    /// What `[compress.shrink]` makes of the model; `None` without it.
    pub(crate) fn smaller(
        &self,
        partial: &mut Partial,
        measured: &[Measured],
        pruned: Option<&Pruned>,
    ) -> Result<Option<Smaller>> {
        let Some(shrink) = &self.request.recipe.compress.shrink else {
            return Ok(None);
        };
        let experts = self.source.files.spec.routing.experts;
        let everybody = Pruned {
            method: Method::Swap,
            semantics: self.request.recipe.compress.semantics(),
            spread: Spread::Equal,
            layers: (measured.iter())
                .map(|measured| PrunedLayer {
                    layer: measured.layer,
                    mask: Mask::none(experts),
                    chosen_loss: 0.0,
                    loss: 0.0,
                    tried: 0,
                    kl_per_loss: None,
                })
                .collect(),
            field_runs: 0,
        };
        let pruned = pruned.unwrap_or(&everybody);
        let whole = self.whole_stream(partial, &self.calibration_windows())?;
        let spread = Spread::from(shrink.spread);
        let surveys = if spread == Spread::Equal {
            Vec::new()
        } else {
            self.shrink_surveys(partial, measured, &whole)?
        };
        let how = (Way::Channels, spread, shrink.multiple.get());
        let much = (shrink.ratio.get(), shrink.end_tokens.get());
        let plan = self.shrink_plan(partial, measured, &surveys, &whole, how, pruned, much)?;
        Ok(Some(Smaller {
            whole,
            layers: measured.iter().map(|measured| measured.layer).zip(plan).collect(),
            healing: shrink.heal.then(|| HealOptions {
                router: shrink.heal_router,
                ..HealOptions::default()
            }),
        }))
    }

    /// A layer's experts made smaller on the compressed model's stream.
    pub(crate) fn smaller_layer(
        &self,
        smaller: &Smaller,
        layer: &Layer,
        index: usize,
        stream: &Stream,
    ) -> Result<SmallerLayer> {
        let (_, how) = (smaller.layers.iter().find(|(id, _)| *id == layer.id())).expect("every MoE layer has a plan");
        let living: Vec<bool> = how.iter().map(|slim| *slim != Slim::Channels(0)).collect();
        let chosen_from = alive(self.request.recipe.compress.dropped, &living);
        let experts = self.experts(layer)?;
        let tokens = self.layer_tokens(layer, stream, &smaller.whole, index, chosen_from)?;
        let mut slim = SlimLayer::build(&experts, how, &tokens)?;
        if let Some(options) = &smaller.healing {
            slim.heal(&tokens, options)?;
            slim.recalibrate(self, layer, (&tokens, chosen_from), options)?;
        }
        let inner = self.source.files.spec.moe_intermediate;
        let decision = |slim: &Slim| Decision {
            chosen_by: Some("channels by OBS".to_owned()),
            channels: matches!(slim, Slim::Channels(kept) if *kept > 0).then_some(Channels { of: inner, error: None }),
            ..Decision::default()
        };
        Ok(SmallerLayer {
            decisions: how.iter().map(decision).collect(),
            healed: slim.steps.iter().map(told).collect(),
            router: slim.router,
            experts: (slim.experts.into_iter())
                .map(|slimmed| slimmed.map(|slimmed| slimmed.mlp))
                .collect(),
        })
    }
}

/// As a container tells it.
pub(crate) fn told(step: &Step) -> Healed {
    Healed {
        step: match step.name.as_str() {
            "scales" => HealStep::Scale,
            "constants" => HealStep::Novice,
            "router" => HealStep::Router,
            _ => HealStep::Ridge,
        },
        before: step.held_out_before,
        after: step.held_out_after,
        kept: step.is_kept,
    }
}
