//! The threads that kernels run on: made once, given numbered parts many times, nothing allocated per call.
//!
//! Each thread first takes the parts of its own contiguous share (one stream of weights each), then those left at the
//! ends of others': who works never decides what comes out, and nobody waits for a peer that has not begun. Threads
//! without work spin for some tens of µs and then sleep, so that on a shared machine they cost their neighbours nothing.
//! Law: every part runs exactly once, and two parts of one seat never at the same time.

use std::any::Any;
use std::cell::{Cell, RefCell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// Most threads of a team.
pub const MAX_THREADS: usize = 256;

/// How long a thread without work looks for some before it sleeps: longer than the gaps between the products of a token,
/// shorter than what a neighbour on the same core would notice.
const SPIN: Duration = Duration::from_micros(40);

/// Pauses between two looks at the clock.
const PAUSES: u32 = 16;

/// What one thread runs of a call: seat, part.
type Work<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// Threads that share calls. Cheap to clone; the threads end with the last clone.
#[derive(Clone)]
pub struct Team(Arc<Owner>);

impl Team {
    /// `threads` seats (1 to [`MAX_THREADS`]): the caller's and `threads - 1` threads of the team's own. If the system
    /// refuses to make some, the team is smaller: results do not depend on it.
    pub fn new(threads: usize) -> Self {
        let threads = threads.clamp(1, MAX_THREADS);
        let shared = Arc::new(Shared {
            state: Aligned(AtomicU64::new(0)),
            shares: (0..threads).map(|_| Aligned(AtomicU64::new(0))).collect(),
            is_asleep: (0..threads).map(|_| Aligned(AtomicBool::new(false))).collect(),
            is_busy: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            work: UnsafeCell::new(None),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
        });
        let helper = |seat: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("cotk-{seat}"))
                .spawn(move || shared.help(seat))
        };
        let helpers = (1..threads).map_while(|seat| helper(seat).ok()).collect();
        Self(Arc::new(Owner { shared, helpers }))
    }

    /// Seats: the caller's and one per thread of the team.
    pub fn threads(&self) -> usize {
        self.0.helpers.len() + 1
    }

    /// Runs `f` with this team as the one that [`run`] finds on this thread.
    pub fn install<R>(&self, f: impl FnOnce() -> R) -> R {
        struct Restore(Option<Team>);
        impl Drop for Restore {
            fn drop(&mut self) {
                let before = self.0.take();
                CURRENT.with_borrow_mut(|current| *current = before);
            }
        }
        let _restore = Restore(CURRENT.replace(Some(self.clone())));
        f()
    }

    /// Calls `f(seat, part)` once for each of `0..parts` and returns when all are done. Seats are below
    /// [`Team::threads`]; parts of one seat never run at the same time, so that a seat may own scratch.
    ///
    /// Inside a part, and while another thread has the team, the caller does all the work itself at seat 0.
    ///
    /// # Panics
    /// With the first panic of a part, once no part runs any more; parts that had not begun are then left out.
    pub fn run(&self, parts: usize, f: impl Fn(usize, usize) + Sync) {
        let shared = &self.0.shared;
        let helpers = self.0.helpers.len().min(parts.saturating_sub(1));
        if helpers == 0 || IS_INSIDE.get() || shared.is_busy.swap(true, Ordering::Acquire) {
            (0..parts).for_each(|part| f(0, part));
            return;
        }
        shared.call(parts, helpers, &self.0.helpers, &f);
    }
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Team({})", self.threads())
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Team>> = const { RefCell::new(None) };
    /// This thread runs a part.
    static IS_INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// The team of this thread: what [`Team::install`] gave, else one of the process with as many threads as rayon's pool here.
fn with_current<R>(f: impl FnOnce(&Team) -> R) -> R {
    static OF_SIZE: [OnceLock<Team>; MAX_THREADS + 1] = [const { OnceLock::new() }; MAX_THREADS + 1];
    let installed = CURRENT.with_borrow(Clone::clone);
    match installed {
        Some(team) => f(&team),
        None => {
            let threads = rayon::current_num_threads().clamp(1, MAX_THREADS);
            f(OF_SIZE[threads].get_or_init(|| Team::new(threads)))
        }
    }
}

/// Seats that [`run_seated`] may use on this thread.
pub fn threads() -> usize {
    if IS_INSIDE.get() {
        1
    } else {
        with_current(Team::threads)
    }
}

