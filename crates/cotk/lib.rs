//! The program: arguments, progress, tables, `--json`, exit codes. Holds no algorithm, and never names the crate that
//! links libtorch: that is `cotk-train`'s alone (`train.rs`).
//!
//! A command is one file in `commands/`: arguments → typed request → library call → [`context::Outcome`].

pub mod commands;
pub mod context;
pub mod fault;
pub mod launch;
mod model_faults;
pub mod predictor;
pub mod provenance;
mod search_faults;
pub mod sibling;
pub mod table;
pub mod ui;
