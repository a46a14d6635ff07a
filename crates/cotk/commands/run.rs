//! `cotk run`: a prompt in, text out as it comes.

use std::ops::ControlFlow;
use std::path::PathBuf;

use cotk_model::ModelError;
use cotk_model::generate::{self, Generated, Request, generate};
use cotk_model::layers::cache::KvKind;
use cotk_model::sampling::{Sampler, Sampling};
use cotk_run::files;
use cotk_run::progress::Progress;
use cotk_run::units::{Bytes, significant};
use cotk_runtime::open::open;
use serde_json::json;

use super::ModeArg;
use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::launch;

/// Continue a prompt
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk run ../shared/models/ref-qwen2moe --prompt \"The city was founded in\"\n  cotk run out --prompt \"Der alte Mann\" --temperature 0.8 --seed 7 --json"
)]
pub struct Args {
    /// Hugging Face folder, or output of `cotk compress`
    pub model: PathBuf,
    /// Text to continue
    #[arg(long, short)]
    pub prompt: String,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub max_tokens: usize,
    /// 0: always the most likely token
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    pub temperature: f32,
    /// Draw from the fewest tokens that reach this probability
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub top_p: f32,
    /// Which width of the experts is used
    #[arg(long, value_enum, default_value_t = ModeArg::Exact)]
    pub mode: ModeArg,
    /// How keys and values are held: f32, f16 or int8 (a scale per head and position)
    #[arg(long, default_value_t = KvKind::default(), value_name = "KIND")]
    pub kv_cache: KvKind,
}

/// # Errors
/// What the model refuses; a prompt longer than the context; Ctrl-C.
pub fn run(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    let sampling = Sampling::new(args.temperature, args.top_p)?;
    let opened = open(&args.model)?.with_kv(args.kv_cache);
    let (model, files) = (&opened.model, &opened.files);
    let prompt = files.tokenizer.encode(&args.prompt).map_err(ModelError::from)?;
    generate::check_prompt(prompt.len(), model.spec().context)?;

    let mut sampler = Sampler::new(sampling, cx.seeds(0).stream("sampling"));
    let request = Request {
        prompt: &prompt,
        max_tokens: args.max_tokens,
        stop: &files.eos,
        mode: args.mode.into(),
    };
    let is_shown = !cx.ui.is_json();
    let mut stream = files.tokenizer.stream();
    let mut is_open = true;
    let generated = generate(model, &request, &mut sampler, &cx.cancel, |token| {
        let piece = stream.push(token).unwrap_or_default();
        is_open = !is_shown || launch::write_out(&piece);
        if is_open {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(()) // nobody reads any more: a closed pipe is success
        }
    })?;
    if is_shown && is_open {
        launch::write_out(&(stream.finish().unwrap_or_default() + "\n"));
    }

    let text = files.tokenizer.decode(&generated.tokens);
    let (prefill, decode) = rates(&generated, prompt.len());
    let peak = files::peak_rss_bytes();
    cx.ui.note(&format!(
        "{} tokens in at {} tokens/s, {} out at {} tokens/s, peak memory {}",
        prompt.len(),
        significant(prefill, 3),
        generated.tokens.len(),
        decode.map_or_else(|| "–".to_owned(), |rate| significant(rate, 3)),
        Bytes(peak),
    ));
    let result = json!({
        "prompt_tokens": prompt.len(),
        "generated_tokens": generated.tokens.len(),
        "text": text,
        "token_ids": generated.tokens,
        "finish_reason": generated.finish.name(),
        "mode": request.mode,
        "low_bit_fraction": generated.totals.low_bit_fraction(),
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "peak_rss_bytes": peak,
    });
    Ok(Outcome::new(result, ""))
}

/// Tokens per second of the prompt, and of single steps where there was one.
#[expect(clippy::cast_precision_loss, reason = "token counts are small")]
fn rates(generated: &Generated, prompt_tokens: usize) -> (f64, Option<f64>) {
    let rate = |count: usize, seconds: f64| count as f64 / seconds.max(1e-9);
    (
        rate(prompt_tokens, generated.prefill_s),
        (generated.decode_steps > 0).then(|| rate(generated.decode_steps, generated.decode_s)),
    )
}
