//! Which profile a search reads, and the small one that it measures itself when the machine has none. Measures through
//! `cotk_latency`'s loop, with ONNX Runtime's probe. Law: what is used is named, and its gaps are said.

use std::path::{Path, PathBuf};

use cotk_latency::identity::Identity;
use cotk_latency::predict::{CostModel, Model, Prediction};
use cotk_latency::probe::gather::{InProcess, Settings};
use cotk_latency::probe::measure::{Plan, Wanted, With};
use cotk_latency::profile::{Profile, Purpose};
use cotk_latency::walk::operators;
use cotk_latency::work::{Key, Work};
use cotk_onnx::probe::OnnxProbe;
use cotk_run::seeds::Seeds;
use serde::{Deserialize, Serialize};

use crate::cost::THREADS;
use crate::pipeline::Request;
use crate::recipe::Recipe;
use crate::space::{Form, Point, Space};
use crate::{Result, SearchError};

/// The profile of a run, as journaled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profiled {
    pub folder: PathBuf,
    pub warnings: Vec<String>,
}

/// This machine, with the runtime that its networks are measured in.
///
/// # Errors
/// [`SearchError::Onnx`] when there is no ONNX Runtime.
pub fn here() -> Result<Identity> {
    let runtimes = [("onnxruntime".to_owned(), cotk_onnx::runtime::version()?)];
    Ok(Identity::here(runtimes.into_iter().collect()))
}

/// The profile that is asked for, or this machine's; `None` when nothing was named and there is none.
///
/// # Errors
/// [`SearchError::Latency`] for a profile that is named and missing, another machine's, or damaged.
pub fn find(flag: Option<&Path>, force: bool, recipe: &Recipe) -> Result<Option<(Profiled, Model)>> {
    let request = cotk_latency::profile::Request {
        flag: flag.map(Path::to_owned),
        recipe: Some(recipe.latency.profile.clone()),
        force,
    };
    let is_named = request.is_named();
    match cotk_latency::profile::find(&request, &here()?) {
        Ok(found) => {
            let warnings = found
                .model()
                .flags()
                .iter()
                .map(|flag| format!("predicted from the profile: {flag}"))
                .collect();
            let model = found.model();
            let folder = found.folder;
            Ok(Some((Profiled { folder, warnings }, model)))
        }
        Err(cotk_latency::Error::NoProfile { .. }) if !is_named => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Refuses a profile in which a kind of operator of the space is missing, all of them by name.
///
/// # Errors
/// [`SearchError::Latency`].
pub fn suffices(space: &Space, model: &Model) -> Result<()> {
    Ok(model.suffices(&space.cover()?, THREADS, "the networks of this search")?)
}

/// Measures the operators of the space into `folder` (a run's own): seconds, not minutes.
///
/// # Errors
/// [`SearchError::Onnx`] without ONNX Runtime; [`SearchError::Latency`] when a probe fails.
pub fn measure(space: &Space, folder: &Path, request: &Request<'_>) -> Result<(Profiled, Model)> {
    let text = "no profile of this machine: measuring the operators of the space first (`cotk profile` does it better)";
    request.progress.note(text);
    let identity = here()?;
    let mut keys: Vec<Key> = Vec::new();
    for graph in space.cover()? {
        keys.extend(operators(&graph, THREADS, identity.block()));
    }
    let probe = OnnxProbe::new(keys, identity.block())?;
    let wanted = Wanted {
        table: probe.seeds(),
        probe: Box::new(probe),
        heldout: 0,
        live: 16,
        adapt: false,
    };
    let plan = Plan {
        // The space's own operators and nothing else.
        settings: Settings {
            per_path: 0,
            ..Settings::QUICK
        },
        seeds: Seeds::new(request.recipe.seed),
        quick: true,
        purpose: Purpose::Machine,
        identity,
        cotk_version: request.cotk_version.clone(),
        commit: Some(request.commit.clone()),
        networks: Vec::new(),
        canaries: Vec::new(),
    };
    let with = With {
        runner: &InProcess,
        networks: None,
    };
    let measured =
        cotk_latency::probe::measure::measure(vec![wanted], &plan, with, folder, request.cancel, request.progress)?;
    let profiled = Profiled {
        folder: folder.to_owned(),
        warnings: vec!["no profile of this machine was there: a small one was measured for this run".to_owned()],
    };
    Ok((profiled, measured.profile.model(&[])))
}

impl Profiled {
    /// The prediction of one network, read anew from the profile's folder.
    ///
    /// # Errors
    /// [`SearchError::Latency`] when the profile is gone or another one.
    pub fn predict(&self, space: &Space, point: &Point) -> Result<Prediction> {
        let model = Profile::load(&self.folder)?.model(&[]);
        let graph = space.cost_graph(point, Form::Int8)?;
        let work = Work::Graph {
            graph: &graph,
            threads: THREADS,
        };
        model.predict(&work).map_err(SearchError::from)
    }
}