/// Calls `f(part)` once for each of `0..parts` on the team of this thread: the one of [`Team::install`], else one of the
/// process that has as many threads as rayon's current pool.
///
/// # Panics
/// As [`Team::run`].
pub fn run(parts: usize, f: impl Fn(usize) + Sync) {
    run_seated(parts, |_, part| f(part));
}

/// [`run`] with the seat first, as [`Team::run`] has it.
///
/// # Panics
/// As [`Team::run`].
pub fn run_seated(parts: usize, f: impl Fn(usize, usize) + Sync) {
    if parts <= 1 || IS_INSIDE.get() {
        (0..parts).for_each(|part| f(0, part));
    } else {
        with_current(|team| team.run(parts, f));
    }
}

/// Calls `f` with the ranges of at most `chunk` that `0..count` falls into, whatever the number of threads.
///
/// # Panics
/// As [`Team::run`].
pub fn run_chunks(count: usize, chunk: usize, f: impl Fn(Range<usize>) + Sync) {
    run(count.div_ceil(chunk), |i| f(i * chunk..((i + 1) * chunk).min(count)));
}

/// Ends the threads.
struct Owner {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A clone that a part of this very team dropped last: the thread ends by itself.
            if helper.thread().id() != std::thread::current().id() {
                let _ = helper.join();
            }
        }
    }
}

/// On a pair of cache lines of its own: no thread's writes slow another's reads of something else.
#[repr(align(128))]
struct Aligned<T>(T);

struct Shared {
    /// Low half: helpers inside the call, [`WAITS`], [`OPEN`]; high half: number of the call.
    state: Aligned<AtomicU64>,
    /// Of each seat: parts not yet taken, `first << 32 | end`.
    shares: Box<[Aligned<AtomicU64>]>,
    is_asleep: Box<[Aligned<AtomicBool>]>,
    is_busy: AtomicBool,
    is_over: AtomicBool,
    /// Written by the caller while nobody is inside.
    work: UnsafeCell<Option<Open>>,
    /// Who sleeps until nobody is inside.
    caller: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// The current call, its borrow of the caller's closure hidden: nobody is inside once the caller returns.
#[derive(Clone, Copy)]
struct Open {
    work: *const Work<'static>,
    seats: usize,
}

// SAFETY: `work` is written by the one thread that holds `is_busy`, while `state` lets nobody in and nobody is inside
// (module law); helpers read it only while they are inside. All else is atomics and locks.
unsafe impl Sync for Shared {}
// SAFETY: the closure behind `work` is `Sync`, and no thread uses it after the call (line above).
unsafe impl Send for Shared {}

const OPEN: u64 = 1 << 31;
const WAITS: u64 = 1 << 30;
const INSIDE: u64 = WAITS - 1;
const NUMBER: u64 = 1 << 32;

fn number(state: u64) -> u64 {
    state / NUMBER
}

impl Shared {
    /// The caller's side. `is_busy` is held; it is given back here.
    fn call(&self, parts: usize, helpers: usize, threads: &[JoinHandle<()>], f: &Work<'_>) {
        let parts = u32::try_from(parts).expect("parts are counted in 32 bits");
        let seats = helpers + 1;
        // SAFETY: only the lifetime changes. The pointer is used by helpers that are inside, and `close` below returns
        // when none is, before `f` ends.
        let work = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(f) };
        // SAFETY: `is_busy` makes this the one caller; the last one left with nobody inside and the door shut.
        unsafe { *self.work.get() = Some(Open { work, seats }) };
        for (seat, share) in self.shares[..seats].iter().enumerate() {
            #[expect(clippy::cast_possible_truncation, reason = "at most `parts`")]
            let at = |seat: usize| (u64::from(parts) * seat as u64 / seats as u64) as u32;
            share.0.store(pack(at(seat), at(seat + 1)), Ordering::Relaxed);
        }
        // One thread writes `state` while nobody is inside: plain arithmetic. The release shows all the above to who joins.
        let call = number(self.state.0.load(Ordering::Relaxed)).wrapping_add(1) % NUMBER;
        let next = (call * NUMBER) | OPEN;
        self.state.0.store(next, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        for (seat, helper) in (1..=helpers).zip(threads) {
            let is_asleep = &self.is_asleep[seat].0;
            if is_asleep.load(Ordering::SeqCst) && is_asleep.swap(false, Ordering::SeqCst) {
                helper.thread().unpark();
            }
        }
        let mine = self.take_part(0, seats, f);
        self.close();
        let theirs = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.is_busy.store(false, Ordering::Release);
        if let Some(panic) = mine.err().or(theirs) {
            resume_unwind(panic);
        }
    }

