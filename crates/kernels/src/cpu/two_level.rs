//! Matrices whose scales have two levels: the plain kernel of the scalar path, and the walk over tiles of the others, which
//! are `x86::*_two_level`. Law: equal to the reference bit for bit.

#[cfg(target_arch = "x86_64")]
use cotk_quant::layout::Placement;
use cotk_quant::layout::{BLOCK_ROWS, SCALE_BYTES, STEP, SUPER_GROUPS, TILE_STEPS};
use half::f16;

use super::dispatch::BlockOut;
use super::panels::Panel;
use super::tiles::Coded;
#[cfg(target_arch = "x86_64")]
use super::tiles::{FIELDS, TileAt};

/// 16 rows × the panel's tokens; `out` has the panel's width.
pub(super) fn block(coded: &Coded<'_>, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
    let prefix = coded.prefix();
    let format = prefix.format();
    let part = format.group().min(STEP);
    out.fill([0.0; BLOCK_ROWS]);
    let mut scales = [0.0f32; BLOCK_ROWS];
    // The scale block in force: eight groups, or what a row ends with.
    let mut held: &[u8] = &[];
    for tile in 0..format.tiles() {
        let lowest = prefix.tile(0, block, tile);
        let scale_blocks = &lowest[format.tile_steps(tile) * format.step_bytes(0)..];
        for within in 0..format.tile_steps(tile) {
            let step = tile * TILE_STEPS + within;
            let mut codes = [[0u8; BLOCK_ROWS]; STEP];
            unpack(coded, block, tile, within, &mut codes);
            for p in 0..STEP / part {
                let first = step * STEP + p * part;
                if first >= format.cols() {
                    continue;
                }
                if first.is_multiple_of(format.group()) {
                    let group = first / format.group();
                    if group.is_multiple_of(SUPER_GROUPS) {
                        // Blocks span four steps or more: one tile begins at most one.
                        held = scale_blocks;
                    }
                    let groups = SUPER_GROUPS.min(format.groups() - group / SUPER_GROUPS * SUPER_GROUPS);
                    read(held, group % SUPER_GROUPS, groups, coded.cell, &mut scales);
                }
                for (t, sums) in out.iter_mut().enumerate() {
                    let step = panel.codes(step, t);
                    let acts = &step.codes[p * part..(p + 1) * part];
                    let mut dots = [0i32; BLOCK_ROWS];
                    for (column, a) in codes[p * part..].iter().zip(acts) {
                        for (dot, code) in dots.iter_mut().zip(column) {
                            *dot += i32::from(*code) * i32::from(*a);
                        }
                    }
                    #[expect(clippy::cast_precision_loss, reason = "below 2^24")]
                    let sum = acts.iter().map(|a| i32::from(*a)).sum::<i32>() as f32;
                    for ((y, dot), scale) in sums.iter_mut().zip(dots).zip(scales) {
                        #[expect(clippy::cast_precision_loss, reason = "below 2^24")]
                        let centred = coded.zero_point.mul_add(-sum, dot as f32);
                        *y = centred.mul_add(scale * step.scale, *y);
                    }
                }
            }
        }
    }
}

/// The codes of one step, by column.
fn unpack(coded: &Coded<'_>, block: usize, tile: usize, within: usize, codes: &mut [[u8; BLOCK_ROWS]; STEP]) {
    let prefix = coded.prefix();
    let mut before = (usize::MAX, 0);
    for field in prefix.fields() {
        if before.0 != field.plane {
            before = (field.plane, 0);
        }
        let bits = field.bits as usize;
        let at = within * prefix.format().step_bytes(field.plane) + before.1;
        let lines = &prefix.tile(field.plane, block, tile)[at..at + 64 * bits];
        let (line_cols, mask) = (STEP / bits, 255u8 >> (8 - bits));
        for (col, column) in codes.iter_mut().enumerate() {
            let (line, in_line) = (col / line_cols, col % line_cols);
            for (row, code) in column.iter_mut().enumerate() {
                let byte = lines[64 * line + 4 * row + in_line % 4];
                *code |= (byte >> (bits * (in_line / 4)) & mask) << field.shift;
            }
        }
        before.1 += 64 * bits;
    }
}

/// The scales of one of the `groups` groups of a scale block (`cotk_quant::layout::TwoLevelAt`) for 16 rows.
fn read(block: &[u8], group: usize, groups: usize, cell: f32, scales: &mut [f32; BLOCK_ROWS]) {
    let (coarse, rest) = block.split_at(SCALE_BYTES);
    let (low, rest) = rest.split_at(BLOCK_ROWS * groups.div_ceil(2));
    let low = &low[group / 2 * BLOCK_ROWS..][..BLOCK_ROWS];
    let high = &rest[group / 4 * BLOCK_ROWS..][..BLOCK_ROWS];
    for (row, scale) in scales.iter_mut().enumerate() {
        let coarse = f16::from_le_bytes([coarse[2 * row], coarse[2 * row + 1]]).to_f32();
        let six = low[row] >> (group % 2 * 4) & 15 | (high[row] >> (group % 4 * 2) & 3) << 4;
        *scale = coarse * (f32::from(six) - 32.0) * cell;
    }
}

