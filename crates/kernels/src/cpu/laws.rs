//! The battery that every path in the dispatch table runs: equal to the plain reference, bit for bit.

use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::{CodedMatrix, CodedView, Prefix};
use cotk_quant::encode::{assemble, assemble_scaled};
use cotk_quant::layout::{MatrixFormat, Placement, ScaleForm, WHOLE_ROW};
use cotk_quant::scales::Scales;
use half::f16;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::activations::Activations;
use super::dispatch::Isa;
use super::expert::{Expert, ExpertScratch, forward};
use super::gemm::{Threads, gemm};
use super::half_matrix::{HalfKind, HalfMatrix, lay_out};
use super::reference;
use super::weights::{Matrix, Weights};

/// Any codes, any scales and any zero points: kernels may not rely on what an encoder would choose.
fn random_matrix(
    rng: &mut SmallRng,
    rows: usize,
    cols: usize,
    code: Code,
    (group, form): (usize, ScaleForm),
) -> CodedMatrix {
    let format = MatrixFormat::try_with_scales(rows, cols, code, group, form).unwrap();
    let top = 1u32 << code.full().get();
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.random_range(0..top) as u8).collect();
    let mut halves = |count: usize| -> Vec<f16> {
        (0..count)
            .map(|_| f16::from_f32(rng.random_range(-0.01f32..0.01)))
            .collect()
    };
    let scales = match form {
        ScaleForm::F16 => Scales::F16(halves(rows * format.groups())),
        ScaleForm::TwoLevel => Scales::TwoLevel {
            coarse: halves(rows * format.scale_blocks()),
            fine: (0..rows * format.groups()).map(|i| (i * 37 % 64) as i8 - 32).collect(),
        },
    };
    let zero_points = code
        .prefixes()
        .iter()
        .map(|b| code.default_zero_point(*b) + rng.random_range(-0.5f32..0.5))
        .collect();
    assemble_scaled(format, &codes, &scales, zero_points).unwrap()
}

fn random_tokens(rng: &mut SmallRng, tokens: usize, cols: usize) -> Vec<f32> {
    (0..tokens * cols).map(|_| rng.random_range(-3.0f32..3.0)).collect()
}

fn random_half(rng: &mut SmallRng, rows: usize, cols: usize, kind: HalfKind) -> Vec<u8> {
    let weights: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-0.1f32..0.1)).collect();
    lay_out(&weights, rows, cols, kind)
}

/// Weights of any form, owned.
enum Made {
    Coded(CodedMatrix),
    Half(usize, usize, Vec<u8>),
}

impl Made {
    fn new(rng: &mut SmallRng, rows: usize, cols: usize, code: Option<Code>, group: (usize, ScaleForm)) -> Self {
        match code {
            Some(code) => Self::Coded(random_matrix(rng, rows, cols, code, group)),
            None => Self::Half(rows, cols, random_half(rng, rows, cols, HalfKind::F16)),
        }
    }

