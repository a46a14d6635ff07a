//! A foreign network as the latency model walks it (`cotk_latency::walk`): the same operators in its few kinds, shapes as
//! `[batch, channels, height, width]`. Fusing and layouts are the walker's. Law: multiply-adds are kept.

use cotk_latency::graph::{Activation, Numerics, Shape, Source};
use cotk_latency::walk;
use cotk_latency::work::{ElementwiseKind, PoolKind};

use super::{Network, Node, Op, Pool, Source as From, Window};

impl Network {
    /// The form that predictions walk. Inputs beyond the first stand before all that runs.
    pub fn to_walk(&self) -> walk::Network {
        let is_quantized = |input: usize| {
            let reads = self.nodes.iter().flat_map(|n| &n.inputs);
            let mut reads = reads.filter(|e| e.source == From::Input(input)).peekable();
            reads.peek().is_some() && reads.all(|e| e.is_quantized)
        };
        let mut places = Vec::with_capacity(self.nodes.len());
        let mut nodes = Vec::with_capacity(self.nodes.len());
        let mut outputs = Vec::new();
        for (at, input) in self.inputs.iter().enumerate().skip(1) {
            nodes.push(walk::Node {
                name: input.name.clone(),
                kind: walk::Kind::Input,
                inputs: Vec::new(),
                output: walk::Tensor {
                    shape: shape(&input.dims),
                    is_quantized: is_quantized(at),
                },
                numerics: Numerics::F32,
                macs: 0,
                weight_bytes: 0,
            });
        }
        for node in &self.nodes {
            let inputs = node.inputs.iter().map(|edge| match edge.source {
                From::Input(0) => Source::Input,
                From::Input(at) => Source::Node(at - 1),
                From::Node(at) => Source::Node(places[at]),
            });
            for part in parts(node, inputs.collect(), nodes.len()) {
                nodes.push(part);
            }
            places.push(nodes.len() - 1);
            if node.is_output {
                outputs.push(Source::Node(nodes.len() - 1));
            }
        }
        walk::Network {
            name: self.name.clone(),
            input: walk::Tensor {
                // A file without an input is refused when it is read.
                shape: shape(self.inputs.first().map_or(&[], |input| &input.dims)),
                is_quantized: is_quantized(0),
            },
            nodes,
            outputs,
        }
    }
}

/// One node, or the two that onnxruntime makes of it.
fn parts(node: &Node, inputs: Vec<Source>, at: usize) -> Vec<walk::Node> {
    let whole = |kind, inputs| walk::Node {
        name: node.label.clone(),
        kind,
        inputs,
        output: walk::Tensor {
            shape: shape(&node.dims),
            is_quantized: node.is_output_quantized,
        },
        numerics: node.numerics,
        macs: node.macs,
        weight_bytes: weight_bytes(node),
    };
    // HardSwish runs as x · HardSigmoid(x): seen in its optimized graphs.
    if node.op_type == "HardSwish"
        && let [x] = inputs[..]
    {
        let mut gate = whole(walk::Kind::Elementwise(ElementwiseKind::Unary), vec![x]);
        gate.name.push_str(".gate");
        gate.output.is_quantized = false;
        let product = whole(
            walk::Kind::Elementwise(ElementwiseKind::Binary),
            vec![x, Source::Node(at)],
        );
        return vec![gate, product];
    }
    // Constants alone make no node, so that every kind has an input; products with constants have one.
    vec![whole(kind(node, inputs.len()), inputs)]
}

