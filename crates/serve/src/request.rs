//! From the bytes of a request to a type that cannot be wrong. Knows the fields and their limits, not the model: prompts
//! become tokens in [`crate::http`]. Law: a field that is understood is checked and named when wrong, one that the server
//! does not do is refused by name, one that nobody knows is ignored; under `cotk` nothing is ignored.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;
use cotk_model::moe::Mode;
use cotk_model::sampling::Sampling;

/// Most prompts in one request, and most stop strings.
const PROMPTS_LIMIT: usize = 64;
const STOPS_LIMIT: usize = 4;
const STOP_LIMIT_BYTES: usize = 256;
/// OpenAI's own limits of `logprobs` and `top_logprobs`.
const COMPLETION_LOGPROBS: u64 = 5;
const CHAT_LOGPROBS: u64 = 20;
/// What OpenAI's completions generate when nobody says.
const COMPLETION_MAX_TOKENS: usize = 16;

/// Which of the two endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Completions,
    Chat,
}

/// What to continue.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    /// Messages, each an object whose `content` is a string.
    Chat(Vec<Value>),
}

/// A request that is right as far as it can be judged without the model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Asked {
    pub(crate) endpoint: Endpoint,
    pub(crate) model: Option<String>,
    pub(crate) prompts: Vec<Prompt>,
    /// Absent: to the end of the context.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) sampling: Sampling,
    pub(crate) seed: Option<u64>,
    pub(crate) stops: Vec<String>,
    /// How many alternatives each token is reported with; absent: no log-probabilities at all.
    pub(crate) logprobs: Option<usize>,
    pub(crate) mode: Option<Mode>,
    pub(crate) is_streamed: bool,
    pub(crate) is_usage_streamed: bool,
}

impl Asked {
    /// # Errors
    /// 400 with line and column for what is not JSON, else with the field.
    pub(crate) fn parse(endpoint: Endpoint, body: &[u8]) -> Result<Self, ApiError> {
        let value: Value =
            serde_json::from_slice(body).map_err(|error| ApiError::invalid_json(format!("invalid JSON: {error}")))?;
        let Value::Object(object) = &value else {
            return Err(ApiError::invalid_json(format!(
                "the body is {}, expected a JSON object",
                kind(&value)
            )));
        };
        let fields = Fields { object, prefix: "" };
        refuse_unsupported(&fields)?;
        let is_streamed = fields.flag("stream")?.unwrap_or(false);
        let (mode, is_usage_streamed) = (mode(&fields)?, usage_streamed(&fields, is_streamed)?);
        let prompts = match endpoint {
            Endpoint::Completions => prompts(&fields)?,
            Endpoint::Chat => vec![Prompt::Chat(messages(&fields)?)],
        };
        let newer = fields.count("max_completion_tokens", 1..=u64::from(u32::MAX))?;
        let older = fields.count("max_tokens", 1..=u64::from(u32::MAX))?;
        let default = (endpoint == Endpoint::Completions).then_some(COMPLETION_MAX_TOKENS);
        Ok(Self {
            endpoint,
            model: fields.text("model")?.map(str::to_owned),
            prompts,
            max_tokens: newer.or(older).and_then(|n| usize::try_from(n).ok()).or(default),
            sampling: sampling(&fields)?,
            seed: seed(&fields)?,
            stops: stops(&fields)?,
            logprobs: logprobs(&fields, endpoint)?,
            mode,
            is_streamed,
            is_usage_streamed,
        })
    }
}

