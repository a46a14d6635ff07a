//! What a point costs: predicted ms and bytes, as tables over the choices, and their exact expectations over gates.
//! Predicts through a `CostModel` once, then never again. Laws: a table's sum is the prediction of that network; an
//! expectation is the sum over all networks.

use cotk_latency::expect::Expectation;
use cotk_latency::predict::CostModel;
use cotk_latency::work::Work;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::space::{Choice, Form, GateKind, Point, Space};

/// Threads that latency is predicted and measured for.
pub const THREADS: u32 = 1;

/// Predicted times and bytes, as journaled: numbers, so that a resumed run decides on the same ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tables {
    /// Time of the smallest network, and what each choice's kernel adds to it: `[choice][kernel]`.
    pub smallest_ms: f64,
    pub added_ms: Vec<Vec<f64>>,
    /// Bytes of the smallest network, and what each choice adds: `[choice][kernel][bits]`.
    pub smallest_bytes: f64,
    pub added_bytes: Vec<Vec<Vec<f64>>>,
}

impl Tables {
    /// Asks the model once for the smallest network and once for each single change of it. Sums of layers are what a
    /// profile predicts, so the differences add up exactly.
    ///
    /// # Errors
    /// [`crate::SearchError::Latency`] when a kind of operator was never measured.
    pub fn new(space: &Space, model: &dyn CostModel) -> Result<Self> {
        let cost = |point: &Point| -> Result<(f64, f64)> {
            let graph = space.cost_graph(point, Form::Int8)?;
            let work = Work::Graph {
                graph: &graph,
                threads: THREADS,
            };
            #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
            Ok((model.predict(&work)?.ms, graph.bytes() as f64))
        };
        let smallest = space.smallest();
        let (smallest_ms, smallest_bytes) = cost(&smallest)?;
        let (mut added_ms, mut added_bytes) = (Vec::new(), Vec::new());
        for choice in 0..space.choices() {
            let (mut ms, mut bytes) = (Vec::new(), Vec::new());
            for kernel in 0..space.kernels().len() {
                let mut row = Vec::new();
                for bits in 0..space.bits().len() {
                    let mut point = smallest.clone();
                    point.0[choice] = Choice {
                        kernel: u8::try_from(kernel).expect("few rungs"),
                        bits: u8::try_from(bits).expect("few rungs"),
                    };
                    let (point_ms, point_bytes) = cost(&point)?;
                    if bits == 0 {
                        // Narrower codes run as int8 too: bits earn bytes, not time.
                        ms.push(point_ms - smallest_ms);
                    }
                    row.push(point_bytes - smallest_bytes);
                }
                bytes.push(row);
            }
            added_ms.push(ms);
            added_bytes.push(bytes);
        }
        Ok(Self {
            smallest_ms,
            added_ms,
            smallest_bytes,
            added_bytes,
        })
    }
}

/// Which limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantity {
    Ms,
    Bytes,
}

/// Expected costs of a space.
#[derive(Debug, Clone)]
pub struct Costs {
    space: Space,
    ms: Expectation,
    bytes: Expectation,
}

impl Costs {
    /// From journaled tables.
    ///
    /// # Errors
    /// [`crate::SearchError::Latency`] when they do not fit the space.
    pub fn new(space: &Space, tables: &Tables) -> Result<Self> {
        // Two variables a choice: kernel, bits.
        let sizes: Vec<usize> = (0..space.choices())
            .flat_map(|_| [space.kernels().len(), space.bits().len()])
            .collect();
        let mut ms = Expectation::new(sizes.clone(), tables.smallest_ms);
        let mut bytes = Expectation::new(sizes, tables.smallest_bytes);
        let lookup = |row: Option<&f64>| row.copied().unwrap_or(f64::NAN);
        for choice in 0..space.choices() {
            let (added_ms, added_bytes) = (tables.added_ms.get(choice), tables.added_bytes.get(choice));
            let name = format!("choice {choice}");
            ms.add::<cotk_latency::Error>(&name, &[2 * choice], |at| {
                Ok(lookup(added_ms.and_then(|t| t.get(at[0]))))
            })?;
            bytes.add::<cotk_latency::Error>(&name, &[2 * choice, 2 * choice + 1], |at| {
                Ok(lookup(added_bytes.and_then(|t| t.get(at[0])?.get(at[1]))))
            })?;
        }
        Ok(Self {
            space: space.clone(),
            ms,
            bytes,
        })
    }

