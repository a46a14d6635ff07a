//! The build id that both programs carry, the commit of the ledger, and the rpath of `cotk-train`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=crates");
    println!("cargo:rerun-if-changed=Cargo.lock");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-env=COTK_BUILD_ID={:016x}", source_hash());
    println!("cargo:rustc-env=COTK_COMMIT={}", commit());
    link_libtorch();
}

/// Over our own sources and the lock file: `cotk` and `cotk-train` of one build agree on it.
#[expect(
    clippy::disallowed_methods,
    reason = "a file that vanishes meanwhile is no error here"
)]
fn source_hash() -> u64 {
    let mut files = vec![PathBuf::from("Cargo.lock"), PathBuf::from("Cargo.toml")];
    collect(Path::new("crates"), &mut files);
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        file.hash(&mut hasher);
        std::fs::read(&file).unwrap_or_default().hash(&mut hasher);
    }
    hasher.finish()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, files);
        } else {
            files.push(path);
        }
    }
}

/// HEAD at build time, 12 digits; `unknown` outside a git checkout.
fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git")
            .args(args)
            .output()
            .ok()
            .filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    if let Some(folder) = git(&["rev-parse", "--git-dir"]) {
        // HEAD moves without touching the sources: its log is what changes with every commit.
        for file in ["HEAD", "logs/HEAD"] {
            let path = Path::new(&folder).join(file);
            if path.exists() {
                println!("cargo:rerun-if-changed={}", path.display());
            }
        }
    }
    git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned())
}

/// `rustc-link-arg` does not travel from a library to its dependants: each package that links tch has these lines.
fn link_libtorch() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if std::env::var_os("CARGO_FEATURE_SEARCH").is_none() {
        return;
    }
    let dir = PathBuf::from(std::env::var_os("LIBTORCH").unwrap_or_else(|| ".deps/libtorch".into()));
    match dir.join("lib").canonicalize() {
        // Only for the program that needs it: `cotk` must not carry libtorch's path.
        Ok(lib) => println!("cargo:rustc-link-arg-bin=cotk-train=-Wl,-rpath,{}", lib.display()),
        Err(e) => panic!(
            "libtorch is not set up ({}: {e}); run `cargo xtask setup`",
            dir.display()
        ),
    }
}
