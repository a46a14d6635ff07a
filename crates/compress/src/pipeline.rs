//! [`compress`]: from a checkpoint to a container, top to bottom. Measure (only if there is something to allocate): the
//! uncompressed model's stream, layer by layer. Build: statistics on the compressed stream, codes, records. Then quality,
//! manifest, report, and the folder gets its name. Each finished step stands in the journal of `OUT.partial/`.

use std::path::PathBuf;
use std::time::Instant;

use cotk_container::dense::{dense_file_bytes, write_dense};
use cotk_container::manifest::{self, Checksum, DENSE, DroppedMeaning, EXPERTS, Manifest, Origin, REPORT, State, Why};
use cotk_container::writer::{CodedExpert, ContainerWriter, Head, NewExpert};
use cotk_latency::predict::CostModel;
use cotk_latency::work::{DecodeStep, ExpertKey, Work};
use cotk_model::layers::linear::Linear;
use cotk_model::layers::rope::Rope;
use cotk_model::layers::{Layer, Mlp};
use cotk_model::model::{KvCache, Model};
use cotk_model::moe::{Alive, Mode, MoeRuntime, MoeShape, RouterScores, route};
use cotk_model::reference::{Absent, PlainMoe, load_expert};
use cotk_model::spec::ModelSpec;
use cotk_run::cancel::Cancel;
use cotk_run::facts::FactSink;
use cotk_run::files;
use cotk_run::progress::Progress;
use cotk_run::recipe as recipes;
use cotk_run::seeds::Seeds;
use cotk_run::units::{ExpertId, LayerId};
use cotk_runtime::mix::{Cpu, Mix};
use cotk_runtime::policy::Exact;
use cotk_runtime::store::{CodedLayer, alive};
use rayon::prelude::*;
use serde::Serialize;

use crate::decide::{self, Decisions, Measured};
use crate::layer::{LayerView, Observer, Samples, Usage};
use crate::partial::{Begun, BuiltLayer, BuiltMoe, Entry, Identity, MeasuredLayer, Partial, layer_id};
use crate::quality::{self, Quality};
use crate::recipe::Recipe;
use crate::report::{LayerReport, Report};
use crate::source::Source;
use crate::stage::{
    Change, DropLeastUsed, RoundToNearest, Stage, code_expert, expert_key, measure_prefixes, record_bytes,
};
use crate::states::{Stream, attend};
use crate::text::{self, Texts};
use crate::{CompressError, Result};

/// Context of the predicted decoding step.
const PREDICTED_POSITIONS: usize = 512;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// Hugging Face folder.
    pub model: PathBuf,
    /// Container to make.
    pub out: PathBuf,
    pub recipe: Recipe,
    pub calibration: PathBuf,
    /// Judges; absent: the last fifth of the calibration documents.
    pub eval_text: Option<PathBuf>,
}

/// The surroundings of one compression.
pub struct Surroundings<'a> {
    pub progress: &'a dyn Progress,
    pub cancel: &'a Cancel,
    pub facts: &'a dyn FactSink,
    /// From this machine's profile, if there is one.
    pub cost: Option<&'a dyn CostModel>,
    /// That a prediction is for.
    pub threads: usize,
}

/// What a compression would do and need: `--dry-run`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    pub bytes_before: u64,
    /// At most.
    pub bytes_after: u64,
    pub disk_bytes_needed: u64,
    pub disk_bytes_free: u64,
    /// Peak memory, about.
    pub memory_bytes: u64,
    pub layers: usize,
    pub moe_layers: usize,
    pub experts: usize,
    pub experts_dropped: usize,
    pub codes: Vec<String>,
    pub calibration_tokens: usize,
    pub quality_tokens: usize,
    pub quality_text: String,
    /// Whether the uncompressed model is walked first, to have something to allocate by.
    pub is_measured_first: bool,
    pub warnings: Vec<String>,
}

