//! Stored weights as f32, with the first that is not finite found on the way: a piece is checked while it is still in
//! cache. Law: exact, every f16, bf16 and e4m3fn is an f32; NaN and infinities are found wherever they stand.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{DType, SCALE_BLOCK};

/// Elements that are decoded and then checked.
const PIECE: usize = 4096;

/// Little-endian weights as f32; `None` for a type that holds no weights by itself.
pub fn decode_f32(bytes: &[u8], dtype: DType) -> Option<Vec<f32>> {
    checked(bytes, dtype).map(|(values, _)| values)
}

/// [`decode_f32`], and the index of the first value that is not finite.
pub(super) fn checked(bytes: &[u8], dtype: DType) -> Option<(Vec<f32>, Option<usize>)> {
    match dtype {
        DType::F32 => Some(pieces(bytes.as_chunks::<4>().0, |from, to| {
            to.extend(from.iter().map(|b| f32::from_le_bytes(*b)));
        })),
        DType::BF16 => Some(pieces(bytes.as_chunks::<2>().0, |from, to| {
            let wide = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            to.extend(from.iter().map(wide));
        })),
        DType::F16 => {
            // By the slice: one value at a time asks for the CPU's instructions each time.
            let mut halves: Vec<f16> = Vec::with_capacity(PIECE);
            Some(pieces(bytes.as_chunks::<2>().0, |from, to| {
                halves.clear();
                halves.extend(from.iter().map(|b| f16::from_le_bytes(*b)));
                let start = to.len();
                to.resize(start + from.len(), 0.0);
                halves.convert_to_f32_slice(&mut to[start..]);
            }))
        }
        DType::F8E4M3 | DType::U8 | DType::Other(_) => None,
    }
}

/// An FP8 matrix `[_, columns]` times its scales, row major by block; and the first value that is not finite.
pub(super) fn fp8(bytes: &[u8], columns: usize, scales: &[f32]) -> (Vec<f32>, Option<usize>) {
    let table: Vec<f32> = (0..=u8::MAX).map(e4m3fn).collect();
    let blocks = columns.div_ceil(SCALE_BLOCK);
    let mut values = Vec::with_capacity(bytes.len());
    let mut bad = None;
    for (row, bytes) in bytes.chunks_exact(columns.max(1)).enumerate() {
        let start = values.len();
        let scales = &scales[row / SCALE_BLOCK * blocks..][..blocks];
        for (bytes, scale) in bytes.chunks(SCALE_BLOCK).zip(scales) {
            values.extend(bytes.iter().map(|&b| table[usize::from(b)] * scale));
        }
        if bad.is_none() && any_not_finite(&values[start..]) {
            bad = values[start..].iter().position(|v| !v.is_finite()).map(|at| start + at);
        }
    }
    (values, bad)
}

/// One e4m3fn number (Micikevicius et al., 2022): no infinities, 0x7f and 0xff are NaN.
fn e4m3fn(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f32::from(byte & 7));
    sign * match (exponent, byte & 0x7f) {
        (_, 0x7f) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

fn pieces<T>(stored: &[T], mut decode: impl FnMut(&[T], &mut Vec<f32>)) -> (Vec<f32>, Option<usize>) {
    let mut values = Vec::with_capacity(stored.len());
    let mut bad = None;
    for piece in stored.chunks(PIECE) {
        let start = values.len();
        decode(piece, &mut values);
        if bad.is_none() && any_not_finite(&values[start..]) {
            bad = values[start..].iter().position(|v| !v.is_finite()).map(|at| start + at);
        }
    }
    (values, bad)
}

/// Without branches, so that it runs in lanes.
fn any_not_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    let all_ones = |v: &f32| v.to_bits() & EXPONENT == EXPONENT;
    values.iter().fold(false, |any, v| any | all_ones(v))
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn every_half_is_decoded_exactly() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
        for (dtype, truth) in [
            (
                DType::F16,
                bits.iter().map(|&b| f16::from_bits(b).to_f32()).collect::<Vec<f32>>(),
            ),
            (DType::BF16, bits.iter().map(|&b| bf16::from_bits(b).to_f32()).collect()),
        ] {
            let (found, bad) = checked(&bytes, dtype).unwrap();
            assert_eq!(bad, truth.iter().position(|v| !v.is_finite()));
            for (found, truth) in found.iter().zip(&truth) {
                assert!(found == truth || (found.is_nan() && truth.is_nan()), "{found} {truth}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_found_wherever_it_stands() {
        let length = 2 * PIECE + 37;
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 1, PIECE - 1, PIECE, 2 * PIECE + 36] {
                let mut values = vec![f32::MAX; length];
                values[at] = bad;
                values[length - 1] = bad;
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                assert_eq!(checked(&bytes, DType::F32).unwrap().1, Some(at));
            }
        }
        assert_eq!(checked(&[], DType::F32).unwrap(), (Vec::new(), None));
    }

    /// The values of the format's table: least and largest of either kind, and signs.
    #[test]
    fn fp8_has_the_values_of_its_table() {
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xb8, -1.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(e4m3fn(byte), value, "{byte:#x}");
        }
        assert!(e4m3fn(0x7f).is_nan() && e4m3fn(0xff).is_nan());
    }

    /// Law: each element times the scale of its block, cut blocks at the edges too.
    #[test]
    fn fp8_is_multiplied_by_the_scale_of_its_block() {
        for (rows, columns) in [(1usize, 1usize), (3, 130), (129, 128), (257, 300), (128, 5)] {
            let blocks = columns.div_ceil(128);
            let bytes: Vec<u8> = (0..rows * columns).map(|i| (i * 31 % 127) as u8).collect();
            let scales: Vec<f32> = (0..rows.div_ceil(128) * blocks).map(|i| i as f32 + 0.5).collect();
            let (values, bad) = fp8(&bytes, columns, &scales);
            assert_eq!((values.len(), bad), (rows * columns, None));
            for (i, value) in values.iter().enumerate() {
                let scale = scales[i / columns / 128 * blocks + i % columns / 128];
                assert_eq!(*value, e4m3fn(bytes[i]) * scale);
            }
        }
        assert_eq!(fp8(&[0x38, 0x7f], 2, &[1.0]).1, Some(1));
    }
}
