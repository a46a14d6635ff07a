//! Laws of carrying a profile over, on a made-up machine whose every term has a price.

use super::*;
use crate::fit::fit as fit_paths;
use crate::graph::{
    ActQuant, Activation, Conv, Linear, Node, Op, RawGraph, Shape, Source as From, WeightBits, Weights,
};
use crate::predict::{Flag, Origin};
use crate::profile::Row;
use crate::profile::tests::profile;
use crate::work::{ExpertKey, Heat};

fn value(scales: &[f64], parts: &[f64]) -> f64 {
    scales.iter().zip(parts).map(|(s, t)| s * t).sum()
}

/// Stem, `blocks` convolutions, mean, linear.
fn net(width: u32, blocks: u32, kernel: u32, weights: Weights, is_depthwise: bool) -> Graph {
    let quant = (weights != Weights::F32).then_some(ActQuant {
        scale: 0.1,
        zero_point: 0,
    });
    let conv = |cin, kernel, groups| {
        let (cout, stride, activation) = (width, 1, Activation::Relu);
        Op::Conv(Conv {
            cin,
            cout,
            kernel,
            stride,
            groups,
            activation,
            weights,
        })
    };
    let mut ops = vec![conv(3, 3, 1)];
    for block in 0..blocks {
        ops.push(if is_depthwise && block % 2 == 0 {
            conv(width, kernel, width)
        } else {
            conv(width, kernel, 1)
        });
    }
    ops.push(Op::GlobalAvgPool);
    ops.push(Op::Linear(Linear {
        inputs: width,
        outputs: 10,
        activation: Activation::None,
        weights,
    }));
    let last = ops.len() - 1;
    let node = |(index, op): (usize, Op)| Node {
        name: format!("n{index}"),
        op,
        inputs: vec![if index == 0 { From::Input } else { From::Node(index - 1) }],
        output: if index == last { None } else { quant },
    };
    Graph::new(RawGraph {
        name: format!("{width} {blocks} {kernel}"),
        input: Shape {
            batch: 1,
            channels: 3,
            height: 16,
            width: 16,
        },
        input_quant: quant,
        nodes: ops.into_iter().enumerate().map(node).collect(),
    })
    .unwrap()
}

fn nets() -> Vec<Graph> {
    let mut nets = Vec::new();
    for width in [16, 32, 48, 80] {
        for (blocks, kernel) in [(1, 3), (3, 1), (6, 3), (4, 5)] {
            for weights in [Weights::F32, Weights::Int(WeightBits::B8)] {
                nets.push(net(width, blocks, kernel, weights, false));
                nets.push(net(width, blocks, kernel, weights, true));
            }
        }
    }
    nets
}

/// µs of a term on the made-up machine.
fn price(term: Term) -> f64 {
    match term.group() {
        TermGroup::Launch => 3.0,
        TermGroup::Compute => 8.0,
        TermGroup::Memory => 0.05,
        TermGroup::Layout => 0.3,
        TermGroup::Link => 1.0,
    }
}

/// One thread, every operator of every net, and an expert.
fn source() -> Profile {
    let mut made = profile();
    let block = made.head.identity.block();
    let mut keys: Vec<Key> = nets().iter().flat_map(|graph| operators(graph, 1, block)).collect();
    keys.push(Key::Expert(ExpertKey {
        hidden: 64,
        inner: 32,
        bits: 4,
        planes: 1,
        group: 32,
        rank: 0,
        experts: 1,
        tokens: 1,
        threads: 1,
        heat: Heat::Cold,
    }));
    keys.sort_unstable();
    keys.dedup();
    let row = |key: Key| {
        let us = key
            .features(block)
            .terms()
            .iter()
            .map(|(term, count)| price(*term) * count)
            .sum::<f64>();
        Row {
            key,
            sessions: 3,
            count: 60,
            median_us: us,
            q10_us: us,
            mad_us: 0.01 * us,
            taken: crate::profile::Taken::default(),
        }
    };
    made.rows = keys.into_iter().map(row).collect();
    let samples: Vec<_> = made.rows.iter().map(Row::sample).collect();
    made.fits = fit_paths(&samples, block, 0.02);
    made
}

fn carried(scale: impl Fn(Group) -> f64, threads: u32) -> (Profile, Source, Vec<Graph>, Vec<usize>, [f64; GROUPS]) {
    let profile = source();
    let source = Source::new(&profile, 1, &profile.head.identity, threads).unwrap();
    let graphs = nets();
    let chosen = source.choose(&graphs, 10).unwrap();
    let scales = Group::ALL.map(scale);
    let sample = |&i: &usize| Sample {
        graph: graphs[i].clone(),
        ms: value(&scales, &source.parts(&graphs[i]).unwrap()),
    };
    let samples: Vec<Sample> = chosen.iter().map(sample).collect();
    (source.carry(&samples).unwrap(), source, graphs, chosen, scales)
}