    /// The narrowest prefix of a code.
    fn weights(&self) -> Weights<'_> {
        match self {
            Self::Coded(m) => m.prefix(m.format.code().prefixes()[0]).unwrap().into(),
            Self::Half(rows, cols, bytes) => HalfMatrix::try_new(*rows, *cols, HalfKind::F16, bytes).unwrap().into(),
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn any_code() -> impl Strategy<Value = Code> {
    proptest::sample::select(Code::ALL.to_vec())
}

fn any_group() -> impl Strategy<Value = (usize, ScaleForm)> {
    let f16 = [32, 64, 128, WHOLE_ROW].map(|group| (group, ScaleForm::F16));
    let two_level = [16, 32, 64, 128].map(|group| (group, ScaleForm::TwoLevel));
    proptest::sample::select([f16, two_level].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn gemm_equals_reference_on_every_path(
        (rows, cols, tokens) in (1usize..50, 1usize..330, 1usize..18),
        code in any_code(), group in any_group(), placement in 0..3usize, seed in any::<u64>(),
    ) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let matrix = random_matrix(&mut rng, rows, cols, code, group);
        let other = random_matrix(&mut rng, rows, cols, code, group);
        let (placement, planes) = match placement {
            0 => (Placement::Alone, matrix.planes.clone()),
            1 => (Placement::PairFirst, CodedMatrix::interleave(&matrix, &other).unwrap()),
            _ => (Placement::PairSecond, CodedMatrix::interleave(&other, &matrix).unwrap()),
        };
        let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        let x = random_tokens(&mut rng, tokens, cols);
        for width in code.prefixes() {
            let acts = Activations::of(Isa::present()[0], &x, cols);
            let mut expected = vec![0.0; tokens * rows];
            reference::gemm(matrix.prefix(*width).unwrap(), &acts, &mut expected);
            let prefix = CodedView::try_new(matrix.format, &planes, &matrix.zero_points, placement).unwrap();
            let prefix = prefix.prefix(*width).unwrap();
            for isa in Isa::present() {
                let mut out = vec![f32::NAN; tokens * rows];
                gemm(isa, prefix, &acts, &mut out, Threads::One);
                prop_assert_eq!(bits(&out), bits(&expected), "{:?} {} at {}", isa, code, width);
            }
        }
    }

    #[test]
    fn half_gemm_equals_reference_on_every_path(
        (rows, cols, tokens) in (1usize..50, 1usize..330, 1usize..18), bf16: bool, seed in any::<u64>(),
    ) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let kind = if bf16 { HalfKind::Bf16 } else { HalfKind::F16 };
        let bytes = random_half(&mut rng, rows, cols, kind);
        let half = HalfMatrix::try_new(rows, cols, kind, &bytes).unwrap();
        let x = random_tokens(&mut rng, tokens, cols);
        let acts = Activations::of(Isa::present()[0], &x, cols);
        let mut expected = vec![0.0; tokens * rows];
        reference::gemm(half, &acts, &mut expected);
        // Activations of 8 bits are within half a step: γ of the sums beside it is far smaller.
        for (t, x) in x.chunks_exact(cols).enumerate() {
            for row in 0..rows {
                let exact: f64 = x.iter().enumerate().map(|(c, x)| f64::from(*x) * f64::from(half.at(row, c))).sum();
                let size: f64 = (0..cols).map(|c| f64::from(half.at(row, c)).abs()).sum::<f64>() * 3.0 / 254.0;
                prop_assert!((f64::from(expected[t * rows + row]) - exact).abs() <= 1.01 * size + 1e-6);
            }
        }
        for isa in Isa::present() {
            for threads in [Threads::One, Threads::Pool] {
                let mut out = vec![f32::NAN; tokens * rows];
                gemm(isa, half, &acts, &mut out, threads);
                prop_assert_eq!(bits(&out), bits(&expected), "{:?} {:?}", isa, kind);
            }
        }
    }

    /// Whole, in factors and with factors on top, codes and 16-bit weights, mixed as they come.
    #[test]
    fn expert_equals_reference_on_every_path_and_thread_count(
        (inner, hidden, tokens) in (1usize..200, 1usize..200, 1usize..18), ranks in prop::array::uniform3(0usize..40),
        corrected in prop::array::uniform3(any::<bool>()),
        codes in prop::array::uniform9(prop::option::weighted(0.8, any_code())), group in any_group(), seed in any::<u64>(),
    ) {
        let mut rng = SmallRng::seed_from_u64(seed);
        // Left and right factor and what they correct; a rank of 0: the left one is the whole matrix.
        let shapes = [(inner, hidden), (inner, hidden), (hidden, inner)];
        let made: Vec<(Made, Option<Made>, Option<Made>)> = (0..3).map(|i| {
            let ((rows, cols), rank) = (shapes[i], ranks[i].saturating_sub(10));
            if rank == 0 {
                (Made::new(&mut rng, rows, cols, codes[3 * i], group), None, None)
            } else {
                let left = Made::new(&mut rng, rows, rank, codes[3 * i], group);
                let right = Made::new(&mut rng, rank, cols, codes[3 * i + 1], group);
                let whole = corrected[i].then(|| Made::new(&mut rng, rows, cols, codes[3 * i + 2], group));
                (left, Some(right), whole)
            }
        }).collect();
        let matrices: Vec<Matrix<'_>> = made.iter().map(|(left, right, whole)| match (right, whole) {
            (None, _) => Matrix::Whole(left.weights()),
            (Some(right), None) => Matrix::product(left.weights(), right.weights()).unwrap(),
            (Some(right), Some(whole)) => {
                Matrix::corrected(whole.weights(), left.weights(), right.weights()).unwrap()
            }
        }).collect();
        let [gate, up, down] = matrices[..] else { unreachable!("three") };
        let x = random_tokens(&mut rng, tokens, hidden);
        let acts = Activations::of(Isa::present()[0], &x, hidden);
        let mut expected = vec![0.0; tokens * hidden];
        reference::expert(&gate, &up, &down, &acts, &mut expected);
        let expert = Expert::try_new(gate, up, down).unwrap();
        // One scratch for all: what an earlier call left must not show.
        let mut scratch = ExpertScratch::default();
        for isa in Isa::present() {
            for threads in [Threads::One, Threads::Pool] {
                let mut out = vec![f32::NAN; tokens * hidden];
                forward(isa, &expert, &acts, &mut out, &mut scratch, threads);
                prop_assert_eq!(bits(&out), bits(&expected), "{:?} {:?}", isa, threads);
            }
        }
    }

    #[test]
    fn quantizing_equals_scalar_on_every_path_and_stays_within_half_a_step(
        x in proptest::collection::vec(prop_oneof![
            8 => -5.0f32..5.0, 1 => Just(0.0f32), 1 => Just(-0.0f32), 1 => Just(1e-42f32), 1 => any::<f32>(),
        ], 1..130),
    ) {
        let scalar = Activations::of(Isa::present()[0], &x, x.len());
        for isa in Isa::present() {
            let acts = Activations::of(isa, &x, x.len());
            for (a, b) in acts.steps().iter().zip(scalar.steps()) {
                prop_assert_eq!((a.codes, a.scale.to_bits(), a.sum), (b.codes, b.scale.to_bits(), b.sum), "{:?}", isa);
            }
        }
        for (x, step) in x.chunks(32).zip(scalar.steps()) {
            prop_assert_eq!(step.sum, step.codes.iter().map(|c| i32::from(*c)).sum::<i32>() as f32);
            if !x.iter().all(|v| v.is_finite()) {
                prop_assert!(step.scale.is_nan());
                continue;
            }
            prop_assert!(step.codes.iter().all(|c| *c != i8::MIN));
            for (v, c) in x.iter().zip(&step.codes) {
                let error = (f64::from(*v) - f64::from(*c) * f64::from(step.scale)).abs();
                prop_assert!(error <= f64::from(step.scale) * 0.501 + 1e-36, "{} as {} of {}", v, c, step.scale);
            }
        }
    }
}

