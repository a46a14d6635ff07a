//! The typed CNN: what `predict` walks and what ONNX export writes. Built through one gate ([`Graph::new`]), after which
//! shapes are known and nobody checks again. Holds no weights: those go beside it by node name.
//!
//! Padding is always "same" with odd kernels: output height = ceil(height / stride). A node with `output` set has a
//! quantize/dequantize pair behind it; a convolution whose `weights` are `Int` runs as int8 whatever its code width.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// No dimension of a graph of ours comes near this; keeps products inside u64.
const LIMIT: u32 = 1 << 16;

/// `[batch, channels, height, width]`; after pooling height and width are 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    pub batch: u32,
    pub channels: u32,
    pub height: u32,
    pub width: u32,
}

impl Shape {
    /// Number of elements.
    pub fn elements(self) -> u64 {
        u64::from(self.batch) * self.elements_per_sample()
    }

    /// Number of elements of one sample of the batch.
    pub fn elements_per_sample(self) -> u64 {
        u64::from(self.channels) * u64::from(self.height) * u64::from(self.width)
    }

    /// As a list, `[batch, channels, height, width]`.
    pub fn dims(self) -> [u32; 4] {
        [self.batch, self.channels, self.height, self.width]
    }
}

/// Where a node's input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Source {
    /// The graph's input.
    Input,
    /// The output of an earlier node, by its index.
    Node(usize),
}

/// How activations become u8: `real = scale · (code − zero_point)`, codes 0..=255, rounded half to even.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActQuant {
    /// Above zero and finite.
    pub scale: f32,
    /// 0 behind a ReLU (else int8 kernels do not fuse), 128 for signed values.
    pub zero_point: u8,
}

/// Width of integer weight codes. ONNX stores and runs all of them as int8; narrower ones earn bytes, not time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum WeightBits {
    B2,
    B4,
    B8,
}

impl WeightBits {
    /// The number of bits.
    pub fn get(self) -> u32 {
        match self {
            Self::B2 => 2,
            Self::B4 => 4,
            Self::B8 => 8,
        }
    }

    /// Largest code of the symmetric range: 1, 7 or 127.
    pub fn max_code(self) -> i8 {
        match self {
            Self::B2 => 1,
            Self::B4 => 7,
            Self::B8 => 127,
        }
    }
}

impl TryFrom<u32> for WeightBits {
    type Error = String;

    fn try_from(bits: u32) -> Result<Self, String> {
        match bits {
            2 => Ok(Self::B2),
            4 => Ok(Self::B4),
            8 => Ok(Self::B8),
            _ => Err(format!("{bits} is not a width of weight codes: expected 2, 4 or 8")),
        }
    }
}

impl From<WeightBits> for u32 {
    fn from(bits: WeightBits) -> Self {
        bits.get()
    }
}

/// Form of a layer's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weights {
    F32,
    /// Symmetric codes, one scale per output channel.
    Int(WeightBits),
}

impl Weights {
    /// Bits of one weight on disk.
    pub fn bits(self) -> u32 {
        match self {
            Self::F32 => 32,
            Self::Int(bits) => bits.get(),
        }
    }
}

/// What follows a layer's sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    None,
    Relu,
}

/// A convolution with bias, "same" padding; weights `[cout, cin / groups, kernel, kernel]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conv {
    pub cin: u32,
    pub cout: u32,
    /// Odd: 1, 3, 5, …
    pub kernel: u32,
    pub stride: u32,
    pub groups: u32,
    pub activation: Activation,
    pub weights: Weights,
}

/// A fully connected layer with bias on a flattened input; weights `[outputs, inputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    pub inputs: u32,
    pub outputs: u32,
    pub activation: Activation,
    pub weights: Weights,
}

/// What a node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    Conv(Conv),
    Linear(Linear),
    /// Sum of two inputs of one shape.
    Add(Activation),
    /// Mean over height and width: `[batch, channels, 1, 1]`.
    GlobalAvgPool,
}

