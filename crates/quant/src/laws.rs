//! The laws of codes and layout, over odd shapes.

use half::f16;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};

use crate::QuantError;
use crate::code::{Bits, Code};
use crate::coded::{CodedMatrix, CodedView};
use crate::decode::{decode, prefix_error};
use crate::encode::{assemble_scaled, encode};
use crate::layout::{MatrixFormat, Placement, ScaleForm, TwoLevelAt, WHOLE_ROW};
use crate::scales::Scales;

fn any_scales() -> impl Strategy<Value = (usize, ScaleForm)> {
    let f16 = [32, 64, 128, WHOLE_ROW].map(|group| (group, ScaleForm::F16));
    let two_level = [16, 32, 64, 128].map(|group| (group, ScaleForm::TwoLevel));
    proptest::sample::select([f16, two_level].concat())
}

fn tiny_format() -> impl Strategy<Value = MatrixFormat> {
    let code = proptest::sample::select(Code::ALL.to_vec());
    (1usize..40, 1usize..600, code, any_scales()).prop_map(|(rows, cols, code, (group, scales))| {
        MatrixFormat::try_with_scales(rows, cols, code, group, scales).unwrap()
    })
}

/// Bell-shaped: the sum of four uniform numbers, standard deviation about 0.58.
fn bell(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    (0..count)
        .map(|_| (0..4).map(|_| rng.random_range(-0.5f32..0.5)).sum())
        .collect()
}

