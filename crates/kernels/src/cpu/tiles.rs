//! Walks the tiles of one row block across planes: the offsets, once for all paths. Where bytes lie is decided by
//! `cotk_quant::layout`; this only steps through them without asking again for each tile.

use cotk_quant::coded::Prefix;
use cotk_quant::layout::{MAX_PLANES, Placement, SCALE_BYTES, ScaleForm, TILE_STEPS};

use super::panels::Panel;

/// Most fields of a code.
pub(super) const FIELDS: usize = 3;

/// The tiles of one row block, in order, for a prefix whose fields have `A`, `B` and `C` bits (0: no such field).
///
/// Fields come high bits first: shifting what is summed so far left by a field's width and adding the field's sum
/// (Horner) gives the whole code's. Arrays over fields are indexed by constants, so that they become registers.
pub(crate) struct Tiles<'a, const A: usize, const B: usize, const C: usize> {
    fields: [FieldWalk<'a>; FIELDS],
    /// Where two matrices take turns and the other one's tile comes first.
    is_second: bool,
    group_mask: usize,
    steps: usize,
    next_step: usize,
}

/// One field's plane.
#[derive(Clone, Copy, Default)]
struct FieldWalk<'a> {
    bytes: &'a [u8],
    /// Start of the next tile, were it whole.
    at: usize,
    /// Bytes of a whole tile, even and odd: groups of 128 have scales in every second one.
    whole: [usize; 2],
    /// From the start of an even (odd) whole tile to that of the next.
    pitch: [usize; 2],
    /// Of all fields of the plane.
    step_bytes: usize,
    /// 32 in the plane that has scales, else 0.
    scale_bytes: usize,
    /// Scales that the first tile alone has: those of whole rows.
    first_scales: usize,
    /// From the first tile to the second on top of the pitch.
    first_pitch: usize,
    /// Of this field in its plane's steps.
    offset: usize,
}

/// One tile: codes of one or two steps, and the scales of the groups that begin in it.
pub(crate) struct Tile<'a> {
    pub(crate) first_step: usize,
    pub(crate) steps: usize,
    codes: [&'a [u8]; FIELDS],
    step_bytes: [usize; FIELDS],
    scales: &'a [u8],
    group_mask: usize,
}

impl<'a, const A: usize, const B: usize, const C: usize> Tiles<'a, A, B, C> {
    pub(crate) fn new(prefix: &Prefix<'a>, block: usize) -> Self {
        let format = prefix.format();
        let (planes, placement) = prefix.planes();
        let turns = if placement == Placement::Alone { 1 } else { 2 };
        let is_second = placement == Placement::PairSecond;
        let (scales, is_row) = scales_of_tiles(format.group_steps());
        let mut fields = [FieldWalk::default(); FIELDS];
        let mut used = [0; FIELDS];
        for (walk, field) in fields.iter_mut().zip(prefix.fields()) {
            let plane = field.plane;
            let step_bytes = format.step_bytes(plane);
            let scale_bytes = if plane == 0 { SCALE_BYTES } else { 0 };
            let whole = scales.map(|n| TILE_STEPS * step_bytes + n * scale_bytes);
            let first_scales = if is_row { scale_bytes } else { 0 };
            *walk = FieldWalk {
                bytes: planes[plane],
                at: turns * block * format.block_bytes(plane) + if is_second { whole[0] + first_scales } else { 0 },
                whole,
                pitch: if is_second {
                    [whole[0] + whole[1]; 2]
                } else {
                    whole.map(|bytes| turns * bytes)
                },
                step_bytes,
                scale_bytes,
                first_scales,
                // The other matrix's first tile has such scales, too; the second's lies before the walk.
                first_pitch: if is_second { first_scales } else { turns * first_scales },
                offset: used[plane],
            };
            used[plane] += 64 * field.bits as usize;
        }
        Self {
            fields,
            is_second,
            group_mask: format.group_steps() - 1,
            steps: format.steps(),
            next_step: 0,
        }
    }
}

impl<'a> FieldWalk<'a> {
    /// From this field's first byte in a whole tile to the tile's end.
    #[inline(always)]
    fn whole(&mut self, odd: usize, is_first: bool) -> &'a [u8] {
        let start = self.at;
        let (scales, pitch) = if is_first {
            (self.first_scales, self.first_pitch)
        } else {
            (0, 0)
        };
        self.at += self.pitch[odd] + pitch;
        &self.bytes[start + self.offset..start + self.whole[odd] + scales]
    }

    /// The same in the last tile of one step, with `groups` scales.
    #[cold]
    fn half(&mut self, odd: usize, is_first: bool, groups: usize, is_second: bool) -> &'a [u8] {
        let bytes = self.step_bytes + groups * self.scale_bytes;
        let whole = self.whole[odd] + if is_first { self.first_scales } else { 0 };
        // The other matrix's tile before it is short, too.
        let start = self.at - if is_second { whole - bytes } else { 0 };
        &self.bytes[start + self.offset..start + bytes]
    }
}

