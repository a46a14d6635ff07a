//! The JSON of replies in OpenAI's shapes, whole and streamed. No I/O, no clock but `created`. Law: the pieces of a
//! stream joined are the whole reply.

use serde_json::{Value, json};

use crate::request::Endpoint;
use crate::sequence::{Delta, Finish, Likely, Summary, Times, TokenReport};

/// What all chunks of one reply share.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) endpoint: Endpoint,
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) has_logprobs: bool,
    pub(crate) is_usage_streamed: bool,
}

/// One choice, collected.
#[derive(Debug, Default)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) tokens: Vec<TokenReport>,
    pub(crate) summary: Option<Summary>,
}

impl Choice {
    pub(crate) fn push(&mut self, delta: Delta) {
        self.text.push_str(&delta.text);
        self.tokens.extend(delta.tokens);
    }
}

impl Frame {
    /// The reply without `stream`.
    pub(crate) fn whole(&self, choices: &[Choice]) -> Value {
        let summaries: Vec<Summary> = choices.iter().filter_map(|choice| choice.summary.clone()).collect();
        let one = |(index, choice): (usize, &Choice)| {
            let finish = choice.summary.as_ref().map(|summary| summary.finish.name());
            let mut value = json!({
                "index": index,
                "finish_reason": finish,
                "logprobs": self.logprobs(&choice.tokens),
            });
            match self.endpoint {
                Endpoint::Completions => value["text"] = json!(choice.text),
                Endpoint::Chat => {
                    value["message"] = json!({ "role": "assistant", "content": choice.text, "refusal": null });
                }
            }
            value
        };
        let mut reply = self.head(false);
        reply["choices"] = choices.iter().enumerate().map(one).collect();
        reply["usage"] = usage(&summaries);
        reply["cotk"] = own(&summaries);
        reply
    }

    /// What opens a streamed choice; completions have nothing to say before their text.
    pub(crate) fn opening(&self, index: usize) -> Option<Value> {
        match self.endpoint {
            Endpoint::Completions => None,
            Endpoint::Chat => Some(self.chunk(index, json!({ "role": "assistant", "content": "" }), &[], None)),
        }
    }

    /// A piece of a streamed choice; nothing for a piece that says nothing.
    pub(crate) fn piece(&self, index: usize, delta: &Delta) -> Option<Value> {
        if *delta == Delta::default() {
            return None;
        }
        let content = match self.endpoint {
            Endpoint::Completions => json!(delta.text),
            Endpoint::Chat => json!({ "content": delta.text }),
        };
        Some(self.chunk(index, content, &delta.tokens, None))
    }

    /// The end of a streamed choice; with the last of them goes what is our own.
    pub(crate) fn ending(&self, index: usize, finish: Finish, all: Option<&[Summary]>) -> Value {
        let content = match self.endpoint {
            Endpoint::Completions => json!(""),
            Endpoint::Chat => json!({}),
        };
        let mut chunk = self.chunk(index, content, &[], Some(finish));
        if let Some(summaries) = all {
            chunk["cotk"] = own(summaries);
        }
        chunk
    }

    /// The chunk of `stream_options.include_usage`, before `[DONE]`.
    pub(crate) fn usage_chunk(&self, summaries: &[Summary]) -> Value {
        let mut chunk = self.head(true);
        chunk["choices"] = json!([]);
        chunk["usage"] = usage(summaries);
        chunk
    }

    fn chunk(&self, index: usize, content: Value, tokens: &[TokenReport], finish: Option<Finish>) -> Value {
        let key = match self.endpoint {
            Endpoint::Completions => "text",
            Endpoint::Chat => "delta",
        };
        let mut chunk = self.head(true);
        chunk["choices"] = json!([{
            "index": index,
            key: content,
            "logprobs": if tokens.is_empty() { Value::Null } else { self.logprobs(tokens) },
            "finish_reason": finish.map(Finish::name),
        }]);
        if self.is_usage_streamed {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn head(&self, is_chunk: bool) -> Value {
        let object = match (self.endpoint, is_chunk) {
            (Endpoint::Completions, _) => "text_completion",
            (Endpoint::Chat, false) => "chat.completion",
            (Endpoint::Chat, true) => "chat.completion.chunk",
        };
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model })
    }