#[test]
fn at_scales_of_one_the_source_comes_back() {
    let (profile, source, graphs, ..) = carried(|_| 1.0, 2);
    let (here, there) = (profile.model(&[]), source.model.clone());
    for graph in &graphs {
        let a = here.predict(&Work::Graph { graph, threads: 2 }).unwrap();
        let b = there.predict(&Work::Graph { graph, threads: 1 }).unwrap();
        assert!((a.ms / b.ms - 1.0).abs() < 1e-3, "{} {} {}", graph.name(), a.ms, b.ms);
        assert_eq!(a.origin, Origin::Transfer);
        assert!(
            a.flags
                .iter()
                .any(|f| matches!(f, Flag::Transferred { networks: 10, .. }))
        );
    }
}

#[test]
fn other_prices_are_found_from_ten_networks() {
    // Two threads as machines have them: calls dearer, arithmetic almost halved.
    let two = |group| match group {
        Group::Fixed | Group::Launch => 2.0,
        Group::Dense | Group::Int8 => 0.55,
        Group::Light => 0.65,
        Group::Bytes => 0.8,
        Group::Edges => 1.0,
    };
    let (profile, source, graphs, chosen, scales) = carried(two, 2);
    let here = profile.model(&[]);
    let transfer = profile.head.transfer.as_ref().unwrap();
    assert!(
        transfer.left_out_mape_pct < 10.0 && transfer.broken == 0,
        "{transfer:?}"
    );
    for (index, graph) in graphs.iter().enumerate() {
        let truth = value(&scales, &source.parts(graph).unwrap());
        let found = here.predict(&Work::Graph { graph, threads: 2 }).unwrap().ms;
        assert!(
            (found / truth - 1.0).abs() < 0.15,
            "{index} {} {found} {truth}",
            chosen.contains(&index)
        );
    }
}

#[test]
fn what_splitting_costs_is_found() {
    let profile = source();
    let source = Source::new(&profile, 1, &profile.head.identity, 2).unwrap();
    let graphs = nets();
    // Half of the work on each thread, and 6 µs for each operator that is worth splitting.
    let truth = |graph: &Graph| {
        let parts = source.parts(graph).unwrap();
        0.55 * parts[..GROUPS].iter().sum::<f64>() + 0.006 * parts[GROUPS]
    };
    let chosen = source.choose(&graphs, 10).unwrap();
    let samples: Vec<Sample> = chosen
        .iter()
        .map(|&i| Sample {
            graph: graphs[i].clone(),
            ms: truth(&graphs[i]),
        })
        .collect();
    let here = source.carry(&samples).unwrap();
    let transfer = here.head.transfer.clone().unwrap();
    assert!((transfer.split_us - 6.0).abs() < 0.5, "{transfer:?}");
    for graph in &graphs {
        let found = here.model(&[]).predict(&Work::Graph { graph, threads: 2 }).unwrap();
        assert!(
            (found.ms / truth(graph) - 1.0).abs() < 0.03,
            "{} {}",
            found.ms,
            truth(graph)
        );
        assert!((found.terms.sum_ms() - found.ms).abs() < 1e-9 * found.ms);
    }
}

#[test]
fn what_networks_do_not_run_is_left_out() {
    let (profile, ..) = carried(|_| 0.7, 2);
    assert!(
        profile
            .fits
            .iter()
            .all(|fit| fit.path.threads == 2 && !matches!(fit.path.family, Family::Expert { .. }))
    );
    assert!(profile.rows.iter().all(|row| row.key.with_threads(2) == Some(row.key)));
    assert!(profile.heldout.is_empty() && profile.good_for().kinds == ["cnn"]);
    let none = Source::new(&source(), 7, &profile.head.identity, 2)
        .unwrap_err()
        .to_string();
    assert!(none.contains("7 threads"), "{none}");
}

#[test]
fn a_broken_sample_is_left_aside_and_counted() {
    let profile = source();
    let source = Source::new(&profile, 1, &profile.head.identity, 1).unwrap();
    let graphs = nets();
    let sample = |(i, factor): (usize, f64)| Sample {
        graph: graphs[i].clone(),
        ms: factor * source.parts(&graphs[i]).unwrap()[..GROUPS].iter().sum::<f64>(),
    };
    let mut samples: Vec<Sample> = (0..8).map(|i| sample((5 * i, 1.3))).collect();
    let clean = source.carry(&samples).unwrap();
    samples.push(sample((3, 1e-3)));
    samples.push(Sample {
        ms: f64::NAN,
        ..sample((4, 1.0))
    });
    let with = source.carry(&samples).unwrap();
    let (with, clean) = (with.head.transfer.unwrap(), clean.head.transfer.unwrap());
    assert_eq!((with.broken, &with.scales), (2, &clean.scales));
    assert!(source.carry(&samples[..2]).is_err());
}

#[test]
fn chosen_networks_differ_and_one_is_tiny() {
    let profile = source();
    let source = Source::new(&profile, 1, &profile.head.identity, 2).unwrap();
    let graphs = nets();
    let chosen = source.choose(&graphs, 10).unwrap();
    let total = |i: usize| source.parts(&graphs[i]).unwrap()[..GROUPS].iter().sum::<f64>();
    assert!((0..graphs.len()).all(|i| total(i) >= total(chosen[0])));
    let mut sorted = chosen.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), 10);
    // Both number formats are among them: composition, not size.
    assert!(chosen.iter().any(|&i| graphs[i].input_quant().is_some()));
    assert!(chosen.iter().any(|&i| graphs[i].input_quant().is_none()));
}
