//! The recipe of `cotk compress`: `seed`, `[compress]`, `[budget]`, `[latency]`. Law: what loads is valid, every choice
//! an enum.

use cotk_container::manifest::DroppedMeaning;
use cotk_quant::code::{Bits, Code};
use cotk_run::recipe::{self, Source};
use cotk_run::units::significant;
use serde::{Deserialize, Serialize};

use crate::attention::recipe::Attention;
use crate::choice::Form;
use crate::joint::recipe::{Joint, Share};
use crate::prune::gram::Semantics;
use crate::prune::recipe::Prune;
use crate::shrink::recipe::Shrink;
use crate::{CompressError, Result};

/// Recipes that are found by bare name.
pub const EMBEDDED: [(&str, &str); 5] = [
    ("moe-int4", include_str!("../../../recipes/moe-int4.toml")),
    (
        "moe-gptq-uniform",
        include_str!("../../../recipes/moe-gptq-uniform.toml"),
    ),
    ("moe-joint", include_str!("../../../recipes/moe-joint.toml")),
    ("moe-prune", include_str!("../../../recipes/moe-prune.toml")),
    ("moe-shrink", include_str!("../../../recipes/moe-shrink.toml")),
];

/// A whole recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Of every random choice.
    #[serde(default)]
    pub seed: u64,
    pub compress: Compress,
    #[serde(default)]
    pub budget: Budget,
    #[serde(default)]
    pub latency: Latency,
}

/// `[compress]`: what is measured, dropped and coded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compress {
    /// Tokens of the calibration text that are used, at most.
    #[serde(default = "defaults::calibration_tokens")]
    pub calibration_tokens: Tokens,
    /// Longest piece of a document that is seen at once.
    #[serde(default = "defaults::calibration_window")]
    pub calibration_window: Tokens,
    /// Share of the experts to drop.
    #[serde(default)]
    pub drop_ratio: DropRatio,
    #[serde(default)]
    pub drop_shape: DropShape,
    /// What a dropped expert means to routing.
    #[serde(default = "defaults::dropped")]
    pub dropped: DroppedMeaning,
    /// Codes to choose from, per expert.
    #[serde(default)]
    pub codes: Codes,
    /// Weights per scale.
    #[serde(default)]
    pub group: Group,
    /// Bits of every other matrix that tokens are multiplied by: attention, shared experts, embedding and head. 16: as the
    /// checkpoint stores them; 8 or 4: codes of groups of 32. Routers are never below 16.
    #[serde(default, skip_serializing_if = "DenseBits::is_stored")]
    pub dense_bits: DenseBits,
    /// Width that `little` reads: a prefix of one of the codes, short of the whole. Absent: 4 where a code has it, else
    /// there is no `little`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub little_bits: Option<Bits>,
    /// Choose what goes by measured loss, in the place of `drop_ratio` and `drop_shape`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prune: Option<Prune>,
    /// Make experts smaller: inner channels go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shrink: Option<Shrink>,
    /// Make the values of attention narrower: low rank of values and outputs, per head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<Attention>,
    /// Choose the codes of every matrix by GPTQ, and among forms by measured loss, in the place of `group`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joint: Option<Joint>,
}

impl Compress {
    /// Every width that `little` could read, narrow to wide.
    fn little_widths(&self) -> Vec<Bits> {
        let proper = |&code: &Code| code.prefixes().iter().filter(move |&&bits| bits != code.full());
        let all: Vec<Bits> = self.codes.get().iter().flat_map(proper).copied().collect();
        Bits::ALL.into_iter().filter(|bits| all.contains(bits)).collect()
    }

    /// What experts may be stored in.
    pub fn forms(&self) -> Vec<Form> {
        match &self.joint {
            Some(joint) => joint.forms(&self.codes),
            None => self
                .codes
                .get()
                .iter()
                .map(|&code| Form::plain(code, self.group.get()))
                .collect(),
        }
    }

