//! Qwen2-MoE (`Qwen2MoeForCausalLM`): GQA with biases on q, k and v; softmax routing, gates normalised only if
//! `norm_topk_prob`; a shared expert behind a sigmoid gate; dense layers by `mlp_only_layers` and
//! `decoder_sparse_step`. Held to transformers 5.23 by `tests/goldens/qwen2_moe`.

use std::path::Path;

use super::{Family, LayerTensor, Matrix, Tensor, limits, rope};
use crate::config::{ConfigError, Keys};
use crate::moe::RoutingRule;
use crate::spec::{AttentionSpec, LayerKind, LayerSpec, ModelSpec};

pub(super) struct Qwen2Moe;

impl Family for Qwen2Moe {
    fn model_type(&self) -> &'static str {
        "qwen2_moe"
    }

    fn architecture(&self) -> &'static str {
        "Qwen2MoeForCausalLM"
    }

    fn parse_config(&self, file: &Path, text: &str) -> Result<ModelSpec, ConfigError> {
        let mut keys = Keys::parse(file, text)?;
        // Shape keys have no defaults: those of the class are another model's.
        let vocab = keys.size("vocab_size", limits::VOCAB)?;
        let hidden = keys.size("hidden_size", limits::WIDTH)?;
        let context = keys.size("max_position_embeddings", limits::CONTEXT)?;
        let attention = attention(&mut keys, hidden, context)?;
        if let Some(act) = keys.text("hidden_act")?
            && act != "silu"
        {
            return Err(keys.wrong("hidden_act", act, "silu"));
        }
        if let Some(quantization) = keys.object("quantization_config")? {
            drop(quantization);
            return Err(keys.wrong(
                "quantization_config",
                "a quantized checkpoint",
                "f32, f16 or bf16 weights",
            ));
        }
        let layer_count = keys.size("num_hidden_layers", limits::LAYERS)?;
        let routing = routing(&mut keys)?;
        let is_moe = moe_layers(&mut keys, layer_count, &routing)?;
        let windows = windows(&mut keys, layer_count)?;
        let has_moe = is_moe.contains(&true);
        // Widths of a kind of layer that does not occur may be absent.
        let intermediate = if has_moe && !is_moe.contains(&false) {
            keys.ignore(&["intermediate_size"]);
            0
        } else {
            keys.size("intermediate_size", limits::WIDTH)?
        };
        let (moe_intermediate, shared) = if has_moe {
            (
                keys.size("moe_intermediate_size", limits::WIDTH)?,
                keys.size("shared_expert_intermediate_size", limits::WIDTH)?,
            )
        } else {
            keys.ignore(&["moe_intermediate_size", "shared_expert_intermediate_size"]);
            (0, 0)
        };
        let layers = is_moe.iter().zip(windows).map(|(&is_moe, window)| LayerSpec {
            kind: if is_moe {
                LayerKind::Moe {
                    shared_intermediate: Some(shared),
                }
            } else {
                LayerKind::Dense { intermediate }
            },
            window,
        });
        #[expect(clippy::cast_possible_truncation, reason = "an epsilon is used in f32")]
        let norm_eps = keys.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32;
        let spec = ModelSpec {
            family: self.model_type(),
            vocab,
            hidden,
            layers: layers.collect(),
            attention,
            norm_eps,
            tied_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            context,
            routing,
            moe_intermediate,
            bos: keys.numbers("bos_token_id")?.and_then(|ids| ids.first().copied()),
            eos: keys.numbers("eos_token_id")?.unwrap_or_default(),
        };
        keys.finish()?;
        Ok(spec)
    }

    fn tensor_name(&self, tensor: Tensor) -> String {
        let (layer, part) = match tensor {
            Tensor::Embedding => return "model.embed_tokens.weight".to_owned(),
            Tensor::FinalNorm => return "model.norm.weight".to_owned(),
            Tensor::Head => return "lm_head.weight".to_owned(),
            Tensor::Layer(layer, part) => (layer.0, part),
        };
        let mlp = |matrix| match matrix {
            Matrix::Gate => "gate_proj",
            Matrix::Up => "up_proj",
            Matrix::Down => "down_proj",
        };
        let rest = match part {
            LayerTensor::AttentionNorm => "input_layernorm.weight".to_owned(),
            LayerTensor::MixerNorm => "post_attention_layernorm.weight".to_owned(),
            LayerTensor::Query => "self_attn.q_proj.weight".to_owned(),
            LayerTensor::QueryBias => "self_attn.q_proj.bias".to_owned(),
            LayerTensor::Key => "self_attn.k_proj.weight".to_owned(),
            LayerTensor::KeyBias => "self_attn.k_proj.bias".to_owned(),
            LayerTensor::Value => "self_attn.v_proj.weight".to_owned(),
            LayerTensor::ValueBias => "self_attn.v_proj.bias".to_owned(),
            LayerTensor::Output => "self_attn.o_proj.weight".to_owned(),
            LayerTensor::Dense(matrix) => format!("mlp.{}.weight", mlp(matrix)),
            LayerTensor::Router => "mlp.gate.weight".to_owned(),
            LayerTensor::Expert(expert, matrix) => format!("mlp.experts.{}.{}.weight", expert.0, mlp(matrix)),
            LayerTensor::Shared(matrix) => format!("mlp.shared_expert.{}.weight", mlp(matrix)),
            LayerTensor::SharedGate => "mlp.shared_expert_gate.weight".to_owned(),
        };
        format!("model.layers.{layer}.{rest}")
    }
}

