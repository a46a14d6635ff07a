//! One image classification task: the recipe's `[data]` section becomes splits, class names and normalisation. Law:
//! training, validation and test images are disjoint; the test images are read by [`Task::open_test`] alone.

use std::path::PathBuf;

use cotk_run::seeds::Seeds;
use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::images::{ImageShape, Images};
use crate::loader::Augment;
use crate::{DataError, Result, cifar, glyphs};

/// `[data]`: what to learn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// The data set.
    pub name: Name,
    /// Folder of its files; absent: looked for. The glyphs have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// Training images; absent: all (glyphs: 12,000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<usize>,
    /// Validation images, held out of the training files; absent: 5,000 (glyphs: 2,000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val: Option<usize>,
    /// Test images; absent: all (glyphs: 4,000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<usize>,
    /// Seed of the data set itself: which glyphs, which validation images. Not the run's.
    #[serde(default)]
    pub seed: u64,
}

/// The data sets there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Name {
    /// Built in, drawn on the fly.
    Glyphs,
    /// The official binary files.
    Cifar10,
}

impl Name {
    /// As in recipes.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Glyphs => "glyphs",
            Self::Cifar10 => "cifar10",
        }
    }

    /// Shape of its images, known before any file is read.
    pub fn shape(self) -> ImageShape {
        match self {
            Self::Glyphs => glyphs::SHAPE,
            Self::Cifar10 => cifar::SHAPE,
        }
    }

    /// Class names in label order, known before any file is read.
    pub fn classes(self) -> &'static [&'static str] {
        match self {
            Self::Glyphs => &glyphs::CLASSES,
            Self::Cifar10 => &cifar::CLASSES,
        }
    }
}

/// How bytes become network input: `(byte - zero) / deviation`, alike for all channels, so that the raw bytes *are* the
/// 8-bit codes of the input and quantizing it loses nothing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Normalisation {
    /// The byte that becomes 0: the rounded mean of the training images.
    pub zero: u8,
    /// Standard deviation of the training images, in byte units.
    pub deviation: f32,
}

/// A loaded task without its test images.
#[derive(Debug, Clone)]
pub struct Task {
    pub name: Name,
    pub train: Images,
    pub val: Images,
    pub normalisation: Normalisation,
    /// What the loader may do to training images.
    pub augment: Augment,
    section: Section,
}

impl Section {
    /// Loads training and validation images.
    ///
    /// # Errors
    /// [`DataError`]: files missing or wrong, or more images asked for than there are.
    pub fn load(&self) -> Result<Task> {
        let seeds = Seeds::new(self.seed);
        let (train, val, augment) = match self.name {
            Name::Glyphs => {
                let train = self.count("train", self.train, 12_000, 1_000_000)?;
                let val = self.count("val", self.val, 2_000, 1_000_000)?;
                (
                    glyphs::images(seeds, "train", train),
                    glyphs::images(seeds, "val", val),
                    Augment { pad: 2, flip: false },
                )
            }
            Name::Cifar10 => {
                let all = cifar::train(&cifar::folder(self.folder.as_deref())?)?;
                let val = self.count("val", self.val, 5_000, all.len() - 10)?;
                let train = self.count("train", self.train, all.len() - val, all.len() - val)?;
                let (val_at, train_at) = stratified(&all, val, seeds);
                (
                    all.subset(&train_at[..train]),
                    all.subset(&val_at),
                    Augment { pad: 4, flip: true },
                )
            }
        };
        let (mean, deviation) = train.mean_std();
        Ok(Task {
            name: self.name,
            train,
            val,
            normalisation: Normalisation {
                zero: mean.round().clamp(0.0, 255.0) as u8,
                deviation: deviation.max(1.0) as f32,
            },
            augment,
            section: self.clone(),
        })
    }

    fn count(&self, key: &'static str, asked: Option<usize>, default: usize, most: usize) -> Result<usize> {
        let count = asked.unwrap_or(default);
        if (10..=most).contains(&count) {
            Ok(count)
        } else {
            Err(DataError::Section {
                key,
                found: count.to_string(),
                expected: format!("10 to {most} images of {}", self.name.as_str()),
            })
        }
    }
}

impl Task {
    /// Reads the test images. Whoever calls this records it: they are for the final figure alone.
    ///
    /// # Errors
    /// [`DataError`] as for the training files.
    pub fn open_test(&self) -> Result<Images> {
        let section = &self.section;
        match self.name {
            Name::Glyphs => {
                let count = section.count("test", section.test, 4_000, 1_000_000)?;
                Ok(glyphs::images(Seeds::new(section.seed), "test", count))
            }
            Name::Cifar10 => {
                let all = cifar::test(&cifar::folder(section.folder.as_deref())?)?;
                let count = section.count("test", section.test, all.len(), all.len())?;
                Ok(all.subset(&(0..count).collect::<Vec<_>>()))
            }
        }
    }
}

/// `val` indices in equal numbers per class (the remainder to the first classes), and all others, both shuffled.
fn stratified(images: &Images, val: usize, seeds: Seeds) -> (Vec<usize>, Vec<usize>) {
    let mut order: Vec<usize> = (0..images.len()).collect();
    shuffle(&mut order, &mut seeds.stream("validation split"));
    let mut room: Vec<usize> = (0..10).map(|class| val / 10 + usize::from(class < val % 10)).collect();
    let (mut chosen, mut rest) = (Vec::new(), Vec::new());
    for index in order {
        let room = &mut room[usize::from(images.labels()[index])];
        if *room > 0 {
            *room -= 1;
            chosen.push(index);
        } else {
            rest.push(index);
        }
    }
    (chosen, rest)
}

/// Fisher–Yates on one stream.
pub(crate) fn shuffle(order: &mut [usize], stream: &mut cotk_run::seeds::Stream) {
    for i in (1..order.len()).rev() {
        order.swap(i, stream.random_range(0..=i));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn glyphs(train: usize) -> Section {
        Section {
            name: Name::Glyphs,
            folder: None,
            train: Some(train),
            val: Some(20),
            test: Some(30),
            seed: 0,
        }
    }

    #[test]
    fn splits_are_disjoint_and_of_the_asked_size() {
        let task = glyphs(50).load().unwrap();
        let test = task.open_test().unwrap();
        assert_eq!((task.train.len(), task.val.len(), test.len()), (50, 20, 30));
        let all: std::collections::HashSet<&[u8]> = (0..50)
            .map(|i| task.train.image(i))
            .chain((0..20).map(|i| task.val.image(i)))
            .chain((0..30).map(|i| test.image(i)))
            .collect();
        assert_eq!(all.len(), 100);
    }

    #[test]
    fn a_stratified_split_takes_each_class_alike_and_loses_nothing() {
        let labels: Vec<u8> = (0..200).map(|i| (i % 10) as u8).collect();
        let shape = ImageShape {
            channels: 1,
            height: 1,
            width: 1,
        };
        let images = Images::new(shape, vec![0; 200], labels);
        let (val, train) = stratified(&images, 42, Seeds::new(1));
        let mut counts = [0; 10];
        for &i in &val {
            counts[usize::from(images.labels()[i])] += 1;
        }
        assert_eq!(counts, [5, 5, 4, 4, 4, 4, 4, 4, 4, 4]);
        let mut all = [val, train].concat();
        all.sort_unstable();
        assert_eq!(all, (0..200).collect::<Vec<_>>());
    }

    #[test]
    fn too_few_images_are_refused_with_the_key() {
        let error = glyphs(3).load().unwrap_err().to_string();
        assert_eq!(error, "data.train: 3, expected 10 to 1000000 images of glyphs");
    }
}
