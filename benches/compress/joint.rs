//! Ways to spend a budget of bits on `ref-qwen2moe` beside each other on test text by domain, what nested codes cost, and
//! what one joint compression takes: `compress-joint.toml`, with the plot of KL against bytes beside it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cotk_compress::contest::budgets::{Contest, contest};
use cotk_compress::contest::entrant::Entrant;
use cotk_compress::contest::table::BudgetLine;
use cotk_compress::pipeline::{Request, Surroundings, compress};
use cotk_compress::recipe::Recipe;
use cotk_model::eval::{EvalOptions, evaluate};
use cotk_model::moe::Mode;
use cotk_run::cancel::Cancel;
use cotk_run::facts::FactList;
use cotk_run::progress::Silent;
use cotk_runtime::open::open;
use serde::Serialize;

use crate::Args;
use crate::lines::Lines;
use crate::output::{self, round};

const DOMAINS: [&str; 6] = ["wiki", "code", "fiction", "docs", "german", "math"];
/// Those with bars, and those that the plot has from 8 bits to 2 beside them.
const BUDGETS: [f64; 4] = [2.5, 3.5, 4.5, 2.25];
const PLOT_BUDGETS: [f64; 3] = [8.5, 6.0, 2.0];
/// Bars on KL over the best uniform code's, by budget: as allocated, healed.
const BARS: [(f64, f64, Option<f64>); 4] = [
    (4.5, 0.90, None),
    (3.5, 0.60, Some(0.50)),
    (2.5, 0.55, Some(0.45)),
    (2.25, 0.70, None),
];
/// On KL over MC-style allocation's, at every budget.
const MC_BAR: f64 = 0.85;
/// Of a finished contest.
const TABLE: &str = "comparison.json";
const RUN_SECONDS: f64 = 600.0;
const RUN_BYTES: f64 = 2_147_483_648.0;

