//! A deterministic engine of bytes. A text `cycle>` is continued by `cycle` again and again; a `.` in it is the end
//! token, so that `ab.>` gives `ab`. Mode `little` flips the case. A prompt with `!` panics, one with `?` fails.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use cotk_model::moe::Mode;

use crate::engine::{Engine, EngineError, Facts, Sequence, SpecialTokens, Step, TextStream};

pub(super) const END: u32 = 256;

pub(super) struct Toy {
    facts: Facts,
    /// Added to every step, so that something is still running when a test looks.
    step_time: Duration,
    /// First byte of the sequence that moved, one entry a step.
    pub(super) steps: Mutex<Vec<u8>>,
    held: Mutex<bool>,
    released: Condvar,
}

impl Toy {
    pub(super) fn new(context: usize, step_time: Duration, modes: &[Mode]) -> Self {
        let facts = Facts {
            id: "toy".into(),
            family: "bytes".into(),
            device: "cpu".into(),
            context,
            vocab: 257,
            end_tokens: vec![END],
            modes: modes.to_vec(),
            kv_bytes_per_token: 4,
            predicted_decode_ms: Vec::new(),
        };
        Self {
            facts,
            step_time,
            steps: Mutex::default(),
            held: Mutex::new(false),
            released: Condvar::new(),
        }
    }

    /// No step ends before [`Toy::release`]: what a test says happens at once does, however busy the machine is.
    pub(super) fn hold(&self) {
        *self.held.lock().unwrap() = true;
    }

    pub(super) fn release(&self) {
        *self.held.lock().unwrap() = false;
        self.released.notify_all();
    }

    fn wait(&self) {
        let held = self.held.lock().unwrap();
        drop(self.released.wait_while(held, |held| *held).unwrap());
    }
}

impl Engine for Toy {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn encode(&self, text: &str, _special: SpecialTokens) -> Result<Vec<u32>, EngineError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn token_bytes(&self, token: u32) -> Vec<u8> {
        u8::try_from(token).into_iter().collect()
    }

    fn text_stream(&self) -> Box<dyn TextStream + '_> {
        Box::new(Bytes(Vec::new()))
    }

    fn sequence(&self, mode: Mode) -> Result<Box<dyn Sequence + '_>, EngineError> {
        Ok(Box::new(Cycle {
            toy: self,
            mode,
            tokens: Vec::new(),
        }))
    }
}

struct Bytes(Vec<u8>);

impl TextStream for Bytes {
    fn push(&mut self, token: u32) -> Result<String, EngineError> {
        self.0
            .push(u8::try_from(token).map_err(|_| EngineError(format!("token {token} is no byte")))?);
        Ok(match std::str::from_utf8(&self.0) {
            Ok(text) => {
                let text = text.to_owned();
                self.0.clear();
                text
            }
            Err(_) => String::new(),
        })
    }

    fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.0)).into_owned()
    }
}

struct Cycle<'e> {
    toy: &'e Toy,
    mode: Mode,
    tokens: Vec<u32>,
}

impl Sequence for Cycle<'_> {
    fn advance(&mut self, tokens: &[u32]) -> Result<Step, EngineError> {
        assert!(!tokens.is_empty(), "a step has at least one token");
        self.toy.wait();
        std::thread::sleep(self.toy.step_time);
        self.tokens.extend(tokens);
        assert!(self.tokens.len() <= self.toy.facts.context, "beyond the context");
        let first = u8::try_from(self.tokens[0]).unwrap_or(0);
        self.toy.steps.lock().unwrap().push(first);
        assert_ne!(first, b'!', "a bug in the engine");
        if first == b'?' {
            return Err(EngineError("experts.bin: layer 1, expert 3: checksum differs".into()));
        }
        let next = match self.tokens.iter().position(|&token| token == u32::from(b'>')) {
            None | Some(0) => END,
            Some(cycle) => match self.tokens[(self.tokens.len() - cycle - 1) % cycle] {
                46 => END, // a full stop
                token => token,
            },
        };
        let next = match (self.mode, u8::try_from(next)) {
            (Mode::Little, Ok(byte)) if byte.is_ascii_alphabetic() => u32::from(byte ^ 0x20),
            _ => next,
        };
        let mut logits: Vec<f32> = (0..257u16).map(|i| f32::from(i % 7) * 0.01).collect();
        logits[END as usize] = -100.0; // never by chance
        logits[next as usize] = 6.0;
        Ok(Step {
            logits,
            low_bit_fraction: if self.mode == Mode::Little { 1.0 } else { 0.0 },
            skipped_mass: 0.0,
        })
    }
}
