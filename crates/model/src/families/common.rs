//! What configs and tensor names of several families have in common. Each function reads the keys that it names and
//! no others; defaults that differ between families are arguments. Not here: what only one family has.

use crate::checkpoint::SCALE_BLOCK;
use crate::config::{ConfigError, Keys};
use crate::moe::RoutingRule;
use crate::spec::{AttentionKind, AttentionSpec, LayerSpec, ModelSpec, RopeLayout, RopeScaling, RopeSpec};

use super::{LayerTensor, Matrix, Tensor, limits};

/// Keys that every decoder has and that depend on no other.
pub(super) struct Basics {
    pub(super) vocab: usize,
    pub(super) hidden: usize,
    pub(super) context: usize,
    pub(super) layers: usize,
    pub(super) norm_eps: f32,
    pub(super) tied_embeddings: bool,
    pub(super) bos: Option<u32>,
    pub(super) eos: Vec<u32>,
}

impl Basics {
    /// A model without biases in routing and without layers that it leaves out: what a family has of those, it adds.
    pub(super) fn spec(
        self,
        family: &'static str,
        attention: AttentionSpec,
        layers: Vec<LayerSpec>,
        (routing, moe_intermediate): (RoutingRule, usize),
    ) -> ModelSpec {
        ModelSpec {
            family,
            vocab: self.vocab,
            hidden: self.hidden,
            layers,
            attention,
            norm_eps: self.norm_eps,
            tied_embeddings: self.tied_embeddings,
            context: self.context,
            routing,
            router_bias: false,
            further_layers: 0,
            moe_intermediate,
            bos: self.bos,
            eos: self.eos,
        }
    }
}

/// Shape keys have no defaults: those of the classes are other models'.
pub(super) fn basics(keys: &mut Keys, default_eps: f64) -> Result<Basics, ConfigError> {
    if let Some(act) = keys.text("hidden_act")?
        && act != "silu"
    {
        return Err(keys.wrong("hidden_act", act, "silu"));
    }
    if let Some(quantization) = keys.object("quantization_config")? {
        fp8(quantization)?;
    }
    let vocab = keys.size("vocab_size", limits::VOCAB)?;
    let bos = keys.numbers("bos_token_id")?.and_then(|ids| ids.first().copied());
    let eos = keys.numbers("eos_token_id")?.unwrap_or_default();
    for (key, ids) in [("bos_token_id", bos.as_slice()), ("eos_token_id", &eos)] {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(keys.wrong(key, id, format!("below vocab_size {vocab}")));
        }
    }
    #[expect(clippy::cast_possible_truncation, reason = "an epsilon is used in f32")]
    let norm_eps = keys.positive("rms_norm_eps")?.unwrap_or(default_eps) as f32;
    Ok(Basics {
        vocab,
        hidden: keys.size("hidden_size", limits::WIDTH)?,
        context: keys.size("max_position_embeddings", limits::CONTEXT)?,
        layers: keys.size("num_hidden_layers", limits::LAYERS)?,
        norm_eps,
        tied_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
        bos,
        eos,
    })
}

/// FP8 in blocks is all that is read; which tensors have it, their types tell. Activations, which the published engine
/// rounds too, stay in f32.
fn fp8(mut keys: Keys) -> Result<(), ConfigError> {
    let method = keys.text("quant_method")?.unwrap_or_default();
    if method != "fp8" {
        return Err(keys.wrong("quant_method", method, "fp8, or a checkpoint in f32, f16 or bf16"));
    }
    for (key, only) in [("fmt", "e4m3"), ("activation_scheme", "dynamic")] {
        if let Some(found) = keys.text(key)?
            && found != only
        {
            return Err(keys.wrong(key, found, only));
        }
    }
    let block = u32::try_from(SCALE_BLOCK).expect("small");
    let found = keys.numbers("weight_block_size")?;
    if found.as_deref() != Some(&[block, block]) {
        let found = found.map_or("none".to_owned(), |size| format!("{size:?}"));
        return Err(keys.wrong("weight_block_size", found, format!("[{block}, {block}]")));
    }
    keys.ignore(&["modules_to_not_convert"]);
    keys.finish()
}

/// `width`^−½.
#[expect(clippy::cast_precision_loss, reason = "head widths are small")]
pub(super) fn scale(width: usize) -> f64 {
    (width as f64).powf(-0.5)
}

/// Grouped-query attention, positions in halves: `num_attention_heads`, `num_key_value_heads` (as many where absent),
/// `head_dim` (hidden / heads where absent), and the keys of [`rope`]. `kind` is the family's.
pub(super) fn grouped(
    keys: &mut Keys,
    basics: &Basics,
    default_theta: f64,
    kind: AttentionKind,
) -> Result<AttentionSpec, ConfigError> {
    let hidden = basics.hidden;
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
    #[expect(clippy::cast_possible_truncation, reason = "scores are f32")]
    let scale = scale(head_dim) as f32;
    Ok(AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        scale,
        rope: rope(keys, default_theta, basics.context, (head_dim, RopeLayout::Halves))?,
        kind,
    })
}

