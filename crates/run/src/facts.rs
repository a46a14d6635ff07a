//! Measured facts on their way to the ledger. Libraries hand them to a [`FactSink`] and never see the ledger.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::Result;

/// One measured (or predicted: then its metric says so) number about one subject.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fact {
    /// What was measured: `compress:moe-int4:ref-qwen2moe`, `search:quickstart:glyphs`.
    pub subject: String,
    /// Name with its unit: `perplexity_after`, `bytes_after`, `predicted_ms`, `measured_ms`.
    pub metric: String,
    pub value: f64,
    /// `ms`, `bytes`, `nats`, `fraction`, `count`, …
    pub unit: String,
    /// Half width of the interval, or median absolute deviation of a timing; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<f64>,
    /// How many samples stand behind the value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
}

impl Fact {
    /// A fact without spread and count.
    pub fn new(subject: impl Into<String>, metric: impl Into<String>, value: f64, unit: impl Into<String>) -> Self {
        Self {
            subject: subject.into(),
            metric: metric.into(),
            value,
            unit: unit.into(),
            spread: None,
            count: None,
        }
    }

    /// The same with its spread.
    #[must_use]
    pub fn spread(mut self, spread: f64) -> Self {
        self.spread = Some(spread);
        self
    }

    /// The same with its sample count.
    #[must_use]
    pub fn count(mut self, count: u64) -> Self {
        self.count = Some(count);
        self
    }
}

/// Where facts go: the ledger in the program, a list in tests.
pub trait FactSink: Send + Sync {
    /// Records one fact durably.
    ///
    /// # Errors
    /// When it cannot be written.
    fn record(&self, fact: Fact) -> Result<()>;
}

/// Keeps facts in memory.
#[derive(Debug, Default)]
pub struct FactList(Mutex<Vec<Fact>>);

impl FactList {
    /// What was recorded so far, in order.
    pub fn facts(&self) -> Vec<Fact> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

impl FactSink for FactList {
    fn record(&self, fact: Fact) -> Result<()> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .push(fact);
        Ok(())
    }
}
