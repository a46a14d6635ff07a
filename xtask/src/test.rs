//! `cargo xtask test`: set up, then every test. `--no-torch` leaves out what links libtorch.

use std::time::Instant;

use anyhow::Result;

use crate::setup::{self, Torch};
use crate::shell;

pub(crate) fn command(args: &[String]) -> Result<()> {
    let (ours, theirs): (Vec<_>, Vec<_>) = args.iter().partition(|a| *a == "--no-torch");
    let torch = if ours.is_empty() { Torch::With } else { Torch::Without };
    setup::setup(torch)?;
    let skips = std::env::var("COTK_SKIP").unwrap_or_default();
    let mut command = shell::cargo(&shell::root()?);
    command.args(["test", "--workspace"]);
    if torch == Torch::Without {
        command.args(["--exclude", "cotk-supernet", "--no-default-features"]);
    }
    if !skips.split(',').any(|skip| skip == "openai") {
        command.env("COTK_PYTHON_PACKAGES", setup::python_packages()?);
    }
    let start = Instant::now();
    shell::run(command.args(theirs))?;
    let skipped = skips.split(',').filter(|s| !s.is_empty()).count();
    shell::print(&format!(
        "test: all green in {:.0} s, {skipped} kinds of test skipped (COTK_SKIP)",
        start.elapsed().as_secs_f64()
    ));
    Ok(())
}
