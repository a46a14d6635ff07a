//! The second pass: statistics on the compressed model's own stream, codes, records, and both quality streams. Law: each
//! layer sees what the compressed layers before it made, so that errors travel as they will when it is served.

use cotk_container::manifest::{DroppedMeaning, Why};
use cotk_container::writer::{CodedExpert, Constant, ContainerWriter, NewExpert, NewLayer, NewState, constant_values};
use cotk_model::layers::linear::Linear;
use cotk_model::layers::{Layer, Mlp};
use cotk_model::moe::{MoeShape, route};
use cotk_model::reference::{Absent, PlainMoe};
use cotk_model::spec::ModelSpec;
use cotk_run::units::{ExpertId, LayerId};
use cotk_runtime::mix::{Cpu, Mix};
use cotk_runtime::policy::Exact;
use cotk_runtime::store::{CodedLayer, alive};
use rayon::prelude::*;

use crate::Result;
use crate::choice::{Fate, LayerFates};
use crate::decide::{self, Decisions};
use crate::joint::build::held_sample;
use crate::joint::code::How;
use crate::joint::stored::decoded_expert;
use crate::layer::{LayerView, Samples, Usage};
use crate::novice;
use crate::partial::{BuiltLayer, BuiltMoe, Entry, Partial};
use crate::pipeline::{Job, Streams};
use crate::quality;
use crate::shrink::build::{Smaller, told};
use crate::stage::{Change, code_expert, measure_prefixes};
use crate::states::{Stream, attend};
use crate::walk::{add, run_plain};

/// What is to be built.
#[derive(Clone, Copy)]
pub(crate) enum Wanted<'a> {
    /// One code; what is dropped is the least used of the compressed stream.
    Undisputed,
    /// Codes rounded to nearest, of smaller experts where there is a plan of them.
    Changes {
        decisions: &'a Decisions,
        smaller: Option<&'a Smaller>,
    },
    /// In layer order.
    Fates { layers: &'a [LayerFates], how: &'a How },
}

