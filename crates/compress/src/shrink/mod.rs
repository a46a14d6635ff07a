//! Smaller experts in the place of fewer: inner channels removed one by one while the others take over (OBS), factors of
//! low rank, and how much of which expert goes, by what it costs at the model's end. Law: what a plan says to be gone is
//! gone from the matrices that are built; sums do not depend on threads.

pub mod judge;
pub mod plan;
pub mod recipe;
pub mod slim;

mod apply;
pub(crate) mod build;
#[cfg(test)]
mod laws;
pub mod moments;
pub mod survey;
#[cfg(test)]
mod whole_laws;

pub use self::slim::{Slim, Slimmed, slim};
