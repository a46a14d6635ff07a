//! One token through matrices that come from memory: what counts is that lines are asked for and read in the order in which
//! they lie, for the CPU's own prefetcher follows one ascending stream and loses a broken one. Law: the same result, bit
//! for bit, as [`super::avx512`]'s blocks, which are quicker where weights lie in a cache and tokens share them.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T1, _mm_prefetch, _mm256_loadu_si256, _mm512_add_epi32, _mm512_cvtepi32_ps,
    _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_si512, _mm512_mul_ps,
    _mm512_or_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_storeu_ps,
};
use std::sync::atomic::{Ordering, compiler_fence};

use super::super::dispatch::BlockOut;
use super::super::panels::{DEPTHS, Panel, STEP_WORDS};
use super::super::tiles::{Coded, TileAt, Walk};
use super::avx512::extract;

/// Bytes that memory is asked for ahead of use, line by line, into the second-level cache. Experts of a layer (2048 × 1024,
/// 8 a token, 4 bit) on a Zen 4 core, of what plain reading gets in the same seconds: 75 to 80 % at 5760 and 6912 bytes, 71
/// at 4608 and 9216, 64 at 256, 55 at 768 to 2304; with gate and up in turn step by step and scales before codes, 58. A bare
/// loop over one such stream reads all of it at 256 to 768, which these kernels do not: why is not known.
pub(super) const AHEAD: usize = 5760;

/// One block of `W` matrices of one format × one token.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
pub(super) fn token<const W: usize, const A: usize, const B: usize, const C: usize>(
    all: [&Coded<'_>; W],
    block: usize,
    panel: &Panel<'_>,
    mut out: [&mut [BlockOut]; W],
) {
    assert!(panel.width == 1 && panel.steps == all[0].steps, "the panel fits");
    // Loops, not `map`: a closure with this function's features is not inlined into one that has none.
    let mut walks = [const { Walk::<A, B, C>::NOTHING }; W];
    let (mut cells, mut zero_points) = ([_mm512_setzero_ps(); W], [_mm512_setzero_ps(); W]);
    for w in 0..W {
        walks[w] = Walk::new(all[w], block);
        cells[w] = _mm512_set1_ps(all[w].cell);
        zero_points[w] = _mm512_set1_ps(all[w].zero_point);
    }
    let mut sums = [_mm512_setzero_ps(); W];
    let mut scales = [_mm512_setzero_ps(); W];
    let mut acts = panel.start();
    let mut first = 0;
    // SAFETY: `Walk::new` has checked that all its tiles lie in the planes; the panel has a step of `STEP_WORDS` words for
    // each of the matrix's (assertion above). This function has the path's features.
    unsafe {
        for _ in 0..walks[0].whole_tiles() {
            // Tile by tile: they lie one behind the other, and so they are read, scales behind codes.
            for w in 0..W {
                let tile = walks[w].whole();
                let new = [walks[w].scales(&tile, first, 0), walks[w].scales(&tile, first, 1)];
                let both = [acts, acts.add(STEP_WORDS)];
                let dots = [dot::<A, B, C>(&tile, 0, both[0]), dot::<A, B, C>(&tile, 1, both[1])];
                for within in 0..2 {
                    scale(new[within], cells[w], &mut scales[w]);
                    add(dots[within], both[within], scales[w], zero_points[w], &mut sums[w]);
                }
            }
            acts = acts.add(2 * STEP_WORDS);
            first += 2;
        }
        for w in 0..W {
            if let Some(tile) = walks[w].half() {
                let dot = dot::<A, B, C>(&tile, 0, acts);
                scale(walks[w].scales(&tile, first, 0), cells[w], &mut scales[w]);
                add(dot, acts, scales[w], zero_points[w], &mut sums[w]);
            }
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        // SAFETY: `out` has room for 16 floats; `storeu` needs no alignment.
        unsafe { _mm512_storeu_ps(out[0].as_mut_ptr(), sum) };
    }
}

/// The products of one step.
///
/// # Safety
/// As [`dots`].
#[inline(always)]
unsafe fn dot<const A: usize, const B: usize, const C: usize>(
    tile: &TileAt,
    within: usize,
    acts: *const u32,
) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        let [one, other] = dots::<A, B, C>(tile, within, acts);
        _mm512_add_epi32(one, other)
    }
}

