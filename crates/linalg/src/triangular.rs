//! Inverses of triangular and of symmetric positive definite matrices. Law: times the matrix they give the identity.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, Axis};

use crate::error::check_entries;
use crate::{Error, cholesky};

/// Below this size rows are taken one by one; above it halves meet in matrix products.
const PLAIN: usize = 64;

/// A symmetric matrix with `damping` times its mean diagonal added to the diagonal.
pub(crate) fn damped(matrix: ArrayView2<'_, f64>, damping: f64) -> Array2<f64> {
    let mut damped = matrix.to_owned();
    #[expect(clippy::cast_precision_loss, reason = "a size")]
    let add = damping * damped.diag().sum() / damped.nrows().max(1) as f64;
    damped.diag_mut().map_inplace(|d| *d += add);
    damped
}

/// Inverse of a lower triangular matrix, lower triangular; entries above the diagonal are not read. `[n, n]`
///
/// # Errors
/// [`Error::Empty`], [`Error::NotSquare`], [`Error::NotFinite`]; [`Error::NotPositiveDefinite`] with the first row
/// whose diagonal is not above zero (a Cholesky factor has none).
pub fn invert_lower(lower: ArrayView2<'_, f64>) -> Result<Array2<f64>, Error> {
    check_entries(&lower)?;
    let (rows, cols) = lower.dim();
    if rows != cols {
        return Err(Error::NotSquare { rows, cols });
    }
    if let Some(pivot) = lower.diag().iter().position(|&d| d <= 0.0) {
        return Err(Error::NotPositiveDefinite { pivot, size: rows });
    }
    Ok(halves(lower))
}

/// Inverse of a symmetric positive definite matrix by its Cholesky factor; the lower triangle alone is read. `[n, n]`
///
/// # Errors
/// As [`cholesky()`].
pub fn invert_symmetric(matrix: ArrayView2<'_, f64>) -> Result<Array2<f64>, Error> {
    let inverse = halves(cholesky(matrix)?.view());
    Ok(inverse.t().dot(&inverse))
}

/// `[[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹·B·A⁻¹, C⁻¹]]`.
fn halves(lower: ArrayView2<'_, f64>) -> Array2<f64> {
    let size = lower.nrows();
    if size <= PLAIN {
        return row_by_row(lower);
    }
    let half = size / 2;
    let (top, bottom) = lower.split_at(Axis(0), half);
    let (corner, last) = bottom.split_at(Axis(1), half);
    let (first, second) = (halves(top.split_at(Axis(1), half).0), halves(last));
    let mut inverse = Array2::zeros((size, size));
    let (top, bottom) = inverse.view_mut().split_at(Axis(0), half);
    let (mut left, mut right) = bottom.split_at(Axis(1), half);
    top.split_at(Axis(1), half).0.assign(&first);
    general_mat_mul(-1.0, &second.dot(&corner), &first, 0.0, &mut left);
    right.assign(&second);
    inverse
}

/// Forward substitution of the identity.
fn row_by_row(lower: ArrayView2<'_, f64>) -> Array2<f64> {
    let size = lower.nrows();
    let mut inverse = Array2::<f64>::zeros((size, size));
    for i in 0..size {
        for k in 0..i {
            let factor = lower[[i, k]];
            for j in 0..=k {
                let above = inverse[[k, j]];
                inverse[[i, j]] -= factor * above;
            }
        }
        inverse[[i, i]] += 1.0;
        for j in 0..=i {
            inverse[[i, j]] /= lower[[i, i]];
        }
    }
    inverse
}
