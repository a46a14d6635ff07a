//! A decoding step of a synthetic model, predicted and then measured: what tells whether predictions are right. The clock is
//! `cotk_latency::probe`'s. The prediction comes first and from a profile that was taken before.

use std::sync::Arc;
use std::time::Duration;

use cotk_kernels::cpu::team::Team;
use cotk_latency::moe::StepPrediction;
use cotk_latency::predict::{Model as CostModel, Prediction};
use cotk_latency::probe::Prepared;
use cotk_latency::probe::rounds::{self, Pace, Timed};
use cotk_model::ModelError;
use cotk_model::model::{KvCache, Logits, Sequence, Workspace};
use cotk_model::moe::Mode;
use cotk_run::seeds::Stream;

use crate::Result;
use crate::cost::{self, Held, Pass};
use crate::synthetic::{self, Experts, SyntheticModel};

/// What is decoded.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// One of `synthetic::names()`.
    pub shape: String,
    /// Another depth than the model's: the same layers, less memory.
    pub layers: Option<usize>,
    /// Plain codes in groups of 32.
    pub bits: u32,
    /// Keys that the new token sees, its own among them.
    pub context: usize,
}

/// Predicted beside measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    pub threads: u32,
    pub predicted: Prediction,
    /// Bytes of weights and cache over the bandwidth of memory.
    pub floor_ms: f64,
    /// Median of undisturbed steps of the fastest session.
    pub measured_ms: f64,
    /// Median of all steps, disturbed ones included.
    pub all_ms: f64,
    /// Median absolute deviation in that session.
    pub spread_ms: f64,
    /// What the two fastest sessions differ by: the noise floor of this figure, ln(a / b) in percent.
    pub repeat_pct: f64,
    pub distinct_expert_bytes_per_100_tokens: u64,
}

/// Sessions of a figure, each with threads and a cache of its own.
const SESSIONS: u32 = 4;
/// Steps of a session, and how long they may wait for a quiet machine.
const PACE: Pace = Pace {
    rounds: 8,
    slice: Duration::from_millis(1),
    patience: Duration::from_secs(1),
};

/// A case, ready to decode.
pub struct Bench {
    made: Arc<SyntheticModel>,
    case: Case,
}

impl Bench {
    /// Makes the model.
    ///
    /// # Errors
    /// As [`synthetic::model`].
    pub fn new(case: Case, seed: u64) -> Result<Self> {
        let spec = synthetic::spec(&case.shape, case.layers)?;
        let made = synthetic::model(&spec, Experts::plain(case.bits), seed)?;
        Ok(Self {
            made: Arc::new(made),
            case,
        })
    }

    /// What a profile says of a step.
    ///
    /// # Errors
    /// What the profile does not know.
    pub fn predict(&self, threads: u32, machine: &CostModel) -> Result<StepPrediction> {
        let spec = self.made.model.spec();
        let pass = Pass::Decode {
            context: self.case.context,
            batch: 1,
        };
        let source = synthetic::Source::new(spec, 0);
        let held = Held {
            dense: &cost::forms_of(spec, &source),
            kv: self.made.model.kv(),
        };
        let step = cost::step(spec, pass, threads, &held, |_| {
            cost::uniform_experts(spec, self.case.bits, threads)
        });
        Ok(machine.step(&step)?)
    }

    /// Predicts, then measures.
    ///
    /// # Errors
    /// What the profile does not know; what the model refuses.
    pub fn figure(&self, threads: u32, machine: &CostModel, order: &mut Stream) -> Result<Figure> {
        let predicted = self.predict(threads, machine)?;
        let distinct = self.made.experts.distinct_bytes_per_100_tokens();
        // What disturbs a step makes it slower, for seconds at a time: the least disturbed session counts, as in profiles.
        let mut sessions = Vec::new();
        for _ in 0..SESSIONS {
            sessions.push(self.session(threads, order)?);
        }
        sessions.sort_by(|a, b| a.median_us.total_cmp(&b.median_us));
        let [best, next, ..] = &sessions[..] else {
            unreachable!("several sessions");
        };
        let all_us = sessions.iter().map(|s| s.all_us).sum::<f64>();
        Ok(Figure {
            threads,
            floor_ms: predicted.floor.ms,
            predicted: predicted.whole,
            measured_ms: best.median_us / 1e3,
            all_ms: all_us / f64::from(SESSIONS) / 1e3,
            spread_ms: best.mad_us / 1e3,
            repeat_pct: 100.0 * (next.median_us / best.median_us).ln(),
            distinct_expert_bytes_per_100_tokens: distinct,
        })
    }

    fn session(&self, threads: u32, order: &mut Stream) -> Result<Timed> {
        let decoder = Decoder::new(self.made.clone(), self.case.context, threads)?;
        let timed = rounds::time(vec![Box::new(decoder)], &PACE, order)?;
        Ok(timed[0])
    }
}

/// One step after the other at a context that stays as long as it is.
struct Decoder {
    made: Arc<SyntheticModel>,
    team: Team,
    work: Workspace,
    cache: KvCache,
    context: usize,
    token: u32,
}

impl Decoder {
    fn new(made: Arc<SyntheticModel>, context: usize, threads: u32) -> Result<Self> {
        let team = Team::new(threads.max(1) as usize);
        let mut cache = made.model.new_cache();
        let vocab = u32::try_from(made.model.spec().vocab).expect("vocabularies fit 32 bits");
        let prompt: Vec<u32> = (0..u32::try_from(context).unwrap_or(u32::MAX).saturating_sub(1))
            .map(|i| i.wrapping_mul(7919) % vocab)
            .collect();
        if !prompt.is_empty() {
            let mut sequence = [Sequence {
                tokens: &prompt,
                cache: &mut cache,
            }];
            team.install(|| made.model.hidden(&mut sequence, Mode::Exact))?;
        }
        // Room for the tokens that come and go.
        cache.reserve(8);
        Ok(Self {
            made,
            team,
            work: Workspace::default(),
            cache,
            context: prompt.len(),
            token: 0,
        })
    }

    fn step(&mut self) -> std::result::Result<(), ModelError> {
        let model = &self.made.model;
        let vocab = u32::try_from(model.spec().vocab).expect("vocabularies fit 32 bits");
        self.token = self.token.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let tokens = [self.token % vocab];
        let mut sequence = [Sequence {
            tokens: &tokens,
            cache: &mut self.cache,
        }];
        let work = &mut self.work;
        self.team
            .install(|| model.step(&mut sequence, Mode::Exact, Logits::Last, work))?;
        std::hint::black_box(work.logits());
        self.cache.truncate(self.context);
        Ok(())
    }
}

impl Prepared for Decoder {
    fn threads(&self) -> u32 {
        u32::try_from(self.team.threads()).unwrap_or(u32::MAX)
    }

    fn run(&mut self, _piece: usize) -> cotk_latency::Result<()> {
        self.step().map_err(|error| cotk_latency::Error::Probe {
            probe: "decode".to_owned(),
            key: format!("{} keys", self.context),
            detail: error.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_keep_their_context_and_their_threads() {
        let case = Case {
            shape: "ref-qwen2moe".to_owned(),
            layers: Some(1),
            bits: 4,
            context: 5,
        };
        let bench = Bench::new(case, 1).unwrap();
        let mut decoder = Decoder::new(bench.made.clone(), 5, 2).unwrap();
        for _ in 0..2 {
            decoder.run(0).unwrap();
            assert_eq!((decoder.cache.positions(), decoder.threads()), (4, 2));
        }
    }
}
