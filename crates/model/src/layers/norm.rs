//! RMS norm.

/// Lanes of the sum of squares: fixed, so that every build adds in the same order.
const LANES: usize = 16;

/// `x / sqrt(mean(x²) + eps) · weight`, row by row. `x` is `[rows, weight.len()]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    rms_norm_to(x, weight, eps, &mut out);
    out
}

/// [`rms_norm`] into `out`, as long as `x`.
pub fn rms_norm_to(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
        let mean = sum_of_squares(x) / weight.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = w * (x * scale);
        }
    }
}

/// [`rms_norm`] in place.
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    for x in x.chunks_exact_mut(weight.len()) {
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
        let mean = sum_of_squares(x) / weight.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for (x, w) in x.iter_mut().zip(weight) {
            *x = w * (*x * scale);
        }
    }
}

fn sum_of_squares(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    sums.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normed_row_has_mean_square_one() {
        let x: Vec<f32> = (0..37).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let out = rms_norm(&x, &[1.0; 37], 0.0);
        let mean: f32 = out.iter().map(|o| o * o).sum::<f32>() / 37.0;
        assert!((mean - 1.0).abs() < 1e-5);
        let mut same = x.clone();
        rms_norm_in_place(&mut same, &[1.0; 37], 0.0);
        assert_eq!(same, out);
        assert_eq!(rms_norm(&[0.0; 4], &[2.0; 4], 1e-6), [0.0; 4]);
    }
}
