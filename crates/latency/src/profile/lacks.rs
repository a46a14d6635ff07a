//! What a profile lacks, by name: a measurement that was cut short is refused where its gap is, and says which one. Law: a model
//! that lacks nothing of a list of operators predicts every sum over them.

use super::Profile;
use crate::graph::Graph;
use crate::predict::{CostModel, Model};
use crate::probe::median;
use crate::probe::order::LEAST_NETWORKS;
use crate::walk::operators;
use crate::work::{Family, Tier, Work};
use crate::{Error, Result};

impl Profile {
    /// What predictions of whole networks and of mixtures will miss, each by name and with what it is needed for. CNN operators
    /// that were not to be measured (no ONNX Runtime) are no gap.
    pub fn lacks(&self) -> Vec<String> {
        let has = |family: Family| self.fits.iter().any(|fit| fit.path.family == family);
        let mut lacks = Vec::new();
        if self.head.transfer.is_none() && !self.head.identity.runtimes.is_empty() {
            if !has(Family::Session) {
                lacks.push("session/t1 (what a call of any network costs)".to_owned());
            }
            let count = self.networks.len();
            if count < LEAST_NETWORKS {
                lacks.push(format!(
                    "networks: {count} of {LEAST_NETWORKS} or more (what corrects and judges sums)"
                ));
            }
        }
        let reading = Family::Read(Tier::Memory);
        for (family, name) in [(Family::Glue, "glue/t1"), (reading, "read.memory/t1")] {
            if !has(family) {
                lacks.push(format!("{name} (part of every decode step)"));
            }
        }
        lacks
    }

    /// How much of the time of operators of several threads went to others while they were measured: the median over their
    /// rows, in percent. Canaries have one thread: what others took of several shows here only. `None` without such rows.
    pub fn lost_with_several_threads_pct(&self) -> Option<f64> {
        let block = self.head.identity.block();
        let several = self.rows.iter().filter(|row| row.key.path(block).threads > 1);
        let lost: Vec<f64> = several.filter_map(|row| row.taken.lost_pct).collect();
        (!lost.is_empty()).then(|| median(&lost))
    }

    /// Below this share no two predictions with so many threads can be told apart: the noise of one thread, or what others
    /// took of several.
    pub fn noise_of(&self, threads: u32) -> f64 {
        let lost_pct = self.lost_with_several_threads_pct().filter(|_| threads > 1);
        self.head.noise.floor_pct.max(lost_pct.unwrap_or(0.0)) / 100.0
    }
}

/// Others may take this much, in percent, of what several threads do.
pub const MOST_LOST_PCT: f64 = 3.0;

impl Model {
    /// Refuses graphs of which some operators cannot be predicted at all, with all that is missing by name. `needed_for` says
    /// whose they are.
    ///
    /// # Errors
    /// [`Error::Lacks`].
    pub fn suffices(&self, graphs: &[Graph], threads: u32, needed_for: &str) -> Result<()> {
        let mut lacks: Vec<String> = Vec::new();
        for key in graphs.iter().flat_map(|g| operators(g, threads, self.block())) {
            if self.predict(&Work::Operator(key)).is_err() {
                let path = key.path(self.block()).to_string();
                if !lacks.contains(&path) {
                    lacks.push(path);
                }
            }
        }
        if lacks.is_empty() {
            return Ok(());
        }
        Err(Error::Lacks {
            profile: self.name().to_owned(),
            lacks,
            needed_for: needed_for.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::profile;
    use super::*;
    use crate::fit::{Sample, fit};
    use crate::graph::{Activation, Conv, Node, Op, RawGraph, Shape, Source, Weights};
    use crate::work::{Block, Key};

    #[test]
    fn a_profile_that_lacks_something_says_so_by_name() {
        let mut cut = profile();
        cut.head.identity.runtimes.insert("onnxruntime".into(), "1".into());
        cut.networks.clear();
        cut.fits
            .retain(|fit| !matches!(fit.path.family, Family::Session | Family::Glue));
        let lacks = cut.lacks().join("; ");
        for name in ["session/t1", "networks: 0 of 30", "glue/t1"] {
            assert!(lacks.contains(name), "{name} in {lacks}");
        }
        // Not meant to have them.
        cut.head.identity.runtimes.clear();
        assert!(!cut.lacks().join("; ").contains("session"), "{:?}", cut.lacks());
    }

    #[test]
    fn what_others_took_of_several_threads_is_part_of_their_noise() {
        let mut taken = profile();
        for row in &mut taken.rows {
            row.taken.lost_pct = Some(0.5);
        }
        let block = taken.head.identity.block();
        assert!(taken.rows.iter().any(|row| row.key.path(block).threads > 1));
        for row in taken.rows.iter_mut().filter(|row| row.key.path(block).threads > 1) {
            row.taken.lost_pct = Some(7.0);
        }
        assert_eq!(taken.lost_with_several_threads_pct(), Some(7.0));
        assert_eq!((taken.noise_of(1), taken.noise_of(2)), (0.01, 0.07));
        taken.rows.retain(|row| row.key.path(block).threads == 1);
        assert_eq!(taken.lost_with_several_threads_pct(), None);
        assert_eq!(taken.noise_of(2), 0.01);
    }

    /// Two convolutions of as many channels.
    fn graph(channels: u32) -> Graph {
        let conv = |name: &str, from| Node {
            name: name.into(),
            op: Op::Conv(Conv {
                cin: channels,
                cout: channels,
                kernel: 3,
                stride: 1,
                groups: 1,
                activation: Activation::Relu,
                weights: Weights::F32,
            }),
            inputs: vec![from],
            output: None,
        };
        Graph::new(RawGraph {
            name: "two".into(),
            input: Shape {
                batch: 1,
                channels,
                height: 8,
                width: 8,
            },
            input_quant: None,
            nodes: vec![conv("a", Source::Input), conv("b", Source::Node(0))],
        })
        .unwrap()
    }

    #[test]
    fn a_model_that_lacks_nothing_predicts_and_else_all_that_is_missing_is_named() {
        let block = Block(16);
        let graphs = [16, 32, 48].map(graph);
        let mut keys: Vec<Key> = graphs.iter().flat_map(|g| operators(g, 1, block)).collect();
        keys.sort_unstable();
        keys.dedup();
        let without = |families: &[Family]| {
            let left: Vec<Key> = keys
                .iter()
                .copied()
                .filter(|k| !families.contains(&k.path(block).family))
                .collect();
            let samples = left.iter().map(|&key| Sample {
                key,
                us: 10.0,
                relative_spread: 0.01,
            });
            let fits = fit(&samples.collect::<Vec<_>>(), block, 0.01);
            Model::new(
                "made up",
                block,
                left.into_iter().map(|key| (key, 10.0, 0.01)),
                fits,
                0.01,
                Vec::new(),
            )
        };
        let works = |model: &Model| {
            let predict = |graph| model.predict(&Work::Graph { graph, threads: 1 });
            graphs.iter().all(|graph| predict(graph).is_ok())
        };
        let whole = without(&[]);
        whole.suffices(&graphs, 1, "a test").unwrap();
        assert!(works(&whole));
        let cut = without(&[Family::Session, Family::ConvBlocked]);
        assert!(!works(&cut));
        let error = cut.suffices(&graphs, 1, "a test").unwrap_err().to_string();
        assert_eq!(
            error,
            "profile `made up` lacks session/t1, conv.blocked/t1: needed for a test"
        );
    }
}
