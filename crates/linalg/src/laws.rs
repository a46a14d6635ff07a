//! One law for every backend that is built in, and for the errors that all share.

use cotk_run::seeds::Seeds;
use ndarray::{Array2, ArrayView2, array};
use proptest::prelude::*;
use rand::RngExt;

use crate::backend::ALL;
use crate::cholesky::cholesky_on;
use crate::svd::svd_on;
use crate::{Error, cholesky, invert_lower, invert_symmetric, svd};

/// Entries between -1 and 1; `rank` below both sides makes it singular.
fn draw(seed: u64, rows: usize, cols: usize, rank: usize) -> Array2<f64> {
    let mut stream = Seeds::new(seed).stream("linalg law");
    let mut side = |r: usize, c: usize| Array2::from_shape_fn((r, c), |_| stream.random_range(-1.0..1.0));
    side(rows, rank).dot(&side(rank, cols))
}

fn largest(matrix: ArrayView2<'_, f64>) -> f64 {
    matrix.iter().fold(0.0, |best: f64, x| best.max(x.abs()))
}

/// Backward stable factors of an n x n matrix are good to a small multiple of n·eps·|A| (Higham, 2002, ch. 10 and 20).
fn tolerance(matrix: ArrayView2<'_, f64>) -> f64 {
    let side = matrix.nrows().max(matrix.ncols()) as f64;
    50.0 * side * f64::EPSILON * (1.0 + side * largest(matrix))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn svd_multiplies_back_is_orthonormal_and_descends(
        seed in any::<u64>(), rows in 1usize..40, cols in 1usize..40, rank in 1usize..12, scale in -12i32..12,
    ) {
        let matrix = draw(seed, rows, cols, rank) * 10f64.powi(scale);
        let mut values = Vec::new();
        for backend in ALL {
            let factors = svd_on(*backend, matrix.view()).unwrap();
            let k = rows.min(cols);
            prop_assert_eq!(factors.u.dim(), (rows, k));
            prop_assert_eq!(factors.vt.dim(), (k, cols));
            let relative = tolerance(matrix.view()) * 10f64.powi(scale).max(1.0);
            prop_assert!(largest((factors.reconstruct(k) - &matrix).view()) <= relative, "{}", backend.name);
            let identity = Array2::<f64>::eye(k);
            let unit = tolerance(identity.view());
            prop_assert!(largest((factors.u.t().dot(&factors.u) - &identity).view()) <= unit, "{}", backend.name);
            prop_assert!(largest((factors.vt.dot(&factors.vt.t()) - &identity).view()) <= unit, "{}", backend.name);
            prop_assert!(factors.s.iter().all(|&s| s >= 0.0));
            prop_assert!(factors.s.windows(2).into_iter().all(|pair| pair[0] >= pair[1]), "{}", factors.s);
            let past = factors.s.iter().skip(rank).fold(0.0f64, |a, &b| a.max(b));
            prop_assert!(past <= relative, "rank {} left {}", rank, past);
            values.push(factors.s);
        }
        for other in &values[1..] {
            prop_assert!(values[0].iter().zip(other).all(|(a, b)| (a - b).abs() <= 1e-11 * values[0][0]));
        }
    }

    #[test]
    fn cholesky_multiplies_back_and_is_lower(seed in any::<u64>(), size in 1usize..80) {
        let half = draw(seed, size, size + 3, size + 3);
        let mut matrix = half.dot(&half.t());
        matrix.diag_mut().map_inplace(|d| *d += 0.1);
        for backend in ALL {
            let mut upper_garbage = matrix.clone();
            for ((row, col), entry) in upper_garbage.indexed_iter_mut() {
                if col > row { *entry = 77.0; }
            }
            let lower = cholesky_on(*backend, upper_garbage.view()).unwrap();
            prop_assert!(largest((lower.dot(&lower.t()) - &matrix).view()) <= tolerance(matrix.view()), "{}", backend.name);
            let is_lower = lower.indexed_iter().all(|((row, col), &x)| (col <= row || x == 0.0) && (col != row || x > 0.0));
            prop_assert!(is_lower, "{}", backend.name);
        }
    }

    #[test]
    fn a_pivot_below_zero_is_named(seed in any::<u64>(), size in 1usize..60, at in 0usize..60) {
        let at = at % size;
        let mut lower = draw(seed, size, size, size);
        for ((row, col), entry) in lower.indexed_iter_mut() {
            if col > row { *entry = 0.0; } else if col == row { *entry = 1.0 + entry.abs(); }
        }
        let mut signs = Array2::<f64>::eye(size);
        signs[[at, at]] = -1.0;
        let matrix = lower.dot(&signs).dot(&lower.t());
        for backend in ALL {
            prop_assert_eq!(
                cholesky_on(*backend, matrix.view()),
                Err(Error::NotPositiveDefinite { pivot: at, size }), "{}", backend.name
            );
        }
    }

    #[test]
    fn what_is_not_finite_is_named(rows in 1usize..9, cols in 1usize..9, at in 0usize..81, kind in 0usize..3) {
        let mut matrix = draw(1, rows, cols, 3);
        let (row, col) = (at / 9 % rows, at % 9 % cols);
        matrix[[row, col]] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][kind];
        for error in [svd(matrix.view()).unwrap_err(), cholesky(matrix.view()).unwrap_err()] {
            let Error::NotFinite { row: r, col: c, .. } = error else { panic!("{error}") };
            prop_assert_eq!((r, c), (row, col));
        }
    }
}

