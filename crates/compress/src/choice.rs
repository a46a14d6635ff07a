//! What may become of an expert, as values: stages offer them, choosers choose, the build carries them out, reports and
//! `inspect` say them. Law: what loads from a journal is what was written, and every fate has a size in bytes.

use cotk_container::layout::{Shape, aligned_constant_bytes, aligned_record_bytes};
use cotk_container::low_rank::{LowRank, Role};
use cotk_quant::QuantError;
use cotk_quant::code::Code;
use cotk_quant::layout::{MatrixFormat, ScaleForm, WHOLE_ROW};
use cotk_run::units::{ExpertId, LayerId};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::layer::Usage;

/// The matrices of an expert, in record order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `[inner, hidden]`.
    Gate,
    /// `[inner, hidden]`.
    Up,
    /// `[hidden, inner]`.
    Down,
}

impl Kind {
    /// In record order.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// In errors and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        }
    }

    /// Rows and columns at a hidden size and an inner size.
    pub fn shape(self, hidden: usize, inner: usize) -> (usize, usize) {
        match self {
            Self::Gate | Self::Up => (inner, hidden),
            Self::Down => (hidden, inner),
        }
    }
}

/// How the codes of one matrix are stored, whatever its shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Form {
    pub code: Code,
    /// Weights per scale; [`WHOLE_ROW`]: one scale a row.
    pub group: usize,
    pub scales: ScaleForm,
}

impl Form {
    /// One f16 for each group.
    pub fn plain(code: Code, group: usize) -> Self {
        Self {
            code,
            group,
            scales: ScaleForm::F16,
        }
    }

    /// For a matrix of this shape.
    ///
    /// # Errors
    /// A group or a size that no layout has.
    pub fn format(self, rows: usize, cols: usize) -> std::result::Result<MatrixFormat, QuantError> {
        MatrixFormat::try_with_scales(rows, cols, self.code, self.group, self.scales)
    }
}

impl std::fmt::Display for Form {
    /// `plain2 g64`, `plain4 g16 two-level`, `nested2+2+4 row`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let group = match self.group {
            WHOLE_ROW => "row".to_owned(),
            group => format!("g{group}"),
        };
        let scales = match self.scales {
            ScaleForm::F16 => "",
            ScaleForm::TwoLevel => " two-level",
        };
        write!(f, "{} {group}{scales}", self.code)
    }
}

/// What one matrix becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MatrixChoice {
    pub form: Form,
    /// Rank of a correction `A·B` on top of the codes; 0: none.
    #[serde(default)]
    pub rank: usize,
}

/// What becomes of one expert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// Gone, as the recipe's meaning of a dropped expert says.
    Dropped,
    /// Routed to as before, but it returns the mean of what it returned (a novice).
    Constant,
    /// Kept.
    Coded {
        /// Gate, up, down.
        matrices: [MatrixChoice; 3],
        /// Inner channels that stay, ascending; absent: all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        channels: Option<Vec<u32>>,
    },
}

impl Fate {
    /// All channels, one form for all three matrices, no correction.
    pub fn uniform(form: Form) -> Self {
        Self::Coded {
            matrices: [MatrixChoice { form, rank: 0 }; 3],
            channels: None,
        }
    }

    /// Bytes of its record with what aligning it costs at most; `hidden` and `inner` are the
    /// source's.
    ///
    /// # Errors
    /// As [`Form::format`].
    pub fn coded_bytes(&self, hidden: usize, inner: usize) -> std::result::Result<u64, QuantError> {
        let (matrices, channels) = match self {
            Self::Dropped => return Ok(0),
            Self::Constant => return Ok(aligned_constant_bytes(hidden)),
            Self::Coded { matrices, channels } => (matrices, channels),
        };
        let inner = channels.as_ref().map_or(inner, Vec::len);
        let shape = |kind: Kind| -> std::result::Result<Shape, QuantError> {
            let (rows, cols) = kind.shape(hidden, inner);
            let MatrixChoice { form, rank } = matrices[kind as usize];
            let factors = |rank| LowRank::try_new(Role::Correction, rows, cols, rank);
            Ok(Shape {
                format: form.format(rows, cols)?,
                rank: (rank > 0).then(|| factors(rank)).transpose()?,
            })
        };
        Ok(aligned_record_bytes(
            shape(Kind::Gate)?,
            shape(Kind::Up)?,
            shape(Kind::Down)?,
        ))
    }
}

