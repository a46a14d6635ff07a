//! The recipe of a search: every section that `cotk search` reads, with defaults. Law: what is not known is refused; what
//! is resolved reads back to itself.

use cotk_run::units::Millis;
use serde::{Deserialize, Serialize};

use crate::{Result, SearchError, space};

/// The whole recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Seed of every random choice of the run.
    #[serde(default)]
    pub seed: u64,
    pub data: cotk_data::task::Section,
    #[serde(default)]
    pub space: space::Section,
    #[serde(default)]
    pub latency: Latency,
    pub budget: Budget,
    #[serde(default)]
    pub search: Search,
    #[serde(default)]
    pub train: Train,
}

/// `[latency]`: the machine to fit, and how fast is fast enough.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latency {
    /// Folder written by `cotk profile`; "auto": this machine's, or a small one measured on the spot.
    #[serde(default = "auto")]
    pub profile: String,
    /// Median time of one inference at batch 1 on one thread. Absent: `target_of_largest`, else no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_ms: Option<Millis>,
    /// The same as a share of the predicted time of the largest int8 network: a target for any machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_of_largest: Option<f64>,
}

/// `[budget]`: what the search may spend and the network may weigh.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Optimizer steps over all phases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Wall time; becomes a step count once, from 20 timed steps. With `steps` too: whichever is fewer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minutes: Option<f64>,
    /// Bytes of weights as coded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The same as a share of the largest network at 8 bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_of_largest: Option<f64>,
}

/// The methods there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MethodName {
    /// Straight-through thresholds on shared weights.
    #[default]
    Gradient,
}

/// `[search]`: how the choice is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Search {
    pub method: MethodName,
    /// Shares of the steps: warm-up without any limit, search, fine-tuning; the baseline gets as many as fine-tuning.
    pub warm_up: f64,
    pub choose: f64,
    pub fine_tune: f64,
    /// Share of the training images that gates learn from, and weights do not.
    pub gate_share: f64,
    /// A gate step every so many weight steps.
    pub gate_every: u64,
    /// Step size of the thresholds (Adam).
    pub gate_rate: f64,
    /// Chance of each gate to be open at the end of warm-up.
    pub open: f64,
    /// Forward passes that repair may spend on judging moves.
    pub repair_evaluations: usize,
}

/// `[train]`: how weights learn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    pub batch: usize,
    /// Largest step size of shared weights; falls to a tenth along a cosine.
    pub rate: f64,
    /// Largest step size of fine-tuning; falls to zero along a cosine.
    pub fine_tune_rate: f64,
    pub momentum: f64,
    pub weight_decay: f64,
    /// Steps between two checkpoints: what a killed run repeats at most.
    pub checkpoint_every: u64,
}

fn auto() -> String {
    "auto".to_owned()
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            profile: auto(),
            target_ms: None,
            target_of_largest: None,
        }
    }
}

impl Default for Search {
    fn default() -> Self {
        Self {
            method: MethodName::default(),
            warm_up: 0.3,
            choose: 0.3,
            fine_tune: 0.2,
            gate_share: 0.25,
            gate_every: 3,
            gate_rate: 0.03,
            open: 0.7,
            repair_evaluations: 24,
        }
    }
}

impl Default for Train {
    fn default() -> Self {
        Self {
            batch: 64,
            rate: 0.05,
            fine_tune_rate: 0.02,
            momentum: 0.9,
            weight_decay: 1e-4,
            checkpoint_every: 200,
        }
    }
}

impl Recipe {
    /// What types alone cannot refuse.
    ///
    /// # Errors
    /// [`SearchError::Recipe`] with the key.
    pub fn check(&self) -> Result<()> {
        let refuse = |key, found: String, expected: &str| {
            Err(SearchError::Recipe {
                key,
                found,
                expected: expected.to_owned(),
            })
        };
        let share = |v: f64| v > 0.0 && v < 1.0;
        for (key, value) in [
            ("search.warm_up", self.search.warm_up),
            ("search.choose", self.search.choose),
            ("search.fine_tune", self.search.fine_tune),
            ("search.gate_share", self.search.gate_share),
            ("search.open", self.search.open),
        ] {
            if !share(value) {
                return refuse(key, value.to_string(), "a share between 0 and 1");
            }
        }
        let sum = self.search.warm_up + self.search.choose + 2.0 * self.search.fine_tune;
        if sum > 1.0 + 1e-9 {
            return refuse(
                "search",
                format!("warm_up + choose + 2 fine_tune = {sum}"),
                "at most 1: the baseline is fine-tuned too",
            );
        }
        for (key, value) in [
            ("latency.target_of_largest", self.latency.target_of_largest),
            ("budget.bytes_of_largest", self.budget.bytes_of_largest),
        ] {
            if let Some(value) = value.filter(|v| !(v.is_finite() && *v > 0.0)) {
                return refuse(key, value.to_string(), "a number above 0");
            }
        }
        match (self.budget.steps, self.budget.minutes) {
            (None, None) => return refuse("budget", "neither steps nor minutes".into(), "one of them"),
            (Some(steps), _) if !(20..=100_000_000).contains(&steps) => {
                return refuse("budget.steps", steps.to_string(), "20 to 100000000");
            }
            (_, Some(minutes)) if !(minutes.is_finite() && minutes > 0.0) => {
                return refuse("budget.minutes", minutes.to_string(), "a number above 0");
            }
            _ => {}
        }
        if !(2..=4096).contains(&self.train.batch) {
            return refuse("train.batch", self.train.batch.to_string(), "2 to 4096 images");
        }
        for (key, value) in [
            ("train.rate", self.train.rate),
            ("train.fine_tune_rate", self.train.fine_tune_rate),
            ("search.gate_rate", self.search.gate_rate),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return refuse(key, value.to_string(), "a step size above 0");
            }
        }
        for (key, value) in [
            ("train.momentum", self.train.momentum),
            ("train.weight_decay", self.train.weight_decay),
        ] {
            if !(0.0..1.0).contains(&value) {
                return refuse(key, value.to_string(), "0 or more, below 1");
            }
        }
        if self.search.gate_every == 0 || self.train.checkpoint_every == 0 {
            return refuse("search.gate_every or train.checkpoint_every", "0".into(), "1 or more");
        }
        space::Space::new(&self.space, self.data.name.shape(), self.data.name.classes().len())?;
        Ok(())
    }
}
