//! Activations as i8 in steps of 32 with one f32 scale each, and the sum that zero points need.
//!
//! Quantize once, multiply with many matrices. Law: a step depends on its own 32 values alone, on every path equally.

use cotk_quant::layout::STEP;

use super::dispatch::Isa;
use super::gemm::{Disjoint, Threads, in_chunks};

/// One step: `x ≈ scale · codes`, codes in −127..=127.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepCodes {
    pub codes: [i8; STEP],
    /// `absmax / 127`; 0 for zeros; NaN when any value is NaN or infinite, so that the output is NaN, not wrong.
    pub scale: f32,
    /// Sum of the codes (exact).
    pub sum: f32,
}

impl StepCodes {
    const ZERO: Self = Self {
        codes: [0; STEP],
        scale: 0.0,
        sum: 0.0,
    };
}

/// Quantized activations of several tokens, `[tokens, cols]`, columns padded with zeros to a multiple of 32.
#[derive(Debug, Clone, Default)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    steps: Vec<StepCodes>, // [tokens, cols / 32]
}

impl Activations {
    /// Room for `tokens` × `cols`, so that [`Activations::quantize`] allocates nothing up to that size.
    pub fn with_capacity(tokens: usize, cols: usize) -> Self {
        Self {
            tokens: 0,
            cols: 0,
            steps: Vec::with_capacity(tokens * cols.div_ceil(STEP)),
        }
    }

    /// Bytes that [`Activations::with_capacity`] allocates.
    pub fn capacity_bytes(tokens: usize, cols: usize) -> usize {
        tokens * cols.div_ceil(STEP) * size_of::<StepCodes>()
    }

    /// Replaces the contents by `x` `[tokens, cols]`.
    ///
    /// # Panics
    /// `x` is not a whole number of rows.
    pub fn quantize(&mut self, isa: Isa, x: &[f32], cols: usize) {
        self.quantize_on(isa, x, cols, Threads::One);
    }

    /// [`Activations::quantize`] on the team where there are many tokens.
    ///
    /// # Panics
    /// As [`Activations::quantize`].
    pub fn quantize_on(&mut self, isa: Isa, x: &[f32], cols: usize, threads: Threads) {
        /// Tokens of a part.
        const CHUNK_TOKENS: usize = 8;
        assert!(
            cols > 0 && x.len().is_multiple_of(cols),
            "activations are whole rows of {cols}"
        );
        self.reset(x.len() / cols, cols);
        let per_token = self.steps_per_token();
        let (tokens, steps) = (self.tokens, Disjoint::new(&mut self.steps));
        in_chunks(tokens, CHUNK_TOKENS, threads, |tokens| {
            // SAFETY: a token belongs to one part.
            let steps = unsafe { steps.part(tokens.start * per_token..tokens.end * per_token) };
            quantize_rows(isa, &x[tokens.start * cols..tokens.end * cols], cols, steps);
        });
    }

    /// A new quantization of `x` `[tokens, cols]`.
    pub fn of(isa: Isa, x: &[f32], cols: usize) -> Self {
        let mut acts = Self::default();
        acts.quantize(isa, x, cols);
        acts
    }

    /// Zeros of the given shape, for a kernel to fill.
    pub(crate) fn reset(&mut self, tokens: usize, cols: usize) {
        (self.tokens, self.cols) = (tokens, cols);
        self.steps.clear();
        self.steps.resize(tokens * cols.div_ceil(STEP), StepCodes::ZERO);
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Steps of one token.
    pub fn steps_per_token(&self) -> usize {
        self.cols.div_ceil(STEP)
    }

    /// All steps `[tokens, steps]`.
    pub fn steps(&self) -> &[StepCodes] {
        &self.steps
    }

    pub(crate) fn steps_mut(&mut self) -> &mut [StepCodes] {
        &mut self.steps
    }

    /// The steps of one token.
    pub fn token(&self, token: usize) -> &[StepCodes] {
        let per_token = self.steps_per_token();
        &self.steps[token * per_token..(token + 1) * per_token]
    }
}

/// Whole rows of `x`, each padded to whole steps.
fn quantize_rows(isa: Isa, x: &[f32], cols: usize, steps: &mut [StepCodes]) {
    for (row, steps) in x.chunks_exact(cols).zip(steps.chunks_exact_mut(cols.div_ceil(STEP))) {
        for (x, step) in row.chunks(STEP).zip(steps) {
            *step = match x.try_into() {
                Ok(whole) => isa.quantize(whole),
                Err(_) => {
                    let mut padded = [0.0; STEP];
                    padded[..x.len()].copy_from_slice(x);
                    isa.quantize(&padded)
                }
            };
        }
    }
}

/// The one algorithm, compiled for each path. Round to nearest, ties to even.
#[inline(always)]
pub(crate) fn quantize_step(x: &[f32; STEP]) -> StepCodes {
    // Of magnitudes, bit patterns sort as numbers do, and NaN sorts above all.
    let absmax_bits = x.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    let absmax = f32::from_bits(absmax_bits);
    if absmax_bits >= f32::INFINITY.to_bits() {
        return StepCodes {
            scale: f32::NAN,
            ..StepCodes::ZERO
        };
    }
    let scale = absmax / 127.0;
    let inverse = 127.0 / absmax;
    if !inverse.is_finite() {
        return StepCodes::ZERO;
    }
    let mut step = StepCodes {
        scale,
        ..StepCodes::ZERO
    };
    let mut sum = 0i32;
    for (code, v) in step.codes.iter_mut().zip(x) {
        // 1.5·2^23: adding it leaves the nearest integer, ties to even, in the low bits. |v · inverse| ≤ 127.5.
        let rounded = (v * inverse + 12_582_912.0).to_bits().wrapping_sub(0x4b40_0000) as i32;
        sum += rounded;
        *code = rounded as i8;
    }
    step.sum = sum as f32;
    step
}
