//! Each verdict on a hand-made machine: a case that fires it and a near miss that does not.

use super::*;
use crate::graph::{Activation, Shape};
use crate::walk::{Node, Tensor};
use crate::work::Key;

/// A machine by its prices: µs per launch, per KiB moved, per KiB that changes layout, per million multiply-adds.
#[derive(Clone, Copy)]
struct Toy {
    launch: f64,
    bytes: f64,
    layout: f64,
    macs: f64,
    int8_macs: f64,
}

const PLAIN: Toy = Toy {
    launch: 1.0,
    bytes: 0.01,
    layout: 0.02,
    macs: 20.0,
    int8_macs: 5.0,
};

impl Toy {
    /// By its own rules, not those of the fits: blocks of 16 in f32, fours in int8.
    fn price(&self, key: Key) -> Terms {
        let kib = |elements: u32, bytes: u32| f64::from(elements) * f64::from(bytes) / 1024.0;
        let mut terms = Terms {
            launch_ms: self.launch / 1e3,
            ..Terms::default()
        };
        let width = |numerics| if numerics == Numerics::Int8 { 1 } else { 4 };
        match key {
            Key::Session { .. } => {}
            Key::Conv(c) => {
                let block = if c.numerics == Numerics::Int8 { 4 } else { 16 };
                let cin = if c.cin < 16 || c.cin % 4 != 0 {
                    c.cin
                } else {
                    c.cin.next_multiple_of(block)
                };
                let taps = c.kernel * c.kernel * cin * c.cout.next_multiple_of(block);
                let price = if c.numerics == Numerics::Int8 {
                    self.int8_macs
                } else {
                    self.macs
                };
                terms.compute_ms = price * f64::from(taps) * f64::from(c.height * c.width) / 1e9;
                let values = (c.cin + c.cout) * c.height * c.width + c.kernel * c.kernel * c.cin * c.cout;
                terms.memory_ms = self.bytes * kib(values, width(c.numerics)) / 1e3;
            }
            Key::Linear(l) => {
                terms.compute_ms = self.macs * f64::from(l.batch * l.inputs) * f64::from(l.outputs) / 1e9;
                terms.memory_ms = self.bytes * kib(l.inputs * l.outputs, width(l.numerics)) / 1e3;
            }
            Key::Edge(e) => terms.layout_ms = self.layout * kib(e.channels * e.height * e.width, 8) / 1e3,
            Key::Add(p) | Key::GlobalAvgPool(p) => {
                terms.memory_ms = self.bytes * kib(p.channels * p.height * p.width, 8) / 1e3;
            }
            Key::Elementwise(p) => terms.memory_ms = self.bytes * kib(p.channels * p.height * p.width, 8) / 1e3,
            other => unreachable!("{other}"),
        }
        terms
    }
}

impl CostModel for Toy {
    fn predict(&self, work: &Work<'_>) -> Result<Prediction> {
        let keys: Vec<Key> = match work {
            Work::Operator(key) => vec![*key],
            Work::Network { network, threads } => walk(network, *threads, Block(16)).keys().collect(),
            _ => unreachable!("only these are asked"),
        };
        let mut terms = Terms::default();
        for one in keys.into_iter().map(|key| self.price(key)) {
            terms.launch_ms += one.launch_ms;
            terms.layout_ms += one.layout_ms;
            terms.memory_ms += one.memory_ms;
            terms.compute_ms += one.compute_ms;
        }
        let ms = terms.sum_ms();
        Ok(Prediction {
            ms,
            lo_ms: 0.95 * ms,
            hi_ms: 1.05 * ms,
            terms,
            origin: Origin::Fit,
            flags: Vec::new(),
        })
    }
}

fn tensor(channels: u32, size: u32) -> Tensor {
    Tensor {
        shape: Shape {
            batch: 1,
            channels,
            height: size,
            width: size,
        },
        is_quantized: false,
    }
}

fn conv(name: &str, from: Source, kernel: u32, cin: u32, output: Tensor) -> Node {
    let taps = u64::from(kernel * kernel) * u64::from(cin) * u64::from(output.shape.channels);
    Node {
        name: name.into(),
        kind: Kind::Conv {
            kernel: [kernel; 2],
            stride: 1,
            groups: 1,
            activation: Activation::None,
        },
        inputs: vec![from],
        output,
        numerics: Numerics::F32,
        macs: taps * output.shape.elements_per_sample() / u64::from(output.shape.channels),
        weight_bytes: 4 * taps,
    }
}

fn other(name: &str, kind: Kind, from: Source, output: Tensor) -> Node {
    Node {
        name: name.into(),
        kind,
        inputs: vec![from],
        output,
        numerics: Numerics::F32,
        macs: 0,
        weight_bytes: 0,
    }
}

