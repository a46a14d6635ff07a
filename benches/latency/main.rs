//! `cargo xtask bench latency`: the figures of the shared latency model into `benches/results/latency-*.toml`. Each part is
//! measured here and now, on held-out work, against a profile that was frozen before; nothing is asserted.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

mod costs;
mod decode;
mod list;
mod networks;
mod operators;
mod output;
mod profile;
mod rivals;
mod threads;
mod transfer;

use std::path::PathBuf;

use anyhow::{Result, bail};

/// What was asked for.
pub(crate) struct Args {
    /// Small sizes: to see that all works, not to quote.
    pub(crate) small: bool,
    /// Networks are timed anew although an earlier run has timed them.
    pub(crate) fresh: bool,
    /// The profile that is judged; else this machine's.
    pub(crate) profile: Option<PathBuf>,
    /// Where results go.
    pub(crate) out: PathBuf,
    /// The command line, for the results' head.
    pub(crate) command: String,
}

type Part = (&'static str, &'static str, fn(&Args) -> Result<()>);

const PARTS: &[Part] = &[
    (
        "operators",
        "the profile's held-out operators, beside rivals",
        operators::run,
    ),
    ("networks", "100 random held-out networks, beside rivals", networks::run),
    (
        "threads",
        "a profile of 2 threads from one of 1 thread and 10 networks",
        threads::run,
    ),
    ("decode", "decode steps of mixtures of experts", decode::run),
    (
        "help",
        "few-shot transfer on HELP's NAS-Bench-201 tables",
        transfer::run,
    ),
    ("costs", "what a prediction costs", costs::run),
];

const HELP: &str =
    "usage: latency [PART…] [--profile FOLDER] [--small] [--fresh] [--out FOLDER]\n\nparts (all without one):";

fn main() -> Result<()> {
    let mut args = Args {
        small: false,
        fresh: false,
        profile: None,
        out: "benches/results".into(),
        command: "cargo xtask bench latency".into(),
    };
    let mut chosen: Vec<&Part> = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--bench" => {} // cargo's own
            "--small" => args.small = true,
            "--fresh" => args.fresh = true,
            // A child of this program: one session of a list of networks.
            "--session" => {
                let (Some(folder), Some(session)) = (words.next(), words.next()) else {
                    bail!("--session wants a folder and a number");
                };
                return list::session(folder.as_ref(), session.parse()?);
            }
            "--profile" => match words.next() {
                Some(folder) => args.profile = Some(folder.into()),
                None => bail!("--profile wants a folder"),
            },
            "--out" => match words.next() {
                Some(folder) => args.out = folder.into(),
                None => bail!("--out wants a folder"),
            },
            "-h" | "--help" => {
                println!("{HELP}");
                PARTS.iter().for_each(|part| println!("  {:14} {}", part.0, part.1));
                return Ok(());
            }
            name => match PARTS.iter().find(|part| part.0 == name) {
                Some(part) => chosen.push(part),
                None => bail!("no part `{name}`; --help lists them"),
            },
        }
    }
    if chosen.is_empty() {
        chosen = PARTS.iter().collect();
    } else {
        chosen.iter().for_each(|part| args.command += &format!(" {}", part.0));
    }
    if args.small {
        args.command += " --small";
    }
    for (name, what, part) in chosen {
        println!("{name}: {what}");
        part(&args)?;
    }
    Ok(())
}
