//! `silu(gate) · up`, then quantized: the middle of an expert. One algorithm, compiled for each path.
//!
//! The exponential is our own so that every machine gives the same bits: Cephes' `expf` with fused multiply-adds, below
//! 2 ULP on the clamped range (held by a test).

use cotk_quant::layout::STEP;

use super::activations::{StepCodes, quantize_step};

/// `exp(x)` for `x` clamped to ±87: 2^n · P(r), `r = x − n·ln 2` (Moshier, Cephes, `expf`).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = if x > 87.0 { 87.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    // Rounds to nearest as in `quantize_step`.
    let shifted = x.mul_add(std::f32::consts::LOG2_E, 12_582_912.0);
    let n = shifted - 12_582_912.0;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = p.mul_add(r, c);
    }
    let p = p.mul_add(r * r, r) + 1.0;
    // NaN passes through `p`; its n makes a power that does not matter.
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(0x4b40_0000).wrapping_add(127) << 23);
    p * power
}

/// `x / (1 + exp(−x))`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[inline(always)]
pub(crate) fn swiglu_step(gate: &[f32; STEP], up: &[f32; STEP]) -> StepCodes {
    let mut hidden = [0.0; STEP];
    for ((h, g), u) in hidden.iter_mut().zip(gate).zip(up) {
        *h = silu(*g) * u;
    }
    quantize_step(&hidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_of_f64() {
        for i in -87_000..=87_000i32 {
            let x = i as f32 / 1000.0;
            let truth = f64::from(x).exp();
            let error = (f64::from(exp(x)) - truth).abs() / truth;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "{x}: {error}");
        }
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn silu_holds_at_the_ends() {
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(100.0), 100.0);
        assert!(silu(-1000.0).abs() < 1e-30);
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
        assert!(silu(f32::NAN).is_nan());
    }
}
