//! Removing inputs of a matrix one by one while those that stay take over: Optimal Brain Surgeon (Hassibi and Stork,
//! 1993) on whole columns. An expert's inner channels are the columns of its down projection.
//!
//! Laws: the losses along the order are those of the least squares fit on what is kept; what is kept is fitted anew, so
//! rounding along the order does not reach it.

use ndarray::{Array2, ArrayView2};

use crate::error::check_entries;
use crate::triangular::{damped, invert_lower, invert_symmetric};
use crate::{Error, cholesky};

/// One column that went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Removal {
    pub column: usize,
    /// `tr(Δ·H·Δᵀ)` once this column and all before it are gone and the others have taken over.
    pub loss: f64,
}

/// The order in which columns of `weights` `[rows, cols]` go: at each step the one whose loss, after the others have
/// taken over, is least (the lower one of equals), until `keep` are left. `hessian` is `Σ w·x·xᵀ` of the inputs
/// `[cols, cols]`, to whose diagonal `damping` times its mean is added; losses are under that sum.
///
/// Time `cols² · (rows + cols) / 2` multiply-adds when all go.
///
/// # Errors
/// Entries that are not finite, sizes that do not fit; [`Error::NotPositiveDefinite`] where `damping` is too small.
pub fn removal_order(
    weights: ArrayView2<'_, f64>,
    hessian: ArrayView2<'_, f64>,
    damping: f64,
    keep: usize,
) -> Result<Vec<Removal>, Error> {
    let (rows, cols) = check(&weights, &hessian)?;
    // By columns of `weights`, so that taking over runs along memory.
    let mut columns: Vec<f64> = weights.t().iter().copied().collect();
    let mut inverse = invert_symmetric(damped(hessian, damping).view())?;
    let mut alive: Vec<usize> = (0..cols).collect();
    let mut removals = Vec::with_capacity(cols.saturating_sub(keep));
    let mut loss = 0.0;
    while alive.len() > keep {
        let saliency = |c: usize| {
            let square: f64 = columns[c * rows..][..rows].iter().map(|w| w * w).sum();
            square / inverse[[c, c]]
        };
        let scores: Vec<f64> = alive.iter().map(|&c| saliency(c)).collect();
        let least = (0..alive.len()).min_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        let least = least.expect("more than `keep` are left");
        loss += scores[least];
        let gone = alive.remove(least);
        removals.push(Removal { column: gone, loss });
        let pivot = inverse[[gone, gone]];
        let row: Vec<f64> = inverse.row(gone).to_vec();
        let leaving = columns[gone * rows..][..rows].to_vec();
        for &c in &alive {
            let share = row[c] / pivot;
            columns[c * rows..][..rows]
                .iter_mut()
                .zip(&leaving)
                .for_each(|(w, l)| *w -= share * l);
            inverse
                .row_mut(c)
                .iter_mut()
                .zip(&row)
                .for_each(|(x, r)| *x -= share * r);
        }
    }
    Ok(removals)
}

/// The weights `[rows, kept]` on columns `kept` that lose least, and that loss: `W·H[:, K]·H[K, K]⁻¹` under the damped
/// Hessian of [`removal_order`].
///
/// # Errors
/// As [`removal_order`]; [`Error::Empty`] where nothing is kept.
///
/// # Panics
/// A column that is out of range.
pub fn keep_columns(
    weights: ArrayView2<'_, f64>,
    hessian: ArrayView2<'_, f64>,
    damping: f64,
    kept: &[usize],
) -> Result<(Array2<f64>, f64), Error> {
    let (rows, cols) = check(&weights, &hessian)?;
    if kept.is_empty() {
        return Err(Error::Empty { rows, cols: 0 });
    }
    let hessian = damped(hessian, damping);
    let seen = hessian.select(ndarray::Axis(1), kept);
    let own = seen.select(ndarray::Axis(0), kept);
    let inverse = invert_lower(cholesky(own.view())?.view())?;
    let fitted = weights.dot(&seen).dot(&inverse.t()).dot(&inverse);
    let mut lost = weights.to_owned();
    for (k, &col) in kept.iter().enumerate() {
        lost.column_mut(col).zip_mut_with(&fitted.column(k), |w, f| *w -= f);
    }
    debug_assert_eq!(lost.ncols(), cols);
    let loss = lost.dot(&hessian).iter().zip(&lost).map(|(a, b)| a * b).sum();
    Ok((fitted, loss))
}

fn check(weights: &ArrayView2<'_, f64>, hessian: &ArrayView2<'_, f64>) -> Result<(usize, usize), Error> {
    check_entries(weights)?;
    check_entries(hessian)?;
    let (rows, cols) = weights.dim();
    if hessian.dim() != (cols, cols) {
        return Err(Error::Shape {
            what: "Hessian",
            rows: hessian.nrows(),
            cols: hessian.ncols(),
            expected_rows: cols,
            expected_cols: cols,
        });
    }
    Ok((rows, cols))
}
