//! Tokens per second of a model at rest in memory: prefill and decode, by batch and threads, with what bounds them beside
//! it, measured in the same minute. Samples that other processes disturbed are dropped and counted. Predicts nothing:
//! that is `cost`'s and `cotk_latency`'s. Law: a row counts the bytes of every weight that its pass reads, once.

use std::collections::BTreeSet;
use std::hint::black_box;
use std::time::{Duration, Instant};

use cotk_kernels::cpu::dispatch::Isa;
use cotk_latency::probe::{Statistics, median};
use cotk_model::generate::PREFILL_CHUNK;
use cotk_model::layers::cache::KvKind;
use cotk_model::layers::clock::{Part, PassTimes};
use cotk_model::model::{KvCache, Logits, Model, Sequence, Workspace};
use cotk_model::moe::Mode;
use cotk_model::spec::ModelSpec;
use cotk_model::{ModelError, inventory};
use cotk_run::cancel::Cancel;
use cotk_run::progress::Progress;
use cotk_run::units::{ExpertId, LayerId};
use rayon::ThreadPoolBuilder;

use self::machine::{Load, Probe, involuntary_switches};
use crate::{Error, Result};

pub mod machine;

/// One thing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// A prompt of so many tokens into an empty cache, logits of its last token.
    Prefill { tokens: usize },
    /// So many steps of `batch` sequences from an empty cache, one token each, logits of all.
    Decode { batch: usize, steps: usize },
}

impl Work {
    /// As llama-bench calls it: `pp512`, `tg128`.
    pub fn name(self) -> String {
        match self {
            Self::Prefill { tokens } => format!("pp{tokens}"),
            Self::Decode { steps, .. } => format!("tg{steps}"),
        }
    }

    fn tokens(self) -> usize {
        match self {
            Self::Prefill { tokens } => tokens,
            Self::Decode { batch, steps } => batch * steps,
        }
    }

    /// Positions of one sequence at its end.
    fn positions(self) -> usize {
        match self {
            Self::Prefill { tokens } => tokens,
            Self::Decode { steps, .. } => steps,
        }
    }
}

/// How to measure.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub work: Vec<Work>,
    pub threads: Vec<usize>,
    /// Undisturbed samples of each row.
    pub repeats: usize,
    /// Count samples during which others used the machine like any other.
    pub keep_disturbed: bool,
    /// Of the token ids.
    pub seed: u64,
}

/// A model and what its weights weigh.
pub struct Subject<'a> {
    pub model: &'a Model,
    /// Bytes of one expert as it is held.
    pub expert_bytes: &'a (dyn Fn(LayerId, ExpertId) -> u64 + Sync),
    /// Bytes of all dense matrices that one token reads, the head included.
    pub dense_bytes: u64,
}

/// One measured row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub work: Work,
    pub threads: usize,
    /// Median of the samples.
    pub tokens_per_s: f64,
    /// Median absolute deviation of the samples.
    pub spread: f64,
    /// Samples that count, and those that were dropped because others used more than [`DISTURBED`] of the machine.
    pub repeats: usize,
    pub dropped: usize,
    /// False: no sample was undisturbed, so all of them count.
    pub is_quiet: bool,
    /// Largest share of the machine that others used during a sample that counts.
    pub others: f64,
    /// Bytes of weights of one pass: each matrix that is read, once.
    pub weight_bytes_per_pass: f64,
    pub weight_gb_per_s: f64,
    /// Read bandwidth on as many threads, median of passes between the samples.
    pub bandwidth_gb_per_s: f64,
    /// Multiply-adds of weights, two operations each (attention's are not counted), and the most this machine does.
    pub gops: f64,
    pub peak_gops: f64,
    /// Of a layer, mean over passes and layers.
    pub distinct_experts: f64,
    /// Of the time: one for each of [`Part::ALL`].
    pub shares: [f64; Part::ALL.len()],
    /// Of all threads, during the samples that count.
    pub involuntary_switches: u64,
}

