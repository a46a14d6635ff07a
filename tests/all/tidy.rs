//! What review would otherwise repeat, as tests: module docs, crate arrows as drawn, a script beside each golden,
//! no machine's paths, file sizes, nothing left open, and a `cotk` that starts without libtorch.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::elf::needed_libraries;
use crate::program::in_repository;

/// DESIGN 2, last column: what a crate may use (`run` for all). One row a crate; a new arrow is the dearest change.
const ARROWS: &[(&str, &[&str])] = &[
    ("run", &[]),
    ("ledger", &[]),
    ("data", &[]),
    ("latency", &[]),
    ("linalg", &[]),
    ("quant", &["linalg"]),
    ("kernels", &["quant", "latency"]),
    ("container", &["quant"]),
    ("model", &["container", "kernels", "data"]),
    ("runtime", &["model", "container", "kernels", "latency"]),
    (
        "compress",
        &["runtime", "model", "container", "quant", "linalg", "latency", "data"],
    ),
    ("serve", &["runtime", "model"]),
    ("onnx", &["latency"]),
    ("search", &["latency", "onnx", "data"]),
    ("supernet", &["search", "linalg", "data"]),
    ("federate", &["search"]),
];

/// Heavy libraries have one home each.
const HOMES: &[(&str, &[&str])] = &[
    ("polars", &["ledger"]),
    ("polars-io", &["ledger"]),
    ("tch", &["supernet"]),
    ("ort", &["onnx"]),
    ("cudarc", &["kernels", "runtime"]),
    ("faer", &["linalg"]),
    ("ndarray-linalg", &["linalg"]),
    ("axum", &["serve"]),
    ("tokenizers", &["model"]),
    ("clap", &["cotk"]),
    ("indicatif", &["cotk"]),
];

/// Crates that hold kernels, map files, lock them or open libraries; all others forbid `unsafe`.
const MAY_BE_UNSAFE: &[&str] = &[
    "run",
    "kernels",
    "container",
    "model",
    "runtime",
    "onnx",
    "latency",
    "supernet",
    "serve",
];

const LINES_AT_MOST: usize = 800;

/// Files that git tracks (all files outside a checkout), as paths in the repository.
fn tracked() -> Vec<PathBuf> {
    let git = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(in_repository(""))
        .output();
    let mut files: Vec<PathBuf> = match git {
        Ok(output) if output.status.success() => String::from_utf8(output.stdout)
            .expect("UTF-8 names")
            .split_terminator('\0')
            .map(PathBuf::from)
            .filter(|path| in_repository(path).is_file())
            .collect(),
        _ => walk(),
    };
    files.sort();
    assert!(files.len() > 50, "the repository has more files than {}", files.len());
    files
}

fn walk() -> Vec<PathBuf> {
    let (root, mut found) = (in_repository(""), Vec::new());
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of the repository") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if !["target", "runs", ".git", ".deps", "__pycache__"].contains(&name.as_str()) {
                    folders.push(path);
                }
            } else {
                found.push(path.strip_prefix(&root).expect("below").to_owned());
            }
        }
    }
    found
}

/// Tracked UTF-8 files with their text.
fn texts() -> Vec<(PathBuf, String)> {
    let text = |path: PathBuf| {
        let bytes = fs_err::read(in_repository(&path)).expect("a tracked file");
        String::from_utf8(bytes).ok().map(|text| (path, text))
    };
    tracked().into_iter().filter_map(text).collect()
}

fn extension(path: &Path) -> &str {
    path.extension().and_then(|e| e.to_str()).unwrap_or_default()
}

fn rust_files() -> Vec<(PathBuf, String)> {
    texts()
        .into_iter()
        .filter(|(path, _)| extension(path) == "rs")
        .collect()
}

/// Manifests of the members: crate name (`run`, `xtask`, `cotk` for the root) and content.
fn manifests() -> BTreeMap<String, toml::Table> {
    let read =
        |path: &Path| toml::from_str::<toml::Table>(&fs_err::read_to_string(path).expect("a manifest")).expect("TOML");
    let mut found = BTreeMap::from([("cotk".to_owned(), read(&in_repository("Cargo.toml")))]);
    for entry in std::fs::read_dir(in_repository("crates")).expect("crates/") {
        let path = entry.expect("an entry").path();
        let file = path.join("Cargo.toml");
        if file.exists() {
            found.insert(
                path.file_name().expect("a name").to_string_lossy().into_owned(),
                read(&file),
            );
        }
    }
    found.insert("xtask".to_owned(), read(&in_repository("xtask/Cargo.toml")));
    found
}

