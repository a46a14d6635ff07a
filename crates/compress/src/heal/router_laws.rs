//! Laws of router recalibration on a layer small enough for finite differences.

use cotk_model::layers::Mlp;
use cotk_model::layers::linear::Linear;
use cotk_model::layers::router::softmax;
use cotk_model::layers::sigmoid;
use cotk_model::moe::{Alive, Routed, RouterScores, RoutingRule, Scoring, route};
use cotk_run::seeds::Seeds;
use rand::RngExt;

use super::router::samples;
use super::*;

const HIDDEN: usize = 8;
const EXPERTS: usize = 5;
const WINDOWS: usize = 25;

struct Case {
    experts: Vec<Option<Mlp>>,
    inputs: Vec<f32>,
    targets: Vec<f32>,
    weights: Vec<f64>,
    held_out: Vec<bool>,
    windows: Vec<usize>,
    rows: Vec<f32>,
    routed: Routed,
}

fn same(weight: f32) -> f32 {
    weight
}

fn mixed(case: &Case, rule: &RoutingRule, alive: Alive<'_>, rows: &[f32]) -> Vec<f32> {
    let mut scores = Linear::new(rows.to_vec(), EXPERTS, HIDDEN).apply(&case.inputs);
    match rule.scoring {
        Scoring::Softmax => softmax(&mut scores, EXPERTS),
        Scoring::Sigmoid => scores.iter_mut().for_each(|s| *s = sigmoid(*s)),
    }
    let routed = route(&RouterScores::new(&scores, rule).unwrap(), alive);
    let mut out = vec![0.0; case.inputs.len()];
    for (slot, (expert, gate)) in routed.experts.iter().zip(&routed.gates).enumerate() {
        let token = slot / routed.slots;
        let mlp = case.experts[expert.index()].as_ref().unwrap();
        let answer = mlp.apply(&case.inputs[token * HIDDEN..][..HIDDEN]);
        let out = &mut out[token * HIDDEN..][..HIDDEN];
        out.iter_mut().zip(answer).for_each(|(o, y)| *o += gate * y);
    }
    out
}

