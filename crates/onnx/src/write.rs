//! Network → ONNX bytes. Law: what is written reads back to the same network, and the runtime's outputs equal the plain
//! reference's.
//!
//! QDQ rules, each of which decides whether int8 kernels fuse: u8 activations with zero point 0 behind a ReLU; a
//! quantize/dequantize pair directly behind every convolution (after its ReLU), sum and pool; s8 weights per output channel
//! (axis 0); bias int32 with scale `s_input · s_weight`.

use std::collections::BTreeMap;

use cotk_latency::graph::{ActQuant, Activation, Graph, Op, Shape, Source};
use prost::Message;

use crate::proto::{self, attribute_type, data_type};
use crate::weights::{Layer, Matrix, Network};

/// ONNX operator set: has everything needed, and is read by every runtime of the last years.
const OPSET: i64 = 17;
const IR_VERSION: i64 = 8;
/// Metadata: width of a layer's codes, which the file stores as int8.
pub(crate) const BITS_KEY: &str = "cotk.weight_bits.";

/// The ONNX file of a network: one input `input` `[batch, channels, height, width]`, one output `output`, both f32.
pub fn to_onnx(network: &Network) -> Vec<u8> {
    let last = network.graph().nodes().len() - 1;
    to_onnx_with_outputs(network, &[last])
}

/// The same with the outputs of several nodes: `output` for the last node, else the node's own name.
pub(crate) fn to_onnx_with_outputs(network: &Network, outputs: &[usize]) -> Vec<u8> {
    let graph = network.graph();
    let mut writer = Writer {
        network,
        nodes: Vec::new(),
        initializers: BTreeMap::new(),
    };
    if let Some(quant) = graph.input_quant() {
        writer.quantize("input", "input", "input.dequantized", quant);
    }
    for index in 0..graph.nodes().len() {
        writer.node(index);
    }
    let value = |name: String, dims: Vec<i64>| proto::ValueInfo {
        name,
        r#type: Some(proto::Type {
            tensor_type: Some(proto::TensorType {
                elem_type: data_type::FLOAT,
                shape: Some(proto::TensorShape {
                    dim: dims
                        .into_iter()
                        .map(|d| proto::Dimension {
                            dim_value: Some(d),
                            dim_param: None,
                        })
                        .collect(),
                }),
            }),
        }),
    };
    let weight_bits = graph.nodes().iter().filter_map(|n| match n.op.weights()? {
        cotk_latency::graph::Weights::F32 => None,
        cotk_latency::graph::Weights::Int(bits) => Some(proto::StringStringEntry {
            key: format!("{BITS_KEY}{}", n.name),
            value: bits.get().to_string(),
        }),
    });
    proto::Model {
        ir_version: IR_VERSION,
        producer_name: "cotk".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(proto::Graph {
            node: writer.nodes,
            name: graph.name().to_owned(),
            initializer: writer.initializers.into_values().collect(),
            input: vec![value("input".into(), dims4(graph.input()))],
            output: outputs
                .iter()
                .map(|&index| value(value_name(graph, Source::Node(index)), output_dims(graph, index)))
                .collect(),
        }),
        opset_import: vec![proto::OperatorSetId {
            domain: String::new(),
            version: OPSET,
        }],
        metadata_props: weight_bits.collect(),
    }
    .encode_to_vec()
}

fn dims4(shape: Shape) -> Vec<i64> {
    shape.dims().map(i64::from).to_vec()
}

fn output_dims(graph: &Graph, index: usize) -> Vec<i64> {
    let dims = dims4(graph.shapes()[index]);
    match graph.nodes()[index].op {
        Op::Linear(_) => dims[..2].to_vec(),
        Op::Conv(_) | Op::Add(_) | Op::GlobalAvgPool => dims,
    }
}

