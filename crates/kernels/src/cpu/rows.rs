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
        while row < count {
            // SAFETY: the caller's; the tile lies inside rows and tokens.
            unsafe {
                let w = rows.bytes.as_ptr().add((first + row) * rows.row_bytes());
                let x = x.as_ptr().add(token * rows.cols);
                let out = &mut out[token..];
                match (count - row >= 4, tokens) {
                    (true, 4) => tile::<L, KIND, 4, 4>(rows, w, x, row, out),
                    (true, 2) => tile::<L, KIND, 4, 2>(rows, w, x, row, out),
                    (true, _) => tile::<L, KIND, 4, 1>(rows, w, x, row, out),
                    (false, 4) => tile::<L, KIND, 1, 4>(rows, w, x, row, out),
                    (false, 2) => tile::<L, KIND, 1, 2>(rows, w, x, row, out),
                    (false, _) => tile::<L, KIND, 1, 1>(rows, w, x, row, out),
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
        let mut col = 0;
        while col < whole {
            let xs: [L; T] = std::array::from_fn(|t| L::f32s(x.add(t * cols + col).cast()));
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
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The same lanes in one register of 512 bits, or in two of 256.

    use std::arch::x86_64::{
        __m256, __m512, _mm_loadl_epi64, _mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepi8_epi32,
        _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_ps,
        _mm256_loadu_si256, _mm256_mul_ps, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm512_castsi512_ps,
        _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    use super::{BlockOut, Lanes, RowKind, Rows, dot_with, mix_with, weigh_with, widen_with};

    #[derive(Clone, Copy)]
    struct Zmm(__m512);

    // In all of them: features and pointers are the caller's promise (trait `Lanes`).
    impl Lanes for Zmm {
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: as the trait says.
            Self(unsafe { _mm512_set1_ps(value) })
        }
        #[inline(always)]
        unsafe fn f32s(at: *const u8) -> Self {
            // SAFETY: as the trait says.
            Self(unsafe { _mm512_loadu_ps(at.cast()) })
        }
        #[inline(always)]
        unsafe fn f16s(at: *const u8) -> Self {
            // SAFETY: as the trait says.
            Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) })
        }
        #[inline(always)]
        unsafe fn bf16s(at: *const u8) -> Self {
            // SAFETY: as the trait says.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }
        #[inline(always)]
        unsafe fn i8s(at: *const u8) -> Self {
            // SAFETY: as the trait says.
            Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()))) })
        }
        #[inline(always)]
        unsafe fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: as the trait says.
            Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            // SAFETY: as the trait says.
            Self(unsafe { _mm512_mul_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as the trait says.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
    }

    #[derive(Clone, Copy)]
    struct Ymms(__m256, __m256);

    impl Lanes for Ymms {
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: as the trait says.
            unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }
        #[inline(always)]
        unsafe fn f32s(at: *const u8) -> Self {
            // SAFETY: as the trait says.
            unsafe { Self(_mm256_loadu_ps(at.cast()), _mm256_loadu_ps(at.add(32).cast())) }
        }
        #[inline(always)]
        unsafe fn f16s(at: *const u8) -> Self {
            // SAFETY: as the trait says.
            unsafe {
                Self(
                    _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(at.add(16).cast())),
                )
            }
        }
        #[inline(always)]
        unsafe fn bf16s(at: *const u8) -> Self {
            // SAFETY: as the trait says.
            unsafe {
                let wide = |at: *const u8| {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                };
                Self(wide(at), wide(at.add(16)))
            }
        }
        #[inline(always)]
        unsafe fn i8s(at: *const u8) -> Self {
            // SAFETY: as the trait says.
            unsafe {
                let wide = |at: *const u8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast())));
                Self(wide(at), wide(at.add(8)))
            }
        }
        #[inline(always)]
        unsafe fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: as the trait says.
            unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            // SAFETY: as the trait says.
            unsafe { Self(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as the trait says.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
    pub(super) fn dot_avx512(rows: &Rows<'_>, first: usize, count: usize, x: &[f32], out: &mut [BlockOut]) {
        // SAFETY: this function has the features; `dot_block` has checked the rest.
        unsafe { dot_with::<Zmm>(rows, first, count, x, out) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn dot_avx2(rows: &Rows<'_>, first: usize, count: usize, x: &[f32], out: &mut [BlockOut]) {
        // SAFETY: this function has the features; `dot_block` has checked the rest.
        unsafe { dot_with::<Ymms>(rows, first, count, x, out) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
    pub(super) fn mix_avx512(rows: &Rows<'_>, p: &[f32], keep: &[f32], out: &mut [f32]) {
        // SAFETY: this function has the features; `mix` has checked the lengths.
        unsafe { mix_with::<Zmm>(rows, p, keep, out) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn mix_avx2(rows: &Rows<'_>, p: &[f32], keep: &[f32], out: &mut [f32]) {
        // SAFETY: this function has the features; `mix` has checked the lengths.
        unsafe { mix_with::<Ymms>(rows, p, keep, out) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
    pub(super) fn widen_avx512(kind: RowKind, bytes: &[u8], out: &mut [f32]) {
        // SAFETY: this function has the features; `widen` has checked the lengths.
        unsafe { widen_with::<Zmm>(kind, bytes, out) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn widen_avx2(kind: RowKind, bytes: &[u8], out: &mut [f32]) {
        // SAFETY: this function has the features; `widen` has checked the lengths.
        unsafe { widen_with::<Ymms>(kind, bytes, out) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
    pub(super) fn weigh_avx512(scores: &mut [f32], max: f32) -> f32 {
        weigh_with(scores, max)
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn weigh_avx2(scores: &mut [f32], max: f32) -> f32 {
        weigh_with(scores, max)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng, rngs::SmallRng};

    use super::*;

    fn stored(rng: &mut SmallRng, kind: RowKind, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..count {
            let value = rng.random_range(-1.0f32..1.0);
            match kind {
                RowKind::F32 => bytes.extend(value.to_le_bytes()),
                RowKind::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                RowKind::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                RowKind::I8 => bytes.push((value * 127.0) as i8 as u8),
            }
        }
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        /// Law: products and mixes equal sums in f64 within rounding, on every path with the same bits, for every kind
        /// and for shapes that no register divides.
        #[test]
        fn every_path_equals_the_sums(
            kind in 0usize..4, rows in 1usize..40, cols in 1usize..140, gap in 0usize..9, tokens in 0usize..11,
            seed: u64,
        ) {
            let kind = RowKind::ALL[kind];
            let mut rng = SmallRng::seed_from_u64(seed);
            let bytes = stored(&mut rng, kind, rows * (cols + gap));
            let matrix = Rows::strided(kind, &bytes, cols, cols + gap);
            let mut floats = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect() };
            let (x, p, keep, before) = (floats(tokens * cols), floats(tokens * rows), floats(tokens), floats(tokens * cols));
            let unit = if kind == RowKind::I8 { 128.0 } else { 1.0 };
            let mut firsts: Option<(Vec<u32>, Vec<u32>)> = None;
            for isa in Isa::present() {
                let mut dots = vec![f32::NAN; tokens * rows];
                dot(isa, matrix, &x, &mut dots, if seed % 2 == 0 { Threads::One } else { Threads::Pool });
                let mut mixed = before.clone();
                mix(isa, matrix, &p, &keep, &mut mixed);
                for t in 0..tokens {
                    for r in 0..rows {
                        let truth: f64 = (0..cols).map(|c| f64::from(matrix.at(r, c)) * f64::from(x[t * cols + c])).sum();
                        let found = f64::from(dots[t * rows + r]);
                        prop_assert!((found - truth).abs() < 1e-5 * unit * cols as f64, "{kind:?} {found} {truth}");
                    }
                    for c in 0..cols {
                        let start = f64::from(before[t * cols + c]) * f64::from(keep[t]);
                        let truth: f64 = (0..rows).map(|r| f64::from(matrix.at(r, c)) * f64::from(p[t * rows + r])).sum();
                        let found = f64::from(mixed[t * cols + c]);
                        prop_assert!((found - truth - start).abs() < 1e-5 * unit * rows as f64, "{kind:?} {found} {truth}");
                    }
                }
                let mut wide = vec![f32::NAN; rows * cols];
                matrix.widen(isa, &mut wide);
                for (i, wide) in wide.iter().enumerate() {
                    prop_assert_eq!(*wide, matrix.at(i / cols, i % cols));
                }
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
                let found = (bits(&dots), bits(&mixed));
                match &firsts {
                    None => firsts = Some(found),
                    Some(first) => prop_assert!(*first == found, "{} differs", isa.name()),
                }
            }
        }

        /// Law: a token's product does not depend on its neighbours.
        #[test]
        fn a_batch_equals_its_tokens(rows in 1usize..40, cols in 1usize..100, tokens in 1usize..13, seed: u64) {
            let mut rng = SmallRng::seed_from_u64(seed);
            let bytes = stored(&mut rng, RowKind::Bf16, rows * cols);
            let matrix = Rows::new(RowKind::Bf16, &bytes, cols);
            let x: Vec<f32> = (0..tokens * cols).map(|_| rng.random_range(-1.0f32..1.0)).collect();
            for isa in Isa::present() {
                let mut whole = vec![0.0; tokens * rows];
                dot(isa, matrix, &x, &mut whole, Threads::One);
                let mut one = vec![0.0; rows];
                for t in 0..tokens {
                    dot(isa, matrix, &x[t * cols..][..cols], &mut one, Threads::One);
                    prop_assert_eq!(&one, &whole[t * rows..][..rows]);
                }
            }
        }

        #[test]
        fn weights_of_scores_equal_the_exponential(count in 0usize..100, seed: u64) {
            let mut rng = SmallRng::seed_from_u64(seed);
            let scores: Vec<f32> = (0..count).map(|_| rng.random_range(-30.0f32..5.0)).collect();
            let mut first: Option<(Vec<u32>, u32)> = None;
            for isa in Isa::present() {
                let mut found = scores.clone();
                let sum = weigh(isa, &mut found, 5.0);
                let truth: f64 = scores.iter().map(|s| f64::from(s - 5.0).exp()).sum();
                prop_assert!((f64::from(sum) - truth).abs() <= 1e-5 * truth + 1e-30);
                for (found, score) in found.iter().zip(&scores) {
                    let truth = f64::from(score - 5.0).exp();
                    prop_assert!((f64::from(*found) - truth).abs() <= 1e-6 * truth);
                }
                let found = (found.iter().map(|v| v.to_bits()).collect(), sum.to_bits());
                match &first {
                    None => first = Some(found),
                    Some(first) => prop_assert!(*first == found),
                }
            }
        }
    }
}
