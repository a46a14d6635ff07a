//! Batches ahead of their use, made by one background thread. Law: batch `step` of a purpose depends on seed, purpose
//! and step alone, so that a run resumed at any step sees what the first would have seen.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use cotk_run::seeds::Seeds;
use rand::RngExt;

use crate::images::Images;
use crate::task::{Normalisation, shuffle};

/// Batches made ahead.
const AHEAD: usize = 4;

/// Random changes of training images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Augment {
    /// Shift by up to this many pixels each way; what enters is black.
    pub pad: usize,
    /// Mirror left to right half of the time.
    pub flip: bool,
}

/// One batch, ready for a network.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `[images, height, width, channels]`: channels last, as the training kernels want them.
    pub pixels: Vec<f32>,
    /// Class of each image.
    pub labels: Vec<i64>,
}

/// What batches are made from.
#[derive(Debug, Clone)]
pub struct Source {
    images: Arc<Images>,
    normalisation: Normalisation,
    augment: Option<Augment>,
    seeds: Seeds,
    purpose: String,
    batch: usize,
}

impl Source {
    /// Shuffled, augmented batches of `batch` images; each epoch has another order, its last incomplete batch is left out.
    ///
    /// # Panics
    /// When there are fewer images than one batch holds: the recipe's check has to come first.
    pub fn shuffled(
        images: Arc<Images>,
        normalisation: Normalisation,
        augment: Option<Augment>,
        seeds: Seeds,
        purpose: &str,
        batch: usize,
    ) -> Self {
        assert!(batch > 0 && images.len() >= batch, "at least one batch of images");
        Self {
            images,
            normalisation,
            augment,
            seeds,
            purpose: purpose.to_owned(),
            batch,
        }
    }

    /// Batches of one epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.images.len() / self.batch
    }

    /// Starts the thread; the first batch it hands out is that of `step`.
    pub fn start(self, step: usize) -> Loader {
        let (send, batches) = sync_channel(AHEAD);
        std::thread::spawn(move || {
            let per_epoch = self.steps_per_epoch();
            let (mut step, mut epoch, mut order) = (step, usize::MAX, Vec::new());
            // Ends when the loader is dropped: nobody receives any more.
            loop {
                if step / per_epoch != epoch {
                    epoch = step / per_epoch;
                    order = self.order(epoch);
                }
                let at = step % per_epoch * self.batch;
                if send.send(self.make(step, &order[at..at + self.batch])).is_err() {
                    return;
                }
                step += 1;
            }
        });
        Loader { batches }
    }

    /// The batch of one step, made here and now.
    pub fn batch(&self, step: usize) -> Batch {
        let per_epoch = self.steps_per_epoch();
        let at = step % per_epoch * self.batch;
        self.make(step, &self.order(step / per_epoch)[at..at + self.batch])
    }

    fn order(&self, epoch: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.images.len()).collect();
        shuffle(
            &mut order,
            &mut self.seeds.stream(&format!("{} order {epoch}", self.purpose)),
        );
        order
    }

    fn make(&self, step: usize, indices: &[usize]) -> Batch {
        let mut stream = self.seeds.stream(&format!("{} augment {step}", self.purpose));
        let mut batch = Batch {
            pixels: Vec::with_capacity(indices.len() * self.images.shape().len()),
            labels: Vec::with_capacity(indices.len()),
        };
        for &index in indices {
            let (mut shift, mut flip) = ([0isize; 2], false);
            if let Some(augment) = self.augment {
                let pad = augment.pad;
                shift = std::array::from_fn(|_| stream.random_range(0..=2 * pad).cast_signed() - pad.cast_signed());
                flip = augment.flip && stream.random::<bool>();
            }
            append(&self.images, index, self.normalisation, shift, flip, &mut batch);
        }
        batch
    }
}

/// The images `range` in order, unchanged: for evaluation.
pub fn plain_batch(images: &Images, normalisation: Normalisation, range: std::ops::Range<usize>) -> Batch {
    let mut batch = Batch {
        pixels: Vec::with_capacity(range.len() * images.shape().len()),
        labels: Vec::with_capacity(range.len()),
    };
    for index in range {
        append(images, index, normalisation, [0, 0], false, &mut batch);
    }
    batch
}

