//! The compression pipeline: calibration stream, statistics, stages, allocation, build, report.
//!
//! [`pipeline::compress`] is the whole way, top to bottom; a layer's weights are the only ones in memory. [`stage`]
//! proposes, [`decide`] chooses, `cotk-container` writes. Law: same recipe, seed and inputs give the same bytes, whatever
//! the threads and wherever it was killed. Not here: formats, kernels, what a model family looks like.
#![forbid(unsafe_code)]

pub mod attention;
pub mod baselines;
pub mod choice;
pub mod contest;
pub mod decide;
pub mod heal;
pub mod joint;
pub mod layer;
pub mod partial;
pub mod pipeline;
pub mod prune;
pub mod quality;
pub mod recipe;
pub mod report;
pub mod shrink;
pub mod source;
pub mod stage;
pub mod states;
pub mod text;

pub use self::error::{CompressError, Result};

mod build;
mod error;
mod finish;
#[cfg(test)]
mod laws;
mod measure;
mod novice;
mod walk;
