//! Laws of steps: sums of their operators, and enumeration of every pattern of touched and missed experts.

use proptest::prelude::*;

use super::*;
use crate::fit::{Sample, fit};
use crate::predict::CostModel;
use crate::schedule::in_order;
use crate::work::{Block, GlueKey, Term, Work};

const EXPERT: ExpertKey = ExpertKey {
    hidden: 256,
    inner: 128,
    bits: 4,
    planes: 1,
    group: 32,
    rank: 0,
    experts: 1,
    tokens: 1,
    threads: 1,
    heat: Heat::Cold,
};

fn dense(inputs: u32, outputs: u32) -> Key {
    Key::Dense(DenseKey {
        inputs,
        outputs,
        bits: 32,
        group: 0,
        tokens: 1,
        threads: 1,
        heat: Heat::Cold,
    })
}

fn glue() -> Key {
    Key::Glue(GlueKey {
        hidden: 256,
        experts: 8,
        top_k: 2,
        inner: 0,
        tokens: 1,
        threads: 1,
    })
}

fn read(tier: Tier, bytes: u64) -> Key {
    Key::Read(ReadKey {
        tier,
        bytes,
        threads: 1,
    })
}

/// A machine made of its terms: 0.01 µs a unit and 2 µs a call.
fn machine(with_dense: bool, with_disk: bool) -> Model {
    let mut keys = vec![glue(), read(Tier::Memory, 1 << 26), read(Tier::Memory, 1 << 27)];
    for (hidden, inner) in [(64, 32), (256, 128), (512, 256), (1024, 512)] {
        for (experts, tokens) in [(1, 1), (2, 1), (4, 1), (2, 2), (1, 8), (8, 3)] {
            keys.push(Key::Expert(ExpertKey {
                hidden,
                inner,
                experts,
                tokens,
                ..EXPERT
            }));
        }
        if with_dense {
            keys.extend([dense(hidden, inner), dense(inner, 4 * hidden)]);
        }
    }
    if with_disk {
        keys.extend([read(Tier::Disk, 1 << 14), read(Tier::Disk, 1 << 20)]);
    }
    let us = |key: &Key| -> f64 {
        let cost = |term| match term {
            Term::Call => 2.0,
            Term::LinkKib => 0.3,
            _ => 0.01,
        };
        key.features(Block(16)).terms().iter().map(|(t, n)| cost(*t) * n).sum()
    };
    let samples: Vec<Sample> = keys
        .iter()
        .map(|&key| Sample {
            key,
            us: us(&key),
            relative_spread: 0.02,
        })
        .collect();
    let fits = fit(&samples, Block(16), 0.02);
    Model::new("test", Block(16), Vec::new(), fits, 0.02, Vec::new())
}

fn step(shares: &[f64], homes: &[bool], top_k: u32, tokens: u32) -> MoeStep {
    let expert = |(share, in_memory): (&f64, &bool)| RoutedExpert {
        key: EXPERT,
        share: *share,
        home: if *in_memory {
            Home::Memory
        } else {
            Home::Disk { bytes: 60_000 }
        },
    };
    MoeStep {
        layers: vec![LayerStep {
            keys: vec![glue(), dense(256, 512)],
            experts: shares.iter().zip(homes).map(expert).collect(),
            top_k,
        }],
        ends: vec![dense(256, 2048)],
        tokens,
        threads: 1,
        working_set_bytes: 1 << 40,
    }
}

fn ms(model: &Model, key: Key) -> f64 {
    model.predict(&Work::Operator(key)).unwrap().ms
}

#[test]
fn all_in_memory_a_step_is_the_sum_of_its_operators() {
    let model = machine(true, false);
    let step = step(&[0.25; 8], &[true; 8], 2, 1);
    let found = model.step(&step).unwrap();
    let experts = ms(&model, Key::Expert(ExpertKey { experts: 2, ..EXPERT }));
    let (layer, head) = (
        ms(&model, glue()) + ms(&model, dense(256, 512)) + experts,
        ms(&model, dense(256, 2048)),
    );
    assert!((found.whole.ms - layer - head).abs() < 1e-9 * layer);
    assert!((found.layers[0].prediction.ms - layer).abs() < 1e-9 * layer && (found.ends.ms - head).abs() < 1e-9);
    assert!((found.whole.terms.sum_ms() - found.whole.ms).abs() < 1e-9);
    assert_eq!(
        (found.touched, found.missed, found.whole.terms.link_ms),
        (2.0, 0.0, 0.0)
    );
    let bytes = 4.0 * 256.0 * (512.0 + 2048.0) + 2.0 * EXPERT.weight_bytes();
    assert!(
        (found.floor.memory_bytes - bytes).abs() < 1e-6,
        "{}",
        found.floor.memory_bytes
    );
    assert_eq!(model.predict(&Work::Step(&step)).unwrap(), found.whole);
}

#[test]
fn what_was_never_measured_goes_by_its_bytes_and_is_said() {
    let step = step(&[0.25; 8], &[true; 8], 2, 1);
    let found = machine(false, false).step(&step).unwrap();
    let said = |f: &Flag| matches!(f, Flag::StandIn { path, .. } if path == "dense.f32.gemv.cold/t1");
    assert!(found.whole.flags.iter().any(said), "{:?}", found.whole.flags);
    // Experts have no such stand-in, nor has the disk.
    let mut wide = step.clone();
    wide.layers[0].experts[0].key.bits = 8;
    assert!(machine(true, false).step(&wide).is_err());
    let away = self::step(&[0.25; 8], &[false; 8], 2, 1);
    let text = machine(true, false).step(&away).unwrap_err().to_string();
    assert!(text.contains("read.disk"), "{text}");
}

