//! Scales as a format can hold them: an f16 for each group, or six bits for each under an f16 for eight.
//!
//! Law: what is settled stays as it is when it is stored and read.

use half::f16;

use crate::QuantError;
use crate::layout::{MatrixFormat, SUPER_GROUPS, ScaleForm};

/// The multiples that the greatest scale of eight may take, tried from the highest.
const GREATEST: std::ops::RangeInclusive<i8> = 22..=31;

/// Scales of a whole matrix, as they are stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// `[rows, groups]`
    F16(Vec<f16>),
    TwoLevel {
        /// `[rows, ⌈groups / 8⌉]`
        coarse: Vec<f16>,
        /// −32 to 31: multiples of the coarse one, `[rows, groups]`.
        fine: Vec<i8>,
    },
}

impl Scales {
    /// None yet.
    pub(crate) fn empty(form: ScaleForm) -> Self {
        match form {
            ScaleForm::F16 => Self::F16(Vec::new()),
            ScaleForm::TwoLevel => Self::TwoLevel {
                coarse: Vec::new(),
                fine: Vec::new(),
            },
        }
    }

    /// As numbers `[rows, groups]`.
    pub fn values(&self, format: &MatrixFormat) -> Vec<f32> {
        match self {
            Self::F16(scales) => scales.iter().map(|s| s.to_f32()).collect(),
            Self::TwoLevel { coarse, fine } => {
                let (groups, coarse_per_row) = (format.groups(), format.scale_blocks());
                let value = |(at, fine): (usize, &i8)| {
                    let coarse = coarse[at / groups * coarse_per_row + at % groups / SUPER_GROUPS];
                    coarse.to_f32() * f32::from(*fine)
                };
                fine.iter().enumerate().map(value).collect()
            }
        }
    }

    /// Appends the nearest that can be held to the scales of one row; false where one is beyond f16 (nothing is
    /// appended then).
    pub(crate) fn push_row(&mut self, row: &[f64]) -> bool {
        match self {
            Self::F16(scales) => {
                let halves = row.iter().map(|&s| f16::from_f64(s));
                let is_held = halves.clone().all(f16::is_finite);
                if is_held {
                    scales.extend(halves);
                }
                is_held
            }
            Self::TwoLevel { coarse, fine } => {
                let settled: Option<Vec<_>> = row.chunks(SUPER_GROUPS).map(settle).collect();
                let is_held = settled.is_some();
                for (one, multiples) in settled.into_iter().flatten() {
                    coarse.push(one);
                    fine.extend(multiples);
                }
                is_held
            }
        }
    }

    /// Moves the multiples of one row of two-level scales one by one to where `dᵀ·A·d − 2·bᵀ·d` falls, `d` their
    /// distance from `start`; f16 scales are fine as they are. `normal` A is `[groups, groups]`.
    pub(crate) fn descend_row(&mut self, start: &[f32], normal: &[f64], b: &[f64]) {
        let Self::TwoLevel { coarse, fine } = self else { return };
        let groups = start.len();
        let value = |g: usize, multiple: i8| f64::from(coarse[g / SUPER_GROUPS].to_f32() * f32::from(multiple));
        let mut by: Vec<f64> = (0..groups).map(|g| value(g, fine[g]) - f64::from(start[g])).collect();
        for _ in 0..2 {
            for g in 0..groups {
                let (pull, one) = (normal[g * groups + g], value(g, 1));
                let gradient = b[g] - (0..groups).map(|j| normal[g * groups + j] * by[j]).sum::<f64>();
                if pull <= 0.0 || one == 0.0 {
                    continue;
                }
                #[expect(clippy::cast_possible_truncation, reason = "-32..=31")]
                let new = (f64::from(fine[g]) + gradient / pull / one).round().clamp(-32.0, 31.0) as i8;
                by[g] += value(g, new) - value(g, fine[g]);
                fine[g] = new;
            }
        }
    }

    /// Appends all rows of another.
    ///
    /// # Panics
    /// Another form.
    pub(crate) fn append(&mut self, other: &Self) {
        match (self, other) {
            (Self::F16(all), Self::F16(more)) => all.extend(more),
            (
                Self::TwoLevel { coarse, fine },
                Self::TwoLevel {
                    coarse: more,
                    fine: more_fine,
                },
            ) => {
                coarse.extend(more);
                fine.extend(more_fine);
            }
            _ => unreachable!("one matrix has one form"),
        }
    }

