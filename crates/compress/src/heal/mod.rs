//! Mending a layer after compression, without gradients of the whole model: what is left of the experts is fitted to what
//! the layer should say, on tokens in memory. Law: a step is kept only if the loss on windows that it never saw falls by
//! more than its standard errors; both numbers are in its [`Step`], kept or not.

mod down;
#[cfg(test)]
mod laws;
mod pairs;
mod router;
#[cfg(test)]
mod router_laws;
mod scales;
mod stored;

use cotk_model::layers::Mlp;
use cotk_model::layers::linear::Linear;
use cotk_model::moe::Routed;
use serde::{Deserialize, Serialize};

pub use self::down::{Healed, heal_down};
pub use self::router::{Router, heal_router};
pub use self::scales::heal_scales;

/// One MoE layer's calibration tokens in memory; rows are tokens in stream order.
#[derive(Debug, Clone, Copy)]
pub struct HealTokens<'a> {
    pub hidden: usize,
    /// What the student's experts see, `[tokens, hidden]`, normed.
    pub inputs: &'a [f32],
    /// What the routed experts together should add, `[tokens, hidden]`: see [`drift_target`].
    pub targets: &'a [f32],
    /// How the student routes them.
    pub routed: &'a Routed,
    /// Weight of each token's squared error; 0 leaves it out.
    pub weights: &'a [f64],
    /// Whether a token judges; the others are fitted to.
    pub held_out: &'a [bool],
    /// Tokens of each window, in order: errors are paired over windows.
    pub windows: &'a [usize],
}

impl HealTokens<'_> {
    /// Window of each token.
    fn window_of(&self) -> Vec<usize> {
        let windows = self.windows.iter().enumerate();
        windows
            .flat_map(|(window, &tokens)| std::iter::repeat_n(window, tokens))
            .collect()
    }

    fn check(&self) {
        let count = self.weights.len();
        assert_eq!(self.inputs.len(), count * self.hidden, "one input a token");
        assert_eq!(self.targets.len(), count * self.hidden, "one target a token");
        assert_eq!(
            self.routed.experts.len(),
            count * self.routed.slots,
            "one choice a slot"
        );
        assert_eq!(self.held_out.len(), count, "one flag a token");
        assert_eq!(self.windows.iter().sum::<usize>(), count, "windows cover all tokens");
    }
}

/// How hard a step tries, and what convinces it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealOptions {
    /// Pulls towards what is there, as shares of the mean of the Hessian's diagonal; tried from the strongest on, the best
    /// on held-out tokens is kept.
    pub lambdas: Vec<f64>,
    /// Sweeps over all experts at the best of them, after one at each.
    pub sweeps: usize,
    /// Of the held-out gain, that it must exceed.
    pub standard_errors: f64,
    /// Whether the router is fitted too, after the experts.
    #[serde(default)]
    pub router: bool,
}

impl Default for HealOptions {
    fn default() -> Self {
        Self {
            lambdas: vec![0.3, 0.1, 0.03, 0.01, 0.003],
            sweeps: 2,
            standard_errors: 2.0,
            router: false,
        }
    }
}

/// What stands where an expert was.
#[derive(Debug, Clone, Copy)]
pub enum Part<'a> {
    /// Its down projection is what a refit changes.
    Mlp(&'a Mlp),
    /// `left · right · (silu(gate · x) · up · x)`: the left factor alone is refitted, the product would not stay low rank.
    LowRank {
        gate: &'a Linear,
        up: &'a Linear,
        right: &'a Linear,
        left: &'a Linear,
    },
    /// Answers with the same vector always, `[hidden]`.
    Constant(&'a [f32]),
    /// Nothing: it adds nothing where it is still chosen.
    Absent,
}

impl<'a> Part<'a> {
    /// Experts that are there, and the constants of some that are not.
    pub fn all(experts: &'a [Option<Mlp>], constants: &'a [Option<Vec<f32>>]) -> Vec<Self> {
        let constant = |expert: usize| constants.get(expert).and_then(Option::as_deref);
        let part = |(expert, mlp): (usize, &'a Option<Mlp>)| match (mlp, constant(expert)) {
            (Some(mlp), _) => Self::Mlp(mlp),
            (None, Some(constant)) => Self::Constant(constant),
            (None, None) => Self::Absent,
        };
        experts.iter().enumerate().map(part).collect()
    }
}

/// One step and what it was judged by; goes into the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// `down`, `scales`, `router`.
    pub name: String,
    /// Squared error of the layer's output on held-out tokens, relative to the targets', before and after.
    pub held_out_before: f64,
    pub held_out_after: f64,
    /// Of their difference, paired over windows.
    pub standard_error: f64,
    pub is_kept: bool,
    /// The pull that was best; of a router, the rate.
    pub lambda: Option<f64>,
}

impl Step {
    /// Judges by errors of held-out windows before and after, and the targets' size.
    #[expect(clippy::cast_precision_loss, reason = "counts are small")]
    fn judged(
        name: &str,
        before: &[f64],
        after: &[f64],
        size: f64,
        options: &HealOptions,
        lambda: Option<f64>,
    ) -> Self {
        let count = before.len() as f64;
        let gains: Vec<f64> = before.iter().zip(after).map(|(before, after)| before - after).collect();
        let gain: f64 = gains.iter().sum();
        let mean = gain / count.max(1.0);
        let spread: f64 = gains.iter().map(|gain| (gain - mean).powi(2)).sum();
        let error = if before.len() > 1 {
            (spread * count / (count - 1.0)).sqrt()
        } else {
            f64::INFINITY
        };
        let share = |error: f64| if size > 0.0 { error / size } else { 0.0 };
        Self {
            name: name.to_owned(),
            held_out_before: share(before.iter().sum()),
            held_out_after: share(after.iter().sum()),
            standard_error: if error.is_finite() { share(error) } else { 0.0 },
            is_kept: gain > 0.0 && gain > options.standard_errors * error,
            lambda,
        }
    }
}

/// What routed experts should add so that the student's state behind the layer is the teacher's: the teacher's state
/// behind it minus the student's with all but the routed experts added, `[tokens, hidden]` each. With `drift` below 1 that
/// much of the way from `own`, what the teacher's experts would say to the student's inputs (reference:
/// moe-compression 8.2).
pub fn drift_target(teacher_behind: &[f32], student_without: &[f32], own: Option<(&[f32], f32)>) -> Vec<f32> {
    let full = teacher_behind.iter().zip(student_without).map(|(t, s)| t - s);
    match own {
        None => full.collect(),
        Some((own, drift)) => full.zip(own).map(|(full, own)| own + drift * (full - own)).collect(),
    }
}
