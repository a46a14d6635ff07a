//! Finds ONNX Runtime and opens it once per process, by absolute path: `$COTK_ORT_LIB`, then `.deps/onnxruntime` upwards of
//! the working folder and of the program, the user's cache, beside the program. `ort` itself would panic without a library.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use ort::environment::Environment;

use crate::{Error, Result};

/// The version that `cargo xtask setup` fetches; 1.24 and newer work.
const CACHE_FOLDER: &str = "onnxruntime-1.31.1";

struct Open {
    environment: Environment,
    library: PathBuf,
}

/// The one environment of this process.
pub(crate) fn environment() -> Result<&'static Environment> {
    open().map(|o| &o.environment)
}

/// The library that is used, opened if it is not yet.
///
/// # Errors
/// [`Error::NoLibrary`], [`Error::Load`].
pub fn library() -> Result<&'static Path> {
    open().map(|o| o.library.as_path())
}

/// Version of the library, `1.31.1`.
///
/// # Errors
/// As [`library`].
pub fn version() -> Result<String> {
    let library = library()?;
    // The file carries it; a library of another name tells it in the build information.
    let name = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if let Some(version) = name.split(".so.").nth(1) {
        return Ok(version.to_owned());
    }
    let info = ort::info();
    let version = info
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .find(|w| w.split('.').count() == 3);
    Ok(version.map_or_else(|| format!("api {}", ort::MINOR_VERSION), str::to_owned))
}

fn open() -> Result<&'static Open> {
    static OPEN: OnceLock<Open> = OnceLock::new();
    // A failure is not kept: it is told again to whoever asks again.
    static TRYING: Mutex<()> = Mutex::new(());
    let _one = TRYING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(open) = OPEN.get() {
        return Ok(open);
    }
    let library = find(std::env::var_os("COTK_ORT_LIB").map(PathBuf::from))?;
    let fail = |detail: String| Error::Load {
        file: library.clone(),
        detail,
    };
    let environment = ort::init_from(&library)
        .map_err(|e| fail(e.to_string()))?
        .with_name("cotk")
        .with_telemetry(false)
        .build()
        .map_err(|e| fail(e.to_string()))?;
    Ok(OPEN.get_or_init(|| Open { environment, library }))
}

/// The library's file. A path in `asked` is the only one looked at.
fn find(asked: Option<PathBuf>) -> Result<PathBuf> {
    let looked_at = match asked.filter(|p| !p.as_os_str().is_empty()) {
        Some(path) => vec![path],
        None => places(),
    };
    match looked_at.iter().find_map(|place| library_in(place)) {
        Some(found) => Ok(std::path::absolute(&found).unwrap_or(found)),
        None => Err(Error::NoLibrary { looked_at }),
    }
}

fn places() -> Vec<PathBuf> {
    let program = std::env::current_exe().ok();
    let working = std::env::current_dir().ok();
    let upwards = |from: &Option<PathBuf>| -> Vec<PathBuf> {
        let folders = from.iter().flat_map(|p| p.ancestors());
        folders
            .map(|p| p.join(".deps/onnxruntime"))
            .filter(|p| p.exists())
            .collect()
    };
    let mut places = upwards(&working);
    places.extend(upwards(&program));
    if places.is_empty() {
        places.push(".deps/onnxruntime".into());
    }
    places.extend(cotk_run::files::cache_folder().map(|c| c.join(CACHE_FOLDER)));
    places.extend(program.iter().filter_map(|p| Some(p.parent()?.to_owned())));
    places
}

/// A library file itself, or the first `libonnxruntime.so*` of a folder.
fn library_in(place: &Path) -> Option<PathBuf> {
    if place.is_file() {
        return Some(place.to_owned());
    }
    let mut names: Vec<PathBuf> = std::fs::read_dir(place)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name == "libonnxruntime.so" || name.starts_with("libonnxruntime.so.") || name == "libonnxruntime.dylib"
        })
        .collect();
    names.sort();
    names.pop()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_every_place() {
        let error = find(Some("/nowhere/libonnxruntime.so".into())).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no ONNX Runtime library: looked at /nowhere/libonnxruntime.so"
        );
    }
}