fn kind(node: &Node, inputs: usize) -> walk::Kind {
    let unary_or_binary = if inputs > 1 {
        ElementwiseKind::Binary
    } else {
        ElementwiseKind::Unary
    };
    match node.op {
        Op::Conv(conv) => walk::Kind::Conv {
            kernel: conv.window.kernel,
            stride: mean_stride(conv.window),
            groups: conv.groups,
            activation: Activation::None,
        },
        Op::Linear { rows, inputs, outputs } => walk::Kind::Linear {
            rows: clamp(rows),
            inputs,
            outputs,
        },
        // The same arithmetic, with activations in place of weights.
        Op::MatMul {
            batch,
            rows,
            inner,
            columns,
        } => walk::Kind::Linear {
            rows: clamp(batch.saturating_mul(rows)),
            inputs: clamp(inner),
            outputs: clamp(columns),
        },
        Op::BatchNorm => walk::Kind::BatchNorm,
        Op::Clamp => walk::Kind::Activation,
        Op::Activation if node.numerics == Numerics::F32 => walk::Kind::Activation,
        Op::Activation | Op::Softmax => walk::Kind::Elementwise(ElementwiseKind::Transcendental),
        Op::Elementwise => walk::Kind::Elementwise(match node.op_type.as_str() {
            "Cast" | "CastLike" | "Neg" | "Abs" | "Sign" | "Floor" | "Ceil" | "Round" | "Not" | "Reciprocal"
            | "Sqrt" | "PRelu" => ElementwiseKind::Unary,
            _ => ElementwiseKind::Transcendental,
        }),
        Op::Add if inputs == 2 => walk::Kind::Add(Activation::None),
        Op::Add | Op::Binary => walk::Kind::Elementwise(unary_or_binary),
        Op::Concat => walk::Kind::Concat,
        Op::Pool(pool, window) => walk::Kind::Pool {
            kind: pool_kind(pool),
            kernel: side(window.kernel),
            stride: mean_stride(window),
        },
        // Written as a reduction it has no blocked and no int8 kernel.
        Op::GlobalPool(_) if node.op_type.starts_with("Reduce") => walk::Kind::Reduce,
        Op::GlobalPool(_) => walk::Kind::GlobalAvgPool,
        Op::Reduce => walk::Kind::Reduce,
        Op::Copy => walk::Kind::Elementwise(unary_or_binary),
        Op::Transpose => walk::Kind::Transpose,
        Op::View => walk::Kind::View,
        Op::Unknown => walk::Kind::Unknown {
            op_type: node.op_type.clone(),
        },
    }
}

/// Bytes of weights as they are run, bias included.
fn weight_bytes(node: &Node) -> u64 {
    let (count, channels) = match node.op {
        Op::Conv(conv) => {
            let taps = u64::from(conv.window.kernel[0]) * u64::from(conv.window.kernel[1]);
            let weights = u64::from(conv.cin / conv.groups) * taps;
            (weights.saturating_mul(u64::from(conv.cout)), conv.cout)
        }
        Op::Linear { inputs, outputs, .. } => (u64::from(inputs) * u64::from(outputs), outputs),
        _ => return 4 * node.constants,
    };
    match (node.numerics, node.weight_bits) {
        (Numerics::F32, _) => 4 * (count + u64::from(channels)),
        (Numerics::Int8, bits) => (count * u64::from(bits.unwrap_or(8))).div_ceil(8) + 8 * u64::from(channels),
    }
}

fn pool_kind(pool: Pool) -> PoolKind {
    match pool {
        Pool::Max => PoolKind::Max,
        Pool::Average => PoolKind::Mean,
    }
}

/// Side of a square of as many taps.
fn side([h, w]: [u32; 2]) -> u32 {
    root(h, w)
}

/// One step for both directions.
fn mean_stride(window: Window) -> u32 {
    root(window.stride[0], window.stride[1])
}

fn root(a: u32, b: u32) -> u32 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the root of two u32 factors"
    )]
    let root = (f64::from(a) * f64::from(b)).sqrt().round() as u32;
    root.max(1)
}

fn clamp(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Any number of dimensions as four: what follows the channels becomes height and width.
fn shape(dims: &[u64]) -> Shape {
    let at = |i: usize| clamp(dims.get(i).copied().unwrap_or(1));
    let rest = dims.iter().skip(3).product::<u64>();
    if dims.len() < 2 {
        return Shape {
            batch: 1,
            channels: at(0),
            height: 1,
            width: 1,
        };
    }
    Shape {
        batch: at(0),
        channels: at(1),
        height: at(2),
        width: clamp(rest),
    }
}
