//! Rows of a comparison that make experts smaller or mend them: plans, what a layer's loss costs, and the walk of the
//! judging windows through what is built, layer by layer. Law: nothing of a row is in memory but one layer.

use cotk_model::moe::Alive;
use serde::{Deserialize, Serialize};

use super::apply::SlimLayer;
use super::plan::{Curve, Sizes, Way, equal, paper, unequal};
use super::slim::Slim;
use super::survey::{ShrinkLayer, Shrunk};
use crate::Result;
use crate::decide::Measured;
use crate::heal::{HealOptions, Step};
use crate::partial::{Entry, Partial};
use crate::pipeline::Job;
use crate::prune::experts::{Dropped, Experts};
use crate::prune::gram::{Measure, Semantics};
use crate::prune::mask::Mask;
use crate::prune::plan::Pruned;
use crate::prune::probe::PROBE_SHARES;
use crate::prune::ratios::Spread;
use crate::states::Stream;

/// Inner sizes are multiples of this, where a comparison chooses them: kernels waste nothing from 16 on, and shares of a
/// quarter can be met exactly with 8.
pub(crate) const MULTIPLE: usize = 8;

/// What each MoE layer's loss costs at the model's end when its experts become smaller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShrinkSensitivity {
    pub way: Way,
    pub curves: Vec<Curve>,
}

/// Healing of each MoE layer, step by step.
pub type Steps = Vec<Vec<Step>>;

