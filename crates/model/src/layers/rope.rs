//! Rotary positions, pairs half a width apart or side by side ([`RopeLayout`]). Frequencies in f32 step by step as
//! transformers computes them: at long range an angle of f64 would be another angle.

use std::f64::consts::PI;

use crate::spec::{RopeLayout, RopeScaling, RopeSpec};

/// Frequencies of one model.
#[derive(Debug, Clone)]
pub struct Rope {
    layout: RopeLayout,
    /// `[dim / 2]`
    frequencies: Vec<f32>,
    /// Multiplies cos and sin.
    attention_factor: f32,
}

impl Rope {
    /// For `spec.dim` elements of each head.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "head widths are small; frequencies are f32"
    )]
    pub fn new(spec: &RopeSpec) -> Self {
        let theta = spec.theta as f32;
        let dim = spec.dim;
        let powers = (0..dim / 2).map(|j| theta.powf((2 * j) as f32 / dim as f32));
        let frequencies: Vec<f32> = match &spec.scaling {
            RopeScaling::None => powers.map(|p| 1.0 / p).collect(),
            RopeScaling::Linear { factor } => powers.map(|p| 1.0 / p / *factor as f32).collect(),
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => {
                // YaRN (Peng et al., 2023), section 3.2: how many rotations fit the original context.
                let correction = |rotations: f64| {
                    dim as f64 * (original_context / (rotations * 2.0 * PI)).ln() / (2.0 * spec.theta.ln())
                };
                let (low, high) = (correction(*beta_fast), correction(*beta_slow));
                let (low, high) = if *truncate {
                    (low.floor(), high.ceil())
                } else {
                    (low, high)
                };
                let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                powers
                    .enumerate()
                    .map(|(j, p)| {
                        let ramp = ((j as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                        1.0 / (*factor as f32 * p) * ramp + 1.0 / p * (1.0 - ramp)
                    })
                    .collect()
            }
            RopeScaling::Llama3 {
                factor,
                original_context,
                low_freq_factor,
                high_freq_factor,
            } => powers
                .map(|p| {
                    let frequency = 1.0 / f64::from(p);
                    let wavelength = 2.0 * PI / frequency;
                    let scaled = if wavelength > original_context / low_freq_factor {
                        frequency / factor
                    } else if wavelength < original_context / high_freq_factor {
                        frequency
                    } else {
                        let smooth =
                            (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    };
                    scaled as f32
                })
                .collect(),
        };
        let attention_factor = match spec.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
        };
        Self {
            layout: spec.layout,
            frequencies,
            attention_factor,
        }
    }

    /// Turns the last elements of every head, of `head_dim`, in rows of `x` `[positions, width]`; row r stands at
    /// position `start + r`.
    pub fn turn(&self, x: &mut [f32], start: usize, width: usize, head_dim: usize) {
        let mut angles = Angles::default();
        self.angles(start..start + x.len() / width, &mut angles);
        angles.turn(x, width, head_dim);
    }

    /// Replaces `angles` by those of rows at these positions: all layers turn by the same.
    pub fn angles(&self, positions: impl Iterator<Item = usize>, angles: &mut Angles) {
        angles.layout = self.layout;
        angles.half = self.frequencies.len();
        angles.cos_sin.clear();
        for position in positions {
            #[expect(
                clippy::cast_precision_loss,
                reason = "contexts are at most 2^26; above 2^24 as transformers"
            )]
            let position = position as f32;
            angles.cos_sin.extend(self.frequencies.iter().map(|frequency| {
                let (sin, cos) = (position * frequency).sin_cos();
                (cos * self.attention_factor, sin * self.attention_factor)
            }));
        }
    }
}

/// Cosines and sines of some rows' positions.
#[derive(Debug, Clone)]
pub struct Angles {
    layout: RopeLayout,
    half: usize,
    /// `[rows, half]`
    cos_sin: Vec<(f32, f32)>,
}