fn attention(keys: &mut Keys, hidden: usize, context: usize) -> Result<AttentionSpec, ConfigError> {
    let heads = keys.size("num_attention_heads", limits::WIDTH)?;
    let kv_heads = keys
        .count_at_most("num_key_value_heads", limits::WIDTH)?
        .unwrap_or(heads);
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(keys.wrong("num_key_value_heads", kv_heads, format!("a divisor of {heads} heads")));
    }
    let head_dim = match keys.count_at_most("head_dim", limits::WIDTH)? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(keys.wrong(
                "num_attention_heads",
                heads,
                format!("a divisor of hidden_size {hidden}"),
            ));
        }
    };
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(keys.wrong("head_dim", head_dim, "an even number: rotary positions turn pairs"));
    }
    if heads * head_dim > limits::WIDTH {
        return Err(keys.wrong(
            "head_dim",
            head_dim,
            format!("heads · head_dim up to {}", limits::WIDTH),
        ));
    }
    Ok(AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        qkv_bias: keys.flag("qkv_bias")?.unwrap_or(true),
        rope: rope(keys, 10_000.0, context)?,
    })
}

fn routing(keys: &mut Keys) -> Result<RoutingRule, ConfigError> {
    let published = keys.count_at_most("num_experts", limits::EXPERTS)?;
    let local = keys.count_at_most("num_local_experts", limits::EXPERTS)?;
    let experts = match (published, local) {
        (Some(a), Some(b)) if a != b => return Err(keys.wrong("num_local_experts", b, format!("num_experts = {a}"))),
        (Some(experts), _) | (None, Some(experts)) => experts,
        (None, None) => {
            return Err(ConfigError::Missing {
                file: keys.file().to_owned(),
                key: "num_experts".into(),
            });
        }
    };
    let norm_topk = keys.flag("norm_topk_prob")?.unwrap_or(false);
    let top_k = if experts == 0 {
        keys.ignore(&["num_experts_per_tok"]);
        0
    } else {
        keys.size("num_experts_per_tok", limits::EXPERTS)?
    };
    if top_k > experts {
        return Err(keys.wrong("num_experts_per_tok", top_k, format!("at most {experts} experts")));
    }
    Ok(RoutingRule {
        experts,
        top_k,
        norm_topk,
    })
}

/// Layer i has experts if it is not in `mlp_only_layers` and (i + 1) is a multiple of `decoder_sparse_step`.
fn moe_layers(keys: &mut Keys, layers: usize, routing: &RoutingRule) -> Result<Vec<bool>, ConfigError> {
    let step = keys.count_at_most("decoder_sparse_step", limits::LAYERS)?.unwrap_or(1);
    if step == 0 {
        return Err(keys.wrong("decoder_sparse_step", 0, "1 or more"));
    }
    let dense = keys.numbers("mlp_only_layers")?.unwrap_or_default();
    if let Some(layer) = dense.iter().find(|&&layer| layer as usize >= layers) {
        return Err(keys.wrong("mlp_only_layers", layer, format!("layers below {layers}")));
    }
    let is_dense = |layer: usize| dense.iter().any(|&d| d as usize == layer);
    Ok((0..layers)
        .map(|layer| routing.experts > 0 && !is_dense(layer) && (layer + 1).is_multiple_of(step))
        .collect())
}

/// Windows only by `layer_types`: without it, transformers 4 and 5 give `max_window_layers` opposite meanings.
fn windows(keys: &mut Keys, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let is_used = keys.flag("use_sliding_window")?.unwrap_or(false);
    let width = keys.count_at_most("sliding_window", usize::MAX)?;
    keys.ignore(&["max_window_layers"]);
    let Some(types) = keys.texts("layer_types")? else {
        return if is_used {
            Err(keys.wrong(
                "use_sliding_window",
                "true without `layer_types`",
                "`layer_types`, one per layer",
            ))
        } else {
            Ok(vec![None; layers])
        };
    };
    if types.len() != layers {
        return Err(keys.wrong(
            "layer_types",
            format!("{} entries", types.len()),
            format!("{layers}, one per layer"),
        ));
    }
    types
        .iter()
        .map(|kind| match (kind.as_str(), is_used, width) {
            ("full_attention", ..) => Ok(None),
            ("sliding_attention", true, Some(width)) if width > 0 => Ok(Some(width)),
            ("sliding_attention", true, _) => Err(keys.wrong("sliding_window", "none", "a number above 0")),
            ("sliding_attention", false, _) => {
                Err(keys.wrong("layer_types", kind, "full_attention, as `use_sliding_window` is false"))
            }
            _ => Err(keys.wrong("layer_types", kind, "full_attention or sliding_attention")),
        })
        .collect()
}
