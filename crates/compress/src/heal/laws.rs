//! Laws of healing on layers small enough for whole normal equations.

use cotk_model::layers::Mlp;
use cotk_model::layers::linear::Linear;
use cotk_model::layers::silu;
use cotk_model::moe::Routed;
use cotk_run::seeds::Seeds;
use cotk_run::units::ExpertId;
use ndarray::Array2;
use rand::RngExt;

use super::*;

const HIDDEN: usize = 6;
const INNER: usize = 4;
const EXPERTS: usize = 3;
const SLOTS: usize = 2;

struct Case {
    experts: Vec<Option<Mlp>>,
    inputs: Vec<f32>,
    targets: Vec<f32>,
    routed: Routed,
    weights: Vec<f64>,
    held_out: Vec<bool>,
    windows: Vec<usize>,
}

impl Case {
    /// Targets are what experts with other down projections say, plus `noise`.
    fn new(seed: u64, tokens: usize, noise: f32) -> Self {
        let mut stream = Seeds::new(seed).stream("heal");
        let mut numbers =
            |count: usize| -> Vec<f32> { (0..count).map(|_| stream.random::<f32>() * 2.0 - 1.0).collect() };
        let mut matrix = |outputs, inputs| Linear::new(numbers(outputs * inputs), outputs, inputs);
        let truth: Vec<Option<Mlp>> = (0..EXPERTS)
            .map(|_| {
                Some(Mlp {
                    gate: matrix(INNER, HIDDEN),
                    up: matrix(INNER, HIDDEN),
                    down: matrix(HIDDEN, INNER),
                })
            })
            .collect();
        let experts = truth
            .iter()
            .map(|mlp| {
                let mlp = mlp.as_ref().unwrap();
                let other = matrix(HIDDEN, INNER);
                let down = mlp
                    .down
                    .weights()
                    .iter()
                    .zip(other.weights().iter())
                    .map(|(w, o)| w + 0.3 * o)
                    .collect();
                Some(Mlp {
                    down: Linear::new(down, HIDDEN, INNER),
                    ..mlp.clone()
                })
            })
            .collect();
        let inputs = numbers(tokens * HIDDEN);
        let gates = numbers(tokens * SLOTS).iter().map(|g| 0.6 + 0.3 * g).collect();
        let routed = Routed {
            slots: SLOTS,
            experts: (0..tokens)
                .flat_map(|t| [ExpertId((t % 3) as u32), ExpertId(((t + 1 + t / 3 % 2) % 3) as u32)])
                .collect(),
            gates,
        };
        let weights = (0..tokens)
            .map(|t| if t % 7 == 3 { 0.0 } else { 0.5 + (t % 5) as f64 })
            .collect();
        let mut case = Self {
            experts,
            targets: Vec::new(),
            inputs,
            routed,
            weights,
            held_out: (0..tokens).map(|t| t * 20 / tokens % 5 == 2).collect(),
            windows: vec![tokens / 20; 20],
        };
        let noises = numbers(tokens * HIDDEN);
        case.targets = case
            .mixed(&truth)
            .iter()
            .zip(noises)
            .map(|(y, n)| y + noise * n)
            .collect();
        case
    }

    fn mixed(&self, experts: &[Option<Mlp>]) -> Vec<f32> {
        let mut out = vec![0.0; self.inputs.len()];
        for (slot, (expert, gate)) in self.routed.experts.iter().zip(&self.routed.gates).enumerate() {
            let token = slot / SLOTS;
            if let Some(mlp) = &experts[expert.index()] {
                let answer = mlp.apply(&self.inputs[token * HIDDEN..][..HIDDEN]);
                let out = &mut out[token * HIDDEN..][..HIDDEN];
                out.iter_mut().zip(answer).for_each(|(o, y)| *o += gate * y);
            }
        }
        out
    }

    fn tokens(&self) -> HealTokens<'_> {
        HealTokens {
            hidden: HIDDEN,
            inputs: &self.inputs,
            targets: &self.targets,
            routed: &self.routed,
            weights: &self.weights,
            held_out: &self.held_out,
            windows: &self.windows,
        }
    }

    /// Features of all experts side by side and targets, of fitted tokens, as one least squares problem.
    fn whole(&self) -> (Array2<f64>, Array2<f64>) {
        let fitted: Vec<usize> = (0..self.weights.len()).filter(|&t| !self.held_out[t]).collect();
        let mut rows = Array2::zeros((fitted.len(), EXPERTS * INNER));
        let mut targets = Array2::zeros((fitted.len(), HIDDEN));
        for (at, &token) in fitted.iter().enumerate() {
            let root = self.weights[token].sqrt();
            for slot in token * SLOTS..(token + 1) * SLOTS {
                let expert = self.routed.experts[slot].index();
                let mlp = self.experts[expert].as_ref().unwrap();
                let x = &self.inputs[token * HIDDEN..][..HIDDEN];
                let (g, u) = (mlp.gate.apply(x), mlp.up.apply(x));
                for c in 0..INNER {
                    rows[[at, expert * INNER + c]] = f64::from(self.routed.gates[slot] * silu(g[c]) * u[c]) * root;
                }
            }
            for h in 0..HIDDEN {
                targets[[at, h]] = f64::from(self.targets[token * HIDDEN + h]) * root;
            }
        }
        (rows, targets)
    }
}

