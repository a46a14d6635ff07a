//! The walk over a file's nodes: names become edges, constants and shape arithmetic fold away, quantize and dequantize become
//! properties of edges; at the end each operator gets the numerics that onnxruntime would run it in. What an operator is
//! stands in `shapes`.

use std::collections::{HashMap, HashSet};

use cotk_latency::graph::Numerics;

use super::constant::{Constant, Element, fold, values};
use super::shapes::{Inferred, Operand, Refusal, attribute, bounded, infer, refuse};
use super::wire::{self, Dim};
use super::{Edge, Input, Network, Node, Op, Options, Source, label};
use crate::write::BITS_KEY;
use crate::{Error, Result};

/// Nodes of one file, and inputs of one node: beyond any network that runs, and a bound on the work.
const LIMIT_NODES: usize = 20_000;
const LIMIT_INPUTS: usize = 4096;

/// What a name stands for.
#[derive(Debug, Clone)]
struct Value {
    dims: Vec<u64>,
    element: Element,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Constant(Constant),
    Activation(Edge),
}

impl Value {
    fn constant(dims: Vec<u64>, element: Element, numbers: Option<Vec<f64>>) -> Self {
        Self {
            dims,
            element,
            kind: Kind::Constant(Constant {
                numbers,
                is_coded: false,
            }),
        }
    }

    fn operand(&self) -> Operand<'_> {
        let (numbers, is_constant) = match &self.kind {
            Kind::Constant(constant) => (constant.numbers.as_deref(), true),
            Kind::Activation(_) => (None, false),
        };
        Operand {
            dims: &self.dims,
            numbers,
            is_constant,
        }
    }

    /// Its elements may be codes: one byte each, or real values behind 8-bit codes.
    fn is_coded_constant(&self) -> bool {
        matches!(&self.kind, Kind::Constant(c) if c.is_coded || self.element.is_code())
    }
}

/// What is known of a node beside [`Node`], to choose its numerics at the end.
struct Beside {
    /// Its weights, if it has any, are codes.
    has_coded_weights: bool,
    /// It reads and writes codes as it stands (`QLinearConv`, MaxPool of codes).
    is_coded: bool,
    /// Reads that see its real values, and reads behind a quantize/dequantize pair.
    plain_reads: usize,
    quantized_reads: usize,
}

struct Builder<'a> {
    file: &'a str,
    opset: i64,
    values: HashMap<&'a str, Value>,
    /// Shapes that the file states, for operators that nobody knows.
    stated: HashMap<&'a str, &'a wire::ValueInfo<'a>>,
    /// What open dimensions stand for, by name.
    open: HashMap<&'a str, u64>,
    nodes: Vec<Node>,
    beside: Vec<Beside>,
}

