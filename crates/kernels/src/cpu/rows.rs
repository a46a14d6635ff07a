//! Rows of floats as they are stored (a checkpoint's matrix, a cache's keys and values) times activations in f32: nothing
//! is quantized, nothing laid out anew. One algorithm over 16 lanes, compiled for each path.
//!
//! Laws: `dot`: lane l sums the columns c ≡ l mod 16, ascending, fused; lanes are added by halves. `mix`: rows ascending,
//! fused. So every path gives the same bits, whatever the threads and whichever tokens stand beside a token.

#![expect(
    clippy::needless_range_loop,
    reason = "arrays over tokens, rows and registers are walked together"
)]

use half::{bf16, f16};

use super::dispatch::{BlockOut, Isa};
use super::gemm::{Disjoint, Threads, for_tokens, in_chunks};
use super::half_matrix::HalfKind;
use super::swiglu;
use cotk_quant::layout::BLOCK_ROWS;

/// Lanes that sums run in.
const LANES: usize = 16;
/// Blocks of 16 rows of one chunk of a product.
const CHUNK_BLOCKS: usize = 8;
/// Rows that are read side by side lie on one page or on a few, and the CPU's own prefetcher does not follow them: rows of up
/// to so many bytes are asked for in the order in which they lie, so far ahead of the last of them. On a Zen 4 core, of what
/// plain reading gets: rows of 512 to 2048 bytes 24 to 37 % without, 67 to 81 % with it; of 8192 bytes 61 and 74 %.
const ASKED_ROW_BYTES: usize = 8192;
const AHEAD: usize = 4096;

/// How an element is stored, little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowKind {
    F32,
    F16,
    Bf16,
    /// An integer in −128..=127: whoever has scales multiplies by them.
    I8,
}

impl RowKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::I8];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I8 => 1,
        }
    }

    /// One element; `bytes` are its.
    fn widen(self, bytes: &[u8]) -> f32 {
        match (self, bytes) {
            (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Self::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            (Self::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            (Self::I8, &[a]) => f32::from(a.cast_signed()),
            _ => unreachable!("callers cut by the kind's width"),
        }
    }
}

impl From<HalfKind> for RowKind {
    fn from(kind: HalfKind) -> Self {
        match kind {
            HalfKind::F16 => Self::F16,
            HalfKind::Bf16 => Self::Bf16,
        }
    }
}

/// A matrix `[rows, stride]` of which the first `cols` of each row are read. Cheap to copy.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    kind: RowKind,
    rows: usize,
    cols: usize,
    stride: usize,
    bytes: &'a [u8],
}

impl<'a> Rows<'a> {
    /// Rows without gaps.
    ///
    /// # Panics
    /// When the bytes are no whole rows.
    pub fn new(kind: RowKind, bytes: &'a [u8], cols: usize) -> Self {
        Self::strided(kind, bytes, cols, cols)
    }

