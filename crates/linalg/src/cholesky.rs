//! The Cholesky factor of a symmetric positive definite matrix.

use ndarray::{Array2, ArrayView2};

use crate::Error;
use crate::backend::{Backend, DEFAULT};
use crate::error::check_entries;

/// Lower triangular `L` with `L · Lᵀ = A` and a diagonal above zero; zeros above the diagonal. Reads the lower
/// triangle of `matrix` alone (its entries above the diagonal must be finite, no more). `[n, n]`
///
/// # Errors
/// [`Error::Empty`], [`Error::NotSquare`], [`Error::NotFinite`]; [`Error::NotPositiveDefinite`] with the pivot.
pub fn cholesky(matrix: ArrayView2<'_, f64>) -> Result<Array2<f64>, Error> {
    cholesky_on(DEFAULT, matrix)
}

pub(crate) fn cholesky_on(backend: Backend, matrix: ArrayView2<'_, f64>) -> Result<Array2<f64>, Error> {
    let (rows, cols) = matrix.dim();
    check_entries(&matrix)?;
    if rows != cols {
        return Err(Error::NotSquare { rows, cols });
    }
    let mut lower = (backend.cholesky)(matrix).map_err(|pivot| Error::NotPositiveDefinite { pivot, size: rows })?;
    for ((row, col), entry) in lower.indexed_iter_mut() {
        if col > row {
            *entry = 0.0;
        }
    }
    Ok(lower)
}
