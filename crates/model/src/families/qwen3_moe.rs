//! Qwen3-MoE (`Qwen3MoeForCausalLM`): GQA with a norm on each query and key head, `head_dim` of its own; softmax
//! routing, gates normalised only if `norm_topk_prob`; no shared expert; dense layers by `mlp_only_layers` and
//! `decoder_sparse_step`. Held to transformers 5.23 by `tests/goldens/qwen3_moe`.

use std::path::Path;

use super::{Family, Tensor, common, gguf};
use crate::config::{ConfigError, Keys};
use crate::spec::{AttentionKind, LayerKind, LayerSpec, ModelSpec, QkNorm};

pub(super) struct Qwen3Moe;

impl Family for Qwen3Moe {
    fn model_type(&self) -> &'static str {
        "qwen3_moe"
    }

    fn architecture(&self) -> &'static str {
        "Qwen3MoeForCausalLM"
    }

    fn parse_config(&self, file: &Path, text: &str) -> Result<ModelSpec, ConfigError> {
        let mut keys = Keys::parse(file, text)?;
        let basics = common::basics(&mut keys, 1e-6)?;
        let has_bias = keys.flag("attention_bias")?.unwrap_or(false);
        let kind = AttentionKind::Grouped {
            qkv_bias: has_bias,
            output_bias: has_bias,
            qk_norm: QkNorm::PerHead,
            clip: None,
        };
        let attention = common::grouped(&mut keys, &basics, 1e4, kind)?;
        let routing = common::softmax_routing(&mut keys)?;
        let is_moe = common::sparse_layers(&mut keys, basics.layers, routing.experts)?;
        let intermediate = common::width_of(&mut keys, "intermediate_size", is_moe.contains(&false))?;
        let moe_intermediate = common::width_of(&mut keys, "moe_intermediate_size", is_moe.contains(&true))?;
        // All layers or none: `max_window_layers` is a leftover of Qwen2 that the class never reads.
        keys.ignore(&["max_window_layers"]);
        let window = if keys.flag("use_sliding_window")?.unwrap_or(false) {
            let Some(window) = common::window(&mut keys)? else {
                return Err(keys.wrong("use_sliding_window", "true without `sliding_window`", "both or none"));
            };
            Some(window)
        } else {
            keys.ignore(&["sliding_window"]);
            None
        };
        let layers = is_moe
            .iter()
            .map(|&is_moe| LayerSpec {
                kind: if is_moe {
                    LayerKind::Moe { shared: None }
                } else {
                    LayerKind::Dense { intermediate }
                },
                window,
                value_dim: None,
            })
            .collect();
        keys.finish()?;
        Ok(basics.spec(self.model_type(), attention, layers, (routing, moe_intermediate)))
    }

    fn tensor_name(&self, tensor: Tensor) -> String {
        common::tensor_name(tensor)
    }

    fn gguf(&self, spec: &ModelSpec) -> Result<gguf::Arch, gguf::Refusal> {
        gguf::check("qwen3moe", spec, true)?;
        gguf::check_attention("qwen3moe", spec, false)?;
        let width = gguf::width(spec.moe_intermediate);
        Ok(gguf::Arch {
            name: "qwen3moe",
            pairs_rope: false,
            keys: vec![
                ("feed_forward_length", width.clone()),
                ("expert_feed_forward_length", width),
            ],
        })
    }
}
