//! What can be wrong with a ledger or a baseline.

use std::path::PathBuf;

/// Facts about the failure; what to do next is the program's to say.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system said no.
    #[error(transparent)]
    Run(#[from] cotk_run::Error),
    /// A line that is not a row, and not the torn last one.
    #[error("{}:{line}: not a ledger row: {detail}", file.display())]
    Row { file: PathBuf, line: u64, detail: String },
    /// A baseline that does not parse: `detail` has line, column and caret.
    #[error("baseline {}: {detail}", file.display())]
    Baseline {
        file: PathBuf,
        key: Option<String>,
        nearest: Option<String>,
        detail: String,
    },
    /// A baseline row that cannot gate anything.
    #[error("baseline {}: row {row}: {key} is {found}, expected {expected}", file.display())]
    BaselineRow {
        file: PathBuf,
        /// Subject and metric.
        row: String,
        key: &'static str,
        found: String,
        expected: &'static str,
    },
    /// A baseline without rows (or with measured ones alone, and these were not asked for): passing would mean nothing.
    #[error("baseline {}: found no row to check, expected at least one", file.display())]
    NothingToCheck { file: PathBuf },
    /// polars refused a query that is right: a bug of ours.
    #[error("ledger query failed: {0}")]
    Query(String),
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
