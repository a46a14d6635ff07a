//! Laws of the file format: what is written reads back, and no bytes make the reader do more than refuse.

use std::collections::BTreeMap;

use cotk_latency::graph::*;
use cotk_onnx::Error;
use cotk_onnx::proto;
use cotk_onnx::read::from_onnx;
use cotk_onnx::weights::{Layer, Matrix, Network, quantize};
use cotk_onnx::write::to_onnx;
use cotk_run::seeds::Seeds;
use prost::Message;
use rand::{Rng, RngExt};

fn uniform(count: u32, rng: &mut impl Rng) -> Vec<f32> {
    (0..count).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
}

/// Stem, residual block, pool, head; `bits` for all layers, or f32.
fn network(bits: Option<[WeightBits; 4]>, channels: u32, kernel: u32, stride: u32) -> Network {
    let relu = bits.map(|_| ActQuant {
        scale: 0.05,
        zero_point: 0,
    });
    let signed = bits.map(|_| ActQuant {
        scale: 0.1,
        zero_point: 128,
    });
    let weights = |i: usize| bits.map_or(Weights::F32, |b| Weights::Int(b[i]));
    let conv = |cin, cout, kernel, stride, activation, i| {
        Op::Conv(Conv {
            cin,
            cout,
            kernel,
            stride,
            groups: 1,
            activation,
            weights: weights(i),
        })
    };
    let node = |name: &str, op, inputs: Vec<Source>, output| Node {
        name: name.into(),
        op,
        inputs,
        output,
    };
    let n = Source::Node;
    let c = channels;
    let head = Linear {
        inputs: c,
        outputs: 5,
        activation: Activation::None,
        weights: weights(3),
    };
    let raw = RawGraph {
        name: "net".into(),
        input: Shape {
            batch: 2,
            channels: 3,
            height: 7,
            width: 6,
        },
        input_quant: signed,
        nodes: vec![
            node(
                "stem",
                conv(3, c, kernel, stride, Activation::Relu, 0),
                vec![Source::Input],
                relu,
            ),
            node("a", conv(c, c, 3, 1, Activation::Relu, 1), vec![n(0)], relu),
            node("b", conv(c, c, 1, 1, Activation::None, 2), vec![n(1)], signed),
            node("sum", Op::Add(Activation::Relu), vec![n(2), n(0)], relu),
            node("pool", Op::GlobalAvgPool, vec![n(3)], relu),
            node("head", Op::Linear(head), vec![n(4)], None),
        ],
    };
    let graph = Graph::new(raw).expect("shapes fit");
    let mut rng = Seeds::new(1).stream("weights");
    let mut layers = BTreeMap::new();
    for node in graph.nodes() {
        let (count, channels) = match node.op {
            Op::Conv(c) => (c.cin * c.cout * c.kernel * c.kernel, c.cout),
            Op::Linear(l) => (l.inputs * l.outputs, l.outputs),
            _ => continue,
        };
        let values = uniform(count, &mut rng);
        let matrix = match node.op.weights().expect("a layer") {
            Weights::F32 => Matrix::F32(values),
            Weights::Int(bits) => quantize(&values, channels as usize, bits),
        };
        layers.insert(
            node.name.clone(),
            Layer {
                matrix,
                bias: uniform(channels, &mut rng),
            },
        );
    }
    Network::new(graph, layers).expect("weights fit")
}

const MIXED: [WeightBits; 4] = [WeightBits::B8, WeightBits::B2, WeightBits::B4, WeightBits::B8];

#[test]
fn what_is_written_reads_back() {
    for (channels, kernel, stride) in [(4, 3, 1), (7, 5, 2), (16, 1, 3)] {
        let network = network(None, channels, kernel, stride);
        assert_eq!(from_onnx("f32", &to_onnx(&network)).unwrap(), network);
    }
    for (channels, kernel, stride) in [(4, 3, 1), (7, 5, 2)] {
        let network = network(Some(MIXED), channels, kernel, stride);
        let bytes = to_onnx(&network);
        let again = from_onnx("int8", &bytes).unwrap();
        assert_eq!(again.graph(), network.graph());
        for (name, layer) in network.layers() {
            assert_eq!(again.layers()[name].matrix, layer.matrix);
            // A bias is stored as an integer code of scale s_x · s_w (here at most 0.1 · 1): half of it is lost.
            for (a, b) in again.layers()[name].bias.iter().zip(&layer.bias) {
                assert!((a - b).abs() <= 0.051, "{a} {b}");
            }
        }
        // And once in codes, nothing more is lost.
        assert_eq!(to_onnx(&again), bytes);
    }
}