    /// What a dropped expert means to the searches of `prune`.
    pub fn semantics(&self) -> Semantics {
        let named = self.prune.as_ref().and_then(|prune| prune.semantics);
        named.unwrap_or(match self.dropped {
            DroppedMeaning::Masked => Semantics::Masked,
            DroppedMeaning::Removed => Semantics::Removed,
            DroppedMeaning::Novice => Semantics::Novice,
        })
    }

    /// Loss, runtime and exports speak of the same absence; one key says how much goes.
    fn settle_pruning(&mut self) -> Result<()> {
        self.settle_shrinking()?;
        let Some(prune) = &self.prune else {
            return Ok(());
        };
        if self.drop_ratio.get() > 0.0 {
            return Err(CompressError::Contradiction {
                keys: ["compress.drop_ratio", "compress.prune.ratio"],
                found: format!("{} and {}", self.drop_ratio.get(), prune.ratio.get()),
                help: "set compress.drop_ratio=0",
            });
        }
        match prune.semantics {
            Some(Semantics::Masked) => self.dropped = DroppedMeaning::Masked,
            Some(Semantics::Removed) => self.dropped = DroppedMeaning::Removed,
            Some(Semantics::Novice) => self.dropped = DroppedMeaning::Novice,
            None => {}
        }
        Ok(())
    }

    /// One way at a time takes weights away, and what whole experts take is part of the share.
    fn settle_shrinking(&self) -> Result<()> {
        let Some(shrink) = &self.shrink else {
            return Ok(());
        };
        let pruned = self.prune.as_ref().map_or(0.0, |prune| prune.ratio.get());
        let contradiction = |keys, found, help| Err(CompressError::Contradiction { keys, found, help });
        if self.drop_ratio.get() > 0.0 {
            let found = format!("{} and {}", self.drop_ratio.get(), shrink.ratio.get());
            return contradiction(
                ["compress.drop_ratio", "compress.shrink.ratio"],
                found,
                "set compress.drop_ratio=0; [compress.prune] drops experts beside smaller ones",
            );
        }
        if pruned >= shrink.ratio.get() && self.prune.is_some() {
            let found = format!("{pruned} and {}", shrink.ratio.get());
            return contradiction(
                ["compress.prune.ratio", "compress.shrink.ratio"],
                found,
                "compress.shrink.ratio counts the experts that go: set it higher",
            );
        }
        if self.joint.is_some() {
            return contradiction(
                ["compress.joint", "compress.shrink"],
                "both".to_owned(),
                "codes of smaller experts are rounded to nearest: leave [compress.joint] out",
            );
        }
        if shrink.heal_router && !shrink.heal {
            return contradiction(
                ["compress.shrink.heal", "compress.shrink.heal_router"],
                "false and true".to_owned(),
                "routers are fitted after the experts: set compress.shrink.heal=true",
            );
        }
        if self.dropped == DroppedMeaning::Novice {
            return contradiction(
                ["compress.dropped", "compress.shrink"],
                "novice".to_owned(),
                "set compress.dropped=\"masked\"",
            );
        }
        Ok(())
    }

    /// What `little` reads, where a record has it.
    pub fn little(&self) -> Bits {
        self.little_bits.unwrap_or(Bits::B4)
    }
}

/// `[budget]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Of `dense.safetensors` and `experts.bin` together, at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Of codes and scales of the experts, over the number of weights that the source's experts have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_expert_weight: Option<Share>,
    /// Predicted time of the experts of one token over all layers, on the profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_ms: Option<Share>,
    /// KL(source ‖ output) on held-out calibration text: the smallest output that is not above it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_kl_nats: Option<Share>,
}

impl Budget {
    /// Whether nothing limits the choice.
    pub fn is_open(&self) -> bool {
        *self == Self::default()
    }
}

