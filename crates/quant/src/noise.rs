//! Matrices whose codes are noise: for timing shapes without a checkpoint. What codes are does not change how long they
//! take; that every byte differs keeps memory from being shared. Law: a valid matrix of its format, padding included.

use half::f16;

use crate::coded::CodedMatrix;
use crate::layout::{BLOCK_ROWS, MatrixFormat, ScaleForm};

/// Fills `bytes` with noise (xorshift64*, Vigna 2016), several gigabytes a second.
pub fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let (words, rest) = bytes.as_chunks_mut::<8>();
    let mut next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    for word in words {
        *word = next().to_le_bytes();
    }
    let last = next().to_le_bytes();
    rest.iter_mut().zip(last).for_each(|(byte, noise)| *byte = noise);
}

/// Codes of noise under one `scale`, with the zero points that nothing was fitted for.
pub fn matrix(format: MatrixFormat, scale: f32, seed: u64) -> CodedMatrix {
    let code = format.code();
    let mut planes: Vec<Vec<u8>> = (0..code.planes()).map(|p| vec![0; format.plane_bytes(p)]).collect();
    for (plane, index) in planes.iter_mut().zip(0u64..) {
        fill(plane, seed.wrapping_mul(31).wrapping_add(index));
    }
    // Two-level: all six bits set, so that each group's is the highest multiple of the coarse one.
    let scale = match format.scales() {
        ScaleForm::F16 => f16::from_f32(scale),
        ScaleForm::TwoLevel => f16::from_f32(scale / 31.0),
    };
    let every = format.scale_block_groups();
    for block in 0..format.row_blocks() {
        for tile in 0..format.tiles() {
            let extent = format.tile(0, block, tile);
            let scales = format.tile_steps(tile) * format.step_bytes(0)..extent.bytes;
            planes[0][extent.offset..extent.offset + extent.bytes][scales].fill(0xff);
        }
        for row in block * BLOCK_ROWS..(block + 1) * BLOCK_ROWS {
            let own = if row < format.rows() { scale } else { f16::ZERO };
            for group in (0..format.groups()).step_by(every) {
                let at = match format.scales() {
                    ScaleForm::F16 => format.locate_scale(row, group),
                    ScaleForm::TwoLevel => format.locate_two_level(row, group).coarse,
                };
                planes[0][at..at + 2].copy_from_slice(&own.to_le_bytes());
            }
        }
    }
    CodedMatrix {
        format,
        planes,
        zero_points: code.prefixes().iter().map(|b| code.default_zero_point(*b)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::Code;
    use crate::decode::decode;

    #[test]
    fn noise_is_a_matrix_of_its_format_with_one_scale_and_empty_padding() {
        for code in Code::ALL {
            for group in [32, 64, 128] {
                let format = MatrixFormat::try_new(21, 330, code, group).unwrap();
                let noise = matrix(format, 0.25, 7);
                for (plane, bytes) in noise.planes.iter().enumerate() {
                    assert_eq!(bytes.len(), format.plane_bytes(plane));
                }
                let prefix = noise.prefix(code.full()).unwrap();
                for row in 0..21 {
                    assert!((0..format.groups()).all(|group| prefix.scale_at(row, group) == 0.25));
                }
                let weights = decode(&prefix);
                let mean = weights.iter().sum::<f32>() / weights.len() as f32;
                let size = 0.25 * (0.5 * 2f32.powi(code.full().get() as i32)).max(1.0);
                assert!(
                    weights.iter().all(|w| w.abs() <= size) && mean.abs() <= 0.3 * size,
                    "{code} {mean}"
                );
                assert_eq!(prefix.scale_at(31, 0), 0.0);
                assert_ne!(matrix(format, 0.25, 8), noise);
            }
        }
    }
}
