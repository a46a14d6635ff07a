//! Why a matrix has no factorisation, and where.

/// What can be wrong with a matrix. Positions count from 0.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum Error {
    /// A side has length 0.
    #[error("matrix is empty: found {rows} x {cols}, expected at least 1 x 1")]
    Empty { rows: usize, cols: usize },
    /// NaN or an infinity.
    #[error("matrix [{row}, {col}] is {found}, expected a finite number")]
    NotFinite { row: usize, col: usize, found: f64 },
    /// Cholesky needs as many rows as columns.
    #[error("matrix is {rows} x {cols}, expected as many rows as columns")]
    NotSquare { rows: usize, cols: usize },
    /// Two matrices of one problem do not fit.
    #[error("{what} is {rows} x {cols}, expected {expected_rows} x {expected_cols}")]
    Shape {
        what: &'static str,
        rows: usize,
        cols: usize,
        expected_rows: usize,
        expected_cols: usize,
    },
    /// The leading block up to and with row `pivot` is not positive definite.
    #[error("matrix is not positive definite: pivot {pivot} of {size} is not above zero")]
    NotPositiveDefinite { pivot: usize, size: usize },
    /// The iteration did not settle, or the library refused its input: a bug of ours or of theirs.
    #[error("{backend} found no factors of a finite {rows} x {cols} matrix")]
    NoConvergence {
        backend: &'static str,
        rows: usize,
        cols: usize,
    },
}

/// First entry that is not finite, in row order.
pub(crate) fn check_entries(matrix: &ndarray::ArrayView2<'_, f64>) -> Result<(), Error> {
    let (rows, cols) = matrix.dim();
    if rows == 0 || cols == 0 {
        return Err(Error::Empty { rows, cols });
    }
    match matrix.indexed_iter().find(|(_, value)| !value.is_finite()) {
        Some(((row, col), &found)) => Err(Error::NotFinite { row, col, found }),
        None => Ok(()),
    }
}
