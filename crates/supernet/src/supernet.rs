//! All points of a space in one set of weights. Weight steps run the chosen kernel and rung alone; gate steps run the
//! full kernels with straight-through gates. Law: gradients of gates are those of the ladder and of the super-kernel,
//! at the hard gates.

use cotk_data::loader::Batch;
use cotk_data::task::Normalisation;
use cotk_run::seeds::Seeds;
use cotk_search::Result;
use cotk_search::checkpoint::State;
use cotk_search::space::{Form, GateKind, Point, Space};
use cotk_search::trainable::{GateGradient, Score, Subnet as SubnetTrait, Trainable};
use tch::{Kind, Tensor, no_grad};

use crate::forward::{Layers, Norm, Statistics, forward, loss, normalise, score};
use crate::kernels::{crop, mask, rms};
use crate::ladder::fake_quantize;
use crate::params::{Decay, Params, Sgd, normal};
use crate::subnet::Subnet;
use crate::{tensors, train_error};

/// How weights train.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// How bytes became inputs: the exported network's input codes.
    pub normalisation: Normalisation,
    pub momentum: f64,
    /// On convolutions and the classifier alone.
    pub weight_decay: f64,
}

/// Indices into [`Params`] of one convolution with its normalisation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConvParams {
    pub(crate) weight: usize,
    pub(crate) gamma: usize,
    pub(crate) beta: usize,
}

/// The shared weights.
#[derive(Debug)]
pub struct Supernet {
    space: Space,
    settings: Settings,
    params: Params,
    convs: Vec<ConvParams>,
    head: (usize, usize),
    statistics: Vec<Statistics>,
    /// Per kernel rung, over the largest kernel.
    masks: Vec<Tensor>,
}

impl Supernet {
    /// Fresh weights: a function of space and seed.
    pub fn new(space: &Space, settings: Settings, seeds: Seeds) -> Self {
        let mut params = Params::default();
        let full = *space.kernels().last().expect("a space has kernels");
        let options = (Kind::Float, tch::Device::Cpu);
        let mut convs = Vec::new();
        for slot in space.slots() {
            let kernel = i64::from(if slot.choice.is_some() { full } else { 3 });
            let shape = [i64::from(slot.cout), i64::from(slot.cin), kernel, kernel];
            // He et al., 2015, with the taps of the largest kernel.
            let deviation = (2.0 / (shape[1] * kernel * kernel) as f64).sqrt();
            let name = &slot.name;
            let weight = normal(seeds, &format!("weights {name}"), &shape, deviation);
            convs.push(ConvParams {
                weight: params.add(format!("{name}.weight"), &weight, Decay::Yes),
                gamma: params.add(format!("{name}.gamma"), &Tensor::ones([shape[0]], options), Decay::No),
                beta: params.add(format!("{name}.beta"), &Tensor::zeros([shape[0]], options), Decay::No),
            });
        }
        let classes = i64::try_from(space.classes()).expect("few classes");
        let shape = [classes, i64::from(space.features())];
        let deviation = (1.0 / shape[1] as f64).sqrt();
        let weight = normal(seeds, "weights head", &shape, deviation);
        let head = (
            params.add("head.weight".into(), &weight, Decay::Yes),
            params.add("head.bias".into(), &Tensor::zeros([classes], options), Decay::No),
        );
        Self {
            space: space.clone(),
            settings,
            convs,
            head,
            statistics: space.slots().iter().map(|s| Statistics::new(s.cout)).collect(),
            masks: space.kernels().iter().map(|&k| mask(full, k)).collect(),
            params,
        }
    }

    /// The space.
    pub fn space(&self) -> &Space {
        &self.space
    }

    pub(crate) fn settings(&self) -> Settings {
        self.settings
    }

    /// Weights of a slot cropped to the kernel of `point`, gamma, beta.
    pub(crate) fn slot_values(&self, slot: usize, point: &Point) -> [Tensor; 3] {
        let conv = self.convs[slot];
        let kernel = self.space.kernel(&self.space.slots()[slot], point);
        [
            crop(self.params.get(conv.weight), kernel),
            self.params.get(conv.gamma).shallow_clone(),
            self.params.get(conv.beta).shallow_clone(),
        ]
    }

