//! The battery that every path in the dispatch table runs: equal to the plain reference, bit for bit.

use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::{CodedMatrix, CodedView, Prefix};
use cotk_quant::encode::assemble;
use cotk_quant::layout::{MatrixFormat, Placement};
use half::f16;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::activations::Activations;
use super::dispatch::Isa;
use super::expert::{Expert, ExpertScratch, forward};
use super::gemm::{Threads, gemm};
use super::reference;

/// Any codes, any scales and any zero points: kernels may not rely on what an encoder would choose.
fn random_matrix(rng: &mut SmallRng, rows: usize, cols: usize, code: Code, group: usize) -> CodedMatrix {
    let format = MatrixFormat::try_new(rows, cols, code, group).unwrap();
    let top = 1u32 << code.full().get();
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.random_range(0..top) as u8).collect();
    let scales: Vec<f16> = (0..rows * format.groups())
        .map(|_| f16::from_f32(rng.random_range(-0.01f32..0.01)))
        .collect();
    let zero_points = code
        .prefixes()
        .iter()
        .map(|b| code.default_zero_point(*b) + rng.random_range(-0.5f32..0.5))
        .collect();
    assemble(format, &codes, &scales, zero_points).unwrap()
}

fn random_tokens(rng: &mut SmallRng, tokens: usize, cols: usize) -> Vec<f32> {
    (0..tokens * cols).map(|_| rng.random_range(-3.0f32..3.0)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn any_code() -> impl Strategy<Value = Code> {
    proptest::sample::select(Code::ALL.to_vec())
}

fn any_group() -> impl Strategy<Value = usize> {
    proptest::sample::select(vec![32usize, 64, 128])
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
            reference::gemm(&matrix.prefix(*width).unwrap(), &acts, &mut expected);
            let prefix = CodedView::try_new(matrix.format, &planes, &matrix.zero_points, placement).unwrap();
            let prefix = prefix.prefix(*width).unwrap();
            for isa in Isa::present() {
                let mut out = vec![f32::NAN; tokens * rows];
                gemm(isa, &prefix, &acts, &mut out, Threads::One);
                prop_assert_eq!(bits(&out), bits(&expected), "{:?} {} at {}", isa, code, width);
            }
        }
    }

    #[test]
    fn expert_equals_reference_on_every_path_and_thread_count(
        (inner, hidden, tokens) in (1usize..200, 1usize..200, 1usize..18),
        codes in (any_code(), any_code(), any_code()), group in any_group(), seed in any::<u64>(),
    ) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let gate = random_matrix(&mut rng, inner, hidden, codes.0, group);
        let up = random_matrix(&mut rng, inner, hidden, codes.1, group);
        let down = random_matrix(&mut rng, hidden, inner, codes.2, group);
        let narrow = |m: &CodedMatrix| m.format.code().prefixes()[0];
        let (gate, up, down) = (gate.prefix(narrow(&gate)).unwrap(), up.prefix(narrow(&up)).unwrap(), down.prefix(narrow(&down)).unwrap());
        let x = random_tokens(&mut rng, tokens, hidden);
        let acts = Activations::of(Isa::present()[0], &x, hidden);
        let mut expected = vec![0.0; tokens * hidden];
        reference::expert(&gate, &up, &down, &acts, &mut expected);
        let expert = Expert::try_new(gate, up, down).unwrap();
        for isa in Isa::present() {
            for threads in [Threads::One, Threads::Pool] {
                let mut out = vec![f32::NAN; tokens * hidden];
                forward(isa, &expert, &acts, &mut out, &mut ExpertScratch::default(), threads);
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

    #[test]
    fn gathered_tokens_are_their_rows(tokens in 1usize..6, cols in 1usize..100, seed in any::<u64>()) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let isa = Isa::selected().unwrap();
        let x = random_tokens(&mut rng, tokens, cols);
        let all = Activations::of(isa, &x, cols);
        let picks: Vec<usize> = (0..4).map(|_| rng.random_range(0..tokens)).collect();
        let mut some = Activations::default();
        some.gather(&all, picks.iter().copied());
        for (i, pick) in picks.iter().enumerate() {
            prop_assert_eq!(some.token(i), all.token(*pick));
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
                gemm(isa, &matrix.prefix(code.full()).unwrap(), &acts, &mut out, Threads::One);
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
    let matrix = random_matrix(&mut rng, 20, 64, Code::Nested224, 32);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = vec![1.0; 64];
        x[40] = bad;
        for isa in Isa::present() {
            let mut out = [0.0; 20];
            gemm(
                isa,
                &matrix.prefix(Code::Nested224.full()).unwrap(),
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
    let mut make = |rows, cols| random_matrix(&mut rng, rows, cols, Code::Plain(Bits::B4), 32);
    let (gate, up, down, wrong) = (make(8, 40), make(8, 40), make(40, 8), make(8, 39));
    fn at(matrix: &CodedMatrix) -> Prefix<'_> {
        matrix.prefix(Bits::B4).unwrap()
    }
    assert!(Expert::try_new(at(&gate), at(&up), at(&down)).is_ok());
    assert!(Expert::try_new(at(&gate), at(&wrong), at(&down)).is_err());
    assert!(Expert::try_new(at(&gate), at(&up), at(&gate)).is_err());
}
