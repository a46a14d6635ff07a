//! What use teaches about sums: networks that a search found far from their prediction. One scale a kernel path, one for
//! calls, one for the session, near 1, on top of the fit: an exact row of the table keeps its ratio to its neighbours, yet a
//! network of such rows can be corrected. Linear in the operators, so that expectation tables stay exact. Law: without
//! networks from use nothing is corrected.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::predict::{Model, Part};
use crate::profile::NetworkRow;
use crate::scales::{self, Row};
use crate::walk::Network;
use crate::work::{Family, Path};

/// The correction for one number of threads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Correction {
    pub threads: u32,
    /// Networks that use has added.
    pub from_use: usize,
    /// Of the session, of calls, of the rest of each path.
    pub session: f64,
    pub calls: f64,
    #[serde(default)]
    pub path: BTreeMap<String, f64>,
}

/// How strongly scales are held at 1: one network a fifth off is corrected to a fiftieth where nothing else is known.
const DOUBT: f64 = 0.03;
/// A network that use has added counts as so many of those that the fit has seen: it is what is asked for.
const FROM_USE: f64 = 16.0;

impl Correction {
    /// One for each number of threads with networks from use. `model` must not be corrected already; a network that it
    /// cannot predict says nothing about sums and is left aside.
    pub fn fit(model: &Model, networks: &[NetworkRow]) -> Vec<Self> {
        let mut threads: Vec<u32> = networks
            .iter()
            .filter(|row| row.is_from_use)
            .map(|row| row.threads)
            .collect();
        threads.sort_unstable();
        threads.dedup();
        threads
            .into_iter()
            .filter_map(|threads| Self::of_threads(model, threads, networks))
            .collect()
    }

    fn of_threads(model: &Model, threads: u32, networks: &[NetworkRow]) -> Option<Self> {
        let parts = |row: &NetworkRow| -> Option<Vec<(Column, f64)>> {
            let parts = model
                .network(&Network::from(&row.graph), threads, &mut Vec::new())
                .ok()?;
            Some(parts.iter().flat_map(|(part, _)| Column::of(part)).collect())
        };
        let summed: Vec<(&NetworkRow, Vec<(Column, f64)>)> = networks
            .iter()
            .filter(|row| row.threads == threads)
            .filter_map(|row| Some((row, parts(row)?)))
            .collect();
        let from_use = summed.iter().filter(|s| s.0.is_from_use).count();
        if from_use == 0 {
            return None;
        }
        let mut columns: Vec<Column> = summed.iter().flat_map(|s| &s.1).map(|c| c.0).collect();
        columns.sort_unstable();
        columns.dedup();
        let row = |(network, parts): &(&NetworkRow, Vec<(Column, f64)>)| {
            let mut of = vec![0.0; columns.len()];
            for (column, ms) in parts {
                of[columns.binary_search(column).expect("listed above")] += ms;
            }
            let weight = if network.is_from_use { FROM_USE } else { 1.0 };
            Row {
                parts: of,
                ms: network.median_us / 1e3,
                weight,
            }
        };
        let rows: Vec<Row> = summed.iter().map(row).collect();
        let found = scales::fit(&rows, &vec![0.0; columns.len()], DOUBT);
        let mut correction = Self {
            threads,
            from_use,
            session: 1.0,
            calls: 1.0,
            path: BTreeMap::new(),
        };
        for (column, scale) in columns.into_iter().zip(found) {
            match column {
                Column::Session => correction.session = scale,
                Column::Calls => correction.calls = scale,
                Column::Path(path) => {
                    correction.path.insert(path.to_string(), scale);
                }
            }
        }
        Some(correction)
    }

    /// Scales of a path: of its calls, of the rest.
    pub(crate) fn scales(&self, path: Path) -> (f64, f64) {
        match path.family {
            Family::Session => (self.session, self.session),
            _ => (self.calls, self.path.get(&path.to_string()).copied().unwrap_or(1.0)),
        }
    }

    /// What is wrong with numbers from a file, if anything.
    pub(crate) fn complaint(&self) -> Option<String> {
        let all = [self.session, self.calls]
            .into_iter()
            .chain(self.path.values().copied());
        let wrong = all.into_iter().find(|s| !(s.is_finite() && *s > 0.0))?;
        Some(format!(
            "correction for {} threads: found {wrong}, expected numbers above 0",
            self.threads
        ))
    }
}

/// What has a scale of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Column {
    Session,
    Calls,
    Path(Path),
}

impl Column {
    /// ms of a part by column.
    fn of(part: &Part) -> Vec<(Self, f64)> {
        if part.path.family == Family::Session {
            return vec![(Self::Session, part.ms)];
        }
        let whole = part.terms.sum_ms();
        let share = if whole > 0.0 { part.terms.launch_ms / whole } else { 1.0 };
        vec![
            (Self::Calls, part.ms * share),
            (Self::Path(part.path), part.ms * (1.0 - share)),
        ]
    }
}
