//! Constants in the place of dropped experts (novices; MoNE): the mean of what an expert answered, over a sample of the
//! tokens that come to it, each counted by its squared gate (reference: moe-compression 7). Law: no constant of its form loses less on
//! those tokens.

use cotk_container::writer::{CodedExpert, Constant};
use cotk_run::units::ExpertId;
use rayon::prelude::*;

use crate::layer::LayerView;
use crate::{CompressError, Result};

/// For each expert that is not in `kept` the mean of its answers times `gain`; zeros where no token came.
///
/// # Errors
/// Weights that cannot be read; a mean that f16 does not reach.
pub(crate) fn constants(
    view: &LayerView<'_>,
    kept: &[Option<CodedExpert>],
    gain: f32,
) -> Result<Vec<Option<Constant>>> {
    let one = |expert: ExpertId| -> Result<Option<Constant>> {
        if kept[expert.index()].is_some() {
            return Ok(None);
        }
        let sample = view.samples.routed(expert);
        let answers = view.weights(expert)?.apply(&sample.rows);
        let mean = mean(&answers, &sample.gates, view.spec.hidden);
        let scaled: Vec<f32> = mean.iter().map(|value| value * gain).collect();
        let constant = Constant::new(&scaled).map_err(|source| CompressError::Weights {
            file: view.source.file("").to_owned(),
            layer: view.layer,
            expert,
            matrix: "the constant",
            source,
        })?;
        Ok(Some(constant))
    };
    view.experts().into_par_iter().map(one).collect()
}

/// `Σ g² y / Σ g²`: `answers` `[tokens, hidden]`, `gates` `[tokens]`.
fn mean(answers: &[f32], gates: &[f32], hidden: usize) -> Vec<f32> {
    let mut sums = vec![0.0f64; hidden];
    let mut weight = 0.0f64;
    for (row, &gate) in answers.chunks_exact(hidden).zip(gates) {
        let squared = f64::from(gate) * f64::from(gate);
        weight += squared;
        sums.iter_mut()
            .zip(row)
            .for_each(|(sum, &y)| *sum += squared * f64::from(y));
    }
    #[expect(clippy::cast_possible_truncation, reason = "a mean of f32")]
    let of = |sum: f64| if weight > 0.0 { (sum / weight) as f32 } else { 0.0 };
    sums.into_iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_other_constant_loses_less_on_the_tokens_that_came() {
        let (answers, gates) = ([1.0, -2.0, 3.0, 0.5, -1.0, 4.0], [0.5, 0.25, 1.0]);
        let best = mean(&answers, &gates, 2);
        let loss = |constant: &[f32]| -> f64 {
            let rows = answers.chunks_exact(2).zip(&gates);
            let of = |(row, gate): (&[f32], &f32)| {
                let square: f32 = row.iter().zip(constant).map(|(y, c)| (y - c) * (y - c)).sum();
                f64::from(gate * gate * square)
            };
            rows.map(of).sum()
        };
        for (at, step) in [(0, 0.01), (0, -0.01), (1, 0.01), (1, -0.01)] {
            let mut other = best.clone();
            other[at] += step;
            assert!(loss(&other) > loss(&best));
        }
        assert_eq!(mean(&[], &[], 2), [0.0, 0.0]);
    }
}
