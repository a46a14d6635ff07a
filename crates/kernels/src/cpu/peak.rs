//! The integer arithmetic that a core can do at best: dot-product instructions on registers, no memory. What prefill is
//! measured against. No clock here. Law: every path does the multiply-adds that it says.

use super::dispatch::Isa;

/// Multiply-adds of one round on every path.
const MACS_PER_ROUND: u64 = ACCUMULATORS as u64 * 64;
/// Enough independent sums to hide the latency of a dot product, few enough to stay in registers.
const ACCUMULATORS: usize = 16;

/// Multiplies and adds on this thread for `rounds` rounds, one multiply-add being two operations. Returns the operations
/// done and a number that depends on all of them, so that no compiler drops them.
pub fn integer_ops(isa: Isa, rounds: u32) -> (u64, i64) {
    let sum = match isa.name() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` of this name exists only where `present` has seen these features.
        "avx512vnni" => unsafe { avx512vnni(rounds) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        "avx2" => unsafe { avx2(rounds) },
        _ => scalar(rounds),
    };
    (2 * MACS_PER_ROUND * u64::from(rounds), sum)
}

/// Unsigned 1, 2, 3, … and signed 1: what every path multiplies, so that sums can be compared.
const WEIGHT: [u8; 64] = {
    let mut weight = [0; 64];
    let mut i = 0;
    while i < 64 {
        weight[i] = i as u8 + 1;
        i += 1;
    }
    weight
};

/// Where sum number `i` begins: sums that differ in nothing would be computed once.
fn start(i: usize) -> i32 {
    i32::try_from(i).expect("a few sums")
}

fn scalar(rounds: u32) -> i64 {
    let mut sums: [i32; ACCUMULATORS] = std::array::from_fn(start);
    for _ in 0..rounds {
        let (weight, one) = std::hint::black_box((WEIGHT, 1i8));
        for sum in &mut sums {
            for w in weight {
                *sum = sum.wrapping_add(i32::from(w) * i32::from(one));
            }
        }
    }
    sums.iter().map(|&sum| i64::from(sum)).sum()
}

/// 32 multiply-adds in three instructions, as where no dot product of bytes is.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(rounds: u32) -> i64 {
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi32, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8,
        _mm256_set1_epi16, _mm256_setr_epi32, _mm256_storeu_si256,
    };
    // SAFETY: each reads half of an array of 64 bytes.
    let [low, high] = [0, 32].map(|at| unsafe { _mm256_loadu_si256(WEIGHT.as_ptr().add(at).cast::<__m256i>()) });
    let [low, high] = std::hint::black_box([low, high]);
    let (one, ones) = std::hint::black_box((_mm256_set1_epi8(1), _mm256_set1_epi16(1)));
    let mut sums: [__m256i; ACCUMULATORS] = std::array::from_fn(|i| _mm256_setr_epi32(start(i), 0, 0, 0, 0, 0, 0, 0));
    for _ in 0..rounds {
        for sum in &mut sums {
            for part in [low, high] {
                // The first operand is what changes, or the product would be made once.
                let product = _mm256_maddubs_epi16(std::hint::black_box(part), one);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(product, ones));
            }
        }
    }
    let mut total = 0;
    for sum in sums {
        let mut lanes = [0i32; 8];
        // SAFETY: 32 bytes are written to an array of 32.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
        total += lanes.iter().map(|&lane| i64::from(lane)).sum::<i64>();
    }
    total
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn avx512vnni(rounds: u32) -> i64 {
    use std::arch::x86_64::{
        __m512i, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_mask_set1_epi32, _mm512_reduce_add_epi32,
        _mm512_set1_epi8, _mm512_setzero_si512,
    };
    // SAFETY: 64 bytes are read from an array of 64.
    let weight = std::hint::black_box(unsafe { _mm512_loadu_si512(WEIGHT.as_ptr().cast()) });
    let one = std::hint::black_box(_mm512_set1_epi8(1));
    let mut sums: [__m512i; ACCUMULATORS] =
        std::array::from_fn(|i| _mm512_mask_set1_epi32(_mm512_setzero_si512(), 1, start(i)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, weight, one);
        }
    }
    sums.iter().map(|&sum| i64::from(_mm512_reduce_add_epi32(sum))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_does_what_it_counts() {
        for isa in Isa::present() {
            for rounds in [0, 1, 1000] {
                let (ops, sum) = integer_ops(isa, rounds);
                assert_eq!(ops, 2 * MACS_PER_ROUND * u64::from(rounds), "{isa:?}");
                // Each round adds 1 + 2 + … + 64 to each sum; sums begin at 0, 1, 2, …
                let expected = ACCUMULATORS as i64 * (i64::from(rounds) * 2080) + (0..ACCUMULATORS as i64).sum::<i64>();
                assert_eq!(sum, expected, "{isa:?}");
            }
        }
    }
}
