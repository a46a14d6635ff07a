//! The knapsack of many items: lower convex hulls, their increments by loss saved per byte, a second budget by a price
//! on it, then repair. Laws: what [`super`] promises; the same answer on any number of threads (it uses one).
//!
//! The linear relaxation of one budget is solved exactly by the increments in order, the one that does not fit taken in
//! part (Zemel, 1980); its value is a bound that no choice beats, and the gap is measured from it. A second budget is
//! priced into the losses (Lagrange): each price gives a bound, too.

use super::repair::repair;
use super::{Allocation, Allocator, Budgets, Candidate, check, least};
use crate::QuantError;

/// Eightfold raises of the price of the second budget before it is said that nothing fits, and halvings to settle it.
const GROW: usize = 40;
const SETTLE: usize = 40;
/// Answers of prices that are repaired.
const REPAIRED: usize = 3;

/// Hulls, increments, repair.
#[derive(Debug, Clone, Copy, Default)]
pub struct Knapsack;

impl Allocator for Knapsack {
    fn allocate(&self, items: &[Vec<Candidate>], budgets: &Budgets) -> Result<Allocation, QuantError> {
        check(items, budgets)?;
        let search = Search::new(items, budgets);
        let free = search.fill(0.0);
        if budgets.ms.is_none_or(|ms| free.sums.ms <= ms) {
            return Ok(search.finish(free.choice.clone(), free.bound, &free, 0.0));
        }
        search.priced(free.bound).ok_or_else(|| search.nothing_fits())
    }
}

/// Sums over chosen candidates.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Sums {
    pub(super) loss: f64,
    pub(super) bytes: u64,
    pub(super) ms: f64,
}

impl Sums {
    pub(super) fn of(items: &[Vec<Candidate>], choice: &[usize]) -> Self {
        let mut sums = Self::default();
        for c in items.iter().zip(choice).map(|(c, &i)| c[i]) {
            sums.loss += c.loss;
            sums.bytes += c.bytes;
            sums.ms += c.ms;
        }
        sums
    }
}

struct Search<'a> {
    items: &'a [Vec<Candidate>],
    budgets: &'a Budgets,
    /// Candidates of each item by bytes.
    by_bytes: Vec<Vec<usize>>,
    /// What a ms costs at a price of 1: the scale of losses over that of times.
    unit: f64,
}

/// One price's answer.
struct Fill {
    choice: Vec<usize>,
    sums: Sums,
    /// Nothing that meets the budgets loses less.
    bound: f64,
    /// Of the first increment that did not fit.
    loss_per_byte: f64,
}

/// A step down a hull.
struct Increment {
    item: u32,
    to: u32,
    bytes: u64,
    saved: f64,
}

impl<'a> Search<'a> {
    fn new(items: &'a [Vec<Candidate>], budgets: &'a Budgets) -> Self {
        let sorted = |candidates: &Vec<Candidate>| {
            let mut order: Vec<usize> = (0..candidates.len()).collect();
            order.sort_by_key(|&i| candidates[i].bytes);
            order
        };
        let widest = |value: fn(&Candidate) -> f64| {
            let all = items.iter().map(|c| c.iter().map(value).fold(0.0, f64::max));
            all.sum::<f64>()
        };
        let (loss, ms) = (widest(|c| c.loss), widest(|c| c.ms));
        let unit = if loss > 0.0 && ms > 0.0 { loss / ms } else { 1.0 };
        Self {
            items,
            budgets,
            by_bytes: items.iter().map(sorted).collect(),
            unit,
        }
    }

