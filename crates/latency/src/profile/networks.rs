//! `networks.jsonl`: whole networks that were timed, those that the fit has seen and those that use has added. One
//! JSON object a line, `{"sum": checksum of the row's text, "row": …}`: an edited line is refused by its number.

use std::path::Path as FilePath;

use cotk_run::files;
use serde::{Deserialize, Serialize};

use super::{FileMark, LIMIT_BYTES, Profile};
use crate::fit::joint::Measured;
use crate::graph::Graph;
use crate::work::Block;
use crate::{Error, Result};

/// How much more a network counts that use has added.
const FROM_USE: f64 = 4.0;

/// One network that was timed as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkRow {
    pub graph: Graph,
    pub threads: u32,
    /// Independent builds of the session.
    pub sessions: u32,
    /// Slices in all sessions.
    pub count: u32,
    /// Median over sessions of the median over slices.
    pub median_us: f64,
    /// Tenth percentile of slices, smallest session.
    pub q10_us: f64,
    /// Median absolute deviation of slices, or half the range of the sessions' medians if that is larger.
    pub mad_us: f64,
    /// Added because a search found the prediction wrong, not drawn by `cotk profile`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_from_use: bool,
}

impl NetworkRow {
    /// As a row of the fit; what use has added counts more, for it is what is asked for.
    pub(crate) fn measured(&self, block: Block) -> Measured {
        let spread = if self.median_us > 0.0 {
            self.mad_us / self.median_us
        } else {
            1.0
        };
        Measured {
            weight: if self.is_from_use { FROM_USE } else { 1.0 },
            ..Measured::network(&self.graph, self.threads, block, self.median_us, spread)
        }
    }

    /// Whether both are times of the same network with the same threads, whatever its name.
    pub fn is_of(&self, graph: &Graph, threads: u32) -> bool {
        self.threads == threads
            && self.graph.input() == graph.input()
            && self.graph.input_quant().is_some() == graph.input_quant().is_some()
            && same_nodes(&self.graph, graph)
    }
}

/// Names and scales of codes cost no time.
fn same_nodes(a: &Graph, b: &Graph) -> bool {
    let pairs = a.nodes().iter().zip(b.nodes());
    a.nodes().len() == b.nodes().len() && { pairs }
        .all(|(a, b)| a.op == b.op && a.inputs == b.inputs && a.output.is_some() == b.output.is_some())
}

impl Profile {
    /// Adds a network, in place of an older time of the same one. Nothing is fitted anew: see [`Profile::refit`].
    pub fn learn(&mut self, row: NetworkRow) {
        match self
            .networks
            .iter_mut()
            .find(|known| known.is_of(&row.graph, row.threads))
        {
            Some(known) => *known = row,
            None => self.networks.push(row),
        }
    }
}

pub(super) fn write(rows: &[NetworkRow]) -> String {
    let mut text = String::new();
    for row in rows {
        let row = serde_json::to_string(row).expect("plain data");
        text += &format!("{{\"sum\":\"{}\",\"row\":{row}}}\n", sum(&row));
    }
    text
}

fn sum(row: &str) -> String {
    format!("{:08x}", files::checksum(row.as_bytes()) >> 32)
}

