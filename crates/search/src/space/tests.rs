//! Laws of the space: coding, nesting, sizes. `tiny_space` serves the other rooms' tests too.

use cotk_run::seeds::Seeds;
use proptest::prelude::*;

use super::*;

/// Four searched convolutions: 1,296 networks.
pub(crate) fn tiny_space() -> Space {
    let section = Section {
        stem: 8,
        stages: vec![8],
        blocks: 1,
        kernels: vec![3, 5],
        bits: default_bits(),
    };
    let mut section = section;
    section.stages = vec![8, 12];
    section.blocks = 0;
    section.stages.push(16);
    section.stages.push(16);
    Space::new(
        &section,
        ImageShape {
            channels: 3,
            height: 16,
            width: 16,
        },
        10,
    )
    .unwrap()
}

/// Two stages with a residual block each: six searched convolutions.
pub(crate) fn residual_space() -> Space {
    let section = Section {
        stem: 8,
        stages: vec![8, 16],
        blocks: 1,
        kernels: vec![3, 5],
        bits: default_bits(),
    };
    Space::new(
        &section,
        ImageShape {
            channels: 3,
            height: 16,
            width: 16,
        },
        10,
    )
    .unwrap()
}

fn point() -> impl Strategy<Value = Point> {
    any::<u64>().prop_map(|seed| residual_space().sample(&mut Seeds::new(seed).stream("point")))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_point_decodes_from_its_text_and_its_gates(point in point()) {
        let space = residual_space();
        prop_assert_eq!(&space.decode(&space.encode(&point)).unwrap(), &point);
        prop_assert_eq!(&space.point_of(&space.gates_of(&point)), &point);
    }

    #[test]
    fn a_move_changes_one_gene_by_one_rung_and_can_be_undone(point in point(), seed in any::<u64>()) {
        let space = residual_space();
        let moved = space.mutate(&point, &mut Seeds::new(seed).stream("move"));
        let changed: u32 = point.0.iter().zip(&moved.0)
            .map(|(a, b)| u32::from(a.kernel.abs_diff(b.kernel)) + u32::from(a.bits.abs_diff(b.bits)))
            .sum();
        prop_assert_eq!(changed, 1);
        prop_assert!(space.moves(&moved).contains(&point));
    }

    #[test]
    fn any_text_is_a_point_or_an_error(text in "[0-9w-]{0,40}") {
        let space = residual_space();
        if let Ok(point) = space.decode(&text) {
            prop_assert_eq!(space.encode(&point), text);
        }
    }
}

#[test]
fn count_is_the_number_of_points() {
    let space = tiny_space();
    let mut all = vec![vec![]];
    for _ in 0..space.choices() {
        all = all
            .into_iter()
            .flat_map(|point: Vec<Choice>| {
                (0..6u8).map(move |i| {
                    let mut next = point.clone();
                    next.push(Choice {
                        kernel: i / 3,
                        bits: i % 3,
                    });
                    next
                })
            })
            .collect();
    }
    assert_eq!(all.len() as f64, space.count());
}

#[test]
fn a_gate_inside_a_closed_one_is_closed() {
    let space = tiny_space();
    let mut on = vec![false; space.gates().len()];
    for (on, gate) in on.iter_mut().zip(space.gates()) {
        *on = gate.kind == GateKind::Bits && gate.rung == 2;
    }
    assert_eq!(space.point_of(&on), space.smallest());
}

#[test]
fn a_graph_has_the_chosen_kernels_and_bits() {
    let space = residual_space();
    let mut point = space.smallest();
    point.0[1] = Choice { kernel: 1, bits: 2 };
    let graph = space.cost_graph(&point, Form::Int8).unwrap();
    let node = graph.nodes().iter().find(|n| n.name == "stage0.block0.first").unwrap();
    assert!(matches!(
        node.op,
        Op::Conv(Conv {
            kernel: 5,
            weights: Weights::Int(WeightBits::B8),
            ..
        })
    ));
    assert_eq!(graph.nodes().len(), space.ranges() + 1);
    assert_eq!(graph.output().channels, 10);
}

#[test]
fn a_section_that_cannot_be_right_is_refused_by_key() {
    let shape = ImageShape {
        channels: 3,
        height: 16,
        width: 16,
    };
    let good = Section {
        stem: 8,
        stages: vec![8],
        blocks: 1,
        kernels: vec![3, 5],
        bits: default_bits(),
    };
    for (key, section) in [
        (
            "space.stem",
            Section {
                stem: 0,
                ..good.clone()
            },
        ),
        (
            "space.stages",
            Section {
                stages: vec![],
                ..good.clone()
            },
        ),
        (
            "space.kernels",
            Section {
                kernels: vec![5, 3],
                ..good.clone()
            },
        ),
        (
            "space.kernels",
            Section {
                kernels: vec![4],
                ..good.clone()
            },
        ),
        (
            "space.bits",
            Section {
                bits: vec![],
                ..good.clone()
            },
        ),
    ] {
        assert!(
            Space::new(&section, shape, 10)
                .unwrap_err()
                .to_string()
                .starts_with(key)
        );
    }
}