    /// Takes parts until none is left; the first panic ends the call for everybody.
    fn take_part(&self, seat: usize, seats: usize, f: &Work<'_>) -> std::thread::Result<()> {
        IS_INSIDE.set(true);
        let done = catch_unwind(AssertUnwindSafe(|| {
            while let Some(part) = self.own(seat) {
                f(seat, part);
            }
            for other in (1..seats).map(|i| (seat + i) % seats) {
                while let Some(part) = self.last_of(other) {
                    f(seat, part);
                }
            }
        }));
        IS_INSIDE.set(false);
        if done.is_err() {
            for share in &self.shares[..seats] {
                share.0.store(0, Ordering::Relaxed);
            }
        }
        done
    }

    /// The first part left of one's own share.
    fn own(&self, seat: usize) -> Option<usize> {
        let share = &self.shares[seat].0;
        let taken = share.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |packed| {
            let (first, end) = unpack(packed);
            (first < end).then(|| pack(first + 1, end))
        });
        taken.ok().map(|packed| unpack(packed).0 as usize)
    }

    /// The last part left of another's.
    fn last_of(&self, seat: usize) -> Option<usize> {
        let share = &self.shares[seat].0;
        let taken = share.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |packed| {
            let (first, end) = unpack(packed);
            (first < end).then(|| pack(first, end - 1))
        });
        taken.ok().map(|packed| unpack(packed).1 as usize - 1)
    }

    /// Lets nobody in any more and waits for those inside: they hold a part each, no more.
    fn close(&self) {
        let state = self.state.0.fetch_and(!OPEN, Ordering::AcqRel);
        if state & INSIDE == 0 {
            return;
        }
        let mut is_left = || self.state.0.load(Ordering::Acquire) & INSIDE == 0;
        if spin_until(&mut is_left) {
            return;
        }
        // The helper may have lost its core: leave it this one.
        *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
        self.state.0.fetch_or(WAITS, Ordering::AcqRel);
        while !is_left() {
            std::thread::park();
        }
        *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// A helper's life.
    fn help(&self, seat: usize) {
        let mut seen = 0;
        loop {
            let mut state = 0;
            let mut is_called = || {
                state = self.state.0.load(Ordering::Acquire);
                state & OPEN != 0 && number(state) != seen
            };
            if !spin_until(&mut is_called) {
                let is_asleep = &self.is_asleep[seat].0;
                is_asleep.store(true, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                // Between the look and the sleep a caller finds the flag and wakes: one of the two sees the other.
                while !is_called() && is_asleep.load(Ordering::SeqCst) {
                    if self.is_over.load(Ordering::SeqCst) {
                        return;
                    }
                    std::thread::park();
                }
                is_asleep.store(false, Ordering::SeqCst);
            }
            if self.is_over.load(Ordering::SeqCst) {
                return;
            }
            if is_called() {
                seen = number(state);
                self.join(seat, state);
            }
        }
    }

    /// Goes inside if the call that was seen is still open, works, and leaves.
    fn join(&self, seat: usize, mut state: u64) {
        let wanted = number(state);
        while state & OPEN != 0 && number(state) == wanted {
            match self
                .state
                .0
                .compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire)
            {
                Err(now) => state = now,
                Ok(_) => {
                    // SAFETY: inside: the caller wrote it before it opened the call and does not return before we leave.
                    let open = unsafe { *self.work.get() }.expect("an open call has work");
                    if seat < open.seats {
                        // SAFETY: as above: the closure lives until we leave.
                        let work = unsafe { &*open.work };
                        if let Err(panic) = self.take_part(seat, open.seats, work) {
                            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                        }
                    }
                    let before = self.state.0.fetch_sub(1, Ordering::AcqRel);
                    if before & WAITS != 0 && before & INSIDE == 1 {
                        let caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner).clone();
                        if let Some(caller) = caller {
                            caller.unpark();
                        }
                    }
                    return;
                }
            }
        }
    }
}

