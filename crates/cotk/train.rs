//! `cotk-train`: the commands that train, run by `cotk` as its sibling; it alone joins search with the supernet.

use std::process::ExitCode;

use cotk_program::commands::Command;
use cotk_program::context::{Context, Outcome};
use cotk_program::fault::Fault;
use cotk_program::{launch, sibling};

mod train_search;

fn main() -> ExitCode {
    launch::launch(|command, cx| {
        sibling::check_build_id()?;
        run(command, cx)
    })
}

fn run(command: &Command, cx: &Context) -> Result<Outcome, Fault> {
    match command {
        Command::Search(args) => train_search::run(args, cx),
        other => Err(Fault::usage(
            format!("cotk-train does not do `{}`", other.name()),
            "run it as `cotk …`",
        )),
    }
}
