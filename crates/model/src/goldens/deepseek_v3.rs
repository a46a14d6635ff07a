//! DeepSeek-V3: cases, and the wrong models that they must tell from the right one.

use super::{NOTHING, Wrong, each_misses, none, set, spec};
use crate::moe::{GroupScore, Scoring};
use crate::spec::{AttentionKind, RopeLayout, RopeScaling};

pub(super) const CASES: [&str; 4] = ["published", "plain_gates", "halves", "odd_widths"];

#[test]
fn wrong_models_miss_the_goldens() {
    let wrong: Vec<Wrong> = vec![
        ("softmax scores", "published", none(), |spec| {
            spec.routing.scoring = Scoring::Softmax
        }),
        ("softmax scores", "plain_gates", none(), |spec| {
            spec.routing.scoring = Scoring::Softmax
        }),
        ("bias ignored", "published", none(), |spec| spec.router_bias = false),
        ("bias ignored", "halves", set("e_score_correction_bias", 0.0), NOTHING),
        ("groups ignored", "published", none(), |spec| spec.routing.groups = None),
        ("groups by their best", "published", none(), |spec| {
            spec.routing.groups.as_mut().unwrap().score = GroupScore::Best
        }),
        ("one group more", "odd_widths", none(), |spec| {
            spec.routing.groups.as_mut().unwrap().kept = 2
        }),
        ("gates not scaled", "published", none(), |spec| spec.routing.scale = 1.0),
        ("gates not scaled", "plain_gates", none(), |spec| {
            spec.routing.scale = 1.0
        }),
        ("gates not normalised", "published", none(), |spec| {
            spec.routing.norm_topk = false
        }),
        ("gates normalised", "plain_gates", none(), |spec| {
            spec.routing.norm_topk = true
        }),
        ("scores not sharpened", "published", none(), |spec| {
            spec.attention.scale = 20f32.powf(-0.5)
        }),
        ("rope scaling ignored", "published", none(), |spec| {
            spec.attention.rope.scaling = RopeScaling::None
        }),
        ("pairs side by side", "halves", none(), |spec| {
            spec.attention.rope.layout = RopeLayout::Pairs
        }),
        ("pairs half a width apart", "plain_gates", none(), |spec| {
            spec.attention.rope.layout = RopeLayout::Halves
        }),
        ("query norm ignored", "published", set("q_a_layernorm", 1.0), NOTHING),
        ("latent norm ignored", "odd_widths", set("kv_a_layernorm", 1.0), NOTHING),
        ("no query bias", "halves", set("q_a_proj.bias", 0.0), NOTHING),
        ("no key bias", "halves", set("kv_a_proj_with_mqa.bias", 0.0), NOTHING),
        ("no output bias", "halves", set("o_proj.bias", 0.0), NOTHING),
        ("latent epsilon of the others", "plain_gates", none(), |spec| {
            if let AttentionKind::Latent { norm_eps, .. } = &mut spec.attention.kind {
                *norm_eps = spec.norm_eps;
            }
        }),
        (
            "shared experts zeroed",
            "halves",
            set("shared_experts.down", 0.0),
            NOTHING,
        ),
        ("embeddings untied", "plain_gates", none(), |spec| {
            spec.tied_embeddings = false
        }),
    ];
    each_misses("deepseek_v3", wrong);
}

#[test]
fn configs_read_in_both_forms() {
    let published = spec("deepseek_v3", "published");
    assert!(published.router_bias && published.routing.norm_topk && published.routing.scale == 2.5);
    assert_eq!(published.routing.groups.map(|g| (g.groups, g.kept)), Some((4, 2)));
    assert_eq!(published.further_layers, 1);
    assert_eq!(published.attention.rope.layout, RopeLayout::Pairs);
    let halves = spec("deepseek_v3", "halves");
    assert_eq!(halves.attention.rope.layout, RopeLayout::Halves);
    assert!(halves.routing.groups.is_none() && halves.moe_layers().len() == 1);
}
