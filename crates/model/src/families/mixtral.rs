//! Mixtral (`MixtralForCausalLM`): GQA without biases, a window for all layers or none; softmax routing whose gates
//! are always divided by their sum; experts in every layer, none shared. Held to transformers 5.23 by
//! `tests/goldens/mixtral`.

use std::path::Path;

use super::{Family, LayerTensor, Matrix, Tensor, common, gguf};
use crate::config::{ConfigError, Keys};
use crate::moe::RoutingRule;
use crate::spec::{AttentionKind, LayerKind, LayerSpec, ModelSpec, QkNorm};

pub(super) struct Mixtral;

impl Family for Mixtral {
    fn model_type(&self) -> &'static str {
        "mixtral"
    }

    fn architecture(&self) -> &'static str {
        "MixtralForCausalLM"
    }

    fn parse_config(&self, file: &Path, text: &str) -> Result<ModelSpec, ConfigError> {
        let mut keys = Keys::parse(file, text)?;
        let basics = common::basics(&mut keys, 1e-5)?;
        let kind = AttentionKind::Grouped {
            qkv_bias: false,
            output_bias: false,
            qk_norm: QkNorm::None,
            clip: None,
        };
        let attention = common::grouped(&mut keys, &basics, 1e6, kind)?;
        let experts = common::experts(&mut keys, &["num_local_experts", "num_experts"])?;
        let routing = RoutingRule {
            norm_topk: true,
            ..RoutingRule::softmax(experts, common::top_k(&mut keys, experts)?)
        };
        if experts == 0 {
            return Err(keys.wrong("num_local_experts", 0, "1 or more"));
        }
        let moe_intermediate = common::width_of(&mut keys, "intermediate_size", true)?;
        let layer = LayerSpec {
            kind: LayerKind::Moe { shared: None },
            window: common::window(&mut keys)?,
            value_dim: None,
        };
        let layers = vec![layer; basics.layers];
        keys.finish()?;
        Ok(basics.spec(self.model_type(), attention, layers, (routing, moe_intermediate)))
    }

    fn tensor_name(&self, tensor: Tensor) -> String {
        match tensor {
            Tensor::Layer(layer, LayerTensor::Router) => {
                format!("model.layers.{}.block_sparse_moe.gate.weight", layer.0)
            }
            Tensor::Layer(layer, LayerTensor::Expert(expert, matrix)) => {
                let matrix = match matrix {
                    Matrix::Gate => "w1",
                    Matrix::Up => "w3",
                    Matrix::Down => "w2",
                };
                let (layer, expert) = (layer.0, expert.0);
                format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight")
            }
            _ => common::tensor_name(tensor),
        }
    }

    /// `llama`, which divides gates by their sum and turns neighbours.
    fn gguf(&self, spec: &ModelSpec) -> Result<gguf::Arch, gguf::Refusal> {
        gguf::check("llama", spec, true)?;
        gguf::check_attention("llama", spec, false)?;
        Ok(gguf::Arch {
            name: "llama",
            pairs_rope: true,
            keys: vec![("feed_forward_length", gguf::width(spec.moe_intermediate))],
        })
    }

    /// transformers 5 beside stacked experts.
    fn other_name(&self, tensor: Tensor) -> Option<String> {
        matches!(tensor, Tensor::Layer(_, LayerTensor::Router)).then(|| common::tensor_name(tensor))
    }
}
