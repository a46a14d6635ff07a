//! The knapsack against exhaustive search, and on many items.

use proptest::collection::vec;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};

use super::*;

fn items(count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Vec<Candidate>>> {
    let candidate = (0u32..50, 0u64..40, 0u32..40).prop_map(|(loss, bytes, ms)| Candidate {
        loss: f64::from(loss),
        bytes,
        ms: f64::from(ms),
    });
    vec(vec(candidate, 1..5), count)
}

/// Loss of the best choice that meets the budgets, over all choices: sums that another one beats in everything are
/// dropped on the way.
fn exhaustive(items: &[Vec<Candidate>], budgets: &Budgets) -> Option<f64> {
    let fits = |s: &(f64, u64, f64)| budgets.bytes.is_none_or(|b| s.1 <= b) && budgets.ms.is_none_or(|b| s.2 <= b);
    let mut sums = vec![(0.0, 0u64, 0.0)];
    for candidates in items {
        let all = sums.iter().flat_map(|s| {
            candidates
                .iter()
                .map(move |c| (s.0 + c.loss, s.1 + c.bytes, s.2 + c.ms))
        });
        let mut all: Vec<_> = all.filter(fits).collect();
        all.sort_by(|a, b| a.1.cmp(&b.1).then(a.2.total_cmp(&b.2)).then(a.0.total_cmp(&b.0)));
        let mut kept: Vec<(f64, u64, f64)> = Vec::new();
        for s in all {
            let is_beaten = |k: &(f64, u64, f64)| k.0 <= s.0 && (budgets.ms.is_none() || k.2 <= s.2);
            if !kept.iter().any(is_beaten) {
                kept.push(s);
            }
        }
        sums = kept;
    }
    sums.into_iter().map(|s| s.0).min_by(f64::total_cmp)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn one_budget_is_within_the_stated_gap_of_exhaustive_search(items in items(1..13), budget in 0u64..300) {
        let budgets = Budgets { bytes: Some(budget), ms: None };
        match (Knapsack.allocate(&items, &budgets), exhaustive(&items, &budgets)) {
            (Ok(found), Some(best)) => {
                prop_assert!(found.bytes <= budget && found.ms >= 0.0);
                prop_assert!(found.loss >= best && found.loss <= best + found.gap + 1e-9, "{found:?} {best}");
                let greedy = Greedy.allocate(&items, &budgets).unwrap();
                prop_assert!(found.loss <= greedy.loss && found.gap <= greedy.gap + 1e-9);
            }
            (Err(QuantError::NothingFits { .. }), None) => {}
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn two_budgets_are_met_within_the_stated_gap(items in items(1..9), bytes in 0u64..200, ms in 0u32..200) {
        let budgets = Budgets { bytes: Some(bytes), ms: Some(f64::from(ms)) };
        match (Knapsack.allocate(&items, &budgets), exhaustive(&items, &budgets)) {
            (Ok(found), Some(best)) => {
                prop_assert!(found.bytes <= bytes && found.ms <= f64::from(ms));
                prop_assert!(found.loss >= best && found.loss <= best + found.gap + 1e-9, "{found:?} {best}");
            }
            (Ok(found), None) => prop_assert!(false, "nothing fits: {found:?}"),
            // Prices do not reach every choice: a pair of budgets that few choices meet may be missed.
            (Err(QuantError::NothingFits { .. }), _) => {}
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn more_budget_never_costs_more_than_the_gap(items in items(1..13), budget in 0u64..300, more in 0u64..100) {
        let loss = |bytes| Knapsack.allocate(&items, &Budgets { bytes: Some(bytes), ms: None });
        if let (Ok(less), Ok(more)) = (loss(budget), loss(budget + more)) {
            prop_assert!(more.loss <= less.loss + more.gap + 1e-9);
        }
    }
}

/// Losses that fall fourfold a bit with noise, at 20 sizes each: what bits and groups look like.
fn many(count: usize, seed: u64) -> Vec<Vec<Candidate>> {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    let mut item = || {
        let size = rng.random_range(1_000u64..9_000);
        let weight = 10f64.powf(rng.random_range(-3.0..1.0));
        let choice = (0..20u32).map(|i| {
            let bits = f64::from(i) * 0.3 + 1.0;
            let loss = weight * 4f64.powf(-bits) * rng.random_range(0.7..1.3);
            let bytes = (size as f64 * bits / 8.0) as u64;
            Candidate {
                loss,
                bytes,
                ms: bytes as f64 * rng.random_range(0.5e-6..1.5e-6),
            }
        });
        choice.collect::<Vec<_>>()
    };
    (0..count).map(|_| item()).collect()
}

#[test]
fn many_items_end_near_their_bound_under_one_budget_and_two() {
    let items = many(5_000, 1);
    let bytes = 5_000 * 5_000 * 3 / 8;
    let one = Knapsack
        .allocate(
            &items,
            &Budgets {
                bytes: Some(bytes),
                ms: None,
            },
        )
        .unwrap();
    assert!(one.bytes <= bytes && one.bytes as f64 > 0.9999 * bytes as f64);
    assert!(
        one.gap < 1e-5 * one.loss && one.loss_per_byte > 0.0 && one.loss_per_ms == 0.0,
        "{}",
        one.gap / one.loss
    );
    let two = Budgets {
        bytes: Some(bytes),
        ms: Some(0.9 * one.ms),
    };
    let both = Knapsack.allocate(&items, &two).unwrap();
    assert!(both.bytes <= bytes && both.ms <= 0.9 * one.ms && both.loss > one.loss);
    assert!(
        both.gap < 0.01 * both.loss && both.loss_per_ms > 0.0,
        "{}",
        both.gap / both.loss
    );
    assert_eq!(both, Knapsack.allocate(&items, &two).unwrap());
}

#[test]
fn what_no_choice_meets_says_the_least() {
    let items = [vec![
        Candidate {
            loss: 1.0,
            bytes: 10,
            ms: 1.0,
        },
        Candidate {
            loss: 0.0,
            bytes: 1,
            ms: 9.0,
        },
    ]];
    let error = |bytes, ms| Knapsack.allocate(&items, &Budgets { bytes, ms }).unwrap_err();
    let fits = |least, budget, unit| QuantError::NothingFits { least, budget, unit };
    assert_eq!(error(Some(0), None), fits(1.0, 0.0, "bytes"));
    assert_eq!(error(None, Some(0.5)), fits(1.0, 0.5, "ms"));
    // Each alone could be met.
    assert_eq!(error(Some(5), Some(5.0)), fits(9.0, 5.0, "ms"));
    let free = Knapsack.allocate(&items, &Budgets::default()).unwrap();
    assert_eq!((free.choice, free.gap, free.loss_per_byte), (vec![1], 0.0, 0.0));
}
