//! Whether the numbers that codes are multiplied by are numbers: codes themselves are always finite, the f16 beside them may
//! be NaN or infinite in a file that was written so. Law: the first such scale is found, whatever the format.

use cotk_quant::coded::Prefix;
use cotk_quant::layout::{BLOCK_ROWS, SCALE_BYTES, ScaleForm};
use half::f16;

/// A scale that is no number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BadScale {
    /// Of the matrix; rows that only fill up a row block count on.
    pub row: usize,
    pub found: f32,
}

/// The first f16 of plane 0 that is NaN or infinite: the scale of a group or, two-level, of eight. Reads one value in
/// [`MatrixFormat::group`](cotk_quant::layout::MatrixFormat::group) weights, in file order.
pub(crate) fn bad_scale(codes: &Prefix<'_>) -> Option<BadScale> {
    (0..codes.format().row_blocks()).find_map(|block| bad_scale_of(codes, block))
}

/// The same in one row block.
pub fn bad_scale_of(codes: &Prefix<'_>, block: usize) -> Option<BadScale> {
    let format = codes.format();
    let step = format.step_bytes(0);
    (0..format.tiles()).find_map(|tile| {
        let scales = &codes.tile(0, block, tile)[format.tile_steps(tile) * step..];
        // Of two levels a tile begins at most one block, and its f16 come first.
        let scales = match format.scales() {
            ScaleForm::F16 => scales,
            ScaleForm::TwoLevel => &scales[..scales.len().min(SCALE_BYTES)],
        };
        let (at, found) = bad_half(scales)?;
        Some(BadScale {
            row: block * BLOCK_ROWS + at % BLOCK_ROWS,
            found,
        })
    })
}

/// The first f16 (little endian) that is NaN or infinite, and where.
pub(crate) fn bad_half(bytes: &[u8]) -> Option<(usize, f32)> {
    /// All bits of the exponent.
    const EXPONENT: u16 = 0x7c00;
    let halves = bytes.as_chunks::<2>().0;
    // Without a branch for each: nearly always all are numbers.
    let is_bad = halves.iter().fold(false, |bad, half| {
        bad | (u16::from_le_bytes(*half) & EXPONENT == EXPONENT)
    });
    if !is_bad {
        return None;
    }
    let values = halves.iter().map(|half| f16::from_le_bytes(*half).to_f32());
    values.enumerate().find(|(_, value)| !value.is_finite())
}

#[cfg(test)]
mod tests {
    use cotk_quant::code::{Bits, Code};
    use cotk_quant::encode::encode;
    use cotk_quant::layout::{MatrixFormat, WHOLE_ROW};

    use super::*;

    /// Law: wherever a scale lies, one that is no number is found with its row, and nothing else is.
    #[test]
    fn the_first_scale_that_is_no_number_is_found() {
        let forms = [
            (32, ScaleForm::F16),
            (64, ScaleForm::F16),
            (WHOLE_ROW, ScaleForm::F16),
            (16, ScaleForm::TwoLevel),
        ];
        for (rows, cols) in [(1, 40), (20, 300), (33, 96)] {
            for code in [
                Code::Plain(Bits::B1),
                Code::Plain(Bits::B4),
                Code::Plain(Bits::B8),
                Code::Nested224,
            ] {
                for (group, scales) in forms {
                    let format = MatrixFormat::try_with_scales(rows, cols, code, group, scales).unwrap();
                    let weights: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.7).sin()).collect();
                    let good = encode(&weights, format).unwrap();
                    let narrowest = code.prefixes()[0];
                    assert_eq!(bad_scale(&good.prefix(narrowest).unwrap()), None);
                    for (row, half) in [(0, f16::NAN), (rows - 1, f16::INFINITY)] {
                        for group in [0, format.groups() - 1] {
                            let at = match scales {
                                ScaleForm::F16 => format.locate_scale(row, group),
                                ScaleForm::TwoLevel => format.locate_two_level(row, group).coarse,
                            };
                            let mut bad = good.clone();
                            bad.planes[0][at..at + 2].copy_from_slice(&half.to_le_bytes());
                            let found = bad_scale(&bad.prefix(narrowest).unwrap()).expect("it is there");
                            assert_eq!((found.row, found.found.is_nan()), (row, half.is_nan()), "{format:?}");
                        }
                    }
                }
            }
        }
    }
}
