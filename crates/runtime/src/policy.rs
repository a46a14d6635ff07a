//! Decisions: at which width a chosen expert runs, what stays in memory. No I/O, no clock of their own. Law: equal
//! questions in equal order get equal answers.

use cotk_run::units::{ExpertId, LayerId};

/// One expert of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    pub layer: LayerId,
    pub expert: ExpertId,
}

/// What a mode knows when it decides about one chosen expert of one token.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    pub place: Place,
    /// 0 for the expert with the largest gate.
    pub slot: usize,
    pub gate: f32,
    /// Sum over the token's slots.
    pub gate_sum: f32,
    /// Width that is in memory; 0 for a miss.
    pub held_bits: u32,
}

/// What becomes of a chosen expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// As stored.
    Full,
    /// Its widest prefix of at most this many bits, its narrowest if none is.
    AtMost(u32),
    /// Not computed.
    Skip,
}

/// Decides the width of each chosen expert.
pub trait RoutingMode: Send + Sync {
    /// As requests and tables spell it.
    fn name(&self) -> &'static str;

    /// Decides about one chosen expert of one token.
    fn width(&self, choice: &Choice) -> Width;
}

/// Every expert as it is stored.
#[derive(Debug, Clone, Copy, Default)]
pub struct Exact;

impl RoutingMode for Exact {
    fn name(&self) -> &'static str {
        "exact"
    }

    fn width(&self, _choice: &Choice) -> Width {
        Width::Full
    }
}

/// Every expert by its short prefix.
#[derive(Debug, Clone, Copy)]
pub struct Little {
    /// `little_bits` of the manifest.
    pub bits: u32,
}

impl RoutingMode for Little {
    fn name(&self) -> &'static str {
        "little"
    }

    fn width(&self, _choice: &Choice) -> Width {
        Width::AtMost(self.bits)
    }
}

/// Decides what stays in memory.
pub trait CachePolicy: Send + Sync {
    /// Width of an expert's planes in memory, of `stored_bits`; 0: a miss.
    fn held_bits(&self, place: Place, stored_bits: u32) -> u32;

    /// An expert was used at `bits` in a step that its caller counts.
    fn on_use(&mut self, place: Place, step: u64, gate: f32, bits: u32);

    /// Router scores of all experts of a layer for one token.
    fn on_scores(&mut self, layer: LayerId, scores: &[f32]);

    /// What keeping it is worth now: the smallest of those not in use goes first, ties by place.
    fn worth(&self, place: Place, step: u64) -> f32;
}

/// Everything is in memory: nothing is ever evicted.
#[derive(Debug, Clone, Copy, Default)]
pub struct AllHit;

impl CachePolicy for AllHit {
    fn held_bits(&self, _place: Place, stored_bits: u32) -> u32 {
        stored_bits
    }

    fn on_use(&mut self, _place: Place, _step: u64, _gate: f32, _bits: u32) {}

    fn on_scores(&mut self, _layer: LayerId, _scores: &[f32]) {}

    fn worth(&self, _place: Place, _step: u64) -> f32 {
        f32::INFINITY
    }
}
