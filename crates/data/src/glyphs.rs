//! The built-in task: ten glyphs drawn as strokes, 24 x 24 pixels in colour, under random rotation, shear, scale,
//! thickness, colours, clutter and noise. Needs no file. Law: an image depends on seed, split and index alone; splits
//! draw from disjoint streams.

use cotk_run::seeds::{Seeds, Stream};
use rand::RngExt;

use crate::images::{ImageShape, Images};

/// Shape of every image.
pub const SHAPE: ImageShape = ImageShape {
    channels: 3,
    height: 24,
    width: 24,
};

/// Class names in label order.
pub const CLASSES: [&str; 10] = [
    "ring", "box", "triangle", "plus", "times", "zed", "arrow", "fork", "hook", "comb",
];

/// A stroke between two points of the square [-1, 1]².
type Stroke = [f32; 4];

/// `count` images of the named split ("train", "val", "test"); labels in equal numbers, in random order.
pub fn images(seeds: Seeds, split: &str, count: usize) -> Images {
    let mut pixels = Vec::with_capacity(count * SHAPE.len());
    let mut labels = Vec::with_capacity(count);
    for block in 0..count.div_ceil(CLASSES.len()) {
        let mut order = seeds.stream(&format!("glyphs {split} labels {block}"));
        let mut classes: [u8; 10] = std::array::from_fn(|i| i as u8);
        for i in (1..classes.len()).rev() {
            classes.swap(i, order.random_range(0..=i));
        }
        for class in classes.into_iter().take(count - labels.len()) {
            let mut stream = seeds.stream(&format!("glyphs {split} {}", labels.len()));
            draw(usize::from(class), &mut stream, &mut pixels);
            labels.push(class);
        }
    }
    Images::new(SHAPE, pixels, labels)
}

fn strokes(class: usize) -> Vec<Stroke> {
    let ring = |from: usize, to: usize, of: usize| -> Vec<Stroke> {
        let at = |i: usize| (std::f32::consts::TAU * i as f32 / of as f32).sin_cos();
        (from..to)
            .map(|i| {
                let ((y0, x0), (y1, x1)) = (at(i), at(i + 1));
                [x0 * 0.9, y0 * 0.9, x1 * 0.9, y1 * 0.9]
            })
            .collect()
    };
    match CLASSES[class] {
        "ring" => ring(0, 14, 14),
        "box" => vec![
            [-0.8, -0.8, 0.8, -0.8],
            [0.8, -0.8, 0.8, 0.8],
            [0.8, 0.8, -0.8, 0.8],
            [-0.8, 0.8, -0.8, -0.8],
        ],
        "triangle" => vec![
            [0.0, -0.9, 0.85, 0.75],
            [0.85, 0.75, -0.85, 0.75],
            [-0.85, 0.75, 0.0, -0.9],
        ],
        "plus" => vec![[0.0, -0.9, 0.0, 0.9], [-0.9, 0.0, 0.9, 0.0]],
        "times" => vec![[-0.75, -0.75, 0.75, 0.75], [0.75, -0.75, -0.75, 0.75]],
        "zed" => vec![
            [-0.75, -0.8, 0.75, -0.8],
            [0.75, -0.8, -0.75, 0.8],
            [-0.75, 0.8, 0.75, 0.8],
        ],
        "arrow" => vec![[0.0, 0.9, 0.0, -0.9], [0.0, -0.9, -0.6, -0.2], [0.0, -0.9, 0.6, -0.2]],
        "fork" => vec![[0.0, 0.9, 0.0, 0.0], [0.0, 0.0, -0.7, -0.85], [0.0, 0.0, 0.7, -0.85]],
        // Three quarters of a ring and a straight end.
        "hook" => {
            let mut strokes = ring(0, 9, 14);
            strokes.push([-0.56, -0.71, -0.1, -0.1]);
            strokes
        }
        "comb" => vec![
            [-0.7, -0.85, -0.7, 0.85],
            [-0.7, -0.85, 0.75, -0.85],
            [-0.7, 0.0, 0.6, 0.0],
            [-0.7, 0.85, 0.75, 0.85],
        ],
        name => unreachable!("{name} is one of CLASSES"),
    }
}