/// Rows of a file; a profile of before there were any has no `mark`, and none.
pub(super) fn read(file: &FilePath, mark: Option<&FileMark>) -> Result<Vec<NetworkRow>> {
    let Some(mark) = mark else {
        return Ok(Vec::new());
    };
    let text = files::read_text(file, LIMIT_BYTES)?;
    let fail = |line: u64, what: &str, found: String, expected: String| Error::Line {
        file: file.to_owned(),
        line,
        what: what.to_owned(),
        found,
        expected,
    };
    let (mut rows, mut lines) = (Vec::new(), 0);
    for (line, number) in text.lines().zip(1u64..) {
        lines = number;
        let parts = line
            .strip_prefix("{\"sum\":\"")
            .and_then(|rest| rest.split_once("\",\"row\":"));
        let (found, row) = parts
            .and_then(|(sum, row)| Some((sum, row.strip_suffix('}')?)))
            .ok_or_else(|| {
                let expected = "{\"sum\":…,\"row\":…}".to_owned();
                fail(number, "network", line.chars().take(60).collect(), expected)
            })?;
        if found != sum(row) {
            return Err(fail(
                number,
                "checksum of the line",
                format!("`{found}`"),
                format!("`{}`", sum(row)),
            ));
        }
        let row: NetworkRow = serde_json::from_str(row)
            .map_err(|e| fail(number, "network", e.to_string(), "a graph and its times".to_owned()))?;
        let times = [row.median_us, row.q10_us, row.mad_us];
        if row.median_us <= 0.0 || times.iter().any(|t| !t.is_finite() || *t < 0.0) {
            return Err(fail(
                number,
                "times",
                format!("{times:?}"),
                "a median above 0".to_owned(),
            ));
        }
        rows.push(row);
    }
    if mark.rows != lines || !(text.is_empty() || text.ends_with('\n')) {
        let expected = format!("after {}", mark.rows);
        return Err(fail(lines, "end of the file", format!("after {lines} lines"), expected));
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Activation, Conv, Node, Op, RawGraph, Shape, Source, Weights};
    use crate::profile::tests::profile;

    fn row(channels: u32, median_us: f64) -> NetworkRow {
        let conv = Conv {
            cin: 3,
            cout: channels,
            kernel: 3,
            stride: 1,
            groups: 1,
            activation: Activation::Relu,
            weights: Weights::F32,
        };
        let node = Node {
            name: "stem".into(),
            op: Op::Conv(conv),
            inputs: vec![Source::Input],
            output: None,
        };
        let graph = Graph::new(RawGraph {
            name: format!("of {median_us}"),
            input: Shape {
                batch: 1,
                channels: 3,
                height: 8,
                width: 8,
            },
            input_quant: None,
            nodes: vec![node],
        });
        NetworkRow {
            graph: graph.unwrap(),
            threads: 1,
            sessions: 3,
            count: 90,
            median_us,
            q10_us: median_us,
            mad_us: 0.1,
            is_from_use: false,
        }
    }

    #[test]
    fn networks_are_saved_and_the_same_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("machine");
        let mut profile = profile();
        profile.learn(row(16, 10.0));
        profile.learn(row(32, 20.0));
        profile.learn(row(16, 12.0));
        profile.learn(NetworkRow {
            threads: 2,
            ..row(16, 7.0)
        });
        assert_eq!(
            profile.networks.iter().map(|n| n.median_us).collect::<Vec<_>>(),
            [12.0, 20.0, 7.0]
        );
        profile.save(&folder).unwrap();
        assert_eq!(Profile::load(&folder).unwrap().networks, profile.networks);
    }

    #[test]
    fn a_changed_or_cut_file_is_refused_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("machine");
        let mut profile = profile();
        profile.learn(row(16, 10.0));
        profile.learn(row(32, 20.0));
        profile.save(&folder).unwrap();
        let file = folder.join("networks.jsonl");
        let text = files::read_text(&file, LIMIT_BYTES).unwrap();
        for (changed, says) in [
            (
                text.replace("\"median_us\":20.0", "\"median_us\":21.0"),
                "networks.jsonl:2: checksum",
            ),
            (
                text.lines().next().unwrap().to_owned() + "\n",
                "networks.jsonl:1: end of the file",
            ),
            (text.trim_end().to_owned(), "networks.jsonl:2: end of the file"),
            (text.replace("{\"sum\"", "{\"som\""), "networks.jsonl:1: network"),
        ] {
            files::write_atomic(&file, changed.as_bytes()).unwrap();
            let found = Profile::load(&folder).unwrap_err().to_string();
            assert!(found.contains(says), "{found}");
        }
        for end in 0..text.len() {
            files::write_atomic(&file, &text.as_bytes()[..end]).unwrap();
            assert!(Profile::load(&folder).is_err(), "cut at {end}");
        }
    }
}
