//! `cargo xtask demo`: builds, then `cotk demo`'s three jobs on real input.

use anyhow::{Result, ensure};

use crate::setup::{self, Torch};
use crate::shell;

pub(crate) fn command(args: &[String]) -> Result<()> {
    ensure!(args.is_empty(), "demo takes no arguments");
    setup::setup(Torch::With)
}
