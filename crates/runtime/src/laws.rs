//! [`Resident`] under the laws of every runtime, on random containers: whatever codes, drops and semantics.

use std::path::Path;
use std::sync::Arc;

use cotk_container::layout::{prefix_at, prefixes};
use cotk_container::manifest::{Checksum, DENSE, DroppedMeaning, Origin, Prefix, SourceModel, Why};
use cotk_container::reader::Container;
use cotk_container::writer::{CodedExpert, ContainerWriter, Head, NewExpert};
use cotk_model::families::parse_config;
use cotk_model::laws::{Subject, check};
use cotk_model::layers::Mlp;
use cotk_model::layers::linear::Linear;
use cotk_model::moe::{Mode, MoeRuntime, MoeShape, RouterScores};
use cotk_model::reference::{Absent, PlainMoe};
use cotk_model::spec::ModelSpec;
use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::CodedMatrix;
use cotk_quant::decode::decode;
use cotk_quant::encode::encode;
use cotk_quant::layout::MatrixFormat;
use cotk_run::seeds::Seeds;
use cotk_run::units::LayerId;
use rand::RngExt;

use crate::Error;
use crate::resident::Resident;

const EXPERTS: usize = 5;
const HIDDEN: usize = 48;

fn config(norm_topk: bool) -> serde_json::Value {
    serde_json::json!({
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 16, "hidden_size": HIDDEN,
        "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "hidden_act": "silu", "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": 2,
        "norm_topk_prob": norm_topk
    })
}

fn spec(norm_topk: bool) -> ModelSpec {
    parse_config(Path::new("config.json"), &config(norm_topk).to_string()).unwrap()
}

fn matrix(rows: usize, cols: usize, code: Code, purpose: &str) -> CodedMatrix {
    let mut stream = Seeds::new(11).stream(purpose);
    let weights: Vec<f32> = (0..rows * cols).map(|_| stream.random_range(-0.5..0.5)).collect();
    encode(&weights, MatrixFormat::try_new(rows, cols, code, 32).unwrap()).unwrap()
}

/// Inner sizes differ between experts.
fn experts(layer: LayerId, code: Code, dropped: &[u32]) -> Vec<Option<CodedExpert>> {
    (0..EXPERTS as u32)
        .map(|e| {
            let inner = 24 + 9 * e as usize;
            let name = |part: &str| format!("{layer} {e} {part}");
            let (gate, up, down) = (
                matrix(inner, HIDDEN, code, &name("gate")),
                matrix(inner, HIDDEN, code, &name("up")),
                matrix(HIDDEN, inner, code, &name("down")),
            );
            let widths = prefixes([gate.format, up.format, down.format]);
            let prefix = |bits| Prefix {
                bits,
                delta: None,
                rho: None,
                tokens: 0,
            };
            (!dropped.contains(&e)).then(|| CodedExpert {
                gate,
                up,
                down,
                prefixes: widths.into_iter().map(prefix).collect(),
            })
        })
        .collect()
}

fn write(folder: &Path, code: Code, dropped: &[u32], meaning: DroppedMeaning, norm_topk: bool) {
    let mut writer = ContainerWriter::resume(folder, vec![]).unwrap();
    let why = Why {
        tokens: 0,
        share: 0.0,
        gate_share: 0.0,
    };
    for layer in [0, 2].map(LayerId) {
        let experts = experts(layer, code, dropped);
        let new = experts.into_iter().map(|kept| NewExpert { why, kept }).collect();
        writer.append_layer(layer, 1.0, new).unwrap();
    }
    cotk_container::dense::write_dense(&folder.join(DENSE), &[], |_| {
        Ok::<_, cotk_container::ContainerError>(vec![])
    })
    .unwrap();
    let head = Head {
        source: SourceModel {
            hash: Checksum(0),
            bytes: 0,
            expert_bytes: 0,
            expert_weights: 0,
        },
        config: config(norm_topk),
        recipe: Origin {
            hash: Checksum(0),
            seed: 0,
            calibration: Checksum(0),
            calibration_tokens: 0,
        },
        little_bits: (code.planes() > 1).then_some(4),
        dropped: meaning,
        hidden: HIDDEN,
        dense: Default::default(),
    };
    writer.finish(head, &[DENSE]).unwrap();
}

