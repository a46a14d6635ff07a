//! AVX-512 with VNNI: one register is a line, 16 rows × 4 deep; `vpdpbusd` adds unsigned codes × signed activations into
//! 16 exact i32 sums. Lanes are rows, so nothing is ever summed across a register.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T1, _mm_prefetch, _mm256_loadu_si256, _mm512_add_epi64, _mm512_add_ps, _mm512_and_si512,
    _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_dpbusd_epi32,
    _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_or_si512, _mm512_reduce_add_epi64,
    _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_slli_epi16,
    _mm512_slli_epi32, _mm512_srli_epi16, _mm512_storeu_ps,
};

use super::super::activations::{StepCodes, quantize_step};
use super::super::dispatch::BlockOut;
use super::super::half_matrix::{HalfKind, HalfMatrix};
use super::super::panels::{DEPTHS, Panel, STEP_WORDS};
use super::super::scalar::sum_lanes;
use super::super::swiglu::swiglu_step;
use super::super::tiles::{Coded, TileAt, Walk, by_fields};
use super::avx512_stream::token;
use super::avx512_two_level;

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
pub(in super::super) fn block(coded: &Coded<'_>, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
    if coded.is_two_level {
        return avx512_two_level::block(coded, block, panel, out);
    }
    let (one, out) = ([coded], [out]);
    match panel.width {
        1 => by_fields!(coded, token::<1>(one, block, panel, out)),
        2 => by_fields!(coded, tokens::<1, 2>(one, block, panel, out)),
        4 => by_fields!(coded, tokens::<1, 4>(one, block, panel, out)),
        8 => by_fields!(coded, tokens::<1, 8>(one, block, panel, out)),
        12 => by_fields!(coded, tokens::<1, 12>(one, block, panel, out)),
        other => unreachable!("panels are 1, 2, 4, 8 or 12 tokens wide, not {other}"),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
pub(in super::super) fn pair(
    both: [&Coded<'_>; 2],
    at: usize,
    panel: &Panel<'_>,
    [first, second]: [&mut [BlockOut]; 2],
) {
    let coded = both[0];
    if coded.is_two_level {
        return avx512_two_level::pair(both, at, panel, [first, second]);
    }
    match panel.width {
        1 => by_fields!(coded, token::<2>(both, at, panel, [first, second])),
        2 => by_fields!(coded, tokens::<2, 2>(both, at, panel, [first, second])),
        4 => by_fields!(coded, tokens::<2, 4>(both, at, panel, [first, second])),
        // The sums of more tokens leave no registers for a second matrix.
        _ => {
            block(both[0], at, panel, first);
            block(both[1], at, panel, second);
        }
    }
}

/// Bytes that memory is asked for ahead of use. On a Zen 4 core at 4 bit, of what plain reading gets in the same seconds:
/// one matrix 73 % at 6912, 65 at 4608, 73 at 768; experts of a layer 59, 58 and 46.
pub(super) const AHEAD: usize = 6912;

/// One block of `W` matrices of one format × `T` tokens, two or more: they share what is read.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
fn tokens<const W: usize, const T: usize, const A: usize, const B: usize, const C: usize>(
    all: [&Coded<'_>; W],
    block: usize,
    panel: &Panel<'_>,
    mut out: [&mut [BlockOut]; W],
) {
    let mut walks: [Walk<A, B, C>; W] = all.map(|coded| Walk::new(coded, block));
    assert!(panel.width == T && panel.steps == all[0].steps, "the panel fits");
    let cells = all.map(|coded| _mm512_set1_ps(coded.cell));
    let zero_points = all.map(|coded| _mm512_set1_ps(coded.zero_point));
    let mut sums = [[_mm512_setzero_ps(); T]; W];
    let mut scales = [_mm512_setzero_ps(); W];
    let mut acts = panel.start();
    let mut first = 0;
    // SAFETY: `Walk::new` has checked that all its tiles lie in the planes; the panel has a step of `STEP_WORDS · T`
    // words for each of the matrix's (assertion above). This function has the path's features.
    unsafe {
        for _ in 0..walks[0].whole_tiles() {
            let tiles: [TileAt; W] = std::array::from_fn(|w| walks[w].whole());
            for tile in &tiles {
                prefetch::<A, B, C>(tile);
            }
            for within in 0..2 {
                for w in 0..W {
                    if let Some(at) = walks[w].scales(&tiles[w], first, within) {
                        scales[w] = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256(at.cast())), cells[w]);
                    }
                    step::<T, A, B, C>(&tiles[w], within, acts, scales[w], zero_points[w], &mut sums[w]);
                }
                acts = acts.add(STEP_WORDS * T);
            }
            first += 2;
        }
        for w in 0..W {
            if let Some(tile) = walks[w].half() {
                if let Some(at) = walks[w].scales(&tile, first, 0) {
                    scales[w] = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256(at.cast())), cells[w]);
                }
                step::<T, A, B, C>(&tile, 0, acts, scales[w], zero_points[w], &mut sums[w]);
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        for (out, sum) in out.iter_mut().zip(sums) {
            // SAFETY: `out` has room for 16 floats; `storeu` needs no alignment.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }
}

/// Asks for the lines of a tile that is [`AHEAD`] of this one, into the cache that weights pass through.
///
/// # Safety
/// The caller has the path's features; any address may be asked for.
#[inline(always)]
pub(super) unsafe fn prefetch<const A: usize, const B: usize, const C: usize>(tile: &TileAt) {
    // Three bits are two fields of one plane; other fields have planes of their own. The lowest one has scales.
    let lines = if B == 1 {
        [2 * (A + B) + 1, 0, 0]
    } else {
        [2 * A + 1, 2 * B, 2 * C]
    };
    for (at, lines) in tile.codes.iter().zip(lines) {
        for line in 0..lines {
            // SAFETY: a hint, which no address makes fail.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD + 64 * line).cast()) };
        }
    }
}

/// Adds one step's products: whole codes are put together from their fields (two instructions each and one to join), then
/// multiplied once. Multiplying each field by itself and shifting sums gives the same integers with up to three times the
/// products.
///
/// # Safety
/// The caller has the path's features; the tile's step and the panel's step at `acts` are readable.
#[inline(always)]
unsafe fn step<const T: usize, const A: usize, const B: usize, const C: usize>(
    tile: &TileAt,
    within: usize,
    acts: *const u32,
    scales: __m512,
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
        depths!(0 1 2 3 4 5 6 7);
        for t in 0..T {
            let scale = _mm512_set1_ps(acts.add(DEPTHS * T + t).cast::<f32>().read());
            let sum = _mm512_set1_ps(acts.add((DEPTHS + 1) * T + t).cast::<f32>().read());
            let centred = _mm512_fnmadd_ps(zero_point, sum, _mm512_cvtepi32_ps(dots[t]));
            sums[t] = _mm512_fmadd_ps(centred, _mm512_mul_ps(scales, scale), sums[t]);
        }
    }
}

/// One field of 16 rows × 4 columns, shifted to `place` in each byte.
///
/// # Safety
/// The caller has the path's features; `BITS` lines at `lines` are readable.
#[inline(always)]
pub(super) unsafe fn field<const BITS: usize, const DEPTH: usize>(lines: *const u8, place: usize) -> __m512i {
    let per_line = 8 / BITS.max(1);
    // SAFETY: the features are the caller's; the load is of 64 readable bytes and needs no alignment.
    unsafe { extract::<BITS, DEPTH>(_mm512_loadu_si512(lines.add(DEPTH / per_line * 64).cast()), place) }
}

/// One field of 16 rows × 4 columns out of its line, shifted to `place` in each byte.
///
/// # Safety
/// The caller has the path's features.
#[inline(always)]
pub(super) unsafe fn extract<const BITS: usize, const DEPTH: usize>(packed: __m512i, place: usize) -> __m512i {
    let per_line = 8 / BITS.max(1);
    // SAFETY: the features are the caller's.
    unsafe {
        if BITS == 8 {
            return packed;
        }
        let from = BITS * (DEPTH % per_line);
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
pub(in super::super) fn half_block(half: &HalfMatrix<'_>, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
    let mut first = 0;
    // Four chains a token: more than four tokens at once would spill.
    for four in out.chunks_mut(4) {
        match (four.len(), half.kind()) {
            (1, HalfKind::F16) => half_tokens::<1, false>(half, block, panel, first, four),
            (1, HalfKind::Bf16) => half_tokens::<1, true>(half, block, panel, first, four),
            (2, HalfKind::F16) => half_tokens::<2, false>(half, block, panel, first, four),
            (2, HalfKind::Bf16) => half_tokens::<2, true>(half, block, panel, first, four),
            (_, HalfKind::F16) => half_tokens::<4, false>(half, block, panel, first, four),
            (_, HalfKind::Bf16) => half_tokens::<4, true>(half, block, panel, first, four),
        }
        first += 4;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
fn half_tokens<const T: usize, const BF16: bool>(
    half: &HalfMatrix<'_>,
    block: usize,
    panel: &Panel<'_>,
    first_token: usize,
    out: &mut [BlockOut],
) {
    let mut sums = [_mm512_setzero_ps(); T];
    for (s, columns) in half.block(block).as_chunks::<32>().0.iter().enumerate() {
        let steps: [StepCodes; T] = std::array::from_fn(|t| panel.codes(s, first_token + t));
        let codes = steps.map(|step| step.codes.map(f32::from));
        let mut chains = [[_mm512_setzero_ps(); 4]; T];
        for c in 0..32 {
            if c % 2 == 0 {
                _mm_prefetch::<_MM_HINT_T1>(columns[c].as_ptr().wrapping_add(AHEAD).cast());
            }
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
            sums[t] = _mm512_fmadd_ps(dot, _mm512_set1_ps(steps[t].scale), sums[t]);
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
