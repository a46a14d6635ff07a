//! Why a container is as it is: what decided about each expert and matrix, what was healed, where routing modes switch.
//! Told by whoever made it, shown by `cotk inspect`; nothing computes with it but routing modes with their thresholds.
//! Law: what is absent was not measured.

use cotk_quant::layout::MatrixFormat;
use serde::{Deserialize, Serialize};

/// What decided about one expert, beyond its use.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// Who chose: `joint`, `gptq uniform`, `mc`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen_by: Option<String>,
    /// Tokens that it lacks to have statistics of its own; absent: it has enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub starved: Option<u64>,
    /// Loss of the layer if this expert alone were dropped, in the unit of [`MatrixDecision::error`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped_alone: Option<f64>,
    /// Gate, up, down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matrices: Option<[MatrixDecision; 3]>,
    /// Where inner channels were cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channels: Option<Channels>,
    /// What its down projection was multiplied by beyond the layer's gain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Steps of healing that were tried on this expert alone, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub healed: Vec<Healed>,
}

/// Why one matrix is stored as it is.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatrixDecision {
    /// Σ g²‖Δ expert output‖² with this matrix alone changed, over held-out tokens that were routed here, relative to the
    /// layer's state and scaled to the traffic.
    pub error: f64,
    /// KL at the model's end, in nats, for each unit of `error`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<f64>,
    /// Share of the layer's pooled Hessian in the one that rounded this matrix, 0..1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
    /// The next choice with fewer bytes; absent: there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub narrower: Option<Alternative>,
    /// The next choice with more bytes; absent: there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wider: Option<Alternative>,
}

/// A choice that was measured and not taken.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alternative {
    pub format: MatrixFormat,
    /// Of a correction on top of the codes; 0: none.
    #[serde(default)]
    pub rank: usize,
    /// Of this matrix.
    pub bytes: u64,
    /// As [`MatrixDecision::error`].
    pub error: f64,
}

/// Inner channels that were cut from an expert.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Channels {
    /// Channels of the source.
    pub of: usize,
    /// As [`MatrixDecision::error`], of the cut alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
}

/// A step of healing that was tried.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Healed {
    pub step: HealStep,
    /// Held-out loss without it.
    pub before: f64,
    /// Held-out loss with it.
    pub after: f64,
    /// Whether it stands.
    pub kept: bool,
}

/// The steps that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HealStep {
    /// Constants in the place of dropped experts.
    Novice,
    /// A factor for each expert.
    Scale,
    /// The down projections, jointly to the layer's target.
    Ridge,
    /// Low-rank corrections of coded matrices.
    Correction,
    /// The router's rows.
    Router,
}

impl HealStep {
    /// As tables spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Novice => "novice",
            Self::Scale => "scale",
            Self::Ridge => "ridge",
            Self::Correction => "correction",
            Self::Router => "router",
        }
    }
}

/// Where a routing mode switches in one layer, as it was calibrated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Threshold {
    /// As requests spell the mode.
    pub mode: String,
    /// What its measure of a token or an expert is compared with.
    pub value: f64,
    /// Share of the gate mass that then ran below full width, 0..1.
    pub low_bit_fraction: f64,
}
