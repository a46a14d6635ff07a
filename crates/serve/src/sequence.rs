//! One request on its way: prompt in chunks, then token by token, tokens to text, stop strings, log-probabilities.
//! Knows nothing of other requests or of HTTP. Law: what a client reads is the text before the first stop string, in
//! whole characters, whatever the pieces.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use cotk_model::moe::Mode;
use cotk_model::sampling::{Sampler, Sampling};
use cotk_run::seeds::Seeds;

use crate::engine::{Engine, EngineError, SequenceId, Step, TextStream};
use crate::likely::{log_softmax, top};
use crate::stop::StopMatcher;

/// A request as the scheduler runs it; all of it checked.
#[derive(Debug, Clone)]
pub(crate) struct Generation {
    /// At least one token, each below the vocabulary's size.
    pub(crate) prompt: Vec<u32>,
    /// At least 1; prompt and reply fit the context together.
    pub(crate) max_tokens: usize,
    pub(crate) sampling: Sampling,
    pub(crate) seed: u64,
    pub(crate) stops: Vec<String>,
    /// Alternatives to report for each token; absent: no log-probabilities.
    pub(crate) logprobs: Option<usize>,
    pub(crate) mode: Mode,
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    Stop,
    Length,
}

impl Finish {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A piece of a reply.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Delta {
    pub(crate) text: String,
    /// The tokens whose text begins in `text`, where log-probabilities were asked for.
    pub(crate) tokens: Vec<TokenReport>,
}

/// One generated token and how likely it was.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TokenReport {
    pub(crate) choice: Likely,
    /// The most likely tokens at that place, best first.
    pub(crate) top: Vec<Likely>,
    /// Characters of the reply before it.
    pub(crate) offset: usize,
}

/// A token with its natural log-probability.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Likely {
    pub(crate) bytes: Vec<u8>,
    pub(crate) logprob: f64,
}

/// What was done for one request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Summary {
    pub(crate) finish: Finish,
    pub(crate) mode: Mode,
    pub(crate) prompt_tokens: usize,
    pub(crate) generated_tokens: usize,
    /// 0..1, means over the computed tokens.
    pub(crate) low_bit_fraction: f64,
    pub(crate) skipped_mass: f64,
    pub(crate) times: Times,
}

/// Where the time of one request went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Times {
    pub(crate) queue: Duration,
    /// To the first token, from the start of the prompt.
    pub(crate) prefill: Duration,
    /// From the first token to the last.
    pub(crate) decode: Duration,
}

/// What a step gave its client.
#[derive(Debug, PartialEq)]
pub(crate) enum Turn {
    /// Nothing to send yet.
    Silent,
    Piece(Delta),
    /// The last piece and the sum.
    Last(Delta, Summary),
}

/// A request in a slot: what goes into the model next, and its text.
pub(crate) struct Running<'e> {
    engine: &'e dyn Engine,
    generation: Generation,
    sequence: SequenceId,
    text: Box<dyn TextStream + 'e>,
    stop: StopMatcher,
    sampler: Sampler,
    /// Prompt tokens in the KV cache.
    prefilled: usize,
    generated: Vec<u32>,
    /// Characters decoded, and characters released to the client.
    decoded_chars: usize,
    released_chars: usize,
    reports: VecDeque<TokenReport>,
    computed: Computed,
    queued: Duration,
    began: Instant,
    first_token: Option<Instant>,
}

/// Sums over the tokens that went through the model.
#[derive(Default)]
struct Computed {
    tokens: f64,
    low_bit: f64,
    skipped: f64,
}

impl<'e> Running<'e> {
    /// `sequence` is empty and this request's alone.
    pub(crate) fn begin(
        engine: &'e dyn Engine,
        sequence: SequenceId,
        generation: Generation,
        queued: Duration,
    ) -> Self {
        Self {
            engine,
            sequence,
            text: engine.text_stream(),
            stop: StopMatcher::new(generation.stops.clone()),
            sampler: Sampler::new(generation.sampling, Seeds::new(generation.seed).stream("sampling")),
            generation,
            prefilled: 0,
            generated: Vec::new(),
            decoded_chars: 0,
            released_chars: 0,
            reports: VecDeque::new(),
            computed: Computed::default(),
            queued,
            began: Instant::now(),
            first_token: None,
        }
    }

    pub(crate) fn sequence(&self) -> SequenceId {
        self.sequence
    }

    pub(crate) fn mode(&self) -> Mode {
        self.generation.mode
    }

