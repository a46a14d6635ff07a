//! Ways to take a quarter and a half of the expert weights of `ref-qwen2moe` away, beside each other on test text by domain.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use cotk_compress::pipeline::{Request, Surroundings};
use cotk_compress::prune::compare::{Compare, Line, RowWish, compare};
use cotk_compress::recipe::Recipe;
use cotk_run::cancel::Cancel;
use cotk_run::facts::FactList;
use serde::Serialize;

use crate::Args;
use crate::lines::Lines;
use crate::output;

#[derive(Serialize)]
struct Row {
    gone: f64,
    by: String,
    seeds: u64,
    #[serde(serialize_with = "output::rounded")]
    kl_nats: f64,
    kl_ci95: [f64; 2],
    /// KL over REAP's with equal counts, and its 95 % over windows.
    times_reap: Option<f64>,
    times_reap_ci95: Option<[f64; 2]>,
    /// The same over MoE-I²'s own settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    times_paper: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    times_paper_ci95: Option<[f64; 2]>,
    /// Of `times_reap`; of `times_paper` where channels go.
    #[serde(skip_serializing_if = "Option::is_none")]
    bar_at_most: Option<f64>,
    /// Share of the experts' weights.
    weights_gone: f64,
    /// Layers in which the refit of down projections, that of scales, and that of the router was kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    healed_layers: Option<[usize; 3]>,
    #[serde(serialize_with = "output::rounded")]
    perplexity: f64,
    /// Relative loss of layers' outputs: on the half that chose, on the other.
    chosen_loss: f64,
    loss: f64,
    dropped: Vec<usize>,
    bytes: u64,
    masks_tried: usize,
    field_runs: usize,
    #[serde(serialize_with = "output::rounded")]
    search_s: f64,
    kl_by_text: BTreeMap<String, f64>,
}

#[derive(Serialize)]
struct Figures {
    semantics: &'static str,
    calibration_tokens: usize,
    targets: usize,
    windows: usize,
    #[serde(serialize_with = "output::rounded")]
    perplexity_before: f64,
    bytes_before: u64,
    #[serde(serialize_with = "output::rounded")]
    seconds: f64,
    peak_rss_bytes: u64,
    row: Vec<Row>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let shared = PathBuf::from("../shared/models");
    let (model, text) = (shared.join("ref-qwen2moe"), shared.join("text"));
    ensure!(
        model.join("config.json").is_file(),
        "{}: not there, see data/README.md",
        model.display()
    );
    let out = Path::new("runs/bench-compress-prune");
    if out.exists() {
        fs_err::remove_dir_all(out)?;
    }
    let (calibration, tokens) = if args.small { (8192, 1024) } else { (98_304, 4096) };
    let sets = [
        "compress.drop_ratio=0".to_owned(),
        "compress.prune.ratio=0.25".to_owned(),
        format!("compress.calibration_tokens={calibration}"),
        format!("compress.prune.gram_tokens={}", if args.small { 1024 } else { 8192 }),
        format!("compress.prune.end_tokens={}", if args.small { 2048 } else { 16_384 }),
    ];
    let domains = ["wiki", "code", "fiction", "docs", "german", "math"];
    let request = Compare {
        request: Request {
            model,
            out: out.to_owned(),
            recipe_name: "moe-int4".to_owned(),
            recipe: Recipe::load("moe-int4", &sets, None, None)?,
            calibration: text.join("calibration.txt"),
            eval_text: None,
        },
        rows: RowWish::usual(),
        ratios: vec![0.25, 0.5],
        texts: domains
            .iter()
            .map(|domain| text.join(format!("test-{domain}.txt")))
            .collect(),
        second_texts: vec![text.join("wikitext2-test.txt")],
        text_tokens: tokens,
    };
    let facts = FactList::default();
    let found = compare(
        &request,
        &Surroundings {
            progress: &Lines,
            cancel: &Cancel::new(),
            facts: &facts,
            cost: None,
            threads: 2,
        },
    )?;
    let figures = Figures {
        semantics: found.semantics.name(),
        calibration_tokens: found.calibration_tokens,
        targets: found.targets,
        windows: found.windows,
        perplexity_before: found.perplexity_before,
        bytes_before: found.bytes_before,
        seconds: found.seconds,
        peak_rss_bytes: found.peak_rss_bytes,
        row: found.lines.iter().map(row).collect(),
    };
    let what = "expert weights of ref-qwen2moe taken away by each method, nothing coded";
    output::write(args, "compress-prune", what, &figures)
}

fn row(line: &Line) -> Row {
    let round = output::round;
    // The bars: masks by exact loss and unequal ratios against REAP at a quarter and a half, healed at a half; any mix
    // against MoE-I² at a half.
    let is_half = line.ratio > 0.3;
    let bar = match line.name.as_str() {
        "genetic unequal" | "swap unequal" => Some(if is_half { 0.80 } else { 0.70 }),
        "swap unequal healed" if is_half => Some(0.80),
        "channels unequal" | "mix unequal" if is_half => Some(0.35),
        _ => None,
    };
    Row {
        gone: line.ratio,
        by: line.name.clone(),
        seeds: line.seeds,
        kl_nats: line.kl_nats,
        kl_ci95: line.kl_ci95.map(round),
        times_reap: line.kl_ratio.map(round),
        times_reap_ci95: line.kl_ratio_ci95.map(|ci| ci.map(round)),
        times_paper: line.kl_of_paper.map(round),
        times_paper_ci95: line.kl_of_paper_ci95.map(|ci| ci.map(round)),
        bar_at_most: bar,
        weights_gone: round(line.gone),
        healed_layers: line.healed,
        perplexity: line.perplexity,
        chosen_loss: round(line.chosen_loss),
        loss: round(line.loss),
        dropped: line.dropped.clone(),
        bytes: line.bytes,
        masks_tried: line.masks_tried,
        field_runs: line.field_runs,
        search_s: line.search_seconds,
        kl_by_text: line
            .texts
            .iter()
            .map(|text| (text.text.clone(), round(text.kl_nats)))
            .collect(),
    }
}
