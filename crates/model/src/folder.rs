//! A model's folder as files: config, weights, tokenizer, generation defaults, chat template. Opens Hugging Face
//! folders; whoever opens a container hands in its config and its tensors and gets the same value.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cotk_run::files;
use serde_json::Value;

use crate::ModelError;
use crate::checkpoint::TensorSource;
use crate::checkpoint::safetensors::Safetensors;
use crate::config::{ConfigError, Keys};
use crate::families;
use crate::inventory;
use crate::spec::ModelSpec;
use crate::tokenizer::Tokenizer;

const LIMIT_BYTES: u64 = 16 << 20;

/// What a folder holds.
pub struct ModelFolder {
    pub path: PathBuf,
    /// `config.json` as it was read.
    pub config_text: String,
    pub spec: ModelSpec,
    pub source: Arc<dyn TensorSource>,
    pub tokenizer: Tokenizer,
    /// Ids that end a text: of `generation_config.json`, else of the config.
    pub eos: Vec<u32>,
    /// `chat_template.jinja`, or the default of `tokenizer_config.json`; not rendered here.
    pub chat_template: Option<String>,
    /// `bos_token`, `eos_token`, … of `tokenizer_config.json`: chat templates name them.
    pub special_tokens: BTreeMap<String, String>,
}

impl ModelFolder {
    /// Opens a Hugging Face folder.
    ///
    /// # Errors
    /// A missing or broken file, a config or a tokenizer that cannot be served, tensors that are not the config's.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let config_file = path.join("config.json");
        let config_text = files::read_text(&config_file, LIMIT_BYTES)?;
        // The config first: an unknown architecture is better news than a missing shard.
        let spec = families::parse_config(&config_file, &config_text)?;
        let source = families::unstack(&spec, Arc::new(Safetensors::open(path)?))?;
        inventory::check(&spec, source.as_ref(), true)?;
        Self::assemble(path, config_text, spec, source)
    }

    /// The same for a folder whose config and tensors (without routed experts) come from elsewhere; `config_file` is
    /// named in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn with_source(
        path: &Path,
        config_file: &Path,
        config_text: String,
        source: Arc<dyn TensorSource>,
    ) -> Result<Self, ModelError> {
        let mut spec = families::parse_config(config_file, &config_text)?;
        inventory::narrow_values(&mut spec, source.as_ref());
        inventory::check(&spec, source.as_ref(), false)?;
        Self::assemble(path, config_text, spec, source)
    }

    fn assemble(
        path: &Path,
        config_text: String,
        spec: ModelSpec,
        source: Arc<dyn TensorSource>,
    ) -> Result<Self, ModelError> {
        let tokenizer = Tokenizer::load(path, spec.vocab)?;
        let eos = match optional(path, "generation_config.json")? {
            Some(mut keys) => {
                let ids = keys.numbers("eos_token_id")?;
                if let Some(id) = ids.iter().flatten().find(|&&id| id as usize >= spec.vocab) {
                    let expected = format!("below vocab_size {}", spec.vocab);
                    return Err(keys.wrong("eos_token_id", id, expected).into());
                }
                ids
            }
            None => None,
        };
        let tokenizer_config = json(path, "tokenizer_config.json")?.unwrap_or(Value::Null);
        let template_file = path.join("chat_template.jinja");
        let chat_template = if template_file.exists() {
            Some(files::read_text(&template_file, LIMIT_BYTES)?)
        } else {
            template(&tokenizer_config)
        };
        Ok(Self {
            path: path.to_owned(),
            config_text,
            source,
            tokenizer,
            eos: eos.unwrap_or_else(|| spec.eos.clone()),
            chat_template,
            special_tokens: special_tokens(&tokenizer_config),
            spec,
        })
    }
}

fn optional(path: &Path, name: &str) -> Result<Option<Keys>, ModelError> {
    let file = path.join(name);
    if !file.exists() {
        return Ok(None);
    }
    let text = files::read_text(&file, LIMIT_BYTES)?;
    Ok(Some(Keys::parse(&file, &text)?))
}

fn json(path: &Path, name: &str) -> Result<Option<Value>, ModelError> {
    let file = path.join(name);
    if !file.exists() {
        return Ok(None);
    }
    let text = files::read_text(&file, LIMIT_BYTES)?;
    let value = serde_json::from_str(&text).map_err(|e| ConfigError::Json {
        file,
        detail: e.to_string(),
    })?;
    Ok(Some(value))
}

/// One template, or a list of named ones of which `default` is meant.
fn template(tokenizer_config: &Value) -> Option<String> {
    match tokenizer_config.get("chat_template")? {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => {
            let of = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
            let default = named.iter().find(|e| of(e, "name").as_deref() == Some("default"));
            of(default.or(named.first())?, "template")
        }
        _ => None,
    }
}

/// Each is a string, or an object with `content`.
fn special_tokens(tokenizer_config: &Value) -> BTreeMap<String, String> {
    let Value::Object(map) = tokenizer_config else {
        return BTreeMap::new();
    };
    let text = |value: &Value| {
        value
            .as_str()
            .or_else(|| value.get("content")?.as_str())
            .map(str::to_owned)
    };
    map.iter()
        .filter(|(key, _)| key.ends_with("_token"))
        .filter_map(|(key, value)| Some((key.clone(), text(value)?)))
        .collect()
}