#[test]
fn an_inverse_times_its_matrix_is_the_identity() {
    for size in [1, 2, 63, 64, 65, 150, 260] {
        let half = draw(size as u64, size, size + 3, size + 3);
        let mut matrix = half.dot(&half.t());
        matrix.diag_mut().map_inplace(|d| *d += size as f64);
        let lower = cholesky(matrix.view()).unwrap();
        let (inverse, whole) = (
            invert_lower(lower.view()).unwrap(),
            invert_symmetric(matrix.view()).unwrap(),
        );
        let identity = Array2::<f64>::eye(size);
        assert!(largest((inverse.dot(&lower) - &identity).view()) < 1e-11, "{size}");
        assert!(largest((whole.dot(&matrix) - &identity).view()) < 1e-11, "{size}");
        assert!(inverse.indexed_iter().all(|((row, col), &x)| col <= row || x == 0.0));
    }
    let flat = array![[1.0, 0.0], [3.0, 0.0]];
    assert_eq!(
        invert_lower(flat.view()),
        Err(Error::NotPositiveDefinite { pivot: 1, size: 2 })
    );
    assert_eq!(
        invert_lower(flat.t().split_at(ndarray::Axis(0), 1).0),
        Err(Error::NotSquare { rows: 1, cols: 2 })
    );
}

#[test]
fn empty_and_oblong_are_refused() {
    let empty = Array2::<f64>::zeros((0, 3));
    assert_eq!(svd(empty.view()), Err(Error::Empty { rows: 0, cols: 3 }));
    assert_eq!(cholesky(empty.view()), Err(Error::Empty { rows: 0, cols: 3 }));
    assert_eq!(
        cholesky(array![[1.0, 0.0]].view()),
        Err(Error::NotSquare { rows: 1, cols: 2 })
    );
}

#[test]
fn truncation_is_the_nearest_matrix_of_its_rank() {
    let matrix = draw(5, 12, 9, 9);
    let factors = svd(matrix.view()).unwrap();
    for rank in 0..=9 {
        let error: f64 = (factors.reconstruct(rank) - &matrix).iter().map(|x| x * x).sum();
        let left: f64 = factors.s.iter().skip(rank).map(|s| s * s).sum();
        assert!((error - left).abs() < 1e-10, "rank {rank}: {error} {left}");
    }
}

#[test]
fn one_input_has_one_answer_bit_for_bit() {
    let matrix = draw(7, 70, 90, 70);
    assert_eq!(svd(matrix.view()), svd(matrix.as_standard_layout().view()));
    assert_eq!(svd(matrix.view()), svd(matrix.t().to_owned().t()));
}
