//! What every run needs: units and ids, seed streams, recipes, run folders, atomic files, journals, locks, cancel,
//! progress, facts, injected I/O faults, what the system tells. No heavy dependency, no algorithm, nothing printed.

pub mod cancel;
pub mod facts;
pub mod files;
pub mod folder;
pub mod journal;
pub mod progress;
pub mod recipe;
pub mod seeds;
pub mod system;
pub mod units;

pub use self::error::{Error, Result};

mod error;
