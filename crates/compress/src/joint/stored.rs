//! One matrix as it will be stored: codes and, where that was chosen, a low-rank correction of what they lose under the
//! Hessian of its inputs (W ≈ Q + A·B; QERA, Zhang et al., 2025). Law: what later stages see is what is stored, factors
//! rounded to 8 bits.

use cotk_container::low_rank::{Factors, Role};
use cotk_container::writer::CodedExpert;
use cotk_model::layers::Mlp;
use cotk_model::layers::linear::Linear;
use cotk_quant::coded::CodedMatrix;
use cotk_quant::decode::decode;
use cotk_quant::gptq::Factor;
use ndarray::{Array2, ArrayView2};

use super::code::times;
use crate::Result;

/// Share of the Hessian's mean diagonal that whitening adds to its diagonal.
const DAMPING: f64 = 1e-4;

/// Codes, and what is added to them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stored {
    pub(crate) coded: CodedMatrix,
    pub(crate) factors: Option<Factors>,
}

impl Stored {
    /// Codes alone, or with a correction of `rank` of what they lose of `weights` `[rows, cols]` under the factor's Hessian.
    ///
    /// # Errors
    /// A Hessian that cannot be whitened; factors that no scale reaches.
    pub(crate) fn corrected(coded: CodedMatrix, weights: &[f32], factor: &Factor, rank: usize) -> Result<Self> {
        if rank == 0 {
            return Ok(Self { coded, factors: None });
        }
        let (rows, cols) = (coded.format.rows(), coded.format.cols());
        let lost = weights
            .iter()
            .zip(full(&coded))
            .map(|(w, q)| f64::from(w - q))
            .collect();
        let lost = Array2::from_shape_vec((rows, cols), lost).expect("a weight for each code");
        let rank = rank.min(rows).min(cols);
        let (left, right) = cotk_linalg::whiten(lost.view(), factor.hessian(), DAMPING)?.factors(rank);
        let factors = Factors::encode(Role::Correction, &narrow(left), &narrow(right), (rows, rank, cols))?;
        Ok(Self {
            coded,
            factors: Some(factors),
        })
    }

    /// What it says, `[rows, cols]`.
    pub(crate) fn decoded(&self) -> Vec<f32> {
        decoded(&self.coded, self.factors.as_ref())
    }
}

/// An expert of stored matrices, its prefixes not measured yet.
pub(crate) fn expert(gate: Stored, up: Stored, down: Stored) -> CodedExpert {
    let mut expert = CodedExpert::new(gate.coded, up.coded, down.coded);
    expert.factors = [gate.factors, up.factors, down.factors];
    expert
}

/// The expert that codes and corrections say.
pub(crate) fn decoded_expert(coded: &CodedExpert) -> Mlp {
    let linear = |m: &CodedMatrix, factors: &Option<Factors>| {
        Linear::new(decoded(m, factors.as_ref()), m.format.rows(), m.format.cols())
    };
    let [gate, up, down] = &coded.factors;
    Mlp {
        gate: linear(&coded.gate, gate),
        up: linear(&coded.up, up),
        down: linear(&coded.down, down),
    }
}

fn decoded(coded: &CodedMatrix, factors: Option<&Factors>) -> Vec<f32> {
    let mut weights = full(coded);
    if let Some(factors) = factors {
        let (rank, cols) = (factors.right.format.rows(), factors.right.format.cols());
        let right = full(&factors.right);
        let right = ArrayView2::from_shape((rank, cols), &right).expect("a factor");
        let turned: Vec<f32> = right.t().iter().copied().collect();
        let product = times(&full(&factors.left), &turned, rank);
        weights.iter_mut().zip(product).for_each(|(w, p)| *w += p);
    }
    weights
}

fn full(coded: &CodedMatrix) -> Vec<f32> {
    let full = coded.format.code().full();
    decode(&coded.prefix(full).expect("a code has its own full width"))
}

#[expect(clippy::cast_possible_truncation, reason = "factors are stored in 8 bits")]
fn narrow(factor: Array2<f64>) -> Vec<f32> {
    factor.iter().map(|&x| x as f32).collect()
}

#[cfg(test)]
mod tests {
    use cotk_quant::code::{Bits, Code};
    use cotk_quant::encode::encode;
    use cotk_quant::gptq::weighted_square;
    use cotk_quant::layout::MatrixFormat;

    use super::*;

    #[test]
    fn a_correction_takes_back_most_of_what_few_bits_lose_along_what_inputs_do() {
        let (rows, cols, rank) = (32, 48, 16);
        let weight = |i: usize| ((i * 7919) % 1000) as f32 / 500.0 - 1.0;
        let weights: Vec<f32> = (0..rows * cols).map(weight).collect();
        // Eight directions carry nearly all of the inputs.
        let hessian = Array2::from_shape_fn((cols, cols), |(i, j)| {
            let own = if i == j { 0.01 } else { 0.0 };
            own + (0..8)
                .map(|k| f64::from(weight(i * 8 + k)) * f64::from(weight(j * 8 + k)))
                .sum::<f64>()
        });
        let factor = Factor::try_new(hessian.view(), 0.01).unwrap();
        let format = MatrixFormat::try_new(rows, cols, Code::Plain(Bits::B2), 32).unwrap();
        let coded = encode(&weights, format).unwrap();
        let loss = |stored: &Stored| {
            let error: Vec<f32> = stored.decoded().iter().zip(&weights).map(|(a, b)| a - b).collect();
            weighted_square(&error, factor.hessian()).unwrap()
        };
        let plain = Stored::corrected(coded.clone(), &weights, &factor, 0).unwrap();
        let corrected = Stored::corrected(coded, &weights, &factor, rank).unwrap();
        assert!(plain.factors.is_none() && corrected.factors.as_ref().unwrap().low_rank().rank() == rank);
        assert!(
            loss(&corrected) < 0.1 * loss(&plain),
            "{} of {}",
            loss(&corrected),
            loss(&plain)
        );
        let whole = expert(corrected.clone(), plain.clone(), plain.clone());
        assert_eq!(*decoded_expert(&whole).gate.weights(), corrected.decoded());
    }
}
