//! A deterministic engine of bytes. A text `cycle>` is continued by `cycle` again and again; a `.` in it is the end
//! token, so that `ab.>` gives `ab`. Mode `little` flips the case. A prompt that begins with `!` panics, one with `?`
//! fails; with `~` and with `^` so does its eighth token.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use cotk_model::moe::Mode;

use crate::engine::{Batch, Engine, EngineError, Facts, New, SequenceId, SpecialTokens, Step, TextStream};

pub(super) const END: u32 = 256;

pub(super) struct Toy {
    facts: Facts,
    /// Added to every step, so that something is still running when a test looks.
    step_time: Duration,
    /// First byte of the sequence that moved, one entry a sequence and step.
    pub(super) steps: Mutex<Vec<u8>>,
    /// Sequences of each step.
    pub(super) sizes: Mutex<Vec<usize>>,
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
            sizes: Mutex::default(),
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

    fn batch(&self) -> Box<dyn Batch + '_> {
        Box::new(Cycles {
            toy: self,
            held: Vec::new(),
            logits: Vec::new(),
        })
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

/// Sequences that one step of the toy may have.
pub(super) const WIDTH: usize = 3;

struct Cycles<'e> {
    toy: &'e Toy,
    held: Vec<Option<Cycle>>,
    /// Of the last step.
    logits: Vec<(Mode, Vec<f32>)>,
}

#[derive(Clone)]
struct Cycle {
    mode: Mode,
    tokens: Vec<u32>,
}

impl Batch for Cycles<'_> {
    fn width(&self) -> usize {
        WIDTH
    }

    fn begin(&mut self, mode: Mode, positions: usize) -> Result<SequenceId, EngineError> {
        assert!(positions <= self.toy.facts.context, "beyond the context");
        let tokens = Vec::new();
        self.held.push(Some(Cycle { mode, tokens }));
        Ok(SequenceId(self.held.len() - 1))
    }

    fn end(&mut self, sequence: SequenceId) {
        assert!(self.held[sequence.0].take().is_some(), "it ends once");
    }

    fn advance(&mut self, new: &[New<'_>]) -> Result<(), EngineError> {
        let is_single = new.iter().all(|new| new.tokens.len() == 1);
        assert!(
            new.len() == 1 || (new.len() <= WIDTH && is_single),
            "what a step may be"
        );
        self.toy.wait();
        std::thread::sleep(self.toy.step_time);
        let mut moved = Vec::new();
        for new in new {
            let mut cycle = self.held[new.sequence.0].clone().expect("it has begun");
            assert!(
                moved.iter().all(|(_, other): &(_, Cycle)| other.mode == cycle.mode),
                "one mode"
            );
            cycle.advance(self.toy, new.tokens)?;
            moved.push((new.sequence, cycle));
        }
        self.logits.clear();
        for (sequence, cycle) in moved {
            self.toy.steps.lock().unwrap().push(cycle.first());
            self.logits.push((cycle.mode, cycle.logits()));
            self.held[sequence.0] = Some(cycle);
        }
        self.toy.sizes.lock().unwrap().push(new.len());
        Ok(())
    }

    fn step(&self, at: usize) -> Step<'_> {
        let (mode, logits) = &self.logits[at];
        Step {
            logits,
            low_bit_fraction: if *mode == Mode::Little { 1.0 } else { 0.0 },
            skipped_mass: 0.0,
        }
    }
}

impl Cycle {
    fn first(&self) -> u8 {
        u8::try_from(self.tokens[0]).unwrap_or(0)
    }

    fn advance(&mut self, toy: &Toy, tokens: &[u32]) -> Result<(), EngineError> {
        assert!(!tokens.is_empty(), "a step has at least one token");
        self.tokens.extend(tokens);
        assert!(self.tokens.len() <= toy.facts.context, "beyond the context");
        let is_late = self.tokens.len() >= 8;
        match self.first() {
            b'!' => panic!("a bug in the engine"),
            b'^' if is_late => panic!("a bug in the engine"),
            b'?' => Err(EngineError("experts.bin: layer 1, expert 3: checksum differs".into())),
            b'~' if is_late => Err(EngineError("experts.bin: layer 1, expert 3: checksum differs".into())),
            _ => Ok(()),
        }
    }

    fn logits(&self) -> Vec<f32> {
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
        logits
    }
}
