//! Reading memory as fast as a path can: what kernels that stream weights are measured against. No clock here.

use super::dispatch::Isa;
use super::gemm::{Threads, in_chunks};

/// Bytes of one thread's chunk.
const CHUNK: usize = 4 << 20;

/// Reads every byte of `bytes` once. The result depends on the bytes, so that no compiler drops the reads.
pub fn read_once(isa: Isa, bytes: &[u8], threads: Threads) -> u64 {
    let total = std::sync::atomic::AtomicU64::new(0);
    in_chunks(bytes.len().div_ceil(CHUNK), 1, threads, |chunks| {
        for chunk in chunks {
            let range = chunk * CHUNK..((chunk + 1) * CHUNK).min(bytes.len());
            total.fetch_add(isa.read(&bytes[range]), std::sync::atomic::Ordering::Relaxed);
        }
    });
    total.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_and_thread_count_reads_every_byte() {
        let bytes: Vec<u8> = (0..(9 << 20))
            .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let expected = bytes
            .as_chunks::<8>()
            .0
            .iter()
            .fold(0u64, |a, b| a.wrapping_add(u64::from_le_bytes(*b)));
        for isa in Isa::present() {
            for threads in [Threads::One, Threads::Pool] {
                assert_eq!(read_once(isa, &bytes, threads), expected, "{isa:?} {threads:?}");
            }
        }
    }
}
