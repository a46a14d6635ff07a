//! The errors of graphs, profiles, fits and probes.

use std::path::PathBuf;

/// What can go wrong when something is described, measured, read or predicted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder operation failed.
    #[error(transparent)]
    Run(#[from] cotk_run::Error),
    /// A graph that cannot be run: which node, what was found, what was expected.
    #[error("graph `{graph}`: node `{node}`: {what}: found {found}, expected {expected}")]
    Graph {
        graph: String,
        node: String,
        what: &'static str,
        found: String,
        expected: String,
    },
    /// No row and no coefficients for this kind of operator: nothing honest can be said.
    #[error("profile `{profile}` has no measurement of `{path}` (needed for {key})")]
    NotMeasured { profile: String, path: String, key: String },
    /// Kinds of operators, by name, without which whatever it is needed for cannot be predicted.
    #[error("profile `{profile}` lacks {}: needed for {needed_for}", lacks.join(", "))]
    Lacks {
        profile: String,
        lacks: Vec<String>,
        needed_for: String,
    },
    /// A line of a profile's file that cannot be right.
    #[error("{}:{line}: {what}: found {found}, expected {expected}", file.display())]
    Line {
        file: PathBuf,
        line: u64,
        what: String,
        found: String,
        expected: String,
    },
    /// A profile's TOML file that does not parse (`detail` has line and caret), or another format version.
    #[error("{}: {detail}", file.display())]
    Format { file: PathBuf, detail: String },
    /// The profile was measured on another machine or with other versions.
    #[error("{}: measured on another machine: {}", folder.display(), list(differences))]
    OtherMachine {
        folder: PathBuf,
        differences: Vec<Difference>,
    },
    /// No profile at any of the places where one is looked for.
    #[error("no profile: looked at {}", looked_at.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))]
    NoProfile { looked_at: Vec<PathBuf> },
    /// A probe could not prepare or run a key.
    #[error("probe `{probe}`, {key}: {detail}")]
    Probe { probe: String, key: String, detail: String },
    /// An expectation table whose sizes do not fit together, or probabilities that are none.
    #[error("expectation of `{term}`: {what}: found {found}, expected {expected}")]
    Expectation {
        term: String,
        what: &'static str,
        found: String,
        expected: String,
    },
}

/// One field of the machine's identity that is not what the profile says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub field: &'static str,
    /// In the profile.
    pub profile: String,
    /// On this machine.
    pub here: String,
}

fn list(differences: &[Difference]) -> String {
    let one = |d: &Difference| format!("{} is {} there, {} here", d.field, d.profile, d.here);
    differences.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
