//! GPTQ: codes chosen one column after another, each loss taken back by the columns to come, for every code form.
//!
//! Plain codes are solved at their width. Nested codes are solved at one width first ([`Settings::first`]): at 8 bits
//! the prefixes fall out of it; at 2 or 4 bits each plane above splits the cells, the child chosen under feedback at
//! the wider width. Laws: a loss is `tr(E·H·Eᵀ)` of what [`crate::decode`] gives; no row is worse than rounding to
//! nearest on its scales; the same bits on any number of threads.

mod factor;
mod grid;
#[cfg(test)]
mod laws;
mod rows;

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use self::grid::Grid;
use self::rows::{Parents, Rows, State};
use crate::QuantError;
use crate::code::Bits;
use crate::coded::CodedMatrix;
use crate::decode::decode;
use crate::encode::{assemble_scaled, check, overflow};
use crate::layout::MatrixFormat;
use crate::scales::Scales;

pub use self::factor::{DAMPING, Factor};

/// Rows that are solved together, on one thread.
const BLOCK_ROWS: usize = 64;

/// How codes are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The width that is solved first, a prefix of the code: the full width, or a narrower one of a nested code, whose
    /// children the wider ones then are.
    pub first: Bits,
    /// Code of zero at the first width where it is the full one; absent: [`crate::code::Code::default_zero_point`].
    /// `(2^b − 1) / 2` has as many levels above zero as below.
    pub zero_point: Option<f32>,
    /// Factors on the scales that are best for rounding (those are too narrow where errors are fed back: 1.3 is good at
    /// 2 bits, 1.1 at 3). Each row takes the best of them.
    pub scale_factors: Vec<f32>,
    /// How many times scales are refitted under the full Hessian and codes descended over afterwards.
    pub refit_rounds: usize,
}

impl Settings {
    /// The scales' own width, one refit: what serves as a baseline.
    pub fn new(first: Bits) -> Self {
        Self {
            first,
            zero_point: None,
            scale_factors: vec![1.0],
            refit_rounds: 1,
        }
    }
}

/// What one width loses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WidthLoss {
    pub bits: Bits,
    /// `tr(E·H·Eᵀ)`, E the weights less what they decode to.
    pub loss: f64,
}

/// Codes, and what they lose under the Hessian that they were chosen for.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution {
    pub coded: CodedMatrix,
    /// One for each prefix, narrow to wide.
    pub losses: Vec<WidthLoss>,
    /// `tr(W·H·Wᵀ)`: what losing the whole matrix would lose.
    pub whole: f64,
}

impl Solution {
    /// `loss / whole` of the full width; 0 where nothing is lost.
    pub fn relative(&self) -> f64 {
        let loss = self.losses.last().map_or(0.0, |l| l.loss);
        if loss > 0.0 { loss / self.whole } else { 0.0 }
    }
}

/// Codes `weights` `[rows, cols]` (row major). Rows run in parallel on rayon's current pool.
///
/// # Errors
/// Lengths that differ from the format's or the factor's, weights that are not finite or beyond f16 scales, a first
/// width that the code does not have, scale factors that are empty or not above 0.
pub fn solve(
    weights: &[f32],
    format: MatrixFormat,
    factor: &Factor,
    settings: &Settings,
) -> Result<Solution, QuantError> {
    check(weights, &format)?;
    let code = format.code();
    if factor.cols() != format.cols() {
        return Err(QuantError::Length {
            what: "columns of the Hessian",
            found: factor.cols(),
            expected: format.cols(),
        });
    }
    let bad_factor = |x: &&f32| !(x.is_finite() && **x > 0.0);
    if settings.scale_factors.is_empty() || settings.scale_factors.iter().any(|x| bad_factor(&x)) {
        return Err(QuantError::ScaleFactors {
            found: settings.scale_factors.clone(),
        });
    }
    let plan = &code.prefixes()[code.prefix_index(settings.first)?..];
    let zero_point = |bits: Bits| match settings.zero_point {
        Some(zero) if bits == code.full() && settings.first == bits => zero,
        _ => code.default_zero_point(bits),
    };
    let grid = |bits: Bits| Grid::new(code.full(), bits, zero_point(bits));

    let blocks = weights.par_chunks(BLOCK_ROWS * format.cols()).enumerate();
    let solved = blocks.map(|(index, weights)| {
        let rows = Rows {
            format: &format,
            factor,
            weights,
        };
        let mut state = first_width(&rows, &grid(plan[0]), settings, index * BLOCK_ROWS)?;
        for pair in plan.windows(2) {
            let parents = Parents {
                codes: &state.codes,
                shift: pair[1].get() - pair[0].get(),
            };
            state = rows.solve(
                &grid(pair[1]),
                state.held.clone(),
                Some(parents),
                settings.refit_rounds,
                false,
            );
        }
        if let [_] = code.prefixes() {
            let sum = state.losses.iter().sum();
            return Ok((state, vec![[sum, 0.0, 0.0]]));
        }
        let moments: Vec<[f64; 3]> = code
            .prefixes()
            .iter()
            .map(|&bits| rows.moments(&grid(bits), &state.scales, &state.codes, bits != code.full()))
            .collect();
        Ok((state, moments))
    });
    let solved = solved.collect::<Result<Vec<(State, Vec<[f64; 3]>)>, QuantError>>()?;

    let (mut zero_points, mut losses) = (Vec::new(), Vec::new());
    for (i, &bits) in code.prefixes().iter().enumerate() {
        let sum = |k: usize| solved.iter().map(|(_, m)| m[i][k]).sum::<f64>();
        let (own, cross, steps) = (sum(0), sum(1), sum(2));
        let shift = -cross / steps;
        #[expect(clippy::cast_possible_truncation, reason = "a zero point is an f32")]
        let fitted = (f64::from(zero_point(bits)) + shift) as f32;
        let is_fitted = bits != code.full() && fitted.is_finite();
        let zero = if is_fitted { fitted } else { zero_point(bits) };
        // The shift that the f32 took, not the one that was wanted.
        let shift = f64::from(zero) - f64::from(zero_point(bits));
        zero_points.push(zero);
        losses.push(WidthLoss {
            bits,
            loss: own + shift * (2.0 * cross + shift * steps),
        });
    }
    let mut codes = Vec::with_capacity(weights.len());
    let mut scales = Scales::empty(format.scales());
    for (state, _) in &solved {
        codes.extend_from_slice(&state.codes);
        scales.append(&state.held);
    }
    Ok(Solution {
        coded: assemble_scaled(format, &codes, &scales, zero_points)?,
        losses,
        whole: weighted_square(weights, factor.hessian())?,
    })
}

