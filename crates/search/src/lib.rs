//! Architecture spaces as values, methods, constraints, and the derive-repair-fine-tune-measure loop over a `Trainable`.
//!
//! `recipe` (what is asked) · `space` (what may be chosen) · `cost` (expected ms and bytes) · `gates` and `constraint`
//! (how the choice is pulled) · `method` · `repair` · `pipeline` (the whole way, read it first) · `export`, `measure`,
//! `report`, `refit` (a wrong prediction joins the profile). No autograd: that is `supernet`'s.

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod constraint;
pub mod cost;
pub mod export;
pub mod gates;
pub mod measure;
pub mod method;
pub mod pipeline;
pub mod plan;
pub mod profile;
pub mod recipe;
pub mod refit;
pub mod repair;
pub mod report;
pub mod result;
pub mod space;
pub mod trainable;

mod error;

pub use self::error::{Result, SearchError};
