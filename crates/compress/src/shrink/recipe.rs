//! `[compress.shrink]`: experts become smaller. Law: what loads is valid.

use serde::{Deserialize, Serialize};

use crate::prune::ratios::Spread;
use crate::recipe::{DropRatio, Tokens};

/// Inner channels of experts go, by OBS.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shrink {
    /// Share of all experts' weights to take away; what `compress.prune` drops counts.
    pub ratio: DropRatio,
    /// `equal`: the same inner size for each expert that stays; `unequal`: by what each layer's loss costs at the model's end.
    #[serde(default)]
    pub spread: Sizing,
    /// Inner sizes are multiples of this.
    #[serde(default = "defaults::multiple")]
    pub multiple: Multiple,
    /// Calibration tokens on which the end of the model is measured.
    #[serde(default = "defaults::end_tokens")]
    pub end_tokens: Tokens,
    /// Refit down projections and scales to the layer's target, where held-out tokens gain.
    #[serde(default = "defaults::heal")]
    pub heal: bool,
    /// Fit routers too, after the experts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub heal_router: bool,
}

/// How inner sizes are spread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sizing {
    Equal,
    #[default]
    Unequal,
}

impl From<Sizing> for Spread {
    fn from(sizing: Sizing) -> Self {
        match sizing {
            Sizing::Equal => Self::Equal,
            Sizing::Unequal => Self::Unequal,
        }
    }
}

/// 1 to 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Multiple(usize);

impl Multiple {
    /// One that is known to be in bounds.
    pub(crate) const fn of(size: usize) -> Self {
        Self(size)
    }

    /// The number.
    pub fn get(self) -> usize {
        self.0
    }
}

impl TryFrom<u64> for Multiple {
    type Error = String;

    fn try_from(size: u64) -> Result<Self, String> {
        match usize::try_from(size) {
            Ok(size) if (1..=1024).contains(&size) => Ok(Self(size)),
            _ => Err(format!(
                "{size} is not what inner sizes are multiples of: expected 1 to 1024"
            )),
        }
    }
}

impl From<Multiple> for u64 {
    fn from(size: Multiple) -> Self {
        size.0 as Self
    }
}

mod defaults {
    use super::{Multiple, Tokens};

    pub(super) fn multiple() -> Multiple {
        Multiple(super::super::judge::MULTIPLE)
    }
    pub(super) fn end_tokens() -> Tokens {
        Tokens::of(16_384)
    }
    pub(super) fn heal() -> bool {
        true
    }
}
