//! `cargo xtask bench NAME`: one figure into `benches/results/NAME.toml`, with machine, commit, date and command beside
//! it. Every figure is measured here and now; nothing is asserted.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::demo::Inputs;
use crate::program::Program;
use crate::setup::{self, Torch};
use crate::shell;

/// One measured number and the bar that the project set for it.
struct Row {
    name: &'static str,
    value: f64,
    unit: &'static str,
    /// At most this; absent where there is no bar.
    bar: Option<f64>,
    /// Every sample behind the value, which is their median.
    samples: Vec<f64>,
}

struct Bench {
    name: &'static str,
    what: &'static str,
    measure: fn(&Path) -> Result<Vec<Row>>,
}

const BENCHES: &[Bench] = &[
    Bench {
        name: "demo",
        what: "the whole demo after the build",
        measure: demo,
    },
    Bench {
        name: "compress",
        what: "compressing the reference checkpoint: seconds and peak memory, 3 times",
        measure: compress,
    },
    Bench {
        name: "serve",
        what: "from start to ready, 5 times",
        measure: serve,
    },
    Bench {
        name: "search",
        what: "the quickstart search",
        measure: search,
    },
    Bench {
        name: "tests",
        what: "warm tests of the crates without libtorch",
        measure: tests,
    },
];

/// Figures of a program in `benches/`, which writes its own result files: name, what, target, its parts.
const TARGETS: &[(&str, &str, &str, &[&str])] = &[
    (
        "latency",
        "every figure of the latency model (15 minutes, a profile first)",
        "latency",
        &[],
    ),
    (
        "latency-operators",
        "the profile's held-out operators",
        "latency",
        &["operators"],
    ),
    (
        "latency-networks",
        "100 random networks that the profile has not seen",
        "latency",
        &["networks"],
    ),
    (
        "latency-decode",
        "decode steps of mixtures of experts",
        "latency",
        &["decode"],
    ),
    (
        "latency-transfer",
        "few-shot transfer, on HELP's tables and from 1 thread to 2",
        "latency",
        &["help", "threads"],
    ),
    ("latency-costs", "what a prediction costs", "latency", &["costs"]),
    (
        "mask-loss",
        "the exact loss of one mask of experts",
        "compress",
        &["mask-loss"],
    ),
    (
        "compress-joint",
        "ways to spend a budget of bits on the reference checkpoint, nested codes, one joint run (an hour)",
        "compress",
        &["joint"],
    ),
    (
        "compress-prune",
        "ways to choose experts of the reference checkpoint (15 minutes)",
        "compress",
        &["prune"],
    ),
];

pub(crate) fn command(args: &[String]) -> Result<()> {
    let Some(name) = args.first() else {
        for bench in BENCHES {
            shell::print(&format!("{:18} {}", bench.name, bench.what));
        }
        for (name, what, ..) in TARGETS {
            shell::print(&format!("{name:18} {what}"));
        }
        return Ok(());
    };
    if let Some((.., target, parts)) = TARGETS.iter().find(|target| target.0 == name) {
        let root = shell::root()?;
        setup::setup(Torch::Without)?;
        let mut cargo = shell::cargo(&root);
        cargo.args(["bench", "--quiet", "--profile", "dev", "--bench", target, "--"]);
        return shell::run(cargo.args(*parts).args(&args[1..]));
    }
    let Some(bench) = BENCHES.iter().find(|bench| bench.name == name) else {
        bail!("no bench `{name}`; `cargo xtask bench` lists them");
    };
    let root = shell::root()?;
    let rows = (bench.measure)(&root)?;
    let file = root.join("benches/results").join(format!("{name}.toml"));
    let text = format!(
        "{}{}",
        head(&root, bench)?,
        rows.iter().map(Row::to_toml).collect::<String>()
    );
    fs_err::write(&file, &text)?;
    shell::print(&format!("{text}\nwritten to {}", file.display()));
    Ok(())
}