impl Op {
    /// Weights and biases.
    pub fn params(&self) -> u64 {
        match *self {
            Self::Conv(c) => weight_count(&c) + u64::from(c.cout),
            Self::Linear(l) => u64::from(l.inputs) * u64::from(l.outputs) + u64::from(l.outputs),
            Self::Add(_) | Self::GlobalAvgPool => 0,
        }
    }

    /// Bytes of weights as coded (`weights.bits()` each), plus a 4-byte bias and, when coded, a 4-byte scale per channel.
    pub fn bytes(&self) -> u64 {
        let coded = |count: u64, channels: u32, weights: Weights| {
            let per_channel = if weights == Weights::F32 { 4 } else { 8 };
            (count * u64::from(weights.bits())).div_ceil(8) + per_channel * u64::from(channels)
        };
        match *self {
            Self::Conv(c) => coded(weight_count(&c), c.cout, c.weights),
            Self::Linear(l) => coded(u64::from(l.inputs) * u64::from(l.outputs), l.outputs, l.weights),
            Self::Add(_) | Self::GlobalAvgPool => 0,
        }
    }

    /// Form of the weights, if there are any.
    pub fn weights(&self) -> Option<Weights> {
        match self {
            Self::Conv(c) => Some(c.weights),
            Self::Linear(l) => Some(l.weights),
            Self::Add(_) | Self::GlobalAvgPool => None,
        }
    }

    /// What follows the sum.
    pub fn activation(&self) -> Activation {
        match self {
            Self::Conv(c) => c.activation,
            Self::Linear(l) => l.activation,
            Self::Add(activation) => *activation,
            Self::GlobalAvgPool => Activation::None,
        }
    }
}

fn weight_count(c: &Conv) -> u64 {
    u64::from(c.cout) * u64::from(c.cin / c.groups) * u64::from(c.kernel).pow(2)
}

/// One node: an operator, where its inputs come from, and how its output is coded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Unique in the graph; the name under which its weights are found.
    pub name: String,
    pub op: Op,
    /// Two for `Add`, one else.
    pub inputs: Vec<Source>,
    /// A quantize/dequantize pair behind this node; `None`: its consumers see f32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<ActQuant>,
}

/// A graph as written down, before [`Graph::new`] has looked at it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawGraph {
    pub name: String,
    pub input: Shape,
    /// A quantize/dequantize pair on the input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_quant: Option<ActQuant>,
    /// In running order; the last one is the output.
    pub nodes: Vec<Node>,
}

/// A network that can be run: every input exists, shapes fit, int8 layers see quantized inputs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawGraph", into = "RawGraph")]
pub struct Graph {
    raw: RawGraph,
    shapes: Vec<Shape>,
}

impl TryFrom<RawGraph> for Graph {
    type Error = Error;

    fn try_from(raw: RawGraph) -> Result<Self> {
        Self::new(raw)
    }
}

impl From<Graph> for RawGraph {
    fn from(graph: Graph) -> Self {
        graph.raw
    }
}

/// The kernel class of a node: what an ONNX runtime runs it as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Numerics {
    F32,
    /// u8 activations, s8 weights, whatever the width of the codes.
    Int8,
}