/// Everything that is fixed before the first layer.
struct Job<'a> {
    request: &'a Request,
    with: &'a Surroundings<'a>,
    source: Source,
    texts: Texts,
    ends: Model,
    rope: Rope,
    cpu: Cpu,
}

/// What would be done, without doing it.
///
/// # Errors
/// As [`compress`], as far as it can be known before.
pub fn plan(request: &Request, with: &Surroundings<'_>) -> Result<Plan> {
    let job = Job::open(request, with)?;
    let plan = job.plan()?;
    job.check_budget(&plan)?;
    Ok(plan)
}

/// Compresses `request.model` into `request.out`.
///
/// # Errors
/// [`CompressError`]; what is finished then stays in `OUT.partial/`, and the same request goes on from there.
pub fn compress(request: &Request, with: &Surroundings<'_>) -> Result<Report> {
    let clock = Instant::now();
    let job = Job::open(request, with)?;
    let plan = job.plan()?;
    job.check_budget(&plan)?;
    let mut partial = match Partial::begin(&request.out, &job.identity()?)? {
        Begun::Finished(report) => return Ok(*report),
        Begun::Working(partial) => *partial,
    };
    job.check_disk(&plan)?;
    let streams = job.streams(&partial);
    job.recover(&mut partial, &streams)?;
    let resumed = partial.is_resumed();

    let decisions = if request.recipe.needs_measuring() {
        let measured = job.measure(&mut partial, &streams.calibration)?;
        let top_k = job.source.files.spec.routing.top_k;
        let record_budget = job.record_budget();
        Some(decide::decide(
            &request.recipe.compress,
            &measured,
            top_k,
            record_budget,
        )?)
    } else {
        None
    };
    job.build(&mut partial, &streams, decisions.as_ref())?;
    let quality = job.score(&mut partial, &streams)?;

    let manifest = job.finish_container(&partial)?;
    let mut report = job.report(&partial, &manifest, quality, plan.warnings)?;
    report.resumed = resumed;
    report.seconds = clock.elapsed().as_secs_f64();
    report.peak_rss_bytes = files::peak_rss_bytes();
    files::write_atomic(partial.out().join(REPORT), report.markdown().as_bytes())?;
    for fact in report.facts(&job.subject()) {
        with.facts.record(fact)?;
    }
    partial.finished(Entry::Finished(Box::new(report.clone())))?;
    partial.publish(&request.out)?;
    Ok(report)
}

/// The three streams of hidden states: calibration and quality through the compressed model, quality through the source.
struct Streams {
    /// Also that of the first pass, under another name: it begins anew for the second.
    calibration: [Stream; 2],
    teacher: Stream,
    student: Stream,
}

impl Streams {
    fn all_built(&self) -> [&Stream; 3] {
        [&self.calibration[1], &self.teacher, &self.student]
    }
}

impl<'a> Job<'a> {
    fn open(request: &'a Request, with: &'a Surroundings<'a>) -> Result<Self> {
        let source = Source::open(&request.model)?;
        let spec = &source.files.spec;
        let texts = text::draw(
            &source.files.tokenizer,
            &request.calibration,
            request.eval_text.as_deref(),
            spec.context,
            &request.recipe.compress,
            Seeds::new(request.recipe.seed),
        )?;
        Ok(Self {
            ends: quality::ends(&source)?,
            rope: Rope::new(&spec.attention.rope, spec.attention.head_dim),
            cpu: Cpu::selected().map_err(cotk_runtime::Error::from)?,
            request,
            with,
            source,
            texts,
        })
    }

    fn layers(&self) -> usize {
        self.source.files.spec.layers.len()
    }

    /// What stands in the ledger before each figure.
    fn subject(&self) -> String {
        let name = self.request.model.file_name().unwrap_or_default();
        format!("compress:{}", name.to_string_lossy())
    }

