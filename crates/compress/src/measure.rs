//! The first pass: the source model's own stream, layer by layer, and what the stages propose for each. Decides nothing
//! (`decide` does). Law: left out where there is nothing to allocate, its absence changes no byte.

use cotk_container::manifest::DroppedMeaning;
use cotk_model::moe::Alive;
use cotk_run::units::ExpertId;

use crate::Result;
use crate::choice::{Form, Instead, LayerOffers};
use crate::decide::Measured;
use crate::joint::code::How;
use crate::joint::offers::{Menu, Offered};
use crate::joint::recipe::Joint;
use crate::joint::variants::Others;
use crate::partial::{Entry, MeasuredLayer, Partial};
use crate::pipeline::{Job, Streams};
use crate::stage::{Change, DropLeastUsed, Proposal, RoundToNearest, Stage, record_bytes};
use crate::states::Stream;

impl Job<'_> {
    /// The first pass: the source model's own stream. What each stage proposes, layer by layer.
    pub(crate) fn measure(&self, partial: &mut Partial, streams: &[Stream; 2]) -> Result<Vec<Measured>> {
        let stream = &streams[0];
        let done = partial.measured().len();
        self.with
            .progress
            .begin("measuring", (self.layers() - done) as u64, "layers");
        if done == 0 {
            self.embed(stream, &self.calibration_windows())?;
        }
        for index in done..self.layers() {
            let layer = self.load_layer(index)?;
            let found = if layer.is_moe() {
                let (usage, samples) = self.observe(&layer, stream, index)?;
                let view = self.view(layer.id(), &usage, &samples);
                let mut proposals = self.undisputed_codes(usage.experts.len());
                for stage in self.stages(usage.experts.len()) {
                    proposals.extend(stage.propose(&view)?);
                }
                let prune = match &self.request.recipe.compress.prune {
                    Some(prune) => {
                        let experts = self.experts(&layer)?;
                        let survey = self.survey(&layer, &experts, stream, index, prune.gram_tokens.get())?;
                        let semantics = self.request.recipe.compress.semantics();
                        Some(self.keep_survey(partial, layer.id(), &survey, semantics)?)
                    }
                    None => {
                        let plain = self.plain_layer(layer.id())?;
                        self.step_plain(&layer, &plain, stream, index)?;
                        None
                    }
                };
                Some(Measured {
                    layer: layer.id(),
                    usage,
                    proposals,
                    prune,
                })
            } else {
                self.step_dense(&layer, stream, index)?;
                None
            };
            partial.finished(Entry::Measured(MeasuredLayer {
                layer: index,
                found,
                offered: None,
                states: stream.checksum(index + 1)?,
            }))?;
            stream.forget(index);
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        Ok(partial.measured().into_iter().filter_map(|m| m.found.clone()).collect())
    }

    /// The first pass where matrices choose among forms: what each could become, weighed by what its layer weighs at the
    /// model's end. `always`: forms that are offered wherever they lie.
    pub(crate) fn offers(
        &self,
        partial: &mut Partial,
        streams: &Streams,
        joint: &Joint,
        always: &[Form],
    ) -> Result<Vec<LayerOffers>> {
        let stream = &streams.calibration[0];
        let done = partial.measured().len();
        let menu = Menu {
            forms: joint.forms(&self.request.recipe.compress.codes),
            always: always.to_vec(),
            ranks: joint.stored_ranks(),
            others: self.others(joint),
            how: How::of(joint).to_compare(),
        };
        self.with
            .progress
            .begin("measuring", (self.layers() - done) as u64, "layers");
        if done == 0 {
            self.embed(stream, &self.calibration_windows())?;
        }
        for index in done..self.layers() {
            let layer = self.load_layer(index)?;
            let offered = if layer.is_moe() {
                let rows = self.gather(partial, &layer, stream, index, Alive::All)?;
                let offered = self.layer_offers(layer.id(), &rows, &menu)?;
                rows.forget();
                let plain = self.plain_layer(layer.id())?;
                self.step_plain(&layer, &plain, stream, index)?;
                Some(Box::new(offered))
            } else {
                self.step_dense(&layer, stream, index)?;
                None
            };
            partial.finished(Entry::Measured(MeasuredLayer {
                layer: index,
                found: None,
                offered,
                states: stream.checksum(index + 1)?,
            }))?;
            stream.forget(index);
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        let offered = partial.measured().into_iter().filter_map(|m| m.offered.as_deref());
        let mut offered: Vec<Offered> = offered.cloned().collect();
        let usages = offered
            .iter()
            .map(|offered| (offered.offers.layer, &offered.offers.usage));
        crate::report::enough(&self.request.calibration, usages)?;
        self.weigh(partial, &mut offered, joint.sensitivity_tokens)?;
        let weighed = |offered: Offered| offered.weighed(joint.traffic_prior.get(), joint.traffic_spread.get());
        Ok(offered.into_iter().map(weighed).collect())
    }

    /// What the recipe offers beside codes.
    fn others(&self, joint: &Joint) -> Others {
        let inner = self.source.files.spec.moe_intermediate;
        let gone = match self.request.recipe.compress.dropped {
            DroppedMeaning::Masked => Some(Instead::Dropped),
            DroppedMeaning::Novice => Some(Instead::Constant),
            // Gates of those that stay change: no expert's loss is its own.
            DroppedMeaning::Removed => None,
        };
        Others {
            gone: gone.filter(|_| joint.max_dropped.get() > 0.0),
            channels: joint.inner_sizes(inner),
        }
    }

    /// One code for whatever `[compress.prune]` keeps: nothing to measure, nothing to allocate.
    fn has_one_code(&self) -> bool {
        let recipe = &self.request.recipe.compress;
        (recipe.prune.is_some() || recipe.shrink.is_some()) && recipe.codes.get().len() == 1
    }

    /// That code for every expert, where there is one.
    fn undisputed_codes(&self, experts: usize) -> Vec<Proposal> {
        if !self.has_one_code() {
            return Vec::new();
        }
        let (spec, recipe) = (&self.source.files.spec, &self.request.recipe.compress);
        let code = recipe.codes.get()[0];
        let bytes = record_bytes(spec.hidden, spec.moe_intermediate, code, recipe.group.get());
        let of = |expert| Proposal {
            bytes,
            ..Proposal::free(expert, Change::Code(code))
        };
        (0..).map(ExpertId).take(experts).map(of).collect()
    }

    /// In order; the first pass offers every drop that could be wanted.
    fn stages(&self, experts: usize) -> Vec<Box<dyn Stage + '_>> {
        let (spec, recipe) = (&self.source.files.spec, &self.request.recipe.compress);
        let mut stages: Vec<Box<dyn Stage + '_>> = Vec::new();
        if recipe.drop_ratio.get() > 0.0 {
            let count = experts.saturating_sub(spec.routing.top_k);
            stages.push(Box::new(DropLeastUsed { count }));
        }
        if self.has_one_code() {
            return stages;
        }
        stages.push(Box::new(RoundToNearest {
            codes: recipe.codes.get(),
            group: recipe.group.get(),
            cpu: self.cpu,
            cost: self.with.cost,
            threads: u32::try_from(self.with.threads).unwrap_or(u32::MAX),
        }));
        stages
    }
}
