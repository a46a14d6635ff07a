//! Who computes when: one worker thread, a bounded queue, a bounded number of slots, rounds. A round is one step of all
//! sequences that decode, together, then one chunk of each prompt. Law: every sequence in a slot moves in every round
//! unless its own client is slow; a client that leaves frees its slot in the next round; a failure ends its own request
//! alone; nothing here waits for the network.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cotk_model::moe::Mode;
use tokio::sync::mpsc::{self, error::TrySendError};

use crate::engine::{Batch, Engine, New};
use crate::error::{ApiError, Error};
use crate::metrics::Metrics;
use crate::sequence::{Delta, Generation, Running, Summary, Turn};

/// Events that wait for one client before its slot stands still.
const CHANNEL: usize = 32;
/// How long the worker rests when every slot waits for its client.
const REST: Duration = Duration::from_millis(2);

/// How much is done at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that are computed together.
    pub slots: usize,
    /// Sequences that wait for a slot.
    pub queue: usize,
    /// Prompt tokens of one round: how long a long prompt keeps the others waiting.
    pub prefill_tokens: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            slots: 8,
            queue: 64,
            prefill_tokens: 128,
        }
    }
}

/// What a client hears of its request: pieces, then exactly one of the other two.
#[derive(Debug)]
pub(crate) enum Event {
    Piece(Delta),
    Done(Summary),
    Failed(ApiError),
}

/// The queue and its worker.
pub(crate) struct Scheduler {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// A job came, or the phase changed.
    changed: Condvar,
    limits: Limits,
    metrics: Arc<Metrics>,
}

struct State {
    waiting: VecDeque<Job>,
    active: usize,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// Nothing new; what is there is finished.
    Draining,
    /// What is there is cut off.
    Cut,
}

struct Job {
    generation: Generation,
    client: mpsc::Sender<Event>,
    arrived: Instant,
}

impl Scheduler {
    /// Starts the worker. The handle ends after [`Scheduler::drain`] and the last sequence, or [`Scheduler::cut`].
    ///
    /// # Errors
    /// When the thread cannot be made.
    pub(crate) fn start(
        engine: Arc<dyn Engine>,
        limits: Limits,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, JoinHandle<()>), Error> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                active: 0,
                phase: Phase::Open,
            }),
            changed: Condvar::new(),
            limits,
            metrics,
        });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("cotk-engine".into())
            .spawn(move || work(&*engine, &worker))
            .map_err(|source| Error::System {
                action: "start the engine's thread",
                source,
            })?;
        Ok((Self { shared }, thread))
    }

    /// Queues all of them or none.
    ///
    /// # Errors
    /// 429 when they do not fit the queue, 503 when the server is on its way down.
    pub(crate) fn submit(&self, generations: Vec<Generation>) -> Result<Vec<mpsc::Receiver<Event>>, ApiError> {
        let (limits, metrics) = (self.shared.limits, &self.shared.metrics);
        let mut state = self.shared.lock();
        if state.phase != Phase::Open {
            return Err(ApiError::draining());
        }
        state.waiting.retain(|job| !job.is_deserted(metrics));
        let free = limits.slots.saturating_sub(state.active) + limits.queue;
        if state.waiting.len() + generations.len() > free {
            metrics.refused.add(generations.len() as u64);
            return Err(ApiError::queue_full(state.waiting.len(), limits.queue));
        }
        let mut receivers = Vec::with_capacity(generations.len());
        for generation in generations {
            let (client, receiver) = mpsc::channel(CHANNEL);
            receivers.push(receiver);
            state.waiting.push_back(Job {
                generation,
                client,
                arrived: Instant::now(),
            });
        }
        metrics.waiting.set(state.waiting.len() as u64);
        self.shared.changed.notify_one();
        Ok(receivers)
    }

    /// Sequences waiting and active.
    pub(crate) fn load(&self) -> (usize, usize) {
        let state = self.shared.lock();
        (state.waiting.len(), state.active)
    }

    pub(crate) fn is_open(&self) -> bool {
        self.shared.lock().phase == Phase::Open
    }

    /// Takes nothing new; the worker ends when all is done.
    pub(crate) fn drain(&self) {
        let mut state = self.shared.lock();
        if state.phase == Phase::Open {
            state.phase = Phase::Draining;
        }
        self.shared.changed.notify_one();
    }

    /// Ends every sequence at its next turn.
    pub(crate) fn cut(&self) {
        self.shared.lock().phase = Phase::Cut;
        self.shared.changed.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Job {
    /// Whether nobody waits for it any more.
    fn is_deserted(&self, metrics: &Metrics) -> bool {
        let is_deserted = self.client.is_closed();
        metrics.cancelled.add(u64::from(is_deserted));
        is_deserted
    }
}

/// A sequence in a slot and the way to its client.
struct Slot<'e> {
    running: Running<'e>,
    client: mpsc::Sender<Event>,
    /// Of the round that runs.
    now: Now,
    /// What the client has not taken yet, because its channel is full.
    unsent: VecDeque<Event>,
    is_over: bool,
    arrived: Instant,
    last_token: Option<Instant>,
}

