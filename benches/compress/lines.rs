//! Phases and notes on standard error, for who waits.

use cotk_run::progress::Progress;

pub(crate) struct Lines;

impl Progress for Lines {
    fn begin(&self, what: &str, total: u64, unit: &str) {
        eprintln!("{what}: {total} {unit}");
    }
    fn advance(&self, _: u64) {}
    fn end(&self) {}
    fn note(&self, text: &str) {
        eprintln!("{text}");
    }
}
