//! ONNX bytes → a typed network: the operators that `write` writes (Conv, Relu, Add, GlobalAveragePool, Flatten, Gemm and
//! Q/DQ pairs), whoever wrote them. Anything else is named and refused. Laws: what was written reads back equal; no bytes
//! make it panic or allocate beyond the file's own size.

use std::collections::{BTreeMap, HashMap};

use cotk_latency::graph::{
    ActQuant, Activation, Conv, Graph, Linear, Node, Op, RawGraph, Shape, Source, WeightBits, Weights,
};
use prost::Message;

use crate::proto::{self, data_type};
use crate::weights::{Layer, Matrix, Network};
use crate::write::BITS_KEY;
use crate::{Error, Result};

/// Largest file that is read.
pub const LIMIT_BYTES: u64 = 1 << 28;

/// Decodes the bytes of a model; `file` for messages.
///
/// # Errors
/// [`Error::Decode`], [`Error::UnknownOp`], [`Error::Unsupported`]; [`Error::Graph`] and [`Error::Weights`] when the parts do
/// not fit together.
pub fn from_onnx(file: &str, bytes: &[u8]) -> Result<Network> {
    let wrong = |detail: String| Error::Decode {
        file: file.to_owned(),
        detail,
    };
    let model = proto::Model::decode(bytes).map_err(|e| wrong(e.to_string()))?;
    let graph = model.graph.ok_or_else(|| wrong("no graph".into()))?;
    let mut reader = Reader {
        file,
        constants: HashMap::new(),
        values: HashMap::new(),
        nodes: Vec::new(),
        layers: BTreeMap::new(),
        input_quant: None,
        bits: bits(&model.metadata_props),
    };
    for tensor in &graph.initializer {
        let constant = constant(tensor).map_err(|d| wrong(format!("tensor `{}`: {d}", tensor.name)))?;
        reader.constants.insert(tensor.name.clone(), constant);
    }
    let inputs: Vec<_> = graph
        .input
        .iter()
        .filter(|i| !reader.constants.contains_key(&i.name))
        .collect();
    let [input] = inputs.as_slice() else {
        return Err(wrong(format!("{} inputs, expected 1", inputs.len())));
    };
    let shape = input_shape(input).map_err(|d| wrong(format!("input `{}`: {d}", input.name)))?;
    reader.values.insert(input.name.clone(), Value::plain(Source::Input));
    for node in &graph.node {
        reader.node(node)?;
    }
    let [output] = graph.output.as_slice() else {
        return Err(wrong(format!("{} outputs, expected 1", graph.output.len())));
    };
    let last = reader.values.get(&output.name).map(|v| v.source);
    if reader.nodes.is_empty() || last != Some(Source::Node(reader.nodes.len() - 1)) {
        return Err(wrong(format!("output `{}` is not that of the last node", output.name)));
    }
    let graph = Graph::new(RawGraph {
        name: graph.name,
        input: shape,
        input_quant: reader.input_quant,
        nodes: reader.nodes,
    })?;
    Network::new(graph, reader.layers)
}

/// A file of at most 256 MiB.
///
/// # Errors
/// As [`from_onnx`], and [`Error::Run`] for the file.
pub fn from_file(path: &std::path::Path) -> Result<Network> {
    from_onnx(&path.display().to_string(), &cotk_run::files::read(path, LIMIT_BYTES)?)
}

fn bits(metadata: &[proto::StringStringEntry]) -> HashMap<String, WeightBits> {
    let entry = |e: &proto::StringStringEntry| {
        let bits = WeightBits::try_from(e.value.parse::<u32>().ok()?).ok()?;
        Some((e.key.strip_prefix(BITS_KEY)?.to_owned(), bits))
    };
    metadata.iter().filter_map(entry).collect()
}

/// A tensor of the file.
#[derive(Debug, Clone)]
struct Constant {
    dims: Vec<usize>,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    F32(Vec<f32>),
    U8(Vec<u8>),
    I8(Vec<i8>),
    I32(Vec<i32>),
}