#[derive(Serialize)]
struct Row {
    budget_bits: f64,
    by: String,
    seeds: u64,
    bits_per_expert_weight: f64,
    kl_nats: f64,
    kl_ci95: [f64; 2],
    /// KL over the best uniform code's, and its 95 % over documents.
    #[serde(skip_serializing_if = "Option::is_none")]
    times_uniform: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    times_uniform_ci95: Option<[f64; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    times_uniform_bar_at_most: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    times_mc: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    times_mc_ci95: Option<[f64; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    times_mc_bar_at_most: Option<f64>,
    /// Texts on which its KL is above that of the best uniform code; the bar of joint rows is none.
    above_uniform_in: Vec<String>,
    perplexity: f64,
    top1_agreement: f64,
    expert_bytes: u64,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    decode_tokens_per_s: Option<f64>,
    seconds: f64,
    peak_rss_bytes: u64,
    experts_dropped: usize,
    experts_constant: usize,
    experts_shrunk: usize,
    hessians_shrunk: usize,
    matrices: BTreeMap<String, usize>,
    kl_by_text: BTreeMap<String, f64>,
}

/// A width read from a nested code, against the plain code of that width.
#[derive(Serialize)]
struct Nested {
    bits: u32,
    kl_nats: f64,
    /// Absent at the full width, whose bar is on the KL itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    plain_kl_nats: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    times_plain: Option<f64>,
    bar_at_most: f64,
}

/// One `cotk compress --recipe moe-joint`.
#[derive(Serialize)]
struct Run {
    budget_bits: f64,
    seconds: f64,
    seconds_bar_at_most: f64,
    peak_rss_bytes: u64,
    peak_rss_bytes_bar_at_most: f64,
    bits_per_expert_weight: f64,
}

#[derive(Serialize)]
struct Figures {
    seed: u64,
    calibration_tokens: usize,
    targets: usize,
    windows: usize,
    documents: usize,
    perplexity_before: f64,
    bytes_before: u64,
    expert_bytes_before: u64,
    allowance_bits: f64,
    /// Spearman's, of expected losses and measured KL.
    #[serde(skip_serializing_if = "Option::is_none")]
    rank_correlation: Option<f64>,
    offers_s: f64,
    offers_peak_rss_bytes: u64,
    seconds: f64,
    left_out: Vec<String>,
    run: Option<Run>,
    row: Vec<Row>,
    /// Joint allocations that were measured end to end on held-out calibration text.
    tried: Vec<Tried>,
    nested: Vec<Nested>,
}

#[derive(Serialize)]
struct Tried {
    trust: f64,
    record_bytes: Option<u64>,
    kl_nats: f64,
}

struct Place {
    model: PathBuf,
    text: PathBuf,
    out: PathBuf,
    calibration_tokens: usize,
    is_small: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let shared = PathBuf::from("../shared/models");
    let place = Place {
        model: shared.join("ref-qwen2moe"),
        text: shared.join("text"),
        out: PathBuf::from("runs/bench-compress-joint"),
        calibration_tokens: if args.small { 8192 } else { 98_304 },
        is_small: args.small,
    };
    ensure!(
        place.model.join("config.json").is_file(),
        "{}: not there, see data/README.md",
        place.model.display()
    );
    let (budgets, entrants) = (place.budgets(args), place.entrants(args)?);
    let out = place.fresh("contest", args.resume)?;
    let wanted = Contest {
        request: place.request("moe-joint", &out, &[])?,
        entrants,
        plot_budgets: if args.small || args.budgets.is_some() {
            Vec::new()
        } else {
            PLOT_BUDGETS.to_vec()
        },
        budgets,
        texts: DOMAINS
            .map(|domain| place.text.join(format!("test-{domain}.txt")))
            .to_vec(),
        second_texts: vec![place.text.join("wikitext2-test.txt")],
        text_tokens: if args.small { 1024 } else { 8192 },
        decode_tokens: (!args.small).then_some(64),
    };
    // A finished table stands only for the same request to the same program.
    let program = cotk_run::files::checksum_file(&std::env::current_exe()?)?;
    let asked = format!("{program:016x} {wanted:?}\n");
    let asked_file = place.out.join("contest.asked");
    let is_same = fs_err::read_to_string(&asked_file).is_ok_and(|before| before == asked);
    let found = if is_same && out.join(TABLE).is_file() {
        serde_json::from_slice(&fs_err::read(out.join(TABLE))?)?
    } else {
        if out.exists() && !out.with_extension("partial").exists() {
            fs_err::remove_dir_all(&out)?;
        }
        let found = contest(&wanted, &surroundings(&FactList::default(), &Cancel::new()))?;
        fs_err::write(&asked_file, &asked)?;
        found
    };
    fs_err::create_dir_all(&args.out)?;
    fs_err::copy(out.join("pareto.svg"), args.out.join("compress-joint.svg"))?;
    let left_out = found.skipped.iter();
    let nested = place.nested()?;
    // Last: a contest runs for an hour beside other work, this one is timed.
    let run = if args.small { None } else { Some(place.run()?) };
    let figures = Figures {
        seed: 0,
        calibration_tokens: found.calibration_tokens,
        targets: found.targets,
        windows: found.windows,
        documents: found.documents,
        perplexity_before: round(found.perplexity_before),
        bytes_before: found.bytes_before,
        expert_bytes_before: found.expert_bytes_before,
        allowance_bits: found.allowance_bits,
        rank_correlation: found.ranking.map(|ranking| round(ranking.correlation)),
        offers_s: round(found.offers_seconds),
        offers_peak_rss_bytes: found.offers_peak_rss_bytes,
        seconds: round(found.seconds),
        left_out: left_out
            .map(|skipped| format!("{} at {} bits: {}", skipped.name, skipped.budget_bits, skipped.why))
            .collect(),
        run,
        row: found.lines.iter().map(row).collect(),
        tried: found.tried.iter().map(tried).collect(),
        nested,
    };
    let what = "ways to spend a budget of bits on the experts of ref-qwen2moe, all from the same calibration tokens";
    output::write(args, "compress-joint", what, &figures)
}

impl Place {
    fn budgets(&self, args: &Args) -> Vec<f64> {
        match (&args.budgets, self.is_small) {
            (Some(budgets), _) => budgets.clone(),
            (None, true) => vec![2.5],
            (None, false) => BUDGETS.to_vec(),
        }
    }

    fn entrants(&self, args: &Args) -> Result<Vec<Entrant>> {
        let Some(rows) = &args.rows else {
            return Ok(Entrant::usual());
        };
        let parse = |row| Entrant::parse(row).map_err(anyhow::Error::msg);
        rows.split(',').map(parse).collect()
    }

    /// A folder that is not there yet, or what an earlier run left of it.
    fn fresh(&self, name: &str, resume: bool) -> Result<PathBuf> {
        let out = self.out.join(name);
        fs_err::create_dir_all(&self.out)?;
        for stale in [out.clone(), out.with_extension("partial")] {
            if stale.exists() && !resume {
                fs_err::remove_dir_all(stale)?;
            }
        }
        Ok(out)
    }

    fn request(&self, recipe: &str, out: &Path, sets: &[String]) -> Result<Request> {
        let tokens = format!("compress.calibration_tokens={}", self.calibration_tokens);
        let sets: Vec<String> = sets.iter().cloned().chain([tokens]).collect();
        Ok(Request {
            model: self.model.clone(),
            out: out.to_owned(),
            recipe_name: recipe.to_owned(),
            recipe: Recipe::load(recipe, &sets, None, None)?,
            calibration: self.text.join("calibration.txt"),
            eval_text: Some(self.text.join("test.txt")),
        })
    }

    /// The whole of one compression, as a user has it.
    fn run(&self) -> Result<Run> {
        let budget_bits = 2.5;
        let out = self.fresh("run", false)?;
        let sets = [format!("budget.bits_per_expert_weight={budget_bits}")];
        let facts = FactList::default();
        let report = compress(
            &self.request("moe-joint", &out, &sets)?,
            &surroundings(&facts, &Cancel::new()),
        )?;
        Ok(Run {
            budget_bits,
            seconds: round(report.seconds),
            seconds_bar_at_most: RUN_SECONDS,
            peak_rss_bytes: report.peak_rss_bytes,
            peak_rss_bytes_bar_at_most: RUN_BYTES,
            bits_per_expert_weight: report.bits_per_expert_weight,
        })
    }

    /// What prefixes of a nested code lose, and plain codes of their widths.
    fn nested(&self) -> Result<Vec<Nested>> {
        let plain = |bits: u32| -> Result<f64> {
            let out = self.uniform(&format!("plain{bits}"), None)?;
            self.kl(&out, Mode::Exact)
        };
        let prefix = |bits: u32| -> Result<(f64, PathBuf)> {
            let out = self.uniform("nested2+2+4", Some(bits))?;
            Ok((self.kl(&out, Mode::Little)?, out))
        };
        let mut nested = Vec::new();
        let mut whole = None;
        for (bits, bar) in [(4, 1.15), (2, 1.3)] {
            let (kl, out) = prefix(bits)?;
            let plain = plain(bits)?;
            nested.push(Nested {
                bits,
                kl_nats: round(kl),
                plain_kl_nats: Some(round(plain)),
                times_plain: Some(round(kl / plain)),
                bar_at_most: bar,
            });
            whole = Some(out);
        }
        nested.push(Nested {
            bits: 8,
            kl_nats: round(self.kl(&whole.context("two prefixes")?, Mode::Exact)?),
            plain_kl_nats: None,
            times_plain: None,
            bar_at_most: 0.001,
        });
        Ok(nested)
    }

    /// One code for all experts, two-level scales of 16, by GPTQ.
    fn uniform(&self, code: &str, little: Option<u32>) -> Result<PathBuf> {
        let little = little.map(|bits| format!("compress.little_bits={bits}"));
        let name = format!("{}-{}", code.replace('+', "-"), little.as_deref().unwrap_or("plain"));
        let out = self.fresh(&name, false)?;
        let sets = [format!("compress.codes=['{code}']")].into_iter().chain(little);
        let facts = FactList::default();
        compress(
            &self.request("moe-gptq-uniform", &out, &sets.collect::<Vec<_>>())?,
            &surroundings(&facts, &Cancel::new()),
        )?;
        Ok(out)
    }

    /// On all test text, windows of 512.
    fn kl(&self, container: &Path, mode: Mode) -> Result<f64> {
        let (student, teacher) = (open(container)?, open(&self.model)?);
        let text = fs_err::read_to_string(self.text.join("test.txt"))?;
        let tokens = student.files.tokenizer.encode(&text)?;
        let options = EvalOptions {
            window: Some(512),
            stride: Some(512),
            max_tokens: Some(if self.is_small { 2048 } else { 49_152 }),
            mode,
            ..EvalOptions::default()
        };
        let found = evaluate(
            &student.model,
            &tokens,
            &options,
            Some(&teacher.model),
            &Silent,
            &Cancel::new(),
        )?;
        Ok(found.reference.context("there is a reference")?.kl_nats)
    }
}

fn surroundings<'a>(facts: &'a FactList, cancel: &'a Cancel) -> Surroundings<'a> {
    Surroundings {
        progress: &Lines,
        cancel,
        facts,
        cost: None,
        threads: 2,
    }
}

fn tried(tried: &cotk_compress::joint::points::Tried) -> Tried {
    Tried {
        trust: tried.trust,
        record_bytes: tried.record_bytes,
        kl_nats: round(tried.kl_nats),
    }
}

fn row(line: &BudgetLine) -> Row {
    let bars = BARS.iter().find(|bar| bar.0 == line.budget_bits);
    let bar = match line.name.as_str() {
        "joint" => bars.map(|bar| bar.1),
        "joint:healed" => bars.and_then(|bar| bar.2),
        _ => None,
    };
    Row {
        budget_bits: line.budget_bits,
        by: line.name.clone(),
        seeds: line.seeds,
        bits_per_expert_weight: round(line.bits_per_expert_weight),
        kl_nats: round(line.kl_nats),
        kl_ci95: line.kl_ci95.map(round),
        times_uniform: line.uniform_ratio.map(round),
        times_uniform_ci95: line.uniform_ratio_ci95.map(|ci| ci.map(round)),
        times_uniform_bar_at_most: bar,
        times_mc: line.mc_ratio.map(round),
        times_mc_ci95: line.mc_ratio_ci95.map(|ci| ci.map(round)),
        times_mc_bar_at_most: (line.name == "joint").then_some(MC_BAR),
        above_uniform_in: line.above_uniform_in.clone(),
        perplexity: round(line.perplexity),
        top1_agreement: round(line.top1_agreement),
        expert_bytes: line.expert_bytes,
        bytes: line.bytes,
        decode_tokens_per_s: line.decode_tokens_per_s.map(round),
        seconds: round(line.seconds),
        peak_rss_bytes: line.peak_rss_bytes,
        experts_dropped: line.counts.experts_dropped,
        experts_constant: line.counts.experts_constant,
        experts_shrunk: line.counts.experts_shrunk,
        hessians_shrunk: line.counts.hessians_shrunk,
        matrices: line.counts.matrices.clone(),
        kl_by_text: line
            .texts
            .iter()
            .map(|text| (text.text.clone(), round(text.kl_nats)))
            .collect(),
    }
}