fn network(input: Tensor, nodes: Vec<Node>) -> Network {
    Network {
        name: "hand-made".into(),
        input,
        outputs: vec![Source::Node(nodes.len() - 1)],
        nodes,
    }
}

/// Two 3x3 layers of `width` on `size`², between a stem and its output.
fn plain(width: u32, size: u32) -> Network {
    network(
        tensor(3, size),
        vec![
            conv("stem", Source::Input, 3, 3, tensor(width, size)),
            conv("a", Source::Node(0), 3, width, tensor(width, size)),
            conv("b", Source::Node(1), 3, width, tensor(width, size)),
        ],
    )
}

fn report(toy: Toy, network: &Network) -> Report {
    explain(
        &toy,
        &Request {
            network,
            threads: 1,
            block: Block(16),
            noise_floor: 0.02,
        },
    )
    .unwrap()
}

fn named<'a>(report: &'a Report, name: &str) -> &'a Layer {
    report.layers.iter().find(|l| l.name == name).unwrap()
}

fn has(layer: &Layer, finding: &str) -> bool {
    layer.findings.iter().any(|f| f.name() == finding)
}

fn coded(network: &mut Network) {
    network.input.is_quantized = true;
    for node in &mut network.nodes {
        node.numerics = Numerics::Int8;
        node.output.is_quantized = true;
        node.weight_bytes = node.weight_bytes / 4 + 8 * u64::from(node.output.shape.channels);
    }
}

#[test]
fn layers_and_call_add_up_to_the_network() {
    for network in [plain(32, 16), plain(20, 8), plain(18, 8)] {
        let r = report(PLAIN, &network);
        let sum: f64 = r.layers.iter().map(|l| l.ms).sum::<f64>() + r.rest_ms;
        assert!((sum / r.total.ms - 1.0).abs() < 1e-9);
        // What is left is the call of the session.
        assert!((r.rest_ms - PLAIN.launch / 1e3).abs() < 1e-9, "{}", r.rest_ms);
        for layer in &r.layers {
            assert!((layer.terms.sum_ms() / layer.ms - 1.0).abs() < 1e-9);
            assert!(layer.choices.len() <= 3 && layer.choices.is_sorted_by(|a, b| a.gain_ms >= b.gain_ms));
        }
    }
}

#[test]
fn bounds_follow_the_rules_at_their_edges() {
    let of = |launch_ms, layout_ms, memory_ms, compute_ms| {
        bound(&Terms {
            launch_ms,
            layout_ms,
            memory_ms,
            compute_ms,
            link_ms: 0.0,
        })
    };
    assert_eq!(of(50.0, 0.0, 0.0, 50.0), Bound::Launch);
    assert_eq!(of(49.0, 0.0, 0.0, 51.0), Bound::Compute);
    assert_eq!(of(30.0, 20.0, 0.0, 50.0), Bound::Launch);
    assert_eq!(of(0.0, 25.0, 0.0, 75.0), Bound::Layout);
    assert_eq!(of(0.0, 24.0, 0.0, 76.0), Bound::Compute);
    assert_eq!(of(20.0, 0.0, 40.0, 40.0), Bound::Memory);
    assert_eq!(of(20.0, 0.0, 39.0, 41.0), Bound::Compute);
}

#[test]
fn launch_bytes_and_arithmetic_bind_as_the_machine_prices_them() {
    let net = plain(32, 8);
    let dear = |launch, bytes, macs| {
        named(
            &report(
                Toy {
                    launch,
                    bytes,
                    macs,
                    ..PLAIN
                },
                &net,
            ),
            "a",
        )
        .bound
    };
    assert_eq!(dear(50.0, 0.0, 10.0), Bound::Launch);
    assert_eq!(dear(0.1, 2.0, 1.0), Bound::Memory);
    assert_eq!(dear(0.1, 0.01, 20.0), Bound::Compute);
    let text = named(&report(Toy { launch: 50.0, ..PLAIN }, &net), "a").note();
    assert!(
        text.starts_with("Launch-bound") && text.contains("bits and rank do not"),
        "{text}"
    );
}

/// 20 channels cost what 32 cost; 28 of 32 are near enough.
#[test]
fn padding_is_named_with_the_next_cheaper_width() {
    let wide = plain(20, 16);
    let r = report(PLAIN, &wide);
    let a = named(&r, "a");
    assert!(
        a.findings.iter().any(|f| matches!(
            f,
            Finding::Padding {
                nominal: 20,
                padded: 32,
                ..
            }
        )),
        "{:?}",
        a.findings
    );
    assert!(
        a.choices.iter().any(|c| c.what == "16 output channels"),
        "{:?}",
        a.choices
    );
    assert!(
        a.headline(200).starts_with("20 channels cost what 32 cost: "),
        "{}",
        a.headline(200)
    );
    assert!(!has(named(&report(PLAIN, &plain(32, 16)), "a"), "padding-waste"));
    let near = network(
        tensor(32, 16),
        vec![
            conv("a", Source::Input, 3, 32, tensor(32, 16)),
            conv("b", Source::Node(0), 3, 32, tensor(28, 16)),
        ],
    );
    assert!(!has(named(&report(PLAIN, &near), "b"), "padding-waste"));
}

