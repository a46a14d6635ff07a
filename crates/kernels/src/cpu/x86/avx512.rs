//! AVX-512 with VNNI: one register is a line, 16 rows × 4 deep; `vpdpbusd` adds unsigned codes × signed activations into
//! 16 exact i32 sums. Lanes are rows, so nothing is ever summed across a register.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T1, _mm_prefetch, _mm256_loadu_si256, _mm512_add_epi32, _mm512_add_epi64, _mm512_add_ps,
    _mm512_and_si512, _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_or_si512,
    _mm512_reduce_add_epi64, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_slli_epi16, _mm512_slli_epi32, _mm512_srli_epi16, _mm512_storeu_ps,
};

use std::sync::atomic::{Ordering, compiler_fence};

use super::super::activations::{StepCodes, quantize_step};
use super::super::dispatch::BlockOut;
use super::super::half_matrix::{HalfKind, HalfMatrix};
use super::super::panels::{DEPTHS, Panel, STEP_WORDS};
use super::super::scalar::sum_lanes;
use super::super::swiglu::swiglu_step;
use super::super::tiles::{Coded, TileAt, Walk, by_fields};

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
    let (one, out) = ([coded], [out]);
    match panel.width {
        1 => by_fields!(coded, tokens::<1, 1>(one, block, panel, out)),
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
    match panel.width {
        1 => by_fields!(coded, tokens::<2, 1>(both, at, panel, [first, second])),
        2 => by_fields!(coded, tokens::<2, 2>(both, at, panel, [first, second])),
        4 => by_fields!(coded, tokens::<2, 4>(both, at, panel, [first, second])),
        // The sums of more tokens leave no registers for a second matrix.
        _ => {
            block(both[0], at, panel, first);
            block(both[1], at, panel, second);
        }
    }
}

/// Bytes that memory is asked for ahead of use, line by line, into the second-level cache; lines are asked for and read in
/// ascending order, or the CPU's own prefetcher loses the stream. Experts of a layer (2048 × 1024, 8 a token, 4 bit) on a
/// Zen 4 core, of what plain reading gets in the same seconds: 78 % at 5760 and 6912 bytes, 71 at 4608 and 9216, 64 at 256,
/// 55 at 768 to 2304; at 4608 with gate and up in turn step by step and scales before codes, 58. A bare loop over one such
/// stream reads all of it at 256 to 768, which these kernels do not: why is not known.
const AHEAD: usize = 5760;

/// Tokens up to which weights come from memory sooner than they are multiplied.
const STREAMED: usize = 4;

