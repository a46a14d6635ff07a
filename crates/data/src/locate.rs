//! Where large data is looked for: beside the checkout, in `$COTK_DATA`, in `data/`. First hit wins.

use std::path::PathBuf;

use crate::{DataError, Result};

/// The folders, in the order in which they are searched.
pub fn folders() -> Vec<PathBuf> {
    let named = std::env::var_os("COTK_DATA").filter(|v| !v.is_empty());
    [
        Some("../shared/data".into()),
        named.map(PathBuf::from),
        Some("data".into()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The first existing `<folder>/<name>`.
///
/// # Errors
/// [`DataError::Missing`] with every place that was looked at, and `help` on how to get it.
pub fn locate(name: &str, help: &str) -> Result<PathBuf> {
    let looked: Vec<PathBuf> = folders().into_iter().map(|folder| folder.join(name)).collect();
    match looked.iter().find(|path| path.exists()) {
        Some(path) => Ok(path.clone()),
        None => Err(DataError::Missing {
            what: name.to_owned(),
            looked,
            help: help.to_owned(),
        }),
    }
}
