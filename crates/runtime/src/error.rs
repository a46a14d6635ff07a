//! Why a runtime cannot be made over a container.

use std::path::PathBuf;

use cotk_container::ContainerError;
use cotk_kernels::KernelError;
use cotk_model::ModelError;
use cotk_model::checkpoint::CheckpointError;

/// Errors of opening; those of a call are `cotk_model::moe::RuntimeError`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Config, tensors, tokenizer.
    #[error(transparent)]
    Files(#[from] ModelError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// `COTK_ISA` asks for what this CPU lacks.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Records and config describe different models.
    #[error("{}: {what}: records have {found}, config.json says {expected}", file.display())]
    Model {
        file: PathBuf,
        what: String,
        found: String,
        expected: String,
    },
    /// A shape or a width of a synthetic model that there is not.
    #[error("{what} `{found}`, expected {expected}")]
    Synthetic {
        what: &'static str,
        found: String,
        expected: String,
    },
    /// Weights that cannot be coded on the way.
    #[error("{what}: {source}")]
    Coding { what: String, source: KernelError },
    /// What would be held does not fit in memory.
    #[error("{what} needs about {needed_bytes} bytes of memory, {available_bytes} are available")]
    Memory {
        what: String,
        needed_bytes: u64,
        available_bytes: u64,
    },
    /// A budget that cannot hold one step.
    #[error(
        "budget of {found} bytes: at least {least} are needed, {dense_bytes} for the dense part, {kv_bytes} for keys and values, {largest_set_bytes} for the experts that one step can touch in a layer"
    )]
    Budget {
        found: u64,
        least: u64,
        dense_bytes: u64,
        kv_bytes: u64,
        largest_set_bytes: u64,
    },
    /// What a probe or a prediction meets.
    #[error(transparent)]
    Latency(#[from] cotk_latency::Error),
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
