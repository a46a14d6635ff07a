//! Prompt to tokens: prefill in fixed chunks, then one token at a time, which allocates nothing but what the listener does.

use std::ops::{ControlFlow, Range};
use std::time::Instant;

use cotk_run::cancel::Cancel;

use crate::ModelError;
use crate::model::{KvCache, Logits, Model, Sequence, Workspace};
use crate::moe::{ExpertUse, Mode, MoeRecord, Precision};
use crate::sampling::Sampler;
use cotk_run::units::LayerId;

/// Prompt tokens per forward pass: bounds memory, and cancelling is looked at between.
pub const PREFILL_CHUNK: usize = 512;

/// Generated tokens that room is made for at once; longer replies make room as they grow.
pub const RESERVED_TOKENS: usize = 4096;

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    pub prompt: &'a [u32],
    /// Stops after this many tokens, or where the context is full.
    pub max_tokens: usize,
    /// Stops at any of these, which is not part of the text.
    pub stop: &'a [u32],
    pub mode: Mode,
}

/// Why it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token, or the listener's word.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
}

impl Finish {
    /// As the OpenAI API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What came out.
#[derive(Debug, Clone)]
pub struct Generated {
    /// Without the prompt and without a stop token.
    pub tokens: Vec<u32>,
    pub finish: Finish,
    pub prefill_s: f64,
    /// Of all steps after the prompt.
    pub decode_s: f64,
    /// Forward passes of one token: with `decode_s` the rate of decoding.
    pub decode_steps: usize,
    pub totals: MoeTotals,
}

/// Gate mass by how it was computed, over any number of records.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MoeTotals {
    mass: f64,
    low: f64,
    skipped: f64,
}

impl MoeTotals {
    /// Counts what a forward pass did.
    pub fn add(&mut self, records: &[(LayerId, MoeRecord)]) {
        for (_, record) in records {
            self.add_uses(&record.uses);
        }
    }

    /// Counts what a forward pass did for some of its tokens: those of one sequence among several.
    ///
    /// # Panics
    /// Tokens that the pass did not have.
    pub fn add_rows(&mut self, records: &[(LayerId, MoeRecord)], rows: Range<usize>) {
        for (_, record) in records {
            self.add_uses(&record.uses[rows.start * record.slots..rows.end * record.slots]);
        }
    }

    fn add_uses(&mut self, uses: &[ExpertUse]) {
        for used in uses {
            let gate = f64::from(used.gate);
            self.mass += gate;
            match used.precision {
                Precision::Full => {}
                Precision::Prefix | Precision::Constant => self.low += gate,
                Precision::Skipped => self.skipped += gate,
            }
        }
    }

    /// Share of the gate mass below full width; 0 without any.
    pub fn low_bit_fraction(&self) -> f64 {
        if self.mass > 0.0 { self.low / self.mass } else { 0.0 }
    }

    /// Share of the gate mass that was not computed; 0 without any.
    pub fn skipped_mass(&self) -> f64 {
        if self.mass > 0.0 { self.skipped / self.mass } else { 0.0 }
    }
}

/// Refuses a prompt that is empty or leaves no room for one token.
///
/// # Errors
/// [`ModelError::EmptyPrompt`], [`ModelError::PromptTooLong`].
pub fn check_prompt(prompt_tokens: usize, context: usize) -> Result<(), ModelError> {
    let limit = context - 1;
    match prompt_tokens {
        0 => Err(ModelError::EmptyPrompt),
        found if found > limit => Err(ModelError::PromptTooLong { found, limit, context }),
        _ => Ok(()),
    }
}

/// Runs a prompt into `cache` in chunks; `work` then holds the logits of its last token, `[1, vocab]`.
///
/// # Errors
/// As [`Model::step`]; [`cotk_run::Error::Cancelled`].
pub fn prefill(
    model: &Model,
    prompt: &[u32],
    cache: &mut KvCache,
    mode: Mode,
    cancel: &Cancel,
    totals: &mut MoeTotals,
    work: &mut Workspace,
) -> Result<(), ModelError> {
    if prompt.is_empty() {
        return Err(ModelError::EmptyPrompt);
    }
    let chunks = prompt.len().div_ceil(PREFILL_CHUNK);
    for (at, tokens) in prompt.chunks(PREFILL_CHUNK).enumerate() {
        cancel.check()?;
        // Only the last chunk's head is of use.
        let which = if at + 1 == chunks { Logits::Last } else { Logits::None };
        model.step(&mut [Sequence { tokens, cache }], mode, which, work)?;
        totals.add(work.records());
    }
    Ok(())
}

/// Generates until something ends it; `on_token` hears every token that belongs to the text and may end it too.
///
/// # Errors
/// A prompt that is empty or too long, what the runtime refuses, [`cotk_run::Error::Cancelled`].
pub fn generate(
    model: &Model,
    request: &Request<'_>,
    sampler: &mut Sampler,
    cancel: &Cancel,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated, ModelError> {
    check_prompt(request.prompt.len(), model.spec().context)?;
    let mut totals = MoeTotals::default();
    let limit = request.max_tokens.min(model.spec().context - request.prompt.len());
    // Room for all that is likely, so that a step allocates nothing; untouched pages cost nothing.
    let room = limit.min(RESERVED_TOKENS);
    let mut cache = model.new_cache();
    cache.reserve(request.prompt.len() + room);
    let mut work = Workspace::default();
    let clock = Instant::now();
    prefill(
        model,
        request.prompt,
        &mut cache,
        request.mode,
        cancel,
        &mut totals,
        &mut work,
    )?;
    let prefill_s = clock.elapsed().as_secs_f64();

    let clock = Instant::now();
    let mut tokens = Vec::with_capacity(room);
    let mut finish = Finish::Length;
    let mut decode_steps = 0;
    while tokens.len() < limit {
        cancel.check()?;
        let token = sampler.choose(work.logits());
        if request.stop.contains(&token) {
            finish = Finish::Stop;
            break;
        }
        tokens.push(token);
        if on_token(token).is_break() {
            finish = Finish::Stop;
            break;
        }
        if tokens.len() < limit {
            let mut step = [Sequence {
                tokens: &[token],
                cache: &mut cache,
            }];
            model.step(&mut step, request.mode, Logits::Last, &mut work)?;
            totals.add(work.records());
            decode_steps += 1;
        }
    }
    Ok(Generated {
        tokens,
        finish,
        prefill_s,
        decode_s: clock.elapsed().as_secs_f64(),
        decode_steps,
        totals,
    })
}
