//! Whole networks timed in processes of their own: each session of a list is one child process, its lines go to a file, and
//! a run that was stopped goes on behind the last line. Whole lists stay: another profile is judged on the same times, whose
//! date stands in the result (`--fresh` times anew). Predicts nothing.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use cotk_latency::graph::Graph;
use cotk_latency::probe::rounds::{Pace, time};
use cotk_latency::probe::{NetworkProbe, Prepared, median, quantile};
use cotk_onnx::zoo::OnnxNetworks;
use cotk_run::files;
use cotk_run::folder::utc_rfc3339;
use cotk_run::seeds::Seeds;
use serde::{Deserialize, Serialize};

use crate::Args;

/// Networks that are open at once.
const LIVE: usize = 12;
const LIMIT_BYTES: u64 = 1 << 28;

/// What a session is asked for.
#[derive(Clone, Serialize, Deserialize)]
struct Wish {
    graphs: Vec<Graph>,
    threads: u32,
    rounds: u32,
}

/// One network in one session: a line.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Line {
    network: usize,
    median_us: f64,
}

/// What a list took.
pub(crate) struct Times {
    /// Median over sessions of the median over slices, by network.
    pub(crate) ms: Vec<f64>,
    /// Median and 90th percentile of |ln(a / b)| over pairs of sessions of one network, in percent.
    pub(crate) floor_pct: f64,
    pub(crate) floor_p90_pct: f64,
    pub(crate) sessions: u32,
    /// When the list was begun.
    pub(crate) timed: String,
}

/// Measures `graphs` in `sessions` child processes. `name` is the folder of lines below `runs/bench-latency`.
pub(crate) fn measure(
    args: &Args,
    name: &str,
    graphs: &[Graph],
    threads: u32,
    (sessions, rounds): (u32, u32),
) -> Result<Times> {
    let wish = Wish {
        graphs: graphs.to_vec(),
        threads,
        rounds,
    };
    let text = serde_json::to_string(&wish)?;
    // Another list begins anew.
    let folder = PathBuf::from("runs/bench-latency").join(format!("{name}-{:016x}", files::checksum(text.as_bytes())));
    if args.fresh && folder.exists() {
        fs_err::remove_dir_all(&folder)?;
    }
    files::create_folder(&folder)?;
    let begun = folder.join("begun");
    if !begun.exists() {
        files::write_atomic(&begun, utc_rfc3339(SystemTime::now()).as_bytes())?;
    }
    files::write_atomic(folder.join("wish.json"), text.as_bytes())?;
    for session in 0..sessions {
        if lines(&folder, session)?.len() == graphs.len() {
            continue;
        }
        eprintln!(
            "  {name}: session {} of {sessions}, {} networks, {threads} threads",
            session + 1,
            graphs.len()
        );
        let status = Command::new(std::env::current_exe()?)
            .arg("--session")
            .arg(&folder)
            .arg(session.to_string())
            .status()
            .context("the bench starts itself")?;
        if !status.success() {
            bail!("session {session} of {name} ended with {status}");
        }
    }
    let mut medians = vec![Vec::new(); graphs.len()];
    for session in 0..sessions {
        for line in lines(&folder, session)? {
            medians[line.network].push(line.median_us);
        }
    }
    let mut repeats = Vec::new();
    for of in &medians {
        for (i, a) in of.iter().enumerate() {
            repeats.extend(of[..i].iter().map(|b| (a / b).ln().abs()));
        }
    }
    let times = Times {
        ms: medians.iter().map(|of| median(of) / 1e3).collect(),
        floor_pct: 100.0 * median(&repeats),
        floor_p90_pct: 100.0 * quantile(&repeats, 0.9),
        sessions,
        timed: files::read_text(&begun, LIMIT_BYTES)?,
    };
    Ok(times)
}

fn file(folder: &Path, session: u32) -> PathBuf {
    folder.join(format!("session-{session}.jsonl"))
}

/// Whole lines of a session; a last one that was cut is not there.
fn lines(folder: &Path, session: u32) -> Result<Vec<Line>> {
    let path = file(folder, session);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = files::read_text(&path, LIMIT_BYTES)?;
    Ok(text.lines().map_while(|line| serde_json::from_str(line).ok()).collect())
}

/// The child: one session of every network that has no line yet.
pub(crate) fn session(folder: &Path, session: u32) -> Result<()> {
    let wish: Wish = serde_json::from_str(&files::read_text(folder.join("wish.json"), LIMIT_BYTES)?)?;
    let done = lines(folder, session)?;
    let mut left: Vec<usize> = (0..wish.graphs.len()).collect();
    left.retain(|i| !done.iter().any(|line| line.network == *i));
    let mut order = Seeds::new(u64::from(session)).stream("order of a session");
    rand::seq::SliceRandom::shuffle(&mut left[..], &mut order);
    // Rewritten without a cut line.
    let mut out = fs_err::File::create(file(folder, session))?;
    for line in &done {
        writeln!(out, "{}", serde_json::to_string(line)?)?;
    }
    let pace = Pace {
        rounds: wish.rounds,
        ..Pace::CAREFUL
    };
    for batch in left.chunks(LIVE) {
        let open = |&i: &usize| OnnxNetworks.prepare(&wish.graphs[i], wish.threads, session);
        let prepared: Vec<Box<dyn Prepared>> = batch.iter().map(open).collect::<cotk_latency::Result<_>>()?;
        for (&network, timed) in batch.iter().zip(time(prepared, &pace, &mut order)?) {
            let line = Line {
                network,
                median_us: timed.median_us,
            };
            writeln!(out, "{}", serde_json::to_string(&line)?)?;
        }
        out.sync_data()?;
    }
    Ok(())
}
