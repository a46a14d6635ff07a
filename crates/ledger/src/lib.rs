//! Append-only rows of measured facts, baselines and tolerances: the only crate with polars, which stays inside
//! (`frame.rs`). Decides nothing about what is measured: libraries hand facts to a `FactSink`, commands build the
//! [`LedgerSink`], `cotk check` compares. Law: a row that was recorded reads back to the same bits, and no row is ever
//! rewritten.

#![forbid(unsafe_code)]

pub mod baseline;
pub mod check;
mod error;
mod frame;
mod row;
mod sink;

pub use self::error::{Error, Result};
pub use self::frame::Ledger;
pub use self::row::{Provenance, Row};
pub use self::sink::{LedgerSink, default_folder};
