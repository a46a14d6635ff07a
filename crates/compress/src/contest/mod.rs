//! Comparisons: what judges ([`judge`]), and ways to spend a budget of bits beside each other ([`budgets`]).

pub mod budgets;
pub mod entrant;
pub mod judge;
pub mod table;

mod plot;