    /// The first `cols` elements of rows of `stride`.
    ///
    /// # Panics
    /// When the bytes are no whole rows, or a row has fewer elements.
    pub fn strided(kind: RowKind, bytes: &'a [u8], cols: usize, stride: usize) -> Self {
        let row = stride * kind.bytes();
        assert!(
            0 < cols && cols <= stride && bytes.len().is_multiple_of(row),
            "whole rows of {stride}, {cols} of which are read"
        );
        Self {
            kind,
            rows: bytes.len() / row,
            cols,
            stride,
            bytes,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements read of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One element, widened exactly.
    pub fn at(&self, row: usize, col: usize) -> f32 {
        let width = self.kind.bytes();
        self.kind
            .widen(&self.bytes[(row * self.stride + col) * width..][..width])
    }

    /// All of it as f32 `[rows, cols]`, exactly.
    ///
    /// # Panics
    /// Another number of elements.
    pub fn widen(&self, isa: Isa, out: &mut [f32]) {
        assert_eq!(out.len(), self.rows * self.cols, "out is [rows, cols]");
        if self.cols == self.stride {
            return widen(isa, self.kind, self.bytes, out);
        }
        let width = self.cols * self.kind.bytes();
        let rows = self.bytes.chunks_exact(self.row_bytes());
        for (row, out) in rows.zip(out.chunks_exact_mut(self.cols)) {
            widen(isa, self.kind, &row[..width], out);
        }
    }

    fn row_bytes(&self) -> usize {
        self.stride * self.kind.bytes()
    }
}

/// `out[t, r] = Σ_c w[r, c] · x[t, c]`; `x` is `[tokens, cols]`, `out` `[tokens, rows]`.
///
/// # Panics
/// Lengths that do not fit.
pub fn dot(isa: Isa, rows: Rows<'_>, x: &[f32], out: &mut [f32], threads: Threads) {
    let (count, cols) = (rows.rows, rows.cols);
    let tokens = x.len() / cols;
    assert_eq!(x.len(), tokens * cols, "x is [tokens, {cols}]");
    assert_eq!(out.len(), tokens * count, "out is [tokens, {count}]");
    let shared = Disjoint::new(out);
    in_chunks(count.div_ceil(BLOCK_ROWS), CHUNK_BLOCKS, threads, |blocks| {
        for block in blocks {
            let first = block * BLOCK_ROWS;
            let width = BLOCK_ROWS.min(count - first);
            for_tokens(tokens, |token, buffer| {
                let x = &x[token * cols..][..buffer.len() * cols];
                dot_block(isa, &rows, first, width, x, buffer);
                for (t, values) in buffer.iter().enumerate() {
                    // SAFETY: rows `first..first + width` belong to this block alone, and a block to one chunk.
                    unsafe { shared.write((token + t) * count + first, &values[..width]) };
                }
            });
        }
    });
}

/// `out[t] = keep[t] · out[t] + Σ_r p[t, r] · w[r]`; `p` is `[tokens, rows]`, `out` `[tokens, cols]`.
///
/// # Panics
/// Lengths that do not fit.
pub fn mix(isa: Isa, rows: Rows<'_>, p: &[f32], keep: &[f32], out: &mut [f32]) {
    let tokens = keep.len();
    assert_eq!(p.len(), tokens * rows.rows, "p is [tokens, rows]");
    assert_eq!(out.len(), tokens * rows.cols, "out is [tokens, cols]");
    // SAFETY: `isa` exists, so its path's features are here; lengths are checked above.
    unsafe {
        match isa.name() {
            #[cfg(target_arch = "x86_64")]
            "avx512vnni" => x86::mix_avx512(&rows, p, keep, out),
            #[cfg(target_arch = "x86_64")]
            "avx2" => x86::mix_avx2(&rows, p, keep, out),
            _ => mix_with::<Plain>(&rows, p, keep, out),
        }
    }
}

/// `scores[i] = exp(scores[i] − max)`; returns their sum (lane l sums i ≡ l mod 16, lanes added by halves). Exponents
/// below −87 count as −87.
pub fn weigh(isa: Isa, scores: &mut [f32], max: f32) -> f32 {
    // SAFETY: `isa` exists, so its path's features are here.
    unsafe {
        match isa.name() {
            #[cfg(target_arch = "x86_64")]
            "avx512vnni" => x86::weigh_avx512(scores, max),
            #[cfg(target_arch = "x86_64")]
            "avx2" => x86::weigh_avx2(scores, max),
            _ => weigh_with(scores, max),
        }
    }
}

/// Stored elements as f32, exactly.
///
/// # Panics
/// Another number of elements.
pub fn widen(isa: Isa, kind: RowKind, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * kind.bytes(), "elements");
    // SAFETY: `isa` exists, so its path's features are here; lengths are checked above.
    unsafe {
        match isa.name() {
            #[cfg(target_arch = "x86_64")]
            "avx512vnni" => x86::widen_avx512(kind, bytes, out),
            #[cfg(target_arch = "x86_64")]
            "avx2" => x86::widen_avx2(kind, bytes, out),
            _ => widen_with::<Plain>(kind, bytes, out),
        }
    }
}

/// # Safety
/// The caller has the path's features; `bytes` are as many elements as `out` has.
#[inline(always)]
unsafe fn widen_with<L: Lanes>(kind: RowKind, bytes: &[u8], out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe {
        match kind {
            RowKind::F32 => widen_kind::<L, F32>(bytes, out),
            RowKind::F16 => widen_kind::<L, F16>(bytes, out),
            RowKind::Bf16 => widen_kind::<L, BF16>(bytes, out),
            RowKind::I8 => widen_kind::<L, I8>(bytes, out),
        }
    }
}

/// # Safety
/// As [`widen_with`].
#[inline(always)]
unsafe fn widen_kind<L: Lanes, const KIND: u8>(bytes: &[u8], out: &mut [f32]) {
    for (i, out) in out.chunks_mut(LANES).enumerate() {
        // SAFETY: the caller's; the last chunk is read and written in part.
        unsafe {
            let at = bytes.as_ptr().add(i * LANES * width(KIND));
            if out.len() == LANES {
                load::<L, KIND>(at).store(out.as_mut_ptr());
            } else {
                let mut lanes = [0.0; LANES];
                load_part::<L, KIND>(at, out.len()).store(lanes.as_mut_ptr());
                out.copy_from_slice(&lanes[..out.len()]);
            }
        }
    }
}

/// Up to 16 rows for up to 8 tokens.
fn dot_block(isa: Isa, rows: &Rows<'_>, first: usize, count: usize, x: &[f32], out: &mut [BlockOut]) {
    assert!(first + count <= rows.rows && count <= BLOCK_ROWS, "inside");
    assert_eq!(x.len(), out.len() * rows.cols, "x is [tokens, cols]");
    // SAFETY: `isa` exists, so its path's features are here; rows and tokens are inside by the lines above.
    unsafe {
        match isa.name() {
            #[cfg(target_arch = "x86_64")]
            "avx512vnni" => x86::dot_avx512(rows, first, count, x, out),
            #[cfg(target_arch = "x86_64")]
            "avx2" => x86::dot_avx2(rows, first, count, x, out),
            _ => dot_with::<Plain>(rows, first, count, x, out),
        }
    }
}

/// 16 floats in the registers of a path.
///
/// # Safety
/// Of all functions: the caller has the path's features, and 16 elements are readable or writable where a pointer points.
trait Lanes: Copy {
    unsafe fn splat(value: f32) -> Self;
    unsafe fn f32s(at: *const u8) -> Self;
    unsafe fn f16s(at: *const u8) -> Self;
    unsafe fn bf16s(at: *const u8) -> Self;
    unsafe fn i8s(at: *const u8) -> Self;
    /// `self · b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Asks memory for a line; any address may be asked for.
    unsafe fn ask(at: *const u8);
}

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;
const I8: u8 = 3;

const fn width(kind: u8) -> usize {
    match kind {
        F32 => 4,
        I8 => 1,
        _ => 2,
    }
}

/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn load<L: Lanes, const KIND: u8>(at: *const u8) -> L {
    // SAFETY: the caller's.
    unsafe {
        match KIND {
            F32 => L::f32s(at),
            F16 => L::f16s(at),
            BF16 => L::bf16s(at),
            _ => L::i8s(at),
        }
    }
}

/// The first `count` of 16 elements, zeros behind them.
///
/// # Safety
/// As [`Lanes`], for `count` elements.
#[inline(always)]
unsafe fn load_part<L: Lanes, const KIND: u8>(at: *const u8, count: usize) -> L {
    let mut bytes = [0u8; 4 * LANES];
    // SAFETY: the caller's, and at most 16 elements of at most 4 bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), count * width(KIND));
        load::<L, KIND>(bytes.as_ptr())
    }
}