fn dependencies(manifest: &toml::Table) -> BTreeSet<String> {
    let table = |key: &str| {
        manifest
            .get(key)
            .and_then(toml::Value::as_table)
            .cloned()
            .unwrap_or_default()
    };
    table("dependencies")
        .into_iter()
        .chain(table("build-dependencies"))
        .map(|(name, _)| name)
        .collect()
}

/// Says all of them at once.
#[track_caller]
fn none(found: Vec<String>, what: &str) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn every_source_file_begins_with_what_it_is() {
    let missing = rust_files().into_iter().filter(|(_, text)| !text.starts_with("//!"));
    none(
        missing.map(|(path, _)| path.display().to_string()).collect(),
        "no module docs on the first line",
    );
    let scripts = texts().into_iter().filter(|(path, text)| {
        let first = text
            .lines()
            .find(|line| !line.starts_with("#!") && !line.is_empty())
            .unwrap_or_default();
        match extension(path) {
            "py" => !first.starts_with("\"\"\"") && !first.starts_with('#'),
            "cu" => !first.starts_with("//") && !first.starts_with("/*"),
            _ => false,
        }
    });
    none(
        scripts.map(|(path, _)| path.display().to_string()).collect(),
        "no word on what it is",
    );
}

#[test]
fn crates_use_what_the_design_draws() {
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut wrong = Vec::new();
    for (name, manifest) in manifests() {
        let ours: Vec<String> = dependencies(&manifest)
            .iter()
            .filter_map(|d| d.strip_prefix("cotk-").map(str::to_owned))
            .collect();
        match name.as_str() {
            "cotk" => {}
            "xtask" => wrong.extend(ours.iter().map(|to| format!("xtask -> {to}"))),
            _ => match allowed.get(name.as_str()) {
                None => wrong.push(format!("{name} stands in no row of the table")),
                Some(list) => {
                    let is_drawn = |to: &&String| to.as_str() == "run" && name != "run" || list.contains(&to.as_str());
                    wrong.extend(
                        ours.iter()
                            .filter(|to| !is_drawn(to))
                            .map(|to| format!("{name} -> {to}")),
                    );
                }
            },
        }
    }
    none(wrong, "arrows that the design does not draw");
}

#[test]
fn the_drawn_arrows_make_no_circle() {
    // Rows stand below what they use: each arrow points to a row above.
    for (at, (name, uses)) in ARROWS.iter().enumerate() {
        for to in *uses {
            assert!(ARROWS[..at].iter().any(|(above, _)| above == to), "{name} -> {to}");
        }
    }
}

#[test]
fn heavy_libraries_have_one_home() {
    let homes: BTreeMap<&str, &[&str]> = HOMES.iter().copied().collect();
    let mut wrong = Vec::new();
    for (name, manifest) in manifests() {
        for library in dependencies(&manifest) {
            if homes
                .get(library.as_str())
                .is_some_and(|home| !home.contains(&name.as_str()))
            {
                wrong.push(format!("{name} -> {library}"));
            }
        }
    }
    none(wrong, "libraries away from their home");
}

#[test]
fn every_crate_has_the_workspace_lints_and_forbids_unsafe_or_needs_it() {
    let mut wrong = Vec::new();
    for (name, manifest) in manifests() {
        if manifest
            .get("lints")
            .and_then(|l| l.get("workspace"))
            .and_then(toml::Value::as_bool)
            != Some(true)
        {
            wrong.push(format!("{name}: no `[lints] workspace = true`"));
        }
        let lib = in_repository(format!("crates/{name}/src/lib.rs"));
        if lib.exists() && !MAY_BE_UNSAFE.contains(&name.as_str()) {
            let text = fs_err::read_to_string(&lib).expect("lib.rs");
            if !text.contains("#![forbid(unsafe_code)]") {
                wrong.push(format!("{name}: lib.rs does not forbid unsafe code"));
            }
        }
    }
    none(wrong, "lints");
}

#[test]
fn no_file_is_longer_than_one_idea() {
    let long = texts().into_iter().filter_map(|(path, text)| {
        let lines = text.lines().count();
        // Tables and lists that were measured are looked up, not read.
        let is_measured = path.starts_with("profiles") || path.starts_with("benches/results");
        let is_ours = ["rs", "cu", "py", "toml", "md", "sh"].contains(&extension(&path)) && !is_measured;
        (is_ours && lines > LINES_AT_MOST).then(|| format!("{}: {lines} lines", path.display()))
    });
    none(long.collect(), "longer than 800 lines");
}

