//! A foreign network timed in ONNX Runtime here, to stand beside a prediction: never a part of one. Several sessions, since
//! a session fixes where its memory lies; the slices are `cotk_latency::probe::rounds`'.

use cotk_latency::probe::rounds::{Pace, time as rounds};
use cotk_latency::probe::{Prepared, median};
use cotk_run::seeds::Seeds;

use super::Network;
use crate::session::feeds::Fed;
use crate::{Error, Result};

/// Sessions that are opened one after the other.
const SESSIONS: usize = 3;

/// What a timing found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Median of the sessions' medians.
    pub ms: f64,
    /// Half of the way from the fastest session to the slowest.
    pub spread_ms: f64,
    /// How many sessions.
    pub sessions: usize,
    /// Whether the machine was undisturbed in all of them.
    pub is_quiet: bool,
}

struct Ready {
    fed: Fed,
    threads: u32,
}

impl Prepared for Ready {
    fn threads(&self) -> u32 {
        self.threads
    }

    fn run(&mut self, _piece: usize) -> cotk_latency::Result<()> {
        self.fed.call().map_err(|e| cotk_latency::Error::Probe {
            probe: "onnx".into(),
            key: "a whole network".into(),
            detail: e.to_string(),
        })
    }
}

/// Times a network, whatever its inputs are: floats are noise, whole numbers zeros and ones. `bytes` are those that `network` was read from.
///
/// # Errors
/// [`Error::NoLibrary`], [`Error::Load`], [`Error::Runtime`]; [`Error::Unsupported`] where weights lie in other files, which
/// are not opened.
pub fn time(file: &str, bytes: &[u8], network: &Network, threads: usize, seeds: &Seeds) -> Result<Measured> {
    if network.external_tensors > 0 {
        return Err(Error::Unsupported {
            file: file.to_owned(),
            node: network.name.clone(),
            what: "weights",
            found: format!("{} tensors in other files", network.external_tensors),
            expected: "all of them inside, to be run".into(),
        });
    }
    let dims = |input: &super::Input| input.dims.iter().filter_map(|&d| i64::try_from(d).ok()).collect();
    let dims: Vec<(String, Vec<i64>)> = { network.inputs.iter() }
        .map(|input| (input.name.clone(), dims(input)))
        .collect();
    let mut medians_ms = Vec::with_capacity(SESSIONS);
    let mut is_quiet = true;
    let mut order = seeds.stream("plan: rounds");
    for _ in 0..SESSIONS {
        let ready = Ready {
            fed: Fed::new(file, bytes, threads, &dims, seeds)?,
            threads: u32::try_from(threads).unwrap_or(1),
        };
        let timed = rounds(vec![Box::new(ready)], &Pace::CAREFUL, &mut order)?;
        for one in timed {
            medians_ms.push(one.median_us / 1e3);
            is_quiet &= one.quiet;
        }
    }
    let (low, high) = medians_ms
        .iter()
        .fold((f64::MAX, 0.0f64), |(low, high), &ms| (low.min(ms), high.max(ms)));
    Ok(Measured {
        ms: median(&medians_ms),
        spread_ms: (high - low) / 2.0,
        sessions: SESSIONS,
        is_quiet,
    })
}
