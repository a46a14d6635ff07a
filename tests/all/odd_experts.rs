//! Experts that are not like their neighbours, through the whole program: fewer inner channels, a constant, low-rank
//! corrections and products. What runs them, judges them, serves them, shows them and exports them.

use std::path::Path;

use cotk_container::decision::{Alternative, Channels, Decision, HealStep, Healed, MatrixDecision, Threshold};
use cotk_container::layout::{Part, prefixes};
use cotk_container::low_rank::{Factors, Role};
use cotk_container::manifest::{DENSE, EXPERTS, MANIFEST, Manifest, Prefix};
use cotk_container::reader::Container;
use cotk_container::view::ExpertView;
use cotk_container::writer::{CodedExpert, Constant, ContainerWriter, Head, NewExpert, NewLayer, NewState};
use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::CodedMatrix;
use cotk_quant::encode::encode;
use cotk_quant::layout::{MatrixFormat, WHOLE_ROW};
use cotk_run::units::LayerId;

use crate::export::{all_experts, compress};
use crate::program::{Workplace, in_repository};
use crate::serve::Server;

const HIDDEN: usize = 64;
const INNER: usize = 32;
/// Of expert 1.
const CUT: usize = 24;

fn coded(weights: &[f32], rows: usize, cols: usize, bits: Bits) -> CodedMatrix {
    let format = MatrixFormat::try_new(rows, cols, Code::Plain(bits), 32).unwrap();
    encode(weights, format).unwrap()
}

/// `left · right` = `weights` exactly before coding.
fn factors(role: Role, weights: &[f32], rows: usize, cols: usize) -> Factors {
    let rank = rows.min(cols);
    let mut one = vec![0.0; rank * rank];
    (0..rank).for_each(|i| one[i * rank + i] = 1.0);
    let (left, right) = if rows <= cols {
        (&one[..], weights)
    } else {
        (weights, &one[..])
    };
    Factors::encode(role, left, right, (rows, rank, cols)).unwrap()
}

/// The first [`CUT`] channels.
fn cut(view: &ExpertView<'_>) -> CodedExpert {
    let wide = |part| coded(&view.weights(part)[..CUT * HIDDEN], CUT, HIDDEN, Bits::B8);
    let down = view.weights(Part::Down);
    let down: Vec<f32> = down.chunks_exact(INNER).flat_map(|row| row[..CUT].to_vec()).collect();
    CodedExpert::new(wide(Part::Gate), wide(Part::Up), coded(&down, HIDDEN, CUT, Bits::B8))
}

/// Two bits, and what they lack in factors.
fn corrected(view: &ExpertView<'_>) -> CodedExpert {
    let parts = [
        (Part::Gate, INNER, HIDDEN),
        (Part::Up, INNER, HIDDEN),
        (Part::Down, HIDDEN, INNER),
    ];
    let made = parts.map(|(part, rows, cols)| {
        let weights = view.weights(part);
        let matrix = coded(&weights, rows, cols, Bits::B2);
        let codes = cotk_quant::decode::decode(&matrix.prefix(Bits::B2).unwrap());
        let lacks: Vec<f32> = weights.iter().zip(&codes).map(|(w, c)| w - c).collect();
        (matrix, factors(Role::Correction, &lacks, rows, cols))
    });
    let [(gate, a), (up, b), (down, c)] = made;
    let mut coded = CodedExpert::new(gate, up, down);
    coded.factors = [Some(a), Some(b), Some(c)];
    coded
}

/// Factors alone.
fn product(view: &ExpertView<'_>) -> CodedExpert {
    let parts = [
        (Part::Gate, INNER, HIDDEN),
        (Part::Up, INNER, HIDDEN),
        (Part::Down, HIDDEN, INNER),
    ];
    let made = parts.map(|(part, rows, cols)| {
        let weights = view.weights(part);
        let mut matrix = coded(&weights, rows, cols, Bits::B8);
        matrix.planes.clear();
        (matrix, factors(Role::Product, &weights, rows, cols))
    });
    let [(gate, a), (up, b), (down, c)] = made;
    let mut coded = CodedExpert::new(gate, up, down);
    coded.factors = [Some(a), Some(b), Some(c)];
    coded
}