/// Appends one image, `[3, 24, 24]`.
fn draw(class: usize, stream: &mut Stream, pixels: &mut Vec<u8>) {
    let (height, width) = (SHAPE.height, SHAPE.width);
    let uniform = |stream: &mut Stream, from: f32, to: f32| from + (to - from) * stream.random::<f32>();

    // Background: a colour with a gradient. Ink: a brighter colour, more or less so.
    let base: [f32; 3] = std::array::from_fn(|_| uniform(stream, 30.0, 130.0));
    let slope: [f32; 2] = std::array::from_fn(|_| uniform(stream, -25.0, 25.0));
    let mut canvas = vec![0f32; SHAPE.len()];
    for (c, &colour) in base.iter().enumerate() {
        for y in 0..height {
            for x in 0..width {
                let (u, v) = (x as f32 / 11.5 - 1.0, y as f32 / 11.5 - 1.0);
                canvas[(c * height + y) * width + x] = colour + slope[0] * u + slope[1] * v;
            }
        }
    }
    let contrast = uniform(stream, 38.0, 115.0);
    let ink: [f32; 3] = std::array::from_fn(|c| base[c] + contrast * uniform(stream, 0.4, 1.0));

    // Clutter first: the glyph lies on top.
    for _ in 0..stream.random_range(1..=3) {
        let (x, y) = (uniform(stream, 0.0, 24.0), uniform(stream, 0.0, 24.0));
        let angle = uniform(stream, 0.0, std::f32::consts::TAU);
        let length = uniform(stream, 2.0, 5.0);
        let colour: [f32; 3] = std::array::from_fn(|c| base[c] + uniform(stream, -60.0, 60.0));
        let half_width = uniform(stream, 0.4, 0.9);
        let end = [x + length * angle.cos(), y + length * angle.sin()];
        paint(&mut canvas, [x, y, end[0], end[1]], half_width, colour);
    }

    let angle = uniform(stream, -0.40, 0.40);
    let (scale_x, scale_y) = (uniform(stream, 5.0, 9.0), uniform(stream, 5.0, 9.0));
    let shear = uniform(stream, -0.25, 0.25);
    let centre = [11.5 + uniform(stream, -2.5, 2.5), 11.5 + uniform(stream, -2.5, 2.5)];
    let half_width = uniform(stream, 0.5, 1.25);
    let (sin, cos) = angle.sin_cos();
    let place = |x: f32, y: f32| {
        let (x, y) = ((x + shear * y) * scale_x, y * scale_y);
        [centre[0] + cos * x - sin * y, centre[1] + sin * x + cos * y]
    };
    for [x0, y0, x1, y1] in strokes(class) {
        let mut jitter = || uniform(stream, -0.08, 0.08);
        let (from, to) = (place(x0 + jitter(), y0 + jitter()), place(x1 + jitter(), y1 + jitter()));
        paint(&mut canvas, [from[0], from[1], to[0], to[1]], half_width, ink);
    }

    let noise = uniform(stream, 4.0, 24.0);
    for value in canvas {
        // Sum of four uniforms: near enough to a Gaussian, of deviation 1 after the factor √3.
        let sum: f32 = (0..4).map(|_| stream.random::<f32>() - 0.5).sum();
        pixels.push((value + noise * sum * 1.732).round().clamp(0.0, 255.0) as u8);
    }
}

/// Paints one stroke with soft edges of one pixel.
fn paint(canvas: &mut [f32], [x0, y0, x1, y1]: Stroke, half_width: f32, colour: [f32; 3]) {
    let (height, width) = (SHAPE.height, SHAPE.width);
    let reach = half_width + 1.0;
    let span = |a: f32, b: f32, size: usize| {
        let from = (a.min(b) - reach).floor().clamp(0.0, size as f32) as usize;
        let to = (a.max(b) + reach).ceil().clamp(0.0, size as f32) as usize;
        from..to
    };
    let (dx, dy) = (x1 - x0, y1 - y0);
    let length_squared = (dx * dx + dy * dy).max(1e-6);
    for y in span(y0, y1, height) {
        for x in span(x0, x1, width) {
            let (px, py) = (x as f32 - x0, y as f32 - y0);
            let along = ((px * dx + py * dy) / length_squared).clamp(0.0, 1.0);
            let distance = (px - along * dx).hypot(py - along * dy);
            let cover = (half_width + 0.5 - distance).clamp(0.0, 1.0);
            if cover > 0.0 {
                for (c, &ink) in colour.iter().enumerate() {
                    let value = &mut canvas[(c * height + y) * width + x];
                    *value += cover * (ink - *value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_depends_on_seed_split_and_index_alone() {
        let few = images(Seeds::new(1), "train", 20);
        let more = images(Seeds::new(1), "train", 35);
        assert_eq!(more.subset(&(0..20).collect::<Vec<_>>()), few);
        assert_ne!(images(Seeds::new(2), "train", 20), few);
        assert_ne!(images(Seeds::new(1), "test", 20), few);
    }

    #[test]
    fn classes_come_in_equal_numbers() {
        let images = images(Seeds::new(3), "val", 100);
        for class in 0..10 {
            assert_eq!(images.labels().iter().filter(|&&l| l == class).count(), 10);
        }
    }

    /// The task must be neither trivial nor hopeless: class means of pixels say nearly nothing.
    #[test]
    fn the_nearest_class_mean_is_a_bad_classifier() {
        let train = images(Seeds::new(1), "train", 2000);
        let test = images(Seeds::new(1), "test", 500);
        let mut means = vec![vec![0f64; SHAPE.len()]; 10];
        for i in 0..train.len() {
            for (mean, &pixel) in means[usize::from(train.labels()[i])].iter_mut().zip(train.image(i)) {
                *mean += f64::from(pixel) / 200.0;
            }
        }
        let right = (0..test.len())
            .filter(|&i| {
                let distance = |mean: &[f64]| -> f64 {
                    mean.iter()
                        .zip(test.image(i))
                        .map(|(m, &p)| (m - f64::from(p)).powi(2))
                        .sum()
                };
                let nearest = (0..10).min_by(|&a, &b| distance(&means[a]).total_cmp(&distance(&means[b])));
                nearest == Some(usize::from(test.labels()[i]))
            })
            .count();
        assert!(right < 150, "{right} of 500");
    }
}
