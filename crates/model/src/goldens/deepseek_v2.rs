//! DeepSeek-V2: cases, and the wrong models that they must tell from the right one.

use super::{NOTHING, Wrong, each_misses, none, set, spec};
use crate::moe::GroupScore;
use crate::spec::{AttentionKind, LayerKind, RopeLayout, RopeScaling, SharedGate, SharedSpec};

pub(super) const CASES: [&str; 5] = ["lite", "groups", "norm_topk", "biases", "odd_widths"];

#[test]
fn wrong_models_miss_the_goldens() {
    let wrong: Vec<Wrong> = vec![
        // What transformers 4 computes.
        ("scores not sharpened", "lite", none(), |spec| {
            spec.attention.scale = 20f32.powf(-0.5)
        }),
        ("scores not sharpened", "biases", none(), |spec| {
            spec.attention.scale = 0.25
        }),
        ("scale of the plain part alone", "groups", none(), |spec| {
            spec.attention.scale = 8f32.powf(-0.5)
        }),
        ("pairs half a width apart", "lite", none(), |spec| {
            spec.attention.rope.layout = RopeLayout::Halves
        }),
        ("pairs half a width apart", "odd_widths", none(), |spec| {
            spec.attention.rope.layout = RopeLayout::Halves
        }),
        ("rope scaling ignored", "lite", none(), |spec| {
            spec.attention.rope.scaling = RopeScaling::None
        }),
        ("cos and sin not scaled", "biases", none(), |spec| {
            if let RopeScaling::Yarn { attention_factor, .. } = &mut spec.attention.rope.scaling {
                *attention_factor = 1.0;
            }
        }),
        ("betas ignored", "biases", none(), |spec| {
            if let RopeScaling::Yarn {
                beta_fast, beta_slow, ..
            } = &mut spec.attention.rope.scaling
            {
                (*beta_fast, *beta_slow) = (32.0, 1.0);
            }
        }),
        ("groups ignored", "groups", none(), |spec| spec.routing.groups = None),
        ("groups by their two best", "groups", none(), |spec| {
            spec.routing.groups.as_mut().unwrap().score = GroupScore::BestTwo
        }),
        ("gates not scaled", "groups", none(), |spec| spec.routing.scale = 1.0),
        ("gates not normalised", "norm_topk", none(), |spec| {
            spec.routing.norm_topk = false
        }),
        ("gates normalised and scaled", "norm_topk", none(), |spec| {
            spec.routing.scale = 4.0
        }),
        // What transformers 5 computes.
        ("gates scaled, not normalised", "norm_topk", none(), |spec| {
            (spec.routing.norm_topk, spec.routing.scale) = (false, 4.0)
        }),
        ("query norm ignored", "groups", set("q_a_layernorm", 1.0), NOTHING),
        ("latent norm ignored", "lite", set("kv_a_layernorm", 1.0), NOTHING),
        ("latent epsilon of the others", "biases", none(), |spec| {
            if let AttentionKind::Latent { norm_eps, .. } = &mut spec.attention.kind {
                *norm_eps = spec.norm_eps;
            }
        }),
        ("epsilon ignored", "biases", none(), |spec| spec.norm_eps = 1e-6),
        ("no query bias", "biases", set("q_a_proj.bias", 0.0), NOTHING),
        ("no key bias", "biases", set("kv_a_proj_with_mqa.bias", 0.0), NOTHING),
        ("no output bias", "biases", set("o_proj.bias", 0.0), NOTHING),
        (
            "shared experts zeroed",
            "lite",
            set("shared_experts.down", 0.0),
            NOTHING,
        ),
        ("dense layer zeroed", "lite", set("layers.0.mlp", 0.0), NOTHING),
        ("embeddings untied", "biases", none(), |spec| {
            spec.tied_embeddings = false
        }),
        ("router ignored", "odd_widths", set("mlp.gate.weight", 0.0), NOTHING),
    ];
    each_misses("deepseek_v2", wrong);
}

#[test]
fn configs_read_in_both_forms() {
    let lite = spec("deepseek_v2", "lite");
    assert_eq!(lite.layers[0].kind, LayerKind::Dense { intermediate: 20 });
    let shared = Some(SharedSpec {
        intermediate: 24,
        gate: SharedGate::Open,
    });
    assert_eq!(lite.layers[1].kind, LayerKind::Moe { shared });
    assert!(matches!(
        lite.attention.kind,
        AttentionKind::Latent {
            q_rank: None,
            kv_rank: 16,
            value_dim: 6,
            bias: false,
            ..
        }
    ));
    // 0.1 · 0.707 · ln 40 + 1 = 1.2608, squared 1.5896, as V2-Lite has it; on cos and sin the two weights cancel.
    assert!((lite.attention.scale * 20f32.sqrt() - 1.5896).abs() < 1e-4);
    assert!(matches!(
        lite.attention.rope.scaling,
        RopeScaling::Yarn {
            attention_factor: 1.0,
            ..
        }
    ));
    assert_eq!(lite.attention.cached_per_token(), 16 + 12);
    let groups = spec("deepseek_v2", "groups").routing;
    assert_eq!((groups.scale, groups.norm_topk), (4.0, false));
    assert_eq!(
        groups.groups.map(|g| (g.groups, g.kept, g.score)),
        Some((4, 2, GroupScore::Best))
    );
    let normed = spec("deepseek_v2", "norm_topk").routing;
    assert_eq!((normed.scale, normed.norm_topk), (1.0, true));
    assert_eq!(spec("deepseek_v2", "biases").moe_layers().len(), 1);
}
