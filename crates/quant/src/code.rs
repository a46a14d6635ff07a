//! Which group codes exist: plain b-bit ones, and 8-bit ones cut from the top into planes whose prefixes are codes too.
//!
//! A weight is `scale · 2^(full − b) · (u − zero_point)` with an unsigned code `u` of `b` bits, one scale per row and
//! group, and one zero point per prefix and matrix. Where the bits lie is [`crate::layout`]'s.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::QuantError;

/// A width that weights can be decoded at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Bits {
    B1,
    B2,
    B3,
    B4,
    B8,
}

impl Bits {
    /// Narrow to wide.
    pub const ALL: [Self; 5] = [Self::B1, Self::B2, Self::B3, Self::B4, Self::B8];

    /// The number of bits.
    pub const fn get(self) -> u32 {
        match self {
            Self::B1 => 1,
            Self::B2 => 2,
            Self::B3 => 3,
            Self::B4 => 4,
            Self::B8 => 8,
        }
    }
}

impl TryFrom<u32> for Bits {
    type Error = QuantError;

    fn try_from(bits: u32) -> Result<Self, QuantError> {
        Self::ALL
            .into_iter()
            .find(|b| b.get() == bits)
            .ok_or(QuantError::Bits { found: bits })
    }
}

impl From<Bits> for u32 {
    fn from(bits: Bits) -> Self {
        bits.get()
    }
}

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.get())
    }
}

/// How the codes of one matrix are cut. Its text form is `plain4`, `nested2+2+4`, …
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Code {
    /// One plane, one width. Group 32: 8 bits equal Q8_0, 4 bits equal Q4_0.
    Plain(Bits),
    /// 8 bits in planes of 2 + 2 + 4: prefixes of 2, 4 and 8 bits.
    Nested224,
    /// 8 bits in planes of 4 + 4: prefixes of 4 and 8 bits.
    Nested44,
}

/// Bits of a code that lie together: the unit that kernels unpack. Its value counts `2^shift` in the full code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Index of the plane that holds it.
    pub plane: usize,
    /// Width: 1, 2, 4 or 8.
    pub bits: u32,
    /// Position of its lowest bit in the code of full width.
    pub shift: u32,
}

const fn field(plane: usize, bits: u32, shift: u32) -> Field {
    Field { plane, bits, shift }
}

impl Code {
    /// Every code, for tests and tables.
    pub const ALL: [Self; 7] = [
        Self::Plain(Bits::B1),
        Self::Plain(Bits::B2),
        Self::Plain(Bits::B3),
        Self::Plain(Bits::B4),
        Self::Plain(Bits::B8),
        Self::Nested224,
        Self::Nested44,
    ];

    const NAMES: &'static str = "plain1, plain2, plain3, plain4, plain8, nested2+2+4, nested4+4";

