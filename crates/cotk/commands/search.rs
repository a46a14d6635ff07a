//! `cotk search RECIPE`: architecture, bits and rank in one search. Here: the arguments and the cheap checks; the
//! search itself runs in `cotk-train`, where libtorch is.

use cotk_run::recipe::{Source, parse};
use cotk_search::recipe::Recipe;

use crate::fault::Fault;

/// Recipes that come with the program, by bare name.
pub const RECIPES: &[(&str, &str)] = &[("quickstart", include_str!("../../../recipes/quickstart.toml"))];

/// Search a network that meets a latency target, fine-tune it, export and measure it
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk search quickstart\n  cotk search recipes/quickstart.toml --set data.name=cifar10 --dry-run\n\nKilled at any moment, the same command goes on where it was."
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
    /// A recipe that does not parse, or asks for what cannot be.
    pub fn check(&self) -> Result<(), Fault> {
        self.load(None).map(|_| ())
    }

    /// The recipe with its overrides and the run's seed, and the first part of the run's name.
    ///
    /// # Errors
    /// As [`Args::check`].
    pub fn load(&self, seed: Option<u64>) -> Result<(Recipe, String), Fault> {
        let source = Source::find(&self.recipe, RECIPES)?;
        let mut recipe: Recipe = parse(&source, &self.sets)?;
        recipe.seed = seed.unwrap_or(recipe.seed);
        recipe.check()?;
        if let Some(folder) = self
            .resume
            .as_deref()
            .filter(|folder| !folder.join("recipe.toml").exists())
        {
            return Err(Fault::usage(
                format!("--resume {}: no run folder (it has no recipe.toml)", folder.display()),
                "name a folder under runs/",
            ));
        }
        Ok((recipe, source.stem()))
    }
}