/// `[latency]`: what predicts the time of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latency {
    /// Folder written by `cotk profile`; "auto": this machine's. `--profile` comes first.
    #[serde(default = "defaults::profile")]
    pub profile: String,
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            profile: defaults::profile(),
        }
    }
}

/// How drops are spread over layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DropShape {
    /// The same number in each layer.
    #[default]
    Uniform,
    /// The least used of all layers together.
    Usage,
}

/// A share of experts, 0 up to but without 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct DropRatio(f64);

impl DropRatio {
    /// The number.
    pub fn get(self) -> f64 {
        self.0
    }

    /// Of `experts`, rounded to the nearest, but `keep` stay.
    pub fn count(self, experts: usize, keep: usize) -> usize {
        self.rounded(experts).min(experts.saturating_sub(keep))
    }

    /// Why [`DropRatio::count`] is not the nearest to what was asked for, or is nothing at all.
    #[expect(clippy::cast_precision_loss, reason = "expert counts are small")]
    pub fn not_as_asked(self, experts: usize, keep: usize) -> Option<String> {
        let (asked, done) = (self.rounded(experts), self.count(experts, keep));
        let why = match done {
            _ if done < asked => format!("every token chooses {keep}, so as many stay"),
            0 if self.0 > 0.0 => "that is less than half an expert".to_owned(),
            _ => return None,
        };
        let share = significant(done as f64 / experts as f64, 3);
        Some(format!(
            "compress.drop_ratio asks for {} of {experts} experts a layer, {share} are dropped ({done} experts): {why}",
            self.0
        ))
    }

    fn rounded(self, experts: usize) -> usize {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "expert counts are small, the ratio is below 1"
        )]
        let count = (experts as f64 * self.0).round() as usize;
        count
    }
}

impl TryFrom<f64> for DropRatio {
    type Error = String;

    fn try_from(ratio: f64) -> Result<Self, String> {
        if (0.0..1.0).contains(&ratio) {
            Ok(Self(ratio))
        } else {
            Err(format!(
                "{ratio} is not a share of experts to drop: expected 0 or more and below 1"
            ))
        }
    }
}

impl From<DropRatio> for f64 {
    fn from(ratio: DropRatio) -> Self {
        ratio.0
    }
}

/// A count of tokens: 2 to 2^30.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Tokens(usize);

impl Tokens {
    /// A count that is known to be in bounds.
    pub(crate) const fn of(count: usize) -> Self {
        Self(count)
    }

    /// The number.
    pub fn get(self) -> usize {
        self.0
    }
}

impl TryFrom<u64> for Tokens {
    type Error = String;

    fn try_from(tokens: u64) -> Result<Self, String> {
        match usize::try_from(tokens) {
            Ok(count) if (2..=1 << 30).contains(&count) => Ok(Self(count)),
            _ => Err(format!("{tokens} is not a count of tokens: expected 2 to 1073741824")),
        }
    }
}

impl From<Tokens> for u64 {
    fn from(tokens: Tokens) -> Self {
        tokens.0 as Self
    }
}

/// Weights per scale: 32, 64 or 128.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Group(usize);

impl Group {
    /// The number.
    pub fn get(self) -> usize {
        self.0
    }
}

impl Default for Group {
    fn default() -> Self {
        Self(32)
    }
}

impl TryFrom<u64> for Group {
    type Error = String;

    fn try_from(group: u64) -> Result<Self, String> {
        match group {
            32 => Ok(Self(32)),
            64 => Ok(Self(64)),
            128 => Ok(Self(128)),
            _ => Err(format!("{group} is not a group size: expected 32, 64 or 128")),
        }
    }
}

impl From<Group> for u64 {
    fn from(group: Group) -> Self {
        group.0 as Self
    }
}

/// Bits of dense matrices: 4, 8 or 16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct DenseBits(u32);

impl DenseBits {
    /// As the checkpoint stores them.
    fn is_stored(&self) -> bool {
        self.0 == 16
    }

