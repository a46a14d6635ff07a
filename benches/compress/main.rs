//! `cargo xtask bench mask-loss`, `compress-prune` and `compress-joint`: figures of compressing experts, into `benches/results/`. Each is
//! measured here and now; nothing is asserted.

#![expect(clippy::print_stderr, reason = "a program for people")]

mod joint;
mod lines;
mod mask_loss;
#[path = "../latency/output.rs"]
#[allow(
    dead_code,
    reason = "one home for the head of result files; not every program needs all of it"
)]
mod output;
mod prune;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// What was asked for.
pub(crate) struct Args {
    /// Small sizes: to see that all works, not to quote.
    pub(crate) small: bool,
    /// Where results go.
    pub(crate) out: PathBuf,
    /// Of `joint`: rows and budgets other than all, and whether to go on with what a stopped run left.
    pub(crate) rows: Option<String>,
    pub(crate) budgets: Option<Vec<f64>>,
    pub(crate) resume: bool,
    /// The command line, for the results' head.
    pub(crate) command: String,
}

type Part = (&'static str, fn(&Args) -> Result<()>);

const PARTS: &[Part] = &[
    ("mask-loss", mask_loss::run),
    ("prune", prune::run),
    ("joint", joint::run),
];

fn main() -> Result<()> {
    let mut args = Args {
        small: false,
        out: "benches/results".into(),
        rows: None,
        budgets: None,
        resume: false,
        command: String::new(),
    };
    let said: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let mut chosen: Vec<&Part> = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--bench" => {} // cargo's own
            "--small" => args.small = true,
            "--resume" => args.resume = true,
            "--rows" => args.rows = Some(words.next().context("--rows wants rows, as in rtn,joint")?),
            "--budgets" => {
                let budgets = words.next().context("--budgets wants bits, as in 4.5,2.5")?;
                args.budgets = Some(budgets.split(',').map(str::parse).collect::<Result<_, _>>()?);
            }
            "--out" => match words.next() {
                Some(folder) => args.out = folder.into(),
                None => bail!("--out wants a folder"),
            },
            name => match PARTS.iter().find(|part| part.0 == name) {
                Some(part) => chosen.push(part),
                None => bail!("no part `{name}`, expected mask-loss, prune or joint"),
            },
        }
    }
    for (name, run) in chosen {
        let bench = match *name {
            "prune" | "joint" => format!("compress-{name}"),
            name => name.to_owned(),
        };
        let more = said.iter().filter(|word| !PARTS.iter().any(|part| part.0 == *word));
        let words: Vec<&str> = [bench.as_str()].into_iter().chain(more.map(String::as_str)).collect();
        args.command = format!("cargo xtask bench {}", words.join(" "));
        run(&args)?;
    }
    Ok(())
}
