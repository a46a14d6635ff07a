//! Laws of smaller experts on tiny cases.

use cotk_linalg::break_even;
use cotk_model::layers::Mlp;
use cotk_model::layers::linear::Linear;
use cotk_run::seeds::Seeds;
use ndarray::Array2;
use rand::RngExt;

use super::moments::{middle, moments};
use super::slim::{DAMPING, Slim, matrix, order, slim};

const HIDDEN: usize = 7;
const INNER: usize = 6;
const ROWS: usize = 90;

fn case(seed: u64) -> (Mlp, Vec<f32>, Vec<f64>) {
    let mut stream = Seeds::new(seed).stream("slim");
    let mut numbers = |count: usize| -> Vec<f32> { (0..count).map(|_| stream.random::<f32>() * 2.0 - 1.0).collect() };
    let mlp = Mlp {
        gate: Linear::new(numbers(INNER * HIDDEN), INNER, HIDDEN),
        up: Linear::new(numbers(INNER * HIDDEN), INNER, HIDDEN),
        down: Linear::new(numbers(HIDDEN * INNER), HIDDEN, INNER),
    };
    let x = numbers(ROWS * HIDDEN);
    let weights = numbers(ROWS).iter().map(|w| f64::from(w.abs()) + 0.1).collect();
    (mlp, x, weights)
}

fn error(a: &Mlp, b: &Mlp, x: &[f32], weights: &[f64]) -> f64 {
    let (a, b) = (a.apply(x), b.apply(x));
    let rows = a.chunks_exact(HIDDEN).zip(b.chunks_exact(HIDDEN)).zip(weights);
    rows.map(|((a, b), w)| w * a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>())
        .sum()
}

/// Law: the one channel that goes is the one whose absence, the others refitted, loses least of all; the loss said is the
/// loss that the outputs have, up to damping.
#[test]
fn the_first_channel_to_go_is_the_cheapest_of_all() {
    for seed in 0..5 {
        let (mlp, x, weights) = case(seed);
        let found = moments(&mlp, &x, &weights, false);
        let damped = found.middle.diag().sum() * DAMPING / INNER as f64;
        let hessian = &found.middle + &(Array2::<f64>::eye(INNER) * damped);
        let removals = order(&mlp, &found).unwrap();
        let down = matrix(&mlp.down);
        let loss = |gone: usize| -> f64 {
            let kept: Vec<usize> = (0..INNER).filter(|&c| c != gone).collect();
            // Least squares of down's outputs on the kept channels, by the normal equations.
            let all = hessian.select(ndarray::Axis(1), &kept);
            let own = all.select(ndarray::Axis(0), &kept);
            let fitted = down.dot(&all).dot(&cotk_linalg::invert_symmetric(own.view()).unwrap());
            let mut lost = down.clone();
            for (k, &c) in kept.iter().enumerate() {
                lost.column_mut(c).zip_mut_with(&fitted.column(k), |w, f| *w -= f);
            }
            (lost.dot(&hessian) * &lost).sum()
        };
        let losses: Vec<f64> = (0..INNER).map(loss).collect();
        let least = losses.iter().copied().fold(f64::INFINITY, f64::min);
        assert!((losses[removals[0].column] - least).abs() < 1e-9 * least);
        assert!(
            (removals[0].loss - least).abs() < 1e-6 * least,
            "{} {least}",
            removals[0].loss
        );
        let smaller = slim(&mlp, &Slim::Channels(INNER - 1), &found).unwrap().unwrap();
        assert_eq!(smaller.channels.as_ref().unwrap().len(), INNER - 1);
        let real = error(&mlp, &smaller.mlp, &x, &weights);
        assert!(
            real <= removals[0].loss * 1.0001 && real > 0.5 * removals[0].loss,
            "{real}"
        );
    }
}

/// Law: the error of a low-rank down projection on its own tokens is the tail of its singular values; plain truncation
/// is never better, and a rank from break-even on leaves the matrix whole.
#[test]
fn the_tail_of_the_singular_values_is_the_error() {
    let (mlp, x, weights) = case(7);
    let found = moments(&mlp, &x, &weights, true);
    for rank in 1..=break_even(INNER, HIDDEN) {
        let smaller = slim(&mlp, &Slim::Ranks([0, 0, rank]), &found).unwrap().unwrap();
        let plain = slim(&mlp, &Slim::PlainRanks([0, 0, rank]), &found).unwrap().unwrap();
        let whitened = cotk_linalg::whiten(matrix(&mlp.down).view(), found.middle.view(), DAMPING).unwrap();
        let real = error(&mlp, &smaller.mlp, &x, &weights);
        assert!(real <= whitened.loss(rank) * 1.001 && real > 0.7 * whitened.loss(rank));
        assert!(error(&mlp, &plain.mlp, &x, &weights) >= real * 0.999);
        let (right, left) = smaller.factors.unwrap();
        assert_eq!((left.inputs(), right.outputs()), (rank, rank));
    }
    let above = Slim::Ranks([break_even(INNER, HIDDEN) + 1; 3]);
    let same = slim(&mlp, &above, &found).unwrap().unwrap();
    assert!(same.factors.is_none() && same.mlp.gate.weights() == mlp.gate.weights());
}

/// Law: moments are the sums that they say, however rows are cut.
#[test]
fn moments_are_sums_over_rows() {
    let (mlp, x, weights) = case(3);
    let found = moments(&mlp, &x, &weights, true);
    let h = middle(&mlp, &x);
    for i in 0..INNER {
        for j in 0..INNER {
            let sum: f64 = (0..ROWS)
                .map(|row| weights[row] * f64::from(h[row * INNER + i]) * f64::from(h[row * INNER + j]))
                .sum();
            assert!((found.middle[[i, j]] - sum).abs() < 1e-4 * (1.0 + sum.abs()));
        }
    }
    assert_eq!(found.tokens, ROWS);
}