/// The network of a decoded file.
pub(super) fn network<'a>(file: &'a str, model: &'a wire::Model<'a>, options: &Options) -> Result<Network> {
    let wrong = |detail: String| Error::Decode {
        file: file.to_owned(),
        detail,
    };
    let graph = model
        .graph
        .as_ref()
        .ok_or_else(|| wrong("no graph: not a model, or an empty one".into()))?;
    if graph.nodes.len() > LIMIT_NODES {
        return Err(wrong(format!(
            "{} nodes, at most {LIMIT_NODES} are read",
            graph.nodes.len()
        )));
    }
    let opset = model
        .opsets
        .iter()
        .find(|(domain, _)| matches!(*domain, "" | "ai.onnx"))
        .map_or(1, |(_, version)| *version);
    let mut builder = Builder {
        file,
        opset,
        values: HashMap::new(),
        stated: graph.values.iter().chain(&graph.outputs).map(|v| (v.name, v)).collect(),
        open: HashMap::new(),
        nodes: Vec::new(),
        beside: Vec::new(),
    };
    let mut constants = 0u64;
    for tensor in &graph.initializers {
        let at = |detail: String| wrong(format!("at byte {}: tensor `{}`: {detail}", tensor.offset, tensor.name));
        let value = tensor_value(tensor).map_err(at)?;
        constants = constants.saturating_add(value.dims.iter().product());
        builder.values.insert(tensor.name, value);
    }
    let inputs = builder.inputs(graph, options)?;
    for node in &graph.nodes {
        if let Some(tensor) = attribute(node, "value").and_then(|a| a.tensor.as_ref())
            && node.op == "Constant"
        {
            constants = constants.saturating_add(tensor.dims.iter().filter_map(|&d| u64::try_from(d).ok()).product());
        }
        builder.node(node)?;
    }
    for output in &graph.outputs {
        match builder.values.get(output.name) {
            Some(Value {
                kind: Kind::Activation(edge),
                ..
            }) => {
                let edge = *edge;
                builder.read(edge);
                if let Source::Node(at) = edge.source {
                    builder.nodes[at].is_output = true;
                }
            }
            Some(_) => {}
            None => return Err(wrong(format!("output `{}` is computed by no node", output.name))),
        }
    }
    if builder.nodes.is_empty() {
        return Err(wrong("nothing runs: no node depends on an input".into()));
    }
    builder.choose_numerics();
    label::make_unique(&mut builder.nodes);
    // Files of our own say how many bits of their codes are used.
    let widths: HashMap<&str, u32> = model
        .metadata
        .iter()
        .filter_map(|(key, bits)| Some((key.strip_prefix(BITS_KEY)?, bits.parse::<u32>().ok()?)))
        .collect();
    for node in &mut builder.nodes {
        node.weight_bits = widths.get(node.name.as_str()).map(|bits| (*bits).clamp(1, 8));
    }
    let external = |t: &&wire::Tensor<'_>| t.is_external;
    Ok(Network {
        name: graph.name.to_owned(),
        producer: format!("{} {}", model.producer, model.producer_version)
            .trim()
            .to_owned(),
        opset,
        inputs,
        nodes: builder.nodes,
        nodes_in_file: graph.nodes.len(),
        constants,
        external_tensors: graph.initializers.iter().filter(external).count(),
    })
}

fn tensor_value(tensor: &wire::Tensor<'_>) -> Result<Value, String> {
    let dims = tensor
        .dims
        .iter()
        .map(|&d| u64::try_from(d).map_err(|_| format!("dimension {d}")))
        .collect::<Result<Vec<u64>, _>>()?;
    let count = bounded(&dims).map_err(|r| format!("{}: found {}, expected {}", r.what, r.found, r.expected))?;
    let numbers = values(tensor, count)?;
    Ok(Value::constant(dims, Element::of(tensor.data_type), numbers))
}

impl<'a> Builder<'a> {
    fn refused(&self, node: &str, refusal: Refusal) -> Error {
        Error::Unsupported {
            file: self.file.to_owned(),
            node: node.to_owned(),
            what: refusal.what,
            found: refusal.found,
            expected: refusal.expected,
        }
    }

    fn inputs(&mut self, graph: &'a wire::Graph<'a>, options: &Options) -> Result<Vec<Input>> {
        let mut inputs = Vec::new();
        for input in graph.inputs.iter() {
            // Old files list weights among the inputs.
            if self.values.contains_key(input.name) {
                continue;
            }
            let (dims, is_open) = self
                .input_dims(input, options)
                .map_err(|refusal| self.refused(input.name, refusal))?;
            let source = Source::Input(inputs.len());
            self.values.insert(
                input.name,
                Value {
                    dims: dims.clone(),
                    element: Element::of(input.element),
                    kind: Kind::Activation(Edge {
                        source,
                        is_quantized: Element::of(input.element).is_code(),
                    }),
                },
            );
            inputs.push(Input {
                name: input.name.to_owned(),
                dims,
                is_batch_open: is_open,
            });
        }
        if inputs.is_empty() {
            return Err(Error::Decode {
                file: self.file.to_owned(),
                detail: "no input that is not a constant".into(),
            });
        }
        let is_no_input = |name: &&(String, Vec<u64>)| !inputs.iter().any(|input| input.name == name.0);
        if let Some((name, _)) = options.shapes.iter().find(is_no_input) {
            let names: Vec<&str> = inputs.iter().map(|input| input.name.as_str()).collect();
            let refusal = Refusal {
                what: "input",
                found: format!("a shape for `{name}`"),
                expected: format!("one of {}", names.join(", ")),
            };
            return Err(self.refused(name, refusal));
        }
        Ok(inputs)
    }

