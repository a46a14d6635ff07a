//! Softmax rows: router scores, and log-probabilities for evaluation.

/// Softmax of each row of `[rows, width]`, in place.
pub fn softmax(x: &mut [f32], width: usize) {
    for row in x.chunks_exact_mut(width) {
        let max = max(row);
        let mut sum = 0.0;
        for value in row.iter_mut() {
            *value = (*value - max).exp();
            sum += *value;
        }
        for value in row.iter_mut() {
            *value /= sum;
        }
    }
}

/// ln Σ exp(x) in f64, without overflow.
pub fn log_sum_exp(row: &[f32]) -> f64 {
    let max = max(row);
    let sum: f64 = row.iter().map(|&x| f64::from((x - max).exp())).sum();
    f64::from(max) + sum.ln()
}

/// The largest value that is not NaN; −∞ of nothing. Lanes, because a plain fold waits for each comparison.
pub fn max(row: &[f32]) -> f32 {
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut best = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (best, &x) in best.iter_mut().zip(chunk) {
            *best = larger(*best, x);
        }
    }
    best.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
}

/// Index of the largest value, the first of equals; 0 where there is none.
pub fn argmax(row: &[f32]) -> usize {
    let max = max(row);
    row.iter().position(|&x| x == max).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_sum_to_one_whatever_their_size() {
        let mut x = [1e30, 1e30, 0.0, -5.0, 2.0, 1.0];
        softmax(&mut x, 3);
        assert_eq!(&x[..3], [0.5, 0.5, 0.0]);
        assert!((x[3..].iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((log_sum_exp(&[1000.0, 1000.0]) - (1000.0 + 2f64.ln())).abs() < 1e-9);
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(argmax(&[f32::NAN, -3.0, f32::NEG_INFINITY]), 1);
        let long: Vec<f32> = (0..77).map(|i| ((i * 37) % 77) as f32).collect();
        assert_eq!(long[argmax(&long)], 76.0);
    }
}