/// Lanes added by halves.
#[inline(always)]
fn reduce(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// # Safety
/// The caller has the path's features; rows and tokens are inside.
#[inline(always)]
unsafe fn dot_with<L: Lanes>(rows: &Rows<'_>, first: usize, count: usize, x: &[f32], out: &mut [BlockOut]) {
    // SAFETY: the caller's.
    unsafe {
        match rows.kind {
            RowKind::F32 => dot_kind::<L, F32>(rows, first, count, x, out),
            RowKind::F16 => dot_kind::<L, F16>(rows, first, count, x, out),
            RowKind::Bf16 => dot_kind::<L, BF16>(rows, first, count, x, out),
            RowKind::I8 => dot_kind::<L, I8>(rows, first, count, x, out),
        }
    }
}

/// # Safety
/// As [`dot_with`].
#[inline(always)]
unsafe fn dot_kind<L: Lanes, const KIND: u8>(
    rows: &Rows<'_>,
    first: usize,
    count: usize,
    x: &[f32],
    out: &mut [BlockOut],
) {
    let mut token = 0;
    while token < out.len() {
        let tokens = match out.len() - token {
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
        let mut row = 0;
        // Other tokens find the rows in a cache.
        let is_asked = token == 0 && rows.row_bytes() <= ASKED_ROW_BYTES;
        while row < count {
            // SAFETY: the caller's; the tile lies inside rows and tokens.
            unsafe {
                let w = rows.bytes.as_ptr().add((first + row) * rows.row_bytes());
                let x = x.as_ptr().add(token * rows.cols);
                let out = &mut out[token..];
                match (count - row >= 4, tokens) {
                    (true, 4) => tile::<L, KIND, 4, 4>(rows, is_asked, w, x, row, out),
                    (true, 2) => tile::<L, KIND, 4, 2>(rows, is_asked, w, x, row, out),
                    (true, _) => tile::<L, KIND, 4, 1>(rows, is_asked, w, x, row, out),
                    (false, 4) => tile::<L, KIND, 1, 4>(rows, is_asked, w, x, row, out),
                    (false, 2) => tile::<L, KIND, 1, 2>(rows, is_asked, w, x, row, out),
                    (false, _) => tile::<L, KIND, 1, 1>(rows, is_asked, w, x, row, out),
                }
            }
            row += if count - row >= 4 { 4 } else { 1 };
        }
        token += tokens;
    }
}

/// `R` rows from `w` for `T` tokens from `x`, into rows `to..` of `out`.
///
/// # Safety
/// As [`dot_with`].
#[inline(always)]
unsafe fn tile<L: Lanes, const KIND: u8, const R: usize, const T: usize>(
    rows: &Rows<'_>,
    is_asked: bool,
    w: *const u8,
    x: *const f32,
    to: usize,
    out: &mut [BlockOut],
) {
    let (cols, row_bytes) = (rows.cols, rows.row_bytes());
    // SAFETY: columns up to `cols` of R rows and T tokens are readable: the caller's.
    unsafe {
        let mut sums = [[L::splat(0.0); R]; T];
        let whole = cols / LANES * LANES;
        let ahead = (R - 1) * row_bytes + AHEAD;
        let mut col = 0;
        while col < whole {
            let xs: [L; T] = std::array::from_fn(|t| L::f32s(x.add(t * cols + col).cast()));
            if is_asked {
                for line in 0..(R * LANES * width(KIND)).div_ceil(64) {
                    L::ask(w.wrapping_add(R * col * width(KIND) + 64 * line + ahead));
                }
            }
            for r in 0..R {
                let w = load::<L, KIND>(w.add(r * row_bytes + col * width(KIND)));
                for t in 0..T {
                    sums[t][r] = w.fma(xs[t], sums[t][r]);
                }
            }
            col += LANES;
        }
        if col < cols {
            let rest = cols - col;
            let xs: [L; T] = std::array::from_fn(|t| load_part::<L, F32>(x.add(t * cols + col).cast(), rest));
            for r in 0..R {
                let w = load_part::<L, KIND>(w.add(r * row_bytes + col * width(KIND)), rest);
                for t in 0..T {
                    sums[t][r] = w.fma(xs[t], sums[t][r]);
                }
            }
        }
        for t in 0..T {
            for r in 0..R {
                let mut lanes = [0.0; LANES];
                sums[t][r].store(lanes.as_mut_ptr());
                out[t][to + r] = reduce(lanes);
            }
        }
    }
}

/// # Safety
/// The caller has the path's features; lengths fit.
#[inline(always)]
unsafe fn mix_with<L: Lanes>(rows: &Rows<'_>, p: &[f32], keep: &[f32], out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe {
        match rows.kind {
            RowKind::F32 => mix_kind::<L, F32>(rows, p, keep, out),
            RowKind::F16 => mix_kind::<L, F16>(rows, p, keep, out),
            RowKind::Bf16 => mix_kind::<L, BF16>(rows, p, keep, out),
            RowKind::I8 => mix_kind::<L, I8>(rows, p, keep, out),
        }
    }
}

/// # Safety
/// As [`mix_with`].
#[inline(always)]
unsafe fn mix_kind<L: Lanes, const KIND: u8>(rows: &Rows<'_>, p: &[f32], keep: &[f32], out: &mut [f32]) {
    let (mut token, cols, count) = (0, rows.cols, rows.rows);
    while token < keep.len() {
        let tokens = if keep.len() - token >= 4 { 4 } else { 1 };
        let (p, keep) = (&p[token * count..], &keep[token..]);
        let out = &mut out[token * cols..];
        let mut col = 0;
        while col < cols {
            // SAFETY: the caller's; columns `col..` are inside.
            unsafe {
                col += match (tokens, cols - col) {
                    (4, 64..) => stripe::<L, KIND, 4, 4>(rows, p, keep, out, col),
                    (4, _) => stripe::<L, KIND, 1, 4>(rows, p, keep, out, col),
                    (_, 64..) => stripe::<L, KIND, 4, 1>(rows, p, keep, out, col),
                    _ => stripe::<L, KIND, 1, 1>(rows, p, keep, out, col),
                };
            }
        }
        token += tokens;
    }
}

/// `D · 16` columns from `col` (or those that are left, where `D` is 1) for `T` tokens; returns their number.
///
/// # Safety
/// As [`mix_with`].
#[inline(always)]
unsafe fn stripe<L: Lanes, const KIND: u8, const D: usize, const T: usize>(
    rows: &Rows<'_>,
    p: &[f32],
    keep: &[f32],
    out: &mut [f32],
    col: usize,
) -> usize {
    let (cols, row_bytes) = (rows.cols, rows.row_bytes());
    let here = (D * LANES).min(cols - col);
    let is_part = here < D * LANES;
    // SAFETY: `here` columns of all rows and of T tokens of `out` are inside: the caller's.
    unsafe {
        let out = out.as_mut_ptr();
        let mut sums = [[L::splat(0.0); D]; T];
        for t in 0..T {
            let keep = L::splat(keep[t]);
            for d in 0..D {
                let at = out.add(t * cols + col + d * LANES).cast::<u8>().cast_const();
                let before = if is_part {
                    load_part::<L, F32>(at, here)
                } else {
                    L::f32s(at)
                };
                sums[t][d] = before.mul(keep);
            }
        }
        let first = rows.bytes.as_ptr().add(col * width(KIND));
        for row in 0..rows.rows {
            let from = first.add(row * row_bytes);
            let mut w = [L::splat(0.0); D];
            for d in 0..D {
                let at = from.add(d * LANES * width(KIND));
                w[d] = if is_part {
                    load_part::<L, KIND>(at, here)
                } else {
                    load::<L, KIND>(at)
                };
            }
            for t in 0..T {
                let p = L::splat(*p.get_unchecked(t * rows.rows + row));
                for d in 0..D {
                    sums[t][d] = w[d].fma(p, sums[t][d]);
                }
            }
        }
        for t in 0..T {
            for d in 0..D {
                let to = out.add(t * cols + col + d * LANES);
                if is_part {
                    let mut lanes = [0.0; LANES];
                    sums[t][d].store(lanes.as_mut_ptr());
                    std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, here);
                } else {
                    sums[t][d].store(to);
                }
            }
        }
    }
    here
}