#[test]
fn nothing_is_left_open() {
    // In pieces, so that this file does not find itself.
    let patterns = [
        ["todo", "!("],
        ["unimplemented", "!("],
        ["dbg", "!("],
        ["#[", "ignore"],
        ["FIX", "ME"],
    ]
    .map(|p| p.concat());
    let mut found = Vec::new();
    for (path, text) in rust_files() {
        for (number, line) in text.lines().enumerate() {
            found.extend(
                patterns
                    .iter()
                    .filter(|p| line.contains(p.as_str()))
                    .map(|p| format!("{}:{}: {p}", path.display(), number + 1)),
            );
        }
    }
    none(found, "left open");
}

#[test]
fn no_file_names_a_machine_or_a_package_index() {
    let folders = [["/ro", "ot/"], ["/ho", "me/"], ["/wo", "rk/"], ["/Us", "ers/"]].map(|p| p.concat());
    let hosts = [
        ["pypi", ".org"],
        ["pythonhosted", ".org"],
        ["index.crates", ".io"],
        ["static.crates", ".io"],
        ["download.pytorch", ".org"],
    ]
    .map(|p| p.concat());
    let mut found = Vec::new();
    for (path, text) in texts() {
        if path.file_name().is_some_and(|name| name == "Cargo.lock") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            // A path of a machine begins a word: `data/work/x` and `~/home/x` are none.
            let starts_word = |p: &String| {
                line.match_indices(p.as_str())
                    .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-~}/)*".contains(c)))
            };
            found.extend(
                (folders.iter().filter(|p| starts_word(p)))
                    .chain(hosts.iter().filter(|p| line.contains(p.as_str())))
                    .map(|p| format!("{}:{}: {p}", path.display(), number + 1)),
            );
        }
    }
    none(found, "paths or hosts of one machine");
}

#[test]
fn every_golden_has_the_script_that_made_it() {
    let files = tracked();
    let is_script = |path: &Path| ["py", "sh"].contains(&extension(path));
    // A script in the golden's folder or one above it, within the place of goldens.
    let has_script = |golden: &Path, place: &Path| {
        golden
            .ancestors()
            .skip(1)
            .take_while(|folder| folder.starts_with(place))
            .any(|folder| files.iter().any(|f| f.parent() == Some(folder) && is_script(f)))
    };
    let mut missing = Vec::new();
    for file in &files {
        for place in ["tests/goldens", "data"].map(Path::new) {
            let is_golden = file.starts_with(place) && !is_script(file) && extension(file) != "md";
            if is_golden && !has_script(file, place) {
                missing.push(file.display().to_string());
            }
        }
        // PTX has its CUDA source beside it.
        if extension(file) == "ptx" && !files.contains(&file.with_extension("cu")) {
            missing.push(file.display().to_string());
        }
    }
    none(missing, "no script beside");
}

#[test]
fn only_the_trainer_names_what_links_libtorch() {
    let named = |text: &str, name: &str| {
        text.match_indices(name)
            .any(|(at, _)| !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
    };
    let names = [["cotk_", "supernet"], ["tc", "h::"]].map(|p| p.concat());
    let is_trainer = |path: &Path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("train"))
            || path.starts_with("crates/cotk/train")
    };
    let found = rust_files()
        .into_iter()
        .filter(|(path, _)| path.starts_with("crates/cotk") && !is_trainer(path))
        .filter(|(_, text)| names.iter().any(|name| named(text, name)));
    none(
        found.map(|(path, _)| path.display().to_string()).collect(),
        "names libtorch",
    );
}

#[test]
fn cotk_starts_without_libtorch_and_without_onnx_runtime() {
    let libraries = needed_libraries(&fs_err::read(env!("CARGO_BIN_EXE_cotk")).expect("the built program"));
    assert!(
        libraries.iter().any(|name| name.starts_with("libc.so")),
        "{libraries:?}"
    );
    let heavy = ["torch", "c10", "onnxruntime", "cuda", "openblas", "python", "gomp"];
    let found = libraries
        .into_iter()
        .filter(|library| heavy.iter().any(|name| library.contains(name)));
    none(found.collect(), "cotk needs");
}

/// The same reader must see libtorch where it is, or the law above could not fail.
#[cfg(feature = "search")]
#[test]
fn cotk_train_stands_beside_cotk_and_needs_libtorch() {
    let trainer = Path::new(env!("CARGO_BIN_EXE_cotk-train"));
    assert_eq!(trainer.parent(), Path::new(env!("CARGO_BIN_EXE_cotk")).parent());
    let libraries = needed_libraries(&fs_err::read(trainer).expect("the built program"));
    assert!(libraries.iter().any(|name| name.contains("torch")), "{libraries:?}");
}