/// One way to store one matrix of one expert, with what it was measured to lose.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    pub expert: ExpertId,
    pub kind: Kind,
    pub choice: MatrixChoice,
    /// g²‖Δ expert output‖² with this matrix alone changed, relative to the layer's state and per token of the layer: the
    /// mean over held-out tokens that were routed here, times what the expert counts
    /// ([`Offered::weighed`](crate::joint::offers::Offered)); before the layer's sensitivity.
    pub error: f64,
    /// Without what aligning a record costs.
    pub bytes: u64,
    /// Predicted time for one token at this expert; 0 without a profile.
    pub ms: f64,
}

/// What an expert may be instead of codes for all of its weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Instead {
    /// As [`Fate::Dropped`].
    Dropped,
    /// As [`Fate::Constant`].
    Constant,
    /// Inner channels that stay, ascending.
    Channels(Vec<u32>),
}

/// One expert as something else, with what that alone was measured to lose.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Variant {
    pub expert: ExpertId,
    pub instead: Instead,
    /// As [`Offer::error`].
    pub error: f64,
    /// Beside those of matrices.
    pub bytes: u64,
    /// Ways to store the matrices of what stays, errors against what stays.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub offers: Vec<Offer>,
}

/// What the first pass found out about one MoE layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerOffers {
    pub layer: LayerId,
    pub usage: Usage,
    /// By expert, kind, then bytes.
    pub offers: Vec<Offer>,
    /// By expert.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub variants: Vec<Variant>,
    /// KL at the model's end per unit of [`Offer::error`], for gate, up and down; 1 where it was not measured.
    pub sensitivity: [f64; 3],
}

/// What becomes of one layer's experts, in original numbering.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerFates {
    pub layer: LayerId,
    pub experts: Vec<Fate>,
}

/// Upper bounds that a choice must meet.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Of all records.
    pub record_bytes: Option<u64>,
    /// Predicted, per token over all layers.
    pub ms: Option<f64>,
}

/// Picks one fate for each expert: the joint allocation, or a baseline.
pub trait Chooser: Sync {
    /// In tables: `joint`, `gptq uniform`, `mc`.
    fn name(&self) -> String;

    /// Fates for all layers in order, and the loss that they are expected to have together (in KL where sensitivities
    /// were measured).
    ///
    /// # Errors
    /// [`crate::CompressError::Budget`] with the smallest that can be reached.
    fn choose(&self, layers: &[LayerOffers], limits: &Limits, seed: u64) -> Result<(Vec<LayerFates>, f64)>;
}

#[cfg(test)]
mod tests {
    use cotk_quant::code::Bits;

    use super::*;

    #[test]
    fn a_fate_says_its_bytes_and_comes_back_from_a_journal() {
        let form = Form::plain(Code::Plain(Bits::B4), 32);
        let whole = Fate::uniform(form);
        let Fate::Coded { matrices, .. } = whole.clone() else {
            panic!("coded")
        };
        let half = Fate::Coded {
            matrices,
            channels: Some((0..48).collect()),
        };
        let bytes = |fate: &Fate| fate.coded_bytes(256, 96).unwrap();
        assert!(bytes(&half) < bytes(&whole) && bytes(&half) > bytes(&whole) / 3);
        assert_eq!(bytes(&Fate::Dropped), 0);
        for fate in [whole, half, Fate::Dropped, Fate::Constant] {
            let text = serde_json::to_string(&fate).unwrap();
            assert_eq!(serde_json::from_str::<Fate>(&text).unwrap(), fate);
        }
        assert_eq!(form.to_string(), "plain4 g32");
    }
}