/// Law: many sweeps come to rest where the joint normal equations do.
#[test]
fn sweeps_end_in_the_joint_normal_equations() {
    let case = Case::new(1, 400, 0.1);
    let options = HealOptions {
        lambdas: vec![0.05; 60],
        sweeps: 0,
        standard_errors: 0.0,
        router: false,
    };
    let mut fit_only = options.clone();
    fit_only.lambdas.truncate(60);
    let (rows, targets) = case.whole();
    let mut hessian = rows.t().dot(&rows);
    let mut cross = targets.t().dot(&rows);
    for expert in 0..EXPERTS {
        let down = case.experts[expert].as_ref().unwrap().down.weights().into_owned();
        let own = expert * INNER..(expert + 1) * INNER;
        let pull = 0.05 * own.clone().map(|c| hessian[[c, c]]).sum::<f64>() / INNER as f64;
        for c in own.clone() {
            hessian[[c, c]] += pull;
            for h in 0..HIDDEN {
                cross[[h, c]] += pull * f64::from(down[h * INNER + c - own.start]);
            }
        }
    }
    let exact = cross.dot(&cotk_linalg::invert_symmetric(hessian.view()).unwrap());
    let healed = heal_down(&case.tokens(), &Part::all(&case.experts, &[]), &fit_only).unwrap();
    assert!(healed.step.is_kept && healed.step.held_out_after < 0.5 * healed.step.held_out_before);
    // The best of many sweeps on held-out tokens need not be the last one: near the fixed point all are alike.
    for (expert, down) in healed.downs.iter().enumerate() {
        for (at, w) in down.as_ref().unwrap().iter().enumerate() {
            let wanted = exact[[at / INNER, expert * INNER + at % INNER]];
            assert!(
                (f64::from(*w) - wanted).abs() < 0.02 * (1.0 + wanted.abs()),
                "{expert} {at}: {w} {wanted}"
            );
        }
    }
}

/// Law: what does not help on held-out tokens is not kept, and the weights stay as they were.
#[test]
fn noise_is_not_learnt() {
    let mut case = Case::new(2, 60, 0.0);
    case.targets = case.mixed(&case.experts);
    let mut stream = Seeds::new(9).stream("noise");
    case.targets
        .iter_mut()
        .for_each(|t| *t += 2.0 * (stream.random::<f32>() - 0.5));
    let parts = Part::all(&case.experts, &[]);
    let healed = heal_down(&case.tokens(), &parts, &HealOptions::default()).unwrap();
    assert!(!healed.step.is_kept, "{:?}", healed.step);
    for (down, expert) in healed.downs.iter().zip(&case.experts) {
        assert_eq!(down.as_deref().unwrap(), &*expert.as_ref().unwrap().down.weights());
    }
    let (scales, step) = heal_scales(&case.tokens(), &parts, &HealOptions::default()).unwrap();
    assert!(!step.is_kept && scales == [1.0; EXPERTS], "{step:?}");
}

/// Law: factors undo factors.
#[test]
fn scales_come_back() {
    let mut case = Case::new(3, 600, 0.0);
    let factors = [0.5f32, 1.25, 0.9];
    case.targets = case.mixed(&case.experts);
    for (expert, factor) in case.experts.iter_mut().zip(factors) {
        let mlp = expert.as_mut().unwrap();
        let down = mlp.down.weights().iter().map(|w| w / factor).collect();
        mlp.down = Linear::new(down, HIDDEN, INNER);
    }
    let options = HealOptions {
        lambdas: vec![1e-6],
        ..HealOptions::default()
    };
    let (scales, step) = heal_scales(&case.tokens(), &Part::all(&case.experts, &[]), &options).unwrap();
    assert!(step.is_kept && step.held_out_after < 1e-6, "{step:?}");
    for (scale, factor) in scales.iter().zip(factors) {
        assert!((scale - factor).abs() < 1e-3, "{scales:?}");
    }
}

/// Law: a constant that stands for a dropped expert ends at its mean answer where nothing else can change.
#[test]
fn a_constant_becomes_the_mean_of_what_was_dropped() {
    let mut case = Case::new(4, 600, 0.0);
    case.targets = case.mixed(&case.experts);
    case.weights.fill(1.0);
    let truth = case.experts[1].take().unwrap();
    let zeros = vec![0.0; HIDDEN];
    // The others stand as they are: only the constant is refitted.
    let kept = case.mixed(&case.experts);
    let targets: Vec<f32> = case.targets.iter().zip(&kept).map(|(t, k)| t - k).collect();
    let parts = [Part::Absent, Part::Constant(&zeros), Part::Absent];
    let tokens = HealTokens {
        targets: &targets,
        ..case.tokens()
    };
    let options = HealOptions {
        lambdas: vec![0.0],
        sweeps: 0,
        standard_errors: -1e9,
        router: false,
    };
    let healed = heal_down(&tokens, &parts, &options).unwrap();
    let (mut sum, mut squares) = (vec![0.0; HIDDEN], 0.0);
    for (slot, expert) in case.routed.experts.iter().enumerate() {
        let token = slot / SLOTS;
        if expert.index() == 1 && !case.held_out[token] {
            let gate = f64::from(case.routed.gates[slot]).powi(2);
            let answer = truth.apply(&case.inputs[token * HIDDEN..][..HIDDEN]);
            sum.iter_mut().zip(answer).for_each(|(s, y)| *s += gate * f64::from(y));
            squares += gate;
        }
    }
    if healed.step.is_kept {
        for (c, s) in healed.downs[1].as_ref().unwrap().iter().zip(sum) {
            assert!((f64::from(*c) - s / squares).abs() < 1e-4);
        }
    }
    assert!(healed.downs[0].is_none());
}
