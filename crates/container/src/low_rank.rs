//! Matrices in two factors, `left · right`: a correction on top of codes, or all there is. Both factors are plain codes of
//! one plane and stand in section 0, so that every prefix of a record has them. Law: what the factors say of themselves
//! fits the matrix that they belong to.

use cotk_quant::QuantError;
use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::{CodedMatrix, CodedView, Prefix};
use cotk_quant::encode::encode;
use cotk_quant::layout::{MatrixFormat, Placement};
use serde::{Deserialize, Serialize};

/// Ranks are multiples of this: a row block.
pub const RANK_STEP: usize = 16;
/// Width of the codes that [`LowRank::try_new`] stores factors in.
const FACTOR_BITS: Bits = Bits::B8;
const FACTOR_GROUP: usize = 32;

/// What two factors are to their matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Added to what the codes say, at every prefix.
    Correction,
    /// In the place of codes.
    Product,
}

/// Shapes and codes of two factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LowRank {
    pub role: Role,
    /// `[rows, rank]`.
    pub left: MatrixFormat,
    /// `[rank, cols]`.
    pub right: MatrixFormat,
}

impl LowRank {
    /// 8-bit codes in groups of 32 for a matrix `[rows, cols]`; `rank` is rounded up to a multiple of [`RANK_STEP`].
    ///
    /// # Errors
    /// Rows, columns or a rank outside `1..=2^24`.
    pub fn try_new(role: Role, rows: usize, cols: usize, rank: usize) -> Result<Self, QuantError> {
        let format = |rows, cols| MatrixFormat::try_new(rows, cols, Code::Plain(FACTOR_BITS), FACTOR_GROUP);
        let rank = rank.next_multiple_of(RANK_STEP);
        Ok(Self {
            role,
            left: format(rows, rank)?,
            right: format(rank, cols)?,
        })
    }

    /// Width between the factors.
    pub fn rank(&self) -> usize {
        self.left.cols()
    }

    /// Bytes of both.
    pub fn bytes(&self) -> u64 {
        (self.left.total_bytes() + self.right.total_bytes()) as u64
    }

    /// Fits a matrix of this format; errors are (found, expected).
    pub(crate) fn check(&self, whole: MatrixFormat) -> Result<(), (String, String)> {
        let Self { role, left, right } = self;
        let found = (left.rows(), left.cols(), right.rows(), right.cols());
        let expected = (whole.rows(), right.rows(), left.cols(), whole.cols());
        if found != expected {
            return Err((format!("{found:?}"), format!("{expected:?}")));
        }
        if !left.cols().is_multiple_of(RANK_STEP) {
            return Err((left.cols().to_string(), format!("a multiple of {RANK_STEP}")));
        }
        if left.code().planes() != 1 || right.code().planes() != 1 {
            let found = format!("{} and {}", left.code(), right.code());
            return Err((found, "plain codes".to_owned()));
        }
        if *role == Role::Product && (whole.code(), whole.code()) != (left.code(), right.code()) {
            let found = format!("{} of factors in {} and {}", whole.code(), left.code(), right.code());
            return Err((found, "one code".to_owned()));
        }
        Ok(())
    }
}

/// Two factors, coded, on their way into a record.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    pub role: Role,
    /// `[rows, rank]`.
    pub left: CodedMatrix,
    /// `[rank, cols]`.
    pub right: CodedMatrix,
}

impl Factors {
    /// Codes `left` `[rows, rank]` and `right` `[rank, cols]`, rounded to the nearest in 8 bits; a rank between multiples of
    /// [`RANK_STEP`] is filled up with zeros.
    ///
    /// # Errors
    /// As [`LowRank::try_new`]; a weight that is not finite or that no f16 scale reaches.
    ///
    /// # Panics
    /// Lengths that are not `rows · rank` and `rank · cols`.
    pub fn encode(
        role: Role,
        left: &[f32],
        right: &[f32],
        (rows, rank, cols): (usize, usize, usize),
    ) -> Result<Self, QuantError> {
        assert_eq!((left.len(), right.len()), (rows * rank, rank * cols), "two factors");
        let format = LowRank::try_new(role, rows, cols, rank)?;
        let width = format.rank();
        let mut padded = vec![0.0; rows * width];
        for (into, row) in padded.chunks_exact_mut(width).zip(left.chunks_exact(rank)) {
            into[..rank].copy_from_slice(row);
        }
        let mut below = right.to_vec();
        below.resize(width * cols, 0.0);
        Ok(Self {
            role,
            left: encode(&padded, format.left)?,
            right: encode(&below, format.right)?,
        })
    }

    /// Their shapes.
    pub fn low_rank(&self) -> LowRank {
        LowRank {
            role: self.role,
            left: self.left.format,
            right: self.right.format,
        }
    }

    /// Left and right.
    pub(crate) fn prefixes(&self) -> [Prefix<'_>; 2] {
        [&self.left, &self.right].map(|factor| {
            let full = factor.prefix(factor.format.code().full());
            full.expect("factors have all of their one plane")
        })
    }
}

/// A factor that lies in `plane`.
pub(crate) fn factor(format: MatrixFormat, plane: &[u8]) -> Prefix<'_> {
    let bits = format.code().full();
    let zero_points = [format.code().default_zero_point(bits)];
    let view = CodedView::try_new(format, &[plane], &zero_points, Placement::Alone);
    let view = view.expect("a plain code whose bytes passed the manifest's gate");
    view.prefix(bits).expect("its plane was just given")
}
