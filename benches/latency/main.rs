//! `cargo xtask bench latency`: the figures of the shared latency model into `benches/results/latency-*.toml`. Each part is
//! measured here and now, on held-out work, against a profile that was frozen before; nothing is asserted.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

mod bars;
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

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::bars::Bar;

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
    /// Of everything that judges: another one each day and commit, unless it is named.
    pub(crate) seed: u64,
    /// The command line, for the results' head.
    pub(crate) command: String,
}

type Part = (&'static str, &'static str, fn(&Args) -> Result<Vec<Bar>>);

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

const HELP: &str = "usage: latency [PART…] [--profile FOLDER] [--seed N] [--small] [--fresh] [--out FOLDER]

--seed N  draws what judges; without it a number made of the day and the commit, which the results state

parts (all without one):";

/// `latency.toml`.
#[derive(Serialize)]
struct Figures {
    seed: u64,
    seconds: f64,
    figure: Vec<Bar>,
}

fn main() -> Result<()> {
    let mut args = Args {
        small: false,
        fresh: false,
        profile: None,
        out: "benches/results".into(),
        seed: output::seed_of_the_day()?,
        command: "cargo xtask bench latency".into(),
    };
    let begin = std::time::Instant::now();
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
            "--seed" => args.seed = words.next().context("--seed wants a number")?.parse()?,
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
    let is_whole = chosen.is_empty();
    if is_whole {
        chosen = PARTS.iter().collect();
    } else {
        chosen.iter().for_each(|part| args.command += &format!(" {}", part.0));
    }
    if let Some(folder) = &args.profile {
        args.command += &format!(" --profile {}", output::shown(folder));
    }
    args.command += &format!(" --seed {}", args.seed);
    if args.small {
        args.command += " --small";
    }
    let (mut bars, mut failed) = (Vec::new(), Vec::new());
    for (name, what, part) in chosen {
        println!("{name}: {what}");
        match part(&args) {
            Ok(of_part) => bars.extend(of_part),
            // The others are still worth their minutes.
            Err(error) => {
                eprintln!("{name}: {error:#}");
                failed.push(*name);
            }
        }
    }
    println!("\n{}", bars::table(&bars));
    if is_whole {
        let figures = Figures {
            seed: args.seed,
            seconds: begin.elapsed().as_secs_f64().round(),
            figure: bars,
        };
        output::write(
            &args,
            "latency",
            "Every figure of the latency model beside its bar",
            &figures,
        )?;
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}