/// 18 channels leave the blocked kernels, and the neighbour pays for reorders: it says because of whom.
#[test]
fn the_neighbour_that_breaks_the_layout_is_named() {
    let layout = Toy { layout: 20.0, ..PLAIN };
    let broken = network(
        tensor(16, 16),
        vec![
            conv("wide", Source::Input, 3, 16, tensor(18, 16)),
            conv("odd", Source::Node(0), 3, 18, tensor(32, 16)),
            conv("next", Source::Node(1), 3, 32, tensor(32, 16)),
            conv("end", Source::Node(2), 3, 32, tensor(32, 16)),
        ],
    );
    let r = report(layout, &broken);
    let next = named(&r, "next");
    assert_eq!(next.bound, Bound::Layout);
    assert_eq!(next.edges[0].culprit, "odd");
    assert!(
        next.note().contains("18 input channels are no multiple of 4"),
        "{}",
        next.note()
    );
    assert!(
        next.headline(200).contains("layout-bound by odd"),
        "{}",
        next.headline(200)
    );
    let odd = named(&r, "odd");
    assert!(has(odd, "slow-kernel"));
    assert!(
        odd.choices.iter().any(|c| c.what == "20 input channels"),
        "{:?}",
        odd.choices
    );
    // With 20 channels nothing is reordered on the way.
    let mut whole = broken;
    whole.nodes[0].output.shape.channels = 20;
    let r = report(layout, &whole);
    assert!(named(&r, "odd").edges.is_empty() && !has(named(&r, "odd"), "slow-kernel"));
}

#[test]
fn an_f32_island_among_int8_layers_is_named() {
    let mut net = network(
        tensor(16, 16),
        vec![
            conv("a", Source::Input, 3, 16, tensor(16, 16)),
            other(
                "swish",
                Kind::Elementwise(crate::work::ElementwiseKind::Transcendental),
                Source::Node(0),
                tensor(16, 16),
            ),
            conv("b", Source::Node(1), 3, 16, tensor(16, 16)),
        ],
    );
    coded(&mut net);
    net.nodes[1].numerics = Numerics::F32;
    let r = report(Toy { layout: 5.0, ..PLAIN }, &net);
    let culprits: Vec<&str> = r
        .layers
        .iter()
        .flat_map(|l| &l.edges)
        .filter(|e| matches!(e.kind, EdgeKind::Dequantize | EdgeKind::Quantize))
        .map(|e| e.culprit.as_str())
        .collect();
    assert_eq!(culprits.iter().filter(|c| **c == "swish").count(), 2, "{culprits:?}");
    // A clamp is no island: the range of the codes does it.
    net.nodes[1].kind = Kind::Activation;
    net.nodes[1].numerics = Numerics::Int8;
    let r = report(PLAIN, &net);
    assert!(r.layers.iter().flat_map(|l| &l.edges).all(|e| e.culprit != "swish"));
}

#[test]
fn codes_narrower_than_any_kernel_earn_bytes_only() {
    let mut net = plain(32, 16);
    coded(&mut net);
    let eight = report(PLAIN, &net);
    assert!(!has(named(&eight, "a"), "no-kernel-for-bits"));
    let codes = net.nodes[1].weight_bytes - 8 * 32;
    net.nodes[1].weight_bytes = codes / 2 + 8 * 32;
    let four = report(PLAIN, &net);
    let a = named(&four, "a");
    assert!(
        a.findings.contains(&Finding::NoKernel {
            bits: 4,
            fewer_bytes: 2.0
        }),
        "{:?}",
        a.findings
    );
    assert!(
        a.note().contains("2.0 times fewer bytes") && a.note().contains("run as int8"),
        "{}",
        a.note()
    );
    assert!((a.ms - named(&eight, "a").ms).abs() < 1e-12);
}

