//! From surveys to one mask per layer: counts under the total, searches at these counts, reception fields. Law: what is
//! chosen on one half of the tokens is reported on the other, with the gap.

use cotk_container::manifest::Checksum;
use cotk_run::files;
use cotk_run::seeds::Seeds;
use cotk_run::units::{ExpertId, LayerId};
use serde::{Deserialize, Serialize};

use super::experts::Dropped;
use super::gram::{Measure, Semantics};
use super::mask::Mask;
use super::probe::PROBE_SHARES;
use super::ratios::{self, Spread};
use super::recipe::Prune;
use super::search::{self, Found, Known, Method};
use super::survey::{ExpertScores, Survey};
use crate::decide::Measured;
use crate::partial::{Entry, Partial};
use crate::pipeline::Job;
use crate::shrink::plan::Curve;
use crate::{CompressError, Result};

/// What the first pass keeps of a layer's survey in the journal; samples and constants lie in a file beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Surveyed {
    /// In original numbering.
    pub scores: Vec<ExpertScores>,
    /// Greedy order on the half that chooses, with losses on both halves.
    pub path: Vec<Step>,
    /// Σ over experts of the Frobenius norm of what the layer loses without that one (MoE-I²'s layer importance).
    pub importance: f64,
    /// Tokens of the half that chooses, of the half that reports.
    pub sampled: [usize; 2],
    /// Of the file with the samples.
    pub file: Checksum,
}

/// One more expert goes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub expert: ExpertId,
    /// Relative loss with all up to this one gone, on the half that chose the order.
    pub chosen_loss: f64,
    /// On the other half.
    pub loss: f64,
}

/// What each layer's loss costs at the end of the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// Experts that the probes of each MoE layer dropped, ascending.
    pub dropped: Vec<usize>,
    pub semantics: Semantics,
    /// KL of the whole model, nats, with that layer alone pruned, by layer and probe.
    pub kl_nats: Vec<Vec<f64>>,
}

/// One mask per MoE layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pruned {
    pub method: Method,
    pub semantics: Semantics,
    pub spread: Spread,
    pub layers: Vec<PrunedLayer>,
    /// Layer runs of the reception fields; 0 without.
    pub field_runs: usize,
}

/// What is dropped of one layer, and why so much.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PrunedLayer {
    pub layer: LayerId,
    pub mask: Mask,
    /// Relative loss of the layer's output on the half of the tokens that chose the mask.
    pub chosen_loss: f64,
    /// On the other half: what it is.
    pub loss: f64,
    /// Masks that were tried.
    pub tried: usize,
    /// KL at the end of the model per unit of this layer's loss, where it was measured.
    pub kl_per_loss: Option<f64>,
}

/// What to choose: of a recipe, or of one row of a comparison.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Wish {
    pub(crate) method: Method,
    pub(crate) spread: Spread,
    pub(crate) semantics: Semantics,
    pub(crate) ratio: f64,
    pub(crate) field_masks: usize,
    pub(crate) field_layers: usize,
    pub(crate) end_tokens: usize,
    pub(crate) seed: u64,
}

impl Wish {
    pub(crate) fn of(prune: &Prune, semantics: Semantics, seed: u64) -> Self {
        Self {
            method: prune.method,
            spread: prune.spread,
            semantics,
            ratio: prune.ratio.get(),
            field_masks: prune.field_masks.get(),
            field_layers: prune.field_layers.get(),
            end_tokens: prune.end_tokens.get(),
            seed,
        }
    }
}

/// Most experts of a layer that may go: a token's choice stays, and under unequal ratios one more.
pub(crate) fn most(experts: usize, top_k: usize, spread: Spread) -> usize {
    match spread {
        Spread::Equal | Spread::Paper => experts.saturating_sub(top_k),
        Spread::Unequal => experts.saturating_sub(top_k + 1),
    }
}

/// How many of all experts go.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "expert counts are small, the ratio is below 1"
)]
pub(crate) fn total(ratio: f64, layers: usize, experts: usize, top_k: usize, spread: Spread) -> usize {
    let most = most(experts, top_k, spread);
    match spread {
        Spread::Equal => layers * ((experts as f64 * ratio).round() as usize).min(most),
        // The same total as equal counts: figures of both can stand side by side.
        Spread::Unequal | Spread::Paper => (layers * (experts as f64 * ratio).round() as usize).min(layers * most),
    }
}

