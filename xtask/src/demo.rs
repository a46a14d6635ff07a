//! `cargo xtask demo`: the three jobs on real input, one table. Uses `ref-qwen2moe` when it is there, the committed tiny
//! checkpoint otherwise. Its rows in `runs/ledger` are the ones that `benches/baseline.toml` guards.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::program::Program;
use crate::setup::{self, Torch};
use crate::shell;
use crate::table::Table;

pub(crate) fn command(args: &[String]) -> Result<()> {
    ensure!(args.is_empty(), "demo takes no arguments");
    setup::setup(Torch::With)?;
    let root = shell::root()?;
    let program = Program::build(&root)?;
    let start = Instant::now();
    let table = jobs(&program, &root)?;
    shell::print(&format!(
        "{}\n{:.0} s in all; rows in runs/ledger, `cotk check` compares them with benches/baseline.toml",
        table.render(),
        start.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// What the guarded predictions are made on, whatever this machine is.
const REFERENCE_PROFILE: &str = "profiles/reference/epyc-2c-avx512vnni";

/// The models and texts of the demo.
pub(crate) struct Inputs {
    pub(crate) model: PathBuf,
    pub(crate) calibration: PathBuf,
    pub(crate) eval_text: PathBuf,
}

impl Inputs {
    /// `ref-qwen2moe` beside the checkout or in `$COTK_DATA`, else the committed tiny checkpoint.
    pub(crate) fn find(root: &Path) -> Self {
        let folders = [
            Some(root.join("../shared")),
            std::env::var_os("COTK_DATA").map(PathBuf::from),
            Some(root.join("data")),
        ];
        for folder in folders.into_iter().flatten() {
            let model = folder.join("models/ref-qwen2moe");
            let text = folder.join("models/text");
            if model.join("model.safetensors").exists() && text.join("calibration.txt").exists() {
                return Self {
                    model,
                    calibration: text.join("calibration.txt"),
                    eval_text: text.join("test.txt"),
                };
            }
        }
        Self::tiny(root)
    }

    /// The committed checkpoint: the same on every machine.
    pub(crate) fn tiny(root: &Path) -> Self {
        let tiny = root.join("data/tiny-qwen2moe");
        Self {
            calibration: tiny.join("train.txt"),
            eval_text: tiny.join("heldout.txt"),
            model: tiny,
        }
    }

    /// Removes what an earlier demo left, compresses into `out`, returns `result` and seconds.
    pub(crate) fn compress(&self, program: &Program, out: &Path, more: &[&str]) -> Result<(Value, f64)> {
        if out.exists() {
            fs_err::remove_dir_all(out)?;
        }
        let mut args = vec![
            "compress",
            "--moe",
            text(&self.model)?,
            "-o",
            text(out)?,
            "--recipe",
            "moe-int4",
        ];
        args.extend([
            "--calibration",
            text(&self.calibration)?,
            "--eval-text",
            text(&self.eval_text)?,
        ]);
        args.extend(more);
        program.json(&args)
    }
}

fn jobs(program: &Program, root: &Path) -> Result<Table> {
    let mut table = Table::new(&["job", "what", "before", "after", "note"]);
    let runs = root.join("runs");
    fs_err::create_dir_all(&runs)?;

    let (profile, seconds) = program.json(&["profile", "--quick"])?;
    table.row([
        "profile".to_owned(),
        text_of(&profile["device"]),
        String::new(),
        format!("{} timings", number(&profile["timings"], 0)),
        format!("noise {} %, {seconds:.0} s", number(&profile["noise_floor_pct"], 1)),
    ]);

    // Always the tiny checkpoint too, on a committed profile: its figures are the same everywhere, so that they can be
    // guarded by benches/baseline.toml.
    let committed = ["--profile", REFERENCE_PROFILE];
    let tiny = Inputs::tiny(root);
    let inputs = Inputs::find(root);
    let mut served = runs.join("demo-tiny");
    compress_rows(
        &mut table,
        "tiny-qwen2moe",
        &tiny.compress(program, &served, &committed)?,
    );
    if inputs.model != tiny.model {
        served = runs.join("demo-ref");
        compress_rows(&mut table, "ref-qwen2moe", &inputs.compress(program, &served, &[])?);
    }

    let server = program.serve(&served)?;
    for mode in ["exact", "little"] {
        let start = Instant::now();
        let reply = server.post(
            "/v1/completions",
            &json!({ "model": server.model, "prompt": "The old man said that", "max_tokens": 64, "temperature": 0, "cotk": { "mode": mode } }),
        )?;
        let tokens = reply["usage"]["completion_tokens"].as_f64().unwrap_or(0.0);
        table.row([
            "serve".to_owned(),
            format!("{mode} experts"),
            String::new(),
            format!("{:.0} tokens/s", tokens / start.elapsed().as_secs_f64()),
            text_of(&reply["choices"][0]["text"])
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
                .chars()
                .take(36)
                .collect(),
        ]);
    }
    let ready_s = server.ready_s;
    server.stop()?;
    table.row([
        "serve".to_owned(),
        "ready after".to_owned(),
        String::new(),
        format!("{ready_s:.2} s"),
        "drained on SIGTERM".to_owned(),
    ]);

    let guarded = [
        "search",
        "tests/recipes/search-guarded.toml",
        "--restart",
        "--profile",
        REFERENCE_PROFILE,
    ];
    let (tiny, seconds) = program.json(&guarded)?;
    table.row([
        "search".to_owned(),
        "small recipe, predicted ms".to_owned(),
        String::new(),
        number(&tiny["predicted_ms"], 4),
        format!("on a committed profile, {seconds:.0} s"),
    ]);
    let (search, seconds) = program.json(&["search", "recipes/quickstart.toml", "--restart"])?;
    let accuracy = |value: &Value| format!("{} %", number(&json!(value.as_f64().unwrap_or(f64::NAN) * 100.0), 2));
    table.row([
        "search".to_owned(),
        "glyphs, test accuracy".to_owned(),
        accuracy(&search["baseline"]["accuracy_test"]),
        accuracy(&search["accuracy_test"]),
        format!("before: {}", text_of(&search["baseline"]["name"])),
    ]);
    table.row([
        "search".to_owned(),
        "latency in ms, measured".to_owned(),
        number(&search["baseline"]["measured_ms"], 3),
        number(&search["measured_ms"], 3),
        format!(
            "predicted {}, target {}, {seconds:.0} s",
            number(&search["predicted_ms"], 3),
            number(&search["target_ms"], 3)
        ),
    ]);
    table.row([
        "search".to_owned(),
        "bytes".to_owned(),
        number(&search["baseline"]["bytes"], 0),
        number(&search["network"]["bytes"], 0),
        String::new(),
    ]);
    Ok(table)
}

fn compress_rows(table: &mut Table, name: &str, (result, seconds): &(Value, f64)) {
    table.row([
        "compress".to_owned(),
        format!("{name}, expert bytes"),
        number(&result["expert_bytes_before"], 0),
        number(&result["expert_bytes_after"], 0),
        format!(
            "{} bits a weight, {seconds:.0} s",
            number(&result["bits_per_expert_weight"], 2)
        ),
    ]);
    table.row([
        "compress".to_owned(),
        format!("{name}, perplexity"),
        number(&result["perplexity_before"], 3),
        number(&result["perplexity_after"], 3),
        format!(
            "KL {} nats, top-1 {}",
            number(&result["kl_nats"], 4),
            number(&result["top1_agreement"], 3)
        ),
    ]);
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{}: not UTF-8", path.display()))
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or("-").to_owned()
}

fn number(value: &Value, decimals: usize) -> String {
    value
        .as_f64()
        .map_or_else(|| "-".to_owned(), |number| format!("{number:.decimals$}"))
}