impl Case {
    fn new(seed: u64, tokens: usize) -> Self {
        let mut stream = Seeds::new(seed).stream("router");
        let mut numbers =
            |count: usize| -> Vec<f32> { (0..count).map(|_| stream.random::<f32>() * 2.0 - 1.0).collect() };
        let mut expert = || {
            let mut matrix = |outputs, inputs| Linear::new(numbers(outputs * inputs), outputs, inputs);
            Some(Mlp {
                gate: matrix(HIDDEN, HIDDEN),
                up: matrix(HIDDEN, HIDDEN),
                down: matrix(HIDDEN, HIDDEN),
            })
        };
        let experts = (0..EXPERTS).map(|_| expert()).collect();
        Self {
            experts,
            inputs: numbers(tokens * HIDDEN),
            targets: vec![0.0; tokens * HIDDEN],
            weights: (0..tokens).map(|t| 0.5 + (t % 3) as f64).collect(),
            held_out: (0..tokens).map(|t| t * WINDOWS / tokens % 5 == 2).collect(),
            windows: vec![tokens / WINDOWS; WINDOWS],
            rows: numbers(EXPERTS * HIDDEN),
            routed: Routed::default(),
        }
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
}

fn rules() -> Vec<RoutingRule> {
    let plain = RoutingRule::softmax(EXPERTS, 2);
    vec![
        plain,
        RoutingRule {
            norm_topk: true,
            ..plain
        },
        RoutingRule {
            scoring: Scoring::Sigmoid,
            scale: 1.7,
            ..plain
        },
        RoutingRule {
            scoring: Scoring::Sigmoid,
            norm_topk: true,
            ..plain
        },
    ]
}

/// Law: slopes are those of finite differences, under every rule and every meaning of absence.
#[test]
fn slopes_equal_finite_differences() {
    let living = [true, true, false, true, true];
    for rule in rules() {
        for alive in [Alive::All, Alive::Masked(&living), Alive::Removed(&living)] {
            let mut case = Case::new(3, 50);
            case.targets = mixed(&case, &rule, Alive::All, &case.rows);
            let mut rows = case.rows.clone();
            rows.iter_mut()
                .enumerate()
                .for_each(|(at, w)| *w += 0.1 * (at as f32).sin());
            let router = Router {
                rows: &rows,
                bias: &[],
                rule: &rule,
                alive,
                stored: &same,
            };
            let parts = Part::all(&case.experts, &[]);
            let [fitted, _] = samples(&case.tokens(), &parts);
            let slopes = fitted.gradient(&rows, &router).unwrap();
            let error = |rows: &[f32]| -> f64 { fitted.errors(rows, &router, WINDOWS).unwrap().iter().sum() };
            let largest = slopes.iter().fold(0.0f32, |most, s| most.max(s.abs()));
            let mut off = Vec::new();
            for at in 0..rows.len() {
                let moved = |by: f32| {
                    let mut rows = rows.clone();
                    rows[at] += by;
                    error(&rows)
                };
                let step = 1e-3;
                // Half the derivative is what descent follows.
                let found = (moved(step) - moved(-step)) / (4.0 * f64::from(step));
                off.push((found - f64::from(slopes[at])).abs() / f64::from(largest.max(1e-6)));
            }
            // A choice that flips between both sides makes a jump of its own: few may.
            off.sort_by(f64::total_cmp);
            assert!(off[off.len() * 3 / 4] < 0.02, "{rule:?} {alive:?}: {off:?}");
        }
    }
}

/// Law: a known shift of the router is found: the layer says what it said before.
#[test]
fn a_known_shift_is_found() {
    for (seed, rule) in rules().into_iter().enumerate() {
        let mut case = Case::new(20 + seed as u64, 1500);
        case.targets = mixed(&case, &rule, Alive::All, &case.rows);
        let mut rows = case.rows.clone();
        rows[HIDDEN..2 * HIDDEN].iter_mut().for_each(|w| *w *= 0.6);
        rows[3 * HIDDEN..4 * HIDDEN].iter_mut().for_each(|w| *w *= 1.3);
        let router = Router {
            rows: &rows,
            bias: &[],
            rule: &rule,
            alive: Alive::All,
            stored: &same,
        };
        let parts = Part::all(&case.experts, &[]);
        // Five windows judge: too few for standard errors to mean much.
        let options = HealOptions {
            standard_errors: 0.0,
            ..HealOptions::default()
        };
        let (found, step) = heal_router(&case.tokens(), &router, &parts, &options).unwrap();
        assert!(
            step.is_kept && step.held_out_after < 0.5 * step.held_out_before,
            "{rule:?}: {step:?}"
        );
        let square = |a: &[f32]| -> f64 { a.iter().map(|x| f64::from(*x).powi(2)).sum() };
        let off = |rows: &[f32]| {
            let said = mixed(&case, &rule, Alive::All, rows);
            square(&said.iter().zip(&case.targets).map(|(a, b)| a - b).collect::<Vec<_>>())
        };
        assert!(off(&found) < 0.5 * off(&rows), "{} {}", off(&found), off(&rows));
    }
}

/// Law: where nothing was changed, and where there is only noise, the router stays bit for bit.
#[test]
fn what_is_right_stays_as_it_is() {
    let rule = RoutingRule::softmax(EXPERTS, 2);
    let mut case = Case::new(9, 400);
    let parts = Part::all(&case.experts, &[]);
    let truth = mixed(&case, &rule, Alive::All, &case.rows);
    let mut stream = Seeds::new(2).stream("noise");
    let noise: Vec<f32> = truth.iter().map(|_| stream.random::<f32>() - 0.5).collect();
    for size in [0.0, 2.0] {
        case.targets = truth.iter().zip(&noise).map(|(y, n)| y + size * n).collect();
        let router = Router {
            rows: &case.rows,
            bias: &[],
            rule: &rule,
            alive: Alive::All,
            stored: &same,
        };
        let (rows, step) = heal_router(&case.tokens(), &router, &parts, &HealOptions::default()).unwrap();
        assert!(!step.is_kept, "{step:?}");
        assert_eq!(rows, case.rows);
    }
}
