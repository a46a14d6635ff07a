//! `[compress.joint]`: codes chosen by GPTQ, per matrix and all together. Law: what loads is valid.

use cotk_container::low_rank::RANK_STEP;
use cotk_quant::layout::{ScaleForm, WHOLE_ROW};
use serde::{Deserialize, Serialize};

use crate::choice::Form;
use crate::recipe::{Codes, DropRatio};
use crate::{CompressError, Result};

/// How codes are chosen, and from what. `compress.codes` says which widths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Joint {
    /// Weights per scale to choose from.
    #[serde(default = "defaults::groups")]
    pub groups: Vec<GroupSize>,
    /// Forms of scales to choose from; where a form does not have a group size, the pair is left out.
    #[serde(default = "defaults::scales")]
    pub scales: Vec<ScaleForm>,
    #[serde(default)]
    pub rounding: Rounding,
    /// Factors on the scales that are best for rounding to nearest: each row takes the best.
    #[serde(default = "defaults::scale_factors")]
    pub scale_factors: Vec<ScaleFactor>,
    /// Refits of all scales of a row under the full Hessian, each with a descent over its codes.
    #[serde(default = "defaults::refit_rounds")]
    pub refit_rounds: usize,
    /// Share of the Hessian's mean diagonal that is added to its diagonal.
    #[serde(default = "defaults::damping")]
    pub damping: Share,
    /// Times the mean traffic of a layer's experts that is added to each one's own: without it the choice fits the mix of
    /// kinds in the calibration text.
    #[serde(default = "defaults::prior")]
    pub traffic_prior: Share,
    /// Times the deviation of an expert's traffic between sections of the calibration text that is added to its mean:
    /// without it the choice sacrifices kinds of text that are a small part of the mix.
    #[serde(default = "defaults::spread")]
    pub traffic_spread: Share,
    /// Calibration tokens on which each layer and matrix kind is weighed by KL at the model's end; 0: all weigh the same.
    #[serde(default = "defaults::sensitivity_tokens")]
    pub sensitivity_tokens: usize,
    /// Refit down projections to what each layer should add, on tokens that do not judge it; kept where held-out tokens
    /// agree.
    #[serde(default)]
    pub heal: bool,
    /// Fit routers too, after the experts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub heal_router: bool,
    /// Share of a layer's experts that may go (or become constants, where `compress.dropped` is novice), at most.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub max_dropped: DropRatio,
    /// Shares of an expert's inner channels that may stay in the place of all, the others removed by OBS.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub channels: Vec<ChannelShare>,
    /// Ranks of low-rank corrections that may stand on top of a matrix's codes, factors in 8 bits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<Rank>,
    /// Allocations that are built and measured end to end, at most.
    #[serde(default = "defaults::points")]
    pub points: usize,
}

impl Joint {
    /// All pairs of code, group and scale form that exist.
    pub fn forms(&self, codes: &Codes) -> Vec<Form> {
        let mut forms = Vec::new();
        for &code in codes.get() {
            for &scales in &self.scales {
                for group in &self.groups {
                    let form = Form {
                        code,
                        group: group.get(),
                        scales,
                    };
                    if form.format(1, 1).is_ok() {
                        forms.push(form);
                    }
                }
            }
        }
        forms
    }

    /// Inner sizes that may stand in the place of `inner`, descending, each once.
    pub fn inner_sizes(&self, inner: usize) -> Vec<usize> {
        let mut sizes: Vec<usize> = self.channels.iter().map(|share| share.of(inner)).collect();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        sizes.dedup();
        sizes
    }

    /// Ranks as they are stored, ascending, each once.
    pub fn stored_ranks(&self) -> Vec<usize> {
        let mut ranks: Vec<usize> = self.ranks.iter().map(|rank| rank.stored()).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }

    /// Whether the model's experts can be of the sizes that are asked for.
    ///
    /// # Errors
    /// [`CompressError::Contradiction`]: a rank at or above break-even, a share that leaves no channel.
    pub fn check_sizes(&self, hidden: usize, inner: usize) -> Result<()> {
        let whole = hidden * inner;
        for (rank, factors) in (self.stored_ranks().into_iter()).map(|rank| (rank, rank * (hidden + inner))) {
            if factors >= whole {
                return Err(CompressError::Contradiction {
                    keys: ["moe_intermediate_size", "compress.joint.ranks"],
                    found: format!(
                        "factors of rank {rank} hold {factors} weights, a matrix of {inner} x {hidden} itself {whole}"
                    ),
                    help: "give ranks below break-even, rows x columns / (rows + columns): wider codes take fewer bytes",
                });
            }
        }
        match self.channels.iter().find(|share| share.of(inner) == 0) {
            None => Ok(()),
            Some(share) => Err(CompressError::Contradiction {
                keys: ["moe_intermediate_size", "compress.joint.channels"],
                found: format!("{} of {inner} channels is less than one", share.0),
                help: "give a larger share, or compress.joint.max_dropped",
            }),
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's form")]
fn is_zero(ratio: &DropRatio) -> bool {
    ratio.get() == 0.0
}

/// Of an expert's inner channels: above 0 and below 1.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct ChannelShare(f64);

impl ChannelShare {
    /// Channels, rounded down.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a count of channels"
    )]
    pub fn of(self, inner: usize) -> usize {
        (self.0 * inner as f64) as usize
    }
}

impl TryFrom<f64> for ChannelShare {
    type Error = String;

