//! What all codes of all matrices with the same inputs share: the order of columns and the inverse Hessian's factor.
//! Law: `UᵀU` is the inverse of the damped Hessian in that order.

use cotk_linalg::{cholesky, invert_lower};
use ndarray::{Array2, ArrayView2};

use crate::QuantError;

/// Share of the mean diagonal that is added to the diagonal unless the caller says otherwise (Frantar et al., 2023).
pub const DAMPING: f64 = 0.01;
/// Factors of ten that damping may grow by until the matrix is positive definite.
const TRIES: i32 = 6;

/// A Hessian made ready for [`super::solve`]. Gate and up of an expert share one.
#[derive(Debug, Clone)]
pub struct Factor {
    /// The Hessian as it was given: losses are measured with it.
    pub(super) hessian: Array2<f64>,
    /// Its diagonal; where that is 0, its mean.
    pub(super) importance: Vec<f64>,
    /// The column at each position: descending diagonal, the lower column first where equal.
    pub(super) order: Vec<usize>,
    /// `U`, upper triangular, rows and columns by position.
    pub(super) upper: Array2<f32>,
    damping: f64,
    dead: usize,
}

impl Factor {
    /// `hessian` is `Σ w·x·xᵀ` over the inputs `[cols, cols]`, symmetric; its scale does not matter. `damping` is a
    /// share of the mean diagonal ([`DAMPING`]); it grows tenfold until Cholesky passes. An input that never moves (0
    /// on the diagonal) counts as an average one, so that its weights are rounded, not lost; a Hessian of zeros is the
    /// identity.
    ///
    /// # Errors
    /// Not square, not finite, a diagonal or damping below 0, or not positive definite however damped.
    pub fn try_new(hessian: ArrayView2<'_, f64>, damping: f64) -> Result<Self, QuantError> {
        let (rows, cols) = hessian.dim();
        if rows != cols {
            return Err(QuantError::Length {
                what: "columns of the Hessian (its rows: expected)",
                found: cols,
                expected: rows,
            });
        }
        let bad = |what, found| Err(QuantError::Hessian { what, found });
        if let Some(x) = hessian.iter().find(|x| !x.is_finite()) {
            return bad("an entry", *x);
        }
        if let Some(x) = hessian.diag().iter().find(|x| **x < 0.0) {
            return bad("the diagonal", *x);
        }
        if !damping.is_finite() || damping < 0.0 {
            return bad("the damping", damping);
        }
        let mut importance = hessian.diag().to_vec();
        let dead = importance.iter().filter(|&&x| x == 0.0).count();
        #[expect(clippy::cast_precision_loss, reason = "counts of columns")]
        let alive_mean = importance.iter().sum::<f64>() / (cols - dead).max(1) as f64;
        let mean = if alive_mean > 0.0 { alive_mean } else { 1.0 };
        importance.iter_mut().filter(|x| **x == 0.0).for_each(|x| *x = mean);

        let mut order: Vec<usize> = (0..cols).collect();
        order.sort_by(|&a, &b| hessian[[b, b]].total_cmp(&hessian[[a, a]]));
        // With positions reversed H = M·Mᵀ, so in order H = R·Rᵀ with R upper and U = R⁻¹: no inverse is ever formed.
        let reversed = |i: usize| order[cols - 1 - i];
        let mut matrix = Array2::from_shape_fn((cols, cols), |(i, j)| hessian[[reversed(i), reversed(j)]]);
        for (i, d) in matrix.diag_mut().iter_mut().enumerate() {
            *d = importance[reversed(i)];
        }
        let mut last = None;
        for attempt in 0..TRIES {
            let damping = damping * 10f64.powi(attempt);
            let mut damped = matrix.clone();
            damped.diag_mut().map_inplace(|d| *d += damping * mean);
            match cholesky(damped.view()) {
                Ok(lower) => {
                    let inverse = invert_lower(lower.view())?;
                    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
                    let upper =
                        Array2::from_shape_fn((cols, cols), |(i, j)| inverse[[cols - 1 - i, cols - 1 - j]] as f32);
                    return Ok(Self {
                        hessian: hessian.to_owned(),
                        importance,
                        order,
                        upper,
                        damping,
                        dead,
                    });
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("at least one try").into())
    }

    /// Inputs of the matrices that it serves.
    pub fn cols(&self) -> usize {
        self.order.len()
    }

    /// The share of the mean diagonal that it took.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// Inputs that never moved.
    pub fn dead(&self) -> usize {
        self.dead
    }

    /// The Hessian as it was given.
    pub fn hessian(&self) -> ArrayView2<'_, f64> {
        self.hessian.view()
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn u_is_the_factor_of_the_damped_inverse_in_order() {
        let hessian = array![[2.0, 0.3, -0.4], [0.3, 5.0, 0.9], [-0.4, 0.9, 1.0]];
        let factor = Factor::try_new(hessian.view(), 0.1).unwrap();
        assert_eq!(factor.order, [1, 0, 2]);
        let damp = 0.1 * 8.0 / 3.0;
        let damped = Array2::from_shape_fn((3, 3), |(i, j)| {
            hessian[[factor.order[i], factor.order[j]]] + if i == j { damp } else { 0.0 }
        });
        let upper = factor.upper.mapv(f64::from);
        let product = upper.t().dot(&upper).dot(&damped);
        for ((i, j), x) in product.indexed_iter() {
            assert!((x - f64::from(u8::from(i == j))).abs() < 1e-6);
            assert!(j >= i || upper[[i, j]] == 0.0);
        }
    }

    #[test]
    fn dead_inputs_empty_and_singular_hessians_pass_and_nonsense_is_named() {
        let zeros = Factor::try_new(Array2::zeros((4, 4)).view(), 0.01).unwrap();
        assert_eq!(
            (zeros.dead(), zeros.order.as_slice()),
            (4, [0usize, 1, 2, 3].as_slice())
        );
        let ones = Factor::try_new(Array2::from_elem((4, 4), 1.0).view(), 0.0001).unwrap();
        assert_eq!((ones.dead(), ones.damping()), (0, 0.0001));
        let mut one_dead = Array2::from_elem((3, 3), 1.0);
        one_dead.row_mut(1).fill(0.0);
        one_dead.column_mut(1).fill(0.0);
        let one_dead = Factor::try_new(one_dead.view(), 0.01).unwrap();
        assert_eq!(
            (one_dead.dead(), one_dead.order.as_slice()),
            (1, [0usize, 2, 1].as_slice())
        );
        for (hessian, expect) in [
            (array![[1.0, 0.0]], "columns of the Hessian"),
            (array![[f64::NAN]], "an entry of the Hessian is NaN"),
            (array![[-1.0]], "the diagonal of the Hessian is -1"),
        ] {
            let error = Factor::try_new(hessian.view(), 0.01).unwrap_err().to_string();
            assert!(error.starts_with(expect), "{error}");
        }
        assert!(Factor::try_new(array![[1.0, 3.0], [3.0, 1.0]].view(), 0.0).is_err());
        assert!(Factor::try_new(array![[1.0]].view(), -1.0).is_err());
    }
}