/// Bytes of the scale block of so many groups.
#[cfg(target_arch = "x86_64")]
pub(super) const fn scale_block_bytes(groups: usize) -> usize {
    SCALE_BYTES + BLOCK_ROWS * (groups.div_ceil(2) + groups.div_ceil(4))
}

/// The tiles of a row block by address, as [`super::tiles::Walk`] is where scales are f16.
#[cfg(target_arch = "x86_64")]
pub(super) struct Walk<const A: usize, const B: usize, const C: usize> {
    /// Of the next tile; of two matrices in turn, of the first one's.
    at: [*const u8; FIELDS],
    step_bytes: [usize; FIELDS],
    /// Matrices that take turns.
    turns: usize,
    is_second: bool,
    next_step: usize,
    /// Steps of a scale block less one.
    block_mask: usize,
    /// Whose scales are still to come.
    groups: usize,
}

#[cfg(target_arch = "x86_64")]
impl<const A: usize, const B: usize, const C: usize> Walk<A, B, C> {
    /// Of no steps.
    pub(super) const NOTHING: Self = Self {
        at: [std::ptr::null(); FIELDS],
        step_bytes: [0; FIELDS],
        turns: 1,
        is_second: false,
        next_step: 0,
        block_mask: 0,
        groups: 0,
    };

    /// # Panics
    /// A block that the matrix does not have, or f16 scales: behind them every tile lies inside the planes, whose lengths
    /// `Coded` knows.
    #[inline(always)]
    pub(super) fn new(coded: &Coded<'_>, block: usize) -> Self {
        assert!(block < coded.row_blocks && coded.is_two_level, "row block {block}");
        let (planes, placement) = coded.prefix().planes();
        let format = coded.prefix().format();
        let mut walk = Self {
            turns: if placement == Placement::Alone { 1 } else { 2 },
            is_second: placement == Placement::PairSecond,
            block_mask: format.scale_block_steps() - 1,
            groups: format.groups(),
            ..Self::NOTHING
        };
        for (i, bits) in [A, B, C].into_iter().enumerate() {
            if bits > 0 {
                let (plane, start, step_bytes) = coded.field(i, block);
                walk.at[i] = planes[plane].as_ptr().wrapping_add(start);
                walk.step_bytes[i] = step_bytes;
            }
        }
        walk
    }

    /// The next tile, of so many steps, and the groups of the scale block that begins in it; 0: none does.
    #[inline(always)]
    pub(super) fn tile(&mut self, steps: usize) -> (TileAt, usize) {
        let (mut groups, mut scale_bytes) = (0, 0);
        if self.next_step & self.block_mask == 0 {
            groups = self.groups.min(SUPER_GROUPS);
            self.groups -= groups;
            scale_bytes = scale_block_bytes(groups);
        }
        self.next_step += steps;
        let mut tile = TileAt {
            codes: self.at,
            step_bytes: self.step_bytes,
            scales: std::ptr::null(),
        };
        for (i, bits) in [A, B, C].into_iter().enumerate() {
            if bits > 0 {
                // One bit beside two: the same plane as the first field's, which has the scales.
                let in_plane_0 = i == 0 || bits == 1;
                let bytes = steps * self.step_bytes[i] + if in_plane_0 { scale_bytes } else { 0 };
                tile.codes[i] = self.at[i].wrapping_add(if self.is_second { bytes } else { 0 });
                self.at[i] = self.at[i].wrapping_add(self.turns * bytes);
            }
        }
        tile.scales = tile.codes[0].wrapping_add(steps * self.step_bytes[0]);
        (tile, groups)
    }
}

/// Which of a scale block's scales a place is under.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Places {
    /// Halves of a step (16 columns) per group, as a power of two.
    shift: u32,
    groups: usize,
}

#[cfg(target_arch = "x86_64")]
impl Places {
    pub(super) fn new(coded: &Coded<'_>) -> Self {
        let format = coded.prefix().format();
        Self {
            shift: (format.group() / (STEP / 2)).ilog2(),
            groups: format.groups(),
        }
    }

    /// Whether each half of a step has its own scale.
    #[inline(always)]
    pub(super) fn is_half(self) -> bool {
        self.shift == 0
    }

    /// Index of the scale in its block, below 8.
    #[inline(always)]
    pub(super) fn of(self, half_step: usize) -> usize {
        (half_step >> self.shift) % SUPER_GROUPS
    }

    /// Whether a row has this half of a step, groups being halves.
    #[inline(always)]
    pub(super) fn has(self, half_step: usize) -> bool {
        half_step < self.groups
    }
}
