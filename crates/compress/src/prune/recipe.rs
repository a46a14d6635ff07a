//! `[compress.prune]`: which experts go, by measured loss. Law: what loads is valid.

use serde::{Deserialize, Serialize};

use super::gram::Semantics;
use super::ratios::Spread;
use super::search::Method;
use crate::recipe::{DropRatio, Tokens};

/// Pruning by measured loss; absent: `drop_ratio` and `drop_shape` decide by use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prune {
    #[serde(default = "defaults::method")]
    pub method: Method,
    /// Share of all experts to drop.
    pub ratio: DropRatio,
    /// What a dropped expert means; absent: as `compress.dropped` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub semantics: Option<Semantics>,
    /// How drops are spread over layers.
    #[serde(default)]
    pub spread: Spread,
    /// Tokens whose experts are all run, per layer: as many choose masks, as many others report what they lose.
    #[serde(default = "defaults::gram_tokens")]
    pub gram_tokens: Tokens,
    /// Calibration tokens on which the end of the model is measured: sensitivities of layers, reception fields.
    #[serde(default = "defaults::end_tokens")]
    pub end_tokens: Tokens,
    /// Masks per layer that a reception field tries in every combination; 1: each layer by itself.
    #[serde(default = "defaults::field_masks")]
    pub field_masks: FieldSize,
    /// Layers of a reception field.
    #[serde(default = "defaults::field_layers")]
    pub field_layers: FieldSize,
}

/// Masks or layers of a reception field: 1 to 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct FieldSize(usize);

impl FieldSize {
    /// The number.
    pub fn get(self) -> usize {
        self.0
    }
}

impl TryFrom<u64> for FieldSize {
    type Error = String;

    fn try_from(size: u64) -> Result<Self, String> {
        match usize::try_from(size) {
            Ok(size) if (1..=8).contains(&size) => Ok(Self(size)),
            _ => Err(format!("{size} is not the size of a reception field: expected 1 to 8")),
        }
    }
}

impl From<FieldSize> for u64 {
    fn from(size: FieldSize) -> Self {
        size.0 as Self
    }
}

/// Of MoE-I², as published: three masks, three layers.
pub(crate) const PAPER_FIELD: FieldSize = FieldSize(3);

mod defaults {
    use super::{FieldSize, Method, Tokens};

    pub(super) fn method() -> Method {
        Method::Genetic
    }
    pub(super) fn gram_tokens() -> Tokens {
        Tokens::of(2048)
    }
    pub(super) fn end_tokens() -> Tokens {
        Tokens::of(8192)
    }
    pub(super) fn field_masks() -> FieldSize {
        FieldSize(1)
    }
    pub(super) fn field_layers() -> FieldSize {
        super::PAPER_FIELD
    }
}
