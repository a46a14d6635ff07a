//! [`ModelBatch`]: the sequences that a worker computes with a [`Model`], several in one pass over each matrix. Law: a
//! sequence's logits are the same bits alone and among others, whenever they came and went.

use std::cell::{RefCell, RefMut};
use std::ops::Range;

use cotk_model::generate::{MoeTotals, RESERVED_TOKENS};
use cotk_model::layers::linear::FEW_ROWS;
use cotk_model::model::{KvCache, Logits, Model, Sequence, Workspace};
use cotk_model::moe::Mode;

use crate::engine::{Batch, EngineError, New, SequenceId, Step};

/// All sequences of one worker.
pub struct ModelBatch<'e> {
    model: &'e Model,
    /// By number; `None`: free. Each is borrowed for a step, since several are at once.
    held: Vec<Option<RefCell<Held>>>,
    work: Workspace,
    /// Of the last step: rows of each sequence.
    rows: Vec<Range<usize>>,
}

struct Held {
    cache: KvCache,
    /// What whole steps have cached: what a step that panicked left behind is cut off.
    positions: usize,
    mode: Mode,
}

impl<'e> ModelBatch<'e> {
    /// Without sequences.
    pub fn new(model: &'e Model) -> Self {
        Self {
            model,
            held: Vec::new(),
            work: Workspace::default(),
            rows: Vec::new(),
        }
    }

    fn borrow(&self, sequence: SequenceId) -> RefMut<'_, Held> {
        let held = self.held[sequence.0]
            .as_ref()
            .expect("a sequence that has begun and not ended");
        held.borrow_mut()
    }
}

