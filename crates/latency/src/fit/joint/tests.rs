//! Laws of the joint fit: what rows say is found, nothing is negative, free or dearer than it can be.

use super::*;
use crate::graph::{Activation, Conv, Node, Op, RawGraph, Shape, Source, Weights};
use crate::work::Family;

const BLOCK: Block = Block(16);

/// A chain of convolutions with these widths, on `side` x `side`.
fn chain(widths: &[u32], side: u32) -> Graph {
    let nodes = widths.windows(2).enumerate().map(|(index, pair)| Node {
        name: format!("n{index}"),
        op: Op::Conv(Conv {
            cin: pair[0],
            cout: pair[1],
            kernel: 3,
            stride: 1,
            groups: 1,
            activation: Activation::Relu,
            weights: Weights::F32,
        }),
        inputs: vec![index.checked_sub(1).map_or(Source::Input, Source::Node)],
        output: None,
    });
    let input = Shape {
        batch: 1,
        channels: widths[0],
        height: side,
        width: side,
    };
    Graph::new(RawGraph {
        name: "chain".into(),
        input,
        input_quant: None,
        nodes: nodes.collect(),
    })
    .unwrap()
}

/// A machine of which every count is known.
fn truth(key: &Key) -> f64 {
    let features = key.features(BLOCK);
    let cost = |term: Term| match term {
        Term::Call => 1.0,
        Term::MegaMacs => 25.0,
        Term::EdgeKib => 0.02,
        _ => 0.0,
    };
    features.terms().iter().map(|(term, count)| cost(*term) * count).sum()
}

fn networks() -> Vec<Measured> {
    let mut rows = Vec::new();
    for (i, c) in [16u32, 24, 32, 48, 64, 20, 36, 52, 80, 96].into_iter().enumerate() {
        for side in [6, 8, 12, 16] {
            let graph = chain(&[3, c, c, 8, c, 2 * c][..3 + i % 4], side);
            let mut row = Measured::network(&graph, 1, BLOCK, 1.0, 0.01);
            row.us = row.parts.iter().map(|(key, times)| times * truth(key)).sum();
            rows.push(row);
        }
    }
    rows
}

#[test]
fn whole_networks_say_what_their_operators_cost() {
    let fitted = fit_all(&networks(), BLOCK, 0.01);
    for row in [chain(&[3, 40, 40], 10), chain(&[3, 28, 28, 8, 56], 14)] {
        let row = Measured::network(&row, 1, BLOCK, 1.0, 0.01);
        let us = |key: &Key| {
            let features = key.features(BLOCK);
            let fit = fitted.paths.iter().find(|fit| fit.path == features.path).unwrap();
            fit.us(&features)
        };
        let found: f64 = row.parts.iter().map(|(key, times)| times * us(key)).sum();
        let expected: f64 = row.parts.iter().map(|(key, times)| times * truth(key)).sum();
        assert!((found / expected).ln().abs() < 0.03, "{found} {expected}");
    }
    let families: Vec<Family> = fitted.paths.iter().map(|fit| fit.path.family).collect();
    assert!(families.contains(&Family::ConvBlocked) && families.contains(&Family::Session));
    assert!(
        fitted
            .paths
            .iter()
            .flat_map(|fit| &fit.coefficients)
            .all(|c| c.us_per_unit >= 0.0)
    );
    let [calibration] = fitted.calibrations[..] else {
        panic!("{:?}", fitted.calibrations)
    };
    assert_eq!((calibration.threads, calibration.networks), (1, 40));
    assert!(calibration.network_mape_pct < 3.0, "{calibration:?}");
}