impl Row {
    /// Share of the read bandwidth that its weights came at, in percent; above 100 where they came from cache.
    pub fn pct_of_bandwidth(&self) -> f64 {
        100.0 * self.weight_gb_per_s / self.bandwidth_gb_per_s
    }
}

/// All rows, and what holds for the whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    pub rows: Vec<Row>,
    /// Distinct expert bytes of 100 decoded tokens; absent where fewer were decoded one by one.
    pub distinct_expert_bytes_per_100_tokens: Option<u64>,
}

/// Others' share of the machine above which a sample does not count.
pub const DISTURBED: f64 = 0.05;
/// A sample is at least so long: ticks of 10 ms must be able to tell 5 %.
const SAMPLE: Duration = Duration::from_millis(400);
/// Samples tried for each one wanted.
const TRIES: usize = 3;
/// Steps of a warm-up.
const WARM_UP_STEPS: usize = 4;

/// Memory that measuring takes beside the weights, in bytes: caches, activations, logits, the probe's buffer.
pub fn scratch_bytes(spec: &ModelSpec, kv: KvKind, work: &[Work]) -> u64 {
    let of = |work: &Work| {
        let (sequences, tokens) = match *work {
            Work::Prefill { tokens } => (1, tokens.min(PREFILL_CHUNK)),
            Work::Decode { batch, .. } => (batch, batch),
        };
        let cached = KvCache::bytes_for(spec, kv, work.positions()) * sequences as u64;
        // Hidden states, what attention makes of them, and an output of each chosen expert, in f32 with room to spare.
        let heads = spec.attention.heads * spec.attention.head_dim;
        let per_token =
            8 * spec.hidden + 6 * heads + spec.routing.top_k * (2 * spec.hidden + 3 * spec.moe_intermediate);
        cached + 4 * (tokens * per_token + sequences * spec.vocab) as u64
    };
    work.iter().map(of).max().unwrap_or(0) + machine::PROBE_BYTES as u64
}

/// Refuses what does not fit: `weights` bytes beside [`scratch_bytes`].
///
/// # Errors
/// [`Error::Memory`] with both numbers.
pub fn check_memory(what: &str, needed_bytes: u64) -> Result<()> {
    match machine::available_bytes() {
        Some(available_bytes) if available_bytes < needed_bytes => Err(Error::Memory {
            what: what.to_owned(),
            needed_bytes,
            available_bytes,
        }),
        _ => Ok(()),
    }
}

/// Measures every work on every thread count, in that order.
///
/// # Errors
/// A sequence longer than the context; threads that cannot be started; what the model refuses;
/// [`cotk_run::Error::Cancelled`].
pub fn measure(subject: &Subject<'_>, settings: &Settings, progress: &dyn Progress, cancel: &Cancel) -> Result<Report> {
    let context = subject.model.spec().context;
    if let Some(long) = settings.work.iter().find(|w| w.positions() > context) {
        return Err(Error::Files(ModelError::ContextFull {
            found: long.positions(),
            context,
        }));
    }
    let probe = Probe::new(Isa::selected()?);
    let mut bench = Bench {
        subject,
        settings,
        probe: &probe,
        cancel,
        workspace: Workspace::timed(),
        experts: Vec::new(),
        seen: Seen::default(),
    };
    let rows = settings.threads.len() * settings.work.len();
    progress.begin("measuring", (rows * settings.repeats) as u64, "samples");
    let mut report = Vec::with_capacity(rows);
    for &threads in &settings.threads {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(|e| Error::Synthetic {
            what: "threads",
            found: format!("{threads}: {e}"),
            expected: "threads that can be started".to_owned(),
        })?;
        for &work in &settings.work {
            report.push(pool.install(|| bench.row(work, threads, progress))?);
        }
    }
    progress.end();
    Ok(Report {
        rows: report,
        distinct_expert_bytes_per_100_tokens: bench.seen.per_100_tokens,
    })
}

/// Distinct experts of tokens that were decoded one by one.
#[derive(Default)]
struct Seen {
    experts: BTreeSet<(LayerId, ExpertId)>,
    tokens: usize,
    per_100_tokens: Option<u64>,
}

