//! Qwen2-MoE (`Qwen2MoeForCausalLM`): GQA with biases on q, k and v; softmax routing, gates normalised only if
//! `norm_topk_prob`; a shared expert behind a sigmoid gate; dense layers by `mlp_only_layers` and
//! `decoder_sparse_step`. Held to transformers 5.23 by `tests/goldens/qwen2_moe`.

use std::path::Path;

use super::{Family, Tensor, common, gguf};
use crate::config::{ConfigError, Keys};
use crate::spec::{AttentionKind, LayerKind, LayerSpec, ModelSpec, QkNorm, SharedGate, SharedSpec};

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
        let basics = common::basics(&mut keys, 1e-6)?;
        let kind = AttentionKind::Grouped {
            qkv_bias: keys.flag("qkv_bias")?.unwrap_or(true),
            output_bias: false,
            qk_norm: QkNorm::None,
            clip: None,
        };
        let attention = common::grouped(&mut keys, &basics, 1e4, kind)?;
        let routing = common::softmax_routing(&mut keys)?;
        let is_moe = common::sparse_layers(&mut keys, basics.layers, routing.experts)?;
        let windows = windows(&mut keys, basics.layers)?;
        let has_moe = is_moe.contains(&true);
        let intermediate = common::width_of(&mut keys, "intermediate_size", is_moe.contains(&false))?;
        let moe_intermediate = common::width_of(&mut keys, "moe_intermediate_size", has_moe)?;
        let shared = SharedSpec {
            intermediate: common::width_of(&mut keys, "shared_expert_intermediate_size", has_moe)?,
            gate: SharedGate::Sigmoid,
        };
        let layers = is_moe.iter().zip(windows).map(|(&is_moe, window)| LayerSpec {
            kind: if is_moe {
                LayerKind::Moe { shared: Some(shared) }
            } else {
                LayerKind::Dense { intermediate }
            },
            window,
            value_dim: None,
        });
        keys.finish()?;
        Ok(basics.spec(
            self.model_type(),
            attention,
            layers.collect(),
            (routing, moe_intermediate),
        ))
    }

    fn tensor_name(&self, tensor: Tensor) -> String {
        common::tensor_name(tensor)
    }

    fn gguf(&self, spec: &ModelSpec) -> Result<gguf::Arch, gguf::Refusal> {
        gguf::check("qwen2moe", spec, false)?;
        gguf::check_head_dim("qwen2moe", spec)?;
        gguf::check_attention("qwen2moe", spec, true)?;
        let shared = spec.layers.iter().find_map(|layer| match layer.kind {
            LayerKind::Moe { shared } => shared,
            LayerKind::Dense { .. } => None,
        });
        let shared = shared.map_or(0, |shared| shared.intermediate);
        Ok(gguf::Arch {
            name: "qwen2moe",
            pairs_rope: false,
            keys: vec![
                ("feed_forward_length", gguf::width(shared)),
                ("expert_feed_forward_length", gguf::width(spec.moe_intermediate)),
                ("expert_shared_feed_forward_length", gguf::width(shared)),
            ],
        })
    }
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
