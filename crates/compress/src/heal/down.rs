//! Ridge refit of all last matrices of a layer to one target, jointly: experts that share tokens share an error, so each
//! in turn is fitted to what the others leave (block coordinate descent on the normal equations; reference:
//! moe-compression 7). Law: at rest the gradient is zero in every expert; no sweep raises the fitted objective.

use ndarray::{Array2, ArrayView2, Axis, Slice};
use rayon::prelude::*;

use super::pairs::{Features, ROWS, features, gather, gram, last, root};
use super::{HealOptions, HealTokens, Part, Step};
use crate::Result;

/// What a refit found.
#[derive(Debug, Clone, PartialEq)]
pub struct Healed {
    /// The last matrix of each expert, `[hidden, width]` row major (a constant: `[hidden, 1]`); `None` where there is none.
    /// Where the step was not kept or no token came: as it was.
    pub downs: Vec<Option<Vec<f32>>>,
    pub step: Step,
}

/// Refits every down projection (left factor, constant) to the layer's targets, all together.
///
/// Holds the features of all pairs of token and expert: `tokens · slots · inner` numbers in f32. One Hessian at a time.
///
/// # Errors
/// [`crate::CompressError::Algebra`]: weights or states that are not finite.
///
/// # Panics
/// Rows that do not fit each other.
pub fn heal_down(tokens: &HealTokens<'_>, parts: &[Part<'_>], options: &HealOptions) -> Result<Healed> {
    tokens.check();
    let mut fit = Fit::new(tokens, parts);
    let before = fit.held_out();
    let mut best: Option<(f64, f64, Matrices)> = None;
    let mut keep_best = |fit: &Fit, lambda: f64| {
        let error: f64 = fit.held_out().iter().sum();
        if best.as_ref().is_none_or(|(least, ..)| error < *least) {
            best = Some((error, lambda, fit.now.clone()));
        }
    };
    for &lambda in &options.lambdas {
        fit.sweep(lambda)?;
        keep_best(&fit, lambda);
    }
    if let Some((_, lambda, now)) = best.clone() {
        fit.set(now);
        for _ in 0..options.sweeps {
            fit.sweep(lambda)?;
            let error: f64 = fit.held_out().iter().sum();
            if best.as_ref().is_some_and(|(least, ..)| error < *least) {
                best = Some((error, lambda, fit.now.clone()));
            }
        }
    }
    let lambda = best.as_ref().map(|(_, lambda, _)| *lambda);
    if let Some((.., now)) = best {
        fit.set(now);
    }
    let step = Step::judged("down", &before, &fit.held_out(), fit.held_out_size, options, lambda);
    let chosen = if step.is_kept { fit.now } else { fit.prior };
    #[expect(clippy::cast_possible_truncation, reason = "weights are held in f32")]
    let narrow = |matrix: Array2<f64>| matrix.iter().map(|&w| w as f32).collect();
    Ok(Healed {
        downs: chosen.into_iter().map(|matrix| matrix.map(narrow)).collect(),
        step,
    })
}

/// One for each part, `[hidden, width]`.
type Matrices = Vec<Option<Array2<f64>>>;

/// A fit under way.
struct Fit {
    hidden: usize,
    features: Vec<Option<Features>>,
    /// What is there, and what is found, `[hidden, width]`.
    prior: Vec<Option<Array2<f64>>>,
    now: Vec<Option<Array2<f64>>>,
    /// Target minus what the experts say, times the root of the token's weight, `[tokens, hidden]`.
    residual: Vec<f32>,
    /// Window of each held-out token.
    held_out_window: Vec<Option<usize>>,
    windows: usize,
    /// Σ w‖target‖² of held-out tokens.
    held_out_size: f64,
}