/// Fields of OpenAI's that this server does not do: fine where they ask for nothing, refused by name otherwise.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ApiError> {
    let asks_nothing = |key: &str, value: &Value| match key {
        "n" | "best_of" => value.as_f64() == Some(1.0),
        "echo" => *value == Value::Bool(false),
        "frequency_penalty" | "presence_penalty" | "min_p" => value.as_f64() == Some(0.0),
        "top_k" => matches!(value.as_i64(), Some(0 | -1)),
        "repetition_penalty" => value.as_f64() == Some(1.0),
        "logit_bias" => value.as_object().is_some_and(Map::is_empty),
        "suffix" => value.as_str() == Some(""),
        "tools" | "functions" => value.as_array().is_some_and(Vec::is_empty),
        "tool_choice" | "function_call" => value
            .as_str()
            .is_some_and(|choice| choice == "none" || choice == "auto"),
        "response_format" => value["type"] == "text",
        "modalities" => value
            .as_array()
            .is_some_and(|kinds| kinds.iter().all(|kind| kind == "text")),
        _ => false,
    };
    let supported = [
        ("n", "1"),
        ("best_of", "1"),
        ("echo", "false"),
        ("suffix", "none"),
        ("frequency_penalty", "0"),
        ("presence_penalty", "0"),
        ("repetition_penalty", "1"),
        ("min_p", "0"),
        ("top_k", "none"),
        ("logit_bias", "none"),
        ("tools", "none"),
        ("functions", "none"),
        ("tool_choice", "none"),
        ("function_call", "none"),
        ("response_format", "text"),
        ("modalities", "text"),
        ("audio", "none"),
        ("prediction", "none"),
    ];
    for (key, expected) in supported {
        if let Some(value) = fields.get(key)
            && !asks_nothing(key, value)
        {
            return Err(ApiError::unsupported(key, value, expected));
        }
    }
    Ok(())
}

#[expect(clippy::cast_possible_truncation, reason = "what a client types has few digits")]
fn sampling(fields: &Fields<'_>) -> Result<Sampling, ApiError> {
    let temperature = fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0);
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0);
    // 0 is allowed by OpenAI: the likeliest token alone.
    Sampling::new(temperature as f32, (top_p as f32).max(f32::MIN_POSITIVE))
        .map_err(|error| ApiError::invalid("temperature", error.to_string()))
}

fn mode(fields: &Fields<'_>) -> Result<Option<Mode>, ApiError> {
    let own = match fields.get("cotk") {
        None => return Ok(None),
        Some(Value::Object(own)) => own,
        Some(other) => return Err(wrong_type("cotk", other, "an object")),
    };
    if let Some(unknown) = own.keys().find(|key| *key != "mode") {
        return Err(ApiError::invalid(
            format!("cotk.{unknown}"),
            format!("unknown key `cotk.{unknown}`, expected `cotk.mode`"),
        ));
    }
    let own = Fields {
        object: own,
        prefix: "cotk.",
    };
    match own.text("mode")? {
        None => Ok(None),
        Some(name) => mode_named(name).map(Some).ok_or_else(|| {
            ApiError::invalid(
                "cotk.mode",
                format!("`cotk.mode`: found `{name}`, expected `exact` or `little`"),
            )
        }),
    }
}

fn mode_named(name: &str) -> Option<Mode> {
    [Mode::Exact, Mode::Little].into_iter().find(|mode| mode.name() == name)
}

fn usage_streamed(fields: &Fields<'_>, is_streamed: bool) -> Result<bool, ApiError> {
    match fields.get("stream_options") {
        None => Ok(false),
        Some(_) if !is_streamed => Err(ApiError::invalid(
            "stream_options",
            "`stream_options` needs `stream`: true",
        )),
        Some(Value::Object(options)) => {
            let options = Fields {
                object: options,
                prefix: "stream_options.",
            };
            Ok(options.flag("include_usage")?.unwrap_or(false))
        }
        Some(other) => Err(wrong_type("stream_options", other, "an object")),
    }
}

