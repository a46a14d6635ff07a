//! The forms of weights that kernels multiply: group codes at a prefix, 16-bit floats; whole, or as a product of two
//! factors. Which kernel reads a form is decided here, once.

use cotk_quant::QuantError;
use cotk_quant::coded::Prefix;

use super::activations::Activations;
use super::dispatch::{BlockOut, Isa};
use super::half_matrix::HalfMatrix;

/// One matrix `[rows, cols]` as it lies in memory.
#[derive(Debug, Clone, Copy)]
pub enum Weights<'a> {
    Coded(Prefix<'a>),
    Half(HalfMatrix<'a>),
}

impl Weights<'_> {
    pub fn rows(&self) -> usize {
        match self {
            Self::Coded(prefix) => prefix.format().rows(),
            Self::Half(half) => half.rows(),
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Self::Coded(prefix) => prefix.format().cols(),
            Self::Half(half) => half.cols(),
        }
    }

    /// Blocks of 16 rows.
    pub fn row_blocks(&self) -> usize {
        self.rows().div_ceil(cotk_quant::layout::BLOCK_ROWS)
    }

    /// One row block for up to 8 tokens (8, 4, 2 or 1).
    pub(crate) fn block(&self, isa: Isa, block: usize, acts: &Activations, first_token: usize, out: &mut [BlockOut]) {
        match self {
            Self::Coded(prefix) => isa.block(prefix, block, acts, first_token, out),
            Self::Half(half) => isa.half_block(half, block, acts, first_token, out),
        }
    }
}

impl<'a> From<Prefix<'a>> for Weights<'a> {
    fn from(prefix: Prefix<'a>) -> Self {
        Self::Coded(prefix)
    }
}

impl<'a> From<HalfMatrix<'a>> for Weights<'a> {
    fn from(half: HalfMatrix<'a>) -> Self {
        Self::Half(half)
    }
}

/// A linear map `[rows, cols]`.
#[derive(Debug, Clone, Copy)]
pub enum Matrix<'a> {
    Whole(Weights<'a>),
    /// `left · right`, left `[rows, rank]`, right `[rank, cols]`; what stands between them is quantized like any
    /// activation.
    Product {
        left: Weights<'a>,
        right: Weights<'a>,
    },
}

impl<'a> Matrix<'a> {
    /// Two factors.
    ///
    /// # Errors
    /// Columns of `left` that are not the rows of `right`.
    pub fn product(left: impl Into<Weights<'a>>, right: impl Into<Weights<'a>>) -> Result<Self, QuantError> {
        let (left, right) = (left.into(), right.into());
        if left.cols() != right.rows() {
            return Err(QuantError::Length {
                what: "rows of the right factor (columns of the left: expected)",
                found: right.rows(),
                expected: left.cols(),
            });
        }
        Ok(Self::Product { left, right })
    }

    pub fn rows(&self) -> usize {
        match self {
            Self::Whole(weights) => weights.rows(),
            Self::Product { left, .. } => left.rows(),
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Self::Whole(weights) => weights.cols(),
            Self::Product { right, .. } => right.cols(),
        }
    }

    /// Width between the factors; 0 for a whole matrix.
    pub fn rank(&self) -> usize {
        match self {
            Self::Whole(_) => 0,
            Self::Product { left, .. } => left.cols(),
        }
    }
}

impl<'a> From<Prefix<'a>> for Matrix<'a> {
    fn from(prefix: Prefix<'a>) -> Self {
        Self::Whole(prefix.into())
    }
}

impl<'a> From<HalfMatrix<'a>> for Matrix<'a> {
    fn from(half: HalfMatrix<'a>) -> Self {
        Self::Whole(half.into())
    }
}
