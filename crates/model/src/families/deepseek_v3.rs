//! DeepSeek-V3 (`DeepseekV3ForCausalLM`): sigmoid scores; experts chosen by score and bias within the groups whose two
//! best are best; gates normalised, then scaled. The layers after the last (for further tokens) are left out. Experts
//! outside the kept groups are never chosen (transformers 4 could, with negative biases): held to transformers 5.23 by
//! `tests/goldens/deepseek_v3`.

use std::path::Path;

use super::deepseek::{self, Variant};
use super::{Family, Tensor, gguf, limits};
use crate::config::{ConfigError, Keys};
use crate::moe::{GroupScore, RoutingRule, Scoring};
use crate::spec::{ModelSpec, RopeLayout};

pub(super) struct DeepseekV3;

impl Family for DeepseekV3 {
    fn model_type(&self) -> &'static str {
        "deepseek_v3"
    }

    fn architecture(&self) -> &'static str {
        "DeepseekV3ForCausalLM"
    }

    fn parse_config(&self, file: &Path, text: &str) -> Result<ModelSpec, ConfigError> {
        let variant = Variant {
            family: self.model_type(),
            dense_layers: 3,
            router_bias: true,
            routing,
            layout: |keys| {
                Ok(match keys.flag("rope_interleave")? {
                    None | Some(true) => RopeLayout::Pairs,
                    Some(false) => RopeLayout::Halves,
                })
            },
            further_layers: |keys| {
                let old = keys.count_at_most("num_nextn_predict_layers", limits::LAYERS)?;
                let new = keys.count_at_most("num_mtp_layers", limits::LAYERS)?;
                Ok(new.or(old).unwrap_or(1))
            },
        };
        variant.parse(file, text)
    }

    fn tensor_name(&self, tensor: Tensor) -> String {
        deepseek::tensor_name(tensor)
    }

    fn gguf(&self, spec: &ModelSpec) -> Result<gguf::Arch, gguf::Refusal> {
        deepseek::gguf(spec)
    }
}

fn routing(keys: &mut Keys, experts: usize, top_k: usize) -> Result<RoutingRule, ConfigError> {
    for (key, only) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
        if let Some(found) = keys.text(key)?
            && found != only
        {
            return Err(keys.wrong(key, found, only));
        }
    }
    let limit = (
        keys.count_at_most("n_group", limits::EXPERTS)?.unwrap_or(8),
        keys.count_at_most("topk_group", limits::EXPERTS)?.unwrap_or(4),
    );
    let groups = deepseek::groups(keys, experts, top_k, limit, GroupScore::BestTwo)?;
    let norm_topk = keys.flag("norm_topk_prob")?.unwrap_or(true);
    if norm_topk && top_k == 1 {
        // The published code leaves a single gate as it is, transformers makes it 1.
        return Err(keys.wrong(
            "norm_topk_prob",
            "true with one expert per token",
            "false, or more experts",
        ));
    }
    #[expect(clippy::cast_possible_truncation, reason = "gates are f32")]
    let scale = keys.positive("routed_scaling_factor")?.unwrap_or(2.5) as f32;
    Ok(RoutingRule {
        norm_topk,
        scoring: Scoring::Sigmoid,
        groups,
        scale,
        ..RoutingRule::softmax(experts, top_k)
    })
}
