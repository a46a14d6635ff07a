//! AVX2 with FMA and F16C: a line is two halves of 8 rows × 4 deep. `vpmaddubsw` sums pairs in i16, so fields of up to 4
//! bits are added eight times (a step) before they are widened: 8 · 2 · 15 · 127 = 30,480 fits, a ninth would not. Codes
//! of 8 bits go as two nibbles, for the same reason.

use std::arch::x86_64::{
    __m256, __m256i, _mm_loadu_si128, _mm256_add_epi16, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256,
    _mm256_castsi256_ps, _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_fmadd_ps,
    _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_set1_epi8, _mm256_set1_epi16,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_slli_epi32, _mm256_srli_epi16,
    _mm256_storeu_ps,
};

use super::super::activations::{StepCodes, quantize_step};
use super::super::dispatch::BlockOut;
use super::super::half_matrix::{HalfKind, HalfMatrix};
use super::super::panels::{DEPTHS, Panel};
use super::super::scalar::sum_lanes;
use super::super::swiglu::swiglu_step;
use super::super::tiles::{Coded, Tiles, by_fields};
use super::avx2_two_level;

pub(in super::super) fn present() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn block(coded: &Coded<'_>, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
    if coded.is_two_level {
        return avx2_two_level::block(coded, block, panel, out);
    }
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

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn pair(
    both: [&Coded<'_>; 2],
    at: usize,
    panel: &Panel<'_>,
    [first, second]: [&mut [BlockOut]; 2],
) {
    block(both[0], at, panel, first);
    block(both[1], at, panel, second);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn tokens<const T: usize, const A: usize, const B: usize, const C: usize>(
    coded: &Coded<'_>,
    block: usize,
    panel: &Panel<'_>,
    first_token: usize,
    out: &mut [BlockOut],
) {
    let tiles = Tiles::<A, B, C>::new(coded.prefix(), block);
    let (cell, zero_point) = (_mm256_set1_ps(coded.cell), _mm256_set1_ps(coded.zero_point));
    let mut sums = [[_mm256_setzero_ps(); 2]; T];
    let mut scales = [_mm256_setzero_ps(); 2];
    for tile in tiles {
        for s in 0..tile.steps {
            if let Some(bytes) = tile.scales(s) {
                for (scale, half) in scales.iter_mut().zip(bytes.as_chunks::<16>().0) {
                    // SAFETY: `half` is 16 readable bytes; `loadu` needs no alignment.
                    let halves = unsafe { _mm_loadu_si128(half.as_ptr().cast()) };
                    *scale = _mm256_mul_ps(_mm256_cvtph_ps(halves), cell);
                }
            }
            let step = Step {
                words: panel.step(tile.first_step + s),
                width: panel.width,
                first_token,
            };
            for half in 0..2 {
                let dots = [_mm256_setzero_si256(); T];
                // SAFETY: this function has the path's features.
                let dots = unsafe {
                    let dots = add_lines::<A, T, 0, DEPTHS>(tile.lines(0, s), half, &step, dots);
                    let dots = add_lines::<B, T, 0, DEPTHS>(tile.lines(1, s), half, &step, dots);
                    add_lines::<C, T, 0, DEPTHS>(tile.lines(2, s), half, &step, dots)
                };
                for t in 0..T {
                    sums[t][half] = add_step(
                        dots[t],
                        scales[half],
                        zero_point,
                        step.scale(t),
                        step.sum(t),
                        sums[t][half],
                    );
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

/// One step of some of a panel's tokens.
#[derive(Clone, Copy)]
pub(super) struct Step<'a> {
    pub(super) words: &'a [u32],
    pub(super) width: usize,
    pub(super) first_token: usize,
}

impl Step<'_> {
    /// Four codes that meet the four-deep codes of a line.
    #[inline(always)]
    fn depth(&self, depth: usize, token: usize) -> i32 {
        self.words[depth * self.width + self.first_token + token].cast_signed()
    }

    #[inline(always)]
    pub(super) fn scale(&self, token: usize) -> f32 {
        f32::from_bits(self.words[DEPTHS * self.width + self.first_token + token])
    }

    #[inline(always)]
    pub(super) fn sum(&self, token: usize) -> f32 {
        f32::from_bits(self.words[(DEPTHS + 1) * self.width + self.first_token + token])
    }

    /// Sum of the first half of the codes.
    #[inline(always)]
    pub(super) fn half_sum(&self, token: usize) -> f32 {
        f32::from_bits(self.words[(DEPTHS + 2) * self.width + self.first_token + token])
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_step(
    dots: __m256i,
    scales: __m256,
    zero_point: __m256,
    scale: f32,
    codes_sum: f32,
    sum: __m256,
) -> __m256 {
    let centred = _mm256_fmadd_ps(zero_point, _mm256_set1_ps(-codes_sum), _mm256_cvtepi32_ps(dots));
    _mm256_fmadd_ps(centred, _mm256_mul_ps(scales, _mm256_set1_ps(scale)), sum)
}

/// `dots << BITS` plus the products of one field's depths `FROM..TO`, for rows 0–7 (`half` 0) or 8–15.
///
/// # Safety
/// The caller has the path's features. (Not a `target_feature` function: those cannot be `inline(always)`.)
#[inline(always)]
pub(super) unsafe fn add_lines<const BITS: usize, const T: usize, const FROM: usize, const TO: usize>(
    lines: &[[u8; 64]; BITS],
    half: usize,
    step: &Step<'_>,
    dots: [__m256i; T],
) -> [__m256i; T] {
    if BITS == 0 {
        return dots;
    }
    // SAFETY: the features are the caller's; each load is of 32 readable bytes and needs no alignment.
    unsafe {
        // A byte goes as two nibbles: its products would not fit i16.
        let width = BITS.min(4);
        #[expect(clippy::cast_possible_wrap, reason = "a mask of at most 4 bits")]
        let mask = _mm256_set1_epi8((255u8 >> (8 - width)) as i8);
        let mut pairs = [_mm256_setzero_si256(); T];
        let mut high_pairs = [_mm256_setzero_si256(); T];
        let per_line = 8 / BITS.max(1);
        for (l, line) in lines.iter().enumerate() {
            if (l + 1) * per_line <= FROM || l * per_line >= TO {
                continue;
            }
            let packed = _mm256_loadu_si256(line.as_chunks::<32>().0[half].as_ptr().cast());
            if BITS == 8 {
                let low = _mm256_and_si256(packed, mask);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask);
                for t in 0..T {
                    let a = _mm256_set1_epi32(step.depth(l, t));
                    pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(low, a));
                    high_pairs[t] = _mm256_add_epi16(high_pairs[t], _mm256_maddubs_epi16(high, a));
                }
                continue;
            }
            for i in 0..per_line {
                if l * per_line + i < FROM || l * per_line + i >= TO {
                    continue;
                }
                let codes = match BITS * i {
                    0 => packed,
                    1 => _mm256_srli_epi16::<1>(packed),
                    2 => _mm256_srli_epi16::<2>(packed),
                    3 => _mm256_srli_epi16::<3>(packed),
                    4 => _mm256_srli_epi16::<4>(packed),
                    5 => _mm256_srli_epi16::<5>(packed),
                    6 => _mm256_srli_epi16::<6>(packed),
                    _ => _mm256_srli_epi16::<7>(packed),
                };
                let codes = _mm256_and_si256(codes, mask);
                for (t, pair) in pairs.iter_mut().enumerate() {
                    let a = _mm256_set1_epi32(step.depth(l * per_line + i, t));
                    *pair = _mm256_add_epi16(*pair, _mm256_maddubs_epi16(codes, a));
                }
            }
        }
        let ones = _mm256_set1_epi16(1);
        std::array::from_fn(|t| {
            let low = _mm256_madd_epi16(pairs[t], ones);
            let shifted = match BITS {
                1 => _mm256_slli_epi32::<1>(dots[t]),
                2 => _mm256_slli_epi32::<2>(dots[t]),
                4 => _mm256_slli_epi32::<4>(dots[t]),
                _ => {
                    let high = _mm256_slli_epi32::<4>(_mm256_madd_epi16(high_pairs[t], ones));
                    _mm256_add_epi32(_mm256_slli_epi32::<8>(dots[t]), high)
                }
            };
            _mm256_add_epi32(shifted, low)
        })
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn half_block(half: &HalfMatrix<'_>, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
    let mut first = 0;
    // Four chains a token and 16 registers: more than two tokens at once would spill.
    for two in out.chunks_mut(2) {
        match (two.len(), half.kind()) {
            (1, HalfKind::F16) => half_tokens::<1, false>(half, block, panel, first, two),
            (1, HalfKind::Bf16) => half_tokens::<1, true>(half, block, panel, first, two),
            (_, HalfKind::F16) => half_tokens::<2, false>(half, block, panel, first, two),
            (_, HalfKind::Bf16) => half_tokens::<2, true>(half, block, panel, first, two),
        }
        first += 2;
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn half_tokens<const T: usize, const BF16: bool>(
    half: &HalfMatrix<'_>,
    block: usize,
    panel: &Panel<'_>,
    first_token: usize,
    out: &mut [BlockOut],
) {
    let mut sums = [[_mm256_setzero_ps(); T]; 2];
    for (s, columns) in half.block(block).as_chunks::<32>().0.iter().enumerate() {
        let steps: [StepCodes; T] = std::array::from_fn(|t| panel.codes(s, first_token + t));
        let codes = steps.map(|step| step.codes.map(f32::from));
        for (side, sums) in sums.iter_mut().enumerate() {
            let mut chains = [[_mm256_setzero_ps(); 4]; T];
            for (c, column) in columns.iter().enumerate() {
                // SAFETY: half a column is 16 readable bytes; `loadu` needs no alignment.
                let bytes = unsafe { _mm_loadu_si128(column.as_chunks::<16>().0[side].as_ptr().cast()) };
                let weights: __m256 = if BF16 {
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bytes)))
                } else {
                    _mm256_cvtph_ps(bytes)
                };
                for t in 0..T {
                    chains[t][c % 4] = _mm256_fmadd_ps(weights, _mm256_set1_ps(codes[t][c]), chains[t][c % 4]);
                }
            }
            for t in 0..T {
                let low = _mm256_add_ps(chains[t][0], chains[t][1]);
                let dot = _mm256_add_ps(low, _mm256_add_ps(chains[t][2], chains[t][3]));
                sums[t] = _mm256_fmadd_ps(dot, _mm256_set1_ps(steps[t].scale), sums[t]);
            }
        }
    }
    let [low, high] = sums;
    for (out, sums) in out.iter_mut().zip(low.into_iter().zip(high)) {
        for (out, sum) in out.as_chunks_mut::<8>().0.iter_mut().zip([sums.0, sums.1]) {
            // SAFETY: `out` has room for 8 floats; `storeu` needs no alignment.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn quantize(x: &[f32; 32]) -> StepCodes {
    quantize_step(x)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn swiglu(gate: &[f32; 32], up: &[f32; 32]) -> StepCodes {
    swiglu_step(gate, up)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn read(bytes: &[u8]) -> u64 {
    sum_lanes(bytes)
}