impl Graph {
    /// The one gate.
    ///
    /// # Errors
    /// [`Error::Graph`] naming the node, what was found and what was expected.
    pub fn new(raw: RawGraph) -> Result<Self> {
        let at = |node: &str, what, found: String, expected: String| Error::Graph {
            graph: raw.name.clone(),
            node: node.to_owned(),
            what,
            found,
            expected,
        };
        if raw.input.dims().iter().any(|&d| d == 0 || d > LIMIT) {
            let (found, expected) = (format!("{:?}", raw.input.dims()), format!("each in 1..={LIMIT}"));
            return Err(at("input", "shape", found, expected));
        }
        if let Some(quant) = raw.input_quant {
            check_quant(quant).map_err(|(found, expected)| at("input", "quantization", found, expected))?;
        }
        if raw.nodes.is_empty() {
            return Err(at("output", "nodes", "none".into(), "at least one".into()));
        }
        let mut names = HashSet::from(["input".to_owned(), "output".to_owned()]);
        let mut shapes: Vec<Shape> = Vec::with_capacity(raw.nodes.len());
        for (index, node) in raw.nodes.iter().enumerate() {
            let fail = |what, found: String, expected: String| at(&node.name, what, found, expected);
            if node.name.is_empty() || !names.insert(node.name.clone()) {
                return Err(fail("name", format!("`{}`", node.name), "a new one".into()));
            }
            let arity = if matches!(node.op, Op::Add(_)) { 2 } else { 1 };
            if node.inputs.len() != arity {
                return Err(fail("inputs", node.inputs.len().to_string(), arity.to_string()));
            }
            let mut inputs = [raw.input; 2];
            for (slot, source) in inputs.iter_mut().zip(&node.inputs) {
                if let Source::Node(from) = *source {
                    *slot = *shapes
                        .get(from)
                        .ok_or_else(|| fail("input", format!("node {from}"), format!("one before {index}")))?;
                }
            }
            if let Some(quant) = node.output {
                check_quant(quant).map_err(|(found, expected)| fail("quantization", found, expected))?;
            }
            if let Some(Weights::Int(_)) = node.op.weights() {
                let quantized = node.inputs.iter().all(|&s| quant_of(&raw, s).is_some());
                if !quantized {
                    return Err(fail("input of an int8 layer", "f32".into(), "a quantized one".into()));
                }
                if node.output.is_none() && !matches!(node.op, Op::Linear(_)) {
                    return Err(fail("output of an int8 layer", "f32".into(), "a quantized one".into()));
                }
            }
            shapes.push(output_shape(&node.op, &inputs[..arity]).map_err(|(w, f, e)| fail(w, f, e))?);
        }
        Ok(Self { raw, shapes })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.raw.name
    }

    /// Shape of the input.
    pub fn input(&self) -> Shape {
        self.raw.input
    }

    /// Quantization of the input, if any.
    pub fn input_quant(&self) -> Option<ActQuant> {
        self.raw.input_quant
    }

    /// The nodes in running order.
    pub fn nodes(&self) -> &[Node] {
        &self.raw.nodes
    }

    /// Output shape of each node, in order.
    pub fn shapes(&self) -> &[Shape] {
        &self.shapes
    }

    /// Shape of what comes from `source`.
    pub fn shape_of(&self, source: Source) -> Shape {
        match source {
            Source::Input => self.raw.input,
            Source::Node(index) => self.shapes[index],
        }
    }

    /// Quantization of what comes from `source`; `None` for f32.
    pub fn quant_of(&self, source: Source) -> Option<ActQuant> {
        quant_of(&self.raw, source)
    }

    /// Shape of the last node's output.
    pub fn output(&self) -> Shape {
        *self.shapes.last().expect("`new` refuses a graph without nodes")
    }

    /// What a runtime runs node `index` as: int8 when inputs, weights and (but for `Linear`) output are quantized.
    pub fn numerics(&self, index: usize) -> Numerics {
        let node = &self.raw.nodes[index];
        let inputs = node.inputs.iter().all(|&s| self.quant_of(s).is_some());
        let int8 = match node.op.weights() {
            Some(weights) => weights != Weights::F32,
            None => inputs && node.output.is_some(),
        };
        if int8 { Numerics::Int8 } else { Numerics::F32 }
    }

    /// Multiply-adds of node `index` for the whole batch.
    pub fn node_macs(&self, index: usize) -> u64 {
        let (node, out) = (&self.raw.nodes[index], self.shapes[index]);
        match node.op {
            Op::Conv(c) => out.elements() * u64::from(c.cin / c.groups) * u64::from(c.kernel).pow(2),
            Op::Linear(l) => u64::from(out.batch) * u64::from(l.inputs) * u64::from(l.outputs),
            Op::Add(_) | Op::GlobalAvgPool => 0,
        }
    }

    /// Multiply-adds of the whole batch.
    pub fn macs(&self) -> u64 {
        (0..self.raw.nodes.len()).map(|i| self.node_macs(i)).sum()
    }