    fn of(&self, quantity: Quantity) -> &Expectation {
        match quantity {
            Quantity::Ms => &self.ms,
            Quantity::Bytes => &self.bytes,
        }
    }

    /// Predicted cost of one network.
    ///
    /// # Errors
    /// [`crate::SearchError::Latency`] for a point of another space.
    pub fn at(&self, quantity: Quantity, point: &Point) -> Result<f64> {
        let choices: Vec<usize> = point
            .0
            .iter()
            .flat_map(|c| [usize::from(c.kernel), usize::from(c.bits)])
            .collect();
        Ok(self.of(quantity).at(&choices)?)
    }

    /// The cheapest network: layers add up, so each choice alone is at its cheapest.
    ///
    /// # Errors
    /// As [`Costs::at`].
    pub fn cheapest(&self, quantity: Quantity) -> Result<(Point, f64)> {
        let mut best = self.space.largest();
        for choice in 0..self.space.choices() {
            let mut least = f64::INFINITY;
            let mut at = best.0[choice];
            // Larger rungs first: what costs nothing is kept.
            for kernel in (0..self.space.kernels().len()).rev() {
                for bits in (0..self.space.bits().len()).rev() {
                    let mut point = best.clone();
                    point.0[choice] = Choice {
                        kernel: kernel as u8,
                        bits: bits as u8,
                    };
                    let cost = self.at(quantity, &point)?;
                    if cost < least {
                        (least, at) = (cost, point.0[choice]);
                    }
                }
            }
            best.0[choice] = at;
        }
        let cost = self.at(quantity, &best)?;
        Ok((best, cost))
    }

    /// Expected cost when each gate is on with its probability, and its derivative by each of them.
    ///
    /// # Errors
    /// [`crate::SearchError::Latency`] for another number of gates.
    pub fn expected(&self, quantity: Quantity, gates: &[f64]) -> Result<(f64, Vec<f64>)> {
        let probabilities = distributions(&self.space, gates);
        let (value, by_probability) = self.of(quantity).value_and_gradient(&probabilities)?;
        let gradient = self.space.gates().iter().enumerate().map(|(index, gate)| {
            let variable = 2 * gate.choice + usize::from(gate.kind == GateKind::Bits);
            // Multilinear: the derivative is the difference between the gate's two ends.
            let end = |value: f64| {
                let mut gates = gates.to_vec();
                gates[index] = value;
                let distribution = distribution(&self.space, gate.choice, gate.kind, &gates);
                let terms = distribution.iter().zip(&by_probability[variable]);
                terms.map(|(p, g)| p * g).sum::<f64>()
            };
            end(1.0) - end(0.0)
        });
        Ok((value, gradient.collect()))
    }
}

/// `P(rung j) = Π_{i ≤ j} p_i · (1 − p_{j+1})` for every variable.
fn distributions(space: &Space, gates: &[f64]) -> Vec<Vec<f64>> {
    (0..space.choices())
        .flat_map(|choice| [GateKind::Kernel, GateKind::Bits].map(|kind| distribution(space, choice, kind, gates)))
        .collect()
}

fn distribution(space: &Space, choice: usize, kind: GateKind, gates: &[f64]) -> Vec<f64> {
    let mine = space.gates().iter().zip(gates);
    let chances = mine
        .filter(|(g, _)| g.choice == choice && g.kind == kind)
        .map(|(_, &p)| p);
    let mut reached = 1.0;
    let mut distribution = Vec::new();
    for p in chances {
        distribution.push(reached * (1.0 - p));
        reached *= p;
    }
    distribution.push(reached);
    distribution
}

#[cfg(test)]
pub(crate) mod tests {
    use cotk_run::seeds::Seeds;
    use proptest::prelude::*;

    use super::*;
    use crate::space::tests::tiny_space;

