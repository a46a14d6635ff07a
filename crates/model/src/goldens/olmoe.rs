//! OLMoE: cases, and the wrong models that they must tell from the right one.

use super::{NOTHING, Wrong, each_misses, none, set, spec};
use crate::spec::{AttentionKind, QkNorm, RopeScaling};

pub(super) const CASES: [&str; 6] = [
    "published",
    "clip",
    "biases",
    "odd_widths",
    "rope_linear",
    "rope_llama3",
];

#[test]
fn wrong_models_miss_the_goldens() {
    let wrong: Vec<Wrong> = vec![
        ("query norm ignored", "published", set("q_norm", 1.0), NOTHING),
        ("key norm ignored", "published", set("k_norm", 1.0), NOTHING),
        ("norms per head", "published", none(), |spec| {
            if let AttentionKind::Grouped { qk_norm, .. } = &mut spec.attention.kind {
                *qk_norm = QkNorm::PerHead;
            }
        }),
        ("clip ignored", "clip", none(), |spec| {
            if let AttentionKind::Grouped { clip, .. } = &mut spec.attention.kind {
                *clip = None;
            }
        }),
        (
            "values not clipped",
            "clip",
            Box::new(|name, values| {
                if name.contains("v_proj") {
                    values.iter_mut().for_each(|x| *x *= 2.0);
                }
            }),
            NOTHING,
        ),
        ("norm_topk flipped", "published", none(), |spec| {
            spec.routing.norm_topk = true
        }),
        ("norm_topk flipped", "clip", none(), |spec| {
            spec.routing.norm_topk = false
        }),
        ("embeddings untied", "clip", none(), |spec| spec.tied_embeddings = false),
        ("no query bias", "biases", set("q_proj.bias", 0.0), NOTHING),
        ("no value bias", "biases", set("v_proj.bias", 0.0), NOTHING),
        ("no output bias", "biases", set("o_proj.bias", 0.0), NOTHING),
        ("epsilon ignored", "biases", none(), |spec| spec.norm_eps = 1e-5),
        ("theta ignored", "biases", none(), |spec| {
            spec.attention.rope.theta = 1e4
        }),
        ("rope scaling ignored", "rope_linear", none(), |spec| {
            spec.attention.rope.scaling = RopeScaling::None
        }),
        ("rope scaling ignored", "rope_llama3", none(), |spec| {
            spec.attention.rope.scaling = RopeScaling::None
        }),
        ("experts zeroed", "odd_widths", set(".experts.", 0.0), NOTHING),
    ];
    each_misses("olmoe", wrong);
}

#[test]
fn configs_read_in_both_forms() {
    let published = spec("olmoe", "published");
    assert!(!published.routing.norm_topk && published.moe_intermediate == 12);
    let kind = |case| spec("olmoe", case).attention.kind;
    assert!(matches!(
        kind("published"),
        AttentionKind::Grouped {
            qk_norm: QkNorm::Whole,
            clip: None,
            ..
        }
    ));
    assert!(matches!(kind("clip"), AttentionKind::Grouped { clip: Some(0.5), .. }));
    assert_eq!(spec("olmoe", "clip").attention.kv_heads, 2);
    assert_eq!(spec("olmoe", "biases").attention.rope.theta, 500.0);
}
