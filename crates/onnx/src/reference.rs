//! A network in plain Rust: short loops, the formulas as they are written, sums in f64 (f32) or exact (int8). The truth
//! that ONNX Runtime's outputs are held to; far too slow for anything else.
//!
//! int8: `acc = Σ (x − zp_x)·w + bias` exact in codes (f64 holds every such integer), `y = clamp(round(acc · s_x·s_w / s_y) + zp_y, 0, 255)`, rounded half
//! to even; ReLU is the clamp at zp_y when zp_y = 0, and `max(·, zp_y)` else.

use cotk_latency::graph::{ActQuant, Activation, Conv, Op, Shape, Source};

use crate::weights::{Layer, Matrix, Network};
use crate::write::bias_codes;

/// Outputs of every node in real units, `[batch, channels, height, width]` each, for one input of the graph's shape.
///
/// # Panics
/// When `input` has another length than the graph's input.
pub fn run(network: &Network, input: &[f32]) -> Vec<Vec<f32>> {
    let graph = network.graph();
    assert_eq!(input.len() as u64, graph.input().elements(), "length of the input");
    let input = requantized(input, graph.input_quant());
    let mut values: Vec<Vec<f32>> = Vec::with_capacity(graph.nodes().len());
    for (index, node) in graph.nodes().iter().enumerate() {
        let of = |source: &Source| match *source {
            Source::Input => input.as_slice(),
            Source::Node(from) => values[from].as_slice(),
        };
        let inputs: Vec<&[f32]> = node.inputs.iter().map(of).collect();
        values.push(run_node(network, index, &inputs));
    }
    values
}

/// Output of one node on given inputs in real units.
pub fn run_node(network: &Network, index: usize, inputs: &[&[f32]]) -> Vec<f32> {
    let graph = network.graph();
    let node = &graph.nodes()[index];
    let shape = graph.shape_of(node.inputs[0]);
    let quant = graph.quant_of(node.inputs[0]);
    let sums: Vec<f64> = match node.op {
        Op::Conv(c) => conv(&c, shape, inputs[0], network.layer(&node.name), quant),
        Op::Linear(l) => {
            // A 1x1 convolution of a flattened input.
            let flat = Shape {
                channels: l.inputs,
                height: 1,
                width: 1,
                ..shape
            };
            let as_conv = Conv {
                cin: l.inputs,
                cout: l.outputs,
                kernel: 1,
                stride: 1,
                groups: 1,
                activation: l.activation,
                weights: l.weights,
            };
            conv(&as_conv, flat, inputs[0], network.layer(&node.name), quant)
        }
        Op::Add(_) => inputs[0]
            .iter()
            .zip(inputs[1])
            .map(|(&a, &b)| f64::from(a) + f64::from(b))
            .collect(),
        Op::GlobalAvgPool => {
            let plane = (shape.height * shape.width) as usize;
            let mean = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>() / plane as f64;
            inputs[0].chunks(plane).map(mean).collect()
        }
    };
    let relu = node.op.activation() == Activation::Relu;
    #[expect(clippy::cast_possible_truncation, reason = "activations are f32")]
    let real = |sum: f64| if relu { sum.max(0.0) as f32 } else { sum as f32 };
    let values: Vec<f32> = sums.into_iter().map(real).collect();
    requantized(&values, node.output)
}

/// Values after a quantize/dequantize pair.
fn requantized(values: &[f32], quant: Option<ActQuant>) -> Vec<f32> {
    let Some(quant) = quant else {
        return values.to_vec();
    };
    values.iter().map(|&v| dequantize(code(v, quant), quant)).collect()
}

/// The u8 code of a real value: nearest, ties to even, clamped.
pub fn code(value: f32, quant: ActQuant) -> u8 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=255"
    )]
    let code = ((value / quant.scale).round_ties_even() + f32::from(quant.zero_point)).clamp(0.0, 255.0) as u8;
    code
}

/// The real value of a code.
pub fn dequantize(code: u8, quant: ActQuant) -> f32 {
    quant.scale * (f32::from(code) - f32::from(quant.zero_point))
}

/// Sums before the activation, in real units. `quant` is the input's.
fn conv(c: &Conv, input: Shape, x: &[f32], layer: &Layer, quant: Option<ActQuant>) -> Vec<f64> {
    let (height, width) = (input.height as usize, input.width as usize);
    let (out_h, out_w) = (height.div_ceil(c.stride as usize), width.div_ceil(c.stride as usize));
    let (k, stride, pad) = (c.kernel as usize, c.stride as usize, c.kernel as usize / 2);
    let (cin, cout) = (c.cin as usize, c.cout as usize);
    let (group_in, group_out) = (cin / c.groups as usize, cout / c.groups as usize);
    // int8: everything in codes until the end; f32: codes are the values and both scales are 1.
    let x_codes: Vec<f64> = match (&layer.matrix, quant) {
        (Matrix::Int { .. }, Some(q)) => x
            .iter()
            .map(|&v| f64::from(code(v, q)) - f64::from(q.zero_point))
            .collect(),
        _ => x.iter().map(|&v| f64::from(v)).collect(),
    };
    let w_codes: Vec<f64> = match &layer.matrix {
        Matrix::F32(values) => values.iter().map(|&v| f64::from(v)).collect(),
        Matrix::Int { codes, .. } => codes.iter().map(|&v| f64::from(v)).collect(),
    };
    let (scales, biases): (Vec<f64>, Vec<f64>) = match (&layer.matrix, quant) {
        (Matrix::Int { scales, .. }, Some(q)) => {
            let scales: Vec<f32> = scales.iter().map(|s| s * q.scale).collect();
            let biases = bias_codes(&layer.bias, &scales);
            (
                scales.iter().map(|&s| f64::from(s)).collect(),
                biases.into_iter().map(f64::from).collect(),
            )
        }
        _ => (vec![1.0; cout], layer.bias.iter().map(|&b| f64::from(b)).collect()),
    };
    let mut out = Vec::with_capacity(input.batch as usize * cout * out_h * out_w);
    for sample in x_codes.chunks(cin * height * width) {
        for o in 0..cout {
            for y in 0..out_h {
                for x in 0..out_w {
                    let mut sum = biases[o];
                    for i in 0..group_in {
                        let channel = o / group_out * group_in + i;
                        for dy in 0..k {
                            for dx in 0..k {
                                let (row, column) = (y * stride + dy, x * stride + dx);
                                if (pad..height + pad).contains(&row) && (pad..width + pad).contains(&column) {
                                    let value = sample[(channel * height + row - pad) * width + column - pad];
                                    sum += value * w_codes[((o * group_in + i) * k + dy) * k + dx];
                                }
                            }
                        }
                    }
                    out.push(sum * scales[o]);
                }
            }
        }
    }
    out
}
