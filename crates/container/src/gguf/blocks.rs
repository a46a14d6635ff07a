//! Weights and coded matrices as the rows of GGUF's types. Law: a plain group code whose values Q8_0 or Q4_0 can hold
//! decodes from it to the same bits; f32 weights get the codes and scales that [`cotk_quant::encode`] gives them.
//!
//! Q8_0: f16 scale, 32 signed bytes. Q4_0: f16 scale, 16 bytes, byte j holds weight j low and weight j + 16 high.

use cotk_quant::QuantError;
use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::Prefix;
use cotk_quant::decode::decode_row;
use cotk_quant::encode::codes_and_scales;
use cotk_quant::layout::{MatrixFormat, ScaleForm};
use half::f16;

use super::TensorType;

/// Weights of a block.
pub const BLOCK: usize = 32;
pub(crate) const Q8_0_BYTES: usize = 34;
pub(crate) const Q4_0_BYTES: usize = 18;

/// One block of signed codes, −128 to 127.
fn q8_0(scale: f16, codes: &[i16; BLOCK], out: &mut Vec<u8>) {
    out.extend(scale.to_le_bytes());
    #[expect(clippy::cast_possible_truncation, reason = "-128..=127")]
    out.extend(codes.iter().map(|&code| (code as i8).cast_unsigned()));
}

/// One block of signed codes, −8 to 7.
fn q4_0(scale: f16, codes: &[i16; BLOCK], out: &mut Vec<u8>) {
    out.extend(scale.to_le_bytes());
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0..=15")]
    let nibble = |code: i16| (code + 8) as u8;
    let (low, high) = codes.split_at(BLOCK / 2);
    out.extend(
        low.iter()
            .zip(high)
            .map(|(&low, &high)| nibble(low) | nibble(high) << 4),
    );
}

fn put(kind: TensorType, scale: f16, codes: &[i16; BLOCK], out: &mut Vec<u8>) {
    match kind {
        TensorType::Q8_0 => q8_0(scale, codes, out),
        TensorType::Q4_0 => q4_0(scale, codes, out),
        TensorType::F16 | TensorType::F32 => unreachable!("not a type of blocks"),
    }
}

/// Whether a matrix at this width can be held by `kind` without a change of any value.
pub fn holds(kind: TensorType, prefix: &Prefix<'_>) -> bool {
    let (format, bits) = (prefix.format(), prefix.bits().get());
    // A prefix that was cut has a zero point between codes.
    let zero = f32::from(1u16 << (bits - 1));
    let is_plain = prefix.cell() == 1.0 && prefix.zero_point() == zero;
    let widest = match kind {
        TensorType::F32 => return true,
        TensorType::F16 => return false,
        TensorType::Q4_0 => 4,
        TensorType::Q8_0 => 8,
    };
    // Two-level scales are products that no f16 holds.
    let has_halves = format.scales() == ScaleForm::F16 && format.group().is_multiple_of(BLOCK);
    is_plain && bits <= widest && format.cols().is_multiple_of(BLOCK) && has_halves
}

/// Rows `rows` of a coded matrix as blocks, where [`holds`] says that it can be.
///
/// # Panics
/// Where [`holds`] is false, or `kind` has no blocks.
pub fn coded_rows(kind: TensorType, prefix: &Prefix<'_>, rows: std::ops::Range<usize>) -> Vec<u8> {
    assert!(holds(kind, prefix), "the caller asks first");
    let format = prefix.format();
    let mut out = Vec::with_capacity(rows.len() * format.cols() / BLOCK * Q8_0_BYTES);
    let mut weights = vec![0.0; format.cols()];
    for row in rows {
        // A row by tiles is many times faster than weight by weight, and nothing is lost: a scale has 11 bits and a signed
        // code 8, so their product is exact in f32, and so is its quotient.
        decode_row(prefix, row, &mut weights);
        for (block, weights) in weights.as_chunks::<BLOCK>().0.iter().enumerate() {
            let scale = prefix.scale_at(row, block * BLOCK / format.group());
            #[expect(clippy::cast_possible_truncation, reason = "-128..=127")]
            let codes = weights.map(|w| if scale == 0.0 { 0 } else { (w / scale) as i16 });
            put(kind, f16::from_f32(scale), &codes, &mut out);
        }
    }
    out
}