    fn input_dims(&mut self, input: &wire::ValueInfo<'a>, options: &Options) -> Result<(Vec<u64>, bool), Refusal> {
        let Some(stated) = &input.dims else {
            return refuse("shape of the input", "none", "dimensions");
        };
        if let Some((_, asked)) = options.shapes.iter().find(|(name, _)| name == input.name) {
            return self.asked_dims(stated, asked);
        }
        let batch = u64::from(options.batch);
        let mut dims = Vec::with_capacity(stated.len());
        for (i, dim) in stated.iter().enumerate() {
            dims.push(match *dim {
                Dim::Fixed(d) if d > 0 => d.cast_unsigned(),
                Dim::Fixed(_) | Dim::Open(_) if i == 0 => {
                    if let Dim::Open(name) = *dim {
                        self.open.insert(name, batch);
                    }
                    batch
                }
                Dim::Open(name) if self.open.contains_key(name) && !name.is_empty() => self.open[name],
                Dim::Open(name) => {
                    return refuse(
                        "dimension of the input",
                        format!("`{name}` at place {i}"),
                        format!("a fixed number, or a shape by --input-shape {}=…", input.name),
                    );
                }
                Dim::Fixed(d) => return refuse("dimension of the input", d, "1 or more"),
            });
        }
        bounded(&dims)?;
        let is_open = stated.first().is_some_and(|d| !matches!(d, Dim::Fixed(1..)));
        if !is_open && dims.first() != Some(&batch) && options.batch != 1 {
            return refuse(
                "batch",
                format!("{batch} asked for, the file fixes {}", dims.first().unwrap_or(&0)),
                "an export with a dynamic batch",
            );
        }
        Ok((dims, is_open))
    }

