//! Matrix × quantized tokens. One pass over the weights serves up to 12 tokens; rows are split over threads.
//! Law: the result depends neither on the thread count nor on which tokens stand beside a token.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use cotk_quant::layout::BLOCK_ROWS;

use super::activations::Activations;
use super::dispatch::{BlockOut, Isa, TOKENS};
use super::panels::{PANEL_TOKENS, Panels, PanelsView};
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

/// Bytes of weights of one part when few tokens meet them: long enough for a stream, short enough to end together.
const STREAM_BYTES: usize = 64 << 10;
/// The same when many do: they stay in the second-level cache while panels pass.
const CACHED_BYTES: usize = 256 << 10;
/// Tokens from which weights are met often enough to be worth keeping.
const MANY_TOKENS: usize = 16;
/// Bytes × tokens below which the caller is done before a second thread has begun.
pub(super) const ALONE_BYTES: usize = 48 << 10;

/// Most products of one call.
pub const MAX_PRODUCTS: usize = 8;

/// One matrix and where its product goes.
#[derive(Debug)]
pub struct Product<'a> {
    pub weights: Weights<'a>,
    /// Added to each row's output, `[rows]`.
    pub bias: Option<&'a [f32]>,
    /// `[tokens, rows]`.
    pub out: &'a mut [f32],
}

/// `out[t, r] = Σ_c w[r, c] · x[t, c]`; `out` is `[tokens, rows]`. One token: a GEMV.
///
/// Equals [`super::reference::gemm`] bit for bit.
///
/// # Panics
/// The matrix's columns are not the activations', or `out` has another length.
pub fn gemm<'a>(isa: Isa, weights: impl Into<Weights<'a>>, acts: &Activations, out: &mut [f32], threads: Threads) {
    let product = Product {
        weights: weights.into(),
        bias: None,
        out,
    };
    products(isa, acts, &mut [product], threads);
}

/// Several matrices × the same tokens in one call of the team: query, key and value, say. Each as [`gemm`], then its bias
/// added. Allocates nothing once a thread has met the shape.
///
/// # Panics
/// As [`gemm`]; a bias that is not `[rows]`.
pub fn products(isa: Isa, acts: &Activations, products: &mut [Product<'_>], threads: Threads) {
    thread_local! {
        static PANELS: RefCell<Panels> = RefCell::default();
    }
    // Taken, not borrowed: a part may multiply, too.
    let mut panels = PANELS.take();
    panels.gather(acts, 0..acts.tokens());
    products_of(isa, panels.view(), products, threads);
    PANELS.set(panels);
}

/// [`products`] of activations that are packed.
///
/// # Panics
/// As [`products`].
pub(super) fn products_of(isa: Isa, panels: PanelsView<'_>, products: &mut [Product<'_>], threads: Threads) {
    let tokens = panels.shape.tokens;
    assert!(
        products.len() <= MAX_PRODUCTS,
        "at most {MAX_PRODUCTS} products in a call"
    );
    let mut ready: [Option<Ready<'_>>; MAX_PRODUCTS] = [const { None }; MAX_PRODUCTS];
    let (mut work, mut parts) = (0, 0);
    for (product, ready) in products.iter_mut().zip(&mut ready) {
        let (weights, bias) = (product.weights, product.bias);
        let rows = weights.rows();
        assert_eq!(weights.cols(), panels.shape.cols, "matrix columns and activations");
        assert_eq!(
            product.out.len(),
            tokens * rows,
            "output of {tokens} tokens × {rows} rows"
        );
        assert!(bias.is_none_or(|b| b.len() == rows), "a bias of {rows} rows");
        let chunk = chunk_blocks(weights.block_bytes(), tokens);
        *ready = Some(Ready {
            weights,
            bias,
            out: Disjoint::new(product.out),
            chunk,
            first_part: parts,
        });
        work += weights.bytes() * tokens;
        parts += weights.row_blocks().div_ceil(chunk);
    }
    let threads = if work < ALONE_BYTES { Threads::One } else { threads };
    in_chunks(parts, 1, threads, |range| {
        for part in range {
            let Some(ready) = ready.iter().flatten().rfind(|ready| ready.first_part <= part) else {
                continue;
            };
            let from = (part - ready.first_part) * ready.chunk;
            ready.rows(isa, panels, from..(from + ready.chunk).min(ready.weights.row_blocks()));
        }
    });
}

/// One product of a call, its parts counted.
struct Ready<'a> {
    weights: Weights<'a>,
    bias: Option<&'a [f32]>,
    out: Disjoint<'a, f32>,
    /// Row blocks of a part.
    chunk: usize,
    first_part: usize,
}

impl Ready<'_> {
    /// Some blocks' rows for all tokens.
    fn rows(&self, isa: Isa, panels: PanelsView<'_>, blocks: Range<usize>) {
        let rows = self.weights.rows();
        let mut buffer = [[0.0; BLOCK_ROWS]; PANEL_TOKENS];
        // Panels outside: one stays near while the part's weights pass, which stay in the second-level cache.
        for i in 0..panels.shape.count() {
            let panel = panels.panel(i);
            for block in blocks.clone() {
                let from = block * BLOCK_ROWS;
                let width = BLOCK_ROWS.min(rows - from);
                self.weights.block(isa, block, &panel, &mut buffer[..panel.width]);
                for (t, values) in buffer[..panel.tokens].iter_mut().enumerate() {
                    if let Some(bias) = self.bias {
                        values
                            .iter_mut()
                            .zip(&bias[from..from + width])
                            .for_each(|(y, b)| *y += b);
                    }
                    // SAFETY: a block's rows belong to one part, and a part to one thread.
                    unsafe { self.out.write((i * PANEL_TOKENS + t) * rows + from, &values[..width]) };
                }
            }
        }
    }
}

/// Row blocks of one part.
pub(super) fn chunk_blocks(block_bytes: usize, tokens: usize) -> usize {
    let bytes = if tokens < MANY_TOKENS {
        STREAM_BYTES
    } else {
        CACHED_BYTES
    };
    (bytes / block_bytes.max(1)).max(1)
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

impl<'a, T> Disjoint<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            borrow: PhantomData,
        }
    }

    /// One element.
    ///
    /// # Safety
    /// Nobody else may use it while the borrow lives.
    #[expect(clippy::mut_from_ref, reason = "elements are disjoint by contract")]
    pub(super) unsafe fn element(&self, at: usize) -> &mut T {
        assert!(at < self.len);
        // SAFETY: inside the slice (line above), which `self` borrows mutably; exclusive by this function's contract.
        unsafe { &mut *self.start.add(at) }
    }

    /// Some elements.
    ///
    /// # Safety
    /// Nobody else may use any of them while the borrow lives.
    #[expect(clippy::mut_from_ref, reason = "elements are disjoint by contract")]
    pub(super) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice (line above), which `self` borrows mutably; exclusive by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Copies `values` to `at..`.
    ///
    /// # Safety
    /// No other call may touch any of these elements.
    pub(super) unsafe fn write(&self, at: usize, values: &[T])
    where
        T: Copy,
    {
        assert!(at + values.len() <= self.len);
        // SAFETY: inside the slice (line above), which `self` borrows mutably; disjoint by this function's contract.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(at), values.len()) };
    }
}