    fn try_from(x: f64) -> Result<Self, String> {
        match x {
            x if x > 0.0 && x < 1.0 => Ok(Self(x)),
            x => Err(format!("{x} is not a share of channels: expected above 0 and below 1")),
        }
    }
}

impl From<ChannelShare> for f64 {
    fn from(x: ChannelShare) -> Self {
        x.0
    }
}

/// Of a correction: 1 to 65536.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Rank(usize);

impl Rank {
    /// A multiple of [`RANK_STEP`], as records have it.
    pub fn stored(self) -> usize {
        self.0.next_multiple_of(RANK_STEP)
    }
}

impl TryFrom<u64> for Rank {
    type Error = String;

    fn try_from(rank: u64) -> Result<Self, String> {
        match usize::try_from(rank) {
            Ok(rank) if (1..=65_536).contains(&rank) => Ok(Self(rank)),
            _ => Err(format!("{rank} is not a rank: expected 1 to 65536")),
        }
    }
}

impl From<Rank> for u64 {
    fn from(rank: Rank) -> Self {
        rank.0 as Self
    }
}

/// How codes are chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rounding {
    /// Each weight's nearest.
    Nearest,
    /// With what one column loses taken back by those to come, under the Hessian of what the matrix sees.
    #[default]
    Gptq,
}

/// 16, 32, 64, 128 or "row".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawGroup", into = "RawGroup")]
pub struct GroupSize(usize);

impl GroupSize {
    /// As in formats.
    pub fn get(self) -> usize {
        self.0
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum RawGroup {
    Size(u64),
    Name(String),
}

impl TryFrom<RawGroup> for GroupSize {
    type Error = String;

    fn try_from(raw: RawGroup) -> Result<Self, String> {
        let found = match raw {
            RawGroup::Size(16) => return Ok(Self(16)),
            RawGroup::Size(32) => return Ok(Self(32)),
            RawGroup::Size(64) => return Ok(Self(64)),
            RawGroup::Size(128) => return Ok(Self(128)),
            RawGroup::Name(name) if name == "row" => return Ok(Self(WHOLE_ROW)),
            RawGroup::Size(size) => size.to_string(),
            RawGroup::Name(name) => format!("`{name}`"),
        };
        Err(format!(
            "{found} is not a group size: expected 16, 32, 64, 128 or \"row\""
        ))
    }
}

impl From<GroupSize> for RawGroup {
    fn from(group: GroupSize) -> Self {
        if group.0 == WHOLE_ROW {
            Self::Name("row".to_owned())
        } else {
            Self::Size(group.0 as u64)
        }
    }
}

/// 0 or more, and finite.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Share(f64);

impl Default for Share {
    fn default() -> Self {
        Self(0.0)
    }
}

impl Share {
    /// The number.
    pub fn get(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for Share {
    type Error = String;

    fn try_from(x: f64) -> Result<Self, String> {
        match x {
            x if x.is_finite() && x >= 0.0 => Ok(Self(x)),
            x => Err(format!("{x}: expected 0 or more")),
        }
    }
}

impl From<Share> for f64 {
    fn from(x: Share) -> Self {
        x.0
    }
}

/// Above 0, at most 10.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct ScaleFactor(f64);

impl ScaleFactor {
    /// The number.
    #[expect(clippy::cast_possible_truncation, reason = "scales are f32")]
    pub fn get(self) -> f32 {
        self.0 as f32
    }
}

impl TryFrom<f64> for ScaleFactor {
    type Error = String;

    fn try_from(x: f64) -> Result<Self, String> {
        match x {
            x if x > 0.0 && x <= 10.0 => Ok(Self(x)),
            x => Err(format!("{x} is not a factor on scales: expected above 0, at most 10")),
        }
    }
}

impl From<ScaleFactor> for f64 {
    fn from(x: ScaleFactor) -> Self {
        x.0
    }
}

mod defaults {
    use super::{GroupSize, ScaleFactor, ScaleForm, Share, WHOLE_ROW};

    pub(super) fn groups() -> Vec<GroupSize> {
        [16, 32, 64, 128, WHOLE_ROW].map(GroupSize).to_vec()
    }
    pub(super) fn scales() -> Vec<ScaleForm> {
        vec![ScaleForm::F16, ScaleForm::TwoLevel]
    }
    pub(super) fn scale_factors() -> Vec<ScaleFactor> {
        [1.0, 1.1, 1.3].map(ScaleFactor).to_vec()
    }
    pub(super) fn refit_rounds() -> usize {
        1
    }
    pub(super) fn damping() -> Share {
        Share(cotk_quant::gptq::DAMPING)
    }
    pub(super) fn prior() -> Share {
        Share(1.0)
    }
    pub(super) fn spread() -> Share {
        Share(1.0)
    }
    pub(super) fn sensitivity_tokens() -> usize {
        12_288
    }
    pub(super) fn points() -> usize {
        3
    }
}
