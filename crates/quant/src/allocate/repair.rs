//! What greed leaves on the table: upgrades into left-over budget, and swaps of one item up and another down.
//!
//! Law: a repaired choice meets the budgets and never loses more than it did.

use super::knapsack::Sums;
use super::{Budgets, Candidate};

/// Passes over all items; each lowers the loss, so that this only bounds the time.
const PASSES: usize = 64;

/// A change of one item.
#[derive(Clone, Copy)]
struct Move {
    item: usize,
    to: usize,
    /// Loss that it takes away; negative for a move down.
    saved: f64,
    bytes: i64,
    ms: f64,
}

/// Until none helps: upgrades of single items, then pairs of one up and one down.
pub(super) fn repair(items: &[Vec<Candidate>], budgets: &Budgets, choice: &mut [usize]) {
    for _ in 0..PASSES {
        let before = choice.to_vec();
        if !upgrade(items, budgets, choice) && !swap(items, budgets, choice) {
            break;
        }
        // Times were added up move by move: the sum over all may be above the budget in its last bits.
        if budgets.ms.is_some_and(|ms| Sums::of(items, choice).ms > ms) {
            choice.copy_from_slice(&before);
            break;
        }
    }
}

fn moves<'a>(items: &'a [Vec<Candidate>], choice: &'a [usize]) -> impl Iterator<Item = Move> + 'a {
    items
        .iter()
        .zip(choice)
        .enumerate()
        .flat_map(|(item, (candidates, &at))| {
            let from = candidates[at];
            candidates
                .iter()
                .enumerate()
                .filter(move |(to, _)| *to != at)
                .map(move |(to, c)| Move {
                    item,
                    to,
                    saved: from.loss - c.loss,
                    bytes: c.bytes.cast_signed() - from.bytes.cast_signed(),
                    ms: c.ms - from.ms,
                })
        })
}

/// What is left of each budget.
struct Left {
    bytes: i64,
    ms: f64,
}

impl Left {
    fn of(items: &[Vec<Candidate>], budgets: &Budgets, choice: &[usize]) -> Self {
        let sums = Sums::of(items, choice);
        Self {
            bytes: budgets.bytes.map_or(i64::MAX / 4, |b| {
                b.cast_signed().min(i64::MAX / 4) - sums.bytes.cast_signed()
            }),
            ms: budgets.ms.map_or(f64::INFINITY, |b| b - sums.ms),
        }
    }

    fn holds(&self, bytes: i64, ms: f64) -> bool {
        bytes <= self.bytes && ms <= self.ms
    }
}

fn upgrade(items: &[Vec<Candidate>], budgets: &Budgets, choice: &mut [usize]) -> bool {
    let left = Left::of(items, budgets, choice);
    let mut ups: Vec<Move> = moves(items, choice)
        .filter(|m| m.saved > 0.0 && left.holds(m.bytes, m.ms))
        .collect();
    ups.sort_by(|a, b| b.saved.total_cmp(&a.saved));
    apply(items, budgets, choice, ups.into_iter().map(|up| vec![up]))
}

/// For each small move up the cheapest small move down of another item that makes room for it: all pairs would be as
/// many as candidates squared.
fn swap(items: &[Vec<Candidate>], budgets: &Budgets, choice: &mut [usize]) -> bool {
    let left = Left::of(items, budgets, choice);
    let (mut ups, mut downs) = (Vec::new(), Vec::new());
    let mut own: Vec<Move> = Vec::new();
    let mut all = moves(items, choice).peekable();
    while let Some(first) = all.next() {
        own.clear();
        own.push(first);
        while let Some(next) = all.next_if(|m| m.item == first.item) {
            own.push(next);
        }
        // The two smallest steps up, and the two down that free something and lose least.
        let mut up: Vec<Move> = own.iter().copied().filter(|m| m.saved > 0.0).collect();
        up.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(b.saved.total_cmp(&a.saved)));
        ups.extend(up.into_iter().take(2));
        let mut down: Vec<Move> = own
            .iter()
            .copied()
            .filter(|m| m.saved <= 0.0 && (m.bytes < 0 || m.ms < 0.0))
            .collect();
        down.sort_by(|a, b| b.saved.total_cmp(&a.saved).then(a.bytes.cmp(&b.bytes)));
        downs.extend(down.into_iter().take(2));
    }
    drop(all);
    // Most bytes freed first; beside each the two least losses so far, of different items.
    downs.sort_by_key(|m| m.bytes);
    let mut cheapest: Vec<[Option<Move>; 2]> = Vec::with_capacity(downs.len());
    let mut best: [Option<Move>; 2] = [None, None];
    for down in &downs {
        let beats = |other: Option<Move>| other.is_none_or(|o| down.saved > o.saved);
        if best[0].is_some_and(|b| b.item == down.item) {
            if beats(best[0]) {
                best[0] = Some(*down);
            }
        } else if beats(best[0]) {
            best = [Some(*down), best[0]];
        } else if beats(best[1]) {
            best[1] = Some(*down);
        }
        cheapest.push(best);
    }
    let mut pairs: Vec<Vec<Move>> = Vec::new();
    for up in ups {
        let enough = downs.partition_point(|d| up.bytes + d.bytes <= left.bytes);
        let Some(found) = enough.checked_sub(1).map(|last| cheapest[last]) else {
            continue;
        };
        let partner = found
            .into_iter()
            .flatten()
            .find(|d| d.item != up.item && left.ms >= up.ms + d.ms);
        if let Some(down) = partner
            && up.saved + down.saved > 0.0
        {
            pairs.push(vec![up, down]);
        }
    }
    pairs.sort_by(|a, b| (b[0].saved + b[1].saved).total_cmp(&(a[0].saved + a[1].saved)));
    apply(items, budgets, choice, pairs.into_iter())
}

/// Applies changes in order where they still fit and touch no item that has changed; true where one did.
fn apply(
    items: &[Vec<Candidate>],
    budgets: &Budgets,
    choice: &mut [usize],
    changes: impl Iterator<Item = Vec<Move>>,
) -> bool {
    let mut left = Left::of(items, budgets, choice);
    let mut touched = vec![false; items.len()];
    let mut changed = false;
    for change in changes {
        let (bytes, ms) = (
            change.iter().map(|m| m.bytes).sum::<i64>(),
            change.iter().map(|m| m.ms).sum::<f64>(),
        );
        if change.iter().any(|m| touched[m.item]) || !left.holds(bytes, ms) {
            continue;
        }
        for m in &change {
            choice[m.item] = m.to;
            touched[m.item] = true;
        }
        left.bytes -= bytes;
        left.ms -= ms;
        changed = true;
    }
    changed
}