    /// Text form, as in manifests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain(Bits::B1) => "plain1",
            Self::Plain(Bits::B2) => "plain2",
            Self::Plain(Bits::B3) => "plain3",
            Self::Plain(Bits::B4) => "plain4",
            Self::Plain(Bits::B8) => "plain8",
            Self::Nested224 => "nested2+2+4",
            Self::Nested44 => "nested4+4",
        }
    }

    /// The width of all planes together.
    pub const fn full(self) -> Bits {
        match self {
            Self::Plain(bits) => bits,
            Self::Nested224 | Self::Nested44 => Bits::B8,
        }
    }

    /// The widths that can be decoded, narrow to wide; the last is [`Code::full`].
    pub const fn prefixes(self) -> &'static [Bits] {
        match self {
            Self::Plain(Bits::B1) => &[Bits::B1],
            Self::Plain(Bits::B2) => &[Bits::B2],
            Self::Plain(Bits::B3) => &[Bits::B3],
            Self::Plain(Bits::B4) => &[Bits::B4],
            Self::Plain(Bits::B8) => &[Bits::B8],
            Self::Nested224 => &[Bits::B2, Bits::B4, Bits::B8],
            Self::Nested44 => &[Bits::B4, Bits::B8],
        }
    }

    /// How many planes there are; one for each prefix.
    pub const fn planes(self) -> usize {
        self.prefixes().len()
    }

    /// The fields, plane by plane, high bits first.
    pub const fn fields(self) -> &'static [Field] {
        match self {
            Self::Plain(Bits::B1) => const { &[field(0, 1, 0)] },
            Self::Plain(Bits::B2) => const { &[field(0, 2, 0)] },
            // Two fields in one plane: no kernel unpacks three bits at once.
            Self::Plain(Bits::B3) => const { &[field(0, 2, 1), field(0, 1, 0)] },
            Self::Plain(Bits::B4) => const { &[field(0, 4, 0)] },
            Self::Plain(Bits::B8) => const { &[field(0, 8, 0)] },
            Self::Nested224 => const { &[field(0, 2, 6), field(1, 2, 4), field(2, 4, 0)] },
            Self::Nested44 => const { &[field(0, 4, 4), field(1, 4, 0)] },
        }
    }

    /// The fields of one plane.
    pub fn plane_fields(self, plane: usize) -> impl Iterator<Item = Field> {
        self.fields().iter().copied().filter(move |f| f.plane == plane)
    }

    /// Bits per weight that one plane holds, scales apart.
    pub fn plane_bits(self, plane: usize) -> u32 {
        self.plane_fields(plane).map(|f| f.bits).sum()
    }

    /// Index of a prefix in [`Code::prefixes`]; it needs one plane more than that.
    ///
    /// # Errors
    /// [`QuantError::NoPrefix`] when the code cannot be decoded at this width.
    pub fn prefix_index(self, bits: Bits) -> Result<usize, QuantError> {
        self.prefixes()
            .iter()
            .position(|b| *b == bits)
            .ok_or_else(|| QuantError::NoPrefix {
                code: self.name().to_owned(),
                bits: bits.get(),
                expected: self.prefixes().iter().map(|b| b.get()).collect(),
            })
    }

    /// The zero point of a prefix that nothing was fitted for: the code of zero less half a cell of what is cut off
    /// (cutting floors, so the mean of the lost bits must come back).
    pub fn default_zero_point(self, bits: Bits) -> f32 {
        if self == Self::Plain(Bits::B1) {
            // One level on each side of zero: with a level at zero there would be none on the other.
            return 0.5;
        }
        let full = self.full().get();
        #[expect(clippy::cast_precision_loss, reason = "at most 256")]
        let (zero, cell) = ((1u32 << (full - 1)) as f32, (1u32 << (full - bits.get())) as f32);
        (zero - (cell - 1.0) / 2.0) / cell
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Code {
    type Err = QuantError;

    fn from_str(name: &str) -> Result<Self, QuantError> {
        Self::ALL
            .into_iter()
            .find(|c| c.name() == name)
            .ok_or_else(|| QuantError::Code {
                found: name.to_owned(),
                expected: Self::NAMES,
            })
    }
}

impl TryFrom<String> for Code {
    type Error = QuantError;

    fn try_from(name: String) -> Result<Self, QuantError> {
        name.parse()
    }
}

impl From<Code> for String {
    fn from(code: Code) -> Self {
        code.name().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_cover_every_bit_once_and_prefixes_end_with_planes() {
        for code in Code::ALL {
            let covered: u32 = code.fields().iter().map(|f| ((1 << f.bits) - 1) << f.shift).sum();
            assert_eq!(covered, (1 << code.full().get()) - 1, "{code}");
            let mut bits = 0;
            for (plane, prefix) in code.prefixes().iter().enumerate() {
                bits += code.plane_bits(plane);
                assert_eq!(bits, prefix.get(), "{code}");
            }
            assert_eq!(code.name().parse(), Ok(code));
        }
        assert!(matches!("plain5".parse::<Code>(), Err(QuantError::Code { .. })));
    }

    #[test]
    fn cutting_floors_and_the_zero_point_takes_it_back() {
        assert_eq!(Code::Plain(Bits::B4).default_zero_point(Bits::B4), 8.0);
        assert_eq!(Code::Nested224.default_zero_point(Bits::B8), 128.0);
        assert_eq!(Code::Nested224.default_zero_point(Bits::B4), 7.53125);
        assert_eq!(Code::Nested224.default_zero_point(Bits::B2), 1.5078125);
        assert_eq!(Code::Plain(Bits::B1).default_zero_point(Bits::B1), 0.5);
    }
}
