//! Least squares with a pull towards what is there: refitting a matrix to a target on the inputs that it will get.
//!
//! Law: the gradient of `Σ ω·‖y − W'x‖² + λ'·‖W' − W‖²` is zero at the answer.

use ndarray::{Array2, ArrayView2};

use crate::error::check_entries;
use crate::triangular::{damped, invert_lower};
use crate::{Error, cholesky};

/// `(C + λ'·W)·(G + λ'·I)⁻¹` with `λ' = lambda · tr(G) / n`: `gram` G is `Σ ω·x·xᵀ` `[n, n]`, `cross` C is `Σ ω·y·xᵀ`
/// `[m, n]`, `prior` W `[m, n]`.
///
/// # Errors
/// Entries that are not finite, sizes that do not fit; [`Error::NotPositiveDefinite`] where `lambda` is too small for
/// the inputs.
pub fn ridge(
    gram: ArrayView2<'_, f64>,
    cross: ArrayView2<'_, f64>,
    prior: ArrayView2<'_, f64>,
    lambda: f64,
) -> Result<Array2<f64>, Error> {
    for matrix in [&gram, &cross, &prior] {
        check_entries(matrix)?;
    }
    let size = gram.nrows();
    for (what, found, expected) in [
        ("gram matrix", gram.dim(), (size, size)),
        ("cross matrix", cross.dim(), (prior.nrows(), size)),
        ("prior", prior.dim(), (cross.nrows(), size)),
    ] {
        if found != expected {
            return Err(Error::Shape {
                what,
                rows: found.0,
                cols: found.1,
                expected_rows: expected.0,
                expected_cols: expected.1,
            });
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a size")]
    let pull = lambda * gram.diag().sum() / size as f64;
    let inverse = invert_lower(cholesky(damped(gram, lambda).view())?.view())?;
    let wanted = &cross + &(&prior * pull);
    Ok(wanted.dot(&inverse.t()).dot(&inverse))
}
