//! One choice per item under budgets: the multiple-choice knapsack behind drops, ranks and bits.
//!
//! Knows losses, bytes and milliseconds, not what a candidate is. Laws: a result meets every budget; its loss is above
//! the optimum by at most the gap that it states.

mod knapsack;
#[cfg(test)]
mod laws;
mod repair;

pub use self::knapsack::Knapsack;

use crate::QuantError;

/// One way to store one item.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// What it costs in quality; any unit that adds up over items.
    pub loss: f64,
    pub bytes: u64,
    /// Predicted time that it adds.
    pub ms: f64,
}

/// Upper bounds on the sums over all items; an absent one does not bind.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Budgets {
    pub bytes: Option<u64>,
    pub ms: Option<f64>,
}

/// Which candidate each item gets, and what one unit more of each budget would have been worth.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// Index into each item's candidates.
    pub choice: Vec<usize>,
    pub loss: f64,
    pub bytes: u64,
    pub ms: f64,
    /// Dual prices: loss per byte and per millisecond at the margin; 0 where the budget does not bind.
    pub loss_per_byte: f64,
    pub loss_per_ms: f64,
    /// The loss is at most this above the optimum.
    pub gap: f64,
}

/// Chooses one candidate per item.
pub trait Allocator {
    /// `items` in a fixed order; ties go to the lower index, so that equal inputs give equal choices.
    ///
    /// # Errors
    /// An item without candidates, numbers that are not finite or negative, budgets that nothing meets.
    fn allocate(&self, items: &[Vec<Candidate>], budgets: &Budgets) -> Result<Allocation, QuantError>;
}

/// Lower convex hulls, all their increments in order of loss saved per cost, taken while they fit. Two budgets are
/// weighed into one cost, by a few fixed weights, and the best result that meets both is kept.
#[derive(Debug, Clone, Copy, Default)]
pub struct Greedy;

/// Share of the byte budget in the cost, tried in this order.
const WEIGHTS: [f64; 7] = [0.5, 0.25, 0.75, 0.1, 0.9, 0.0, 1.0];

impl Allocator for Greedy {
    fn allocate(&self, items: &[Vec<Candidate>], budgets: &Budgets) -> Result<Allocation, QuantError> {
        check(items, budgets)?;
        let weights: &[f64] = match (budgets.bytes, budgets.ms) {
            (Some(_), Some(_)) => &WEIGHTS,
            (None, Some(_)) => &[0.0],
            (_, None) => &[1.0],
        };
        let mut best: Option<Allocation> = None;
        for &weight in weights {
            if let Some(found) = fill(items, budgets, weight)
                && best.as_ref().is_none_or(|b| found.loss < b.loss)
            {
                best = Some(found);
            }
        }
        best.ok_or_else(|| least(items, budgets))
    }
}

/// One more step down the hull of an item.
struct Increment {
    item: usize,
    to: usize,
    saved: f64,
    cost: f64,
}