    /// Width of their codes; `None`: as the checkpoint stores them.
    pub fn coded(self) -> Option<u32> {
        (self.0 < 16).then_some(self.0)
    }
}

impl Default for DenseBits {
    fn default() -> Self {
        Self(16)
    }
}

impl TryFrom<u64> for DenseBits {
    type Error = String;

    fn try_from(bits: u64) -> Result<Self, String> {
        match bits {
            4 => Ok(Self(4)),
            8 => Ok(Self(8)),
            16 => Ok(Self(16)),
            _ => Err(format!("{bits} is not a width of dense matrices: expected 4, 8 or 16")),
        }
    }
}

impl From<DenseBits> for u64 {
    fn from(bits: DenseBits) -> Self {
        Self::from(bits.0)
    }
}

/// One code or several, each once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Code>", into = "Vec<Code>")]
pub struct Codes(Vec<Code>);

impl Codes {
    /// In the recipe's order.
    pub fn get(&self) -> &[Code] {
        &self.0
    }
}

impl Default for Codes {
    fn default() -> Self {
        Self(vec![Code::Nested224])
    }
}

impl TryFrom<Vec<Code>> for Codes {
    type Error = String;

    fn try_from(codes: Vec<Code>) -> Result<Self, String> {
        if codes.is_empty() {
            return Err("no codes: expected at least one".to_owned());
        }
        if let Some(twice) = (1..codes.len()).find(|&i| codes[..i].contains(&codes[i])) {
            return Err(format!("code {} stands twice: expected each once", codes[twice]));
        }
        Ok(Self(codes))
    }
}

impl From<Codes> for Vec<Code> {
    fn from(codes: Codes) -> Self {
        codes.0
    }
}

mod defaults {
    use super::{DroppedMeaning, Tokens};

    pub(super) fn calibration_tokens() -> Tokens {
        Tokens(16_384)
    }
    pub(super) fn calibration_window() -> Tokens {
        Tokens(256)
    }
    pub(super) fn dropped() -> DroppedMeaning {
        DroppedMeaning::Masked
    }
    pub(super) fn profile() -> String {
        "auto".to_owned()
    }
}

impl Recipe {
    /// A file or the bare name of an embedded recipe, after `--set key=value`, `--seed` and `--budget-bytes`.
    ///
    /// # Errors
    /// [`cotk_run::Error`] with line, column, caret and the nearest known key; [`CompressError::LittleBits`].
    pub fn load(name: &str, sets: &[String], seed: Option<u64>, budget_bytes: Option<u64>) -> Result<Self> {
        let mut recipe: Self = recipe::parse(&Source::find(name, &EMBEDDED)?, sets)?;
        recipe.seed = seed.unwrap_or(recipe.seed);
        recipe.budget.bytes = budget_bytes.or(recipe.budget.bytes);
        recipe.compress.settle_pruning()?;
        recipe.settle_budgets()?;
        let widths = recipe.compress.little_widths();
        match recipe.compress.little_bits {
            Some(found) if !widths.contains(&found) => {
                let widths: Vec<String> = widths.iter().map(|bits| bits.get().to_string()).collect();
                let expected = if widths.is_empty() {
                    "no value: none of compress.codes is nested".to_owned()
                } else {
                    format!("{}, a narrower width of a code in compress.codes", widths.join(" or "))
                };
                Err(CompressError::LittleBits {
                    found: found.get(),
                    expected,
                })
            }
            _ => Ok(recipe),
        }
    }

