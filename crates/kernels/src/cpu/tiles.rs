//! Walks the tiles of one row block across planes: the offsets, once for all paths. Where bytes lie is decided by
//! `cotk_quant::layout`; this only steps through them without asking again for each tile.

use cotk_quant::coded::Prefix;
use cotk_quant::layout::{MAX_PLANES, Placement, SCALE_BYTES, TILE_STEPS};

use super::activations::Activations;
use super::dispatch::TOKENS;

/// Most fields of a code.
pub(crate) const MAX_FIELDS: usize = 3;

/// A field inside a step's codes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepField {
    plane: usize,
    /// From the start of the step's codes in its plane.
    offset: usize,
}

/// The tiles of one row block, in order.
pub(crate) struct Tiles<'a> {
    planes: [&'a [u8]; MAX_PLANES],
    at: [usize; MAX_PLANES],
    step_bytes: [usize; MAX_PLANES],
    count: usize,
    fields: [StepField; MAX_FIELDS],
    placement: Placement,
    group_steps: usize,
    steps: usize,
    next_step: usize,
}

/// One tile: codes of one or two steps in each plane, and the scales of the groups that begin in it.
pub(crate) struct Tile<'a> {
    pub(crate) first_step: usize,
    pub(crate) steps: usize,
    codes: [&'a [u8]; MAX_PLANES],
    step_bytes: [usize; MAX_PLANES],
    scales: &'a [[u8; SCALE_BYTES]],
}

impl<'a> Tiles<'a> {
    pub(crate) fn new(prefix: &Prefix<'a>, block: usize) -> Self {
        let format = prefix.format();
        let (planes, placement) = prefix.planes();
        let mut tiles = Self {
            planes: [&[]; MAX_PLANES],
            at: [0; MAX_PLANES],
            step_bytes: [0; MAX_PLANES],
            count: planes.len(),
            fields: [StepField::default(); MAX_FIELDS],
            placement,
            group_steps: format.group_steps(),
            steps: format.steps(),
            next_step: 0,
        };
        for (i, plane) in planes.iter().enumerate() {
            tiles.planes[i] = plane;
            tiles.at[i] = format.placed_tile(Placement::PairFirst, i, block, 0).offset;
            if placement == Placement::Alone {
                tiles.at[i] /= 2;
            }
            tiles.step_bytes[i] = format.step_bytes(i);
        }
        let mut used = [0; MAX_PLANES];
        for (i, field) in prefix.fields().enumerate() {
            let offset = used[field.plane];
            used[field.plane] += 64 * field.bits as usize;
            tiles.fields[i] = StepField {
                plane: field.plane,
                offset,
            };
        }
        tiles
    }

    /// The prefix's fields, high bits first: shifting what is summed so far left by a field's width and adding the
    /// field's sum (Horner) gives the whole code's.
    pub(crate) fn fields(&self) -> [StepField; MAX_FIELDS] {
        self.fields
    }
}

/// Calls `$kernel::<$tokens, A, B, C>$arguments` with the widths of the prefix's fields as constants (0: no such field),
/// so that each combination is compiled to straight code.
macro_rules! by_fields {
    ($prefix:expr, $kernel:ident::<$tokens:literal>$arguments:tt) => {{
        let mut widths = [0; 3];
        for (width, field) in widths.iter_mut().zip($prefix.fields()) {
            *width = field.bits;
        }
        match widths {
            [2, 0, 0] => $kernel::<$tokens, 2, 0, 0> $arguments,
            [4, 0, 0] => $kernel::<$tokens, 4, 0, 0> $arguments,
            [8, 0, 0] => $kernel::<$tokens, 8, 0, 0> $arguments,
            [2, 1, 0] => $kernel::<$tokens, 2, 1, 0> $arguments,
            [2, 2, 0] => $kernel::<$tokens, 2, 2, 0> $arguments,
            [4, 4, 0] => $kernel::<$tokens, 4, 4, 0> $arguments,
            [2, 2, 4] => $kernel::<$tokens, 2, 2, 4> $arguments,
            // A new code fails the battery here until its line is added.
            other => unreachable!("no kernel is compiled for fields of {other:?} bits"),
        }
    }};
}
pub(crate) use by_fields;

impl<'a> Iterator for Tiles<'a> {
    type Item = Tile<'a>;

    #[inline(always)]
    fn next(&mut self) -> Option<Tile<'a>> {
        let first_step = self.next_step;
        if first_step >= self.steps {
            return None;
        }
        let steps = TILE_STEPS.min(self.steps - first_step);
        self.next_step += TILE_STEPS;
        let first_group = first_step.div_ceil(self.group_steps);
        let scales = (first_step + steps).div_ceil(self.group_steps) - first_group;
        let mut tile = Tile {
            first_step,
            steps,
            codes: [&[]; MAX_PLANES],
            step_bytes: self.step_bytes,
            scales: &[],
        };
        for i in 0..self.count {
            let codes = steps * self.step_bytes[i];
            let scale_bytes = if i == 0 { scales * SCALE_BYTES } else { 0 };
            let bytes = codes + scale_bytes;
            let start = self.at[i]
                + if self.placement == Placement::PairSecond {
                    bytes
                } else {
                    0
                };
            self.at[i] += if self.placement == Placement::Alone {
                bytes
            } else {
                2 * bytes
            };
            let (codes, scale_bytes) = self.planes[i][start..start + bytes].split_at(codes);
            tile.codes[i] = codes;
            if i == 0 {
                tile.scales = scale_bytes.as_chunks().0;
            }
        }
        Some(tile)
    }
}

impl<'a> Tile<'a> {
    /// The lines of one field in one step: 16 rows × 4 deep, `8 / bits` times over.
    #[inline(always)]
    pub(crate) fn lines<const BITS: usize>(&self, step: usize, field: StepField) -> &'a [[u8; 64]; BITS] {
        let from = step * self.step_bytes[field.plane] + field.offset;
        let lines = self.codes[field.plane][from..from + 64 * BITS].as_chunks().0;
        lines.first_chunk().expect("64 · BITS bytes are BITS lines")
    }

    /// The 16 f16 scales of a group that begins at this step of the tile, if one does.
    #[inline(always)]
    pub(crate) fn scales(&self, step: usize, group_steps: usize) -> Option<&'a [u8; SCALE_BYTES]> {
        (self.first_step + step)
            .is_multiple_of(group_steps)
            .then(|| &self.scales[if group_steps == 1 { step } else { 0 }])
    }
}

/// What every block kernel may rely on.
pub(crate) fn check(prefix: &Prefix<'_>, block: usize, acts: &Activations, first_token: usize, tokens: usize) {
    assert_eq!(prefix.format().cols(), acts.cols(), "matrix columns and activations");
    assert!(block < prefix.format().row_blocks(), "row block {block}");
    assert!(
        tokens.is_power_of_two() && tokens <= TOKENS && first_token + tokens <= acts.tokens(),
        "{tokens} tokens from {first_token}"
    );
}