fn prompts(fields: &Fields<'_>) -> Result<Vec<Prompt>, ApiError> {
    let expected = "a string, a list of strings, a list of token ids, or a list of lists of token ids";
    let prompts = match fields.get("prompt") {
        None => return Err(ApiError::invalid("prompt", "`prompt` is missing")),
        Some(Value::String(text)) => vec![Prompt::Text(text.clone())],
        Some(Value::Array(items)) => match items.first() {
            Some(Value::Number(_)) => vec![Prompt::Tokens(tokens(items, "prompt")?)],
            _ => {
                let one = |(at, item): (usize, &Value)| match item {
                    Value::String(text) => Ok(Prompt::Text(text.clone())),
                    Value::Array(items) => tokens(items, &format!("prompt[{at}]")).map(Prompt::Tokens),
                    other => Err(wrong_type(&format!("prompt[{at}]"), other, expected)),
                };
                items.iter().enumerate().map(one).collect::<Result<_, _>>()?
            }
        },
        Some(other) => return Err(wrong_type("prompt", other, expected)),
    };
    match prompts.len() {
        0 => Err(ApiError::invalid("prompt", "`prompt` is empty")),
        1..=PROMPTS_LIMIT => Ok(prompts),
        found => Err(ApiError::invalid(
            "prompt",
            format!("{found} prompts, expected at most {PROMPTS_LIMIT}"),
        )),
    }
}

fn tokens(items: &[Value], name: &str) -> Result<Vec<u32>, ApiError> {
    let token = |(at, item): (usize, &Value)| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong_type(&format!("{name}[{at}]"), item, "a token id"))
    };
    items.iter().enumerate().map(token).collect()
}

/// The messages, each with its content as one string.
fn messages(fields: &Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let items = match fields.get("messages") {
        None => return Err(ApiError::invalid("messages", "`messages` is missing")),
        Some(Value::Array(items)) if items.is_empty() => {
            return Err(ApiError::invalid("messages", "`messages` is empty"));
        }
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type("messages", other, "a list of messages")),
    };
    items.iter().enumerate().map(|(at, item)| message(at, item)).collect()
}

fn message(at: usize, item: &Value) -> Result<Value, ApiError> {
    let name = format!("messages[{at}]");
    let Value::Object(object) = item else {
        return Err(wrong_type(&name, item, "an object with `role` and `content`"));
    };
    match object.get("role") {
        Some(Value::String(_)) => {}
        Some(other) => return Err(wrong_type(&format!("{name}.role"), other, "a string")),
        None => {
            return Err(ApiError::invalid(
                format!("{name}.role"),
                format!("`{name}.role` is missing"),
            ));
        }
    }
    let content = match object.get("content") {
        Some(Value::String(text)) => text.clone(),
        None | Some(Value::Null) => String::new(),
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for (part_at, part) in parts.iter().enumerate() {
                let part_name = format!("{name}.content[{part_at}]");
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(piece)) => text.push_str(piece),
                    (Some("text") | None, _) => return Err(wrong_type(&part_name, part, "a text part")),
                    (Some(_), _) => return Err(ApiError::unsupported(&part_name, &part["type"], "text")),
                }
            }
            text
        }
        Some(other) => {
            return Err(wrong_type(
                &format!("{name}.content"),
                other,
                "a string or a list of text parts",
            ));
        }
    };
    let mut message = object.clone();
    message.insert("content".into(), Value::String(content));
    Ok(Value::Object(message))
}

fn seed(fields: &Fields<'_>) -> Result<Option<u64>, ApiError> {
    match fields.get("seed") {
        None => Ok(None),
        Some(value) => value
            .as_u64()
            .or_else(|| value.as_i64().map(i64::cast_unsigned))
            .map(Some)
            .ok_or_else(|| wrong_type("seed", value, "an integer")),
    }
}

fn stops(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let expected = "a string or a list of up to 4 strings";
    let stops = match fields.get("stop") {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(items)) if items.len() <= STOPS_LIMIT => items
            .iter()
            .map(|item| item.as_str().map(str::to_owned))
            .map(|stop| stop.ok_or_else(|| wrong_type("stop", &fields.object["stop"], expected)))
            .collect::<Result<_, _>>()?,
        Some(Value::Array(items)) => {
            return Err(ApiError::invalid(
                "stop",
                format!("{} stop strings, expected at most {STOPS_LIMIT}", items.len()),
            ));
        }
        Some(other) => return Err(wrong_type("stop", other, expected)),
    };
    if let Some(stop) = stops
        .iter()
        .find(|stop| stop.is_empty() || stop.len() > STOP_LIMIT_BYTES)
    {
        return Err(ApiError::invalid(
            "stop",
            format!(
                "a stop string has {} bytes, expected 1 to {STOP_LIMIT_BYTES}",
                stop.len()
            ),
        ));
    }
    Ok(stops)
}

