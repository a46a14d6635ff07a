//! What was to be reached beside what was: one line a figure, printed at the end and written to `latency.toml`.

use serde::Serialize;

use crate::output::round;

/// A figure and its bar.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Bar {
    pub(crate) what: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at_least: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at_most: Option<f64>,
    /// Absent where no bar is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) met: Option<bool>,
    /// What repeats of the measurement differ by, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) repeat_pct: Option<f64>,
}

impl Bar {
    /// A figure without a bar.
    pub(crate) fn none(what: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self {
            what: what.into(),
            value: round(value),
            unit,
            at_least: None,
            at_most: None,
            met: None,
            repeat_pct: None,
        }
    }

    pub(crate) fn at_most(what: impl Into<String>, value: f64, unit: &'static str, bar: f64) -> Self {
        Self {
            at_most: Some(bar),
            met: Some(value <= bar),
            ..Self::none(what, value, unit)
        }
    }

    pub(crate) fn at_least(what: impl Into<String>, value: f64, unit: &'static str, bar: f64) -> Self {
        Self {
            at_least: Some(bar),
            met: Some(value >= bar),
            ..Self::none(what, value, unit)
        }
    }

    pub(crate) fn between(what: impl Into<String>, value: f64, unit: &'static str, low: f64, high: f64) -> Self {
        Self {
            at_least: Some(low),
            at_most: Some(high),
            met: Some((low..=high).contains(&value)),
            ..Self::none(what, value, unit)
        }
    }

    /// The same, with what repeats of the measurement differ by.
    pub(crate) fn beside(self, repeat_pct: Option<f64>) -> Self {
        Self {
            repeat_pct: repeat_pct.map(round),
            ..self
        }
    }

    fn line(&self) -> String {
        let bar = match (self.at_least, self.at_most) {
            (Some(low), Some(high)) => format!("{low} to {high}"),
            (Some(low), None) => format!("{low} or more"),
            (None, Some(high)) => format!("{high} or less"),
            (None, None) => "-".into(),
        };
        let met = match self.met {
            Some(true) => "met",
            Some(false) => "NOT MET",
            None => "",
        };
        let repeat = self.repeat_pct.map(|r| format!("{r:.2} %")).unwrap_or_default();
        let value = format!("{} {}", self.value, self.unit);
        format!("{:62} {value:>14}  {bar:>14}  {met:8} {repeat:>9}", self.what)
    }
}

/// All of them as a table.
pub(crate) fn table(bars: &[Bar]) -> String {
    let head = format!(
        "{:62} {:>14}  {:>14}  {:8} {:>9}",
        "figure", "found", "bar", "", "repeats"
    );
    let lines: Vec<String> = std::iter::once(head).chain(bars.iter().map(Bar::line)).collect();
    lines.join("\n")
}
