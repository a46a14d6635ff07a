//! `config.json` as typed keys: each is taken once, with its type; what a family leaves over is refused by name
//! unless it cannot change the forward pass. Which keys mean what: `families`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// Why a config cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(transparent)]
    File(#[from] cotk_run::Error),
    #[error("{}: {detail}", file.display())]
    Json { file: PathBuf, detail: String },
    /// A shape key that has no honest default.
    #[error("{}: no key `{key}`", file.display())]
    Missing { file: PathBuf, key: String },
    #[error("{}: key `{key}`: found {found}, expected {expected}", file.display())]
    Value {
        file: PathBuf,
        key: String,
        found: String,
        expected: String,
    },
    #[error("{}: architecture `{found}` is not supported, expected one of: {}", file.display(), known.join(", "))]
    Architecture {
        file: PathBuf,
        found: String,
        known: Vec<&'static str>,
    },
    /// A key that might change the forward pass and that nobody here knows.
    #[error("{}: unknown key `{key}` = {found}{}", file.display(), nearest.as_ref().map_or(String::new(), |n| format!(" (nearest: `{n}`)")))]
    UnknownKey {
        file: PathBuf,
        key: String,
        found: String,
        nearest: Option<String>,
    },
}

/// Keys of every Hugging Face config that say nothing about the forward pass of a decoder.
const HARMLESS: [&str; 63] = [
    "_attn_implementation_autoset",
    "_commit_hash",
    "_experts_implementation",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "model_type",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
];

/// Keys of the same configs that say nothing as long as they have this value: another asks for what no decoder here does.
fn is_neutral(key: &str, value: &Value) -> bool {
    match key {
        "add_cross_attention" | "is_encoder_decoder" => value == &Value::Bool(false),
        "chunk_size_feed_forward" => value.as_u64() == Some(0),
        "pruned_heads" => value.as_object().is_some_and(Map::is_empty),
        _ => HARMLESS.contains(&key),
    }
}

/// The keys of one JSON object that nobody has taken yet. A key that is `null` counts as absent.
pub(crate) struct Keys {
    file: PathBuf,
    /// `rope_parameters.` inside a nested object.
    prefix: String,
    map: Map<String, Value>,
    asked: Vec<&'static str>,
}

impl Keys {
    /// Parses a config's text.
    pub(crate) fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_str(text).map_err(|e| ConfigError::Json {
            file: file.to_owned(),
            detail: e.to_string(),
        })?;
        let Value::Object(map) = value else {
            return Err(ConfigError::Json {
                file: file.to_owned(),
                detail: "is not a JSON object".into(),
            });
        };
        Ok(Self::of(file.to_owned(), String::new(), map))
    }

    fn of(file: PathBuf, prefix: String, mut map: Map<String, Value>) -> Self {
        map.retain(|_, value| !value.is_null());
        Self {
            file,
            prefix,
            map,
            asked: Vec::new(),
        }
    }

    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    fn take(&mut self, key: &'static str) -> Option<Value> {
        self.asked.push(key);
        self.map.remove(key)
    }

    /// An error about the value of `key`.
    pub(crate) fn wrong(&self, key: &str, found: impl ToString, expected: impl ToString) -> ConfigError {
        ConfigError::Value {
            file: self.file.clone(),
            key: format!("{}{key}", self.prefix),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, ConfigError> {
        value.ok_or_else(|| ConfigError::Missing {
            file: self.file.clone(),
            key: format!("{}{key}", self.prefix),
        })
    }

    /// A whole number from 0 to `limit`.
    pub(crate) fn count_at_most(&mut self, key: &'static str, limit: usize) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        value
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .filter(|&n| n <= limit)
            .map(Some)
            .ok_or_else(|| self.wrong(key, &value, format!("a whole number up to {limit}")))
    }

    /// A size that must be there: from 1 to `limit`.
    pub(crate) fn size(&mut self, key: &'static str, limit: usize) -> Result<usize, ConfigError> {
        let count = self.count_at_most(key, limit)?;
        match self.required(key, count)? {
            0 => Err(self.wrong(key, 0, format!("1 to {limit}"))),
            size => Ok(size),
        }
    }

    pub(crate) fn flag(&mut self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        self.take(key)
            .map(|value| value.as_bool().ok_or_else(|| self.wrong(key, &value, "true or false")))
            .transpose()
    }

    /// A finite number above 0.
    pub(crate) fn positive(&mut self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        self.take(key)
            .map(|value| {
                value
                    .as_f64()
                    .filter(|x| x.is_finite() && *x > 0.0)
                    .ok_or_else(|| self.wrong(key, &value, "a number above 0"))
            })
            .transpose()
    }

    /// A finite number, 0 too.
    pub(crate) fn at_least_zero(&mut self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        self.take(key)
            .map(|value| {
                value
                    .as_f64()
                    .filter(|x| x.is_finite() && *x >= 0.0)
                    .ok_or_else(|| self.wrong(key, &value, "a number from 0"))
            })
            .transpose()
    }

    pub(crate) fn required_positive(&mut self, key: &'static str) -> Result<f64, ConfigError> {
        let value = self.positive(key)?;
        self.required(key, value)
    }

    pub(crate) fn text(&mut self, key: &'static str) -> Result<Option<String>, ConfigError> {
        self.take(key)
            .map(|value| {
                value
                    .as_str()
                    .map(str::to_owned)
                    .ok_or_else(|| self.wrong(key, &value, "a string"))
            })
            .transpose()
    }

    /// A list of token ids or layer numbers; a single number is a list of one.
    pub(crate) fn numbers(&mut self, key: &'static str) -> Result<Option<Vec<u32>>, ConfigError> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        let number = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let numbers = match &value {
            Value::Array(list) => list.iter().map(number).collect(),
            single => number(single).map(|n| vec![n]),
        };
        numbers
            .map(Some)
            .ok_or_else(|| self.wrong(key, &value, "whole numbers"))
    }

    pub(crate) fn texts(&mut self, key: &'static str) -> Result<Option<Vec<String>>, ConfigError> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        value
            .as_array()
            .and_then(|list| list.iter().map(|v| v.as_str().map(str::to_owned)).collect())
            .map(Some)
            .ok_or_else(|| self.wrong(key, &value, "a list of strings"))
    }

    /// A nested object, its keys to be finished on their own.
    pub(crate) fn object(&mut self, key: &'static str) -> Result<Option<Self>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self::of(self.file.clone(), format!("{}{key}.", self.prefix), map))),
            Some(value) => Err(self.wrong(key, value, "an object")),
        }
    }

    /// A key that is read and not used.
    pub(crate) fn ignore(&mut self, keys: &[&'static str]) {
        for key in keys {
            self.take(key);
        }
    }

    /// Refuses what is left: a key that nobody took might change the forward pass.
    pub(crate) fn finish(self) -> Result<(), ConfigError> {
        match self.map.iter().find(|(key, value)| !is_neutral(key, value)) {
            None => Ok(()),
            Some((key, value)) => Err(ConfigError::UnknownKey {
                nearest: cotk_run::recipe::nearest_of(key, self.asked.iter().copied()),
                file: self.file.clone(),
                key: format!("{}{key}", self.prefix),
                found: value.to_string(),
            }),
        }
    }
}