/// Worst case of every integer bound: all codes and all activations at their extremes.
#[test]
fn no_path_saturates_at_the_extremes() {
    for code in Code::ALL {
        let format = MatrixFormat::try_new(16, 64, code, 32).unwrap();
        let top = ((1u32 << code.full().get()) - 1) as u8;
        let matrix = assemble(format, &[top; 16 * 64], &[f16::ONE; 32], vec![0.0; code.planes()]).unwrap();
        for sign in [1.0, -1.0] {
            let acts = Activations::of(Isa::present()[0], &[sign; 64], 64);
            for isa in Isa::present() {
                let mut out = [0.0; 16];
                gemm(isa, matrix.prefix(code.full()).unwrap(), &acts, &mut out, Threads::One);
                let exact = sign * 64.0 * f32::from(top);
                assert!(
                    out.iter().all(|y| (y / exact - 1.0).abs() < 1e-6),
                    "{isa:?} {code}: {out:?} for {exact}"
                );
            }
        }
    }
}

#[test]
fn a_value_that_is_not_finite_gives_nan_not_a_number_that_looks_right() {
    let mut rng = SmallRng::seed_from_u64(1);
    let matrix = random_matrix(&mut rng, 20, 64, Code::Nested224, (32, ScaleForm::F16));
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = vec![1.0; 64];
        x[40] = bad;
        for isa in Isa::present() {
            let mut out = [0.0; 20];
            gemm(
                isa,
                matrix.prefix(Code::Nested224.full()).unwrap(),
                &Activations::of(isa, &x, 64),
                &mut out,
                Threads::One,
            );
            assert!(out.iter().all(|y| y.is_nan()), "{isa:?}");
        }
    }
}

#[test]
fn matrices_that_do_not_fit_are_no_expert() {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut make = |rows, cols| random_matrix(&mut rng, rows, cols, Code::Plain(Bits::B4), (32, ScaleForm::F16));
    let (gate, up, down, wrong) = (make(8, 40), make(8, 40), make(40, 8), make(8, 39));
    let (left, right) = (make(8, 16), make(16, 40));
    fn at(matrix: &CodedMatrix) -> Prefix<'_> {
        matrix.prefix(Bits::B4).unwrap()
    }
    assert!(Expert::try_new(at(&gate), at(&up), at(&down)).is_ok());
    assert!(Expert::try_new(at(&gate), at(&wrong), at(&down)).is_err());
    assert!(Expert::try_new(at(&gate), at(&up), at(&gate)).is_err());
    assert!(Matrix::product(at(&gate), at(&down)).is_ok());
    assert!(Matrix::product(at(&gate), at(&gate)).is_err());
    assert!(Matrix::corrected(at(&gate), at(&left), at(&right)).is_ok());
    assert!(Matrix::corrected(at(&wrong), at(&left), at(&right)).is_err());
    assert!(Matrix::corrected(at(&down), at(&left), at(&right)).is_err());
}
