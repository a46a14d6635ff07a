//! Chat templates: the Jinja text that checkpoints carry, run the way `transformers` runs it (trimmed blocks, Python's
//! string methods, `raise_exception`, `strftime_now`, `tojson`). Law: the rendered text has its special tokens already,
//! so that it is encoded without adding them again.

use std::collections::BTreeMap;
use std::path::Path;

use cotk_run::files;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Value as JinjaValue};
use serde_json::{Value, json};

use crate::clock;
use crate::error::{ApiError, Error};

/// Instructions that one rendering may execute: far beyond any real conversation, and below a second.
const FUEL: u64 = 20_000_000;
/// Larger than any published template.
const TEMPLATE_LIMIT_BYTES: u64 = 1 << 20;

/// ChatML, for models that have no template of their own.
const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
/// What ends a turn in [`CHATML`]: there it is plain text, which no end token catches.
const CHATML_END: &str = "<|im_end|>";

/// The special tokens that templates name: `bos_token`, `eos_token`, …
pub type SpecialTokens = BTreeMap<String, String>;

/// Turns messages into a prompt.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: SpecialTokens,
    is_fallback: bool,
}

impl ChatTemplate {
    /// The template that holds: `--chat-template F`, then the model's own, then ChatML as plain text. `origin` is where
    /// the model's own stands, for messages.
    ///
    /// # Errors
    /// When the file cannot be read, or a template does not parse.
    pub fn choose(
        file: Option<&Path>,
        own: Option<String>,
        origin: &str,
        special_tokens: SpecialTokens,
    ) -> Result<Self, Error> {
        match (file, own) {
            (Some(file), _) => {
                let text = files::read_text(file, TEMPLATE_LIMIT_BYTES)?;
                Self::parse(&file.display().to_string(), text, special_tokens)
            }
            (None, Some(text)) => Self::parse(origin, text, special_tokens),
            (None, None) => Self::chatml(special_tokens),
        }
    }

    /// ChatML as plain text.
    ///
    /// # Errors
    /// Never on this text.
    pub fn chatml(special_tokens: SpecialTokens) -> Result<Self, Error> {
        let mut template = Self::parse("ChatML", CHATML.into(), special_tokens)?;
        template.is_fallback = true;
        Ok(template)
    }

    /// From the template's text; `origin` is the file it came from, for messages.
    ///
    /// # Errors
    /// [`Error::Template`] with line and reason.
    pub fn parse(origin: &str, text: String, special_tokens: SpecialTokens) -> Result<Self, Error> {
        let broken = |line: usize, detail: String| Error::Template {
            origin: origin.to_owned(),
            line,
            detail,
        };
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| broken(1, error.to_string()))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: String| clock::format_now(&format));
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned("chat", text)
            .map_err(|error| broken(error.line().unwrap_or(1), describe(&error)))?;
        Ok(Self {
            environment,
            special_tokens,
            is_fallback: false,
        })
    }

    /// Whether the model has no template and ChatML stands in.
    pub fn is_fallback(&self) -> bool {
        self.is_fallback
    }

    /// Strings that end a reply besides the model's end tokens.
    pub fn stops(&self) -> &'static [&'static str] {
        if self.is_fallback { &[CHATML_END] } else { &[] }
    }

    /// The prompt of a conversation; each message's content is text by now.
    ///
    /// # Errors
    /// 400 with the template's own words (`raise_exception`) or its line.
    pub fn render(&self, messages: &[Value]) -> Result<String, ApiError> {
        let refused = |error: &minijinja::Error| {
            let line = error.line().map_or(String::new(), |line| format!(", line {line}"));
            ApiError::invalid("messages", format!("chat template{line}: {}", describe(error)))
        };
        let mut variables = json!({ "messages": messages, "add_generation_prompt": true });
        for (key, token) in &self.special_tokens {
            variables[key] = json!(token);
        }
        self.environment
            .get_template("chat")
            .and_then(|template| template.render(JinjaValue::from(Serde(variables))))
            .map_err(|error| refused(&error))
    }
}

fn describe(error: &minijinja::Error) -> String {
    error.detail().map_or_else(
        || error.kind().to_string(),
        |detail| format!("{}: {detail}", error.kind()),
    )
}

fn raise_exception(message: String) -> Result<JinjaValue, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// Python's `json.dumps(value, ensure_ascii=False)`: a blank after commas and colons, nothing escaped for HTML.
fn to_json(value: JinjaValue, options: Kwargs) -> Result<String, minijinja::Error> {
    use serde::Serialize;
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let result = match indent {
        Some(width) => {
            let blanks = vec![b' '; width.min(16)];
            let style = serde_json::ser::PrettyFormatter::with_indent(&blanks);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, style))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonStyle)),
    };
    result.map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    String::from_utf8(out).map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))
}

struct PythonStyle;

impl serde_json::ser::Formatter for PythonStyle {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, messages: &Value) -> Result<String, ApiError> {
        let special_tokens = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        let messages = messages.as_array().unwrap();
        let template = ChatTemplate::parse("test", template.into(), special_tokens.into()).unwrap();
        template.render(messages)
    }

    #[test]
    fn chatml_frames_each_turn_and_opens_the_reply() {
        let template = ChatTemplate::chatml(SpecialTokens::new()).unwrap();
        let messages = [
            json!({"role": "system", "content": "s"}),
            json!({"role": "user", "content": "u"}),
        ];
        assert_eq!(
            template.render(&messages).unwrap(),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(template.stops(), ["<|im_end|>"]);
    }

    #[test]
    fn what_published_templates_use_works() {
        // Python methods, loop controls, namespaces, slices, blocks on lines of their own.
        let template = "{{ bos_token }}\n{% set ns = namespace(last='') %}\n{% for m in messages %}\n    {% if m['role'] == 'system' %}\n        {% continue %}\n    {% endif %}\n{{ m['content'].strip().split(' ')[-1] | upper }}\n{%- set ns.last = m.role %}\n{% endfor %}\n{{ messages[1:] | length }}{{ ns.last }}{{ eos_token }}";
        let messages = json!([{"role": "system", "content": "x"}, {"role": "user", "content": " a b "}]);
        assert_eq!(render(template, &messages).unwrap(), "<s>\nB1user</s>");
    }

    #[test]
    fn tojson_is_pythons() {
        let messages = json!([{"a": [1, 2.5, null, true], "content": "<é>"}]);
        let out = render("{{ messages[0] | tojson }}", &messages).unwrap();
        assert_eq!(out, r#"{"a": [1, 2.5, null, true], "content": "<é>"}"#);
    }

    #[test]
    fn a_template_refuses_in_its_own_words() {
        let error = render("{{ raise_exception('roles must alternate') }}", &json!([])).unwrap_err();
        assert!(error.message.contains("roles must alternate"), "{}", error.message);
        assert_eq!(error.status.as_u16(), 400);
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% set x = b %}{% endfor %}{% endfor %}";
        assert_eq!(render(endless, &json!([])).unwrap_err().status.as_u16(), 400);
    }

    #[test]
    fn a_broken_template_names_its_line() {
        let error = ChatTemplate::parse("f.jinja", "a\n{% if %}".into(), SpecialTokens::new()).unwrap_err();
        assert!(
            error.to_string().starts_with("f.jinja: chat template, line 2: "),
            "{error}"
        );
    }
}
