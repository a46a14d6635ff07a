//! AVX-512 with VNNI: one register is a line, 16 rows × 4 deep; `vpdpbusd` adds unsigned codes × signed activations into
//! 16 exact i32 sums. Lanes are rows, so nothing is ever summed across a register.

use std::arch::x86_64::{
    __m512i, _mm256_loadu_si256, _mm512_add_epi32, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_cvtph_ps,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi8, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_slli_epi32, _mm512_srli_epi16, _mm512_storeu_ps,
};

use cotk_quant::coded::Prefix;

use super::super::activations::{Activations, StepCodes, quantize_step};
use super::super::dispatch::BlockOut;
use super::super::scalar::sum_lanes;
use super::super::swiglu::swiglu_step;
use super::super::tiles::{Tiles, by_fields};

pub(in super::super) fn present() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
pub(in super::super) fn block(
    prefix: &Prefix<'_>,
    block: usize,
    acts: &Activations,
    first_token: usize,
    out: &mut [BlockOut],
) {
    match out.len() {
        1 => by_fields!(prefix, tokens::<1>(prefix, block, acts, first_token, out)),
        2 => by_fields!(prefix, tokens::<2>(prefix, block, acts, first_token, out)),
        4 => by_fields!(prefix, tokens::<4>(prefix, block, acts, first_token, out)),
        8 => by_fields!(prefix, tokens::<8>(prefix, block, acts, first_token, out)),
        other => unreachable!("{other} tokens: `tiles::check` lets 1, 2, 4 and 8 pass"),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
fn tokens<const T: usize, const A: usize, const B: usize, const C: usize>(
    prefix: &Prefix<'_>,
    block: usize,
    acts: &Activations,
    first_token: usize,
    out: &mut [BlockOut],
) {
    let steps: [&[StepCodes]; T] = std::array::from_fn(|t| acts.token(first_token + t));
    let tiles = Tiles::new(prefix, block);
    let fields = tiles.fields();
    let group_steps = prefix.format().group_steps();
    let (cell, zero_point) = (_mm512_set1_ps(prefix.cell()), _mm512_set1_ps(prefix.zero_point()));
    let mut sums = [_mm512_setzero_ps(); T];
    let mut scales = _mm512_setzero_ps();
    for tile in tiles {
        for s in 0..tile.steps {
            if let Some(bytes) = tile.scales(s, group_steps) {
                // SAFETY: `bytes` are 32 readable bytes; `loadu` needs no alignment.
                let halves = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
                scales = _mm512_mul_ps(_mm512_cvtph_ps(halves), cell);
            }
            let step: [&StepCodes; T] = std::array::from_fn(|t| &steps[t][tile.first_step + s]);
            let dots = [_mm512_setzero_si512(); T];
            // SAFETY: this function has the path's features.
            let dots = unsafe {
                let dots = add_lines::<A, T>(tile.lines(s, fields[0]), &step, dots);
                let dots = add_lines::<B, T>(tile.lines(s, fields[1]), &step, dots);
                add_lines::<C, T>(tile.lines(s, fields[2]), &step, dots)
            };
            for t in 0..T {
                let centred = _mm512_fmadd_ps(zero_point, _mm512_set1_ps(-step[t].sum), _mm512_cvtepi32_ps(dots[t]));
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(step[t].scale));
                sums[t] = _mm512_fmadd_ps(centred, scale, sums[t]);
            }
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        // SAFETY: `out` has room for 16 floats; `storeu` needs no alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
    }
}

/// `dots << BITS` plus the products of one field; two chains per token where there is one, since `vpdpbusd` takes 4 to 5
/// cycles.
///
/// # Safety
/// The caller has the path's features. (Not a `target_feature` function: those cannot be `inline(always)`, and as a call
/// it costs three quarters of the speed.)
#[inline(always)]
unsafe fn add_lines<const BITS: usize, const T: usize>(
    lines: &[[u8; 64]; BITS],
    steps: &[&StepCodes; T],
    dots: [__m512i; T],
) -> [__m512i; T] {
    if BITS == 0 {
        return dots;
    }
    // SAFETY: the features are the caller's; each load is of 64 readable bytes and needs no alignment.
    unsafe {
        #[expect(clippy::cast_possible_wrap, reason = "a mask of BITS bits")]
        let mask = _mm512_set1_epi8((255u8 >> (8 - BITS)) as i8);
        let mut even = dots.map(|dot| match BITS {
            1 => _mm512_slli_epi32::<1>(dot),
            2 => _mm512_slli_epi32::<2>(dot),
            4 => _mm512_slli_epi32::<4>(dot),
            _ => _mm512_slli_epi32::<8>(dot),
        });
        let mut odd = _mm512_setzero_si512();
        let per_line = 8 / BITS.max(1);
        for (l, line) in lines.iter().enumerate() {
            let packed = _mm512_loadu_si512(line.as_ptr().cast());
            for i in 0..per_line {
                // Shifts move 16-bit lanes; the mask drops what crossed from the upper byte.
                let codes = match BITS * i {
                    0 => packed,
                    1 => _mm512_srli_epi16::<1>(packed),
                    2 => _mm512_srli_epi16::<2>(packed),
                    3 => _mm512_srli_epi16::<3>(packed),
                    4 => _mm512_srli_epi16::<4>(packed),
                    5 => _mm512_srli_epi16::<5>(packed),
                    6 => _mm512_srli_epi16::<6>(packed),
                    _ => _mm512_srli_epi16::<7>(packed),
                };
                let codes = if BITS == 8 {
                    codes
                } else {
                    _mm512_and_si512(codes, mask)
                };
                let depth = l * per_line + i;
                for t in 0..T {
                    let a = _mm512_set1_epi32(steps[t].depth(depth));
                    if T == 1 && depth % 2 == 1 {
                        odd = _mm512_dpbusd_epi32(odd, codes, a);
                    } else {
                        even[t] = _mm512_dpbusd_epi32(even[t], codes, a);
                    }
                }
            }
        }
        if T == 1 {
            even[0] = _mm512_add_epi32(even[0], odd);
        }
        even
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
pub(in super::super) fn quantize(x: &[f32; 32]) -> StepCodes {
    quantize_step(x)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
pub(in super::super) fn swiglu(gate: &[f32; 32], up: &[f32; 32]) -> StepCodes {
    swiglu_step(gate, up)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
pub(in super::super) fn read(bytes: &[u8]) -> u64 {
    sum_lanes(bytes)
}
