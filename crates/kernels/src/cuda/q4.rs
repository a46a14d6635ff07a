//! What the 4-bit kernels take: an expert whose three matrices are plain 4-bit codes (or 4-bit bases of nested ones) in
//! groups of 32, and activations as separate arrays. Shared by the device, the shim and their tests.

use cotk_quant::QuantError;
use cotk_quant::code::Code;
use cotk_quant::coded::{CodedMatrix, Prefix};
use cotk_quant::encode::assemble;
use cotk_quant::layout::{MatrixFormat, Placement, STEP, ScaleForm};
use half::f16;

use crate::cpu::activations::Activations;

/// A matrix as the kernels address it.
#[derive(Debug, Clone, Copy)]
pub struct Q4Matrix<'a> {
    /// Its plane, or the plane of the pair that it is in.
    pub plane: &'a [u8],
    /// 1, or 2 in a pair.
    pub turns: u32,
    /// 1 where its tiles come second.
    pub second: u32,
    pub zero_point: f32,
    pub cell: f32,
}

impl<'a> Q4Matrix<'a> {
    /// # Errors
    /// The prefix is not one plane of 4 bits in groups of 32.
    pub fn try_new(prefix: &Prefix<'a>) -> Result<Self, QuantError> {
        let format = prefix.format();
        let fields: Vec<u32> = prefix.fields().map(|f| f.bits).collect();
        if fields != [4] {
            return Err(QuantError::Code {
                found: format!("{} at {}", format.code(), prefix.bits()),
                expected: "plain4 or the 4-bit base of nested4+4",
            });
        }
        if format.group() != STEP || format.scales() != ScaleForm::F16 {
            return Err(QuantError::Group { found: format.group() });
        }
        let (planes, placement) = prefix.planes();
        Ok(Self {
            plane: planes[0],
            turns: if placement == Placement::Alone { 1 } else { 2 },
            second: u32::from(placement == Placement::PairSecond),
            zero_point: prefix.zero_point(),
            cell: prefix.cell(),
        })
    }
}

/// Activations as the kernels read them.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitActivations {
    /// Eight words of four int8 per step: `[tokens, steps, 8]`.
    pub codes: Vec<u32>,
    /// `[tokens, steps]`.
    pub scales: Vec<f32>,
    /// `[tokens, steps]`.
    pub sums: Vec<f32>,
}

impl SplitActivations {
    /// The same values, field by field.
    pub fn of(acts: &Activations) -> Self {
        let steps = acts.steps();
        let words = |codes: &[i8; STEP]| -> Vec<u32> {
            let words = codes.as_chunks::<4>().0.iter();
            words.map(|w| u32::from_le_bytes(w.map(i8::cast_unsigned))).collect()
        };
        Self {
            codes: steps.iter().flat_map(|s| words(&s.codes)).collect(),
            scales: steps.iter().map(|s| s.scale).collect(),
            sums: steps.iter().map(|s| s.sum).collect(),
        }
    }
}

/// An expert made of a seed: gate, up `[inner, hidden]` and down `[hidden, inner]`, of the size of trained weights. The
/// check of a device must not depend on a file.
///
/// # Errors
/// A shape that no format has.
pub fn sample_expert(hidden: usize, inner: usize, code: Code, seed: u64) -> Result<[CodedMatrix; 3], QuantError> {
    // xorshift64*: the codes need no more.
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    };
    let mut matrix = |rows: usize, cols: usize| {
        let format = MatrixFormat::try_new(rows, cols, code, STEP)?;
        let mask = (1u64 << code.full().get()) - 1;
        #[expect(clippy::cast_possible_truncation, reason = "masked to a byte")]
        let codes: Vec<u8> = (0..rows * cols).map(|_| (next() & mask) as u8).collect();
        #[expect(clippy::cast_precision_loss, reason = "a thousand values")]
        let scales: Vec<f16> = (0..rows * format.groups())
            .map(|_| f16::from_f32(0.002 + (next() % 1000) as f32 * 4e-6))
            .collect();
        let zero_points = code.prefixes().iter().map(|b| code.default_zero_point(*b)).collect();
        assemble(format, &codes, &scales, zero_points)
    };
    Ok([matrix(inner, hidden)?, matrix(inner, hidden)?, matrix(hidden, inner)?])
}
