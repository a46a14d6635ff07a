//! `cotk eval`: perplexity of a text, and how far a model is from another.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use cotk_model::ModelError;
use cotk_model::eval::{EvalOptions, Evaluation, evaluate};
use cotk_run::files;
use cotk_run::units::significant;
use cotk_runtime::open::open;
use serde_json::json;

use super::ModeArg;
use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::table::Table;

/// Largest text that is read.
const TEXT_LIMIT_BYTES: u64 = 1 << 30;

/// Measure perplexity on a text, and divergence from a reference model
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk eval ../shared/models/ref-qwen2moe --text ../shared/models/text/test-math.txt\n  cotk eval out --text test.txt --reference ../shared/models/ref-qwen2moe --max-tokens 16384"
)]
pub struct Args {
    /// Hugging Face folder, or output of `cotk compress`
    pub model: PathBuf,
    /// Text to score (UTF-8)
    #[arg(long, value_name = "F")]
    pub text: PathBuf,
    /// Also measure KL(reference ‖ model) and top-1 agreement
    #[arg(long, value_name = "MODEL")]
    pub reference: Option<PathBuf>,
    /// Tokens that a target sees at most (default: the context, at most 1024)
    #[arg(long, value_name = "N")]
    pub window: Option<usize>,
    /// How far the window moves (default: half of it)
    #[arg(long, value_name = "N")]
    pub stride: Option<usize>,
    /// Token id put before the text (default: none, unless the tokenizer adds one)
    #[arg(long, value_name = "ID")]
    pub bos: Option<u32>,
    /// Score at most this many targets (default: all)
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<NonZeroUsize>,
    /// Which width of the experts is used
    #[arg(long, value_enum, default_value_t = ModeArg::Exact)]
    pub mode: ModeArg,
}

/// # Errors
/// What the models refuse; a reference of another vocabulary; Ctrl-C.
pub fn run(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    let text = files::read_text(&args.text, TEXT_LIMIT_BYTES)?;
    let opened = open(&args.model)?;
    let reference = args.reference.as_ref().map(|path| open(path)).transpose()?;
    let tokens = opened.files.tokenizer.encode(&text).map_err(ModelError::from)?;
    if let Some(reference) = &reference {
        let theirs = reference.files.tokenizer.encode(&text).map_err(ModelError::from)?;
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
    let found = evaluate(
        &opened.model,
        &tokens,
        &options,
        reference.as_ref().map(|r| &r.model),
        &cx.ui,
        &cx.cancel,
    )?;

    let rate = rate(&found);
    let result = json!({
        "tokens": found.tokens,
        "window": found.window,
        "stride": found.stride,
        "mode": options.mode,
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
            "perplexity": r.perplexity,
        })),
        "tokens_per_s": rate,
        "tasks": [],
    });
    Ok(Outcome::new(result, table(args, &found, rate)))
}

#[expect(clippy::cast_precision_loss, reason = "token counts are small")]
fn rate(found: &Evaluation) -> f64 {
    found.tokens as f64 / found.seconds.max(1e-9)
}

fn table(args: &Args, found: &Evaluation, rate: f64) -> String {
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
                "perplexity of reference".to_owned(),
                show(reference.perplexity),
                String::new(),
            ]);
    }
    format!(
        "{}\n{} targets of {}, window {}, stride {}, {} tokens/s\n",
        table.render(),
        found.tokens,
        args.text.display(),
        found.window,
        found.stride,
        significant(rate, 3),
    )
}
