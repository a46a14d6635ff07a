//! Matrices whose scales have two levels, on every path: plain Rust over the layout's lines, one or two groups a step.
//! Law: equal to the reference bit for bit.

use cotk_quant::layout::{BLOCK_ROWS, SCALE_BYTES, STEP, SUPER_GROUPS, TILE_STEPS};
use half::f16;

use super::dispatch::BlockOut;
use super::panels::Panel;
use super::tiles::Coded;

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
