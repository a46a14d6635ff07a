//! Codes back to weights, and what a prefix loses: the plain reference of every kernel.

use crate::QuantError;
use crate::coded::Prefix;
use crate::layout::{BLOCK_ROWS, STEP, TILE_STEPS};

/// The weights `[rows, cols]`, row major, at the prefix's width: `scale · cell · (u − zero_point)`.
pub fn decode(prefix: &Prefix<'_>) -> Vec<f32> {
    let format = prefix.format();
    let mut weights = vec![0.0; format.rows() * format.cols()];
    for (row, weights) in weights.chunks_exact_mut(format.cols()).enumerate() {
        decode_row(prefix, row, weights);
    }
    weights
}

/// One row of [`decode`] into `weights` `[cols]`: tile by tile, so that a look-up of an embedding costs what it reads.
///
/// # Panics
/// No such row, another number of weights.
pub fn decode_row(prefix: &Prefix<'_>, row: usize, weights: &mut [f32]) {
    let format = prefix.format();
    assert!(
        row < format.rows() && weights.len() == format.cols(),
        "a row of {format:?}"
    );
    let (block, in_block) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
    for (tile, weights) in weights.chunks_mut(TILE_STEPS * STEP).enumerate() {
        for (step, weights) in weights.chunks_mut(STEP).enumerate() {
            let mut codes = [0u8; STEP];
            // Bytes that earlier fields of the same plane take in a step.
            let mut before = (usize::MAX, 0);
            for field in prefix.fields() {
                if before.0 != field.plane {
                    before = (field.plane, 0);
                }
                let bits = field.bits as usize;
                let at = step * format.step_bytes(field.plane) + before.1;
                let lines = &prefix.tile(field.plane, block, tile)[at..at + 64 * bits];
                let mask = 255u8 >> (8 - bits);
                let line_cols = STEP / bits;
                for (col, code) in codes.iter_mut().enumerate() {
                    let (line, in_line) = (col / line_cols, col % line_cols);
                    let byte = lines[64 * line + 4 * in_block + in_line % 4];
                    *code |= (byte >> (bits * (in_line / 4)) & mask) << field.shift;
                }
                before.1 += 64 * bits;
            }
            // A step has one group or a part of one, or two groups of 16.
            let first_col = (tile * TILE_STEPS + step) * STEP;
            let parts = weights
                .chunks_mut(format.group())
                .zip(codes.chunks(format.group().min(STEP)));
            for (part, (weights, codes)) in parts.enumerate() {
                let group = first_col / format.group() + part;
                let scale = prefix.scale_at(row, group) * prefix.cell();
                for (weight, code) in weights.iter_mut().zip(codes) {
                    *weight = scale * (f32::from(*code) - prefix.zero_point());
                }
            }
        }
    }
}

/// What a width loses, over all weights of a matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrefixError {
    /// `‖ŵ − w‖ / ‖w‖`; 0 where all weights are 0 and decode to 0.
    pub delta: f64,
    /// `‖ŵ‖ / ‖w‖`; 1 where both are 0.
    pub rho: f64,
    /// Mean of `ŵ − w`, in the weights' own unit.
    pub mean: f64,
}

/// Error of one width against the weights `[rows, cols]` that were coded.
///
/// # Errors
/// `weights` has another length than the format.
pub fn prefix_error(weights: &[f32], prefix: &Prefix<'_>) -> Result<PrefixError, QuantError> {
    let decoded = decode(prefix);
    if weights.len() != decoded.len() {
        return Err(QuantError::Length {
            what: "weights",
            found: weights.len(),
            expected: decoded.len(),
        });
    }
    let (mut lost, mut kept, mut whole, mut sum) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
    for (&w, &d) in weights.iter().zip(&decoded) {
        let (w, d) = (f64::from(w), f64::from(d));
        lost += (d - w) * (d - w);
        kept += d * d;
        whole += w * w;
        sum += d - w;
    }
    let ratio = |x: f64, same: f64| if x == whole { same } else { (x / whole).sqrt() };
    #[expect(clippy::cast_precision_loss, reason = "a mean")]
    let mean = sum / decoded.len() as f64;
    Ok(PrefixError {
        delta: if lost == 0.0 { 0.0 } else { (lost / whole).sqrt() },
        rho: ratio(kept, 1.0),
        mean,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::Code;
    use crate::encode::encode;
    use crate::layout::MatrixFormat;

    /// Law: a row by tiles equals its weights one by one, for every code, group, prefix and odd shape.
    #[test]
    fn rows_equal_their_weights_one_by_one() {
        for code in Code::ALL {
            for (rows, cols, group) in [(1, 1, 32), (17, 100, 32), (33, 200, 64), (5, 333, 128)] {
                let format = MatrixFormat::try_new(rows, cols, code, group).unwrap();
                let weights: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.37).sin()).collect();
                let coded = encode(&weights, format).unwrap();
                for &bits in code.prefixes() {
                    let prefix = coded.prefix(bits).unwrap();
                    let mut found = vec![f32::NAN; cols];
                    for row in 0..rows {
                        decode_row(&prefix, row, &mut found);
                        for (col, found) in found.iter().enumerate() {
                            let scale = prefix.scale_at(row, col / group) * prefix.cell();
                            let truth = scale * (f32::from(prefix.code_at(row, col)) - prefix.zero_point());
                            assert_eq!(*found, truth, "{code} {bits} {row} {col}");
                        }
                    }
                }
            }
        }
    }
}
