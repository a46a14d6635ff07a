//! What configs are refused for, each by the name of its key.

use std::path::Path;

use serde_json::{Value, json};

use crate::families::parse_config;
use crate::spec::AttentionKind;

fn good() -> Value {
    json!({
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 48, "hidden_size": 24,
        "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 96, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16,
        "num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": [1]
    })
}

/// The message for a good config with `changes`; a `null` takes a key away.
fn refusal(changes: &Value) -> String {
    let mut config = good();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    parse_config(Path::new("some/config.json"), &config.to_string())
        .expect_err("must be refused")
        .to_string()
}

fn check(changes: &Value, says: &[&str]) {
    let message = refusal(changes);
    for part in says.iter().chain(&["some/config.json"]) {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
}

#[test]
fn a_missing_shape_key_is_named() {
    for key in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
    ] {
        check(&json!({ key: null }), &[&format!("no key `{key}`")]);
    }
}

#[test]
fn behaviour_keys_have_the_defaults_of_the_class() {
    let spec = parse_config(Path::new("config.json"), &good().to_string()).unwrap();
    let has_bias = matches!(spec.attention.kind, AttentionKind::Grouped { qkv_bias: true, .. });
    assert!(has_bias && !spec.tied_embeddings && !spec.routing.norm_topk);
    assert_eq!(spec.norm_eps, 1e-6);
    assert_eq!(spec.attention.rope.theta, 10_000.0);
}

#[test]
fn experts_may_go_by_either_name() {
    let mut config = good();
    config["num_local_experts"] = config["num_experts"].take();
    let spec = parse_config(Path::new("config.json"), &config.to_string()).unwrap();
    assert_eq!(spec.routing.experts, 6);
    check(
        &json!({ "num_local_experts": 7 }),
        &["num_local_experts", "7", "num_experts = 6"],
    );
}

#[test]
fn an_unknown_architecture_lists_the_known_ones() {
    check(
        &json!({ "model_type": "llama", "architectures": ["LlamaForCausalLM"] }),
        &["LlamaForCausalLM", "Qwen2MoeForCausalLM"],
    );
    check(
        &json!({ "architectures": ["Qwen2MoeForSequenceClassification"] }),
        &["Qwen2MoeForSequenceClassification", "Qwen2MoeForCausalLM"],
    );
    check(
        &json!({ "model_type": null, "architectures": null }),
        &["no key `model_type`"],
    );
}

