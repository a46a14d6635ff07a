//! One point alone, with weights of its own: fake-quantized training with learned weight scales, measured activation
//! ranges, normalisation folded at export. Law: what it evaluates is what ONNX Runtime computes from its export, within
//! one code a layer.
//!
//! Per-output-channel symmetric codes commute with the channel's normalisation scale, sign included, so training needs
//! no folding: codes come from the unfolded weights, the scale takes the factor.

use std::cell::RefCell;
use std::collections::BTreeMap;

use cotk_data::loader::Batch;
use cotk_search::Result;
use cotk_search::checkpoint::{Array, State};
use cotk_search::export::{Folded, FoldedLayer, FoldedMatrix};
use cotk_search::space::{Form, Point, Range, Space, Step};
use cotk_search::trainable::{Score, Subnet as SubnetTrait};
use tch::{Tensor, no_grad};

use crate::forward::{EPSILON, Layers, Norm, Statistics, forward, loss, normalise, score};
use crate::ladder::{best_scale, max_code};
use crate::params::{Decay, Params, Sgd, array, floats, restore};
use crate::supernet::{ConvParams, Settings, Supernet};
use crate::{tensors, train_error};

/// A channel whose normalisation factor is below this is exported as its bias alone: its contribution lies far below one
/// code, and its scale would push the bias out of 32 bits.
const DEAD: f32 = 1e-6;

/// A cut-out network.
pub(crate) struct Subnet {
    space: Space,
    point: Point,
    settings: Settings,
    form: Form,
    params: Params,
    convs: Vec<ConvParams>,
    /// Weight scales, one tensor `[cout]` per slot and one for the classifier; empty in f32.
    scales: Vec<usize>,
    head: (usize, usize),
    statistics: Vec<Statistics>,
    /// Largest magnitude seen at each node; empty before [`SubnetTrait::settle`] and in f32.
    ranges: Vec<f32>,
    /// While ranges are being measured.
    observed: RefCell<Option<Vec<f32>>>,
}

impl Subnet {
    pub(crate) fn new(net: &Supernet, point: &Point, form: Form) -> Self {
        let space = net.space();
        let mut params = Params::default();
        let mut convs = Vec::new();
        let mut scales = Vec::new();
        for (at, slot) in space.slots().iter().enumerate() {
            let [weight, gamma, beta] = net.slot_values(at, point);
            let name = &slot.name;
            let weight = weight.contiguous();
            convs.push(ConvParams {
                weight: params.add(format!("{name}.weight"), &weight, Decay::Yes),
                gamma: params.add(format!("{name}.gamma"), &gamma, Decay::No),
                beta: params.add(format!("{name}.beta"), &beta, Decay::No),
            });
            if form == Form::Int8 {
                let fitted = fit(&weight, space.weight_bits(slot, point));
                scales.push(params.add(format!("{name}.scale"), &fitted, Decay::No));
            }
        }
        let (weight, bias) = net.head_values();
        let head = (
            params.add("head.weight".into(), weight, Decay::Yes),
            params.add("head.bias".into(), bias, Decay::No),
        );
        if form == Form::Int8 {
            scales.push(params.add("head.scale".into(), &fit(weight, 8), Decay::No));
        }
        Self {
            point: point.clone(),
            settings: net.settings(),
            form,
            params,
            convs,
            scales,
            head,
            statistics: space.slots().iter().map(|s| Statistics::new(s.cout)).collect(),
            ranges: Vec::new(),
            observed: RefCell::new(None),
            space: space.clone(),
        }
    }

    fn batch(&self, batch: &Batch) -> (Tensor, Tensor) {
        let shape = self.space.input();
        tensors(batch, shape.channels, shape.height, shape.width)
    }

    /// Bits of the weights of slot `at`; past the last slot, of the classifier.
    fn bits(&self, at: usize) -> u32 {
        let slot = self.space.slots().get(at);
        slot.map_or(8, |slot| self.space.weight_bits(slot, &self.point))
    }

    /// Weights as they will be coded, with gradients to weights and scales ("Learned Step Size Quantization", 2020).
    fn coded(&self, at: usize, weight: &Tensor) -> Tensor {
        let Some(&scale) = self.scales.get(at) else {
            return weight.shallow_clone();
        };
        let scale = self.params.get(scale);
        let most = i64::from(max_code(self.bits(at)));
        let per_channel = weight.numel() as f64 / scale.numel() as f64;
        let factor = 1.0 / (per_channel * most as f64).sqrt();
        let zero = scale.zeros_like().set_requires_grad(false);
        weight.internal_fake_quantize_learnable_per_channel_affine(scale, &zero, 0, -most, most, factor)
    }

