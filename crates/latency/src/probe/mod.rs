//! What is timed: the [`Probe`] that kernels and runtimes register, and the loop that gathers their times. The only
//! room with a clock.

use cotk_run::seeds::Stream;

use crate::Result;
use crate::work::Key;

/// A kind of operator that can be measured. Its features are its keys' own ([`Key::features`]): `predict` must know them
/// where no kernel and no runtime is at hand.
pub trait Probe {
    /// Short name for progress and errors: `onnx`, `experts`, `memory`, `disk`.
    fn name(&self) -> &str;

    /// `count` keys to measure: the seeds of its table first, then draws from its distribution of use. May return fewer.
    fn candidates(&self, count: usize, rng: &mut Stream) -> Vec<Key>;

    /// Whether it can measure this key.
    fn measures(&self, key: &Key) -> bool;

    /// Builds what one key needs. `session` numbers independent builds of the same key: fresh allocations, fresh
    /// placement.
    ///
    /// # Errors
    /// [`crate::Error::Probe`] with what failed.
    fn prepare(&self, key: &Key, session: u32) -> Result<Box<dyn Prepared>>;
}

/// A key that is ready to run. Its time is `Σ weight[i] · time(piece i)`: one piece of weight 1 for a plain operator;
/// for what one more copy in a network costs, long minus short chain, divided by the copies.
pub trait Prepared {
    /// One weight per piece.
    fn weights(&self) -> Vec<f64> {
        vec![1.0]
    }

    /// One call of one piece. Nothing but the call: it is timed.
    ///
    /// # Errors
    /// [`crate::Error::Probe`] with what failed.
    fn run(&mut self, piece: usize) -> Result<()>;
}
