//! The backbone's way from pixels to logits, shared by all points at once and by one alone: they differ in how a
//! convolution's weights are made and in what happens at each node, which they pass in.

use cotk_search::space::{Slot, Space, Step};
use tch::{Kind, Tensor, no_grad};

/// Keeps the variance of a normalisation off zero.
pub(crate) const EPSILON: f64 = 1e-5;

/// Where normalisation statistics come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Norm {
    /// This batch; nothing is remembered.
    Batch,
    /// This batch, which enters the running statistics with this weight.
    Measure(f64),
    /// The running statistics.
    Running,
}

/// Running mean and variance of one normalisation.
#[derive(Debug)]
pub(crate) struct Statistics {
    pub(crate) mean: Tensor,
    pub(crate) variance: Tensor,
}

impl Statistics {
    pub(crate) fn new(channels: u32) -> Self {
        let options = (Kind::Float, tch::Device::Cpu);
        Self {
            mean: Tensor::zeros([i64::from(channels)], options),
            variance: Tensor::ones([i64::from(channels)], options),
        }
    }
}

/// Batch normalisation of `x` `[images, channels, height, width]`.
pub(crate) fn normalise(x: &Tensor, gamma: &Tensor, beta: &Tensor, statistics: &Statistics, norm: Norm) -> Tensor {
    let (mean, variance) = (&statistics.mean, &statistics.variance);
    match norm {
        Norm::Batch => x.batch_norm(
            Some(gamma),
            Some(beta),
            None::<&Tensor>,
            None::<&Tensor>,
            true,
            0.0,
            EPSILON,
            false,
        ),
        Norm::Measure(weight) => x.batch_norm(
            Some(gamma),
            Some(beta),
            Some(mean),
            Some(variance),
            true,
            weight,
            EPSILON,
            false,
        ),
        Norm::Running => x.batch_norm(
            Some(gamma),
            Some(beta),
            Some(mean),
            Some(variance),
            false,
            0.0,
            EPSILON,
            false,
        ),
    }
}

/// What differs between a supernet and a subnet.
pub(crate) trait Layers {
    /// Convolution and normalisation of a slot, before its ReLU.
    fn conv(&self, slot: usize, x: &Tensor, norm: Norm) -> Tensor;

    /// What happens to the output of node `index` (after its ReLU), as its graph counts nodes.
    fn node(&self, index: usize, x: Tensor) -> Tensor;

    /// Logits from pooled features `[images, features]`.
    fn head(&self, x: &Tensor) -> Tensor;
}

/// Logits `[images, classes]`.
pub(crate) fn forward(space: &Space, layers: &dyn Layers, pixels: &Tensor, norm: Norm) -> Tensor {
    let mut index = 0;
    let mut node = |x: Tensor| {
        index += 1;
        layers.node(index - 1, x)
    };
    let relu = |slot: &Slot, x: Tensor| if slot.relu { x.relu() } else { x };
    let mut x = pixels.shallow_clone();
    for step in space.steps() {
        let conv = |slot: usize, x: &Tensor| relu(&space.slots()[slot], layers.conv(slot, x, norm));
        x = match *step {
            Step::Conv(slot) => node(conv(slot, &x)),
            Step::Block { first, second } => {
                let inner = node(conv(first, &x));
                let outer = node(conv(second, &inner));
                node((outer + x).relu())
            }
        };
    }
    let pooled = node(x.mean_dim([2i64, 3].as_slice(), true, Kind::Float));
    layers.head(&pooled.flatten(1, -1))
}

/// Mean cross entropy of a batch.
pub(crate) fn loss(logits: &Tensor, labels: &Tensor) -> Tensor {
    logits.cross_entropy_loss::<&Tensor>(labels, None, tch::Reduction::Mean, -100, 0.0)
}

/// Sum of cross entropies, and how many were right.
pub(crate) fn score(logits: &Tensor, labels: &Tensor) -> cotk_search::trainable::Score {
    no_grad(|| {
        let count = labels.numel() as u64;
        let right = logits
            .argmax(1, false)
            .eq_tensor(labels)
            .sum(Kind::Int64)
            .int64_value(&[]);
        cotk_search::trainable::Score {
            loss_sum: loss(logits, labels).double_value(&[]) * count as f64,
            right: right.unsigned_abs(),
            count,
        }
    })
}
