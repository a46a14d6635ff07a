//! `cotk eval`: perplexity of a text, how far a model is from another, and tasks (their part is `eval_tasks`).

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use cotk_model::ModelError;
use cotk_model::eval::{EvalOptions, Evaluation, evaluate};
use cotk_model::layers::cache::KvKind;
use cotk_model::moe::Mode;
use cotk_model::tasks::TaskOptions;
use cotk_run::files;
use cotk_run::units::significant;
use cotk_runtime::open::{Opened, open};
use serde_json::{Value, json};

use super::{ModeArg, eval_tasks};
use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::table::Table;

/// Largest text that is read.
const TEXT_LIMIT_BYTES: u64 = 1 << 30;

/// Measure perplexity on a text, divergence from a reference model, and zero-shot tasks
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk eval ../shared/models/ref-qwen2moe --text ../shared/models/text/test-math.txt\n  cotk eval out --text test.txt --reference ../shared/models/ref-qwen2moe --max-tokens 16384\n  cotk eval out --tasks ../shared/data/zeroshot"
)]
pub struct Args {
    /// Hugging Face folder, or output of `cotk compress`
    pub model: PathBuf,
    /// Text to score (UTF-8)
    #[arg(long, value_name = "F", required_unless_present = "tasks")]
    pub text: Option<PathBuf>,
    /// Zero-shot tasks: JSONL files, or folders of them, separated by commas
    #[arg(long, value_name = "F", value_delimiter = ',')]
    pub tasks: Vec<PathBuf>,
    /// Score the first items of each task only (default: all)
    #[arg(long, value_name = "N", requires = "tasks")]
    pub max_items: Option<NonZeroUsize>,
    /// Also measure KL(reference ‖ model), top-1 agreement, shared choices of experts, and the tasks there
    #[arg(long, value_name = "MODEL")]
    pub reference: Option<PathBuf>,
    /// Tokens that a target sees at most (default: the context, at most 1024)
    #[arg(long, value_name = "N", requires = "text")]
    pub window: Option<usize>,
    /// How far the window moves (default: half of it)
    #[arg(long, value_name = "N", requires = "text")]
    pub stride: Option<usize>,
    /// Token id put before the text and before each item of a task (default: for the text none, unless the tokenizer
    /// adds one; for tasks the model's BOS, else its end of text)
    #[arg(long, value_name = "ID")]
    pub bos: Option<u32>,
    /// Score at most this many targets of the text (default: all)
    #[arg(long, value_name = "N", requires = "text")]
    pub max_tokens: Option<NonZeroUsize>,
    /// Which width of the experts is used
    #[arg(long, value_enum, default_value_t = ModeArg::Exact)]
    pub mode: ModeArg,
    /// How keys and values are held: f32, f16 or int8 (a scale per head and position); the reference has f32
    #[arg(long, default_value_t = KvKind::default(), value_name = "KIND")]
    pub kv_cache: KvKind,
}

/// # Errors
/// What the models refuse; a reference of another vocabulary; a task that cannot be scored; Ctrl-C.
pub fn run(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    let text = (args.text.as_ref())
        .map(|file| files::read_text(file, TEXT_LIMIT_BYTES))
        .transpose()?;
    // Tasks before models: a typing error in a file should not wait for gigabytes.
    let tasks = eval_tasks::read(&args.tasks, args.max_items)?;
    let opened = open(&args.model)?.with_kv(args.kv_cache);
    let reference = args
        .reference
        .as_ref()
        .map(|path| Ok::<_, Fault>(open(path)?.with_kv(KvKind::F32)));
    let reference = reference.transpose()?;
    let found = text
        .map(|text| score_text(args, &text, &opened, reference.as_ref(), cx))
        .transpose()?;
    let mut scored = Vec::new();
    if !tasks.is_empty() {
        let bos = eval_tasks::bos(&opened.files, args.bos)?;
        let mode = args.mode.into();
        scored = eval_tasks::score(&tasks, &opened, reference.as_ref(), TaskOptions { bos, mode }, cx)?;
    }

    let mut result = match &found {
        Some(found) => text_json(args, found),
        None => json!({
            "tokens": null, "window": null, "stride": null, "nll_nats": null, "perplexity": null,
            "perplexity_ci95": null, "top1_accuracy": null, "low_bit_fraction": null, "skipped_mass": null,
            "reference": args.reference.as_ref().map(|model| json!({ "model": model })), "tokens_per_s": null,
        }),
    };
    result["mode"] = json!(Mode::from(args.mode));
    result["tasks"] = scored.iter().map(eval_tasks::Scored::json).collect();
    let mut shown = Vec::new();
    shown.extend(found.as_ref().map(|found| table(args, found)));
    if !scored.is_empty() {
        shown.push(eval_tasks::tables(&scored));
    }
    Ok(Outcome::new(result, shown.join("\n")))
}

