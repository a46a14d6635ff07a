//! The errors of a search.

use std::path::PathBuf;

/// What can be wrong with a search: which key, what was found, what was expected.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// Files, recipes, journals, run folders, Ctrl-C.
    #[error(transparent)]
    Run(#[from] cotk_run::Error),
    /// The data set.
    #[error(transparent)]
    Data(#[from] cotk_data::DataError),
    /// The latency model.
    #[error(transparent)]
    Latency(#[from] cotk_latency::Error),
    /// ONNX files and ONNX Runtime.
    #[error(transparent)]
    Onnx(#[from] cotk_onnx::Error),
    /// A key of the recipe has a value that cannot be right.
    #[error("{key}: {found}, expected {expected}")]
    Recipe {
        key: &'static str,
        found: String,
        expected: String,
    },
    /// A text that is no point of the space.
    #[error("`{text}` is not a network of this space: {detail}")]
    Encoding { text: String, detail: String },
    /// No network of the space meets a target.
    #[error("no network of the space meets {what} {target} {unit}: the best one needs {best} {unit} ({encoding})")]
    OutOfReach {
        /// `target_ms` or `bytes`.
        what: &'static str,
        target: f64,
        best: f64,
        unit: &'static str,
        /// The network that comes nearest.
        encoding: String,
    },
    /// A checkpoint that does not fit the network that it is loaded into.
    #[error("{}: {detail}: found {found}, expected {expected}", file.display())]
    Checkpoint {
        file: PathBuf,
        detail: String,
        found: String,
        expected: String,
    },
    /// The training library refused.
    #[error("training: {detail}")]
    Train { detail: String },
    /// The loss is not a number any more.
    #[error("training diverged: loss {loss} at step {step} of {phase}")]
    Diverged { phase: &'static str, step: u64, loss: f64 },
    /// A plot could not be drawn.
    #[error("{}: cannot draw: {detail}", file.display())]
    Plot { file: PathBuf, detail: String },
}

/// `Result` with this crate's [`SearchError`].
pub type Result<T, E = SearchError> = std::result::Result<T, E>;
