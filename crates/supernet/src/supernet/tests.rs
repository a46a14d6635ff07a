//! Laws that hold supernet, subnet and export together.

use cotk_data::glyphs;
use cotk_data::loader::{Source, plain_batch};
use cotk_search::space::{Choice, Section};
use cotk_search::{export, measure};
use std::sync::Arc;

use super::*;

const NORMALISATION: Normalisation = Normalisation {
    zero: 126,
    deviation: 60.0,
};

fn tiny() -> Supernet {
    crate::set_threads(1);
    let section = Section {
        stem: 8,
        stages: vec![12, 16],
        blocks: 1,
        kernels: vec![3, 5],
        ..Section::default()
    };
    let space = Space::new(&section, glyphs::SHAPE, 10).unwrap();
    let settings = Settings {
        normalisation: NORMALISATION,
        momentum: 0.9,
        weight_decay: 1e-4,
    };
    Supernet::new(&space, settings, Seeds::new(5))
}

fn source(batch: usize) -> Source {
    let images = Arc::new(glyphs::images(Seeds::new(1), "train", 256));
    Source::shuffled(images, NORMALISATION, None, Seeds::new(1), "test", batch)
}

fn some_point(net: &Supernet) -> Point {
    let choice = |i: usize| Choice {
        kernel: (i % 2) as u8,
        bits: (i % 3) as u8,
    };
    Point((0..net.space().choices()).map(choice).collect())
}

fn trained(steps: usize) -> Supernet {
    let mut net = tiny();
    let source = source(32);
    let mut stream = Seeds::new(9).stream("points");
    for step in 0..steps {
        let point = net.space().sample(&mut stream);
        net.weight_step(&point, &source.batch(step), 0.05).unwrap();
    }
    net
}

#[test]
fn a_subnet_alone_computes_what_its_point_computes_inside() {
    let mut net = trained(4);
    let batches: Vec<Batch> = (0..2).map(|i| source(64).batch(i)).collect();
    // Uncoded, so that both see the same weights: scales are fitted anew when a point is cut out.
    let point = net.space().largest();
    net.recalibrate(&point, &batches).unwrap();
    let mut alone = net.cut_out(&point, Form::Float).unwrap();
    alone.settle(&batches).unwrap();
    let (inside, outside) = (
        net.evaluate(&point, &batches[0]).unwrap(),
        alone.evaluate(&batches[0]).unwrap(),
    );
    // 8 bits against none: close, and the same verdicts but for a tie or two.
    assert!((inside.loss() - outside.loss()).abs() < 0.02, "{inside:?} {outside:?}");
    assert!(inside.right.abs_diff(outside.right) <= 2, "{inside:?} {outside:?}");
}

#[test]
fn masked_full_kernels_and_cropped_ones_give_one_loss() {
    let net = trained(4);
    let batch = source(32).batch(0);
    let (pixels, labels) = net.batch(&batch);
    for point in [some_point(&net), net.space().smallest(), net.space().largest()] {
        let inside = Inside {
            net: &net,
            point: &point,
            gates: None,
        };
        let cropped = loss(&forward(&net.space, &inside, &pixels, Norm::Batch), &labels).double_value(&[]);
        let masked = net.gate_gradient(&point, &batch).unwrap().loss;
        assert!((cropped - masked).abs() < 1e-4 * cropped, "{cropped} {masked}");
    }
}

