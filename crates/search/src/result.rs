//! What a search found: the `result` of `cotk search --json`. Values only.

use std::path::PathBuf;

use cotk_run::facts::Fact;
use serde::Serialize;

use crate::refit::Refit;

/// One convolution as chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerResult {
    pub name: String,
    pub kernel: u32,
    pub weight_bits: u32,
    pub channels_in: u32,
    pub channels_out: u32,
    pub stride: u32,
}

/// The chosen network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkResult {
    pub encoding: String,
    pub params: u64,
    pub macs: u64,
    /// Weights as coded, with scales and biases.
    pub bytes: u64,
    pub layers: Vec<LayerResult>,
}

/// What it is compared with: as many fine-tuning steps, from the same shared weights.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Baseline {
    pub name: String,
    pub accuracy_test: f64,
    pub measured_ms: f64,
    pub measured_spread_ms: f64,
    pub bytes: u64,
}

/// Files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Exports {
    pub safetensors: PathBuf,
    pub onnx: PathBuf,
}

/// DESIGN 4, `search RECIPE`. Accuracies are 0..1, in ONNX Runtime.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SearchResult {
    pub run: PathBuf,
    pub method: String,
    pub seed: u64,
    pub data: String,
    pub network: NetworkResult,
    pub accuracy_val: f64,
    pub accuracy_test: f64,
    pub target_ms: Option<f64>,
    pub target_bytes: Option<f64>,
    pub predicted_ms: f64,
    pub predicted_spread_ms: f64,
    pub measured_ms: f64,
    pub measured_spread_ms: f64,
    /// Measured against `target_ms`; absent without one.
    pub meets_target: Option<bool>,
    pub baseline: Baseline,
    pub exports: Exports,
    /// Folder of the profile that predicted.
    pub profile: String,
    /// The prediction was more than a tenth off, and the profile has learnt from it.
    pub latency_refit: Option<Refit>,
    pub seconds: f64,
}

/// A finished search.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    pub result: SearchResult,
    pub facts: Vec<Fact>,
    pub warnings: Vec<String>,
    /// Whether an unfinished run was gone on with.
    pub resumed: bool,
}
