//! What DeepSeek-V2 and V3 share: multi-head latent attention, dense layers first, experts in groups, shared experts
//! without a gate. Their routing rules and defaults are in a file each.

use std::path::Path;

use cotk_container::gguf::Value;

use super::{LayerTensor, Tensor, common, gguf, limits};
use crate::config::{ConfigError, Keys};
use crate::moe::{GroupLimit, GroupScore, RoutingRule, Scoring};
use crate::spec::{
    AttentionKind, AttentionSpec, LayerKind, LayerSpec, ModelSpec, RopeLayout, RopeScaling, SharedGate, SharedSpec,
};

/// Epsilon of the norms of latent vectors: the class's own, whatever `rms_norm_eps`.
const LATENT_EPS: f32 = 1e-6;

/// Where the two differ.
pub(super) struct Variant {
    pub(super) family: &'static str,
    /// Where `first_k_dense_replace` is absent.
    pub(super) dense_layers: usize,
    pub(super) router_bias: bool,
    /// Reads what routing has of its own; experts and their number per token are read already.
    pub(super) routing: fn(&mut Keys, usize, usize) -> Result<RoutingRule, ConfigError>,
    pub(super) layout: fn(&mut Keys) -> Result<RopeLayout, ConfigError>,
    /// See [`ModelSpec::further_layers`].
    pub(super) further_layers: fn(&mut Keys) -> Result<usize, ConfigError>,
}

impl Variant {
    pub(super) fn parse(&self, file: &Path, text: &str) -> Result<ModelSpec, ConfigError> {
        let mut keys = Keys::parse(file, text)?;
        let basics = common::basics(&mut keys, 1e-6)?;
        // Training and its parallelism.
        keys.ignore(&["aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp"]);
        if keys.flag("mlp_bias")?.unwrap_or(false) {
            return Err(keys.wrong("mlp_bias", true, "false"));
        }
        let attention = self.attention(&mut keys, basics.context)?;

        let experts = common::experts(&mut keys, &["n_routed_experts", "num_experts", "num_local_experts"])?;
        if experts == 0 {
            return Err(keys.wrong("n_routed_experts", 0, "1 or more"));
        }
        let top_k = common::top_k(&mut keys, experts)?;
        let routing = (self.routing)(&mut keys, experts, top_k)?;
        let frequency = keys.count_at_most("moe_layer_freq", limits::LAYERS)?.unwrap_or(1);
        if frequency != 1 {
            return Err(keys.wrong("moe_layer_freq", frequency, "1"));
        }
        let dense = keys
            .count_at_most("first_k_dense_replace", limits::LAYERS)?
            .unwrap_or(self.dense_layers)
            .min(basics.layers);
        let has_moe = dense < basics.layers;
        let intermediate = common::width_of(&mut keys, "intermediate_size", dense > 0)?;
        let moe_intermediate = common::width_of(&mut keys, "moe_intermediate_size", has_moe)?;
        let Some(shared) = keys.count_at_most("n_shared_experts", limits::EXPERTS)? else {
            return Err(ConfigError::Missing {
                file: file.to_owned(),
                key: "n_shared_experts".into(),
            });
        };
        let shared = (shared > 0).then_some(SharedSpec {
            intermediate: shared * moe_intermediate,
            gate: SharedGate::Open,
        });
        let layers = (0..basics.layers).map(|layer| LayerSpec {
            kind: if layer < dense {
                LayerKind::Dense { intermediate }
            } else {
                LayerKind::Moe { shared }
            },
            window: None,
            value_dim: None,
        });
        let further_layers = (self.further_layers)(&mut keys)?;
        keys.finish()?;
        Ok(ModelSpec {
            router_bias: self.router_bias,
            further_layers,
            ..basics.spec(self.family, attention, layers.collect(), (routing, moe_intermediate))
        })
    }

    fn attention(&self, keys: &mut Keys, context: usize) -> Result<AttentionSpec, ConfigError> {
        let heads = keys.size("num_attention_heads", limits::WIDTH)?;
        let kv_heads = keys
            .count_at_most("num_key_value_heads", limits::WIDTH)?
            .unwrap_or(heads);
        if kv_heads != heads {
            let expected = format!("{heads}, as many as heads: their keys are latent");
            return Err(keys.wrong("num_key_value_heads", kv_heads, expected));
        }
        let rope_dim = keys.size("qk_rope_head_dim", limits::WIDTH)?;
        if !rope_dim.is_multiple_of(2) {
            let expected = "an even number: rotary positions turn pairs";
            return Err(keys.wrong("qk_rope_head_dim", rope_dim, expected));
        }
        let head_dim = keys.size("qk_nope_head_dim", limits::WIDTH)? + rope_dim;
        let value_dim = keys.size("v_head_dim", limits::WIDTH)?;
        let kv_rank = keys.size("kv_lora_rank", limits::WIDTH)?;
        let q_rank = match keys.count_at_most("q_lora_rank", limits::WIDTH)? {
            Some(0) => return Err(keys.wrong("q_lora_rank", 0, "null, or 1 and more")),
            rank => rank,
        };
        for (key, width) in [
            ("qk_nope_head_dim", head_dim),
            ("v_head_dim", value_dim),
            ("kv_lora_rank", kv_rank + rope_dim),
        ] {
            if heads * width > 1 << 22 {
                return Err(keys.wrong(key, width, format!("heads · width up to {}", 1 << 22)));
            }
        }
        // Written by transformers 5: what follows from the others.
        for (key, expected) in [("head_dim", rope_dim), ("qk_head_dim", head_dim)] {
            if let Some(found) = keys.count_at_most(key, limits::WIDTH)?
                && found != expected
            {
                return Err(keys.wrong(key, found, format!("{expected}, which the other widths make")));
            }
        }
        let layout = (self.layout)(keys)?;
        let rope = common::rope(keys, 1e4, context, (rope_dim, layout))?;
        // DeepSeek's YaRN sharpens scores too (modeling_deepseek.py: softmax_scale · mscale²; transformers 4 forgets
        // it in V2).
        let sharper = match rope.scaling {
            RopeScaling::Yarn {
                factor,
                mscale_all_dim: Some(weight),
                ..
            } => common::yarn_mscale(factor, weight).powi(2),
            _ => 1.0,
        };
        #[expect(clippy::cast_possible_truncation, reason = "scores are f32")]
        let scale = (common::scale(head_dim) * sharper) as f32;
        Ok(AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            scale,
            rope,
            kind: AttentionKind::Latent {
                q_rank,
                kv_rank,
                value_dim,
                bias: keys.flag("attention_bias")?.unwrap_or(false),
                norm_eps: LATENT_EPS,
            },
        })
    }
}