struct Bench<'a> {
    subject: &'a Subject<'a>,
    settings: &'a Settings,
    probe: &'a Probe,
    cancel: &'a Cancel,
    workspace: Workspace,
    /// Of a layer, for counting.
    experts: Vec<ExpertId>,
    seen: Seen,
}

/// Sums over passes.
#[derive(Default, Clone, Copy)]
struct Counts {
    passes: usize,
    layers: usize,
    distinct: usize,
    expert_bytes: u64,
}

/// One sample.
struct Sample {
    took: Duration,
    others: f64,
    times: PassTimes,
    switches: u64,
    counts: Counts,
}

impl Bench<'_> {
    #[expect(clippy::cast_precision_loss, reason = "counts and bytes of a model")]
    fn row(&mut self, work: Work, threads: usize, progress: &dyn Progress) -> Result<Row> {
        // Caches, pages and threads are warm after the first; a second, where it is short, says how often the work fits
        // into a sample.
        let mut begin = Instant::now();
        self.run(work, 1, WARM_UP_STEPS)?;
        if begin.elapsed() < 2 * SAMPLE {
            begin = Instant::now();
            self.run(work, 1, WARM_UP_STEPS)?;
        }
        let share = match work {
            Work::Prefill { .. } => 1.0,
            Work::Decode { steps, .. } => steps.max(1) as f64 / steps.clamp(1, WARM_UP_STEPS) as f64,
        };
        let times = (SAMPLE.as_secs_f64() / (share * begin.elapsed().as_secs_f64()).max(1e-6)).ceil();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        let times = times.clamp(1.0, 1e6) as usize;
        let (mut quiet, mut disturbed) = (Vec::new(), Vec::new());
        let (mut bandwidth, mut peak) = (Vec::new(), 0.0f64);
        while quiet.len() < self.settings.repeats && quiet.len() + disturbed.len() < TRIES * self.settings.repeats {
            bandwidth.extend((0..2).map(|_| self.probe.read_gb_per_s()));
            peak = peak.max(self.probe.gops());
            let sample = self.sample(work, times)?;
            if self.settings.keep_disturbed || sample.others <= DISTURBED {
                quiet.push(sample);
                progress.advance(1);
            } else {
                disturbed.push(sample);
            }
        }
        bandwidth.push(self.probe.read_gb_per_s());
        let dropped = disturbed.len();
        let is_quiet = !quiet.is_empty();
        let counted = if is_quiet { quiet } else { disturbed };
        let tokens = (work.tokens() * times) as f64;
        let rates: Vec<f64> = counted.iter().map(|s| tokens / s.took.as_secs_f64()).collect();
        let rate = Statistics::of(&rates);
        let sum = |of: fn(&Sample) -> f64| counted.iter().map(of).sum::<f64>();
        let passes = sum(|s| s.counts.passes as f64);
        let times = counted.iter().fold(PassTimes::default(), |sum, s| sum.and(&s.times));
        let time = times.whole().as_secs_f64();
        let expert_bytes = sum(|s| s.counts.expert_bytes as f64);
        let weight_bytes = self.subject.dense_bytes as f64 + expert_bytes / passes;
        let tokens_per_pass = tokens * counted.len() as f64 / passes;
        Ok(Row {
            work,
            threads,
            tokens_per_s: rate.median,
            spread: rate.mad,
            repeats: counted.len(),
            dropped: if is_quiet { dropped } else { 0 },
            is_quiet,
            others: counted.iter().map(|s| s.others).fold(0.0, f64::max),
            weight_bytes_per_pass: weight_bytes,
            weight_gb_per_s: weight_bytes * rate.median / tokens_per_pass / 1e9,
            bandwidth_gb_per_s: median(&bandwidth),
            gops: 2.0 * rate.median * macs_per_token(self.subject.model.spec(), work) / 1e9,
            peak_gops: peak,
            distinct_experts: sum(|s| s.counts.distinct as f64) / sum(|s| s.counts.layers as f64).max(1.0),
            shares: Part::ALL.map(|part| times.of(part).as_secs_f64() / time),
            involuntary_switches: counted.iter().map(|s| s.switches).sum(),
        })
    }

    fn sample(&mut self, work: Work, times: usize) -> Result<Sample> {
        self.workspace.take_times();
        let (load, switches) = (Load::now(), involuntary_switches());
        let begin = Instant::now();
        let counts = self.run(work, times, usize::MAX)?;
        let took = begin.elapsed();
        let others = match (load, Load::now()) {
            (Some(before), Some(after)) => after.others_since(before),
            _ => 0.0,
        };
        Ok(Sample {
            took,
            others,
            times: self.workspace.take_times(),
            switches: involuntary_switches().saturating_sub(switches),
            counts,
        })
    }

    /// The work, `times` times over; of steps at most so many.
    fn run(&mut self, work: Work, times: usize, most_steps: usize) -> Result<Counts> {
        let mut counts = Counts::default();
        let mut random = self.settings.seed;
        for _ in 0..times {
            match work {
                Work::Prefill { tokens } => {
                    let ids = self.ids(&mut random, tokens);
                    let mut caches = vec![self.subject.model.new_cache()];
                    for chunk in ids.chunks(PREFILL_CHUNK) {
                        self.pass(&[chunk], &mut caches, &mut counts)?;
                    }
                }
                Work::Decode { batch, steps } => {
                    let mut caches: Vec<KvCache> = (0..batch).map(|_| self.subject.model.new_cache()).collect();
                    for _ in 0..steps.min(most_steps) {
                        let ids = self.ids(&mut random, batch);
                        let new: Vec<&[u32]> = ids.chunks(1).collect();
                        self.pass(&new, &mut caches, &mut counts)?;
                    }
                }
            }
        }
        Ok(counts)
    }

    fn pass(&mut self, new: &[&[u32]], caches: &mut [KvCache], counts: &mut Counts) -> Result<()> {
        self.cancel.check().map_err(ModelError::from)?;
        let mut sequences: Vec<Sequence<'_>> = (new.iter().zip(caches))
            .map(|(tokens, cache)| Sequence { tokens, cache })
            .collect();
        let (model, work) = (self.subject.model, &mut self.workspace);
        model.step(&mut sequences, Mode::Exact, Logits::Last, work)?;
        black_box(work.logits());
        counts.passes += 1;
        let is_single = new.len() == 1 && new[0].len() == 1;
        for (layer, record) in self.workspace.records() {
            let experts = &mut self.experts;
            experts.clear();
            experts.extend(record.uses.iter().map(|used| used.expert));
            experts.sort_unstable();
            experts.dedup();
            counts.layers += 1;
            counts.distinct += experts.len();
            counts.expert_bytes += experts
                .iter()
                .map(|&e| (self.subject.expert_bytes)(*layer, e))
                .sum::<u64>();
            if is_single && self.seen.per_100_tokens.is_none() {
                self.seen.experts.extend(experts.iter().map(|&e| (*layer, e)));
            }
        }
        if is_single && self.seen.per_100_tokens.is_none() {
            self.seen.tokens += 1;
            if self.seen.tokens == 100 {
                let bytes = self
                    .seen
                    .experts
                    .iter()
                    .map(|&(l, e)| (self.subject.expert_bytes)(l, e));
                self.seen.per_100_tokens = Some(bytes.sum());
            }
        }
        Ok(())
    }

    /// Token ids drawn evenly from the vocabulary, as llama-bench draws them.
    fn ids(&self, state: &mut u64, count: usize) -> Vec<u32> {
        let vocab = self.subject.model.spec().vocab as u64;
        let mut next = || {
            *state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (*state >> 33) % vocab
        };
        (0..count)
            .map(|_| u32::try_from(next()).expect("vocabularies fit 32 bits"))
            .collect()
    }
}