/// One block of `W` matrices of one format × `T` tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")]
fn tokens<const W: usize, const T: usize, const A: usize, const B: usize, const C: usize>(
    all: [&Coded<'_>; W],
    block: usize,
    panel: &Panel<'_>,
    mut out: [&mut [BlockOut]; W],
) {
    assert!(panel.width == T && panel.steps == all[0].steps, "the panel fits");
    // Loops, not `map`: a closure with this function's features is not inlined into one that has none.
    let mut walks = [const { Walk::<A, B, C>::NOTHING }; W];
    let (mut cells, mut zero_points) = ([_mm512_setzero_ps(); W], [_mm512_setzero_ps(); W]);
    for w in 0..W {
        walks[w] = Walk::new(all[w], block);
        cells[w] = _mm512_set1_ps(all[w].cell);
        zero_points[w] = _mm512_set1_ps(all[w].zero_point);
    }
    let mut sums = [[_mm512_setzero_ps(); T]; W];
    let mut scales = [_mm512_setzero_ps(); W];
    let mut acts = panel.start();
    let mut first = 0;
    // SAFETY: `Walk::new` has checked that all its tiles lie in the planes; the panel has a step of `STEP_WORDS · T`
    // words for each of the matrix's (assertion above). This function has the path's features.
    unsafe {
        for _ in 0..walks[0].whole_tiles() {
            // Tile by tile: they lie one behind the other, and so they are read.
            for w in 0..W {
                let tile = walks[w].whole();
                let new = [walks[w].scales(&tile, first, 0), walks[w].scales(&tile, first, 1)];
                let both = [acts, acts.add(STEP_WORDS * T)];
                let sums = &mut sums[w];
                if T <= STREAMED {
                    let dots = [
                        dots::<T, A, B, C>(&tile, 0, both[0]),
                        dots::<T, A, B, C>(&tile, 1, both[1]),
                    ];
                    for within in 0..2 {
                        scale(new[within], cells[w], &mut scales[w]);
                        add::<T>(dots[within], both[within], scales[w], zero_points[w], sums);
                    }
                } else {
                    for within in 0..2 {
                        let dots = dots::<T, A, B, C>(&tile, within, both[within]);
                        scale(new[within], cells[w], &mut scales[w]);
                        add::<T>(dots, both[within], scales[w], zero_points[w], sums);
                    }
                }
            }
            acts = acts.add(2 * STEP_WORDS * T);
            first += 2;
        }
        for w in 0..W {
            if let Some(tile) = walks[w].half() {
                let dots = dots::<T, A, B, C>(&tile, 0, acts);
                scale(walks[w].scales(&tile, first, 0), cells[w], &mut scales[w]);
                add::<T>(dots, acts, scales[w], zero_points[w], &mut sums[w]);
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

/// The products of one step: whole codes are put together from their fields (two instructions each and one to join), then
/// multiplied once. Multiplying each field by itself and shifting sums gives the same integers with up to three times the
/// products.
///
/// # Safety
/// The caller has the path's features; the tile's step and the panel's step at `acts` are readable.
#[inline(always)]
unsafe fn dots<const T: usize, const A: usize, const B: usize, const C: usize>(
    tile: &TileAt,
    within: usize,
    acts: *const u32,
) -> [__m512i; T] {
    let mut codes = tile.codes;
    for (at, step_bytes) in codes.iter_mut().zip(tile.step_bytes) {
        *at = at.wrapping_add(within * step_bytes);
    }
    // SAFETY: the features are the caller's, and so is the readability of the step.
    unsafe {
        let mut dots = [_mm512_setzero_si512(); T];
        // `vpdpbusd` takes 4 to 5 cycles: one token alone needs two chains.
        let mut odd = _mm512_setzero_si512();
        let mut lines = [_mm512_setzero_si512(); 3];
        macro_rules! depths {
            ($($depth:literal)*) => {$(
                next_line::<T, A, $depth>(codes[0], &mut lines[0]);
                let mut whole = field::<A, $depth>(lines[0], B + C);
                if B > 0 {
                    next_line::<T, B, $depth>(codes[1], &mut lines[1]);
                    whole = _mm512_or_si512(whole, field::<B, $depth>(lines[1], C));
                }
                if C > 0 {
                    next_line::<T, C, $depth>(codes[2], &mut lines[2]);
                    whole = _mm512_or_si512(whole, field::<C, $depth>(lines[2], 0));
                }
                for t in 0..T {
                    let four = _mm512_set1_epi32(acts.add($depth * T + t).cast::<i32>().read());
                    if T == 1 && $depth % 2 == 1 {
                        odd = _mm512_dpbusd_epi32(odd, whole, four);
                    } else {
                        dots[t] = _mm512_dpbusd_epi32(dots[t], whole, four);
                    }
                }
            )*};
        }
        depths!(0 1 2 3 4 5 6 7);
        if T == 1 {
            dots[0] = _mm512_add_epi32(dots[0], odd);
        }
        dots
    }
}

/// Loads the line that a depth begins, if one does.
///
/// # Safety
/// The caller has the path's features; `BITS` lines at `lines` are readable.
#[inline(always)]
unsafe fn next_line<const T: usize, const BITS: usize, const DEPTH: usize>(lines: *const u8, line: &mut __m512i) {
    let per_line = 8 / BITS.max(1);
    if DEPTH % per_line == 0 {
        let at = lines.wrapping_add(DEPTH / per_line * 64);
        // SAFETY: the features are the caller's; the load is of 64 readable bytes and needs no alignment.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD).cast());
            *line = _mm512_loadu_si512(at.cast());
        }
        if T <= STREAMED {
            // No instruction: the compiler, which would read scales and later lines first, keeps the order of `AHEAD`.
            compiler_fence(Ordering::SeqCst);
        }
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
unsafe fn add<const T: usize>(
    dots: [__m512i; T],
    acts: *const u32,
    scales: __m512,
    zero_point: __m512,
    sums: &mut [__m512; T],
) {
    // SAFETY: the features are the caller's, and so is the readability of the step.
    unsafe {
        for t in 0..T {
            let scale = _mm512_set1_ps(acts.add(DEPTHS * T + t).cast::<f32>().read());
            let sum = _mm512_set1_ps(acts.add((DEPTHS + 1) * T + t).cast::<f32>().read());
            let centred = _mm512_fnmadd_ps(zero_point, sum, _mm512_cvtepi32_ps(dots[t]));
            sums[t] = _mm512_fmadd_ps(centred, _mm512_mul_ps(scales, scale), sums[t]);
        }
    }
}

/// One field of 16 rows × 4 columns out of its line, shifted to `place` in each byte.
///
/// # Safety
/// The caller has the path's features.
#[inline(always)]
unsafe fn field<const BITS: usize, const DEPTH: usize>(packed: __m512i, place: usize) -> __m512i {
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