    /// The best under the byte budget alone where each ms costs `price` units of loss.
    fn fill(&self, price: f64) -> Fill {
        let cost = |c: &Candidate| c.loss + price * self.unit * c.ms;
        let mut choice = Vec::with_capacity(self.items.len());
        let mut increments = Vec::new();
        let mut hull = Vec::new();
        for ((item, candidates), order) in (0u32..).zip(self.items).zip(&self.by_bytes) {
            lower_hull(candidates, order, &cost, &mut hull);
            choice.push(hull[0]);
            for pair in hull.windows(2) {
                let (from, to) = (&candidates[pair[0]], &candidates[pair[1]]);
                increments.push(Increment {
                    item,
                    to: u32::try_from(pair[1]).expect("candidates are counted in memory"),
                    bytes: to.bytes - from.bytes,
                    saved: cost(from) - cost(to),
                });
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "bytes below 2^53")]
        let slope = |i: &Increment| i.saved / i.bytes as f64;
        // Within a hull slopes fall strictly: an item's increments stay in order.
        increments.sort_unstable_by(|a, b| slope(b).total_cmp(&slope(a)).then(a.item.cmp(&b.item)));
        let mut bytes = Sums::of(self.items, &choice).bytes;
        let budget = self.budgets.bytes.unwrap_or(u64::MAX);
        let mut closed = vec![false; self.items.len()];
        let (mut relaxed, mut loss_per_byte, mut is_full) = (0.0, 0.0, false);
        let start: f64 = self.items.iter().zip(&choice).map(|(c, &i)| cost(&c[i])).sum();
        for step in &increments {
            let item = step.item as usize;
            let fits = bytes + step.bytes <= budget;
            if !is_full {
                relaxed += if fits {
                    step.saved
                } else {
                    slope(step) * to_f64(budget - bytes)
                };
            }
            if !fits && !is_full {
                (is_full, loss_per_byte) = (true, slope(step));
            }
            if fits && !closed[item] {
                bytes += step.bytes;
                choice[item] = step.to as usize;
            } else {
                closed[item] = true;
            }
        }
        let bound = start - relaxed - self.budgets.ms.map_or(0.0, |ms| price * self.unit * ms);
        let sums = Sums::of(self.items, &choice);
        Fill {
            choice,
            sums,
            bound,
            loss_per_byte,
        }
    }

    /// The least price at which the second budget holds, and the prices just above it: repaired, one of them is best.
    fn priced(&self, mut bound: f64) -> Option<Allocation> {
        let budget = self.budgets.ms?;
        let (mut low, mut high) = (0.0f64, 1e-3f64);
        let mut found: Vec<(Fill, f64)> = Vec::new();
        for _ in 0..GROW {
            let fill = self.fill(high);
            bound = bound.max(fill.bound);
            if fill.sums.ms <= budget {
                found.push((fill, high));
                break;
            }
            low = high;
            high *= 8.0;
        }
        for _ in 0..SETTLE {
            if found.is_empty() || high - low < 1e-3 * high {
                break;
            }
            let middle = 0.5 * (low + high);
            let fill = self.fill(middle);
            bound = bound.max(fill.bound);
            if fill.sums.ms > budget {
                low = middle;
            } else {
                high = middle;
                found.push((fill, middle));
            }
        }
        let last = found.iter().rev().take(REPAIRED);
        let repaired = last.map(|(fill, price)| self.finish(fill.choice.clone(), bound, fill, *price));
        repaired.min_by(|a, b| a.loss.total_cmp(&b.loss))
    }

    fn finish(&self, mut choice: Vec<usize>, bound: f64, fill: &Fill, price: f64) -> Allocation {
        repair(self.items, self.budgets, &mut choice);
        let sums = Sums::of(self.items, &choice);
        Allocation {
            choice,
            loss: sums.loss,
            bytes: sums.bytes,
            ms: sums.ms,
            loss_per_byte: fill.loss_per_byte,
            loss_per_ms: price * self.unit,
            gap: (sums.loss - bound).max(0.0),
        }
    }

    /// Each budget alone may be met while both together are not: then the least time under the byte budget is named.
    fn nothing_fits(&self) -> QuantError {
        let (Some(_), Some(budget)) = (self.budgets.bytes, self.budgets.ms) else {
            return least(self.items, self.budgets);
        };
        QuantError::NothingFits {
            least: self.fill(1e30).sums.ms,
            budget,
            unit: "ms",
        }
    }
}

/// Candidates on the lower convex hull of (bytes, cost), cheapest first, slopes strictly falling in magnitude; what is
/// dominated is not among them.
fn lower_hull(candidates: &[Candidate], by_bytes: &[usize], cost: &impl Fn(&Candidate) -> f64, hull: &mut Vec<usize>) {
    hull.clear();
    let key = |i: usize| (to_f64(candidates[i].bytes), cost(&candidates[i]));
    for &i in by_bytes {
        let (x, y) = key(i);
        if let Some(&last) = hull.last() {
            let (x_last, y_last) = key(last);
            if y >= y_last {
                continue;
            }
            if x == x_last {
                hull.pop();
            }
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
}

#[expect(clippy::cast_precision_loss, reason = "bytes below 2^53")]
pub(super) fn to_f64(bytes: u64) -> f64 {
    bytes as f64
}
