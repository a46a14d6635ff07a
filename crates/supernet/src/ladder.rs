//! The bit ladder of weights: plain references in f64 and the fused form on tensors.
//!
//! Symmetric codes of `b` bits are `-n..=n`, `n = 2^(b-1) - 1`, with scale `2β/(2^b - 1)` and clip `±β(1 - ε)`: at ±β
//! itself the quotient is a tie that would round past `n`. "Bayesian Bits" (van Baalen et al., 2020). Law: with one β,
//! the ladder `x_2 + e_4 + e_8` equals one rounding at the chosen rung, so hard gates need that one alone. We give each
//! rung a β of its own, because one for all costs 10 dB at 8 bits or the 2-bit rung entirely; residuals are then
//! differences between neighbouring rungs, and the sum still telescopes.

use tch::{Kind, Tensor, no_grad};

/// Keeps ±β off the tie.
pub const EPSILON: f64 = 1e-6;

/// Best clip of Gaussian weights in standard deviations, by squared error.
fn clip_in_deviations(bits: u32) -> f64 {
    match bits {
        0..=2 => 1.8,
        3..=4 => 2.6,
        _ => 3.9,
    }
}

/// Largest code of the symmetric range: 1, 7 or 127.
pub fn max_code(bits: u32) -> i32 {
    (1 << (bits - 1)) - 1
}

/// `2β/(2^b - 1)`.
pub fn scale(beta: f64, bits: u32) -> f64 {
    2.0 * beta / f64::from((1u32 << bits) - 1)
}

/// The code of one weight: the plain reference.
pub fn code(x: f64, beta: f64, bits: u32) -> i32 {
    let limit = beta * (1.0 - EPSILON);
    let most = f64::from(max_code(bits));
    #[expect(clippy::cast_possible_truncation, reason = "clamped to ±127")]
    let code = (x.clamp(-limit, limit) / scale(beta, bits))
        .round_ties_even()
        .clamp(-most, most) as i32;
    code
}

/// `x_2 + e_4 + e_8` up to `bits`, as written in the paper, with one β: the plain reference of the ladder.
pub fn ladder(x: f64, beta: f64, bits: u32) -> f64 {
    let limit = beta * (1.0 - EPSILON);
    let x = x.clamp(-limit, limit);
    let mut sum = scale(beta, 2) * (x / scale(beta, 2)).round_ties_even();
    for rung in [4, 8] {
        if rung <= bits {
            let s = scale(beta, rung);
            sum += s * ((x - sum) / s).round_ties_even();
        }
    }
    sum
}

/// Weights coded at `bits`, with per-channel clips from the root mean square over `open` weights a channel (the others
/// are zero). Gradient: straight through inside the clip, none outside. `weights` is `[cout, …]`.
pub(crate) fn fake_quantize(weights: &Tensor, bits: u32, open: i64) -> Tensor {
    let beta = no_grad(|| {
        let squares = weights
            .square()
            .sum_dim_intlist([1i64, 2, 3].as_slice(), true, Kind::Float);
        (squares / open as f64).sqrt() * clip_in_deviations(bits) + 1e-12
    });
    let limit = &beta * (1.0 - EPSILON);
    let most = i64::from(max_code(bits));
    let mut clipped = weights.clamp_tensor(Some(&-&limit), Some(&limit));
    no_grad(|| {
        let scale = beta * (2.0 / f64::from((1u32 << bits) - 1));
        // In place: clamp's backward needs its input alone, and six temporaries a layer are spared.
        let _ = clipped.divide_(&scale);
        let _ = clipped.round_();
        let _ = clipped.clamp_(-most, most);
        let _ = clipped.multiply_(&scale);
    });
    clipped
}

