//! The laws of the solver against brute force and against rounding to nearest.

use ndarray::Array2;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::code::Code;
use crate::encode::encode;
use crate::layout::{ScaleForm, WHOLE_ROW};

/// Bell-shaped weights.
fn bell(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    (0..count)
        .map(|_| (0..4).map(|_| rng.random_range(-0.05f32..0.05)).sum())
        .collect()
}

/// Second moments of inputs that share a few directions, of sizes that differ.
fn correlated(cols: usize, seed: u64) -> Array2<f64> {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    let mut draw = |r: usize, c: usize| Array2::from_shape_fn((r, c), |_| rng.random_range(-1.0..1.0));
    let (shared, mixing, own) = (
        draw(3 * cols, cols.div_ceil(4)),
        draw(cols.div_ceil(4), cols),
        draw(3 * cols, cols),
    );
    let size = Array2::from_shape_fn((1, cols), |(_, c)| 0.3 + (c * 7 % 5) as f64);
    let x = (shared.dot(&mixing) + own * 0.5) * size;
    x.t().dot(&x) / (3 * cols) as f64
}

fn solved(weights: &[f32], format: MatrixFormat, hessian: &Array2<f64>, settings: &Settings) -> Solution {
    solve(
        weights,
        format,
        &Factor::try_new(hessian.view(), DAMPING).unwrap(),
        settings,
    )
    .unwrap()
}

fn formats() -> Vec<MatrixFormat> {
    let shapes = [(5, 40, 32), (70, 129, 64), (17, 96, 32), (3, 130, 128)];
    let all = Code::ALL
        .into_iter()
        .flat_map(|code| shapes.map(|(r, c, g)| MatrixFormat::try_new(r, c, code, g)));
    let more = [
        (Bits::B1, WHOLE_ROW, ScaleForm::F16),
        (Bits::B2, 16, ScaleForm::TwoLevel),
        (Bits::B4, 32, ScaleForm::TwoLevel),
    ];
    let more = more.map(|(b, g, s)| MatrixFormat::try_with_scales(66, 136, Code::Plain(b), g, s));
    all.chain(more).map(Result::unwrap).collect()
}

#[test]
fn losses_are_those_of_what_decodes() {
    for format in formats() {
        let (weights, hessian) = (bell(format.rows() * format.cols(), 1), correlated(format.cols(), 2));
        for &first in format.code().prefixes() {
            let found = solved(&weights, format, &hessian, &Settings::new(first));
            let brute = losses(&weights, &found.coded, hessian.view()).unwrap();
            for (a, b) in found.losses.iter().zip(&brute) {
                assert_eq!(a.bits, b.bits);
                assert!(
                    (a.loss - b.loss).abs() <= 1e-4 * b.loss + 1e-11 * found.whole,
                    "{format:?} {a:?} {b:?}"
                );
            }
            assert!(found.relative() < if format.code().full() == Bits::B1 { 0.6 } else { 0.3 });
        }
    }
}

#[test]
fn a_loss_is_the_sum_of_squared_output_errors() {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(3);
    let x = Array2::from_shape_fn((50, 40), |_| rng.random_range(-1.0f64..1.0));
    let m = bell(80, 4);
    let hessian = x.t().dot(&x);
    let outputs = (0..50).flat_map(|t| (0..2).map(move |r| (t, r)));
    let direct: f64 = outputs
        .map(|(t, r)| {
            (0..40)
                .map(|c| x[[t, c]] * f64::from(m[r * 40 + c]))
                .sum::<f64>()
                .powi(2)
        })
        .sum();
    assert!((weighted_square(&m, hessian.view()).unwrap() / direct - 1.0).abs() < 1e-12);
    assert!(weighted_square(&m[1..], hessian.view()).is_err());
}

