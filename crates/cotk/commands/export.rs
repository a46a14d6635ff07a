//! `cotk export`: a model in the files of llama.cpp or transformers. What they cannot carry is refused with the reason.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use cotk_kernels::cpu::noise::NoiseExpert;
use cotk_model::export::gguf::GgufOptions;
use cotk_model::export::hf::{HfOptions, HfType};
use cotk_model::export::{ExportError, Exported, Made, Projected, gguf, hf};
use cotk_run::units::{Bytes, ExpertId, LayerId, significant};
use cotk_runtime::open::{Folder, open_folder};
use cotk_runtime::synthetic::{self, Experts, Source};
use cotk_runtime::synthetic_container;
use serde_json::json;

use crate::context::{Context, Outcome};
use crate::fault::{FAILED, Fault, Report, WRONG_USE};
use crate::model_faults;
use crate::table::Table;

/// Write a model as GGUF (for llama.cpp) or as a Hugging Face folder (for transformers)
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk export ../shared/models/ref-qwen2moe --gguf model.gguf --bits 8\n  cotk export out --gguf out.gguf --project\n  cotk export out --hf out-hf --dtype bf16\n  cotk export --synthetic olmoe-1b-7b --bits 4 --gguf olmoe-q4.gguf\n  cotk export --synthetic olmoe-1b-7b --bits 4 --container olmoe-q4\n\nCodes of groups keep every value in Q8_0 and Q4_0; what has no codes becomes F16 in GGUF, norms and routers F32."
)]
pub struct Args {
    /// Hugging Face folder, or output of `cotk compress`
    #[arg(required_unless_present = "synthetic")]
    pub model: Option<PathBuf>,
    /// Random weights of a real model's shape, the same as `cotk bench --synthetic` runs: olmoe-1b-7b,
    /// qwen1.5-moe-a2.7b, qwen3-30b-a3b, ref-qwen2moe
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "hf", "project"])]
    pub synthetic: Option<String>,
    /// Another depth of the synthetic model
    #[arg(long, value_name = "N", requires = "synthetic")]
    pub layers: Option<usize>,
    #[command(flatten)]
    pub output: Output,
    /// Experts of a Hugging Face folder: code them on the way, in 8 bits (Q8_0) or 4 (Q4_0); of a container: take
    /// this prefix of its codes (default: F16, or all of the codes)
    #[arg(long, value_name = "N")]
    pub bits: Option<u32>,
    /// All other matrices, where they have no codes: code them on the way, in 8 bits (Q8_0) or 4 (Q4_0) (default: F16)
    #[arg(long, value_name = "N", requires = "gguf", conflicts_with = "synthetic")]
    pub dense_bits: Option<u32>,
    /// Round what the format cannot carry to what it can, and print the loss
    #[arg(long)]
    pub project: bool,
    /// Element type of a Hugging Face folder
    #[arg(long, value_enum, default_value_t = TypeArg::F32, conflicts_with = "gguf")]
    pub dtype: TypeArg,
}

/// Where to.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Output {
    /// Write this file for llama.cpp
    #[arg(long, value_name = "F.gguf")]
    pub gguf: Option<PathBuf>,
    /// Write this new folder for transformers
    #[arg(long, value_name = "DIR")]
    pub hf: Option<PathBuf>,
    /// Write a synthetic model as this new folder, a container as `cotk compress` makes them: to measure how fast it opens
    #[arg(long, value_name = "DIR", requires = "synthetic")]
    pub container: Option<PathBuf>,
}

/// `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TypeArg {
    /// Keeps every value
    F32,
    F16,
    Bf16,
}

/// # Errors
/// What the folder's files refuse, what the format cannot carry, Ctrl-C.
pub fn run(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    let (output, format, written) = match (&args.synthetic, &args.model) {
        (Some(name), _) => match (&args.output.gguf, &args.output.container) {
            (Some(out), _) => (out, "gguf", synthetic(name, args, out, cx)?),
            (None, Some(out)) => (out, "container", synthetic_container(name, args, out, cx)?),
            (None, None) => {
                return Err(Fault::usage(
                    "--synthetic with --hf: random weights are for llama.cpp and for cotk to run",
                    "give --gguf F or --container DIR",
                ));
            }
        },
        (None, Some(model)) => from_folder(model, args, cx)?,
        (None, None) => unreachable!("clap asks for one of them"),
    };
    let result = json!({
        "output": output,
        "format": format,
        "bytes": written.bytes,
        "tensors": written.tensors,
        "projected": written.projected.iter().map(|p| json!({
            "tensor": p.tensor,
            "reason": p.reason,
            "loss": p.loss,
        })).collect::<Vec<_>>(),
    });
    let mut text = format!(
        "{}: {}, {} tensors\n",
        output.display(),
        Bytes(written.bytes),
        written.tensors
    );
    if !written.projected.is_empty() {
        text.push('\n');
        text += &table(&written);
    }
    Ok(Outcome::new(result, text))
}

