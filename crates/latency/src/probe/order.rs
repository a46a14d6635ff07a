//! The order of a session: first what no other key stands in for (the call of a session, glue, reading) and the networks
//! that sums are corrected by, then everything else as it comes. Pure. Law: what consumers need has half of the whole budget
//! to itself before anything is cut, so that a short measurement has fewer operators and not fewer kinds of answers.

use super::gather::{Settings, Subject};
use crate::work::Key;

/// Networks without which sums are not judged: a profile of fewer says so.
pub const LEAST_NETWORKS: usize = 30;
/// Networks that come before operators.
pub const FIRST_NETWORKS: usize = 32;
/// Share of the whole budget after which even what is needed is cut.
const NEEDED_SHARE: f64 = 0.5;

/// A session's things in groups, one done before the next begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    pub groups: Vec<Vec<Subject>>,
    /// How many of the first groups are needed, see [`needed_s`].
    pub needed: usize,
}

/// Canaries, what is needed, the first networks, the rest.
pub fn order(canaries: &[Key], things: impl IntoIterator<Item = Subject>) -> Order {
    let canaries = canaries.iter().copied().map(Subject::Key).collect();
    let mut groups = vec![canaries, Vec::new(), Vec::new(), Vec::new()];
    for thing in things {
        let group = match thing {
            Subject::Key(Key::Session { .. } | Key::Glue(_) | Key::Read(_)) => 1,
            Subject::Network(at) if at < FIRST_NETWORKS => 2,
            Subject::Key(_) | Subject::Network(_) => 3,
        };
        groups[group].push(thing);
    }
    Order { groups, needed: 3 }
}

/// How long the needed groups of the first session may take; no limit without a budget.
pub fn needed_s(settings: &Settings) -> Option<f64> {
    settings.budget.map(|budget| NEEDED_SHARE * budget.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::work::GlueKey;

    const SESSION: Subject = Subject::Key(Key::Session { threads: 1 });

    fn glue(hidden: u32) -> Key {
        Key::Glue(GlueKey {
            hidden,
            experts: 8,
            top_k: 2,
            inner: 0,
            tokens: 1,
            threads: 1,
        })
    }

    fn dense(inputs: u32) -> Subject {
        Subject::Key(Key::Dense(crate::work::DenseKey {
            inputs,
            outputs: 64,
            bits: 32,
            group: 0,
            tokens: 1,
            threads: 1,
            heat: crate::work::Heat::Cold,
        }))
    }

    #[test]
    fn what_is_needed_comes_before_any_operator_however_many_there_are() {
        let networks = (0..40).map(Subject::Network);
        let operators = (1..=3000).map(dense);
        let things = operators.chain(networks).chain([Subject::Key(glue(64)), SESSION]);
        let order = order(&[glue(32)], things);
        let needed: Vec<Subject> = order.groups[..order.needed].iter().flatten().copied().collect();
        assert!(needed.contains(&SESSION) && needed.contains(&Subject::Key(glue(64))));
        let first = needed.iter().filter(|s| matches!(s, Subject::Network(_))).count();
        assert!(first >= LEAST_NETWORKS, "{first}");
        // And nothing else delays them; nothing is lost.
        assert_eq!(needed.len(), 1 + 2 + FIRST_NETWORKS);
        assert_eq!(order.groups.iter().map(Vec::len).sum::<usize>(), 1 + 3000 + 40 + 2);
    }

    #[test]
    fn a_quick_budget_has_time_for_networks_that_never_find_a_quiet_core() {
        let settings = Settings::QUICK;
        let pace = &settings.network_pace;
        // Each slice tried as often as it may be, all patience spent; a slice of one call that is ten times as long as asked.
        let rounds = 10 * pace.slice * (super::super::rounds::TRIES * pace.rounds);
        let longest = u32::try_from(FIRST_NETWORKS).unwrap() * (rounds + pace.patience);
        let reserved = Duration::from_secs_f64(needed_s(&settings).unwrap());
        // The rest is for building them.
        assert!(3 * longest <= reserved, "{longest:?} of {reserved:?}");
        let unlimited = Settings {
            budget: None,
            ..settings
        };
        assert_eq!(needed_s(&unlimited), None);
    }
}
