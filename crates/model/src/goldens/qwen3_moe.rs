//! Qwen3-MoE: cases, and the wrong models that they must tell from the right one.

use super::{NOTHING, Wrong, each_misses, none, set, spec};
use crate::spec::{AttentionKind, LayerKind, QkNorm, RopeScaling};

pub(super) const CASES: [&str; 6] = [
    "published",
    "biases",
    "window",
    "odd_widths",
    "rope_yarn",
    "rope_dynamic",
];

#[test]
fn wrong_models_miss_the_goldens() {
    let wrong: Vec<Wrong> = vec![
        ("query norms ignored", "published", set("q_norm", 1.0), NOTHING),
        ("key norms ignored", "published", set("k_norm", 1.0), NOTHING),
        ("no query and key norms", "published", none(), |spec| {
            if let AttentionKind::Grouped { qk_norm, .. } = &mut spec.attention.kind {
                *qk_norm = QkNorm::None;
            }
        }),
        ("norms over all heads", "window", none(), |spec| {
            if let AttentionKind::Grouped { qk_norm, .. } = &mut spec.attention.kind {
                *qk_norm = QkNorm::Whole;
            }
        }),
        ("norm_topk flipped", "published", none(), |spec| {
            spec.routing.norm_topk = false
        }),
        ("norm_topk flipped", "biases", none(), |spec| {
            spec.routing.norm_topk = true
        }),
        ("norm_topk flipped", "odd_widths", none(), |spec| {
            spec.routing.norm_topk = true
        }),
        ("no query bias", "biases", set("q_proj.bias", 0.0), NOTHING),
        ("no key bias", "biases", set("k_proj.bias", 0.0), NOTHING),
        ("no value bias", "biases", set("v_proj.bias", 0.0), NOTHING),
        ("no output bias", "biases", set("o_proj.bias", 0.0), NOTHING),
        ("epsilon ignored", "biases", none(), |spec| spec.norm_eps = 1e-6),
        ("embeddings untied", "biases", none(), |spec| {
            spec.tied_embeddings = false
        }),
        ("window ignored", "window", none(), |spec| {
            spec.layers.iter_mut().for_each(|layer| layer.window = None)
        }),
        ("dense layer elsewhere", "published", none(), |spec| {
            spec.layers.swap(1, 2)
        }),
        ("theta ignored", "published", none(), |spec| {
            spec.attention.rope.theta = 1e4
        }),
        ("rope scaling ignored", "rope_yarn", none(), |spec| {
            spec.attention.rope.scaling = RopeScaling::None
        }),
        ("no rope", "rope_dynamic", none(), |spec| {
            spec.attention.rope.scaling = RopeScaling::Linear { factor: 1e30 }
        }),
    ];
    each_misses("qwen3_moe", wrong);
}

#[test]
fn configs_read_in_both_forms() {
    let published = spec("qwen3_moe", "published");
    assert_eq!((published.attention.head_dim, published.attention.heads), (10, 4));
    assert_eq!(published.layers[1].kind, LayerKind::Dense { intermediate: 20 });
    assert_eq!(published.layers[2].kind, LayerKind::Moe { shared: None });
    assert!(published.routing.norm_topk && published.layers.iter().all(|l| l.window.is_none()));
    let v5 = spec("qwen3_moe", "window");
    assert_eq!(v5.layers[0].kind, LayerKind::Dense { intermediate: 20 });
    assert!(v5.layers.iter().all(|l| l.window == Some(20)));
    assert!(matches!(
        spec("qwen3_moe", "biases").attention.kind,
        AttentionKind::Grouped {
            qkv_bias: true,
            output_bias: true,
            ..
        }
    ));
}
