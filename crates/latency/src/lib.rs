//! The shared hardware model: profiles, the `Probe` trait, predictions, expectation tables.
//!
//! `work` (what can be asked, features with units) · `graph` (the typed CNN that `predict` walks) · `probe` (gather:
//! the only room with a clock) · `fit` · `predict` · `expect` · `profile` (disk). Milliseconds at every public
//! function; µs only inside fits and timing files. Kernels and runtimes live elsewhere and register a `Probe`.

#![forbid(unsafe_code)]

pub mod baselines;
pub mod correct;
pub mod expect;
pub mod explain;
pub mod fit;
pub mod graph;
pub mod identity;
pub mod judge;
pub mod moe;
pub mod predict;
pub mod probe;
pub mod profile;
pub mod schedule;
pub mod transfer;
pub mod walk;
pub mod work;

pub use self::error::{Difference, Error, Result};

mod cholesky;
mod error;
mod scales;
mod smooth;
