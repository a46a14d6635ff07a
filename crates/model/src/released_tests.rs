//! Configs of released models, in their published keys: all of them read, and the parameters that they promise are the
//! published counts.

use std::path::Path;

use serde_json::{Value, json};

use crate::families::parse_config;
use crate::inventory;
use crate::spec::{AttentionKind, ModelSpec, RopeLayout};

/// What every release carries beside the keys of its family.
fn with_common(mut config: Value, vocab: u32, context: u32, theta: f64, eps: f64) -> Value {
    for (key, value) in [
        ("vocab_size", json!(vocab)),
        ("max_position_embeddings", json!(context)),
        ("rope_theta", json!(theta)),
        ("rms_norm_eps", json!(eps)),
        ("attention_dropout", json!(0.0)),
        ("hidden_act", json!("silu")),
        ("initializer_range", json!(0.02)),
        ("tie_word_embeddings", json!(false)),
        ("torch_dtype", json!("bfloat16")),
        ("use_cache", json!(true)),
    ] {
        config[key] = value;
    }
    config
}

fn deepseek(mut config: Value, mscale: f64) -> Value {
    for (key, value) in [
        ("kv_lora_rank", json!(512)),
        ("qk_nope_head_dim", json!(128)),
        ("qk_rope_head_dim", json!(64)),
        ("v_head_dim", json!(128)),
        ("attention_bias", json!(false)),
        ("moe_layer_freq", json!(1)),
        ("num_key_value_heads", config["num_attention_heads"].clone()),
        (
            "rope_scaling",
            json!({ "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                    "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale }),
        ),
        (
            "auto_map",
            json!({ "AutoConfig": "configuration_deepseek.DeepseekConfig" }),
        ),
    ] {
        config[key] = value;
    }
    config
}

/// Name, config, parameters in all and active per token, in billions as published (reference table 1.3).
fn released() -> Vec<(&'static str, Value, f64, f64)> {
    let mixtral = json!({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
        "num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": false,
        "router_aux_loss_coef": 0.02, "sliding_window": null, "bos_token_id": 1, "eos_token_id": 2,
    });
    let qwen15 = json!({
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 2048,
        "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 24,
        "max_window_layers": 21, "use_sliding_window": false, "sliding_window": 32768, "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4,
        "num_experts": 60, "norm_topk_prob": false, "output_router_logits": false, "router_aux_loss_coef": 0.001,
        "bos_token_id": 151643, "eos_token_id": 151643,
    });
    let qwen3 = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": false,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": true,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": false, "rope_scaling": null,
        "router_aux_loss_coef": 0.001, "sliding_window": null, "use_sliding_window": false,
        "bos_token_id": 151643, "eos_token_id": 151645,
    });
    let olmoe = json!({
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": false, "clip_qkv": null,
        "hidden_size": 2048, "intermediate_size": 1024, "norm_topk_prob": false, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "output_router_logits": false, "pad_token_id": 1, "eos_token_id": 50279, "rope_scaling": null,
        "router_aux_loss_coef": 0.01,
    });
    let lite = json!({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "num_attention_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64, "routed_scaling_factor": 1.0,
        "q_lora_rank": null, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "norm_topk_prob": false, "scoring_func": "softmax", "aux_loss_alpha": 0.001,
        "seq_aux": true, "pretraining_tp": 1, "bos_token_id": 100000, "eos_token_id": 100001,
    });
    let v2 = json!({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 5120,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
        "num_attention_heads": 128, "n_shared_experts": 2, "n_routed_experts": 160, "routed_scaling_factor": 16.0,
        "q_lora_rank": 1536, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "norm_topk_prob": false, "scoring_func": "softmax",
        "aux_loss_alpha": 0.001, "seq_aux": true, "ep_size": 1, "bos_token_id": 100000, "eos_token_id": 100001,
    });
    let v3 = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1, "num_attention_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
        "routed_scaling_factor": 2.5, "q_lora_rank": 1536, "topk_method": "noaux_tc", "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": true,
        "scoring_func": "sigmoid", "ep_size": 1, "bos_token_id": 0, "eos_token_id": 1,
        "quantization_config": { "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                 "weight_block_size": [128, 128] },
    });
    vec![
        (
            "Mixtral-8x7B",
            with_common(mixtral, 32000, 32768, 1e6, 1e-5),
            46.7,
            12.9,
        ),
        (
            "Qwen1.5-MoE-A2.7B",
            with_common(qwen15, 151_936, 8192, 1e6, 1e-6),
            14.3,
            2.7,
        ),
        (
            "Qwen3-30B-A3B",
            with_common(qwen3, 151_936, 40960, 1e6, 1e-6),
            30.5,
            3.3,
        ),
        ("OLMoE-1B-7B", with_common(olmoe, 50304, 4096, 1e4, 1e-5), 6.9, 1.3),
        (
            "DeepSeek-V2-Lite",
            with_common(deepseek(lite, 0.707), 102_400, 163_840, 1e4, 1e-6),
            15.7,
            2.7,
        ),
        (
            "DeepSeek-V2",
            with_common(deepseek(v2, 1.0), 102_400, 163_840, 1e4, 1e-6),
            236.0,
            21.0,
        ),
        (
            "DeepSeek-V3",
            with_common(deepseek(v3, 1.0), 129_280, 163_840, 1e4, 1e-6),
            671.0,
            37.0,
        ),
    ]
}

fn read(config: &Value) -> ModelSpec {
    parse_config(Path::new("config.json"), &config.to_string()).unwrap()
}

#[test]
fn released_models_have_their_published_sizes() {
    for (name, config, billions, active_billions) in released() {
        let spec = read(&config);
        let layers = spec.moe_layers().len() as u64;
        let of_experts = |count: usize| layers * count as u64 * inventory::expert_params(&spec);
        let dense = inventory::dense_params(&spec);
        let total = (dense + of_experts(spec.routing.experts)) as f64 / 1e9;
        assert!((total - billions).abs() / billions < 0.01, "{name}: {total}");
        // Published active counts leave out the embedding or not, and round freely.
        let active = (dense + of_experts(spec.routing.top_k)) as f64 / 1e9;
        assert!(
            (active - active_billions).abs() / active_billions < 0.05,
            "{name}: {active}"
        );
    }
}

/// DeepSeek caches 512 + 64 numbers per token and layer; the others two rows per key head.
#[test]
fn released_models_cache_what_their_papers_say() {
    for (name, config, ..) in released() {
        let attention = read(&config).attention;
        let expected = match attention.kind {
            AttentionKind::Latent { .. } => {
                assert_eq!(attention.rope.layout, RopeLayout::Pairs);
                576
            }
            AttentionKind::Grouped { .. } => 2 * attention.kv_heads * 128,
        };
        assert_eq!(attention.cached_per_token(), expected, "{name}");
    }
}