/// The scale of one channel with least squared error: 40 clips between a fifth of the largest weight and all of it.
pub(crate) fn best_scale(weights: &[f32], bits: u32) -> f32 {
    let largest = weights.iter().fold(0f32, |m, w| m.max(w.abs()));
    if largest == 0.0 {
        return 1.0;
    }
    let most = max_code(bits) as f32;
    let error = |scale: f32| -> f64 {
        let inverse = 1.0 / scale;
        weights
            .iter()
            .map(|&w| {
                let decoded = (w * inverse).round_ties_even().clamp(-most, most) * scale;
                f64::from(w - decoded).powi(2)
            })
            .sum()
    };
    let steps = f64::from((1u32 << bits) - 1);
    let candidates = (1..=40).map(|i| {
        // β from 0.2 to 1.2 times the largest weight: at 2 bits the largest code is 0.67 β.
        let beta = f64::from(largest) * (0.2 + f64::from(i) / 40.0);
        #[expect(clippy::cast_possible_truncation, reason = "scales are f32")]
        let scale = (2.0 * beta / steps) as f32;
        (error(scale), scale)
    });
    let best = candidates.min_by(|a, b| a.0.total_cmp(&b.0)).expect("40 candidates");
    best.1.max(f32::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use cotk_run::seeds::Seeds;
    use rand::RngExt;

    use super::*;

    const ALL: [u32; 3] = [2, 4, 8];

    #[test]
    fn the_ladder_equals_one_rounding_at_its_rung() {
        let mut stream = Seeds::new(1).stream("ladder");
        for _ in 0..50_000 {
            let (x, beta) = (stream.random_range(-2.0..2.0), stream.random_range(0.3..1.7));
            for bits in ALL {
                let fused = scale(beta, bits) * f64::from(code(x, beta, bits));
                assert!((ladder(x, beta, bits) - fused).abs() < 1e-9, "{x} {beta} {bits:?}");
            }
        }
        for bits in ALL {
            assert_eq!(code(1.0, 1.0, bits), max_code(bits), "the tie at β");
        }
    }

    #[test]
    fn codes_nest() {
        let mut stream = Seeds::new(2).stream("nest");
        for _ in 0..20_000 {
            let x = stream.random_range(-1.2..1.2);
            let [n2, n4, n8] = ALL.map(|bits| code(x, 1.0, bits));
            assert!(
                (n8 - 17 * n4).abs() <= 8 && (n4 - 5 * n2).abs() <= 2,
                "{x}: {n2} {n4} {n8}"
            );
        }
    }

    #[test]
    fn the_fused_form_on_tensors_rounds_as_the_reference() {
        let mut stream = Seeds::new(3).stream("tensor");
        let values: Vec<f32> = (0..2 * 3 * 9).map(|_| stream.random_range(-1.0f32..1.0)).collect();
        let weights = Tensor::from_slice(&values).view([2, 3, 3, 3]).set_requires_grad(true);
        for bits in ALL {
            let coded = fake_quantize(&weights, bits, 27);
            let out = Vec::<f32>::try_from(&coded.flatten(0, -1)).unwrap();
            let gradient = Tensor::run_backward(&[coded.sum(Kind::Float)], &[&weights], false, false);
            let gradient = Vec::<f32>::try_from(&gradient[0].flatten(0, -1)).unwrap();
            for channel in 0..2 {
                let of = channel * 27..(channel + 1) * 27;
                let squares: f64 = values[of.clone()].iter().map(|&v| f64::from(v).powi(2)).sum();
                let beta = (squares / 27.0).sqrt() * clip_in_deviations(bits) + 1e-12;
                for i in of {
                    let x = f64::from(values[i]);
                    let expected = scale(beta, bits) * f64::from(code(x, beta, bits));
                    assert!((f64::from(out[i]) - expected).abs() < 1e-6, "{bits:?} {i}");
                    assert_eq!(gradient[i], if x.abs() <= beta { 1.0 } else { 0.0 }, "{bits:?} {i}");
                }
            }
        }
    }

    #[test]
    fn the_best_scale_is_not_worse_than_its_neighbours() {
        let mut stream = Seeds::new(4).stream("scale");
        let weights: Vec<f32> = (0..200).map(|_| stream.random_range(-1.0f32..1.0).powi(3)).collect();
        for bits in ALL {
            let most = max_code(bits) as f32;
            let error = |s: f32| -> f32 {
                weights
                    .iter()
                    .map(|w| (w - (w / s).round_ties_even().clamp(-most, most) * s).powi(2))
                    .sum()
            };
            let best = best_scale(&weights, bits);
            assert!(
                error(best) <= error(best * 1.3) && error(best) <= error(best * 0.7),
                "{bits:?}"
            );
        }
        assert_eq!(best_scale(&[0.0; 4], 8), 1.0);
    }
}
