//! The libraries that do the arithmetic, as values: callers see one, the laws run on all. Each gets finite input with
//! at least one entry, and works on one thread.

use ndarray::{Array2, ArrayView2};

use crate::Svd;

/// One library's factorisations.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backend {
    pub(crate) name: &'static str,
    /// `None`: it did not converge.
    pub(crate) svd: fn(ArrayView2<'_, f64>) -> Option<Svd>,
    /// The lower factor (what stands above the diagonal does not matter), or the first pivot that is not above zero.
    pub(crate) cholesky: fn(ArrayView2<'_, f64>) -> Result<Array2<f64>, usize>,
}

/// The one that the public functions use.
#[cfg(not(feature = "lapack"))]
pub(crate) const DEFAULT: Backend = faer::BACKEND;
#[cfg(feature = "lapack")]
pub(crate) const DEFAULT: Backend = lapack::BACKEND;

/// All that are built in.
#[cfg(test)]
pub(crate) const ALL: &[Backend] = &[
    faer::BACKEND,
    #[cfg(feature = "lapack")]
    lapack::BACKEND,
];

mod faer {
    use faer::dyn_stack::{MemBuffer, MemStack};
    use faer::linalg::cholesky::llt::factor::{self as llt, LltError};
    use faer::linalg::svd::{self, ComputeSvdVectors::Thin};
    use faer::{Auto, Mat, Par, Spec, diag::Diag};
    use ndarray::{Array1, Array2, ArrayView2};

    use super::Backend;
    use crate::Svd;

    #[cfg_attr(feature = "lapack", allow(dead_code, reason = "only the laws use both"))]
    pub(crate) const BACKEND: Backend = Backend {
        name: "faer",
        svd,
        cholesky,
    };

    fn svd(matrix: ArrayView2<'_, f64>) -> Option<Svd> {
        let (rows, cols) = matrix.dim();
        let rank = rows.min(cols);
        let a = to_faer(matrix);
        let (mut u, mut s, mut v) = (Mat::zeros(rows, rank), Diag::zeros(rank), Mat::zeros(cols, rank));
        let params = Spec::new(<svd::SvdParams as Auto<f64>>::auto());
        let scratch = svd::svd_scratch::<f64>(rows, cols, Thin, Thin, Par::Seq, params);
        let mut buffer = MemBuffer::new(scratch);
        let stack = MemStack::new(&mut buffer);
        svd::svd(
            a.as_ref(),
            s.as_mut(),
            Some(u.as_mut()),
            Some(v.as_mut()),
            Par::Seq,
            stack,
            params,
        )
        .ok()?;
        let values = s.column_vector();
        Some(Svd {
            u: Array2::from_shape_fn((rows, rank), |(i, j)| u[(i, j)]),
            s: Array1::from_shape_fn(rank, |i| values[i]),
            vt: Array2::from_shape_fn((rank, cols), |(i, j)| v[(j, i)]),
        })
    }

    fn cholesky(matrix: ArrayView2<'_, f64>) -> Result<Array2<f64>, usize> {
        let size = matrix.nrows();
        let mut a = to_faer(matrix);
        let params = Spec::new(<llt::LltParams as Auto<f64>>::auto());
        let mut buffer = MemBuffer::new(llt::cholesky_in_place_scratch::<f64>(size, Par::Seq, params));
        let stack = MemStack::new(&mut buffer);
        llt::cholesky_in_place(a.as_mut(), llt::LltRegularization::default(), Par::Seq, stack, params)
            .map_err(|LltError::NonPositivePivot { index }| index)?;
        Ok(Array2::from_shape_fn((size, size), |(i, j)| a[(i, j)]))
    }

    fn to_faer(matrix: ArrayView2<'_, f64>) -> Mat<f64> {
        Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| matrix[[i, j]])
    }
}

#[cfg(feature = "lapack")]
mod lapack {
    use ndarray::{Array2, ArrayView2};
    use ndarray_linalg::{Cholesky, JobSvd, SVDDC, UPLO};

    use super::Backend;
    use crate::Svd;

    pub(crate) const BACKEND: Backend = Backend {
        name: "lapack",
        svd,
        cholesky,
    };

    /// `gesdd`: `gesvd` takes 30 times as long at 1024 x 1024.
    fn svd(matrix: ArrayView2<'_, f64>) -> Option<Svd> {
        let (u, s, vt) = matrix.to_owned().svddc(JobSvd::Some).ok()?;
        Some(Svd { u: u?, s, vt: vt? })
    }

    fn cholesky(matrix: ArrayView2<'_, f64>) -> Result<Array2<f64>, usize> {
        matrix
            .to_owned()
            .cholesky(UPLO::Lower)
            .map_err(|_| first_bad_pivot(matrix))
    }

    /// ndarray-linalg hides `potrf`'s answer: the definition, row by row, until a pivot is not above zero.
    fn first_bad_pivot(matrix: ArrayView2<'_, f64>) -> usize {
        let size = matrix.nrows();
        let mut lower = Array2::<f64>::zeros((size, size));
        for i in 0..size {
            for j in 0..=i {
                let sum: f64 = (0..j).map(|k| lower[[i, k]] * lower[[j, k]]).sum();
                let rest = matrix[[i, j]] - sum;
                if i != j {
                    lower[[i, j]] = rest / lower[[j, j]];
                } else if rest > 0.0 {
                    lower[[i, i]] = rest.sqrt();
                } else {
                    return i;
                }
            }
        }
        size - 1 // rounding let every pivot pass here: the last is the least certain
    }
}
