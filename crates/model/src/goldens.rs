//! Goldens: logits of PyTorch transformers on tiny random models (`tests/goldens/qwen2_moe/make.py`), whose weights
//! both sides draw from tensor names. And the wrong models that the goldens must tell from the right one.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::safetensors::Safetensors;
use crate::checkpoint::{CheckpointError, TensorInfo, TensorSource};
use crate::families::parse_config;
use crate::model::{Logits, Model, Sequence};
use crate::moe::Mode;
use crate::reference::PlainMoe;
use crate::spec::{LayerKind, ModelSpec, RopeScaling};

const TOLERANCE: f32 = 1e-4;
const CASES: [&str; 9] = [
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

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/qwen2_moe")
}

/// Splitmix64 over the FNV-1a hash of `name`: numbers in [0, 1), steps of 2⁻²⁴. Same function as in `make.py`.
fn uniform(name: &str, count: usize) -> impl Iterator<Item = f32> {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    (1..=count as u64).map(move |i| {
        let z = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let z = z ^ (z >> 31);
        (z >> 40) as f32 * 2f32.powi(-24)
    })
}

/// Any tensor of any shape, drawn from its name; `harm` changes what is wanted wrong.
struct Drawn<'a> {
    harm: &'a (dyn Fn(&str, &mut [f32]) + Send + Sync),
}

impl TensorSource for Drawn<'_> {
    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn info(&self, _name: &str) -> Option<TensorInfo> {
        None
    }

    fn file(&self, _name: &str) -> &Path {
        Path::new("drawn")
    }

    fn raw(&self, _name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        unreachable!("load_f32 is all that a model asks for")
    }

    fn load_f32(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        let numbers = uniform(name, expected.iter().product());
        let mut values: Vec<f32> = if name.ends_with("norm.weight") {
            numbers.map(|u| u + 0.5).collect()
        } else if name.ends_with(".bias") {
            numbers.map(|u| (u - 0.5) * 1.732_050_8).collect()
        } else {
            numbers.map(|u| (u - 0.5) * 0.692_820_3).collect()
        };
        (self.harm)(name, &mut values);
        Ok(values)
    }
}

fn spec(case: &str) -> ModelSpec {
    let file = folder().join(format!("{case}.json"));
    parse_config(&file, &cotk_run::files::read_text(&file, 1 << 20).unwrap()).unwrap()
}

fn model(spec: ModelSpec, harm: &(dyn Fn(&str, &mut [f32]) + Send + Sync)) -> Model {
    let source = Drawn { harm };
    let runtime = Arc::new(PlainMoe::load(&spec, &source).unwrap());
    Model::load(spec, &source, runtime).unwrap()
}

fn right(case: &str) -> Model {
    model(spec(case), &|_, _| {})
}

fn tokens(case: &str, vocab: usize) -> Vec<u32> {
    uniform(&format!("tokens of {case}"), 80)
        .map(|u| (u * vocab as f32) as u32)
        .collect()
}

/// Largest difference to the golden when the 80 tokens go in as these many at a time.
fn miss(case: &str, model: &Model, steps: &[usize]) -> f32 {
    let vocab = model.spec().vocab;
    let tokens = tokens(case, vocab);
    let golden = Safetensors::open(&folder().join("goldens.safetensors")).unwrap();
    let golden = golden.load_f32(case, &[tokens.len(), vocab]).unwrap();
    let mut cache = model.new_cache();
    let mut logits = Vec::new();
    let mut steps = steps.iter().cycle();
    while cache.positions() < tokens.len() {
        let at = cache.positions();
        let step = (*steps.next().unwrap()).min(tokens.len() - at);
        let mut sequences = [Sequence {
            tokens: &tokens[at..at + step],
            cache: &mut cache,
        }];
        logits.extend(model.forward(&mut sequences, Mode::Exact, Logits::All).unwrap().logits);
    }
    assert_eq!(logits.len(), golden.len());
    logits
        .iter()
        .zip(&golden)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

#[test]
fn prefill_and_decode_equal_transformers() {
    for case in CASES {
        let model = right(case);
        for (how, steps) in [
            ("prefill", &[80][..]),
            ("one by one", &[1]),
            ("odd chunks", &[7, 1, 30, 3]),
        ] {
            let miss = miss(case, &model, steps);
            assert!(miss < TOLERANCE, "{case}, {how}: off by {miss}");
        }
    }
}

#[test]
fn a_batch_of_sequences_equals_each_alone() {
    for case in ["dense_between", "window"] {
        let model = right(case);
        let tokens = tokens(case, model.spec().vocab);
        let parts = [&tokens[..33], &tokens[33..34], &tokens[34..]];
        let mut caches = [(); 3].map(|()| model.new_cache());
        let mut sequences: Vec<_> = parts
            .iter()
            .zip(&mut caches)
            .map(|(tokens, cache)| Sequence { tokens, cache })
            .collect();
        let together = model.forward(&mut sequences, Mode::Exact, Logits::All).unwrap().logits;
        let alone = parts.iter().flat_map(|tokens| {
            let mut cache = model.new_cache();
            let mut one = [Sequence {
                tokens,
                cache: &mut cache,
            }];
            model.forward(&mut one, Mode::Exact, Logits::All).unwrap().logits
        });
        for (together, alone) in together.iter().zip(alone) {
            assert!((together - alone).abs() < TOLERANCE);
        }
    }
}

#[test]
fn logits_do_not_depend_on_the_number_of_threads() {
    let model = right("dense_between");
    let tokens = tokens("dense_between", model.spec().vocab);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut cache = model.new_cache();
            let mut one = [Sequence {
                tokens: &tokens,
                cache: &mut cache,
            }];
            model.forward(&mut one, Mode::Exact, Logits::All).unwrap().logits
        })
    };
    assert_eq!(run(1), run(3));
}