fn fill(items: &[Vec<Candidate>], budgets: &Budgets, weight: f64) -> Option<Allocation> {
    let unit = |budget: f64| if budget > 0.0 { 1.0 / budget } else { 1.0 };
    let per_byte = weight * budgets.bytes.map_or(1.0, |b| unit(to_f64(b)));
    let per_ms = (1.0 - weight) * budgets.ms.map_or(1.0, unit);
    let cost = |c: &Candidate| per_byte * to_f64(c.bytes) + per_ms * c.ms;
    let fits = |bytes: u64, ms: f64| budgets.bytes.is_none_or(|b| bytes <= b) && budgets.ms.is_none_or(|b| ms <= b);

    let mut choice = Vec::with_capacity(items.len());
    let mut increments = Vec::new();
    for (item, candidates) in items.iter().enumerate() {
        let hull = lower_hull(candidates, &cost);
        choice.push(hull[0]);
        increments.extend(hull.windows(2).map(|pair| Increment {
            item,
            to: pair[1],
            saved: candidates[pair[0]].loss - candidates[pair[1]].loss,
            cost: cost(&candidates[pair[1]]) - cost(&candidates[pair[0]]),
        }));
    }
    // Within a hull slopes fall, so a stable sort keeps an item's increments in order.
    increments.sort_by(|a, b| (b.saved / b.cost).total_cmp(&(a.saved / a.cost)));

    let sum = |choice: &[usize]| {
        let chosen = || items.iter().zip(choice).map(|(c, &i)| c[i]);
        let bytes = chosen().map(|c| c.bytes).sum::<u64>();
        (
            chosen().map(|c| c.loss).sum::<f64>(),
            bytes,
            chosen().map(|c| c.ms).sum::<f64>(),
        )
    };
    let (_, mut bytes, mut ms) = sum(&choice);
    if !fits(bytes, ms) {
        return None;
    }
    let mut closed = vec![false; items.len()];
    let (mut gap, mut price) = (0.0, 0.0);
    for step in increments {
        let (from, to) = (items[step.item][choice[step.item]], items[step.item][step.to]);
        let (new_bytes, new_ms) = (bytes - from.bytes + to.bytes, ms - from.ms + to.ms);
        if !closed[step.item] && fits(new_bytes, new_ms) {
            (bytes, ms) = (new_bytes, new_ms);
            choice[step.item] = step.to;
        } else {
            if price == 0.0 {
                (gap, price) = (step.saved, step.saved / step.cost);
            }
            closed[step.item] = true;
        }
    }
    let (loss, bytes, ms) = sum(&choice);
    Some(Allocation {
        choice,
        loss,
        bytes,
        ms,
        loss_per_byte: if budgets.bytes.is_some() { price * per_byte } else { 0.0 },
        loss_per_ms: if budgets.ms.is_some() { price * per_ms } else { 0.0 },
        gap,
    })
}

/// Candidates on the lower convex hull of (cost, loss), cheapest first, slopes strictly falling in magnitude.
fn lower_hull(candidates: &[Candidate], cost: &impl Fn(&Candidate) -> f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    let key = |i: usize| (cost(&candidates[i]), candidates[i].loss);
    order.sort_by(|&a, &b| key(a).0.total_cmp(&key(b).0).then(key(a).1.total_cmp(&key(b).1)));
    let mut hull: Vec<usize> = Vec::new();
    for i in order {
        let (x, y) = key(i);
        if hull.last().is_some_and(|&last| y >= key(last).1) {
            continue;
        }
        while let [.., a, b] = hull[..] {
            let ((xa, ya), (xb, yb)) = (key(a), key(b));
            if (ya - yb) * (x - xb) > (yb - y) * (xb - xa) {
                break;
            }
            hull.pop();
        }
        hull.push(i);
    }
    hull
}

fn check(items: &[Vec<Candidate>], budgets: &Budgets) -> Result<(), QuantError> {
    for (item, candidates) in items.iter().enumerate() {
        if candidates.is_empty() {
            return Err(QuantError::NoCandidate { item });
        }
        for (candidate, c) in candidates.iter().enumerate() {
            for (what, found) in [("loss", c.loss), ("ms", c.ms)] {
                if !found.is_finite() || found < 0.0 {
                    return Err(QuantError::BadCandidate {
                        item,
                        candidate,
                        what,
                        found,
                    });
                }
            }
        }
    }
    let least_bytes: u64 = items.iter().filter_map(|c| c.iter().map(|c| c.bytes).min()).sum();
    let over_bytes = budgets.bytes.is_some_and(|b| least_bytes > b);
    let over_ms = budgets.ms.is_some_and(|b| least_ms(items) > b);
    if over_bytes || over_ms {
        Err(least(items, budgets))
    } else {
        Ok(())
    }
}

fn least_ms(items: &[Vec<Candidate>]) -> f64 {
    items
        .iter()
        .filter_map(|c| c.iter().map(|c| c.ms).min_by(f64::total_cmp))
        .sum()
}

