//! From work to milliseconds: an exact row of the table wins, else the fitted terms of its path. Pure: no clock, no file.

use crate::Result;
use crate::work::Work;

/// Where a prediction comes from, weakest part first for sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// This very key was measured.
    Table,
    /// Fitted terms of its kernel path.
    Fit,
    /// Another machine's profile, scaled by a few measurements here.
    Transfer,
    /// Nominal figures of the hardware.
    Datasheet,
}

/// What a reader of a prediction must know.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Flag {
    /// A count lies outside what was measured on this path: the spread is widened.
    Extrapolated { path: String },
    /// The profile's own noise floor is above 5 %.
    Noisy,
    /// The profile was taken with `--quick`.
    Quick,
    /// A committed reference profile: comparable between commits, not this machine's own times.
    Reference,
    /// Used on another machine with `--force`.
    OtherMachine,
}

/// Predicted time by what it is spent on, in ms.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Terms {
    pub launch_ms: f64,
    pub layout_ms: f64,
    pub memory_ms: f64,
    pub compute_ms: f64,
    pub link_ms: f64,
}

/// How long something will take.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// Median time of one call.
    pub ms: f64,
    /// Nine in ten medians lie between these two.
    pub lo_ms: f64,
    pub hi_ms: f64,
    /// Sums to `ms`.
    pub terms: Terms,
    pub origin: Origin,
    pub flags: Vec<Flag>,
}

/// Anything that can say how long work takes on one machine. Pure, cheap, no I/O.
pub trait CostModel: Send + Sync {
    /// # Errors
    /// [`crate::Error::NotMeasured`] when nothing at all is known about a kind of operator.
    fn predict(&self, work: &Work<'_>) -> Result<Prediction>;
}
