//! The committed baseline: which rows of the ledger are guarded, at which value, with which tolerance. Law: the file
//! read and written again with new values differs in those values alone.

use std::path::{Path, PathBuf};

use cotk_run::files;
use cotk_run::recipe::nearest_of;
use serde::Deserialize;
use toml::Spanned;

use crate::{Error, Result};

const LIMIT_BYTES: u64 = 1 << 20;
const AUTO: &str = "auto";

/// A baseline file.
#[derive(Debug, Clone)]
pub struct Baseline {
    file: PathBuf,
    text: String,
    content: Content,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    #[serde(default)]
    measured: MeasuredGate,
    #[serde(default, rename = "row")]
    rows: Vec<BaselineRow>,
}

/// `[measured]`: when a timing counts as worse.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MeasuredGate {
    /// No change of a ratio below this fraction is ever flagged. 0..1
    pub floor: f64,
    /// Nor one below this many times the series' own noise.
    pub noise_factor: f64,
}

impl Default for MeasuredGate {
    fn default() -> Self {
        Self {
            floor: 0.05,
            noise_factor: 3.0,
        }
    }
}

/// One guarded fact: `[[row]]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaselineRow {
    pub subject: String,
    pub metric: String,
    pub kind: Kind,
    pub better: Better,
    /// In the unit of the ledger's row; of `measured` rows the ratio to `reference`.
    value: Spanned<f64>,
    /// For every kind but `measured`, whose tolerance is its noise.
    #[serde(default)]
    pub tolerance: Option<Tolerance>,
    /// Only rows of this seed count; absent: of any.
    #[serde(default)]
    pub seed: Option<u64>,
    /// Only rows of this resolved recipe count; absent: of any.
    #[serde(default)]
    recipe_hash: Option<Spanned<String>>,
    /// Only rows of these inputs count; absent: of any.
    #[serde(default)]
    inputs: Option<Spanned<String>>,
    /// For `measured` alone: what was timed in the same run.
    #[serde(default)]
    pub reference: Option<Reference>,
}

/// What a row guards, and so how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Accuracy, perplexity, divergence.
    Accuracy,
    Bytes,
    /// Latency by the model, on a committed profile.
    Predicted,
    /// Latency by the clock, as a ratio: gated on request alone.
    Measured,
}

impl Kind {
    /// As the file writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accuracy => "accuracy",
            Self::Bytes => "bytes",
            Self::Predicted => "predicted",
            Self::Measured => "measured",
        }
    }
}

/// Which way is an improvement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    Lower,
    Higher,
}

/// How much worse is still the same.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tolerance {
    /// In the unit of the value.
    Absolute(f64),
    /// A fraction of the baseline value.
    Relative(f64),
}

/// The reference workload of a measured row.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reference {
    pub subject: String,
    pub metric: String,
}

/// A hash that a row's origin must have: of the recipe, or of the inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pin<'a> {
    /// Any will do.
    Absent,
    /// `auto`: any will do until the baseline is next updated.
    Auto,
    /// 16 hexadecimal digits.
    Hash(&'a str),
}

impl Pin<'_> {
    /// Whether a row of this hash counts.
    pub fn admits(self, hash: Option<&str>) -> bool {
        match self {
            Self::Absent | Self::Auto => true,
            Self::Hash(pinned) => hash == Some(pinned),
        }
    }
}

fn pin(key: Option<&Spanned<String>>) -> Pin<'_> {
    match key.map(|key| key.get_ref().as_str()) {
        None => Pin::Absent,
        Some(AUTO) => Pin::Auto,
        Some(hash) => Pin::Hash(hash),
    }
}

/// What to write into a row: `None` keeps the old. A hash is written only where the row has that key already.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Update {
    pub value: Option<f64>,
    pub recipe_hash: Option<String>,
    pub inputs: Option<String>,
}

impl BaselineRow {
    /// The committed value.
    pub fn value(&self) -> f64 {
        *self.value.get_ref()
    }

    /// The resolved recipe that a row must be of.
    pub fn recipe_hash(&self) -> Pin<'_> {
        pin(self.recipe_hash.as_ref())
    }

    /// The inputs that a row must be of.
    pub fn inputs(&self) -> Pin<'_> {
        pin(self.inputs.as_ref())
    }
}

