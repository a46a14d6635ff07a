//! The errors of data files.

use std::path::PathBuf;

/// What can be wrong with data: which file, what was found, what was expected.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file system, with the file's name.
    #[error(transparent)]
    Run(#[from] cotk_run::Error),
    /// Nothing of that name where data is looked for.
    #[error("no {what}: looked in {}", looked.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))]
    Missing {
        what: String,
        looked: Vec<PathBuf>,
        help: String,
    },
    /// A file has the wrong length after decompression.
    #[error("{}: {found} bytes{}, expected {expected} ({records} records of {record_bytes} bytes)", file.display(), if *at_least { " or more" } else { "" })]
    Size {
        file: PathBuf,
        found: u64,
        /// Reading stopped at the limit: the file may be longer still.
        at_least: bool,
        expected: u64,
        records: u64,
        record_bytes: u64,
    },
    /// A label that no class has.
    #[error("{}: record {record} has label {found}, expected 0 to {}", file.display(), classes - 1)]
    Label {
        file: PathBuf,
        record: usize,
        found: u8,
        classes: usize,
    },
    /// An archive that liblzma refuses.
    #[error("{}: not a readable xz file: {detail}", file.display())]
    Xz { file: PathBuf, detail: String },
    /// A field of a table that cannot be right.
    #[error("{}: line {line}: `{column}`: found {found}, expected {expected}", file.display())]
    Cell {
        file: PathBuf,
        line: usize,
        column: String,
        found: String,
        expected: String,
    },
    /// A key of the `[data]` section asks for what the data set does not have.
    #[error("data.{key}: {found}, expected {expected}")]
    Section {
        key: &'static str,
        found: String,
        expected: String,
    },
    /// A line that is not JSON of the expected form.
    #[error("{}: line {line}: {detail}", file.display())]
    Line { file: PathBuf, line: usize, detail: String },
    /// A key of a task's item that cannot be right.
    #[error("{}: line {line}: `{key}`: found {found}, expected {expected}", file.display())]
    Item {
        file: PathBuf,
        line: usize,
        key: String,
        found: String,
        expected: String,
    },
    /// A file without a single document or item.
    #[error("{}: no text in it", file.display())]
    Empty { file: PathBuf },
}

/// `Result` with this crate's [`DataError`].
pub type Result<T, E = DataError> = std::result::Result<T, E>;