/// Names the budget that is missed by the greater ratio.
fn least(items: &[Vec<Candidate>], budgets: &Budgets) -> QuantError {
    let bytes = to_f64(items.iter().filter_map(|c| c.iter().map(|c| c.bytes).min()).sum());
    let ms = least_ms(items);
    match (budgets.bytes, budgets.ms) {
        (bytes_budget, Some(budget)) if bytes_budget.is_none_or(|b| ms * to_f64(b) > bytes * budget) => {
            QuantError::NothingFits {
                least: ms,
                budget,
                unit: "ms",
            }
        }
        (bytes_budget, _) => QuantError::NothingFits {
            least: bytes,
            budget: bytes_budget.map_or(f64::INFINITY, to_f64),
            unit: "bytes",
        },
    }
}

#[expect(clippy::cast_precision_loss, reason = "budgets below 2^53 bytes")]
fn to_f64(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn tiny_items() -> impl Strategy<Value = Vec<Vec<Candidate>>> {
        let candidate = (0u32..50, 0u64..40, 0u32..40).prop_map(|(loss, bytes, ms)| Candidate {
            loss: f64::from(loss),
            bytes,
            ms: f64::from(ms),
        });
        vec(vec(candidate, 1..5), 1..6)
    }

    /// Loss of the best choice that meets the budgets, by trying all.
    fn brute_force(items: &[Vec<Candidate>], budgets: &Budgets) -> Option<f64> {
        let fits = |bytes: u64, ms: f64| budgets.bytes.is_none_or(|b| bytes <= b) && budgets.ms.is_none_or(|b| ms <= b);
        let mut sums = vec![(0.0, 0u64, 0.0)];
        for candidates in items {
            sums = sums
                .iter()
                .flat_map(|s| {
                    candidates
                        .iter()
                        .map(move |c| (s.0 + c.loss, s.1 + c.bytes, s.2 + c.ms))
                })
                .collect();
        }
        let best = sums.into_iter().filter(|s| fits(s.1, s.2)).map(|s| s.0);
        best.min_by(f64::total_cmp)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn one_budget_is_met_within_the_stated_gap_of_brute_force(items in tiny_items(), budget in 0u64..160) {
            let budgets = Budgets { bytes: Some(budget), ms: None };
            match (Greedy.allocate(&items, &budgets), brute_force(&items, &budgets)) {
                (Ok(found), Some(best)) => {
                    prop_assert!(found.bytes <= budget);
                    prop_assert!(found.loss >= best && found.loss <= best + found.gap, "{found:?} {best}");
                }
                (Err(QuantError::NothingFits { .. }), None) => {}
                other => prop_assert!(false, "{other:?}"),
            }
        }

        #[test]
        fn two_budgets_are_both_met(items in tiny_items(), bytes in 0u64..160, ms in 0u32..160) {
            let budgets = Budgets { bytes: Some(bytes), ms: Some(f64::from(ms)) };
            if let Ok(found) = Greedy.allocate(&items, &budgets) {
                prop_assert!(found.bytes <= bytes && found.ms <= f64::from(ms));
                prop_assert!(brute_force(&items, &budgets).is_some_and(|best| found.loss >= best));
            }
        }
    }

    #[test]
    fn no_budget_takes_the_least_loss() {
        let items = [vec![
            Candidate {
                loss: 3.0,
                bytes: 1,
                ms: 0.0,
            },
            Candidate {
                loss: 1.0,
                bytes: 9,
                ms: 2.0,
            },
        ]];
        let found = Greedy.allocate(&items, &Budgets::default()).unwrap();
        assert_eq!((found.choice, found.loss_per_byte), (vec![1], 0.0));
        assert_eq!(
            Greedy.allocate(&[vec![]], &Budgets::default()),
            Err(QuantError::NoCandidate { item: 0 })
        );
    }
}
