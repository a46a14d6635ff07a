//! Where each byte of a coded matrix lies: the one place that knows. File layout = kernel layout.
//!
//! A plane is a sequence of *row blocks* of 16 rows, a row block a sequence of *tiles* of two *steps*, a step 32 codes
//! along k of each of the 16 rows. Rows are padded to 16 (scales 0), k to 32 (codes 0); the last tile of a row block
//! holds one step when the number of steps is odd. A tile is the codes of its steps, then (lowest plane alone) 16 f16
//! scales for each group that *begins* in the tile.
//!
//! In a step, each field of `p` bits takes `64 · p` bytes: `p` lines of 64. Byte `4·row + depth` of line `l` holds, from
//! bit `p·i`, the field of column `l·(32/p) + 4·i + depth`: a line is 16 rows × 4 codes deep, `8/p` times over.
//! Law: [`MatrixFormat::locate`] is a bijection from (field, row, column) onto the bits of a plane.

use half::f16;
use serde::{Deserialize, Serialize};

use crate::QuantError;
use crate::code::{Bits, Code, Field};

/// Rows that are interleaved.
pub const BLOCK_ROWS: usize = 16;
/// Columns of a step: the activations' group.
pub const STEP: usize = 32;
/// Steps of a whole tile.
pub const TILE_STEPS: usize = 2;
/// Bytes of the scales of one group for 16 rows.
pub const SCALE_BYTES: usize = BLOCK_ROWS * size_of::<f16>();
/// Most planes that any code has.
pub const MAX_PLANES: usize = 4;
/// Most rows or columns.
pub const MAX_DIM: usize = 1 << 24;

/// Shape and code of one matrix `[rows, cols]`; columns run along the input. Always valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawFormat", into = "RawFormat")]
pub struct MatrixFormat {
    rows: usize,
    cols: usize,
    code: Code,
    group: usize,
}

/// What a manifest says, not yet believed.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFormat {
    rows: usize,
    cols: usize,
    code: Code,
    group: usize,
}

impl TryFrom<RawFormat> for MatrixFormat {
    type Error = QuantError;

    fn try_from(raw: RawFormat) -> Result<Self, QuantError> {
        Self::try_new(raw.rows, raw.cols, raw.code, raw.group)
    }
}

impl From<MatrixFormat> for RawFormat {
    fn from(f: MatrixFormat) -> Self {
        Self {
            rows: f.rows,
            cols: f.cols,
            code: f.code,
            group: f.group,
        }
    }
}

/// A run of bytes in a plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub offset: usize,
    pub bytes: usize,
}

/// Whether a plane's bytes are one matrix's own or tile by tile those of two (gate and up) in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    #[default]
    Alone,
    PairFirst,
    PairSecond,
}

