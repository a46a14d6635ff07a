//! Where sections, planes and factors lie inside a record, from the three shapes alone: writer, gate and reader agree
//! because they all ask here. Law: pieces of a section are in order, aligned to 64, and end where the section ends.

use cotk_quant::code::Bits;
use cotk_quant::layout::{MatrixFormat, Placement};
use half::f16;

use crate::low_rank::{LowRank, Role};
use crate::manifest::{Matrix, Record};
use crate::record::HEADER_BYTES;

/// Every section and every piece in it starts at a multiple of this: a cache line, a zmm.
const LINE: u64 = 64;
/// Records from this size on start at a page.
const PAGED_BYTES: u64 = 256 * 1024;
const PAGE: u64 = 4096;

/// The matrices of an expert, in record order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Gate,
    Up,
    Down,
}

impl Part {
    /// This one of a record.
    pub(crate) fn of(self, record: &Record) -> &Matrix {
        match self {
            Self::Gate => &record.gate,
            Self::Up => &record.up,
            Self::Down => &record.down,
        }
    }
}

/// What decides where the bytes of one matrix lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub format: MatrixFormat,
    pub rank: Option<LowRank>,
}

impl Shape {
    /// Whether `format` has codes, or only says what the factors multiply to.
    pub(crate) fn has_codes(&self) -> bool {
        self.rank.is_none_or(|factors| factors.role == Role::Correction)
    }

    /// Planes of codes.
    fn planes(&self) -> usize {
        if self.has_codes() {
            self.format.code().planes()
        } else {
            0
        }
    }
}

impl From<MatrixFormat> for Shape {
    fn from(format: MatrixFormat) -> Self {
        Self { format, rank: None }
    }
}

/// What a piece holds of its matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holds {
    Codes,
    Right,
    Left,
}

/// One plane of one matrix, or of gate and up tile by tile in turn; or a factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) part: Part,
    pub(crate) holds: Holds,
    pub(crate) placement: Placement,
    /// From the start of the record.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// One section: a contiguous run of pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SectionLayout {
    /// From the start of the record.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// Gate and up of a pair have two pieces over the same bytes.
    pub(crate) pieces: Vec<Piece>,
}

/// A whole record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) sections: Vec<SectionLayout>,
    /// Header and sections.
    pub(crate) bytes: u64,
}

impl Layout {
    /// Section i: plane i of gate, up and down, of those that have one; behind the lowest planes the factors of gate, up
    /// and down, the right one first. Gate and up tiles alternate where their formats are equal.
    pub(crate) fn of(shapes: [Shape; 3]) -> Self {
        let [gate, up, _] = &shapes;
        let is_pair = gate.format == up.format && gate.has_codes() && up.has_codes();
        let parts = [Part::Gate, Part::Up, Part::Down].into_iter().zip(&shapes);
        let planes = shapes.iter().map(Shape::planes).max().unwrap_or(0).max(1);
        let mut end = HEADER_BYTES as u64;
        let mut sections = Vec::with_capacity(planes);
        for plane in 0..planes {
            let offset = end;
            let mut pieces = Vec::with_capacity(3);
            let mut last_bytes = 0;
            let mut place = |part, holds, placement, bytes: usize| {
                // The second of a pair lies over the first.
                if placement != Placement::PairSecond {
                    end = (end + last_bytes).next_multiple_of(LINE);
                    last_bytes = bytes as u64;
                }
                pieces.push(Piece {
                    part,
                    holds,
                    placement,
                    offset: end,
                    bytes: bytes as u64,
                });
            };
            for (part, shape) in parts.clone().filter(|(_, shape)| plane < shape.planes()) {
                let placement = match part {
                    Part::Gate if is_pair => Placement::PairFirst,
                    Part::Up if is_pair => Placement::PairSecond,
                    _ => Placement::Alone,
                };
                let bytes = shape.format.placed_bytes(placement, plane);
                place(part, Holds::Codes, placement, bytes);
            }
            for (part, shape) in parts.clone().filter(|_| plane == 0) {
                if let Some(LowRank { left, right, .. }) = shape.rank {
                    place(part, Holds::Right, Placement::Alone, right.plane_bytes(0));
                    place(part, Holds::Left, Placement::Alone, left.plane_bytes(0));
                }
            }
            end += last_bytes;
            sections.push(SectionLayout {
                offset,
                bytes: end - offset,
                pieces,
            });
            end = end.next_multiple_of(LINE);
        }
        let bytes = sections.last().map_or(end, |s| s.offset + s.bytes);
        Self { sections, bytes }
    }
}

/// Offset and bytes of the one section of a constant's record.
pub(crate) fn constant_section(hidden: usize) -> (u64, u64) {
    (HEADER_BYTES as u64, (hidden * size_of::<f16>()) as u64)
}