/// The products of the two halves of one step, lines in ascending order.
///
/// # Safety
/// The caller has the path's features; the tile's step and the panel's step at `acts` are readable.
#[inline(always)]
pub(super) unsafe fn dots<const A: usize, const B: usize, const C: usize>(
    tile: &TileAt,
    within: usize,
    acts: *const u32,
) -> [__m512i; 2] {
    let mut codes = tile.codes;
    for (at, step_bytes) in codes.iter_mut().zip(tile.step_bytes) {
        *at = at.wrapping_add(within * step_bytes);
    }
    // SAFETY: the features are the caller's, and so is the readability of the step.
    unsafe {
        // Two chains, for `vpdpbusd` takes 4 to 5 cycles.
        let (mut one, mut other) = (_mm512_setzero_si512(), _mm512_setzero_si512());
        let mut lines = [_mm512_setzero_si512(); 3];
        macro_rules! depths {
            ($($depth:literal)*) => {$(
                next_line::<A, $depth>(codes[0], &mut lines[0]);
                let mut whole = extract::<A, $depth>(lines[0], B + C);
                if B > 0 {
                    next_line::<B, $depth>(codes[1], &mut lines[1]);
                    whole = _mm512_or_si512(whole, extract::<B, $depth>(lines[1], C));
                }
                if C > 0 {
                    next_line::<C, $depth>(codes[2], &mut lines[2]);
                    whole = _mm512_or_si512(whole, extract::<C, $depth>(lines[2], 0));
                }
                let four = _mm512_set1_epi32(acts.add($depth).cast::<i32>().read());
                if $depth < DEPTHS / 2 {
                    one = _mm512_dpbusd_epi32(one, whole, four);
                } else {
                    other = _mm512_dpbusd_epi32(other, whole, four);
                }
            )*};
        }
        depths!(0 1 2 3 4 5 6 7);
        [one, other]
    }
}

/// Loads the line that a depth begins, if one does.
///
/// # Safety
/// The caller has the path's features; `BITS` lines at `lines` are readable.
#[inline(always)]
unsafe fn next_line<const BITS: usize, const DEPTH: usize>(lines: *const u8, line: &mut __m512i) {
    let per_line = 8 / BITS.max(1);
    if DEPTH.is_multiple_of(per_line) {
        let at = lines.wrapping_add(DEPTH / per_line * 64);
        // SAFETY: the features are the caller's; the load is of 64 readable bytes and needs no alignment.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD).cast());
            *line = _mm512_loadu_si512(at.cast());
        }
        // No instruction: the compiler, which would read scales and later lines first, keeps the order of the addresses.
        compiler_fence(Ordering::SeqCst);
    }
}

/// The scales that begin with a step, if some do.
///
/// # Safety
/// The caller has the path's features; 32 bytes at `at` are readable.
#[inline(always)]
unsafe fn scale(at: Option<*const u8>, cell: __m512, scales: &mut __m512) {
    if let Some(at) = at {
        // SAFETY: the features are the caller's, and so is the readability; the load needs no alignment.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD).cast());
            *scales = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256(at.cast())), cell);
        }
    }
}

/// Adds the products of one step, scaled.
///
/// # Safety
/// The caller has the path's features; the panel's step at `acts` is readable.
#[inline(always)]
unsafe fn add(dot: __m512i, acts: *const u32, scales: __m512, zero_point: __m512, sums: &mut __m512) {
    // SAFETY: the features are the caller's, and so is the readability of the step.
    unsafe {
        let scale = _mm512_set1_ps(acts.add(DEPTHS).cast::<f32>().read());
        let sum = _mm512_set1_ps(acts.add(DEPTHS + 1).cast::<f32>().read());
        let centred = _mm512_fnmadd_ps(zero_point, sum, _mm512_cvtepi32_ps(dot));
        *sums = _mm512_fmadd_ps(centred, _mm512_mul_ps(scales, scale), *sums);
    }
}