    fn logprobs(&self, tokens: &[TokenReport]) -> Value {
        if !self.has_logprobs {
            return Value::Null;
        }
        match self.endpoint {
            Endpoint::Completions => completion_logprobs(tokens),
            Endpoint::Chat => chat_logprobs(tokens),
        }
    }
}

fn token_text(likely: &Likely) -> String {
    String::from_utf8_lossy(&likely.bytes).into_owned()
}

/// Parallel lists; offsets in characters from the start of the reply.
fn completion_logprobs(tokens: &[TokenReport]) -> Value {
    let alternatives = |report: &TokenReport| {
        let mut map = serde_json::Map::new();
        // Worst first: of two tokens with the same text the likelier one stays.
        for likely in report.top.iter().rev() {
            map.insert(token_text(likely), json!(likely.logprob));
        }
        Value::Object(map)
    };
    json!({
        "tokens": tokens.iter().map(|t| token_text(&t.choice)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.choice.logprob).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(alternatives).collect::<Vec<_>>(),
        "text_offset": tokens.iter().map(|t| t.offset).collect::<Vec<_>>(),
    })
}

fn chat_logprobs(tokens: &[TokenReport]) -> Value {
    let likely =
        |likely: &Likely| json!({ "token": token_text(likely), "logprob": likely.logprob, "bytes": likely.bytes });
    let one = |report: &TokenReport| {
        let mut value = likely(&report.choice);
        value["top_logprobs"] = report.top.iter().map(likely).collect();
        value
    };
    json!({ "content": tokens.iter().map(one).collect::<Vec<_>>(), "refusal": null })
}

fn usage(summaries: &[Summary]) -> Value {
    let prompt: usize = summaries.iter().map(|s| s.prompt_tokens).sum();
    let generated: usize = summaries.iter().map(|s| s.generated_tokens).sum();
    json!({ "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated })
}

/// What stands under `cotk` in a reply: the mode used, what it cost in precision, where the time went.
#[expect(clippy::cast_precision_loss, reason = "counts of tokens, for rates of three digits")]
fn own(summaries: &[Summary]) -> Value {
    let computed = |s: &Summary| (s.prompt_tokens + s.generated_tokens) as f64;
    let total: f64 = summaries.iter().map(computed).sum();
    let mean = |of: fn(&Summary) -> f64| summaries.iter().map(|s| of(s) * computed(s)).sum::<f64>() / total.max(1.0);
    let longest = |of: fn(&Times) -> std::time::Duration| {
        summaries.iter().map(|s| of(&s.times).as_secs_f64()).fold(0.0, f64::max)
    };
    let (prefill_s, decode_s) = (longest(|t| t.prefill), longest(|t| t.decode));
    let prompt: usize = summaries.iter().map(|s| s.prompt_tokens).sum();
    let decoded: usize = summaries.iter().map(|s| s.generated_tokens.saturating_sub(1)).sum();
    let rate = |tokens: usize, seconds: f64| (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds);
    json!({
        "mode": summaries.first().map(|s| s.mode.name()),
        "low_bit_fraction": mean(|s| s.low_bit_fraction),
        "skipped_mass": mean(|s| s.skipped_mass),
        "timings": {
            "queue_ms": longest(|t| t.queue) * 1e3,
            "prefill_ms": prefill_s * 1e3,
            "decode_ms": decode_s * 1e3,
            "prefill_tokens_per_s": rate(prompt, prefill_s),
            "decode_tokens_per_s": rate(decoded, decode_s),
        },
    })
}
