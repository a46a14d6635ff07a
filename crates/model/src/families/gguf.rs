//! What llama.cpp calls the tensors of a decoder and the keys of its config, as far as its families agree, and the
//! checks of what its code takes for granted. What is a family's own stands in the family's file.

use cotk_container::gguf::Value;

use super::{LayerTensor, Matrix, Tensor};
use crate::spec::{AttentionKind, LayerKind, ModelSpec, RopeScaling};

/// A family as llama.cpp knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Arch {
    /// `general.architecture`, and the first word of its keys.
    pub name: &'static str,
    /// Rows of queries and keys stand in pairs there (`x[j]` and `x[j + d/2]` become neighbours): rotary positions turn
    /// neighbours.
    pub pairs_rope: bool,
    /// Keys of its own, without the first word.
    pub keys: Vec<(&'static str, Value)>,
}

/// Something in a config that llama.cpp cannot run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// A key, or words.
    pub what: String,
    pub found: String,
    pub expected: String,
}

/// `Ok` if `is_so`, else a refusal.
pub(crate) fn require(
    is_so: bool,
    what: &str,
    found: impl std::fmt::Display,
    expected: impl std::fmt::Display,
) -> Result<(), Refusal> {
    if is_so {
        return Ok(());
    }
    Err(Refusal {
        what: what.to_owned(),
        found: found.to_string(),
        expected: expected.to_string(),
    })
}

/// What llama.cpp takes for granted in every MoE decoder with grouped-query attention: experts in all layers, gates
/// normalised as the code has it, no window shorter than the context.
pub(super) fn check(arch: &str, spec: &ModelSpec, norm_topk: bool) -> Result<(), Refusal> {
    let dense = spec
        .layers
        .iter()
        .position(|l| matches!(l.kind, LayerKind::Dense { .. }));
    let (expected, none) = (
        format!("experts in every layer: `{arch}` has no dense ones"),
        String::new(),
    );
    let found = dense.map_or(none, |layer| format!("layer {layer} dense"));
    require(dense.is_none(), "layers", found, expected)?;
    require(
        spec.routing.norm_topk == norm_topk,
        "norm_topk_prob",
        spec.routing.norm_topk,
        format!("{norm_topk}, which the code of `{arch}` does whatever the file says"),
    )?;
    require(
        spec.routing.scale == 1.0,
        "routed_scaling_factor",
        spec.routing.scale,
        1,
    )?;
    let window = spec.layers.iter().filter_map(|l| l.window).min();
    let is_short = window.is_some_and(|window| window < spec.context);
    let expected = format!("none, or the context of {}: `{arch}` looks at all keys", spec.context);
    require(!is_short, "sliding_window", window.unwrap_or(0), expected)
}

/// Heads of d / heads, which some architectures take for granted.
pub(super) fn check_head_dim(arch: &str, spec: &ModelSpec) -> Result<(), Refusal> {
    let width = spec.hidden / spec.attention.heads;
    let expected = format!("{width}, hidden_size / heads: `{arch}` has no other");
    require(
        spec.attention.head_dim == width,
        "head_dim",
        spec.attention.head_dim,
        expected,
    )
}

/// Biases and clipping that an architecture has no tensor or code for.
pub(super) fn check_attention(arch: &str, spec: &ModelSpec, may_bias_qkv: bool) -> Result<(), Refusal> {
    let AttentionKind::Grouped {
        qkv_bias,
        output_bias,
        clip,
        ..
    } = spec.attention.kind
    else {
        return require(false, "attention", "latent", "grouped");
    };
    let expected = format!("none: `{arch}` has no such tensor");
    require(may_bias_qkv || !qkv_bias, "biases of q, k, v", "some", &expected)?;
    require(!output_bias, "bias of the attention output", "one", &expected)?;
    require(
        clip.is_none(),
        "clip_qkv",
        clip.unwrap_or(0.0),
        format!("null: `{arch}` does not clip"),
    )
}