fn from_folder<'a>(model: &Path, args: &'a Args, cx: &Context) -> Result<(&'a PathBuf, &'static str, Exported), Fault> {
    if args.output.container.is_some() {
        // Of two arguments that exclude each other clap does not ask for the other.
        return Err(Fault::usage(
            "--container without --synthetic: a model becomes a container by being compressed",
            "see `cotk compress --help`",
        ));
    }
    let Folder { files, container } = open_folder(model)?;
    let container = container.as_deref();
    if container.is_none() && args.output.hf.is_some() && args.bits.is_some() {
        return Err(Fault::usage(
            "--bits with --hf: a Hugging Face folder has no codes to take a prefix of",
            "leave it out, or compress the model first",
        ));
    }
    match (&args.output.gguf, &args.output.hf) {
        (Some(out), _) => {
            let options = GgufOptions {
                name: (model.file_name()).map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
                bits: args.bits,
                dense_bits: args.dense_bits,
                project: args.project,
            };
            let written = gguf::export(&files, container, out, &options, &cx.ui, &cx.cancel)?;
            Ok((out, "gguf", written))
        }
        (None, Some(out)) => {
            let kind = match args.dtype {
                TypeArg::F32 => HfType::F32,
                TypeArg::F16 => HfType::F16,
                TypeArg::Bf16 => HfType::BF16,
            };
            let options = HfOptions {
                bits: args.bits,
                kind,
                project: args.project,
            };
            let written = hf::export(&files, container, out, &options, &cx.ui, &cx.cancel)?;
            Ok((out, "hf", written))
        }
        (None, None) => unreachable!("clap asks for one of them"),
    }
}

/// The weights that `cotk bench` makes of the same name, bits, layers and seed. One layer's experts are in memory at a time.
fn synthetic(name: &str, args: &Args, out: &Path, cx: &Context) -> Result<Exported, Fault> {
    let bits = args.bits.unwrap_or(8);
    if ![2, 3, 4, 8].contains(&bits) {
        return Err(Fault::usage(
            format!("--bits {bits}: expected 2, 3, 4 or 8"),
            "8 bits become Q8_0, 4 and fewer Q4_0",
        ));
    }
    if args.layers == Some(0) {
        return Err(Fault::usage(
            "--layers 0: expected 1 or more",
            "leave it out for all layers",
        ));
    }
    let seed = cx.seed.unwrap_or(0);
    let spec = synthetic::spec(name, args.layers)?;
    let source = Source::new(&spec, seed);
    let moe_layers = spec.moe_layers();
    let at_hand: Mutex<Option<(LayerId, Vec<Arc<NoiseExpert>>)>> = Mutex::new(None);
    let expert = |layer: LayerId, expert: ExpertId| -> Result<Arc<NoiseExpert>, ExportError> {
        let mut at_hand = at_hand.lock().unwrap_or_else(PoisonError::into_inner);
        if at_hand.as_ref().is_none_or(|(held, _)| *held != layer) {
            let index = moe_layers.iter().position(|l| *l == layer).unwrap_or(0);
            // On this thread alone: one that waits for others here might be given work that waits for this lock.
            let all = 0..spec.routing.experts;
            let made: cotk_runtime::Result<Vec<NoiseExpert>> = all
                .map(|expert| synthetic::one_expert(&spec, Experts::plain(bits), seed, index, expert))
                .collect();
            let made = made.map_err(|e| ExportError::Weight {
                tensor: format!("experts of {layer}"),
                detail: e.to_string(),
            })?;
            *at_hand = Some((layer, made.into_iter().map(Arc::new).collect()));
        }
        let (_, experts) = at_hand.as_ref().expect("made above");
        Ok(experts[expert.index()].clone())
    };
    let made = Made {
        spec: &spec,
        source: &source,
        expert: &expert,
    };
    let options = GgufOptions {
        name: format!("{name}, random weights"),
        ..GgufOptions::default()
    };
    Ok(gguf::export_made(&made, out, &options, &cx.ui, &cx.cancel)?)
}

/// Such a model on disk, as `cotk bench` opens it.
fn synthetic_container(name: &str, args: &Args, out: &Path, cx: &Context) -> Result<Exported, Fault> {
    let seed = cx.seed.unwrap_or(0);
    let bits = args.bits.unwrap_or(8);
    let manifest = synthetic_container::write(name, args.layers, bits, seed, out, &cx.ui, &cx.cancel)?;
    Ok(Exported {
        bytes: manifest.files.values().map(|file| file.bytes).sum(),
        tensors: manifest.records().count(),
        projected: Vec::new(),
    })
}

/// One row a reason: how many tensors, and the one that lost most. (`--json` has them all.)
fn table(written: &Exported) -> String {
    let mut reasons: BTreeMap<&str, (usize, &Projected)> = BTreeMap::new();
    for projected in &written.projected {
        let (count, worst) = reasons.entry(&projected.reason).or_insert((0, projected));
        *count += 1;
        if projected.loss > worst.loss {
            *worst = projected;
        }
    }
    let mut table = Table::new(&["held as", "tensors", "worst loss", "of"]);
    for (reason, (count, worst)) in reasons {
        let of = if worst.loss > 0.0 { worst.tensor.as_str() } else { "" };
        table.row([
            reason.to_owned(),
            count.to_string(),
            significant(worst.loss, 3),
            of.to_owned(),
        ]);
    }
    format!("{}\nloss = ‖written − ours‖ / ‖ours‖\n", table.render())
}

/// What an export's failure means to a user.
pub(crate) fn failure(error: &ExportError) -> Report {
    match error {
        ExportError::Model(error) => model_faults::model(error),
        ExportError::Container(error) => model_faults::container(error),
        ExportError::Refused {
            what,
            found,
            expected,
            help,
            ..
        } => Report {
            kind: "export",
            exit_code: WRONG_USE,
            key: Some(what.trim_matches('`').to_owned()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            help: Some(help.clone()),
            ..Report::default()
        },
        ExportError::Weight { tensor, .. } => Report {
            kind: "tensor-value",
            exit_code: FAILED,
            key: Some(tensor.clone()),
            help: Some("export it as f32 with --hf, or serve it with `cotk serve`".to_owned()),
            ..Report::default()
        },
    }
}
