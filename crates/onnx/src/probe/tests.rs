//! Laws of the CNN probes: what is asked for is built and runs, and a slope holds what the walk says.

use super::*;
use cotk_latency::work::PoolKind;

use crate::weights::{Layer, Matrix, Network, quantize};

fn conv(cin: u32, cout: u32, stride: u32, numerics: Numerics) -> ConvKey {
    ConvKey {
        batch: 1,
        cin,
        cout,
        kernel: 3,
        stride,
        groups: 1,
        height: 8,
        width: 8,
        numerics,
        threads: 1,
        context: Context::Chain,
    }
}

fn plane(numerics: Numerics) -> PlaneKey {
    PlaneKey {
        batch: 1,
        channels: 16,
        height: 8,
        width: 8,
        numerics,
        threads: 1,
    }
}

/// Law: every kind of key builds models that run, and its weights say "what one more copy adds".
#[test]
fn every_kind_of_key_prepares_and_runs() {
    let block = Block(16);
    let mut keys = vec![Key::Session { threads: 1 }];
    for numerics in [Numerics::F32, Numerics::Int8] {
        let alone = ConvKey {
            context: Context::Alone,
            ..conv(3, 16, 1, numerics)
        };
        let convs = [
            conv(16, 16, 1, numerics),
            conv(16, 32, 2, numerics),
            conv(1, 8, 1, numerics),
            alone,
        ];
        keys.extend(convs.map(Key::Conv));
        let p = plane(numerics);
        keys.extend([Key::Add(p), Key::GlobalAvgPool(p), Key::Entry(p)]);
        keys.push(Key::Linear(cotk_latency::work::LinearKey {
            batch: 1,
            inputs: 32,
            outputs: 10,
            numerics,
            threads: 1,
        }));
        keys.extend([16, 8].map(|cout| {
            Key::LowRank(LowRankKey {
                conv: conv(16, cout, 1, numerics),
                rank_in: 4,
                rank_out: 8,
            })
        }));
    }
    let p = plane(Numerics::F32);
    keys.push(Key::Edge(EdgeKey {
        kind: EdgeKind::ReorderOut,
        batch: 1,
        channels: 16,
        height: 8,
        width: 8,
        threads: 1,
    }));
    for (kind, channels) in [(PoolKind::Max, 16), (PoolKind::Mean, 6)] {
        keys.push(Key::Pool(cotk_latency::work::PoolKey {
            kind,
            batch: p.batch,
            channels,
            kernel: 3,
            stride: 1,
            height: 8,
            width: 8,
            numerics: Numerics::F32,
            threads: 1,
        }));
    }
    for kind in [
        ElementwiseKind::Unary,
        ElementwiseKind::Transcendental,
        ElementwiseKind::Binary,
    ] {
        keys.push(Key::Elementwise(cotk_latency::work::ElementwiseKey {
            kind,
            batch: 1,
            channels: 16,
            height: 8,
            width: 8,
            numerics: Numerics::F32,
            threads: 1,
        }));
    }
    let probe = OnnxProbe::new(keys.clone(), block).unwrap();
    assert_eq!(probe.seeds(), keys.len());
    for key in keys {
        let mut prepared = probe.prepare(&key, 0).unwrap();
        let weights = prepared.weights();
        for piece in 0..weights.len() {
            prepared.run(piece).unwrap();
        }
        // Slopes take off what they put on; a session and what is timed alone stand for themselves; an entry keeps
        // one call less one session.
        let sum: f64 = weights.iter().sum();
        let alone = matches!(
            key,
            Key::Session { .. }
                | Key::Conv(ConvKey {
                    context: Context::Alone,
                    ..
                })
        );
        assert!((sum - f64::from(u8::from(alone))).abs() < 1e-12, "{key}: {weights:?}");
    }
}