    /// A shape that somebody asked for, where it fits what the file fixes.
    fn asked_dims(&mut self, stated: &[Dim<'a>], asked: &[u64]) -> Result<(Vec<u64>, bool), Refusal> {
        if stated.len() != asked.len() || asked.contains(&0) {
            return refuse(
                "dimensions of the input",
                format!("{} asked for", asked.len()),
                format!("{}, each 1 or more", stated.len()),
            );
        }
        for (i, (dim, &wish)) in stated.iter().zip(asked).enumerate() {
            match *dim {
                Dim::Fixed(d) if d > 0 && d.cast_unsigned() != wish => {
                    return refuse("dimension of the input", format!("{wish} asked for at place {i}"), d);
                }
                Dim::Open(name) if !name.is_empty() => match self.open.get(name) {
                    Some(&other) if other != wish => {
                        return refuse(
                            "dimension of the input",
                            format!("`{name}` is {other} and {wish}"),
                            "one number for one name",
                        );
                    }
                    _ => {
                        self.open.insert(name, wish);
                    }
                },
                Dim::Open(_) | Dim::Fixed(_) => {}
            }
        }
        bounded(asked)?;
        let is_open = stated.first().is_some_and(|d| !matches!(d, Dim::Fixed(1..)));
        Ok((asked.to_vec(), is_open))
    }

    /// One node of the file: a constant, an edge, or something that runs.
    fn node(&mut self, node: &'a wire::Node<'a>) -> Result<()> {
        let name = if node.name.is_empty() {
            let output = node.outputs.first().copied().unwrap_or_default();
            format!("{}({output})", node.op)
        } else {
            node.name.to_owned()
        };
        let outputs = self
            .outputs_of(node, &name)
            .map_err(|refusal| self.refused(&name, refusal))?;
        for (&output, value) in node.outputs.iter().zip(outputs) {
            if output.is_empty() {
                continue;
            }
            if self.values.insert(output, value).is_some() {
                let refusal = Refusal {
                    what: "output",
                    found: format!("`{output}` again"),
                    expected: "a new name".into(),
                };
                return Err(self.refused(&name, refusal));
            }
        }
        Ok(())
    }

    fn outputs_of(&mut self, node: &'a wire::Node<'a>, name: &str) -> Result<Vec<Value>, Refusal> {
        let standard = matches!(node.domain, "" | "ai.onnx");
        let quantizer = node.domain == "com.microsoft";
        match node.op {
            "Constant" if standard => return constant_node(node).map(|value| vec![value]),
            "Shape" | "Size" if standard => return Ok(vec![self.shape_of(node)?]),
            "ConstantOfShape" if standard => return Ok(vec![self.filled(node)?]),
            "QuantizeLinear" if standard || quantizer => return Ok(vec![self.quantize(node)?]),
            "DequantizeLinear" if standard || quantizer => return Ok(vec![self.dequantize(node)?]),
            // What a runtime removes.
            "Identity" | "Dropout" if standard => {
                let mut value = self.input(node, 0)?.clone();
                // A bias that exporters share this way has no pair of its own: its other readers stay f32.
                if let Kind::Constant(constant) = &mut value.kind {
                    constant.is_coded = false;
                }
                return Ok(vec![value]);
            }
            _ => {}
        }
        if node.inputs.len() > LIMIT_INPUTS {
            return refuse("inputs", node.inputs.len(), format!("at most {LIMIT_INPUTS}"));
        }
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for (i, input) in node.inputs.iter().enumerate() {
            inputs.push(if input.is_empty() {
                None
            } else {
                Some(self.input(node, i)?)
            });
        }
        let operands: Vec<Option<Operand<'_>>> = inputs.iter().map(|v| v.map(Value::operand)).collect();
        let inferred = infer(node, &operands, self.opset)?;
        let first_element = inputs.iter().flatten().next().map_or(Element::F32, |v| v.element);
        let is_constant = inputs.iter().flatten().all(|v| matches!(v.kind, Kind::Constant(_)));
        if is_constant && !inferred.outputs.is_empty() {
            let numbers: Vec<Option<&[f64]>> = operands.iter().map(|o| o.and_then(|o| o.numbers)).collect();
            let mut numbers = fold(node, &numbers);
            let is_coded = inputs.first().copied().flatten().is_some_and(Value::is_coded_constant);
            let element = inferred.element.unwrap_or(first_element);
            return Ok(inferred
                .outputs
                .into_iter()
                .map(|dims| {
                    let count: u64 = dims.iter().product();
                    let known = numbers.take().filter(|list| list.len() as u64 == count);
                    Value {
                        dims,
                        element,
                        kind: Kind::Constant(Constant {
                            numbers: known,
                            is_coded,
                        }),
                    }
                })
                .collect());
        }
        let shaped = self.shape(node, inferred, &inputs)?;
        Ok(self.push(node, name, shaped))
    }

    /// Output shapes where no rule knows them: those of the file, else those of the first input.
    fn shape(
        &self,
        node: &wire::Node<'a>,
        mut inferred: Inferred,
        inputs: &[Option<&Value>],
    ) -> Result<(Inferred, Vec<Summary>, bool), Refusal> {
        let summaries = inputs
            .iter()
            .map(|value| match value {
                None => Summary::default(),
                Some(value) => Summary {
                    edge: match value.kind {
                        Kind::Activation(edge) => Some(edge),
                        Kind::Constant(_) => None,
                    },
                    elements: value.dims.iter().product(),
                    element: Some(value.element),
                    is_coded_constant: value.is_coded_constant(),
                },
            })
            .collect();
        let mut is_assumed = false;
        if inferred.outputs.is_empty() {
            for output in &node.outputs {
                let stated = self.stated.get(output).and_then(|info| self.stated_dims(info));
                let first = inputs
                    .iter()
                    .flatten()
                    .find(|v| matches!(v.kind, Kind::Activation(_)))
                    .or_else(|| inputs.iter().flatten().next());
                let dims = stated.unwrap_or_else(|| {
                    is_assumed = true;
                    first.map_or_else(Vec::new, |value| value.dims.clone())
                });
                bounded(&dims)?;
                inferred.outputs.push(dims);
            }
        }
        Ok((inferred, summaries, is_assumed))
    }

    fn stated_dims(&self, info: &wire::ValueInfo<'_>) -> Option<Vec<u64>> {
        let dim = |dim: &Dim<'_>| match *dim {
            Dim::Fixed(d) => u64::try_from(d).ok().filter(|&d| d > 0),
            Dim::Open(name) => self.open.get(name).copied(),
        };
        info.dims.as_ref()?.iter().map(dim).collect()
    }

