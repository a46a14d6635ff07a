//! The gated MLP of dense layers, shared experts and uncoded routed ones: `down(silu(gate(x)) · up(x))`. Where all three
//! matrices are codes it runs as a routed expert does, the middle in 8 bit; else in f32.

use std::cell::RefCell;

use cotk_kernels::cpu::activations::Activations;
use cotk_kernels::cpu::expert::{self, Expert, ExpertScratch};
use cotk_kernels::cpu::gemm::Threads;

use super::linear::{DenseForm, Linear, apply_all, isa, with_scratch};
use crate::checkpoint::{CheckpointError, TensorSource};
use crate::families::Matrix;

/// Rows of one pass over f32 or 16-bit weights: bounds what stands between the projections.
const MLP_ROWS: usize = 256;
/// `down(silu(gate(x)) · up(x))`.
#[derive(Debug, Clone)]
pub struct Mlp {
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

thread_local! {
    static CODES: RefCell<(Activations, ExpertScratch)> = RefCell::default();
    static MIDDLE: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

impl Mlp {
    pub(super) fn load(
        source: &dyn TensorSource,
        hidden: usize,
        intermediate: usize,
        name: impl Fn(Matrix) -> String,
    ) -> Result<Self, CheckpointError> {
        let load = |matrix: Matrix| Linear::load(source, &name(matrix), matrix.shape(hidden, intermediate));
        Ok(Self {
            gate: load(Matrix::Gate)?,
            up: load(Matrix::Up)?,
            down: load(Matrix::Down)?,
        })
    }

    /// Whether it runs as one expert of codes.
    pub fn is_coded(&self) -> bool {
        [&self.gate, &self.up, &self.down]
            .iter()
            .all(|linear| matches!(linear.form(), DenseForm::Coded { .. }))
    }

    /// Bytes of its weights as held.
    pub fn bytes(&self) -> u64 {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }

    /// `x` is `[rows, hidden]`; returns `[rows, hidden]`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len() / self.gate.inputs() * self.down.outputs()];
        self.apply_to(x, &mut out);
        out
    }

    /// [`apply`](Self::apply) into `out` `[rows, hidden]`, which is overwritten. Nothing is allocated for a few rows once a
    /// thread has seen the like.
    ///
    /// # Panics
    /// Lengths that are not whole rows.
    pub fn apply_to(&self, x: &[f32], out: &mut [f32]) {
        let (width, inner) = (self.gate.inputs(), self.gate.outputs());
        if x.is_empty() {
            return;
        }
        if let (Some(gate), Some(up), Some(down)) = (self.gate.codes(), self.up.codes(), self.down.codes()) {
            let whole = cotk_kernels::cpu::weights::Matrix::Whole;
            let expert = Expert::try_new(whole(gate), whole(up), whole(down)).expect("shapes of one MLP");
            with_scratch(&CODES, |(acts, scratch)| {
                acts.quantize_on(isa(), x, width, Threads::Pool);
                expert::forward(isa(), &expert, acts, out, scratch, Threads::Pool);
            });
            return;
        }
        let chunks = x.chunks(MLP_ROWS * width);
        for (x, out) in chunks.zip(out.chunks_mut(MLP_ROWS * self.down.outputs())) {
            with_scratch(&MIDDLE, |[gate, up]| {
                let length = x.len() / width * inner;
                gate.resize(length, 0.0);
                up.resize(length, 0.0);
                apply_all(x, [(&self.gate, &mut *gate), (&self.up, &mut *up)]);
                for (gate, up) in gate.iter_mut().zip(&*up) {
                    *gate = silu(*gate) * up;
                }
                self.down.apply_to(gate, out);
            });
        }
    }
}

/// x · sigmoid(x).
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// 1 / (1 + exp(−x)).
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use cotk_container::dense::code_matrix;
    use cotk_kernels::cpu::team::Team;

    use super::*;

    fn draw(count: usize, salt: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 7 + salt * 13) as f32 * 0.37).sin() * 0.3)
            .collect()
    }

    /// Law: as codes it is the MLP of the codes' weights, up to rounding activations, and the same on any team.
    #[test]
    fn codes_equal_their_weights_in_f32() {
        let (hidden, inner) = (70, 100);
        let shapes = [(inner, hidden), (inner, hidden), (hidden, inner)];
        let linears: Vec<Linear> = shapes
            .iter()
            .enumerate()
            .map(|(salt, &(rows, cols))| {
                let (matrix, plane) = code_matrix(&draw(rows * cols, salt), rows, cols, 8).unwrap();
                Linear::coded(matrix, plane).unwrap()
            })
            .collect();
        let plain = |linear: &Linear| Linear::new(linear.weights().into_owned(), linear.outputs(), linear.inputs());
        let mlp = |of: &dyn Fn(&Linear) -> Linear| Mlp {
            gate: of(&linears[0]),
            up: of(&linears[1]),
            down: of(&linears[2]),
        };
        let (coded, plain) = (mlp(&Clone::clone), mlp(&plain));
        assert!(coded.is_coded() && !plain.is_coded() && coded.bytes() < plain.bytes() / 2);
        for rows in [0, 1, 3, 40] {
            let x = draw(rows * hidden, 9);
            let (found, truth) = (coded.apply(&x), plain.apply(&x));
            let size = truth.iter().map(|t| t * t).sum::<f32>().sqrt();
            let error = found
                .iter()
                .zip(&truth)
                .map(|(a, b)| (a - b) * (a - b))
                .sum::<f32>()
                .sqrt();
            assert!(error <= 0.02 * size, "{error} of {size}");
            assert_eq!(Team::new(3).install(|| coded.apply(&x)), found);
            assert_eq!(Team::new(3).install(|| plain.apply(&x)), truth);
        }
    }
}
