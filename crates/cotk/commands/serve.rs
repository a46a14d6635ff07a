//! `cotk serve`: a model behind the OpenAI API. Port, model, template, then `cotk_serve` until Ctrl-C.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cotk_latency::predict::CostModel;
use cotk_latency::work::Work;
use cotk_model::layers::cache::KvKind;
use cotk_model::moe::Mode;
use cotk_run::progress::Progress;
use cotk_run::units::{Bytes, significant};
use cotk_runtime::cost;
use cotk_runtime::open::{Opened, open};
use cotk_serve::Limits;
use cotk_serve::model_engine::ModelEngine;
use cotk_serve::server::{Bound, Options, serve};
use cotk_serve::template::ChatTemplate;
use serde_json::json;

use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::launch;
use crate::predictor;

/// Containers up to this size have every byte checked before the first request: less than a second.
const CHECKED_BYTES: u64 = 1 << 30;
/// How long running requests may take after Ctrl-C.
const DRAIN: Duration = Duration::from_secs(10);

/// Serve a model over the OpenAI API
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk serve out --port 8080\n  cotk serve out --host 0.0.0.0 --api-key \"$KEY\" --chat-template chatml.jinja"
)]
pub struct Args {
    /// Hugging Face folder, or output of `cotk compress`
    pub model: PathBuf,
    /// Address to listen on; 0.0.0.0 lets other machines in
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    pub host: String,
    /// 0: any free port
    #[arg(long, default_value_t = 8080, value_name = "N")]
    pub port: u16,
    /// Clients must send this key (Authorization: Bearer KEY)
    #[arg(long, value_name = "KEY", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub api_key: Option<String>,
    /// Jinja file instead of the model's own chat template
    #[arg(long, value_name = "F")]
    pub chat_template: Option<PathBuf>,
    /// Requests that are computed together
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub slots: u16,
    /// Requests that may wait; more are refused with 429
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub queue: u16,
    /// How keys and values are held: f32, f16 or int8 (a scale per head and position)
    #[arg(long, default_value_t = KvKind::default(), value_name = "KIND")]
    pub kv_cache: KvKind,
}

/// Returns when it was asked to stop and has drained.
///
/// # Errors
/// A port in use, a model or a template that cannot be read, a damaged record.
pub fn run(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    let started = Instant::now();
    let bound = Bound::bind(&args.host, args.port)?;
    let mut opened = open(&args.model)?.with_kv(args.kv_cache);
    check_records(&opened, cx)?;
    cx.cancel.check()?;
    let template = ChatTemplate::choose(
        args.chat_template.as_deref(),
        opened.files.chat_template.take(),
        &args.model.display().to_string(),
        std::mem::take(&mut opened.files.special_tokens),
    )?;
    let (predictions, profile_warnings) = predict(&opened, cx)?;
    let engine = Arc::new(ModelEngine::from_opened(opened, "cpu").with_predictions(predictions));
    let options = Options {
        api_key: args.api_key.clone(),
        limits: Limits {
            slots: usize::from(args.slots),
            queue: usize::from(args.queue),
            ..Limits::default()
        },
        drain: DRAIN,
        seeds: cx.seeds(0),
        version: env!("CARGO_PKG_VERSION"),
    };
    serve(bound, engine, template, options, &cx.cancel, |ready| {
        let ready_s = started.elapsed().as_secs_f64();
        if cx.ui.is_json() {
            let result = json!({
                "listening": ready.listening,
                "model": ready.model,
                "device": ready.device,
                "ready_s": ready_s,
                "predicted_decode_ms": ready.predicted_decode_ms,
            });
            let warnings = [&ready.warnings[..], &profile_warnings].concat();
            launch::print_line(&launch::envelope_ok("serve", &result, &warnings).to_string());
        } else {
            let (model, device, seconds) = (&ready.model, &ready.device, significant(ready_s, 2));
            launch::print_line(&format!(
                "{}: {model} on {device}, ready in {seconds} s; Ctrl-C stops it",
                ready.listening
            ));
            if let Some(ms) = ready.predicted_decode_ms["exact"].as_f64() {
                cx.ui.note(&format!(
                    "one token alone: {} ms, predicted from the profile",
                    significant(ms, 3)
                ));
            }
            for warning in ready.warnings.iter().chain(&profile_warnings) {
                launch::complain(&format!("warning: {warning}"));
            }
        }
    })?;
    cx.ui.note("drained, stopped");
    Ok(Outcome {
        is_printed: true,
        ..Outcome::default()
    })
}

/// One token's time in each mode, where a profile tells, in ms; and what to say about the profile.
type Predictions = (Vec<(Mode, f64)>, Vec<String>);

fn predict(opened: &Opened, cx: &Context) -> Result<Predictions, Fault> {
    let (Some(container), Some(predictor)) = (&opened.container, predictor::find(cx, None)?) else {
        return Ok((Vec::new(), Vec::new()));
    };
    let threads = u32::try_from(cx.threads).unwrap_or(u32::MAX);
    let mut warnings = predictor.warnings;
    let mut predictions = Vec::new();
    for &mode in opened.model.runtime().modes() {
        let step = cost::decode_step(container.manifest(), &opened.files.spec, mode, threads);
        match predictor.model.predict(&Work::Step(&step)) {
            Ok(prediction) => predictions.push((mode, prediction.ms)),
            Err(error) => warnings.push(format!("the time of decoding is not predicted: {error}")),
        }
    }
    Ok((predictions, warnings))
}

/// A damaged record is better found now than by a client; a large container is checked as it is used.
fn check_records(opened: &Opened, cx: &Context) -> Result<(), Fault> {
    let Some(container) = &opened.container else {
        return Ok(());
    };
    let bytes = container.manifest().files.values().map(|file| file.bytes).sum();
    if bytes <= CHECKED_BYTES {
        container.verify().map_err(cotk_runtime::Error::from)?;
    } else {
        cx.ui.note(&format!(
            "{}: {} are checked as they are used, not before",
            container.folder().display(),
            Bytes(bytes)
        ));
    }
    Ok(())
}
