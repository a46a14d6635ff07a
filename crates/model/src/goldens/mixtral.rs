//! Mixtral: cases, and the wrong models that they must tell from the right one.

use super::{NOTHING, Wrong, each_misses, none, set, spec};
use crate::spec::{AttentionKind, LayerKind, QkNorm, RopeScaling};

pub(super) const CASES: [&str; 4] = ["published", "window", "odd_widths", "one_expert"];

#[test]
fn wrong_models_miss_the_goldens() {
    let wrong: Vec<Wrong> = vec![
        ("gates not normalised", "published", none(), |spec| {
            spec.routing.norm_topk = false
        }),
        ("gates not normalised", "one_expert", none(), |spec| {
            spec.routing.norm_topk = false
        }),
        ("one expert fewer", "published", none(), |spec| spec.routing.top_k -= 1),
        ("one expert more", "one_expert", none(), |spec| spec.routing.top_k += 1),
        ("window ignored", "window", none(), |spec| {
            spec.layers.iter_mut().for_each(|layer| layer.window = None)
        }),
        ("window of one key more", "window", none(), |spec| {
            spec.layers.iter_mut().for_each(|layer| layer.window = Some(21))
        }),
        ("window in one layer alone", "window", none(), |spec| {
            spec.layers[1].window = None
        }),
        ("theta ignored", "published", none(), |spec| {
            spec.attention.rope.theta = 1e4
        }),
        ("no rope", "published", none(), |spec| {
            spec.attention.rope.scaling = RopeScaling::Linear { factor: 1e30 }
        }),
        ("embeddings untied", "odd_widths", none(), |spec| {
            spec.tied_embeddings = false
        }),
        ("epsilon ignored", "odd_widths", none(), |spec| spec.norm_eps = 1e-5),
        (
            "gate and up exchanged",
            "published",
            Box::new(|name, values| {
                if name.contains(".w1.") {
                    let other = name.replace(".w1.", ".w3.");
                    values.copy_from_slice(&super::drawn(&other, values.len()));
                }
            }),
            NOTHING,
        ),
        (
            "router ignored",
            "published",
            set("block_sparse_moe.gate", 0.0),
            NOTHING,
        ),
        ("experts zeroed", "odd_widths", set(".experts.", 0.0), NOTHING),
        ("keys normed", "published", none(), |spec| {
            if let AttentionKind::Grouped { qk_norm, .. } = &mut spec.attention.kind {
                *qk_norm = QkNorm::PerHead;
            }
        }),
    ];
    each_misses("mixtral", wrong);
}

#[test]
fn configs_read_in_both_forms() {
    let published = spec("mixtral", "published");
    assert!(published.routing.norm_topk && published.layers.iter().all(|l| l.window.is_none()));
    assert_eq!(published.layers[0].kind, LayerKind::Moe { shared: None });
    assert_eq!((published.attention.rope.theta, published.moe_intermediate), (1e6, 20));
    assert_eq!((published.bos, published.eos.as_slice()), (Some(1), &[2][..]));
    let v5 = spec("mixtral", "window");
    assert!(v5.layers.iter().all(|l| l.window == Some(20)));
    assert_eq!((v5.attention.head_dim, v5.attention.kv_heads), (10, 1));
}