#[test]
fn a_model_in_cache_is_read_from_there() {
    let small = MoeStep {
        working_set_bytes: 1 << 20,
        ..step(&[0.25; 8], &[true; 8], 2, 1)
    };
    let cold = machine(true, false);
    // Nothing hot was measured: memory stands in, and that is said.
    let warm = machine(true, false).with_cache(32 << 20);
    let (found, expected) = (warm.step(&small).unwrap().whole, cold.step(&small).unwrap().whole);
    assert!((found.ms - expected.ms).abs() < 1e-9);
    let said = |f: &Flag| matches!(f, Flag::StandIn { by, .. } if by == "expert.codes.cold/t1");
    assert!(
        found.flags.iter().any(said) && !expected.flags.iter().any(said),
        "{:?}",
        found.flags
    );
    assert_eq!(warm.cold_share(16 << 20), 0.0);
    assert_eq!(warm.cold_share(48 << 20), 1.0);
    assert!((warm.cold_share(28_982_058) - 0.5).abs() < 0.01);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Law: one token. Equal to all 2^k patterns of misses, each through the walk of the schedule.
    #[test]
    fn one_token_equals_every_pattern_of_misses(
        homes in prop::collection::vec(any::<bool>(), 6), top_k in 1u32..5, raw in prop::collection::vec(0.05f64..1.0, 6),
    ) {
        let model = machine(true, true);
        // Shares below 1 that add up to k are not needed here: weights of the draw are.
        let sum: f64 = raw.iter().sum();
        let shares: Vec<f64> = raw.iter().map(|r| (f64::from(top_k) * r / sum).min(1.0)).collect();
        let step = step(&shares, &homes, top_k, 1);
        let found = model.step(&step).unwrap().layers[0].prediction.ms;
        let total: f64 = shares.iter().sum();
        let miss: f64 = shares.iter().zip(&homes).filter(|(_, home)| !**home).map(|(s, _)| s / total).sum();
        let fetch = ms(&model, read(Tier::Disk, 60_000));
        let one = ms(&model, Key::Expert(EXPERT));
        let mut expected = ms(&model, glue()) + ms(&model, dense(256, 512));
        for pattern in 0..1u32 << top_k {
            let misses = pattern.count_ones();
            let p = miss.powi(misses as i32) * (1.0 - miss).powi((top_k - misses) as i32);
            let hits = top_k - misses;
            let resident = if hits == 0 { 0.0 } else { ms(&model, Key::Expert(ExpertKey { experts: hits, ..EXPERT })) };
            expected += p * in_order(resident, (0..misses).map(|_| (fetch, one)));
        }
        prop_assert!((found - expected).abs() < 1e-4 * expected, "{} {}", found, expected);
    }

    /// Law: a batch. Equal to all 2^E patterns of touched experts.
    #[test]
    fn a_batch_equals_every_pattern_of_touched_experts(
        homes in prop::collection::vec(any::<bool>(), 6), raw in prop::collection::vec(0.05f64..1.0, 6), batch in 2u32..5,
    ) {
        let model = machine(true, true);
        let sum: f64 = raw.iter().sum();
        let shares: Vec<f64> = raw.iter().map(|r| (2.0 * r / sum).min(1.0)).collect();
        let step = step(&shares, &homes, 2, batch);
        let found = model.step(&step).unwrap();
        let p: Vec<f64> = shares.iter().map(|s| 1.0 - (1.0 - s).powi(batch as i32)).collect();
        let distinct: f64 = p.iter().sum();
        prop_assert!((found.touched - distinct).abs() < 1e-9);
        let mean = (2.0 * f64::from(batch) / distinct).max(1.0);
        let call = |experts: u32| {
            let at = |tokens: f64| ms(&model, Key::Expert(ExpertKey { experts, tokens: tokens as u32, ..EXPERT }));
            if experts == 0 { 0.0 } else { at(mean.floor()) * (1.0 - mean.fract()) + at(mean.floor() + 1.0) * mean.fract() }
        };
        let fetch = ms(&model, read(Tier::Disk, 60_000));
        let mut expected = ms(&model, glue()) + ms(&model, dense(256, 512));
        for pattern in 0..1u32 << 6 {
            let is_touched = |i: usize| pattern >> i & 1 == 1;
            let probability: f64 = p.iter().enumerate().map(|(i, p)| if is_touched(i) { *p } else { 1.0 - p }).product();
            let count = |in_memory: bool| (0..6).filter(|&i| is_touched(i) && homes[i] == in_memory).count() as u32;
            expected += probability * in_order(call(count(true)), (0..count(false)).map(|_| (fetch, call(1))));
        }
        prop_assert!((found.layers[0].prediction.ms - expected).abs() < 1e-4 * expected, "{} {}", found.layers[0].prediction.ms, expected);
    }

    /// Law: moving an expert to disk never makes a step faster; terms still add up.
    #[test]
    fn each_expert_away_costs_time_or_nothing(
        homes in prop::collection::vec(any::<bool>(), 8), which in 0usize..8, tokens in 1u32..4,
    ) {
        let model = machine(true, true);
        let with = |home| {
            let mut homes = homes.clone();
            homes[which] = home;
            model.step(&step(&[0.25; 8], &homes, 2, tokens)).unwrap()
        };
        let (near, far) = (with(true), with(false));
        prop_assert!(far.whole.ms >= near.whole.ms * (1.0 - 1e-5), "{} {}", far.whole.ms, near.whole.ms);
        prop_assert!((far.whole.terms.sum_ms() - far.whole.ms).abs() < 1e-9);
        prop_assert!(far.floor.ms >= near.floor.ms - 1e-12 && far.missed > near.missed);
    }
}
