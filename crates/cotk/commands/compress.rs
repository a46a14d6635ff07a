//! `cotk compress --moe`: a checkpoint in, a container out, and what it cost in bytes and quality.

use std::path::{Path, PathBuf};

use cotk_compress::CompressError;
use cotk_compress::pipeline::{Plan, Request, Surroundings, compress, plan};
use cotk_compress::prune::search::EXHAUSTIVE_MASKS;
use cotk_compress::recipe::Recipe;
use cotk_compress::report::Report;
use cotk_data::DataError;
use cotk_latency::predict::CostModel;
use cotk_run::files;
use cotk_run::progress::Progress;
use cotk_run::recipe;
use cotk_run::units::{Bytes, significant};
use serde_json::{Value, json};

use crate::commands::compress_compare::{self, Rows};
use crate::commands::compress_contest;
use crate::context::{Context, Outcome};
use crate::fault::{self, FAILED, Fault, OUT_OF_REACH, Report as FaultReport, WRONG_USE};
use crate::model_faults;
use crate::predictor;
use crate::provenance::{self, Run};
use crate::table::Table;

/// Compress a mixture-of-experts model: drop experts, code the rest, measure what it cost
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk compress --moe ../shared/models/ref-qwen2moe -o out --calibration ../shared/models/text/calibration.txt\n  cotk compress --moe data/tiny-qwen2moe -o out --calibration data/tiny-qwen2moe/train.txt --set compress.drop_ratio=0.25 --dense-bits 8\n  cotk compress --moe data/tiny-qwen2moe -o out --calibration data/tiny-qwen2moe/train.txt --recipe moe-prune --set compress.prune.ratio=0.5\n  cotk compress --moe data/tiny-qwen2moe -o table --calibration data/tiny-qwen2moe/train.txt --eval-text data/tiny-qwen2moe/heldout.txt --compare reap,swap:equal,swap:unequal --ratios 0.25,0.5\n  cotk compress --moe ../shared/models/ref-qwen2moe -o out --calibration ../shared/models/text/calibration.txt --recipe moe-joint --budget-bits-per-weight 2.5\n  cotk compress --moe ../shared/models/ref-qwen2moe -o table --calibration ../shared/models/text/calibration.txt --eval-text ../shared/models/text/test.txt --second-text ../shared/models/text/wikitext2-test.txt --compare rtn,gptq-uniform,mc,mop,joint,joint:healed --budgets 4.5,3.5,2.5,2.25\n\nKilled at any moment, the same command goes on where it was."
)]
pub struct Args {
    /// Hugging Face folder with config.json, safetensors and tokenizer.json
    #[arg(long, value_name = "MODEL", required = true)]
    pub moe: PathBuf,
    /// Folder to make; must not exist
    #[arg(long, short, value_name = "OUT", required = true)]
    pub output: PathBuf,
    /// File, or name of a recipe that comes with cotk: moe-int4, moe-joint, moe-gptq-uniform, moe-prune (default: moe-int4;
    /// where budgets are compared, moe-joint)
    #[arg(long, value_name = "F")]
    pub recipe: Option<String>,
    /// Text that shows how experts are used (UTF-8, documents separated by <|endoftext|>)
    #[arg(long, value_name = "F", required = true)]
    pub calibration: PathBuf,
    /// Text that judges (default: the last fifth of the calibration documents, which then does nothing else); with
    /// --compare once per text, all of them decide together
    #[arg(long, value_name = "F")]
    pub eval_text: Vec<PathBuf>,
    #[command(flatten)]
    pub compare: compress_compare::Args,
    /// Most bytes of the weights: dense.safetensors and experts.bin together (`weight_bytes_after`). Tokenizer, config and
    /// manifest come on top (`bytes_after` counts all files)
    #[arg(long, value_name = "N", conflicts_with = "budget_bits_per_weight")]
    pub budget_bytes: Option<u64>,
    /// Most bits of codes and scales of the routed experts, over the number of their weights in MODEL
    /// (budget.bits_per_expert_weight)
    #[arg(long, value_name = "BITS")]
    pub budget_bits_per_weight: Option<f64>,
    /// Longest predicted time of the experts of one token, on --profile (budget.target_ms)
    #[arg(long, value_name = "MS")]
    pub target_ms: Option<f64>,
    /// Smallest output whose KL divergence from MODEL, on held-out calibration text, is not above this
    /// (budget.max_kl_nats)
    #[arg(long, value_name = "NATS")]
    pub max_kl: Option<f64>,
    /// Bits of attention, shared experts, embedding and head: 16 as stored, 8 or 4 coded (compress.dense_bits)
    #[arg(long, value_name = "N")]
    pub dense_bits: Option<u32>,
    /// Change a value of the recipe: compress.drop_ratio=0.25
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Say what would be done and what it needs, and stop
    #[arg(long)]
    pub dry_run: bool,
}