/// `n_group` and `topk_group` as a limit; one group is none.
pub(super) fn groups(
    keys: &Keys,
    experts: usize,
    top_k: usize,
    (groups, kept): (usize, usize),
    score: GroupScore,
) -> Result<Option<GroupLimit>, ConfigError> {
    if groups == 0 || !experts.is_multiple_of(groups) {
        return Err(keys.wrong("n_group", groups, format!("a divisor of {experts} experts")));
    }
    let size = experts / groups;
    if score == GroupScore::BestTwo && size < 2 {
        let expected = format!("at most {}: groups are judged by their two best experts", experts / 2);
        return Err(keys.wrong("n_group", groups, expected));
    }
    if kept == 0 || kept > groups || kept * size < top_k {
        let least = top_k.div_ceil(size);
        let expected = format!("{least} to {groups}: room for {top_k} experts in groups of {size}");
        return Err(keys.wrong("topk_group", kept, expected));
    }
    Ok((groups > 1).then_some(GroupLimit { groups, kept, score }))
}

/// The names of both.
pub(super) fn tensor_name(tensor: Tensor) -> String {
    match tensor {
        Tensor::Layer(layer, LayerTensor::QueryNorm) => {
            format!("model.layers.{}.self_attn.q_a_layernorm.weight", layer.0)
        }
        Tensor::Layer(layer, LayerTensor::Shared(matrix)) => {
            let matrix = common::projection(matrix);
            format!("model.layers.{}.mlp.shared_experts.{matrix}.weight", layer.0)
        }
        _ => common::tensor_name(tensor),
    }
}

/// `deepseek2` of llama.cpp runs both, V2's groups apart: it judges groups by V3's rule.
pub(super) fn gguf(spec: &ModelSpec) -> Result<gguf::Arch, gguf::Refusal> {
    let routing = &spec.routing;
    let AttentionKind::Latent {
        q_rank, bias, norm_eps, ..
    } = spec.attention.kind
    else {
        return gguf::require(false, "attention", "grouped", "latent").map(|()| unreachable!("just refused"));
    };
    gguf::require(!bias, "attention_bias", bias, false)?;
    let expected = format!("{norm_eps}: `deepseek2` has one epsilon for all norms");
    gguf::require(spec.norm_eps == norm_eps, "rms_norm_eps", spec.norm_eps, expected)?;
    let is_paired = spec.attention.rope.layout == RopeLayout::Pairs;
    gguf::require(is_paired, "rope_interleave", is_paired, true)?;
    // Models of these depths are taken for the small ones, whose queries have one projection.
    let is_lite = [26, 27].contains(&spec.layers.len());
    gguf::require(
        !is_lite || q_rank.is_none(),
        "q_lora_rank",
        q_rank.unwrap_or(0),
        "null in 26 or 27 layers",
    )?;
    let dense = spec
        .layers
        .iter()
        .take_while(|l| matches!(l.kind, LayerKind::Dense { .. }));
    let (dense_count, intermediate) = dense.fold((0, 0), |(count, _), layer| match layer.kind {
        LayerKind::Dense { intermediate } => (count + 1, intermediate),
        LayerKind::Moe { .. } => unreachable!("only dense ones were taken"),
    });
    let shared = spec.layers.iter().find_map(|layer| match layer.kind {
        LayerKind::Moe { shared } => shared,
        LayerKind::Dense { .. } => None,
    });
    let shared = shared.map_or(0, |shared| shared.intermediate / spec.moe_intermediate);
    gguf::require(shared > 0, "n_shared_experts", shared, "1 or more")?;
    let gating = match routing.scoring {
        Scoring::Softmax => 1,
        Scoring::Sigmoid => 2,
    };
    let mut keys = vec![
        ("leading_dense_block_count", gguf::width(dense_count)),
        ("feed_forward_length", gguf::width(intermediate.max(1))),
        ("expert_feed_forward_length", gguf::width(spec.moe_intermediate)),
        ("expert_shared_count", gguf::width(shared)),
        ("expert_weights_scale", Value::F32(routing.scale)),
        ("expert_weights_norm", Value::Bool(routing.norm_topk)),
        ("expert_gating_func", Value::U32(gating)),
        ("attention.q_lora_rank", gguf::width(q_rank.unwrap_or(0))),
    ];
    if let Some(limit) = routing.groups {
        let expected = "groups judged by the sum of their two best experts: `deepseek2` knows no other rule";
        gguf::require(
            limit.score == GroupScore::BestTwo,
            "topk_method",
            "group_limited_greedy",
            expected,
        )?;
        keys.push(("expert_group_count", gguf::width(limit.groups)));
        keys.push(("expert_group_used_count", gguf::width(limit.kept)));
    }
    Ok(gguf::Arch {
        name: "deepseek2",
        pairs_rope: false,
        keys,
    })
}