fn score_text(
    args: &Args,
    text: &str,
    opened: &Opened,
    reference: Option<&Opened>,
    cx: &Context,
) -> Result<Evaluation, Fault> {
    let tokens = opened.files.tokenizer.encode(text).map_err(ModelError::from)?;
    if let Some(reference) = reference {
        let theirs = reference.files.tokenizer.encode(text).map_err(ModelError::from)?;
        if theirs != tokens {
            return Err(Fault::usage(
                format!(
                    "{}: its tokenizer reads the text as {} tokens, that of {} as {}",
                    reference.files.path.display(),
                    theirs.len(),
                    args.model.display(),
                    tokens.len()
                ),
                "a reference must have the same tokenizer",
            ));
        }
    }
    let options = EvalOptions {
        window: args.window,
        stride: args.stride,
        bos: args.bos,
        max_tokens: args.max_tokens.map(NonZeroUsize::get),
        mode: args.mode.into(),
    };
    Ok(evaluate(
        &opened.model,
        &tokens,
        &options,
        reference.map(|r| &r.model),
        &cx.ui,
        &cx.cancel,
    )?)
}

fn text_json(args: &Args, found: &Evaluation) -> Value {
    json!({
        "tokens": found.tokens,
        "window": found.window,
        "stride": found.stride,
        "nll_nats": found.nll_nats,
        "perplexity": found.perplexity,
        "perplexity_ci95": found.perplexity_ci95,
        "top1_accuracy": found.top1_accuracy,
        "low_bit_fraction": found.low_bit_fraction,
        "skipped_mass": found.skipped_mass,
        "reference": found.reference.as_ref().map(|r| json!({
            "model": args.reference,
            "kl_nats": r.kl_nats,
            "kl_ci95": r.kl_ci95,
            "top1_agreement": r.top1_agreement,
            "routing_overlap": r.routing_overlap,
            "perplexity": r.perplexity,
        })),
        "tokens_per_s": rate(found),
    })
}

#[expect(clippy::cast_precision_loss, reason = "token counts are small")]
fn rate(found: &Evaluation) -> f64 {
    found.tokens as f64 / found.seconds.max(1e-9)
}

fn table(args: &Args, found: &Evaluation) -> String {
    let show = |value: f64| significant(value, 4);
    let interval = |[lo, hi]: [f64; 2]| format!("{} to {}", show(lo), show(hi));
    let mut table = Table::new(&["measure", "value", "95 % interval"]);
    table
        .row([
            "perplexity".to_owned(),
            show(found.perplexity),
            interval(found.perplexity_ci95),
        ])
        .row(["loss, nats per token".to_owned(), show(found.nll_nats), String::new()])
        .row(["top-1 accuracy".to_owned(), show(found.top1_accuracy), String::new()]);
    if let Some(reference) = &found.reference {
        table
            .row([
                "KL from reference, nats".to_owned(),
                show(reference.kl_nats),
                interval(reference.kl_ci95),
            ])
            .row([
                "top-1 agreement".to_owned(),
                show(reference.top1_agreement),
                String::new(),
            ])
            .row([
                "shared choices of experts".to_owned(),
                reference.routing_overlap.map_or("none".to_owned(), show),
                String::new(),
            ])
            .row([
                "perplexity of reference".to_owned(),
                show(reference.perplexity),
                String::new(),
            ]);
    }
    format!(
        "{}\n{} targets of {}, window {}, stride {}, {} tokens/s\n",
        table.render(),
        found.tokens,
        args.text.as_deref().unwrap_or(Path::new("")).display(),
        found.window,
        found.stride,
        significant(rate(found), 3),
    )
}
