//! OLMoE (`OlmoeForCausalLM`): heads as wide as hidden / heads, norms over all query heads and all key heads at once,
//! `clip_qkv`; softmax routing, gates normalised only if `norm_topk_prob`; experts in every layer, none shared. Held
//! to transformers 5.23 by `tests/goldens/olmoe`.

use std::path::Path;

use super::{Family, Tensor, common, gguf};
use crate::config::{ConfigError, Keys};
use crate::spec::{AttentionKind, LayerKind, LayerSpec, ModelSpec, QkNorm};

pub(super) struct Olmoe;

impl Family for Olmoe {
    fn model_type(&self) -> &'static str {
        "olmoe"
    }

    fn architecture(&self) -> &'static str {
        "OlmoeForCausalLM"
    }

    fn parse_config(&self, file: &Path, text: &str) -> Result<ModelSpec, ConfigError> {
        let mut keys = Keys::parse(file, text)?;
        let basics = common::basics(&mut keys, 1e-5)?;
        let has_bias = keys.flag("attention_bias")?.unwrap_or(false);
        let kind = AttentionKind::Grouped {
            qkv_bias: has_bias,
            output_bias: has_bias,
            qk_norm: QkNorm::Whole,
            #[expect(clippy::cast_possible_truncation, reason = "a bound on f32 elements")]
            clip: keys.positive("clip_qkv")?.map(|clip| clip as f32),
        };
        let attention = common::grouped(&mut keys, &basics, 1e4, kind)?;
        if attention.heads * attention.head_dim != basics.hidden {
            // The class sizes its norms by hidden_size.
            return Err(keys.wrong(
                "head_dim",
                attention.head_dim,
                format!("hidden_size / {} heads", attention.heads),
            ));
        }
        let routing = common::softmax_routing(&mut keys)?;
        if routing.experts == 0 {
            return Err(keys.wrong("num_experts", 0, "1 or more"));
        }
        let moe_intermediate = common::width_of(&mut keys, "intermediate_size", true)?;
        let layer = LayerSpec {
            kind: LayerKind::Moe { shared: None },
            window: None,
            value_dim: None,
        };
        let layers = vec![layer; basics.layers];
        keys.finish()?;
        Ok(basics.spec(self.model_type(), attention, layers, (routing, moe_intermediate)))
    }

    fn tensor_name(&self, tensor: Tensor) -> String {
        common::tensor_name(tensor)
    }

    fn gguf(&self, spec: &ModelSpec) -> Result<gguf::Arch, gguf::Refusal> {
        gguf::check("olmoe", spec, false)?;
        gguf::check_head_dim("olmoe", spec)?;
        gguf::check_attention("olmoe", spec, false)?;
        // The norm of keys has the width of queries there.
        let (kv_heads, heads) = (spec.attention.kv_heads, spec.attention.heads);
        gguf::require(
            kv_heads == heads,
            "num_key_value_heads",
            kv_heads,
            format!("{heads}, as many as heads"),
        )?;
        Ok(gguf::Arch {
            name: "olmoe",
            pairs_rope: false,
            keys: vec![("feed_forward_length", gguf::width(spec.moe_intermediate))],
        })
    }
}
