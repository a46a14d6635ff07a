//! What can be wrong with a container: file, layer, expert, section, what was found and what was expected.

use std::path::PathBuf;

use cotk_run::units::{ExpertId, LayerId};

/// Errors of reading and writing containers.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// A file operation failed, or a file is larger than any of ours.
    #[error(transparent)]
    Run(#[from] cotk_run::Error),
    /// `manifest.json` is not JSON of the expected form.
    #[error("{}: {detail}", file.display())]
    Manifest { file: PathBuf, detail: String },
    /// Not our format at all, or another version of it.
    #[error("{}: {what} is {found}, expected {expected}", file.display())]
    Version {
        file: PathBuf,
        what: &'static str,
        found: String,
        expected: String,
    },
    /// A number or a name in the manifest that cannot be right.
    #[error("{}: `{key}` is {found}, expected {expected}", file.display())]
    Value {
        file: PathBuf,
        key: String,
        found: String,
        expected: String,
    },
    /// A file of the container has another length than the manifest says.
    #[error("{}: {found} bytes, expected {expected}", file.display())]
    Length { file: PathBuf, found: u64, expected: u64 },
    /// A file's bytes are not those that were written.
    #[error("{}: checksum {found:016x}, expected {expected:016x}", file.display())]
    Checksum { file: PathBuf, found: u64, expected: u64 },
    /// A record's header is damaged, or is another expert's.
    #[error("{}: {layer}, {expert}: record header: {what} is {found}, expected {expected}", file.display())]
    Header {
        file: PathBuf,
        layer: LayerId,
        expert: ExpertId,
        what: &'static str,
        found: String,
        expected: String,
    },
    /// A section's bytes are not those that were written.
    #[error("{}: {layer}, {expert}, section {section}: checksum {found:016x}, expected {expected:016x}", file.display())]
    Section {
        file: PathBuf,
        layer: LayerId,
        expert: ExpertId,
        section: usize,
        found: u64,
        expected: u64,
    },
    /// A scale (or a value of a constant) that is NaN or infinite: whole bytes, and no weight.
    #[error("{}: {layer}, {expert}: {what} has a scale of {found} in row {row}, expected a finite number", file.display())]
    Scale {
        file: PathBuf,
        layer: LayerId,
        expert: ExpertId,
        /// A matrix, one of its factors, or a constant.
        what: String,
        row: usize,
        found: f32,
    },
    /// A GGUF file that is not whole, or cannot be written so; `what` is a key, a tensor or a field of the head.
    #[error("{}: `{what}`: found {found}, expected {expected}", file.display())]
    Gguf {
        file: PathBuf,
        what: String,
        found: String,
        expected: String,
    },
    /// Matrices that cannot stand in one record.
    #[error("{layer}, {expert}: {what}: found {found}, expected {expected}")]
    Unwritable {
        layer: LayerId,
        expert: ExpertId,
        what: String,
        found: String,
        expected: String,
    },
}

/// `Result` with this crate's [`ContainerError`].
pub type Result<T, E = ContainerError> = std::result::Result<T, E>;