/// A count or a width as a value.
pub(crate) fn width(n: usize) -> Value {
    Value::U32(u32::try_from(n).expect("configs have limits far below"))
}

/// Keys that all architectures have, without the first word.
pub(crate) fn common_keys(spec: &ModelSpec) -> Result<Vec<(&'static str, Value)>, Refusal> {
    #[expect(clippy::cast_possible_truncation, reason = "llama.cpp holds it in f32")]
    let theta = spec.attention.rope.theta as f32;
    let mut keys = vec![
        ("block_count", width(spec.layers.len())),
        ("context_length", width(spec.context)),
        ("embedding_length", width(spec.hidden)),
        ("attention.head_count", width(spec.attention.heads)),
        ("attention.layer_norm_rms_epsilon", Value::F32(spec.norm_eps)),
        ("rope.freq_base", Value::F32(theta)),
        ("rope.dimension_count", width(spec.attention.rope.dim)),
        ("expert_count", width(spec.routing.experts)),
        ("expert_used_count", width(spec.routing.top_k)),
        ("vocab_size", width(spec.vocab)),
    ];
    match spec.attention.kind {
        AttentionKind::Grouped { .. } => {
            keys.push(("attention.head_count_kv", width(spec.attention.kv_heads)));
            if spec.attention.head_dim * spec.attention.heads != spec.hidden {
                keys.push(("attention.key_length", width(spec.attention.head_dim)));
                keys.push(("attention.value_length", width(spec.attention.head_dim)));
            }
        }
        // One key of latent values and positions, which all heads share.
        AttentionKind::Latent { kv_rank, value_dim, .. } => keys.extend([
            ("attention.head_count_kv", Value::U32(1)),
            ("attention.key_length", width(kv_rank + spec.attention.rope.dim)),
            ("attention.value_length", width(kv_rank)),
            ("attention.key_length_mla", width(spec.attention.head_dim)),
            ("attention.value_length_mla", width(value_dim)),
            ("attention.kv_lora_rank", width(kv_rank)),
        ]),
    }
    keys.extend(rope_keys(&spec.attention.rope.scaling)?);
    Ok(keys)
}

/// Position scaling. YaRN as llama.cpp has it: betas 32 and 1, cos and sin times 0.1 ln(factor) + 1.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "llama.cpp holds factors in f32 and contexts in u32"
)]
fn rope_keys(scaling: &RopeScaling) -> Result<Vec<(&'static str, Value)>, Refusal> {
    match scaling {
        RopeScaling::None => Ok(Vec::new()),
        RopeScaling::Linear { factor } => Ok(vec![
            ("rope.scaling.type", "linear".into()),
            ("rope.scaling.factor", Value::F32(*factor as f32)),
        ]),
        RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor,
            mscale_all_dim,
        } => {
            // With a weight for all dimensions (DeepSeek) scores are scaled in place of cos and sin.
            let turned = if mscale_all_dim.is_some() {
                1.0
            } else {
                0.1 * factor.ln() + 1.0
            };
            let is_known =
                *beta_fast == 32.0 && *beta_slow == 1.0 && *truncate && (attention_factor - turned).abs() < 1e-6;
            let expected = "beta_fast 32, beta_slow 1, mscale as mscale_all_dim, no attention_factor";
            require(is_known, "rope_scaling", "yarn with other constants", expected)?;
            let mut keys = vec![
                ("rope.scaling.type", "yarn".into()),
                ("rope.scaling.factor", Value::F32(*factor as f32)),
                (
                    "rope.scaling.original_context_length",
                    Value::U32(*original_context as u32),
                ),
            ];
            // llama.cpp divides by 0.1 again.
            let weight = mscale_all_dim.map(|weight| Value::F32((0.1 * weight) as f32));
            keys.extend(weight.map(|weight| ("rope.scaling.yarn_log_multiplier", weight)));
            Ok(keys)
        }
        RopeScaling::Llama3 { .. } => Err(Refusal {
            what: "rope_scaling".to_owned(),
            found: "llama3".to_owned(),
            expected: "none, linear or yarn".to_owned(),
        }),
    }
}

