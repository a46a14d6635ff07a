//! What failures of models, containers and runtimes mean to a user: kind, exit code, next step.

use cotk_container::ContainerError;
use cotk_model::ModelError;
use cotk_model::checkpoint::CheckpointError;
use cotk_model::config::ConfigError;
use cotk_model::moe::RuntimeError;
use cotk_model::tokenizer::TokenizerError;

use crate::fault::{FAILED, OUT_OF_REACH, Report, WRONG_USE, run};

fn facts(kind: &'static str, exit_code: u8) -> Report {
    Report {
        kind,
        exit_code,
        ..Report::default()
    }
}

/// Of `cotk-model`.
pub(crate) fn model(error: &ModelError) -> Report {
    match error {
        ModelError::Run(error) => run(error),
        ModelError::Data(error) => crate::search_faults::data(error),
        ModelError::Config(error) => config(error),
        ModelError::Checkpoint(error) => checkpoint(error),
        ModelError::Tokenizer(error) => tokenizer(error),
        ModelError::Runtime(error) => call(error),
        ModelError::PromptTooLong { found, limit, .. } => Report {
            found: Some(format!("{found} tokens")),
            expected: Some(format!("at most {limit} tokens")),
            help: Some("shorten the prompt".into()),
            ..facts("prompt-too-long", WRONG_USE)
        },
        ModelError::ContextFull { found, context } => Report {
            found: Some(format!("{found} tokens")),
            expected: Some(format!("at most {context} tokens")),
            help: Some("give fewer tokens".into()),
            ..facts("context-full", WRONG_USE)
        },
        ModelError::EmptyPrompt => Report {
            help: Some("give a prompt of at least one character".into()),
            ..facts("empty-prompt", WRONG_USE)
        },
        ModelError::TokenId { found, vocab } => Report {
            found: Some(found.to_string()),
            expected: Some(format!("below {vocab}")),
            ..facts("token-id", WRONG_USE)
        },
        ModelError::Setting { what, found, expected } => Report {
            key: Some((*what).to_owned()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            ..facts("setting", WRONG_USE)
        },
    }
}

fn config(error: &ConfigError) -> Report {
    match error {
        ConfigError::File(error) => run(error),
        ConfigError::Json { file, .. } => Report {
            file: Some(file.display().to_string()),
            help: Some("fetch the file again".into()),
            ..facts("config", WRONG_USE)
        },
        ConfigError::Missing { file, key } => Report {
            file: Some(file.display().to_string()),
            key: Some(key.clone()),
            help: Some("shape keys have no defaults: take the config that was published with the weights".into()),
            ..facts("config-key-missing", WRONG_USE)
        },
        ConfigError::Value {
            file,
            key,
            found,
            expected,
        } => Report {
            file: Some(file.display().to_string()),
            key: Some(key.clone()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            ..facts("config-value", WRONG_USE)
        },
        ConfigError::Architecture { file, found, known } => Report {
            file: Some(file.display().to_string()),
            found: Some(found.clone()),
            expected: Some(known.join(", ")),
            ..facts("unknown-architecture", WRONG_USE)
        },
        ConfigError::UnknownKey {
            file,
            key,
            found,
            nearest,
        } => Report {
            file: Some(file.display().to_string()),
            key: Some(key.clone()),
            found: Some(found.clone()),
            help: Some(match nearest {
                Some(known) => format!("did you mean `{known}`? Remove a key that does not change the forward pass"),
                None => "remove it if it does not change the forward pass".to_owned(),
            }),
            ..facts("config-key-unknown", WRONG_USE)
        },
    }
}

/// Of tensors and their files.
pub(crate) fn checkpoint(error: &CheckpointError) -> Report {
    let of = |file: &std::path::Path, kind, key: Option<&String>, found: String, expected: String, help: &str| Report {
        file: Some(file.display().to_string()),
        key: key.cloned(),
        found: Some(found),
        expected: Some(expected),
        help: Some(help.to_owned()),
        ..facts(kind, WRONG_USE)
    };
    let differ = "config.json and weights differ: take both from one place";
    match error {
        CheckpointError::File(error) => run(error),
        CheckpointError::Missing { file, tensor, .. } => Report {
            file: Some(file.display().to_string()),
            key: Some(tensor.clone()),
            help: Some(differ.to_owned()),
            ..facts("tensor-missing", WRONG_USE)
        },
        CheckpointError::Unknown { file, tensor, .. } => Report {
            file: Some(file.display().to_string()),
            key: Some(tensor.clone()),
            help: Some(differ.to_owned()),
            ..facts("tensor-unknown", WRONG_USE)
        },
        CheckpointError::Shape {
            file,
            tensor,
            found,
            expected,
        } => of(
            file,
            "tensor-shape",
            Some(tensor),
            format!("{found:?}"),
            format!("{expected:?}"),
            differ,
        ),
        CheckpointError::Type {
            file,
            tensor,
            found,
            expected,
        } => of(
            file,
            "tensor-type",
            Some(tensor),
            found.clone(),
            expected.clone(),
            "convert the checkpoint to bf16",
        ),
        CheckpointError::NotFinite {
            file,
            tensor,
            index,
            found,
        } => of(
            file,
            "tensor-value",
            Some(tensor),
            format!("{found} at index {index}"),
            "finite numbers".to_owned(),
            "the checkpoint is damaged, or its training diverged",
        ),
        CheckpointError::Truncated { file, found, expected } => of(
            file,
            "truncated",
            None,
            format!("{found} bytes"),
            format!("{expected} bytes"),
            "fetch the file again",
        ),
        CheckpointError::Header {
            file,
            what,
            found,
            expected,
        } => of(
            file,
            "safetensors-header",
            Some(what),
            found.clone(),
            expected.clone(),
            "fetch the file again",
        ),
    }
}

fn tokenizer(error: &TokenizerError) -> Report {
    match error {
        TokenizerError::File(error) => run(error),
        TokenizerError::Parse { file, .. } | TokenizerError::Encode { file, .. } => Report {
            file: Some(file.display().to_string()),
            ..facts("tokenizer", WRONG_USE)
        },
        TokenizerError::Vocab { file, found, vocab } => Report {
            file: Some(file.display().to_string()),
            key: Some("vocab_size".to_owned()),
            found: Some(format!("ids up to {found}")),
            expected: Some(format!("below {vocab}")),
            help: Some("take tokenizer and config from one place".to_owned()),
            ..facts("tokenizer-vocab", WRONG_USE)
        },
    }
}

fn call(error: &RuntimeError) -> Report {
    match error {
        RuntimeError::Layer { .. } | RuntimeError::Shape { .. } => Report {
            help: Some("this is a bug of cotk: please report it".to_owned()),
            ..facts("runtime", FAILED)
        },
        RuntimeError::Mode { mode, offered } => Report {
            key: Some("mode".to_owned()),
            found: Some(mode.to_string()),
            expected: Some(offered.iter().map(|m| m.name()).collect::<Vec<_>>().join(", ")),
            ..facts("mode", WRONG_USE)
        },
        RuntimeError::Expert { source, .. } => match source.downcast_ref::<ContainerError>() {
            Some(error) => container(error),
            None => facts("expert", FAILED),
        },
    }
}

/// Of the compressed checkpoint.
pub(crate) fn container(error: &ContainerError) -> Report {
    let damaged = "the container is damaged: copy it again, or compress again";
    match error {
        ContainerError::Run(error) => run(error),
        ContainerError::Manifest { file, .. } => Report {
            file: Some(file.display().to_string()),
            help: Some(damaged.to_owned()),
            ..facts("manifest", WRONG_USE)
        },
        ContainerError::Version {
            file, found, expected, ..
        } => Report {
            file: Some(file.display().to_string()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            help: Some("compress the model again with this version".to_owned()),
            ..facts("container-version", WRONG_USE)
        },
        ContainerError::Value {
            file,
            key,
            found,
            expected,
        } => Report {
            file: Some(file.display().to_string()),
            key: Some(key.clone()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            help: Some(damaged.to_owned()),
            ..facts("manifest", WRONG_USE)
        },
        ContainerError::Length { file, found, expected } => Report {
            file: Some(file.display().to_string()),
            found: Some(format!("{found} bytes")),
            expected: Some(format!("{expected} bytes")),
            help: Some(damaged.to_owned()),
            ..facts("container-length", WRONG_USE)
        },
        ContainerError::Checksum { file, found, expected } => Report {
            file: Some(file.display().to_string()),
            found: Some(format!("{found:016x}")),
            expected: Some(format!("{expected:016x}")),
            help: Some(damaged.to_owned()),
            ..facts("checksum", WRONG_USE)
        },
        ContainerError::Header {
            file,
            layer,
            expert,
            what,
            found,
            expected,
        } => Report {
            file: Some(file.display().to_string()),
            key: Some(format!("{layer}, {expert}: {what}")),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            help: Some(damaged.to_owned()),
            ..facts("expert-record", WRONG_USE)
        },
        ContainerError::Section {
            file,
            layer,
            expert,
            section,
            found,
            expected,
        } => Report {
            file: Some(file.display().to_string()),
            key: Some(format!("{layer}, {expert}, section {section}")),
            found: Some(format!("{found:016x}")),
            expected: Some(format!("{expected:016x}")),
            help: Some(damaged.to_owned()),
            ..facts("expert-record", WRONG_USE)
        },
        ContainerError::Scale {
            file,
            layer,
            expert,
            what,
            row,
            found,
        } => Report {
            file: Some(file.display().to_string()),
            key: Some(format!("{layer}, {expert}: {what}, row {row}")),
            found: Some(found.to_string()),
            expected: Some("a finite number".to_owned()),
            help: Some("compress the model again: it was written with weights that are no numbers".to_owned()),
            ..facts("tensor-value", WRONG_USE)
        },
        ContainerError::Gguf {
            file,
            what,
            found,
            expected,
        } => Report {
            file: Some(file.display().to_string()),
            key: Some(what.clone()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            ..facts("gguf", WRONG_USE)
        },
        ContainerError::Unwritable {
            layer,
            expert,
            found,
            expected,
            ..
        } => Report {
            key: Some(format!("{layer}, {expert}")),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            ..facts("container", FAILED)
        },
    }
}

/// Of opening a model for running.
pub(crate) fn runtime(error: &cotk_runtime::Error) -> Report {
    use cotk_runtime::Error;
    match error {
        Error::Container(error) => container(error),
        Error::Files(error) => model(error),
        Error::Checkpoint(error) => checkpoint(error),
        Error::Kernel(_) => Report {
            key: Some("COTK_ISA".to_owned()),
            help: Some("unset COTK_ISA".to_owned()),
            ..facts("isa", WRONG_USE)
        },
        Error::Model {
            file,
            what,
            found,
            expected,
        } => Report {
            file: Some(file.display().to_string()),
            key: Some(what.clone()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            help: Some("compress the model again".to_owned()),
            ..facts("container", WRONG_USE)
        },
        Error::Synthetic { what, found, expected } => Report {
            key: Some((*what).to_owned()),
            found: Some(found.clone()),
            expected: Some(expected.clone()),
            ..facts("synthetic", WRONG_USE)
        },
        Error::Coding { what, .. } => Report {
            key: Some(what.clone()),
            ..facts("tensor-value", WRONG_USE)
        },
        Error::Memory {
            needed_bytes,
            available_bytes,
            ..
        } => Report {
            key: Some("memory".to_owned()),
            found: Some(format!("{available_bytes} bytes available")),
            expected: Some(format!("{needed_bytes} bytes")),
            help: Some("free memory, take fewer --bits or --layers, or a shorter --prompt".to_owned()),
            ..facts("memory", OUT_OF_REACH)
        },
        Error::Budget { found, least, .. } => Report {
            key: Some("budget-bytes".to_owned()),
            found: Some(found.to_string()),
            expected: Some(format!("at least {least}")),
            help: Some("raise the budget, or shorten --context".to_owned()),
            ..facts("budget", OUT_OF_REACH)
        },
        Error::Latency(error) => crate::search_faults::latency(error),
    }
}
