//! MoeRuntimes: where expert weights live, caches and routing modes.
//!
//! [`mod@open`] opens any model folder, [`resident`] serves a container that is all in memory, [`cost`] says what a step
//! costs in the terms of the latency model; [`mix`] is the arithmetic that every runtime shares, over a
//! [`store::ExpertStore`]; [`in_memory`] holds experts that were made
//! here, [`synthetic`] makes models of noise, [`throughput`], [`probes`] and [`figure`] time them; [`policy`] holds decisions only, so that engine and simulator run the same code. Law: every
//! runtime passes `cotk_model::laws`. Not here: attention and routers (`cotk-model`), kernels (`cotk-kernels`).
#![forbid(unsafe_code)]

pub mod coded_dense;
pub mod cost;
pub mod figure;
pub mod in_memory;
pub mod mix;
pub mod open;
pub mod plan;
pub mod policy;
pub mod probes;
pub mod resident;
pub mod store;
pub mod synthetic;
pub mod synthetic_container;
pub mod throughput;

pub use self::error::{Error, Result};

mod error;
#[cfg(test)]
mod laws;
