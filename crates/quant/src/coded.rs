//! A coded matrix: owned, borrowed (from a mapped record, say), and at one of its prefixes.
//!
//! [`CodedView::try_new`] is the gate for bytes from outside: behind it lengths are right and nobody checks again.

use half::f16;

use crate::QuantError;
use crate::code::{Bits, Code, Field};
use crate::layout::{BLOCK_ROWS, MAX_PLANES, MatrixFormat, Placement, STEP, ScaleForm, TILE_STEPS, interleave_pair};

/// One matrix `[rows, cols]` in planes of bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct CodedMatrix {
    /// Shape, code and group.
    pub format: MatrixFormat,
    /// One for each prefix, lowest first; lengths are [`MatrixFormat::plane_bytes`].
    pub planes: Vec<Vec<u8>>,
    /// One for each prefix, in units of that prefix's codes.
    pub zero_points: Vec<f32>,
}

impl CodedMatrix {
    /// All planes, borrowed.
    pub fn view(&self) -> CodedView<'_> {
        let mut view = CodedView {
            format: self.format,
            placement: Placement::Alone,
            planes: [&[]; MAX_PLANES],
            count: self.planes.len(),
            zero_points: [0.0; MAX_PLANES],
        };
        for (i, (plane, zero)) in self.planes.iter().zip(&self.zero_points).enumerate() {
            view.planes[i] = plane;
            view.zero_points[i] = *zero;
        }
        view
    }

    /// At one width.
    ///
    /// # Errors
    /// The code has no such prefix.
    pub fn prefix(&self, bits: Bits) -> Result<Prefix<'_>, QuantError> {
        self.view().prefix(bits)
    }

    /// The planes of two matrices, tile by tile in turn, as [`CodedView::try_new`] reads them with
    /// [`Placement::PairFirst`] and [`Placement::PairSecond`].
    ///
    /// # Errors
    /// The formats differ.
    pub fn interleave(first: &Self, second: &Self) -> Result<Vec<Vec<u8>>, QuantError> {
        if first.format != second.format {
            return Err(QuantError::PairFormat);
        }
        let planes = first.planes.iter().zip(&second.planes).enumerate();
        planes
            .map(|(plane, (a, b))| interleave_pair(&first.format, plane, a, b))
            .collect()
    }
}

/// A coded matrix whose bytes belong to someone else; may lack upper planes. Cheap to copy.
#[derive(Debug, Clone, Copy)]
pub struct CodedView<'a> {
    format: MatrixFormat,
    placement: Placement,
    planes: [&'a [u8]; MAX_PLANES],
    count: usize,
    zero_points: [f32; MAX_PLANES],
}

impl<'a> CodedView<'a> {
    /// Checks every length once. `planes` are the lowest ones, at least one; `zero_points` has one for each of the
    /// code's prefixes.
    ///
    /// # Errors
    /// Too few or too many planes or zero points, a plane of the wrong length, a zero point that is not finite.
    pub fn try_new(
        format: MatrixFormat,
        planes: &[&'a [u8]],
        zero_points: &[f32],
        placement: Placement,
    ) -> Result<Self, QuantError> {
        let code = format.code();
        let length = |what, found, expected| QuantError::Length { what, found, expected };
        if planes.is_empty() || planes.len() > code.planes() {
            return Err(length("planes", planes.len(), code.planes()));
        }
        if zero_points.len() != code.planes() {
            return Err(length("zero points", zero_points.len(), code.planes()));
        }
        if let Some(value) = zero_points.iter().find(|z| !z.is_finite()) {
            return Err(QuantError::NotFinite {
                row: 0,
                col: 0,
                value: *value,
            });
        }
        let mut view = Self {
            format,
            placement,
            planes: [&[]; MAX_PLANES],
            count: planes.len(),
            zero_points: [0.0; MAX_PLANES],
        };
        for (plane, bytes) in planes.iter().enumerate() {
            let (found, expected) = (bytes.len(), format.placed_bytes(placement, plane));
            if found != expected {
                return Err(QuantError::PlaneBytes { plane, found, expected });
            }
            view.planes[plane] = bytes;
        }
        view.zero_points[..zero_points.len()].copy_from_slice(zero_points);
        Ok(view)
    }

    /// Shape, code and group.
    pub fn format(&self) -> MatrixFormat {
        self.format
    }

    /// The widths whose planes are here.
    pub fn available(&self) -> &'static [Bits] {
        &self.format.code().prefixes()[..self.count]
    }