#[test]
fn nothing_is_dearer_than_from_memory() {
    let mut rows: Vec<Measured> = networks();
    // Two wild rows say that far weights cost a µs a KiB.
    let far = |row: &Measured| -> f64 {
        let features = row
            .parts
            .iter()
            .flat_map(|(key, _)| key.features(BLOCK).terms().to_vec());
        features.filter(|t| t.0 == Term::FarWeightKib).map(|t| t.1).sum()
    };
    for (c, side) in [(160, 4), (176, 6), (192, 4), (208, 5), (224, 4), (240, 4)] {
        let mut row = Measured::network(&chain(&[3, c, c], side), 1, BLOCK, 1.0, 0.01);
        row.us = row.parts.iter().map(|(key, times)| times * truth(key)).sum::<f64>() + far(&row);
        rows.push(row);
    }
    let price = |read_us: Option<f64>| {
        let refs: Vec<&Measured> = rows.iter().collect();
        let system = System::new(&refs, BLOCK, read_us);
        let found = system.solve(&(0..rows.len()).collect::<Vec<_>>());
        let at = system.columns.iter().position(|c| c.1 == Term::FarWeightKib).unwrap();
        (
            found[at],
            (0..40)
                .map(|row| (system.predict(row, &found) / rows[row].us).ln().abs())
                .fold(0.0, f64::max),
        )
    };
    assert!(price(None).0 > 0.5, "{:?}", price(None));
    let (held, worst) = price(Some(0.05));
    assert!(held <= 0.1 * 1.3 && worst < 0.1, "{held} {worst}");
}

#[test]
fn a_slope_gives_back_what_is_not_its_own() {
    let rows = networks();
    let fitted = fit_all(&rows, BLOCK, 0.01);
    let parts: Vec<(Key, f64)> = rows[0]
        .parts
        .iter()
        .filter(|p| !matches!(p.0, Key::Session { .. }))
        .copied()
        .collect();
    let us: f64 = parts.iter().map(|(key, times)| times * truth(key)).sum();
    let key = parts
        .iter()
        .map(|p| p.0)
        .find(|key| matches!(key, Key::Conv(c) if c.cin == 16))
        .unwrap();
    let row = Measured {
        key: Some(key),
        parts,
        us,
        relative_spread: 0.01,
        weight: 1.0,
    };
    let own = fitted.own_us(&row, BLOCK);
    assert!((own / truth(&key)).ln().abs() < 0.1, "{own} {}", truth(&key));
}

#[test]
fn arithmetic_is_never_free() {
    let mut rows = networks();
    // 1x1 convolutions that cost nothing: rows that say so are wrong, and their path must not predict 0 ms.
    let pointwise = |key: &Key| key.path(BLOCK).family == Family::ConvPointwise;
    let mut free = chain(&[3, 32, 32], 8);
    for _ in 0..3 {
        let mut raw: RawGraph = free.into();
        if let Op::Conv(conv) = &mut raw.nodes[1].op {
            conv.kernel = 1;
        }
        free = Graph::new(raw).unwrap();
        let mut row = Measured::network(&free, 1, BLOCK, 1.0, 0.01);
        assert!(row.parts.iter().any(|(key, _)| pointwise(key)));
        let paid = row.parts.iter().filter(|(key, _)| !pointwise(key));
        row.us = paid.map(|(key, times)| times * truth(key)).sum::<f64>() * 0.9;
        rows.push(row);
    }
    let fitted = fit_all(&rows, BLOCK, 0.01);
    let is_free = |fit: &&PathFit| fit.path.family == Family::ConvPointwise;
    assert!(
        fitted.paths.iter().find(is_free).is_none(),
        "{:?}",
        fitted.paths.iter().find(is_free)
    );
}

#[test]
fn what_counts_more_is_met_more_closely() {
    let mut rows = networks();
    let odd = rows[5].us * 1.3;
    let error = |rows: &[Measured]| {
        let fitted = fit_all(rows, BLOCK, 0.01);
        let us = |key: &Key| {
            let features = key.features(BLOCK);
            let fit = fitted.paths.iter().find(|fit| fit.path == features.path);
            fit.map_or(0.0, |fit| fit.us(&features))
        };
        let found: f64 = rows[5].parts.iter().map(|(key, times)| times * us(key)).sum();
        (found / odd).ln().abs()
    };
    rows[5].us = odd;
    let light = error(&rows);
    rows[5].weight = 20.0;
    assert!(error(&rows) < 0.8 * light);
}
