//! Weights of 16 bits, f16 or bf16, in the order that kernels read: 16 rows side by side, columns ascending. The form of
//! experts that no code has touched, and of factors; a container holds codes only.
//!
//! Law: `y[r] = Σ_s a_scale[s] · ((p0 + p1) + (p2 + p3))`, `p_j` the fused sum over the step's columns c ≡ j mod 4 of
//! `w[r, c] · code[c]`: four chains, because one would wait for every multiply-add, and one order on every path.

use cotk_quant::QuantError;
use cotk_quant::layout::{BLOCK_ROWS, MAX_DIM, STEP};
use half::{bf16, f16};

/// How 16 bits are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HalfKind {
    F16,
    Bf16,
}

impl HalfKind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::F16, Self::Bf16];

    /// Widened exactly.
    pub fn widen(self, bytes: [u8; 2]) -> f32 {
        match self {
            Self::F16 => f16::from_le_bytes(bytes).to_f32(),
            Self::Bf16 => bf16::from_le_bytes(bytes).to_f32(),
        }
    }

    /// Rounded to the nearest.
    pub fn narrow(self, value: f32) -> [u8; 2] {
        match self {
            Self::F16 => f16::from_f32(value).to_le_bytes(),
            Self::Bf16 => bf16::from_f32(value).to_le_bytes(),
        }
    }
}

/// Bytes of one column of 16 rows.
pub(crate) const COLUMN_BYTES: usize = 2 * BLOCK_ROWS;

/// A matrix `[rows, cols]` of 16-bit weights whose bytes belong to someone else. Cheap to copy.
#[derive(Debug, Clone, Copy)]
pub struct HalfMatrix<'a> {
    rows: usize,
    cols: usize,
    kind: HalfKind,
    bytes: &'a [u8],
}

impl<'a> HalfMatrix<'a> {
    /// Checks shape and length once; `bytes` as of [`lay_out`].
    ///
    /// # Errors
    /// Rows or columns outside `1..=2^24`, another length than [`half_bytes`].
    pub fn try_new(rows: usize, cols: usize, kind: HalfKind, bytes: &'a [u8]) -> Result<Self, QuantError> {
        if !(1..=MAX_DIM).contains(&rows) || !(1..=MAX_DIM).contains(&cols) {
            return Err(QuantError::Shape {
                rows,
                cols,
                limit: MAX_DIM,
            });
        }
        let (found, expected) = (bytes.len(), half_bytes(rows, cols));
        if found != expected {
            return Err(QuantError::PlaneBytes {
                plane: 0,
                found,
                expected,
            });
        }
        Ok(Self {
            rows,
            cols,
            kind,
            bytes,
        })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn kind(&self) -> HalfKind {
        self.kind
    }

    /// Blocks of 16 rows.
    pub fn row_blocks(&self) -> usize {
        self.rows.div_ceil(BLOCK_ROWS)
    }

    /// Bytes of a row block.
    pub fn block_bytes(&self) -> usize {
        COLUMN_BYTES * self.cols.next_multiple_of(STEP)
    }

    /// One weight, widened.
    pub fn at(&self, row: usize, col: usize) -> f32 {
        let line = &self.block(row / BLOCK_ROWS)[col];
        let at = 2 * (row % BLOCK_ROWS);
        self.kind.widen([line[at], line[at + 1]])
    }

    /// The columns of one block of rows, padded to a multiple of 32.
    pub(crate) fn block(&self, block: usize) -> &'a [[u8; COLUMN_BYTES]] {
        let bytes = COLUMN_BYTES * self.cols.next_multiple_of(STEP);
        self.bytes[block * bytes..(block + 1) * bytes].as_chunks().0
    }
}

/// Bytes of a matrix: rows padded to 16, columns to 32.
pub fn half_bytes(rows: usize, cols: usize) -> usize {
    2 * rows.next_multiple_of(BLOCK_ROWS) * cols.next_multiple_of(STEP)
}

/// Weights `[rows, cols]`, row major, rounded to nearest and laid out; padding is 0.
///
/// # Panics
/// When their number is another.
pub fn lay_out(weights: &[f32], rows: usize, cols: usize, kind: HalfKind) -> Vec<u8> {
    assert_eq!(weights.len(), rows * cols, "weights are [{rows}, {cols}]");
    let mut bytes = vec![0; half_bytes(rows, cols)];
    let block_bytes = COLUMN_BYTES * cols.next_multiple_of(STEP);
    for (row, weights) in weights.chunks_exact(cols).enumerate() {
        for (col, weight) in weights.iter().enumerate() {
            let at = row / BLOCK_ROWS * block_bytes + COLUMN_BYTES * col + 2 * (row % BLOCK_ROWS);
            bytes[at..at + 2].copy_from_slice(&kind.narrow(*weight));
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_laid_out_is_read_back() {
        let (rows, cols) = (19, 45);
        let weights: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.37).sin()).collect();
        for kind in HalfKind::ALL {
            let bytes = lay_out(&weights, rows, cols, kind);
            let matrix = HalfMatrix::try_new(rows, cols, kind, &bytes).unwrap();
            for (i, weight) in weights.iter().enumerate() {
                assert_eq!(matrix.at(i / cols, i % cols), kind.widen(kind.narrow(*weight)));
            }
            assert!(HalfMatrix::try_new(rows, cols, kind, &bytes[1..]).is_err());
            assert!(HalfMatrix::try_new(0, cols, kind, &bytes).is_err());
        }
    }
}
