//! `[compress.attention]`: values and outputs become narrower. Law: what loads is valid.

use serde::{Deserialize, Serialize};

use crate::recipe::DropRatio;
use crate::shrink::recipe::Multiple;

/// Ranks of the product of value and output projections go, those that lose least of all layers first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Share of the weights of all value and output projections to take away.
    pub ratio: DropRatio,
    /// Widths of value heads are multiples of this.
    #[serde(default = "defaults::multiple")]
    pub multiple: Multiple,
}

mod defaults {
    use super::Multiple;

    pub(super) fn multiple() -> Multiple {
        Multiple::of(4)
    }
}