/// # Errors
/// An input that cannot be right, a budget that cannot be met, a full disk, Ctrl-C.
pub fn run(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    let rows = compress_compare::rows(&args.compare)?;
    let recipe_of = args.recipe.clone().unwrap_or_else(|| match rows {
        Some(Rows::Budgets(_)) => "moe-joint".to_owned(),
        _ => "moe-int4".to_owned(),
    });
    let mut sets = compress_compare::sets(&args.compare, rows.as_ref())?;
    sets.extend_from_slice(&args.set);
    sets.extend(args.dense_bits.map(|bits| format!("compress.dense_bits={bits}")));
    sets.extend(budgets(args, rows.as_ref())?);
    let request = Request {
        model: args.moe.clone(),
        out: args.output.clone(),
        recipe_name: recipe_name(&recipe_of),
        recipe: Recipe::load(&recipe_of, &sets, cx.seed, args.budget_bytes)?,
        calibration: args.calibration.clone(),
        eval_text: args.eval_text.first().cloned(),
    };
    if rows.is_none() && args.eval_text.len() > 1 {
        return Err(Fault::usage(
            format!("{} texts to judge by, expected one", args.eval_text.len()),
            "join them in one file, or add --compare",
        ));
    }
    let predictor = predictor::find(cx, Some(&request.recipe.latency.profile))?;
    let mut warnings = predictor.as_ref().map(|p| p.warnings.clone()).unwrap_or_default();
    let run = Run {
        recipe_hash: Some(recipe::hash(&request.recipe)?),
        seed: Some(request.recipe.seed),
        folder: None,
    };
    // A text that cannot be read is the pipeline's to say.
    let ledger = provenance::ledger_with_inputs(cx, run, texts_hash(args).ok())?;
    let with = Surroundings {
        progress: &cx.ui,
        cancel: &cx.cancel,
        facts: &ledger,
        cost: predictor.as_ref().map(|p| &p.model as &dyn CostModel),
        threads: cx.threads,
    };
    if args.dry_run {
        let plan = plan(&request, &with)?;
        warnings.extend(plan.warnings.clone());
        return Ok(Outcome::new(json!({ "plan": plan }), plan_table(&plan)).warn(warnings));
    }
    match rows {
        Some(Rows::Masks(rows)) => return compress_compare::run(args, rows, request, &with, warnings),
        Some(Rows::Budgets(entrants)) => return compress_contest::run(args, entrants, request, &with, warnings),
        None => {}
    }
    let report = compress(&request, &with)?;
    warnings.extend(report.warnings.clone());
    if report.resumed {
        cx.ui.note("went on with an unfinished output");
    }
    let mut result = serde_json::to_value(&report).unwrap_or(Value::Null);
    if let Value::Object(fields) = &mut result {
        // They stand in the envelope.
        fields.remove("warnings");
    }
    Ok(Outcome::new(result, table(&report)).warn(warnings))
}

