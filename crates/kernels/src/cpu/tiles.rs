//! Walks the tiles of one row block across planes: the offsets, once for all paths. Where bytes lie is decided by
//! `cotk_quant::layout`; this only steps through them without asking again for each tile.

use cotk_quant::coded::Prefix;
use cotk_quant::layout::{Placement, SCALE_BYTES, TILE_STEPS};

use super::activations::Activations;
use super::dispatch::TOKENS;

/// Most fields of a code.
const FIELDS: usize = 3;

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
        // Scales of whole tiles, even and odd, for groups of one, two and four steps.
        let scales = match format.group_steps() {
            1 => [2, 2],
            2 => [1, 1],
            _ => [1, 0],
        };
        let mut fields = [FieldWalk::default(); FIELDS];
        let mut used = [0; FIELDS];
        for (walk, field) in fields.iter_mut().zip(prefix.fields()) {
            let plane = field.plane;
            let step_bytes = format.step_bytes(plane);
            let scale_bytes = if plane == 0 { SCALE_BYTES } else { 0 };
            let whole = scales.map(|n| TILE_STEPS * step_bytes + n * scale_bytes);
            *walk = FieldWalk {
                bytes: planes[plane],
                at: turns * block * format.block_bytes(plane) + if is_second { whole[0] } else { 0 },
                whole,
                pitch: if is_second {
                    [whole[0] + whole[1]; 2]
                } else {
                    whole.map(|bytes| turns * bytes)
                },
                step_bytes,
                scale_bytes,
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
    fn whole(&mut self, odd: usize) -> &'a [u8] {
        let start = self.at;
        self.at += self.pitch[odd];
        &self.bytes[start + self.offset..start + self.whole[odd]]
    }

    /// The same in the last tile of one step, with `groups` scales.
    #[cold]
    fn half(&mut self, odd: usize, groups: usize, is_second: bool) -> &'a [u8] {
        let bytes = self.step_bytes + groups * self.scale_bytes;
        // The other matrix's tile before it is short, too.
        let start = self.at - if is_second { self.whole[odd] - bytes } else { 0 };
        &self.bytes[start + self.offset..start + bytes]
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
                    self.fields[i].whole(odd)
                } else {
                    let groups = usize::from(first_step & self.group_mask == 0);
                    self.fields[i].half(odd, groups, self.is_second)
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

/// What every block kernel may rely on.
pub(crate) fn check(prefix: &Prefix<'_>, block: usize, acts: &Activations, first_token: usize, tokens: usize) {
    let format = prefix.format();
    check_shape(format.cols(), format.row_blocks(), block, acts, first_token, tokens);
}

/// The same, of a matrix with so many columns and row blocks.
pub(crate) fn check_shape(
    cols: usize,
    row_blocks: usize,
    block: usize,
    acts: &Activations,
    first_token: usize,
    tokens: usize,
) {
    assert_eq!(cols, acts.cols(), "matrix columns and activations");
    assert!(block < row_blocks, "row block {block}");
    assert!(
        tokens.is_power_of_two() && tokens <= TOKENS && first_token + tokens <= acts.tokens(),
        "{tokens} tokens from {first_token}"
    );
}