impl Baseline {
    /// Reads and checks a baseline.
    ///
    /// # Errors
    /// [`Error::Run`]; [`Error::Baseline`] with line and caret; [`Error::BaselineRow`] for a row that cannot gate.
    pub fn load(file: impl AsRef<Path>) -> Result<Self> {
        let text = files::read_text(file.as_ref(), LIMIT_BYTES)?;
        Self::parse(file.as_ref(), text)
    }

    fn parse(file: &Path, text: String) -> Result<Self> {
        let content: Content = toml::from_str(&text).map_err(|e| {
            let mut quoted = e.message().split('`').skip(1).step_by(2);
            let key = quoted.next().map(str::to_owned);
            Error::Baseline {
                file: file.to_owned(),
                nearest: key.as_ref().and_then(|key| nearest_of(key, quoted)),
                key,
                detail: e.to_string().trim_end().to_owned(),
            }
        })?;
        for (index, row) in content.rows.iter().enumerate() {
            if let Some((key, found, expected)) = wrong(row, &content.rows[..index]) {
                return Err(Error::BaselineRow {
                    file: file.to_owned(),
                    row: format!("{} {}", row.subject, row.metric),
                    key,
                    found,
                    expected,
                });
            }
        }
        Ok(Self {
            file: file.to_owned(),
            text,
            content,
        })
    }

    /// Where it was read from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The guarded facts, in the order of the file.
    pub fn rows(&self) -> &[BaselineRow] {
        &self.content.rows
    }

    /// When a timing counts as worse.
    pub fn measured(&self) -> MeasuredGate {
        self.content.measured
    }

    /// The file's text with what changed (one update per row): comments and layout stay.
    pub fn with_updates(&self, updates: &[Update]) -> String {
        let mut changes = Vec::new();
        for (row, update) in self.rows().iter().zip(updates) {
            changes.extend(update.value.map(|value| (row.value.span(), format!("{value:?}"))));
            for (key, hash) in [(&row.recipe_hash, &update.recipe_hash), (&row.inputs, &update.inputs)] {
                if let (Some(key), Some(hash)) = (key, hash) {
                    changes.push((key.span(), format!("\"{hash}\"")));
                }
            }
        }
        // From the end, so that the spans before stay true.
        changes.sort_by_key(|(span, _)| std::cmp::Reverse(span.start));
        let mut text = self.text.clone();
        for (span, new) in changes {
            text.replace_range(span, &new);
        }
        text
    }
}