    /// Weight and bias of the classifier.
    pub(crate) fn head_values(&self) -> (&Tensor, &Tensor) {
        (self.params.get(self.head.0), self.params.get(self.head.1))
    }

    fn batch(&self, batch: &Batch) -> (Tensor, Tensor) {
        let shape = self.space.input();
        tensors(batch, shape.channels, shape.height, shape.width)
    }

    fn rung_bits(&self, rung: usize) -> u32 {
        self.space.bits()[rung]
    }
}

/// A point inside the supernet; with `gates`, differentiable in them.
struct Inside<'a> {
    net: &'a Supernet,
    point: &'a Point,
    /// `[gates]`, hard values.
    gates: Option<&'a Tensor>,
}

impl Inside<'_> {
    /// 0 with gradient 1 to gate `index`.
    fn straight_through(gates: &Tensor, index: usize) -> Tensor {
        let gate = gates.get(i64::try_from(index).expect("few gates"));
        let stopped = gate.detach();
        gate - stopped
    }

    /// Weights as the gates say, full kernel; gradients flow to weights and gates.
    fn gated(&self, slot: usize, choice: usize, gates: &Tensor) -> Tensor {
        let net = self.net;
        let weight = net.params.get(net.convs[slot].weight);
        let here = self.point.0[choice];
        let (kernel, bits) = (usize::from(here.kernel), usize::from(here.bits));
        // A gate acts only inside its parent: those up to one rung above the current one.
        let mine = |kind: GateKind, rung: usize| {
            let all = net.space.gates().iter().enumerate();
            all.filter(move |(_, g)| g.choice == choice && g.kind == kind && g.rung <= rung + 1)
        };
        let mut open = weight * &net.masks[kernel];
        for (index, gate) in mine(GateKind::Kernel, kernel) {
            let shell = &net.masks[kernel.max(gate.rung)] - &net.masks[gate.rung - 1];
            open += Self::straight_through(gates, index) * (weight.detach() * shell);
        }
        let coded = |rung: usize| fake_quantize(&open, net.rung_bits(rung), self.open_taps(slot));
        let mut out = coded(bits);
        for (index, gate) in mine(GateKind::Bits, bits) {
            let residual = no_grad(|| coded(bits.max(gate.rung)) - coded(gate.rung - 1));
            out += Self::straight_through(gates, index) * residual;
        }
        out
    }

    /// Weights of one output channel that the point's kernel uses.
    fn open_taps(&self, slot: usize) -> i64 {
        let slot = &self.net.space.slots()[slot];
        let kernel = i64::from(self.net.space.kernel(slot, self.point));
        i64::from(slot.cin) * kernel * kernel
    }
}

impl Layers for Inside<'_> {
    fn conv(&self, at: usize, x: &Tensor, norm: Norm) -> Tensor {
        let net = self.net;
        let slot = &net.space.slots()[at];
        let conv = net.convs[at];
        let weight = match (slot.choice, self.gates) {
            // The stem stays in f32 until it is cut out: 8 bits cost it nothing that training could learn from.
            (None, _) => net.params.get(conv.weight).shallow_clone(),
            (Some(choice), Some(gates)) => self.gated(at, choice, gates),
            (Some(_), None) => {
                let open = crop(net.params.get(conv.weight), net.space.kernel(slot, self.point));
                fake_quantize(&open, net.space.weight_bits(slot, self.point), self.open_taps(at))
            }
        };
        let (stride, pad) = (i64::from(slot.stride), weight.size()[2] / 2);
        let y = x.conv2d::<&Tensor>(&weight, None, [stride; 2], [pad; 2], [1; 2], 1);
        let (gamma, beta) = (net.params.get(conv.gamma), net.params.get(conv.beta));
        normalise(&y, gamma, beta, &net.statistics[at], norm)
    }

    fn node(&self, _index: usize, x: Tensor) -> Tensor {
        x
    }

    fn head(&self, x: &Tensor) -> Tensor {
        let (weight, bias) = self.net.head_values();
        x.linear(weight, Some(bias))
    }
}

