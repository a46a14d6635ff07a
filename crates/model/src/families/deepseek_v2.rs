//! DeepSeek-V2 (`DeepseekV2ForCausalLM`): softmax routing, greedy or within the groups of the best experts; gates
//! normalised (and then not scaled) or scaled, as published. transformers 5.23 always scales and never normalises: the
//! goldens in `tests/goldens/deepseek_v2` say where they follow the published rule instead.

use std::path::Path;

use super::deepseek::{self, Variant};
use super::{Family, Tensor, gguf, limits};
use crate::config::{ConfigError, Keys};
use crate::moe::{GroupScore, RoutingRule};
use crate::spec::{ModelSpec, RopeLayout};

pub(super) struct DeepseekV2;

impl Family for DeepseekV2 {
    fn model_type(&self) -> &'static str {
        "deepseek_v2"
    }

    fn architecture(&self) -> &'static str {
        "DeepseekV2ForCausalLM"
    }

    fn parse_config(&self, file: &Path, text: &str) -> Result<ModelSpec, ConfigError> {
        let variant = Variant {
            family: self.model_type(),
            dense_layers: 0,
            router_bias: false,
            routing,
            layout: |_| Ok(RopeLayout::Pairs),
            further_layers: |_| Ok(0),
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
    if let Some(scoring) = keys.text("scoring_func")?
        && scoring != "softmax"
    {
        return Err(keys.wrong("scoring_func", scoring, "softmax"));
    }
    let method = keys.text("topk_method")?.unwrap_or_else(|| "greedy".to_owned());
    let groups = match method.as_str() {
        "greedy" => {
            keys.ignore(&["n_group", "topk_group"]);
            None
        }
        "group_limited_greedy" => {
            let limit = (
                keys.size("n_group", limits::EXPERTS)?,
                keys.size("topk_group", limits::EXPERTS)?,
            );
            deepseek::groups(keys, experts, top_k, limit, GroupScore::Best)?
        }
        _ => return Err(keys.wrong("topk_method", method, "greedy or group_limited_greedy")),
    };
    // modeling_deepseek.py of DeepSeek-V2: either normalised or scaled; a single gate is never normalised.
    let norm_topk = keys.flag("norm_topk_prob")?.unwrap_or(false) && top_k > 1;
    #[expect(clippy::cast_possible_truncation, reason = "gates are f32")]
    let scale = keys.positive("routed_scaling_factor")?.unwrap_or(1.0) as f32;
    Ok(RoutingRule {
        norm_topk,
        groups,
        scale: if norm_topk { 1.0 } else { scale },
        ..RoutingRule::softmax(experts, top_k)
    })
}