/// Bytes of a constant's record, and what aligning it costs at most.
pub fn aligned_constant_bytes(hidden: usize) -> u64 {
    let (from, length) = constant_section(hidden);
    align_record(1, from + length) + from + length
}

/// Where a record of this size starts after the one that ends at `previous_end`.
pub(crate) fn align_record(previous_end: u64, record_bytes: u64) -> u64 {
    previous_end.next_multiple_of(if record_bytes >= PAGED_BYTES { PAGE } else { LINE })
}

/// Bytes of a record of these shapes, and what aligning it costs at most: sums of these bound `experts.bin`.
pub fn aligned_record_bytes(gate: impl Into<Shape>, up: impl Into<Shape>, down: impl Into<Shape>) -> u64 {
    let bytes = Layout::of([gate.into(), up.into(), down.into()]).bytes;
    align_record(1, bytes) + bytes
}

/// Widths that an expert can be used at: every width that one of its matrices can be decoded at.
pub fn prefixes(formats: [MatrixFormat; 3]) -> Vec<u32> {
    let mut all: Vec<u32> = formats
        .iter()
        .flat_map(|f| f.code().prefixes())
        .map(|b| b.get())
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// What a matrix is read at when its expert is used at `bits`: its widest prefix of at most that, else its narrowest.
pub fn prefix_at(format: &MatrixFormat, bits: u32) -> Bits {
    let prefixes = format.code().prefixes();
    let widest = prefixes.iter().rev().find(|b| b.get() <= bits);
    *widest.unwrap_or(&prefixes[0])
}

#[cfg(test)]
mod tests {
    use cotk_quant::code::Code;

    use super::*;

    fn format(rows: usize, cols: usize, code: Code) -> MatrixFormat {
        MatrixFormat::try_new(rows, cols, code, 32).unwrap()
    }

    /// Every code for gate, up and down, with and without factors.
    fn shapes() -> Vec<[Shape; 3]> {
        let mut all = Vec::new();
        for gate in Code::ALL {
            for up in Code::ALL {
                for down in Code::ALL {
                    let plain = [(33, 70, gate), (33, 70, up), (70, 33, down)];
                    let plain = plain.map(|(rows, cols, code)| Shape::from(format(rows, cols, code)));
                    all.push(plain);
                    let factors = |role, shape: Shape| {
                        let rank = LowRank::try_new(role, shape.format.rows(), shape.format.cols(), 16).unwrap();
                        Shape {
                            rank: Some(rank),
                            ..shape
                        }
                    };
                    let [gate, up, down] = plain;
                    all.push([factors(Role::Correction, gate), up, factors(Role::Correction, down)]);
                    all.push([gate, factors(Role::Product, up), down]);
                    all.push(plain.map(|shape| factors(Role::Product, shape)));
                }
            }
        }
        all
    }

    #[test]
    fn pieces_are_in_order_aligned_and_fill_their_section() {
        for shapes in shapes() {
            let layout = Layout::of(shapes);
            let mut end = HEADER_BYTES as u64;
            for section in &layout.sections {
                assert_eq!(section.offset, end.next_multiple_of(LINE));
                end = section.offset;
                for piece in &section.pieces {
                    assert_eq!(piece.offset % LINE, 0);
                    if piece.placement == Placement::PairSecond {
                        assert_eq!(piece.offset + piece.bytes, end);
                    } else {
                        assert_eq!(piece.offset, end.next_multiple_of(LINE));
                    }
                    end = piece.offset + piece.bytes;
                }
                assert_eq!(section.offset + section.bytes, end);
            }
            assert_eq!(layout.bytes, end);
            let factors = layout.sections[0].pieces.iter().filter(|p| p.holds != Holds::Codes);
            let expected = shapes.iter().filter(|s| s.rank.is_some()).count();
            assert_eq!(factors.count(), 2 * expected, "all factors stand in section 0");
        }
    }

    #[test]
    fn a_prefix_is_the_widest_that_fits_else_the_narrowest() {
        let nested = format(16, 32, Code::Nested224);
        assert_eq!([1, 2, 3, 4, 8].map(|b| prefix_at(&nested, b).get()), [2, 2, 2, 4, 8]);
        let plain = format(16, 32, Code::Plain(Bits::B4));
        assert_eq!([2, 4, 8].map(|b| prefix_at(&plain, b).get()), [4, 4, 4]);
        assert_eq!(prefixes([plain, nested, plain]), [2, 4, 8]);
    }

    #[test]
    fn large_records_start_at_pages_small_ones_at_lines() {
        assert_eq!(align_record(1, PAGED_BYTES - 1), 64);
        assert_eq!(align_record(1, PAGED_BYTES), 4096);
        assert_eq!(align_record(0, PAGED_BYTES), 0);
    }
}
