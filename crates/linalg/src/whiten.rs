//! Low rank where it counts: the truncation that loses least on the inputs, not in the weights.
//!
//! Laws: the loss of a rank is exactly the sum of the squared singular values that it leaves out; no matrix of that rank
//! loses less.

use ndarray::{Array2, ArrayView2, Axis, Slice};

use crate::backend::{Backend, DEFAULT};
use crate::cholesky::cholesky_on;
use crate::error::check_entries;
use crate::svd::svd_on;
use crate::triangular::{damped, invert_lower};
use crate::{Error, Svd};

/// `W·L = U·Σ·Vᵀ` with `C = L·Lᵀ`: whitened SVD (SVD-LLM; Wang et al., 2025).
#[derive(Debug, Clone, PartialEq)]
pub struct Whitened {
    svd: Svd,
    /// `L⁻¹`, lower triangular. `[n, n]`
    unwhiten: Array2<f64>,
}

/// Decomposes `matrix` `[m, n]` under `second` `[n, n]`, the second moment of its inputs, to whose diagonal `damping`
/// times its mean is added. Of what quantization left over (`W − Q`) the factors are the closed form of `W ≈ Q + A·B`
/// (QERA; Zhang et al., 2025).
///
/// # Errors
/// Entries that are not finite, sizes that do not fit; [`Error::NotPositiveDefinite`] where `damping` is too small.
pub fn whiten(matrix: ArrayView2<'_, f64>, second: ArrayView2<'_, f64>, damping: f64) -> Result<Whitened, Error> {
    whiten_on(DEFAULT, matrix, second, damping)
}

pub(crate) fn whiten_on(
    backend: Backend,
    matrix: ArrayView2<'_, f64>,
    second: ArrayView2<'_, f64>,
    damping: f64,
) -> Result<Whitened, Error> {
    check_entries(&matrix)?;
    check_entries(&second)?;
    let cols = matrix.ncols();
    if second.dim() != (cols, cols) {
        return Err(Error::Shape {
            what: "second moment",
            rows: second.nrows(),
            cols: second.ncols(),
            expected_rows: cols,
            expected_cols: cols,
        });
    }
    let lower = cholesky_on(backend, damped(second, damping).view())?;
    Ok(Whitened {
        svd: svd_on(backend, matrix.dot(&lower).view())?,
        unwhiten: invert_lower(lower.view())?,
    })
}

impl Whitened {
    /// The gain of each rank, descending: what the loss falls by when it is added. `[min(m, n)]`
    pub fn gains(&self) -> Vec<f64> {
        self.svd.s.iter().map(|s| s * s).collect()
    }

    /// `tr((W − W')·C·(W − W')ᵀ)` of the best `W'` of this rank, C damped.
    pub fn loss(&self, rank: usize) -> f64 {
        // Small ones first: a tail of many must not vanish beside its head.
        self.svd.s.iter().skip(rank).rev().map(|s| s * s).sum()
    }

    /// The best factors of `rank` (at most `min(m, n)`): left `[m, rank]`, right `[rank, n]`, each with the root of the
    /// singular values, so that neither is harder to quantize than the other.
    pub fn factors(&self, rank: usize) -> (Array2<f64>, Array2<f64>) {
        let first = Slice::from(..rank.min(self.svd.s.len()));
        let roots = self.svd.s.slice_axis(Axis(0), first).mapv(f64::sqrt);
        let left = &self.svd.u.slice_axis(Axis(1), first) * &roots;
        let right = &self.svd.vt.slice_axis(Axis(0), first) * &roots.insert_axis(Axis(1));
        (left, right.dot(&self.unwhiten))
    }
}

/// The largest rank at which two factors have fewer entries than the matrix `[rows, cols]`.
pub fn break_even(rows: usize, cols: usize) -> usize {
    (rows * cols).saturating_sub(1) / (rows + cols).max(1)
}

/// Low rank of a product `O·V` that is narrower between its factors than outside: the values of one attention head and
/// the output blocks of all heads that share them, stacked (COMCAT; Xiao et al., 2023). The product is truncated, not
/// the factors.
#[derive(Debug, Clone, PartialEq)]
pub struct Product {
    whitened: Whitened,
    /// Turns the small left factor back into rows of O. `[m, h]`
    basis: Array2<f64>,
}

/// Decomposes `outputs` `[m, h]` times `values` `[h, n]` under the inputs' second moment `[n, n]`.
///
/// # Errors
/// As [`whiten`].
pub fn whiten_product(
    outputs: ArrayView2<'_, f64>,
    values: ArrayView2<'_, f64>,
    second: ArrayView2<'_, f64>,
    damping: f64,
) -> Result<Product, Error> {
    if outputs.ncols() != values.nrows() {
        return Err(Error::Shape {
            what: "values",
            rows: values.nrows(),
            cols: values.ncols(),
            expected_rows: outputs.ncols(),
            expected_cols: values.ncols(),
        });
    }
    // O = U·S·Pᵀ with orthonormal U: what U stands before keeps its norm, so that only S·Pᵀ·V has to be truncated.
    let outputs = crate::svd(outputs)?;
    let inner = (&outputs.vt * &outputs.s.view().insert_axis(Axis(1))).dot(&values);
    Ok(Product {
        whitened: whiten(inner.view(), second, damping)?,
        basis: outputs.u,
    })
}

impl Product {
    /// As [`Whitened::gains`].
    pub fn gains(&self) -> Vec<f64> {
        self.whitened.gains()
    }

    /// As [`Whitened::loss`].
    pub fn loss(&self, rank: usize) -> f64 {
        self.whitened.loss(rank)
    }

    /// As [`Whitened::factors`]: new outputs `[m, rank]`, new values `[rank, n]`.
    pub fn factors(&self, rank: usize) -> (Array2<f64>, Array2<f64>) {
        let (left, right) = self.whitened.factors(rank);
        (self.basis.dot(&left), right)
    }
}
