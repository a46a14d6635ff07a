//! `cotk bench`: tokens per second of a model on this machine, in the manner of llama-bench, with what bounds them beside.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use cotk_container::manifest::DENSE;
use cotk_container::reader::Container;
use cotk_latency::work::Tier;
use cotk_model::ModelError;
use cotk_model::checkpoint::TensorSource;
use cotk_model::inventory;
use cotk_model::layers::cache::KvKind;
use cotk_model::layers::clock::Part;
use cotk_model::model::{Logits, Model, Sequence, Workspace};
use cotk_model::moe::{Mode, MoeRuntime};
use cotk_model::spec::ModelSpec;
use cotk_run::files;
use cotk_run::progress::Progress;
use cotk_run::units::{Bytes, ExpertId, LayerId, significant};
use cotk_runtime::coded_dense::{CodedDense, stored_bytes};
use cotk_runtime::in_memory::{InMemory, Routing};
use cotk_runtime::open::{Folder, open_folder};
use cotk_runtime::resident::Resident;
use cotk_runtime::synthetic::{self, DENSE_BITS, Experts, Source};
use cotk_runtime::throughput::machine::{self, Held, last_level_cache_bytes};
use cotk_runtime::throughput::{DISTURBED, Report, Row, Settings, Subject, Work, check_memory, measure, scratch_bytes};
use serde_json::{Value, json};

use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::predictor;
use crate::table::Table;

/// Measure prefill and decode of a model in tokens per second
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk bench out --threads 1,2\n  cotk bench --synthetic olmoe-1b-7b --bits 4 --prompt 512 --generate 128 --batch 1,4\n\n\
    ppN is a prompt of N tokens, tgN are N steps of each sequence of a batch. Token ids are drawn; a synthetic model's\n\
    experts are drawn anew for each token. Weights are all that a pass reads, each once, the dense part and the head\n\
    included; `of read` compares them with the read bandwidth, measured between the samples. Samples during which\n\
    other processes used more than 5 % of the machine are dropped and counted.\n\n\
    Of a container, memory is shown after a prompt and a look at every expert, before anything is measured: measuring\n\
    takes 256 MiB more. COTK_ISA=scalar|avx2|avx512vnni takes a lower path than the CPU has."
)]
pub struct Args {
    #[command(flatten)]
    pub subject: SubjectArgs,
    /// Another depth of the synthetic model, for machines that cannot hold it
    #[arg(long, value_name = "N", requires = "synthetic")]
    pub layers: Option<usize>,
    /// Width of the experts: 2, 3, 4 or 8 (default: 8; a container runs as it is)
    #[arg(long, value_name = "N")]
    pub bits: Option<u32>,
    /// Tokens of the prompts; 0: none
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [128, 512])]
    pub prompt: Vec<usize>,
    /// Steps to decode; 0: none
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub generate: usize,
    /// Sequences that are decoded at once
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1])]
    pub batch: Vec<usize>,
    /// Threads to compute with, each in turn (default: all cores)
    #[arg(id = "threads", long, value_name = "N,…", value_delimiter = ',')]
    pub threads: Vec<usize>,
    /// How keys and values are held: f32, f16 or int8 (a scale per head and position)
    #[arg(long, default_value_t = KvKind::default(), value_name = "KIND")]
    pub kv_cache: KvKind,
    /// Undisturbed samples of each row
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub repeats: usize,
    /// Count disturbed samples like any other: what a busy machine gives
    #[arg(long)]
    pub keep_disturbed: bool,
}

/// What is measured.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct SubjectArgs {
    /// Hugging Face folder (coded on the way, all but its experts in 8 bits), or output of `cotk compress`
    pub model: Option<PathBuf>,
    /// Random weights of a real model's shape, made in memory: olmoe-1b-7b, qwen1.5-moe-a2.7b, qwen3-30b-a3b,
    /// ref-qwen2moe
    #[arg(long, value_name = "NAME")]
    pub synthetic: Option<String>,
}

/// A model that is ready, and what its weights weigh.
struct Ready {
    name: String,
    /// Of the experts; `None`: of several widths.
    bits: Option<u32>,
    model: Model,
    expert_bytes: Box<dyn Fn(LayerId, ExpertId) -> u64 + Sync>,
    /// Of the dense matrices that a token reads.
    dense_bytes: u64,
    is_synthetic: bool,
    /// Where its experts are, if they are in one.
    container: Option<Arc<Container>>,
}

