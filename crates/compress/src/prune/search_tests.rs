//! Searches against all masks of a small layer.

use cotk_model::moe::RoutingRule;
use cotk_run::seeds::Seeds;

use super::*;
use crate::prune::gram::Tokens;

const EXPERTS: usize = 10;
const HIDDEN: usize = 12;

/// A drawn layer and its scores.
fn layer(seed: u64) -> (Gram, Vec<ExpertScores>) {
    let mut stream = Seeds::new(seed).stream("layer");
    let tokens = 60;
    let mut scores: Vec<f32> = (0..tokens * EXPERTS)
        .map(|_| stream.random_range(0.0f32..1.0).powi(4) + 1e-3)
        .collect();
    for row in scores.chunks_exact_mut(EXPERTS) {
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|s| *s /= sum);
    }
    let outputs: Vec<Vec<f32>> = (0..EXPERTS)
        .map(|_| {
            (0..tokens * HIDDEN)
                .map(|_| stream.random_range(-1.0f32..1.0))
                .collect()
        })
        .collect();
    let sample = Tokens {
        rule: RoutingRule::softmax(EXPERTS, 2),
        bias: &[],
        scores: &scores,
        weights: &vec![1.0; tokens],
    };
    let gram = Gram::build(&sample, &[0.0; EXPERTS * HIDDEN], HIDDEN, |from, to| {
        Ok::<_, ()>(
            outputs
                .iter()
                .map(|rows| rows[from * HIDDEN..to * HIDDEN].to_vec())
                .collect(),
        )
    });
    let scores = (0..EXPERTS as u64).map(|e| ExpertScores {
        tokens: 10 + (e * 7) % 10,
        gate: 1.0,
        gated_norm: ((e * 3) % 10) as f64,
        renormalised_norm: ((e * 3) % 10) as f64,
        energy: ((e * 9) % 10) as f64,
        largest_norm: 1.0,
    });
    (gram.unwrap(), scores.collect())
}

fn found(seed: u64, method: Method, count: usize, semantics: Semantics) -> Found {
    let (gram, scores) = layer(seed);
    let known = Known {
        scores: &scores,
        gram: &gram,
        semantics,
    };
    search(&known, method, count, 3, &mut Seeds::new(seed).stream("search")).unwrap()
}

#[test]
fn every_method_drops_that_many_and_says_the_loss_of_its_mask() {
    for semantics in [Semantics::Masked, Semantics::Removed, Semantics::Novice] {
        for method in Method::ALL {
            for count in [0, 1, 4, 8] {
                let (gram, _) = layer(1);
                let found = found(1, method, count, semantics);
                let (mask, loss) = &found.masks[0];
                let measure = if method == Method::Paper {
                    Measure::Frobenius
                } else {
                    Measure::Weighted
                };
                assert_eq!(mask.count(), count, "{}", method.name());
                assert_eq!(*loss, gram.measured(mask, semantics, measure), "{}", method.name());
                assert!(found.masks.is_sorted_by(|a, b| a.1 <= b.1) && found.masks.len() <= 3);
                assert!(found.tried >= found.masks.len());
                assert_eq!(Method::named(method.name()), Some(method));
            }
        }
    }
}

#[test]
fn no_search_beats_all_masks_and_polished_ones_come_near() {
    for seed in 0..6 {
        for semantics in [Semantics::Masked, Semantics::Removed, Semantics::Novice] {
            let loss = |method| found(seed, method, 4, semantics).masks[0].1;
            let least = loss(Method::Exhaustive);
            for method in Method::ALL.into_iter().filter(|&m| m != Method::Paper) {
                assert!(loss(method) >= least, "{}", method.name());
            }
            assert!(loss(Method::Swap) <= loss(Method::Greedy));
            assert!(loss(Method::Genetic) <= loss(Method::Greedy));
            assert!(loss(Method::Genetic) <= 1.02 * least, "{seed} {}", semantics.name());
        }
    }
}

#[test]
fn an_exhaustive_search_tries_every_mask_once_or_says_how_many_there_are() {
    let found = found(3, Method::Exhaustive, 4, Semantics::Masked);
    assert_eq!((found.tried, found.masks.len()), (210, 3));
    assert_eq!(combinations(32, 8), 10_518_300);
    assert_eq!(
        (combinations(10, 0), combinations(10, 10), combinations(300, 150)),
        (1, 1, u64::MAX)
    );
    let (gram, scores) = layer(3);
    // A layer of more experts than the sample is of: refused before anything is looked up.
    let mut tried = Tried::new(&gram, Semantics::Masked, Measure::Weighted);
    let refused = exhaustive(&mut tried, 32, 8, 1).unwrap_err();
    assert_eq!((refused.masks, scores.len()), (10_518_300, EXPERTS));
}

#[test]
fn a_path_drops_one_more_each_time() {
    let (gram, scores) = layer(5);
    let known = Known {
        scores: &scores,
        gram: &gram,
        semantics: Semantics::Masked,
    };
    let path = path(&known, 8);
    let greedy = found(5, Method::Greedy, 5, Semantics::Masked);
    let mask = Mask::of(EXPERTS, path[..5].iter().map(|(expert, _)| *expert));
    assert_eq!((&mask, path[4].1), (&greedy.masks[0].0, greedy.masks[0].1));
    assert_eq!(path.len(), 8);
}

#[test]
fn another_seed_draws_another_mask() {
    let of = |seed: u64| {
        let (gram, scores) = layer(0);
        let known = Known {
            scores: &scores,
            gram: &gram,
            semantics: Semantics::Masked,
        };
        search(&known, Method::Random, 5, 1, &mut Seeds::new(seed).stream("search"))
            .unwrap()
            .masks
    };
    assert_eq!(of(1), of(1));
    assert_ne!(of(1), of(2));
}