#[test]
fn feedback_loses_less_than_rounding_to_nearest() {
    for format in formats() {
        for seed in 0..3 {
            let (weights, hessian) = (
                bell(format.rows() * format.cols(), seed),
                correlated(format.cols(), seed + 9),
            );
            let nearest = losses(&weights, &encode(&weights, format).unwrap(), hessian.view()).unwrap();
            for rounds in [0, 1] {
                let settings = Settings {
                    refit_rounds: rounds,
                    ..Settings::new(format.code().full())
                };
                let found = solved(&weights, format, &hessian, &settings);
                let (own, nearest) = (found.losses.last().unwrap(), nearest.last().unwrap());
                assert!(
                    own.loss < nearest.loss,
                    "{format:?}, {rounds} rounds: {own:?} {nearest:?}"
                );
            }
        }
    }
}

/// All codes of one row, tried.
fn exhaustive(weights: &[f32], hessian: &Array2<f64>, levels: &[f32]) -> f64 {
    let cols = weights.len();
    let mut best = f64::INFINITY;
    for mut n in 0..levels.len().pow(cols as u32) {
        let error: Vec<f32> = weights
            .iter()
            .map(|w| {
                let level = levels[n % levels.len()];
                n /= levels.len();
                w - level
            })
            .collect();
        best = best.min(weighted_square(&error, hessian.view()).unwrap());
    }
    best
}

#[test]
fn under_a_diagonal_hessian_codes_are_the_best_there_are_and_else_never_better() {
    let format = MatrixFormat::try_new(1, 6, Code::Plain(Bits::B2), 32).unwrap();
    let mut gaps = [0.0f64; 2];
    for seed in 0..30 {
        let weights = bell(6, seed);
        let full = correlated(6, seed);
        let diagonal = Array2::from_diag(&full.diag());
        for (kind, hessian) in [diagonal, full].into_iter().enumerate() {
            let settings = Settings {
                refit_rounds: 0,
                ..Settings::new(Bits::B2)
            };
            let settings = Settings {
                refit_rounds: kind,
                ..settings
            };
            let found = solved(&weights, format, &hessian, &settings);
            let prefix = found.coded.prefix(Bits::B2).unwrap();
            let levels: Vec<f32> = (0..4).map(|u| prefix.scale_at(0, 0) * (u as f32 - 2.0)).collect();
            let best = exhaustive(&weights, &hessian, &levels);
            assert!(found.losses[0].loss >= best * (1.0 - 1e-4));
            gaps[kind] += found.losses[0].loss / best - 1.0;
        }
    }
    assert!(gaps[0] < 1e-3 && gaps[1] / 30.0 < 0.5, "{gaps:?}");
}

#[test]
fn more_factors_and_more_rounds_never_cost_loss() {
    let format = MatrixFormat::try_new(66, 128, Code::Plain(Bits::B2), 64).unwrap();
    let (weights, hessian) = (bell(66 * 128, 5), correlated(128, 6));
    let loss = |factors: &[f32], refit_rounds| {
        let settings = Settings {
            scale_factors: factors.to_vec(),
            refit_rounds,
            ..Settings::new(Bits::B2)
        };
        solved(&weights, format, &hessian, &settings).losses[0].loss
    };
    assert!(loss(&[1.0, 1.15, 1.3], 0) < loss(&[1.0], 0));
    assert!(loss(&[1.0, 1.15, 1.3], 1) < loss(&[1.0], 1));
    assert!(loss(&[1.0], 2) <= loss(&[1.0], 1) && loss(&[1.0], 1) < loss(&[1.0], 0));
}

#[test]
fn what_is_solved_first_is_best() {
    for (code, narrow) in [
        (Code::Nested224, Bits::B2),
        (Code::Nested224, Bits::B4),
        (Code::Nested44, Bits::B4),
    ] {
        let format = MatrixFormat::try_new(40, 128, code, 32).unwrap();
        let (weights, hessian) = (bell(40 * 128, 7), correlated(128, 8));
        let by = |first| solved(&weights, format, &hessian, &Settings::new(first)).losses;
        let (base, full) = (by(narrow), by(Bits::B8));
        let at = code.prefix_index(narrow).unwrap();
        assert!(base[at].loss < full[at].loss, "{code} {base:?} {full:?}");
        assert!(base.last().unwrap().loss > full.last().unwrap().loss);
        assert!(base.windows(2).all(|pair| pair[1].loss < pair[0].loss));
    }
}

