//! Keys and values of one layer of one sequence, in f32, f16 or 8-bit integers with a scale per head and position.
//! Law: what is truncated is the shorter cache; f32 gives back what was put in, the others its rounding.

use std::ops::Range;
use std::str::FromStr;

use cotk_kernels::cpu::rows::{RowKind, Rows};
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::attention::Heads;
use crate::spec::{AttentionSpec, LayerSpec, ModelSpec};

/// How cached numbers are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvKind {
    F32,
    #[default]
    F16,
    /// Integers of 8 bits, one f32 scale per head and position.
    Int8,
}

impl KvKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Int8];

    /// As the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }

    /// Bits of one number, scales not counted.
    pub fn bits(self) -> u32 {
        match self {
            Self::F32 => 32,
            Self::F16 => 16,
            Self::Int8 => 8,
        }
    }

    /// Bytes of a row of `width` numbers with its scale.
    pub fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::F32 => 4 * width,
            Self::F16 => 2 * width,
            Self::Int8 => width + 4,
        }
    }
}

impl std::fmt::Display for KvKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == name);
        known.ok_or_else(|| format!("`{name}` is not a kind of cache: expected f32, f16 or int8"))
    }
}

/// Rows of one head.
#[derive(Debug, Clone, PartialEq)]
enum Held {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Int8(Vec<i8>, Vec<f32>),
}

impl Held {
    fn new(kind: KvKind) -> Self {
        match kind {
            KvKind::F32 => Self::F32(Vec::new()),
            KvKind::F16 => Self::F16(Vec::new()),
            KvKind::Int8 => Self::Int8(Vec::new(), Vec::new()),
        }
    }

    fn reserve(&mut self, rows: usize, width: usize) {
        match self {
            Self::F32(held) => held.reserve(rows * width),
            Self::F16(held) => held.reserve(rows * width),
            Self::Int8(held, scales) => {
                held.reserve(rows * width);
                scales.reserve(rows);
            }
        }
    }

    fn push(&mut self, row: &[f32]) {
        match self {
            Self::F32(held) => held.extend_from_slice(row),
            Self::F16(held) => {
                let start = held.len();
                held.resize(start + row.len(), f16::ZERO);
                held[start..].convert_from_f32_slice(row);
                if row.iter().any(|x| x.abs() > f16::MAX.to_f32_const()) {
                    // An infinite key would make NaN of a softmax that f32 survives.
                    for (to, x) in held[start..].iter_mut().zip(row) {
                        *to = f16::from_f32(x.clamp(f16::MIN.to_f32_const(), f16::MAX.to_f32_const()));
                    }
                }
            }
            Self::Int8(held, scales) => {
                let largest = row.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let (scale, inverse) = if largest > f32::MIN_POSITIVE * 127.0 {
                    (largest / 127.0, 127.0 / largest)
                } else {
                    (0.0, 0.0)
                };
                scales.push(scale);
                #[expect(clippy::cast_possible_truncation, reason = "−127..=127")]
                held.extend(row.iter().map(|x| (x * inverse).round_ties_even() as i8));
            }
        }
    }