    /// Adds what runs, and says what its outputs are.
    fn push(
        &mut self,
        node: &wire::Node<'a>,
        name: &str,
        (inferred, inputs, is_shape_assumed): (Inferred, Vec<Summary>, bool),
    ) -> Vec<Value> {
        let is_data = |i: &usize| inferred.data.as_ref().is_none_or(|data| data.contains(i));
        let edges: Vec<Edge> = inputs
            .iter()
            .enumerate()
            .filter(|(i, _)| is_data(i))
            .filter_map(|(_, summary)| summary.edge)
            .collect();
        for &edge in &edges {
            self.read(edge);
        }
        let dims = inferred.outputs.first().cloned().unwrap_or_default();
        let written: u64 = inferred.outputs.iter().map(|d| d.iter().product::<u64>()).sum();
        let read: u64 = inputs
            .iter()
            .filter(|s| s.edge.is_some())
            .fold(0u64, |sum, s| sum.saturating_add(s.elements));
        let has_weights = matches!(inferred.op, Op::Conv(_) | Op::Linear { .. });
        let first_data = inputs.iter().find(|s| s.edge.is_some());
        let element = inferred
            .element
            .or(first_data.and_then(|s| s.element))
            .unwrap_or(Element::F32);
        // Words of onnxruntime's quantizer: codes in, codes out.
        let is_linear_form = node.op.starts_with("QLinear") || node.op == "QGemm";
        let element = if is_linear_form { Element::U8 } else { element };
        let is_coded = is_linear_form || element.is_code() && !matches!(inferred.op, Op::Unknown | Op::Elementwise);
        self.nodes.push(Node {
            name: name.to_owned(),
            label: label::of(node, name),
            op_type: if node.domain.is_empty() {
                node.op.to_owned()
            } else {
                format!("{}.{}", node.domain, node.op)
            },
            op: inferred.op,
            inputs: edges,
            output: node.outputs.first().copied().unwrap_or_default().to_owned(),
            dims,
            element_bytes: if element.is_code() { 4 } else { element.bytes() },
            numerics: Numerics::F32,
            constants: inputs
                .iter()
                .filter(|s| s.edge.is_none())
                .fold(0u64, |sum, s| sum.saturating_add(s.elements)),
            macs: macs(&inferred),
            elements: read.saturating_add(written),
            is_output: false,
            is_output_quantized: false,
            weight_bits: None,
            is_shape_assumed,
        });
        self.beside.push(Beside {
            // Weights and bias: onnxruntime leaves a layer in f32 when one of them is not behind a pair of its own.
            has_coded_weights: has_weights && inputs.iter().filter(|s| s.is_constant()).all(|s| s.is_coded_constant),
            is_coded,
            plain_reads: 0,
            quantized_reads: 0,
        });
        let edge = Edge {
            source: Source::Node(self.nodes.len() - 1),
            is_quantized: is_coded,
        };
        inferred
            .outputs
            .into_iter()
            .map(|dims| Value {
                dims,
                element,
                kind: Kind::Activation(edge),
            })
            .collect()
    }

    fn read(&mut self, edge: Edge) {
        if let Source::Node(at) = edge.source {
            if edge.is_quantized {
                self.beside[at].quantized_reads += 1;
            } else {
                self.beside[at].plain_reads += 1;
            }
        }
    }

    fn input(&self, node: &wire::Node<'a>, at: usize) -> Result<&Value, Refusal> {
        let name = node.inputs.get(at).copied().unwrap_or_default();
        match self.values.get(name) {
            Some(value) => Ok(value),
            None => refuse(
                "input",
                format!("`{name}`"),
                "a constant, an input, or the output of an earlier node",
            ),
        }
    }