/// Scale blocks of whole tiles, even and odd, for groups of one, two and four steps; longer ones are whole rows, whose
/// scales stand in the first tile alone.
fn scales_of_tiles(group_steps: usize) -> ([usize; 2], bool) {
    match group_steps {
        1 => ([2, 2], false),
        2 => ([1, 1], false),
        4 => ([1, 0], false),
        _ => ([0, 0], true),
    }
}

impl<'a, const A: usize, const B: usize, const C: usize> Iterator for Tiles<'a, A, B, C> {
    type Item = Tile<'a>;

    #[inline(always)]
    fn next(&mut self) -> Option<Tile<'a>> {
        let first_step = self.next_step;
        if first_step >= self.steps {
            return None;
        }
        let steps = TILE_STEPS.min(self.steps - first_step);
        self.next_step += TILE_STEPS;
        let odd = first_step / TILE_STEPS % 2;
        let mut codes: [&[u8]; FIELDS] = [&[]; FIELDS];
        for (i, bits) in [A, B, C].into_iter().enumerate() {
            if bits > 0 {
                codes[i] = if steps == TILE_STEPS {
                    self.fields[i].whole(odd, first_step == 0)
                } else {
                    let groups = usize::from(first_step & self.group_mask == 0);
                    self.fields[i].half(odd, first_step == 0, groups, self.is_second)
                };
            }
        }
        Some(Tile {
            first_step,
            steps,
            codes,
            step_bytes: self.fields.map(|f| f.step_bytes),
            // The first field begins its plane's steps: what follows their codes is scales.
            scales: &codes[0][steps * self.fields[0].step_bytes..],
            group_mask: self.group_mask,
        })
    }
}

impl<'a> Tile<'a> {
    /// The lines of one field in one step: 16 rows × 4 deep, `8 / BITS` times over.
    #[inline(always)]
    pub(crate) fn lines<const BITS: usize>(&self, field: usize, step: usize) -> &'a [[u8; 64]; BITS] {
        let from = step * self.step_bytes[field];
        let lines = self.codes[field][from..from + 64 * BITS].as_chunks().0;
        lines.first_chunk().expect("64 · BITS bytes are BITS lines")
    }

    /// The 16 f16 scales of a group that begins at this step of the tile, if one does.
    #[inline(always)]
    pub(crate) fn scales(&self, step: usize) -> Option<&'a [u8; SCALE_BYTES]> {
        // Tiles begin at even steps: with groups of more than one step, only a first step begins one.
        if (self.first_step + step) & self.group_mask == 0 {
            self.scales[step * SCALE_BYTES..].first_chunk()
        } else {
            None
        }
    }
}

/// A prefix with all that kernels ask of its layout, found once: a row block is a hundred tiles or fewer.
#[derive(Debug, Clone, Copy)]
pub struct Coded<'a> {
    prefix: Prefix<'a>,
    /// Widths of its fields, high bits first; 0: no such field.
    pub(crate) widths: [u32; FIELDS],
    fields: [FieldMap; FIELDS],
    pub(crate) steps: usize,
    pub(crate) row_blocks: usize,
    group_mask: usize,
    pub(crate) block_bytes: usize,
    pub(crate) cell: f32,
    pub(crate) zero_point: f32,
    /// Scales of two levels, which have kernels of their own.
    pub(crate) is_two_level: bool,
}

/// Where one field's codes lie in its plane.
#[derive(Debug, Clone, Copy, Default)]
struct FieldMap {
    plane: usize,
    /// Of the first tile of the first block.
    start: usize,
    /// From a row block to the next.
    block_pitch: usize,
    /// From the start of an even (odd) whole tile to that of the next.
    pitch: [usize; 2],
    /// From the codes of a tile's first step to those of its second.
    step_bytes: usize,
    /// From the first tile to the second on top of the pitch: scales of whole rows.
    first_pitch: usize,
    /// What a last tile of one step begins earlier, because the other matrix's tile before it is short, too.
    early: usize,
}

