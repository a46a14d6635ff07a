//! The thin singular value decomposition.

use ndarray::{Array1, Array2, ArrayView2, Axis, Slice};

use crate::Error;
use crate::backend::{Backend, DEFAULT};
use crate::error::check_entries;

/// `A = U · diag(s) · Vᵀ` with `k = min(rows, cols)` columns.
#[derive(Debug, Clone, PartialEq)]
pub struct Svd {
    /// Left singular vectors, orthonormal columns. `[rows, k]`
    pub u: Array2<f64>,
    /// Singular values, not negative, descending. `[k]`
    pub s: Array1<f64>,
    /// Right singular vectors, transposed: orthonormal rows. `[k, cols]`
    pub vt: Array2<f64>,
}

impl Svd {
    /// `U · diag(s) · Vᵀ` of the `rank` largest singular values (all when `rank` is above `k`): the nearest matrix of
    /// that rank (Eckart and Young, 1936). `[rows, cols]`
    pub fn reconstruct(&self, rank: usize) -> Array2<f64> {
        let rank = rank.min(self.s.len());
        let first = Slice::from(..rank);
        let scaled = &self.u.slice_axis(Axis(1), first) * &self.s.slice_axis(Axis(0), first);
        scaled.dot(&self.vt.slice_axis(Axis(0), first))
    }
}

/// Thin SVD. Each column of `U` has its entry of largest magnitude above zero (the first of equals), which settles the
/// sign that the definition leaves open. One thread: the same bits each time on one kind of machine.
///
/// # Errors
/// [`Error::Empty`], [`Error::NotFinite`]; [`Error::NoConvergence`] on no known input.
pub fn svd(matrix: ArrayView2<'_, f64>) -> Result<Svd, Error> {
    svd_on(DEFAULT, matrix)
}

pub(crate) fn svd_on(backend: Backend, matrix: ArrayView2<'_, f64>) -> Result<Svd, Error> {
    check_entries(&matrix)?;
    let mut factors = (backend.svd)(matrix).ok_or(Error::NoConvergence {
        backend: backend.name,
        rows: matrix.nrows(),
        cols: matrix.ncols(),
    })?;
    settle_signs(&mut factors);
    Ok(factors)
}

fn settle_signs(factors: &mut Svd) {
    for (mut u, mut v) in factors.u.columns_mut().into_iter().zip(factors.vt.rows_mut()) {
        let largest = u
            .iter()
            .fold(0.0f64, |best, &x| if x.abs() > best.abs() { x } else { best });
        if largest < 0.0 {
            u.map_inplace(|x| *x = -*x);
            v.map_inplace(|x| *x = -*x);
        }
    }
}
