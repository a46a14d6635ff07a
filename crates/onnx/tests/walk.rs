//! Law: the predictor's walk lists the very operators of ONNX Runtime's optimized graph, on random networks of every kind. A
//! runtime whose rules changed fails here, not in a prediction.

use std::collections::BTreeMap;

use cotk_latency::graph::{Graph, Numerics};
use cotk_latency::walk::operators;
use cotk_latency::work::{Block, EdgeKind, ElementwiseKind, Family, Key, PoolKind};
use cotk_onnx::session::optimized_operators;
use cotk_onnx::write::to_onnx;
use cotk_onnx::zoo::{Kind, random_network, random_weights};
use cotk_run::seeds::Seeds;

/// The node that a key stands for; `None` for what is part of another node or of the call.
fn node(key: &Key, block: Block) -> Option<&'static str> {
    let name = match key {
        Key::Session { .. } => return None,
        Key::Conv(c) if c.numerics == Numerics::Int8 => "QLinearConv",
        // With an activation the plain one is called FusedConv; blocked ones are Conv of another domain.
        Key::Conv(_) => match key.path(block).family {
            Family::ConvPatches | Family::ConvPatchesPointwise | Family::DepthwisePlain | Family::ConvGrouped => {
                "plain Conv"
            }
            _ => "blocked Conv",
        },
        Key::Linear(l) if l.numerics == Numerics::Int8 => "QGemm",
        Key::Linear(_) => "Gemm",
        Key::Add(p) if p.numerics == Numerics::Int8 => "QLinearAdd",
        Key::Add(_) => return None,
        Key::GlobalAvgPool(p) if p.numerics == Numerics::Int8 => "QLinearGlobalAveragePool",
        Key::GlobalAvgPool(_) => "GlobalAveragePool",
        Key::Edge(e) => match e.kind {
            EdgeKind::ReorderIn => "ReorderInput",
            EdgeKind::ReorderOut => "ReorderOutput",
            EdgeKind::Quantize => "QuantizeLinear",
            EdgeKind::Dequantize => "DequantizeLinear",
            EdgeKind::TransposeInt8 | EdgeKind::TransposeF32 => "Transpose",
            EdgeKind::View => "Flatten",
        },
        Key::Pool(p) if p.kind == PoolKind::Max => "MaxPool",
        Key::Pool(_) => "AveragePool",
        Key::Elementwise(e) if e.kind == ElementwiseKind::Binary => "Add",
        Key::Elementwise(_) => "Relu",
        other => panic!("{other} is no operator of a graph"),
    };
    Some(name)
}

fn assumed(graph: &Graph, block: Block) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for name in operators(graph, 1, block).iter().filter_map(|key| node(key, block)) {
        *counts.entry(name.to_owned()).or_default() += 1;
    }
    counts
}

fn found(graph: Graph) -> BTreeMap<String, usize> {
    let network = random_weights(graph, 1).expect("weights of any graph");
    let mut counts = BTreeMap::new();
    for (domain, op, _) in optimized_operators("walk", &to_onnx(&network)).expect("a model that loads") {
        let name = match op.as_str() {
            "Conv" if domain.ends_with("nchwc") => "blocked Conv",
            "Conv" | "FusedConv" => "plain Conv",
            other => other,
        };
        *counts.entry(name.to_owned()).or_default() += 1;
    }
    counts
}

#[test]
fn the_walk_lists_what_the_runtime_runs() {
    let block = cotk_latency::identity::Identity::here(BTreeMap::new()).block();
    let mut rng = Seeds::new(12).stream("walk");
    let mut kernels = BTreeMap::<String, usize>::new();
    for kind in [Kind::Dense, Kind::Depthwise, Kind::LowRank, Kind::Int8] {
        for _ in 0..8 {
            let graph = random_network(&mut rng, kind);
            let (assumed, found) = (assumed(&graph, block), found(graph.clone()));
            assert_eq!(assumed, found, "{kind:?}: {:?}", graph.nodes());
            found
                .into_iter()
                .for_each(|(op, count)| *kernels.entry(op).or_default() += count);
        }
    }
    // The networks must show the rules: both layouts, both directions, sums that fuse and sums that do not.
    for op in [
        "blocked Conv",
        "plain Conv",
        "ReorderInput",
        "ReorderOutput",
        "QLinearConv",
        "QLinearAdd",
        "Transpose",
    ] {
        assert!(kernels.contains_key(op), "{op}: {kernels:?}");
    }
}
