//! Images in memory as bytes. Holds no files and no normalisation constants of a data set: those are `task`'s.

/// Channels, height and width of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageShape {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
}

impl ImageShape {
    /// Bytes of one image, one per value.
    pub fn len(self) -> usize {
        self.channels * self.height * self.width
    }

    /// Whether an image of this shape has no pixels.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Labelled images of one shape: `pixels` is `[images, channels, height, width]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Images {
    shape: ImageShape,
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

impl Images {
    /// # Panics
    /// When the lengths do not fit each other: a bug of the reader that calls this.
    pub fn new(shape: ImageShape, pixels: Vec<u8>, labels: Vec<u8>) -> Self {
        assert_eq!(pixels.len(), labels.len() * shape.len(), "as many images as labels");
        Self { shape, pixels, labels }
    }

    /// Shape of each image.
    pub fn shape(&self) -> ImageShape {
        self.shape
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The bytes of image `index`: `[channels, height, width]`.
    pub fn image(&self, index: usize) -> &[u8] {
        &self.pixels[index * self.shape.len()..(index + 1) * self.shape.len()]
    }

    /// All labels.
    pub fn labels(&self) -> &[u8] {
        &self.labels
    }

    /// The images at `indices`, in that order.
    #[must_use]
    pub fn subset(&self, indices: &[usize]) -> Self {
        let mut pixels = Vec::with_capacity(indices.len() * self.shape.len());
        for &index in indices {
            pixels.extend_from_slice(self.image(index));
        }
        Self {
            shape: self.shape,
            pixels,
            labels: indices.iter().map(|&i| self.labels[i]).collect(),
        }
    }

    /// Mean and standard deviation over all pixels of all channels, in byte units.
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    pub fn mean_std(&self) -> (f64, f64) {
        let mut counts = [0u64; 256];
        for &pixel in &self.pixels {
            counts[usize::from(pixel)] += 1;
        }
        let n = self.pixels.len().max(1) as f64;
        let moment = |f: &dyn Fn(f64) -> f64| -> f64 {
            counts
                .iter()
                .enumerate()
                .map(|(v, &c)| f(v as f64) * c as f64)
                .sum::<f64>()
                / n
        };
        let mean = moment(&|v| v);
        (mean, moment(&|v| (v - mean).powi(2)).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_deviation_are_those_of_the_pixels() {
        let shape = ImageShape {
            channels: 1,
            height: 1,
            width: 2,
        };
        let images = Images::new(shape, vec![0, 10, 20, 30], vec![0, 1]);
        assert_eq!(images.mean_std(), (15.0, 125f64.sqrt()));
        assert_eq!(images.subset(&[1]).image(0), [20, 30]);
    }
}
