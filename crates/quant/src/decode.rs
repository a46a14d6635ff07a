//! Codes back to weights, and what a prefix loses: the plain reference of every kernel.

use crate::QuantError;
use crate::coded::Prefix;

/// The weights `[rows, cols]`, row major, at the prefix's width: `scale · cell · (u − zero_point)`.
pub fn decode(prefix: &Prefix<'_>) -> Vec<f32> {
    let format = prefix.format();
    let mut weights = Vec::with_capacity(format.rows() * format.cols());
    for row in 0..format.rows() {
        for col in 0..format.cols() {
            let scale = prefix.scale_at(row, col / format.group()) * prefix.cell();
            weights.push(scale * (f32::from(prefix.code_at(row, col)) - prefix.zero_point()));
        }
    }
    weights
}

/// What a width loses, over all weights of a matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrefixError {
    /// `‖ŵ − w‖ / ‖w‖`; 0 where all weights are 0 and decode to 0.
    pub delta: f64,
    /// `‖ŵ‖ / ‖w‖`; 1 where both are 0.
    pub rho: f64,
    /// Mean of `ŵ − w`, in the weights' own unit.
    pub mean: f64,
}

/// Error of one width against the weights `[rows, cols]` that were coded.
///
/// # Errors
/// `weights` has another length than the format.
pub fn prefix_error(weights: &[f32], prefix: &Prefix<'_>) -> Result<PrefixError, QuantError> {
    let decoded = decode(prefix);
    if weights.len() != decoded.len() {
        return Err(QuantError::Length {
            what: "weights",
            found: weights.len(),
            expected: decoded.len(),
        });
    }
    let (mut lost, mut kept, mut whole, mut sum) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
    for (&w, &d) in weights.iter().zip(&decoded) {
        let (w, d) = (f64::from(w), f64::from(d));
        lost += (d - w) * (d - w);
        kept += d * d;
        whole += w * w;
        sum += d - w;
    }
    let ratio = |x: f64, same: f64| if x == whole { same } else { (x / whole).sqrt() };
    #[expect(clippy::cast_precision_loss, reason = "a mean")]
    let mean = sum / decoded.len() as f64;
    Ok(PrefixError {
        delta: if lost == 0.0 { 0.0 } else { (lost / whole).sqrt() },
        rho: ratio(kept, 1.0),
        mean,
    })
}
