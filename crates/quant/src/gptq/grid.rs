//! The levels that weights are rounded to at one width, and the search of their scales.
//!
//! A level is `step · (u − zero_point)`, `step = scale · 2^cut` where `cut` bits of the full code lie below this width.
//! Law: [`Grid::nearest`] has the nearest level among those allowed.

use crate::code::Bits;

/// 1.5 · 2^23: added and taken away it rounds what is below 2^22 to an integer, halves to even. (`round` is a call.)
const ROUND: f32 = 12_582_912.0;
/// Factors on the widest scale of the first sweep: 0.05, 0.1 … 1.2; two sweeps of finer ones follow around the best.
const SWEEP: (u8, f32) = (24, 0.05);
/// Weights that are summed side by side.
const LANES: usize = 8;

/// One width of a code.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    /// Bits of the full code below this width.
    pub(super) cut: u32,
    /// `2^cut`.
    pub(super) cell: f32,
    pub(super) zero_point: f32,
    /// Highest code.
    pub(super) top: f32,
}

impl Grid {
    pub(super) fn new(full: Bits, bits: Bits, zero_point: f32) -> Self {
        let cut = full.get() - bits.get();
        #[expect(clippy::cast_precision_loss, reason = "at most 255")]
        let (cell, top) = ((1u32 << cut) as f32, ((1u32 << bits.get()) - 1) as f32);
        Self {
            cut,
            cell,
            zero_point,
            top,
        }
    }

    /// The nearest code of a weight in `low..=high`; `inverse` is 1 / step, or 0.
    #[inline(always)]
    pub(super) fn nearest(&self, weight: f32, inverse: f32, low: f32, high: f32) -> f32 {
        // No `mul_add`: without the FMA instruction it is a slow call. Clamped first: the ends are integers, and rounding needs a bound.
        let place = (weight * inverse + self.zero_point).max(low).min(high);
        (place + ROUND) - ROUND
    }

    /// Σ h·(w − level)² with every level allowed.
    fn error(&self, weights: &[f32], importance: &[f32], step: f32) -> f32 {
        let inverse = inverse(step);
        let mut sums = [0.0f32; LANES];
        let (whole, rest) = weights.as_chunks::<LANES>();
        let (whole_h, rest_h) = importance.as_chunks::<LANES>();
        let one = |w: f32, h: f32| {
            let e = w - step * (self.nearest(w, inverse, 0.0, self.top) - self.zero_point);
            h * e * e
        };
        for (w, h) in whole.iter().zip(whole_h) {
            for lane in 0..LANES {
                sums[lane] += one(w[lane], h[lane]);
            }
        }
        for ((sum, &w), &h) in sums.iter_mut().zip(rest).zip(rest_h) {
            *sum += one(w, h);
        }
        sums.iter().sum()
    }

    /// The step (either sign) of least `Σ h·(w − level)²` among those tried; ties go to the first. 0 for weights of 0.
    pub(super) fn search(&self, weights: &[f32], importance: &[f32]) -> f32 {
        let widest =
            weights.iter().fold(0.0f32, |best, w| best.max(w.abs())) / self.zero_point.max(self.top - self.zero_point);
        if widest == 0.0 {
            return 0.0;
        }
        let is_symmetric = self.top - self.zero_point == self.zero_point;
        // Errors beyond f32 leave it so: beyond f16, too, and the caller says so.
        let mut best = (f32::INFINITY, widest);
        let consider = |step: f32, best: &mut (f32, f32)| {
            let error = self.error(weights, importance, step);
            if error < best.0 {
                *best = (error, step);
            }
        };
        for i in 1..=SWEEP.0 {
            let step = widest * SWEEP.1 * f32::from(i);
            consider(step, &mut best);
            if !is_symmetric {
                consider(-step, &mut best);
            }
        }
        for finer in [0.5, 0.25] {
            let (center, by) = (best.1, widest * SWEEP.1 * finer);
            consider(center - by, &mut best);
            consider(center + by, &mut best);
        }
        for _ in 0..2 {
            let (inverse, mut wq, mut qq) = (inverse(best.1), 0.0f32, 0.0f32);
            for (&w, &h) in weights.iter().zip(importance) {
                let q = self.nearest(w, inverse, 0.0, self.top) - self.zero_point;
                wq += h * w * q;
                qq += h * q * q;
            }
            if qq > 0.0 {
                consider(wq / qq, &mut best);
            }
        }
        best.1
    }
}

/// 1 / step, and 0 where that is not a number to multiply with.
pub(super) fn inverse(step: f32) -> f32 {
    let inverse = 1.0 / step;
    if inverse.is_finite() { inverse } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bell(count: usize) -> Vec<f32> {
        let mut bytes = vec![0u8; count * 4];
        crate::noise::fill(&mut bytes, 5);
        let uniform = |b: &[u8]| (f32::from(b[0]) + f32::from(b[1]) + f32::from(b[2]) + f32::from(b[3])) / 510.0 - 1.0;
        bytes.chunks_exact(4).map(uniform).collect()
    }

    #[test]
    fn the_nearest_level_is_nearest_among_those_allowed() {
        for (full, bits, zero) in [
            (Bits::B2, Bits::B2, 2.0),
            (Bits::B8, Bits::B4, 7.53),
            (Bits::B3, Bits::B3, 3.5),
        ] {
            let grid = Grid::new(full, bits, zero);
            for (i, w) in bell(200).into_iter().enumerate() {
                let step = [0.1f32, -0.3, 0.02][i % 3];
                let (low, high) = if i % 2 == 0 { (0.0, grid.top) } else { (1.0, 2.0) };
                let distance = |u: f32| (w - step * (u - zero)).abs();
                let found = grid.nearest(w, inverse(step), low, high);
                assert!(found >= low && found <= high && found.fract() == 0.0);
                let mut u = low;
                while u <= high {
                    assert!(distance(found) <= distance(u) + 1e-5, "{w} {step}: {found} against {u}");
                    u += 1.0;
                }
            }
        }
    }

    #[test]
    fn the_search_finds_what_a_dense_sweep_finds() {
        for bits in [Bits::B2, Bits::B3, Bits::B4, Bits::B8] {
            let code = crate::code::Code::Plain(bits);
            let grid = Grid::new(bits, bits, code.default_zero_point(bits));
            // At 8 bits 16 weights happen to lie well under some step that no sweep looks for.
            let slack = if bits == Bits::B8 { 1.3 } else { 1.12 };
            for group in [16, 32, 200] {
                let w = bell(group);
                let h: Vec<f32> = (0..group).map(|i| 1.0 + (i % 3) as f32).collect();
                let found = grid.error(&w, &h, grid.search(&w, &h));
                let mut best = f32::INFINITY;
                for i in 1..2000u16 {
                    let step = f32::from(i) * 0.0015 / (1u32 << (bits.get() - 2)) as f32;
                    best = best.min(grid.error(&w, &h, step)).min(grid.error(&w, &h, -step));
                }
                assert!(
                    found <= best * slack + 1e-9,
                    "{bits} bits, {group}: {found} against {best}"
                );
            }
        }
        assert_eq!(Grid::new(Bits::B2, Bits::B2, 2.0).search(&[0.0; 32], &[1.0; 32]), 0.0);
    }
}
