//! AVX-512 with VNNI where scales have two levels: eight groups' scales are put together at once when their block is met,
//! then each step, or each half of one where groups have 16 weights, is multiplied as in [`super::avx512`].
//! Law: equal to the plain kernel bit for bit.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T1, _mm_prefetch, _mm256_loadu_si256, _mm512_add_epi32, _mm512_and_si512,
    _mm512_castsi256_si512, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_dpbusd_epi32,
    _mm512_extracti32x4_epi32, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_si512, _mm512_maskz_loadu_epi8,
    _mm512_mul_ps, _mm512_or_si512, _mm512_set_epi64, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_sllv_epi16, _mm512_srli_epi16,
    _mm512_storeu_ps, _mm512_sub_epi8,
};

use cotk_quant::layout::{BLOCK_ROWS, SCALE_BYTES, SUPER_GROUPS, TILE_STEPS};

use super::super::dispatch::BlockOut;
use super::super::panels::{DEPTHS, Panel, STEP_WORDS};
use super::super::tiles::{Coded, TileAt, by_fields};
use super::super::two_level::{Places, Walk};
use super::avx512::{field, prefetch};
use super::avx512_stream::{AHEAD, dots};

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
pub(super) fn block(coded: &Coded<'_>, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
    match panel.width {
        1 => by_fields!(coded, token::<1>([coded], block, panel, [out])),
        2 => by_fields!(coded, tokens::<2>(coded, block, panel, out)),
        4 => by_fields!(coded, tokens::<4>(coded, block, panel, out)),
        8 => by_fields!(coded, tokens::<8>(coded, block, panel, out)),
        12 => by_fields!(coded, tokens::<12>(coded, block, panel, out)),
        other => unreachable!("panels are 1, 2, 4, 8 or 12 tokens wide, not {other}"),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
pub(super) fn pair(both: [&Coded<'_>; 2], at: usize, panel: &Panel<'_>, [first, second]: [&mut [BlockOut]; 2]) {
    let coded = both[0];
    if panel.width == 1 {
        by_fields!(coded, token::<2>(both, at, panel, [first, second]))
    } else {
        block(both[0], at, panel, first);
        block(both[1], at, panel, second);
    }
}

/// One block of `W` matrices of one format × one token, bytes in the order in which they lie.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
fn token<const W: usize, const A: usize, const B: usize, const C: usize>(
    all: [&Coded<'_>; W],
    block: usize,
    panel: &Panel<'_>,
    mut out: [&mut [BlockOut]; W],
) {
    assert!(panel.width == 1 && panel.steps == all[0].steps, "the panel fits");
    let places = Places::new(all[0]);
    let mut walks = [const { Walk::<A, B, C>::NOTHING }; W];
    let (mut cells, mut zero_points) = ([_mm512_setzero_ps(); W], [_mm512_setzero_ps(); W]);
    for w in 0..W {
        walks[w] = Walk::new(all[w], block);
        cells[w] = _mm512_set1_ps(all[w].cell);
        zero_points[w] = _mm512_set1_ps(all[w].zero_point);
    }
    let mut sums = [_mm512_setzero_ps(); W];
    let mut scales = [[_mm512_setzero_ps(); SUPER_GROUPS]; W];
    let mut acts = panel.start();
    let steps = all[0].steps;
    // SAFETY: `Walk::new` has checked that all its tiles lie in the planes; the panel has a step of `STEP_WORDS` words for
    // each of the matrix's (assertion above). This function has the path's features.
    unsafe {
        for first in (0..steps / TILE_STEPS * TILE_STEPS).step_by(TILE_STEPS) {
            for w in 0..W {
                let (tile, groups) = walks[w].tile(TILE_STEPS);
                let both = [acts, acts.add(STEP_WORDS)];
                let found = [dots::<A, B, C>(&tile, 0, both[0]), dots::<A, B, C>(&tile, 1, both[1])];
                if groups > 0 {
                    expand(tile.scales, groups, cells[w], &mut scales[w]);
                }
                for within in 0..TILE_STEPS {
                    add(
                        found[within],
                        both[within],
                        2 * (first + within),
                        places,
                        &scales[w],
                        zero_points[w],
                        &mut sums[w],
                    );
                }
            }
            acts = acts.add(TILE_STEPS * STEP_WORDS);
        }
        if !steps.is_multiple_of(TILE_STEPS) {
            for w in 0..W {
                let (tile, groups) = walks[w].tile(1);
                let found = dots::<A, B, C>(&tile, 0, acts);
                if groups > 0 {
                    expand(tile.scales, groups, cells[w], &mut scales[w]);
                }
                add(
                    found,
                    acts,
                    2 * (steps - 1),
                    places,
                    &scales[w],
                    zero_points[w],
                    &mut sums[w],
                );
            }
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        // SAFETY: `out` has room for 16 floats; `storeu` needs no alignment.
        unsafe { _mm512_storeu_ps(out[0].as_mut_ptr(), sum) };
    }
}

/// The scales of the groups of one block (`cotk_quant::layout::TwoLevelAt`), 16 rows each. Those of groups that are not there
/// mean nothing.
///
/// # Safety
/// The caller has the path's features; the scale block of so many groups at `at` is readable.
#[inline(always)]
unsafe fn expand(at: *const u8, groups: usize, cell: __m512, scales: &mut [__m512; SUPER_GROUPS]) {
    // SAFETY: the features are the caller's, and so is the readability: masks end where the block does. No load needs
    // alignment.
    unsafe {
        let coarse = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256(at.cast())), cell);
        let fine = at.add(SCALE_BYTES);
        let (low, high): (__m512i, __m512i) = if groups == SUPER_GROUPS {
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD).cast());
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD + 64).cast());
            let high = _mm256_loadu_si256(fine.add(BLOCK_ROWS * SUPER_GROUPS / 2).cast());
            (_mm512_loadu_si512(fine.cast()), _mm512_castsi256_si512(high))
        } else {
            let (low, high) = (BLOCK_ROWS * groups.div_ceil(2), BLOCK_ROWS * groups.div_ceil(4));
            let mask = |bytes: usize| u64::MAX >> (64 - bytes);
            (
                _mm512_maskz_loadu_epi8(mask(low), fine.cast()),
                _mm512_maskz_loadu_epi8(mask(high), fine.add(low).cast()),
            )
        };
        // Lane j of 16 bytes: groups 2j and 2j + 1. Their high bits lie at 0 and 2 of a byte where j is even, else at 4 and 6,
        // and go to 4.
        let high = _mm512_shuffle_i32x4::<0b01_01_00_00>(high, high);
        let four = 0x0004_0004_0004_0004;
        let places = _mm512_set_epi64(0, 0, four, four, 0, 0, four, four);
        let (nibble, two) = (_mm512_set1_epi8(0x0f), _mm512_set1_epi8(0x30));
        let even_high = _mm512_and_si512(_mm512_sllv_epi16(high, places), two);
        let odd_high = _mm512_and_si512(_mm512_sllv_epi16(_mm512_srli_epi16::<2>(high), places), two);
        let even = _mm512_or_si512(_mm512_and_si512(low, nibble), even_high);
        let odd = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16::<4>(low), nibble), odd_high);
        let middle = _mm512_set1_epi8(32);
        let (even, odd) = (_mm512_sub_epi8(even, middle), _mm512_sub_epi8(odd, middle));
        macro_rules! lanes {
            ($($lane:literal)*) => {$(
                let (one, other) = (_mm512_extracti32x4_epi32::<$lane>(even), _mm512_extracti32x4_epi32::<$lane>(odd));
                scales[2 * $lane] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(one)), coarse);
                scales[2 * $lane + 1] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(other)), coarse);
            )*};
        }
        lanes!(0 1 2 3);
    }
}