/// The number of experts, by any of the names that it goes by; where several are there they must agree.
pub(super) fn experts(keys: &mut Keys, names: &[&'static str]) -> Result<usize, ConfigError> {
    let mut found: Option<(&str, usize)> = None;
    for &name in names {
        match (keys.count_at_most(name, limits::EXPERTS)?, found) {
            (Some(b), Some((first, a))) if a != b => return Err(keys.wrong(name, b, format!("{first} = {a}"))),
            (Some(count), None) => found = Some((name, count)),
            (Some(_), Some(_)) | (None, _) => {}
        }
    }
    found.map(|(_, count)| count).ok_or_else(|| ConfigError::Missing {
        file: keys.file().to_owned(),
        key: names[0].into(),
    })
}

/// `num_experts_per_tok`: from 1 to the number of experts, or 0 where there are none.
pub(super) fn top_k(keys: &mut Keys, experts: usize) -> Result<usize, ConfigError> {
    if experts == 0 {
        keys.ignore(&["num_experts_per_tok"]);
        return Ok(0);
    }
    let top_k = keys.size("num_experts_per_tok", limits::EXPERTS)?;
    if top_k > experts {
        return Err(keys.wrong("num_experts_per_tok", top_k, format!("at most {experts} experts")));
    }
    Ok(top_k)
}

/// Softmax routing; `norm_topk_prob` is false where absent.
pub(super) fn softmax_routing(keys: &mut Keys) -> Result<RoutingRule, ConfigError> {
    let experts = experts(keys, &["num_experts", "num_local_experts"])?;
    Ok(RoutingRule {
        norm_topk: keys.flag("norm_topk_prob")?.unwrap_or(false),
        ..RoutingRule::softmax(experts, top_k(keys, experts)?)
    })
}

/// Qwen: layer i has experts if it is not in `mlp_only_layers` and (i + 1) is a multiple of `decoder_sparse_step`.
pub(super) fn sparse_layers(keys: &mut Keys, layers: usize, experts: usize) -> Result<Vec<bool>, ConfigError> {
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
        .map(|layer| experts > 0 && !is_dense(layer) && (layer + 1).is_multiple_of(step))
        .collect())
}

/// A width that only layers of one kind have: 0 where there is no such layer.
pub(super) fn width_of(keys: &mut Keys, key: &'static str, is_needed: bool) -> Result<usize, ConfigError> {
    if is_needed {
        keys.size(key, limits::WIDTH)
    } else {
        keys.ignore(&[key]);
        Ok(0)
    }
}

/// A number of keys that a window holds, the query's own too.
pub(super) fn window(keys: &mut Keys) -> Result<Option<usize>, ConfigError> {
    match keys.count_at_most("sliding_window", usize::MAX)? {
        Some(0) => Err(keys.wrong("sliding_window", 0, "a number above 0")),
        window => Ok(window),
    }
}

/// `rope_theta` and `rope_scaling` of published configs, or `rope_parameters` as transformers 5 writes it.
///
/// `dim` and `layout` are the family's.
pub(super) fn rope(
    keys: &mut Keys,
    default_theta: f64,
    context: usize,
    (dim, layout): (usize, RopeLayout),
) -> Result<RopeSpec, ConfigError> {
    let flat_theta = keys.positive("rope_theta")?;
    let scaling = keys.object("rope_scaling")?;
    let parameters = keys.object("rope_parameters")?;
    if let (Some(_), Some(_)) = (&scaling, &parameters) {
        return Err(keys.wrong("rope_scaling", "beside `rope_parameters`", "one of the two"));
    }
    let Some(mut rope) = parameters.or(scaling) else {
        return Ok(RopeSpec {
            dim,
            layout,
            theta: flat_theta.unwrap_or(default_theta),
            scaling: RopeScaling::None,
        });
    };
    let theta = rope.positive("rope_theta")?.or(flat_theta).unwrap_or(default_theta);
    let old_name = rope.text("type")?;
    let kind = rope
        .text("rope_type")?
        .or(old_name)
        .unwrap_or_else(|| "default".to_owned());
    if let Some(share) = rope.positive("partial_rotary_factor")?
        && share != 1.0
    {
        return Err(rope.wrong("partial_rotary_factor", share, "1"));
    }
    #[expect(clippy::cast_precision_loss, reason = "contexts are far below 2^53")]
    let context = context as f64;
    let scaling = match kind.as_str() {
        "default" => RopeScaling::None,
        // NTK by length changes nothing up to `max_position_embeddings`, and no sequence here is longer: beyond, keys
        // already cached would need turning again at every step (transformers leaves them turned by another theta).
        "dynamic" => {
            rope.required_positive("factor")?;
            RopeScaling::None
        }
        "linear" => RopeScaling::Linear {
            factor: rope.required_positive("factor")?,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: rope.required_positive("factor")?,
            original_context: rope.positive("original_max_position_embeddings")?.unwrap_or(context),
            low_freq_factor: rope.required_positive("low_freq_factor")?,
            high_freq_factor: rope.required_positive("high_freq_factor")?,
        },
        "yarn" => yarn(&mut rope, context)?,
        _ => return Err(rope.wrong("rope_type", kind, "default, linear, dynamic, yarn or llama3")),
    };
    rope.finish()?;
    Ok(RopeSpec {
        dim,
        layout,
        theta,
        scaling,
    })
}