impl Job<'_> {
    /// [`build`](Self::build) of chosen fates.
    pub(crate) fn build_fates(
        &self,
        partial: &mut Partial,
        streams: &Streams,
        layers: &[LayerFates],
        how: &How,
    ) -> Result<()> {
        self.build(partial, streams, Wanted::Fates { layers, how })
    }

    /// The second pass: statistics on the compressed model's own stream, codes, records.
    pub(crate) fn build(&self, partial: &mut Partial, streams: &Streams, wanted: Wanted<'_>) -> Result<()> {
        let done = partial.built().len();
        self.with
            .progress
            .begin("compressing", (self.layers() - done) as u64, "layers");
        if done == 0 {
            self.embed_student(&streams.calibration[1], &self.calibration_windows())?;
            let windows = quality::plan(&self.source.files.spec, self.texts.quality.len()).2;
            let quality: Vec<&[u32]> = windows.iter().map(|w| &self.texts.quality[w.inputs.clone()]).collect();
            self.embed(&streams.teacher, &quality)?;
            self.embed_student(&streams.student, &quality)?;
        }
        let entries = partial
            .built()
            .iter()
            .filter_map(|b| b.moe.as_ref().map(|m| m.entry.clone()))
            .collect();
        let mut writer = ContainerWriter::resume(&partial.out(), entries)?;
        for index in done..self.layers() {
            let layer = self.load_student_layer(index)?;
            let other = match self.source.is_dense_as_stored() {
                true => None,
                false => Some(self.load_layer(index)?),
            };
            let teacher = other.as_ref().unwrap_or(&layer);
            let moe = if layer.is_moe() {
                Some(match wanted {
                    Wanted::Fates { layers, how } => {
                        let fates = layers.iter().find(|fates| fates.layer == layer.id());
                        let fates = &fates.expect("every MoE layer has fates").experts;
                        self.build_fated(partial, [&layer, teacher], index, streams, (fates, how), &mut writer)?
                    }
                    Wanted::Undisputed => {
                        self.build_moe(partial, [&layer, teacher], index, streams, (None, None), &mut writer)?
                    }
                    Wanted::Changes { decisions, smaller } => {
                        let wanted = (Some(decisions), smaller);
                        self.build_moe(partial, [&layer, teacher], index, streams, wanted, &mut writer)?
                    }
                })
            } else {
                self.step_dense(&layer, &streams.calibration[1], index)?;
                self.step_dense(&layer, &streams.student, index)?;
                self.step_dense(teacher, &streams.teacher, index)?;
                None
            };
            let [a, b, c] = streams.all_built().map(|stream| stream.checksum(index + 1));
            partial.finished(Entry::Built(Box::new(BuiltLayer {
                layer: index,
                moe,
                states: [a?, b?, c?],
            })))?;
            for stream in streams.all_built() {
                stream.forget(index);
            }
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        Ok(())
    }

    /// The compressed model's dense part of the layer, and the source's.
    fn build_moe(
        &self,
        partial: &Partial,
        [layer, teacher]: [&Layer; 2],
        index: usize,
        streams: &Streams,
        (decisions, smaller): (Option<&Decisions>, Option<&Smaller>),
        writer: &mut ContainerWriter,
    ) -> Result<BuiltMoe> {
        let calibration = &streams.calibration[1];
        let (usage, samples) = self.observe(layer, calibration, index)?;
        let smaller = match smaller {
            Some(smaller) => Some(self.smaller_layer(smaller, layer, index, calibration)?),
            None => None,
        };
        let fitted = match smaller.as_ref().and_then(|smaller| smaller.router.clone()) {
            None => None,
            Some(rows) => {
                let kept = self.keep_router(partial, layer, &rows)?;
                Some((self.with_router(layer.clone(), rows), kept))
            }
        };
        let (layer, router) = match &fitted {
            Some((layer, kept)) => (layer, Some(*kept)),
            None => (layer, None),
        };
        let weights = smaller.as_ref().map(|smaller| smaller.experts.as_slice());
        let view = self.view(layer.id(), &usage, &samples);
        let changes = match decisions {
            Some(decisions) => decided(decisions, layer.id()),
            None => self.undisputed(&usage),
        };
        let plain = self.plain_layer(layer.id())?;
        // In the place of experts that go, where that is what going means.
        let novices = |coded: &[Option<CodedExpert>], gain: f32| match self.request.recipe.compress.dropped {
            DroppedMeaning::Novice => novice::constants(&view, coded, gain),
            DroppedMeaning::Masked | DroppedMeaning::Removed => Ok(vec![None; coded.len()]),
        };
        let coded = self.code(&view, &changes, weights, 1.0)?;
        let constants = novices(&coded, 1.0)?;
        let gain = self.gain(
            layer,
            &self.student(layer.id(), (&coded, &constants), &living(&coded, &constants)),
            &plain,
            calibration,
            index,
        )?;
        let mut coded = self.code(&view, &changes, weights, gain)?;
        self.measure_prefixes(&view, &mut coded, gain)?;
        let constants = novices(&coded, gain)?;
        let living = living(&coded, &constants);
        let student = self.student(layer.id(), (&coded, &constants), &living);
        let relative_error = self.step_student(layer, &student, Some(&plain), calibration, index)?;
        self.step_student(layer, &student, None, &streams.student, index)?;
        self.step_plain(teacher, &plain, &streams.teacher, index)?;

        let new = view
            .experts()
            .into_iter()
            .zip(coded.into_iter().zip(constants))
            .map(|(expert, (kept, constant))| {
                let state = constant.map_or_else(|| NewState::from(kept), NewState::Constant);
                let new = NewExpert::new(why(&usage, expert), state);
                match &smaller {
                    Some(smaller) => new.decided(smaller.decisions[expert.index()].clone()),
                    None => new,
                }
            })
            .collect();
        let entry = writer.append(NewLayer {
            layer: layer.id(),
            gain,
            healed: smaller.map_or_else(Vec::new, |smaller| smaller.healed),
            thresholds: Vec::new(),
            experts: new,
        })?;
        Ok(BuiltMoe {
            entry,
            usage,
            relative_error,
            router,
            hessians: Vec::new(),
        })
    }

    /// The compressed model's dense part of the layer, and the source's; codes under the Hessians of what the compressed
    /// stream shows.
    fn build_fated(
        &self,
        partial: &Partial,
        [layer, teacher]: [&Layer; 2],
        index: usize,
        streams: &Streams,
        (fates, how): (&[Fate], &How),
        writer: &mut ContainerWriter,
    ) -> Result<BuiltMoe> {
        let calibration = &streams.calibration[1];
        let living: Vec<bool> = fates.iter().map(|fate| *fate != Fate::Dropped).collect();
        let chosen_from = alive(self.request.recipe.compress.dropped, &living);
        let rows = self.gather(partial, layer, calibration, index, chosen_from)?;
        let coded = match &how.heal {
            None => self.code_layer(layer.id(), fates, &rows, how)?,
            Some(options) => {
                let whole = self.whole_stream(partial, &self.calibration_windows())?;
                let tokens = self.layer_tokens(layer, calibration, &whole, index, chosen_from)?;
                self.code_healed_layer(layer, fates, (&rows, &tokens, chosen_from), how, options)?
            }
        };
        let healed = coded.steps.iter().map(told).collect();
        let fitted = match coded.router {
            None => None,
            Some(rows) => {
                let kept = self.keep_router(partial, layer, &rows)?;
                Some((self.with_router(layer.clone(), rows), kept))
            }
        };
        let (layer, router) = match &fitted {
            Some((layer, kept)) => (layer, Some(*kept)),
            None => (layer, None),
        };
        let (mut experts, hessians) = (coded.experts, coded.notes);
        let samples = Samples::none(self.source.files.spec.hidden, experts.len());
        let view = self.view(layer.id(), &rows.usage, &samples);
        let measure = |(expert, slot): (ExpertId, &mut Option<CodedExpert>)| -> Result<()> {
            if let Some(coded) = slot.take() {
                let sample = held_sample(&rows, expert)?;
                let weights = view.weights(expert)?;
                *slot = Some(measure_prefixes(self.cpu, &view, coded, &weights, &sample));
            }
            Ok(())
        };
        view.experts().into_par_iter().zip(&mut experts).try_for_each(measure)?;

        let constants = coded.constants;
        let decoded = self.decoded_layer(layer.id(), &experts, &constants);
        self.step_plain(layer, &decoded, calibration, index)?;
        let plain = self.plain_layer(layer.id())?;
        let student = self.student(layer.id(), (&experts, &constants), &living);
        let relative_error = self.step_student(layer, &student, Some(&plain), &streams.student, index)?;
        self.step_plain(teacher, &plain, &streams.teacher, index)?;
        let new = view.experts().into_iter().zip(experts.into_iter().zip(constants));
        let new = new.map(|(expert, (kept, constant))| {
            let note = hessians.iter().find(|note| note.expert == expert);
            let decision = self.decision(partial, (layer.id(), expert), &fates[expert.index()], note);
            let state = constant.map_or_else(|| NewState::from(kept), NewState::Constant);
            NewExpert::new(why(&rows.usage, expert), state).decided(decision)
        });
        let entry = writer.append(NewLayer {
            layer: layer.id(),
            gain: 1.0,
            healed,
            thresholds: Vec::new(),
            experts: new.collect(),
        })?;
        let usage = rows.usage.clone();
        rows.forget();
        Ok(BuiltMoe {
            entry,
            usage,
            relative_error,
            router,
            hessians,
        })
    }

    /// What the codes say, in f32: the stream that later layers are fitted to need not go through 8-bit activations.
    pub(crate) fn decoded_layer(
        &self,
        layer: LayerId,
        coded: &[Option<CodedExpert>],
        constants: &[Option<Constant>],
    ) -> PlainMoe {
        let spec = &self.source.files.spec;
        let experts = coded.par_iter().map(|coded| coded.as_ref().map(decoded_expert));
        let shape = MoeShape {
            hidden: spec.hidden,
            rule: spec.routing,
            layers: vec![layer],
        };
        let absent = match self.request.recipe.compress.dropped {
            DroppedMeaning::Removed => Absent::Removed,
            DroppedMeaning::Masked | DroppedMeaning::Novice => Absent::Masked,
        };
        let plain = PlainMoe::from_experts(shape, vec![experts.collect()], absent);
        let values = |constant: &Option<Constant>| constant.as_ref().map(|c| constant_values(c.bytes()));
        plain.with_constants(vec![constants.iter().map(values).collect()])
    }

    /// Codes the kept experts of a layer, their down projections times `gain`; `smaller`: weights in the place of the
    /// source's.
    fn code(
        &self,
        view: &LayerView<'_>,
        changes: &[Change],
        smaller: Option<&[Option<Mlp>]>,
        gain: f32,
    ) -> Result<Vec<Option<CodedExpert>>> {
        let group = self.request.recipe.compress.group.get();
        let weights = |expert: ExpertId| match smaller {
            Some(smaller) => Ok(smaller[expert.index()].clone().expect("what is kept has a size")),
            None => view.weights(expert),
        };
        let code = |expert: ExpertId| match changes[expert.index()] {
            Change::Drop => Ok(None),
            Change::Code(code) => code_expert(view, expert, &scaled(weights(expert)?, gain), code, group).map(Some),
        };
        view.experts().into_par_iter().map(code).collect()
    }

    fn measure_prefixes(&self, view: &LayerView<'_>, coded: &mut [Option<CodedExpert>], gain: f32) -> Result<()> {
        let measure = |(expert, slot): (ExpertId, &mut Option<CodedExpert>)| -> Result<()> {
            if let Some(coded) = slot.take() {
                let weights = scaled(view.weights(expert)?, gain);
                let sample = view.samples.routed(expert);
                *slot = Some(measure_prefixes(self.cpu, view, coded, &weights, sample));
            }
            Ok(())
        };
        view.experts().into_par_iter().zip(coded).try_for_each(measure)
    }

    fn student<'s>(
        &self,
        layer: LayerId,
        (experts, constants): (&'s [Option<CodedExpert>], &'s [Option<Constant>]),
        living: &'s [bool],
    ) -> Student<'s> {
        Student {
            store: CodedLayer {
                layer,
                experts,
                constants,
            },
            living,
            meaning: self.request.recipe.compress.dropped,
            cpu: self.cpu,
        }
    }

    /// The least-squares factor from the compressed layer's mixed output to the source's, over the calibration tokens:
    /// what is dropped and what is rounded away shrink the output, and one factor a layer in the down projections gives
    /// its size back at no cost (reference: moe-compression 3.1, 7; there per expert).
    fn gain(
        &self,
        layer: &Layer,
        student: &Student<'_>,
        plain: &PlainMoe,
        stream: &Stream,
        index: usize,
    ) -> Result<f32> {
        let spec = &self.source.files.spec;
        let (mut product, mut square) = (0.0f64, 0.0f64);
        stream.read(index, self.with.cancel, |mut hidden, windows| {
            attend(spec, &self.rope, layer, &mut hidden, windows);
            let normed = layer.mixer_input(&hidden);
            let (own, truth) = (student.run(layer, spec, &normed)?, run_plain(layer, plain, &normed)?);
            for (own, truth) in own.iter().zip(&truth) {
                product += f64::from(*own) * f64::from(*truth);
                square += f64::from(*own) * f64::from(*own);
            }
            Ok(())
        })?;
        #[expect(clippy::cast_possible_truncation, reason = "a factor near 1")]
        let gain = (product / square) as f32;
        // A layer that hardly speaks, or whose output turned around, is left alone.
        Ok(if (0.5..=2.0).contains(&gain) { gain } else { 1.0 })
    }

    /// What a recipe that leaves nothing to allocate wants.
    fn undisputed(&self, usage: &Usage) -> Vec<Change> {
        let recipe = &self.request.recipe.compress;
        let count = decide::drops(recipe, &[usage], self.source.files.spec.routing.top_k)[0];
        let mut changes = vec![Change::Code(recipe.codes.get()[0]); usage.experts.len()];
        for expert in &usage.least_used()[..count] {
            changes[expert.index()] = Change::Drop;
        }
        changes
    }

    /// Returns the relative error of the mixed output against `plain` on the first batch; 0 without one.
    fn step_student(
        &self,
        layer: &Layer,
        student: &Student<'_>,
        mut plain: Option<&PlainMoe>,
        stream: &Stream,
        index: usize,
    ) -> Result<f64> {
        let spec = &self.source.files.spec;
        let mut relative_error = 0.0;
        stream.step(index, self.with.cancel, |hidden, windows| {
            attend(spec, &self.rope, layer, hidden, windows);
            let normed = layer.mixer_input(hidden);
            let mixed = student.run(layer, spec, &normed)?;
            if let Some(plain) = plain.take() {
                relative_error = relative(&mixed, &run_plain(layer, plain, &normed)?);
            }
            add(hidden, &mixed);
            layer.add_dense(&normed, hidden);
            Ok(())
        })?;
        Ok(relative_error)
    }
}