    /// At one width. Owning the result is the proof that its planes are there.
    ///
    /// # Errors
    /// The code has no such prefix, or its planes were not given.
    pub fn prefix(self, bits: Bits) -> Result<Prefix<'a>, QuantError> {
        let index = self.format.code().prefix_index(bits)?;
        if index >= self.count {
            return Err(QuantError::MissingPlane {
                bits: bits.get(),
                found: self.count,
                expected: index + 1,
            });
        }
        Ok(Prefix {
            view: self,
            bits,
            index,
        })
    }
}

/// A coded matrix at one width: what kernels and [`crate::decode`] read.
#[derive(Debug, Clone, Copy)]
pub struct Prefix<'a> {
    view: CodedView<'a>,
    bits: Bits,
    index: usize,
}

impl<'a> Prefix<'a> {
    /// Shape, code and group.
    pub fn format(&self) -> MatrixFormat {
        self.view.format
    }

    /// The width.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// The code of zero, in units of this width's codes.
    pub fn zero_point(&self) -> f32 {
        self.view.zero_points[self.index]
    }

    /// `2^(full − bits)`: what one step of this width's codes counts in units of the stored scale.
    pub fn cell(&self) -> f32 {
        f32::from(1u8 << (self.view.format.code().full().get() - self.bits.get()))
    }

    /// The fields of this width with their position *in its codes*, high bits first.
    pub fn fields(&self) -> impl Iterator<Item = Field> {
        let code: Code = self.view.format.code();
        let (cut, index) = (code.full().get() - self.bits.get(), self.index);
        let fields = code.fields().iter().filter(move |f| f.plane <= index);
        fields.map(move |f| Field {
            shift: f.shift - cut,
            ..*f
        })
    }

    /// Bytes of one tile in one plane: codes of its steps, then (plane 0) its scales.
    pub fn tile(&self, plane: usize, block: usize, tile: usize) -> &'a [u8] {
        let at = self.view.format.placed_tile(self.view.placement, plane, block, tile);
        &self.view.planes[plane][at.offset..at.offset + at.bytes]
    }

    /// The planes that this width reads, lowest first, with their placement: for kernels that walk them by offset.
    pub fn planes(&self) -> (&[&'a [u8]], Placement) {
        (&self.view.planes[..=self.index], self.view.placement)
    }

    /// The unsigned code of one weight.
    pub fn code_at(&self, row: usize, col: usize) -> u8 {
        let format = &self.view.format;
        let cut = format.code().full().get() - self.bits.get();
        let (block, tile) = (row / BLOCK_ROWS, col / STEP / TILE_STEPS);
        let fields = format.code().fields().iter().filter(|f| f.plane <= self.index);
        fields.fold(0, |code, f| {
            let (byte, bit) = format.locate(*f, row, col);
            let within = byte - format.tile(f.plane, block, tile).offset;
            let stored = self.tile(f.plane, block, tile)[within] >> bit;
            #[expect(clippy::cast_possible_truncation, reason = "a field has at most 8 bits")]
            let mask = ((1u32 << f.bits) - 1) as u8;
            code | (stored & mask) << (f.shift - cut)
        })
    }

    /// The scale of one row and group: of two levels the product, which f32 holds exactly.
    pub fn scale_at(&self, row: usize, group: usize) -> f32 {
        let format = &self.view.format;
        let (block, tile) = (
            row / BLOCK_ROWS,
            group / format.scale_block_groups() * format.scale_block_steps() / TILE_STEPS,
        );
        let start = format.tile(0, block, tile).offset;
        let tile = self.tile(0, block, tile);
        let half = |at: usize| f16::from_le_bytes([tile[at - start], tile[at - start + 1]]).to_f32();
        match format.scales() {
            ScaleForm::F16 => half(format.locate_scale(row, group)),
            ScaleForm::TwoLevel => {
                let at = format.locate_two_level(row, group);
                let low = tile[at.low.0 - start] >> at.low.1 & 15;
                let high = tile[at.high.0 - start] >> at.high.1 & 3;
                half(at.coarse) * (f32::from(high << 4 | low) - 32.0)
            }
        }
    }
}