/// Name of the f32 value that consumers of a source read.
fn value_name(graph: &Graph, source: Source) -> String {
    match source {
        Source::Input if graph.input_quant().is_some() => "input.dequantized".into(),
        Source::Input => "input".into(),
        Source::Node(index) if index + 1 == graph.nodes().len() => "output".into(),
        Source::Node(index) => format!("{}.value", graph.nodes()[index].name),
    }
}

struct Writer<'a> {
    network: &'a Network,
    nodes: Vec<proto::Node>,
    initializers: BTreeMap<String, proto::Tensor>,
}

impl Writer<'_> {
    fn node(&mut self, index: usize) {
        let graph = self.network.graph();
        let node = &graph.nodes()[index];
        let name = &node.name;
        let mut inputs: Vec<String> = node.inputs.iter().map(|&s| value_name(graph, s)).collect();
        let input_quant = graph.quant_of(node.inputs[0]);
        // The raw result, then ReLU, then the pair: the last of these that exists carries the value's name.
        let value = value_name(graph, Source::Node(index));
        let relu = node.op.activation() == Activation::Relu;
        let raw = if relu || node.output.is_some() {
            format!("{name}.raw")
        } else {
            value.clone()
        };
        match node.op {
            Op::Conv(c) => {
                let layer = self.network.layer(name);
                let dims = [c.cout, c.cin / c.groups, c.kernel, c.kernel].map(i64::from);
                inputs.extend(self.layer(name, layer, &dims, input_quant));
                let (kernel, stride, pad) = (i64::from(c.kernel), i64::from(c.stride), i64::from(c.kernel / 2));
                let attributes = vec![
                    ints("dilations", &[1, 1]),
                    int("group", i64::from(c.groups)),
                    ints("kernel_shape", &[kernel; 2]),
                    ints("pads", &[pad; 4]),
                    ints("strides", &[stride; 2]),
                ];
                self.push(name, "Conv", inputs, &raw, attributes);
            }
            Op::Linear(l) => {
                let flat = format!("{name}.flat");
                self.push(
                    &format!("{name}.flatten"),
                    "Flatten",
                    inputs,
                    &flat,
                    vec![int("axis", 1)],
                );
                let mut flat = flat;
                if let Some(quant) = input_quant {
                    // The kernel fuses only with the pair directly before it; equal pairs around Flatten vanish.
                    let again = format!("{name}.input");
                    self.quantize(&format!("{name}.flat"), &flat, &again, quant);
                    flat = again;
                }
                let layer = self.network.layer(name);
                let mut inputs = vec![flat];
                inputs.extend(self.layer(name, layer, &[i64::from(l.outputs), i64::from(l.inputs)], input_quant));
                self.push(name, "Gemm", inputs, &raw, vec![int("transB", 1)]);
            }
            Op::Add(_) => self.push(name, "Add", inputs, &raw, vec![]),
            Op::GlobalAvgPool => self.push(name, "GlobalAveragePool", inputs, &raw, vec![]),
        }
        let mut last = raw;
        if relu {
            let after = if node.output.is_some() {
                format!("{name}.relu")
            } else {
                value.clone()
            };
            self.push(&format!("{name}.relu"), "Relu", vec![last], &after, vec![]);
            last = after;
        }
        if let Some(quant) = node.output {
            self.quantize(name, &last, &value, quant);
        }
    }

    /// Weights and bias; returns the names that the operator reads.
    fn layer(&mut self, name: &str, layer: &Layer, dims: &[i64], input: Option<ActQuant>) -> [String; 2] {
        let channels = dims[0];
        let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
        match &layer.matrix {
            Matrix::F32(values) => {
                self.initialize(&weight, data_type::FLOAT, dims, f32_bytes(values));
                self.initialize(&bias, data_type::FLOAT, &[channels], f32_bytes(&layer.bias));
                [weight, bias]
            }
            Matrix::Int { codes, scales } => {
                let input = input.expect("a graph gives every int8 layer a quantized input");
                let codes: Vec<u8> = codes.iter().map(|c| c.to_le_bytes()[0]).collect();
                self.initialize(&weight, data_type::INT8, dims, codes);
                self.initialize(
                    &format!("{weight}.scale"),
                    data_type::FLOAT,
                    &[channels],
                    f32_bytes(scales),
                );
                let zeros = vec![0u8; scales.len()];
                self.initialize(&format!("{weight}.zero"), data_type::INT8, &[channels], zeros);
                let bias_scales: Vec<f32> = scales.iter().map(|s| s * input.scale).collect();
                let codes = bias_codes(&layer.bias, &bias_scales);
                let bytes = codes.iter().flat_map(|c| c.to_le_bytes()).collect();
                self.initialize(&bias, data_type::INT32, &[channels], bytes);
                self.initialize(
                    &format!("{bias}.scale"),
                    data_type::FLOAT,
                    &[channels],
                    f32_bytes(&bias_scales),
                );
                for (tensor, zero) in [(&weight, Some(format!("{weight}.zero"))), (&bias, None)] {
                    let mut inputs = vec![tensor.clone(), format!("{tensor}.scale")];
                    inputs.extend(zero);
                    let node = format!("{tensor}.dequantize");
                    self.push(
                        &node,
                        "DequantizeLinear",
                        inputs,
                        &format!("{tensor}.real"),
                        vec![int("axis", 0)],
                    );
                }
                [format!("{weight}.real"), format!("{bias}.real")]
            }
        }
    }

    /// `from` → u8 codes → `to`.
    fn quantize(&mut self, name: &str, from: &str, to: &str, quant: ActQuant) {
        let (scale, zero, codes) = (format!("{name}.scale"), format!("{name}.zero"), format!("{name}.codes"));
        self.initialize(&scale, data_type::FLOAT, &[], f32_bytes(&[quant.scale]));
        self.initialize(&zero, data_type::UINT8, &[], vec![quant.zero_point]);
        let inputs = |x: &str| vec![x.to_owned(), scale.clone(), zero.clone()];
        self.push(
            &format!("{name}.quantize"),
            "QuantizeLinear",
            inputs(from),
            &codes,
            vec![],
        );
        self.push(
            &format!("{name}.dequantize"),
            "DequantizeLinear",
            inputs(&codes),
            to,
            vec![],
        );
    }

    fn push(&mut self, name: &str, op: &str, input: Vec<String>, output: &str, attribute: Vec<proto::Attribute>) {
        self.nodes.push(proto::Node {
            input,
            output: vec![output.to_owned()],
            name: name.to_owned(),
            op_type: op.to_owned(),
            attribute,
            domain: String::new(),
        });
    }

    fn initialize(&mut self, name: &str, data_type: i32, dims: &[i64], raw_data: Vec<u8>) {
        let tensor = proto::Tensor {
            dims: dims.to_vec(),
            data_type,
            name: name.to_owned(),
            raw_data,
            ..Default::default()
        };
        self.initializers.insert(name.to_owned(), tensor);
    }
}

/// int32 codes of a bias: nearest, ties to even.
pub(crate) fn bias_codes(bias: &[f32], scales: &[f32]) -> Vec<i32> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "`as` saturates, which is what is wanted here"
    )]
    let code = |(&b, &s): (&f32, &f32)| (f64::from(b) / f64::from(s)).round_ties_even() as i32;
    bias.iter().zip(scales).map(code).collect()
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn int(name: &str, i: i64) -> proto::Attribute {
    proto::Attribute {
        name: name.to_owned(),
        i,
        r#type: attribute_type::INT,
        ..Default::default()
    }
}

fn ints(name: &str, ints: &[i64]) -> proto::Attribute {
    proto::Attribute {
        name: name.to_owned(),
        ints: ints.to_vec(),
        r#type: attribute_type::INTS,
        ..Default::default()
    }
}