fn encoded(format: MatrixFormat, seed: u64) -> (Vec<f32>, CodedMatrix) {
    let weights = bell(format.rows() * format.cols(), seed);
    let coded = encode(&weights, format).unwrap();
    (weights, coded)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn codes_and_scales_come_back_from_their_planes(format in tiny_format(), seed in any::<u64>()) {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let top = (1u32 << format.code().full().get()) - 1;
        let codes: Vec<u8> = (0..format.rows() * format.cols()).map(|_| rng.random_range(0..=top) as u8).collect();
        let mut halves = |count: usize| (0..count).map(|_| f16::from_f32(rng.random_range(-2.0..2.0))).collect();
        let scales = match format.scales() {
            ScaleForm::F16 => Scales::F16(halves(format.rows() * format.groups())),
            ScaleForm::TwoLevel => Scales::TwoLevel {
                coarse: halves(format.rows() * format.scale_blocks()),
                fine: (0..format.rows() * format.groups()).map(|i| (i * 37 % 64) as i8 - 32).collect(),
            },
        };
        let values = scales.values(&format);
        let coded = assemble_scaled(format, &codes, &scales, vec![1.0; format.code().planes()]).unwrap();
        for (plane, bytes) in coded.planes.iter().enumerate() {
            prop_assert_eq!(bytes.len(), format.plane_bytes(plane));
        }
        for bits in format.code().prefixes() {
            let (prefix, cut) = (coded.prefix(*bits).unwrap(), format.code().full().get() - bits.get());
            for row in 0..format.rows() {
                for col in 0..format.cols() {
                    prop_assert_eq!(prefix.code_at(row, col), codes[row * format.cols() + col] >> cut);
                }
                for group in 0..format.groups() {
                    prop_assert_eq!(prefix.scale_at(row, group), values[row * format.groups() + group]);
                }
            }
        }
    }

    #[test]
    fn no_two_fields_share_a_bit(format in tiny_format()) {
        let mut taken: Vec<Vec<u8>> = (0..format.code().planes()).map(|p| vec![0; format.plane_bytes(p)]).collect();
        let mut take = |plane: usize, byte: usize, mask: u8| {
            let free = taken[plane][byte] & mask == 0;
            taken[plane][byte] |= mask;
            free
        };
        for row in 0..format.rows() {
            for col in 0..format.cols() {
                for field in format.code().fields() {
                    let (byte, bit) = format.locate(*field, row, col);
                    prop_assert!(take(field.plane, byte, (((1u32 << field.bits) - 1) << bit) as u8));
                }
            }
            for group in 0..format.groups() {
                let coarse = match format.scales() {
                    ScaleForm::F16 => format.locate_scale(row, group),
                    ScaleForm::TwoLevel => {
                        let TwoLevelAt { coarse, low, high } = format.locate_two_level(row, group);
                        prop_assert!(take(0, low.0, 15 << low.1) && take(0, high.0, 3 << high.1));
                        coarse
                    }
                };
                if group % format.scale_block_groups() == 0 {
                    prop_assert!(take(0, coarse, 0xff) && take(0, coarse + 1, 0xff));
                }
            }
        }
    }

    #[test]
    fn a_prefix_decodes_alone_and_a_pair_decodes_as_two(format in tiny_format(), seed in any::<u64>()) {
        let ((_, a), (_, b)) = (encoded(format, seed), encoded(format, seed ^ 1));
        let pair = CodedMatrix::interleave(&a, &b).unwrap();
        for (i, bits) in format.code().prefixes().iter().enumerate() {
            let lower: Vec<&[u8]> = pair[..=i].iter().map(Vec::as_slice).collect();
            for (matrix, placement) in [(&a, Placement::PairFirst), (&b, Placement::PairSecond)] {
                let view = CodedView::try_new(format, &lower, &matrix.zero_points, placement).unwrap();
                prop_assert_eq!(decode(&view.prefix(*bits).unwrap()), decode(&matrix.prefix(*bits).unwrap()));
            }
        }
    }

    #[test]
    fn more_bits_never_cost_error_and_means_stay_near_zero(
        (rows, cols) in (8usize..40, 32usize..300), code in proptest::sample::select(Code::ALL.to_vec()),
        (group, scales) in any_scales(), seed in any::<u64>()
    ) {
        let format = MatrixFormat::try_with_scales(rows, cols, code, group, scales).unwrap();
        let (weights, coded) = encoded(format, seed);
        let mut last = f64::INFINITY;
        for bits in code.prefixes() {
            let prefix = coded.prefix(*bits).unwrap();
            let error = prefix_error(&weights, &prefix).unwrap();
            prop_assert!(error.delta < last, "{code} at {bits}: {} after {last}", error.delta);
            last = error.delta;
            // Without its zero point a prefix would be off by half a cell everywhere.
            let cell = f64::from(prefix.scale_at(0, 0).abs() * prefix.cell());
            let noise = 4.0 * cell / ((rows * cols) as f64).sqrt();
            prop_assert!(error.mean.abs() < noise + 0.02 * cell, "{code} at {bits}: mean {} cell {cell}", error.mean);
        }
    }

    #[test]
    fn truncated_or_foreign_planes_are_refused(format in tiny_format(), seed in any::<u64>()) {
        let (_, coded) = encoded(format, seed);
        for plane in 0..coded.planes.len() {
            let mut planes: Vec<&[u8]> = coded.planes.iter().map(Vec::as_slice).collect();
            let whole = planes[plane];
            planes[plane] = &whole[..whole.len() - 1];
            let refused = CodedView::try_new(format, &planes, &coded.zero_points, Placement::Alone);
            let found = whole.len() - 1;
            prop_assert_eq!(refused.err(), Some(QuantError::PlaneBytes { plane, found, expected: whole.len() }));
        }
        prop_assert!(CodedView::try_new(format, &[], &coded.zero_points, Placement::Alone).is_err());
        prop_assert!(CodedView::try_new(format, &[coded.planes[0].as_slice()], &[], Placement::Alone).is_err());
    }
}

/// ggml's `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref`, one block at a time.
#[test]
fn plain_8_and_4_bits_in_groups_of_32_are_q8_0_and_q4_0() {
    let weights = bell(3 * 64, 7);
    let coded = |code| encode(&weights, MatrixFormat::try_new(3, 64, code, 32).unwrap()).unwrap();
    let (q8, q4, nested) = (
        coded(Code::Plain(Bits::B8)),
        coded(Code::Plain(Bits::B4)),
        coded(Code::Nested224),
    );
    let (q8, q4, nested) = (
        q8.prefix(Bits::B8).unwrap(),
        q4.prefix(Bits::B4).unwrap(),
        nested.prefix(Bits::B8).unwrap(),
    );
    for (block, w) in weights.chunks(32).enumerate() {
        let (row, group) = (block / 2, block % 2);
        let amax = w.iter().fold(0f32, |a, x| a.max(x.abs()));
        let extreme = *w.iter().find(|x| x.abs() == amax).unwrap();
        let (d8, d4) = (amax / 127.0, extreme / -8.0);
        assert_eq!(q8.scale_at(row, group), f16::from_f32(d8).to_f32());
        assert_eq!(q4.scale_at(row, group), f16::from_f32(d4).to_f32());
        for (i, x) in w.iter().enumerate() {
            let col = group * 32 + i;
            let expect8 = (x * (1.0 / d8)).round() as i8;
            let expect4 = ((x * (1.0 / d4) + 8.5) as i8).min(15);
            assert_eq!(i32::from(q8.code_at(row, col)) - 128, i32::from(expect8));
            assert_eq!(nested.code_at(row, col), q8.code_at(row, col));
            assert_eq!(q4.code_at(row, col) as i8, expect4);
        }
    }
    assert_eq!(decode(&q8), decode(&nested));
}

