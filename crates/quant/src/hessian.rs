//! Second moments of what a matrix sees: summed over tokens in a fixed order, shrunk where tokens are few.
//!
//! Which tokens and weights is the caller's: [`routed_weight`] for those that were routed, [`soft_weight`] for those
//! that might have been. Laws: batches and threads change no bit; shrinking leaves the trace; without tokens the target
//! is all there is.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2};

use crate::QuantError;

/// Tokens whose products are summed in f32 before they join the f64 sums: relative error below 256 · 2⁻²⁴ = 2e-5 of
/// the absolute sums, the mean of many such far below.
const BLOCK_TOKENS: usize = 256;

/// What a token counts that the router sent here: the square of its gate, since the error of an expert reaches the
/// layer's output times the gate (affinity guidance: MoEQuant, 2025).
pub fn routed_weight(gate: f32) -> f64 {
    f64::from(gate) * f64::from(gate)
}

/// What a token counts that the router gave this expert the score `score` and sent elsewhere: `η²·score²`.
pub fn soft_weight(eta: f64, score: f32) -> f64 {
    (eta * f64::from(score)).powi(2)
}

/// Sums `w · x · xᵀ` token by token.
#[derive(Debug, Clone)]
pub struct Accumulator {
    cols: usize,
    /// Rows times the square root of their weight, `[tokens below a block, cols]`.
    waiting: Vec<f32>,
    sums: Array2<f64>,
    tokens: u64,
    weight: f64,
    weight_squares: f64,
    /// `Σ w²·‖x‖⁴`.
    fourth: f64,
}

/// Second moments `[cols, cols]` and how much stands behind them.
#[derive(Debug, Clone, PartialEq)]
pub struct Moment {
    /// `Σ w·x·xᵀ / Σ w`, symmetric; zeros without tokens.
    pub second: Array2<f64>,
    /// Tokens with a weight above 0.
    pub tokens: u64,
    /// `Σ w`.
    pub weight: f64,
    /// `(Σ w)² / Σ w²`: equal weights would need as many.
    pub effective_tokens: f64,
    /// `Σ w²·‖x‖⁴ / (Σ w)²`.
    fourth: f64,
}

impl Accumulator {
    /// Nothing seen yet.
    pub fn new(cols: usize) -> Self {
        Self {
            cols,
            waiting: Vec::new(),
            sums: Array2::zeros((cols, cols)),
            tokens: 0,
            weight: 0.0,
            weight_squares: 0.0,
            fourth: 0.0,
        }
    }

    /// Adds `rows` `[tokens, cols]` with one weight each; a weight of 0 leaves its token out.
    ///
    /// # Errors
    /// Lengths that do not fit, a weight that is negative or not finite, an input that is not finite.
    pub fn add(&mut self, rows: &[f32], weights: &[f64]) -> Result<(), QuantError> {
        if rows.len() != weights.len() * self.cols {
            return Err(QuantError::Length {
                what: "inputs",
                found: rows.len(),
                expected: weights.len() * self.cols,
            });
        }
        for (token, (row, &weight)) in rows.chunks_exact(self.cols.max(1)).zip(weights).enumerate() {
            if !weight.is_finite() || weight < 0.0 {
                return Err(QuantError::Weight {
                    what: format!("the weight of token {token}"),
                    found: weight,
                });
            }
            if let Some(col) = row.iter().position(|x| !x.is_finite()) {
                return Err(QuantError::Input {
                    token,
                    col,
                    value: row[col],
                });
            }
            if weight == 0.0 {
                continue;
            }
            let square: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            self.tokens += 1;
            self.weight += weight;
            self.weight_squares += weight * weight;
            self.fourth += weight * weight * square * square;
            #[expect(clippy::cast_possible_truncation, reason = "inputs are f32")]
            let root = weight.sqrt() as f32;
            self.waiting.extend(row.iter().map(|x| x * root));
            if self.waiting.len() == BLOCK_TOKENS * self.cols {
                self.merge();
            }
        }
        Ok(())
    }

    fn merge(&mut self) {
        let rows = self.waiting.len() / self.cols.max(1);
        let x = ArrayView2::from_shape((rows, self.cols), &self.waiting).expect("whole rows");
        let mut products = Array2::<f32>::zeros((self.cols, self.cols));
        general_mat_mul(1.0, &x.t(), &x, 0.0, &mut products);
        self.sums.zip_mut_with(&products, |sum, p| *sum += f64::from(*p));
        self.waiting.clear();
    }

