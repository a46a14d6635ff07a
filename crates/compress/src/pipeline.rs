//! [`compress`]: from a checkpoint to a container, top to bottom. Measure (only if there is something to allocate): the
//! uncompressed model's stream, layer by layer. Build: statistics on the compressed stream, codes, records. Then quality,
//! manifest, report, and the folder gets its name. Each finished step stands in the journal of `OUT.partial/`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use cotk_container::dense::dense_file_bytes;
use cotk_container::layout::aligned_constant_bytes;
use cotk_container::low_rank::{LowRank, Role};
use cotk_container::manifest::{Checksum, DroppedMeaning, REPORT};
use cotk_latency::predict::CostModel;
use cotk_model::layers::Layer;
use cotk_model::layers::rope::Rope;
use cotk_model::model::Model;
use cotk_run::cancel::Cancel;
use cotk_run::facts::FactSink;
use cotk_run::files;
use cotk_run::progress::Progress;
use cotk_run::recipe as recipes;
use cotk_run::seeds::Seeds;
use cotk_runtime::mix::Cpu;
use serde::Serialize;

use crate::build::Wanted;
use crate::choice::{Fate, Form, Kind, LayerFates, Limits, MatrixChoice};
use crate::decide::{self, Measured};
use crate::joint::choose::most_gone;
use crate::joint::code::How;
use crate::joint::offers::matrix_bytes;
use crate::joint::recipe::{Joint, Share};
use crate::partial::{Begun, Entry, Identity, Partial, layer_id, partial_path};
use crate::prune;
use crate::prune::plan::{Pruned, Wish};
use crate::quality;
use crate::recipe::Recipe;
use crate::report::Report;
use crate::source::Source;
use crate::states::Stream;
use crate::text::{self, Texts};
use crate::{CompressError, Result};

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// Hugging Face folder.
    pub model: PathBuf,
    /// Container to make.
    pub out: PathBuf,
    /// The recipe's name, for the ledger.
    pub recipe_name: String,
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
    /// Of `dense.safetensors` and `experts.bin`, at most: what `[budget] bytes` limits.
    pub weight_bytes_after: u64,
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
pub(crate) struct Job<'a> {
    pub(crate) request: &'a Request,
    pub(crate) with: &'a Surroundings<'a>,
    pub(crate) source: Source,
    pub(crate) texts: Texts,
    /// Of the source.
    pub(crate) ends: Model,
    /// Of the container.
    pub(crate) student_ends: Model,
    pub(crate) rope: Rope,
    pub(crate) cpu: Cpu,
}

/// What would be done, without doing it.
///
/// # Errors
/// As [`compress`], as far as it can be known before.
pub fn plan(request: &Request, with: &Surroundings<'_>) -> Result<Plan> {
    let job = Job::open(request, with)?;
    let plan = job.plan()?;
    // Narrower attention is not known yet.
    if request.recipe.compress.attention.is_none() {
        job.check_budget(&plan)?;
    }
    Ok(plan)
}

/// Compresses `request.model` into `request.out`.
///
/// # Errors
/// [`CompressError`]; what is finished then stays in `OUT.partial/`, and the same request goes on from there.
pub fn compress(request: &Request, with: &Surroundings<'_>) -> Result<Report> {
    let clock = Instant::now();
    let mut job = Job::open(request, with)?;
    let plan = job.plan()?;
    if request.recipe.compress.attention.is_none() {
        job.check_budget(&plan)?;
    }
    check_disk(&plan, request)?;
    let mut partial = match Partial::begin(&request.out, &job.identity()?)? {
        Begun::Finished(report) => return Ok(*report),
        Begun::Compared(_) | Begun::Stood(_) => {
            let folder = request.out.clone();
            return Err(CompressError::OutputExists { folder });
        }
        Begun::Working(partial) => *partial,
    };
    let streams = job.streams(&partial);
    job.recover(&mut partial, &streams)?;
    let resumed = partial.is_resumed();
    if job.narrow_attention(&mut partial)?.is_some() {
        job.check_budget(&plan)?;
    }

    if let Some(joint) = &request.recipe.compress.joint {
        let layers = job.fates(&mut partial, &streams, joint)?;
        job.build_fates(&mut partial, &streams, &layers, &How::of(joint))?;
        return job.finish(partial, &streams, plan.warnings, resumed, clock);
    }
    let decisions = if request.recipe.needs_measuring() {
        let measured = job.measure(&mut partial, &streams.calibration)?;
        let top_k = job.source.files.spec.routing.top_k;
        let record_budget = job.record_budget();
        let pruned = job.masks(&mut partial, &measured)?;
        let decisions = decide::decide(
            &request.recipe.compress,
            &measured,
            pruned.as_ref(),
            top_k,
            record_budget,
            job.gone_bytes(),
        )?;
        Some((decisions, job.smaller(&mut partial, &measured, pruned.as_ref())?))
    } else {
        None
    };
    match &decisions {
        Some((decisions, smaller)) => {
            let smaller = smaller.as_ref();
            job.build(&mut partial, &streams, Wanted::Changes { decisions, smaller })?;
        }
        None => job.build(&mut partial, &streams, Wanted::Undisputed)?,
    }
    job.finish(partial, &streams, plan.warnings, resumed, clock)
}

