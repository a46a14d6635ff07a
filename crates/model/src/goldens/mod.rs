//! Goldens: logits of PyTorch transformers on tiny random models (`tests/goldens/<family>/make.py`), whose weights
//! both sides draw from tensor names. One file per family here says which wrong models its goldens must tell from the
//! right one.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::safetensors::Safetensors;
use crate::checkpoint::{CheckpointError, TensorInfo, TensorSource};
use crate::families::parse_config;
use crate::layers::cache::KvKind;
use crate::model::{KvCache, Logits, Model, Sequence};
use crate::moe::Mode;
use crate::reference::PlainMoe;
use crate::spec::ModelSpec;

mod deepseek_v2;
mod deepseek_v3;
mod loading;
mod mixtral;
mod olmoe;
mod qwen2_moe;
mod qwen3_moe;

const TOLERANCE: f32 = 1e-4;
/// Families and their cases.
const CASES: [(&str, &[&str]); 6] = [
    ("deepseek_v2", &deepseek_v2::CASES),
    ("deepseek_v3", &deepseek_v3::CASES),
    ("mixtral", &mixtral::CASES),
    ("olmoe", &olmoe::CASES),
    ("qwen2_moe", &qwen2_moe::CASES),
    ("qwen3_moe", &qwen3_moe::CASES),
];

fn file(family: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/goldens")
        .join(family)
        .join(name)
}

/// Splitmix64 over the FNV-1a hash of `name`: numbers in [0, 1), steps of 2⁻²⁴. Same function as in `tiny.py`.
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

/// The weights of this name. Same function as `weights` in `tiny.py`.
fn drawn(name: &str, count: usize) -> Vec<f32> {
    let numbers = uniform(name, count);
    if name.ends_with("norm.weight") {
        numbers.map(|u| u + 0.5).collect()
    } else if name.ends_with(".bias") {
        numbers.map(|u| (u - 0.5) * 1.732_050_8).collect()
    } else {
        numbers.map(|u| (u - 0.5) * 0.692_820_3).collect()
    }
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
        let mut values = drawn(name, expected.iter().product());
        (self.harm)(name, &mut values);
        Ok(values)
    }
}

fn spec(family: &str, case: &str) -> ModelSpec {
    let file = file(family, &format!("{case}.json"));
    parse_config(&file, &cotk_run::files::read_text(&file, 1 << 20).unwrap()).unwrap()
}

fn model(spec: ModelSpec, harm: &(dyn Fn(&str, &mut [f32]) + Send + Sync)) -> Model {
    let source = Drawn { harm };
    let runtime = Arc::new(PlainMoe::load(&spec, &source).unwrap());
    // The tolerance is that of f32 throughout.
    Model::load(spec, &source, runtime).unwrap().with_kv(KvKind::F32)
}

fn right(family: &str, case: &str) -> Model {
    model(spec(family, case), &|_, _| {})
}

fn tokens(case: &str, vocab: usize) -> Vec<u32> {
    uniform(&format!("tokens of {case}"), 80)
        .map(|u| (u * vocab as f32) as u32)
        .collect()
}

/// Logits of one sequence from its start, fed as these many tokens at a time.
fn logits(model: &Model, tokens: &[u32], steps: &[usize]) -> Vec<f32> {
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
    logits
}

/// Largest difference to the golden when the 80 tokens go in as these many at a time.
fn miss(family: &str, case: &str, model: &Model, steps: &[usize]) -> f32 {
    let vocab = model.spec().vocab;
    let tokens = tokens(case, vocab);
    let golden = Safetensors::open(&file(family, "goldens.safetensors")).unwrap();
    let golden = golden.load_f32(case, &[tokens.len(), vocab]).unwrap();
    let logits = logits(model, &tokens, steps);
    assert_eq!(logits.len(), golden.len());
    let gap = |(a, b): (&f32, &f32)| (a - b).abs();
    logits.iter().zip(&golden).map(gap).fold(0.0, f32::max)
}

#[test]
fn prefill_and_decode_equal_transformers() {
    for (family, cases) in CASES {
        for case in cases {
            let model = right(family, case);
            for (how, steps) in [
                ("prefill", &[80][..]),
                ("one by one", &[1]),
                ("odd chunks", &[7, 1, 30, 3]),
            ] {
                let miss = miss(family, case, &model, steps);
                assert!(miss < TOLERANCE, "{family}, {case}, {how}: off by {miss}");
            }
        }
    }
}

/// One case of each kind of attention.
const BATCHED: [(&str, &str); 5] = [
    ("deepseek_v2", "lite"),
    ("deepseek_v3", "published"),
    ("qwen2_moe", "dense_between"),
    ("qwen2_moe", "window"),
    ("olmoe", "clip"),
];

#[test]
fn a_batch_of_sequences_equals_each_alone() {
    for (family, case) in BATCHED {
        let model = right(family, case);
        let tokens = tokens(case, model.spec().vocab);
        let parts = [&tokens[..33], &tokens[33..34], &tokens[34..]];
        let mut caches = [(); 3].map(|()| model.new_cache());
        let mut sequences: Vec<_> = parts
            .iter()
            .zip(&mut caches)
            .map(|(tokens, cache)| Sequence { tokens, cache })
            .collect();
        let together = model.forward(&mut sequences, Mode::Exact, Logits::All).unwrap().logits;
        let alone = parts.iter().flat_map(|tokens| logits(&model, tokens, &[80]));
        for (together, alone) in together.iter().zip(alone) {
            assert!((together - alone).abs() < TOLERANCE);
        }
    }
}

#[test]
fn logits_do_not_depend_on_the_number_of_threads() {
    for (family, case) in BATCHED {
        let model = right(family, case);
        let tokens = tokens(case, model.spec().vocab);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| logits(&model, &tokens, &[80]))
        };
        assert_eq!(run(1), run(3));
    }
}

/// Cached bytes are those that a plan counts with.
#[test]
fn a_cache_holds_as_much_as_was_promised() {
    for (family, case) in BATCHED {
        for kind in KvKind::ALL {
            let model = right(family, case).with_kv(kind);
            let mut cache = model.new_cache();
            let tokens = tokens(case, model.spec().vocab);
            let mut one = [Sequence {
                tokens: &tokens,
                cache: &mut cache,
            }];
            model.forward(&mut one, Mode::Exact, Logits::Last).unwrap();
            assert_eq!(cache.bytes(), KvCache::bytes_for(model.spec(), kind, 80));
        }
    }
}

type Harm = Box<dyn Fn(&str, &mut [f32]) + Send + Sync>;
type Change = fn(&mut ModelSpec);
/// What is wrong, with which case, by which weights, by which rules.
type Wrong = (&'static str, &'static str, Harm, Change);

/// Weights whose name contains `part` set to `value`.
fn set(part: &'static str, value: f32) -> Harm {
    Box::new(move |name, values| {
        if name.contains(part) {
            values.fill(value);
        }
    })
}

/// Weights as they are.
fn none() -> Harm {
    Box::new(|_, _| {})
}

/// Rules as they are.
const NOTHING: Change = |_| {};

/// Each wrong model must miss its golden by a hundred times the tolerance: else the golden proves nothing.
fn each_misses(family: &str, wrong: Vec<Wrong>) {
    for (what, case, harm, change) in wrong {
        let mut spec = spec(family, case);
        change(&mut spec);
        let miss = miss(family, case, &model(spec, &*harm), &[80]);
        assert!(miss >= 100.0 * TOLERANCE, "{what} ({case}) is off by {miss} only");
    }
}
