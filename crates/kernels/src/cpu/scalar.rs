//! The path of every CPU: plain Rust over the layout's lines.

use half::f16;

use super::activations::{StepCodes, quantize_step};
use super::dispatch::BlockOut;
use super::half_matrix::HalfMatrix;
use super::panels::Panel;
use super::swiglu::swiglu_step;
use super::tiles::{Coded, Tiles, by_fields};
use super::two_level;

pub(super) fn block(coded: &Coded<'_>, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
    if coded.is_two_level {
        return two_level::block(coded, block, panel, out);
    }
    for (t, out) in out.iter_mut().enumerate() {
        by_fields!(coded, one_token::<1>(coded, block, panel, t, out));
    }
}

fn one_token<const T: usize, const A: usize, const B: usize, const C: usize>(
    coded: &Coded<'_>,
    block: usize,
    panel: &Panel<'_>,
    token: usize,
    sums: &mut BlockOut,
) {
    let (cell, zero_point) = (coded.cell, coded.zero_point);
    let tiles = Tiles::<A, B, C>::new(coded.prefix(), block);
    let mut scales = [0.0f32; 16];
    *sums = [0.0; 16];
    for tile in tiles {
        for s in 0..tile.steps {
            let step = &panel.codes(tile.first_step + s, token);
            if let Some(bytes) = tile.scales(s) {
                for (scale, b) in scales.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *scale = f16::from_le_bytes(*b).to_f32() * cell;
                }
            }
            let mut dots = [0i32; 16];
            add_lines::<A>(tile.lines(0, s), step, &mut dots);
            add_lines::<B>(tile.lines(1, s), step, &mut dots);
            add_lines::<C>(tile.lines(2, s), step, &mut dots);
            for ((sum, dot), scale) in sums.iter_mut().zip(&dots).zip(&scales) {
                #[expect(clippy::cast_precision_loss, reason = "below 2^24")]
                let centred = zero_point.mul_add(-step.sum, *dot as f32);
                *sum = centred.mul_add(scale * step.scale, *sum);
            }
        }
    }
}

/// `dots << BITS` plus the products of one field.
#[inline(always)]
fn add_lines<const BITS: usize>(lines: &[[u8; 64]; BITS], step: &StepCodes, dots: &mut [i32; 16]) {
    if BITS == 0 {
        return;
    }
    let (per_line, depths) = (8 / BITS.max(1), step.codes.as_chunks::<4>().0);
    for dot in dots.iter_mut() {
        *dot <<= BITS;
    }
    for (l, line) in lines.iter().enumerate() {
        for i in 0..per_line {
            let a = depths[l * per_line + i].map(i32::from);
            let codes = line.map(|code| (code >> (BITS * i)) & (255u8 >> (8 - BITS)));
            for (dot, c) in dots.iter_mut().zip(codes.as_chunks::<4>().0) {
                let c = c.map(i32::from);
                *dot += c[0] * a[0] + c[1] * a[1] + c[2] * a[2] + c[3] * a[3];
            }
        }
    }
}

pub(super) fn half_block(half: &HalfMatrix<'_>, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
    let columns = half.block(block);
    for (t, sums) in out.iter_mut().enumerate() {
        *sums = [0.0; 16];
        for (s, columns) in columns.as_chunks::<32>().0.iter().enumerate() {
            let step = panel.codes(s, t);
            let mut chains = [[0.0f32; 16]; 4];
            for (c, (column, code)) in columns.iter().zip(step.codes).enumerate() {
                for (chain, bytes) in chains[c % 4].iter_mut().zip(column.as_chunks::<2>().0) {
                    *chain = half.kind().widen(*bytes).mul_add(f32::from(code), *chain);
                }
            }
            for (row, sum) in sums.iter_mut().enumerate() {
                let dot = (chains[0][row] + chains[1][row]) + (chains[2][row] + chains[3][row]);
                *sum = dot.mul_add(step.scale, *sum);
            }
        }
    }
}

pub(super) fn quantize(x: &[f32; 32]) -> StepCodes {
    quantize_step(x)
}

pub(super) fn swiglu(gate: &[f32; 32], up: &[f32; 32]) -> StepCodes {
    swiglu_step(gate, up)
}

pub(super) fn read(bytes: &[u8]) -> u64 {
    sum_lanes(bytes)
}

/// Eight independent sums of u64 lanes: what a compiler makes of it is the path's widest load.
#[inline(always)]
pub(super) fn sum_lanes(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 32];
    for chunk in bytes.as_chunks::<256>().0 {
        for (sum, lane) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*lane));
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}
