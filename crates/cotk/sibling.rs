//! `cotk search …` runs `cotk-train` from its own folder with the same arguments, terminal, exit code and signals, the
//! way git and cargo run theirs. Law: both are of one build, or nothing runs.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::fault::Fault;

const BUILD_ID: &str = env!("COTK_BUILD_ID");
const VARIABLE: &str = "COTK_BUILD_ID_EXPECTED";
const HELP: &str = "run `cargo build` (with the default feature `search`) in the checkout of cotk";

/// Becomes `cotk-train`; returns only when that fails.
///
/// # Errors
/// [`Fault::Sibling`] when there is none beside this program, or it does not start.
pub fn become_trainer() -> Fault {
    let program = match std::env::current_exe() {
        Ok(me) => me.with_file_name("cotk-train"),
        Err(error) => {
            return Fault::Sibling {
                message: format!("cannot find this program's own folder: {error}"),
                help: HELP,
            };
        }
    };
    if !program.exists() {
        return Fault::Sibling {
            message: format!("{}: not there; `search` runs in it", program.display()),
            help: HELP,
        };
    }
    let mut command = Command::new(&program);
    command.args(std::env::args_os().skip(1)).env(VARIABLE, BUILD_ID);
    if std::env::var_os("OMP_WAIT_POLICY").is_none() {
        // libtorch's idle threads spin by default: three times slower on a machine that has other work.
        command.env("OMP_WAIT_POLICY", "PASSIVE");
    }
    let error = command.exec();
    Fault::Sibling {
        message: format!("{}: does not start: {error}", program.display()),
        help: HELP,
    }
}

/// In `cotk-train`: refuses a `cotk` of another build. Run by hand, without the variable, it checks nothing.
///
/// # Errors
/// [`Fault::Sibling`] with both ids.
pub fn check_build_id() -> Result<(), Fault> {
    match std::env::var(VARIABLE) {
        Ok(expected) if expected != BUILD_ID => Err(Fault::Sibling {
            message: format!("cotk-train is of build {BUILD_ID}, cotk of build {expected}"),
            help: HELP,
        }),
        _ => Ok(()),
    }
}

/// The id of this build: a hash of the sources and the lock file.
pub fn build_id() -> &'static str {
    BUILD_ID
}

/// HEAD when this program was built, 12 digits; `unknown` outside a git checkout.
pub fn commit() -> &'static str {
    env!("COTK_COMMIT")
}
