//! `cargo xtask bench NAME`: one figure into `benches/results/NAME.toml`.

use anyhow::{Result, bail};

pub(crate) fn command(_args: &[String]) -> Result<()> {
    bail!("no benches yet")
}
