//! The plain reference of every matrix kernel: the formula as loops, safe, weight by weight.

use cotk_quant::coded::Prefix;
use cotk_quant::layout::STEP;

use super::activations::{Activations, StepCodes, quantize_step};
use super::half_matrix::HalfMatrix;
use super::swiglu::swiglu_step;
use super::weights::{Matrix, Weights};

/// `out[t, r] = Σ_c w[r, c] · x[t, c]` with `x` quantized. `out` is `[tokens, rows]`.
pub fn gemm<'a>(weights: impl Into<Weights<'a>>, acts: &Activations, out: &mut [f32]) {
    let weights = weights.into();
    let rows = weights.rows();
    assert_eq!(weights.cols(), acts.cols());
    assert_eq!(out.len(), acts.tokens() * rows);
    for token in 0..acts.tokens() {
        for row in 0..rows {
            out[token * rows + row] = match &weights {
                Weights::Coded(coded) => dot(coded.prefix(), row, acts.token(token)),
                Weights::Half(half) => half_dot(half, row, acts.token(token)),
            };
        }
    }
}

fn half_dot(half: &HalfMatrix<'_>, row: usize, steps: &[StepCodes]) -> f32 {
    let mut y = 0.0f32;
    for (s, step) in steps.iter().enumerate() {
        let mut chains = [0.0f32; 4];
        for col in s * STEP..((s + 1) * STEP).min(half.cols()) {
            let chain = &mut chains[col % 4];
            *chain = half.at(row, col).mul_add(f32::from(step.codes[col % STEP]), *chain);
        }
        y = ((chains[0] + chains[1]) + (chains[2] + chains[3])).mul_add(step.scale, y);
    }
    y
}

/// `out[t] = matrix · x[t]`: of two factors the right one first, what it gives quantized anew; a correction is added
/// to what the whole gives.
pub fn map(matrix: &Matrix<'_>, acts: &Activations, out: &mut [f32]) {
    match matrix {
        Matrix::Whole(weights) => gemm(*weights, acts, out),
        Matrix::Corrected { whole, left, right } => {
            let mut correction = vec![0.0; out.len()];
            map(
                &Matrix::Product {
                    left: *left,
                    right: *right,
                },
                acts,
                &mut correction,
            );
            gemm(*whole, acts, out);
            out.iter_mut().zip(correction).for_each(|(y, more)| *y += more);
        }
        Matrix::Product { left, right } => {
            let mut between = vec![0.0; acts.tokens() * right.rows()];
            gemm(*right, acts, &mut between);
            let mut quantized = Activations::default();
            quantized.reset(acts.tokens(), right.rows());
            let per_token = quantized.steps_per_token();
            for (i, step) in quantized.steps_mut().iter_mut().enumerate() {
                let (token, from) = (i / per_token, i % per_token * STEP);
                let range = from..(from + STEP).min(right.rows());
                let mut padded = [0.0; STEP];
                padded[..range.len()].copy_from_slice(&between[token * right.rows()..][range]);
                *step = quantize_step(&padded);
            }
            gemm(*left, &quantized, out);
        }
    }
}

fn dot(prefix: &Prefix<'_>, row: usize, steps: &[StepCodes]) -> f32 {
    let format = prefix.format();
    let mut y = 0.0f32;
    // A step has one group or a part of one, or two groups of 16.
    let part = format.group().min(STEP);
    for (s, step) in steps.iter().enumerate() {
        for (p, acts) in step.codes.chunks(part).enumerate() {
            let first = s * STEP + p * part;
            if first >= format.cols() {
                continue;
            }
            let cols = first..(first + part).min(format.cols());
            let d: i32 = cols
                .zip(acts)
                .map(|(col, a)| i32::from(prefix.code_at(row, col)) * i32::from(*a))
                .sum();
            let sum: i32 = acts.iter().map(|a| i32::from(*a)).sum();
            let scale = prefix.scale_at(row, first / format.group()) * prefix.cell() * step.scale;
            // |d| ≤ 32 · 255 · 127 < 2^24: exact.
            #[expect(clippy::cast_precision_loss, reason = "below 2^24")]
            let centred = prefix.zero_point().mul_add(-(sum as f32), d as f32);
            y = centred.mul_add(scale, y);
        }
    }
    y
}

/// An expert for `x` `[tokens, hidden]`: `down(silu(gate x) · up x)`. `out` is `[tokens, hidden]`.
pub fn expert(gate: &Matrix<'_>, up: &Matrix<'_>, down: &Matrix<'_>, acts: &Activations, out: &mut [f32]) {
    let inner = gate.rows();
    let mut g = vec![0.0; acts.tokens() * inner];
    let mut u = g.clone();
    map(gate, acts, &mut g);
    map(up, acts, &mut u);
    let mut hidden = Activations::default();
    hidden.reset(acts.tokens(), inner);
    let per_token = hidden.steps_per_token();
    for (i, step) in hidden.steps_mut().iter_mut().enumerate() {
        let (token, from) = (i / per_token, i % per_token * STEP);
        let range = token * inner + from..token * inner + (from + STEP).min(inner);
        let (mut g32, mut u32) = ([0.0; STEP], [0.0; STEP]);
        g32[..range.len()].copy_from_slice(&g[range.clone()]);
        u32[..range.len()].copy_from_slice(&u[range]);
        *step = swiglu_step(&g32, &u32);
    }
    map(down, &hidden, out);
}