    /// The quantization of each node's output, from the measured ranges.
    fn outputs(&self) -> Vec<Range> {
        let signed = signed_nodes(&self.space);
        let quant = |(&range, signed): (&f32, bool)| {
            let range = range.max(1e-6);
            if signed {
                Range {
                    scale: range / 127.0,
                    zero_point: 128,
                }
            } else {
                Range {
                    scale: range / 255.0,
                    zero_point: 0,
                }
            }
        };
        self.ranges.iter().zip(signed).map(quant).collect()
    }

    /// Folded weights of slot `at`.
    fn layer(&self, at: usize) -> FoldedLayer {
        let conv = self.convs[at];
        let [gamma, beta] = [conv.gamma, conv.beta].map(|i| floats(self.params.get(i)));
        let (mean, variance) = (floats(&self.statistics[at].mean), floats(&self.statistics[at].variance));
        #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
        let factors: Vec<f32> = gamma
            .iter()
            .zip(&variance)
            .map(|(&g, &v)| (f64::from(g) / (f64::from(v) + EPSILON).sqrt()) as f32)
            .collect();
        let bias = (0..factors.len()).map(|c| beta[c] - mean[c] * factors[c]).collect();
        let weight = floats(self.params.get(conv.weight));
        FoldedLayer {
            matrix: self.matrix(at, &weight, &factors),
            bias,
        }
    }

    /// Codes or values of one layer, output channel `c` times `factors[c]`.
    fn matrix(&self, at: usize, weight: &[f32], factors: &[f32]) -> FoldedMatrix {
        let per_channel = weight.len() / factors.len();
        let rows = weight.chunks_exact(per_channel).zip(factors);
        let Some(&scale) = self.scales.get(at) else {
            return FoldedMatrix::F32(rows.flat_map(|(row, &k)| row.iter().map(move |w| w * k)).collect());
        };
        let most = max_code(self.bits(at)) as f32;
        let (mut codes, mut scales) = (Vec::with_capacity(weight.len()), Vec::with_capacity(factors.len()));
        for ((row, &factor), scale) in rows.zip(floats(self.params.get(scale))) {
            let is_dead = factor.abs() < DEAD;
            // As the training kernel rounds: times the reciprocal.
            let inverse = 1.0 / scale;
            #[expect(clippy::cast_possible_truncation, reason = "clamped to ±127")]
            codes.extend(row.iter().map(|w| {
                let code = (w * inverse).round_ties_even().clamp(-most, most);
                if is_dead {
                    0
                } else {
                    code.copysign(code * factor.signum()) as i8
                }
            }));
            scales.push(if is_dead { 1.0 } else { scale * factor.abs() });
        }
        FoldedMatrix::Int { codes, scales }
    }
}

/// Which nodes can be negative: second convolutions of blocks, before their sum.
fn signed_nodes(space: &Space) -> Vec<bool> {
    let mut signed = Vec::new();
    for step in space.steps() {
        match *step {
            Step::Conv(slot) => signed.push(!space.slots()[slot].relu),
            Step::Block { .. } => signed.extend([false, true, false]),
        }
    }
    signed.push(false);
    signed
}

/// Scales with least squared error, one per output channel.
fn fit(weight: &Tensor, bits: u32) -> Tensor {
    let values = floats(weight);
    let channels = usize::try_from(weight.size()[0]).expect("sizes are not negative");
    let rows = values.chunks_exact(values.len() / channels);
    Tensor::from_slice(&rows.map(|row| best_scale(row, bits)).collect::<Vec<f32>>())
}

impl Layers for Subnet {
    fn conv(&self, at: usize, x: &Tensor, norm: Norm) -> Tensor {
        let (slot, conv) = (&self.space.slots()[at], self.convs[at]);
        let weight = self.coded(at, self.params.get(conv.weight));
        let (stride, pad) = (i64::from(slot.stride), weight.size()[2] / 2);
        let y = x.conv2d::<&Tensor>(&weight, None, [stride; 2], [pad; 2], [1; 2], 1);
        let (gamma, beta) = (self.params.get(conv.gamma), self.params.get(conv.beta));
        normalise(&y, gamma, beta, &self.statistics[at], norm)
    }

    fn node(&self, index: usize, x: Tensor) -> Tensor {
        if let Some(observed) = self.observed.borrow_mut().as_mut() {
            #[expect(clippy::cast_possible_truncation, reason = "it was an f32")]
            let largest = x.abs().max().double_value(&[]) as f32;
            observed[index] = observed[index].max(largest);
            return x;
        }
        if self.ranges.is_empty() {
            return x;
        }
        let quant = self.outputs()[index];
        let (scale, zero) = (f64::from(quant.scale), f64::from(quant.zero_point));
        let mut clipped = x.clamp(-zero * scale, (255.0 - zero) * scale);
        no_grad(|| {
            // In place: clamp's backward needs its input alone.
            let _ = clipped.divide_scalar_(scale);
            let _ = clipped.round_();
            let _ = clipped.multiply_scalar_(scale);
        });
        clipped
    }