/// Weights `[rows, cols]` as `kind`, rounded to it where it is narrower.
///
/// # Errors
/// A weight that is not finite or too large for the type, by row and column.
pub fn weight_rows(kind: TensorType, weights: &[f32], cols: usize) -> Result<Vec<u8>, QuantError> {
    let (code, zero) = match kind {
        TensorType::F32 => return Ok(weights.iter().flat_map(|w| w.to_le_bytes()).collect()),
        TensorType::F16 => return f16_rows(weights, cols),
        TensorType::Q4_0 => (Code::Plain(Bits::B4), 8),
        TensorType::Q8_0 => (Code::Plain(Bits::B8), 128),
    };
    let format = MatrixFormat::try_new(weights.len() / cols.max(1), cols, code, BLOCK)?;
    let (codes, scales) = codes_and_scales(weights, &format)?;
    let mut out = Vec::with_capacity(scales.len() * Q8_0_BYTES);
    for (codes, scale) in codes.as_chunks::<BLOCK>().0.iter().zip(scales) {
        put(kind, scale, &codes.map(|code| i16::from(code) - zero), &mut out);
    }
    Ok(out)
}

fn f16_rows(weights: &[f32], cols: usize) -> Result<Vec<u8>, QuantError> {
    let mut out = Vec::with_capacity(2 * weights.len());
    for (at, &weight) in weights.iter().enumerate() {
        let half = f16::from_f32(weight);
        if !half.is_finite() {
            let (row, col) = (at / cols, at % cols);
            return Err(if weight.is_finite() {
                QuantError::ScaleOverflow {
                    row,
                    col,
                    absmax: weight.abs(),
                    limit: f16::MAX.to_f32(),
                }
            } else {
                QuantError::NotFinite {
                    row,
                    col,
                    value: weight,
                }
            });
        }
        out.extend(half.to_le_bytes());
    }
    Ok(out)
}

