//! Qwen2-MoE: cases, and the wrong models that they must tell from the right one.

use super::{Change, NOTHING, Wrong, each_misses, none, set, spec};
use crate::spec::{AttentionKind, LayerKind, RopeScaling};

pub(super) const CASES: [&str; 9] = [
    "dense_between",
    "norm_topk",
    "odd_widths",
    "all_experts",
    "no_experts",
    "rope_linear",
    "rope_yarn",
    "rope_llama3",
    "window",
];

#[test]
fn wrong_models_miss_the_goldens() {
    let no_rope: Change = |spec| spec.attention.rope.scaling = RopeScaling::Linear { factor: 1e30 };
    let plain_rope: Change = |spec| spec.attention.rope.scaling = RopeScaling::None;
    let flip_norm: Change = |spec| spec.routing.norm_topk = !spec.routing.norm_topk;
    let no_window: Change = |spec| spec.layers.iter_mut().for_each(|layer| layer.window = None);
    let wrong: Vec<Wrong> = vec![
        ("no query bias", "dense_between", set("q_proj.bias", 0.0), NOTHING),
        // A key's bias moves all scores of a query by the same amount where rope leaves it alone: the weakest of all.
        ("no key bias", "dense_between", set("k_proj.bias", 0.0), NOTHING),
        ("no value bias", "dense_between", set("v_proj.bias", 0.0), NOTHING),
        (
            "unit input norms",
            "dense_between",
            set("input_layernorm", 1.0),
            NOTHING,
        ),
        (
            "unit mixer norms",
            "norm_topk",
            set("post_attention_layernorm", 1.0),
            NOTHING,
        ),
        ("unit final norm", "norm_topk", set("model.norm", 1.0), NOTHING),
        ("no rope", "dense_between", none(), no_rope),
        ("no rope", "norm_topk", none(), no_rope),
        ("rope scaling ignored", "rope_linear", none(), plain_rope),
        ("rope scaling ignored", "rope_yarn", none(), plain_rope),
        ("rope scaling ignored", "rope_llama3", none(), plain_rope),
        ("norm_topk flipped", "dense_between", none(), flip_norm),
        ("norm_topk flipped", "norm_topk", none(), flip_norm),
        ("experts zeroed", "dense_between", set(".experts.", 0.0), NOTHING),
        ("experts zeroed", "odd_widths", set(".experts.", 0.0), NOTHING),
        (
            "shared expert zeroed",
            "dense_between",
            set("shared_expert.", 0.0),
            NOTHING,
        ),
        (
            "shared gate ignored",
            "norm_topk",
            set("shared_expert_gate", 0.0),
            NOTHING,
        ),
        ("router ignored", "norm_topk", set("mlp.gate.weight", 0.0), NOTHING),
        ("dense layer zeroed", "dense_between", set("layers.1.mlp", 0.0), NOTHING),
        ("window ignored", "window", none(), no_window),
        ("one expert fewer", "dense_between", none(), |spec| {
            spec.routing.top_k -= 1
        }),
        ("dense layer elsewhere", "dense_between", none(), |spec| {
            spec.layers.swap(1, 2)
        }),
        ("embeddings untied", "dense_between", none(), |spec| {
            spec.tied_embeddings = false
        }),
        ("epsilon ignored", "all_experts", none(), |spec| spec.norm_eps = 1e-6),
        ("theta ignored", "all_experts", none(), |spec| {
            spec.attention.rope.theta = 1e4
        }),
    ];
    each_misses("qwen2_moe", wrong);
}

#[test]
fn configs_read_in_both_forms() {
    let published = spec("qwen2_moe", "dense_between");
    assert_eq!(published.attention.head_dim, 6);
    assert_eq!(published.layers[1].kind, LayerKind::Dense { intermediate: 20 });
    let has_bias = matches!(published.attention.kind, AttentionKind::Grouped { qkv_bias: true, .. });
    assert!(published.tied_embeddings && has_bias && !published.routing.norm_topk);
    let v5 = spec("qwen2_moe", "norm_topk");
    assert_eq!((v5.attention.head_dim, v5.attention.kv_heads), (10, 1));
    assert!(v5.routing.norm_topk && !v5.tied_embeddings);
    let moe: Vec<u32> = v5.moe_layers().iter().map(|l| l.0).collect();
    assert_eq!(moe, [1, 3]);
    assert_eq!(spec("qwen2_moe", "window").layers[0].window, Some(20));
    assert_eq!(spec("qwen2_moe", "window").layers[1].window, None);
    assert_eq!(spec("qwen2_moe", "all_experts").attention.rope.theta, 500.0);
}