    fn truncate(&mut self, rows: usize, width: usize) {
        match self {
            Self::F32(held) => held.truncate(rows * width),
            Self::F16(held) => held.truncate(rows * width),
            Self::Int8(held, scales) => {
                held.truncate(rows * width);
                scales.truncate(rows);
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(held) => size_of_val(held.as_slice()),
            Self::F16(held) => size_of_val(held.as_slice()),
            Self::Int8(held, scales) => held.len() + size_of_val(scales.as_slice()),
        }
    }

    /// The first `cols` numbers of some rows of `width`, and the rows' scales: none where numbers need none.
    fn rows(&self, rows: Range<usize>, cols: usize, width: usize) -> (Rows<'_>, &[f32]) {
        let range = rows.start * width..rows.end * width;
        match self {
            Self::F32(held) => (Rows::strided(RowKind::F32, bytes_of(&held[range]), cols, width), &[]),
            Self::F16(held) => (Rows::strided(RowKind::F16, bytes_of(&held[range]), cols, width), &[]),
            Self::Int8(held, scales) => (
                Rows::strided(RowKind::I8, bytes_of(&held[range]), cols, width),
                &scales[rows],
            ),
        }
    }
}

/// Types that are plain bytes: every bit pattern means something and nothing lies between.
trait Bare: Copy {}
impl Bare for f32 {}
impl Bare for f16 {}
impl Bare for i8 {}

fn bytes_of<T: Bare>(numbers: &[T]) -> &[u8] {
    // SAFETY: `Bare` types have no padding, and any byte is a u8.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// Keys and values of one layer of one sequence.
#[derive(Debug, Clone)]
pub struct LayerCache {
    key_dim: usize,
    value_dim: usize,
    positions: usize,
    /// Per key head, `[positions, key_dim]`, turned.
    keys: Vec<Held>,
    /// Per key head, `[positions, value_dim]`. None where a value is the first `value_dim` elements of its key
    /// (latent attention).
    values: Vec<Held>,
}

impl LayerCache {
    /// Nothing cached: the next token stands at position 0.
    pub fn new(spec: &AttentionSpec, kind: KvKind) -> Self {
        Self::of(&Heads::new(spec, None), kind)
    }

    /// The same for one layer, whose values may be narrower.
    pub fn of_layer(spec: &ModelSpec, layer: &LayerSpec, kind: KvKind) -> Self {
        Self::of(&Heads::of_layer(spec, layer), kind)
    }

    pub(super) fn of(heads: &Heads, kind: KvKind) -> Self {
        let values = if heads.values_are_keys { 0 } else { heads.kv_heads };
        Self {
            key_dim: heads.key_dim,
            value_dim: heads.value_dim,
            positions: 0,
            keys: vec![Held::new(kind); heads.kv_heads],
            values: vec![Held::new(kind); values],
        }
    }

    /// Positions cached.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Makes room for `positions` more, so that adding them allocates nothing.
    pub fn reserve(&mut self, positions: usize) {
        for (heads, width) in [(&mut self.keys, self.key_dim), (&mut self.values, self.value_dim)] {
            heads.iter_mut().for_each(|held| held.reserve(positions, width));
        }
    }

    /// Forgets what follows the first `positions`.
    pub fn truncate(&mut self, positions: usize) {
        self.positions = self.positions.min(positions);
        for (heads, width) in [(&mut self.keys, self.key_dim), (&mut self.values, self.value_dim)] {
            heads.iter_mut().for_each(|held| held.truncate(positions, width));
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.keys
            .iter()
            .chain(&self.values)
            .map(|held| held.bytes() as u64)
            .sum()
    }

    /// Appends rows of `[tokens, kv_heads · key_dim]` and of `[tokens, kv_heads · value_dim]`; no values where keys
    /// hold them.
    pub(super) fn append(&mut self, keys: &[f32], values: &[f32]) {
        self.positions += keys.len() / (self.key_dim * self.keys.len());
        for (rows, width, heads) in [
            (keys, self.key_dim, &mut self.keys),
            (values, self.value_dim, &mut self.values),
        ] {
            for row in rows.chunks_exact((width * heads.len()).max(1)) {
                for (row, held) in row.chunks_exact(width).zip(heads.iter_mut()) {
                    held.push(row);
                }
            }
        }
    }

    /// Keys of some positions of one head, and their scales (none: 1).
    pub(super) fn keys(&self, head: usize, positions: Range<usize>) -> (Rows<'_>, &[f32]) {
        self.keys[head].rows(positions, self.key_dim, self.key_dim)
    }

    /// Values of some positions of one head, and their scales (none: 1).
    pub(super) fn values(&self, head: usize, positions: Range<usize>) -> (Rows<'_>, &[f32]) {
        match self.values.get(head) {
            Some(held) => held.rows(positions, self.value_dim, self.value_dim),
            None => self.keys[head].rows(positions, self.value_dim, self.key_dim),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(values_are_keys: bool) -> Heads {
        Heads {
            heads: 2,
            kv_heads: 2,
            key_dim: 3,
            value_dim: 2,
            values_are_keys,
            scale: 1.0,
            window: None,
        }
    }

    #[test]
    fn a_truncated_cache_is_the_shorter_one() {
        for kind in KvKind::ALL {
            for values_are_keys in [false, true] {
                let heads = heads(values_are_keys);
                let keys: Vec<f32> = (0..30u8).map(f32::from).collect();
                let values = if values_are_keys { &[] } else { &keys[..20] };
                let (mut long, mut short) = (LayerCache::of(&heads, kind), LayerCache::of(&heads, kind));
                long.append(&keys, values);
                assert_eq!(long.positions(), 5);
                short.append(&keys[..18], &values[..values.len() * 3 / 5]);
                long.truncate(3);
                assert_eq!((long.positions(), long.bytes()), (3, short.bytes()));
                assert_eq!((&long.keys, &long.values), (&short.keys, &short.values));
                let per_head = kind.row_bytes(3) + if values_are_keys { 0 } else { kind.row_bytes(2) };
                assert_eq!(short.bytes(), 3 * 2 * per_head as u64);
            }
        }
    }

    /// Law: f32 is exact, f16 within 2⁻¹¹ of each number, int8 within half a step of the row's largest; rows of zeros and
    /// numbers beyond f16 stay finite.
    #[test]
    fn what_is_held_is_what_was_put_in_rounded() {
        let rows = [
            [0.1f32, -3.0, 2.5],
            [0.0, 0.0, 0.0],
            [1e-20, -1e-20, 0.0],
            [9e4, 1.0, -9e4],
        ];
        for kind in KvKind::ALL {
            let mut held = Held::new(kind);
            rows.iter().for_each(|row| held.push(row));
            let (found, scales) = held.rows(0..4, 3, 3);
            for (r, row) in rows.iter().enumerate() {
                let largest = row.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                for (c, x) in row.iter().enumerate() {
                    let found = found.at(r, c) * scales.get(r).copied().unwrap_or(1.0);
                    let bound = match kind {
                        KvKind::F32 => 0.0,
                        KvKind::F16 => x.abs() / 2048.0 + 1e-7,
                        KvKind::Int8 => largest / 253.0,
                    };
                    let x = if kind == KvKind::F16 {
                        x.clamp(-65504.0, 65504.0)
                    } else {
                        *x
                    };
                    assert!((found - x).abs() <= bound, "{kind} {found} {x}");
                }
            }
        }
    }

    #[test]
    fn kinds_are_read_by_their_names() {
        for kind in KvKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!(
            "int4"
                .parse::<KvKind>()
                .unwrap_err()
                .contains("expected f32, f16 or int8")
        );
    }
}
