//! Who measured: version, commit, build, command line, machine. The one place where a command gets its ledger from.

use std::path::Path;

use cotk_ledger::{LedgerSink, Provenance, default_folder};
use cotk_run::files;

use crate::context::Context;
use crate::fault::Fault;
use crate::sibling;

/// What of a run the surroundings do not know.
#[derive(Debug, Clone, Copy, Default)]
pub struct Run<'a> {
    /// Hash of the resolved recipe.
    pub recipe_hash: Option<u64>,
    /// The seed that was used, if anything was drawn.
    pub seed: Option<u64>,
    /// The run folder.
    pub folder: Option<&'a Path>,
}

/// The ledger (`$COTK_RUNS/ledger`, else `runs/ledger`) for the facts of one run: hand it to libraries as their
/// `FactSink`.
///
/// # Errors
/// When its folder or file cannot be made.
pub fn ledger(cx: &Context, run: Run<'_>) -> Result<LedgerSink, Fault> {
    ledger_with_inputs(cx, run, None)
}

/// As [`ledger`], for figures that also depend on files: `inputs` is a hash over them.
///
/// # Errors
/// As [`ledger`].
pub fn ledger_with_inputs(cx: &Context, run: Run<'_>, inputs: Option<u64>) -> Result<LedgerSink, Fault> {
    let provenance = Provenance {
        cotk_version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: sibling::commit().to_owned(),
        build: Some(sibling::build_id().to_owned()),
        command: cx.command_line.clone(),
        recipe_hash: run.recipe_hash,
        inputs,
        seed: run.seed,
        device: device(),
        run: run.folder.map(|folder| folder.display().to_string()),
    };
    Ok(LedgerSink::open(default_folder(), provenance)?)
}

/// CPU model and cores: `AMD EPYC 7B13, 2 cores`.
fn device() -> String {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let model = files::read_text("/proc/cpuinfo", 1 << 24).ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    format!(
        "{}, {cores} cores",
        model.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
    )
}