/// # Errors
/// Arguments that cannot be right; a model that does not open or does not fit; Ctrl-C.
pub fn run(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    let settings = settings(args, cx)?;
    let begin = Instant::now();
    let mut ready = match (&args.subject.model, &args.subject.synthetic) {
        (_, Some(name)) => synthetic(name, args, &settings, cx)?,
        (Some(path), None) => from_folder(path, args, &settings, cx)?,
        (None, None) => unreachable!("clap asks for one of them"),
    };
    let load_s = begin.elapsed().as_secs_f64();
    ready.model = ready.model.with_kv(args.kv_cache);
    first_token(&ready.model)?;
    // Of what is made in memory the making would be timed.
    let opening = (!ready.is_synthetic).then(|| Opening {
        load_s,
        first_token_s: begin.elapsed().as_secs_f64(),
        peak_rss_bytes: files::peak_rss_bytes(),
    });
    let whole = ready
        .container
        .as_deref()
        .map(|container| whole(&ready.model, container));
    let whole = whole.transpose()?;
    let subject = Subject {
        model: &ready.model,
        expert_bytes: ready.expert_bytes.as_ref(),
        dense_bytes: ready.dense_bytes,
    };
    let report = measure(&subject, &settings, &cx.ui, &cx.cancel)?;
    let mut warnings = warnings(&ready, &report);
    let profile = match predictor::find(cx, None) {
        Ok(found) => found,
        Err(fault) if cx.profile.is_some() => return Err(fault),
        Err(fault) => {
            warnings.push(format!("no bandwidth of a profile: {fault}"));
            None
        }
    };
    let profiled = |threads: usize| -> Option<f64> {
        let threads = u32::try_from(threads).ok()?;
        let rate = profile.as_ref()?.model.bytes_per_s(Tier::Memory, threads).ok()?;
        Some(rate / 1e9)
    };
    let rows: Vec<Value> = report
        .rows
        .iter()
        .map(|row| to_json(&ready, row, profiled(row.threads)))
        .collect();
    let peak = files::peak_rss_bytes();
    let result = json!({
        "rows": rows,
        "distinct_expert_bytes_per_100_tokens": report.distinct_expert_bytes_per_100_tokens,
        "dense_bytes_per_token": subject.dense_bytes,
        "kv_cache": args.kv_cache.name(),
        "load_s": opening.as_ref().map(|o| o.load_s),
        "first_token_s": opening.as_ref().map(|o| o.first_token_s),
        "first_token_peak_rss_bytes": opening.as_ref().map(|o| o.peak_rss_bytes),
        "whole_weight_bytes": whole.as_ref().map(|w| w.weight_bytes),
        "whole_peak_rss_bytes": whole.as_ref().map(|w| w.peak_rss_bytes),
        "whole_own_bytes": whole.as_ref().and_then(|w| Some(w.held?.own_bytes)),
        "whole_mapped_bytes": whole.as_ref().and_then(|w| Some(w.held?.mapped_bytes)),
        "peak_rss_bytes": peak,
    });
    let mut text = table(&report.rows);
    if let Some(bytes) = report.distinct_expert_bytes_per_100_tokens {
        text += &format!("distinct expert bytes per 100 tokens: {}; ", Bytes(bytes));
    }
    text += &format!("peak memory: {}\n", Bytes(peak));
    if let Some(opening) = &opening {
        text += &format!(
            "loaded in {} s, first token after {} s in all, with {} of memory\n",
            significant(opening.load_s, 2),
            significant(opening.first_token_s, 2),
            Bytes(opening.peak_rss_bytes)
        );
    }
    if let Some(whole) = &whole {
        text += &whole.line();
    }
    let mut of_profile: Vec<(usize, f64)> = settings
        .threads
        .iter()
        .filter_map(|&t| Some((t, profiled(t)?)))
        .collect();
    of_profile.dedup();
    for (threads, rate) in of_profile {
        text += &format!(
            "read bandwidth of the profile, {threads} threads: {} GB/s\n",
            significant(rate, 3)
        );
    }
    Ok(Outcome::new(result, text).warn(warnings))
}

/// What came before the first row.
struct Opening {
    load_s: f64,
    /// From the first file on, to the logits of the first token.
    first_token_s: f64,
    peak_rss_bytes: u64,
}

/// Memory after everything was used once: a prompt, and every expert of a container.
struct Whole {
    /// Of all experts and the dense part, as stored.
    weight_bytes: u64,
    /// The most so far, whatever it was.
    peak_rss_bytes: u64,
    held: Option<Held>,
}

