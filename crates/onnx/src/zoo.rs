//! Random networks as a distribution of use: dense, depthwise, low-rank and int8 CNNs of 3 to 9 blocks. What the model of a
//! machine is fitted on and, from another seed, judged on. Times nothing. Law: the same stream draws the same networks.

use std::collections::BTreeMap;

use cotk_latency::graph::{
    ActQuant, Activation, Conv, Graph, Linear, Node, Op, RawGraph, Shape, Source, WeightBits, Weights,
};
use cotk_latency::probe::{NetworkProbe, Prepared};
use cotk_run::seeds::{Seeds, Stream};
use ort::value::Tensor;
use rand::RngExt;
use rand::seq::IndexedRandom;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::session::Session;
use crate::weights::{Layer, Matrix, Network, quantize};
use crate::write::to_onnx;

/// What a random network is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Convolutions 3x3 and 5x5, plain or in residual blocks, f32.
    Dense,
    /// Depthwise and pointwise convolutions, some with an expansion and a residual sum, f32.
    Depthwise,
    /// As dense, with most convolutions as triples 1x1, kxk, 1x1 over a few channels, f32.
    LowRank,
    /// Any of these with int8 weights and activations throughout.
    Int8,
}

impl Kind {
    /// All of them: a quarter of a list each.
    pub const ALL: [Self; 4] = [Self::Dense, Self::Depthwise, Self::LowRank, Self::Int8];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Depthwise => "depthwise",
            Self::LowRank => "low_rank",
            Self::Int8 => "int8",
        }
    }
}

/// `count` networks, the kinds in turn, none twice and none that is in `known`.
pub fn random_networks(count: usize, known: &[Graph], rng: &mut Stream) -> Vec<(Kind, Graph)> {
    let mut networks: Vec<(Kind, Graph)> = Vec::with_capacity(count);
    while networks.len() < count {
        let kind = Kind::ALL[networks.len() % Kind::ALL.len()];
        let graph = random_network(rng, kind);
        let same = |other: &Graph| other.input() == graph.input() && other.nodes() == graph.nodes();
        if !known.iter().any(same) && !networks.iter().any(|(_, g)| same(g)) {
            networks.push((kind, graph));
        }
    }
    networks
}

/// One network: stem, two to four stages of 3 to 9 blocks together, mean, linear head. Width 0.5 to 4 times 16, 32, 64, …
/// channels per stage; batch 1.
pub fn random_network(rng: &mut Stream, kind: Kind) -> Graph {
    let (channels, side) = *[(3, 32), (3, 32), (3, 32), (1, 28), (1, 28), (3, 24), (1, 16), (3, 48)]
        .choose(rng)
        .expect("a list");
    let numerics = if kind == Kind::Int8 {
        Weights::Int(WeightBits::B8)
    } else {
        Weights::F32
    };
    let style = match kind {
        Kind::Dense => Style::Dense,
        Kind::Depthwise => Style::Depthwise,
        Kind::LowRank => Style::LowRank,
        Kind::Int8 => match rng.random_range(0..20) {
            0..12 => Style::Dense,
            12..17 => Style::Depthwise,
            _ => Style::LowRank,
        },
    };
    let width = 0.5 * 8f64.powf(rng.random::<f64>());
    let mut draw = Draw {
        nodes: Vec::new(),
        weights: numerics,
        channels,
        // Most spaces step by the machine's block or a part of it, few by any number.
        step: *[16, 16, 16, 8, 8, 8, 4, 4, 4, 4, 2, 1].choose(rng).expect("a list"),
        rng,
    };
    let blocks = draw.rng.random_range(3..=9u32);
    let stages = draw.rng.random_range(2..=4u32).min(blocks);
    let stem = draw.round(16.0 * width);
    let stride = if side >= 48 { 2 } else { 1 };
    let mut x = draw.conv(Source::Input, stem, 3, stride, Activation::Relu);
    for block in 0..blocks {
        let stage = block * stages / blocks;
        let is_first = block == 0 || (block - 1) * stages / blocks != stage;
        // Within a stage one width for residual sums, as spaces have it.
        let out = if is_first {
            let jitter = 0.8 + 0.4 * draw.rng.random::<f64>();
            draw.round(f64::from(16u32 << stage) * width * jitter)
        } else {
            draw.channels
        };
        let stride = if is_first && stage > 0 { 2 } else { 1 };
        x = match style {
            Style::Dense | Style::LowRank => draw.dense_block(x, out, stride, style),
            Style::Depthwise => draw.depthwise_block(x, out, stride),
        };
    }
    let pool = draw.push(Op::GlobalAvgPool, vec![x]);
    let head = Linear {
        inputs: draw.channels,
        outputs: *[10, 10, 100].choose(draw.rng).expect("a list"),
        activation: Activation::None,
        weights: numerics,
    };
    draw.push(Op::Linear(head), vec![pool]);
    let mut nodes = draw.nodes;
    if let Some(last) = nodes.last_mut() {
        last.output = None; // the last layer gives f32
    }
    Graph::new(RawGraph {
        name: format!("{}-{blocks}", kind.name()),
        input: Shape {
            batch: 1,
            channels,
            height: side,
            width: side,
        },
        input_quant: (kind == Kind::Int8).then_some(SIGNED),
        nodes,
    })
    .expect("drawn by the rules of a graph")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Dense,
    Depthwise,
    LowRank,
}

