//! ONNX networks that others made, as far as a plan needs them: operators, shapes, numerics and counts, no weights. Shapes
//! are inferred here for one batch size (files leave it open), shape arithmetic is folded, quantize and dequantize pairs
//! become the numerics of edges and operators. An operator nobody knows stays in the list under its own name. Other files
//! that a model names are never opened. Laws: counts equal those of torch and shapes those of onnx (`tests/goldens/onnx`);
//! no bytes make it panic.

use std::path::Path;

use cotk_latency::graph::Numerics;

use crate::{Error, Result};

mod build;
mod constant;
mod convert;
mod label;
pub mod measure;
mod moves;
mod op;
mod shapes;
mod wire;

#[cfg(test)]
mod tests;

pub use self::op::{Conv, Op, Pool, Window};

/// Largest file that is read: a protobuf cannot be larger.
pub const LIMIT_BYTES: u64 = 1 << 31;

/// What to read a file as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// For every input dimension that the file leaves open in first place.
    pub batch: u32,
    /// Shapes of inputs by name, where the file leaves more than that open.
    pub shapes: Vec<(String, Vec<u64>)>,
}

impl Options {
    /// A batch, and shapes as the file has them.
    pub fn of_batch(batch: u32) -> Self {
        Self {
            batch,
            shapes: Vec::new(),
        }
    }
}

/// Where an input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// An input of the network, by its place in [`Network::inputs`].
    Input(usize),
    /// The first or a later output of an earlier node, by the node's place.
    Node(usize),
}

/// One input of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    /// Where it comes from.
    pub source: Source,
    /// Read through a quantize/dequantize pair, or as codes.
    pub is_quantized: bool,
}

/// An input of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// Its name in the file.
    pub name: String,
    /// Its dimensions, the batch filled in.
    pub dims: Vec<u64>,
    /// Whether the file left its first dimension open.
    pub is_batch_open: bool,
}

/// One operator that runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Its name in the file; made from operator and place where it has none.
    pub name: String,
    /// What people call it: the module that its weights belong to, else its name without what exporters put around it.
    pub label: String,
    /// The operator in the file's words: `Conv`, `QLinearConv`, `com.example.Special`.
    pub op_type: String,
    /// What it does.
    pub op: Op,
    /// Its inputs that are not constant.
    pub inputs: Vec<Edge>,
    /// Name of its first output in the file.
    pub output: String,
    /// Dimensions of its first output.
    pub dims: Vec<u64>,
    /// Bytes of one output element when nothing is quantized.
    pub element_bytes: u32,
    /// Whether it can run on codes: decided from its inputs, its weights and who reads its output.
    pub numerics: Numerics,
    /// Elements of its constant inputs (weights, bias).
    pub constants: u64,
    /// Multiply-adds.
    pub macs: u64,
    /// Elements read from and written to activations.
    pub elements: u64,
    /// Its output is an output of the network.
    pub is_output: bool,
    /// Everybody reads its output as codes.
    pub is_output_quantized: bool,
    /// Bits of its weight codes, where a file of ours says so; they run as 8.
    pub weight_bits: Option<u32>,
    /// The shape stands in no rule and not in the file: that of the first input was taken.
    pub is_shape_assumed: bool,
}

/// A network as read.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    /// Its name in the file.
    pub name: String,
    /// Who wrote the file, with version.
    pub producer: String,
    /// Version of the standard operators.
    pub opset: i64,
    /// Its inputs.
    pub inputs: Vec<Input>,
    /// What runs, in order: constants and shape arithmetic are folded away, quantize and dequantize are edges.
    pub nodes: Vec<Node>,
    /// Nodes in the file, all of them.
    pub nodes_in_file: usize,
    /// Elements of all constants.
    pub constants: u64,
    /// Tensors whose values lie in other files.
    pub external_tensors: usize,
}

impl Network {
    /// Multiply-adds of one run.
    pub fn macs(&self) -> u64 {
        self.nodes.iter().map(|n| n.macs).sum()
    }

    /// Operators that nobody knows here, in order.
    pub fn unknown(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|n| matches!(n.op, Op::Unknown))
    }
}

/// Reads the bytes of a model; `file` for messages.
///
/// # Errors
/// [`Error::Decode`] with the place in the file, [`Error::Unsupported`] naming the node, what was found and expected.
pub fn read(file: &str, bytes: &[u8], options: &Options) -> Result<Network> {
    let model = wire::model(bytes).map_err(|broken| Error::Decode {
        file: file.to_owned(),
        detail: format!("at byte {}: {}", broken.offset, broken.detail),
    })?;
    build::network(file, &model, options)
}

/// Reads a file of at most 2 GiB.
///
/// # Errors
/// As [`read`], and [`Error::Run`] for the file.
pub fn from_file(path: &Path, options: &Options) -> Result<Network> {
    read(
        &path.display().to_string(),
        &cotk_run::files::read(path, LIMIT_BYTES)?,
        options,
    )
}