/// The three streams of hidden states: calibration and quality through the compressed model, quality through the source.
pub(crate) struct Streams {
    /// Also that of the first pass, under another name: it begins anew for the second.
    pub(crate) calibration: [Stream; 2],
    pub(crate) teacher: Stream,
    pub(crate) student: Stream,
}

impl Streams {
    /// Those of the second pass.
    pub(crate) fn all_built(&self) -> [&Stream; 3] {
        [&self.calibration[1], &self.teacher, &self.student]
    }
}

impl Job<'_> {
    /// Quality, manifest and report; OUT gets its name.
    fn finish(
        &self,
        mut partial: Partial,
        streams: &Streams,
        warnings: Vec<String>,
        resumed: bool,
        clock: Instant,
    ) -> Result<Report> {
        let quality = self.score(&mut partial, streams)?;
        let manifest = self.finish_container(&partial)?;
        let mut report = self.report(&partial, &manifest, quality, warnings)?;
        report.resumed = resumed;
        report.seconds = clock.elapsed().as_secs_f64();
        report.peak_rss_bytes = files::peak_rss_bytes();
        files::write_atomic(partial.out().join(REPORT), report.markdown().as_bytes())?;
        for fact in report.facts(&self.subject()) {
            self.with.facts.record(fact)?;
        }
        partial.finished(Entry::Finished(Box::new(report.clone())))?;
        partial.publish(&self.request.out)?;
        Ok(report)
    }

    /// What becomes of every expert under `[compress.joint]` and `[budget]`.
    fn fates(&self, partial: &mut Partial, streams: &Streams, joint: &Joint) -> Result<Vec<LayerFates>> {
        let recipe = &self.request.recipe.compress;
        let spec = &self.source.files.spec;
        if let [form] = joint.forms(&recipe.codes)[..] {
            let experts = vec![Fate::uniform(form); spec.routing.experts];
            let of = |layer| LayerFates {
                layer,
                experts: experts.clone(),
            };
            return Ok(self.source.moe_layers().into_iter().map(of).collect());
        }
        let limits = self.limits()?;
        if let (Some(ms), None) = (limits.ms, self.with.cost) {
            return Err(CompressError::Contradiction {
                keys: ["latency.profile", "budget.target_ms"],
                found: format!("no profile and {ms} ms"),
                help: "give --profile, or measure this machine with `cotk profile`",
            });
        }
        let offers = self.offers(partial, streams, joint, &[])?;
        let fates = self.joint_fates(partial, &offers, joint, &limits);
        Ok(fates.map_err(|error| self.whole_budget(error))?.0)
    }

    /// A refusal in bytes of codes, in those of `budget.bytes`.
    fn whole_budget(&self, error: CompressError) -> CompressError {
        let apart = self.apart_bytes();
        match (error, self.request.recipe.budget.bytes, apart) {
            (CompressError::Budget { least, .. }, Some(budget), Ok(apart)) => CompressError::Budget {
                budget,
                least: least + apart,
            },
            (error, ..) => error,
        }
    }

    /// What a byte budget holds beside codes, scales and constants: the dense part, headers of records, and what aligning
    /// sections and records costs at most.
    fn apart_bytes(&self) -> Result<u64> {
        let (spec, recipe) = (&self.source.files.spec, &self.request.recipe);
        let experts = (self.source.moe_layers().len() * spec.routing.experts) as u64;
        let mut aligning = 0;
        let ranks = recipe
            .compress
            .joint
            .as_ref()
            .map_or_else(Vec::new, Joint::stored_ranks);
        for form in recipe.compress.forms() {
            for &rank in [0].iter().chain(&ranks) {
                let own = matrices_bytes(form, rank, spec.hidden, spec.moe_intermediate)?;
                let fate = Fate::Coded {
                    matrices: [MatrixChoice { form, rank }; 3],
                    channels: None,
                };
                let record = fate.coded_bytes(spec.hidden, spec.moe_intermediate)?;
                aligning = record.saturating_sub(own).max(aligning);
            }
        }
        Ok(dense_file_bytes(&self.source.dense) + experts * aligning)
    }

    /// What `[budget]` leaves for the experts' codes.
    pub(crate) fn limits(&self) -> Result<Limits> {
        let recipe = &self.request.recipe;
        let mut record_bytes = None;
        if let Some(bytes) = recipe.budget.bytes {
            record_bytes = Some(bytes.saturating_sub(self.apart_bytes()?));
        }
        if let Some(bits) = recipe.budget.bits_per_expert_weight {
            #[expect(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "byte counts are far below 2^53"
            )]
            let bytes = (bits.get() / 8.0 * self.source.origin.expert_weights as f64).floor() as u64;
            record_bytes = Some(bytes);
        }
        Ok(Limits {
            record_bytes,
            ms: recipe.budget.target_ms.map(Share::get),
        })
    }
}