/// Codes behind a ReLU.
pub(crate) const RELU: ActQuant = ActQuant {
    scale: 0.05,
    zero_point: 0,
};
/// Codes of values of both signs.
pub(crate) const SIGNED: ActQuant = ActQuant {
    scale: 0.05,
    zero_point: 128,
};

struct Draw<'a> {
    nodes: Vec<Node>,
    weights: Weights,
    /// Of the value at hand.
    channels: u32,
    /// Channels are multiples of this.
    step: u32,
    rng: &'a mut Stream,
}

impl Draw<'_> {
    fn round(&self, channels: f64) -> u32 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a few hundred channels"
        )]
        let steps = (channels / f64::from(self.step)).round().max(1.0) as u32;
        (steps * self.step).max(4)
    }

    fn push(&mut self, op: Op, inputs: Vec<Source>) -> Source {
        let positive = op.activation() == Activation::Relu || op == Op::GlobalAvgPool;
        let quant = if positive { RELU } else { SIGNED };
        self.nodes.push(Node {
            name: format!("n{}", self.nodes.len()),
            op,
            inputs,
            output: (self.weights != Weights::F32).then_some(quant),
        });
        Source::Node(self.nodes.len() - 1)
    }

    /// From `self.channels` to `cout`, which are then the channels at hand.
    fn conv(&mut self, x: Source, cout: u32, kernel: u32, stride: u32, activation: Activation) -> Source {
        let conv = Conv {
            cin: self.channels,
            cout,
            kernel,
            stride,
            groups: 1,
            activation,
            weights: self.weights,
        };
        self.channels = cout;
        self.push(Op::Conv(conv), vec![x])
    }

    fn depthwise(&mut self, x: Source, kernel: u32, stride: u32) -> Source {
        let conv = Conv {
            cin: self.channels,
            cout: self.channels,
            kernel,
            stride,
            groups: self.channels,
            activation: Activation::Relu,
            weights: self.weights,
        };
        self.push(Op::Conv(conv), vec![x])
    }

    /// A convolution, or a triple in its place.
    fn maybe_triple(&mut self, x: Source, cout: u32, stride: u32, activation: Activation, style: Style) -> Source {
        let kernel = if self.rng.random::<f64>() < 0.25 { 5 } else { 3 };
        if style == Style::Dense || self.rng.random::<f64>() < 0.3 {
            return self.conv(x, cout, kernel, stride, activation);
        }
        let mut rank = |channels: u32| {
            let share = 0.125 + 0.6 * self.rng.random::<f64>();
            let rank = f64::from(channels) * share;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "few channels")]
            let rounded = match self.rng.random_range(0..10) {
                0..4 => (rank / 16.0).round() as u32 * 16,
                4..8 => (rank / 4.0).round() as u32 * 4,
                _ => rank.round() as u32,
            };
            rounded.max(4)
        };
        let (r1, r2) = (rank(self.channels), rank(cout));
        let x = self.conv(x, r1, 1, 1, Activation::None);
        let x = self.conv(x, r2, kernel, stride, Activation::None);
        self.conv(x, cout, 1, 1, activation)
    }

    fn dense_block(&mut self, x: Source, cout: u32, stride: u32, style: Style) -> Source {
        let cin = self.channels;
        if self.rng.random::<f64>() < 0.4 {
            return self.maybe_triple(x, cout, stride, Activation::Relu, style);
        }
        let inner = self.maybe_triple(x, cout, stride, Activation::Relu, style);
        let last = self.maybe_triple(inner, cout, 1, Activation::None, style);
        let shortcut = if cin == cout && stride == 1 {
            x
        } else {
            self.channels = cin;
            self.conv(x, cout, 1, stride, Activation::None)
        };
        self.push(Op::Add(Activation::Relu), vec![last, shortcut])
    }

    fn depthwise_block(&mut self, x: Source, cout: u32, stride: u32) -> Source {
        let cin = self.channels;
        let kernel = if self.rng.random::<f64>() < 0.3 { 5 } else { 3 };
        if self.rng.random::<f64>() < 0.5 {
            let inner = self.depthwise(x, kernel, stride);
            return self.conv(inner, cout, 1, 1, Activation::Relu);
        }
        let expansion = self.rng.random_range(1..=4u32);
        let expanded = self.conv(x, cin * expansion, 1, 1, Activation::Relu);
        let inner = self.depthwise(expanded, kernel, stride);
        let last = self.conv(inner, cout, 1, 1, Activation::None);
        if cin == cout && stride == 1 {
            return self.push(Op::Add(Activation::None), vec![last, x]);
        }
        last
    }
}

