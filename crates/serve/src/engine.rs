//! What the server needs of a model, as two traits. [`crate::model_engine`] is the real one; the tests' own is a few
//! lines and deterministic. Knows nothing of HTTP. Law: a sequence's logits depend on its own tokens and mode alone,
//! not on who else is served.

use cotk_model::moe::Mode;

/// What a model is, as far as clients and the scheduler care.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The name that requests carry.
    pub id: String,
    pub family: String,
    /// `cpu`, or the name of the accelerator.
    pub device: String,
    /// Tokens that one sequence may hold, prompt and reply together.
    pub context: usize,
    pub vocab: usize,
    /// Tokens that end a reply.
    pub end_tokens: Vec<u32>,
    /// What requests may ask for; the first is the default.
    pub modes: Vec<Mode>,
    /// Memory that one token of one sequence takes.
    pub kv_bytes_per_token: u64,
    /// Predicted time of one token alone, in ms; empty where no profile tells.
    pub predicted_decode_ms: Vec<(Mode, f64)>,
}

impl Facts {
    /// `{"exact": ms, …}` as clients and the ready line show it; null without a profile.
    pub fn predicted_decode_ms(&self) -> serde_json::Value {
        if self.predicted_decode_ms.is_empty() {
            return serde_json::Value::Null;
        }
        self.predicted_decode_ms
            .iter()
            .map(|(mode, ms)| (mode.name().to_owned(), serde_json::Value::from(*ms)))
            .collect()
    }
}

/// Whether the tokenizer's own begin and end tokens are put around a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// A plain prompt: as the tokenizer is configured.
    Add,
    /// The text of a chat template has them already.
    InText,
}

/// The model failed: the sentence says what, where, found and expected.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct EngineError(pub String);

/// A model behind the server.
pub trait Engine: Send + Sync {
    /// Fixed while the server runs.
    fn facts(&self) -> &Facts;

    /// # Errors
    /// When the tokenizer refuses the text.
    fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, EngineError>;

    /// The bytes of one token, whole characters or not.
    fn token_bytes(&self, token: u32) -> Vec<u8>;

    /// Turns the tokens of one reply into text as they come.
    fn text_stream(&self) -> Box<dyn TextStream + '_>;

    /// A place for the sequences of one worker: none yet.
    fn batch(&self) -> Box<dyn Batch + '_>;
}

/// Tokens to text. Law: pieces are whole characters, and together the text of all tokens.
pub trait TextStream {
    /// The text that is certain after this token; often empty.
    ///
    /// # Errors
    /// When the token is unknown.
    fn push(&mut self, token: u32) -> Result<String, EngineError>;

    /// What an unfinished character at the end reads as.
    fn finish(&mut self) -> String;
}

/// Which sequence of a [`Batch`]; free for another after [`Batch::end`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceId(pub usize);

/// New tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct New<'a> {
    pub sequence: SequenceId,
    /// At least one.
    pub tokens: &'a [u32],
}

/// The KV caches of all sequences that are computed by one worker, and what computing them needs.
pub trait Batch {
    /// Sequences that may move by one token each in the same [`Batch::advance`] without seeing each other: at least 1.
    fn width(&self) -> usize;

    /// A sequence with an empty KV cache that will hold about `positions` tokens.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn begin(&mut self, mode: Mode, positions: usize) -> Result<SequenceId, EngineError>;

    /// Forgets a sequence.
    fn end(&mut self, sequence: SequenceId);

    /// Appends tokens: any number to one sequence, or one each to at most [`Batch::width`] sequences of one mode.
    ///
    /// # Errors
    /// When a layer, expert or file fails. None of the sequences has moved then, nor after a panic.
    fn advance(&mut self, new: &[New<'_>]) -> Result<(), EngineError>;

    /// What the last [`Batch::advance`] gave its `at`-th sequence.
    fn step(&self, at: usize) -> Step<'_>;
}

/// What one call of [`Batch::advance`] gave one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// `[vocab]`, after the last token.
    pub logits: &'a [f32],
    /// Share of the gate mass that went through low-bit prefixes, 0..1, mean over layers and tokens.
    pub low_bit_fraction: f64,
    /// Share of the gate mass that no expert served, 0..1.
    pub skipped_mass: f64,
}
