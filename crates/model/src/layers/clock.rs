//! Where the time of a pass goes. Law: parts are laps of one clock, so that together they are the whole.

use std::time::{Duration, Instant};

/// A part of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Products with dense matrices: projections, router, shared experts, dense MLPs.
    Dense,
    /// Keys and values: into the cache, scores, softmax, sums.
    Attention,
    /// Routed experts, choosing them included.
    Experts,
    /// Final norm and head.
    Head,
    /// Embedding, norms, residual sums.
    Other,
}

impl Part {
    /// All, as [`PassTimes`] orders them.
    pub const ALL: [Self; 5] = [Self::Dense, Self::Attention, Self::Experts, Self::Head, Self::Other];

    /// As tables and JSON spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Attention => "attention",
            Self::Experts => "experts",
            Self::Head => "head",
            Self::Other => "other",
        }
    }
}

/// Time of each part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassTimes([Duration; Part::ALL.len()]);

impl PassTimes {
    /// Of one part.
    pub fn of(&self, part: Part) -> Duration {
        self.0[part as usize]
    }

    /// Of all parts.
    pub fn whole(&self) -> Duration {
        self.0.iter().sum()
    }

    /// The same and another's.
    #[must_use]
    pub fn and(mut self, more: &Self) -> Self {
        self.0.iter_mut().zip(more.0).for_each(|(sum, time)| *sum += time);
        self
    }
}

/// Adds up laps; stands still unless it was asked to run.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    last: Option<Instant>,
    pub(crate) times: PassTimes,
    pub(crate) runs: bool,
}

impl Clock {
    /// A pass begins.
    pub(crate) fn begin(&mut self) {
        self.last = self.runs.then(Instant::now);
    }

    /// What passed since the last lap was `part`.
    pub(crate) fn lap(&mut self, part: Part) {
        if let Some(last) = &mut self.last {
            let now = Instant::now();
            self.times.0[part as usize] += now - *last;
            *last = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_are_the_whole_time_and_a_clock_that_does_not_run_counts_nothing() {
        let mut clock = Clock {
            runs: true,
            ..Clock::default()
        };
        let begin = Instant::now();
        clock.begin();
        for part in Part::ALL.into_iter().cycle().take(12) {
            std::thread::sleep(Duration::from_micros(200));
            clock.lap(part);
        }
        let whole = begin.elapsed();
        assert!(clock.times.whole() <= whole);
        assert!(
            Part::ALL
                .iter()
                .all(|&part| clock.times.of(part) >= Duration::from_micros(400))
        );
        assert_eq!(clock.times.and(&clock.times).whole(), 2 * clock.times.whole());
        let mut still = Clock::default();
        still.begin();
        still.lap(Part::Head);
        assert_eq!(still.times, PassTimes::default());
    }
}