    /// What was seen.
    pub fn finish(mut self) -> Moment {
        if !self.waiting.is_empty() {
            self.merge();
        }
        let per_weight = if self.weight > 0.0 { 1.0 / self.weight } else { 0.0 };
        // Products of one pair are the same either way round, their sums need not be in the last bit.
        let second = Array2::from_shape_fn(self.sums.dim(), |(i, j)| {
            (self.sums[[i, j]] + self.sums[[j, i]]) * 0.5 * per_weight
        });
        Moment {
            second,
            tokens: self.tokens,
            weight: self.weight,
            effective_tokens: self.weight * self.weight / self.weight_squares.max(f64::MIN_POSITIVE),
            fourth: self.fourth * per_weight * per_weight,
        }
    }
}

/// A Hessian that may lean on another.
#[derive(Debug, Clone, PartialEq)]
pub struct Shrunk {
    /// `(1 − λ)·own + λ·target`, the target scaled to the own trace.
    pub hessian: Array2<f64>,
    /// λ: 0 where the tokens suffice, 1 where there are none (or one, whose spread nobody knows).
    pub lambda: f64,
}

/// Shrinks a moment towards `target` (gate and up: all tokens of the layer; down: the expert's own inner state on
/// tokens that it was not sent, since those of other experts are nothing like it) by the rule of Ledoit and Wolf (2004)
/// with that target and weighted tokens: `λ = b²/c²`, b² the variance of the own moment's entries, c² its squared
/// distance from the target. `lambda_scale` multiplies λ (1: as derived).
///
/// # Errors
/// Sizes that differ, a scale that is negative or not finite.
pub fn shrink(own: &Moment, target: ArrayView2<'_, f64>, lambda_scale: f64) -> Result<Shrunk, QuantError> {
    if own.second.dim() != target.dim() {
        return Err(QuantError::Length {
            what: "columns of the target Hessian",
            found: target.ncols(),
            expected: own.second.ncols(),
        });
    }
    if !lambda_scale.is_finite() || lambda_scale < 0.0 {
        return Err(QuantError::Weight {
            what: "the scale of lambda".to_owned(),
            found: lambda_scale,
        });
    }
    let (trace, target_trace) = (own.second.diag().sum(), target.diag().sum());
    if own.tokens == 0 || trace <= 0.0 {
        return Ok(Shrunk {
            hessian: target.to_owned(),
            lambda: 1.0,
        });
    }
    if target_trace <= 0.0 {
        return Ok(Shrunk {
            hessian: own.second.clone(),
            lambda: 0.0,
        });
    }
    let scale = trace / target_trace;
    let squares: f64 = own.second.iter().map(|x| x * x).sum();
    let distance: f64 = own
        .second
        .iter()
        .zip(target)
        .map(|(s, t)| (s - scale * t).powi(2))
        .sum();
    let n = own.effective_tokens;
    // The sample variance loses one token to the mean that it is taken around: with one token it is unknown.
    let variance = (own.fourth - squares / n).max(0.0) * n / (n - 1.0);
    let lambda = if own.tokens < 2 || !variance.is_finite() {
        1.0
    } else if distance > 0.0 {
        (lambda_scale * variance / distance).min(1.0)
    } else {
        0.0
    };
    let mix = |s: f64, t: f64| (1.0 - lambda) * s + lambda * scale * t;
    Ok(Shrunk {
        hessian: Array2::from_shape_fn(own.second.dim(), |at| mix(own.second[at], target[at])),
        lambda,
    })
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// Inputs whose columns differ in size, `[tokens, cols]`, and weights.
    fn inputs(tokens: usize, cols: usize, seed: u64) -> (Vec<f32>, Vec<f64>) {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let x = (0..tokens * cols)
            .map(|i| rng.random_range(-1.0f32..1.0) * (1.0 + (i % cols) as f32))
            .collect();
        (x, (0..tokens).map(|_| rng.random_range(0.01f64..1.0)).collect())
    }

    fn moment(x: &[f32], w: &[f64]) -> Moment {
        let mut sum = Accumulator::new(x.len() / w.len());
        sum.add(x, w).unwrap();
        sum.finish()
    }

    #[test]
    fn sums_are_those_of_loops() {
        let (x, w) = inputs(600, 5, 1);
        let found = moment(&x, &w);
        let all: f64 = w.iter().sum();
        for i in 0..5 {
            for j in 0..5 {
                let direct: f64 = w
                    .iter()
                    .enumerate()
                    .map(|(t, w)| w * f64::from(x[t * 5 + i]) * f64::from(x[t * 5 + j]))
                    .sum();
                assert!((found.second[[i, j]] - direct / all).abs() < 1e-4, "{i} {j}");
                assert_eq!(found.second[[i, j]], found.second[[j, i]]);
            }
        }
        let squares: f64 = w.iter().map(|w| w * w).sum();
        assert_eq!((found.tokens, found.effective_tokens), (600, all * all / squares));
        assert_eq!(
            (routed_weight(0.5), soft_weight(0.1, 0.5)),
            (0.25, (0.1f64 * 0.5).powi(2))
        );
    }

    #[test]
    fn batches_change_no_bit_and_weights_of_zero_leave_tokens_out() {
        let (x, mut w) = inputs(700, 3, 2);
        w[100] = 0.0;
        let whole = moment(&x, &w);
        let mut parts = Accumulator::new(3);
        let mut from = 0;
        for size in [1, 255, 0, 300, 144] {
            parts
                .add(&x[from * 3..(from + size) * 3], &w[from..from + size])
                .unwrap();
            from += size;
        }
        assert_eq!(parts.finish(), whole);
        assert_eq!(whole.tokens, 699);
    }

    #[test]
    fn starved_experts_lean_on_the_pool_and_fed_ones_do_not() {
        let (x, w) = inputs(20_000, 6, 3);
        let pool = moment(&x, &w);
        // A target that is wrong for this expert.
        let foreign = Array2::<f64>::eye(6);
        let lambda = |tokens: usize, target: &Array2<f64>| {
            let own = if tokens == 0 {
                Accumulator::new(6).finish()
            } else {
                moment(&x[..tokens * 6], &w[..tokens])
            };
            let shrunk = shrink(&own, target.view(), 1.0).unwrap();
            let trace = if tokens == 0 {
                target.diag().sum()
            } else {
                own.second.diag().sum()
            };
            assert!((shrunk.hessian.diag().sum() / trace - 1.0).abs() < 1e-9);
            shrunk.lambda
        };
        assert_eq!((lambda(0, &foreign), lambda(1, &foreign)), (1.0, 1.0));
        let few: Vec<f64> = [2, 20, 200, 2000].into_iter().map(|n| lambda(n, &foreign)).collect();
        assert!(few.windows(2).all(|p| p[1] < p[0]) && few[3] < 0.01, "{few:?}");
        assert!(lambda(20, &pool.second) > few[1]);
    }

    /// λ as derived is near the one that comes nearest to the truth.
    #[test]
    fn lambda_is_near_the_best_there_is() {
        let (x, w) = inputs(20_000, 8, 4);
        let truth = moment(&x, &w).second;
        let target = Array2::from_diag(&truth.diag().mapv(|d| d.powf(0.7)));
        let (mut derived, mut best, mut none) = (0.0, 0.0, 0.0);
        for part in 0..100 {
            let own = moment(&x[part * 120 * 8..][..12 * 8], &w[part * 120..][..12]);
            let at = |scale: f64| {
                let h = shrink(&own, target.view(), scale).unwrap().hessian;
                (&h - &truth).iter().map(|d| d * d).sum::<f64>()
            };
            let tried = (0..=40).map(|i| at(f64::from(i) * 0.1));
            derived += at(1.0);
            none += at(0.0);
            best += tried.min_by(f64::total_cmp).unwrap();
        }
        // The best is chosen with the truth in sight.
        assert!(derived < 0.75 * none && derived < 1.5 * best, "{derived} {best} {none}");
    }

    #[test]
    fn nonsense_is_named() {
        let mut sum = Accumulator::new(2);
        assert!(sum.add(&[1.0], &[1.0]).is_err());
        for (x, w, expect) in [
            (1.0, -1.0, "the weight of token 0 is -1"),
            (1.0, f64::NAN, "the weight of token 0 is NaN"),
            (f32::NAN, 1.0, "input of token 0, column 1 is NaN"),
        ] {
            assert!(sum.add(&[0.0, x], &[w]).unwrap_err().to_string().starts_with(expect));
        }
        let own = sum.finish();
        assert!(shrink(&own, Array2::eye(3).view(), 1.0).is_err());
        assert!(shrink(&own, Array2::eye(2).view(), -1.0).is_err());
        assert_eq!(shrink(&own, Array2::eye(2).view(), 1.0).unwrap().lambda, 1.0);
    }
}