fn reference(code: Code, dropped: &[u32], meaning: DroppedMeaning, norm_topk: bool) -> PlainMoe {
    let layers = [0, 2].map(LayerId).to_vec();
    let linear = |m: &CodedMatrix| {
        let width = prefix_at(&m.format, 8);
        Linear::new(decode(&m.prefix(width).unwrap()), m.format.rows(), m.format.cols())
    };
    let plain = layers
        .iter()
        .map(|&layer| {
            experts(layer, code, dropped)
                .iter()
                .map(|coded| {
                    coded.as_ref().map(|c| Mlp {
                        gate: linear(&c.gate),
                        up: linear(&c.up),
                        down: linear(&c.down),
                    })
                })
                .collect()
        })
        .collect();
    let absent = match meaning {
        DroppedMeaning::Masked => Absent::Masked,
        DroppedMeaning::Removed => Absent::Removed,
    };
    let shape = MoeShape {
        hidden: HIDDEN,
        rule: spec(norm_topk).routing,
        layers,
    };
    PlainMoe::from_experts(shape, plain, absent)
}

#[test]
fn resident_obeys_the_laws_of_every_runtime() {
    for code in [Code::Nested224, Code::Nested44, Code::Plain(Bits::B4)] {
        for (dropped, meaning, norm_topk) in [
            (&[][..], DroppedMeaning::Masked, false),
            (&[1, 4][..], DroppedMeaning::Masked, true),
            (&[0, 2, 3][..], DroppedMeaning::Removed, false),
            (&[0, 1, 2, 3][..], DroppedMeaning::Masked, false),
        ] {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), code, dropped, meaning, norm_topk);
            let container = Arc::new(Container::open(folder.path()).unwrap());
            let runtime = Resident::new(container, &spec(norm_topk)).unwrap();
            let reference = reference(code, dropped, meaning, norm_topk);
            let subject = Subject {
                runtime: &runtime,
                reference: &reference,
                // 8-bit activations, quantized twice: 1/254 of the largest of 32 each time.
                exact_error: 0.03,
                split_error: 0.0,
                seed: 5,
            };
            if let Err(broken) = check(&subject) {
                panic!("{code}, dropped {dropped:?}, {meaning:?}:\n{broken}");
            }
        }
    }
}

#[test]
fn a_model_of_another_shape_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), Code::Nested44, &[], DroppedMeaning::Masked, false);
    let container = Arc::new(Container::open(folder.path()).unwrap());
    let wrong = [
        ModelSpec {
            hidden: 64,
            ..spec(false)
        },
        ModelSpec {
            layers: spec(false).layers[..1].to_vec(),
            ..spec(false)
        },
        {
            let mut spec = spec(false);
            spec.routing.experts = 6;
            spec
        },
    ];
    for spec in wrong {
        assert!(matches!(
            Resident::new(container.clone(), &spec),
            Err(Error::Model { .. })
        ));
    }
}

#[test]
fn a_damaged_expert_fails_its_own_tokens_only_and_by_name() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), Code::Nested224, &[], DroppedMeaning::Masked, false);
    let manifest = Container::open(folder.path()).unwrap().manifest().clone();
    let (_, _, record) = manifest.records().nth(1).unwrap();
    let path = folder.path().join("experts.bin");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1, 2, 3], record.offset + record.sections[1].offset).unwrap();
    let container = Arc::new(Container::open(folder.path()).unwrap());
    let runtime = Resident::new(container, &spec(false)).unwrap();
    let ask = |scores: [f32; EXPERTS]| {
        let rule = spec(false).routing;
        let mut out = vec![0.0; HIDDEN];
        let router = RouterScores::new(&scores, &rule).unwrap();
        runtime.forward(LayerId(0), &[1.0; HIDDEN], router, Mode::Exact, &mut out)
    };
    assert!(ask([0.1, 0.0, 0.3, 0.3, 0.3]).is_ok());
    let error = ask([0.1, 0.5, 0.2, 0.1, 0.1]).unwrap_err();
    let source = std::error::Error::source(&error)
        .map(ToString::to_string)
        .unwrap_or_default();
    assert!(
        format!("{error} {source}").contains("layer 0, expert 1, section 1"),
        "{error} {source}"
    );
}
