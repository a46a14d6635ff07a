//! One expert at one width, borrowed: from a mapped file, or from codes that are about to be written.
//! Law: [`MatrixView::weights`] is what every kernel computes with, up to rounding.

use cotk_quant::coded::Prefix;
use cotk_quant::decode::decode;

use crate::layout::Part;

/// One matrix at one width.
#[derive(Debug, Clone, Copy)]
pub enum MatrixView<'a> {
    Codes(Prefix<'a>),
    /// `codes + left · right`.
    Corrected {
        codes: Prefix<'a>,
        left: Prefix<'a>,
        right: Prefix<'a>,
    },
    /// `left · right`.
    Product {
        left: Prefix<'a>,
        right: Prefix<'a>,
    },
}

impl<'a> MatrixView<'a> {
    pub fn rows(&self) -> usize {
        match self {
            Self::Codes(codes) | Self::Corrected { codes, .. } => codes.format().rows(),
            Self::Product { left, .. } => left.format().rows(),
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Self::Codes(codes) | Self::Corrected { codes, .. } => codes.format().cols(),
            Self::Product { right, .. } => right.format().cols(),
        }
    }

    /// Bits per weight that are read: of the codes, or of the factors where there is nothing else.
    pub fn bits(&self) -> u32 {
        match self {
            Self::Codes(codes) | Self::Corrected { codes, .. } => codes.bits().get(),
            Self::Product { left, .. } => left.bits().get(),
        }
    }

    /// Whether all planes are read.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Codes(codes) | Self::Corrected { codes, .. } => codes.bits() == codes.format().code().full(),
            Self::Product { .. } => true,
        }
    }

    /// The codes, where they are all there is.
    pub fn codes(&self) -> Option<Prefix<'a>> {
        match self {
            Self::Codes(codes) => Some(*codes),
            Self::Corrected { .. } | Self::Product { .. } => None,
        }
    }

    /// Width between the factors; 0 without any.
    pub fn rank(&self) -> usize {
        match self {
            Self::Codes(_) => 0,
            Self::Corrected { left, .. } | Self::Product { left, .. } => left.format().cols(),
        }
    }

    /// Decoded, row major, `[rows, cols]`.
    pub fn weights(&self) -> Vec<f32> {
        match self {
            Self::Codes(codes) => decode(codes),
            Self::Corrected { codes, left, right } => {
                let mut weights = decode(codes);
                add_product(left, right, &mut weights);
                weights
            }
            Self::Product { left, right } => {
                let mut weights = vec![0.0; self.rows() * self.cols()];
                add_product(left, right, &mut weights);
                weights
            }
        }
    }
}

/// `weights += left · right`, summed in f64 along the rank.
fn add_product(left: &Prefix<'_>, right: &Prefix<'_>, weights: &mut [f32]) {
    let (rank, cols) = (right.format().rows(), right.format().cols());
    let (left, right) = (decode(left), decode(right));
    let mut sums = vec![0.0f64; cols];
    for (row, left) in weights.chunks_exact_mut(cols).zip(left.chunks_exact(rank)) {
        sums.fill(0.0);
        for (&a, right) in left.iter().zip(right.chunks_exact(cols)) {
            let a = f64::from(a);
            sums.iter_mut()
                .zip(right)
                .for_each(|(sum, &b)| *sum += a * f64::from(b));
        }
        #[expect(clippy::cast_possible_truncation, reason = "a weight")]
        row.iter_mut()
            .zip(&sums)
            .for_each(|(w, &sum)| *w = (f64::from(*w) + sum) as f32);
    }
}

/// One expert at one width.
#[derive(Debug, Clone, Copy)]
pub struct ExpertView<'a> {
    /// `[inner, hidden]`.
    pub gate: MatrixView<'a>,
    /// `[inner, hidden]`.
    pub up: MatrixView<'a>,
    /// `[hidden, inner]`.
    pub down: MatrixView<'a>,
}

impl<'a> ExpertView<'a> {
    /// One matrix.
    pub fn part(&self, part: Part) -> MatrixView<'a> {
        match part {
            Part::Gate => self.gate,
            Part::Up => self.up,
            Part::Down => self.down,
        }
    }

    /// One matrix decoded, row major: what every kernel computes with, up to rounding.
    pub fn weights(&self, part: Part) -> Vec<f32> {
        self.part(part).weights()
    }

    /// Rows of gate and up.
    pub fn inner(&self) -> usize {
        self.gate.rows()
    }
}
