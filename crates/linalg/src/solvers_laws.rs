//! Low rank, refits and removals against brute force.

use cotk_run::seeds::Seeds;
use ndarray::{Array2, ArrayView2, Axis, array};
use rand::RngExt;

use crate::backend::ALL;
use crate::whiten::whiten_on;
use crate::{Error, break_even, invert_symmetric, keep_columns, removal_order, ridge, svd, whiten, whiten_product};

fn draw(seed: u64, rows: usize, cols: usize) -> Array2<f64> {
    let mut stream = Seeds::new(seed).stream("solver law");
    Array2::from_shape_fn((rows, cols), |_| stream.random_range(-1.0..1.0))
}

/// Second moments of inputs that share directions.
fn moment(seed: u64, cols: usize) -> Array2<f64> {
    let x = draw(seed, 3 * cols, cols / 2 + 1).dot(&draw(seed + 1, cols / 2 + 1, cols))
        + draw(seed + 2, 3 * cols, cols) * 0.3;
    x.t().dot(&x)
}

fn damp(matrix: &Array2<f64>, damping: f64) -> Array2<f64> {
    let size = matrix.nrows() as f64;
    matrix + &(Array2::<f64>::eye(matrix.nrows()) * (damping * matrix.diag().sum() / size))
}

/// tr(E·H·Eᵀ)
fn loss(error: &Array2<f64>, hessian: &Array2<f64>) -> f64 {
    error.dot(hessian).iter().zip(error).map(|(a, b)| a * b).sum()
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-8 * (a.abs() + b.abs()) + 1e-10
}

#[test]
fn whitened_loss_is_the_tail_and_plain_svd_never_loses_less() {
    for (rows, cols) in [(7, 12), (12, 7), (9, 9), (1, 5)] {
        let (matrix, second) = (draw(1, rows, cols), moment(2, cols));
        let damped = damp(&second, 1e-4);
        let plain = svd(matrix.view()).unwrap();
        let mut first: Option<Vec<f64>> = None;
        for backend in ALL {
            let found = whiten_on(*backend, matrix.view(), second.view(), 1e-4).unwrap();
            for rank in 0..=rows.min(cols) {
                let (left, right) = found.factors(rank);
                assert_eq!((left.dim(), right.dim()), ((rows, rank), (rank, cols)));
                let own = loss(&(&matrix - &left.dot(&right)), &damped);
                assert!(
                    near(own, found.loss(rank)),
                    "{}, rank {rank}: {own} {}",
                    backend.name,
                    found.loss(rank)
                );
                assert!(own <= loss(&(&matrix - &plain.reconstruct(rank)), &damped) * (1.0 + 1e-9) + 1e-10);
            }
            let gains = found.gains();
            assert!(gains.windows(2).all(|p| p[0] >= p[1]) && near(gains.iter().sum(), found.loss(0)));
            let first = first.get_or_insert_with(|| gains.clone());
            assert!(first.iter().zip(&gains).all(|(a, b)| near(*a, *b)), "{}", backend.name);
        }
    }
    assert!(break_even(1408, 2048) == 834 && break_even(2, 2) == 0);
}

/// Of many matrices of the rank, none near the answer and none elsewhere loses less.
#[test]
fn no_correction_of_that_rank_is_better() {
    let (matrix, second) = (draw(3, 6, 8), moment(4, 8));
    let quantized = matrix.mapv(|w| (w * 2.0).round() / 2.0);
    let residual = &matrix - &quantized;
    let damped = damp(&second, 1e-6);
    let (left, right) = whiten(residual.view(), second.view(), 1e-6).unwrap().factors(2);
    let best = loss(&(&residual - &left.dot(&right)), &damped);
    assert!(best < loss(&residual, &damped));
    for seed in 0..200 {
        let size = [1e-3, 0.1][seed as usize % 2];
        let (l, r) = (
            &left + &(draw(seed, 6, 2) * size),
            &right + &(draw(seed + 500, 2, 8) * size),
        );
        assert!(loss(&(&residual - &l.dot(&r)), &damped) >= best * (1.0 - 1e-9));
    }
}

#[test]
fn a_product_is_truncated_as_a_whole() {
    // Two heads of 5 outputs share values of width 4 on 9 inputs.
    let (outputs, values, second) = (draw(5, 10, 4), draw(6, 4, 9), moment(7, 9));
    let whole = outputs.dot(&values);
    let found = whiten_product(outputs.view(), values.view(), second.view(), 1e-4).unwrap();
    let direct = whiten(whole.view(), second.view(), 1e-4).unwrap();
    for rank in 0..=4 {
        let (left, right) = found.factors(rank);
        assert_eq!((left.dim(), right.dim()), ((10, rank), (rank, 9)));
        let own = loss(&(&whole - &left.dot(&right)), &damp(&second, 1e-4));
        assert!(
            near(own, found.loss(rank)) && near(own, direct.loss(rank)),
            "{rank}: {own} {}",
            direct.loss(rank)
        );
    }
    assert!(found.loss(4) < 1e-9);
    assert!(whiten_product(outputs.view(), draw(6, 3, 9).view(), second.view(), 1e-4).is_err());
}