/// Tokens of the prompt that is computed before memory is looked at.
const WHOLE_PROMPT: usize = 512;

fn whole(model: &Model, container: &Container) -> Result<Whole, Fault> {
    let spec = model.spec();
    let tokens: Vec<u32> = (0..WHOLE_PROMPT.min(spec.context))
        .map(|at| u32::try_from(at % spec.vocab).expect("vocabularies fit 32 bits"))
        .collect();
    let mut cache = model.new_cache();
    let mut sequences = [Sequence {
        tokens: &tokens,
        cache: &mut cache,
    }];
    model.step(&mut sequences, Mode::Exact, Logits::Last, &mut Workspace::default())?;
    // Experts that no token was sent to: every byte of them is held to its checksum.
    for (layer, expert, _) in container.manifest().records() {
        container
            .expert(layer, expert, u32::MAX)
            .map_err(cotk_runtime::Error::from)?;
    }
    let dense = container.manifest().files.get(DENSE).map_or(0, |file| file.bytes);
    Ok(Whole {
        weight_bytes: container.manifest().record_bytes() + dense,
        peak_rss_bytes: files::peak_rss_bytes(),
        held: machine::held(),
    })
}

impl Whole {
    #[expect(clippy::cast_precision_loss, reason = "a ratio of two sizes")]
    fn line(&self) -> String {
        let of = self.peak_rss_bytes as f64 / self.weight_bytes.max(1) as f64;
        let parts = self.held.map_or_else(String::new, |held| {
            format!(
                ", now {} of its own and {} mapped from the page cache",
                Bytes(held.own_bytes),
                Bytes(held.mapped_bytes)
            )
        });
        format!(
            "after {WHOLE_PROMPT} tokens and a look at every expert: peak memory {}, {} times the {} of weights{parts}\n",
            Bytes(self.peak_rss_bytes),
            significant(of, 3),
            Bytes(self.weight_bytes)
        )
    }
}

/// One token of an empty sequence.
fn first_token(model: &Model) -> Result<(), Fault> {
    let mut cache = model.new_cache();
    let mut sequences = [Sequence {
        tokens: &[0],
        cache: &mut cache,
    }];
    model.step(&mut sequences, Mode::Exact, Logits::Last, &mut Workspace::default())?;
    Ok(())
}

/// What was typed as what is meant.
fn settings(args: &Args, cx: &Context) -> Result<Settings, Fault> {
    let bounded = |what: &str, values: &[usize], range: std::ops::RangeInclusive<usize>| match values
        .iter()
        .find(|value| !range.contains(value))
    {
        None => Ok(()),
        Some(value) => Err(Fault::usage(
            format!("--{what} {value}: expected {} to {}", range.start(), range.end()),
            "see `cotk bench --help`",
        )),
    };
    bounded("prompt", &args.prompt, 0..=1 << 20)?;
    bounded("generate", &[args.generate], 0..=1 << 20)?;
    bounded("batch", &args.batch, 1..=1024)?;
    bounded("threads", &args.threads, 1..=1024)?;
    bounded("layers", args.layers.as_slice(), 1..=4096)?;
    bounded("repeats", &[args.repeats], 1..=1000)?;
    if let Some(bits) = args.bits
        && ![2, 3, 4, 8].contains(&bits)
    {
        return Err(Fault::usage(
            format!("--bits {bits}: expected 2, 3, 4 or 8"),
            "see `cotk bench --help`",
        ));
    }
    let prompts = args.prompt.iter().filter(|&&tokens| tokens > 0);
    let mut work: Vec<Work> = prompts.map(|&tokens| Work::Prefill { tokens }).collect();
    if args.generate > 0 {
        work.extend(args.batch.iter().map(|&batch| Work::Decode {
            batch,
            steps: args.generate,
        }));
    }
    if work.is_empty() {
        return Err(Fault::usage(
            "--prompt 0 and --generate 0 leave nothing to measure",
            "leave one of them out",
        ));
    }
    Ok(Settings {
        work,
        threads: if args.threads.is_empty() {
            vec![cx.threads]
        } else {
            args.threads.clone()
        },
        repeats: args.repeats,
        keep_disturbed: args.keep_disturbed,
        seed: cx.seed.unwrap_or(0),
    })
}

/// As it was typed, and as it is meant.
type Asked<'a> = (&'a Args, &'a Settings);