    fn shape_of(&self, node: &wire::Node<'a>) -> Result<Value, Refusal> {
        let x = self.input(node, 0)?;
        #[expect(clippy::cast_precision_loss, reason = "dimensions stay below 2^40")]
        let (dims, numbers) = if node.op == "Size" {
            (Vec::new(), vec![x.dims.iter().product::<u64>() as f64])
        } else {
            let all: Vec<f64> = x.dims.iter().map(|&d| d as f64).collect();
            let rank = i64::try_from(all.len()).unwrap_or(0);
            let place = |name, default| {
                let v = super::shapes::attribute_int(node, name, default);
                let v = if v < 0 { v.saturating_add(rank) } else { v };
                usize::try_from(v.clamp(0, rank)).unwrap_or(0)
            };
            let (from, to) = (place("start", 0), place("end", rank));
            let part = all[from..to.max(from)].to_vec();
            (vec![part.len() as u64], part)
        };
        Ok(Value::constant(dims, Element::I64, Some(numbers)))
    }

    fn filled(&self, node: &wire::Node<'a>) -> Result<Value, Refusal> {
        let shape = self.input(node, 0)?.operand();
        let Some(numbers) = shape.numbers else {
            return refuse("shape", "values that are computed", "constant ones");
        };
        let dims: Vec<u64> = super::constant::integers(numbers)
            .iter()
            .map(|&d| u64::try_from(d).unwrap_or(u64::MAX))
            .collect();
        let count = bounded(&dims)?;
        let tensor = attribute(node, "value").and_then(|a| a.tensor.as_ref());
        let (element, fill) = match tensor {
            Some(tensor) => (Element::of(tensor.data_type), values(tensor, 1).ok().flatten()),
            None => (Element::F32, Some(vec![0.0])),
        };
        let fill = fill.and_then(|f| f.first().copied());
        let numbers = fill.filter(|_| count <= wire::SMALL as u64);
        let count = usize::try_from(count).unwrap_or(0);
        Ok(Value::constant(dims, element, numbers.map(|f| vec![f; count])))
    }

    fn quantize(&self, node: &wire::Node<'a>) -> Result<Value, Refusal> {
        let mut value = self.input(node, 0)?.clone();
        // The zero point says the type; without one it is uint8, or what newer files say in an attribute.
        let zero = node
            .inputs
            .get(2)
            .filter(|n| !n.is_empty())
            .and_then(|n| self.values.get(n));
        let stated = match super::shapes::attribute_int(node, "output_dtype", 0) {
            0 => Element::U8,
            stated => Element::of(stated),
        };
        value.element = zero.map_or(stated, |z| z.element);
        match &mut value.kind {
            Kind::Activation(edge) => edge.is_quantized = value.element.is_code(),
            Kind::Constant(constant) => {
                constant.numbers = None;
                constant.is_coded = value.element.is_code();
            }
        }
        Ok(value)
    }

    fn dequantize(&self, node: &wire::Node<'a>) -> Result<Value, Refusal> {
        let mut value = self.input(node, 0)?.clone();
        if let Kind::Constant(constant) = &mut value.kind {
            // int32: a bias.
            constant.is_coded = value.element.is_code() || value.element == Element::I32;
            constant.numbers = None;
        }
        value.element = Element::F32;
        Ok(value)
    }

    /// onnxruntime's rules for pairs (its QDQ selectors): codes in, codes out, coded weights.
    fn choose_numerics(&mut self) {
        // From the back: a clamp is absorbed by the codes behind it.
        for at in (0..self.nodes.len()).rev() {
            let (node, beside) = (&self.nodes[at], &self.beside[at]);
            let codes_in = !node.inputs.is_empty() && node.inputs.iter().all(|e| e.is_quantized || self.absorbed(e));
            let codes_out = beside.plain_reads == 0 && beside.quantized_reads > 0;
            let is_int8 = beside.is_coded
                || match node.op {
                    Op::Conv(_) => codes_in && codes_out && beside.has_coded_weights,
                    Op::Linear { .. } => codes_in && beside.has_coded_weights,
                    Op::MatMul { .. }
                    | Op::Add
                    | Op::Concat
                    | Op::Pool(..)
                    | Op::GlobalPool(_)
                    | Op::View
                    | Op::Transpose
                    | Op::Softmax => {
                        codes_in && codes_out && node.op_type != "ReduceMean" && node.op_type != "ReduceMax"
                    }
                    Op::Binary => codes_in && codes_out && node.op_type == "Mul",
                    Op::Activation => codes_in && codes_out && matches!(node.op_type.as_str(), "Sigmoid" | "LeakyRelu"),
                    Op::Copy => {
                        codes_in
                            && codes_out
                            && matches!(node.op_type.as_str(), "Gather" | "Split" | "Resize" | "Slice")
                    }
                    Op::Clamp => codes_out,
                    Op::BatchNorm | Op::Elementwise | Op::Reduce | Op::Unknown => false,
                };
            if is_int8 {
                self.nodes[at].numerics = Numerics::Int8;
                // What a clamp reads directly is coded behind it.
                if matches!(self.nodes[at].op, Op::Clamp)
                    && let [
                        Edge {
                            source: Source::Node(from),
                            is_quantized: false,
                        },
                    ] = self.nodes[at].inputs[..]
                {
                    self.beside[from].plain_reads -= 1;
                    self.beside[from].quantized_reads += 1;
                }
            }
        }
        // Once every clamp is settled, forward: an operator behind an absorbed clamp reads codes.
        for at in 0..self.nodes.len() {
            for i in 0..self.nodes[at].inputs.len() {
                let edge = self.nodes[at].inputs[i];
                let reads_codes = edge.is_quantized || self.absorbed(&edge);
                self.nodes[at].inputs[i].is_quantized = reads_codes;
            }
            let beside = &self.beside[at];
            self.nodes[at].is_output_quantized = beside.plain_reads == 0 && beside.quantized_reads > 0;
        }
    }