    /// Weights and biases.
    pub fn params(&self) -> u64 {
        self.raw.nodes.iter().map(|n| n.op.params()).sum()
    }

    /// Bytes of weights as coded (see [`Op::bytes`]), not of an ONNX file, which stores every code as int8.
    pub fn bytes(&self) -> u64 {
        self.raw.nodes.iter().map(|n| n.op.bytes()).sum()
    }

    /// The same network for another batch size.
    ///
    /// # Errors
    /// [`Error::Graph`] when `batch` is 0 or far too large.
    pub fn with_batch(&self, batch: u32) -> Result<Self> {
        let mut raw = self.raw.clone();
        raw.input.batch = batch;
        Self::new(raw)
    }
}

fn quant_of(raw: &RawGraph, source: Source) -> Option<ActQuant> {
    match source {
        Source::Input => raw.input_quant,
        Source::Node(index) => raw.nodes[index].output,
    }
}

fn check_quant(quant: ActQuant) -> Result<(), (String, String)> {
    if quant.scale.is_finite() && quant.scale > 0.0 {
        Ok(())
    } else {
        Err((format!("scale {}", quant.scale), "a finite one above 0".into()))
    }
}

type Mismatch = (&'static str, String, String);

fn output_shape(op: &Op, inputs: &[Shape]) -> Result<Shape, Mismatch> {
    let x = inputs[0];
    let bounded = |what, value: u32| {
        if value == 0 || value > LIMIT {
            Err((what, value.to_string(), format!("1..={LIMIT}")))
        } else {
            Ok(())
        }
    };
    match *op {
        Op::Conv(c) => {
            for (what, value) in [
                ("cin", c.cin),
                ("cout", c.cout),
                ("stride", c.stride),
                ("groups", c.groups),
            ] {
                bounded(what, value)?;
            }
            if c.kernel % 2 == 0 || c.kernel > 31 {
                return Err(("kernel", c.kernel.to_string(), "an odd number up to 31".into()));
            }
            if c.cin % c.groups != 0 || c.cout % c.groups != 0 {
                let found = format!("{} for {} → {} channels", c.groups, c.cin, c.cout);
                return Err(("groups", found, "a divisor of both".into()));
            }
            if c.cin != x.channels {
                return Err(("input channels", x.channels.to_string(), c.cin.to_string()));
            }
            Ok(Shape {
                batch: x.batch,
                channels: c.cout,
                height: x.height.div_ceil(c.stride),
                width: x.width.div_ceil(c.stride),
            })
        }
        Op::Linear(l) => {
            bounded("outputs", l.outputs)?;
            if u64::from(l.inputs) != x.elements_per_sample() {
                return Err((
                    "input elements",
                    x.elements_per_sample().to_string(),
                    l.inputs.to_string(),
                ));
            }
            Ok(Shape {
                batch: x.batch,
                channels: l.outputs,
                height: 1,
                width: 1,
            })
        }
        Op::Add(_) => {
            if inputs[1] != x {
                return Err((
                    "shape of the second input",
                    format!("{:?}", inputs[1].dims()),
                    format!("{:?}", x.dims()),
                ));
            }
            Ok(x)
        }
        Op::GlobalAvgPool => Ok(Shape {
            height: 1,
            width: 1,
            ..x
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conv(cin: u32, cout: u32, kernel: u32, stride: u32, weights: Weights) -> Op {
        Op::Conv(Conv {
            cin,
            cout,
            kernel,
            stride,
            groups: 1,
            activation: Activation::Relu,
            weights,
        })
    }

    const UNIT: ActQuant = ActQuant {
        scale: 0.1,
        zero_point: 0,
    };

    fn node(name: &str, op: Op, inputs: &[Source], output: Option<ActQuant>) -> Node {
        Node {
            name: name.into(),
            op,
            inputs: inputs.to_vec(),
            output,
        }
    }

    fn small(weights: Weights) -> RawGraph {
        let q = (weights != Weights::F32).then_some(UNIT);
        RawGraph {
            name: "small".into(),
            input: Shape {
                batch: 1,
                channels: 3,
                height: 9,
                width: 8,
            },
            input_quant: q,
            nodes: vec![
                node("stem", conv(3, 16, 3, 2, weights), &[Source::Input], q),
                node("body", conv(16, 16, 5, 1, weights), &[Source::Node(0)], q),
                node("add", Op::Add(Activation::Relu), &[Source::Node(0), Source::Node(1)], q),
                node("pool", Op::GlobalAvgPool, &[Source::Node(2)], q),
                node(
                    "head",
                    Op::Linear(Linear {
                        inputs: 16,
                        outputs: 10,
                        activation: Activation::None,
                        weights,
                    }),
                    &[Source::Node(3)],
                    None,
                ),
            ],
        }
    }

    #[test]
    fn shapes_macs_and_bytes_follow_the_formulas() {
        let graph = Graph::new(small(Weights::F32)).unwrap();
        assert_eq!(graph.shapes()[0].dims(), [1, 16, 5, 4]);
        assert_eq!(graph.output().dims(), [1, 10, 1, 1]);
        assert_eq!(graph.macs(), 20 * 9 * 3 * 16 + 20 * 25 * 16 * 16 + 160);
        assert_eq!(graph.params(), (27 * 16 + 16) + (25 * 256 + 16) + (160 + 10));
        assert_eq!(graph.bytes(), 4 * graph.params());
        assert_eq!(graph.with_batch(8).unwrap().macs(), 8 * graph.macs());
    }

    #[test]
    fn narrower_codes_earn_bytes_and_run_as_int8() {
        let bytes = |bits| Graph::new(small(Weights::Int(bits))).unwrap().bytes();
        assert!(bytes(WeightBits::B2) < bytes(WeightBits::B4) && bytes(WeightBits::B4) < bytes(WeightBits::B8));
        let graph = Graph::new(small(Weights::Int(WeightBits::B2))).unwrap();
        assert!((0..5).all(|i| graph.numerics(i) == Numerics::Int8));
    }

    #[test]
    fn what_does_not_fit_is_refused_by_node() {
        let refuse = |change: &dyn Fn(&mut RawGraph), node: &str, what: &str| {
            let mut raw = small(Weights::Int(WeightBits::B8));
            change(&mut raw);
            let text = Graph::new(raw).unwrap_err().to_string();
            assert!(text.contains(&format!("`{node}`")) && text.contains(what), "{text}");
        };
        refuse(&|g| g.input.channels = 4, "stem", "found 4, expected 3");
        refuse(&|g| g.input.batch = 0, "input", "shape");
        refuse(&|g| g.input_quant = None, "stem", "int8 layer: found f32");
        refuse(&|g| g.nodes[1].output = None, "body", "output of an int8 layer");
        refuse(&|g| g.nodes[1].inputs = vec![Source::Node(1)], "body", "one before 1");
        refuse(
            &|g| g.nodes[2].inputs = vec![Source::Node(0)],
            "add",
            "inputs: found 1, expected 2",
        );
        refuse(&|g| g.nodes[2].inputs[0] = Source::Input, "add", "second input");
        refuse(&|g| g.nodes[1].name = "stem".into(), "stem", "name");
        refuse(&|g| g.nodes[0].op = conv(3, 16, 4, 2, Weights::F32), "stem", "odd");
        refuse(&|g| g.nodes[0].op = conv(3, 16, 3, 0, Weights::F32), "stem", "stride");
        refuse(
            &|g| g.nodes[0].output.as_mut().unwrap().scale = f32::NAN,
            "stem",
            "scale NaN",
        );
        refuse(&|g| g.nodes.clear(), "output", "at least one");
    }

    #[test]
    fn a_graph_reads_back_from_json_and_a_wrong_one_does_not() {
        let graph = Graph::new(small(Weights::Int(WeightBits::B4))).unwrap();
        let text = serde_json::to_string(&graph).unwrap();
        assert_eq!(serde_json::from_str::<Graph>(&text).unwrap(), graph);
        assert!(serde_json::from_str::<Graph>(&text.replace("\"cin\":3", "\"cin\":5")).is_err());
    }
}
