//! The same lanes in one register of 512 bits, or in two of 256.

use std::arch::x86_64::{
    __m256, __m512, _MM_HINT_T1, _mm_loadl_epi64, _mm_loadu_si128, _mm_prefetch, _mm256_castsi256_ps,
    _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_mul_ps, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm512_castsi512_ps,
    _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_mul_ps, _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_ps,
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
    #[inline(always)]
    unsafe fn ask(at: *const u8) {
        // SAFETY: a hint, which no address makes fail.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
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
    #[inline(always)]
    unsafe fn ask(at: *const u8) {
        // SAFETY: a hint, which no address makes fail.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
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
