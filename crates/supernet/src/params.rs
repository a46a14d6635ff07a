//! Weights that train: leaves of the autograd graph with their momentum, SGD, and the state that a checkpoint keeps
//! (tch exports none of its optimizers').

use cotk_run::seeds::Seeds;
use cotk_search::Result;
use cotk_search::checkpoint::{Array, State};
use rand::RngExt;
use tch::{Tensor, no_grad};

use crate::train_error;

/// One tensor that trains.
#[derive(Debug)]
pub(crate) struct Param {
    pub(crate) name: String,
    pub(crate) value: Tensor,
    momentum: Tensor,
    decay: Decay,
}

/// Whether weight decay acts: not on normalisation, biases and scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decay {
    Yes,
    No,
}

/// SGD with momentum.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sgd {
    pub(crate) rate: f64,
    pub(crate) momentum: f64,
    pub(crate) weight_decay: f64,
}

/// All parameters of a network, in a fixed order.
#[derive(Debug, Default)]
pub(crate) struct Params(Vec<Param>);

impl Params {
    /// Adds a leaf; returns its index.
    pub(crate) fn add(&mut self, name: String, value: &Tensor, decay: Decay) -> usize {
        let value = value.detach().copy().set_requires_grad(true);
        let momentum = value.zeros_like().set_requires_grad(false);
        self.0.push(Param {
            name,
            value,
            momentum,
            decay,
        });
        self.0.len() - 1
    }

    pub(crate) fn get(&self, index: usize) -> &Tensor {
        &self.0[index].value
    }

    /// Gradients of `loss` in the parameters' order.
    pub(crate) fn gradients(&self, loss: &Tensor) -> Vec<Tensor> {
        let leaves: Vec<&Tensor> = self.0.iter().map(|p| &p.value).collect();
        Tensor::run_backward(&[loss], &leaves, false, false)
    }

    /// `m ← μ·m + g + λ·w; w ← w − rate·m`.
    pub(crate) fn step(&mut self, gradients: &[Tensor], sgd: Sgd) {
        no_grad(|| {
            for (param, gradient) in self.0.iter_mut().zip(gradients) {
                let _ = param.momentum.multiply_scalar_(sgd.momentum);
                param.momentum += gradient;
                if param.decay == Decay::Yes && sgd.weight_decay > 0.0 {
                    param.momentum += &param.value * sgd.weight_decay;
                }
                param.value -= &param.momentum * sgd.rate;
            }
        });
    }

    /// Changes one value in place, outside of autograd.
    pub(crate) fn adjust(&mut self, index: usize, change: impl FnOnce(&mut Tensor)) {
        no_grad(|| change(&mut self.0[index].value));
    }

    /// Values and momenta by name.
    pub(crate) fn state(&self) -> State {
        let entries = self.0.iter().flat_map(|p| {
            [
                (p.name.clone(), array(&p.value)),
                (format!("momentum.{}", p.name), array(&p.momentum)),
            ]
        });
        entries.collect()
    }

    /// Inverse of [`Params::state`].
    pub(crate) fn load(&mut self, state: &State) -> Result<()> {
        no_grad(|| {
            for param in &mut self.0 {
                restore(&mut param.value, &param.name, state)?;
                restore(&mut param.momentum, &format!("momentum.{}", param.name), state)?;
            }
            Ok(())
        })
    }
}

/// A tensor's values, row major.
pub(crate) fn array(tensor: &Tensor) -> Array {
    Array {
        shape: tensor
            .size()
            .iter()
            .map(|&d| usize::try_from(d).expect("sizes are not negative"))
            .collect(),
        values: floats(tensor),
    }
}

/// The same without the shape.
pub(crate) fn floats(tensor: &Tensor) -> Vec<f32> {
    let flat = tensor.detach().contiguous().view([-1]);
    let mut values = vec![0f32; flat.numel()];
    flat.copy_data(&mut values, flat.numel());
    values
}

/// Copies `state[name]` into an existing tensor of its shape.
pub(crate) fn restore(tensor: &mut Tensor, name: &str, state: &State) -> Result<()> {
    let array = state
        .get(name)
        .ok_or_else(|| train_error(format!("the checkpoint has no tensor `{name}`")))?;
    let shape: Vec<i64> = array
        .shape
        .iter()
        .map(|&d| i64::try_from(d).unwrap_or(i64::MAX))
        .collect();
    if shape != tensor.size() {
        return Err(train_error(format!(
            "tensor `{name}` of the checkpoint has shape {shape:?}, expected {:?}",
            tensor.size()
        )));
    }
    let values = Tensor::from_slice(&array.values).view(shape.as_slice());
    no_grad(|| tensor.copy_(&values));
    Ok(())
}

/// Normal values of deviation `deviation` from the stream of `purpose`: not from libtorch, whose generator has no state
/// that could be kept.
pub(crate) fn normal(seeds: Seeds, purpose: &str, shape: &[i64], deviation: f64) -> Tensor {
    let mut stream = seeds.stream(purpose);
    let count = usize::try_from(shape.iter().product::<i64>()).expect("sizes are not negative");
    let values: Vec<f32> = (0..count)
        .map(|_| {
            // Box and Muller, 1958; the first uniform is never 0.
            let (u, v): (f64, f64) = (1.0 - stream.random::<f64>(), stream.random());
            #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
            let value = (deviation * (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32;
            value
        })
        .collect();
    Tensor::from_slice(&values).view(shape)
}