impl Trainable for Supernet {
    fn weight_step(&mut self, point: &Point, batch: &Batch, rate: f64) -> Result<f64> {
        let (pixels, labels) = self.batch(batch);
        let inside = Inside {
            net: self,
            point,
            gates: None,
        };
        let loss = loss(&forward(&self.space, &inside, &pixels, Norm::Batch), &labels);
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
        Ok(loss.double_value(&[]))
    }

    fn gate_gradient(&self, point: &Point, batch: &Batch) -> Result<GateGradient> {
        let (pixels, labels) = self.batch(batch);
        let hard: Vec<f32> = self
            .space
            .gates_of(point)
            .into_iter()
            .map(|on| if on { 1.0 } else { 0.0 })
            .collect();
        if hard.is_empty() {
            return Err(train_error("the space has nothing to choose"));
        }
        let gates = Tensor::from_slice(&hard).set_requires_grad(true);
        let inside = Inside {
            net: self,
            point,
            gates: Some(&gates),
        };
        let loss = loss(&forward(&self.space, &inside, &pixels, Norm::Batch), &labels);
        let gradient = &Tensor::run_backward(&[&loss], &[&gates], false, false)[0];
        Ok(GateGradient {
            loss: loss.double_value(&[]),
            gradient: (0..hard.len() as i64).map(|i| gradient.double_value(&[i])).collect(),
        })
    }

    fn gate_statistics(&self) -> Vec<f64> {
        no_grad(|| {
            let slot_of = |choice: usize| self.space.slots().iter().position(|s| s.choice == Some(choice));
            let statistic = |gate: &cotk_search::space::Gate| {
                let slot = slot_of(gate.choice).expect("each choice has its slot");
                let weight = self.params.get(self.convs[slot].weight);
                match gate.kind {
                    GateKind::Kernel => {
                        let shell = &self.masks[gate.rung] - &self.masks[gate.rung - 1];
                        rms(weight, &shell).ln() - rms(weight, &self.masks[0]).ln()
                    }
                    GateKind::Bits => {
                        let everything = self.masks.last().expect("a space has kernels");
                        let taps = weight.size()[1..].iter().product();
                        let coarse = fake_quantize(weight, self.rung_bits(gate.rung - 1), taps);
                        let residual = fake_quantize(weight, self.rung_bits(gate.rung), taps) - &coarse;
                        rms(&residual, everything).ln() - rms(&coarse, everything).ln()
                    }
                }
            };
            self.space.gates().iter().map(statistic).collect()
        })
    }

    fn recalibrate(&mut self, point: &Point, batches: &[Batch]) -> Result<()> {
        let inside = Inside {
            net: self,
            point,
            gates: None,
        };
        for (i, batch) in batches.iter().enumerate() {
            let (pixels, _) = self.batch(batch);
            let _ = no_grad(|| forward(&self.space, &inside, &pixels, Norm::Measure(1.0 / (i + 1) as f64)));
        }
        Ok(())
    }

    fn evaluate(&self, point: &Point, batch: &Batch) -> Result<Score> {
        let (pixels, labels) = self.batch(batch);
        let inside = Inside {
            net: self,
            point,
            gates: None,
        };
        let logits = no_grad(|| forward(&self.space, &inside, &pixels, Norm::Running));
        Ok(score(&logits, &labels))
    }

    fn cut_out(&self, point: &Point, form: Form) -> Result<Box<dyn SubnetTrait>> {
        Ok(Box::new(Subnet::new(self, point, form)))
    }

    fn state(&self) -> State {
        self.params.state()
    }

    fn load(&mut self, state: &State) -> Result<()> {
        self.params.load(state)
    }
}

#[cfg(test)]
mod tests;
