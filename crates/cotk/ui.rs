//! Where things are shown: results on standard output, all else on standard error; bars on a terminal, else a line
//! every 10 s. Decides this once, for every command.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cotk_run::progress::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::launch::complain;

const LINE_EVERY: Duration = Duration::from_secs(10);

/// Cheap to clone; clones share the bar.
#[derive(Clone)]
pub struct Ui {
    is_json: bool,
    is_quiet: bool,
    is_terminal: bool,
    phase: Arc<Mutex<Option<Phase>>>,
}

struct Phase {
    what: String,
    unit: String,
    total: u64,
    done: u64,
    began: Instant,
    said: Instant,
    bar: Option<ProgressBar>,
}

impl Ui {
    /// As asked on the command line, and as standard error is.
    pub fn new(is_json: bool, is_quiet: bool) -> Self {
        Self {
            is_json,
            is_quiet,
            is_terminal: std::io::stderr().is_terminal(),
            phase: Arc::default(),
        }
    }

    /// Whether the result is to be one JSON object.
    pub fn is_json(&self) -> bool {
        self.is_json
    }

    /// Removes a bar that an error left.
    pub fn finish(&self) {
        self.end();
    }

    fn with_phase(&self, change: impl FnOnce(&mut Option<Phase>)) {
        change(&mut self.phase.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Progress for Ui {
    fn begin(&self, what: &str, total: u64, unit: &str) {
        self.end();
        if self.is_quiet {
            return;
        }
        let bar = self.is_terminal.then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
            let template = if total > 0 {
                "{msg:20} {wide_bar} {human_pos}/{human_len} {prefix} {per_sec:>12} {eta:>5} left"
            } else {
                "{msg:20} {spinner} {human_pos} {prefix} {elapsed}"
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_message(what.to_owned());
            bar.set_prefix(unit.to_owned());
            bar
        });
        let now = Instant::now();
        self.with_phase(|phase| {
            *phase = Some(Phase {
                what: what.to_owned(),
                unit: unit.to_owned(),
                total,
                done: 0,
                began: now,
                said: now,
                bar,
            });
        });
    }

    fn advance(&self, steps: u64) {
        self.with_phase(|phase| {
            let Some(phase) = phase else { return };
            phase.done += steps;
            if let Some(bar) = &phase.bar {
                bar.inc(steps);
            } else if phase.said.elapsed() >= LINE_EVERY {
                phase.said = Instant::now();
                complain(&phase.line());
            }
        });
    }

    fn end(&self) {
        self.with_phase(|phase| {
            if let Some(Phase { bar: Some(bar), .. }) = phase.take() {
                bar.finish_and_clear();
            }
        });
    }

    fn note(&self, text: &str) {
        if self.is_quiet {
            return;
        }
        self.with_phase(|phase| match phase {
            Some(Phase { bar: Some(bar), .. }) => bar.suspend(|| complain(text)),
            _ => complain(text),
        });
    }
}

impl Phase {
    fn line(&self) -> String {
        let seconds = self.began.elapsed().as_secs_f64();
        if self.total == 0 {
            return format!("{}: {} {}, {seconds:.0} s", self.what, self.done, self.unit);
        }
        #[expect(clippy::cast_precision_loss, reason = "a whole number of seconds is shown")]
        let left = seconds * self.total.saturating_sub(self.done) as f64 / self.done.max(1) as f64;
        format!(
            "{}: {}/{} {}, {seconds:.0} s, about {left:.0} s left",
            self.what, self.done, self.total, self.unit
        )
    }
}
