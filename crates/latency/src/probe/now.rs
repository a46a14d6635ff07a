//! What memory gives at this minute. A machine's cores are its own, its memory's bandwidth is not: on a shared host it drifts
//! by a fifth within the hour, and what reads weights drifts with it. A pass over memory, as the profile has it in its table,
//! takes a second to repeat. Law: a profile without such a row says nothing, and nothing is corrected.

use cotk_run::seeds::Stream;

use super::memory::MemoryProbe;
use super::rounds::{self, Pace};
use super::{Probe, quantile};
use crate::Result;
use crate::predict::Model;
use crate::work::Key;

use std::time::Duration;

/// Passes over memory take milliseconds each.
const PACE: Pace = Pace {
    rounds: 8,
    slice: Duration::from_millis(1),
    patience: Duration::from_millis(200),
};
/// What is disturbed for a moment is slower in it: the best of a few counts, as in a profile's table.
const SESSIONS: u32 = 3;

/// How many times as long as in the profile a pass over memory takes now with so many threads, from a half to twice; `None`
/// where the profile's table has no such pass.
///
/// # Errors
/// What the probe reports.
pub fn memory_now(model: &Model, threads: u32, order: &mut Stream) -> Result<Option<f64>> {
    let Some((read, then_us)) = model.memory_pass(threads) else {
        return Ok(None);
    };
    let probe = MemoryProbe::new(vec![threads], 0);
    let mut best = Vec::new();
    for session in 0..SESSIONS {
        let prepared = probe.prepare(&Key::Read(read), session)?;
        let timed = rounds::time(vec![prepared], &PACE, order)?;
        best.extend(timed.iter().map(|t| if t.quiet { t.median_us } else { t.q10_us }));
    }
    Ok(Some((quantile(&best, 0.0) / then_us).clamp(0.5, 2.0)))
}

#[cfg(test)]
mod tests {
    use cotk_run::seeds::Seeds;

    use super::*;
    use crate::work::{Block, ReadKey, Tier};

    fn model(rows: Vec<(Key, f64, f64)>) -> Model {
        Model::new("test", Block(16), rows, [], 0.01, Vec::new())
    }

    fn pass(bytes: u64) -> Key {
        Key::Read(ReadKey {
            tier: Tier::Memory,
            bytes,
            threads: 1,
        })
    }

    #[test]
    fn a_pass_of_the_table_is_repeated_and_without_one_nothing_is_said() {
        let mut order = Seeds::new(1).stream("now");
        assert_eq!(memory_now(&model(Vec::new()), 1, &mut order).unwrap(), None);
        // No machine reads a MiB in a ns, nor takes a year: the ends of what is believed.
        let found = memory_now(&model(vec![(pass(1 << 20), 1e-3, 0.01)]), 1, &mut order);
        assert_eq!(found.unwrap(), Some(2.0));
        let found = memory_now(&model(vec![(pass(1 << 20), 3e13, 0.01)]), 1, &mut order);
        assert_eq!(found.unwrap(), Some(0.5));
    }
}