impl Default for Angles {
    fn default() -> Self {
        Self {
            layout: RopeLayout::Halves,
            half: 0,
            cos_sin: Vec::new(),
        }
    }
}

impl Angles {
    /// Turns the last elements of every head, of `head_dim`, in rows of `x` `[rows, width]`.
    ///
    /// # Panics
    /// Rows without angles.
    pub fn turn(&self, x: &mut [f32], width: usize, head_dim: usize) {
        let half = self.half;
        assert!(x.len() / width * half <= self.cos_sin.len(), "an angle for each row");
        for (row, cos_sin) in x.chunks_exact_mut(width).zip(self.cos_sin.chunks_exact(half.max(1))) {
            for head in row.chunks_exact_mut(head_dim) {
                let turned = &mut head[head_dim - 2 * half..];
                match self.layout {
                    RopeLayout::Halves => {
                        let (low, high) = turned.split_at_mut(half);
                        for ((a, b), cos_sin) in low.iter_mut().zip(high).zip(cos_sin) {
                            (*a, *b) = turn_pair(*a, *b, *cos_sin);
                        }
                    }
                    RopeLayout::Pairs => {
                        for ([a, b], cos_sin) in turned.as_chunks_mut::<2>().0.iter_mut().zip(cos_sin) {
                            (*a, *b) = turn_pair(*a, *b, *cos_sin);
                        }
                    }
                }
            }
        }
    }
}

fn turn_pair(a: f32, b: f32, (cos, sin): (f32, f32)) -> (f32, f32) {
    (a * cos - b * sin, b * cos + a * sin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(dim: usize, layout: RopeLayout) -> Rope {
        Rope::new(&RopeSpec {
            dim,
            layout,
            theta: 10_000.0,
            scaling: RopeScaling::None,
        })
    }

    /// Law: the score of a turned query and a turned key depends on their distance alone.
    #[test]
    fn scores_depend_on_distance_alone() {
        for (layout, dim) in [(RopeLayout::Halves, 8), (RopeLayout::Pairs, 8), (RopeLayout::Pairs, 6)] {
            let rope = rope(dim, layout);
            let q: Vec<f32> = (0..8).map(|i| (i as f32).sin()).collect();
            let k: Vec<f32> = (0..8).map(|i| (i as f32 * 2.0).cos()).collect();
            let score = |at: usize, distance: usize| {
                let (mut q, mut k) = (q.clone(), k.clone());
                rope.turn(&mut q, at + distance, 8, 8);
                rope.turn(&mut k, at, 8, 8);
                q.iter().zip(&k).map(|(a, b)| a * b).sum::<f32>()
            };
            for distance in [0, 1, 7, 100] {
                assert!((score(0, distance) - score(40, distance)).abs() < 1e-4);
            }
            assert!((score(0, 1) - score(0, 7)).abs() > 1e-2, "positions must matter");
        }
    }

    /// Law: the layouts differ by the order of elements alone, and only the last `dim` of a head turn.
    #[test]
    fn layouts_are_the_same_turn_in_another_order() {
        let x: Vec<f32> = (0..20).map(|i| (i as f32 * 0.7).sin()).collect();
        let (mut pairs, mut halves) = (x.clone(), x.clone());
        let order = [0, 1, 2, 3, 4, 6, 8, 5, 7, 9];
        for (head, from) in halves.chunks_exact_mut(10).zip(x.chunks_exact(10)) {
            for (to, at) in head.iter_mut().zip(order) {
                *to = from[at];
            }
        }
        rope(6, RopeLayout::Pairs).turn(&mut pairs, 5, 20, 10);
        rope(6, RopeLayout::Halves).turn(&mut halves, 5, 20, 10);
        for (pairs, halves) in pairs.chunks_exact(10).zip(halves.chunks_exact(10)) {
            for (half, at) in halves.iter().zip(order) {
                assert_eq!(*half, pairs[at]);
            }
        }
        assert_eq!((&pairs[..4], &pairs[10..14]), (&x[..4], &x[10..14]));
        assert_ne!(pairs[4], x[4]);
    }
}
