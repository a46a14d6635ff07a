//! Running other programs, and the folders that every command shares.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The only place of xtask that prints.
#[expect(clippy::print_stdout, reason = "xtask is a program for people")]
pub(crate) fn print(text: &str) {
    println!("{text}");
}

/// The workspace root: the folder above xtask's manifest.
pub(crate) fn root() -> Result<PathBuf> {
    let manifest = std::env::var("CARGO_MANIFEST_DIR").context("run it as `cargo xtask …`")?;
    let root = Path::new(&manifest)
        .parent()
        .context("xtask's manifest has no parent folder")?;
    Ok(root.to_owned())
}

/// `$XDG_CACHE_HOME/cotk`, or `~/.cache/cotk`.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()) {
        Some(base) => PathBuf::from(base),
        None => {
            PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?).join(".cache")
        }
    };
    Ok(base.join("cotk"))
}

/// Runs a program; an exit code other than 0 is an error that shows the command.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = describe(command);
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("`{program}` does not start; {}", how_to_get(&program)))?;
    if !status.success() {
        bail!("`{line}` ended with {status}");
    }
    Ok(())
}

/// The same cargo that runs xtask, in the workspace root.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    // Set by `cargo run` for xtask itself: they would leak into build scripts of the inner cargo.
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("CARGO_PKG_")
            || key == "CARGO_MANIFEST_DIR"
            || key == "CARGO_MANIFEST_PATH"
        {
            command.env_remove(key);
        }
    }
    command
}

fn describe(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

fn how_to_get(program: &str) -> &'static str {
    match program {
        "python3" => "install Python 3 with pip (Debian: apt-get install python3-pip)",
        _ => "is it installed and on PATH?",
    }
}
