//! The plain reference of every matrix kernel: the formula as loops, safe, through `code_at` and `scale_at`.

use cotk_quant::coded::Prefix;
use cotk_quant::layout::STEP;

use super::activations::{Activations, StepCodes};
use super::swiglu::swiglu_step;

/// `out[t, r] = Σ_c w[r, c] · x[t, c]` with `w` at the prefix's width and `x` quantized. `out` is `[tokens, rows]`.
pub fn gemm(prefix: &Prefix<'_>, acts: &Activations, out: &mut [f32]) {
    let format = prefix.format();
    assert_eq!(format.cols(), acts.cols());
    assert_eq!(out.len(), acts.tokens() * format.rows());
    for token in 0..acts.tokens() {
        for row in 0..format.rows() {
            out[token * format.rows() + row] = dot(prefix, row, acts.token(token));
        }
    }
}

fn dot(prefix: &Prefix<'_>, row: usize, steps: &[StepCodes]) -> f32 {
    let format = prefix.format();
    let mut y = 0.0f32;
    for (s, step) in steps.iter().enumerate() {
        let cols = s * STEP..((s + 1) * STEP).min(format.cols());
        let d: i32 = cols
            .zip(&step.codes)
            .map(|(col, a)| i32::from(prefix.code_at(row, col)) * i32::from(*a))
            .sum();
        let scale = prefix.scale_at(row, s / format.group_steps()) * prefix.cell() * step.scale;
        // |d| ≤ 32 · 255 · 127 < 2^24: exact.
        #[expect(clippy::cast_precision_loss, reason = "below 2^24")]
        let centred = prefix.zero_point().mul_add(-step.sum, d as f32);
        y = centred.mul_add(scale, y);
    }
    y
}

/// An expert for `x` `[tokens, hidden]`: `down(silu(gate x) · up x)`. `out` is `[tokens, hidden]`.
pub fn expert(gate: &Prefix<'_>, up: &Prefix<'_>, down: &Prefix<'_>, acts: &Activations, out: &mut [f32]) {
    let inner = gate.format().rows();
    let mut g = vec![0.0; acts.tokens() * inner];
    let mut u = g.clone();
    gemm(gate, acts, &mut g);
    gemm(up, acts, &mut u);
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
    gemm(down, &hidden, out);
}
