//! Where each byte of a coded matrix lies: the one place that knows. File layout = kernel layout.
//!
//! A plane is a sequence of *row blocks* of 16 rows, a row block a sequence of *tiles* of two *steps*, a step 32 codes
//! along k of each of the 16 rows. Rows are padded to 16 (scales 0), k to 32 (codes 0); the last tile of a row block
//! holds one step when the number of steps is odd. A tile is the codes of its steps, then (lowest plane alone) the scale
//! blocks that *begin* in the tile: 16 f16 scales for each group or, two-level, what [`TwoLevelAt`] says for eight groups.
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
/// Groups that share an f16 where scales are two-level.
pub const SUPER_GROUPS: usize = 8;
/// The group of rows that have one scale each: as long as any row may be.
pub const WHOLE_ROW: usize = MAX_DIM;
/// Most planes that any code has.
pub const MAX_PLANES: usize = 4;
/// Most rows or columns.
pub const MAX_DIM: usize = 1 << 24;

/// How the scales of groups are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleForm {
    /// An f16 for each group.
    #[default]
    F16,
    /// Six bits for each group, `m − 32` times an f16 for each eight groups.
    TwoLevel,
}

impl ScaleForm {
    fn is_f16(&self) -> bool {
        *self == Self::F16
    }
}

/// Where one two-level scale lies in plane 0. A scale block holds, each 16 rows long: the f16 of eight groups; the low
/// four bits of each group, two groups to a byte; the high two bits, four groups to a byte. At the end of a row there
/// are fewer groups, and no bytes for those that are not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TwoLevelAt {
    /// Byte of the f16.
    pub coarse: usize,
    /// Byte and lowest bit of the low four.
    pub low: (usize, u32),
    /// Byte and lowest bit of the high two.
    pub high: (usize, u32),
}

/// Shape and code of one matrix `[rows, cols]`; columns run along the input. Always valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawFormat", into = "RawFormat")]
pub struct MatrixFormat {
    rows: usize,
    cols: usize,
    code: Code,
    group: usize,
    scales: ScaleForm,
}

/// What a manifest says, not yet believed.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFormat {
    rows: usize,
    cols: usize,
    code: Code,
    group: RawGroup,
    #[serde(default, skip_serializing_if = "ScaleForm::is_f16")]
    scales: ScaleForm,
}

