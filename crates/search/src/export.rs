//! From trained weights to files: a typed network, its ONNX, its safetensors. Law: the files hold the same numbers.

use std::collections::BTreeMap;
use std::path::Path;

use cotk_onnx::weights::{Layer, Matrix, Network};
use cotk_onnx::write::to_onnx;
use cotk_run::files;
use safetensors::tensor::{Dtype, TensorView};

use crate::space::{Coding, Point, Range, Space};
use crate::{Result, SearchError};

/// Weights of one layer with normalisation folded in, row major.
#[derive(Debug, Clone, PartialEq)]
pub enum FoldedMatrix {
    F32(Vec<f32>),
    /// `real = scales[output channel] * code`.
    Int {
        codes: Vec<i8>,
        scales: Vec<f32>,
    },
}

/// One layer: weights and one bias per output channel.
#[derive(Debug, Clone, PartialEq)]
pub struct FoldedLayer {
    pub matrix: FoldedMatrix,
    pub bias: Vec<f32>,
}

/// A whole network's weights, as training hands them over.
#[derive(Debug, Clone, PartialEq)]
pub struct Folded {
    /// By slot name, and `head`.
    pub layers: BTreeMap<String, FoldedLayer>,
    /// Input range, then one per node but the classifier; `None` in f32.
    pub ranges: Option<(Range, Vec<Range>)>,
}

/// The network of a point with its weights.
///
/// # Errors
/// [`SearchError::Onnx`] when a weight is no number.
pub fn network(space: &Space, point: &Point, folded: Folded) -> Result<Network> {
    let coding = match folded.ranges {
        None => Coding::Float,
        Some((input, outputs)) => Coding::Int8 { input, outputs },
    };
    let graph = space.graph(point, &coding)?;
    let layer = |layer: FoldedLayer| Layer {
        matrix: match layer.matrix {
            FoldedMatrix::F32(values) => Matrix::F32(values),
            FoldedMatrix::Int { codes, scales } => Matrix::Int { codes, scales },
        },
        bias: layer.bias,
    };
    let layers = folded.layers.into_iter().map(|(name, l)| (name, layer(l))).collect();
    Ok(Network::new(graph, layers)?)
}

/// Writes `network.onnx` (batch 1) and `network.safetensors` (folded codes, scales, biases; `encoding` in its header).
///
/// # Errors
/// [`SearchError::Run`] when a file cannot be written.
pub fn write(network: &Network, encoding: &str, onnx: &Path, weights: &Path) -> Result<()> {
    files::write_atomic(onnx, &to_onnx(network))?;
    files::write_atomic(weights, &safetensors_bytes(network, encoding)?)?;
    Ok(())
}

fn safetensors_bytes(network: &Network, encoding: &str) -> Result<Vec<u8>> {
    let floats = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, layer) in network.layers() {
        let channels = layer.bias.len();
        let shape = |len: usize| vec![channels, len / channels];
        match &layer.matrix {
            Matrix::F32(values) => {
                tensors.push((
                    format!("{name}.weight"),
                    Dtype::F32,
                    shape(values.len()),
                    floats(values),
                ));
            }
            Matrix::Int { codes, scales } => {
                let bytes = codes.iter().map(|c| c.to_le_bytes()[0]).collect();
                tensors.push((format!("{name}.codes"), Dtype::I8, shape(codes.len()), bytes));
                tensors.push((format!("{name}.scales"), Dtype::F32, vec![channels], floats(scales)));
            }
        }
        tensors.push((format!("{name}.bias"), Dtype::F32, vec![channels], floats(&layer.bias)));
    }
    let refuse = |detail: String| SearchError::Train { detail };
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            view.map(|view| (name.as_str(), view))
                .map_err(|e| refuse(format!("tensor `{name}`: {e}")))
        })
        .collect::<Result<Vec<_>>>()?;
    let metadata = std::collections::HashMap::from([("cotk.encoding".to_owned(), encoding.to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(|e| refuse(e.to_string()))
}