    fn identity(&self) -> Result<Identity> {
        let text = |path: &PathBuf| files::checksum_file(path);
        let mut inputs = self.source.origin.hash.0.to_le_bytes().to_vec();
        inputs.extend(text(&self.request.calibration)?.to_le_bytes());
        if let Some(path) = &self.request.eval_text {
            inputs.extend(text(path)?.to_le_bytes());
        }
        Ok(Identity {
            recipe: Checksum(recipes::hash(&self.request.recipe)?),
            inputs: Checksum(files::checksum(&inputs)),
        })
    }

    fn plan(&self) -> Result<Plan> {
        let (spec, recipe) = (&self.source.files.spec, &self.request.recipe);
        let layers = self.source.moe_layers().len();
        let dropped = recipe
            .compress
            .drop_ratio
            .count(spec.routing.experts, spec.routing.top_k)
            * layers;
        let kept = (layers * spec.routing.experts - dropped) as u64;
        let group = recipe.compress.group.get();
        let widest = recipe.compress.codes.get().iter();
        let widest = widest
            .map(|&c| record_bytes(spec.hidden, spec.moe_intermediate, c, group))
            .max();
        let most = dense_file_bytes(&self.source.dense) + kept * widest.unwrap_or(0);
        let bytes_after = recipe.budget.bytes.map_or(most, |budget| budget.min(most));
        let quality = quality::plan(spec, self.texts.quality.len()).2;
        let quality_rows: usize = quality.iter().map(|w| w.inputs.len()).sum();
        let rows = self.texts.calibration_tokens() + 2 * quality_rows;
        // States before and after one layer, for each stream.
        let states = 2 * (rows * spec.hidden * 4) as u64;
        // Copied files and manifest: a few MiB.
        let needed = bytes_after + states + (16 << 20);
        // A layer's experts in f32 and coded, embedding and head in f32, logits and batches.
        let layer = 3 * (spec.hidden * spec.moe_intermediate * spec.routing.experts) as u64;
        let memory =
            layer * 6 + 2 * (spec.vocab * spec.hidden * 4) as u64 + (2 * 512 * spec.vocab * 4) as u64 + (64 << 20);
        let mut warnings = self.texts.warnings.clone();
        if recipe.compress.codes.get().len() > 1 && recipe.budget.bytes.is_none() {
            warnings.push("several codes and no budget: every expert gets the one that loses least".to_owned());
        }
        if self.with.cost.is_none() {
            warnings.push("no profile of this machine: the time of decoding is not predicted".to_owned());
        }
        Ok(Plan {
            bytes_before: self.source.bytes,
            bytes_after,
            disk_bytes_needed: needed,
            disk_bytes_free: files::free_bytes(&self.request.out)?,
            memory_bytes: memory,
            layers: self.layers(),
            moe_layers: layers,
            experts: layers * spec.routing.experts,
            experts_dropped: dropped,
            codes: recipe.compress.codes.get().iter().map(ToString::to_string).collect(),
            calibration_tokens: self.texts.calibration_tokens(),
            quality_tokens: self.texts.quality.len() - 1,
            quality_text: self.texts.quality_name.clone(),
            is_measured_first: recipe.needs_measuring(),
            warnings,
        })
    }

    /// What the budget leaves for records.
    fn record_budget(&self) -> Option<u64> {
        let budget = self.request.recipe.budget.bytes?;
        Some(budget.saturating_sub(dense_file_bytes(&self.source.dense)))
    }

    /// Whether the narrowest codes would fit: known before anything is read.
    fn check_budget(&self, plan: &Plan) -> Result<()> {
        let Some(budget) = self.request.recipe.budget.bytes else {
            return Ok(());
        };
        let (spec, recipe) = (&self.source.files.spec, &self.request.recipe.compress);
        let codes = recipe.codes.get().iter();
        let narrowest = codes
            .map(|&c| record_bytes(spec.hidden, spec.moe_intermediate, c, recipe.group.get()))
            .min();
        let kept = (plan.experts - plan.experts_dropped) as u64;
        let least = dense_file_bytes(&self.source.dense) + kept * narrowest.unwrap_or(0);
        if least > budget {
            return Err(CompressError::Budget { budget, least });
        }
        Ok(())
    }