/// A triple of rank 16 in place of 64 → 64: worth it where arithmetic is dear, not where launches are.
#[test]
fn factors_that_gain_nothing_are_named_with_the_dense_layer() {
    let triple = network(
        tensor(16, 8),
        vec![
            conv("stem", Source::Input, 3, 16, tensor(64, 8)),
            conv("in", Source::Node(0), 1, 64, tensor(16, 8)),
            conv("core", Source::Node(1), 3, 16, tensor(16, 8)),
            conv("out", Source::Node(2), 1, 16, tensor(64, 8)),
        ],
    );
    let dear_launches = Toy { launch: 60.0, ..PLAIN };
    let r = report(dear_launches, &triple);
    let finding = r
        .layers
        .iter()
        .flat_map(|l| &l.findings)
        .find(|f| f.name() == "factorised-no-gain");
    match finding {
        Some(Finding::FactorisedNoGain {
            factors_ms,
            dense_ms,
            launches: 3,
            rank: 16,
        }) => assert!(factors_ms > dense_ms),
        other => panic!("{other:?}"),
    }
    assert!(
        r.layers
            .iter()
            .any(|l| l.choices.iter().any(|c| c.what == "dense, unfactorised"))
    );
    let r = report(PLAIN, &triple);
    assert!(r.layers.iter().all(|l| !has(l, "factorised-no-gain")));
    // With an activation between them they are no factors of one layer.
    let mut active = triple;
    if let Kind::Conv { activation, .. } = &mut active.nodes[2].kind {
        *activation = Activation::Relu;
    }
    let r = report(dear_launches, &active);
    let chains: Vec<u32> = r
        .layers
        .iter()
        .flat_map(|l| &l.findings)
        .filter_map(|f| match f {
            Finding::FactorisedNoGain { launches, .. } => Some(u32::try_from(*launches).unwrap()),
            _ => None,
        })
        .collect();
    assert!(!chains.contains(&3), "{chains:?}");
}

#[test]
fn int8_without_gain_is_said_with_both_times() {
    let mut net = plain(32, 16);
    coded(&mut net);
    let slow = Toy {
        int8_macs: 19.9,
        bytes: 0.0,
        ..PLAIN
    };
    let r = report(slow, &net);
    let a = named(&r, "a");
    assert!(has(a, "int8-no-gain"), "{:?}", a.findings);
    assert!(a.note().contains("f32 would take"), "{}", a.note());
    assert!(!has(named(&report(PLAIN, &net), "a"), "int8-no-gain"));
}

#[test]
fn a_gain_below_the_noise_is_not_promised() {
    // A pool has no neighbours; a convolution whose only cheaper neighbours save a fraction of a per cent has.
    let flat = Toy {
        launch: 5000.0,
        bytes: 0.0,
        layout: 0.0,
        macs: 20.0,
        int8_macs: 20.0,
    };
    let net = plain(64, 8);
    let a = report(flat, &net).layers.into_iter().find(|l| l.name == "a").unwrap();
    assert!(has(&a, "not-measurable"), "{:?} {:?}", a.findings, a.choices);
    assert!(a.choices.iter().all(|c| !c.is_measurable));
    assert!(a.headline(200).ends_with("nothing nearby helps"), "{}", a.headline(200));
    assert!(!has(named(&report(PLAIN, &net), "a"), "not-measurable"));
}

/// Choices are what the whole network would save: narrowing a layer makes its reader cheaper too.
#[test]
fn a_choice_counts_what_it_does_to_the_neighbours() {
    let point = |name: &str, from| conv(name, from, 1, 64, tensor(64, 16));
    let net = network(
        tensor(64, 16),
        vec![
            point("stem", Source::Input),
            point("a", Source::Node(0)),
            point("b", Source::Node(1)),
        ],
    );
    let r = report(PLAIN, &net);
    let a = named(&r, "a");
    let of = |what: &str| a.choices.iter().find(|c| c.what == what).unwrap();
    // A quarter of its own arithmetic and of its reader's.
    let narrower = of("48 output channels");
    assert!(narrower.gain_ms > 0.4 * a.terms.compute_ms, "{narrower:?}");
    // At rank 32 two factors have as much arithmetic as the layer: the neighbour that gains is 16.
    let rank = of("rank 16");
    assert!(rank.layer_ms < a.ms && rank.spread_ms > 0.0, "{rank:?}");
    let mut axes: Vec<Axis> = a.choices.iter().map(|c| c.axis).collect();
    axes.dedup();
    assert_eq!(axes.len(), a.choices.len(), "one along each axis: {:?}", a.choices);
    let int8 = r.int8.unwrap();
    assert!(int8.gain_ms > 0.3 * r.total.ms && int8.is_measurable, "{int8:?}");
}

#[test]
fn an_unknown_operator_is_said_in_its_own_words() {
    let kind = Kind::Unknown {
        op_type: "example.org.Mystery".into(),
    };
    let net = network(
        tensor(16, 16),
        vec![
            conv("a", Source::Input, 3, 16, tensor(16, 16)),
            other("m", kind, Source::Node(0), tensor(16, 16)),
        ],
    );
    let r = report(PLAIN, &net);
    let m = named(&r, "m");
    assert!(has(m, "unknown-operator") && m.headline(200).contains("example.org.Mystery"));
    assert!(
        m.edges.iter().any(|e| e.culprit == "m" && e.why.contains("unknown")),
        "{:?}",
        m.edges
    );
}