/// What the command line says of `[budget]`.
fn budgets(args: &Args, rows: Option<&Rows>) -> Result<Vec<String>, Fault> {
    let given = [
        (
            "--budget-bits-per-weight",
            "budget.bits_per_expert_weight",
            args.budget_bits_per_weight,
        ),
        ("--target-ms", "budget.target_ms", args.target_ms),
        ("--max-kl", "budget.max_kl_nats", args.max_kl),
    ];
    let given: Vec<_> = given
        .into_iter()
        .filter_map(|(flag, key, value)| Some((flag, key, value?)))
        .collect();
    if let Some((flag, _, wrong)) = given.iter().find(|(.., value)| !(value.is_finite() && *value > 0.0)) {
        return Err(Fault::usage(
            format!("{flag} {wrong}: expected a number above 0"),
            "as in --budget-bits-per-weight 2.5 --max-kl 0.02",
        ));
    }
    let is_capped = args.budget_bytes.is_some() || !given.is_empty();
    if is_capped && matches!(rows, Some(Rows::Budgets(_))) {
        return Err(Fault::usage(
            "a budget beside --compare, whose rows have those of --budgets".to_owned(),
            "leave --budget-bytes, --budget-bits-per-weight, --target-ms and --max-kl out",
        ));
    }
    Ok(given.iter().map(|(_, key, value)| format!("{key}={value}")).collect())
}

/// Hash over the texts that the figures depend on.
fn texts_hash(args: &Args) -> cotk_run::Result<u64> {
    let mut hashes = files::checksum_file(&args.calibration)?.to_le_bytes().to_vec();
    for text in args.eval_text.iter().chain(&args.compare.second_text) {
        hashes.extend(files::checksum_file(text)?.to_le_bytes());
    }
    Ok(files::checksum(&hashes))
}

/// File name without folder and extension.
fn recipe_name(recipe: &str) -> String {
    let stem = Path::new(recipe).file_stem();
    stem.map_or_else(|| recipe.to_owned(), |stem| stem.to_string_lossy().into_owned())
}

fn table(report: &Report) -> String {
    let show = |value: f64| significant(value, 4);
    let bytes = |n: u64| Bytes(n).to_string();
    let mut table = Table::new(&["", "before", "after", "after, 95 %"]);
    let interval = |[lo, hi]: [f64; 2]| format!("{} to {}", show(lo), show(hi));
    let experts: usize = report.layers.iter().map(|l| l.experts).sum();
    let kept: usize = report.experts_kept.iter().sum();
    let none = String::new;
    table
        .row([
            "all files".into(),
            bytes(report.bytes_before),
            bytes(report.bytes_after),
            none(),
        ])
        .row([
            "weights, as budgeted".into(),
            none(),
            bytes(report.weight_bytes_after),
            none(),
        ])
        .row([
            "routed experts".into(),
            bytes(report.expert_bytes_before),
            bytes(report.expert_bytes_after),
            none(),
        ])
        .row(["experts".into(), experts.to_string(), kept.to_string(), none()])
        .row([
            "perplexity".into(),
            show(report.perplexity_before),
            show(report.perplexity_after),
            interval(report.quality.perplexity_after_ci95),
        ])
        .row([
            "KL, nats".into(),
            "0".into(),
            show(report.kl_nats),
            interval(report.quality.kl_ci95),
        ])
        .row([
            "top-1 agreement".into(),
            "1".into(),
            show(report.top1_agreement),
            none(),
        ]);
    let predicted = report.predicted_decode_ms.map_or_else(String::new, |ms| {
        format!(
            "Predicted time of one token with every weight in memory: {} ms.\n",
            show(ms)
        )
    });
    format!(
        "{}\n{} bits per expert weight. Quality on {} tokens of {}.\n{predicted}{}: {} s, {} peak memory.\n",
        table.render(),
        show(report.bits_per_expert_weight),
        report.quality.tokens,
        report.quality.text,
        report.output,
        significant(report.seconds, 3),
        Bytes(report.peak_rss_bytes),
    )
}