fn wrong(row: &BaselineRow, before: &[BaselineRow]) -> Option<(&'static str, String, &'static str)> {
    let is_measured = row.kind == Kind::Measured;
    let amount = row.tolerance.map(|(Tolerance::Absolute(x) | Tolerance::Relative(x))| x);
    if !row.value().is_finite() {
        return Some(("value", row.value().to_string(), "a finite number"));
    }
    if before
        .iter()
        .any(|b| (&b.subject, &b.metric, b.seed) == (&row.subject, &row.metric, row.seed))
    {
        return Some((
            "subject",
            "there twice".to_owned(),
            "one row of each subject, metric and seed",
        ));
    }
    for (key, pin) in [("recipe_hash", row.recipe_hash()), ("inputs", row.inputs())] {
        let is_digit = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        if let Pin::Hash(hash) = pin
            && !(hash.len() == 16 && hash.bytes().all(is_digit))
        {
            return Some((key, format!("`{hash}`"), "`auto` or 16 lower-case hexadecimal digits"));
        }
    }
    match (is_measured, amount, &row.reference) {
        (false, None, _) => Some(("tolerance", "absent".to_owned(), "{ absolute = x } or { relative = x }")),
        (false, Some(x), _) if !(x.is_finite() && x >= 0.0) => Some(("tolerance", x.to_string(), "0 or above")),
        (false, _, Some(_)) => Some(("reference", "there".to_owned(), "none: only measured rows have one")),
        (true, Some(x), _) => Some(("tolerance", x.to_string(), "none: a measured row has its noise")),
        (true, _, None) => Some(("reference", "absent".to_owned(), "the workload timed in the same run")),
        (true, _, _) if row.value() <= 0.0 => Some(("value", row.value().to_string(), "a ratio above 0")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# guarded by `cotk check`
[[row]]
subject = "compress:x"
metric = "perplexity_after"
kind = "accuracy"
better = "lower"
value = 12.5 # as of the first
tolerance = { relative = 0.01 }

[[row]]
subject = "compress:x"
metric = "bytes_after"
kind = "bytes"
better = "lower"
value = 1000
tolerance = { absolute = 0 }

[[row]]
subject = "search:x"
metric = "measured_ms"
kind = "measured"
better = "lower"
value = 2.0
reference = { subject = "search:x", metric = "reference_ms" }
"#;

    fn parse(text: &str) -> Result<Baseline> {
        Baseline::parse(Path::new("b.toml"), text.to_owned())
    }

    fn of_values(values: [Option<f64>; 3]) -> [Update; 3] {
        values.map(|value| Update {
            value,
            recipe_hash: Some("0123456789abcdef".into()),
            inputs: Some("fedcba9876543210".into()),
        })
    }

    #[test]
    fn new_values_change_the_values_alone() {
        let baseline = parse(TEXT).unwrap();
        assert_eq!(baseline.with_updates(&of_values([None; 3])), TEXT);
        let changed = baseline.with_updates(&of_values([Some(0.1 + 0.2), None, Some(3.0)]));
        assert_eq!(
            changed,
            TEXT.replace("12.5 #", "0.30000000000000004 #")
                .replace("value = 2.0", "value = 3.0")
        );
        let values: Vec<f64> = parse(&changed).unwrap().rows().iter().map(BaselineRow::value).collect();
        assert_eq!(values, [0.1 + 0.2, 1000.0, 3.0]);
    }

    #[test]
    fn hashes_are_written_where_the_author_asked_for_them() {
        for old in ["\"auto\"", "'aaaaaaaaaaaaaaaa'"] {
            let text = TEXT.replacen(
                "value = 12.5",
                &format!("recipe_hash = {old}  # pinned\nvalue = 12.5"),
                1,
            );
            let text = text.replacen("value = 1000", &format!("value = 1000\ninputs = {old}"), 1);
            let changed = parse(&text).unwrap().with_updates(&of_values([Some(1.5), None, None]));
            assert_eq!(
                changed,
                text.replace("12.5", "1.5")
                    .replace(&format!("recipe_hash = {old}"), "recipe_hash = \"0123456789abcdef\"")
                    .replace(&format!("inputs = {old}"), "inputs = \"fedcba9876543210\"")
            );
            let baseline = parse(&changed).unwrap();
            assert_eq!(baseline.rows()[0].recipe_hash(), Pin::Hash("0123456789abcdef"));
            assert_eq!(baseline.rows()[1].inputs(), Pin::Hash("fedcba9876543210"));
            assert_eq!(baseline.rows()[1].recipe_hash(), Pin::Absent);
        }
    }

    #[test]
    fn what_cannot_gate_is_refused_with_row_and_key() {
        for (from, to, says) in [
            (
                "tolerance = { relative = 0.01 }",
                "",
                "perplexity_after: tolerance is absent",
            ),
            ("{ relative = 0.01 }", "{ relative = -1 }", "tolerance is -1"),
            ("{ relative = 0.01 }", "{ relative = nan }", "tolerance is NaN"),
            ("value = 12.5", "value = inf", "value is inf"),
            (
                "value = 12.5",
                "value = 12.5\nrecipe_hash = \"12\"",
                "recipe_hash is `12`",
            ),
            (
                "value = 12.5",
                "value = 12.5\ninputs = \"ABCDEF0123456789\"",
                "inputs is `ABCDEF",
            ),
            (
                "\nreference = { subject = \"search:x\", metric = \"reference_ms\" }",
                "",
                "reference is absent",
            ),
            (
                "value = 2.0",
                "value = 2.0\ntolerance = { absolute = 1 }",
                "measured_ms: tolerance is 1",
            ),
            ("value = 2.0", "value = 0.0", "a ratio above 0"),
            (
                "metric = \"bytes_after\"",
                "metric = \"perplexity_after\"",
                "there twice",
            ),
            ("kind = \"bytes\"", "kind = \"byte\"", "line 13"),
            (
                "better = \"lower\"\nvalue = 1000",
                "value = 1000",
                "missing field `better`",
            ),
        ] {
            let text = parse(&TEXT.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(text.contains("b.toml") && text.contains(says), "{says}: {text}");
        }
        let text = parse(&TEXT.replace("kind =", "kinds =")).unwrap_err().to_string();
        assert!(
            text.contains("unknown field `kinds`") && text.contains("line 5"),
            "{text}"
        );
    }
}