/// Multiply-adds of weights for one token: a prompt's head is computed once.
#[expect(clippy::cast_precision_loss, reason = "parameters of a model")]
fn macs_per_token(spec: &ModelSpec, work: Work) -> f64 {
    let head = (spec.vocab * spec.hidden) as u64;
    let embeddings = if spec.tied_embeddings { 1 } else { 2 };
    let layers = inventory::dense_params(spec) - embeddings * head;
    let routed = spec.moe_layers().len() * spec.routing.top_k.min(spec.routing.experts);
    let per_token = (layers + routed as u64 * inventory::expert_params(spec)) as f64;
    match work {
        Work::Prefill { tokens } => per_token + head as f64 / tokens.max(1) as f64,
        Work::Decode { .. } => per_token + head as f64,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cotk_run::progress::Silent;

    use super::*;
    use crate::in_memory::{InMemory, Routing};
    use crate::synthetic::{self, Experts};

    fn settings(work: Vec<Work>) -> Settings {
        Settings {
            work,
            threads: vec![1, 2],
            repeats: 1,
            keep_disturbed: true,
            seed: 1,
        }
    }

    fn with_tiny<R>(test: impl FnOnce(&Subject<'_>) -> R) -> R {
        let mut spec = synthetic::spec("ref-qwen2moe", Some(1)).unwrap();
        spec.vocab = 128;
        let experts = synthetic::experts(&spec, Experts::plain(4), 1).unwrap();
        let held = Arc::new(InMemory::new(&spec, experts, 4, Routing::drawn(1, 1)).unwrap());
        let model = synthetic::dense_part(&spec, 1, held.clone()).unwrap();
        test(&Subject {
            model: &model,
            expert_bytes: &|layer, expert| held.expert_bytes(layer, expert),
            dense_bytes: 1000,
        })
    }

    /// Law: every matrix that a pass reads counts once.
    #[test]
    fn a_row_counts_the_weights_that_its_pass_reads() {
        let work = vec![
            Work::Decode { batch: 1, steps: 120 },
            Work::Decode { batch: 4, steps: 3 },
        ];
        with_tiny(|subject| {
            let report = measure(subject, &settings(work.clone()), &Silent, &Cancel::new()).unwrap();
            assert_eq!(report.rows.len(), 4);
            let one = (subject.expert_bytes)(LayerId(0), ExpertId(0));
            let rows = report
                .rows
                .iter()
                .zip([(1, work[0]), (1, work[1]), (2, work[0]), (2, work[1])]);
            for (row, (threads, work)) in rows {
                assert_eq!((row.threads, row.work, row.repeats), (threads, work, 1));
                let experts = row.distinct_experts;
                assert!((row.weight_bytes_per_pass - 1000.0 - experts * one as f64).abs() < 1.0);
                match work {
                    Work::Decode { batch: 1, .. } => assert_eq!(experts, 4.0),
                    _ => assert!(experts > 4.0 && experts <= 16.0, "{experts}"),
                }
                assert!(row.tokens_per_s > 0.0 && row.bandwidth_gb_per_s > 0.0 && row.peak_gops > 0.0);
                assert!(row.shares.iter().all(|share| (0.0..=1.0).contains(share)), "{row:?}");
                assert!((row.shares.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{row:?}");
            }
            assert_eq!(report.distinct_expert_bytes_per_100_tokens, Some(32 * one));
        });
    }

    #[test]
    fn what_cannot_be_measured_is_refused_before_it_begins() {
        with_tiny(|subject| {
            let long = settings(vec![Work::Prefill { tokens: 1025 }]);
            let text = measure(subject, &long, &Silent, &Cancel::new())
                .unwrap_err()
                .to_string();
            assert!(text.contains("1025") && text.contains("1024"), "{text}");
            let cancel = Cancel::new();
            cancel.cancel();
            assert!(measure(subject, &settings(vec![Work::Prefill { tokens: 8 }]), &Silent, &cancel).is_err());
        });
        let text = check_memory("this model", u64::MAX).unwrap_err().to_string();
        assert!(
            text.contains("this model") && text.contains(&u64::MAX.to_string()),
            "{text}"
        );
        check_memory("nothing", 0).unwrap();
    }
}