/// Bytes of a type back to weights: the plain reference of every reader.
pub fn decode(kind: TensorType, bytes: &[u8]) -> Vec<f32> {
    let scale = |block: &[u8]| f16::from_le_bytes([block[0], block[1]]).to_f32();
    match kind {
        TensorType::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        TensorType::F16 => (bytes.as_chunks::<2>().0.iter())
            .map(|b| f16::from_le_bytes(*b).to_f32())
            .collect(),
        TensorType::Q8_0 => (bytes.as_chunks::<Q8_0_BYTES>().0.iter())
            .flat_map(|block| block[2..].iter().map(|&q| scale(block) * f32::from(q.cast_signed())))
            .collect(),
        TensorType::Q4_0 => (bytes.as_chunks::<Q4_0_BYTES>().0.iter())
            .flat_map(|block| {
                let value = |nibble: u8| scale(block) * (f32::from(nibble) - 8.0);
                let low = block[2..].iter().map(move |&b| value(b & 15));
                low.chain(block[2..].iter().map(move |&b| value(b >> 4)))
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use cotk_quant::decode::decode as decode_codes;
    use cotk_quant::encode::encode;
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn weights(count: usize, seed: u64) -> Vec<f32> {
        let mut random = rand::rngs::SmallRng::seed_from_u64(seed);
        (0..count).map(|_| random.random_range(-1.0f32..1.0).powi(3)).collect()
    }

    fn coded(rows: usize, cols: usize, code: Code, group: usize, seed: u64) -> cotk_quant::coded::CodedMatrix {
        let format = MatrixFormat::try_new(rows, cols, code, group).unwrap();
        encode(&weights(rows * cols, seed), format).unwrap()
    }

    #[test]
    fn one_block_byte_by_byte() {
        let mut q8: [f32; BLOCK] = std::array::from_fn(|i| i as f32 - 16.0);
        q8[0] = -127.0;
        let bytes = weight_rows(TensorType::Q8_0, &q8, BLOCK).unwrap();
        assert_eq!(bytes[..5], [0x00, 0x3c, 0x81, 0xf1, 0xf2]); // 1.0 as f16; −127, −15, −14
        assert_eq!((bytes[33], bytes.len()), (15, Q8_0_BYTES));
        let mut q4: [f32; BLOCK] = std::array::from_fn(|i| (i % 8) as f32 / 2.0);
        q4[0] = -4.0;
        let bytes = weight_rows(TensorType::Q4_0, &q4, BLOCK).unwrap();
        // 0.5 as f16; weight 0 is −8 → 0, weight 16 is 0 → 8; weights 1 and 17 are 1 → 9.
        assert_eq!(bytes[..4], [0x00, 0x38, 0x80, 0x99]);
        assert_eq!(bytes.len(), Q4_0_BYTES);
    }

    proptest! {
        /// Law: our plain codes and GGUF's blocks of the same weights hold the same scales and codes: equal values, bit
        /// for bit, whichever way the bytes were made.
        #[test]
        fn plain_codes_equal_blocks(rows in 1usize..20, blocks in 1usize..5, seed in any::<u64>()) {
            let cols = BLOCK * blocks;
            for (kind, bits) in [(TensorType::Q8_0, Bits::B8), (TensorType::Q4_0, Bits::B4)] {
                let matrix = coded(rows, cols, Code::Plain(bits), 32, seed);
                let prefix = matrix.prefix(bits).unwrap();
                let from_codes = coded_rows(kind, &prefix, 0..rows);
                prop_assert_eq!(&from_codes, &weight_rows(kind, &weights(rows * cols, seed), cols).unwrap());
                prop_assert_eq!(decode(kind, &from_codes), decode_codes(&prefix));
            }
        }

        /// Law: every plain code of whole groups is held without loss by each type that is wide enough, but for one bit,
        /// whose zero lies between its levels; so is a nested one at its full width; a prefix that was cut is not.
        #[test]
        fn what_is_held_keeps_every_value(seed in any::<u64>(), group in prop_oneof![Just(32usize), Just(64), Just(128)]) {
            let (rows, cols) = (5, 256);
            for code in Code::ALL {
                let matrix = coded(rows, cols, code, group, seed);
                for &bits in code.prefixes() {
                    let prefix = matrix.prefix(bits).unwrap();
                    for kind in [TensorType::Q4_0, TensorType::Q8_0] {
                        let is_cut = bits != code.full();
                        let is_wide_enough = kind == TensorType::Q8_0 || bits.get() <= 4;
                        let is_held = !is_cut && is_wide_enough && bits != Bits::B1;
                        prop_assert_eq!(holds(kind, &prefix), is_held, "{} {:?}", code, kind);
                        if holds(kind, &prefix) {
                            let bytes = coded_rows(kind, &prefix, 0..rows);
                            prop_assert_eq!(decode(kind, &bytes), decode_codes(&prefix));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rows_that_are_no_whole_blocks_are_not_held() {
        let matrix = coded(3, 40, Code::Plain(Bits::B8), 32, 1);
        assert!(!holds(TensorType::Q8_0, &matrix.prefix(Bits::B8).unwrap()));
    }

    #[test]
    fn f16_keeps_what_it_can_and_refuses_what_it_cannot() {
        let weights = [1.0, -0.5, 65504.0, 6e-8];
        let bytes = weight_rows(TensorType::F16, &weights, 2).unwrap();
        assert_eq!(decode(TensorType::F16, &bytes)[..3], weights[..3]);
        let error = weight_rows(TensorType::F16, &[1.0, 1.0, 1.0, 7e4], 2).unwrap_err();
        assert!(matches!(error, QuantError::ScaleOverflow { row: 1, col: 1, .. }));
        assert!(weight_rows(TensorType::F16, &[f32::NAN], 1).is_err());
    }
}
