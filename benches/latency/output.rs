//! The head that every result file carries, and its writing: machine, commit, date, command, then the figures.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use cotk_run::files;
use serde::Serialize;

use crate::Args;

/// Where and when a figure was measured.
#[derive(Serialize)]
struct Head<'a> {
    machine: String,
    commit: String,
    date: String,
    command: &'a str,
    /// Small sizes were asked for: not to be quoted.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    small: bool,
}

/// What the measured programs are made of; a changed page of text moves no figure.
const SOURCES: [&str; 8] = [
    "crates",
    "benches/latency",
    "recipes",
    "profiles",
    "Cargo.toml",
    "Cargo.lock",
    "build.rs",
    ".cargo",
];

fn output(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program).args(args).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The seed of what judges when nobody names one: nobody has tuned anything on lists that did not exist.
pub(crate) fn seed_of_the_day() -> Result<u64> {
    let (day, commit) = (
        output("date", &["-u", "+%Y-%m-%d"])?,
        output("git", &["rev-parse", "HEAD"])?,
    );
    Ok(files::checksum(format!("{day} {commit}").as_bytes()) % 1_000_000)
}

/// A folder as a command names it: from here if it lies below, else by its last name: where it lies is no fact about it.
pub(crate) fn shown(folder: &Path) -> String {
    let here = std::env::current_dir().ok();
    let below = here.and_then(|here| Some(folder.strip_prefix(here).ok()?.to_owned()));
    let shown = match below {
        Some(below) => Some(below),
        None if folder.is_relative() => Some(folder.to_owned()),
        None => folder.file_name().map(PathBuf::from),
    };
    shown.unwrap_or_default().display().to_string()
}

/// Writes `NAME.toml`: `# what`, the head, then `figures`.
pub(crate) fn write(args: &Args, name: &str, what: &str, figures: &impl Serialize) -> Result<()> {
    let cpuinfo = fs_err::read_to_string("/proc/cpuinfo")?;
    let cpu = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown", |(_, name)| name.trim());
    let status = [&["status", "--porcelain", "--"][..], &SOURCES].concat();
    let changed = if output("git", &status)?.is_empty() {
        ""
    } else {
        " with local changes"
    };
    let head = Head {
        machine: format!("{cpu}, {} cores", std::thread::available_parallelism()?),
        commit: format!("{}{changed}", output("git", &["rev-parse", "--short=12", "HEAD"])?),
        date: output("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"])?,
        command: &args.command,
        small: args.small,
    };
    let text = format!("# {what}\n{}\n{}", toml::to_string(&head)?, toml::to_string(figures)?);
    fs_err::create_dir_all(&args.out)?;
    let file = args.out.join(format!("{name}.toml"));
    fs_err::write(&file, &text)?;
    eprintln!("written to {}", file.display());
    Ok(())
}

/// Four significant digits: files for people.
pub(crate) fn round(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10f64.powf(3.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

/// Rounded, for `#[serde(serialize_with)]`.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's form")]
pub(crate) fn rounded<S: serde::Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(round(*value))
}
