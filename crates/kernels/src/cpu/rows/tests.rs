//! Laws of rows: what is stored equals what a plain loop reads, on every path.

use proptest::prelude::*;
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::*;

fn stored(rng: &mut SmallRng, kind: RowKind, count: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..count {
        let value = rng.random_range(-1.0f32..1.0);
        match kind {
            RowKind::F32 => bytes.extend(value.to_le_bytes()),
            RowKind::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
            RowKind::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            RowKind::I8 => bytes.push((value * 127.0) as i8 as u8),
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Law: products and mixes equal sums in f64 within rounding, on every path with the same bits, for every kind
    /// and for shapes that no register divides.
    #[test]
    fn every_path_equals_the_sums(
        kind in 0usize..4, rows in 1usize..40, cols in 1usize..140, gap in 0usize..9, tokens in 0usize..11,
        seed: u64,
    ) {
        let kind = RowKind::ALL[kind];
        let mut rng = SmallRng::seed_from_u64(seed);
        let bytes = stored(&mut rng, kind, rows * (cols + gap));
        let matrix = Rows::strided(kind, &bytes, cols, cols + gap);
        let mut floats = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect() };
        let (x, p, keep, before) = (floats(tokens * cols), floats(tokens * rows), floats(tokens), floats(tokens * cols));
        let unit = if kind == RowKind::I8 { 128.0 } else { 1.0 };
        let mut firsts: Option<(Vec<u32>, Vec<u32>)> = None;
        for isa in Isa::present() {
            let mut dots = vec![f32::NAN; tokens * rows];
            dot(isa, matrix, &x, &mut dots, if seed % 2 == 0 { Threads::One } else { Threads::Pool });
            let mut mixed = before.clone();
            mix(isa, matrix, &p, &keep, &mut mixed);
            for t in 0..tokens {
                for r in 0..rows {
                    let truth: f64 = (0..cols).map(|c| f64::from(matrix.at(r, c)) * f64::from(x[t * cols + c])).sum();
                    let found = f64::from(dots[t * rows + r]);
                    prop_assert!((found - truth).abs() < 1e-5 * unit * cols as f64, "{kind:?} {found} {truth}");
                }
                for c in 0..cols {
                    let start = f64::from(before[t * cols + c]) * f64::from(keep[t]);
                    let truth: f64 = (0..rows).map(|r| f64::from(matrix.at(r, c)) * f64::from(p[t * rows + r])).sum();
                    let found = f64::from(mixed[t * cols + c]);
                    prop_assert!((found - truth - start).abs() < 1e-5 * unit * rows as f64, "{kind:?} {found} {truth}");
                }
            }
            let mut wide = vec![f32::NAN; rows * cols];
            matrix.widen(isa, &mut wide);
            for (i, wide) in wide.iter().enumerate() {
                prop_assert_eq!(*wide, matrix.at(i / cols, i % cols));
            }
            let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
            let found = (bits(&dots), bits(&mixed));
            match &firsts {
                None => firsts = Some(found),
                Some(first) => prop_assert!(*first == found, "{} differs", isa.name()),
            }
        }
    }

    /// Law: a token's product does not depend on its neighbours.
    #[test]
    fn a_batch_equals_its_tokens(rows in 1usize..40, cols in 1usize..100, tokens in 1usize..13, seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let bytes = stored(&mut rng, RowKind::Bf16, rows * cols);
        let matrix = Rows::new(RowKind::Bf16, &bytes, cols);
        let x: Vec<f32> = (0..tokens * cols).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        for isa in Isa::present() {
            let mut whole = vec![0.0; tokens * rows];
            dot(isa, matrix, &x, &mut whole, Threads::One);
            let mut one = vec![0.0; rows];
            for t in 0..tokens {
                dot(isa, matrix, &x[t * cols..][..cols], &mut one, Threads::One);
                prop_assert_eq!(&one, &whole[t * rows..][..rows]);
            }
        }
    }

    #[test]
    fn weights_of_scores_equal_the_exponential(count in 0usize..100, seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let scores: Vec<f32> = (0..count).map(|_| rng.random_range(-30.0f32..5.0)).collect();
        let mut first: Option<(Vec<u32>, u32)> = None;
        for isa in Isa::present() {
            let mut found = scores.clone();
            let sum = weigh(isa, &mut found, 5.0);
            let truth: f64 = scores.iter().map(|s| f64::from(s - 5.0).exp()).sum();
            prop_assert!((f64::from(sum) - truth).abs() <= 1e-5 * truth + 1e-30);
            for (found, score) in found.iter().zip(&scores) {
                let truth = f64::from(score - 5.0).exp();
                prop_assert!((f64::from(*found) - truth).abs() <= 1e-6 * truth);
            }
            let found = (found.iter().map(|v| v.to_bits()).collect(), sum.to_bits());
            match &first {
                None => first = Some(found),
                Some(first) => prop_assert!(*first == found),
            }
        }
    }
}