impl MatrixFormat {
    /// The one gate.
    ///
    /// # Errors
    /// Rows or columns outside `1..=2^24`, a group that is not 32, 64 or 128.
    pub fn try_new(rows: usize, cols: usize, code: Code, group: usize) -> Result<Self, QuantError> {
        if !(1..=MAX_DIM).contains(&rows) || !(1..=MAX_DIM).contains(&cols) {
            return Err(QuantError::Shape {
                rows,
                cols,
                limit: MAX_DIM,
            });
        }
        if ![32, 64, 128].contains(&group) {
            return Err(QuantError::Group { found: group });
        }
        Ok(Self {
            rows,
            cols,
            code,
            group,
        })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn code(&self) -> Code {
        self.code
    }

    /// Weights of a row that share one scale: 32, 64 or 128; the last group of a row may be short.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Blocks of 16 rows.
    pub fn row_blocks(&self) -> usize {
        self.rows.div_ceil(BLOCK_ROWS)
    }

    /// Steps of 32 columns.
    pub fn steps(&self) -> usize {
        self.cols.div_ceil(STEP)
    }

    /// Tiles of a row block.
    pub fn tiles(&self) -> usize {
        self.steps().div_ceil(TILE_STEPS)
    }

    /// Groups of a row, each with its scale.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// Steps of a group: 1, 2 or 4.
    pub fn group_steps(&self) -> usize {
        self.group / STEP
    }

    /// Bytes of the codes of one step (16 rows × 32 columns) in a plane.
    pub fn step_bytes(&self, plane: usize) -> usize {
        64 * self.code.plane_bits(plane) as usize
    }

    /// Bytes of a row block in a plane.
    pub fn block_bytes(&self, plane: usize) -> usize {
        self.before(plane, self.steps())
    }

    /// Bytes of a plane.
    pub fn plane_bytes(&self, plane: usize) -> usize {
        self.row_blocks() * self.block_bytes(plane)
    }

    /// Bytes of all planes.
    pub fn total_bytes(&self) -> usize {
        (0..self.code.planes()).map(|p| self.plane_bytes(p)).sum()
    }

    /// Bytes of the planes that a prefix needs.
    ///
    /// # Errors
    /// The code has no such prefix.
    pub fn prefix_bytes(&self, bits: Bits) -> Result<usize, QuantError> {
        let planes = self.code.prefix_index(bits)? + 1;
        Ok((0..planes).map(|p| self.plane_bytes(p)).sum())
    }

    /// Bytes of a row block before the tile that begins at `step`.
    fn before(&self, plane: usize, step: usize) -> usize {
        let scales = if plane == 0 {
            step.div_ceil(self.group_steps())
        } else {
            0
        };
        step * self.step_bytes(plane) + scales * SCALE_BYTES
    }

    /// One tile in a plane that holds this matrix alone.
    pub fn tile(&self, plane: usize, block: usize, tile: usize) -> Extent {
        let (from, to) = (tile * TILE_STEPS, ((tile + 1) * TILE_STEPS).min(self.steps()));
        let start = self.before(plane, from);
        Extent {
            offset: block * self.block_bytes(plane) + start,
            bytes: self.before(plane, to) - start,
        }
    }

    /// One tile in a plane that is placed as said.
    pub fn placed_tile(&self, placement: Placement, plane: usize, block: usize, tile: usize) -> Extent {
        let Extent { offset, bytes } = self.tile(plane, block, tile);
        let offset = match placement {
            Placement::Alone => offset,
            Placement::PairFirst => 2 * offset,
            Placement::PairSecond => 2 * offset + bytes,
        };
        Extent { offset, bytes }
    }

    /// Length of a plane's bytes under a placement.
    pub fn placed_bytes(&self, placement: Placement, plane: usize) -> usize {
        match placement {
            Placement::Alone => self.plane_bytes(plane),
            Placement::PairFirst | Placement::PairSecond => 2 * self.plane_bytes(plane),
        }
    }

    /// Steps in a tile: 2, or 1 at an odd end.
    pub fn tile_steps(&self, tile: usize) -> usize {
        TILE_STEPS.min(self.steps() - tile * TILE_STEPS)
    }

    /// Byte (inside a plane of this matrix alone) and lowest bit of one field of one weight.
    pub fn locate(&self, field: Field, row: usize, col: usize) -> (usize, u32) {
        let (step, in_step) = (col / STEP, col % STEP);
        let tile = self.tile(field.plane, row / BLOCK_ROWS, step / TILE_STEPS);
        let mut offset = tile.offset + (step % TILE_STEPS) * self.step_bytes(field.plane);
        offset += self
            .code
            .plane_fields(field.plane)
            .take_while(|f| *f != field)
            .map(|f| 64 * f.bits as usize)
            .sum::<usize>();
        let line_cols = STEP / field.bits as usize;
        let (line, in_line) = (in_step / line_cols, in_step % line_cols);
        let byte = offset + 64 * line + 4 * (row % BLOCK_ROWS) + in_line % 4;
        #[expect(clippy::cast_possible_truncation, reason = "below 8")]
        let shift = (in_line / 4) as u32 * field.bits;
        (byte, shift)
    }

    /// Byte in plane 0 (of this matrix alone) of the f16 scale of one row and group.
    pub fn locate_scale(&self, row: usize, group: usize) -> usize {
        let step = group * self.group_steps();
        let tile = step / TILE_STEPS;
        let extent = self.tile(0, row / BLOCK_ROWS, tile);
        let first_group = (tile * TILE_STEPS).div_ceil(self.group_steps());
        let codes = self.tile_steps(tile) * self.step_bytes(0);
        extent.offset + codes + (group - first_group) * SCALE_BYTES + (row % BLOCK_ROWS) * size_of::<f16>()
    }
}

/// Two planes of one format, tile by tile in turn: gate and up of an expert.
///
/// # Errors
/// A plane whose length is not the format's.
pub fn interleave_pair(
    format: &MatrixFormat,
    plane: usize,
    first: &[u8],
    second: &[u8],
) -> Result<Vec<u8>, QuantError> {
    let expected = format.plane_bytes(plane);
    for found in [first.len(), second.len()] {
        if found != expected {
            return Err(QuantError::PlaneBytes { plane, found, expected });
        }
    }
    let mut pair = Vec::with_capacity(2 * expected);
    for block in 0..format.row_blocks() {
        for tile in 0..format.tiles() {
            let Extent { offset, bytes } = format.tile(plane, block, tile);
            pair.extend_from_slice(&first[offset..offset + bytes]);
            pair.extend_from_slice(&second[offset..offset + bytes]);
        }
    }
    Ok(pair)
}
