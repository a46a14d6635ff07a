//! Limits as losses: the log ratio of an expected cost to its target under an augmented Lagrangian, with dual ascent.
//! Law: a limit that is met costs nothing in the end; one that is broken pulls harder and harder.

use serde::{Deserialize, Serialize};

use crate::cost::Quantity;

/// Weight of the square.
const RHO: f64 = 1.0;
/// Step of the dual.
const ASCENT: f64 = 0.05;
/// Most that a limit may pull.
const MOST: f64 = 10.0;
/// Memory of the ratio's moving average.
const MEMORY: f64 = 0.9;
/// What is aimed at, so that the target itself is met.
const INNER: f64 = 0.98;

/// One limit with its dual variable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Constraint {
    pub quantity: Quantity,
    pub target: f64,
    /// λ, 0..=10.
    pub dual: f64,
    ratio: f64,
}

impl Constraint {
    /// A limit that does not pull yet.
    pub fn new(quantity: Quantity, target: f64) -> Self {
        Self {
            quantity,
            target,
            dual: 0.0,
            ratio: 0.0,
        }
    }

    fn log_ratio(&self, expected: f64) -> f64 {
        (expected / (INNER * self.target)).ln()
    }

    /// `(max(0, λ + ρr)² − λ²)/(2ρ)`.
    pub fn loss(&self, expected: f64) -> f64 {
        let pull = (self.dual + RHO * self.log_ratio(expected)).max(0.0);
        (pull * pull - self.dual * self.dual) / (2.0 * RHO)
    }

    /// `∂ loss / ∂ expected`.
    pub fn slope(&self, expected: f64) -> f64 {
        (self.dual + RHO * self.log_ratio(expected)).max(0.0) / expected
    }

    /// Dual ascent after a gate step.
    pub fn update(&mut self, expected: f64) {
        self.ratio = MEMORY * self.ratio + (1.0 - MEMORY) * self.log_ratio(expected);
        self.dual = (self.dual + ASCENT * self.ratio).clamp(0.0, MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_that_of_the_loss() {
        let mut constraint = Constraint::new(Quantity::Ms, 2.0);
        for dual in [0.0, 0.7, 3.0] {
            constraint.dual = dual;
            for expected in [0.5, 1.9, 2.5, 8.0] {
                let numeric = (constraint.loss(expected + 1e-6) - constraint.loss(expected - 1e-6)) / 2e-6;
                assert!((constraint.slope(expected) - numeric).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn a_met_limit_stops_pulling_and_a_broken_one_pulls_to_the_cap() {
        let mut constraint = Constraint::new(Quantity::Ms, 2.0);
        for _ in 0..2000 {
            constraint.update(4.0);
        }
        assert_eq!(constraint.dual, MOST);
        for _ in 0..2000 {
            constraint.update(1.0);
        }
        assert_eq!((constraint.dual, constraint.slope(1.0)), (0.0, 0.0));
    }
}
