//! Checkpoint reading, families, attention, KV cache, tokenizer, sampling, evaluation, and the MoeRuntime seam.

pub mod checkpoint;
pub mod config;
pub mod eval;
pub mod export;
pub mod families;
pub mod folder;
pub mod generate;
pub mod inventory;
pub mod laws;
pub mod layers;
pub mod model;
pub mod moe;
pub mod reference;
pub mod sampling;
pub mod spec;
pub mod tasks;
pub mod tokenizer;

pub use self::error::ModelError;

mod error;

#[cfg(test)]
mod config_tests;
#[cfg(test)]
mod goldens;
#[cfg(test)]
mod released_tests;
#[cfg(test)]
mod trained_tests;