/// Squared errors that a search must reach on bell-shaped weights: absmax would give 0.43 at 2 bits.
#[test]
fn two_and_three_bits_search_their_scale() {
    for (bits, bound) in [(Bits::B2, 0.13), (Bits::B3, 0.03), (Bits::B4, 0.011)] {
        let (weights, coded) = encoded(MatrixFormat::try_new(64, 256, Code::Plain(bits), 32).unwrap(), 3);
        let delta = prefix_error(&weights, &coded.prefix(bits).unwrap()).unwrap().delta;
        assert!(delta * delta < bound, "{bits} bits: {}", delta * delta);
    }
}

#[test]
fn weights_that_no_code_holds_are_named() {
    for code in Code::ALL {
        let format = MatrixFormat::try_new(2, 40, code, 32).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut weights = vec![0.5; 80];
            weights[40 + 33] = bad;
            let error = encode(&weights, format).unwrap_err();
            assert!(
                error.to_string().starts_with("weight at row 1, column 33 is"),
                "{error}"
            );
        }
        let mut weights = vec![0.5; 80];
        weights[40 + 33] = -1e30;
        let error = encode(&weights, format).unwrap_err();
        assert!(
            matches!(error, QuantError::ScaleOverflow { row: 1, col: 33, .. }),
            "{error}"
        );
        assert!(encode(&weights[1..], format).is_err());
    }
}

#[test]
fn zeros_and_vanishing_weights_decode_to_zeros() {
    for code in Code::ALL {
        let format = MatrixFormat::try_new(3, 70, code, 64).unwrap();
        for value in [0.0, -0.0, 1e-40, -f32::MIN_POSITIVE] {
            let coded = encode(&[value; 210], format).unwrap();
            for bits in code.prefixes() {
                let decoded = decode(&coded.prefix(*bits).unwrap());
                assert!(
                    decoded.iter().all(|w| w.abs() == 0.0),
                    "{code} at {bits} of {value}: {decoded:?}"
                );
            }
        }
    }
}

#[test]
fn shapes_pass_one_gate() {
    let make = |rows, cols, group| MatrixFormat::try_new(rows, cols, Code::Nested224, group);
    for (rows, cols, group) in [
        (0, 1, 32),
        (1, 0, 32),
        ((1 << 24) + 1, 1, 32),
        (1, usize::MAX, 32),
        (1, 1, 0),
        (1, 1, 16),
    ] {
        assert!(make(rows, cols, group).is_err());
    }
    let whole = make(32, 128, 32).unwrap();
    assert_eq!(whole.plane_bytes(0), 2 * 2 * (16 * 64 / 4 + 64));
    // Six bits and an eighth of 16 for each group.
    let of = |group, scales| MatrixFormat::try_with_scales(32, 512, Code::Plain(Bits::B2), group, scales);
    assert_eq!(of(32, ScaleForm::TwoLevel).unwrap().total_bytes(), 32 * 512 * 9 / 32);
    assert_eq!(of(16, ScaleForm::TwoLevel).unwrap().total_bytes(), 32 * 512 * 10 / 32);
    assert_eq!(of(WHOLE_ROW, ScaleForm::F16).unwrap().total_bytes(), 32 * (512 / 4 + 2));
    assert!(of(16, ScaleForm::F16).is_err() && of(WHOLE_ROW, ScaleForm::TwoLevel).is_err());
    assert_eq!(whole.prefix_bytes(Bits::B4).unwrap(), 32 * 128 * 9 / 16);
    assert_eq!(whole.total_bytes(), 32 * 128 * 17 / 16);
    assert!(whole.prefix_bytes(Bits::B3).is_err());
}