fn decision() -> Decision {
    let format = |bits, group| MatrixFormat::try_new(INNER, HIDDEN, Code::Plain(bits), group).unwrap();
    let other = |format, bytes, error| {
        Some(Alternative {
            format,
            rank: 0,
            bytes,
            error,
        })
    };
    let matrix = MatrixDecision {
        error: 0.25,
        sensitivity: Some(1.5),
        lambda: Some(0.75),
        narrower: other(format(Bits::B2, WHOLE_ROW), 700, 0.75),
        wider: other(format(Bits::B8, 64), 2500, 0.0125),
    };
    Decision {
        chosen_by: Some("joint".to_owned()),
        starved: Some(17),
        matrices: Some([matrix; 3]),
        channels: Some(Channels {
            of: INNER,
            error: Some(0.125),
        }),
        scale: Some(1.25),
        ..Decision::default()
    }
}

/// `from` with its first experts made odd: a constant, fewer channels, corrections, a product.
fn make_odd(from: &Path, to: &Path) -> Manifest {
    let container = Container::open(from).unwrap();
    let manifest = container.manifest();
    fs_err::create_dir(to).unwrap();
    let mut extra = Vec::new();
    for name in manifest.files.keys().filter(|name| *name != EXPERTS) {
        fs_err::copy(from.join(name), to.join(name)).unwrap();
        extra.push(name.as_str());
    }
    let mut writer = ContainerWriter::resume(to, vec![]).unwrap();
    for layer in &manifest.layers {
        let odd = |index: usize, layer: LayerId| -> NewState {
            let expert = &manifest.layers[0].experts[index];
            let view = container.expert(layer, expert.expert, u32::MAX).unwrap().unwrap();
            let mut coded = match index {
                0 => return NewState::Constant(Constant::new(&[0.01; HIDDEN]).unwrap()),
                1 => cut(&view),
                2 => corrected(&view),
                3 => product(&view),
                _ => {
                    let wide = |part| coded(&view.weights(part), INNER, HIDDEN, Bits::B8);
                    let down = coded(&view.weights(Part::Down), HIDDEN, INNER, Bits::B8);
                    CodedExpert::new(wide(Part::Gate), wide(Part::Up), down)
                }
            };
            let prefix = |bits| Prefix {
                bits,
                delta: Some(0.5),
                rho: None,
                tokens: 3,
            };
            coded.prefixes = prefixes(coded.formats()).into_iter().map(prefix).collect();
            coded.into()
        };
        let experts = (0..layer.experts.len()).map(|index| {
            let new = NewExpert::new(layer.experts[index].why, odd(index, layer.layer));
            if index == 1 { new.decided(decision()) } else { new }
        });
        let new = NewLayer {
            layer: layer.layer,
            gain: 1.0,
            healed: vec![Healed {
                step: HealStep::Router,
                before: 0.5,
                after: 0.375,
                kept: true,
            }],
            thresholds: vec![Threshold {
                mode: "big-little".to_owned(),
                value: 0.125,
                low_bit_fraction: 0.5,
            }],
            experts: experts.collect(),
        };
        writer.append(new).unwrap();
    }
    let head = Head {
        source: manifest.source.clone(),
        config: manifest.config.clone(),
        recipe: manifest.recipe.clone(),
        little_bits: None,
        dropped: manifest.dropped,
        hidden: manifest.hidden,
        dense: manifest.dense.clone(),
    };
    assert!(extra.contains(&DENSE));
    writer.finish(head, &extra).unwrap()
}

fn odd(place: &Workplace) -> Manifest {
    all_experts(place);
    compress(place, "even", &["compress.drop_ratio=0"]);
    make_odd(&place.join("even"), &place.join("odd"))
}

fn perplexity(place: &Workplace, model: &str) -> f64 {
    let text = in_repository("data/tiny-qwen2moe/heldout.txt");
    let args = ["eval", model, "--text", text.to_str().unwrap(), "--json"];
    place.run(args).result(0)["perplexity"].as_f64().unwrap()
}

