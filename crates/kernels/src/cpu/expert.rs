//! A whole expert: `down(silu(gate · x) · (up · x))` for some tokens, the middle never leaving the cache.
//!
//! Several at once, and how rows are split: [`super::experts`]. Choosing experts is the runtime's.

use cotk_quant::QuantError;

use super::activations::Activations;
use super::dispatch::Isa;
use super::experts::{self, ExpertsScratch};
use super::gemm::Threads;
use super::weights::Matrix;

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

    /// Gate, up, down.
    pub(crate) fn matrices(&self) -> [&Matrix<'a>; 3] {
        [&self.gate, &self.up, &self.down]
    }
}

/// What [`forward`] needs beside its arguments.
pub type ExpertScratch = ExpertsScratch;

/// Fills `out` `[tokens, hidden]`. Once the scratch has met the shape nothing is allocated.
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
    experts::alone(isa, expert, acts, out, scratch, threads);
}