// A prefix names its planes; that none is shorter than its tiles need is asserted in `from`, and no field is public.
impl<'a> From<Prefix<'a>> for Coded<'a> {
    fn from(prefix: Prefix<'a>) -> Self {
        let format = prefix.format();
        let (planes, placement) = prefix.planes();
        let (turns, is_second) = match placement {
            Placement::Alone => (1, false),
            Placement::PairFirst => (2, false),
            Placement::PairSecond => (2, true),
        };
        let (steps, group_steps) = (format.steps(), format.group_steps());
        // Scales of whole tiles, then of all, and of a last half tile.
        let (scales, is_row) = scales_of_tiles(group_steps);
        let is_two_level = format.scales() == ScaleForm::TwoLevel;
        let all_scales = steps.div_ceil(group_steps);
        let half_scales = usize::from((steps - 1).is_multiple_of(group_steps));
        let mut plane_bits = [0; MAX_PLANES];
        let known = format.code().fields();
        for field in known {
            plane_bits[field.plane] += field.bits as usize;
        }
        let mut coded = Self {
            prefix,
            widths: [0; FIELDS],
            fields: [FieldMap::default(); FIELDS],
            steps,
            row_blocks: format.row_blocks(),
            group_mask: group_steps - 1,
            block_bytes: 0,
            cell: prefix.cell(),
            zero_point: prefix.zero_point(),
            is_two_level,
        };
        let mut used = [0; MAX_PLANES];
        for (i, field) in known.iter().filter(|field| field.plane < planes.len()).enumerate() {
            let plane = field.plane;
            let step_bytes = 64 * plane_bits[plane];
            let scale_bytes = if plane == 0 { SCALE_BYTES } else { 0 };
            let whole = scales.map(|n| TILE_STEPS * step_bytes + n * scale_bytes);
            let first_scales = if is_row { scale_bytes } else { 0 };
            // Two-level scales have a walk of their own, which computes where tiles begin.
            let block_bytes = if is_two_level {
                format.block_bytes(plane)
            } else {
                steps * step_bytes + all_scales * scale_bytes
            };
            assert_eq!(
                planes[plane].len(),
                turns * coded.row_blocks * block_bytes,
                "bytes of plane {plane}"
            );
            if used[plane] == 0 {
                coded.block_bytes += block_bytes;
            }
            // A tile of one step alone is a block's first and its last.
            let half = step_bytes + half_scales * scale_bytes;
            coded.widths[i] = field.bits;
            coded.fields[i] = FieldMap {
                plane,
                start: used[plane]
                    + if is_second && !is_two_level {
                        whole[0] + first_scales
                    } else {
                        0
                    },
                block_pitch: turns * block_bytes,
                pitch: if is_second {
                    [whole[0] + whole[1]; 2]
                } else {
                    whole.map(|bytes| turns * bytes)
                },
                step_bytes,
                first_pitch: if is_second { first_scales } else { turns * first_scales },
                early: if is_second {
                    whole[steps / TILE_STEPS % 2] + if steps == 1 { first_scales } else { 0 } - half
                } else {
                    0
                },
            };
            used[plane] += 64 * field.bits as usize;
        }
        coded
    }
}

impl<'a> Coded<'a> {
    /// Plane of a field, its first codes in a row block, and bytes of a step of all fields of the plane.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn field(&self, index: usize, block: usize) -> (usize, usize, usize) {
        let map = &self.fields[index];
        (map.plane, block * map.block_pitch + map.start, map.step_bytes)
    }

    /// What it was made from.
    pub fn prefix(&self) -> &Prefix<'a> {
        &self.prefix
    }
}

/// The tiles of a row block by address, for kernels whose loop may hold nothing else.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Walk<const A: usize, const B: usize, const C: usize> {
    at: [*const u8; FIELDS],
    pitch: [[usize; 2]; FIELDS],
    first_pitch: [usize; FIELDS],
    step_bytes: [usize; FIELDS],
    early: [usize; FIELDS],
    group_mask: usize,
    steps: usize,
    next_step: usize,
}

/// Where one tile lies.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct TileAt {
    /// Each field's codes in the first step.
    pub(crate) codes: [*const u8; FIELDS],
    pub(crate) step_bytes: [usize; FIELDS],
    /// Of the groups that begin in the tile.
    pub(crate) scales: *const u8,
}

#[cfg(target_arch = "x86_64")]
impl<const A: usize, const B: usize, const C: usize> Walk<A, B, C> {
    /// Of no steps.
    pub(crate) const NOTHING: Self = Self {
        at: [std::ptr::null(); FIELDS],
        pitch: [[0; 2]; FIELDS],
        first_pitch: [0; FIELDS],
        step_bytes: [0; FIELDS],
        early: [0; FIELDS],
        group_mask: 0,
        steps: 0,
        next_step: 0,
    };

