//! Laws of learning from use, on a made-up profile whose every operator is an exact row of the table.

use std::collections::BTreeMap;

use cotk_latency::profile::{Conditions, GoodFor, Head, Noise, Provenance, Row, Taken, Verdict};
use cotk_latency::walk::operators;
use cotk_run::seeds::Seeds;

use super::*;
use crate::cost::{Costs, Quantity, Tables};
use crate::space::tests::tiny_space;
use crate::space::{Form, Space};

fn machine(purpose: Purpose, here: &Identity, space: &Space) -> Profile {
    let mut keys: Vec<_> = space
        .cover()
        .unwrap()
        .iter()
        .flat_map(|graph| operators(graph, THREADS, here.block()))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    let row = |key: cotk_latency::work::Key| {
        let counts: f64 = key.features(here.block()).terms().iter().map(|(_, count)| count).sum();
        let us = 1.0 + 0.3 * counts;
        Row {
            key,
            sessions: 3,
            count: 60,
            median_us: us,
            q10_us: us,
            mad_us: 0.01 * us,
            taken: Taken::default(),
        }
    };
    let mut profile = Profile {
        head: Head {
            format: Profile::FORMAT,
            purpose,
            provenance: Provenance {
                date: "2026-11-21T00:00:00Z".into(),
                cotk_version: "0.1.0".into(),
                commit: None,
                seed: 0,
                quick: true,
                seconds: 1.0,
            },
            identity: here.clone(),
            noise: Noise {
                floor_pct: 1.0,
                p90_pct: 2.0,
                steal_pct: 0.0,
                verdict: Verdict::Good,
                canaries: vec![],
            },
            transfer: None,
            carried: Vec::new(),
            good_for: GoodFor::default(),
            conditions: Conditions::default(),
            left_out: vec![],
            edited: None,
            files: BTreeMap::new(),
        },
        rows: keys.into_iter().map(row).collect(),
        fits: vec![],
        heldout: vec![],
        networks: vec![],
        calibrations: vec![],
        corrections: vec![],
    };
    profile.refit();
    profile
}

fn predict(folder: &Path, graph: &Graph) -> f64 {
    let work = Work::Graph {
        graph,
        threads: THREADS,
    };
    Profile::load(folder).unwrap().model(&[]).predict(&work).unwrap().ms
}

fn judged(predicted_ms: f64, times: f64) -> Judged {
    Judged {
        predicted_ms,
        measured_ms: times * predicted_ms,
        spread_ms: 0.01 * predicted_ms,
        q10_ms: times * predicted_ms,
        sessions: 7,
        count: 175,
    }
}

#[test]
fn the_next_prediction_agrees_better_and_its_neighbours_move_with_it() {
    let (dir, here, space) = (
        tempfile::tempdir().unwrap(),
        Identity::here(BTreeMap::new()),
        tiny_space(),
    );
    let folder = dir.path().join("machine");
    machine(Purpose::Machine, &here, &space).save(&folder).unwrap();
    let graph = space.cost_graph(&space.largest(), Form::Int8).unwrap();
    let near = space.cost_graph(&space.uniform(0, 2), Form::Int8).unwrap();
    let (before_ms, near_ms) = (predict(&folder, &graph), predict(&folder, &near));
    let judged = judged(before_ms, 1.4);
    assert!(judged.disagrees());
    let copy = dir.path().join("copy");
    let refit = super::refit(&folder, &copy, &here, &graph, &judged).unwrap();
    assert!((refit.before_pct - 40.0).abs() < 1e-6 && refit.is_shared && refit.profile == folder);
    assert!(refit.after_pct.abs() < 10.0, "{refit:?}");
    let after_ms = predict(&folder, &graph);
    assert!((100.0 * (judged.measured_ms / after_ms - 1.0) - refit.after_pct).abs() < 1e-9);
    assert!(predict(&folder, &near) > 1.1 * near_ms);
    assert!(!copy.exists());
}