/// Adds the products of one step of one token, its two halves apart, scaled.
///
/// # Safety
/// The caller has the path's features; the panel's step at `acts` is readable.
#[inline(always)]
unsafe fn add(
    [one, other]: [__m512i; 2],
    acts: *const u32,
    half_step: usize,
    places: Places,
    scales: &[__m512; SUPER_GROUPS],
    zero_point: __m512,
    sums: &mut __m512,
) {
    // SAFETY: the features are the caller's, and so is the readability of the step.
    unsafe {
        let scale = _mm512_set1_ps(acts.add(DEPTHS).cast::<f32>().read());
        let sum = acts.add(DEPTHS + 1).cast::<f32>().read();
        // No closure: one with no features of its own is called, not inlined.
        macro_rules! part {
            ($dot:expr, $sum:expr, $half_step:expr) => {
                let centred = _mm512_fnmadd_ps(zero_point, _mm512_set1_ps($sum), _mm512_cvtepi32_ps($dot));
                *sums = _mm512_fmadd_ps(
                    centred,
                    _mm512_mul_ps(scales[places.of($half_step)], scale),
                    *sums,
                );
            };
        }
        if places.is_half() {
            let of_one = acts.add(DEPTHS + 2).cast::<f32>().read();
            part!(one, of_one, half_step);
            if places.has(half_step + 1) {
                part!(other, sum - of_one, half_step + 1);
            }
        } else {
            part!(_mm512_add_epi32(one, other), sum, half_step);
        }
    }
}