/// YaRN with the defaults of transformers; its factor on cos and sin is resolved here.
fn yarn(rope: &mut Keys, context: f64) -> Result<RopeScaling, ConfigError> {
    let original_context = rope.positive("original_max_position_embeddings")?.unwrap_or(context);
    let factor = rope.positive("factor")?.unwrap_or(context / original_context);
    // A weight of 0 means that there is none.
    let mscale = rope.at_least_zero("mscale")?.filter(|m| *m > 0.0);
    let mscale_all_dim = rope.at_least_zero("mscale_all_dim")?.filter(|m| *m > 0.0);
    let attention_factor = rope
        .positive("attention_factor")?
        .unwrap_or(match (mscale, mscale_all_dim) {
            (Some(mscale), Some(all_dim)) => yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim),
            _ => yarn_mscale(factor, 1.0),
        });
    Ok(RopeScaling::Yarn {
        factor,
        original_context,
        beta_fast: rope.positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: rope.positive("beta_slow")?.unwrap_or(1.0),
        truncate: rope.flag("truncate")?.unwrap_or(true),
        attention_factor,
        mscale_all_dim,
    })
}

/// How much YaRN sharpens attention: 0.1 · weight · ln factor + 1 (Peng et al., 2023, eq. 22, with DeepSeek's weight).
pub(super) fn yarn_mscale(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * weight * factor.ln() + 1.0
    }
}

/// The names that most families give their tensors; where a family has others, it says so.
pub(super) fn tensor_name(tensor: Tensor) -> String {
    let (layer, part) = match tensor {
        Tensor::Embedding => return "model.embed_tokens.weight".to_owned(),
        Tensor::FinalNorm => return "model.norm.weight".to_owned(),
        Tensor::Head => return "lm_head.weight".to_owned(),
        Tensor::Layer(layer, part) => (layer.0, part),
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
        LayerTensor::OutputBias => "self_attn.o_proj.bias".to_owned(),
        LayerTensor::QueryNorm => "self_attn.q_norm.weight".to_owned(),
        LayerTensor::KeyNorm => "self_attn.k_norm.weight".to_owned(),
        LayerTensor::QueryDown => "self_attn.q_a_proj.weight".to_owned(),
        LayerTensor::QueryDownBias => "self_attn.q_a_proj.bias".to_owned(),
        LayerTensor::QueryUp => "self_attn.q_b_proj.weight".to_owned(),
        LayerTensor::KeyValueDown => "self_attn.kv_a_proj_with_mqa.weight".to_owned(),
        LayerTensor::KeyValueDownBias => "self_attn.kv_a_proj_with_mqa.bias".to_owned(),
        LayerTensor::KeyValueNorm => "self_attn.kv_a_layernorm.weight".to_owned(),
        LayerTensor::KeyValueUp => "self_attn.kv_b_proj.weight".to_owned(),
        LayerTensor::Dense(matrix) => format!("mlp.{}.weight", projection(matrix)),
        LayerTensor::Router => "mlp.gate.weight".to_owned(),
        LayerTensor::RouterBias => "mlp.gate.e_score_correction_bias".to_owned(),
        LayerTensor::Expert(expert, matrix) => format!("mlp.experts.{}.{}.weight", expert.0, projection(matrix)),
        LayerTensor::Shared(matrix) => format!("mlp.shared_expert.{}.weight", projection(matrix)),
        LayerTensor::SharedGate => "mlp.shared_expert_gate.weight".to_owned(),
    };
    format!("model.layers.{layer}.{rest}")
}

/// `gate_proj`, `up_proj`, `down_proj`.
pub(super) fn projection(matrix: Matrix) -> &'static str {
    match matrix {
        Matrix::Gate => "gate_proj",
        Matrix::Up => "up_proj",
        Matrix::Down => "down_proj",
    }
}