#[inline(always)]
fn weigh_with(scores: &mut [f32], max: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (score, sum) in chunk.iter_mut().zip(&mut sums) {
            *score = swiglu::exp(*score - max);
            *sum += *score;
        }
    }
    for (score, sum) in rest.iter_mut().zip(&mut sums) {
        *score = swiglu::exp(*score - max);
        *sum += *score;
    }
    reduce(sums)
}

/// The lanes of every CPU.
#[derive(Clone, Copy)]
struct Plain([f32; LANES]);

impl Plain {
    /// # Safety
    /// As [`Lanes`].
    #[inline(always)]
    unsafe fn read<const N: usize>(at: *const u8, widen: impl Fn([u8; N]) -> f32) -> Self {
        Self(std::array::from_fn(|i| {
            // SAFETY: the caller's.
            widen(unsafe { at.cast::<[u8; N]>().add(i).read_unaligned() })
        }))
    }
}

impl Lanes for Plain {
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }
    unsafe fn f32s(at: *const u8) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::read(at, f32::from_le_bytes) }
    }
    unsafe fn f16s(at: *const u8) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::read(at, |b| f16::from_le_bytes(b).to_f32()) }
    }
    unsafe fn bf16s(at: *const u8) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::read(at, |b| bf16::from_le_bytes(b).to_f32()) }
    }
    unsafe fn i8s(at: *const u8) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::read(at, |[b]: [u8; 1]| f32::from(b.cast_signed())) }
    }
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    unsafe fn mul(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * b.0[i]))
    }
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    unsafe fn ask(_: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;
