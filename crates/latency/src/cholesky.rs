//! The one factorisation that this crate needs: small dense positive definite systems. (`cotk-linalg` lies above this crate.)

/// Lower triangle `L` with `L·Lᵀ = K`, row by row; `None` when `K` is not positive definite.
pub(crate) fn cholesky(k: &[Vec<f64>]) -> Option<Vec<Vec<f64>>> {
    let n = k.len();
    let mut l = vec![vec![0.0; n]; n];
    for i in 0..n {
        for j in 0..=i {
            let known: f64 = (0..j).map(|c| l[i][c] * l[j][c]).sum();
            let rest = k[i][j] - known;
            if i == j {
                if rest <= 0.0 || !rest.is_finite() {
                    return None;
                }
                l[i][i] = rest.sqrt();
            } else {
                l[i][j] = rest / l[j][j];
            }
        }
    }
    Some(l)
}

/// `x` with `L·Lᵀ·x = b`.
pub(crate) fn solve(l: &[Vec<f64>], b: &[f64]) -> Vec<f64> {
    let n = b.len();
    let mut x = b.to_vec();
    for i in 0..n {
        let known: f64 = (0..i).map(|j| l[i][j] * x[j]).sum();
        x[i] = (x[i] - known) / l[i][i];
    }
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| l[j][i] * x[j]).sum();
        x[i] = (x[i] - known) / l[i][i];
    }
    x
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Law: what is solved for solves it.
        #[test]
        fn a_solution_solves(rows in prop::collection::vec(prop::collection::vec(-1.0f64..1.0, 6), 6), b in prop::collection::vec(-1.0f64..1.0, 6)) {
            let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
            let k: Vec<Vec<f64>> = (0..6).map(|i| (0..6).map(|j| dot(&rows[i], &rows[j]) + f64::from(u8::from(i == j))).collect()).collect();
            let x = solve(&cholesky(&k).unwrap(), &b);
            for (row, b) in k.iter().zip(&b) {
                prop_assert!((dot(row, &x) - b).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn what_is_not_positive_definite_has_no_factor() {
        assert_eq!(cholesky(&[vec![1.0, 2.0], vec![2.0, 1.0]]), None);
        assert_eq!(cholesky(&[vec![f64::NAN]]), None);
    }
}