    /// Caps that cannot hold together, and caps that nothing would heed.
    fn settle_budgets(&self) -> Result<()> {
        let budget = &self.budget;
        let refuse = |keys, found, help| Err(CompressError::Contradiction { keys, found, help });
        let may_drop = self
            .compress
            .joint
            .as_ref()
            .map_or(0.0, |joint| joint.max_dropped.get());
        if may_drop > 0.0 && self.compress.dropped == DroppedMeaning::Removed {
            return refuse(
                ["compress.dropped", "compress.joint.max_dropped"],
                format!("removed and {may_drop}"),
                "without an expert the gates of all others change: its loss is not its own; say masked or novice",
            );
        }
        if let (Some(bytes), Some(bits)) = (budget.bytes, budget.bits_per_expert_weight) {
            return refuse(
                ["budget.bytes", "budget.bits_per_expert_weight"],
                format!("{bytes} and {}", bits.get()),
                "give one of them",
            );
        }
        let Some(joint) = &self.compress.joint else {
            let caps = [
                (budget.bits_per_expert_weight, "budget.bits_per_expert_weight"),
                (budget.target_ms, "budget.target_ms"),
                (budget.max_kl_nats, "budget.max_kl_nats"),
            ];
            return match caps.into_iter().find_map(|(cap, key)| Some((cap?, key))) {
                Some((cap, key)) => refuse(
                    ["compress.joint", key],
                    format!("none and {}", cap.get()),
                    "use --recipe moe-joint",
                ),
                None => Ok(()),
            };
        };
        if joint.heal_router && !joint.heal {
            return refuse(
                ["compress.joint.heal", "compress.joint.heal_router"],
                "false and true".to_owned(),
                "routers are fitted after the experts: set compress.joint.heal=true",
            );
        }
        if joint.forms(&self.compress.codes).is_empty() {
            return refuse(
                ["compress.joint.scales", "compress.joint.groups"],
                "no pair of them exists".to_owned(),
                "f16 goes with 32, 64, 128 and \"row\", two-level with 16, 32, 64 and 128",
            );
        }
        if self.compress.drop_ratio.get() > 0.0 {
            return refuse(
                ["compress.joint", "compress.drop_ratio"],
                format!("given and {}", self.compress.drop_ratio.get()),
                "set compress.drop_ratio=0",
            );
        }
        if self.compress.prune.is_some() {
            return refuse(
                ["compress.joint", "compress.prune"],
                "both are given".to_owned(),
                "leave one of them out",
            );
        }
        Ok(())
    }