#[test]
fn learning_the_same_again_changes_no_byte() {
    let (dir, here, space) = (
        tempfile::tempdir().unwrap(),
        Identity::here(BTreeMap::new()),
        tiny_space(),
    );
    let folder = dir.path().join("machine");
    machine(Purpose::Machine, &here, &space).save(&folder).unwrap();
    let graph = space.cost_graph(&space.largest(), Form::Int8).unwrap();
    let judged = judged(predict(&folder, &graph), 0.7);
    let copy = dir.path().join("copy");
    let bytes = || {
        let files = [
            "profile.toml",
            "timings.csv",
            "coeffs.toml",
            "heldout.csv",
            "networks.jsonl",
        ];
        files.map(|file| fs_err::read(folder.join(file)).unwrap())
    };
    let first = super::refit(&folder, &copy, &here, &graph, &judged).unwrap();
    let once = bytes();
    // A run that was killed behind the save learns it again.
    let second = super::refit(&folder, &copy, &here, &graph, &judged).unwrap();
    assert_eq!((first, once), (second, bytes()));
}

/// Law: what two searches learn at once is in the profile, both.
#[test]
fn two_writers_lose_nothing() {
    let (dir, here, space) = (
        tempfile::tempdir().unwrap(),
        Identity::here(BTreeMap::new()),
        tiny_space(),
    );
    let folder = dir.path().join("machine");
    machine(Purpose::Machine, &here, &space).save(&folder).unwrap();
    let copy = dir.path().join("copy");
    let graphs =
        [space.largest(), space.uniform(0, 2), space.uniform(1, 0)].map(|p| space.cost_graph(&p, Form::Int8).unwrap());
    std::thread::scope(|scope| {
        for graph in &graphs {
            let (folder, copy, here) = (&folder, &copy, &here);
            scope.spawn(move || super::refit(folder, copy, here, graph, &judged(1.0, 1.4)).unwrap());
        }
    });
    let learnt = Profile::load(&folder).unwrap().networks;
    for graph in &graphs {
        assert_eq!(
            learnt.iter().filter(|n| n.is_of(graph, THREADS)).count(),
            1,
            "{}",
            graph.name()
        );
    }
    assert!(learnt.iter().all(|n| n.is_from_use));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_reference_stays_as_it_is() {
    let (dir, here, space) = (
        tempfile::tempdir().unwrap(),
        Identity::here(BTreeMap::new()),
        tiny_space(),
    );
    let (folder, copy) = (dir.path().join("reference"), dir.path().join("copy"));
    machine(Purpose::Reference, &here, &space).save(&folder).unwrap();
    let graph = space.cost_graph(&space.largest(), Form::Int8).unwrap();
    let before_ms = predict(&folder, &graph);
    let refit = super::refit(&folder, &copy, &here, &graph, &judged(before_ms, 1.3)).unwrap();
    assert!(!refit.is_shared && refit.profile == copy);
    assert_eq!(predict(&folder, &graph), before_ms);
    assert!(predict(&copy, &graph) > 1.1 * before_ms);
}

#[test]
fn what_agrees_or_cannot_be_told_teaches_nothing() {
    assert!(!judged(1.0, 1.09).disagrees() && !judged(1.0, 0.91).disagrees());
    assert!(judged(1.0, 1.11).disagrees() && judged(1.0, 0.89).disagrees());
    let noisy = Judged {
        spread_ms: 0.2,
        ..judged(1.0, 1.3)
    };
    assert!(!noisy.disagrees());
}

/// Law: tables of single changes add up to what the model says of any network, corrected or not.
#[test]
fn tables_add_up_with_a_corrected_model() {
    let (dir, here, space) = (
        tempfile::tempdir().unwrap(),
        Identity::here(BTreeMap::new()),
        tiny_space(),
    );
    let folder = dir.path().join("machine");
    machine(Purpose::Machine, &here, &space).save(&folder).unwrap();
    let graph = space.cost_graph(&space.largest(), Form::Int8).unwrap();
    super::refit(&folder, &folder, &here, &graph, &judged(predict(&folder, &graph), 1.5)).unwrap();
    let model = Profile::load(&folder).unwrap().model(&[]);
    let costs = Costs::new(&space, &Tables::new(&space, &model).unwrap()).unwrap();
    let mut stream = Seeds::new(5).stream("points");
    for _ in 0..20 {
        let point = space.sample(&mut stream);
        let graph = space.cost_graph(&point, Form::Int8).unwrap();
        let whole = model
            .predict(&Work::Graph {
                graph: &graph,
                threads: THREADS,
            })
            .unwrap()
            .ms;
        let summed = costs.at(Quantity::Ms, &point).unwrap();
        assert!((whole - summed).abs() < 1e-9 * whole, "{whole} {summed}");
    }
}
