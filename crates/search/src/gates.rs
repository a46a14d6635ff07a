//! Threshold gates: `a = (ln ρ_shell − ln ρ_ref − θ)/τ`, open when `a > 0`, probability `σ(a)`. "Single-Path NAS"
//! (Stamoulis et al., 2019), with a root-mean-square ratio instead of norms so that one step size serves all layers.
//! Holds thresholds and their Adam; knows neither weights nor costs. Law: forward is hard, backward is `p(1 − p)`.

use serde::{Deserialize, Serialize};

/// Where every gate starts after warm-up, whatever its layer.
const START: f64 = 0.73;

/// Betas of Adam: short memory of the slope, long of its size.
const BETA: [f64; 2] = [0.5, 0.999];

/// Thresholds with their optimizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gates {
    thresholds: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
    steps: u32,
    /// Temperature τ.
    pub temperature: f64,
}

impl Gates {
    /// Thresholds such that every gate is open with probability 0.73 at these statistics.
    pub fn new(statistics: &[f64], temperature: f64) -> Self {
        let logit = (START / (1.0 - START)).ln();
        Self {
            thresholds: statistics.iter().map(|s| s - temperature * logit).collect(),
            first: vec![0.0; statistics.len()],
            second: vec![0.0; statistics.len()],
            steps: 0,
            temperature,
        }
    }

    /// Probability of each gate to be open at these statistics.
    pub fn probabilities(&self, statistics: &[f64]) -> Vec<f64> {
        let chance = |(s, t): (&f64, &f64)| 1.0 / (1.0 + (-(s - t) / self.temperature).exp());
        statistics.iter().zip(&self.thresholds).map(chance).collect()
    }

    /// One step of Adam down `∂L/∂p`.
    pub fn step(&mut self, by_probability: &[f64], probabilities: &[f64], rate: f64) {
        self.steps += 1;
        let correct = BETA.map(|b| 1.0 - b.powi(i32::try_from(self.steps).unwrap_or(i32::MAX)));
        for (i, (slope, p)) in by_probability.iter().zip(probabilities).enumerate() {
            // da/dθ = −1/τ. The factor 1/τ is left out: Adam would divide by it again.
            let gradient = -slope * p * (1.0 - p);
            self.first[i] = BETA[0] * self.first[i] + (1.0 - BETA[0]) * gradient;
            self.second[i] = BETA[1] * self.second[i] + (1.0 - BETA[1]) * gradient * gradient;
            let (m, v) = (self.first[i] / correct[0], self.second[i] / correct[1]);
            self.thresholds[i] -= rate * m / (v.sqrt() + 1e-8);
        }
    }
}

/// Mean binary entropy in nats: how undecided the gates are.
pub fn entropy(probabilities: &[f64]) -> f64 {
    let one = |p: &f64| {
        let term = |p: f64| if p > 0.0 { -p * p.ln() } else { 0.0 };
        term(*p) + term(1.0 - p)
    };
    probabilities.iter().map(one).sum::<f64>() / probabilities.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_gate_starts_at_the_same_probability() {
        let statistics = [-3.0, 0.0, 1.7];
        let gates = Gates::new(&statistics, 1.0);
        for p in gates.probabilities(&statistics) {
            assert!((p - START).abs() < 1e-12);
        }
    }

    #[test]
    fn a_gate_that_raises_the_loss_closes_and_one_that_lowers_it_opens() {
        let statistics = [0.0, 0.0];
        let mut gates = Gates::new(&statistics, 1.0);
        for _ in 0..100 {
            let p = gates.probabilities(&statistics);
            gates.step(&[0.3, -0.3], &p, 0.05);
        }
        let p = gates.probabilities(&statistics);
        assert!(p[0] < 0.3 && p[1] > 0.9, "{p:?}");
    }

    #[test]
    fn a_lower_temperature_decides() {
        let statistics = [0.4, -0.4];
        let mut gates = Gates::new(&[0.0, 0.0], 1.0);
        let before = entropy(&gates.probabilities(&statistics));
        gates.temperature = 0.1;
        assert!(entropy(&gates.probabilities(&statistics)) < before);
    }
}