impl Job<'_> {
    /// Where a layer's samples lie.
    fn survey_path(partial: &Partial, layer: LayerId) -> std::path::PathBuf {
        partial.states().join(format!("survey-{}.bin", layer.0))
    }

    /// Writes the samples and works out what the journal keeps of them.
    pub(crate) fn keep_survey(
        &self,
        partial: &Partial,
        layer: LayerId,
        survey: &Survey,
        semantics: Semantics,
    ) -> Result<Surveyed> {
        let bytes = survey.to_bytes();
        files::write_atomic(Self::survey_path(partial, layer), &bytes)?;
        let experts = survey.scores.len();
        let known = Known {
            scores: &survey.scores,
            gram: &survey.choose,
            semantics,
        };
        let top_k = self.source.files.spec.routing.top_k;
        let order = search::path(&known, experts.saturating_sub(top_k));
        let masks: Vec<Mask> = (1..=order.len())
            .map(|count| Mask::of(experts, order[..count].iter().map(|(expert, _)| *expert)))
            .collect();
        let losses = survey.report.losses(&masks, semantics, Measure::Weighted);
        let step = |((expert, chosen_loss), loss): ((usize, f64), f64)| Step {
            expert: ExpertId(u32::try_from(expert).expect("expert counts fit 32 bits")),
            chosen_loss,
            loss,
        };
        let alone: Vec<Mask> = (0..experts).map(|expert| Mask::of(experts, [expert])).collect();
        Ok(Surveyed {
            scores: survey.scores.clone(),
            path: order.into_iter().zip(losses).map(step).collect(),
            importance: survey.choose.losses(&alone, semantics, Measure::Frobenius).iter().sum(),
            sampled: [survey.choose.tokens(), survey.report.tokens()],
            file: Checksum(files::checksum(&bytes)),
        })
    }

    /// Whether a layer's samples lie as the journal says.
    pub(crate) fn survey_is_whole(partial: &Partial, layer: LayerId, surveyed: &Surveyed) -> bool {
        files::checksum_file(&Self::survey_path(partial, layer)).is_ok_and(|found| Checksum(found) == surveyed.file)
    }

    pub(crate) fn read_survey(&self, partial: &Partial, layer: LayerId, surveyed: &Surveyed) -> Result<Survey> {
        let path = Self::survey_path(partial, layer);
        let bytes = files::read(&path, 1 << 40)?;
        let spec = &self.source.files.spec;
        let survey = (Checksum(files::checksum(&bytes)) == surveyed.file).then(|| {
            Survey::from_bytes(
                surveyed.scores.clone(),
                spec.routing,
                spec.router_bias,
                spec.hidden,
                &bytes,
            )
        });
        survey.flatten().ok_or(CompressError::Survey { file: path })
    }

    /// One mask per MoE layer.
    pub(crate) fn prune(&self, partial: &mut Partial, measured: &[Measured], wish: &Wish) -> Result<Pruned> {
        let rule = self.source.files.spec.routing;
        let surveyed: Vec<(LayerId, &Surveyed)> = measured
            .iter()
            .map(|m| {
                (
                    m.layer,
                    m.prune.as_ref().expect("the first pass surveys what is to be pruned"),
                )
            })
            .collect();
        let most = most(rule.experts, rule.top_k, wish.spread);
        let total = total(wish.ratio, surveyed.len(), rule.experts, rule.top_k, wish.spread);
        let mut kl_per_loss = vec![None; surveyed.len()];
        let counts = match wish.spread {
            Spread::Equal => vec![total / surveyed.len().max(1); surveyed.len()],
            Spread::Paper => {
                let importances: Vec<f64> = surveyed.iter().map(|(_, s)| s.importance).collect();
                ratios::paper(&importances, total, most)
            }
            Spread::Unequal if total == 0 => vec![0; surveyed.len()],
            Spread::Unequal => {
                let sensitivity = self.sensitivity(partial, &surveyed, wish)?;
                let costs: Vec<Vec<f64>> = surveyed
                    .iter()
                    .zip(&sensitivity.kl_nats)
                    .zip(&mut kl_per_loss)
                    .map(|(((_, surveyed), kl), per_loss)| {
                        let probed = (sensitivity.dropped.iter()).map(|count| surveyed.path[count - 1].loss);
                        let curve = Curve::new(probed.zip(kl.iter().copied()).collect());
                        *per_loss = Some(curve.points.last().map_or(0.0, |(loss, kl)| kl / loss));
                        let costs = surveyed.path[..most].iter().map(|step| curve.kl(step.loss));
                        std::iter::once(0.0).chain(costs).collect()
                    })
                    .collect();
                ratios::cheapest(&costs, total)
            }
        };
        self.with
            .progress
            .begin("choosing experts", surveyed.len() as u64, "layers");
        let mut found = Vec::with_capacity(surveyed.len());
        for ((layer, surveyed), &count) in surveyed.iter().zip(&counts) {
            self.with.cancel.check()?;
            let survey = self.read_survey(partial, *layer, surveyed)?;
            found.push(self.search(&survey, *layer, count, wish)?);
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        let (chosen, field_runs) = if wish.field_masks > 1 {
            self.fields(partial, &surveyed, &found, wish)?
        } else {
            (vec![0; found.len()], 0)
        };
        let mut layers = Vec::with_capacity(found.len());
        for (((&(layer, surveyed), found), at), kl_per_loss) in surveyed.iter().zip(found).zip(chosen).zip(kl_per_loss)
        {
            let survey = self.read_survey(partial, layer, surveyed)?;
            let mask = found.masks[at].0.clone();
            layers.push(PrunedLayer {
                layer,
                chosen_loss: survey.choose.loss(&mask, wish.semantics),
                loss: survey.report.loss(&mask, wish.semantics),
                tried: found.tried,
                kl_per_loss,
                mask,
            });
        }
        Ok(Pruned {
            method: wish.method,
            semantics: wish.semantics,
            spread: wish.spread,
            layers,
            field_runs,
        })
    }

    fn search(&self, survey: &Survey, layer: LayerId, count: usize, wish: &Wish) -> Result<Found> {
        let known = Known {
            scores: &survey.scores,
            gram: &survey.choose,
            semantics: wish.semantics,
        };
        let purpose = format!("prune {} {layer}", wish.method.name());
        let mut stream = Seeds::new(wish.seed).stream(&purpose);
        let found = search::search(&known, wish.method, count, wish.field_masks, &mut stream);
        found.map_err(|too_many| CompressError::TooManyMasks { layer, too_many })
    }

    /// KL at the end of the model with one layer pruned at a time, at several counts.
    fn sensitivity(
        &self,
        partial: &mut Partial,
        surveyed: &[(LayerId, &Surveyed)],
        wish: &Wish,
    ) -> Result<Sensitivity> {
        let rule = self.source.files.spec.routing;
        let most = most(rule.experts, rule.top_k, Spread::Unequal).max(1);
        let known = partial.entries.iter().find_map(|entry| match entry {
            Entry::Sensitivity(known) if known.semantics == wish.semantics => Some(known),
            _ => None,
        });
        if let Some(known) = known {
            return Ok(known.clone());
        }
        let mut dropped = PROBE_SHARES
            .map(|share| total(share, 1, rule.experts, rule.top_k, Spread::Unequal).clamp(1, most))
            .to_vec();
        dropped.dedup();
        let kl_nats = self.forks(partial, wish.end_tokens, |at, _, experts, _, fork| {
            let (id, surveyed) = surveyed[at];
            let survey = self.read_survey(partial, id, surveyed)?;
            for &count in &dropped {
                let path = surveyed.path[..count.min(surveyed.path.len())].iter();
                let mask = Mask::of(rule.experts, path.map(|step| step.expert.index()));
                let dropped = Dropped {
                    mask: &mask,
                    semantics: wish.semantics,
                    constants: &survey.constants,
                };
                fork(experts, Some(dropped))?;
            }
            Ok(())
        })?;
        let found = Sensitivity {
            dropped,
            semantics: wish.semantics,
            kl_nats,
        };
        partial.finished(Entry::Sensitivity(found.clone()))?;
        Ok(found)
    }
}
