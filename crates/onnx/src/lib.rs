//! ONNX reader and writer (QDQ), ONNX Runtime sessions, timing probes.
//!
//! `weights` (what goes beside a `cotk_latency::graph::Graph`) · `write` and `read` (bytes) · `reference` (the graph in
//! plain Rust: the truth that the runtime is held to) · `runtime` (finds and opens the library) · `session` · `probe`.
//! The only crate that opens ONNX Runtime. Searching lives in `search`.

#![forbid(unsafe_code)]

pub mod foreign;
pub mod probe;
pub mod proto;
pub mod read;
pub mod reference;
pub mod runtime;
pub mod session;
pub mod weights;
pub mod write;
pub mod zoo;

pub use self::error::{Error, Result};

mod error;
