//! How many steps each phase gets. Law: minutes become a step count once, are journaled, and no clock is asked again.

use std::sync::Arc;
use std::time::Instant;

use cotk_data::images::Images;
use cotk_data::loader::Source;
use cotk_data::task::Task;
use cotk_run::seeds::Seeds;
use serde::{Deserialize, Serialize};

use crate::recipe::Recipe;
use crate::space::Space;
use crate::trainable::Trainable;
use crate::{Result, SearchError};

/// Steps that are timed before anything is planned.
const TIMED: usize = 20;

/// Steps of each phase.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Weight steps without any limit, gates at random.
    pub warm_up: u64,
    /// Weight steps while gates learn.
    pub choose: u64,
    /// Steps of the derived network, and of the baseline.
    pub fine_tune: u64,
    /// Median of 20 timed weight steps; what `predicted_s` was made of.
    pub step_ms: f64,
    /// Predicted wall time of all phases.
    pub predicted_s: f64,
}

/// What gate steps, fake codes of activations and the f32 baseline cost, in weight steps of the phase.
const GATE_COST: f64 = 2.0;
const FINE_TUNE_COST: f64 = 1.6;
/// Data, deriving, repair, measuring.
const FIXED_S: f64 = 12.0;

impl Plan {
    /// From timed steps and the recipe's budget.
    ///
    /// # Errors
    /// [`SearchError::Recipe`] when the minutes are too few for anything.
    pub fn new(recipe: &Recipe, step_ms: f64) -> Result<Self> {
        let shares = &recipe.search;
        let per_step_ms = step_ms
            * (shares.warm_up
                + shares.choose * (1.0 + GATE_COST / shares.gate_every as f64)
                + shares.fine_tune * (1.0 + FINE_TUNE_COST));
        let mut steps = recipe.budget.steps.unwrap_or(u64::MAX);
        if let Some(minutes) = recipe.budget.minutes {
            let most = (minutes * 60.0 - FIXED_S).max(0.0) * 1e3 / per_step_ms;
            if most < 20.0 {
                return Err(SearchError::Recipe {
                    key: "budget.minutes",
                    found: minutes.to_string(),
                    expected: format!(
                        "{:.2} or more: a step takes {step_ms:.1} ms here",
                        (FIXED_S + per_step_ms / 50.0) / 60.0
                    ),
                });
            }
            steps = steps.min(most as u64);
        }
        let part = |share: f64| ((steps as f64 * share).round() as u64).max(1);
        Ok(Self {
            warm_up: part(shares.warm_up),
            choose: part(shares.choose),
            fine_tune: part(shares.fine_tune),
            step_ms,
            predicted_s: FIXED_S + steps as f64 * per_step_ms / 1e3,
        })
    }
}

/// Median time of a weight step over points of the space, after two that do not count. Changes the weights: the caller
/// begins anew.
///
/// # Errors
/// [`SearchError::Train`].
pub fn time_steps(net: &mut dyn Trainable, space: &Space, source: &Source, seeds: Seeds) -> Result<f64> {
    let mut stream = seeds.stream("timing");
    let mut times = Vec::with_capacity(TIMED);
    for step in 0..TIMED + 2 {
        let (point, batch) = (space.sample(&mut stream), source.batch(step % source.steps_per_epoch()));
        let begin = Instant::now();
        net.weight_step(&point, &batch, 1e-6)?;
        if step >= 2 {
            times.push(begin.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(cotk_latency::probe::median(&times))
}

/// Training images in two disjoint halves: weights never see what gates learn from.
#[derive(Debug, Clone)]
pub struct Halves {
    pub weights: Arc<Images>,
    pub gates: Arc<Images>,
    /// Both together, for fine-tuning.
    pub all: Arc<Images>,
    pub val: Arc<Images>,
}

impl Halves {
    /// Split by the run's seed.
    ///
    /// # Errors
    /// [`SearchError::Recipe`] when a half holds less than one batch.
    pub fn new(task: &Task, recipe: &Recipe, seeds: Seeds) -> Result<Self> {
        use rand::RngExt;
        let mut order: Vec<usize> = (0..task.train.len()).collect();
        let mut stream = seeds.stream("halves");
        for i in (1..order.len()).rev() {
            order.swap(i, stream.random_range(0..=i));
        }
        let gates = (order.len() as f64 * recipe.search.gate_share) as usize;
        if gates < recipe.train.batch || order.len() - gates < recipe.train.batch {
            return Err(SearchError::Recipe {
                key: "train.batch",
                found: recipe.train.batch.to_string(),
                expected: format!(
                    "at most {}, the smaller half of the training images",
                    gates.min(order.len() - gates)
                ),
            });
        }
        Ok(Self {
            gates: Arc::new(task.train.subset(&order[..gates])),
            weights: Arc::new(task.train.subset(&order[gates..])),
            all: Arc::new(task.train.clone()),
            val: Arc::new(task.val.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(text: &str) -> Recipe {
        let source = cotk_run::recipe::Source {
            name: "test".into(),
            text: format!("[data]\nname = \"glyphs\"\n[budget]\n{text}"),
        };
        cotk_run::recipe::parse(&source, &[]).unwrap()
    }

    #[test]
    fn minutes_and_steps_bind_whichever_are_fewer() {
        let plan = Plan::new(&recipe("steps = 1000\nminutes = 600.0"), 20.0).unwrap();
        assert_eq!((plan.warm_up, plan.choose, plan.fine_tune), (300, 300, 200));
        let fast = Plan::new(&recipe("steps = 1000\nminutes = 0.3"), 20.0).unwrap();
        assert!(fast.warm_up < 150 && fast.predicted_s <= 18.1, "{fast:?}");
        assert!(
            Plan::new(&recipe("minutes = 0.2"), 20.0)
                .unwrap_err()
                .to_string()
                .contains("budget.minutes")
        );
    }
}
