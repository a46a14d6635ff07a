//! One file per family, nothing about a family outside it: config to [`ModelSpec`], tensor names. This file only
//! finds the family of a config; keys and names that several families share are in `common`, those of DeepSeek's two
//! in `deepseek`.

use std::path::Path;

use cotk_run::units::{ExpertId, LayerId};

use crate::config::{ConfigError, Keys};
use crate::spec::ModelSpec;

mod common;
mod deepseek;
mod deepseek_v2;
mod deepseek_v3;
pub mod gguf;
mod mixtral;
mod olmoe;
mod qwen2_moe;
mod qwen3_moe;
mod stacked;

pub use self::stacked::unstack;

/// Largest sizes that a config may ask for: far above every model, far below overflow.
pub(crate) mod limits {
    pub(crate) const WIDTH: usize = 1 << 17;
    pub(crate) const VOCAB: usize = 1 << 22;
    pub(crate) const LAYERS: usize = 1 << 10;
    pub(crate) const EXPERTS: usize = 1 << 12;
    pub(crate) const CONTEXT: usize = 1 << 26;
}

/// What a family knows: its name, how its config reads, what its tensors are called.
pub trait Family: Send + Sync {
    /// `model_type` in the config.
    fn model_type(&self) -> &'static str;

    /// The name in `architectures`.
    fn architecture(&self) -> &'static str;

    /// The typed form of a config's text.
    ///
    /// # Errors
    /// A missing shape key, a value that is not supported, a key that nobody knows.
    fn parse_config(&self, file: &Path, text: &str) -> Result<ModelSpec, ConfigError>;

    /// The name of a tensor in a Hugging Face checkpoint, as published.
    fn tensor_name(&self, tensor: Tensor) -> String;

    /// The architecture that runs this model in llama.cpp.
    ///
    /// # Errors
    /// What llama.cpp cannot run: its code takes some values for granted.
    fn gguf(&self, spec: &ModelSpec) -> Result<gguf::Arch, gguf::Refusal>;

    /// Another name that it has in some checkpoints.
    fn other_name(&self, tensor: Tensor) -> Option<String> {
        let _ = tensor;
        None
    }

    /// Where the experts of a layer lie in stacks, without an ending: gate and up as one, down.
    fn stacks(&self, layer: LayerId) -> [String; 2] {
        ["gate_up_proj", "down_proj"].map(|part| format!("model.layers.{}.mlp.experts.{part}", layer.0))
    }
}

/// The tensors of a decoder, by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tensor {
    /// `[vocab, hidden]`
    Embedding,
    /// `[hidden]`
    FinalNorm,
    /// `[vocab, hidden]`, absent when tied
    Head,
    /// One of a layer.
    Layer(LayerId, LayerTensor),
}

/// The tensors of one layer. Matrices are `[outputs, inputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerTensor {
    AttentionNorm,
    MixerNorm,
    Query,
    QueryBias,
    Key,
    KeyBias,
    Value,
    ValueBias,
    Output,
    OutputBias,
    /// `[head_dim]`, `[heads · head_dim]`, or of the narrow query in latent attention.
    QueryNorm,
    KeyNorm,
    /// Latent attention: hidden to the narrow query, and that to all heads.
    QueryDown,
    QueryDownBias,
    QueryUp,
    /// Latent attention: hidden to `[kv_rank | rope]`, the norm of the first part, and that to `[plain | value]` of
    /// all heads.
    KeyValueDown,
    KeyValueDownBias,
    KeyValueNorm,
    KeyValueUp,
    /// The MLP of a dense layer.
    Dense(Matrix),
    /// `[experts, hidden]`
    Router,
    /// `[experts]`, see [`ModelSpec::router_bias`].
    RouterBias,
    Expert(ExpertId, Matrix),
    Shared(Matrix),
    /// `[1, hidden]`: its sigmoid scales the shared expert.
    SharedGate,
}

/// The three matrices of an MLP: `down(silu(gate(x)) · up(x))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Matrix {
    /// `[intermediate, hidden]`
    Gate,
    /// `[intermediate, hidden]`
    Up,
    /// `[hidden, intermediate]`
    Down,
}

impl Matrix {
    /// In the order of records.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// `[rows, columns]` for these widths.
    pub fn shape(self, hidden: usize, intermediate: usize) -> [usize; 2] {
        match self {
            Self::Gate | Self::Up => [intermediate, hidden],
            Self::Down => [hidden, intermediate],
        }
    }
}

/// Every family that can be run.
pub static FAMILIES: [&dyn Family; 6] = [
    &deepseek_v2::DeepseekV2,
    &deepseek_v3::DeepseekV3,
    &mixtral::Mixtral,
    &olmoe::Olmoe,
    &qwen2_moe::Qwen2Moe,
    &qwen3_moe::Qwen3Moe,
];

/// The family of this `model_type`.
pub fn by_model_type(model_type: &str) -> Option<&'static dyn Family> {
    FAMILIES.iter().copied().find(|f| f.model_type() == model_type)
}

/// The family of a parsed model.
pub fn of(spec: &ModelSpec) -> &'static dyn Family {
    by_model_type(spec.family).expect("a spec is made by its family")
}

/// Reads a config by its `model_type`, or by `architectures` where that is absent.
///
/// # Errors
/// [`ConfigError`]: not JSON, an unknown architecture, and whatever the family refuses.
pub fn parse_config(file: &Path, text: &str) -> Result<ModelSpec, ConfigError> {
    let mut keys = Keys::parse(file, text)?;
    let model_type = keys.text("model_type")?;
    let architecture = keys.texts("architectures")?.and_then(|names| names.into_iter().next());
    let family = match (&model_type, &architecture) {
        (Some(name), _) => by_model_type(name),
        (None, Some(name)) => FAMILIES.iter().copied().find(|f| f.architecture() == name),
        (None, None) => {
            return Err(ConfigError::Missing {
                file: file.to_owned(),
                key: "model_type".into(),
            });
        }
    };
    // A type of the same name with another head (a classifier) is another architecture.
    let found = match (&family, architecture, model_type) {
        (Some(family), Some(architecture), _) if architecture != family.architecture() => architecture,
        (Some(family), ..) => return family.parse_config(file, text),
        (None, architecture, model_type) => architecture.or(model_type).unwrap_or_default(),
    };
    Err(ConfigError::Architecture {
        file: file.to_owned(),
        found,
        known: FAMILIES.iter().map(|f| f.architecture()).collect(),
    })
}
