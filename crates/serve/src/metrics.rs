//! Counters and histograms in Prometheus' text form. Atomics only: nothing here waits. Knows nothing of requests.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cotk_model::moe::Mode;

/// Upper bounds of the histograms, in seconds.
const BOUNDS_S: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// Everything that `/metrics` shows.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    pub(crate) prompt_tokens: Counter,
    pub(crate) generated_tokens: Counter,
    pub(crate) finished: Counter,
    pub(crate) cancelled: Counter,
    pub(crate) refused: Counter,
    pub(crate) failed: Counter,
    pub(crate) waiting: Counter,
    pub(crate) active: Counter,
    pub(crate) mode_requests: PerMode,
    pub(crate) mode_tokens: PerMode,
    /// Tokens times their low-bit share, in millionths.
    pub(crate) low_bit_tokens_millionths: Counter,
    pub(crate) queue_time: Histogram,
    pub(crate) first_token_time: Histogram,
    pub(crate) between_tokens_time: Histogram,
    pub(crate) request_time: Histogram,
}

/// A number that mostly grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One counter a mode.
#[derive(Debug, Default)]
pub(crate) struct PerMode {
    exact: Counter,
    little: Counter,
}

impl PerMode {
    pub(crate) fn of(&self, mode: Mode) -> &Counter {
        match mode {
            Mode::Exact => &self.exact,
            Mode::Little => &self.little,
        }
    }
}

/// How often a time fell under each bound.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BOUNDS_S.len()],
    count: AtomicU64,
    sum_us: AtomicU64,
}

impl Histogram {
    pub(crate) fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        for (bucket, bound) in self.buckets.iter().zip(BOUNDS_S) {
            if seconds <= bound {
                bucket.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        head(out, name, help, "histogram");
        let count = self.count.load(Ordering::Relaxed);
        for (bucket, bound) in self.buckets.iter().zip(BOUNDS_S) {
            let _ = writeln!(
                out,
                "{name}_bucket{{le=\"{bound}\"}} {}",
                bucket.load(Ordering::Relaxed)
            );
        }
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {count}");
        let _ = writeln!(out, "{name}_sum {}", seconds(self.sum_us.load(Ordering::Relaxed)));
        let _ = writeln!(out, "{name}_count {count}");
    }
}

#[expect(clippy::cast_precision_loss, reason = "exact for 285 years of microseconds")]
fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

fn head(out: &mut String, name: &str, help: &str, kind: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

impl Metrics {
    /// One answered HTTP request. `endpoint` is the route, never the raw path: the set of labels stays small.
    pub(crate) fn answered(&self, endpoint: &'static str, status: u16) {
        let mut requests = self.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *requests.entry((endpoint, status)).or_default() += 1;
    }

    /// The text of `/metrics`.
    pub fn render(&self) -> String {
        let mut out = String::new();
        head(
            &mut out,
            "cotk_http_requests_total",
            "Answered HTTP requests.",
            "counter",
        );
        for ((endpoint, status), count) in self
            .requests
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .iter()
        {
            let _ = writeln!(
                out,
                "cotk_http_requests_total{{endpoint=\"{endpoint}\",status=\"{status}\"}} {count}"
            );
        }
        let counters = [
            (
                "cotk_prompt_tokens_total",
                "Prompt tokens computed.",
                &self.prompt_tokens,
            ),
            (
                "cotk_generated_tokens_total",
                "Tokens generated.",
                &self.generated_tokens,
            ),
            (
                "cotk_sequences_finished_total",
                "Sequences that ended by themselves.",
                &self.finished,
            ),
            (
                "cotk_sequences_cancelled_total",
                "Sequences whose client left.",
                &self.cancelled,
            ),
            (
                "cotk_sequences_refused_total",
                "Sequences refused by a full queue.",
                &self.refused,
            ),
            (
                "cotk_sequences_failed_total",
                "Sequences that the engine failed.",
                &self.failed,
            ),
        ];
        for (name, help, counter) in counters {
            head(&mut out, name, help, "counter");
            let _ = writeln!(out, "{name} {}", counter.get());
        }
        let gauges = [
            ("cotk_sequences_waiting", "Sequences in the queue.", &self.waiting),
            ("cotk_sequences_active", "Sequences being generated.", &self.active),
        ];
        for (name, help, gauge) in gauges {
            head(&mut out, name, help, "gauge");
            let _ = writeln!(out, "{name} {}", gauge.get());
        }
        let per_mode = [
            (
                "cotk_mode_sequences_total",
                "Sequences begun, by mode.",
                &self.mode_requests,
            ),
            (
                "cotk_mode_tokens_total",
                "Tokens generated, by mode.",
                &self.mode_tokens,
            ),
        ];
        for (name, help, counters) in per_mode {
            head(&mut out, name, help, "counter");
            let _ = writeln!(out, "{name}{{mode=\"exact\"}} {}", counters.exact.get());
            let _ = writeln!(out, "{name}{{mode=\"little\"}} {}", counters.little.get());
        }
        let name = "cotk_low_bit_tokens_total";
        head(
            &mut out,
            name,
            "Computed tokens times the share of their gate mass at low bits.",
            "counter",
        );
        let _ = writeln!(out, "{name} {}", seconds(self.low_bit_tokens_millionths.get()));
        self.queue_time.write(
            &mut out,
            "cotk_queue_seconds",
            "From request to the first computed token.",
        );
        let name = "cotk_time_to_first_token_seconds";
        self.first_token_time
            .write(&mut out, name, "From request to the first generated token.");
        let name = "cotk_time_between_tokens_seconds";
        self.between_tokens_time
            .write(&mut out, name, "Between two tokens of one sequence.");
        self.request_time
            .write(&mut out, "cotk_sequence_seconds", "From request to the last token.");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_end_with_the_count() {
        let metrics = Metrics::default();
        for ms in [0, 3, 3, 700, 60_000] {
            metrics.request_time.observe(Duration::from_millis(ms));
        }
        let text = metrics.render();
        for line in [
            "cotk_sequence_seconds_bucket{le=\"0.001\"} 1",
            "cotk_sequence_seconds_bucket{le=\"0.005\"} 3",
            "cotk_sequence_seconds_bucket{le=\"1\"} 4",
            "cotk_sequence_seconds_bucket{le=\"+Inf\"} 5",
            "cotk_sequence_seconds_sum 60.706",
            "cotk_sequence_seconds_count 5",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} not in\n{text}");
        }
    }
}