    /// Made-up tables: any numbers will do.
    pub(crate) fn some_tables(space: &Space) -> Tables {
        let ms = |c: usize, k: usize| (c + 1) as f64 * 0.01 * k as f64 * (1.0 + 0.3 * (c % 2) as f64);
        let bytes = |c: usize, k: usize, b: usize| 100.0 * (c + 1) as f64 * ((1 + 2 * k) * (1 << b)) as f64;
        let each = |n: usize| 0..n;
        Tables {
            smallest_ms: 0.05,
            added_ms: each(space.choices())
                .map(|c| each(space.kernels().len()).map(|k| ms(c, k)).collect())
                .collect(),
            smallest_bytes: 5000.0,
            added_bytes: each(space.choices())
                .map(|c| {
                    each(space.kernels().len())
                        .map(|k| {
                            each(space.bits().len())
                                .map(|b| bytes(c, k, b) - bytes(c, 0, 0))
                                .collect()
                        })
                        .collect()
                })
                .collect(),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]

        /// Brute force over all 1,296 networks, weighted by what the gates make of them.
        #[test]
        fn an_expectation_is_the_sum_over_all_networks(gates in proptest::collection::vec(0.0f64..1.0, 12)) {
            let space = tiny_space();
            let costs = Costs::new(&space, &some_tables(&space)).unwrap();
            for quantity in [Quantity::Ms, Quantity::Bytes] {
                let mut expected = 0.0;
                for pattern in 0..1u32 << 12 {
                    let on: Vec<bool> = (0..12).map(|i| pattern >> i & 1 == 1).collect();
                    let chance: f64 = on.iter().zip(&gates).map(|(&on, p)| if on { *p } else { 1.0 - p }).product();
                    expected += chance * costs.at(quantity, &space.point_of(&on)).unwrap();
                }
                let (value, gradient) = costs.expected(quantity, &gates).unwrap();
                prop_assert!((value - expected).abs() < 1e-9 * expected);
                for (index, slope) in gradient.iter().enumerate() {
                    let moved = |by: f64| {
                        let mut gates = gates.clone();
                        gates[index] += by;
                        costs.expected(quantity, &gates).unwrap().0
                    };
                    let numeric = (moved(1e-4) - moved(-1e-4)) / 2e-4;
                    prop_assert!((slope - numeric).abs() < 1e-6 * expected, "{} {}", slope, numeric);
                }
            }
        }
    }

    #[test]
    fn at_hard_gates_the_expectation_is_that_networks_cost() {
        let space = tiny_space();
        let costs = Costs::new(&space, &some_tables(&space)).unwrap();
        let mut stream = Seeds::new(1).stream("points");
        for _ in 0..20 {
            let point = space.sample(&mut stream);
            let gates: Vec<f64> = space
                .gates_of(&point)
                .into_iter()
                .map(|on| if on { 1.0 } else { 0.0 })
                .collect();
            for quantity in [Quantity::Ms, Quantity::Bytes] {
                let (value, _) = costs.expected(quantity, &gates).unwrap();
                assert!((value - costs.at(quantity, &point).unwrap()).abs() < 1e-9 * value);
            }
        }
    }

    #[test]
    fn no_network_is_cheaper_than_the_cheapest() {
        let space = tiny_space();
        let costs = Costs::new(&space, &some_tables(&space)).unwrap();
        let (_, least) = costs.cheapest(Quantity::Bytes).unwrap();
        let mut stream = Seeds::new(2).stream("points");
        for _ in 0..200 {
            assert!(costs.at(Quantity::Bytes, &space.sample(&mut stream)).unwrap() >= least - 1e-9);
        }
        // Bits cost no time: the fastest network keeps them all.
        let (fastest, _) = costs.cheapest(Quantity::Ms).unwrap();
        assert_eq!(fastest, space.uniform(0, 2));
    }

    #[test]
    fn bytes_are_those_of_the_graph() {
        struct Flat;
        impl CostModel for Flat {
            fn predict(&self, _: &Work<'_>) -> cotk_latency::Result<cotk_latency::predict::Prediction> {
                Ok(cotk_latency::predict::Prediction {
                    ms: 1.0,
                    lo_ms: 1.0,
                    hi_ms: 1.0,
                    terms: cotk_latency::predict::Terms::default(),
                    origin: cotk_latency::predict::Origin::Table,
                    flags: Vec::new(),
                })
            }
        }
        let space = tiny_space();
        let costs = Costs::new(&space, &Tables::new(&space, &Flat).unwrap()).unwrap();
        let mut stream = Seeds::new(3).stream("points");
        for _ in 0..20 {
            let point = space.sample(&mut stream);
            let graph = space.cost_graph(&point, Form::Int8).unwrap();
            assert_eq!(costs.at(Quantity::Bytes, &point).unwrap(), graph.bytes() as f64);
        }
    }
}
