//! What every command gets (user interface, cancel flag, global flags) and what it gives back.

use std::path::PathBuf;

use cotk_run::cancel::Cancel;
use cotk_run::seeds::Seeds;
use serde_json::Value;

use crate::commands::Cli;
use crate::fault::Fault;
use crate::ui::Ui;

/// The surroundings of one command.
pub struct Context {
    pub ui: Ui,
    /// Set by SIGINT and SIGTERM; long work asks it between whole steps.
    pub cancel: Cancel,
    /// `--seed`; absent: the recipe's, else 0.
    pub seed: Option<u64>,
    /// `--threads`, else the cores of this machine.
    pub threads: usize,
    /// `--profile`.
    pub profile: Option<PathBuf>,
    /// `--force`: that profile may be of another machine.
    pub force: bool,
    /// The command line as typed: stands in the ledger beside each figure.
    pub command_line: String,
}

impl Context {
    /// Installs the signal handler and sizes the thread pool.
    ///
    /// # Errors
    /// [`Fault::Usage`] for `--threads 0`.
    pub fn new(cli: &Cli) -> Result<Self, Fault> {
        let global = &cli.global;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = global.threads.unwrap_or(cores);
        if threads == 0 || threads > 1024 {
            return Err(Fault::usage(
                format!("--threads {threads}: expected 1 to 1024"),
                "leave it out to use every core",
            ));
        }
        // Fails only when a pool exists already, which no code before this makes.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        let cancel = Cancel::new();
        let flag = cancel.clone();
        let _ = ctrlc::set_handler(move || {
            if flag.is_cancelled() {
                std::process::exit(130); // asked twice: at once
            }
            flag.cancel();
        });
        Ok(Self {
            ui: Ui::new(global.json, global.quiet),
            cancel,
            seed: global.seed,
            threads,
            profile: global.profile.clone(),
            force: global.force,
            command_line: std::env::args()
                .enumerate()
                .map(|(i, arg)| if i == 0 { "cotk".to_owned() } else { arg })
                .collect::<Vec<_>>()
                .join(" "),
        })
    }

    /// The run's seed: `--seed`, else `default` (the recipe's).
    pub fn seeds(&self, default: u64) -> Seeds {
        Seeds::new(self.seed.unwrap_or(default))
    }
}

/// What a command has to say.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The `result` of `--json`.
    pub result: Value,
    /// For people: tables that fit 100 columns.
    pub text: String,
    pub warnings: Vec<String>,
    /// 0; 3 when `check` found a regression; 4 when a target cannot be met.
    pub exit_code: u8,
    /// The command has printed its one JSON line already (`serve`, when it was ready).
    pub is_printed: bool,
}

impl Outcome {
    /// A success with both forms.
    pub fn new(result: Value, text: impl Into<String>) -> Self {
        Self {
            result,
            text: text.into(),
            ..Self::default()
        }
    }

    /// The same with warnings.
    #[must_use]
    pub fn warn(mut self, warnings: Vec<String>) -> Self {
        self.warnings = warnings;
        self
    }
}
