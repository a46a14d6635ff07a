//! Which experts go: statistics of the calibration stream, the exact loss of a mask, searches, ratios per layer, and
//! what whole models lose. Not here: codes of what is kept (`stage`), bytes (`decide`).

pub mod compare;
pub mod gram;
pub mod mask;
pub mod plan;
pub mod ratios;
pub mod recipe;
pub mod rows;
pub mod search;
pub mod survey;
pub mod walk;

pub(crate) mod experts;
mod field;
mod genetic;
#[cfg(test)]
mod laws;
pub(crate) mod probe;
