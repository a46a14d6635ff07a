//! The errors of models, weights and the runtime.

use std::path::PathBuf;

/// What can go wrong with an ONNX model or the library that runs it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error(transparent)]
    Run(#[from] cotk_run::Error),
    /// What the nodes say does not make a graph.
    #[error(transparent)]
    Graph(#[from] cotk_latency::Error),
    /// No ONNX Runtime at any place where one is looked for.
    #[error("no ONNX Runtime library: looked at {}", looked_at.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))]
    NoLibrary { looked_at: Vec<PathBuf> },
    /// The library is there and does not load, or is too old.
    #[error("cannot load ONNX Runtime: {detail}")]
    Load { file: PathBuf, detail: String },
    /// ONNX Runtime refused or failed: what was asked of it, and its own words.
    #[error("ONNX Runtime cannot {action} `{model}`: {detail}")]
    Runtime {
        action: &'static str,
        model: String,
        detail: String,
    },
    /// Bytes that are no ONNX model.
    #[error("{file}: not an ONNX model: {detail}")]
    Decode { file: String, detail: String },
    /// An operator that this reader does not know.
    #[error("{file}: node `{node}`: unknown operator `{op}`")]
    UnknownOp { file: String, node: String, op: String },
    /// A known operator, used in a way that the typed graph cannot say.
    #[error("{file}: node `{node}`: {what}: found {found}, expected {expected}")]
    Unsupported {
        file: String,
        node: String,
        what: &'static str,
        found: String,
        expected: String,
    },
    /// More of a network is unknown than was allowed: what a plan would say of it means little.
    #[error("{file}: unknown operators are {share_pct:.0} % of it, at most {limit_pct:.0} % are allowed: {operators}")]
    TooUnknown {
        file: String,
        operators: String,
        share_pct: f64,
        limit_pct: f64,
    },
    /// Weights that do not fit their layer.
    #[error("weights of `{layer}`: {what}: found {found}, expected {expected}")]
    Weights {
        layer: String,
        what: &'static str,
        found: String,
        expected: String,
    },
    /// An input of the wrong length for the model.
    #[error("input of `{model}`: found {found} values, expected {expected}")]
    Input {
        model: String,
        found: usize,
        expected: usize,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