/// Says what memory will be needed, and refuses more than there is.
fn announce(
    what: &str,
    weights: u64,
    spec: &ModelSpec,
    (args, settings): Asked<'_>,
    cx: &Context,
) -> Result<(), Fault> {
    let needed = weights + scratch_bytes(spec, args.kv_cache, &settings.work);
    cx.ui.note(&format!("{what}: about {} of memory", Bytes(needed)));
    Ok(check_memory(what, needed)?)
}

/// Bytes of all experts in plain codes of groups of 32.
fn coded_bytes(spec: &ModelSpec, bits: u32) -> u64 {
    let experts = (spec.moe_layers().len() * spec.routing.experts) as u64;
    // A scale of 16 bits for each 32 weights.
    experts * inventory::expert_params(spec) * u64::from(2 * bits + 1) / 16
}

fn synthetic(name: &str, args: &Args, settings: &Settings, cx: &Context) -> Result<Ready, Fault> {
    let bits = args.bits.unwrap_or(8);
    let spec = synthetic::spec(name, args.layers)?;
    let name = match args.layers {
        None => name.to_owned(),
        Some(layers) => format!("{name}, {layers} layers"),
    };
    let source = Source::new(&spec, settings.seed);
    let (dense, dense_bytes) = stored_bytes(&spec, &source);
    announce(&name, coded_bytes(&spec, bits) + dense, &spec, (args, settings), cx)?;
    let experts = synthetic::experts(&spec, Experts::plain(bits), settings.seed)?;
    let routing = Routing::drawn(settings.seed, experts.len());
    let held = Arc::new(InMemory::new(&spec, experts, bits, routing)?);
    Ok(Ready {
        name,
        bits: Some(bits),
        model: Model::load(spec, &source, held.clone()).map_err(ModelError::from)?,
        expert_bytes: Box::new(move |layer, expert| held.expert_bytes(layer, expert)),
        dense_bytes,
        is_synthetic: true,
        container: None,
    })
}

fn from_folder(path: &Path, args: &Args, settings: &Settings, cx: &Context) -> Result<Ready, Fault> {
    let Folder { files, container } = open_folder(path)?;
    let spec = &files.spec;
    let name = path
        .file_name()
        .map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
    match container {
        Some(container) => {
            if let Some(bits) = args.bits {
                return Err(Fault::usage(
                    format!("--bits {bits}: a container runs at the width it was compressed to"),
                    "leave it out, or give the Hugging Face folder it was made from",
                ));
            }
            let (dense, _) = stored_bytes(spec, files.source.as_ref());
            announce(
                &name,
                container.manifest().record_bytes() + dense,
                spec,
                (args, settings),
                cx,
            )?;
            let mut bits = Vec::new();
            let mut bytes = HashMap::new();
            for (layer, expert, record) in container.manifest().records() {
                bits.extend(record.formats().map(|format| format.code().full().get()));
                bytes.insert((layer, expert), record.bytes);
            }
            bits.sort_unstable();
            bits.dedup();
            let runtime = Arc::new(Resident::new(container.clone(), spec)?);
            let of = move |layer, expert| bytes.get(&(layer, expert)).copied().unwrap_or(0);
            let only = if bits.len() == 1 { bits.pop() } else { None };
            let made = ready(name, only, spec, files.source.as_ref(), runtime, Box::new(of))?;
            Ok(Ready {
                container: Some(container),
                ..made
            })
        }
        None => {
            let bits = args.bits.unwrap_or(8);
            // The dense part is counted as if it stayed as it is stored: coding makes it smaller.
            let (dense, _) = stored_bytes(spec, files.source.as_ref());
            announce(&name, coded_bytes(spec, bits) + dense, spec, (args, settings), cx)?;
            let held = Arc::new(InMemory::coded(spec, files.source.as_ref(), bits, &cx.ui, &cx.cancel)?);
            let source = CodedDense::new(spec, files.source.clone(), DENSE_BITS, &cx.ui, &cx.cancel)?;
            let of = held.clone();
            let of = move |layer, expert| of.expert_bytes(layer, expert);
            ready(name, Some(bits), spec, &source, held, Box::new(of))
        }
    }
}

fn ready(
    name: String,
    bits: Option<u32>,
    spec: &ModelSpec,
    source: &dyn TensorSource,
    runtime: Arc<dyn MoeRuntime>,
    expert_bytes: Box<dyn Fn(LayerId, ExpertId) -> u64 + Sync>,
) -> Result<Ready, Fault> {
    Ok(Ready {
        name,
        bits,
        model: Model::load(spec.clone(), source, runtime).map_err(ModelError::from)?,
        expert_bytes,
        dense_bytes: stored_bytes(spec, source).1,
        is_synthetic: false,
        container: None,
    })
}

