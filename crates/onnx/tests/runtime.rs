//! Laws of export and runtime: what ONNX Runtime computes equals the plain reference, and int8 layers run as int8.

use std::collections::BTreeMap;
use std::time::Duration;

use cotk_latency::graph::*;
use cotk_onnx::reference;
use cotk_onnx::session::{self, Session};
use cotk_onnx::weights::{Layer, Matrix, Network, quantize};
use cotk_onnx::write::to_onnx;
use cotk_run::seeds::Seeds;
use rand::{Rng, RngExt};

const RELU_QUANT: ActQuant = ActQuant {
    scale: 0.02,
    zero_point: 0,
};
const SIGNED_QUANT: ActQuant = ActQuant {
    scale: 0.04,
    zero_point: 128,
};

fn conv(cin: u32, cout: u32, kernel: u32, stride: u32, groups: u32, activation: Activation, weights: Weights) -> Op {
    Op::Conv(Conv {
        cin,
        cout,
        kernel,
        stride,
        groups,
        activation,
        weights,
    })
}

/// Stem 5x5, residual block of two 3x3, a depthwise 3x3 at stride 2 with a 1x1, pool, head: every operator that we export.
fn graph(bits: [Option<WeightBits>; 6], channels: u32, batch: u32) -> Graph {
    let weights = |i: usize| bits[i].map_or(Weights::F32, Weights::Int);
    let quantized = bits.iter().all(Option::is_some);
    let relu = quantized.then_some(RELU_QUANT);
    let signed = quantized.then_some(SIGNED_QUANT);
    let (r, none) = (Activation::Relu, Activation::None);
    let node = |name: &str, op, inputs: &[Source], output| Node {
        name: name.into(),
        op,
        inputs: inputs.to_vec(),
        output,
    };
    let n = Source::Node;
    let c = channels;
    let nodes = vec![
        node("stem", conv(3, c, 5, 1, 1, r, weights(0)), &[Source::Input], relu),
        node("a", conv(c, c, 3, 1, 1, r, weights(1)), &[n(0)], relu),
        node("b", conv(c, c, 3, 1, 1, none, weights(2)), &[n(1)], signed),
        node("sum", Op::Add(r), &[n(0), n(2)], relu),
        node("dw", conv(c, c, 3, 2, c, r, weights(3)), &[n(3)], relu),
        node("pw", conv(c, 2 * c, 1, 1, 1, r, weights(4)), &[n(4)], relu),
        node("pool", Op::GlobalAvgPool, &[n(5)], relu),
        node(
            "head",
            Op::Linear(Linear {
                inputs: 2 * c,
                outputs: 10,
                activation: none,
                weights: weights(5),
            }),
            &[n(6)],
            signed,
        ),
    ];
    let input = Shape {
        batch,
        channels: 3,
        height: 12,
        width: 12,
    };
    Graph::new(RawGraph {
        name: "test".into(),
        input,
        input_quant: signed,
        nodes,
    })
    .expect("shapes fit")
}

fn uniform(count: usize, width: f32, rng: &mut impl Rng) -> Vec<f32> {
    (0..count).map(|_| (rng.random::<f32>() * 2.0 - 1.0) * width).collect()
}

fn network(graph: Graph, seed: u64) -> Network {
    let mut rng = Seeds::new(seed).stream("weights");
    let mut layers = BTreeMap::new();
    for node in graph.nodes() {
        let (count, channels, weights) = match node.op {
            Op::Conv(c) => (
                (c.cout * c.cin / c.groups * c.kernel * c.kernel) as usize,
                c.cout as usize,
                c.weights,
            ),
            Op::Linear(l) => ((l.inputs * l.outputs) as usize, l.outputs as usize, l.weights),
            _ => continue,
        };
        let values = uniform(count, 2.0 / (count as f32 / channels as f32).sqrt(), &mut rng);
        let bias = uniform(channels, 0.3, &mut rng);
        let matrix = match weights {
            Weights::F32 => Matrix::F32(values),
            Weights::Int(bits) => quantize(&values, channels, bits),
        };
        layers.insert(node.name.clone(), Layer { matrix, bias });
    }
    Network::new(graph, layers).expect("weights fit")
}

fn input(network: &Network, seed: u64) -> Vec<f32> {
    uniform(
        network.graph().input().elements() as usize,
        2.0,
        &mut Seeds::new(seed).stream("input"),
    )
}

#[test]
fn f32_outputs_equal_the_reference() {
    for (channels, batch) in [(16, 1), (18, 1), (8, 3)] {
        let network = network(graph([None; 6], channels, batch), 1);
        let input = input(&network, 2);
        let mut session = Session::from_bytes("f32", &to_onnx(&network), 1).unwrap();
        let found = session.run(&input).unwrap();
        let expected = reference::run(&network, &input).pop().unwrap();
        let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert_eq!(found.len(), expected.len());
        for (x, y) in found.iter().zip(&expected) {
            // Sums of at most 450 products in f32.
            assert!((x - y).abs() <= 450.0 * f32::EPSILON * scale.max(1.0), "{x} {y}");
        }
        assert!(scale > 0.1, "a network of zeros would prove nothing");
    }
}