    /// Replaces one row by row 0 of another of the same format.
    ///
    /// # Panics
    /// Another form, no such row.
    pub(crate) fn set_row(&mut self, format: &MatrixFormat, row: usize, from: &Self, from_row: usize) {
        let copy = |to: &mut [f16], from: &[f16], width: usize| {
            to[row * width..][..width].copy_from_slice(&from[from_row * width..][..width]);
        };
        match (self, from) {
            (Self::F16(to), Self::F16(from)) => copy(to, from, format.groups()),
            (
                Self::TwoLevel { coarse, fine },
                Self::TwoLevel {
                    coarse: from,
                    fine: from_fine,
                },
            ) => {
                copy(coarse, from, format.scale_blocks());
                let groups = format.groups();
                fine[row * groups..][..groups].copy_from_slice(&from_fine[from_row * groups..][..groups]);
            }
            _ => unreachable!("one matrix has one form"),
        }
    }

    /// Whether there is one for each row and group.
    pub(crate) fn check(&self, format: &MatrixFormat) -> Result<(), QuantError> {
        let all = format.rows() * format.groups();
        let (found, expected) = match (self, format.scales()) {
            (Self::F16(scales), ScaleForm::F16) => (scales.len(), all),
            (Self::TwoLevel { coarse, fine }, ScaleForm::TwoLevel) => {
                (coarse.len() + fine.len(), format.rows() * format.scale_blocks() + all)
            }
            (Self::F16(scales), ScaleForm::TwoLevel) => (scales.len(), 0),
            (Self::TwoLevel { fine, .. }, ScaleForm::F16) => (fine.len(), 0),
        };
        if found == expected {
            Ok(())
        } else {
            Err(QuantError::Length {
                what: "scales of this form",
                found,
                expected,
            })
        }
    }
}

/// The coarse scale and multiples of least squared error for up to eight scales; `None` beyond f16.
fn settle(scales: &[f64]) -> Option<(f16, Vec<i8>)> {
    if !scales.iter().all(|s| s.is_finite()) {
        return None;
    }
    let greatest = scales.iter().fold(0.0f64, |best, s| best.max(s.abs()));
    #[expect(clippy::cast_possible_truncation, reason = "-31..=31")]
    let multiple = |scale: f64, coarse: f64| (scale / coarse).round().clamp(-31.0, 31.0) as i8;
    let mut best: Option<(f64, f16)> = None;
    for at in GREATEST.rev() {
        let coarse = f16::from_f64(greatest / f64::from(at));
        if !coarse.is_finite() {
            return None;
        }
        let coarse_value = coarse.to_f64();
        if coarse_value == 0.0 {
            continue;
        }
        let error = |s: &f64| (s - coarse_value * f64::from(multiple(*s, coarse_value))).powi(2);
        let error: f64 = scales.iter().map(error).sum();
        if best.is_none_or(|(least, _)| error < least) {
            best = Some((error, coarse));
        }
    }
    let coarse = best.map_or(f16::ZERO, |(_, coarse)| coarse);
    let multiples = scales.iter().map(|&s| {
        if best.is_some() {
            multiple(s, coarse.to_f64())
        } else {
            0
        }
    });
    Some((coarse, multiples.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::{Bits, Code};

    #[test]
    fn two_levels_keep_scales_within_two_per_cent_of_the_greatest() {
        let format = MatrixFormat::try_with_scales(1, 300, Code::Plain(Bits::B2), 32, ScaleForm::TwoLevel).unwrap();
        let row: Vec<f64> = (0..10)
            .map(|i| 0.01 * (1.0 + f64::from(i * 7 % 10) / 5.0) * f64::from(1 - i % 2 * 2))
            .collect();
        let mut scales = Scales::empty(ScaleForm::TwoLevel);
        assert!(scales.push_row(&row));
        scales.check(&format).unwrap();
        let values = scales.values(&format);
        for (part, (values, row)) in values.chunks(8).zip(row.chunks(8)).enumerate() {
            let greatest = row.iter().fold(0.0f64, |m, s| m.max(s.abs()));
            for (v, s) in values.iter().zip(row) {
                assert!((f64::from(*v) - s).abs() <= 0.5 / 22.0 * greatest, "{part}: {v} {s}");
            }
        }
        // What is held stays.
        let mut again = Scales::empty(ScaleForm::TwoLevel);
        assert!(again.push_row(&values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>()));
        assert_eq!(again.values(&format), values);
    }

    #[test]
    fn zeros_vanishing_and_overflowing_scales() {
        for form in [ScaleForm::F16, ScaleForm::TwoLevel] {
            let mut scales = Scales::empty(form);
            assert!(scales.push_row(&[0.0; 8]) && scales.push_row(&[1e-30; 8]));
            for bad in [f64::NAN, f64::INFINITY, 1e9] {
                let mut row = [0.5; 8];
                row[3] = bad;
                assert!(!scales.push_row(&row), "{form:?} {bad}");
            }
            let format = MatrixFormat::try_with_scales(2, 256, Code::Plain(Bits::B2), 32, form).unwrap();
            scales.check(&format).unwrap();
            assert!(scales.values(&format).iter().all(|s| *s == 0.0));
        }
    }
}