fn logprobs(fields: &Fields<'_>, endpoint: Endpoint) -> Result<Option<usize>, ApiError> {
    let top = match endpoint {
        Endpoint::Completions => match fields.get("logprobs") {
            Some(Value::Bool(false)) => None,
            _ => fields.count("logprobs", 0..=COMPLETION_LOGPROBS)?,
        },
        Endpoint::Chat => {
            let is_asked = fields.flag("logprobs")?.unwrap_or(false);
            match fields.count("top_logprobs", 0..=CHAT_LOGPROBS)? {
                Some(_) if !is_asked => {
                    return Err(ApiError::invalid(
                        "top_logprobs",
                        "`top_logprobs` needs `logprobs`: true",
                    ));
                }
                top => is_asked.then(|| top.unwrap_or(0)),
            }
        }
    };
    Ok(top.and_then(|top| usize::try_from(top).ok()))
}

/// An object's fields by name; null counts as absent.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// Stands before names in messages: `cotk.`.
    prefix: &'static str,
}

impl<'a> Fields<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ApiError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(wrong_type(&self.name(key), other, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ApiError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.name(key), other, "a string")),
        }
    }

    fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if range.contains(&number) => Ok(Some(number)),
                _ => Err(wrong_type(&self.name(key), value, &expected)),
            },
        }
    }

    fn count(&self, key: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(number) if range.contains(&number) => Ok(Some(number)),
                _ => Err(wrong_type(&self.name(key), value, &expected)),
            },
        }
    }
}