/// How the compressed layer mixes.
struct Student<'a> {
    store: CodedLayer<'a>,
    living: &'a [bool],
    meaning: DroppedMeaning,
    cpu: Cpu,
}

impl Student<'_> {
    /// The routed experts' mixed output, `[tokens, hidden]`: with the kernels that will serve it.
    fn run(&self, layer: &Layer, spec: &ModelSpec, normed: &[f32]) -> Result<Vec<f32>> {
        let scores = layer.router_scores(normed).expect("a MoE layer has a router");
        let routed = route(&layer.routing(&scores)?, alive(self.meaning, self.living));
        let mix = Mix {
            store: &self.store,
            mode: &Exact,
            held_bits: &|_, stored| stored,
            cpu: self.cpu,
            layer: layer.id(),
            hidden_size: spec.hidden,
        };
        let mut mixed = vec![0.0; normed.len()];
        mix.forward(normed, &routed, &mut mixed)?;
        Ok(mixed)
    }
}

fn why(usage: &Usage, expert: ExpertId) -> Why {
    Why {
        tokens: usage.experts[expert.index()].tokens,
        share: usage.share(expert),
        gate_share: usage.gate_share(expert),
    }
}

fn living(coded: &[Option<CodedExpert>], constants: &[Option<Constant>]) -> Vec<bool> {
    let pairs = coded.iter().zip(constants);
    pairs
        .map(|(coded, constant)| coded.is_some() || constant.is_some())
        .collect()
}

/// The same expert with its output times `gain`.
fn scaled(mut weights: Mlp, gain: f32) -> Mlp {
    let down = weights.down.weights().iter().map(|w| w * gain).collect();
    weights.down = Linear::new(down, weights.down.outputs(), weights.down.inputs());
    weights
}

fn decided(decisions: &Decisions, layer: LayerId) -> Vec<Change> {
    let of = decisions.layers.iter().find(|(id, _)| *id == layer);
    of.expect("every MoE layer was measured").1.clone()
}

/// ‖a − b‖ / ‖b‖; where b is 0: 0 if a is too, else 1.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = a
        .iter()
        .zip(b)
        .map(|(a, b)| square(f64::from(*a) - f64::from(*b)))
        .sum();
    let size: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    if difference == 0.0 {
        0.0
    } else {
        (difference / size).sqrt()
    }
}
