//! `cotk`: everything but training. Parses, dispatches, renders, exits.

use std::process::ExitCode;

use cotk_program::{commands, launch};

fn main() -> ExitCode {
    launch::launch(commands::run)
}