/// Whether `is_so` became true within [`SPIN`].
fn spin_until(is_so: &mut impl FnMut() -> bool) -> bool {
    let mut start = None;
    loop {
        for _ in 0..PAUSES {
            if is_so() {
                return true;
            }
            std::hint::spin_loop();
        }
        match start {
            None => start = Some(Instant::now()),
            Some(start) if start.elapsed() >= SPIN => return false,
            Some(_) => {}
        }
    }
}

fn pack(first: u32, end: u32) -> u64 {
    (u64::from(first) << 32) | u64::from(end)
}

fn unpack(packed: u64) -> (u32, u32) {
    #[expect(clippy::cast_possible_truncation, reason = "two halves")]
    let halves = ((packed >> 32) as u32, packed as u32);
    halves
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn counts(team: &Team, parts: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
        team.run(parts, |_, part| {
            counts[part].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_part_runs_once_whatever_the_team() {
        for threads in [1, 2, 3, 8] {
            let team = Team::new(threads);
            assert_eq!(team.threads(), threads);
            for parts in [0, 1, 2, 3, 7, 100, 1000] {
                assert_eq!(counts(&team, parts), vec![1; parts], "{threads} threads");
            }
        }
    }

    #[test]
    fn a_seat_runs_one_part_at_a_time() {
        let team = Team::new(4);
        let busy: Vec<AtomicBool> = (0..4).map(|_| AtomicBool::new(false)).collect();
        for _ in 0..200 {
            team.run(40, |seat, _| {
                assert!(!busy[seat].swap(true, Ordering::SeqCst), "seat {seat} twice");
                std::hint::spin_loop();
                busy[seat].store(false, Ordering::SeqCst);
            });
        }
    }

    #[test]
    fn short_calls_in_a_row_and_after_a_sleep_are_complete() {
        let team = Team::new(3);
        let total = AtomicUsize::new(0);
        for call in 0..20_000 {
            team.run(1 + call % 5, |_, _| {
                total.fetch_add(1, Ordering::Relaxed);
            });
            if call % 4000 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        assert_eq!(total.into_inner(), 20_000 / 5 * (1 + 2 + 3 + 4 + 5));
    }

    #[test]
    fn calls_inside_a_part_and_from_other_threads_do_their_own_work() {
        let team = Team::new(3);
        let total = AtomicUsize::new(0);
        let add = |_: usize, _: usize| {
            total.fetch_add(1, Ordering::Relaxed);
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..50).for_each(|_| team.run(10, |_, _| team.run(5, add))));
            }
        });
        assert_eq!(total.into_inner(), 4 * 50 * 10 * 5);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(3);
        for bad in [0, 7, 29] {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                team.run(30, |_, part| assert!(part != bad, "part {bad}"));
            }));
            let message = caught.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(*message, format!("part {bad}"));
            assert_eq!(counts(&team, 50), vec![1; 50]);
        }
    }

    #[test]
    fn a_caller_that_waits_long_sleeps_and_wakes() {
        let team = Team::new(2);
        for _ in 0..5 {
            // Both parts take longer than the spinning, whoever has which.
            team.run(2, |seat, _| {
                std::thread::sleep(Duration::from_millis(1 + 4 * seat as u64))
            });
        }
        assert_eq!(counts(&team, 9), vec![1; 9]);
    }

    #[test]
    fn the_installed_team_is_found_and_the_one_before_comes_back() {
        let (one, three) = (Team::new(1), Team::new(3));
        three.install(|| {
            assert_eq!(threads(), 3);
            one.install(|| assert_eq!(threads(), 1));
            assert_eq!(threads(), 3);
            run(4, |_| assert_eq!(threads(), 1));
        });
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        assert_eq!(pool.install(threads), 2);
    }

    #[test]
    fn chunks_cover_a_range_once() {
        let seen: Vec<AtomicUsize> = (0..37).map(|_| AtomicUsize::new(0)).collect();
        run_chunks(seen.len(), 5, |range| {
            assert!(range.len() <= 5 && range.start % 5 == 0);
            range.for_each(|i| {
                seen[i].fetch_add(1, Ordering::Relaxed);
            });
        });
        assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn teams_come_and_go() {
        for i in 0..100 {
            let team = Team::new(1 + i % 4);
            if i % 3 == 0 {
                assert_eq!(counts(&team, 10), vec![1; 10]);
            }
            drop(team.clone());
        }
    }
}