#[test]
fn odd_experts_run_and_are_judged_served_and_exported() {
    let place = Workplace::new();
    odd(&place);
    let (even, found) = (perplexity(&place, "even"), perplexity(&place, "odd"));
    assert!(found > even * 0.98 && found < even * 1.5, "{found} for {even}");

    let generated = |model: &str| {
        let args = [
            "run",
            model,
            "--prompt",
            "The ",
            "--max-tokens",
            "8",
            "--temperature",
            "0",
            "--json",
        ];
        place.run(args).result(0)["text"].as_str().unwrap().to_owned()
    };
    let text = generated("odd");
    let server = Server::start(place.join("odd").to_str().unwrap(), &[]);
    let body = serde_json::json!({"prompt": "The ", "max_tokens": 8, "temperature": 0}).to_string();
    let (status, answer) = server.call("POST", "/v1/completions", &body);
    let answer = answer.split_once("\r\n\r\n").unwrap().1;
    assert_eq!(status, 200, "{answer}");
    let answer: serde_json::Value =
        serde_json::from_str(&answer[answer.find('{').unwrap()..=answer.rfind('}').unwrap()])
            .unwrap_or_else(|e| panic!("{e}: {answer}"));
    assert_eq!(answer["choices"][0]["text"], text.as_str());

    for out in [["--gguf", "x.gguf"], ["--hf", "x"]] {
        let fault = place.run(["export", "odd", out[0], out[1], "--json"]).fault(2);
        assert!(
            fault["message"]
                .as_str()
                .unwrap()
                .contains("constants in the place of experts"),
            "{fault}"
        );
    }
    let result = place
        .run(["export", "odd", "--gguf", "o.gguf", "--project", "--json"])
        .result(0);
    let projected = result["projected"].as_array().unwrap();
    let constants = projected
        .iter()
        .filter(|p| p["reason"].as_str().unwrap().contains("novice"));
    assert_eq!(constants.count(), 3, "one a layer");
    assert!(
        projected
            .iter()
            .any(|p| p["reason"].as_str().unwrap().contains("low-rank factors"))
    );
    let result = place
        .run(["export", "odd", "--hf", "hf", "--project", "--json"])
        .result(0);
    let filled = result["projected"].as_array().unwrap().iter();
    let filled = filled.filter(|p| p["reason"].as_str().unwrap().contains("filled up with zeros"));
    assert_eq!(filled.count(), 3 * 3, "matrices of expert 1");
    // But for a constant of 0.01 the folder is the same model.
    let folder = perplexity(&place, "hf");
    assert!((folder / found - 1.0).abs() < 0.03, "{folder} for {found}");
}

#[test]
fn inspect_explains_every_decision_of_an_expert() {
    let place = Workplace::new();
    odd(&place);
    let listed = place.run(["inspect", "odd", "--experts", "--json"]).result(0);
    let layer = &listed["per_layer"][0];
    assert_eq!(
        (&layer["experts_kept"], &layer["experts_constant"]),
        (&7.into(), &1.into())
    );
    assert_eq!(layer["experts"][0]["kind"], "constant");
    assert!(layer["experts"][0]["rank"].is_null());
    assert_eq!(
        layer["experts"][2]["rank"],
        serde_json::json!({"gate": 32, "up": 32, "down": 32})
    );

    let told = place.run(["inspect", "odd", "--expert", "0.1", "--json"]).result(0);
    let told = &told["expert"];
    assert_eq!(
        (&told["kind"], &told["inner"], &told["channels_of"]),
        (&"kept".into(), &CUT.into(), &INNER.into())
    );
    assert_eq!(
        (&told["chosen_by"], &told["lacks_tokens"]),
        (&"joint".into(), &17.into())
    );
    let gate = &told["matrices"]["gate"];
    assert_eq!(
        (&gate["form"], &gate["error"], &gate["lambda"]),
        (&"plain8 g32".into(), &0.25.into(), &0.75.into())
    );
    assert_eq!(gate["narrower"]["form"], "plain2 row");
    assert_eq!(gate["wider"]["bytes"], 2500);
    assert_eq!(told["healed"][0]["step"], "router");
    assert_eq!(told["thresholds"][0]["mode"], "big-little");
    let manifest = fs_err::read_to_string(place.join("odd").join(MANIFEST)).unwrap();
    assert!(manifest.contains("\"group\": \"row\"") && !manifest.contains("16777216"));

    let shown = |expert: &str| place.run(["inspect", "odd", "--expert", expert]).stdout;
    let text = shown("0.1");
    for words in [
        "24 of 32",
        "joint",
        "lacks 17",
        "narrower: plain2 row",
        "wider: plain8 g64",
        "router",
        "big-little",
    ] {
        assert!(text.contains(words), "{words}:\n{text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    assert!(shown("0.0").contains("a constant: routed to as before"));
    assert!(shown("2.3").contains("two factors, plain8 g32"));

    for (expert, words) in [
        ("9.0", "layer 9 has no experts"),
        ("0.8", "layer 0 has no expert 8"),
        ("x", "as 2.17"),
    ] {
        let fault = place.run(["inspect", "odd", "--expert", expert, "--json"]).fault(2);
        assert!(fault["message"].as_str().unwrap().contains(words), "{fault}");
    }
    let fault = place.run(["inspect", "model", "--expert", "0.0", "--json"]).fault(2);
    assert!(
        fault["message"].as_str().unwrap().contains("nothing was decided"),
        "{fault}"
    );
}