/// The name of a tensor that stands alone. `None`: it is stacked with its neighbours ([`stack_name`]), or is cut into
/// one for keys and one for values.
pub(crate) fn tensor_name(spec: &ModelSpec, tensor: Tensor) -> Option<String> {
    let (layer, part) = match tensor {
        Tensor::Embedding => return Some("token_embd.weight".to_owned()),
        Tensor::FinalNorm => return Some("output_norm.weight".to_owned()),
        Tensor::Head => return Some("output.weight".to_owned()),
        Tensor::Layer(layer, part) => (layer.0, part),
    };
    let rest = match part {
        LayerTensor::AttentionNorm => "attn_norm.weight".to_owned(),
        LayerTensor::MixerNorm => "ffn_norm.weight".to_owned(),
        LayerTensor::Query => "attn_q.weight".to_owned(),
        LayerTensor::QueryBias => "attn_q.bias".to_owned(),
        LayerTensor::Key => "attn_k.weight".to_owned(),
        LayerTensor::KeyBias => "attn_k.bias".to_owned(),
        LayerTensor::Value => "attn_v.weight".to_owned(),
        LayerTensor::ValueBias => "attn_v.bias".to_owned(),
        LayerTensor::Output => "attn_output.weight".to_owned(),
        LayerTensor::OutputBias => "attn_output.bias".to_owned(),
        LayerTensor::QueryNorm => match spec.attention.kind {
            AttentionKind::Grouped { .. } => "attn_q_norm.weight".to_owned(),
            AttentionKind::Latent { .. } => "attn_q_a_norm.weight".to_owned(),
        },
        LayerTensor::KeyNorm => "attn_k_norm.weight".to_owned(),
        LayerTensor::QueryDown => "attn_q_a.weight".to_owned(),
        LayerTensor::QueryDownBias => "attn_q_a.bias".to_owned(),
        LayerTensor::QueryUp => "attn_q_b.weight".to_owned(),
        LayerTensor::KeyValueDown => "attn_kv_a_mqa.weight".to_owned(),
        LayerTensor::KeyValueDownBias => "attn_kv_a_mqa.bias".to_owned(),
        LayerTensor::KeyValueNorm => "attn_kv_a_norm.weight".to_owned(),
        LayerTensor::KeyValueUp | LayerTensor::Expert(..) => return None,
        LayerTensor::Dense(matrix) => format!("ffn_{}.weight", short(matrix)),
        LayerTensor::Router => "ffn_gate_inp.weight".to_owned(),
        LayerTensor::RouterBias => "exp_probs_b.bias".to_owned(),
        LayerTensor::Shared(matrix) => format!("ffn_{}_shexp.weight", short(matrix)),
        LayerTensor::SharedGate => "ffn_gate_inp_shexp.weight".to_owned(),
    };
    Some(format!("blk.{layer}.{rest}"))
}

/// What latent attention is cut into: keys from latent vectors, `[heads, kv_rank, plain]`, and values from them,
/// `[heads, value, kv_rank]`.
pub(crate) fn latent_names(layer: u32) -> [String; 2] {
    ["k", "v"].map(|half| format!("blk.{layer}.attn_{half}_b.weight"))
}

/// The stack of one matrix of all experts of a layer, `[experts, rows, columns]`.
pub(crate) fn stack_name(layer: u32, matrix: Matrix) -> String {
    format!("blk.{layer}.ffn_{}_exps.weight", short(matrix))
}

fn short(matrix: Matrix) -> &'static str {
    match matrix {
        Matrix::Gate => "gate",
        Matrix::Up => "up",
        Matrix::Down => "down",
    }
}
