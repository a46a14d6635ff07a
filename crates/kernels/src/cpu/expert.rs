//! A whole expert: `down(silu(gate · x) · (up · x))` for some tokens, the middle never leaving the cache.
//!
//! Gate and up go block by block together (their tiles alternate in a record), 32 inner channels at a time: one quantized
//! step of the hidden activations. Choosing experts and weighing their outputs is the runtime's.

use cotk_quant::QuantError;
use cotk_quant::coded::Prefix;
use cotk_quant::layout::{BLOCK_ROWS, STEP};

use super::activations::{Activations, StepCodes};
use super::dispatch::{Isa, TOKENS};
use super::gemm::{Disjoint, Threads, for_tokens, gemm, in_chunks};

/// Three matrices that fit together: gate and up `[inner, hidden]`, down `[hidden, inner]`.
#[derive(Debug, Clone, Copy)]
pub struct Expert<'a> {
    gate: Prefix<'a>,
    up: Prefix<'a>,
    down: Prefix<'a>,
}

impl<'a> Expert<'a> {
    /// Their widths, codes and groups may differ.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn try_new(gate: Prefix<'a>, up: Prefix<'a>, down: Prefix<'a>) -> Result<Self, QuantError> {
        let (g, u, d) = (gate.format(), up.format(), down.format());
        for (what, found, expected) in [
            ("rows of up (of gate: expected)", u.rows(), g.rows()),
            ("columns of up (of gate: expected)", u.cols(), g.cols()),
            ("columns of down (rows of gate: expected)", d.cols(), g.rows()),
            ("rows of down (columns of gate: expected)", d.rows(), g.cols()),
        ] {
            if found != expected {
                return Err(QuantError::Length { what, found, expected });
            }
        }
        Ok(Self { gate, up, down })
    }

    /// Width of input and output.
    pub fn hidden(&self) -> usize {
        self.gate.format().cols()
    }

    /// Width of the middle.
    pub fn inner(&self) -> usize {
        self.gate.format().rows()
    }
}

/// What [`forward`] needs beside its arguments; grows when asked for more than it was made for.
#[derive(Debug, Default)]
pub struct ExpertScratch {
    middle: Activations,
}

impl ExpertScratch {
    /// Room for `tokens` × `inner`.
    pub fn new(tokens: usize, inner: usize) -> Self {
        Self {
            middle: Activations::with_capacity(tokens, inner),
        }
    }
}

/// Bytes that [`ExpertScratch::new`] allocates.
pub fn expert_scratch_bytes(tokens: usize, inner: usize) -> usize {
    Activations::capacity_bytes(tokens, inner)
}

/// Inner steps of one chunk: 128 rows each of gate and up.
const CHUNK_STEPS: usize = 4;

/// Fills `out` `[tokens, hidden]`. With [`Threads::One`] and a scratch of sufficient size nothing is allocated.
///
/// Equals [`super::reference::expert`] bit for bit.
///
/// # Panics
/// `acts` or `out` do not have the expert's width.
pub fn forward(
    isa: Isa,
    expert: &Expert<'_>,
    acts: &Activations,
    out: &mut [f32],
    scratch: &mut ExpertScratch,
    threads: Threads,
) {
    let middle = &mut scratch.middle;
    middle.reset(acts.tokens(), expert.inner());
    let steps = middle.steps_per_token();
    let blocks = expert.gate.format().row_blocks();
    let shared = Disjoint::new(middle.steps_mut());
    in_chunks(steps, CHUNK_STEPS, threads, |range| {
        for step in range {
            let (mut gate, mut up) = ([[0.0; STEP]; TOKENS], [[0.0; STEP]; TOKENS]);
            for_tokens(acts.tokens(), |first, buffer| {
                for half in 0..STEP / BLOCK_ROWS {
                    let (block, at) = (step * STEP / BLOCK_ROWS + half, half * BLOCK_ROWS);
                    for (matrix, side) in [(&expert.gate, &mut gate), (&expert.up, &mut up)] {
                        if block < blocks {
                            isa.block(matrix, block, acts, first, buffer);
                        } else {
                            buffer.fill([0.0; BLOCK_ROWS]);
                        }
                        for (side, values) in side.iter_mut().zip(buffer.iter()) {
                            side[at..at + BLOCK_ROWS].copy_from_slice(values);
                        }
                    }
                }
                for t in 0..buffer.len() {
                    let codes: StepCodes = isa.swiglu(&gate[t], &up[t]);
                    // SAFETY: this step of this token is written here alone: steps belong to one chunk.
                    unsafe { shared.write((first + t) * steps + step, &[codes]) };
                }
            });
        }
    });
    gemm(isa, &expert.down, middle, out, threads);
}
