//! AVX2 where scales have two levels: as [`super::avx2`], each half of a step apart where groups have 16 weights.
//! Law: equal to the plain kernel bit for bit.

use std::arch::x86_64::{
    __m256, __m256i, _mm_add_epi8, _mm_and_si128, _mm_cvtsi32_si128, _mm_loadu_si128, _mm_or_si128, _mm_set1_epi8,
    _mm_sll_epi16, _mm_srl_epi16, _mm_srli_si128, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtph_ps,
    _mm256_mul_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_storeu_ps,
};

use cotk_quant::layout::{BLOCK_ROWS, SCALE_BYTES, SUPER_GROUPS, TILE_STEPS};

use super::super::dispatch::BlockOut;
use super::super::panels::{DEPTHS, Panel};
use super::super::tiles::{Coded, TileAt, by_fields};
use super::super::two_level::{Places, Walk};
use super::avx2::{Step, add_lines, add_step};

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn block(coded: &Coded<'_>, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
    let mut first = 0;
    // 16 registers: more than four tokens at once would spill.
    for four in out.chunks_mut(4) {
        match four.len() {
            1 => by_fields!(coded, tokens::<1>(coded, block, panel, first, four)),
            2 => by_fields!(coded, tokens::<2>(coded, block, panel, first, four)),
            _ => by_fields!(coded, tokens::<4>(coded, block, panel, first, four)),
        }
        first += 4;
    }
}

/// The scales of a group for rows 0–7 and 8–15.
type Pair = [__m256; 2];

#[target_feature(enable = "avx2,fma,f16c")]
fn tokens<const T: usize, const A: usize, const B: usize, const C: usize>(
    coded: &Coded<'_>,
    block: usize,
    panel: &Panel<'_>,
    first_token: usize,
    out: &mut [BlockOut],
) {
    let mut walk = Walk::<A, B, C>::new(coded, block);
    let places = Places::new(coded);
    let (cell, zero_point) = (_mm256_set1_ps(coded.cell), _mm256_set1_ps(coded.zero_point));
    let mut sums = [[_mm256_setzero_ps(); 2]; T];
    let mut scales = [[_mm256_setzero_ps(); 2]; SUPER_GROUPS];
    for first in (0..coded.steps).step_by(TILE_STEPS) {
        let steps = TILE_STEPS.min(coded.steps - first);
        let (tile, groups) = walk.tile(steps);
        // SAFETY: `Walk::new` has checked that all its tiles lie in the planes. This function has the path's features.
        unsafe {
            expand(tile.scales, groups, cell, &mut scales);
            for within in 0..steps {
                let step = Step {
                    words: panel.step(first + within),
                    width: panel.width,
                    first_token,
                };
                let half_step = 2 * (first + within);
                let scales = [scales[places.of(half_step)], scales[places.of(half_step + 1)]];
                for rows in [0, 1] {
                    if places.is_half() {
                        let found = products::<T, A, B, C, 0, { DEPTHS / 2 }>(&tile, within, rows, &step);
                        let sum = |t| step.half_sum(t);
                        finish(found, scales[0][rows], zero_point, &step, sum, rows, &mut sums);
                        if places.has(half_step + 1) {
                            let found = products::<T, A, B, C, { DEPTHS / 2 }, DEPTHS>(&tile, within, rows, &step);
                            let sum = |t| step.sum(t) - step.half_sum(t);
                            finish(found, scales[1][rows], zero_point, &step, sum, rows, &mut sums);
                        }
                    } else {
                        let found = products::<T, A, B, C, 0, DEPTHS>(&tile, within, rows, &step);
                        finish(
                            found,
                            scales[0][rows],
                            zero_point,
                            &step,
                            |t| step.sum(t),
                            rows,
                            &mut sums,
                        );
                    }
                }
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        for (out, sum) in out.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
            // SAFETY: `out` has room for 8 floats; `storeu` needs no alignment.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }
}

/// The products of depths `FROM..TO` of one step for rows 0–7 (`rows` 0) or 8–15.
///
/// # Safety
/// The caller has the path's features; the tile's step is readable.
#[inline(always)]
unsafe fn products<
    const T: usize,
    const A: usize,
    const B: usize,
    const C: usize,
    const FROM: usize,
    const TO: usize,
>(
    tile: &TileAt,
    within: usize,
    rows: usize,
    step: &Step<'_>,
) -> [__m256i; T] {
    // SAFETY: the features are the caller's, and so is the readability: a field of `BITS` bits is `BITS` lines.
    unsafe {
        let at = |field: usize| tile.codes[field].add(within * tile.step_bytes[field]);
        let mut dots = add_lines::<A, T, FROM, TO>(&*at(0).cast(), rows, step, [_mm256_setzero_si256(); T]);
        if B > 0 {
            dots = add_lines::<B, T, FROM, TO>(&*at(1).cast(), rows, step, dots);
        }
        if C > 0 {
            dots = add_lines::<C, T, FROM, TO>(&*at(2).cast(), rows, step, dots);
        }
        dots
    }
}

/// Adds products, scaled.
///
/// # Safety
/// The caller has the path's features.
#[inline(always)]
unsafe fn finish<const T: usize>(
    dots: [__m256i; T],
    scales: __m256,
    zero_point: __m256,
    step: &Step<'_>,
    sum: impl Fn(usize) -> f32,
    rows: usize,
    sums: &mut [[__m256; 2]; T],
) {
    for t in 0..T {
        // SAFETY: the features are the caller's.
        sums[t][rows] = unsafe { add_step(dots[t], scales, zero_point, step.scale(t), sum(t), sums[t][rows]) };
    }
}

/// The scales of the groups of one block (`cotk_quant::layout::TwoLevelAt`); none: nothing is done.
///
/// # Safety
/// The caller has the path's features; the scale block of so many groups at `at` is readable.
#[inline(always)]
unsafe fn expand(at: *const u8, groups: usize, cell: __m256, scales: &mut [Pair; SUPER_GROUPS]) {
    if groups == 0 {
        return;
    }
    // SAFETY: the features are the caller's, and so is the readability; no load needs alignment.
    unsafe {
        let load = |at: *const u8| _mm_loadu_si128(at.cast());
        let coarse = [at, at.add(BLOCK_ROWS)].map(|at| _mm256_mul_ps(_mm256_cvtph_ps(load(at)), cell));
        let low = at.add(SCALE_BYTES);
        let high = low.add(BLOCK_ROWS * groups.div_ceil(2));
        let (nibble, two, middle) = (_mm_set1_epi8(0x0f), _mm_set1_epi8(0x30), _mm_set1_epi8(-32));
        for (group, scales) in scales.iter_mut().enumerate().take(groups) {
            #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "below 8")]
            let shift = |bits: usize| _mm_cvtsi32_si128(bits as i32);
            let low = _mm_srl_epi16(load(low.add(group / 2 * BLOCK_ROWS)), shift(group % 2 * 4));
            // To bit 4: up by four, then down by where they lie. What crosses from the other byte is masked.
            let high = load(high.add(group / 4 * BLOCK_ROWS));
            let high = match group % 4 {
                0 => _mm_sll_epi16(high, shift(4)),
                1 => _mm_sll_epi16(high, shift(2)),
                2 => high,
                _ => _mm_srl_epi16(high, shift(2)),
            };
            let six = _mm_or_si128(_mm_and_si128(low, nibble), _mm_and_si128(high, two));
            let fine = _mm_add_epi8(six, middle);
            *scales = [
                _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(fine)), coarse[0]),
                _mm256_mul_ps(
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(fine))),
                    coarse[1],
                ),
            ];
        }
    }
}
