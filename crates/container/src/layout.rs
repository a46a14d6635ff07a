//! Where sections and planes lie inside a record, from the three formats alone: writer, gate and reader agree because
//! they all ask here. Law: pieces of a section are in order, aligned to 64, and end where the section ends.

use cotk_quant::code::Bits;
use cotk_quant::layout::{MatrixFormat, Placement};

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

/// One plane of one matrix, or of gate and up tile by tile in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) part: Part,
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
    /// Section i: plane i of gate, up and down, of those that have one. Gate and up tiles alternate where their
    /// formats are equal.
    pub(crate) fn of(gate: MatrixFormat, up: MatrixFormat, down: MatrixFormat) -> Self {
        let parts = [(Part::Gate, gate), (Part::Up, up), (Part::Down, down)];
        let planes = parts.iter().map(|(_, f)| f.code().planes()).max().unwrap_or(0);
        let mut end = HEADER_BYTES as u64;
        let mut sections = Vec::with_capacity(planes);
        for plane in 0..planes {
            let offset = end;
            let mut pieces = Vec::with_capacity(3);
            let mut last_bytes = 0;
            for (part, format) in parts.iter().filter(|(_, f)| plane < f.code().planes()) {
                let placement = match part {
                    Part::Gate if gate == up => Placement::PairFirst,
                    Part::Up if gate == up => Placement::PairSecond,
                    _ => Placement::Alone,
                };
                let bytes = format.placed_bytes(placement, plane) as u64;
                // The second of a pair lies over the first.
                if placement != Placement::PairSecond {
                    end = (end + last_bytes).next_multiple_of(LINE);
                    last_bytes = bytes;
                }
                pieces.push(Piece {
                    part: *part,
                    placement,
                    offset: end,
                    bytes,
                });
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

/// Where a record of this size starts after the one that ends at `previous_end`.
pub(crate) fn align_record(previous_end: u64, record_bytes: u64) -> u64 {
    previous_end.next_multiple_of(if record_bytes >= PAGED_BYTES { PAGE } else { LINE })
}

/// Bytes of a record of these formats, and what aligning it costs at most: sums of these bound `experts.bin`.
pub fn aligned_record_bytes(gate: MatrixFormat, up: MatrixFormat, down: MatrixFormat) -> u64 {
    let bytes = Layout::of(gate, up, down).bytes;
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

    #[test]
    fn pieces_are_in_order_aligned_and_fill_their_section() {
        for gate in Code::ALL {
            for up in Code::ALL {
                for down in Code::ALL {
                    let layout = Layout::of(format(33, 70, gate), format(33, 70, up), format(70, 33, down));
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
                }
            }
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
