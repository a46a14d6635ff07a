//! What others predict by, fitted on the same profile: see `cotk_latency::baselines`.

use cotk_latency::baselines::{Rival, Rivals};
use cotk_latency::graph::Graph;
use cotk_latency::work::Key;

use crate::profile::Frozen;

/// Name and prediction of each item of a list.
pub(crate) type Predicted = (&'static str, Vec<f64>);

/// ms by rival and network; rivals that have nothing to go by are left out.
pub(crate) fn networks(frozen: &Frozen, graphs: &[Graph], threads: u32) -> Vec<Predicted> {
    let rivals = Rivals::new(&frozen.found.profile, threads);
    let of = |rival: &Rival| {
        let us: Option<Vec<f64>> = graphs.iter().map(|graph| rivals.network_us(*rival, graph)).collect();
        Some((rival.name(), us?.into_iter().map(|us| us / 1e3).collect()))
    };
    Rival::ALL.iter().filter_map(of).collect()
}

/// µs by rival and operator.
pub(crate) fn operators(frozen: &Frozen, keys: &[Key], threads: u32) -> Vec<Predicted> {
    let rivals = Rivals::new(&frozen.found.profile, threads);
    let of = |rival: &Rival| {
        let us: Option<Vec<f64>> = keys.iter().map(|key| rivals.operator_us(*rival, key)).collect();
        Some((rival.name(), us?))
    };
    Rival::ALL
        .iter()
        .filter(|rival| **rival != Rival::Alone)
        .filter_map(of)
        .collect()
}