impl Fit {
    fn new(tokens: &HealTokens<'_>, parts: &[Part<'_>]) -> Self {
        let scaled = (tokens.targets.chunks_exact(tokens.hidden))
            .zip(tokens.weights)
            .flat_map(|(row, &weight)| row.iter().map(move |x| x * root(weight)));
        let prior: Vec<Option<Array2<f64>>> = parts.iter().map(last).collect();
        let judges = tokens.window_of().into_iter().zip(tokens.held_out);
        let mut fit = Self {
            hidden: tokens.hidden,
            features: features(tokens, parts),
            now: prior.clone(),
            prior,
            residual: scaled.collect(),
            held_out_window: judges.map(|(window, held)| held.then_some(window)).collect(),
            windows: tokens.windows.len(),
            held_out_size: 0.0,
        };
        fit.held_out_size = fit.held_out().iter().sum();
        for expert in 0..parts.len() {
            if let Some(down) = fit.now[expert].clone() {
                fit.take_away(expert, down.view());
            }
        }
        fit
    }

    /// Each expert once, fitted to what the others leave.
    fn sweep(&mut self, lambda: f64) -> Result<()> {
        for expert in 0..self.features.len() {
            let (Some(features), Some(now), Some(prior)) =
                (&self.features[expert], &self.now[expert], &self.prior[expert])
            else {
                continue;
            };
            let rows = features.rows.slice_axis(Axis(0), Slice::from(..features.fitted));
            let hessian = gram(features.fitted, |from, to| {
                let block = rows.slice_axis(Axis(0), Slice::from(from..to));
                block.t().dot(&block)
            });
            if hessian.is_empty() || hessian.diag().sum() <= 0.0 {
                continue;
            }
            let cross = gram(features.fitted, |from, to| {
                let residual = gather(&self.residual, self.hidden, &features.tokens[from..to]);
                let residual = Array2::from_shape_vec((to - from, self.hidden), residual).expect("a row a token");
                residual.t().dot(&rows.slice_axis(Axis(0), Slice::from(from..to)))
            });
            // What the others leave is the residual with its own part put back.
            let cross = cross + now.dot(&hessian);
            let found = cotk_linalg::ridge(hessian.view(), cross.view(), prior.view(), lambda)?;
            let change = &found - now;
            self.now[expert] = Some(found);
            self.take_away(expert, change.view());
        }
        Ok(())
    }

    /// Goes back to matrices that were found before.
    fn set(&mut self, found: Vec<Option<Array2<f64>>>) {
        for expert in 0..found.len() {
            if let (Some(found), Some(now)) = (&found[expert], &self.now[expert]) {
                let change = found - now;
                self.take_away(expert, change.view());
            }
        }
        self.now = found;
    }

    /// `residual −= features · changeᵀ`.
    fn take_away(&mut self, expert: usize, change: ArrayView2<'_, f64>) {
        let Some(features) = &self.features[expert] else {
            return;
        };
        #[expect(clippy::cast_possible_truncation, reason = "states are f32")]
        let change = change.t().mapv(|w| w as f32);
        let starts: Vec<usize> = (0..features.tokens.len()).step_by(ROWS).collect();
        let blocks: Vec<Array2<f32>> = starts
            .into_par_iter()
            .map(|start| {
                let block = Slice::from(start..(start + ROWS).min(features.tokens.len()));
                features.rows.slice_axis(Axis(0), block).dot(&change)
            })
            .collect();
        let said = blocks.iter().flat_map(|block| block.axis_iter(Axis(0)));
        for (said, &token) in said.zip(&features.tokens) {
            let residual = &mut self.residual[token * self.hidden..][..self.hidden];
            residual.iter_mut().zip(said).for_each(|(r, s)| *r -= s);
        }
    }

    /// Squared error of each held-out window.
    fn held_out(&self) -> Vec<f64> {
        let mut errors = vec![None; self.windows];
        for (row, window) in self.residual.chunks_exact(self.hidden).zip(&self.held_out_window) {
            if let Some(window) = window {
                let square: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
                *errors[*window].get_or_insert(0.0) += square;
            }
        }
        errors.into_iter().flatten().collect()
    }
}
