//! What failures of searches, data, profiles and ONNX Runtime mean to a user: kind, exit code, next step.

use cotk_data::DataError;
use cotk_search::SearchError;

use crate::fault::{FAILED, OUT_OF_REACH, Report, WRONG_USE, run};

fn facts(kind: &'static str, exit_code: u8) -> Report {
    Report {
        kind,
        exit_code,
        ..Report::default()
    }
}

/// Of `cotk-search`.
pub(crate) fn search(error: &SearchError) -> Report {
    match error {
        SearchError::Run(error) => run(error),
        SearchError::Data(error) => data(error),
        SearchError::Latency(error) => latency(error),
        SearchError::Onnx(error) => onnx(error),
        SearchError::Recipe { key, found, expected } => Report {
            key: Some((*key).to_owned()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            help: Some(format!("change `{key}` in the recipe, or with --set {key}=…")),
            ..facts("recipe", WRONG_USE)
        },
        SearchError::Encoding { text, detail } => Report {
            found: Some(text.clone()),
            expected: Some(detail.clone()),
            ..facts("encoding", WRONG_USE)
        },
        SearchError::OutOfReach {
            what,
            target,
            best,
            unit,
            encoding,
        } => Report {
            key: Some((*what).to_owned()),
            found: Some(format!("{target} {unit}")),
            expected: Some(format!("{best} {unit} or more")),
            help: Some(format!(
                "ask for {best:.4} {unit} or more: {encoding} is predicted to need that"
            )),
            ..facts("out-of-reach", OUT_OF_REACH)
        },
        SearchError::Checkpoint {
            file, found, expected, ..
        } => Report {
            file: Some(file.display().to_string()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            help: Some("begin anew with --restart".into()),
            ..facts("checkpoint", FAILED)
        },
        SearchError::Train { .. } => facts("training", FAILED),
        SearchError::Diverged { .. } => Report {
            help: Some("halve train.rate and train.fine_tune_rate".into()),
            ..facts("diverged", FAILED)
        },
        SearchError::Plot { file, .. } => Report {
            file: Some(file.display().to_string()),
            ..facts("plot", FAILED)
        },
    }
}

/// Of `cotk-data`.
pub(crate) fn data(error: &DataError) -> Report {
    match error {
        DataError::Run(error) => run(error),
        DataError::Missing { looked, help, .. } => Report {
            file: looked.first().map(|path| path.display().to_string()),
            help: Some(help.clone()),
            ..facts("no-data", WRONG_USE)
        },
        DataError::Size {
            file, found, expected, ..
        } => Report {
            file: Some(file.display().to_string()),
            found: Some(format!("{found} bytes")),
            expected: Some(format!("{expected} bytes")),
            help: Some("fetch the file again".into()),
            ..facts("data-size", WRONG_USE)
        },
        DataError::Label {
            file, found, classes, ..
        } => Report {
            file: Some(file.display().to_string()),
            found: Some(format!("label {found}")),
            expected: Some(format!("0 to {}", classes - 1)),
            help: Some("fetch the file again".into()),
            ..facts("data-label", WRONG_USE)
        },
        DataError::Xz { file, .. } => Report {
            file: Some(file.display().to_string()),
            help: Some("fetch the file again".into()),
            ..facts("damaged-archive", WRONG_USE)
        },
        DataError::Cell {
            file,
            column,
            found,
            expected,
            ..
        } => Report {
            file: Some(file.display().to_string()),
            key: Some(column.clone()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            help: Some("fetch the file again".into()),
            ..facts("data-table", WRONG_USE)
        },
        DataError::Line { file, line, .. } => Report {
            file: Some(file.display().to_string()),
            found: Some(format!("line {line}")),
            expected: Some("one JSON object a line".into()),
            ..facts("task-line", WRONG_USE)
        },
        DataError::Item {
            file,
            line,
            key,
            found,
            expected,
        } => Report {
            file: Some(file.display().to_string()),
            key: Some(key.clone()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            help: Some(format!("mend line {line}, or take it out")),
            ..facts("task-item", WRONG_USE)
        },
        DataError::Section { key, found, expected } => Report {
            key: Some(format!("data.{key}")),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            ..facts("recipe", WRONG_USE)
        },
        DataError::Empty { file } => Report {
            file: Some(file.display().to_string()),
            expected: Some("text".into()),
            ..facts("empty-text", WRONG_USE)
        },
    }
}

/// Of `cotk-latency`.
pub(crate) fn latency(error: &cotk_latency::Error) -> Report {
    use cotk_latency::Error;
    match error {
        Error::Run(error) => run(error),
        Error::Graph { found, expected, .. } | Error::Expectation { found, expected, .. } => Report {
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            ..facts("graph", WRONG_USE)
        },
        Error::NotMeasured { profile, .. } => Report {
            file: Some(profile.clone()),
            help: Some("measure this machine with `cotk profile`".into()),
            ..facts("not-measured", WRONG_USE)
        },
        Error::Lacks { profile, lacks, .. } => Report {
            file: Some(profile.clone()),
            found: Some(format!("no measurement of {}", lacks.join(", "))),
            help: Some(
                "measure this machine with `cotk profile`, with more time if that one was short: --seconds S".into(),
            ),
            ..facts("not-measured", WRONG_USE)
        },
        Error::Line {
            file, found, expected, ..
        } => Report {
            file: Some(file.display().to_string()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            help: Some("measure again with `cotk profile`".into()),
            ..facts("profile", WRONG_USE)
        },
        Error::Format { file, .. } => Report {
            file: Some(file.display().to_string()),
            help: Some("measure again with `cotk profile`".into()),
            ..facts("profile", WRONG_USE)
        },
        Error::OtherMachine { folder, differences } => Report {
            file: Some(folder.display().to_string()),
            key: differences.first().map(|d| d.field.to_owned()),
            found: differences.first().map(|d| d.profile.clone()),
            expected: differences.first().map(|d| d.here.clone()),
            help: Some("measure this machine with `cotk profile`, or add --force".into()),
            ..facts("other-machine", WRONG_USE)
        },
        Error::NoProfile { looked_at } => Report {
            file: looked_at.first().map(|path| path.display().to_string()),
            help: Some("measure this machine: `cotk profile --quick` takes a minute".into()),
            ..facts("no-profile", WRONG_USE)
        },
        Error::Probe { .. } => facts("probe", FAILED),
    }
}

/// Of `cotk-onnx`.
pub(crate) fn onnx(error: &cotk_onnx::Error) -> Report {
    use cotk_onnx::Error;
    match error {
        Error::Run(error) => run(error),
        Error::Graph(error) => latency(error),
        Error::NoLibrary { looked_at } => Report {
            file: looked_at.first().map(|path| path.display().to_string()),
            help: Some("run `cargo xtask setup`, or name the library in COTK_ORT_LIB".into()),
            ..facts("no-onnxruntime", FAILED)
        },
        Error::Load { file, .. } => Report {
            file: Some(file.display().to_string()),
            help: Some("ONNX Runtime 1.24 or newer is needed: `cargo xtask setup` fetches one".into()),
            ..facts("no-onnxruntime", FAILED)
        },
        Error::Runtime { .. } => facts("onnxruntime", FAILED),
        Error::Decode { file, .. } | Error::UnknownOp { file, .. } => Report {
            file: Some(file.clone()),
            ..facts("onnx", WRONG_USE)
        },
        Error::Unsupported {
            file, found, expected, ..
        } => Report {
            file: Some(file.clone()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            ..facts("onnx", WRONG_USE)
        },
        Error::TooUnknown {
            file,
            operators,
            share_pct,
            limit_pct,
        } => Report {
            file: Some(file.clone()),
            key: Some(operators.clone()),
            found: Some(format!("{share_pct:.0} %")),
            expected: Some(format!("at most {limit_pct:.0} %")),
            help: Some("--max-unknown PCT allows more; their bytes alone stand for them".into()),
            ..facts("unknown-operators", WRONG_USE)
        },
        Error::Weights {
            layer, found, expected, ..
        } => Report {
            key: Some(layer.clone()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            ..facts("weights", FAILED)
        },
        Error::Input { found, expected, .. } => Report {
            found: Some(found.to_string()),
            expected: Some(expected.to_string()),
            ..facts("input", FAILED)
        },
    }
}
