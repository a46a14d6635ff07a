//! What can go wrong between a folder and a token.

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::moe::RuntimeError;
use crate::tokenizer::TokenizerError;

/// Any error of opening or running a model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file, or Ctrl-C.
    #[error(transparent)]
    Run(#[from] cotk_run::Error),
    /// A task file, or an item of it that this model cannot score.
    #[error(transparent)]
    Data(#[from] cotk_data::DataError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("prompt has {found} tokens, expected at most {limit}: the model's context is {context}")]
    PromptTooLong { found: usize, limit: usize, context: usize },
    #[error("sequence of {found} tokens, expected at most {context}: the model's context")]
    ContextFull { found: usize, context: usize },
    #[error("prompt has no tokens, expected at least one")]
    EmptyPrompt,
    #[error("token id {found}, expected below {vocab}: the model's vocabulary")]
    TokenId { found: u32, vocab: usize },
    #[error("{what} is {found}, expected {expected}")]
    Setting {
        what: &'static str,
        found: String,
        expected: String,
    },
}