/// One block × `T` tokens, two or more: they share what is read.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
fn tokens<const T: usize, const A: usize, const B: usize, const C: usize>(
    coded: &Coded<'_>,
    block: usize,
    panel: &Panel<'_>,
    out: &mut [BlockOut],
) {
    let mut walk = Walk::<A, B, C>::new(coded, block);
    assert!(panel.width == T && panel.steps == coded.steps, "the panel fits");
    let places = Places::new(coded);
    let (cell, zero_point) = (_mm512_set1_ps(coded.cell), _mm512_set1_ps(coded.zero_point));
    let mut sums = [_mm512_setzero_ps(); T];
    let mut scales = [_mm512_setzero_ps(); SUPER_GROUPS];
    let mut acts = panel.start();
    // SAFETY: `Walk::new` has checked that all its tiles lie in the planes; the panel has a step of `STEP_WORDS · T`
    // words for each of the matrix's (assertion above). This function has the path's features.
    unsafe {
        for first in (0..coded.steps).step_by(TILE_STEPS) {
            let steps = TILE_STEPS.min(coded.steps - first);
            let (tile, groups) = walk.tile(steps);
            if groups > 0 {
                expand(tile.scales, groups, cell, &mut scales);
            }
            prefetch::<A, B, C>(&tile);
            for within in 0..steps {
                step::<T, A, B, C>(
                    &tile,
                    within,
                    acts,
                    2 * (first + within),
                    places,
                    &scales,
                    zero_point,
                    &mut sums,
                );
                acts = acts.add(STEP_WORDS * T);
            }
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        // SAFETY: `out` has room for 16 floats; `storeu` needs no alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
    }
}

/// Adds one step's products for `T` tokens.
///
/// # Safety
/// The caller has the path's features; the tile's step and the panel's step at `acts` are readable.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "what the loop holds in registers")]
unsafe fn step<const T: usize, const A: usize, const B: usize, const C: usize>(
    tile: &TileAt,
    within: usize,
    acts: *const u32,
    half_step: usize,
    places: Places,
    scales: &[__m512; SUPER_GROUPS],
    zero_point: __m512,
    sums: &mut [__m512; T],
) {
    let codes: [*const u8; 3] = std::array::from_fn(|f| tile.codes[f].wrapping_add(within * tile.step_bytes[f]));
    // SAFETY: the features are the caller's, and so is the readability of the step.
    unsafe {
        let mut dots = [_mm512_setzero_si512(); T];
        macro_rules! depths {
            ($($depth:literal)*) => {$(
                let mut whole = field::<A, $depth>(codes[0], B + C);
                if B > 0 {
                    whole = _mm512_or_si512(whole, field::<B, $depth>(codes[1], C));
                }
                if C > 0 {
                    whole = _mm512_or_si512(whole, field::<C, $depth>(codes[2], 0));
                }
                for t in 0..T {
                    let four = _mm512_set1_epi32(acts.add($depth * T + t).cast::<i32>().read());
                    dots[t] = _mm512_dpbusd_epi32(dots[t], whole, four);
                }
            )*};
        }
        // `sum` of token `t` is given by its expression: words differ.
        macro_rules! finish {
            ($half_step:expr, |$t:ident| $sum:expr) => {
                let scales = scales[places.of($half_step)];
                for $t in 0..T {
                    let scale = _mm512_set1_ps(acts.add(DEPTHS * T + $t).cast::<f32>().read());
                    let sum = _mm512_set1_ps($sum);
                    let centred = _mm512_fnmadd_ps(zero_point, sum, _mm512_cvtepi32_ps(dots[$t]));
                    sums[$t] = _mm512_fmadd_ps(centred, _mm512_mul_ps(scales, scale), sums[$t]);
                }
            };
        }
        let sum = |t: usize| acts.add((DEPTHS + 1) * T + t).cast::<f32>().read();
        let half_sum = |t: usize| acts.add((DEPTHS + 2) * T + t).cast::<f32>().read();
        depths!(0 1 2 3);
        if places.is_half() {
            finish!(half_step, |t| half_sum(t));
            if !places.has(half_step + 1) {
                return;
            }
            dots = [_mm512_setzero_si512(); T];
            depths!(4 5 6 7);
            finish!(half_step + 1, |t| sum(t) - half_sum(t));
        } else {
            depths!(4 5 6 7);
            finish!(half_step, |t| sum(t));
        }
    }
}