impl Batch for ModelBatch<'_> {
    /// More rows go through products that sum in another order.
    fn width(&self) -> usize {
        FEW_ROWS
    }

    fn begin(&mut self, mode: Mode, positions: usize) -> Result<SequenceId, EngineError> {
        let mut cache = self.model.new_cache();
        cache.reserve(positions.min(RESERVED_TOKENS));
        let held = Some(RefCell::new(Held {
            cache,
            positions: 0,
            mode,
        }));
        let free = self.held.iter().position(Option::is_none);
        Ok(SequenceId(match free {
            Some(at) => {
                self.held[at] = held;
                at
            }
            None => {
                self.held.push(held);
                self.held.len() - 1
            }
        }))
    }

    fn end(&mut self, sequence: SequenceId) {
        self.held[sequence.0] = None;
    }

    fn advance(&mut self, new: &[New<'_>]) -> Result<(), EngineError> {
        let mut work = std::mem::take(&mut self.work);
        let mut rows = std::mem::take(&mut self.rows);
        rows.clear();
        let mut first = 0;
        for new in new {
            rows.push(first..first + new.tokens.len());
            first += new.tokens.len();
        }
        let mut held: Vec<RefMut<'_, Held>> = new.iter().map(|new| self.borrow(new.sequence)).collect();
        let mode = held.first().map_or(Mode::Exact, |held| held.mode);
        debug_assert!(held.iter().all(|held| held.mode == mode), "one mode a step");
        let mut sequences: Vec<Sequence<'_>> = (new.iter().zip(&mut held))
            .map(|(new, held)| {
                let Held { cache, positions, .. } = &mut **held;
                cache.truncate(*positions);
                let tokens = new.tokens;
                Sequence { tokens, cache }
            })
            .collect();
        let done = self.model.step(&mut sequences, mode, Logits::Last, &mut work);
        drop(sequences);
        if done.is_ok() {
            for held in &mut held {
                held.positions = held.cache.positions();
            }
        }
        drop(held);
        (self.work, self.rows) = (work, rows);
        done.map_err(|error| EngineError(error.to_string()))
    }

    fn step(&self, at: usize) -> Step<'_> {
        let vocab = self.model.spec().vocab;
        let mut totals = MoeTotals::default();
        totals.add_rows(self.work.records(), self.rows[at].clone());
        Step {
            logits: &self.work.logits()[at * vocab..][..vocab],
            low_bit_fraction: totals.low_bit_fraction(),
            skipped_mass: totals.skipped_mass(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cotk_model::checkpoint::TensorSource;
    use cotk_model::layers::Mlp;
    use cotk_model::layers::linear::Linear;
    use cotk_model::moe::MoeRuntime;
    use cotk_model::reference::{Absent, PlainMoe};
    use cotk_runtime::in_memory::{InMemory, Routing};
    use cotk_runtime::synthetic::{self, Experts, Source};

    use super::*;

    /// Experts as codes, and in f32; the dense part as codes with a router in f32.
    fn models() -> Vec<Model> {
        let mut spec = synthetic::spec("ref-qwen2moe", Some(2)).unwrap();
        (spec.vocab, spec.routing.experts) = (160, 8);
        let source = Source::new(&spec, 3);
        let coded = synthetic::experts(&spec, Experts::plain(4), 3).unwrap();
        let coded = InMemory::new(&spec, coded, 4, Routing::Router).unwrap();
        let mut salt = 0u32;
        let mut linear = |outputs: usize, inputs: usize| {
            salt += 1;
            let weight = |i: usize| ((i as f32) * 0.37 + salt as f32).sin() * 0.05;
            Linear::new((0..outputs * inputs).map(weight).collect(), outputs, inputs)
        };
        let (hidden, inner) = (spec.hidden, spec.moe_intermediate);
        let mut layer = || -> Vec<Option<Mlp>> {
            let mlp = |_| {
                Some(Mlp {
                    gate: linear(inner, hidden),
                    up: linear(inner, hidden),
                    down: linear(hidden, inner),
                })
            };
            (0..spec.routing.experts).map(mlp).collect()
        };
        let plain = PlainMoe::from_experts(coded.shape().clone(), vec![layer(), layer()], Absent::Masked);
        let load =
            |runtime: Arc<dyn MoeRuntime>| Model::load(spec.clone(), &source as &dyn TensorSource, runtime).unwrap();
        vec![load(Arc::new(coded)), load(Arc::new(plain))]
    }

    fn advance(batch: &mut ModelBatch<'_>, new: &[(SequenceId, &[u32])]) -> Vec<Vec<f32>> {
        let new: Vec<New<'_>> = new.iter().map(|&(sequence, tokens)| New { sequence, tokens }).collect();
        batch.advance(&new).unwrap();
        (0..new.len()).map(|at| batch.step(at).logits.to_vec()).collect()
    }

    /// A prompt in two chunks, then single tokens.
    fn prompt(of: u32) -> (Vec<u32>, Vec<u32>) {
        let next = |i: u32| (i * 31 + of * 17) % 160;
        ((0..20 + of).map(next).collect(), (100..106).map(next).collect())
    }

    #[test]
    fn a_sequence_has_the_same_logits_alone_and_in_any_batch() {
        for model in models() {
            let alone: Vec<Vec<Vec<f32>>> = (0..FEW_ROWS as u32)
                .map(|of| {
                    let (prompt, tokens) = prompt(of);
                    let mut batch = ModelBatch::new(&model);
                    let id = batch.begin(Mode::Exact, 32).unwrap();
                    advance(&mut batch, &[(id, &prompt[..16])]);
                    let mut all = advance(&mut batch, &[(id, &prompt[16..])]);
                    all.extend(tokens.iter().flat_map(|&token| advance(&mut batch, &[(id, &[token])])));
                    all
                })
                .collect();
            let mut batch = ModelBatch::new(&model);
            assert_eq!(batch.width(), FEW_ROWS);
            // One more comes in each round, and each leaves after its six tokens: all sizes of a batch, in any order.
            let mut running: Vec<(u32, SequenceId, usize)> = Vec::new();
            let mut coming = 0..FEW_ROWS as u32;
            loop {
                if let Some(of) = coming.next() {
                    let (prompt, _) = prompt(of);
                    let id = batch.begin(Mode::Exact, 0).unwrap();
                    advance(&mut batch, &[(id, &prompt[..16])]);
                    assert_eq!(advance(&mut batch, &[(id, &prompt[16..])])[0], alone[of as usize][0]);
                    running.insert(of as usize / 2 % (running.len() + 1), (of, id, 0));
                }
                if running.is_empty() {
                    break;
                }
                let tokens: Vec<[u32; 1]> = running.iter().map(|(of, _, at)| [prompt(*of).1[*at]]).collect();
                let new: Vec<(SequenceId, &[u32])> = running
                    .iter()
                    .zip(&tokens)
                    .map(|((_, id, _), tokens)| (*id, &tokens[..]))
                    .collect();
                for ((of, _, at), logits) in running.iter_mut().zip(advance(&mut batch, &new)) {
                    *at += 1;
                    assert_eq!(logits, alone[*of as usize][*at], "sequence {of}, token {at}");
                }
                running.retain(|(_, id, at)| {
                    if *at == 6 {
                        batch.end(*id);
                    }
                    *at < 6
                });
            }
            assert!(batch.held.len() < FEW_ROWS, "places are used again");
        }
    }

    #[test]
    fn a_step_that_fails_moves_nobody() {
        let model = models().swap_remove(0);
        let mut batch = ModelBatch::new(&model);
        let [good, bad] = [(); 2].map(|()| batch.begin(Mode::Exact, 8).unwrap());
        for id in [good, bad] {
            advance(&mut batch, &[(id, &[1, 2, 3])]);
        }
        let wrong = [(good, &[4][..]), (bad, &[160])].map(|(sequence, tokens)| New { sequence, tokens });
        assert!(batch.advance(&wrong).unwrap_err().0.contains("160"));
        let after = advance(&mut batch, &[(good, &[4])]);
        let again = batch.begin(Mode::Exact, 8).unwrap();
        advance(&mut batch, &[(again, &[1, 2, 3])]);
        assert_eq!(after, advance(&mut batch, &[(again, &[4])]));
    }
}