/// What a slot may do in this round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Now {
    /// Wait: the client is slow.
    Rest,
    Decode,
    Prefill,
    /// Nothing more: the slot is free.
    Leave,
}

fn work(engine: &dyn Engine, shared: &Shared) {
    let mut slots: Vec<Slot<'_>> = Vec::new();
    let mut batch = engine.batch();
    loop {
        let mut state = shared.lock();
        while slots.is_empty() && state.waiting.is_empty() && state.phase == Phase::Open {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let phase = state.phase;
        let mut begun = Vec::new();
        while slots.len() + begun.len() < shared.limits.slots
            && let Some(job) = state.waiting.pop_front()
        {
            if !job.is_deserted(&shared.metrics) {
                begun.push(job);
            }
        }
        state.active = slots.len() + begun.len();
        shared.metrics.waiting.set(state.waiting.len() as u64);
        shared.metrics.active.set(state.active as u64);
        let is_last = phase == Phase::Draining && state.waiting.is_empty();
        let left = if phase == Phase::Cut {
            std::mem::take(&mut state.waiting)
        } else {
            VecDeque::new()
        };
        drop(state);

        slots.extend(
            begun
                .into_iter()
                .filter_map(|job| Slot::begin(engine, &mut *batch, job, &shared.metrics)),
        );
        if phase == Phase::Cut {
            for client in left
                .iter()
                .map(|job| &job.client)
                .chain(slots.iter().map(|slot| &slot.client))
            {
                let _ = client.try_send(Event::Failed(ApiError::draining()));
            }
            return;
        }
        if slots.is_empty() {
            if is_last {
                return;
            }
            continue;
        }
        let is_moved = round(&mut slots, &mut *batch, &engine.facts().modes, shared);
        // Written before the next look at the queue, so that a free slot is seen by `submit`.
        shared.lock().active = slots.len();
        shared.metrics.active.set(slots.len() as u64);
        if !is_moved && !slots.is_empty() {
            let state = shared.lock();
            let _ = shared.changed.wait_timeout(state, REST);
        }
    }
}

/// One step of everybody who decodes, one chunk of each prompt; whether somebody moved.
fn round(slots: &mut Vec<Slot<'_>>, batch: &mut dyn Batch, modes: &[Mode], shared: &Shared) -> bool {
    slots.iter_mut().for_each(|slot| slot.now = slot.look(&shared.metrics));
    let is_moved = slots.iter().any(|slot| matches!(slot.now, Now::Decode | Now::Prefill));
    for &mode in modes {
        let mut decoding: Vec<&mut Slot<'_>> = slots
            .iter_mut()
            .filter(|slot| slot.now == Now::Decode && slot.running.mode() == mode)
            .collect();
        for together in decoding.chunks_mut(batch.width().max(1)) {
            advance(together, batch, shared);
        }
    }
    for slot in slots.iter_mut().filter(|slot| slot.now == Now::Prefill) {
        advance(&mut [slot], batch, shared);
    }
    slots.retain_mut(|slot| {
        // What is over and told leaves at once, so that its place is free.
        let stays = slot.now != Now::Leave && !(slot.send() && slot.is_over);
        if !stays {
            batch.end(slot.running.sequence());
        }
        stays
    });
    is_moved
}

/// One step of these; if it fails, of each alone, so that only who is to blame fails.
fn advance(slots: &mut [&mut Slot<'_>], batch: &mut dyn Batch, shared: &Shared) {
    let chunk = shared.limits.prefill_tokens;
    let new: Vec<New<'_>> = slots
        .iter()
        .map(|slot| New {
            sequence: slot.running.sequence(),
            tokens: slot.running.next_tokens(chunk),
        })
        .collect();
    let counts: Vec<usize> = new.iter().map(|new| new.tokens.len()).collect();
    match guarded(|| batch.advance(&new).map_err(|error| error.0)) {
        Ok(()) => {
            for (at, (slot, count)) in slots.iter_mut().zip(counts).enumerate() {
                let before = slot.running.generated_tokens();
                let (running, batch) = (&mut slot.running, &*batch);
                let result = guarded(|| running.took(count, batch.step(at)).map_err(|error| error.0));
                slot.time_token(before, &shared.metrics);
                slot.queue(result, &shared.metrics);
            }
        }
        Err(_) if slots.len() > 1 => {
            for slot in slots {
                advance(&mut [&mut **slot], batch, shared);
            }
        }
        Err(message) => slots[0].queue(Err(message), &shared.metrics),
    }
}

impl<'e> Slot<'e> {
    fn begin(engine: &'e dyn Engine, batch: &mut dyn Batch, job: Job, metrics: &Metrics) -> Option<Self> {
        let queued = job.arrived.elapsed();
        metrics.queue_time.observe(queued);
        metrics.mode_requests.of(job.generation.mode).add(1);
        let mode = job.generation.mode;
        let positions = job.generation.prompt.len() + job.generation.max_tokens;
        let begun = guarded(|| {
            let sequence = batch.begin(mode, positions).map_err(|error| error.0)?;
            Ok(Running::begin(engine, sequence, job.generation, queued))
        });
        match begun {
            Ok(running) => Some(Self {
                running,
                client: job.client,
                now: Now::Rest,
                unsent: VecDeque::new(),
                is_over: false,
                arrived: job.arrived,
                last_token: None,
            }),
            Err(message) => {
                metrics.failed.add(1);
                let error = ApiError::engine(format!("mode {}: {message}", mode.name()));
                let _ = job.client.try_send(Event::Failed(error));
                None
            }
        }
    }

    /// Before a round: what it may do.
    fn look(&mut self, metrics: &Metrics) -> Now {
        if self.client.is_closed() {
            if !self.is_over {
                metrics.cancelled.add(1);
            }
            return Now::Leave;
        }
        match (self.send(), self.is_over) {
            (false, _) => Now::Rest,
            (true, true) => Now::Leave,
            (true, false) if self.running.is_decoding() => Now::Decode,
            (true, false) => Now::Prefill,
        }
    }

    /// What the client is to hear of a step.
    fn queue(&mut self, result: Result<Turn, String>, metrics: &Metrics) {
        match result {
            Ok(Turn::Silent) => {}
            Ok(Turn::Piece(delta)) => self.unsent.push_back(Event::Piece(delta)),
            Ok(Turn::Last(delta, summary)) => {
                account(&summary, self.arrived.elapsed(), metrics);
                self.unsent.push_back(Event::Piece(delta));
                self.unsent.push_back(Event::Done(summary));
                self.is_over = true;
            }
            Err(message) => {
                metrics.failed.add(1);
                self.unsent.push_back(Event::Failed(ApiError::engine(message)));
                self.is_over = true;
            }
        }
        self.send();
    }

    /// Hands over what the channel takes; false when something is left.
    fn send(&mut self) -> bool {
        while let Some(event) = self.unsent.pop_front() {
            match self.client.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.unsent.push_front(event);
                    return false;
                }
                Err(TrySendError::Closed(_)) => self.unsent.clear(),
            }
        }
        true
    }

    fn time_token(&mut self, before: usize, metrics: &Metrics) {
        if self.running.generated_tokens() == before {
            return;
        }
        metrics.generated_tokens.add(1);
        metrics.mode_tokens.of(self.running.mode()).add(1);
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => metrics.first_token_time.observe(now - self.arrived),
            Some(last) => metrics.between_tokens_time.observe(now - last),
        }
    }
}

fn account(summary: &Summary, whole: Duration, metrics: &Metrics) {
    metrics.finished.add(1);
    metrics.prompt_tokens.add(summary.prompt_tokens as u64);
    metrics.request_time.observe(whole);
    // The last generated token is not computed any further.
    let tokens = (summary.prompt_tokens + summary.generated_tokens).saturating_sub(1);
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a fraction of a count, in millionths"
    )]
    metrics
        .low_bit_tokens_millionths
        .add((tokens as f64 * summary.low_bit_fraction * 1e6) as u64);
}

/// Runs engine code; a panic there (a bug) fails its own request alone.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("the engine panicked: {}", text.unwrap_or("without a message")))
    })
}