/// Each wrong model must miss its golden by a hundred times the tolerance: else the golden proves nothing.
#[test]
fn wrong_models_miss_the_goldens() {
    type Harm = Box<dyn Fn(&str, &mut [f32]) + Send + Sync>;
    type Change = fn(&mut ModelSpec);
    let set = |part: &'static str, value: f32| -> Harm {
        Box::new(move |name, values| {
            if name.contains(part) {
                values.fill(value);
            }
        })
    };
    let none = || -> Harm { Box::new(|_, _| {}) };
    let nothing: Change = |_| {};
    let no_rope: Change = |spec| spec.attention.rope.scaling = RopeScaling::Linear { factor: 1e30 };
    let plain_rope: Change = |spec| spec.attention.rope.scaling = RopeScaling::None;
    let flip_norm: Change = |spec| spec.routing.norm_topk = !spec.routing.norm_topk;
    let no_window: Change = |spec| spec.layers.iter_mut().for_each(|layer| layer.window = None);
    let wrong: Vec<(&str, &str, Harm, Change)> = vec![
        ("no query bias", "dense_between", set("q_proj.bias", 0.0), nothing),
        // A key's bias moves all scores of a query by the same amount where rope leaves it alone: the weakest of all.
        ("no key bias", "dense_between", set("k_proj.bias", 0.0), nothing),
        ("no value bias", "dense_between", set("v_proj.bias", 0.0), nothing),
        (
            "unit input norms",
            "dense_between",
            set("input_layernorm", 1.0),
            nothing,
        ),
        (
            "unit mixer norms",
            "norm_topk",
            set("post_attention_layernorm", 1.0),
            nothing,
        ),
        ("unit final norm", "norm_topk", set("model.norm", 1.0), nothing),
        ("no rope", "dense_between", none(), no_rope),
        ("no rope", "norm_topk", none(), no_rope),
        ("rope scaling ignored", "rope_linear", none(), plain_rope),
        ("rope scaling ignored", "rope_yarn", none(), plain_rope),
        ("rope scaling ignored", "rope_llama3", none(), plain_rope),
        ("norm_topk flipped", "dense_between", none(), flip_norm),
        ("norm_topk flipped", "norm_topk", none(), flip_norm),
        ("experts zeroed", "dense_between", set(".experts.", 0.0), nothing),
        ("experts zeroed", "odd_widths", set(".experts.", 0.0), nothing),
        (
            "shared expert zeroed",
            "dense_between",
            set("shared_expert.", 0.0),
            nothing,
        ),
        (
            "shared gate ignored",
            "norm_topk",
            set("shared_expert_gate", 0.0),
            nothing,
        ),
        ("router ignored", "norm_topk", set("mlp.gate.weight", 0.0), nothing),
        ("dense layer zeroed", "dense_between", set("layers.1.mlp", 0.0), nothing),
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
    for (what, case, harm, change) in wrong {
        let mut spec = spec(case);
        change(&mut spec);
        let miss = miss(case, &model(spec, &*harm), &[80]);
        assert!(miss >= 100.0 * TOLERANCE, "{what} ({case}) is off by {miss} only");
    }
}

#[test]
fn configs_read_in_both_forms() {
    let published = spec("dense_between");
    assert_eq!(published.attention.head_dim, 6);
    assert_eq!(published.layers[1].kind, LayerKind::Dense { intermediate: 20 });
    assert!(published.tied_embeddings && published.attention.qkv_bias && !published.routing.norm_topk);
    let v5 = spec("norm_topk");
    assert_eq!((v5.attention.head_dim, v5.attention.kv_heads), (10, 1));
    assert!(v5.routing.norm_topk && !v5.tied_embeddings);
    let moe: Vec<u32> = v5.moe_layers().iter().map(|l| l.0).collect();
    assert_eq!(moe, [1, 3]);
    assert_eq!(spec("window").layers[0].window, Some(20));
    assert_eq!(spec("window").layers[1].window, None);
    assert_eq!(spec("all_experts").attention.rope.theta, 500.0);
}
