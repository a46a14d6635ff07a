//! Laws of the foreign reader, on files that torch and onnxruntime wrote (`tests/goldens/onnx/make.py`).

use std::path::PathBuf;

use serde_json::Value;

use super::*;

fn goldens() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/onnx")
}

fn bytes(name: &str) -> Vec<u8> {
    fs_err::read(goldens().join(format!("{name}.onnx"))).unwrap()
}

fn at(name: &str, batch: u32) -> Network {
    read(name, &bytes(name), &Options::of_batch(batch)).unwrap()
}

fn expected() -> Value {
    serde_json::from_str(&fs_err::read_to_string(goldens().join("expected.json")).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect()
}

/// Multiply-adds, layer by layer, are those that torch's modules counted while they ran.
#[test]
fn multiply_adds_are_those_of_torch() {
    for (name, expected) in expected().as_object().unwrap() {
        let network = at(name, u32::try_from(expected["batch"].as_u64().unwrap()).unwrap());
        let mut found: Vec<u64> = network.nodes.iter().map(|n| n.macs).filter(|&m| m > 0).collect();
        let mut counted = numbers(&expected["macs"]);
        if name.starts_with("tiny-q") {
            // The quantizer reorders branches.
            found.sort_unstable();
            counted.sort_unstable();
        }
        assert_eq!(found, counted, "{name}");
    }
}

/// Shapes of all values are those of onnx's own inference.
#[test]
fn shapes_are_those_of_onnx() {
    let mut seen = 0;
    for (name, expected) in expected().as_object().unwrap() {
        let Some(shapes) = expected["shapes"].as_object() else {
            continue;
        };
        for node in at(name, u32::try_from(expected["batch"].as_u64().unwrap()).unwrap()).nodes {
            if let Some(shape) = shapes.get(&node.output) {
                assert_eq!(node.dims, numbers(shape), "{name}: {}", node.name);
                seen += 1;
            }
        }
    }
    assert!(seen > 300, "{seen} shapes were compared");
}

#[test]
fn counts_grow_with_the_batch_and_a_fixed_batch_is_kept() {
    let (one, four) = (at("resnet18", 1), at("resnet18", 4));
    assert_eq!(4 * one.macs(), four.macs());
    assert_eq!(one.inputs[0].dims, [1, 3, 224, 224]);
    assert!(one.inputs[0].is_batch_open);
    // 11.7 M parameters; folded batch norms leave a bias per channel.
    assert!((11_600_000..11_800_000).contains(&one.constants), "{}", one.constants);
    assert!(one.external_tensors > 20);
    let fixed = bytes("tiny");
    // `batch` is the only name of a dimension: a file that fixes it refuses another one.
    let text = read("tiny", &fixed, &Options::of_batch(3)).unwrap();
    assert_eq!(text.inputs[0].dims[0], 3);
}

/// Both forms that onnxruntime writes run the same layers on codes; what it cannot quantize stays f32.
#[test]
fn quantized_files_say_which_layers_run_on_codes() {
    for name in ["tiny-qdq", "tiny-qlinear"] {
        let network = at(name, 1);
        let of = |op: &str| -> Vec<Numerics> {
            let named = |n: &&Node| n.op.name() == op;
            network.nodes.iter().filter(named).map(|n| n.numerics).collect()
        };
        assert_eq!(of("conv"), vec![Numerics::Int8; 8], "{name}");
        assert_eq!(of("linear"), [Numerics::Int8], "{name}");
        assert_eq!(of("add"), [Numerics::Int8], "{name}");
        assert_eq!(of("max pool"), [Numerics::Int8], "{name}");
        assert_eq!(
            of("elementwise"),
            [Numerics::F32],
            "{name}: HardSwish has no kernel on codes"
        );
        assert_eq!(network.unknown().count(), 0, "{name}");
        let edges_of_codes = network
            .nodes
            .iter()
            .flat_map(|n| &n.inputs)
            .filter(|e| e.is_quantized)
            .count();
        assert!(edges_of_codes >= 14, "{name}: {edges_of_codes}");
    }
    assert!(at("tiny", 1).nodes.iter().all(|n| n.numerics == Numerics::F32));
}

#[test]
fn an_unknown_operator_keeps_its_name_and_the_rest_is_read() {
    let network = at("unknown-many", 1);
    let names: Vec<&str> = network.unknown().map(|n| n.op_type.as_str()).collect();
    assert_eq!(names, ["example.org.Mystery"; 6]);
    assert!(
        network
            .unknown()
            .all(|n| n.is_shape_assumed && n.dims == [1, 8, 16, 16])
    );
    assert_eq!(network.nodes.len(), 15);
}

/// Cut anywhere, a file is refused with a place in it, or what is left is read; never a panic.
#[test]
fn a_file_cut_anywhere_is_refused_or_read() {
    let whole = bytes("tiny-qlinear");
    let mut refused = 0;
    for length in (0..2000).chain((2000..whole.len()).step_by(37)) {
        if let Err(error) = read("cut.onnx", &whole[..length], &Options::of_batch(1)) {
            let text = error.to_string();
            assert!(text.contains("cut.onnx"), "{text}");
            refused += 1;
        }
    }
    assert!(refused > 1900, "{refused}");
    let text = read("cut.onnx", &whole[..whole.len() - 100], &Options::of_batch(1));
    let text = text.unwrap_err().to_string();
    assert!(text.contains("at byte") && text.contains("are left"), "{text}");
}

/// Any changed byte: an error or a network, never a panic, never much memory.
#[test]
fn a_changed_byte_never_panics() {
    for name in ["tiny-dynamo", "unknown-many", "tiny-qlinear"] {
        let whole = bytes(name);
        let step = whole.len() / 1500 + 1;
        for at in (0..whole.len()).step_by(step) {
            for change in [0x01, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= change;
                if let Ok(network) = read("changed", &bytes, &Options::of_batch(1)) {
                    let _ = (network.macs(), network.unknown().count());
                }
            }
        }
    }
}

#[test]
fn lengths_that_lie_are_refused_with_their_place() {
    // Field 7 (the graph), 2^40 bytes long.
    let bytes = [0x3a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20];
    let text = read("x", &bytes, &Options::of_batch(1)).unwrap_err().to_string();
    assert!(
        text.contains("at byte 0: model: a field of 1099511627776 bytes, 0 are left"),
        "{text}"
    );
    let text = read("x", b"", &Options::of_batch(1)).unwrap_err().to_string();
    assert!(text.contains("no graph"), "{text}");
    let text = read("x", &[0x3a, 0x00], &Options::of_batch(1)).unwrap_err().to_string();
    assert!(text.contains("no input"), "{text}");
    // A tensor whose dimensions promise more than memory holds: [2^31, 2^31].
    let dims = [0x08, 0x80, 0x80, 0x80, 0x80, 0x08, 0x08, 0x80, 0x80, 0x80, 0x80, 0x08];
    let mut tensor = vec![0x2a, 12];
    tensor.extend(dims);
    let mut model = vec![0x3a, 14];
    model.extend(tensor);
    let text = read("x", &model, &Options::of_batch(1)).unwrap_err().to_string();
    assert!(text.contains("2^40"), "{text}");
}

/// What predictions walk has the same multiply-adds, an output, and knows every operator.
#[test]
fn the_walked_form_keeps_the_arithmetic() {
    for name in expected().as_object().unwrap().keys() {
        let network = at(name, 2);
        let walked = network.to_walk();
        let macs: u64 = walked.nodes.iter().map(|n| n.macs).sum();
        assert_eq!(macs, network.macs(), "{name}");
        assert!(!walked.outputs.is_empty(), "{name}");
        let unknown = |n: &&cotk_latency::walk::Node| matches!(n.kind, cotk_latency::walk::Kind::Unknown { .. });
        assert_eq!(walked.nodes.iter().filter(unknown).count(), 0, "{name}");
        // Weights as they are run: an int8 file is about a quarter of its f32 form.
        assert!(
            walked.nodes.iter().map(|n| n.weight_bytes).sum::<u64>() > 10_000,
            "{name}"
        );
    }
    let bytes = |name: &str| -> u64 { at(name, 1).to_walk().nodes.iter().map(|n| n.weight_bytes).sum() };
    assert!((0.2..0.4).contains(&(bytes("tiny-qdq") as f64 / bytes("tiny") as f64)));
}

#[test]
fn layers_have_the_names_of_their_modules() {
    let labels = |name: &str| -> Vec<String> { at(name, 1).nodes.into_iter().map(|n| n.label).collect() };
    let has = |name: &str, label: &str| {
        let labels = labels(name);
        assert!(labels.iter().any(|l| l == label), "{name}: {label} of {labels:?}");
    };
    has("resnet18", "layer4.0.conv2");
    has("mobilenet-v3-small", "features.4.block.1.0");
    has("tiny", "head");
    has("tiny-qdq", "head");
    for name in expected().as_object().unwrap().keys() {
        let mut labels = labels(name);
        let count = labels.len();
        labels.sort();
        labels.dedup();
        assert_eq!(labels.len(), count, "{name}");
    }
}

/// What predictions walk is what onnxruntime runs: operators and edges by kind, on files that others wrote.
#[test]
fn the_walk_lists_what_onnxruntime_runs() {
    use std::collections::BTreeMap;

    use cotk_latency::walk::walk;
    use cotk_latency::work::{Block, EdgeKind, Key};

    for name in ["tiny", "tiny-dynamo", "tiny-qdq", "tiny-qlinear"] {
        let Ok(ran) = crate::session::optimized_operators(name, &bytes(name)) else {
            // The dynamo export has left its weights out.
            assert_eq!(name, "tiny-dynamo");
            continue;
        };
        let mut theirs: BTreeMap<&str, i32> = BTreeMap::new();
        for (_, op, _) in &ran {
            let kind = match op.as_str() {
                "Conv" | "FusedConv" | "QLinearConv" => "conv",
                "ReorderInput" => "reorder in",
                "ReorderOutput" => "reorder out",
                "QuantizeLinear" => "quantize",
                "DequantizeLinear" => "dequantize",
                "Transpose" => "transpose",
                "Gemm" | "QGemm" => "linear",
                _ => continue,
            };
            *theirs.entry(kind).or_default() += 1;
        }
        let block = cotk_latency::identity::Identity::here(BTreeMap::new()).block();
        let mut ours: BTreeMap<&str, i32> = BTreeMap::new();
        for key in walk(&at(name, 1).to_walk(), 1, Block(block.0)).keys() {
            let kind = match key {
                Key::Conv(_) => "conv",
                Key::Linear(_) => "linear",
                Key::Edge(e) => match e.kind {
                    EdgeKind::ReorderIn => "reorder in",
                    EdgeKind::ReorderOut => "reorder out",
                    EdgeKind::Quantize => "quantize",
                    EdgeKind::Dequantize => "dequantize",
                    EdgeKind::TransposeInt8 | EdgeKind::TransposeF32 => "transpose",
                    EdgeKind::View => continue,
                },
                _ => continue,
            };
            *ours.entry(kind).or_default() += 1;
        }
        if name.starts_with("tiny-q") {
            // Known gap: onnxruntime moves the transposes of 1x1 tensors (squeeze and excite) away, the walk counts them.
            assert!(ours.remove("transpose") >= theirs.remove("transpose"), "{name}");
        }
        assert_eq!(ours, theirs, "{name}: {ran:?}");
    }
}

/// Work is bounded too: a chain longer than any network is refused, one within the bound is read at once.
#[test]
fn chains_without_end_are_refused() {
    use prost::Message;

    use crate::proto;

    let chain = |length: usize| {
        let node = |i: usize| proto::Node {
            input: vec![format!("v{i}")],
            output: vec![format!("v{}", i + 1)],
            op_type: "Relu".into(),
            ..proto::Node::default()
        };
        let dim = |value| proto::Dimension {
            dim_value: Some(value),
            dim_param: None,
        };
        let value = |name: String| proto::ValueInfo {
            name,
            r#type: Some(proto::Type {
                tensor_type: Some(proto::TensorType {
                    elem_type: 1,
                    shape: Some(proto::TensorShape {
                        dim: [1, 8, 4, 4].map(dim).to_vec(),
                    }),
                }),
            }),
        };
        let graph = proto::Graph {
            node: (0..length).map(node).collect(),
            input: vec![value("v0".into())],
            output: vec![value(format!("v{length}"))],
            ..proto::Graph::default()
        };
        let model = proto::Model {
            graph: Some(graph),
            ..proto::Model::default()
        };
        read("chain", &model.encode_to_vec(), &Options::of_batch(1))
    };
    assert_eq!(chain(20_000).unwrap().nodes.len(), 20_000);
    let text = chain(20_001).unwrap_err().to_string();
    assert!(text.contains("20001 nodes, at most 20000"), "{text}");
}

