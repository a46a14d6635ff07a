//! A whole expert: `down(silu(gate · x) · (up · x))` for some tokens, the middle never leaving the cache.
//!
//! Gate and up go block by block together (their tiles alternate in a record), 32 inner channels at a time: one quantized
//! step of the hidden activations. Choosing experts and weighing their outputs is the runtime's.

use cotk_quant::QuantError;
use cotk_quant::layout::{BLOCK_ROWS, STEP};

use super::activations::{Activations, StepCodes};
use super::dispatch::{Isa, TOKENS};
use super::gemm::{Disjoint, Threads, for_tokens, gemm, in_chunks};
use super::weights::{Matrix, Weights};

/// Three matrices that fit together: gate and up `[inner, hidden]`, down `[hidden, inner]`.
#[derive(Debug, Clone, Copy)]
pub struct Expert<'a> {
    gate: Matrix<'a>,
    up: Matrix<'a>,
    down: Matrix<'a>,
}

impl<'a> Expert<'a> {
    /// Their forms, widths, codes, groups and ranks may differ.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn try_new(
        gate: impl Into<Matrix<'a>>,
        up: impl Into<Matrix<'a>>,
        down: impl Into<Matrix<'a>>,
    ) -> Result<Self, QuantError> {
        let (gate, up, down) = (gate.into(), up.into(), down.into());
        for (what, found, expected) in [
            ("rows of up (of gate: expected)", up.rows(), gate.rows()),
            ("columns of up (of gate: expected)", up.cols(), gate.cols()),
            ("columns of down (rows of gate: expected)", down.cols(), gate.rows()),
            ("rows of down (columns of gate: expected)", down.rows(), gate.cols()),
        ] {
            if found != expected {
                return Err(QuantError::Length { what, found, expected });
            }
        }
        Ok(Self { gate, up, down })
    }

    /// Width of input and output.
    pub fn hidden(&self) -> usize {
        self.gate.cols()
    }

    /// Width of the middle.
    pub fn inner(&self) -> usize {
        self.gate.rows()
    }
}

/// What [`forward`] needs beside its arguments; grows when asked for more than it was made for.
#[derive(Debug, Default)]
pub struct ExpertScratch {
    middle: Activations,
    /// Between the factors of gate, up and down.
    between: [Activations; 3],
    /// The same before it is quantized.
    floats: Vec<f32>,
}

impl ExpertScratch {
    /// Room for `tokens` × `inner`; factors are given theirs when they come.
    pub fn new(tokens: usize, inner: usize) -> Self {
        Self {
            middle: Activations::with_capacity(tokens, inner),
            ..Self::default()
        }
    }
}

/// Bytes that [`ExpertScratch::new`] allocates.
pub fn expert_scratch_bytes(tokens: usize, inner: usize) -> usize {
    Activations::capacity_bytes(tokens, inner)
}

/// What is left to multiply, and with what: of two factors the right one is done here, on all threads.
fn last_factor<'w, 'a>(
    isa: Isa,
    matrix: &Matrix<'w>,
    acts: &'a Activations,
    between: &'a mut Activations,
    floats: &mut Vec<f32>,
    threads: Threads,
) -> (Weights<'w>, &'a Activations) {
    match *matrix {
        Matrix::Whole(weights) => (weights, acts),
        Matrix::Product { left, right } => {
            floats.clear();
            floats.resize(acts.tokens() * right.rows(), 0.0);
            gemm(isa, right, acts, floats, threads);
            between.quantize(isa, floats, right.rows());
            (left, between)
        }
    }
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
    let ExpertScratch {
        middle,
        between: [between_gate, between_up, between_down],
        floats,
    } = scratch;
    middle.reset(acts.tokens(), expert.inner());
    let gate_factor = last_factor(isa, &expert.gate, acts, between_gate, floats, threads);
    let up_factor = last_factor(isa, &expert.up, acts, between_up, floats, threads);
    let steps = middle.steps_per_token();
    let blocks = gate_factor.0.row_blocks();
    let shared = Disjoint::new(middle.steps_mut());
    in_chunks(steps, CHUNK_STEPS, threads, |range| {
        for step in range {
            let (mut gate, mut up) = ([[0.0; STEP]; TOKENS], [[0.0; STEP]; TOKENS]);
            for_tokens(acts.tokens(), |first, buffer| {
                for half in 0..STEP / BLOCK_ROWS {
                    let (block, at) = (step * STEP / BLOCK_ROWS + half, half * BLOCK_ROWS);
                    for ((weights, acts), side) in [(gate_factor, &mut gate), (up_factor, &mut up)] {
                        if block < blocks {
                            weights.block(isa, block, acts, first, buffer);
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
    let (weights, acts) = last_factor(isa, &expert.down, middle, between_down, floats, threads);
    gemm(isa, weights, acts, out, threads);
}
