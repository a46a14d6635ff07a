//! What a model is, after its config was parsed: a value that cannot be wrong. How configs are read: `families`.

use cotk_run::units::LayerId;

use crate::moe::RoutingRule;

/// Shapes and rules of one model. Made by a family's parser; behind it nobody checks again.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the config: `qwen2_moe`.
    pub family: &'static str,
    /// Rows of the embedding; token ids are below it.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// One entry per decoder layer.
    pub layers: Vec<LayerSpec>,
    pub attention: AttentionSpec,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Whether the head is the embedding.
    pub tied_embeddings: bool,
    /// Longest sequence in tokens.
    pub context: usize,
    /// How a token chooses experts: the same in all MoE layers. `experts` is 0 in a model that has none.
    pub routing: RoutingRule,
    /// Inner width of a routed expert as trained.
    pub moe_intermediate: usize,
    /// `bos_token_id`, where the config names one.
    pub bos: Option<u32>,
    /// `eos_token_id`: one, several or none.
    pub eos: Vec<u32>,
}

/// Heads and positions, the same in all layers.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    pub heads: usize,
    /// Divides `heads`: query head h reads key head ⌊h · kv_heads / heads⌋.
    pub kv_heads: usize,
    /// Even.
    pub head_dim: usize,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    pub rope: RopeSpec,
}

/// Rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How frequencies are changed for contexts longer than trained.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    /// YaRN (Peng et al., 2023), as in transformers.
    Yarn {
        factor: f64,
        original_context: f64,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, smooth between.
    Llama3 {
        factor: f64,
        original_context: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
    },
}

/// One decoder layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSpec {
    pub kind: LayerKind,
    /// Query i sees keys j with i − window < j ≤ i; all of them when absent.
    pub window: Option<usize>,
}

/// What follows attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// One MLP of this inner width.
    Dense { intermediate: usize },
    /// Routed experts, and a shared one of this inner width behind a sigmoid gate.
    Moe { shared_intermediate: Option<usize> },
}

impl ModelSpec {
    /// Layers with routed experts, ascending.
    pub fn moe_layers(&self) -> Vec<LayerId> {
        (0..)
            .zip(&self.layers)
            .filter(|(_, layer)| matches!(layer.kind, LayerKind::Moe { .. }))
            .map(|(i, _)| LayerId(i))
            .collect()
    }
}
