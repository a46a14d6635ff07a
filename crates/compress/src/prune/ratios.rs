//! How many experts go per layer, under one total. Law: counts add up to the total, none is above the layer's most, and
//! the sum of costs is the least there is (a shortest path over layers, not a greedy choice).

use serde::{Deserialize, Serialize};

/// How drops are spread over layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    /// The same number in each layer.
    Equal,
    /// Least sum of layer loss times what a layer's loss costs at the model's end, measured.
    #[default]
    Unequal,
    /// MoE-I²: shares like 1 over the layer's importance.
    Paper,
}

impl Spread {
    /// As recipes and tables spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Unequal => "unequal",
            Self::Paper => "paper",
        }
    }
}

/// Counts of least total cost: `costs[layer][count]`, counts 0 to the layer's most, and Σ counts = `total`, or as many
/// as can go. Ties leave more in later layers.
pub fn cheapest(costs: &[Vec<f64>], total: usize) -> Vec<usize> {
    let most: usize = costs.iter().map(|costs| costs.len() - 1).sum();
    let total = total.min(most);
    // best[n]: least cost of n drops in the layers so far; choice[layer][n]: the layer's own count then.
    let mut best = vec![f64::INFINITY; total + 1];
    best[0] = 0.0;
    let mut choices: Vec<Vec<usize>> = Vec::with_capacity(costs.len());
    for costs in costs {
        let mut next = vec![f64::INFINITY; total + 1];
        let mut choice = vec![0; total + 1];
        for (n, (next, choice)) in next.iter_mut().zip(&mut choice).enumerate() {
            for (own, cost) in costs.iter().enumerate().take(n + 1) {
                let found = best[n - own] + cost;
                if found < *next {
                    (*next, *choice) = (found, own);
                }
            }
        }
        best = next;
        choices.push(choice);
    }
    let mut left = total;
    let mut counts: Vec<usize> = choices
        .iter()
        .rev()
        .map(|choice| {
            let own = choice[left];
            left -= own;
            own
        })
        .collect();
    counts.reverse();
    counts
}

/// MoE-I²'s rule: shares like 1 / importance, largest remainders rounded up, none above `most`; what a full layer cannot
/// take goes to the others by the same shares.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "expert counts are small"
)]
pub fn paper(importances: &[f64], total: usize, most: usize) -> Vec<usize> {
    let shares: Vec<f64> = importances
        .iter()
        .map(|&i| 1.0 / i.max(f64::MIN_POSITIVE.sqrt()))
        .collect();
    let mut counts = vec![0; shares.len()];
    let mut left = total.min(most * shares.len());
    while left > 0 {
        let open: Vec<usize> = (0..shares.len()).filter(|&layer| counts[layer] < most).collect();
        let sum: f64 = open.iter().map(|&layer| shares[layer]).sum();
        let exact: Vec<f64> = open.iter().map(|&layer| left as f64 * shares[layer] / sum).collect();
        let mut order: Vec<usize> = (0..open.len()).collect();
        order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
        let whole: usize = exact.iter().map(|exact| exact.floor() as usize).sum();
        let mut spare = left.saturating_sub(whole);
        let before = left;
        for at in order {
            let extra = usize::from(spare > 0);
            spare -= extra;
            let room = most - counts[open[at]];
            let own = (exact[at].floor() as usize + extra).min(room).min(left);
            counts[open[at]] += own;
            left -= own;
        }
        assert!(left < before, "the largest share has room and takes one at least");
    }
    counts
}

#[cfg(test)]
mod tests {
    use cotk_run::seeds::Seeds;
    use proptest::prelude::*;
    use rand::RngExt;

    use super::*;

    proptest! {
        /// Law: no other split of the total costs less.
        #[test]
        fn no_split_is_cheaper(seed: u64, total in 0usize..14) {
            let mut stream = Seeds::new(seed).stream("costs");
            let costs: Vec<Vec<f64>> = (0..4).map(|_| (0..=stream.random_range(0..4usize)).map(|_| stream.random::<f64>()).collect()).collect();
            let counts = cheapest(&costs, total);
            let cost = |counts: &[usize]| counts.iter().zip(&costs).map(|(&c, costs)| costs[c]).sum::<f64>();
            let most: usize = costs.iter().map(|c| c.len() - 1).sum();
            prop_assert_eq!(counts.iter().sum::<usize>(), total.min(most));
            let sizes: Vec<usize> = costs.iter().map(Vec::len).collect();
            let mut least = f64::INFINITY;
            for code in 0..sizes.iter().product::<usize>() {
                let mut rest = code;
                let split: Vec<usize> = sizes.iter().map(|&size| { let own = rest % size; rest /= size; own }).collect();
                if split.iter().sum::<usize>() == total.min(most) {
                    least = least.min(cost(&split));
                }
            }
            prop_assert!((cost(&counts) - least).abs() < 1e-12);
        }

        /// Law: the paper's counts add up, are bounded, and an important layer never loses more than an unimportant one.
        #[test]
        fn important_layers_lose_fewer(importances in proptest::collection::vec(0.0f64..10.0, 1..8), total in 0usize..60) {
            let counts = paper(&importances, total, 7);
            prop_assert_eq!(counts.iter().sum::<usize>(), total.min(7 * importances.len()));
            for (a, x) in importances.iter().zip(&counts) {
                for (b, y) in importances.iter().zip(&counts) {
                    prop_assert!(*x <= 7 && (a >= b || x + 1 >= *y));
                }
            }
        }
    }

    #[test]
    fn shares_are_like_one_over_importance() {
        assert_eq!(paper(&[1.0, 2.0, 4.0], 14, 20), [8, 4, 2]);
        assert_eq!(paper(&[1.0, 2.0, 4.0], 14, 6), [6, 5, 3]);
        assert_eq!(paper(&[1.0, 1.0], 3, 20), [2, 1]);
    }
}
