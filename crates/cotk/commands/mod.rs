//! The commands, one file each. `Cli` is what can be typed; each file's `run` does it.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use cotk_model::moe::Mode;

use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::sibling;

pub mod bench;
pub mod check;
pub mod compress;
mod compress_compare;
mod compress_contest;
pub mod eval;
mod eval_tasks;
pub mod export;
pub mod gpu_check;
pub mod inspect;
mod inspect_expert;
pub mod logits;
pub mod plan;
pub mod plan_moe;
pub mod profile;
mod profile_transfer;
mod profile_worker;
pub mod run;
pub mod search;
pub mod serve;

/// Makes neural networks fit a given machine, and proves that they do.
#[derive(Debug, Parser)]
#[command(name = "cotk", version, arg_required_else_help = true, max_term_width = 100)]
#[command(
    after_help = "Examples:\n  cotk compress --moe models/ref-qwen2moe -o out --recipe moe-int4 --calibration text.txt\n  cotk serve out --port 8080"
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that hold everywhere.
#[derive(Debug, clap::Args)]
pub struct Global {
    /// Print one JSON object on standard output, last
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress and no notes on standard error
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Seed of every random choice (default: the recipe's, else 0)
    #[arg(long, global = true, value_name = "N")]
    pub seed: Option<u64>,
    /// Threads to compute with (default: all cores)
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Folder written by `cotk profile`, for what predicts: compress, search, serve (default: this machine's)
    #[arg(long, global = true, value_name = "DIR")]
    pub profile: Option<PathBuf>,
    /// Use --profile although it was measured on another machine
    #[arg(long, global = true, requires = "profile")]
    pub force: bool,
}

/// What `cotk` does. (One variant a command, in the order of a user's day.)
#[derive(Debug, Subcommand)]
pub enum Command {
    Inspect(inspect::Args),
    Run(run::Args),
    Eval(eval::Args),
    Logits(logits::Args),
    Compress(compress::Args),
    Export(export::Args),
    Serve(serve::Args),
    Profile(profile::Args),
    Plan(plan::Args),
    Bench(bench::Args),
    Search(search::Args),
    Check(check::Args),
    GpuCheck(gpu_check::Args),
}

/// `--mode`: which width of the experts is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ModeArg {
    /// Their full stored width
    Exact,
    /// Their short prefix, in a container that has one
    Little,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Exact => Self::Exact,
            ModeArg::Little => Self::Little,
        }
    }
}

impl Command {
    /// As typed, and as `command` in `--json`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Inspect(_) => "inspect",
            Self::Run(_) => "run",
            Self::Eval(_) => "eval",
            Self::Logits(_) => "logits",
            Self::Compress(_) => "compress",
            Self::Export(_) => "export",
            Self::Serve(_) => "serve",
            Self::Profile(_) => "profile",
            Self::Plan(_) => "plan",
            Self::Bench(_) => "bench",
            Self::Search(_) => "search",
            Self::Check(_) => "check",
            Self::GpuCheck(_) => "gpu-check",
        }
    }
}

/// Runs one command of `cotk`.
///
/// # Errors
/// The command's own.
pub fn run(command: &Command, cx: &Context) -> Result<Outcome, Fault> {
    let _ = cx;
    match command {
        Command::Inspect(args) => inspect::run(args, cx),
        Command::Run(args) => run::run(args, cx),
        Command::Eval(args) => eval::run(args, cx),
        Command::Logits(args) => logits::run(args, cx),
        Command::Compress(args) => compress::run(args, cx),
        Command::Export(args) => export::run(args, cx),
        Command::Serve(args) => serve::run(args, cx),
        Command::Profile(args) => profile::run(args, cx),
        Command::Plan(args) => plan::run(args, cx),
        Command::Bench(args) => bench::run(args, cx),
        Command::Search(args) => {
            args.check()?;
            Err(sibling::become_trainer())
        }
        Command::Check(args) => check::run(args, cx),
        Command::GpuCheck(args) => gpu_check::run(args, cx),
    }
}
