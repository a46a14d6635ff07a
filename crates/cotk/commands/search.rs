//! `cotk search RECIPE`: architecture, bits and rank in one search. Here: the arguments and the cheap checks; the
//! search itself runs in `cotk-train`, where libtorch is.

use crate::fault::Fault;

/// Search a network that meets a latency target, fine-tune it, export and measure it
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk search quickstart\n  cotk search recipes/quickstart.toml --set data.name=cifar10 --dry-run"
)]
pub struct Args {
    /// A recipe file, or the name of a built-in one (quickstart)
    pub recipe: String,
    /// Override a key of the recipe: --set latency.target_ms=0.5
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Print the plan and its predicted cost, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Go on with this unfinished run folder
    #[arg(long, value_name = "RUN", conflicts_with = "restart")]
    pub resume: Option<std::path::PathBuf>,
    /// Begin anew even if an unfinished run of this recipe exists
    #[arg(long)]
    pub restart: bool,
}

impl Args {
    /// What can be refused before a second program starts.
    ///
    /// # Errors
    /// A recipe that does not parse.
    pub fn check(&self) -> Result<(), Fault> {
        Ok(())
    }
}
