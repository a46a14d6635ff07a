//! Genetic search over masks of a fixed count: children are subsets of the union of two parents, mutation swaps experts,
//! the best survive, no mask is worked out twice (reference: moe-compression 2 and 4).

use cotk_run::seeds::Stream;
use rand::RngExt;

use super::mask::Mask;
use super::search::{Tried, below};

/// How a population lives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Habits {
    pub(super) population: usize,
    pub(super) generations: usize,
    /// Generations without gain after which it ends.
    pub(super) patience: usize,
    /// Best masks that live on as they are.
    pub(super) elites: usize,
    /// Best masks that have children.
    pub(super) parents: usize,
    /// Share of children that mutate.
    pub(super) mutating: f64,
    /// Swaps of one mutation at most; at least one.
    pub(super) swaps: usize,
}

/// Ours: seeded, so that it may stop early.
pub(super) const OURS: Habits = Habits {
    population: 64,
    generations: 50,
    patience: 8,
    elites: 4,
    parents: 16,
    mutating: 0.5,
    swaps: 3,
};

/// As a public re-implementation of MoE-I² states them: 100 masks, 50 rounds, the best fifth are parents and live on.
pub(super) const PAPER: Habits = Habits {
    population: 100,
    generations: 50,
    patience: 50,
    elites: 20,
    parents: 20,
    mutating: 0.3,
    swaps: 2,
};

/// The best mask of `count` experts that was found.
pub(super) fn evolve(
    tried: &mut Tried<'_>,
    experts: usize,
    count: usize,
    seeds: &[Mask],
    habits: &Habits,
    stream: &mut Stream,
) -> Mask {
    let everybody: Vec<usize> = (0..experts).collect();
    let mut population: Vec<Mask> = Vec::with_capacity(habits.population);
    seeds.iter().for_each(|seed| insert(&mut population, seed.clone()));
    fill(&mut population, habits.population, || {
        drawn(&everybody, experts, count, stream)
    });
    let mut best = f64::INFINITY;
    let mut idle = 0;
    for _ in 0..habits.generations {
        sort(tried, &mut population);
        let found = tried.all(&population[..1])[0];
        idle = if found < best { 0 } else { idle + 1 };
        best = best.min(found);
        if idle >= habits.patience {
            break;
        }
        let parents = population[..habits.parents.min(population.len())].to_vec();
        population.truncate(habits.elites);
        fill(&mut population, habits.population, || {
            let (a, b) = (
                &parents[below(stream, parents.len())],
                &parents[below(stream, parents.len())],
            );
            let mut union = a.dropped();
            union.extend(b.dropped().into_iter().filter(|&expert| !a.is_dropped(expert)));
            let child = drawn(&union, experts, count, stream);
            if stream.random_bool(habits.mutating) {
                mutated(child, habits.swaps, stream)
            } else {
                child
            }
        });
    }
    sort(tried, &mut population);
    population.swap_remove(0)
}

/// Best first; ties in an order of their own, so that threads cannot matter.
fn sort(tried: &mut Tried<'_>, population: &mut Vec<Mask>) {
    let losses = tried.all(population);
    let mut both: Vec<(f64, Mask)> = losses.into_iter().zip(population.drain(..)).collect();
    both.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
    population.extend(both.into_iter().map(|(_, mask)| mask));
}

/// Draws until there are enough; gives up where there are too few different masks.
fn fill(population: &mut Vec<Mask>, size: usize, mut draw: impl FnMut() -> Mask) {
    for _ in 0..4 * size {
        if population.len() >= size {
            break;
        }
        insert(population, draw());
    }
}

fn insert(population: &mut Vec<Mask>, mask: Mask) {
    if !population.contains(&mask) {
        population.push(mask);
    }
}

/// `count` of `from`, drawn (the first steps of a Fisher–Yates shuffle).
pub(super) fn drawn(from: &[usize], experts: usize, count: usize, stream: &mut Stream) -> Mask {
    let mut from = from.to_vec();
    for at in 0..count {
        let other = at + below(stream, from.len() - at);
        from.swap(at, other);
    }
    Mask::of(experts, from.into_iter().take(count))
}

fn mutated(mut mask: Mask, most: usize, stream: &mut Stream) -> Mask {
    for _ in 0..1 + below(stream, most) {
        let (dropped, kept) = (mask.dropped(), mask.kept());
        if dropped.is_empty() || kept.is_empty() {
            break;
        }
        mask = mask.swapped(dropped[below(stream, dropped.len())], kept[below(stream, kept.len())]);
    }
    mask
}
