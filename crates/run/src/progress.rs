//! How libraries say how far they are. They never print: the program draws bars or lines from this.

/// Receives the progress of one piece of work at a time. Implementations must be cheap: calls come from hot loops.
pub trait Progress: Send + Sync {
    /// A phase begins: `what` in a few words ("layers", "training"), `total` steps of `unit`; 0 if not known.
    fn begin(&self, what: &str, total: u64, unit: &str);
    /// `steps` more are done.
    fn advance(&self, steps: u64);
    /// The phase is over.
    fn end(&self);
    /// A line that stays: a fallback, a finding. Goes to standard error.
    fn note(&self, text: &str);
}

/// Says nothing: for tests and for callers that do not watch.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _what: &str, _total: u64, _unit: &str) {}
    fn advance(&self, _steps: u64) {}
    fn end(&self) {}
    fn note(&self, _text: &str) {}
}