fn plan_table(plan: &Plan) -> String {
    let mut table = Table::new(&["what", "how much"]);
    let first = if plan.is_measured_first { "twice" } else { "once" };
    table
        .row(["weights before".into(), Bytes(plan.bytes_before).to_string()])
        .row([
            "weights after, at most".into(),
            Bytes(plan.weight_bytes_after).to_string(),
        ])
        .row(["disk needed".into(), Bytes(plan.disk_bytes_needed).to_string()])
        .row(["disk free".into(), Bytes(plan.disk_bytes_free).to_string()])
        .row(["memory, about".into(), Bytes(plan.memory_bytes).to_string()])
        .row([
            "layers walked".into(),
            format!("{} ({} with experts), {first}", plan.layers, plan.moe_layers),
        ])
        .row([
            "experts dropped".into(),
            format!("{} of {}", plan.experts_dropped, plan.experts),
        ])
        .row(["codes".into(), plan.codes.join(", ")])
        .row(["calibration tokens".into(), plan.calibration_tokens.to_string()])
        .row([
            "quality measured on".into(),
            format!("{} tokens of {}", plan.quality_tokens, plan.quality_text),
        ]);
    table.render()
}

/// What failures of the pipeline mean to a user.
pub(crate) fn failure(error: &CompressError) -> FaultReport {
    let facts = |kind, exit_code| FaultReport {
        kind,
        exit_code,
        ..FaultReport::default()
    };
    match error {
        CompressError::Run(error) => fault::run(error),
        CompressError::Model(error) => model_faults::model(error),
        CompressError::Container(error) => model_faults::container(error),
        CompressError::Runtime(error) => model_faults::runtime(error),
        CompressError::Data(DataError::Run(error)) => fault::run(error),
        CompressError::Data(_) => FaultReport {
            help: Some("give a UTF-8 text with documents separated by <|endoftext|>".into()),
            ..facts("text", WRONG_USE)
        },
        CompressError::NoExperts { file, .. } => FaultReport {
            file: Some(file.display().to_string()),
            help: Some("`--moe` wants a mixture-of-experts model".into()),
            ..facts("no-experts", WRONG_USE)
        },
        CompressError::AlreadyCompressed { file } => FaultReport {
            file: Some(file.display().to_string()),
            help: Some("compress the checkpoint that it was made from".into()),
            ..facts("already-compressed", WRONG_USE)
        },
        CompressError::OutputExists { folder } => FaultReport {
            file: Some(folder.display().to_string()),
            help: Some("give another -o, or move that folder away".into()),
            ..facts("output-exists", WRONG_USE)
        },
        CompressError::ShortText {
            file, found, expected, ..
        } => FaultReport {
            file: Some(file.display().to_string()),
            found: Some(format!("{found} tokens")),
            expected: Some(format!("at least {expected} tokens")),
            help: Some("give a longer text".into()),
            ..facts("short-text", WRONG_USE)
        },
        CompressError::SameText { calibration, eval_text } => FaultReport {
            file: Some(calibration.display().to_string()),
            found: Some(eval_text.display().to_string()),
            expected: Some("a text with other documents than the calibration text".into()),
            help: Some(
                "give another --eval-text, or leave it out: the last fifth of the calibration text judges".into(),
            ),
            ..facts("same-text", WRONG_USE)
        },
        CompressError::LittleBits { found, expected } => FaultReport {
            key: Some("compress.little_bits".into()),
            found: Some(found.to_string()),
            expected: Some(expected.clone()),
            help: Some("change compress.little_bits or compress.codes, or leave little_bits out".into()),
            ..facts("little-bits", WRONG_USE)
        },
        CompressError::DiskSpace { folder, need, have } => FaultReport {
            file: Some(folder.display().to_string()),
            found: Some(Bytes(*have).to_string()),
            expected: Some(Bytes(*need).to_string()),
            help: Some("free some space, or write to another disk".into()),
            ..facts("disk-full", FAILED)
        },
        CompressError::Weights { file, source, .. } => FaultReport {
            file: Some(file.display().to_string()),
            found: Some(source.to_string()),
            ..facts("weights", WRONG_USE)
        },
        CompressError::Budget { budget, least } => FaultReport {
            key: Some("budget.bytes".into()),
            found: Some(budget.to_string()),
            expected: Some(format!("at least {least}")),
            help: Some("raise the budget, add narrower codes to compress.codes, or raise compress.drop_ratio".into()),
            ..facts("budget", OUT_OF_REACH)
        },
        CompressError::TargetKl { target, least, .. } => FaultReport {
            key: Some("budget.max_kl_nats".into()),
            found: Some(format!("{target} nats")),
            expected: Some(format!("at least {least} nats")),
            help: Some("raise the target or the budget, or add wider codes to compress.codes".into()),
            ..facts("budget", OUT_OF_REACH)
        },
        CompressError::TargetTime { budget, least } => FaultReport {
            key: Some("budget.target_ms".into()),
            found: Some(format!("{budget} ms")),
            expected: Some(format!("at least {least} ms")),
            help: Some("raise the target, or add narrower codes to compress.codes".into()),
            ..facts("budget", OUT_OF_REACH)
        },
        CompressError::Contradiction { keys, found, help } => FaultReport {
            key: Some(keys[1].into()),
            found: Some(found.clone()),
            expected: Some(format!("one of {} and {}", keys[0], keys[1])),
            help: Some((*help).into()),
            ..facts("contradiction", WRONG_USE)
        },
        CompressError::TooManyMasks { too_many, .. } => FaultReport {
            key: Some("compress.prune.method".into()),
            found: Some(format!("{} masks", too_many.masks)),
            expected: Some(format!("at most {EXHAUSTIVE_MASKS} masks")),
            help: Some("use method genetic or swap, or a smaller compress.prune.ratio".into()),
            ..facts("too-many-masks", WRONG_USE)
        },
        CompressError::Survey { file } => FaultReport {
            file: Some(file.display().to_string()),
            help: Some("remove the .partial folder beside the output and begin anew".into()),
            ..facts("survey", FAILED)
        },
        CompressError::Algebra(_) | CompressError::Statistics(_) => FaultReport {
            help: Some("give more calibration text".into()),
            ..facts("statistics", FAILED)
        },
        CompressError::FewTokens {
            file, named, expected, ..
        } => FaultReport {
            file: Some(file.display().to_string()),
            found: Some(named.clone()),
            expected: Some(format!("about {expected} tokens")),
            help: Some("give more calibration text, or raise compress.calibration_tokens".into()),
            ..facts("few-tokens", WRONG_USE)
        },
        CompressError::Plot { file, .. } => FaultReport {
            file: Some(file.display().to_string()),
            help: Some("this is a bug of cotk: please report it".into()),
            ..facts("plot", FAILED)
        },
        CompressError::Allocation(_) => FaultReport {
            help: Some("this is a bug of cotk: please report it with the recipe".into()),
            ..facts("allocation", FAILED)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_widths_that_cannot_be_right_are_wrong_use_with_both_sides() {
        let errors = [
            CompressError::SameText {
                calibration: "a.txt".into(),
                eval_text: "b.txt".into(),
            },
            CompressError::LittleBits {
                found: 3,
                expected: "2 or 4".into(),
            },
        ];
        for error in errors {
            let report = failure(&error);
            assert_eq!(report.exit_code, WRONG_USE, "{error}");
            assert!(report.found.is_some() && report.expected.is_some(), "{error}");
        }
    }
}
