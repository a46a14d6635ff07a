//! Search by gradient: weights and gates in turns on shared weights. Warm-up opens gates at random and asks for nothing;
//! then thresholds descend cross entropy plus limits. Law: every random choice is a function of seed and step, so that a
//! checkpoint needs no generator.

use cotk_run::seeds::Seeds;
use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::{Drive, Found, Method, Moment, cosine};
use crate::checkpoint;
use crate::constraint::Constraint;
use crate::cost::Quantity;
use crate::gates::Gates;
use crate::space::{Point, Space};
use crate::{Result, SearchError};

/// Temperature from here to there over the search.
const TEMPERATURE: [f64; 2] = [1.0, 0.1];
/// Chance of a gate to be flipped, from here to there: keeps closed parts alive.
const EXPLORE: [f64; 2] = [0.1, 0.02];
/// Lines of history over a whole search.
const MOMENTS: u64 = 120;

/// Straight-through thresholds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Gradient;

/// What a checkpoint keeps beside the weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Memory {
    /// Weight steps done, warm-up included.
    step: u64,
    gates: Option<Gates>,
    constraints: Vec<Constraint>,
    history: Vec<Moment>,
    /// Sum and number of losses since the last line of history.
    losses: (f64, u64),
}

impl Method for Gradient {
    fn name(&self) -> &'static str {
        "gradient"
    }

    fn search(&self, drive: &mut Drive<'_>) -> Result<Found> {
        let mut memory = recall(drive)?;
        let total = drive.plan.warm_up + drive.plan.choose;
        if memory.step < total {
            let mut weights = drive.weight_batches().start(to_usize(memory.step));
            let gate_source = drive.gate_batches();
            let gate_steps = memory
                .step
                .saturating_sub(drive.plan.warm_up)
                .div_ceil(drive.recipe.search.gate_every);
            let mut gate_batches = gate_source.start(to_usize(gate_steps));
            drive.progress.begin("searching", total, "steps");
            drive.progress.advance(memory.step);
            while memory.step < total {
                if drive.cancel.is_cancelled() {
                    remember(drive, &memory)?;
                    drive.cancel.check()?;
                }
                if memory.step >= drive.plan.warm_up {
                    let chosen = memory.step - drive.plan.warm_up;
                    if memory.gates.is_none() {
                        memory.gates = Some(Gates::new(&drive.net.gate_statistics(), TEMPERATURE[0]));
                    }
                    if chosen.is_multiple_of(drive.recipe.search.gate_every) {
                        gate_step(drive, &mut memory, &gate_batches.next_batch(), chosen)?;
                    }
                }
                weight_step(drive, &mut memory, &weights.next_batch())?;
                drive.progress.advance(1);
                if memory.step.is_multiple_of(drive.recipe.train.checkpoint_every) || memory.step == total {
                    remember(drive, &memory)?;
                }
            }
            drive.progress.end();
        }
        let probabilities = probabilities(drive, &memory);
        let on: Vec<bool> = probabilities.iter().map(|p| *p > 0.5).collect();
        Ok(Found {
            points: vec![drive.space.point_of(&on)],
            history: memory.history,
        })
    }
}

fn to_usize(step: u64) -> usize {
    usize::try_from(step).expect("steps fit in memory's range")
}

fn recall(drive: &mut Drive<'_>) -> Result<Memory> {
    if drive.checkpoint.exists() {
        let (memory, state) = checkpoint::load::<Memory>(&drive.checkpoint)?;
        drive.net.load(&state)?;
        return Ok(memory);
    }
    Ok(Memory {
        step: 0,
        gates: None,
        constraints: drive
            .limits
            .iter()
            .map(|limit| Constraint::new(limit.quantity, limit.target))
            .collect(),
        history: Vec::new(),
        losses: (0.0, 0),
    })
}

fn remember(drive: &Drive<'_>, memory: &Memory) -> Result<()> {
    checkpoint::save(&drive.checkpoint, memory, &drive.net.state())
}

/// How far the search proper is, 0..1.
fn share(drive: &Drive<'_>, memory: &Memory) -> f64 {
    memory.step.saturating_sub(drive.plan.warm_up) as f64 / drive.plan.choose.max(1) as f64
}

fn probabilities(drive: &Drive<'_>, memory: &Memory) -> Vec<f64> {
    match &memory.gates {
        Some(gates) => gates.probabilities(&drive.net.gate_statistics()),
        None => vec![1.0; drive.space.gates().len()],
    }
}

/// Warm-up: every gate open with a chance that falls from 1 to `open` over the first third, closed with all inside it.
fn warm_up_point(space: &Space, seeds: Seeds, step: u64, warm_up: u64, open: f64) -> Point {
    let mut stream = seeds.stream(&format!("warm-up {step}"));
    let ramp = (3.0 * step as f64 / warm_up.max(1) as f64).min(1.0);
    let chance = 1.0 - (1.0 - open) * ramp;
    let on: Vec<bool> = space.gates().iter().map(|_| stream.random::<f64>() < chance).collect();
    space.point_of(&on)
}

