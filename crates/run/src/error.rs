//! The errors of files, recipes, journals and run folders.

use std::io;
use std::path::PathBuf;

/// What can go wrong around a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed: what was done to which file, and what the system said.
    #[error("cannot {action} {}: {source}", file.display())]
    Io {
        action: &'static str,
        file: PathBuf,
        source: io::Error,
    },
    /// A file is larger than anything that its reader expects.
    #[error("{}: {found} bytes, expected at most {limit}", file.display())]
    TooLarge { file: PathBuf, found: u64, limit: u64 },
    /// A recipe does not parse: `detail` has line, column and caret.
    #[error("recipe {file}: {detail}")]
    Recipe {
        file: String,
        key: Option<String>,
        nearest: Option<String>,
        detail: String,
    },
    /// A `--set` argument is not `key=value`, or names a key that cannot be set.
    #[error("--set {argument}: {detail}")]
    Set { argument: String, detail: String },
    /// A bare recipe name that is neither a file nor embedded.
    #[error("no recipe `{name}`: neither a file nor one of {}", known.join(", "))]
    NoRecipe { name: String, known: Vec<String> },
    /// Somebody else works in this folder.
    #[error("{}: in use by process {holder}", file.display())]
    Locked { file: PathBuf, holder: String },
    /// A journal line that cannot be read, and is not the torn last one.
    #[error("{}:{line}: {detail}", file.display())]
    Journal { file: PathBuf, line: usize, detail: String },
    /// An unfinished run was started from other inputs.
    #[error("{}: begun with another {what}: found {found}, expected {expected}", file.display())]
    OtherInput {
        file: PathBuf,
        what: &'static str,
        found: String,
        expected: String,
    },
    /// Ctrl-C, or its equivalent.
    #[error("interrupted")]
    Cancelled,
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// For `map_err` on an operation whose file is known: `Error::io("read", path)`.
    pub fn io(action: &'static str, file: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let file = file.into();
        move |source| Self::Io { action, file, source }
    }
}