#[test]
fn values_that_are_not_supported_are_refused_by_key() {
    for (changes, says) in [
        (json!({ "hidden_act": "gelu" }), ["`hidden_act`", "gelu", "silu"]),
        (
            json!({ "use_sliding_window": true }),
            ["`use_sliding_window`", "true", "`layer_types`"],
        ),
        (
            json!({ "layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 4 }),
            ["`layer_types`", "sliding_attention", "`use_sliding_window` is false"],
        ),
        (
            json!({ "layer_types": ["full_attention"] }),
            ["`layer_types`", "1 entries", "3, one per layer"],
        ),
        (
            json!({ "rope_scaling": { "type": "longrope", "factor": 2.0 } }),
            ["`rope_scaling.rope_type`", "longrope", "yarn"],
        ),
        (
            json!({ "rope_parameters": { "rope_type": "linear" } }),
            ["no key `rope_parameters.factor`", "", ""],
        ),
        (
            json!({ "rope_parameters": { "rope_type": "default", "partial_rotary_factor": 0.5 } }),
            ["`rope_parameters.partial_rotary_factor`", "0.5", "expected 1"],
        ),
        (
            json!({ "quantization_config": { "quant_method": "gptq", "bits": 4 } }),
            ["`quantization_config.quant_method`", "gptq", "bf16"],
        ),
        (
            json!({ "quantization_config": { "quant_method": "fp8" } }),
            ["`quantization_config.weight_block_size`", "none", "[128, 128]"],
        ),
        (
            json!({ "quantization_config": { "quant_method": "fp8", "weight_block_size": [1, 128] } }),
            ["`quantization_config.weight_block_size`", "[1, 128]", "[128, 128]"],
        ),
        (
            json!({ "quantization_config": { "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128] } }),
            ["unknown key `quantization_config.scale_fmt`", "ue8m0", ""],
        ),
        (
            json!({ "decoder_sparse_step": 0 }),
            ["`decoder_sparse_step`", "0", "1 or more"],
        ),
        (
            json!({ "mlp_only_layers": [3] }),
            ["`mlp_only_layers`", "3", "layers below 3"],
        ),
        (
            json!({ "num_key_value_heads": 3 }),
            ["`num_key_value_heads`", "3", "divisor of 4"],
        ),
        (json!({ "head_dim": 7 }), ["`head_dim`", "7", "even"]),
        (
            json!({ "num_attention_heads": 5, "num_key_value_heads": 5 }),
            ["`num_attention_heads`", "5", "hidden_size 24"],
        ),
        (
            json!({ "num_experts_per_tok": 7 }),
            ["`num_experts_per_tok`", "7", "at most 6"],
        ),
        (json!({ "hidden_size": -1 }), ["`hidden_size`", "-1", "whole number"]),
        (json!({ "hidden_size": 1e18 }), ["`hidden_size`", "1e+18", "up to"]),
        (json!({ "rms_norm_eps": 0 }), ["`rms_norm_eps`", "0", "above 0"]),
        (
            json!({ "norm_topk_prob": "yes" }),
            ["`norm_topk_prob`", "yes", "true or false"],
        ),
    ] {
        check(&changes, &says);
    }
}

/// A golden config of `family` with `changes`, which must be refused.
fn check_golden(family: &str, case: &str, changes: &Value, says: &[&str]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens");
    let file = folder.join(family).join(format!("{case}.json"));
    let text = cotk_run::files::read_text(&file, 1 << 20).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let message = match parse_config(Path::new("some/config.json"), &config.to_string()) {
        Ok(_) => panic!("{family}: {changes} must be refused"),
        Err(error) => error.to_string(),
    };
    for part in says.iter().chain(&["some/config.json"]) {
        assert!(message.contains(part), "{family}: `{message}` does not say `{part}`");
    }
}

#[test]
fn each_family_refuses_what_it_does_not_do() {
    for (family, case, changes, says) in [
        (
            "mixtral",
            "published",
            json!({ "sliding_window": 0 }),
            ["`sliding_window`", "0"],
        ),
        (
            "mixtral",
            "published",
            json!({ "num_local_experts": 0 }),
            ["`num_local_experts`", "1 or more"],
        ),
        (
            "mixtral",
            "published",
            json!({ "num_local_experts": null }),
            ["no key `num_local_experts`", ""],
        ),
        (
            "mixtral",
            "published",
            json!({ "num_experts": 5 }),
            ["`num_experts`", "num_local_experts = 4"],
        ),
        (
            "mixtral",
            "published",
            json!({ "intermediate_size": null }),
            ["no key `intermediate_size`", ""],
        ),
        (
            "mixtral",
            "published",
            json!({ "norm_topk_prob": false }),
            ["unknown key `norm_topk_prob`", "false"],
        ),
        (
            "mixtral",
            "published",
            json!({ "attention_bias": true }),
            ["unknown key `attention_bias`", "true"],
        ),
        (
            "mixtral",
            "published",
            json!({ "eos_token_id": 48 }),
            ["`eos_token_id`", "vocab_size 48"],
        ),
        (
            "qwen3_moe",
            "published",
            json!({ "use_sliding_window": true, "sliding_window": null }),
            ["`use_sliding_window`", "without `sliding_window`"],
        ),
        (
            "qwen3_moe",
            "published",
            json!({ "qkv_bias": true }),
            ["unknown key `qkv_bias`", "true"],
        ),
        (
            "qwen3_moe",
            "published",
            json!({ "clip_qkv": 8.0 }),
            ["unknown key `clip_qkv`", "8.0"],
        ),
        (
            "qwen3_moe",
            "rope_dynamic",
            json!({ "rope_parameters": { "rope_type": "dynamic" } }),
            ["no key `rope_parameters.factor`", ""],
        ),
        (
            "olmoe",
            "published",
            json!({ "head_dim": 8 }),
            ["`head_dim`", "hidden_size / 4"],
        ),
        (
            "olmoe",
            "published",
            json!({ "clip_qkv": -1.0 }),
            ["`clip_qkv`", "above 0"],
        ),
        (
            "olmoe",
            "published",
            json!({ "sliding_window": 8 }),
            ["unknown key `sliding_window`", "8"],
        ),
        (
            "deepseek_v2",
            "lite",
            json!({ "moe_layer_freq": 2 }),
            ["`moe_layer_freq`", "expected 1"],
        ),
        (
            "deepseek_v2",
            "lite",
            json!({ "num_key_value_heads": 2 }),
            ["`num_key_value_heads`", "latent"],
        ),
        (
            "deepseek_v2",
            "lite",
            json!({ "topk_method": "noaux_tc" }),
            ["`topk_method`", "group_limited_greedy"],
        ),
        (
            "deepseek_v2",
            "lite",
            json!({ "scoring_func": "sigmoid" }),
            ["`scoring_func`", "softmax"],
        ),
        (
            "deepseek_v2",
            "lite",
            json!({ "n_shared_experts": null }),
            ["no key `n_shared_experts`", ""],
        ),
        (
            "deepseek_v2",
            "lite",
            json!({ "qk_rope_head_dim": 5 }),
            ["`qk_rope_head_dim`", "even"],
        ),
        (
            "deepseek_v2",
            "lite",
            json!({ "kv_lora_rank": null }),
            ["no key `kv_lora_rank`", ""],
        ),
        (
            "deepseek_v2",
            "lite",
            json!({ "q_lora_rank": 0 }),
            ["`q_lora_rank`", "null"],
        ),
        (
            "deepseek_v2",
            "lite",
            json!({ "sliding_window": 8 }),
            ["unknown key `sliding_window`", "8"],
        ),
        (
            "deepseek_v2",
            "groups",
            json!({ "n_group": 3 }),
            ["`n_group`", "divisor of 8"],
        ),
        (
            "deepseek_v2",
            "groups",
            json!({ "topk_group": 1 }),
            ["`topk_group`", "2 to 4"],
        ),
        (
            "deepseek_v2",
            "groups",
            json!({ "topk_group": 5 }),
            ["`topk_group`", "2 to 4"],
        ),
        (
            "deepseek_v2",
            "biases",
            json!({ "mlp_bias": true }),
            ["`mlp_bias`", "false"],
        ),
        (
            "deepseek_v2",
            "biases",
            json!({ "qk_head_dim": 12 }),
            ["`qk_head_dim`", "16"],
        ),
        (
            "deepseek_v3",
            "published",
            json!({ "n_group": 8, "topk_group": 8 }),
            ["`n_group`", "at most 4"],
        ),
        (
            "deepseek_v3",
            "published",
            json!({ "topk_method": "greedy" }),
            ["`topk_method`", "noaux_tc"],
        ),
        (
            "deepseek_v3",
            "published",
            json!({ "scoring_func": "softmax" }),
            ["`scoring_func`", "sigmoid"],
        ),
        (
            "deepseek_v3",
            "published",
            json!({ "num_experts_per_tok": 1 }),
            ["`norm_topk_prob`", "one expert"],
        ),
        (
            "deepseek_v3",
            "published",
            json!({ "routed_scaling_factor": 0 }),
            ["`routed_scaling_factor`", "above 0"],
        ),
        (
            "deepseek_v3",
            "published",
            json!({ "index_topk": 2048 }),
            ["unknown key `index_topk`", "2048"],
        ),
    ] {
        check_golden(family, case, &changes, &says);
    }
}

#[test]
fn a_key_that_nobody_knows_is_refused_with_the_nearest() {
    check(
        &json!({ "norm_topk_prop": true }),
        &["unknown key `norm_topk_prop` = true", "nearest: `norm_topk_prob`"],
    );
    check(
        &json!({ "rope_parameters": { "rope_type": "default", "thata": 1.0 } }),
        &["unknown key `rope_parameters.thata`"],
    );
}

/// Keys that every config carries and that mean nothing, until they have a value.
#[test]
fn keys_without_meaning_are_refused_once_they_have_one() {
    for (key, neutral, other) in [
        ("pruned_heads", json!({}), json!({ "0": [1] })),
        ("add_cross_attention", json!(false), json!(true)),
        ("is_encoder_decoder", json!(false), json!(true)),
        ("chunk_size_feed_forward", json!(0), json!(16)),
    ] {
        let mut config = good();
        config[key] = neutral;
        parse_config(Path::new("config.json"), &config.to_string()).unwrap();
        let says = format!("unknown key `{key}` = {other}");
        check(&json!({ key: other }), &[says.as_str()]);
    }
}

#[test]
fn what_is_no_json_object_is_refused() {
    for text in ["", "[1]", "{\"a\": ", "nul"] {
        let error = parse_config(Path::new("some/config.json"), text)
            .unwrap_err()
            .to_string();
        assert!(error.contains("some/config.json"), "{error}");
    }
}

#[test]
fn no_changed_byte_makes_the_parser_panic() {
    let text = good().to_string().into_bytes();
    for at in 0..text.len() {
        for value in [b'0', b'9', b'"', b'-', b'{', b'e'] {
            let mut text = text.clone();
            text[at] = value;
            if let Ok(text) = String::from_utf8(text) {
                let _ = parse_config(Path::new("config.json"), &text);
            }
        }
    }
}
