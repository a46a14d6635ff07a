//! `cargo xtask bench mask-loss` and `compress-prune`: figures of choosing experts, into `benches/results/`. Each is
//! measured here and now; nothing is asserted.

#![expect(clippy::print_stderr, reason = "a program for people")]

mod mask_loss;
#[path = "../latency/output.rs"]
#[allow(
    dead_code,
    reason = "one home for the head of result files; not every program needs all of it"
)]
mod output;
mod prune;

use std::path::PathBuf;

use anyhow::{Result, bail};

/// What was asked for.
pub(crate) struct Args {
    /// Small sizes: to see that all works, not to quote.
    pub(crate) small: bool,
    /// Where results go.
    pub(crate) out: PathBuf,
    /// The command line, for the results' head.
    pub(crate) command: String,
}

type Part = (&'static str, fn(&Args) -> Result<()>);

const PARTS: &[Part] = &[("mask-loss", mask_loss::run), ("prune", prune::run)];

fn main() -> Result<()> {
    let mut args = Args {
        small: false,
        out: "benches/results".into(),
        command: String::new(),
    };
    let mut chosen: Vec<&Part> = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--bench" => {} // cargo's own
            "--small" => args.small = true,
            "--out" => match words.next() {
                Some(folder) => args.out = folder.into(),
                None => bail!("--out wants a folder"),
            },
            name => match PARTS.iter().find(|part| part.0 == name) {
                Some(part) => chosen.push(part),
                None => bail!("no part `{name}`, expected mask-loss or prune"),
            },
        }
    }
    for (name, run) in chosen {
        let bench = if *name == "prune" { "compress-prune" } else { name };
        args.command = format!("cargo xtask bench {bench}{}", if args.small { " --small" } else { "" });
        run(&args)?;
    }
    Ok(())
}
