//! One factor per expert, in closed form: what compression made too small or too loud (reference: moe-compression 7).
//! Law: at the answer the gradient of the fitted error plus its pull towards 1 is zero.

use ndarray::{Array1, Array2};
use rayon::prelude::*;

use super::pairs::{ROWS, gather};
use super::{HealOptions, HealTokens, Part, Step};
use crate::Result;

/// Σ over tokens of w·g_i·g_j·⟨y_i, y_j⟩, of w·g_i·⟨y_i, o⟩ and of w·‖o‖².
#[derive(Clone)]
struct Normal {
    square: Array2<f64>,
    cross: Array1<f64>,
    size: f64,
}

impl Normal {
    fn new(experts: usize) -> Self {
        Self {
            square: Array2::zeros((experts, experts)),
            cross: Array1::zeros(experts),
            size: 0.0,
        }
    }

    fn add(&mut self, other: &Self) {
        self.square += &other.square;
        self.cross += &other.cross;
        self.size += other.size;
    }

    fn error(&self, scales: &Array1<f64>) -> f64 {
        scales.dot(&self.square.dot(scales)) - 2.0 * scales.dot(&self.cross) + self.size
    }
}

/// Factors of the experts' outputs that bring the layer nearest to its targets; 1 where the step is not kept or nothing
/// came. To be folded into down projections or their scales.
///
/// # Errors
/// [`crate::CompressError::Algebra`]: weights or states that are not finite.
pub fn heal_scales(tokens: &HealTokens<'_>, parts: &[Part<'_>], options: &HealOptions) -> Result<(Vec<f32>, Step)> {
    tokens.check();
    let window_of = tokens.window_of();
    let experts = parts.len();
    let mut fitted = Normal::new(experts);
    let mut held_out = vec![None; tokens.windows.len()];
    // Runs of one window's tokens, ascending.
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for token in 0..window_of.len() {
        let is_alike =
            |from: usize| window_of[from] == window_of[token] && tokens.held_out[from] == tokens.held_out[token];
        match runs.last_mut() {
            Some((from, to)) if is_alike(*from) && *to - *from < ROWS => *to = token + 1,
            _ => runs.push((token, token + 1)),
        }
    }
    // A few at a time: their sums are not all in memory.
    for runs in runs.chunks(32) {
        let found: Vec<Normal> = runs
            .par_iter()
            .map(|&(from, to)| normal(tokens, parts, from, to))
            .collect();
        for (&(from, _), found) in runs.iter().zip(&found) {
            if tokens.held_out[from] {
                held_out[window_of[from]]
                    .get_or_insert_with(|| Normal::new(experts))
                    .add(found);
            } else {
                fitted.add(found);
            }
        }
    }
    let held_out: Vec<Normal> = held_out.into_iter().flatten().collect();
    let errors = |scales: &Array1<f64>| -> Vec<f64> { held_out.iter().map(|window| window.error(scales)).collect() };
    let ones = Array1::ones(experts);
    let mut best: Option<(f64, f64, Array1<f64>)> = None;
    for &lambda in &options.lambdas {
        let found = solve(&fitted, lambda)?;
        let error: f64 = errors(&found).iter().sum();
        if best.as_ref().is_none_or(|(least, ..)| error < *least) {
            best = Some((error, lambda, found));
        }
    }
    let (lambda, found) = best.map_or((None, ones.clone()), |(_, lambda, found)| (Some(lambda), found));
    let size = held_out.iter().map(|window| window.size).sum();
    let step = Step::judged("scales", &errors(&ones), &errors(&found), size, options, lambda);
    let chosen = if step.is_kept { found } else { ones };
    #[expect(clippy::cast_possible_truncation, reason = "factors near 1")]
    let scales = chosen.iter().map(|&scale| scale as f32).collect();
    Ok((scales, step))
}

/// `(A + λ·diag A)·α = b + λ·diag A·1`; 1 where the diagonal is 0.
fn solve(normal: &Normal, lambda: f64) -> Result<Array1<f64>> {
    let experts = normal.cross.len();
    let alive: Vec<usize> = (0..experts).filter(|&e| normal.square[[e, e]] > 0.0).collect();
    let mut found = Array1::ones(experts);
    if alive.is_empty() {
        return Ok(found);
    }
    let entry = |i: usize, j: usize| normal.square[[alive[i], alive[j]]];
    let square = Array2::from_shape_fn((alive.len(), alive.len()), |(i, j)| {
        entry(i, j) + if i == j { lambda * entry(i, i) } else { 0.0 }
    });
    let wanted = Array1::from_shape_fn(alive.len(), |i| normal.cross[alive[i]] + lambda * entry(i, i));
    let solved = cotk_linalg::invert_symmetric(square.view())?.dot(&wanted);
    alive
        .iter()
        .zip(&solved)
        .for_each(|(&expert, &scale)| found[expert] = scale);
    Ok(found)
}

/// Of tokens `from..to`.
fn normal(tokens: &HealTokens<'_>, parts: &[Part<'_>], from: usize, to: usize) -> Normal {
    let (hidden, slots) = (tokens.hidden, tokens.routed.slots);
    let mut normal = Normal::new(parts.len());
    let mut slots_of: Vec<Vec<usize>> = vec![Vec::new(); parts.len()];
    for slot in from * slots..to * slots {
        if tokens.weights[slot / slots] > 0.0 {
            slots_of[tokens.routed.experts[slot].index()].push(slot);
        }
    }
    // Answers times gates, by slot.
    let mut said: Vec<Vec<f32>> = vec![Vec::new(); (to - from) * slots];
    for (part, slots_of) in parts.iter().zip(&slots_of).filter(|(_, slots)| !slots.is_empty()) {
        let rows: Vec<usize> = slots_of.iter().map(|slot| slot / slots).collect();
        let x = || gather(tokens.inputs, hidden, &rows);
        let answers = match part {
            Part::Mlp(mlp) => mlp.apply(&x()),
            Part::LowRank { gate, up, right, left } => {
                let x = x();
                let mut middle = gate.apply(&x);
                let up = up.apply(&x);
                (middle.iter_mut().zip(up)).for_each(|(g, u)| *g = cotk_model::layers::silu(*g) * u);
                left.apply(&right.apply(&middle))
            }
            Part::Constant(constant) => constant.repeat(rows.len()),
            Part::Absent => continue,
        };
        for (&slot, answer) in slots_of.iter().zip(answers.chunks_exact(hidden)) {
            let gate = tokens.routed.gates[slot];
            said[slot - from * slots] = answer.iter().map(|y| y * gate).collect();
        }
    }
    for token in from..to {
        let weight = tokens.weights[token];
        if weight <= 0.0 {
            continue;
        }
        let target = &tokens.targets[token * hidden..][..hidden];
        normal.size += weight * dot(target, target);
        let own = &said[(token - from) * slots..][..slots];
        let experts = &tokens.routed.experts[token * slots..][..slots];
        for (i, (a, expert)) in own.iter().zip(experts).enumerate().filter(|(_, (a, _))| !a.is_empty()) {
            let expert = expert.index();
            normal.cross[expert] += weight * dot(a, target);
            normal.square[[expert, expert]] += weight * dot(a, a);
            for (b, other) in own[..i].iter().zip(experts).filter(|(b, _)| !b.is_empty()) {
                let product = weight * dot(a, b);
                normal.square[[expert, other.index()]] += product;
                normal.square[[other.index(), expert]] += product;
            }
        }
    }
    normal
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
