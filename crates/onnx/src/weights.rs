//! Weights beside a graph, by node name: f32, or symmetric integer codes with one scale per output channel. Checked against
//! the graph once ([`Network::new`]); behind that gate lengths are right and codes are inside their width.

use std::collections::BTreeMap;

use cotk_latency::graph::{Graph, Op, Weights};

use crate::{Error, Result};

/// Weights of one layer, row major: `[cout, cin / groups, kernel, kernel]` or `[outputs, inputs]`.
#[derive(Debug, Clone, PartialEq)]
pub enum Matrix {
    F32(Vec<f32>),
    /// `real = scales[output channel] · code`.
    Int {
        codes: Vec<i8>,
        scales: Vec<f32>,
    },
}

/// Weights and bias of one layer; batch norm is already folded into both.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    pub matrix: Matrix,
    /// One per output channel, in real units.
    pub bias: Vec<f32>,
}

/// A graph with weights that fit it.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    graph: Graph,
    layers: BTreeMap<String, Layer>,
}

impl Network {
    /// The one gate.
    ///
    /// # Errors
    /// [`Error::Weights`]: a layer without weights, weights without a layer, a wrong length or form, a code outside its
    /// width, a value that is not finite.
    pub fn new(graph: Graph, layers: BTreeMap<String, Layer>) -> Result<Self> {
        for node in graph.nodes() {
            let Some((count, channels)) = sizes(&node.op) else {
                continue;
            };
            let fail = |what, found: String, expected: String| Error::Weights {
                layer: node.name.clone(),
                what,
                found,
                expected,
            };
            let layer = layers
                .get(&node.name)
                .ok_or_else(|| fail("layer", "none".into(), "weights".into()))?;
            check(layer, node.op.weights(), count, channels).map_err(|(what, f, e)| fail(what, f, e))?;
        }
        let known = |name: &String| graph.nodes().iter().any(|n| n.name == *name && sizes(&n.op).is_some());
        if let Some(name) = layers.keys().find(|name| !known(name)) {
            return Err(Error::Weights {
                layer: name.clone(),
                what: "layer",
                found: "weights".into(),
                expected: format!("no such layer in `{}`", graph.name()),
            });
        }
        Ok(Self { graph, layers })
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Weights by node name.
    pub fn layers(&self) -> &BTreeMap<String, Layer> {
        &self.layers
    }

    /// Weights of a node that has some.
    pub(crate) fn layer(&self, name: &str) -> &Layer {
        self.layers.get(name).expect("`new` has found weights for every layer")
    }

    /// The same weights at another batch size: ONNX Runtime plans a fixed batch better than an open one.
    ///
    /// # Errors
    /// [`Error::Graph`] when the batch is 0 or far too large.
    pub fn with_batch(&self, batch: u32) -> Result<Self> {
        Ok(Self {
            graph: self.graph.with_batch(batch)?,
            layers: self.layers.clone(),
        })
    }
}

/// Number of weights and of output channels.
fn sizes(op: &Op) -> Option<(usize, usize)> {
    match *op {
        Op::Conv(c) => {
            let taps = (c.kernel * c.kernel) as usize;
            Some((c.cout as usize * (c.cin / c.groups) as usize * taps, c.cout as usize))
        }
        Op::Linear(l) => Some((l.inputs as usize * l.outputs as usize, l.outputs as usize)),
        Op::Add(_) | Op::GlobalAvgPool => None,
    }
}

type Mismatch = (&'static str, String, String);

fn check(layer: &Layer, form: Option<Weights>, count: usize, channels: usize) -> Result<(), Mismatch> {
    let length = |what, found: usize, expected: usize| {
        if found == expected {
            Ok(())
        } else {
            Err((what, found.to_string(), expected.to_string()))
        }
    };
    let finite = |what, values: &[f32]| match values.iter().find(|v| !v.is_finite()) {
        None => Ok(()),
        Some(v) => Err((what, v.to_string(), "finite values".into())),
    };
    length("bias", layer.bias.len(), channels)?;
    finite("bias", &layer.bias)?;
    match (&layer.matrix, form) {
        (Matrix::F32(values), Some(Weights::F32)) => {
            length("weights", values.len(), count)?;
            finite("weights", values)
        }
        (Matrix::Int { codes, scales }, Some(Weights::Int(bits))) => {
            length("codes", codes.len(), count)?;
            length("scales", scales.len(), channels)?;
            // The lowest code may be one below the symmetric range: −128 is no code of ours, −2 and −8 are.
            let lowest = if bits.get() == 8 { -127 } else { -bits.max_code() - 1 };
            if let Some(code) = codes.iter().find(|&&c| c < lowest || c > bits.max_code()) {
                return Err(("code", code.to_string(), format!("{lowest}..={}", bits.max_code())));
            }
            match scales.iter().find(|s| !s.is_finite() || **s <= 0.0) {
                None => Ok(()),
                Some(s) => Err(("scale", s.to_string(), "finite ones above 0".into())),
            }
        }
        (Matrix::F32(_), _) => Err(("form", "f32".into(), "integer codes".into())),
        (Matrix::Int { .. }, _) => Err(("form", "integer codes".into(), "f32".into())),
    }
}

/// Symmetric codes of `weights` (`channels` rows of equal length): scale = largest magnitude / largest code, nearest code,
/// ties to even. A row of zeros gets scale 1.
pub fn quantize(weights: &[f32], channels: usize, bits: cotk_latency::graph::WeightBits) -> Matrix {
    let per_channel = (weights.len() / channels.max(1)).max(1);
    let max_code = f32::from(bits.max_code());
    let scale_of = |row: &[f32]| {
        let largest = row.iter().fold(0.0f32, |m, w| m.max(w.abs()));
        if largest > 0.0 {
            (largest / max_code).max(f32::MIN_POSITIVE)
        } else {
            1.0
        }
    };
    let scales: Vec<f32> = weights.chunks(per_channel).map(scale_of).collect();
    #[expect(clippy::cast_possible_truncation, reason = "clamped to the codes' range")]
    let code = |w: f32, scale: f32| (w / scale).round_ties_even().clamp(-max_code, max_code) as i8;
    let rows = weights.chunks(per_channel).zip(&scales);
    let codes = rows
        .flat_map(|(row, &scale)| row.iter().map(move |&w| code(w, scale)))
        .collect();
    Matrix::Int { codes, scales }
}