/// Law: a time holds its own key once, and what else it holds the walk knows.
#[test]
fn parts_of_a_slope_are_its_key_and_what_comes_along() {
    let probe = OnnxProbe::new(Vec::new(), Block(16)).unwrap();
    let parts = |key: Key| probe.parts(&key).unwrap();
    let blocked = Key::Conv(conv(16, 16, 1, Numerics::F32));
    assert_eq!(parts(blocked), [(blocked, 1.0)]);
    let narrow = Key::Conv(conv(16, 32, 2, Numerics::F32));
    let own = parts(narrow);
    let once = own.iter().find(|p| p.0 == narrow).expect("itself").1;
    assert!((once - 1.0).abs() < 1e-9, "{own:?}");
    let triple = Key::LowRank(LowRankKey {
        conv: conv(16, 16, 1, Numerics::F32),
        rank_in: 4,
        rank_out: 8,
    });
    assert!(parts(triple).iter().any(|p| matches!(p.0, Key::Conv(c) if c.cout == 4)));
}

/// Law: an edge of a region of codes is measured as itself; what else ONNX Runtime adds for it is among its parts.
#[test]
fn edges_of_codes_are_operators_of_their_own() {
    let probe = OnnxProbe::new(Vec::new(), Block(16)).unwrap();
    let edge = |kind| {
        Key::Edge(EdgeKey {
            kind,
            batch: 1,
            channels: 32,
            height: 8,
            width: 8,
            threads: 1,
        })
    };
    for (kind, op) in [
        (EdgeKind::Dequantize, "DequantizeLinear"),
        (EdgeKind::TransposeInt8, "Transpose"),
    ] {
        let key = edge(kind);
        assert!(probe.measures(&key) && probe.is_slope(&key));
        let parts = probe.parts(&key).unwrap();
        assert_eq!(parts.len(), 1, "{parts:?}");
        assert!(parts[0].0 == key && (parts[0].1 - 1.0).abs() < 1e-9, "{parts:?}");
        // Long models less short ones, by what ONNX Runtime runs.
        let mut counts = BTreeMap::<String, f64>::new();
        for (weight, model) in probe.models(&key).unwrap() {
            for (_, op, _) in crate::session::optimized_operators("probe", &model.bytes(0).unwrap()).unwrap() {
                *counts.entry(op).or_default() += weight;
            }
        }
        counts.retain(|_, count| count.abs() > 1e-9);
        assert_eq!(counts.len(), 1, "{counts:?}");
        assert!((counts[op] - 1.0).abs() < 1e-9, "{counts:?}");
        let mut prepared = probe.prepare(&key, 0).unwrap();
        for piece in 0..prepared.weights().len() {
            prepared.run(piece).unwrap();
        }
    }
}

#[test]
fn draws_come_after_the_seeds_and_repeat_by_seed() {
    let seeds: Vec<Key> = [conv(16, 16, 1, Numerics::Int8), conv(1, 16, 1, Numerics::Int8)]
        .map(Key::Conv)
        .into();
    let probe = OnnxProbe::new(seeds.clone(), Block(16))
        .unwrap()
        .with_threads(vec![1, 2]);
    let draw = |seed: u64| probe.candidates(200, &mut Seeds::new(seed).stream("draw"));
    let keys = draw(1);
    assert_eq!((keys.len(), &keys[..2]), (200, &seeds[..]));
    assert_eq!(keys, draw(1));
    assert_ne!(keys, draw(2));
    let unique: std::collections::HashSet<&Key> = keys.iter().collect();
    assert_eq!(unique.len(), keys.len());
    // Every kernel path that a network can meet.
    let paths: std::collections::HashSet<_> = keys.iter().map(|k| k.path(Block(16)).family).collect();
    assert!(paths.len() >= 12, "{paths:?}");
    for key in &keys {
        assert!(probe.measures(key), "{key}");
    }
}

