//! Processes of one measurement: `cotk profile` runs itself with `--worker`, hands it one job as JSON on standard input and
//! reads a line of JSON for each session. A process of its own has its own addresses, and its own ONNX Runtime.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use cotk_latency::probe::gather::{InProcess, Job, Runner, Session, Subject, Tools};
use cotk_latency::probe::memory::MemoryProbe;
use cotk_latency::probe::{NetworkProbe, Probe};
use cotk_latency::work::{Block, Key};
use cotk_latency::{Error, Result};
use cotk_onnx::probe::OnnxProbe;
use cotk_onnx::zoo::OnnxNetworks;
use cotk_run::cancel::Cancel;
use cotk_runtime::mix::Cpu;
use cotk_runtime::probes::EngineProbe;
use cotk_search::SearchError;
use serde::{Deserialize, Serialize};

use crate::context::{Context, Outcome};
use crate::fault::Fault;

/// What a worker reads: its job, and what its probes are made of.
#[derive(Serialize, Deserialize)]
struct Order {
    job: Job,
    threads: u32,
    block: Block,
    cache_bytes: u64,
}

/// A line that a worker writes.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Session(Session),
    Done,
    Failed(String),
}

/// No job of ours comes near this.
const LIMIT_BYTES: u64 = 1 << 28;

/// No machine has more.
const MOST_THREADS: u32 = 4096;

/// Runs each job in a process of its own; what reads a disk stays here, where the file is.
pub(crate) struct Processes {
    pub(crate) threads: u32,
    pub(crate) block: Block,
    pub(crate) cache_bytes: u64,
}

/// Ends with its owner.
struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Runner for Processes {
    fn run(
        &self,
        job: &Job,
        tools: &Tools<'_>,
        cancel: &Cancel,
        each: &mut dyn FnMut(Session) -> Result<()>,
    ) -> Result<()> {
        let is_disk = |subject: &Subject| matches!(subject, Subject::Key(Key::Read(r)) if r.tier.is_disk());
        let part = |disk: bool| Job {
            subjects: { job.subjects.iter() }
                .map(|group| group.iter().filter(|s| is_disk(s) == disk).copied().collect())
                .collect(),
            ..job.clone()
        };
        let begin = Instant::now();
        InProcess.run(&part(true), tools, cancel, each)?;
        let mut job = part(false);
        for limit in [&mut job.limit, &mut job.needed_limit].into_iter().flatten() {
            *limit = limit.saturating_sub(begin.elapsed());
        }
        if job.subjects.iter().all(Vec::is_empty) {
            return Ok(());
        }
        let order = Order {
            job,
            threads: self.threads,
            block: self.block,
            cache_bytes: self.cache_bytes,
        };
        let fail = |detail: String| Error::Probe {
            probe: "worker".into(),
            key: format!("session {}", order.job.session),
            detail,
        };
        let program = std::env::current_exe().map_err(|e| fail(e.to_string()))?;
        let mut child = Command::new(program)
            .args(["profile", "--worker", "--quiet", "--threads", &self.threads.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map(Worker)
            .map_err(|e| fail(e.to_string()))?;
        let text = serde_json::to_vec(&order).expect("plain data");
        let mut stdin = child.0.stdin.take().expect("piped");
        stdin.write_all(&text).map_err(|e| fail(e.to_string()))?;
        drop(stdin);
        let stdout = BufReader::new(child.0.stdout.take().expect("piped"));
        for line in stdout.lines() {
            cancel.check()?;
            let line = line.map_err(|e| fail(e.to_string()))?;
            match serde_json::from_str(&line).map_err(|e| fail(format!("{e} in `{line}`")))? {
                Line::Session(session) => each(session)?,
                Line::Done => return Ok(()),
                Line::Failed(detail) => return Err(fail(detail)),
            }
        }
        cancel.check()?;
        let status = child.0.wait().map_err(|e| fail(e.to_string()))?;
        Err(fail(format!("ended before its job was done: {status}")))
    }
}

/// `cotk profile --worker`: one job from standard input, sessions to standard output.
///
/// # Errors
/// An order that does not parse. What fails while measuring is told to the parent instead.
pub(crate) fn worker(cx: &Context) -> Result<Outcome, Fault> {
    let wrong = |detail: String| {
        Fault::usage(
            format!("--worker reads a job from standard input: {detail}"),
            "use `cotk profile`; it starts its workers itself",
        )
    };
    let mut text = Vec::new();
    let read = std::io::stdin().take(LIMIT_BYTES).read_to_end(&mut text);
    read.map_err(|e| wrong(e.to_string()))?;
    let order: Order = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
    if !(1..=MOST_THREADS).contains(&order.threads) {
        return Err(wrong(format!(
            "{} threads, expected 1 to {MOST_THREADS}",
            order.threads
        )));
    }
    // What is cold is measured over hundreds of MiB, key after key.
    cotk_run::system::keep_freed_memory();
    let mut out = std::io::stdout().lock();
    let mut say = |line: &Line| -> std::io::Result<()> {
        let text = serde_json::to_string(line).expect("plain data");
        writeln!(out, "{text}")?;
        out.flush()
    };
    let measured = probes(&order).and_then(|(probes, networks)| {
        let live: Vec<usize> = probes
            .iter()
            .map(|p| crate::commands::profile::live(p.name()))
            .collect();
        let tools = Tools {
            probes: &probes,
            live: &live,
            networks: networks.as_deref(),
        };
        let mut each = |session: Session| {
            // A parent that is gone needs no more sessions.
            say(&Line::Session(session)).map_err(|_| Error::Run(cotk_run::Error::Cancelled))
        };
        let done = InProcess.run(&order.job, &tools, &cx.cancel, &mut each);
        done.map_err(|e| SearchError::Latency(e).into())
    });
    let last = match &measured {
        Ok(()) => Line::Done,
        Err(fault) => Line::Failed(fault.report().message),
    };
    let _ = say(&last);
    Ok(Outcome {
        is_printed: true,
        ..Outcome::default()
    })
}

type Found = (Vec<Box<dyn Probe>>, Option<Box<dyn NetworkProbe>>);

/// The probes of a worker: without ONNX Runtime the rest.
fn probes(order: &Order) -> Result<Found, Fault> {
    let threads = crate::commands::profile::one_and(order.threads);
    let mut probes: Vec<Box<dyn Probe>> = Vec::new();
    let mut networks: Option<Box<dyn NetworkProbe>> = None;
    if cotk_onnx::runtime::library().is_ok() {
        let probe = OnnxProbe::new(Vec::new(), order.block).map_err(|e| Fault::from(SearchError::Onnx(e)))?;
        probes.push(Box::new(probe));
        networks = Some(Box::new(OnnxNetworks));
    }
    let cpu = Cpu::selected().map_err(|e| Fault::usage(e.to_string(), "leave COTK_ISA out"))?;
    let engine = EngineProbe::new(cpu, threads.clone(), order.cache_bytes);
    probes.push(Box::new(engine.map_err(|e| Fault::from(SearchError::Latency(e)))?));
    probes.push(Box::new(MemoryProbe::new(threads, order.cache_bytes)));
    let is_of_a_gpu = |subject: &Subject| matches!(subject, Subject::Key(Key::Read(r)) if r.tier.is_of_a_gpu());
    // A driver takes its time to start: only where it is needed.
    if order.job.subjects.iter().flatten().any(is_of_a_gpu) {
        let probe = crate::commands::profile::links().map_err(|why| Fault::usage(why, "measure anew"))?;
        probes.push(Box::new(probe));
    }
    Ok((probes, networks))
}
