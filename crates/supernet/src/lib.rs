//! The `Trainable` on tch: super-kernels, bit ladder, training loop, checkpoints.
//!
//! `ladder` (rungs of weight bits) · `kernels` (3x3 inside 5x5) · `params` (weights, SGD, state) · `forward` (the
//! backbone) · `supernet` (all points at once) · `subnet` (one point alone, folding, export). Chooses nothing: that is
//! `cotk_search`'s. Law: the same calls on the same machine with the same number of threads give the same bits.

#![forbid(unsafe_code)]

pub mod ladder;
pub mod supernet;

mod forward;
mod kernels;
mod params;
mod subnet;

pub use self::supernet::{Settings, Supernet};

use cotk_data::loader::Batch;
use cotk_search::SearchError;
use tch::Tensor;

/// Fixes the number of threads of libtorch for this process: part of what makes a run repeatable.
pub fn set_threads(threads: usize) {
    tch::set_num_threads(i32::try_from(threads.clamp(1, 1024)).expect("at most 1024"));
}

/// Version of the training library, for journals and reports.
pub fn library() -> &'static str {
    "libtorch 2.11.0"
}

/// `[images, channels, height, width]` with channels last in memory, and the labels.
fn tensors(batch: &Batch, channels: usize, height: usize, width: usize) -> (Tensor, Tensor) {
    let count = i64::try_from(batch.labels.len()).expect("a batch fits in memory");
    let size = |v: usize| i64::try_from(v).expect("a batch fits in memory");
    let pixels = Tensor::from_slice(&batch.pixels)
        .view([count, size(height), size(width), size(channels)])
        .permute([0, 3, 1, 2]);
    (pixels, Tensor::from_slice(&batch.labels))
}

fn train_error(detail: impl Into<String>) -> SearchError {
    SearchError::Train { detail: detail.into() }
}