/// Random weights for a graph: other ones in each layer, or a runtime would merge equal ones; sized to keep activations
/// near 1.
///
/// # Errors
/// [`crate::Error::Weights`] never, unless the graph has a form that no weights fit.
pub fn random_weights(graph: Graph, seed: u64) -> Result<Network> {
    let mut rng = Seeds::new(seed).stream("random weights");
    let mut layers = BTreeMap::new();
    for node in graph.nodes() {
        let (channels, per_channel, form) = match node.op {
            Op::Conv(c) => (c.cout, c.cin / c.groups * c.kernel * c.kernel, c.weights),
            Op::Linear(l) => (l.outputs, l.inputs, l.weights),
            _ => continue,
        };
        let (channels, per_channel) = (channels as usize, per_channel as usize);
        #[expect(clippy::cast_precision_loss, reason = "a width of values")]
        let width = (6.0 / per_channel as f32).sqrt();
        let values = uniform(channels * per_channel, width, &mut rng);
        let matrix = match form {
            Weights::F32 => Matrix::F32(values),
            Weights::Int(bits) => quantize(&values, channels, bits),
        };
        let bias = uniform(channels, 0.1, &mut rng);
        layers.insert(node.name.clone(), Layer { matrix, bias });
    }
    Network::new(graph, layers)
}

/// Values in `-width..width`.
pub(crate) fn uniform(count: usize, width: f32, rng: &mut Stream) -> Vec<f32> {
    (0..count).map(|_| (rng.random::<f32>() * 2.0 - 1.0) * width).collect()
}

/// Whole networks in ONNX Runtime, with random weights and inputs.
#[derive(Debug, Clone, Copy, Default)]
pub struct OnnxNetworks;

impl NetworkProbe for OnnxNetworks {
    fn prepare(&self, graph: &Graph, threads: u32, session: u32) -> cotk_latency::Result<Box<dyn Prepared>> {
        let open = || -> Result<Running> {
            let network = random_weights(graph.clone(), u64::from(session))?;
            let session = Session::from_bytes(graph.name(), &to_onnx(&network), threads as usize)?;
            let input = uniform(session.input_len(), 1.0, &mut Seeds::new(1).stream("input"));
            let input = session.input(&input)?;
            Ok(Running {
                session,
                input,
                threads,
            })
        };
        let running = open().map_err(|e| failed(graph, &e.to_string()))?;
        Ok(Box::new(running))
    }
}

fn failed(graph: &Graph, detail: &str) -> cotk_latency::Error {
    cotk_latency::Error::Probe {
        probe: "onnx".into(),
        key: graph.name().to_owned(),
        detail: detail.to_owned(),
    }
}

struct Running {
    session: Session,
    input: Tensor<f32>,
    threads: u32,
}

impl Prepared for Running {
    fn threads(&self) -> u32 {
        self.threads
    }

    fn run(&mut self, _piece: usize) -> cotk_latency::Result<()> {
        let done = self.session.call(&self.input);
        done.map_err(|e| cotk_latency::Error::Probe {
            probe: "onnx".into(),
            key: "network".into(),
            detail: e.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_repeat_by_seed_and_differ_between_seeds() {
        let draw = |seed: u64, known: &[Graph]| random_networks(40, known, &mut Seeds::new(seed).stream("zoo"));
        let first = draw(1, &[]);
        assert_eq!(first, draw(1, &[]));
        let known: Vec<Graph> = first.iter().map(|n| n.1.clone()).collect();
        let second = draw(1, &known);
        for (kind, graph) in &second {
            assert!(
                !known
                    .iter()
                    .any(|k| k.nodes() == graph.nodes() && k.input() == graph.input())
            );
            assert_eq!(graph.input_quant().is_some(), *kind == Kind::Int8);
            let convs = graph.nodes().iter().filter(|n| matches!(n.op, Op::Conv(_))).count();
            assert!((4..=60).contains(&convs), "{convs}");
        }
        assert!(
            Kind::ALL
                .iter()
                .all(|k| second.iter().filter(|n| n.0 == *k).count() == 10)
        );
    }

    /// Law: what is drawn runs, in the runtime that it is drawn for.
    #[test]
    fn every_kind_runs() {
        let mut rng = Seeds::new(2).stream("zoo");
        for kind in Kind::ALL {
            let graph = random_network(&mut rng, kind);
            let mut running = OnnxNetworks.prepare(&graph, 1, 0).unwrap();
            running.run(0).unwrap();
        }
    }
}