#[test]
fn the_thread_count_changes_no_bit_and_rows_do_not_see_each_other() {
    let format = |rows| MatrixFormat::try_new(rows, 160, Code::Nested224, 32).unwrap();
    let (weights, hessian) = (bell(150 * 160, 7), correlated(160, 8));
    let settings = Settings {
        scale_factors: vec![1.0, 1.2],
        ..Settings::new(Bits::B4)
    };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| solved(&weights, format(150), &hessian, &settings))
    };
    let one = run(1);
    assert_eq!(one, run(3));
    let first = solved(&weights[..64 * 160], format(64), &hessian, &settings);
    let (all, part) = (
        one.coded.prefix(Bits::B8).unwrap(),
        first.coded.prefix(Bits::B8).unwrap(),
    );
    for row in 0..64 {
        assert!((0..160).all(|col| all.code_at(row, col) == part.code_at(row, col)));
        assert!((0..5).all(|group| all.scale_at(row, group) == part.scale_at(row, group)));
    }
}

#[test]
fn zeros_dead_inputs_and_no_inputs_at_all_are_coded() {
    for code in Code::ALL {
        let format = MatrixFormat::try_new(4, 50, code, 32).unwrap();
        let none = Array2::zeros((50, 50));
        let zeros = solved(&[0.0; 200], format, &none, &Settings::new(code.full()));
        assert!(
            decode(&zeros.coded.prefix(code.full()).unwrap())
                .iter()
                .all(|w| *w == 0.0),
            "{code}"
        );
        assert_eq!((zeros.relative(), zeros.whole), (0.0, 0.0));
        let mut dead = correlated(50, 1);
        dead.row_mut(7).fill(0.0);
        dead.column_mut(7).fill(0.0);
        let weights = bell(200, 2);
        for hessian in [none, dead] {
            let found = solved(&weights, format, &hessian, &Settings::new(code.full()));
            let decoded = decode(&found.coded.prefix(code.full()).unwrap());
            let left: f32 = (0..4)
                .map(|r| (weights[r * 50 + 7] - decoded[r * 50 + 7]).powi(2))
                .sum();
            assert!(
                left < 0.9 * (0..4).map(|r| weights[r * 50 + 7].powi(2)).sum::<f32>(),
                "{code}: rounded, not lost"
            );
        }
    }
}

#[test]
fn what_cannot_be_solved_is_named() {
    let format = MatrixFormat::try_new(2, 40, Code::Plain(Bits::B4), 32).unwrap();
    let factor = Factor::try_new(correlated(40, 1).view(), DAMPING).unwrap();
    let settings = Settings::new(Bits::B4);
    let error = |weights: &[f32], factor: &Factor, settings: &Settings| {
        solve(weights, format, factor, settings).unwrap_err().to_string()
    };
    let mut weights = bell(80, 2);
    let narrow = Factor::try_new(correlated(39, 1).view(), DAMPING).unwrap();
    assert_eq!(
        error(&weights, &narrow, &settings),
        "columns of the Hessian: 39 elements, expected 40"
    );
    assert!(error(&weights, &factor, &Settings::new(Bits::B2)).contains("no prefix of 2 bits"));
    for factors in [vec![], vec![0.0], vec![f32::NAN], vec![1.0, -1.0]] {
        let settings = Settings {
            scale_factors: factors,
            ..settings.clone()
        };
        assert!(error(&weights, &factor, &settings).starts_with("scale factors"));
    }
    weights[45] = f32::NAN;
    assert!(error(&weights, &factor, &settings).starts_with("weight at row 1, column 5 is NaN"));
    weights[45] = 1e30;
    assert!(error(&weights, &factor, &settings).starts_with("weight of magnitude 10000"));
}
