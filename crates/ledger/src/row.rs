//! One row of the ledger: a measured (or predicted) fact with everything needed to get it again.

use cotk_run::facts::Fact;
use serde::{Deserialize, Serialize};

/// Who measured: the same for all facts of one run of the program.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Provenance {
    /// Version of the program, `0.1.0`.
    pub cotk_version: String,
    /// Commit that the program was built from, 12 digits, or `unknown`.
    pub commit: String,
    /// Id of the program's build: its sources, committed or not.
    pub build: Option<String>,
    /// The command line as typed.
    pub command: String,
    /// Hash of the resolved recipe; absent where there is none.
    pub recipe_hash: Option<u64>,
    /// Hash of the inputs that the figures depend on beside the recipe (texts, models); absent where none was taken.
    pub inputs: Option<u64>,
    /// The run's seed; absent where nothing is drawn.
    pub seed: Option<u64>,
    /// The machine's profile id or CPU model.
    pub device: String,
    /// The run folder, relative to where the program ran; absent where there is none.
    pub run: Option<String>,
}

/// One line of the ledger. The names are the file format.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// When it was recorded, RFC 3339, UTC, whole seconds.
    pub time: String,
    pub cotk_version: String,
    pub commit: String,
    /// Absent in rows of the first programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<String>,
    pub command: String,
    /// 16 hexadecimal digits.
    #[serde(default)]
    pub recipe_hash: Option<String>,
    /// 16 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inputs: Option<String>,
    #[serde(default)]
    pub seed: Option<u64>,
    pub device: String,
    pub subject: String,
    /// Name with its unit, as in [`Fact::metric`].
    pub metric: String,
    /// Finite.
    pub value: f64,
    pub unit: String,
    /// In the unit of `value`: half width of the interval, or median absolute deviation of a timing.
    #[serde(default)]
    pub spread: Option<f64>,
    /// Samples behind `value`.
    #[serde(default)]
    pub count: Option<u64>,
    #[serde(default)]
    pub run: Option<String>,
}

impl Row {
    /// The row of a fact at a time (RFC 3339).
    pub fn new(provenance: &Provenance, time: String, fact: Fact) -> Self {
        Self {
            time,
            cotk_version: provenance.cotk_version.clone(),
            commit: provenance.commit.clone(),
            build: provenance.build.clone(),
            command: provenance.command.clone(),
            recipe_hash: provenance.recipe_hash.map(|hash| format!("{hash:016x}")),
            inputs: provenance.inputs.map(|hash| format!("{hash:016x}")),
            seed: provenance.seed,
            device: provenance.device.clone(),
            subject: fact.subject,
            metric: fact.metric,
            value: fact.value,
            unit: fact.unit,
            spread: fact.spread,
            count: fact.count,
            run: provenance.run.clone(),
        }
    }
}
