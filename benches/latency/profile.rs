//! The profile that is judged: taken before, frozen, named by the checksum of its coefficients.

use std::path::PathBuf;

use anyhow::{Context, Result};
use cotk_latency::identity::Identity;
use cotk_latency::predict::Model;
use cotk_latency::profile::{Found, Request, find};
use serde::Serialize;

/// Which profile a figure judges.
#[derive(Serialize)]
pub(crate) struct Judged {
    folder: String,
    date: String,
    commit: String,
    quick: bool,
    rows: usize,
    /// xxh3-64 of `coeffs.toml`: what was frozen.
    coeffs: String,
    noise_floor_pct: f64,
    noise_p90_pct: f64,
    steal_pct: f64,
    verdict: String,
}

/// A profile and what predicts from it.
pub(crate) struct Frozen {
    pub(crate) found: Found,
    pub(crate) model: Model,
    pub(crate) here: Identity,
}

impl Frozen {
    /// This machine's, or the folder that was named.
    pub(crate) fn load(named: Option<PathBuf>) -> Result<Self> {
        let runtimes = [("onnxruntime".to_owned(), cotk_onnx::runtime::version()?)];
        let here = Identity::here(runtimes.into_iter().collect());
        let request = Request {
            flag: named,
            ..Request::default()
        };
        let found = find(&request, &here).context("take one first: `cotk profile`")?;
        Ok(Self {
            model: found.model(),
            found,
            here,
        })
    }

    pub(crate) fn judged(&self) -> Judged {
        let head = &self.found.profile.head;
        Judged {
            // Its name only: where it lies is no fact about it.
            folder: self
                .found
                .folder
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            date: head.provenance.date.clone(),
            commit: head.provenance.commit.clone().unwrap_or_default(),
            quick: head.provenance.quick,
            rows: self.found.profile.rows.len(),
            coeffs: head
                .files
                .get("coeffs.toml")
                .map(|mark| mark.xxh3.clone())
                .unwrap_or_default(),
            noise_floor_pct: crate::output::round(head.noise.floor_pct),
            noise_p90_pct: crate::output::round(head.noise.p90_pct),
            steal_pct: crate::output::round(head.noise.steal_pct),
            verdict: format!("{:?}", head.noise.verdict).to_lowercase(),
        }
    }
}
