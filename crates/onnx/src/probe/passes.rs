//! Chains of operators that our typed graph does not have: pools over windows and passes over values, as ONNX files. Shapes
//! stay, so that one more copy is one more operator.

use cotk_latency::work::{EdgeKey, ElementwiseKey, ElementwiseKind, PoolKey, PoolKind};
use cotk_run::seeds::Seeds;
use prost::Message;

use crate::proto::{self, attribute_type, data_type};
use crate::zoo::uniform;

const OPSET: i64 = 17;
const IR_VERSION: i64 = 8;

/// `copies` pools behind each other, behind a 1x1 convolution that puts channels into blocks where they can be.
pub(super) fn pool(key: &PoolKey, copies: usize) -> Vec<u8> {
    let dims = [key.batch, key.channels, key.height, key.width].map(i64::from);
    let mut file = File::new(dims);
    if key.channels.is_multiple_of(4) && key.channels >= 16 {
        file.pointwise(key.channels);
    }
    let (name, pad) = match key.kind {
        PoolKind::Max => ("MaxPool", key.kernel / 2),
        PoolKind::Mean => ("AveragePool", key.kernel / 2),
    };
    // "Same" padding of an even kernel is one less at the beginning.
    let (before, after) = (i64::from((key.kernel - 1) / 2), i64::from(pad));
    for _ in 0..copies {
        let attributes = vec![
            ints("kernel_shape", &[i64::from(key.kernel); 2]),
            ints("pads", &[before, before, after, after]),
            ints("strides", &[1; 2]),
        ];
        file.push(name, &[], attributes);
    }
    file.encode()
}

/// `copies` passes behind each other.
pub(super) fn elementwise(key: &ElementwiseKey, copies: usize) -> Vec<u8> {
    let dims = [key.batch, key.channels, key.height, key.width].map(i64::from);
    let mut file = File::new(dims);
    for _ in 0..copies {
        match key.kind {
            ElementwiseKind::Unary => file.push("Neg", &[], vec![]),
            ElementwiseKind::Transcendental => file.push("Sigmoid", &[], vec![]),
            ElementwiseKind::Binary | ElementwiseKind::Concat => file.push("Mul", &["input"], vec![]),
        }
    }
    file.encode()
}

/// Codes of the input, `copies` times made floats beside each other: each with a scale of its own, or they would be one.
pub(super) fn dequantize(key: &EdgeKey, copies: usize) -> Vec<u8> {
    let dims = [key.batch, key.channels, key.height, key.width].map(i64::from);
    let mut file = File::new(dims);
    file.initializers.push(proto::Tensor {
        data_type: data_type::UINT8,
        name: "zero".into(),
        raw_data: vec![128],
        ..Default::default()
    });
    file.scale("scale", 1.0 / 128.0);
    file.push("QuantizeLinear", &["scale", "zero"], vec![]);
    let codes = file.last.clone();
    let mut scale = 1.0 / 128.0;
    for copy in 0..copies {
        let name = format!("scale {copy}");
        scale *= 1.25;
        file.scale(&name, scale);
        file.last.clone_from(&codes);
        file.push("DequantizeLinear", &[&name, "zero"], vec![]);
        file.outputs.push(file.last.clone());
    }
    file.encode()
}

struct File {
    /// Empty: the last value alone.
    outputs: Vec<String>,
    dims: [i64; 4],
    nodes: Vec<proto::Node>,
    initializers: Vec<proto::Tensor>,
    last: String,
}

impl File {
    fn new(dims: [i64; 4]) -> Self {
        Self {
            outputs: Vec::new(),
            dims,
            nodes: Vec::new(),
            initializers: Vec::new(),
            last: "input".into(),
        }
    }

    fn push(&mut self, op_type: &str, more: &[&str], attribute: Vec<proto::Attribute>) {
        let name = format!("n{}", self.nodes.len());
        let mut input = vec![std::mem::replace(&mut self.last, name.clone())];
        input.extend(more.iter().map(|m| (*m).to_owned()));
        self.nodes.push(proto::Node {
            input,
            output: vec![name.clone()],
            name,
            op_type: op_type.into(),
            attribute,
            domain: String::new(),
        });
    }

    fn scale(&mut self, name: &str, value: f32) {
        self.initializers.push(proto::Tensor {
            data_type: data_type::FLOAT,
            name: name.into(),
            raw_data: value.to_le_bytes().to_vec(),
            ..Default::default()
        });
    }

    fn pointwise(&mut self, channels: u32) {
        let count = channels as usize * channels as usize;
        let values = uniform(count, 0.1, &mut Seeds::new(1).stream("pointwise"));
        self.initializers.push(proto::Tensor {
            dims: vec![i64::from(channels), i64::from(channels), 1, 1],
            data_type: data_type::FLOAT,
            name: "weight".into(),
            raw_data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            ..Default::default()
        });
        self.push("Conv", &["weight"], vec![ints("kernel_shape", &[1; 2])]);
    }

    fn encode(mut self) -> Vec<u8> {
        if self.outputs.is_empty()
            && let Some(node) = self.nodes.last_mut()
        {
            node.output = vec!["output".into()];
            self.outputs.push("output".into());
        }
        let dims = self.dims;
        let value = |name: &str| proto::ValueInfo {
            name: name.into(),
            r#type: Some(proto::Type {
                tensor_type: Some(proto::TensorType {
                    elem_type: data_type::FLOAT,
                    shape: Some(proto::TensorShape {
                        dim: dims
                            .map(|d| proto::Dimension {
                                dim_value: Some(d),
                                dim_param: None,
                            })
                            .into(),
                    }),
                }),
            }),
        };
        proto::Model {
            ir_version: IR_VERSION,
            producer_name: "cotk".into(),
            graph: Some(proto::Graph {
                node: self.nodes,
                name: "passes".into(),
                initializer: self.initializers,
                input: vec![value("input")],
                output: self.outputs.iter().map(|name| value(name)).collect(),
            }),
            opset_import: vec![proto::OperatorSetId {
                domain: String::new(),
                version: OPSET,
            }],
            ..Default::default()
        }
        .encode_to_vec()
    }
}

fn ints(name: &str, ints: &[i64]) -> proto::Attribute {
    proto::Attribute {
        name: name.into(),
        ints: ints.to_vec(),
        r#type: attribute_type::INTS,
        ..Default::default()
    }
}