/// Search: hard gates, some of them flipped.
fn explored_point(space: &Space, probabilities: &[f64], seeds: Seeds, purpose: &str, step: u64, share: f64) -> Point {
    let mut stream = seeds.stream(&format!("{purpose} {step}"));
    let flip = EXPLORE[0] + (EXPLORE[1] - EXPLORE[0]) * share;
    let on: Vec<bool> = probabilities
        .iter()
        .map(|p| (*p > 0.5) != (stream.random::<f64>() < flip))
        .collect();
    space.point_of(&on)
}

fn weight_step(drive: &mut Drive<'_>, memory: &mut Memory, batch: &cotk_data::loader::Batch) -> Result<()> {
    let (step, total) = (memory.step, drive.plan.warm_up + drive.plan.choose);
    let point = if step < drive.plan.warm_up {
        warm_up_point(
            drive.space,
            drive.seeds,
            step,
            drive.plan.warm_up,
            drive.recipe.search.open,
        )
    } else {
        let probabilities = probabilities(drive, memory);
        explored_point(
            drive.space,
            &probabilities,
            drive.seeds,
            "search",
            step,
            share(drive, memory),
        )
    };
    // A short ramp: the first gradients of fresh weights are wild.
    let ramp = ((step + 1) as f64 / 20.0).min(1.0);
    let rate = drive.recipe.train.rate * ramp * cosine(step, total, 0.1);
    let loss = drive.net.weight_step(&point, batch, rate)?;
    if !loss.is_finite() {
        return Err(SearchError::Diverged {
            phase: "search",
            step,
            loss,
        });
    }
    memory.step += 1;
    memory.losses = (memory.losses.0 + loss, memory.losses.1 + 1);
    let every = total.div_ceil(MOMENTS).max(1);
    if memory.step.is_multiple_of(every) || memory.step == total {
        let moment = moment(drive, memory)?;
        memory.history.push(moment);
        memory.losses = (0.0, 0);
    }
    Ok(())
}

fn moment(drive: &Drive<'_>, memory: &Memory) -> Result<Moment> {
    let mut moment = Moment {
        step: memory.step,
        loss: memory.losses.0 / memory.losses.1.max(1) as f64,
        expected_ms: None,
        expected_bytes: None,
        hard_ms: None,
        gates: Vec::new(),
    };
    if memory.gates.is_some() {
        let gates = probabilities(drive, memory);
        let on: Vec<bool> = gates.iter().map(|p| *p > 0.5).collect();
        moment.expected_ms = Some(drive.costs.expected(Quantity::Ms, &gates)?.0);
        moment.expected_bytes = Some(drive.costs.expected(Quantity::Bytes, &gates)?.0);
        moment.hard_ms = Some(drive.costs.at(Quantity::Ms, &drive.space.point_of(&on))?);
        moment.gates = gates;
    }
    Ok(moment)
}

fn gate_step(drive: &mut Drive<'_>, memory: &mut Memory, batch: &cotk_data::loader::Batch, chosen: u64) -> Result<()> {
    let share = share(drive, memory);
    if let Some(gates) = &mut memory.gates {
        gates.temperature = TEMPERATURE[0] * (TEMPERATURE[1] / TEMPERATURE[0]).powf(share);
    }
    let probabilities = probabilities(drive, memory);
    let point = explored_point(drive.space, &probabilities, drive.seeds, "gates", chosen, share);
    let measured = drive.net.gate_gradient(&point, batch)?;
    if !measured.loss.is_finite() {
        return Err(SearchError::Diverged {
            phase: "gate steps",
            step: chosen,
            loss: measured.loss,
        });
    }
    let mut slope = measured.gradient;
    for constraint in &mut memory.constraints {
        let (expected, gradient) = drive.costs.expected(constraint.quantity, &probabilities)?;
        let pull = constraint.slope(expected);
        for (slope, by_gate) in slope.iter_mut().zip(gradient) {
            *slope += pull * by_gate;
        }
        constraint.update(expected);
    }
    if let Some(gates) = &mut memory.gates {
        gates.step(&slope, &probabilities, drive.recipe.search.gate_rate);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::tests::residual_space;

    #[test]
    fn warm_up_begins_with_everything_open() {
        let space = residual_space();
        let point = |step| warm_up_point(&space, Seeds::new(1), step, 300, 0.6);
        assert_eq!(point(0), space.largest());
        let closed = (200..260).filter(|s| point(*s) != space.largest()).count();
        assert!(closed > 50, "{closed}");
        assert_eq!(point(250), point(250));
        assert_ne!(point(250), warm_up_point(&space, Seeds::new(2), 250, 300, 0.6));
    }
}