fn head(root: &Path, bench: &Bench) -> Result<String> {
    let output = |program: &str, args: &[&str]| -> Result<String> {
        let output = std::process::Command::new(program)
            .current_dir(root)
            .args(args)
            .output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let cpuinfo = fs_err::read_to_string("/proc/cpuinfo")?;
    let cpu = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown", |(_, name)| name.trim());
    let cores = std::thread::available_parallelism()?;
    // What the measured programs are made of; a changed page of text moves no figure.
    let sources = [
        "status",
        "--porcelain",
        "--",
        "crates",
        "recipes",
        "profiles",
        "Cargo.toml",
        "Cargo.lock",
        "build.rs",
    ];
    let dirty = if output("git", &sources)?.is_empty() {
        ""
    } else {
        " with local changes"
    };
    Ok(format!(
        "# {}\nmachine = \"{cpu}, {cores} cores\"\ncommit = \"{}{dirty}\"\ndate = \"{}\"\ncommand = \"cargo xtask bench {}\"\n",
        bench.what,
        output("git", &["rev-parse", "--short=12", "HEAD"])?,
        output("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"])?,
        bench.name
    ))
}

impl Row {
    fn new(name: &'static str, unit: &'static str, bar: Option<f64>, mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self {
            name,
            value: samples[samples.len() / 2],
            unit,
            bar,
            samples,
        }
    }

    fn to_toml(&self) -> String {
        let bar = self.bar.map(|bar| format!("bar_at_most = {bar}\n")).unwrap_or_default();
        let samples: Vec<String> = self.samples.iter().map(|s| format!("{s:.3}")).collect();
        format!(
            "\n[[row]]\nname = \"{}\"\nvalue = {:.3}\nunit = \"{}\"\n{bar}samples = [{}]\n",
            self.name,
            self.value,
            self.unit,
            samples.join(", ")
        )
    }
}

fn demo(root: &Path) -> Result<Vec<Row>> {
    setup::setup(Torch::With)?;
    Program::build(root)?;
    let start = Instant::now();
    crate::demo::command(&[])?;
    Ok(vec![Row::new(
        "demo",
        "s",
        Some(300.0),
        vec![start.elapsed().as_secs_f64()],
    )])
}

fn compress(root: &Path) -> Result<Vec<Row>> {
    let program = Program::build(root)?;
    let inputs = Inputs::find(root);
    let (mut seconds, mut peaks) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let (result, took) = inputs.compress(&program, &root.join("runs/bench-compress"), &[])?;
        seconds.push(took);
        peaks.push(
            result["peak_rss_bytes"]
                .as_f64()
                .context("compress says no peak_rss_bytes")?,
        );
    }
    Ok(vec![
        Row::new("compress_seconds", "s", Some(60.0), seconds),
        Row::new("compress_peak_rss", "bytes", Some(1_073_741_824.0), peaks),
    ])
}

fn serve(root: &Path) -> Result<Vec<Row>> {
    let program = Program::build(root)?;
    let out = root.join("runs/bench-serve");
    Inputs::find(root).compress(&program, &out, &[])?;
    let mut ready = Vec::new();
    for _ in 0..5 {
        let server = program.serve(&out)?;
        ready.push(server.ready_s);
        server.stop()?;
    }
    Ok(vec![Row::new("serve_ready", "s", Some(2.0), ready)])
}

fn search(root: &Path) -> Result<Vec<Row>> {
    setup::setup(Torch::With)?;
    let program = Program::build(root)?;
    let (_, seconds) = program.json(&["search", "recipes/quickstart.toml", "--restart"])?;
    Ok(vec![Row::new("quickstart_search", "s", Some(180.0), vec![seconds])])
}

fn tests(root: &Path) -> Result<Vec<Row>> {
    let args = ["--no-torch".to_owned()];
    crate::test::command(&args)?; // builds; what is timed is the second, warm run
    let mut seconds = Vec::new();
    for _ in 0..3 {
        let start = Instant::now();
        crate::test::command(&args)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let _ = root;
    Ok(vec![Row::new("warm_tests_without_libtorch", "s", Some(60.0), seconds)])
}