/// The straight-through gradient of a gate is a directional derivative: along the part that the gate scales.
#[test]
fn a_kernel_gates_gradient_is_the_slope_along_its_shell() {
    let net = trained(4);
    let batch = source(32).batch(0);
    let (pixels, labels) = net.batch(&batch);
    let point = net.space().largest();
    let gradient = net.gate_gradient(&point, &batch).unwrap().gradient;
    let (index, gate) = net
        .space
        .gates()
        .iter()
        .enumerate()
        .find(|(_, g)| g.kind == GateKind::Kernel && g.choice == 1)
        .unwrap();
    let slot = net
        .space
        .slots()
        .iter()
        .position(|s| s.choice == Some(gate.choice))
        .unwrap();
    // d loss / d w through the coded weights, times the shell.
    let inside = Inside {
        net: &net,
        point: &point,
        gates: None,
    };
    let loss = loss(&forward(&net.space, &inside, &pixels, Norm::Batch), &labels);
    let weight = net.params.get(net.convs[slot].weight);
    let slope = &Tensor::run_backward(&[loss], &[weight], false, false)[0];
    let shell = &net.masks[1] - &net.masks[0];
    let expected = (slope * weight * shell).sum(Kind::Double).double_value(&[]);
    assert!(
        (gradient[index] - expected).abs() < 1e-3 * expected.abs().max(1e-3),
        "{} {expected}",
        gradient[index]
    );
}

#[test]
fn a_gate_inside_a_closed_one_has_no_gradient() {
    let net = trained(2);
    let gradient = net
        .gate_gradient(&net.space().smallest(), &source(32).batch(0))
        .unwrap()
        .gradient;
    for (gate, gradient) in net.space.gates().iter().zip(gradient) {
        let is_reachable = gate.rung == 1;
        assert_eq!(gradient != 0.0, is_reachable, "{gate:?}: {gradient}");
    }
}

#[test]
fn state_restores_the_same_bits() {
    let (mut one, mut two) = (trained(3), tiny());
    two.load(&one.state()).unwrap();
    let batch = source(32).batch(7);
    let point = some_point(&one);
    for _ in 0..2 {
        let (a, b) = (
            one.weight_step(&point, &batch, 0.05).unwrap(),
            two.weight_step(&point, &batch, 0.05).unwrap(),
        );
        assert_eq!(a.to_bits(), b.to_bits());
    }
    assert_eq!(one.state(), two.state());
    let mut short = one.state();
    short.remove("head.bias");
    assert!(two.load(&short).unwrap_err().to_string().contains("head.bias"));
}

/// The whole chain: cut out, fine-tuned with fake codes, folded, exported, run by ONNX Runtime on its int8 kernels.
#[test]
fn an_export_computes_what_its_subnet_evaluates() {
    let mut net = trained(30);
    let images = glyphs::images(Seeds::new(1), "val", 128);
    let batch = plain_batch(&images, NORMALISATION, 0..128);
    let calibration: Vec<Batch> = (0..3).map(|i| source(64).batch(i)).collect();
    for form in [Form::Float, Form::Int8] {
        let mut subnet = net.cut_out(&some_point(&net), form).unwrap();
        subnet.settle(&calibration).unwrap();
        for step in 0..20 {
            subnet.step(&source(32).batch(step), 0.02).unwrap();
        }
        subnet.settle(&calibration).unwrap();
        let expected = subnet.evaluate(&batch).unwrap();
        let network = export::network(net.space(), &some_point(&net), subnet.folded().unwrap()).unwrap();
        let found = measure::accuracy(&network, &images, NORMALISATION, 1).unwrap();
        let (near, wrong) = match form {
            Form::Float => (1e-4, 0),
            Form::Int8 => (0.02, 3),
        };
        assert!(
            (found.loss() - expected.loss()).abs() < near,
            "{form:?}: {found:?} {expected:?}"
        );
        assert!(
            found.right.abs_diff(expected.right) <= wrong,
            "{form:?}: {found:?} {expected:?}"
        );
    }
    // The supernet itself still trains: cutting out has copied.
    net.weight_step(&some_point(&net), &source(32).batch(0), 0.01).unwrap();
}

#[test]
fn loss_falls_on_what_it_trains_on() {
    let mut net = tiny();
    let source = source(64);
    let point = net.space().largest();
    let first = net.weight_step(&point, &source.batch(0), 0.05).unwrap();
    for step in 1..40 {
        net.weight_step(&point, &source.batch(step), 0.05).unwrap();
    }
    let last = net.weight_step(&point, &source.batch(0), 0.05).unwrap();
    assert!(last < 0.7 * first, "{first} {last}");
}
