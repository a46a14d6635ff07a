//! `cargo xtask`: what cargo cannot do. One file per command; `setup` is called by those that need it.

mod bench;
mod check;
mod demo;
mod program;
mod setup;
mod shell;
#[path = "../../crates/cotk/table.rs"]
#[expect(
    unreachable_pub,
    reason = "public in the program's library, whose one table printer this is"
)]
mod table;
mod test;

use anyhow::{Result, bail};

const HELP: &str = "\
cargo xtask COMMAND

  cargo xtask demo                 the three jobs on real input, one table
  cargo xtask test                 every test; --no-torch leaves out what needs libtorch

commands:
  setup [--no-torch] [--python]    fetch libtorch and ONNX Runtime into the user's cache, link them into .deps
                                   (--python: the openai client of the tests too)
  demo                             compress, serve and search on real input; rows go to runs/ledger
  test [--no-torch] [ARGS…]        set up, then cargo test (ARGS go to cargo test)
  check                            format, clippy, docs, licences and bans
  bench NAME [ARGS…]               measure one figure into benches/results; without NAME: list them
";

fn main() -> Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let command = if args.is_empty() {
        "--help".to_owned()
    } else {
        args.remove(0)
    };
    match command.as_str() {
        "setup" => setup::command(&args),
        "demo" => demo::command(&args),
        "test" => test::command(&args),
        "check" => check::command(&args),
        "bench" => bench::command(&args),
        "-h" | "--help" | "help" => {
            shell::print(HELP);
            Ok(())
        }
        other => bail!("unknown command `{other}`; `cargo xtask --help` lists them"),
    }
}