    /// Whether the first pass, that of the uncompressed model, has anything to find out.
    pub fn needs_measuring(&self) -> bool {
        let drops = self.compress.drop_ratio.get() > 0.0;
        self.compress.codes.get().len() > 1
            || self.compress.prune.is_some()
            || self.compress.shrink.is_some()
            || (drops && self.compress.drop_shape == DropShape::Usage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> cotk_run::Result<Recipe> {
        let source = Source {
            name: "r.toml".into(),
            text: text.into(),
        };
        recipe::parse(&source, &[])
    }

    #[test]
    fn embedded_recipes_parse_and_resolve_to_themselves() {
        for (name, _) in EMBEDDED {
            let recipe = Recipe::load(name, &[], None, None).unwrap();
            let resolved = recipe::resolved(&recipe).unwrap();
            assert_eq!(parse(&resolved).unwrap(), recipe);
        }
    }

    #[test]
    fn what_cannot_be_right_is_refused_with_its_line() {
        for (line, expected) in [
            ("drop_ratio = 1.0", "expected 0 or more and below 1"),
            ("drop_ratio = -0.1", "expected 0 or more and below 1"),
            ("drop_ratio = nan", "expected 0 or more and below 1"),
            ("group = 48", "expected 32, 64 or 128"),
            ("codes = []", "expected at least one"),
            ("codes = [\"plain4\", \"plain4\"]", "each once"),
            ("codes = [\"plain5\"]", "plain5"),
            ("calibration_tokens = 0", "count of tokens"),
            ("little_bits = 5", "expected one of 1, 2, 3, 4, 8"),
            ("dense_bits = 2", "expected 4, 8 or 16"),
            ("prune = { ratio = 1.0 }", "expected 0 or more and below 1"),
            ("prune = { ratio = 0.5, method = \"reep\" }", "reap"),
            ("prune = { ratio = 0.5, field_masks = 9 }", "expected 1 to 8"),
            ("prune = { ratio = 0.5, spreads = \"equal\" }", "spread"),
            ("prune = { method = \"reap\" }", "ratio"),
            ("drop_shapes = \"uniform\"", "drop_shape"),
            ("joint = { max_dropped = 1.0 }", "expected 0 or more and below 1"),
            ("joint = { channels = [1.0] }", "above 0 and below 1"),
            ("joint = { channels = [0.5, 0.0] }", "above 0 and below 1"),
            ("joint = { ranks = [0] }", "expected 1 to 65536"),
        ] {
            let error = parse(&format!("[compress]\n{line}\n")).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("line 2"), "{line}: {error}");
        }
    }

    #[test]
    fn the_command_line_wins_and_changes_the_hash() {
        let plain = Recipe::load("moe-int4", &[], None, None).unwrap();
        let sets = ["compress.drop_ratio=0.5".to_owned()];
        let changed = Recipe::load("moe-int4", &sets, Some(3), Some(1000)).unwrap();
        assert_eq!((changed.seed, changed.budget.bytes), (3, Some(1000)));
        assert_eq!(changed.compress.drop_ratio.get(), 0.5);
        assert_ne!(recipe::hash(&plain).unwrap(), recipe::hash(&changed).unwrap());
    }

    #[test]
    fn little_is_a_proper_prefix_of_some_code_or_refused() {
        let load = |codes: &str, bits: Option<u32>| {
            let codes = format!("compress.codes={codes}");
            let bits = bits.map(|bits| format!("compress.little_bits={bits}"));
            Recipe::load(
                "moe-int4",
                &[codes].into_iter().chain(bits).collect::<Vec<_>>(),
                None,
                None,
            )
        };
        for (codes, bits) in [
            ("['nested2+2+4']", Some(2)),
            ("['nested2+2+4']", Some(4)),
            ("['plain2', 'nested4+4']", Some(4)),
            ("['plain4']", None),
        ] {
            load(codes, bits).unwrap();
        }
        for (codes, bits, wanted) in [
            ("['nested2+2+4']", 3, "2 or 4,"),
            ("['nested2+2+4']", 8, "2 or 4,"),
            ("['nested4+4', 'plain2']", 2, "4,"),
            ("['plain4', 'plain8']", 4, "no value"),
        ] {
            match load(codes, Some(bits)).unwrap_err() {
                CompressError::LittleBits { found, expected } => {
                    assert!(
                        found == bits && expected.starts_with(wanted),
                        "{codes} {found}: {expected}"
                    );
                }
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_recipe_may_name_its_profile() {
        assert_eq!(parse("[compress]").unwrap().latency.profile, "auto");
        let named = parse("[compress]\n[latency]\nprofile = \"p\"").unwrap();
        assert_eq!(named.latency.profile, "p");
        assert!(parse("[compress]\n[latency]\nprofiles = \"p\"").is_err());
    }

    #[test]
    fn drops_are_rounded_and_leave_enough() {
        let ratio = |r| DropRatio::try_from(r).unwrap();
        assert_eq!(ratio(0.25).count(32, 4), 8);
        assert_eq!(ratio(0.99).count(32, 4), 28);
        assert_eq!(ratio(0.0).count(32, 4), 0);
        assert_eq!(ratio(0.5).count(2, 4), 0);
        assert_eq!(ratio(0.75).not_as_asked(8, 2), None);
        assert_eq!(ratio(0.0).not_as_asked(8, 2), None);
        let clamped = ratio(0.95).not_as_asked(8, 2).unwrap();
        assert!(
            ["0.95", "0.75", "(6 experts)", "every token chooses 2"]
                .iter()
                .all(|s| clamped.contains(s)),
            "{clamped}"
        );
        assert!(ratio(0.01).not_as_asked(8, 2).unwrap().contains("half an expert"));
    }
}
