//! [`Resident`] under the laws of every runtime, on random containers: whatever codes, factors, drops, constants
//! and semantics.

use std::path::Path;
use std::sync::Arc;

use cotk_container::layout::prefixes;
use cotk_container::low_rank::{Factors, Role};
use cotk_container::manifest::{Checksum, DENSE, DroppedMeaning, Origin, Prefix, SourceModel, Why};
use cotk_container::reader::Container;
use cotk_container::view::{ExpertView, MatrixView};
use cotk_container::writer::{CodedExpert, Constant, ContainerWriter, Head, NewExpert, NewState};
use cotk_model::families::parse_config;
use cotk_model::laws::{Subject, check};
use cotk_model::layers::Mlp;
use cotk_model::layers::linear::Linear;
use cotk_model::moe::{Mode, MoeRuntime, MoeShape, RouterScores};
use cotk_model::reference::{Absent, PlainMoe};
use cotk_model::spec::ModelSpec;
use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::CodedMatrix;
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

/// A container's experts and what routing may do with them.
#[derive(Debug, Clone, Copy)]
struct Case {
    code: Code,
    dropped: &'static [u32],
    constants: &'static [u32],
    meaning: DroppedMeaning,
    norm_topk: bool,
    /// Odd experts: a correction of gate and down, up in two factors.
    has_factors: bool,
}

impl Case {
    /// All experts, in codes alone.
    fn whole(code: Code) -> Self {
        Self {
            code,
            dropped: &[],
            constants: &[],
            meaning: DroppedMeaning::Masked,
            norm_topk: false,
            has_factors: false,
        }
    }
}

fn factors(role: Role, rows: usize, cols: usize, purpose: &str) -> Factors {
    let mut stream = Seeds::new(11).stream(purpose);
    let rank = 24;
    let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| stream.random_range(-0.2..0.2)).collect() };
    Factors::encode(role, &draw(rows * rank), &draw(rank * cols), (rows, rank, cols)).unwrap()
}

/// Inner sizes differ between experts.
fn experts(layer: LayerId, case: &Case) -> Vec<NewState> {
    let expert = |e: u32| {
        let inner = 24 + 9 * e as usize;
        let name = |part: &str| format!("{layer} {e} {part}");
        if case.dropped.contains(&e) {
            return NewState::Dropped;
        }
        if case.constants.contains(&e) {
            let mut stream = Seeds::new(11).stream(&name("constant"));
            let values: Vec<f32> = (0..HIDDEN).map(|_| stream.random_range(-0.5..0.5)).collect();
            return NewState::Constant(Constant::new(&values).unwrap());
        }
        let has_factors = case.has_factors && e % 2 == 1;
        let up = if has_factors { Code::Plain(Bits::B8) } else { case.code };
        let mut coded = CodedExpert::new(
            matrix(inner, HIDDEN, case.code, &name("gate")),
            matrix(inner, HIDDEN, up, &name("up")),
            matrix(HIDDEN, inner, case.code, &name("down")),
        );
        if has_factors {
            coded.up.planes.clear();
            coded.factors = [
                Some(factors(Role::Correction, inner, HIDDEN, &name("gate factors"))),
                Some(factors(Role::Product, inner, HIDDEN, &name("up factors"))),
                Some(factors(Role::Correction, HIDDEN, inner, &name("down factors"))),
            ];
        }
        let prefix = |bits| Prefix {
            bits,
            delta: None,
            rho: None,
            tokens: 0,
        };
        coded.prefixes = prefixes(coded.formats()).into_iter().map(prefix).collect();
        coded.into()
    };
    (0..EXPERTS as u32).map(expert).collect()
}

fn write(folder: &Path, case: &Case) {
    let mut writer = ContainerWriter::resume(folder, vec![]).unwrap();
    for layer in [0, 2].map(LayerId) {
        let states = experts(layer, case).into_iter();
        let new = states.map(|state| NewExpert::new(Why::default(), state)).collect();
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
        config: config(case.norm_topk),
        recipe: Origin {
            hash: Checksum(0),
            seed: 0,
            calibration: Checksum(0),
            calibration_tokens: 0,
        },
        little_bits: (case.code.planes() > 1).then_some(4),
        dropped: case.meaning,
        hidden: HIDDEN,
        dense: Default::default(),
    };
    writer.finish(head, &[DENSE]).unwrap();
}

fn reference(case: &Case) -> PlainMoe {
    let layers = [0, 2].map(LayerId).to_vec();
    let linear = |m: MatrixView<'_>| Linear::new(m.weights(), m.rows(), m.cols());
    let plain = |state: &NewState| match state {
        NewState::Kept(coded) => {
            let ExpertView { gate, up, down } = coded.view(8);
            Some(Mlp {
                gate: linear(gate),
                up: linear(up),
                down: linear(down),
            })
        }
        NewState::Constant(_) | NewState::Dropped => None,
    };
    let constant = |state: &NewState| match state {
        NewState::Constant(constant) => Some(constant.values()),
        NewState::Kept(_) | NewState::Dropped => None,
    };
    let states: Vec<Vec<NewState>> = layers.iter().map(|&layer| experts(layer, case)).collect();
    let absent = match case.meaning {
        DroppedMeaning::Masked | DroppedMeaning::Novice => Absent::Masked,
        DroppedMeaning::Removed => Absent::Removed,
    };
    let shape = MoeShape {
        hidden: HIDDEN,
        rule: spec(case.norm_topk).routing,
        layers,
    };
    let plain = states.iter().map(|layer| layer.iter().map(plain).collect()).collect();
    let constants = states
        .iter()
        .map(|layer| layer.iter().map(constant).collect())
        .collect();
    PlainMoe::from_experts(shape, plain, absent).with_constants(constants)
}

#[test]
fn resident_obeys_the_laws_of_every_runtime() {
    use DroppedMeaning::{Masked, Novice, Removed};
    for code in [Code::Nested224, Code::Nested44, Code::Plain(Bits::B4)] {
        type Lists = (&'static [u32], &'static [u32], DroppedMeaning, bool, bool);
        let lists: [Lists; 8] = [
            (&[], &[], Masked, false, false),
            (&[1, 4], &[], Masked, true, false),
            (&[0, 2, 3], &[], Removed, false, false),
            (&[0, 1, 2, 3], &[], Masked, false, false),
            (&[], &[0, 3], Novice, false, false),
            (&[2], &[4], Masked, true, true),
            (&[1], &[0, 3], Removed, false, false),
            (&[], &[2], Novice, true, true),
        ];
        for (dropped, constants, meaning, norm_topk, has_factors) in lists {
            let case = Case {
                code,
                dropped,
                constants,
                meaning,
                norm_topk,
                has_factors,
            };
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &case);
            let container = Arc::new(Container::open(folder.path()).unwrap());
            let runtime = Resident::new(container, &spec(norm_topk)).unwrap();
            let subject = Subject {
                runtime: &runtime,
                reference: &reference(&case),
                // 8-bit activations, quantized twice: 1/254 of the largest of 32 each time.
                exact_error: 0.03,
                split_error: 0.0,
                seed: 5,
            };
            if let Err(broken) = check(&subject) {
                panic!("{case:?}:\n{broken}");
            }
        }
    }
}

#[test]
fn a_model_of_another_shape_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &Case::whole(Code::Nested44));
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
    write(folder.path(), &Case::whole(Code::Nested224));
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
