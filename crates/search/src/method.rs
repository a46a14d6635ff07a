//! A [`Method`] drives a `Trainable` under a budget and reports networks, best first. What all methods share stands in
//! [`Drive`]: data, costs, limits, plan, checkpoints. Law: killed anywhere and started again it reports the same.

use std::path::PathBuf;

use cotk_data::loader::{Batch, Source, plain_batch};
use cotk_data::task::Task;
use cotk_run::cancel::Cancel;
use cotk_run::progress::Progress;
use cotk_run::seeds::Seeds;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::cost::{Costs, Quantity};
use crate::plan::{Halves, Plan};
use crate::recipe::Recipe;
use crate::space::{Point, Space};
use crate::trainable::{Score, Trainable};

pub mod gradient;

/// A limit on a predicted cost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    pub quantity: Quantity,
    pub target: f64,
}

/// One line of the search's history.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Moment {
    /// Weight steps so far.
    pub step: u64,
    /// Mean training loss since the last line, in nats.
    pub loss: f64,
    /// Expected over the gates; absent during warm-up.
    pub expected_ms: Option<f64>,
    pub expected_bytes: Option<f64>,
    /// Of the network that the gates say right now: its distance from the expectation is the discretisation gap.
    pub hard_ms: Option<f64>,
    /// Probability of each gate; empty during warm-up.
    pub gates: Vec<f64>,
}

/// Everything a method works with.
pub struct Drive<'a> {
    pub space: &'a Space,
    pub costs: &'a Costs,
    pub limits: &'a [Limit],
    pub plan: Plan,
    pub recipe: &'a Recipe,
    pub task: &'a Task,
    pub halves: &'a Halves,
    pub net: &'a mut dyn Trainable,
    pub seeds: Seeds,
    /// The method's own checkpoint file.
    pub checkpoint: PathBuf,
    pub cancel: &'a Cancel,
    pub progress: &'a dyn Progress,
}

/// What a method found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Best first; later ones trade cost against accuracy.
    pub points: Vec<Point>,
    pub history: Vec<Moment>,
}

/// A way to choose.
pub trait Method {
    /// As in recipes and results.
    fn name(&self) -> &'static str;

    /// Trains the shared weights and chooses. Leaves the weights in `drive.net`.
    ///
    /// # Errors
    /// [`crate::SearchError`], [`cotk_run::Error::Cancelled`] after a checkpoint.
    fn search(&self, drive: &mut Drive<'_>) -> Result<Found>;
}

impl Drive<'_> {
    /// Batches for weights, from their half.
    pub fn weight_batches(&self) -> Source {
        Source::shuffled(
            self.halves.weights.clone(),
            self.task.normalisation,
            Some(self.task.augment),
            self.seeds,
            "weights",
            self.recipe.train.batch,
        )
    }

    /// Batches for gates, from theirs.
    pub fn gate_batches(&self) -> Source {
        Source::shuffled(
            self.halves.gates.clone(),
            self.task.normalisation,
            Some(self.task.augment),
            self.seeds,
            "gates",
            self.recipe.train.batch,
        )
    }

    /// Unchanged training images for normalisation statistics.
    pub fn calibration(&self, batches: usize) -> Vec<Batch> {
        calibration(&self.halves.all, self.task, batches)
    }

    /// Loss and accuracy of a point on the first `images` validation images, its statistics recalibrated.
    ///
    /// # Errors
    /// [`crate::SearchError::Train`].
    pub fn judge(&mut self, point: &Point, images: usize) -> Result<Score> {
        let batches = self.calibration(2);
        self.net.recalibrate(point, &batches)?;
        let images = images.min(self.halves.val.len());
        let mut score = Score::default();
        for from in (0..images).step_by(256) {
            let batch = plain_batch(
                &self.halves.val,
                self.task.normalisation,
                from..(from + 256).min(images),
            );
            score = score.plus(self.net.evaluate(point, &batch)?);
        }
        Ok(score)
    }
}

/// `batches` batches of up to 128 unchanged training images.
pub(crate) fn calibration(images: &cotk_data::images::Images, task: &Task, batches: usize) -> Vec<Batch> {
    let size = 128.min(images.len());
    let most = (images.len() / size).max(1);
    (0..batches.min(most))
        .map(|i| plain_batch(images, task.normalisation, i * size..(i + 1) * size))
        .collect()
}

/// Half a cosine from 1 at 0 to `low` at `total`.
pub(crate) fn cosine(step: u64, total: u64, low: f64) -> f64 {
    let at = step as f64 / total.max(1) as f64;
    low + (1.0 - low) * 0.5 * (1.0 + (std::f64::consts::PI * at.min(1.0)).cos())
}