fn constant(tensor: &proto::Tensor) -> Result<Constant, String> {
    if tensor.data_location != 0 {
        return Err("its data is in another file".into());
    }
    let dims: Vec<usize> = tensor
        .dims
        .iter()
        .map(|&d| usize::try_from(d).map_err(|_| format!("dimension {d}")))
        .collect::<Result<_, _>>()?;
    let count = dims
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .ok_or("too many elements")?;
    let raw = &tensor.raw_data;
    let length = |found: usize, expected: usize| {
        if found == expected {
            Ok(())
        } else {
            Err(format!("{found} values, its shape {dims:?} has {expected}"))
        }
    };
    let whole = |width: usize| {
        if raw.len().is_multiple_of(width) {
            Ok(raw.len() / width)
        } else {
            Err(format!("{} bytes", raw.len()))
        }
    };
    let data = match tensor.data_type {
        data_type::FLOAT if raw.is_empty() => {
            length(tensor.float_data.len(), count)?;
            Data::F32(tensor.float_data.clone())
        }
        data_type::FLOAT => {
            length(whole(4)?, count)?;
            Data::F32(raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        }
        data_type::UINT8 | data_type::INT8 | data_type::INT32 if raw.is_empty() && count > 0 => {
            length(tensor.int32_data.len(), count)?;
            let narrow = |what| format!("a value outside of {what}");
            let values = tensor.int32_data.iter();
            match tensor.data_type {
                data_type::UINT8 => Data::U8(
                    values
                        .map(|&v| u8::try_from(v))
                        .collect::<Result<_, _>>()
                        .map_err(|_| narrow("u8"))?,
                ),
                data_type::INT8 => Data::I8(
                    values
                        .map(|&v| i8::try_from(v))
                        .collect::<Result<_, _>>()
                        .map_err(|_| narrow("i8"))?,
                ),
                _ => Data::I32(tensor.int32_data.clone()),
            }
        }
        data_type::UINT8 => {
            length(raw.len(), count)?;
            Data::U8(raw.clone())
        }
        data_type::INT8 => {
            length(raw.len(), count)?;
            Data::I8(raw.iter().map(|&b| i8::from_le_bytes([b])).collect())
        }
        data_type::INT32 => {
            length(whole(4)?, count)?;
            Data::I32(raw.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect())
        }
        other => return Err(format!("data type {other}, expected float, uint8, int8 or int32")),
    };
    Ok(Constant { dims, data })
}

fn input_shape(input: &proto::ValueInfo) -> Result<Shape, String> {
    let tensor = input
        .r#type
        .as_ref()
        .and_then(|t| t.tensor_type.as_ref())
        .ok_or("not a tensor")?;
    if tensor.elem_type != data_type::FLOAT {
        return Err(format!("element type {}, expected float", tensor.elem_type));
    }
    let dims = &tensor.shape.as_ref().ok_or("no shape")?.dim;
    let fixed = |d: &proto::Dimension| {
        let open = || {
            format!(
                "dimension `{}`, expected a fixed number",
                d.dim_param.clone().unwrap_or_default()
            )
        };
        d.dim_value
            .and_then(|v| u32::try_from(v).ok())
            .filter(|&v| v > 0)
            .ok_or_else(open)
    };
    let dims: Vec<u32> = dims.iter().map(fixed).collect::<Result<_, _>>()?;
    let [batch, channels, height, width] = dims[..] else {
        return Err(format!("shape {dims:?}, expected 4 dimensions"));
    };
    Ok(Shape {
        batch,
        channels,
        height,
        width,
    })
}

/// What a name stands for.
#[derive(Debug, Clone)]
struct Value {
    source: Source,
    /// u8 codes between a Q and its DQ.
    codes: Option<ActQuant>,
    is_flat: bool,
}

impl Value {
    fn plain(source: Source) -> Self {
        Self {
            source,
            codes: None,
            is_flat: false,
        }
    }
}

struct Reader<'a> {
    file: &'a str,
    constants: HashMap<String, Constant>,
    values: HashMap<String, Value>,
    nodes: Vec<Node>,
    layers: BTreeMap<String, Layer>,
    input_quant: Option<ActQuant>,
    bits: HashMap<String, WeightBits>,
}