    fn check_disk(&self, plan: &Plan) -> Result<()> {
        if plan.disk_bytes_needed > plan.disk_bytes_free {
            return Err(CompressError::DiskSpace {
                folder: self.request.out.parent().unwrap_or(&self.request.out).to_owned(),
                need: plan.disk_bytes_needed,
                have: plan.disk_bytes_free,
            });
        }
        Ok(())
    }

    fn streams(&self, partial: &Partial) -> Streams {
        let spec = &self.source.files.spec;
        let folder = partial.states();
        let quality = quality::plan(spec, self.texts.quality.len()).2;
        let quality: Vec<usize> = quality.iter().map(|w| w.inputs.len()).collect();
        let calibration: Vec<usize> = self.texts.calibration.iter().map(Vec::len).collect();
        let stream = |name, windows| Stream::new(&folder, name, spec.hidden, windows);
        Streams {
            calibration: [
                stream("source", calibration.clone()),
                stream("calibration", calibration),
            ],
            teacher: stream("teacher", quality.clone()),
            student: stream("student", quality),
        }
    }

    /// Begins anew when states that the journal promises are not there whole: the machine itself went down.
    fn recover(&self, partial: &mut Partial, streams: &Streams) -> Result<()> {
        let is_whole = |stream: &Stream, layer: usize, expected: Checksum| {
            stream.path(layer).is_file() && stream.checksum(layer).is_ok_and(|found| found == expected)
        };
        let built_is_whole = partial.built().last().is_none_or(|last| {
            let all = streams.all_built().into_iter().zip(last.states);
            partial.scored().is_some()
                || all
                    .into_iter()
                    .all(|(stream, sum)| is_whole(stream, last.layer + 1, sum))
        });
        let measured_is_whole = partial.measured().last().is_none_or(|last| {
            last.layer + 1 == self.layers() || is_whole(&streams.calibration[0], last.layer + 1, last.states)
        });
        if !(built_is_whole && measured_is_whole) {
            self.with
                .progress
                .note("the unfinished output lost what its journal promises: beginning anew");
            partial.restart()?;
        }
        Ok(())
    }

    fn embed(&self, stream: &Stream, windows: &[&[u32]]) -> Result<()> {
        stream.begin(windows, |tokens| Ok(self.ends.embed(tokens)?))
    }

    fn calibration_windows(&self) -> Vec<&[u32]> {
        self.texts.calibration.iter().map(Vec::as_slice).collect()
    }

    fn load_layer(&self, layer: usize) -> Result<Layer> {
        Ok(Layer::load(
            &self.source.files.spec,
            self.source.files.source.as_ref(),
            layer_id(layer),
        )?)
    }