    /// A clamp whose only readers see codes: its own input is coded where it is read.
    fn absorbed(&self, edge: &Edge) -> bool {
        let Source::Node(at) = edge.source else { return false };
        let beside = &self.beside[at];
        matches!(self.nodes[at].op, Op::Clamp) && beside.plain_reads == 0 && beside.quantized_reads > 0
    }
}

/// An input as `push` needs it: no borrow of the values.
#[derive(Debug, Default)]
struct Summary {
    edge: Option<Edge>,
    elements: u64,
    element: Option<Element>,
    is_coded_constant: bool,
}

impl Summary {
    fn is_constant(&self) -> bool {
        self.edge.is_none() && self.element.is_some()
    }
}

fn constant_node(node: &wire::Node<'_>) -> Result<Value, Refusal> {
    if let Some(tensor) = attribute(node, "value").and_then(|a| a.tensor.as_ref()) {
        return match tensor_value(tensor) {
            Ok(value) => Ok(value),
            Err(found) => refuse("value", found, "a tensor"),
        };
    }
    #[expect(clippy::cast_precision_loss, reason = "axes and dimensions")]
    let (dims, element, numbers) = if let Some(a) = attribute(node, "value_int") {
        (Vec::new(), Element::I64, vec![a.int as f64])
    } else if let Some(a) = attribute(node, "value_float") {
        (Vec::new(), Element::F32, vec![f64::from(a.float)])
    } else if let Some(a) = attribute(node, "value_ints") {
        let list: Vec<f64> = a.ints.iter().map(|&i| i as f64).collect();
        (vec![list.len() as u64], Element::I64, list)
    } else if let Some(a) = attribute(node, "value_floats") {
        let list: Vec<f64> = a.floats.iter().map(|&f| f64::from(f)).collect();
        (vec![list.len() as u64], Element::F32, list)
    } else {
        let names: HashSet<&str> = node.attributes.iter().map(|a| a.name).collect();
        return refuse("value", format!("{names:?}"), "a tensor, an int or a float");
    };
    let few = numbers.len() <= wire::SMALL;
    Ok(Value::constant(dims, element, few.then_some(numbers)))
}

fn macs(inferred: &Inferred) -> u64 {
    let out = inferred.outputs.first().map_or(0, |d| d.iter().product::<u64>());
    match inferred.op {
        Op::Conv(conv) => {
            let taps = u64::from(conv.window.kernel[0]) * u64::from(conv.window.kernel[1]);
            out.saturating_mul(u64::from(conv.cin / conv.groups))
                .saturating_mul(taps)
        }
        Op::Linear { rows, inputs, outputs } => rows
            .saturating_mul(u64::from(inputs))
            .saturating_mul(u64::from(outputs)),
        Op::MatMul {
            batch,
            rows,
            inner,
            columns,
        } => batch.saturating_mul(rows).saturating_mul(inner).saturating_mul(columns),
        _ => 0,
    }
}
