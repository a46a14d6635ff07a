//! What a method drives: a [`Trainable`] holds the shared weights of a whole space, a [`Subnet`] is one point cut out.
//! No autograd here, and no choosing there: gates go in as booleans, gradients come out as numbers.
//! Law: a subnet computes what its point computed inside the shared weights.

use crate::Result;
use crate::checkpoint::State;
use crate::export::Folded;
use crate::space::{Form, Point};
use cotk_data::loader::Batch;

/// What an evaluation counted.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Score {
    /// Sum of the cross entropies, in nats.
    pub loss_sum: f64,
    pub right: u64,
    pub count: u64,
}

impl Score {
    /// Share of images that were classified right, 0..1.
    pub fn accuracy(self) -> f64 {
        self.right as f64 / self.count.max(1) as f64
    }

    /// Mean cross entropy in nats.
    pub fn loss(self) -> f64 {
        self.loss_sum / self.count.max(1) as f64
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            loss_sum: self.loss_sum + other.loss_sum,
            right: self.right + other.right,
            count: self.count + other.count,
        }
    }
}

/// One batch's loss, and how it would change with each gate.
#[derive(Debug, Clone, PartialEq)]
pub struct GateGradient {
    /// Mean cross entropy at the given gates.
    pub loss: f64,
    /// `∂ loss / ∂ gate` at the hard 0 or 1, in the order of [`crate::space::Space::gates`].
    pub gradient: Vec<f64>,
}

/// The shared weights of a space.
pub trait Trainable {
    /// One optimizer step on the weights that `point` uses; returns the batch's mean cross entropy before it.
    ///
    /// # Errors
    /// [`crate::SearchError::Train`].
    fn weight_step(&mut self, point: &Point, batch: &Batch, rate: f64) -> Result<f64>;

    /// Gradients of the gates; changes nothing.
    ///
    /// # Errors
    /// [`crate::SearchError::Train`].
    fn gate_gradient(&self, point: &Point, batch: &Batch) -> Result<GateGradient>;

    /// `ln ρ_shell − ln ρ_ref` of each gate: how much of the weights lies in what it would switch on.
    fn gate_statistics(&self) -> Vec<f64>;

    /// Sets the normalisation statistics to those of `point` on these batches. Never judge a point without it.
    ///
    /// # Errors
    /// [`crate::SearchError::Train`].
    fn recalibrate(&mut self, point: &Point, batches: &[Batch]) -> Result<()>;

    /// Loss and accuracy with the statistics of the last [`Trainable::recalibrate`].
    ///
    /// # Errors
    /// [`crate::SearchError::Train`].
    fn evaluate(&self, point: &Point, batch: &Batch) -> Result<Score>;

    /// One point alone, with weights of its own.
    ///
    /// # Errors
    /// [`crate::SearchError::Train`].
    fn cut_out(&self, point: &Point, form: Form) -> Result<Box<dyn Subnet>>;

    /// Everything that training changes.
    fn state(&self) -> State;

    /// Continues from a state.
    ///
    /// # Errors
    /// [`crate::SearchError::Train`] for a tensor that is missing or has another shape.
    fn load(&mut self, state: &State) -> Result<()>;
}

/// One discrete network: trains, evaluates and exports alone.
pub trait Subnet {
    /// One optimizer step; returns the batch's mean cross entropy before it.
    ///
    /// # Errors
    /// [`crate::SearchError::Train`].
    fn step(&mut self, batch: &Batch, rate: f64) -> Result<f64>;

    /// Sets what is measured, not learned: normalisation statistics, then (int8) the activation ranges.
    ///
    /// # Errors
    /// [`crate::SearchError::Train`].
    fn settle(&mut self, batches: &[Batch]) -> Result<()>;

    /// Loss and accuracy as the exported network will have them, after [`Subnet::settle`].
    ///
    /// # Errors
    /// [`crate::SearchError::Train`].
    fn evaluate(&self, batch: &Batch) -> Result<Score>;

    /// Weights as a runtime wants them, after [`Subnet::settle`].
    ///
    /// # Errors
    /// [`crate::SearchError::Train`] before it.
    fn folded(&self) -> Result<Folded>;

    /// Everything that training changes.
    fn state(&self) -> State;

    /// Continues from a state.
    ///
    /// # Errors
    /// [`crate::SearchError::Train`] for a tensor that is missing or has another shape.
    fn load(&mut self, state: &State) -> Result<()>;
}
