//! Why a compression cannot be done, with what was found and what was expected.

use std::path::PathBuf;

use cotk_container::ContainerError;
use cotk_data::DataError;
use cotk_model::ModelError;
use cotk_model::checkpoint::CheckpointError;
use cotk_model::moe::RuntimeError;
use cotk_model::tokenizer::TokenizerError;
use cotk_quant::QuantError;
use cotk_run::units::{Bytes, ExpertId, LayerId};

use crate::prune::search::{EXHAUSTIVE_MASKS, TooManyMasks};

/// Errors of the compression pipeline.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// Files, recipes, journals, an unfinished output of other inputs, Ctrl-C.
    #[error(transparent)]
    Run(#[from] cotk_run::Error),
    /// Config, weights, tokenizer of the source.
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Calibration or evaluation text.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The kernels cannot run here.
    #[error(transparent)]
    Runtime(#[from] cotk_runtime::Error),
    /// The model has no routed experts.
    #[error("{}: {family} model without routed experts: nothing to compress", file.display())]
    NoExperts { file: PathBuf, family: &'static str },
    /// The source is a container already.
    #[error("{}: is a compressed model, expected a Hugging Face checkpoint", file.display())]
    AlreadyCompressed { file: PathBuf },
    /// A folder stands where the output is to go, and it is not this command's own unfinished output.
    #[error("{}: exists, and is not an unfinished output of this command", folder.display())]
    OutputExists { folder: PathBuf },
    /// The text is too short to calibrate or to measure on.
    #[error("{}: {found} tokens for {purpose}, expected at least {expected}", file.display())]
    ShortText {
        file: PathBuf,
        purpose: &'static str,
        found: usize,
        expected: usize,
    },
    /// What would calibrate is all in what would judge.
    #[error(
        "the calibration text {} is also what would judge: {} holds all of its documents",
        calibration.display(),
        eval_text.display()
    )]
    SameText { calibration: PathBuf, eval_text: PathBuf },
    /// No code of the recipe can be read at the width of `little`.
    #[error("compress.little_bits is {found}: expected {expected}")]
    LittleBits { found: u32, expected: String },
    #[error("{}: needs about {}, {} are free", folder.display(), Bytes(*need), Bytes(*have))]
    DiskSpace { folder: PathBuf, need: u64, have: u64 },
    /// A weight cannot be coded.
    #[error("{}: {layer}, {expert}, {matrix}: {source}", file.display())]
    Weights {
        file: PathBuf,
        layer: LayerId,
        expert: ExpertId,
        matrix: &'static str,
        source: QuantError,
    },
    /// The byte budget is below what the recipe can reach.
    #[error("budget of {} cannot be met: the smallest output of this recipe is {}", Bytes(*budget), Bytes(*least))]
    Budget { budget: u64, least: u64 },
    /// The time budget is below what the recipe can reach.
    #[error("a target of {budget} ms for a token cannot be met: the least of this recipe is {least} ms")]
    TargetTime { budget: f64, least: f64 },
    /// Even the largest output of the recipe loses more than it may.
    #[error(
        "a KL divergence of {target} nats cannot be met: with {} of codes, the most that there may be, it is {least}",
        Bytes(*bytes)
    )]
    TargetKl { target: f64, least: f64, bytes: u64 },
    /// Two keys of the recipe cannot both hold.
    #[error("{} and {} contradict each other: {found}", keys[0], keys[1])]
    Contradiction {
        keys: [&'static str; 2],
        found: String,
        help: &'static str,
    },
    /// An exhaustive search was asked for where there are too many masks.
    #[error(
        "{layer}: {} of {} experts make {} masks, an exhaustive search tries at most {EXHAUSTIVE_MASKS}",
        too_many.dropped,
        too_many.experts,
        too_many.masks
    )]
    TooManyMasks { layer: LayerId, too_many: TooManyMasks },
    /// Most experts of a layer saw too few calibration tokens for statistics of theirs to mean anything.
    #[error(
        "{}: {tokens} tokens are too few for the statistics of {layer}: {starved} of its {experts} experts saw fewer than \
         {}: {named}",
        file.display(),
        crate::report::ENOUGH_TOKENS
    )]
    FewTokens {
        file: PathBuf,
        layer: LayerId,
        tokens: u64,
        experts: usize,
        starved: usize,
        /// What each of them lacks.
        named: String,
        /// Tokens of a text that would do, about.
        expected: u64,
    },
    #[error("{}: {detail}", file.display())]
    Plot { file: PathBuf, detail: String },
    /// Samples that an earlier process wrote are not there whole.
    #[error("{}: not the samples that the journal promises", file.display())]
    Survey { file: PathBuf },
    /// Statistics or weights that have no factorisation.
    #[error("linear algebra: {0}")]
    Algebra(#[from] cotk_linalg::Error),
    /// Hessians that no code can be chosen under.
    #[error("statistics of calibration tokens: {0}")]
    Statistics(#[from] QuantError),
    /// The allocator refused its candidates.
    #[error("allocation: {0}")]
    Allocation(QuantError),
}

/// `Result` with this crate's [`CompressError`].
pub type Result<T, E = CompressError> = std::result::Result<T, E>;

impl From<CheckpointError> for CompressError {
    fn from(error: CheckpointError) -> Self {
        Self::Model(error.into())
    }
}

impl From<RuntimeError> for CompressError {
    fn from(error: RuntimeError) -> Self {
        Self::Model(error.into())
    }
}

impl From<TokenizerError> for CompressError {
    fn from(error: TokenizerError) -> Self {
        Self::Model(error.into())
    }
}
