//! The forms of weights that kernels multiply: group codes at a prefix, 16-bit floats; whole, or as a product of two
//! factors. Which kernel reads a form is decided here, once.

use cotk_quant::QuantError;
use cotk_quant::coded::Prefix;

use super::dispatch::{BlockOut, Isa};
use super::half_matrix::HalfMatrix;
use super::panels::Panel;
use super::tiles::Coded;

/// One matrix `[rows, cols]` as it lies in memory.
#[derive(Debug, Clone, Copy)]
#[expect(
    clippy::large_enum_variant,
    reason = "borrowed and short-lived; a box would allocate per expert and token"
)]
pub enum Weights<'a> {
    Coded(Coded<'a>),
    Half(HalfMatrix<'a>),
}

impl Weights<'_> {
    pub fn rows(&self) -> usize {
        match self {
            Self::Coded(coded) => coded.prefix().format().rows(),
            Self::Half(half) => half.rows(),
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Self::Coded(coded) => coded.prefix().format().cols(),
            Self::Half(half) => half.cols(),
        }
    }

    /// Blocks of 16 rows.
    pub fn row_blocks(&self) -> usize {
        self.rows().div_ceil(cotk_quant::layout::BLOCK_ROWS)
    }

    /// Bytes of a row block that kernels read.
    pub fn block_bytes(&self) -> usize {
        match self {
            Self::Coded(coded) => coded.block_bytes,
            Self::Half(half) => half.block_bytes(),
        }
    }

    /// Bytes that kernels read for one pass over all rows.
    pub fn bytes(&self) -> usize {
        self.row_blocks() * self.block_bytes()
    }

    /// One row block for the tokens of a panel; `out` has the panel's width.
    pub(crate) fn block(&self, isa: Isa, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
        match self {
            Self::Coded(coded) => isa.block(coded, block, panel, out),
            Self::Half(half) => isa.half_block(half, block, panel, out),
        }
    }

    /// The same row block of two matrices that meet the same activations.
    pub(crate) fn pair(
        isa: Isa,
        both: [&Self; 2],
        block: usize,
        panel: &Panel<'_>,
        [first, second]: [&mut [BlockOut]; 2],
    ) {
        match both {
            [Self::Coded(a), Self::Coded(b)] if a.prefix().format() == b.prefix().format() && a.widths == b.widths => {
                isa.pair([a, b], block, panel, [first, second]);
            }
            [a, b] => {
                a.block(isa, block, panel, first);
                b.block(isa, block, panel, second);
            }
        }
    }
}

impl<'a> From<Prefix<'a>> for Weights<'a> {
    fn from(prefix: Prefix<'a>) -> Self {
        Self::Coded(prefix.into())
    }
}

impl<'a> From<HalfMatrix<'a>> for Weights<'a> {
    fn from(half: HalfMatrix<'a>) -> Self {
        Self::Half(half)
    }
}

/// A linear map `[rows, cols]`.
#[derive(Debug, Clone, Copy)]
#[expect(
    clippy::large_enum_variant,
    reason = "borrowed and short-lived; a box would allocate per expert and token"
)]
pub enum Matrix<'a> {
    Whole(Weights<'a>),
    /// `left · right`, left `[rows, rank]`, right `[rank, cols]`; what stands between them is quantized like any
    /// activation.
    Product {
        left: Weights<'a>,
        right: Weights<'a>,
    },
    /// `whole + left · right`; what stands between the factors is quantized like any activation.
    Corrected {
        whole: Weights<'a>,
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

    /// Two factors on top of a whole matrix.
    ///
    /// # Errors
    /// As [`product`](Self::product); factors of another shape than the whole.
    pub fn corrected(
        whole: impl Into<Weights<'a>>,
        left: impl Into<Weights<'a>>,
        right: impl Into<Weights<'a>>,
    ) -> Result<Self, QuantError> {
        let (whole, left, right) = (whole.into(), left.into(), right.into());
        let product = Self::product(left, right)?;
        for (what, found, expected) in [
            ("rows of a correction", product.rows(), whole.rows()),
            ("columns of a correction", product.cols(), whole.cols()),
        ] {
            if found != expected {
                return Err(QuantError::Length { what, found, expected });
            }
        }
        Ok(Self::Corrected { whole, left, right })
    }

    /// The factors, left and right.
    pub(crate) fn factors(&self) -> Option<(Weights<'a>, Weights<'a>)> {
        match *self {
            Self::Whole(_) => None,
            Self::Product { left, right } | Self::Corrected { left, right, .. } => Some((left, right)),
        }
    }

    pub fn rows(&self) -> usize {
        match self {
            Self::Whole(weights) | Self::Corrected { whole: weights, .. } => weights.rows(),
            Self::Product { left, .. } => left.rows(),
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Self::Whole(weights) | Self::Corrected { whole: weights, .. } => weights.cols(),
            Self::Product { right, .. } => right.cols(),
        }
    }

    /// Width between the factors; 0 for a whole matrix.
    pub fn rank(&self) -> usize {
        match self {
            Self::Whole(_) => 0,
            Self::Product { left, .. } | Self::Corrected { left, .. } => left.cols(),
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