fn append(
    images: &Images,
    index: usize,
    normalisation: Normalisation,
    [down, right]: [isize; 2],
    flip: bool,
    batch: &mut Batch,
) {
    let shape = images.shape();
    let image = images.image(index);
    let value: [f32; 256] =
        std::array::from_fn(|byte| (byte as f32 - f32::from(normalisation.zero)) / normalisation.deviation);
    for y in 0..shape.height {
        let from_y = y.checked_add_signed(-down).filter(|&v| v < shape.height);
        for x in 0..shape.width {
            let x = if flip { shape.width - 1 - x } else { x };
            let from_x = x.checked_add_signed(-right).filter(|&v| v < shape.width);
            for c in 0..shape.channels {
                let byte = match (from_y, from_x) {
                    (Some(y), Some(x)) => image[(c * shape.height + y) * shape.width + x],
                    _ => 0,
                };
                batch.pixels.push(value[usize::from(byte)]);
            }
        }
    }
    batch.labels.push(i64::from(images.labels()[index]));
}

/// Hands out the batches of consecutive steps.
#[derive(Debug)]
pub struct Loader {
    batches: Receiver<Batch>,
}

impl Loader {
    /// The next step's batch.
    pub fn next_batch(&mut self) -> Batch {
        self.batches
            .recv()
            .expect("the thread ends only after its loader, and makes no errors")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::glyphs;

    fn source(augment: Option<Augment>) -> Source {
        let images = Arc::new(glyphs::images(Seeds::new(1), "train", 25));
        let normalisation = Normalisation {
            zero: 100,
            deviation: 50.0,
        };
        Source::shuffled(images, normalisation, augment, Seeds::new(7), "weights", 10)
    }

    #[test]
    fn a_loader_started_anywhere_gives_the_batches_of_its_steps() {
        let source = source(Some(Augment { pad: 2, flip: true }));
        for start in [0, 1, 3] {
            let mut loader = source.clone().start(start);
            for step in start..start + 4 {
                assert_eq!(loader.next_batch(), source.batch(step), "step {step} from {start}");
            }
        }
    }

    #[test]
    fn an_epoch_holds_each_image_at_most_once() {
        let source = source(None);
        let batches: Vec<Batch> = (0..2).map(|step| source.batch(step)).collect();
        let mut images: Vec<Vec<u32>> = batches
            .iter()
            .flat_map(|b| b.pixels.chunks(glyphs::SHAPE.len()))
            .map(|image| image.iter().map(|v| v.to_bits()).collect())
            .collect();
        images.sort();
        images.dedup();
        assert_eq!(images.len(), 20);
        assert_ne!(source.batch(2), batches[0]);
    }

    #[test]
    fn a_plain_batch_is_channels_last_and_normalised() {
        let images = glyphs::images(Seeds::new(1), "train", 10);
        let normalisation = Normalisation {
            zero: 100,
            deviation: 50.0,
        };
        let batch = plain_batch(&images, normalisation, 3..5);
        let (y, x, c) = (5, 7, 2);
        let expected = (f32::from(images.image(4)[(c * 24 + y) * 24 + x]) - 100.0) / 50.0;
        assert_eq!(batch.pixels[glyphs::SHAPE.len() + (y * 24 + x) * 3 + c], expected);
        assert_eq!(batch.labels[1], i64::from(images.labels()[4]));
    }

    #[test]
    fn a_shift_moves_the_picture() {
        let images = glyphs::images(Seeds::new(1), "train", 10);
        let normalisation = Normalisation {
            zero: 0,
            deviation: 1.0,
        };
        let (mut plain, mut moved) = (
            plain_batch(&images, normalisation, 0..0),
            plain_batch(&images, normalisation, 0..0),
        );
        append(&images, 0, normalisation, [0, 0], false, &mut plain);
        append(&images, 0, normalisation, [2, -1], false, &mut moved);
        let at = |batch: &Batch, y: usize, x: usize| batch.pixels[(y * 24 + x) * 3];
        assert_eq!(at(&moved, 7, 4), at(&plain, 5, 5));
        assert_eq!(at(&moved, 1, 4), 0.0);
    }
}
