//! AVX-512 with VNNI: one register is a line, 16 rows × 4 deep; `vpdpbusd` adds unsigned codes × signed activations into
//! 16 exact i32 sums. Lanes are rows, so nothing is ever summed across a register.

use std::arch::x86_64::{
    __m512, __m512i, _mm256_loadu_si256, _mm512_add_epi32, _mm512_add_epi64, _mm512_add_ps, _mm512_and_si512,
    _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_dpbusd_epi32,
    _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_or_si512, _mm512_reduce_add_epi64, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_slli_epi16, _mm512_slli_epi32,
    _mm512_srli_epi16, _mm512_storeu_ps,
};

use cotk_quant::coded::Prefix;

use super::super::activations::{Activations, StepCodes, quantize_step};
use super::super::dispatch::BlockOut;
use super::super::half_matrix::{HalfKind, HalfMatrix};
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
    let tiles = Tiles::<A, B, C>::new(prefix, block);
    let (cell, zero_point) = (_mm512_set1_ps(prefix.cell()), _mm512_set1_ps(prefix.zero_point()));
    let mut sums = [_mm512_setzero_ps(); T];
    let mut scales = _mm512_setzero_ps();
    for tile in tiles {
        for s in 0..tile.steps {
            if let Some(bytes) = tile.scales(s) {
                // SAFETY: `bytes` are 32 readable bytes; `loadu` needs no alignment.
                let halves = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
                scales = _mm512_mul_ps(_mm512_cvtph_ps(halves), cell);
            }
            let step: [&StepCodes; T] = std::array::from_fn(|t| &steps[t][tile.first_step + s]);
            // SAFETY: this function has the path's features.
            let dots = unsafe { dots::<T, A, B, C>(tile.lines(0, s), tile.lines(1, s), tile.lines(2, s), &step) };
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

/// The products of one step: whole codes are put together from their fields (two instructions each and one to join), then
/// multiplied once. Multiplying each field by itself and shifting sums gives the same integers with up to three times the
/// products.
///
/// # Safety
/// The caller has the path's features. (Not a `target_feature` function: those cannot be `inline(always)`.)
#[inline(always)]
unsafe fn dots<const T: usize, const A: usize, const B: usize, const C: usize>(
    a: &[[u8; 64]; A],
    b: &[[u8; 64]; B],
    c: &[[u8; 64]; C],
    steps: &[&StepCodes; T],
) -> [__m512i; T] {
    // SAFETY: the features are the caller's.
    unsafe {
        let mut even = [_mm512_setzero_si512(); T];
        // `vpdpbusd` takes 4 to 5 cycles: one token alone needs two chains.
        let mut odd = _mm512_setzero_si512();
        for depth in 0..8 {
            let mut codes = field::<A>(a, depth, B + C);
            if B > 0 {
                codes = _mm512_or_si512(codes, field::<B>(b, depth, C));
            }
            if C > 0 {
                codes = _mm512_or_si512(codes, field::<C>(c, depth, 0));
            }
            for t in 0..T {
                let activations = _mm512_set1_epi32(steps[t].depth(depth));
                if T == 1 && depth % 2 == 1 {
                    odd = _mm512_dpbusd_epi32(odd, codes, activations);
                } else {
                    even[t] = _mm512_dpbusd_epi32(even[t], codes, activations);
                }
            }
        }
        if T == 1 {
            even[0] = _mm512_add_epi32(even[0], odd);
        }
        even
    }
}

/// One field of 16 rows × 4 columns, shifted to `place` in each byte.
///
/// # Safety
/// The caller has the path's features.
#[inline(always)]
unsafe fn field<const BITS: usize>(lines: &[[u8; 64]; BITS], depth: usize, place: usize) -> __m512i {
    let per_line = 8 / BITS.max(1);
    // SAFETY: the features are the caller's; the load is of 64 readable bytes and needs no alignment.
    unsafe {
        let packed = _mm512_loadu_si512(lines[depth / per_line].as_ptr().cast());
        if BITS == 8 {
            return packed;
        }
        let from = BITS * (depth % per_line);
        // Shifts move 16-bit lanes; the mask drops what crossed from the other byte.
        let placed = match from.cast_signed() - place.cast_signed() {
            -6 => _mm512_slli_epi16::<6>(packed),
            -5 => _mm512_slli_epi16::<5>(packed),
            -4 => _mm512_slli_epi16::<4>(packed),
            -3 => _mm512_slli_epi16::<3>(packed),
            -2 => _mm512_slli_epi16::<2>(packed),
            -1 => _mm512_slli_epi16::<1>(packed),
            0 => packed,
            1 => _mm512_srli_epi16::<1>(packed),
            2 => _mm512_srli_epi16::<2>(packed),
            3 => _mm512_srli_epi16::<3>(packed),
            4 => _mm512_srli_epi16::<4>(packed),
            5 => _mm512_srli_epi16::<5>(packed),
            6 => _mm512_srli_epi16::<6>(packed),
            _ => _mm512_srli_epi16::<7>(packed),
        };
        #[expect(clippy::cast_possible_wrap, reason = "a mask of a byte")]
        let mask = _mm512_set1_epi8(((255u8 >> (8 - BITS)) << place) as i8);
        _mm512_and_si512(placed, mask)
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
pub(in super::super) fn half_block(
    half: &HalfMatrix<'_>,
    block: usize,
    acts: &Activations,
    first_token: usize,
    out: &mut [BlockOut],
) {
    let mut first = first_token;
    // Four chains a token: more than four tokens at once would spill.
    for four in out.chunks_mut(4) {
        match (four.len(), half.kind()) {
            (1, HalfKind::F16) => half_tokens::<1, false>(half, block, acts, first, four),
            (1, HalfKind::Bf16) => half_tokens::<1, true>(half, block, acts, first, four),
            (2, HalfKind::F16) => half_tokens::<2, false>(half, block, acts, first, four),
            (2, HalfKind::Bf16) => half_tokens::<2, true>(half, block, acts, first, four),
            (_, HalfKind::F16) => half_tokens::<4, false>(half, block, acts, first, four),
            (_, HalfKind::Bf16) => half_tokens::<4, true>(half, block, acts, first, four),
        }
        first += 4;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
fn half_tokens<const T: usize, const BF16: bool>(
    half: &HalfMatrix<'_>,
    block: usize,
    acts: &Activations,
    first_token: usize,
    out: &mut [BlockOut],
) {
    let steps: [&[StepCodes]; T] = std::array::from_fn(|t| acts.token(first_token + t));
    let mut sums = [_mm512_setzero_ps(); T];
    for (s, columns) in half.block(block).as_chunks::<32>().0.iter().enumerate() {
        let codes: [[f32; 32]; T] = std::array::from_fn(|t| steps[t][s].codes.map(f32::from));
        let mut chains = [[_mm512_setzero_ps(); 4]; T];
        for c in 0..32 {
            // SAFETY: a column is 32 readable bytes; `loadu` needs no alignment.
            let bytes = unsafe { _mm256_loadu_si256(columns[c].as_ptr().cast()) };
            let weights: __m512 = if BF16 {
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bytes)))
            } else {
                _mm512_cvtph_ps(bytes)
            };
            for t in 0..T {
                chains[t][c % 4] = _mm512_fmadd_ps(weights, _mm512_set1_ps(codes[t][c]), chains[t][c % 4]);
            }
        }
        for t in 0..T {
            let low = _mm512_add_ps(chains[t][0], chains[t][1]);
            let dot = _mm512_add_ps(low, _mm512_add_ps(chains[t][2], chains[t][3]));
            sums[t] = _mm512_fmadd_ps(dot, _mm512_set1_ps(steps[t][s].scale), sums[t]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        // SAFETY: `out` has room for 16 floats; `storeu` needs no alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
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

/// Eight chains of 64-byte loads: the compiler's own choice for [`sum_lanes`] here is ten times slower.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
pub(in super::super) fn read(bytes: &[u8]) -> u64 {
    let (chunks, rest) = bytes.as_chunks::<512>();
    let mut sums = [_mm512_setzero_si512(); 8];
    for chunk in chunks {
        for (sum, line) in sums.iter_mut().zip(chunk.as_chunks::<64>().0) {
            // SAFETY: `line` is 64 readable bytes; `loadu` needs no alignment.
            *sum = _mm512_add_epi64(*sum, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
        }
    }
    let mut total = sum_lanes(rest);
    for sum in sums {
        total = total.wrapping_add(_mm512_reduce_add_epi64(sum).cast_unsigned());
    }
    total
}