/// Law: every layer alone, on what the runtime's layers before it gave, is within one code of the reference.
#[test]
fn int8_layers_are_within_one_code_of_the_reference() {
    use WeightBits::{B2, B4, B8};
    let network = network(graph([B8, B4, B2, B8, B4, B8].map(Some), 16, 2), 3);
    let input = input(&network, 4);
    let graph = network.graph();
    let mut outputs: Vec<Vec<f32>> = Vec::new();
    for index in 0..graph.nodes().len() {
        let raw = RawGraph::from(graph.clone());
        let prefix = RawGraph {
            nodes: raw.nodes[..=index].to_vec(),
            ..raw
        };
        let layers = network
            .layers()
            .iter()
            .filter(|(name, _)| prefix.nodes.iter().any(|n| n.name == **name));
        let layers = layers.map(|(n, l)| (n.clone(), l.clone())).collect();
        let prefix = Network::new(Graph::new(prefix).unwrap(), layers).unwrap();
        let found = Session::from_bytes("prefix", &to_onnx(&prefix), 1)
            .unwrap()
            .run(&input)
            .unwrap();
        let quant = graph.nodes()[index].output.unwrap();
        let of = |s: &Source| match *s {
            Source::Input => input.clone(),
            Source::Node(i) => outputs[i].clone(),
        };
        let inputs: Vec<Vec<f32>> = graph.nodes()[index].inputs.iter().map(of).collect();
        let inputs: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
        let expected = reference::run_node(&network, index, &inputs);
        let mut equal = 0;
        for (x, y) in found.iter().zip(&expected) {
            let (x, y) = (reference::code(*x, quant), reference::code(*y, quant));
            assert!(x.abs_diff(y) <= 1, "{}: {x} {y}", graph.nodes()[index].name);
            equal += usize::from(x == y);
        }
        assert!(
            equal * 100 >= found.len() * 98,
            "{}: {equal} of {} equal",
            graph.nodes()[index].name,
            found.len()
        );
        let distinct: std::collections::BTreeSet<u8> = found.iter().map(|&v| reference::code(v, quant)).collect();
        assert!(distinct.len() > 5, "{}: {distinct:?}", graph.nodes()[index].name);
        outputs.push(found);
    }
}

#[test]
fn every_int8_convolution_runs_as_one() {
    let network = network(graph([Some(WeightBits::B8); 6], 16, 1), 5);
    let bytes = to_onnx(&network);
    let operators = session::optimized_operators("int8", &bytes).unwrap();
    let count = |op: &str| operators.iter().filter(|(_, o, _)| o == op).count();
    assert_eq!(count("QLinearConv"), 5, "{operators:?}");
    assert_eq!(count("QLinearAdd"), 1, "{operators:?}");
    assert_eq!(count("QLinearGlobalAveragePool"), 1, "{operators:?}");
    assert_eq!(count("QGemm"), 1, "{operators:?}");
    assert_eq!(
        count("Conv") + count("FusedConv") + count("Relu") + count("Gemm"),
        0,
        "{operators:?}"
    );
    let input = input(&network, 6);
    let nodes = session::profile_nodes("int8", &bytes, 1, &input).unwrap();
    assert_eq!(nodes.iter().filter(|n| n.op == "QLinearConv").count(), 5, "{nodes:?}");
    assert!(nodes.iter().all(|n| n.us >= 0.0));
}

#[test]
fn a_timing_has_its_counts_and_spread() {
    let network = network(graph([None; 6], 16, 1), 7);
    let input = input(&network, 8);
    let mut session = Session::from_bytes("f32", &to_onnx(&network), 1).unwrap();
    let timing = session.time(&input, 3, Duration::from_micros(300)).unwrap();
    assert!(timing.runs == 5 && timing.calls >= 1);
    assert!(timing.q10_ms > 0.0 && timing.q10_ms <= timing.ms && timing.spread_ms >= 0.0);
}

#[test]
fn whole_samples_in_any_number() {
    let network = network(graph([None; 6], 8, 4), 9);
    let one = network.with_batch(1).unwrap();
    let samples = uniform(7 * 3 * 12 * 12, 1.0, &mut Seeds::new(1).stream("input"));
    let many = Session::from_bytes("b4", &to_onnx(&network), 1)
        .unwrap()
        .run_all(&samples)
        .unwrap();
    let single = Session::from_bytes("b1", &to_onnx(&one), 1)
        .unwrap()
        .run_all(&samples)
        .unwrap();
    assert_eq!(many.len(), 70);
    assert!(many.iter().zip(&single).all(|(a, b)| (a - b).abs() < 1e-4));
    let error = Session::from_bytes("b1", &to_onnx(&one), 1)
        .unwrap()
        .run(&samples)
        .unwrap_err();
    assert!(error.to_string().contains("found 3024 values, expected 432"), "{error}");
}

#[test]
fn bytes_that_are_no_model_are_refused_in_the_runtimes_words() {
    let error = Session::from_bytes("noise", b"not a model", 1).unwrap_err().to_string();
    assert!(error.contains("cannot load `noise`"), "{error}");
}
