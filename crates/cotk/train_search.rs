//! `cotk search` where libtorch is: joins the search with the supernet.

use cotk_program::commands::search::Args;
use cotk_program::context::{Context, Outcome};
use cotk_program::fault::Fault;

/// Runs or resumes the search of a recipe.
///
/// # Errors
/// As the libraries report them.
pub(crate) fn run(args: &Args, _cx: &Context) -> Result<Outcome, Fault> {
    Err(Fault::usage(format!("no search for {}", args.recipe), ""))
}