impl Job<'_> {
    /// Surveys of all MoE layers on the teacher's stream, journaled.
    pub(crate) fn shrink_surveys(
        &self,
        partial: &mut Partial,
        measured: &[Measured],
        whole: &Stream,
    ) -> Result<Vec<ShrinkLayer>> {
        let known = |partial: &Partial, layer| {
            partial.entries.iter().find_map(|entry| match entry {
                Entry::Shrunk(found) if found.layer == layer => Some(found.found.clone()),
                _ => None,
            })
        };
        let mut surveys = Vec::with_capacity(measured.len());
        self.with
            .progress
            .begin("surveying channels and ranks", measured.len() as u64, "layers");
        for measured in measured {
            if let Some(found) = known(partial, measured.layer) {
                surveys.push(found);
                continue;
            }
            let index = measured.layer.index();
            let (layer, experts) = self.load_whole(index)?;
            let experts = experts.expect("a measured layer has experts");
            let found = self.survey_shrinking(&layer, &experts, whole, index, true)?;
            surveys.push(found.clone());
            partial.finished(Entry::Shrunk(Box::new(Shrunk {
                layer: measured.layer,
                found,
            })))?;
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        Ok(surveys)
    }

    /// Loss against KL of each layer, measured by making one layer smaller at a time; journaled.
    pub(crate) fn shrink_curves(
        &self,
        partial: &mut Partial,
        surveys: &[ShrinkLayer],
        whole: &Stream,
        way: Way,
        end_tokens: usize,
    ) -> Result<Vec<Curve>> {
        // Plain truncation is weighed as the whitened one is.
        let way = if way == Way::PlainRank { Way::Rank } else { way };
        let known = partial.entries.iter().find_map(|entry| match entry {
            Entry::ShrinkSensitivity(known) if known.way == way => Some(known.curves.clone()),
            _ => None,
        });
        if let Some(curves) = known {
            return Ok(curves);
        }
        let spec = &self.source.files.spec;
        let (hidden, inner, count) = (spec.hidden, spec.moe_intermediate, spec.routing.experts);
        let alive = vec![vec![true; count]];
        let mut losses: Vec<Vec<f64>> = Vec::new();
        let kls = self.forks(partial, end_tokens, |at, layer, experts, index, fork| {
            let tokens = self.layer_tokens(layer, whole, whole, index, Alive::All)?;
            let mut own = Vec::new();
            for share in PROBE_SHARES {
                #[expect(
                    clippy::cast_precision_loss,
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "weights of a layer are far below 2^53"
                )]
                let weights = ((1.0 - share) * (3 * hidden * inner * count) as f64) as usize;
                let sizes = Sizes {
                    hidden,
                    inner,
                    multiple: 1,
                    weights,
                };
                let how = equal(way, &alive, &sizes).swap_remove(0);
                let slim = SlimLayer::build(experts, &how, &tokens)?;
                own.push(surveys[at].loss(&how, inner));
                fork(&slim.into_experts(hidden).0, None)?;
            }
            losses.push(own);
            Ok(())
        })?;
        let curves: Vec<Curve> = (losses.into_iter().zip(kls))
            .map(|(losses, kls)| Curve::new(losses.into_iter().zip(kls).collect()))
            .collect();
        partial.finished(Entry::ShrinkSensitivity(Box::new(ShrinkSensitivity {
            way,
            curves: curves.clone(),
        })))?;
        Ok(curves)
    }

    /// How much of which expert goes so that the share `ratio` of all expert weights is gone, `pruned` counted.
    #[expect(clippy::too_many_arguments, reason = "what a plan hangs on")]
    pub(crate) fn shrink_plan(
        &self,
        partial: &mut Partial,
        measured: &[Measured],
        surveys: &[ShrinkLayer],
        whole: &Stream,
        (way, spread, multiple): (Way, Spread, usize),
        pruned: &Pruned,
        (ratio, end_tokens): (f64, usize),
    ) -> Result<Vec<Vec<Slim>>> {
        let spec = &self.source.files.spec;
        let alive: Vec<Vec<bool>> = pruned.layers.iter().map(|layer| layer.mask.living()).collect();
        let all = 3 * spec.hidden * spec.moe_intermediate * spec.routing.experts * alive.len();
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "weights of a model are far below 2^53"
        )]
        let weights = ((1.0 - ratio) * all as f64).round() as usize;
        let sizes = Sizes {
            hidden: spec.hidden,
            inner: spec.moe_intermediate,
            multiple,
            weights,
        };
        match (way, spread) {
            (Way::Whole, _) => Ok(equal(
                way,
                &alive,
                &Sizes {
                    weights: usize::MAX,
                    ..sizes
                },
            )),
            (Way::PlainRank, _) => {
                let mut importances = Vec::with_capacity(alive.len());
                for found in measured {
                    let surveyed = found.prune.as_ref().expect("surveyed before it is planned");
                    let survey = self.read_survey(partial, found.layer, surveyed)?;
                    let experts = spec.routing.experts;
                    let alone: Vec<Mask> = (0..experts).map(|expert| Mask::of(experts, [expert])).collect();
                    importances.push(survey.choose.losses(&alone, pruned.semantics, Measure::Frobenius));
                }
                Ok(paper(&importances, &alive, &sizes))
            }
            (_, Spread::Equal) => Ok(equal(way, &alive, &sizes)),
            _ => {
                let curves = self.shrink_curves(partial, surveys, whole, way, end_tokens)?;
                let surveys: Vec<&ShrinkLayer> = surveys.iter().collect();
                unequal(way, &surveys, &alive, &curves, &sizes)
            }
        }
    }

    /// The judging stream through a model made smaller as `plan` says under `pruned`, healed layer by layer on its own
    /// calibration stream where `healing` says how.
    pub(crate) fn walk_slim(
        &self,
        partial: &Partial,
        measured: &[Measured],
        whole: &Stream,
        (pruned, plan): (&Pruned, &[Vec<Slim>]),
        healing: Option<&HealOptions>,
        judge: &Stream,
    ) -> Result<Steps> {
        let spec = &self.source.files.spec;
        let student = Stream::new(&partial.states(), "slim", spec.hidden, whole.windows().to_vec());
        if healing.is_some() {
            self.embed(&student, &self.calibration_windows())?;
        }
        let calibration = if healing.is_some() { &student } else { whole };
        self.with.progress.begin("shrinking", self.layers() as u64, "layers");
        let mut moe = measured.iter().enumerate();
        let mut steps = Vec::new();
        for index in 0..self.layers() {
            let (mut layer, experts) = self.load_whole(index)?;
            let at = experts.as_ref().and_then(|_| moe.next());
            let built = match (&experts, at) {
                (Some(experts), Some((at, found))) => {
                    let mask = &pruned.layers[at].mask;
                    let living = mask.living();
                    let alive = match pruned.semantics {
                        Semantics::Removed => Alive::Removed(&living),
                        Semantics::Masked => Alive::Masked(&living),
                        Semantics::Novice => Alive::All,
                    };
                    let tokens = self.layer_tokens(&layer, calibration, whole, index, alive)?;
                    let mut slim = SlimLayer::build(experts, &plan[at], &tokens)?;
                    if pruned.semantics == Semantics::Novice {
                        let surveyed = found.prune.as_ref().expect("surveyed before it is judged");
                        let survey = self.read_survey(partial, found.layer, surveyed)?;
                        for expert in mask.dropped() {
                            let constant = survey.constants[expert * spec.hidden..][..spec.hidden].to_vec();
                            slim.constants[expert] = Some(constant);
                        }
                    }
                    if let Some(options) = healing {
                        slim.heal(&tokens, options)?;
                        slim.recalibrate(self, &layer, (&tokens, alive), options)?;
                        if let Some(rows) = slim.router.take() {
                            layer = self.with_router(layer, rows);
                        }
                    }
                    steps.push(std::mem::take(&mut slim.steps));
                    Some((slim.into_experts(spec.hidden), mask))
                }
                _ => None,
            };
            let dropped = built.as_ref().map(|((_, constants), mask)| Dropped {
                mask,
                semantics: pruned.semantics,
                constants,
            });
            let experts: Option<&Experts> = built.as_ref().map(|((experts, _), _)| experts);
            self.step_under(&layer, experts, dropped, index, judge, judge)?;
            judge.forget(index);
            if healing.is_some() {
                self.step_under(&layer, experts, dropped, index, &student, &student)?;
                student.forget(index);
            }
            self.with.progress.advance(1);
        }
        student.forget(self.layers());
        self.with.progress.end();
        Ok(steps)
    }
}

impl ShrinkLayer {
    /// Predicted loss of the layer: the sum over its experts.
    fn loss(&self, how: &[Slim], inner: usize) -> f64 {
        let of = |(found, how): (&super::survey::ShrinkExpert, &Slim)| -> f64 {
            match how {
                Slim::Whole => 0.0,
                Slim::Channels(kept) if *kept >= inner => 0.0,
                Slim::Channels(kept) => f64::from(found.losses[inner - kept - 1]),
                Slim::Ranks(ranks) | Slim::PlainRanks(ranks) => (ranks.iter().zip(&found.gains))
                    .filter(|(rank, _)| **rank > 0)
                    .map(|(&rank, gains)| gains.iter().skip(rank).rev().map(|&g| f64::from(g)).sum::<f64>())
                    .sum(),
            }
        };
        self.experts.iter().zip(how).map(of).sum()
    }
}