/// The node lists that the predictor's walk assumes: copies of a convolution add one kernel each and nothing else.
#[test]
fn one_more_copy_adds_one_kernel() {
    let operators = |line: &Line, copies: usize| {
        let Model::Chain(model) = (line.0)(copies) else {
            panic!("a chain")
        };
        let numerics = model.numerics;
        let graph = Graph::new(RawGraph {
            name: "probe".into(),
            input: model.input,
            input_quant: (numerics == Numerics::Int8).then_some(SIGNED),
            nodes: model.nodes,
        })
        .unwrap();
        let mut layers = BTreeMap::new();
        let mut rng = Seeds::new(3).stream("w");
        for node in graph.nodes() {
            if let Op::Conv(c) = node.op {
                let count = (c.cout * c.cin * c.kernel * c.kernel) as usize;
                let values = uniform(count, 0.2, &mut rng);
                let matrix = match numerics {
                    Numerics::F32 => Matrix::F32(values),
                    Numerics::Int8 => quantize(&values, c.cout as usize, WeightBits::B8),
                };
                layers.insert(
                    node.name.clone(),
                    Layer {
                        matrix,
                        bias: uniform(c.cout as usize, 0.1, &mut rng),
                    },
                );
            }
        }
        let bytes = to_onnx_with_outputs(&Network::new(graph, layers).unwrap(), &model.outputs);
        let mut counts = BTreeMap::<String, usize>::new();
        for (_, op, _) in crate::session::optimized_operators("probe", &bytes).unwrap() {
            *counts.entry(op).or_default() += 1;
        }
        counts
    };
    let added = |line: &Line| {
        let (one, two) = (operators(line, 1), operators(line, 2));
        two.into_iter()
            .filter_map(|(op, count)| {
                let more = count - one.get(&op).copied().unwrap_or(0);
                (more > 0).then_some((op, more))
            })
            .collect::<Vec<_>>()
    };
    let list = |ops: &[&str]| ops.iter().map(|op| ((*op).to_owned(), 1)).collect::<Vec<_>>();
    assert_eq!(added(&chain(conv(16, 16, 1, Numerics::F32))), list(&["Conv"]));
    assert_eq!(added(&chain(conv(16, 16, 1, Numerics::Int8))), list(&["QLinearConv"]));
    // Beside each other: with its pool, which is measured apart with the same edges.
    let f32_pool = list(&["Conv", "GlobalAveragePool", "ReorderOutput"]);
    let int8_pool = list(&[
        "DequantizeLinear",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "Transpose",
    ]);
    for c in [(16, 32, 2), (1, 16, 1)] {
        assert_eq!(
            added(&fan(vec![conv(c.0, c.1, c.2, Numerics::F32)], Block(16))),
            f32_pool
        );
        assert_eq!(
            added(&fan(vec![conv(c.0, c.1, c.2, Numerics::Int8)], Block(16))),
            int8_pool
        );
    }
}

/// Law: no kernel path that a network can meet is left with a handful of keys.
#[test]
fn a_spread_has_enough_of_every_path() {
    let probe = OnnxProbe::new(Vec::new(), Block(16)).unwrap();
    let keys = probe.spread(4, &mut Seeds::new(1).stream("spread"));
    let count = |family: Family| keys.iter().filter(|k| k.path(Block(16)).family == family).count();
    for family in [
        Family::ConvBlocked,
        Family::ConvFromNchw,
        Family::ConvPatches,
        Family::ConvPointwise,
        Family::DepthwiseBlocked,
        Family::DepthwisePlain,
        Family::ConvInt8,
        Family::ConvInt8Pointwise,
        Family::DepthwiseInt8,
        Family::Linear(Numerics::F32),
        Family::Linear(Numerics::Int8),
        Family::Add(Numerics::F32),
        Family::Pool(Numerics::F32),
        Family::LowRank(Numerics::F32),
        Family::Edge(EdgeKind::Quantize),
        Family::Edge(EdgeKind::Dequantize),
        Family::Edge(EdgeKind::TransposeInt8),
        Family::Edge(EdgeKind::ReorderOut),
    ] {
        assert!(count(family) >= 4, "{family:?}: {}", count(family));
    }
    assert!(keys.iter().all(|key| probe.measures(key) && threads(key) == 1));
    assert_eq!(keys, probe.spread(4, &mut Seeds::new(1).stream("spread")));
}