#[test]
fn cut_and_changed_bytes_are_refused_or_read_and_never_panic() {
    let bytes = to_onnx(&network(Some(MIXED), 3, 3, 1));
    for cut in 0..bytes.len() {
        let _ = from_onnx("cut", &bytes[..cut]);
    }
    let mut refused = 0;
    for at in 0..bytes.len() {
        for change in [0xff, 0x01, 0x80] {
            let mut changed = bytes.clone();
            changed[at] ^= change;
            refused += usize::from(from_onnx("changed", &changed).is_err());
        }
    }
    assert!(refused > bytes.len() / 2, "{refused} of {}", 3 * bytes.len());
}

/// One wrong thing at a time: named by node, with what was found and expected.
#[test]
fn what_the_graph_cannot_say_is_named() {
    let model = proto::Model::decode(&to_onnx(&network(Some(MIXED), 4, 3, 1))[..]).unwrap();
    let check = |change: &dyn Fn(&mut proto::Graph), expect: &str| {
        let mut model = model.clone();
        change(model.graph.as_mut().unwrap());
        let error = from_onnx("x.onnx", &model.encode_to_vec()).unwrap_err().to_string();
        assert!(error.contains("x.onnx") && error.contains(expect), "{error}");
    };
    fn node<'a>(g: &'a mut proto::Graph, name: &str) -> &'a mut proto::Node {
        g.node.iter_mut().find(|n| n.name == name).unwrap()
    }
    fn attribute<'a>(node: &'a mut proto::Node, name: &str) -> &'a mut proto::Attribute {
        node.attribute.iter_mut().find(|a| a.name == name).unwrap()
    }
    check(
        &|g| node(g, "a").op_type = "Softsign".into(),
        "node `a`: unknown operator `Softsign`",
    );
    check(
        &|g| node(g, "a").domain = "com.x".into(),
        "unknown operator `com.x.Conv`",
    );
    check(
        &|g| attribute(node(g, "a"), "pads").ints = vec![0; 4],
        "node `a`: pads: found [0, 0, 0, 0], expected [1, 1, 1, 1]",
    );
    check(&|g| attribute(node(g, "a"), "strides").ints = vec![1, 2], "strides");
    check(&|g| attribute(node(g, "a"), "group").i = 0, "group");
    check(&|g| attribute(node(g, "a"), "dilations").ints = vec![2, 2], "dilations");
    check(
        &|g| attribute(node(g, "head"), "transB").i = 0,
        "transB: found 0, expected 1",
    );
    check(
        &|g| node(g, "b").input[0] = "nowhere".into(),
        "node `b`: input: found `nowhere`",
    );
    check(
        &|g| {
            g.input[0]
                .r#type
                .as_mut()
                .unwrap()
                .tensor_type
                .as_mut()
                .unwrap()
                .elem_type = 10
        },
        "element type 10",
    );
    check(&|g| g.output.clear(), "0 outputs, expected 1");
    check(
        &|g| g.initializer[0].dims = vec![i64::MAX, i64::MAX],
        "too many elements",
    );
    check(&|g| g.initializer[0].dims = vec![-1], "dimension -1");
    check(&|g| g.initializer[0].data_location = 1, "in another file");
}

#[test]
fn weights_that_do_not_fit_are_refused_by_layer() {
    let good = network(Some(MIXED), 4, 3, 1);
    let refuse = |change: &dyn Fn(&mut BTreeMap<String, Layer>), expect: &str| {
        let mut layers = good.layers().clone();
        change(&mut layers);
        let error = Network::new(good.graph().clone(), layers).unwrap_err();
        assert!(
            matches!(error, Error::Weights { .. }) && error.to_string().contains(expect),
            "{error}"
        );
    };
    refuse(&|l| drop(l.remove("a")), "`a`: layer: found none");
    refuse(&|l| drop(l.insert("x".into(), l["a"].clone())), "`x`: layer");
    refuse(
        &|l| l.get_mut("a").unwrap().bias.push(0.0),
        "`a`: bias: found 5, expected 4",
    );
    refuse(
        &|l| l.get_mut("a").unwrap().bias[0] = f32::NAN,
        "found NaN, expected finite",
    );
    refuse(
        &|l| l.get_mut("a").unwrap().matrix = Matrix::F32(vec![0.0; 144]),
        "form: found f32",
    );
    let code = |l: &mut BTreeMap<String, Layer>, to: i8| {
        let Matrix::Int { codes, .. } = &mut l.get_mut("a").unwrap().matrix else {
            panic!()
        };
        codes[0] = to;
    };
    refuse(&|l| code(l, 5), "code: found 5, expected -2..=1");
    refuse(
        &|l| {
            let Matrix::Int { scales, .. } = &mut l.get_mut("a").unwrap().matrix else {
                panic!()
            };
            scales[1] = 0.0;
        },
        "scale: found 0",
    );
}
