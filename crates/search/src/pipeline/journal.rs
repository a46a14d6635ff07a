//! The lines of a search's journal: every step that took time, in the order in which it happened. What a line means for the
//! rest of the run, `pipeline` knows.

use serde::{Deserialize, Serialize};

use crate::cost::Tables;
use crate::method::Limit;
use crate::plan::Plan;
use crate::profile::Profiled;
use crate::refit::Refit;

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Entry {
    Begun {
        threads: usize,
        cotk_version: String,
        commit: String,
    },
    Costs {
        tables: Tables,
        profile: Profiled,
        limits: Vec<Limit>,
    },
    Planned {
        plan: Plan,
    },
    /// One network repaired, predicted, then measured.
    Tried {
        encoding: String,
        predicted_ms: f64,
    },
    Timed {
        encoding: String,
        measured_ms: f64,
    },
    Chosen {
        encoding: String,
    },
    Trained {
        which: Which,
        val_accuracy: f64,
    },
    Predicted {
        ms: f64,
        spread_ms: f64,
        origin: String,
    },
    Measured {
        ms: f64,
        spread_ms: f64,
        baseline_ms: f64,
        baseline_spread_ms: f64,
        /// Tenth percentile of the network's own slices.
        #[serde(default)]
        q10_ms: f64,
    },
    /// The prediction was wrong, and the profile has learnt from it.
    Refitted {
        refit: Refit,
    },
    /// The test images were read: once.
    Tested {
        accuracy: f64,
        baseline: f64,
        images: u64,
    },
    /// Seconds of work of one process, up to here.
    Worked {
        seconds: f64,
    },
}

/// The two networks that are fine-tuned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Which {
    Network,
    Baseline,
}

impl Which {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Network => "network",
            Self::Baseline => "baseline",
        }
    }
}