    /// The first pass: the source model's own stream. What each stage proposes, layer by layer.
    fn measure(&self, partial: &mut Partial, streams: &[Stream; 2]) -> Result<Vec<Measured>> {
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
                let mut proposals = Vec::new();
                for stage in self.stages(usage.experts.len()) {
                    proposals.extend(stage.propose(&view)?);
                }
                let plain = self.plain_layer(layer.id())?;
                self.step_plain(&layer, &plain, stream, index)?;
                Some(Measured {
                    layer: layer.id(),
                    usage,
                    proposals,
                })
            } else {
                self.step_dense(&layer, stream, index)?;
                None
            };
            partial.finished(Entry::Measured(MeasuredLayer {
                layer: index,
                found,
                states: stream.checksum(index + 1)?,
            }))?;
            stream.forget(index);
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        Ok(partial.measured().into_iter().filter_map(|m| m.found.clone()).collect())
    }

    /// In order; the first pass offers every drop that could be wanted.
    fn stages(&self, experts: usize) -> Vec<Box<dyn Stage + '_>> {
        let (spec, recipe) = (&self.source.files.spec, &self.request.recipe.compress);
        let mut stages: Vec<Box<dyn Stage + '_>> = Vec::new();
        if recipe.drop_ratio.get() > 0.0 {
            let count = experts.saturating_sub(spec.routing.top_k);
            stages.push(Box::new(DropLeastUsed { count }));
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

    /// The second pass: statistics on the compressed model's own stream, codes, records.
    fn build(&self, partial: &mut Partial, streams: &Streams, decisions: Option<&Decisions>) -> Result<()> {
        let done = partial.built().len();
        self.with
            .progress
            .begin("compressing", (self.layers() - done) as u64, "layers");
        if done == 0 {
            self.embed(&streams.calibration[1], &self.calibration_windows())?;
            let windows = quality::plan(&self.source.files.spec, self.texts.quality.len()).2;
            let quality: Vec<&[u32]> = windows.iter().map(|w| &self.texts.quality[w.inputs.clone()]).collect();
            self.embed(&streams.teacher, &quality)?;
            self.embed(&streams.student, &quality)?;
        }
        let entries = partial
            .built()
            .iter()
            .filter_map(|b| b.moe.as_ref().map(|m| m.entry.clone()))
            .collect();
        let mut writer = ContainerWriter::resume(&partial.out(), entries)?;
        for index in done..self.layers() {
            let layer = self.load_layer(index)?;
            let moe = if layer.is_moe() {
                Some(self.build_moe(&layer, index, streams, decisions, &mut writer)?)
            } else {
                for stream in streams.all_built() {
                    self.step_dense(&layer, stream, index)?;
                }
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

    fn build_moe(
        &self,
        layer: &Layer,
        index: usize,
        streams: &Streams,
        decisions: Option<&Decisions>,
        writer: &mut ContainerWriter,
    ) -> Result<BuiltMoe> {
        let calibration = &streams.calibration[1];
        let (usage, samples) = self.observe(layer, calibration, index)?;
        let view = self.view(layer.id(), &usage, &samples);
        let changes = match decisions {
            Some(decisions) => decided(decisions, layer.id()),
            None => self.undisputed(&usage),
        };
        let plain = self.plain_layer(layer.id())?;
        let coded = self.code(&view, &changes, 1.0)?;
        let gain = self.gain(
            layer,
            &self.student(layer.id(), &coded, &living(&coded)),
            &plain,
            calibration,
            index,
        )?;
        let mut coded = self.code(&view, &changes, gain)?;
        self.measure_prefixes(&view, &mut coded, gain)?;
        let living = living(&coded);
        let student = self.student(layer.id(), &coded, &living);
        let relative_error = self.step_student(layer, &student, Some(&plain), calibration, index)?;
        self.step_student(layer, &student, None, &streams.student, index)?;
        self.step_plain(layer, &plain, &streams.teacher, index)?;

        let new = view
            .experts()
            .into_iter()
            .zip(coded)
            .map(|(expert, kept)| NewExpert {
                why: Why {
                    tokens: usage.experts[expert.index()].tokens,
                    share: usage.share(expert),
                    gate_share: usage.gate_share(expert),
                },
                kept,
            })
            .collect();
        let entry = writer.append_layer(layer.id(), gain, new)?;
        Ok(BuiltMoe {
            entry,
            usage,
            relative_error,
        })
    }

    /// Codes the kept experts of a layer, their down projections times `gain`.
    fn code(&self, view: &LayerView<'_>, changes: &[Change], gain: f32) -> Result<Vec<Option<CodedExpert>>> {
        let group = self.request.recipe.compress.group.get();
        let code = |expert: ExpertId| match changes[expert.index()] {
            Change::Drop => Ok(None),
            Change::Code(code) => {
                code_expert(view, expert, &scaled(view.weights(expert)?, gain), code, group).map(Some)
            }
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

    fn student<'s>(&self, layer: LayerId, coded: &'s [Option<CodedExpert>], living: &'s [bool]) -> Student<'s> {
        Student {
            store: CodedLayer { layer, experts: coded },
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

    fn view<'v>(&'v self, layer: LayerId, usage: &'v Usage, samples: &'v Samples) -> LayerView<'v> {
        LayerView {
            layer,
            spec: &self.source.files.spec,
            source: self.source.files.source.as_ref(),
            usage,
            samples,
        }
    }

    /// How the stream that enters a MoE layer uses its experts, if the router had its way.
    fn observe(&self, layer: &Layer, stream: &Stream, index: usize) -> Result<(Usage, Samples)> {
        let spec = &self.source.files.spec;
        let mut observer = Observer::new(spec.hidden, spec.routing.experts);
        stream.read(index, self.with.cancel, |mut hidden, windows| {
            attend(spec, &self.rope, layer, &mut hidden, windows);
            let normed = layer.mixer_input(&hidden);
            let scores = layer.router_scores(&normed).expect("a MoE layer has a router");
            let routed = route(&RouterScores::new(&scores, &spec.routing)?, Alive::All);
            observer.see(&hidden, &normed, &routed);
            Ok(())
        })?;
        Ok(observer.finish())
    }

    /// One layer's experts in f32: the only ones of the source in memory.
    fn plain_layer(&self, layer: LayerId) -> Result<PlainMoe> {
        let (spec, source) = (&self.source.files.spec, self.source.files.source.as_ref());
        let ids: Vec<ExpertId> = (0..).map(ExpertId).take(spec.routing.experts).collect();
        let load = |expert| Ok(Some(load_expert(spec, source, layer, expert)?));
        let experts: Vec<Option<Mlp>> = ids.into_par_iter().map(load).collect::<Result<_>>()?;
        let shape = MoeShape {
            hidden: spec.hidden,
            rule: spec.routing,
            layers: vec![layer],
        };
        Ok(PlainMoe::from_experts(shape, vec![experts], Absent::Masked))
    }

    fn step_dense(&self, layer: &Layer, stream: &Stream, index: usize) -> Result<()> {
        stream.step(index, self.with.cancel, |hidden, windows| {
            attend(&self.source.files.spec, &self.rope, layer, hidden, windows);
            let normed = layer.mixer_input(hidden);
            layer.add_dense(&normed, hidden);
            Ok(())
        })
    }

    fn step_plain(&self, layer: &Layer, plain: &PlainMoe, stream: &Stream, index: usize) -> Result<()> {
        let spec = &self.source.files.spec;
        stream.step(index, self.with.cancel, |hidden, windows| {
            attend(spec, &self.rope, layer, hidden, windows);
            let normed = layer.mixer_input(hidden);
            let mixed = run_plain(layer, plain, &normed)?;
            add(hidden, &mixed);
            layer.add_dense(&normed, hidden);
            Ok(())
        })
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

    fn score(&self, partial: &mut Partial, streams: &Streams) -> Result<Quality> {
        if let Some(quality) = partial.scored() {
            return Ok(quality.clone());
        }
        let quality = quality::measure(
            &self.ends,
            &self.texts.quality,
            &self.texts.quality_name,
            &streams.teacher,
            &streams.student,
            self.layers(),
            self.with.cancel,
        )?;
        partial.finished(Entry::Scored(quality.clone()))?;
        Ok(quality)
    }

    /// Dense part, copied files, manifest. Repeatable: each file appears whole.
    fn finish_container(&self, partial: &Partial) -> Result<Manifest> {
        self.with.cancel.check()?;
        let out = partial.out();
        let tensors = self.source.files.source.as_ref();
        write_dense(&out.join(DENSE), &self.source.dense, |tensor| {
            self.with.cancel.check()?;
            Ok::<_, CompressError>(tensors.raw(&tensor.name)?.into_owned())
        })?;
        let copied = self.source.copied();
        for name in &copied {
            let bytes = files::read(self.source.files.path.join(name), 1 << 30)?;
            files::write_atomic(out.join(name), &bytes)?;
        }
        let recipe = &self.request.recipe;
        let entries: Vec<_> = partial
            .built()
            .iter()
            .filter_map(|b| b.moe.as_ref().map(|m| m.entry.clone()))
            .collect();
        let little = recipe.compress.little_bits.get();
        let has_little = entries
            .iter()
            .flat_map(|layer: &manifest::Layer| &layer.experts)
            .any(|e| match &e.state {
                State::Kept(record) => {
                    let widths = record.prefixes.iter().map(|p| p.bits);
                    widths.clone().any(|b| b == little) && widths.max() > Some(little)
                }
                State::Dropped => false,
            });
        let head = Head {
            source: self.source.origin.clone(),
            config: self.source.config.clone(),
            recipe: Origin {
                hash: Checksum(recipes::hash(recipe)?),
                seed: recipe.seed,
                calibration: Checksum(files::checksum_file(&self.request.calibration)?),
                calibration_tokens: self.texts.calibration_tokens() as u64,
            },
            little_bits: has_little.then_some(little),
            dropped: recipe.compress.dropped,
            hidden: self.source.files.spec.hidden,
        };
        let writer = ContainerWriter::resume(&out, entries)?;
        let extra: Vec<&str> = copied.into_iter().chain([DENSE]).collect();
        Ok(writer.finish(head, &extra)?)
    }

    fn report(
        &self,
        partial: &Partial,
        manifest: &Manifest,
        quality: Quality,
        mut warnings: Vec<String>,
    ) -> Result<Report> {
        let spec = &self.source.files.spec;
        let built: Vec<&BuiltMoe> = partial.built().into_iter().filter_map(|b| b.moe.as_ref()).collect();
        let layers: Vec<LayerReport> = built.iter().map(|moe| layer_report(moe)).collect();
        let manifest_bytes = manifest.to_bytes().len() as u64;
        let without: usize = built
            .iter()
            .map(|m| m.usage.experts.iter().filter(|e| e.tokens == 0).count())
            .sum();
        if without > 0 {
            warnings.push(format!(
                "{without} experts saw no calibration token: their figures rest on their neighbours'"
            ));
        }
        let counts: Vec<usize> = layers.iter().map(|l| l.experts_kept).collect();
        if counts.windows(2).any(|w| w[0] != w[1]) || counts.iter().any(|&c| c != spec.routing.experts) {
            warnings.push(
                "experts were dropped: other engines demand all of them, this container runs in cotk alone".to_owned(),
            );
        }
        Ok(Report {
            input: self.request.model.display().to_string(),
            output: self.request.out.display().to_string(),
            bytes_before: self.source.bytes,
            bytes_after: manifest.files.values().map(|f| f.bytes).sum::<u64>() + manifest_bytes,
            expert_bytes_before: self.source.origin.expert_bytes,
            expert_bytes_after: manifest.files[EXPERTS].bytes,
            bits_per_expert_weight: bits_per_expert_weight(manifest),
            experts_kept: counts,
            perplexity_before: quality.perplexity_before,
            perplexity_after: quality.perplexity_after,
            kl_nats: quality.kl_nats,
            top1_agreement: quality.top1_agreement,
            quality,
            layers,
            calibration_tokens: self.texts.calibration_tokens(),
            experts_without_tokens: without,
            seed: self.request.recipe.seed,
            recipe_hash: String::from(manifest.recipe.hash),
            seconds: 0.0,
            peak_rss_bytes: 0,
            predicted_decode_ms: self.predict(manifest, &mut warnings)?,
            resumed: false,
            warnings,
        })
    }

    /// One token with every weight in memory: dense weights as the engine holds them (f32), experts at full width.
    #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^53")]
    fn predict(&self, manifest: &Manifest, warnings: &mut Vec<String>) -> Result<Option<f64>> {
        let Some(cost) = self.with.cost else { return Ok(None) };
        let spec = &self.source.files.spec;
        let threads = u32::try_from(self.with.threads).unwrap_or(u32::MAX);
        let mut experts: Vec<(ExpertKey, f64)> = Vec::new();
        for layer in &manifest.layers {
            let kept = layer.experts.iter().filter_map(|e| match &e.state {
                State::Kept(record) => Some((record, e.why.tokens)),
                State::Dropped => None,
            });
            let tokens: u64 = kept.clone().map(|(_, tokens)| tokens).sum();
            let calls = spec.routing.top_k.min(layer.kept()) as f64;
            for (record, used) in kept {
                let format = record.gate.format;
                let key = expert_key(spec.hidden, format.rows(), format.code(), format.group(), threads);
                // Traffic of dropped experts goes to the kept ones, in proportion; each is thought used once more.
                let share = calls * (used + 1) as f64 / (tokens + layer.kept() as u64) as f64;
                match experts.iter_mut().find(|(known, _)| *known == key) {
                    Some((_, count)) => *count += share,
                    None => experts.push((key, share)),
                }
            }
        }
        let positions = PREDICTED_POSITIONS.min(spec.context);
        let step = DecodeStep {
            dense_bytes: 4 * self.source.dense_weights_per_token() + KvCache::bytes_for(spec, positions),
            experts,
            threads,
        };
        match cost.predict(&Work::DecodeStep(step)) {
            Ok(prediction) => Ok(Some(prediction.ms)),
            Err(error) => {
                warnings.push(format!("the time of decoding is not predicted: {error}"));
                Ok(None)
            }
        }
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
        let routed = route(
            &RouterScores::new(&scores, &spec.routing)?,
            alive(self.meaning, self.living),
        );
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

fn living(coded: &[Option<CodedExpert>]) -> Vec<bool> {
    coded.iter().map(Option::is_some).collect()
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

fn run_plain(layer: &Layer, plain: &PlainMoe, normed: &[f32]) -> Result<Vec<f32>> {
    let scores = layer.router_scores(normed).expect("a MoE layer has a router");
    let router = RouterScores::new(&scores, &plain.shape().rule)?;
    let mut mixed = vec![0.0; normed.len()];
    plain.forward(layer.id(), normed, router, Mode::Exact, &mut mixed)?;
    Ok(mixed)
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
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

fn layer_report(moe: &BuiltMoe) -> LayerReport {
    let records = moe.entry.experts.iter().map(|e| match &e.state {
        State::Kept(record) => (record.bytes, 0.0),
        State::Dropped => (0, e.why.share),
    });
    let (bytes, dropped_share) = records.fold((0, 0.0), |(b, s), (bytes, share)| (b + bytes, s + share));
    LayerReport {
        layer: moe.entry.layer.0,
        experts: moe.entry.experts.len(),
        experts_kept: moe.entry.kept(),
        bytes,
        relative_error: moe.relative_error,
        gain: moe.entry.gain,
        dropped_share,
    }
}

/// Codes, scales and zero points over the weights of all experts of the source.
#[expect(clippy::cast_precision_loss, reason = "byte counts are far below 2^53")]
fn bits_per_expert_weight(manifest: &Manifest) -> f64 {
    let bytes: usize = manifest
        .records()
        .flat_map(|(_, _, record)| [&record.gate, &record.up, &record.down])
        .map(|matrix| matrix.format.total_bytes() + 4 * matrix.zero_points.len())
        .sum();
    8.0 * bytes as f64 / manifest.source.expert_weights.max(1) as f64
}