    fn head(&self, x: &Tensor) -> Tensor {
        let weight = self.coded(self.convs.len(), self.params.get(self.head.0));
        x.linear(&weight, Some(self.params.get(self.head.1)))
    }
}

impl SubnetTrait for Subnet {
    fn step(&mut self, batch: &Batch, rate: f64) -> Result<f64> {
        let (pixels, labels) = self.batch(batch);
        let loss = loss(&forward(&self.space, self, &pixels, Norm::Batch), &labels);
        let gradients = self.params.gradients(&loss);
        let Settings {
            momentum, weight_decay, ..
        } = self.settings;
        self.params.step(
            &gradients,
            Sgd {
                rate,
                momentum,
                weight_decay,
            },
        );
        for &scale in &self.scales {
            self.params.adjust(scale, |scale| {
                let _ = scale.clamp_min_(1e-8);
            });
        }
        Ok(loss.double_value(&[]))
    }

    fn settle(&mut self, batches: &[Batch]) -> Result<()> {
        if batches.is_empty() {
            return Err(train_error("no images to measure ranges on"));
        }
        // Statistics under the ranges of before (none at first), then ranges under the new statistics.
        for (i, batch) in batches.iter().enumerate() {
            let (pixels, _) = self.batch(batch);
            let _ = no_grad(|| forward(&self.space, self, &pixels, Norm::Measure(1.0 / (i + 1) as f64)));
        }
        if self.form == Form::Int8 {
            self.observed.replace(Some(vec![0.0; self.space.ranges()]));
            for batch in batches {
                let (pixels, _) = self.batch(batch);
                let _ = no_grad(|| forward(&self.space, self, &pixels, Norm::Running));
            }
            self.ranges = self.observed.take().unwrap_or_default();
        }
        Ok(())
    }

    fn evaluate(&self, batch: &Batch) -> Result<Score> {
        let (pixels, labels) = self.batch(batch);
        let logits = no_grad(|| forward(&self.space, self, &pixels, Norm::Running));
        Ok(score(&logits, &labels))
    }

    fn folded(&self) -> Result<Folded> {
        let ranges = match self.form {
            Form::Float => None,
            Form::Int8 if self.ranges.is_empty() => {
                return Err(train_error("activation ranges were not measured yet"));
            }
            Form::Int8 => {
                // Raw bytes are the codes of the input: nothing is lost there.
                let input = Range {
                    scale: 1.0 / self.settings.normalisation.deviation,
                    zero_point: self.settings.normalisation.zero,
                };
                Some((input, self.outputs()))
            }
        };
        let names = self.space.slots().iter().map(|s| s.name.clone());
        let mut layers: BTreeMap<String, FoldedLayer> =
            names.enumerate().map(|(at, name)| (name, self.layer(at))).collect();
        let weight = floats(self.params.get(self.head.0));
        let head = FoldedLayer {
            matrix: self.matrix(self.convs.len(), &weight, &vec![1.0; self.space.classes()]),
            bias: floats(self.params.get(self.head.1)),
        };
        layers.insert("head".into(), head);
        Ok(Folded { layers, ranges })
    }

    fn state(&self) -> State {
        let mut state = self.params.state();
        for (slot, statistics) in self.space.slots().iter().zip(&self.statistics) {
            state.insert(format!("{}.mean", slot.name), array(&statistics.mean));
            state.insert(format!("{}.variance", slot.name), array(&statistics.variance));
        }
        let ranges = Array {
            shape: vec![self.ranges.len()],
            values: self.ranges.clone(),
        };
        state.insert("ranges".into(), ranges);
        state
    }

    fn load(&mut self, state: &State) -> Result<()> {
        self.params.load(state)?;
        for (slot, statistics) in self.space.slots().iter().zip(&mut self.statistics) {
            restore(&mut statistics.mean, &format!("{}.mean", slot.name), state)?;
            restore(&mut statistics.variance, &format!("{}.variance", slot.name), state)?;
        }
        let ranges = state.get("ranges").map(|a| a.values.clone()).unwrap_or_default();
        if ![0, self.space.ranges()].contains(&ranges.len()) {
            return Err(train_error(format!("the checkpoint has {} ranges", ranges.len())));
        }
        self.ranges = ranges;
        Ok(())
    }
}