/// The width that nothing binds: the best of the scale factors for each row.
fn first_width(rows: &Rows<'_>, grid: &Grid, settings: &Settings, first_row: usize) -> Result<State, QuantError> {
    let (cols, groups, group) = (rows.format.cols(), rows.format.groups(), rows.format.group());
    #[expect(clippy::cast_possible_truncation, reason = "weights of errors")]
    let importance: Vec<f32> = rows.factor.importance.iter().map(|&h| h as f32).collect();
    let mut searched = Vec::new();
    for row in rows.weights.chunks_exact(cols) {
        searched.extend(
            row.chunks(group)
                .zip(importance.chunks(group))
                .map(|(w, h)| grid.search(w, h) / grid.cell),
        );
    }
    let mut best: Option<State> = None;
    for &by in &settings.scale_factors {
        let mut scales = Scales::empty(rows.format.scales());
        for (r, row) in searched.chunks_exact(groups).enumerate() {
            let row: Vec<f64> = row.iter().map(|&s| f64::from(s * by)).collect();
            if !scales.push_row(&row) {
                // The greatest scale is of the group with the greatest weight, or near.
                let greatest = (0..groups)
                    .max_by(|&a, &b| row[a].abs().total_cmp(&row[b].abs()))
                    .unwrap_or(0);
                let at = greatest * group;
                let weights = &rows.weights[r * cols..][at..(at + group).min(cols)];
                return Err(overflow(weights, first_row + r, at));
            }
        }
        let state = rows.solve(grid, scales, None, settings.refit_rounds, true);
        best = Some(match best {
            None => state,
            Some(mut best) => {
                for (r, loss) in state.losses.iter().enumerate() {
                    if *loss < best.losses[r] {
                        best.losses[r] = *loss;
                        best.codes[r * cols..][..cols].copy_from_slice(&state.codes[r * cols..][..cols]);
                        best.scales[r * groups..][..groups].copy_from_slice(&state.scales[r * groups..][..groups]);
                        best.held.set_row(rows.format, r, &state.held, r);
                    }
                }
                best
            }
        });
    }
    Ok(best.expect("at least one factor"))
}

/// `tr(E·H·Eᵀ)` of any coded matrix at each of its widths, by what it decodes to.
///
/// # Errors
/// Lengths that differ.
pub fn losses(
    weights: &[f32],
    coded: &CodedMatrix,
    hessian: ArrayView2<'_, f64>,
) -> Result<Vec<WidthLoss>, QuantError> {
    let loss = |&bits: &Bits| {
        let decoded = decode(&coded.prefix(bits)?);
        if decoded.len() != weights.len() {
            return Err(QuantError::Length {
                what: "weights",
                found: weights.len(),
                expected: decoded.len(),
            });
        }
        let error: Vec<f32> = weights.iter().zip(&decoded).map(|(w, d)| w - d).collect();
        Ok(WidthLoss {
            bits,
            loss: weighted_square(&error, hessian)?,
        })
    };
    coded.format.code().prefixes().iter().map(loss).collect()
}

/// `tr(M·H·Mᵀ)` of a matrix `[rows, cols]`, row major.
///
/// # Errors
/// A length that is not a multiple of the Hessian's columns.
pub fn weighted_square(matrix: &[f32], hessian: ArrayView2<'_, f64>) -> Result<f64, QuantError> {
    let cols = hessian.ncols();
    if cols != hessian.nrows() || !matrix.len().is_multiple_of(cols) {
        return Err(QuantError::Length {
            what: "entries (columns of the Hessian)",
            found: matrix.len(),
            expected: cols,
        });
    }
    let blocks: Vec<f64> = matrix
        .par_chunks(BLOCK_ROWS * cols)
        .map(|rows| {
            let m = Array2::from_shape_fn((rows.len() / cols, cols), |(r, c)| f64::from(rows[r * cols + c]));
            m.dot(&hessian).iter().zip(&m).map(|(x, y)| x * y).sum()
        })
        .collect();
    Ok(blocks.iter().sum())
}