/// Weights of a group, or `row`. (One form for each, so that what is read and written again is the same.)
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum RawGroup {
    Size(usize),
    Name(GroupName),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum GroupName {
    Row,
}

impl TryFrom<RawFormat> for MatrixFormat {
    type Error = QuantError;

    fn try_from(raw: RawFormat) -> Result<Self, QuantError> {
        let group = match raw.group {
            RawGroup::Name(GroupName::Row) => WHOLE_ROW,
            RawGroup::Size(found) if found < WHOLE_ROW => found,
            RawGroup::Size(found) => return Err(QuantError::Group { found }),
        };
        Self::try_with_scales(raw.rows, raw.cols, raw.code, group, raw.scales)
    }
}

impl From<MatrixFormat> for RawFormat {
    fn from(f: MatrixFormat) -> Self {
        Self {
            rows: f.rows,
            cols: f.cols,
            code: f.code,
            group: match f.group {
                WHOLE_ROW => RawGroup::Name(GroupName::Row),
                size => RawGroup::Size(size),
            },
            scales: f.scales,
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
    /// A format with f16 scales.
    ///
    /// # Errors
    /// As [`MatrixFormat::try_with_scales`].
    pub fn try_new(rows: usize, cols: usize, code: Code, group: usize) -> Result<Self, QuantError> {
        Self::try_with_scales(rows, cols, code, group, ScaleForm::F16)
    }

    /// The one gate.
    ///
    /// # Errors
    /// Rows or columns outside `1..=2^24`; a group that is not 32, 64, 128 or [`WHOLE_ROW`], or, with two-level scales,
    /// not 16, 32, 64 or 128.
    pub fn try_with_scales(
        rows: usize,
        cols: usize,
        code: Code,
        group: usize,
        scales: ScaleForm,
    ) -> Result<Self, QuantError> {
        if !(1..=MAX_DIM).contains(&rows) || !(1..=MAX_DIM).contains(&cols) {
            return Err(QuantError::Shape {
                rows,
                cols,
                limit: MAX_DIM,
            });
        }
        let groups: &[usize] = match scales {
            ScaleForm::F16 => &[32, 64, 128, WHOLE_ROW],
            ScaleForm::TwoLevel => &[16, 32, 64, 128],
        };
        if !groups.contains(&group) {
            return Err(QuantError::Group { found: group });
        }
        Ok(Self {
            rows,
            cols,
            code,
            group,
            scales,
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

    /// Weights of a row that share one scale: 16, 32, 64, 128 or [`WHOLE_ROW`]; the last group of a row may be short.
    pub fn group(&self) -> usize {
        self.group
    }

    /// How scales are stored.
    pub fn scales(&self) -> ScaleForm {
        self.scales
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

    /// Steps of a group, a power of two; 1 also where a step holds two groups.
    pub fn group_steps(&self) -> usize {
        (self.group / STEP).max(1)
    }

    /// Steps from one scale block to the next, a power of two: those of a group or, two-level, of eight.
    pub fn scale_block_steps(&self) -> usize {
        match self.scales {
            ScaleForm::F16 => self.group_steps(),
            ScaleForm::TwoLevel => SUPER_GROUPS * self.group / STEP,
        }
    }

    /// Groups of a whole scale block.
    pub fn scale_block_groups(&self) -> usize {
        match self.scales {
            ScaleForm::F16 => 1,
            ScaleForm::TwoLevel => SUPER_GROUPS,
        }
    }

    /// Scale blocks of a row block.
    pub fn scale_blocks(&self) -> usize {
        self.steps().div_ceil(self.scale_block_steps())
    }

    /// Bytes of one scale block; a last two-level one may be shorter.
    pub fn scale_block_bytes(&self, index: usize) -> usize {
        match self.scales {
            ScaleForm::F16 => SCALE_BYTES,
            ScaleForm::TwoLevel => {
                let groups = SUPER_GROUPS.min(self.groups() - index * SUPER_GROUPS);
                SCALE_BYTES + BLOCK_ROWS * (groups.div_ceil(2) + groups.div_ceil(4))
            }
        }
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
        let mut scales = 0;
        if plane == 0 {
            let blocks = step.div_ceil(self.scale_block_steps());
            // All but the last of the row are whole.
            scales = blocks * self.scale_block_bytes(0);
            if blocks == self.scale_blocks() {
                scales -= self.scale_block_bytes(0) - self.scale_block_bytes(blocks - 1);
            }
        }
        step * self.step_bytes(plane) + scales
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

    /// Byte in plane 0 (of this matrix alone) of a scale block.
    fn locate_scale_block(&self, row_block: usize, index: usize) -> usize {
        let (step, every) = (index * self.scale_block_steps(), self.scale_block_steps());
        let tile = step / TILE_STEPS;
        let extent = self.tile(0, row_block, tile);
        let first = (tile * TILE_STEPS).div_ceil(every);
        let codes = self.tile_steps(tile) * self.step_bytes(0);
        extent.offset + codes + (index - first) * self.scale_block_bytes(first)
    }

    /// Byte in plane 0 (of this matrix alone) of the f16 scale of one row and group.
    ///
    /// # Panics
    /// Scales are two-level.
    pub fn locate_scale(&self, row: usize, group: usize) -> usize {
        assert_eq!(self.scales, ScaleForm::F16, "a scale of its own for each group");
        self.locate_scale_block(row / BLOCK_ROWS, group) + (row % BLOCK_ROWS) * size_of::<f16>()
    }

    /// Where the parts of a two-level scale lie in plane 0 (of this matrix alone).
    ///
    /// # Panics
    /// Scales are not two-level.
    pub fn locate_two_level(&self, row: usize, group: usize) -> TwoLevelAt {
        assert_eq!(self.scales, ScaleForm::TwoLevel, "two levels");
        let (index, in_block, row_in) = (group / SUPER_GROUPS, group % SUPER_GROUPS, row % BLOCK_ROWS);
        let start = self.locate_scale_block(row / BLOCK_ROWS, index);
        let low = start + SCALE_BYTES;
        let high = start + self.scale_block_bytes(index)
            - BLOCK_ROWS * SUPER_GROUPS.min(self.groups() - index * SUPER_GROUPS).div_ceil(4);
        #[expect(clippy::cast_possible_truncation, reason = "below 8")]
        let shift = |place: usize| place as u32;
        TwoLevelAt {
            coarse: start + row_in * size_of::<f16>(),
            low: (low + in_block / 2 * BLOCK_ROWS + row_in, shift(in_block % 2 * 4)),
            high: (high + in_block / 4 * BLOCK_ROWS + row_in, shift(in_block % 4 * 2)),
        }
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