/// A refusal before it knows its node: what, found, expected.
type Refusal = (&'static str, String, String);

fn refuse<T>(what: &'static str, found: impl ToString, expected: impl ToString) -> Result<T, Refusal> {
    Err((what, found.to_string(), expected.to_string()))
}

impl Reader<'_> {
    fn node(&mut self, node: &proto::Node) -> Result<()> {
        let name = if node.name.is_empty() {
            format!("{}{}", node.op_type, self.nodes.len())
        } else {
            node.name.clone()
        };
        let done = match (node.domain.as_str(), node.op_type.as_str()) {
            ("" | "ai.onnx", "Conv") => self.conv(&name, node),
            ("" | "ai.onnx", "Gemm") => self.gemm(&name, node),
            ("" | "ai.onnx", "Relu") => self.relu(node),
            ("" | "ai.onnx", "Add") => self.add(&name, node),
            ("" | "ai.onnx", "GlobalAveragePool") => self.value(node, 0).map(|x| {
                let at = self.push(&name, Op::GlobalAvgPool, vec![x.source]);
                Value::plain(at)
            }),
            ("" | "ai.onnx", "Flatten") => self.value(node, 0).and_then(|x| match int(node, "axis", 1) {
                1 => Ok(Value { is_flat: true, ..x }),
                axis => refuse("axis", axis, 1),
            }),
            ("" | "ai.onnx", "QuantizeLinear") => self.quantize(node),
            ("" | "ai.onnx", "DequantizeLinear") if self.dequantize_constant(node) => return Ok(()),
            ("" | "ai.onnx", "DequantizeLinear") => self.dequantize(node),
            _ => {
                return Err(Error::UnknownOp {
                    file: self.file.to_owned(),
                    node: name,
                    op: if node.domain.is_empty() {
                        node.op_type.clone()
                    } else {
                        format!("{}.{}", node.domain, node.op_type)
                    },
                });
            }
        };
        let unsupported = |(what, found, expected)| Error::Unsupported {
            file: self.file.to_owned(),
            node: name.clone(),
            what,
            found,
            expected,
        };
        let value = done.map_err(unsupported)?;
        let [output] = node.output.as_slice() else {
            return Err(unsupported(("outputs", node.output.len().to_string(), "1".into())));
        };
        if self.values.insert(output.clone(), value).is_some() {
            return Err(unsupported((
                "output name",
                format!("`{output}` again"),
                "a new one".into(),
            )));
        }
        Ok(())
    }

    fn push(&mut self, name: &str, op: Op, inputs: Vec<Source>) -> Source {
        self.nodes.push(Node {
            name: name.to_owned(),
            op,
            inputs,
            output: None,
        });
        Source::Node(self.nodes.len() - 1)
    }

    /// An input that is a real activation.
    fn value(&self, node: &proto::Node, at: usize) -> Result<Value, Refusal> {
        let name = node.input.get(at).map_or("", String::as_str);
        match self.values.get(name) {
            Some(value) if value.codes.is_none() => Ok(value.clone()),
            Some(_) => refuse("input", format!("codes `{name}`"), "real values"),
            None => refuse("input", format!("`{name}`"), "the output of an earlier node"),
        }
    }

    fn constant(&self, node: &proto::Node, at: usize) -> Result<&Constant, Refusal> {
        let name = node.input.get(at).map_or("", String::as_str);
        self.constants
            .get(name)
            .ok_or(("input", format!("`{name}`"), "a constant".into()))
    }

    fn conv(&mut self, name: &str, node: &proto::Node) -> Result<Value, Refusal> {
        let x = self.value(node, 0)?;
        let dims = self.weight_dims(node, 4)?;
        let [cout, per_group, kernel, kernel_w] = dims[..] else {
            return refuse("weights", format!("{dims:?}"), "4 dimensions");
        };
        if kernel != kernel_w {
            return refuse("kernel", format!("{kernel}x{kernel_w}"), "a square");
        }
        let pad = i64::from(kernel / 2);
        let expect = |what, expected: &[i64]| {
            let found = ints(node, what).unwrap_or_else(|| expected.to_vec());
            if found == expected {
                Ok(())
            } else {
                refuse(what, format!("{found:?}"), format!("{expected:?}"))
            }
        };
        if attribute(node, "auto_pad").is_some_and(|a| a.s != b"NOTSET") {
            return refuse("auto_pad", "set", "NOTSET");
        }
        expect("kernel_shape", &[i64::from(kernel); 2])?;
        expect("dilations", &[1, 1])?;
        // Absent pads are zeros, not "same".
        let pads = ints(node, "pads").unwrap_or_else(|| vec![0; 4]);
        if pads != [pad; 4] {
            return refuse("pads", format!("{pads:?}"), format!("{:?}", [pad; 4]));
        }
        let strides = ints(node, "strides").unwrap_or_else(|| vec![1, 1]);
        let stride = match strides[..] {
            [a, b] if a == b => u32::try_from(a).unwrap_or(0),
            _ => return refuse("strides", format!("{strides:?}"), "two equal ones"),
        };
        let groups = u32::try_from(int(node, "group", 1)).unwrap_or(0);
        let Some(cin) = per_group.checked_mul(groups).filter(|&c| c > 0) else {
            return refuse("group", groups, "a divisor of the channels");
        };
        let weights = self.layer(name, node, cout)?;
        let conv = Conv {
            cin,
            cout,
            kernel,
            stride,
            groups,
            activation: Activation::None,
            weights,
        };
        Ok(Value::plain(self.push(name, Op::Conv(conv), vec![x.source])))
    }

    fn gemm(&mut self, name: &str, node: &proto::Node) -> Result<Value, Refusal> {
        let x = self.value(node, 0)?;
        if !x.is_flat {
            return refuse("input", "not flattened", "the output of Flatten");
        }
        for (what, expected) in [("transA", 0), ("transB", 1)] {
            if int(node, what, 0) != expected {
                return refuse(what, int(node, what, 0), expected);
            }
        }
        for what in ["alpha", "beta"] {
            if let Some(a) = attribute(node, what).filter(|a| a.f != 1.0) {
                return refuse(what, a.f, 1);
            }
        }
        let dims = self.weight_dims(node, 2)?;
        let [outputs, inputs] = dims[..] else {
            return refuse("weights", format!("{dims:?}"), "2 dimensions");
        };
        let weights = self.layer(name, node, outputs)?;
        let linear = Linear {
            inputs,
            outputs,
            activation: Activation::None,
            weights,
        };
        Ok(Value::plain(self.push(name, Op::Linear(linear), vec![x.source])))
    }

    fn weight_dims(&self, node: &proto::Node, count: usize) -> Result<Vec<u32>, Refusal> {
        let dims = &self.constant(node, 1)?.dims;
        let small: Option<Vec<u32>> = dims
            .iter()
            .map(|&d| u32::try_from(d).ok().filter(|&d| d < 1 << 16))
            .collect();
        match small {
            Some(small) if small.len() == count => Ok(small),
            _ => refuse(
                "weights",
                format!("{dims:?}"),
                format!("{count} dimensions below 65536"),
            ),
        }
    }

    /// Weights and bias of a layer; dequantized constants carry their codes under the name of their real value.
    fn layer(&mut self, name: &str, node: &proto::Node, channels: u32) -> Result<Weights, Refusal> {
        let weight = self.constant(node, 1)?.clone();
        let scales = self.constants.get(&format!("{}\u{0}scale", node.input[1])).cloned();
        let bias = match node.input.get(2).filter(|n| !n.is_empty()) {
            None => vec![0.0; channels as usize],
            Some(bias) => {
                let scales = self.constants.get(&format!("{bias}\u{0}scale")).cloned();
                match (&self.constant(node, 2)?.data, scales.map(|s| s.data)) {
                    (Data::F32(values), None) => values.clone(),
                    (Data::I32(codes), Some(Data::F32(scales))) if codes.len() == scales.len() => {
                        #[expect(clippy::cast_possible_truncation, reason = "a bias is f32")]
                        let real = |(&c, &s): (&i32, &f32)| (f64::from(c) * f64::from(s)) as f32;
                        codes.iter().zip(&scales).map(real).collect()
                    }
                    _ => return refuse("bias", "neither float nor int32 with scales per channel", "one of both"),
                }
            }
        };
        let (matrix, form) = match (weight.data, scales.map(|s| s.data)) {
            (Data::F32(values), None) => (Matrix::F32(values), Weights::F32),
            (Data::I8(codes), Some(Data::F32(scales))) => {
                // A file of another program stores no width: all eight bits.
                let bits = self.bits.get(name).copied().unwrap_or(WeightBits::B8);
                (Matrix::Int { codes, scales }, Weights::Int(bits))
            }
            _ => {
                return refuse(
                    "weights",
                    "neither float nor int8 with scales per channel",
                    "one of both",
                );
            }
        };
        self.layers.insert(name.to_owned(), Layer { matrix, bias });
        Ok(form)
    }

    fn relu(&mut self, node: &proto::Node) -> Result<Value, Refusal> {
        let x = self.value(node, 0)?;
        let Source::Node(at) = x.source else {
            return refuse("input", "the graph's input", "a layer's output");
        };
        let last = at + 1 == self.nodes.len();
        let before = &mut self.nodes[at];
        let slot = match &mut before.op {
            Op::Conv(c) => &mut c.activation,
            Op::Linear(l) => &mut l.activation,
            Op::Add(activation) => activation,
            Op::GlobalAvgPool => return refuse("input", "a pool", "a layer or a sum"),
        };
        // A second reader of the bare sum would be an earlier node than this one's reader: only the last node may change.
        if *slot == Activation::Relu || before.output.is_some() || !last {
            return refuse("input", "shared or quantized", "directly behind its layer");
        }
        *slot = Activation::Relu;
        Ok(x)
    }

    fn add(&mut self, name: &str, node: &proto::Node) -> Result<Value, Refusal> {
        let (a, b) = (self.value(node, 0)?, self.value(node, 1)?);
        Ok(Value::plain(self.push(
            name,
            Op::Add(Activation::None),
            vec![a.source, b.source],
        )))
    }

    fn quant(&self, node: &proto::Node) -> Result<ActQuant, Refusal> {
        match (&self.constant(node, 1)?.data, &self.constant(node, 2)?.data) {
            (Data::F32(scale), Data::U8(zero)) if scale.len() == 1 && zero.len() == 1 => Ok(ActQuant {
                scale: scale[0],
                zero_point: zero[0],
            }),
            _ => refuse("activation scale and zero point", "others", "one float and one uint8"),
        }
    }

    fn quantize(&mut self, node: &proto::Node) -> Result<Value, Refusal> {
        let (x, quant) = (self.value(node, 0)?, self.quant(node)?);
        let slot = match x.source {
            Source::Input => &mut self.input_quant,
            Source::Node(at) => &mut self.nodes[at].output,
        };
        match *slot {
            Some(known) if known != quant => return refuse("quantization", format!("{quant:?}"), format!("{known:?}")),
            _ => *slot = Some(quant),
        }
        Ok(Value {
            codes: Some(quant),
            ..x
        })
    }

    fn dequantize(&mut self, node: &proto::Node) -> Result<Value, Refusal> {
        let name = node.input.first().map_or("", String::as_str);
        let quant = self.quant(node)?;
        match self.values.get(name) {
            Some(value) if value.codes == Some(quant) => Ok(Value {
                codes: None,
                ..value.clone()
            }),
            Some(value) => refuse("quantization", format!("{quant:?}"), format!("{:?}", value.codes)),
            None => refuse("input", format!("`{name}`"), "the output of QuantizeLinear"),
        }
    }

    /// `DequantizeLinear` of a constant: its output is that constant with scales beside it.
    fn dequantize_constant(&mut self, node: &proto::Node) -> bool {
        let ([codes, scale, ..], [output]) = (node.input.as_slice(), node.output.as_slice()) else {
            return false;
        };
        let (Some(codes), Some(scale)) = (self.constants.get(codes), self.constants.get(scale)) else {
            return false;
        };
        let zero = node.input.get(2).and_then(|n| self.constants.get(n));
        let is_zero = zero.is_none_or(|z| match &z.data {
            Data::I8(z) => z.iter().all(|&z| z == 0),
            Data::I32(z) => z.iter().all(|&z| z == 0),
            Data::U8(_) | Data::F32(_) => false,
        });
        if !is_zero || int(node, "axis", 1) != 0 {
            return false;
        }
        let (codes, scale) = (codes.clone(), scale.clone());
        self.constants.insert(format!("{output}\u{0}scale"), scale);
        self.constants.insert(output.clone(), codes);
        true
    }
}

fn attribute<'a>(node: &'a proto::Node, name: &str) -> Option<&'a proto::Attribute> {
    node.attribute.iter().find(|a| a.name == name)
}

fn int(node: &proto::Node, name: &str, default: i64) -> i64 {
    attribute(node, name).map_or(default, |a| a.i)
}

fn ints(node: &proto::Node, name: &str) -> Option<Vec<i64>> {
    attribute(node, name).map(|a| a.ints.clone())
}
