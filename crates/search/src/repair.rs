//! From what the gates say to a network that meets its limits: single moves, the cheapest in loss per cost first, then
//! whatever still fits and helps. Judges moves by exact forward passes, their statistics recalibrated. Law: it ends inside
//! the limits, or says that no network is.

use crate::cost::Costs;
use crate::cost::Quantity;
use crate::method::{Drive, Limit};
use crate::space::Point;
use crate::space::Space;
use crate::{Result, SearchError};

/// Validation images a judgement looks at.
const IMAGES: usize = 384;
/// Moves judged in a round while a limit is broken, and moves in all.
const SHORTLIST: usize = 6;
const MOVES: usize = 60;
/// A network and the last ones before it are not gone back to.
const TABU: usize = 4;
/// Room below a limit that is worth filling.
const SLACK: f64 = 0.01;

/// What was done.
#[derive(Debug, Clone, PartialEq)]
pub struct Repaired {
    pub point: Point,
    pub moves: usize,
    /// Validation loss and accuracy on shared weights.
    pub loss: f64,
    pub accuracy: f64,
}

/// Moves `start` inside `limits`.
///
/// # Errors
/// [`SearchError::OutOfReach`] when no network of the space is inside.
pub fn repair(drive: &mut Drive<'_>, start: &Point, limits: &[Limit]) -> Result<Repaired> {
    reachable(drive.space, drive.costs, limits)?;
    let mut point = start.clone();
    let mut past = vec![point.clone()];
    let mut score = drive.judge(&point, IMAGES)?;
    let (mut moves, mut evaluations) = (0, 0);
    while moves < MOVES {
        drive.cancel.check()?;
        let worst = worst(drive, &point, limits)?;
        let broken = worst.filter(|(_, ratio)| *ratio > 1.0);
        let spare = drive.recipe.search.repair_evaluations.saturating_sub(evaluations);
        let Some(limit) = broken.map(|(limit, _)| limit).or_else(|| worst.map(|(limit, _)| limit)) else {
            break; // no limits: nothing to repair
        };
        let candidates = candidates(drive, &point, limit, limits, broken.is_some(), &past)?;
        if broken.is_none() && (spare < candidates.len() || worst.is_some_and(|(_, ratio)| ratio > 1.0 - SLACK)) {
            break;
        }
        let mut best: Option<(f64, Point, crate::trainable::Score)> = None;
        for (gain, candidate) in candidates {
            // With nothing left to spend, cost alone decides: largest gain first.
            if spare == 0 {
                if best.is_none() {
                    best = Some((0.0, candidate, score));
                }
                continue;
            }
            let judged = drive.judge(&candidate, IMAGES)?;
            evaluations += 1;
            let price = (judged.loss() - score.loss()) / gain.max(1e-12);
            if best.as_ref().is_none_or(|(least, ..)| price < *least) {
                best = Some((price, candidate, judged));
            }
        }
        match best {
            Some((_, candidate, judged)) if broken.is_some() || judged.loss() < score.loss() => {
                point = candidate;
                score = judged;
                past.push(point.clone());
                moves += 1;
            }
            _ => break,
        }
    }
    if worst(drive, &point, limits)?.is_some_and(|(_, ratio)| ratio > 1.0) {
        // Moves ran out in a corner: the cheapest network by the limit that is hardest to meet is inside (checked above
        // for each limit alone; with several limits the smallest network is tried last).
        point = drive.space.smallest();
        if let Some((limit, ratio)) = worst(drive, &point, limits)?.filter(|(_, ratio)| *ratio > 1.0) {
            return Err(out_of_reach(drive.space, limit, &point, ratio * limit.target));
        }
        score = drive.judge(&point, IMAGES)?;
    }
    Ok(Repaired {
        point,
        moves,
        loss: score.loss(),
        accuracy: score.accuracy(),
    })
}

/// Refuses limits that no network meets, with the one that comes nearest.
///
/// # Errors
/// [`SearchError::OutOfReach`].
pub fn reachable(space: &Space, costs: &Costs, limits: &[Limit]) -> Result<()> {
    for limit in limits {
        let (point, cost) = costs.cheapest(limit.quantity)?;
        if cost > limit.target {
            return Err(out_of_reach(space, *limit, &point, cost));
        }
    }
    Ok(())
}

fn out_of_reach(space: &Space, limit: Limit, point: &Point, best: f64) -> SearchError {
    let (what, unit) = match limit.quantity {
        Quantity::Ms => ("target_ms", "ms"),
        Quantity::Bytes => ("bytes", "bytes"),
    };
    SearchError::OutOfReach {
        what,
        target: limit.target,
        best,
        unit,
        encoding: space.encode(point),
    }
}

/// The limit with the largest cost over target.
fn worst(drive: &Drive<'_>, point: &Point, limits: &[Limit]) -> Result<Option<(Limit, f64)>> {
    let mut worst: Option<(Limit, f64)> = None;
    for &limit in limits {
        let ratio = drive.costs.at(limit.quantity, point)? / limit.target;
        if worst.is_none_or(|(_, most)| ratio > most) {
            worst = Some((limit, ratio));
        }
    }
    Ok(worst)
}

/// Single moves: while broken, those that lower the broken cost; else those that raise some cost and stay inside. With how
/// much they change, largest first; at most a shortlist.
fn candidates(
    drive: &Drive<'_>,
    point: &Point,
    limit: Limit,
    limits: &[Limit],
    is_broken: bool,
    past: &[Point],
) -> Result<Vec<(f64, Point)>> {
    let tabu = &past[past.len().saturating_sub(TABU)..];
    let mut found = Vec::new();
    for candidate in drive.space.moves(point) {
        if tabu.contains(&candidate) {
            continue;
        }
        if is_broken {
            let gain =
                (drive.costs.at(limit.quantity, point)? - drive.costs.at(limit.quantity, &candidate)?) / limit.target;
            if gain > 0.0 {
                found.push((gain, candidate));
            }
        } else {
            let is_inside = worst(drive, &candidate, limits)?.is_none_or(|(_, ratio)| ratio <= 1.0);
            let grows = drive.costs.at(Quantity::Bytes, &candidate)? > drive.costs.at(Quantity::Bytes, point)?;
            if is_inside && grows {
                found.push((1.0, candidate));
            }
        }
    }
    // Stable, so that equal gains stay in the order of moves.
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    if is_broken {
        found.truncate(SHORTLIST);
    }
    Ok(found)
}