    /// # Panics
    /// A block that the matrix does not have, or scales of two levels: behind them every tile lies inside the planes,
    /// whose lengths `Coded` knows.
    #[inline(always)]
    pub(crate) fn new(coded: &Coded<'_>, block: usize) -> Self {
        assert!(block < coded.row_blocks && !coded.is_two_level, "row block {block}");
        let planes = coded.prefix.planes().0;
        let mut walk = Self {
            group_mask: coded.group_mask,
            steps: coded.steps,
            ..Self::NOTHING
        };
        for (i, bits) in [A, B, C].into_iter().enumerate() {
            if bits > 0 {
                let map = &coded.fields[i];
                let start = block * map.block_pitch + map.start;
                walk.at[i] = planes[map.plane].as_ptr().wrapping_add(start);
                (walk.pitch[i], walk.step_bytes[i], walk.early[i]) = (map.pitch, map.step_bytes, map.early);
                walk.first_pitch[i] = map.first_pitch;
            }
        }
        walk
    }

    /// Tiles of two steps.
    #[inline(always)]
    pub(crate) fn whole_tiles(&self) -> usize {
        self.steps / TILE_STEPS
    }

    /// The next tile of two steps.
    #[inline(always)]
    pub(crate) fn whole(&mut self) -> TileAt {
        let odd = self.next_step / TILE_STEPS % 2;
        let tile = TileAt {
            codes: self.at,
            step_bytes: self.step_bytes,
            scales: self.at[0].wrapping_add(TILE_STEPS * self.step_bytes[0]),
        };
        for (i, bits) in [A, B, C].into_iter().enumerate() {
            if bits > 0 {
                let first = if self.next_step == 0 { self.first_pitch[i] } else { 0 };
                self.at[i] = self.at[i].wrapping_add(self.pitch[i][odd] + first);
            }
        }
        self.next_step += TILE_STEPS;
        tile
    }

    /// The last tile, of one step, where there is one.
    pub(crate) fn half(&self) -> Option<TileAt> {
        if self.steps.is_multiple_of(TILE_STEPS) {
            return None;
        }
        let mut codes = self.at;
        for (at, early) in codes.iter_mut().zip(self.early) {
            *at = at.wrapping_sub(early);
        }
        Some(TileAt {
            codes,
            step_bytes: self.step_bytes,
            scales: codes[0].wrapping_add(self.step_bytes[0]),
        })
    }

    /// Where the scales lie of the group that begins at step `within` of the tile that begins at step `first`, if one does.
    #[inline(always)]
    pub(crate) fn scales(&self, tile: &TileAt, first: usize, within: usize) -> Option<*const u8> {
        ((first + within) & self.group_mask == 0).then(|| tile.scales.wrapping_add(within * SCALE_BYTES))
    }
}

/// Calls `$kernel::<$constants, A, B, C>$arguments` with the widths of the matrix's fields as constants (0: no such field),
/// so that each combination is compiled to straight code.
macro_rules! by_fields {
    ($coded:expr, $kernel:ident::<$($constant:literal),+>$arguments:tt) => {{
        match $coded.widths {
            [1, 0, 0] => $kernel::<$($constant),+, 1, 0, 0> $arguments,
            [2, 0, 0] => $kernel::<$($constant),+, 2, 0, 0> $arguments,
            [4, 0, 0] => $kernel::<$($constant),+, 4, 0, 0> $arguments,
            [8, 0, 0] => $kernel::<$($constant),+, 8, 0, 0> $arguments,
            [2, 1, 0] => $kernel::<$($constant),+, 2, 1, 0> $arguments,
            [2, 2, 0] => $kernel::<$($constant),+, 2, 2, 0> $arguments,
            [4, 4, 0] => $kernel::<$($constant),+, 4, 4, 0> $arguments,
            [2, 2, 4] => $kernel::<$($constant),+, 2, 2, 4> $arguments,
            // A new code fails the battery here until its line is added.
            other => unreachable!("no kernel is compiled for fields of {other:?} bits"),
        }
    }};
}
pub(crate) use by_fields;

/// What every block kernel may rely on.
pub(crate) fn check(steps: usize, row_blocks: usize, block: usize, panel: &Panel<'_>, tokens: usize) {
    assert_eq!(steps, panel.steps, "steps of the matrix and of the activations");
    assert!(block < row_blocks, "row block {block}");
    assert_eq!(tokens, panel.width, "outputs and tokens");
}
