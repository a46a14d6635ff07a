//! Matrix × quantized tokens. One pass over the weights serves up to 8 tokens; rows are split over threads in
//! fixed chunks. Law: the result depends neither on the thread count nor on which tokens stand beside a token.

use std::marker::PhantomData;
use std::ops::Range;

use cotk_quant::layout::BLOCK_ROWS;

use super::activations::Activations;
use super::dispatch::{BlockOut, Isa, TOKENS};
use super::team;
use super::weights::Weights;

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread: for callers that split work over experts themselves. Allocates nothing.
    One,
    /// The team of this thread: [`team::run`].
    Pool,
}

/// Row blocks of one chunk: 128 rows, large enough to hide a pool's hand-over.
const CHUNK_BLOCKS: usize = 8;

/// `out[t, r] = Σ_c w[r, c] · x[t, c]`; `out` is `[tokens, rows]`. One token: a GEMV.
///
/// Equals [`super::reference::gemm`] bit for bit.
///
/// # Panics
/// The matrix's columns are not the activations', or `out` has another length.
pub fn gemm<'a>(isa: Isa, weights: impl Into<Weights<'a>>, acts: &Activations, out: &mut [f32], threads: Threads) {
    let weights = weights.into();
    let rows = weights.rows();
    assert_eq!(
        out.len(),
        acts.tokens() * rows,
        "output of {} tokens × {rows} rows",
        acts.tokens()
    );
    let shared = Disjoint::new(out);
    in_chunks(weights.row_blocks(), CHUNK_BLOCKS, threads, |blocks| {
        for block in blocks {
            let from = block * BLOCK_ROWS;
            let width = BLOCK_ROWS.min(rows - from);
            for_tokens(acts.tokens(), |first, buffer| {
                weights.block(isa, block, acts, first, buffer);
                for (t, values) in buffer.iter().enumerate() {
                    // SAFETY: rows `from..from + width` belong to this block alone, and a block to one chunk.
                    unsafe { shared.write((first + t) * rows + from, &values[..width]) };
                }
            });
        }
    });
}

/// Calls `f` with the first token and a buffer for each batch of 8, 4, 2, 1 tokens.
pub(super) fn for_tokens(tokens: usize, mut f: impl FnMut(usize, &mut [BlockOut])) {
    let mut buffer = [[0.0; BLOCK_ROWS]; TOKENS];
    let mut first = 0;
    while first < tokens {
        let batch = 1 << (tokens - first).min(TOKENS).ilog2();
        f(first, &mut buffer[..batch]);
        first += batch;
    }
}

/// Splits `0..count` into chunks of fixed size, whatever the thread count.
pub(super) fn in_chunks(count: usize, chunk: usize, threads: Threads, f: impl Fn(Range<usize>) + Sync) {
    match threads {
        Threads::One => f(0..count),
        Threads::Pool => team::run_chunks(count, chunk, f),
    }
}

/// A slice that several threads fill, each its own elements.
pub(super) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: the one method that touches memory is unsafe and asks for disjoint ranges; `T: Send` moves values across.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T: Copy> Disjoint<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            borrow: PhantomData,
        }
    }

    /// Copies `values` to `at..`.
    ///
    /// # Safety
    /// No other call may touch any of these elements.
    pub(super) unsafe fn write(&self, at: usize, values: &[T]) {
        assert!(at + values.len() <= self.len);
        // SAFETY: inside the slice (line above), which `self` borrows mutably; disjoint by this function's contract.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(at), values.len()) };
    }
}