    pub(crate) fn generated_tokens(&self) -> usize {
        self.generated.len()
    }

    /// Whether the prompt is done: each step is one token.
    pub(crate) fn is_decoding(&self) -> bool {
        self.prefilled == self.generation.prompt.len()
    }

    /// What the model reads next: at most `chunk` tokens of the prompt, then the last token of the reply.
    pub(crate) fn next_tokens(&self, chunk: usize) -> &[u32] {
        let left = &self.generation.prompt[self.prefilled..];
        if left.is_empty() {
            &self.generated[self.generated.len() - 1..]
        } else {
            &left[..left.len().min(chunk.max(1))]
        }
    }

    /// The model has read `count` tokens of [`next_tokens`](Self::next_tokens).
    ///
    /// # Errors
    /// What the engine says of the token that follows.
    pub(crate) fn took(&mut self, count: usize, step: Step<'_>) -> Result<Turn, EngineError> {
        self.computed.add(count, step);
        if !self.is_decoding() {
            self.prefilled += count;
            if !self.is_decoding() {
                return Ok(Turn::Silent);
            }
        }
        self.take(step.logits)
    }

    /// Chooses the next token and says what the client may read by now.
    fn take(&mut self, logits: &[f32]) -> Result<Turn, EngineError> {
        let token = self.sampler.choose(logits);
        self.first_token.get_or_insert_with(Instant::now);
        self.generated.push(token);
        if self.engine.facts().end_tokens.contains(&token) {
            return Ok(self.finish(Finish::Stop, String::new(), false));
        }
        if let Some(count) = self.generation.logprobs {
            self.reports.push_back(self.report(token, logits, count));
        }
        let piece = self.text.push(token)?;
        self.decoded_chars += piece.chars().count();
        let released = self.stop.push(&piece);
        if released.is_stopped {
            return Ok(self.finish(Finish::Stop, released.text, true));
        }
        if self.generated.len() >= self.generation.max_tokens {
            return Ok(self.finish(Finish::Length, released.text, false));
        }
        let delta = self.release(released.text);
        Ok(if delta == Delta::default() {
            Turn::Silent
        } else {
            Turn::Piece(delta)
        })
    }

    fn report(&self, token: u32, logits: &[f32], count: usize) -> TokenReport {
        let logprobs = log_softmax(logits);
        let likely = |token: u32| Likely {
            bytes: self.engine.token_bytes(token),
            logprob: logprobs[token as usize],
        };
        TokenReport {
            choice: likely(token),
            top: top(&logprobs, count).into_iter().map(likely).collect(),
            offset: self.decoded_chars,
        }
    }

    /// The text and the tokens that begin in it.
    fn release(&mut self, text: String) -> Delta {
        self.released_chars += text.chars().count();
        let count = self
            .reports
            .iter()
            .take_while(|r| r.offset < self.released_chars)
            .count();
        Delta {
            tokens: self.reports.drain(..count).collect(),
            text,
        }
    }

    /// Ends the reply; after a stop string the tokens that lie behind it are not reported.
    fn finish(&mut self, finish: Finish, text: String, is_cut: bool) -> Turn {
        let mut delta = if is_cut {
            self.release(text)
        } else {
            let rest = self.text.finish();
            let mut text = text;
            let released = self.stop.push(&rest);
            text.push_str(&released.text);
            if !released.is_stopped {
                text.push_str(&self.stop.finish());
            }
            self.release(text)
        };
        if !is_cut {
            delta.tokens.extend(self.reports.drain(..));
        }
        let first = self.first_token.unwrap_or(self.began);
        let mean = |sum: f64| sum / self.computed.tokens.max(1.0);
        let summary = Summary {
            finish,
            mode: self.generation.mode,
            prompt_tokens: self.generation.prompt.len(),
            generated_tokens: self.generated.len(),
            low_bit_fraction: mean(self.computed.low_bit),
            skipped_mass: mean(self.computed.skipped),
            times: Times {
                queue: self.queued,
                prefill: first - self.began,
                decode: first.elapsed(),
            },
        };
        Turn::Last(delta, summary)
    }
}

impl Computed {
    fn add(&mut self, tokens: usize, step: Step<'_>) {
        #[expect(clippy::cast_precision_loss, reason = "a context has far fewer than 2^53 tokens")]
        let tokens = tokens as f64;
        self.tokens += tokens;
        self.low_bit += tokens * step.low_bit_fraction;
        self.skipped += tokens * step.skipped_mass;
    }
}