fn warnings(ready: &Ready, report: &Report) -> Vec<String> {
    let mut warnings = Vec::new();
    if let (true, Some(bytes), Some(cache)) = (
        ready.is_synthetic,
        report.distinct_expert_bytes_per_100_tokens,
        last_level_cache_bytes(),
    ) && bytes < 20 * cache
    {
        warnings.push(format!(
            "100 tokens read {} of distinct experts, less than 20 times the last-level cache of {}: a part comes from there",
            Bytes(bytes),
            Bytes(cache)
        ));
    }
    for row in report.rows.iter().filter(|row| !row.is_quiet) {
        warnings.push(format!(
            "{} of {} threads: other processes used up to {} % of the machine in every sample",
            row.work.name(),
            row.threads,
            significant(100.0 * row.others, 2)
        ));
    }
    warnings
}

fn batch_prompt_generate(work: Work) -> (usize, usize, usize) {
    match work {
        Work::Prefill { tokens } => (1, tokens, 0),
        Work::Decode { batch, steps } => (batch, 0, steps),
    }
}

fn to_json(ready: &Ready, row: &Row, profiled_gb_per_s: Option<f64>) -> Value {
    let (batch, prompt, generate) = batch_prompt_generate(row.work);
    let parts: serde_json::Map<String, Value> = Part::ALL
        .iter()
        .zip(row.shares)
        .map(|(part, share)| (part.name().to_owned(), (100.0 * share).into()))
        .collect();
    json!({
        "name": row.work.name(),
        "model": ready.name,
        "bits": ready.bits,
        "batch": batch,
        "threads": row.threads,
        "prompt": prompt,
        "generate": generate,
        "tokens_per_s": row.tokens_per_s,
        "tokens_per_s_spread": row.spread,
        "weight_bytes_per_pass": row.weight_bytes_per_pass,
        "weight_gb_per_s": row.weight_gb_per_s,
        "bandwidth_gb_per_s": row.bandwidth_gb_per_s,
        "pct_of_bandwidth": row.pct_of_bandwidth(),
        "profile_bandwidth_gb_per_s": profiled_gb_per_s,
        "pct_of_profile_bandwidth": profiled_gb_per_s.map(|rate| 100.0 * row.weight_gb_per_s / rate),
        "gops": row.gops,
        "peak_gops": row.peak_gops,
        "pct_of_peak": 100.0 * row.gops / row.peak_gops,
        "distinct_experts": row.distinct_experts,
        "parts_pct": parts,
        "involuntary_switches": row.involuntary_switches,
        "repeats": row.repeats,
        "dropped": row.dropped,
        "others_pct": 100.0 * row.others,
        "is_quiet": row.is_quiet,
    })
}

fn table(rows: &[Row]) -> String {
    let mut table = Table::new(&[
        "test",
        "batch",
        "threads",
        "tokens/s",
        "±",
        "GB/s",
        "of read",
        "read",
        "GOPS",
        "of peak",
        "experts",
        "dense",
        "attention",
        "in experts",
        "head",
        "other",
        "n",
    ]);
    for row in rows {
        let pct = |share: f64| format!("{} %", significant(100.0 * share, 2));
        let count = match row.dropped {
            0 => row.repeats.to_string(),
            dropped => format!("{}-{dropped}", row.repeats),
        };
        let mut cells = vec![
            row.work.name(),
            batch_prompt_generate(row.work).0.to_string(),
            row.threads.to_string(),
            significant(row.tokens_per_s, 3),
            significant(row.spread, 2),
            significant(row.weight_gb_per_s, 3),
            pct(row.pct_of_bandwidth() / 100.0),
            significant(row.bandwidth_gb_per_s, 3),
            significant(row.gops, 3),
            pct(row.gops / row.peak_gops),
            significant(row.distinct_experts, 3),
        ];
        cells.extend(row.shares.map(pct));
        cells.push(count);
        table.row(cells);
    }
    format!(
        "{}± median absolute deviation; GB/s: weights, read: the bandwidth beside them; experts: distinct ones\n\
        of a layer and pass; dense to other: shares of the time (attention: keys and values, its projections are\n\
        dense); n: samples, and after the minus those dropped because others used more than {:.0} % of the machine\n",
        table.render(),
        100.0 * DISTURBED
    )
}