impl<'a> Job<'a> {
    pub(crate) fn open(request: &'a Request, with: &'a Surroundings<'a>) -> Result<Self> {
        let source = Source::open(&request.model, request.recipe.compress.dense_bits)?;
        let spec = &source.files.spec;
        if let Some(joint) = &request.recipe.compress.joint {
            joint.check_sizes(spec.hidden, spec.moe_intermediate)?;
        }
        let texts = text::draw(
            &source.files.tokenizer,
            &request.calibration,
            request.eval_text.as_deref(),
            spec.context,
            &request.recipe.compress,
            Seeds::new(request.recipe.seed),
        )?;
        Ok(Self {
            ends: quality::ends(&source.files.spec, source.files.source.as_ref())?,
            student_ends: quality::ends(&source.files.spec, source.student.as_ref())?,
            rope: Rope::new(&spec.attention.rope),
            cpu: Cpu::selected().map_err(cotk_runtime::Error::from)?,
            request,
            with,
            source,
            texts,
        })
    }

    pub(crate) fn layers(&self) -> usize {
        self.source.files.spec.layers.len()
    }

    /// The subject of every fact: `compress:moe-int4:ref-qwen2moe`.
    fn subject(&self) -> String {
        // `models/ref/..` and `.` have names too.
        let model = &self.request.model;
        let whole = std::fs::canonicalize(model).unwrap_or_else(|_| model.clone());
        let name = whole.file_name().unwrap_or_default();
        format!("compress:{}:{}", self.request.recipe_name, name.to_string_lossy())
    }

    fn identity(&self) -> Result<Identity> {
        self.identity_with(&[])
    }

    /// With what else decides.
    pub(crate) fn identity_with(&self, more: &[u8]) -> Result<Identity> {
        let text = |path: &PathBuf| files::checksum_file(path);
        let mut inputs = self.source.origin.hash.0.to_le_bytes().to_vec();
        inputs.extend(text(&self.request.calibration)?.to_le_bytes());
        if let Some(path) = &self.request.eval_text {
            inputs.extend(text(path)?.to_le_bytes());
        }
        inputs.extend(more);
        Ok(Identity {
            recipe: Checksum(recipes::hash(&self.request.recipe)?),
            inputs: Checksum(files::checksum(&inputs)),
        })
    }