fn wrong_type(name: &str, found: &Value, expected: &str) -> ApiError {
    let found = match found {
        Value::Number(number) => number.to_string(),
        Value::Bool(flag) => flag.to_string(),
        other => kind(other).to_owned(),
    };
    ApiError::invalid(name, format!("`{name}`: found {found}, expected {expected}"))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn completions(body: &Value) -> Result<Asked, ApiError> {
        Asked::parse(Endpoint::Completions, body.to_string().as_bytes())
    }

    fn chat(body: &Value) -> Result<Asked, ApiError> {
        Asked::parse(Endpoint::Chat, body.to_string().as_bytes())
    }

    /// Every field of the request, right.
    fn whole() -> Value {
        json!({
            "model": "m", "messages": [{"role": "user", "content": "x"}], "prompt": "x", "max_tokens": 3,
            "temperature": 0.5, "top_p": 0.9, "seed": -1, "stop": ["a", "b"], "stream": true,
            "stream_options": {"include_usage": true}, "n": 1, "cotk": {"mode": "little"}, "nobody_knows": 7,
            "user": null,
        })
    }

    #[test]
    fn what_is_typed_is_what_is_asked() {
        let asked = completions(&whole()).unwrap();
        assert_eq!(asked.prompts, [Prompt::Text("x".into())]);
        assert_eq!(
            (asked.max_tokens, asked.sampling),
            (Some(3), Sampling::new(0.5, 0.9).unwrap())
        );
        assert_eq!((asked.seed, asked.mode), (Some(u64::MAX), Some(Mode::Little)));
        assert!(asked.is_streamed && asked.is_usage_streamed);
        assert_eq!(completions(&json!({"prompt": ""})).unwrap().max_tokens, Some(16));
        let asked = chat(&json!({"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 5}));
        assert_eq!(asked.unwrap().max_tokens, Some(5));
    }

    #[test]
    fn prompts_come_in_four_forms() {
        let forms = json!([["a", 1], [["a", "b"], 2], [[1, 2, 3], 1], [[[1], [2, 3]], 2],]);
        for form in forms.as_array().unwrap() {
            let asked = completions(&json!({"prompt": form[0]})).unwrap();
            assert_eq!(asked.prompts.len() as u64, form[1].as_u64().unwrap(), "{form}");
        }
    }

    #[test]
    fn content_parts_become_one_text() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let asked = chat(&json!({"messages": [{"role": "user", "content": parts}]})).unwrap();
        assert_eq!(
            asked.prompts,
            [Prompt::Chat(vec![json!({"role": "user", "content": "ab"})])]
        );
    }

    #[test]
    fn each_wrong_field_is_named() {
        let cases = json!([
            ["temperature", "hot", "temperature"],
            ["temperature", 3, "temperature"],
            ["top_p", -0.1, "top_p"],
            ["max_tokens", 0, "max_tokens"],
            ["max_tokens", 1.5, "max_tokens"],
            ["stream", "yes", "stream"],
            ["seed", 0.5, "seed"],
            ["stop", ["a", "b", "c", "d", "e"], "stop"],
            ["stop", [""], "stop"],
            ["stop", [3], "stop"],
            ["n", 2, "n"],
            ["best_of", 3, "best_of"],
            ["echo", true, "echo"],
            ["suffix", "x", "suffix"],
            ["logit_bias", {"5": 1}, "logit_bias"],
            ["frequency_penalty", 0.5, "frequency_penalty"],
            ["tools", [{}], "tools"],
            ["response_format", {"type": "json_object"}, "response_format"],
            ["model", 5, "model"],
            ["cotk", "little", "cotk"],
            ["cotk", {"mode": "medium"}, "cotk.mode"],
            ["cotk", {"mood": "exact"}, "cotk.mood"],
            ["stream_options", 3, "stream_options"],
            ["stream_options", {"include_usage": 3}, "stream_options.include_usage"],
            ["prompt", [], "prompt"],
            ["prompt", [1, "a"], "prompt[1]"],
            ["prompt", 7, "prompt"],
            ["prompt", [-1], "prompt[0]"],
            ["logprobs", 6, "logprobs"],
        ]);
        for case in cases.as_array().unwrap() {
            let mut body = whole();
            let key = case[0].as_str().unwrap();
            body[key] = case[1].clone();
            let error = completions(&body).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, case[2].as_str()),
                "{case}"
            );
            assert!(error.message.contains(key), "{}", error.message);
        }
    }

    #[test]
    fn each_wrong_message_is_named() {
        let cases = json!([
            [[], "messages"],
            ["x", "messages"],
            [["x"], "messages[0]"],
            [[{"content": "x"}], "messages[0].role"],
            [[{"role": "user", "content": 3}], "messages[0].content"],
            [[{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"],
        ]);
        for case in cases.as_array().unwrap() {
            let error = chat(&json!({"messages": case[0]})).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, case[1].as_str()),
                "{case}"
            );
        }
        let error = chat(&json!({"messages": [{"role": "user"}], "top_logprobs": 3})).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("top_logprobs"));
    }

    #[test]
    fn broken_json_is_placed() {
        let error = Asked::parse(Endpoint::Chat, b"{\n \"a\": }").unwrap_err();
        assert!(error.message.contains("line 2 column 7"), "{}", error.message);
        assert_eq!(error.code, Some("invalid_json"));
        assert!(Asked::parse(Endpoint::Chat, b"[]").is_err());
        assert!(Asked::parse(Endpoint::Chat, &[b'['; 100_000]).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_changed_byte_never_panics(at in 0usize..400, byte in any::<u8>()) {
            let mut body = whole().to_string().into_bytes();
            let at = at % body.len();
            body[at] = byte;
            let _ = Asked::parse(Endpoint::Completions, &body);
            let _ = Asked::parse(Endpoint::Chat, &body[..at]);
        }
    }
}