/// A sum of two images, each of two names of dimensions: what is asked for by name is what is walked, and what does not fit
/// is refused.
#[test]
fn several_inputs_are_walked_with_the_shapes_that_are_asked_for() {
    use prost::Message;

    use crate::proto;

    let value = |name: &str| proto::ValueInfo {
        name: name.into(),
        r#type: Some(proto::Type {
            tensor_type: Some(proto::TensorType {
                elem_type: 1,
                shape: Some(proto::TensorShape {
                    dim: ["batch", "8", "side", "side"]
                        .map(|dim| proto::Dimension {
                            dim_value: dim.parse().ok(),
                            dim_param: dim.parse::<i64>().err().map(|_| dim.to_owned()),
                        })
                        .to_vec(),
                }),
            }),
        }),
    };
    let graph = proto::Graph {
        node: vec![proto::Node {
            input: vec!["left".into(), "right".into()],
            output: vec!["sum".into()],
            op_type: "Add".into(),
            ..proto::Node::default()
        }],
        input: vec![value("left"), value("right")],
        output: vec![value("sum")],
        ..proto::Graph::default()
    };
    let model = proto::Model {
        graph: Some(graph),
        ..proto::Model::default()
    };
    let bytes = model.encode_to_vec();
    let read = |shapes: &[(&str, &[u64])]| {
        let shapes = shapes.iter().map(|(name, dims)| ((*name).to_owned(), dims.to_vec()));
        let options = Options {
            batch: 1,
            shapes: shapes.collect(),
        };
        read("two", &bytes, &options)
    };
    // One shape says what `side` is for both.
    let walked = read(&[("left", &[2, 8, 6, 6])]).unwrap().to_walk();
    let keys: Vec<String> = cotk_latency::walk::walk(&walked, 1, cotk_latency::work::Block(16))
        .keys()
        .map(|key| key.to_string())
        .collect();
    assert!(
        keys.iter()
            .any(|key| key.contains("8 at 6x6") && key.contains("batch 2")),
        "{keys:?}"
    );
    assert_eq!((walked.nodes.len(), walked.input.shape.batch), (2, 2));
    for (shapes, expected) in [
        (&[][..], "--input-shape left="),
        (&[("left", &[2, 8, 6][..])][..], "3 asked for"),
        (&[("left", &[2, 9, 6, 6][..])][..], "9 asked for at place 1"),
        (&[("left", &[2, 8, 6, 5][..])][..], "one number for one name"),
        (
            &[("left", &[2, 8, 6, 6][..]), ("right", &[1, 8, 6, 6][..])][..],
            "one number for one name",
        ),
        (
            &[("left", &[2, 8, 6, 6][..]), ("middle", &[1][..])][..],
            "one of left, right",
        ),
    ] {
        let text = read(shapes).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
}