    fn plan(&self) -> Result<Plan> {
        let (spec, recipe) = (&self.source.files.spec, &self.request.recipe);
        let layers = self.source.moe_layers().len();
        let (experts, top_k) = (spec.routing.experts, spec.routing.top_k);
        let dropped = match &recipe.compress.prune {
            Some(prune) => prune::plan::total(prune.ratio.get(), layers, experts, top_k, prune.spread),
            None => recipe.compress.drop_ratio.count(experts, top_k) * layers,
        };
        let kept = (layers * spec.routing.experts - dropped) as u64;
        let widest = self.form_bytes()?.into_iter().max();
        let gone = dropped as u64 * self.gone_bytes();
        let most = dense_file_bytes(&self.source.dense) + kept * widest.unwrap_or(0) + gone;
        let weight_bytes_after = recipe.budget.bytes.map_or(most, |budget| budget.min(most));
        let quality = quality::plan(spec, self.texts.quality.len()).2;
        let quality_rows: usize = quality.iter().map(|w| w.inputs.len()).sum();
        let rows = self.texts.calibration_tokens() + 2 * quality_rows;
        // States before and after one layer, for each stream.
        let states = 2 * (rows * spec.hidden * 4) as u64;
        // Copied files and manifest: a few MiB.
        let needed = weight_bytes_after + states + (16 << 20);
        // A layer's experts in f32 and coded, embedding and head in f32, logits and batches.
        let layer = 3 * (spec.hidden * spec.moe_intermediate * spec.routing.experts) as u64;
        let memory =
            layer * 6 + 2 * (spec.vocab * spec.hidden * 4) as u64 + (2 * 512 * spec.vocab * 4) as u64 + (64 << 20);
        let mut warnings = self.texts.warnings.clone();
        let ratio = recipe.compress.drop_ratio;
        warnings.extend(ratio.not_as_asked(spec.routing.experts, spec.routing.top_k));
        if recipe.compress.codes.get().len() > 1 && recipe.budget.is_open() {
            warnings.push("several codes and no budget: every expert gets the one that loses least".to_owned());
        }
        if self.with.cost.is_none() {
            warnings.push("no profile of this machine: the time of decoding is not predicted".to_owned());
        }
        Ok(Plan {
            bytes_before: self.source.bytes,
            weight_bytes_after,
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

    /// What `[compress.prune]` drops; `None`: the recipe drops by use, or nothing.
    fn masks(&self, partial: &mut Partial, measured: &[Measured]) -> Result<Option<Pruned>> {
        let recipe = &self.request.recipe;
        let Some(prune) = &recipe.compress.prune else {
            return Ok(None);
        };
        if let Some(pruned) = partial.pruned() {
            return Ok(Some(pruned.clone()));
        }
        let wish = Wish::of(prune, recipe.compress.semantics(), recipe.seed);
        let pruned = self.prune(partial, measured, &wish)?;
        partial.finished(Entry::Pruned(Box::new(pruned.clone())))?;
        Ok(Some(pruned))
    }

    /// What the budget leaves for records.
    pub(crate) fn record_budget(&self) -> Option<u64> {
        let budget = self.request.recipe.budget.bytes?;
        Some(budget.saturating_sub(dense_file_bytes(&self.source.dense)))
    }

    /// Bytes of an expert's record in each form of the recipe.
    fn form_bytes(&self) -> Result<Vec<u64>> {
        let (spec, recipe) = (&self.source.files.spec, &self.request.recipe.compress);
        let bytes = |form| Ok(Fate::uniform(form).coded_bytes(spec.hidden, spec.moe_intermediate)?);
        recipe.forms().into_iter().map(bytes).collect()
    }

    /// What stands in the place of an expert that is dropped.
    fn gone_bytes(&self) -> u64 {
        match self.request.recipe.compress.dropped {
            DroppedMeaning::Novice => aligned_constant_bytes(self.source.files.spec.hidden),
            DroppedMeaning::Masked | DroppedMeaning::Removed => 0,
        }
    }

    /// Whether the narrowest codes would fit: known before anything is read, once the dense part is. What experts that may
    /// go, or become smaller, take is the allocation's to say.
    fn check_budget(&self, plan: &Plan) -> Result<()> {
        let Some(budget) = self.request.recipe.budget.bytes else {
            return Ok(());
        };
        let dense = dense_file_bytes(&self.source.dense);
        let (needed, least) = match &self.request.recipe.compress.joint {
            Some(joint) if joint.max_dropped.get() > 0.0 || !joint.channels.is_empty() => {
                (dense, self.smallest_bytes(joint)?)
            }
            _ => {
                let narrowest = self.form_bytes()?.into_iter().min();
                let kept = (plan.experts - plan.experts_dropped) as u64;
                let gone = plan.experts_dropped as u64 * self.gone_bytes();
                let all = dense + kept * narrowest.unwrap_or(0) + gone;
                (all, all)
            }
        };
        if needed > budget {
            return Err(CompressError::Budget { budget, least });
        }
        Ok(())
    }

    /// The smallest budget that the joint allocation meets: as many experts gone as may go, the others as small as they get.
    fn smallest_bytes(&self, joint: &Joint) -> Result<u64> {
        let (spec, recipe) = (&self.source.files.spec, &self.request.recipe.compress);
        let layers = self.source.moe_layers().len() as u64;
        let inner = joint.inner_sizes(spec.moe_intermediate).into_iter().min();
        let inner = inner.unwrap_or(spec.moe_intermediate);
        let mut kept_bytes = u64::MAX;
        for form in recipe.forms() {
            kept_bytes = matrices_bytes(form, 0, spec.hidden, inner)?.min(kept_bytes);
        }
        let gone = most_gone(joint.max_dropped.get(), spec.routing.experts, spec.routing.top_k) as u64;
        let kept = spec.routing.experts as u64 - gone;
        let gone_bytes = self.gone_bytes().min(kept_bytes);
        Ok(self.apart_bytes()? + layers * (kept * kept_bytes + gone * gone_bytes))
    }

    pub(crate) fn streams(&self, partial: &Partial) -> Streams {
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
    pub(crate) fn recover(&self, partial: &mut Partial, streams: &Streams) -> Result<()> {
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
        let surveys_are_whole = partial.pruned().is_some()
            || partial.measured().iter().filter_map(|m| m.found.as_ref()).all(|found| {
                found
                    .prune
                    .as_ref()
                    .is_none_or(|s| Self::survey_is_whole(partial, found.layer, s))
            });
        let measured_is_whole = partial.measured().last().is_none_or(|last| {
            last.layer + 1 == self.layers() || is_whole(&streams.calibration[0], last.layer + 1, last.states)
        });
        let is_kept = |path: PathBuf, expected: Checksum| {
            files::checksum_file(&path).is_ok_and(|found| Checksum(found) == expected)
        };
        let attention_is_whole = partial
            .attention()
            .is_none_or(|found| is_kept(Self::attention_path(partial), found.file));
        let fitted = partial.built().into_iter().filter_map(|built| built.moe.as_ref());
        let routers_are_whole = fitted
            .filter_map(|moe| Some((moe.entry.layer.0, moe.router?)))
            .all(|(layer, expected)| is_kept(Self::router_path(partial, layer), expected));
        let kept_is_whole = attention_is_whole && routers_are_whole;
        if !(built_is_whole && measured_is_whole && surveys_are_whole && kept_is_whole) {
            self.with
                .progress
                .note("the unfinished output lost what its journal promises: beginning anew");
            partial.restart()?;
        }
        Ok(())
    }

    /// Begins a stream of the source.
    pub(crate) fn embed(&self, stream: &Stream, windows: &[&[u32]]) -> Result<()> {
        stream.begin(windows, |tokens| Ok(self.ends.embed(tokens)?))
    }

    /// Begins a stream of the compressed model.
    pub(crate) fn embed_student(&self, stream: &Stream, windows: &[&[u32]]) -> Result<()> {
        stream.begin(windows, |tokens| Ok(self.student_ends.embed(tokens)?))
    }

    pub(crate) fn calibration_windows(&self) -> Vec<&[u32]> {
        self.texts.calibration.iter().map(Vec::as_slice).collect()
    }

    /// The dense part of a layer of the source.
    pub(crate) fn load_layer(&self, layer: usize) -> Result<Layer> {
        // What earlier layers were read from leaves memory: a model may be larger than that.
        self.source.files.source.release();
        let spec = &self.source.files.spec;
        Ok(Layer::load(spec, self.source.files.source.as_ref(), layer_id(layer))?)
    }

    /// The same as the container will hold it.
    pub(crate) fn load_student_layer(&self, layer: usize) -> Result<Layer> {
        self.source.files.source.release();
        let spec = &self.source.student_spec;
        Ok(Layer::load(spec, self.source.student.as_ref(), layer_id(layer))?)
    }
}

/// Codes, scales and zero points of an expert's three matrices, each with a correction of this rank.
fn matrices_bytes(form: Form, rank: usize, hidden: usize, inner: usize) -> Result<u64> {
    let mut own = 0;
    for kind in Kind::ALL {
        let (rows, cols) = kind.shape(hidden, inner);
        own += matrix_bytes(&form.format(rows, cols)?);
        if rank > 0 {
            own += LowRank::try_new(Role::Correction, rows, cols, rank)?.bytes();
        }
    }
    Ok(own)
}

/// Said before anything is written, with both numbers; what an unfinished output holds already counts as free.
pub(crate) fn check_disk(plan: &Plan, request: &Request) -> Result<()> {
    let have = plan
        .disk_bytes_free
        .saturating_add(bytes_below(&partial_path(&request.out)));
    if plan.disk_bytes_needed > have {
        return Err(CompressError::DiskSpace {
            folder: request.out.parent().unwrap_or(&request.out).to_owned(),
            need: plan.disk_bytes_needed,
            have,
        });
    }
    Ok(())
}

/// Of all files in a folder; 0 where there is none.
fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    let bytes = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => bytes_below(&entry.path()),
        Ok(found) => found.len(),
        Err(_) => 0,
    };
    entries.flatten().map(bytes).sum()
}
