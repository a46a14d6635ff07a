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
    /// Epsilon of the RMS norms of hidden states, and of queries and keys where [`AttentionKind::Grouped`] has such.
    pub norm_eps: f32,
    /// Whether the head is the embedding.
    pub tied_embeddings: bool,
    /// Longest sequence in tokens.
    pub context: usize,
    /// How a token chooses experts: the same in all MoE layers. `experts` is 0 in a model that has none.
    pub routing: RoutingRule,
    /// Whether a learned number per expert is added to its score when experts are chosen, and to no gate.
    pub router_bias: bool,
    /// Layers that a checkpoint holds after the decoder's to predict further tokens (DeepSeek-V3); they are left out.
    pub further_layers: usize,
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
    /// Divides `heads`: query head h reads key head ⌊h · kv_heads / heads⌋. Equal to `heads` where keys are latent.
    pub kv_heads: usize,
    /// Width of a query or key head, positions included.
    pub head_dim: usize,
    /// What scores are multiplied by before the softmax: `head_dim`^−½, and what a position scaling adds to it.
    pub scale: f32,
    pub rope: RopeSpec,
    pub kind: AttentionKind,
}

/// How queries, keys and values come from hidden states.
#[derive(Debug, Clone, PartialEq)]
pub enum AttentionKind {
    /// One projection each; values are as wide as keys.
    Grouped {
        /// Whether q, k and v have biases.
        qkv_bias: bool,
        /// Whether the output projection has one.
        output_bias: bool,
        qk_norm: QkNorm,
        /// Elements of q, k and v are held within ± this, before positions.
        clip: Option<f32>,
    },
    /// Multi-head latent attention (DeepSeek-V2, 2024, section 2.1): keys and values of all heads come from one
    /// vector of `kv_rank` per token, positions from one key of `rope.dim` that the heads share.
    Latent {
        /// Width between the two query projections; one projection when absent.
        q_rank: Option<usize>,
        kv_rank: usize,
        /// Width of a value head.
        value_dim: usize,
        /// Whether the projections that read or write hidden states have biases (a query of one projection has none).
        bias: bool,
        /// Epsilon of the norms of the two latent vectors.
        norm_eps: f32,
    },
}

/// RMS norms between projection and positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    None,
    /// Over each head, the weights shared by all heads.
    PerHead,
    /// Over all heads at once.
    Whole,
}

/// Rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Elements of a head that are turned: the last ones. Even.
    pub dim: usize,
    pub layout: RopeLayout,
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// Which elements of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// `(x[j], x[j + dim / 2])`, also called NeoX.
    Halves,
    /// `(x[2j], x[2j + 1])`, also called interleaved.
    Pairs,
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
        /// DeepSeek: weight of the factor that multiplies scores, see the family.
        mscale_all_dim: Option<f64>,
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
    /// Width of a value head where it is narrower than the model's: a container's low rank of values and outputs.
    pub value_dim: Option<usize>,
}

/// What follows attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// One MLP of this inner width.
    Dense { intermediate: usize },
    /// Routed experts, and perhaps a shared one.
    Moe { shared: Option<SharedSpec> },
}

/// An expert that every token visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedSpec {
    pub intermediate: usize,
    pub gate: SharedGate,
}

/// What a shared expert's output is multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedGate {
    /// Nothing: it is added as it is.
    Open,
    /// The sigmoid of a projection of its input to one number.
    Sigmoid,
}

impl AttentionSpec {
    /// Numbers that one token leaves in one layer's cache.
    pub fn cached_per_token(&self) -> usize {
        self.cached_widths().into_iter().sum()
    }

    /// The same row by row: one per key head for keys and one for values, or one for all where keys are latent.
    pub fn cached_widths(&self) -> Vec<usize> {
        match self.kind {
            AttentionKind::Grouped { .. } => vec![self.head_dim; 2 * self.kv_heads],
            AttentionKind::Latent { kv_rank, .. } => vec![kv_rank + self.rope.dim],
        }
    }
}

impl ModelSpec {
    /// Width of a value head of one layer, as its output projection sees it.
    pub fn value_dim(&self, layer: &LayerSpec) -> usize {
        layer.value_dim.unwrap_or(match self.attention.kind {
            AttentionKind::Grouped { .. } => self.attention.head_dim,
            AttentionKind::Latent { value_dim, .. } => value_dim,
        })
    }

    /// [`AttentionSpec::cached_widths`] of one layer.
    pub fn cached_widths(&self, layer: &LayerSpec) -> Vec<usize> {
        let mut widths = self.attention.cached_widths();
        if let (AttentionKind::Grouped { .. }, Some(narrow)) = (&self.attention.kind, layer.value_dim) {
            widths[self.attention.kv_heads..].fill(narrow);
        }
        widths
    }

    /// Layers with routed experts, ascending.
    pub fn moe_layers(&self) -> Vec<LayerId> {
        (0..)
            .zip(&self.layers)
            .filter(|(_, layer)| matches!(layer.kind, LayerKind::Moe { .. }))
            .map(|(i, _)| LayerId(i))
            .collect()
    }
}