#[test]
fn a_refit_has_no_gradient_and_goes_from_the_data_to_the_prior() {
    let (x, y, prior) = (draw(8, 40, 6), draw(9, 40, 3), draw(10, 3, 6));
    let (gram, cross) = (x.t().dot(&x), y.t().dot(&x));
    for lambda in [0.0, 1e-3, 1.0] {
        let fitted = ridge(gram.view(), cross.view(), prior.view(), lambda).unwrap();
        let pull = lambda * gram.diag().sum() / 6.0;
        let gradient = fitted.dot(&gram) - &cross + (&fitted - &prior) * pull;
        assert!(gradient.iter().all(|g| g.abs() < 1e-9), "{lambda}: {gradient}");
    }
    let far = ridge(gram.view(), cross.view(), prior.view(), 1e12).unwrap();
    assert!((far - &prior).iter().all(|d| d.abs() < 1e-9));
    let few = draw(11, 2, 6);
    assert!(ridge(few.t().dot(&few).view(), cross.view(), prior.view(), 0.0).is_err());
    assert!(ridge(gram.view(), cross.t(), prior.view(), 1.0).is_err());
    assert!(ridge(gram.view(), cross.view(), prior.t(), 1.0).is_err());
}

/// Least squares on `kept` by the normal equations of an explicit basis.
fn brute(weights: &Array2<f64>, hessian: &Array2<f64>, kept: &[usize]) -> f64 {
    if kept.is_empty() {
        return loss(weights, hessian);
    }
    let own = hessian.select(Axis(0), kept).select(Axis(1), kept);
    let fitted = weights
        .dot(&hessian.select(Axis(1), kept))
        .dot(&invert_symmetric(own.view()).unwrap());
    let mut error = weights.clone();
    for (k, &c) in kept.iter().enumerate() {
        error.column_mut(c).zip_mut_with(&fitted.column(k), |w, f| *w -= f);
    }
    loss(&error, hessian)
}

#[test]
fn removals_lose_what_least_squares_on_the_rest_loses_and_each_is_the_least() {
    let (rows, cols) = (5, 12);
    let (weights, second) = (draw(12, rows, cols), moment(13, cols));
    let hessian = damp(&second, 0.01);
    let removals = removal_order(weights.view(), second.view(), 0.01, 0).unwrap();
    let mut kept: Vec<usize> = (0..cols).collect();
    for removal in &removals {
        let without = |c: usize| kept.iter().copied().filter(|&k| k != c).collect::<Vec<_>>();
        let best = kept
            .iter()
            .map(|&c| brute(&weights, &hessian, &without(c)))
            .fold(f64::INFINITY, f64::min);
        kept = without(removal.column);
        assert!(near(removal.loss, best), "{removal:?}: {best}");
        if !kept.is_empty() {
            let (fitted, own) = keep_columns(weights.view(), second.view(), 0.01, &kept).unwrap();
            assert!(near(own, best) && fitted.dim() == (rows, kept.len()));
        }
    }
    assert!(near(removals[cols - 1].loss, loss(&weights, &hessian)));
    let some = removal_order(weights.view(), second.view(), 0.01, 8).unwrap();
    assert_eq!(some, removals[..4]);
}

#[test]
fn channels_that_never_fire_or_that_others_repeat_go_for_nothing() {
    let mut x = draw(14, 60, 6);
    x.column_mut(2).fill(0.0);
    let copy = x.column(1).to_owned() * 2.0;
    x.column_mut(4).assign(&copy);
    let weights = draw(15, 4, 6);
    let removals = removal_order(weights.view(), x.t().dot(&x).view(), 1e-9, 3).unwrap();
    assert!(removals[1].loss < 1e-6 && removals[2].loss > 1e-2, "{removals:?}");
    let mut first: Vec<usize> = removals[..2].iter().map(|r| r.column).collect();
    first.sort_unstable();
    assert!(first == [1, 2] || first == [2, 4], "{first:?}");
}

#[test]
fn what_does_not_fit_is_named() {
    let (weights, square) = (array![[1.0, 2.0]], array![[1.0]]);
    let shape = |what| Error::Shape {
        what,
        rows: 1,
        cols: 1,
        expected_rows: 2,
        expected_cols: 2,
    };
    let of = |w: ArrayView2<'_, f64>| removal_order(w, square.view(), 0.1, 0).unwrap_err();
    assert_eq!(of(weights.view()), shape("Hessian"));
    assert_eq!(
        whiten(weights.view(), square.view(), 0.1).unwrap_err(),
        shape("second moment")
    );
    let eye = Array2::eye(2);
    assert_eq!(
        keep_columns(weights.view(), eye.view(), 0.1, &[]).unwrap_err(),
        Error::Empty { rows: 1, cols: 0 }
    );
    assert!(matches!(of(array![[f64::NAN, 1.0]].view()), Error::NotFinite { .. }));
}
