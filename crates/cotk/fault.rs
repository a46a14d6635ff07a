//! Every way a command can fail: exit code, kind, and what to do next. A library's error states facts; here the
//! program decides what they mean. Law: no `_` arm over error variants that need different next steps.

use crate::commands;
use crate::model_faults;
use crate::search_faults;

/// One failure. Library errors come in by `From`.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Files, recipes, journals, run folders.
    #[error(transparent)]
    Run(#[from] cotk_run::Error),
    /// The ledger or its baseline.
    #[error(transparent)]
    Ledger(#[from] cotk_ledger::Error),
    /// Config, weights, tokenizer, prompt.
    #[error(transparent)]
    Model(#[from] cotk_model::ModelError),
    /// Opening a model for running.
    #[error(transparent)]
    Runtime(#[from] cotk_runtime::Error),
    /// The server.
    #[error(transparent)]
    Serve(#[from] cotk_serve::Error),
    /// Choosing a path of the CPU, a GPU that fails, NVRTC.
    #[error(transparent)]
    Kernels(#[from] cotk_kernels::KernelError),
    /// A search, its data, its profile, ONNX Runtime.
    #[error(transparent)]
    Search(#[from] cotk_search::SearchError),
    /// The compression pipeline.
    #[error(transparent)]
    Compress(#[from] cotk_compress::CompressError),
    /// Writing a model for another program.
    #[error(transparent)]
    Export(#[from] cotk_model::export::ExportError),
    /// Profiles and predictions.
    #[error(transparent)]
    Latency(#[from] cotk_latency::Error),
    /// Arguments that cannot be right.
    #[error("{message}")]
    Usage { message: String, help: String },
    /// A command line that does not parse.
    #[error("{message}")]
    Arguments {
        message: String,
        help: String,
        key: Option<String>,
    },
    /// `cotk-train` is missing or of another build.
    #[error("{message}")]
    Sibling { message: String, help: &'static str },
}

/// A fault as the two renderings (text and JSON) need it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// kebab-case.
    pub kind: &'static str,
    pub exit_code: u8,
    pub message: String,
    pub help: Option<String>,
    pub file: Option<String>,
    pub key: Option<String>,
    pub found: Option<String>,
    pub expected: Option<String>,
}

/// It failed while running.
pub const FAILED: u8 = 1;
/// Wrong use: arguments, recipe, input that cannot be right.
pub const WRONG_USE: u8 = 2;
/// `check` found a regression.
pub const REGRESSION: u8 = 3;
/// The target or budget cannot be met.
pub const OUT_OF_REACH: u8 = 4;
/// Ctrl-C.
pub const INTERRUPTED: u8 = 130;

impl Fault {
    /// Wrong use, with the next step (may be empty).
    pub fn usage(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Usage {
            message: message.into(),
            help: help.into(),
        }
    }

    /// Kind, exit code, help and the facts of this failure.
    pub fn report(&self) -> Report {
        let mut report = match self {
            Self::Run(error) => run(error),
            Self::Ledger(error) => ledger(error),
            Self::Model(error) => model_faults::model(error),
            Self::Runtime(error) => model_faults::runtime(error),
            Self::Serve(error) => serve(error),
            Self::Kernels(error) => kernels(error),
            Self::Search(error) => search_faults::search(error),
            Self::Compress(error) => commands::compress::failure(error),
            Self::Export(error) => commands::export::failure(error),
            Self::Arguments { help, key, .. } => Report {
                kind: "usage",
                exit_code: WRONG_USE,
                help: Some(help.clone()),
                key: key.clone(),
                ..Report::default()
            },
            Self::Latency(error) => search_faults::latency(error),
            Self::Usage { help, .. } => Report {
                kind: "usage",
                exit_code: WRONG_USE,
                help: Some(help.clone()),
                ..Report::default()
            },
            Self::Sibling { help, .. } => Report {
                kind: "sibling-program",
                exit_code: FAILED,
                help: Some((*help).to_owned()),
                ..Report::default()
            },
        };
        report.message = self.to_string();
        report.help = report.help.filter(|help| !help.is_empty());
        report
    }
}

pub(crate) fn kernels(error: &cotk_kernels::KernelError) -> Report {
    use cotk_kernels::KernelError;
    let facts = |kind, exit_code, help: &str| Report {
        kind,
        exit_code,
        help: Some(help.to_owned()),
        ..Report::default()
    };
    match error {
        KernelError::Isa { found, present } => Report {
            key: Some("COTK_ISA".into()),
            found: Some(found.clone()),
            expected: Some(present.join(", ")),
            ..facts("isa", WRONG_USE, "unset COTK_ISA, or name a path that this CPU has")
        },
        KernelError::Gpu { .. } => facts("gpu", FAILED, "see `nvidia-smi`; restart the driver or the machine"),
        KernelError::NoDevice { .. } => facts("no-gpu", FAILED, "leave out --require on machines without a GPU"),
        KernelError::WrongKernel { .. } => facts("wrong-kernel", FAILED, "do not use this GPU; report the message"),
        KernelError::NoCompiler { looked_at, .. } => Report {
            file: Some(looked_at.clone()),
            ..facts(
                "no-nvrtc",
                FAILED,
                "install the wheel nvidia-cuda-nvrtc-cu12==12.4.127 and name its nvidia/cuda_nvrtc/lib by COTK_NVRTC",
            )
        },
        KernelError::Quant(_) => facts("codes", FAILED, ""),
    }
}

pub(crate) fn run(error: &cotk_run::Error) -> Report {
    use cotk_run::Error;
    let facts = |kind, exit_code| Report {
        kind,
        exit_code,
        ..Report::default()
    };
    match error {
        Error::Io { file, source, .. } => {
            let (kind, exit_code, help) = match source.kind() {
                std::io::ErrorKind::NotFound => ("no-such-file", WRONG_USE, "check the path"),
                std::io::ErrorKind::StorageFull => ("disk-full", FAILED, "free some space"),
                std::io::ErrorKind::PermissionDenied => (
                    "permission-denied",
                    FAILED,
                    "check the owner and mode of the file and its folder",
                ),
                std::io::ErrorKind::IsADirectory | std::io::ErrorKind::NotADirectory => {
                    ("not-a-file", WRONG_USE, "check the path")
                }
                std::io::ErrorKind::InvalidData => ("invalid-data", WRONG_USE, ""),
                _ => ("io", FAILED, ""),
            };
            Report {
                file: Some(file.display().to_string()),
                help: Some(help.to_owned()),
                ..facts(kind, exit_code)
            }
        }
        Error::TooLarge { file, found, limit } => Report {
            file: Some(file.display().to_string()),
            found: Some(format!("{found} bytes")),
            expected: Some(format!("at most {limit} bytes")),
            ..facts("file-too-large", WRONG_USE)
        },
        Error::Recipe { file, key, nearest, .. } => Report {
            file: Some(file.clone()),
            key: key.clone(),
            help: nearest.as_ref().map(|known| format!("did you mean `{known}`?")),
            ..facts("recipe", WRONG_USE)
        },
        Error::Set { argument, .. } => Report {
            found: Some(argument.clone()),
            expected: Some("key.path=value".into()),
            ..facts("set", WRONG_USE)
        },
        Error::NoRecipe { name, .. } => Report {
            found: Some(name.clone()),
            ..facts("no-such-recipe", WRONG_USE)
        },
        Error::Locked { file, .. } => Report {
            file: Some(file.display().to_string()),
            help: Some("wait for it, or stop it".into()),
            ..facts("locked", FAILED)
        },
        Error::Journal { file, .. } => Report {
            file: Some(file.display().to_string()),
            help: Some(
                "the journal was edited or its disk is faulty: delete the unfinished run and start again".into(),
            ),
            ..facts("journal", FAILED)
        },
        Error::OtherInput {
            file, found, expected, ..
        } => Report {
            file: Some(file.display().to_string()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            help: Some("use the recipe and inputs it was begun with, or delete the unfinished folder".into()),
            ..facts("other-input", WRONG_USE)
        },
        Error::Cancelled => Report {
            ..facts("interrupted", INTERRUPTED)
        },
    }
}

fn ledger(error: &cotk_ledger::Error) -> Report {
    use cotk_ledger::Error;
    let facts = |kind, exit_code| Report {
        kind,
        exit_code,
        ..Report::default()
    };
    match error {
        Error::Run(error) => run(error),
        Error::Row { file, line, .. } => Report {
            file: Some(file.display().to_string()),
            found: Some(format!("line {line}")),
            expected: Some("one row of the ledger as JSON".into()),
            help: Some("the ledger was edited or its disk is faulty: move the file away, or remove that line".into()),
            ..facts("ledger-row", WRONG_USE)
        },
        Error::Baseline { file, key, nearest, .. } => Report {
            file: Some(file.display().to_string()),
            key: key.clone(),
            help: nearest.as_ref().map(|known| format!("did you mean `{known}`?")),
            ..facts("baseline", WRONG_USE)
        },
        Error::BaselineRow {
            file,
            key,
            found,
            expected,
            ..
        } => Report {
            file: Some(file.display().to_string()),
            key: Some((*key).to_owned()),
            found: Some(found.clone()),
            expected: Some((*expected).to_owned()),
            ..facts("baseline", WRONG_USE)
        },
        Error::NothingToCheck { file } => Report {
            file: Some(file.display().to_string()),
            help: Some("add a [[row]], or give --measured if all of them are timings".into()),
            ..facts("nothing-to-check", WRONG_USE)
        },
        Error::Query(_) => Report {
            help: Some("this is a bug of cotk: please report it with the ledger".into()),
            ..facts("ledger-query", FAILED)
        },
    }
}

fn serve(error: &cotk_serve::Error) -> Report {
    use cotk_serve::Error;
    let facts = |kind, exit_code| Report {
        kind,
        exit_code,
        ..Report::default()
    };
    match error {
        Error::Run(error) => run(error),
        Error::Host { host, .. } => Report {
            key: Some("host".into()),
            found: Some(host.clone()),
            expected: Some("an address of this machine, or a name that has one".into()),
            ..facts("host", WRONG_USE)
        },
        Error::PortInUse { address } => Report {
            key: Some("port".into()),
            found: Some(address.port().to_string()),
            expected: Some("a free port".into()),
            help: Some("stop what listens there, or choose another: --port 0 takes any free one".into()),
            ..facts("port-in-use", FAILED)
        },
        Error::Bind { address, .. } => Report {
            found: Some(address.to_string()),
            help: Some("choose another --host or --port; ports below 1024 need rights".into()),
            ..facts("bind", FAILED)
        },
        Error::Template { origin, line, .. } => Report {
            file: Some(origin.clone()),
            found: Some(format!("line {line}")),
            help: Some("--chat-template F gives another".into()),
            ..facts("chat-template", WRONG_USE)
        },
        Error::System { .. } => facts("system", FAILED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_says_what_to_do() {
        let source = std::io::Error::from_raw_os_error(libc::ENOSPC);
        let report = Fault::from(cotk_run::Error::Io {
            action: "write",
            file: "out/experts.bin".into(),
            source,
        })
        .report();
        assert_eq!((report.kind, report.exit_code), ("disk-full", FAILED));
        assert_eq!(report.file.as_deref(), Some("out/experts.bin"));
        assert!(report.help.is_some_and(|help| help.contains("free some space")));
    }

    #[test]
    fn an_interrupt_exits_130() {
        assert_eq!(Fault::from(cotk_run::Error::Cancelled).report().exit_code, INTERRUPTED);
    }
}
