//! [`PlainMoe`]: all experts resident in f32, the plain reference of every [`MoeRuntime`], and the runtime of
//! Hugging Face checkpoints. Offers [`Mode::Exact`] alone.

use cotk_kernels::cpu::team;
use cotk_run::units::{ExpertId, LayerId};
use rayon::prelude::*;

use crate::checkpoint::{CheckpointError, TensorSource};
use crate::families::{self, LayerTensor, Matrix, Tensor};
use crate::layers::Mlp;
use crate::layers::linear::Linear;
use crate::layers::product::Tile;
use crate::moe::{
    Alive, ExpertUse, Mode, MoeRecord, MoeRuntime, MoeShape, Precision, Routed, RouterScores, RuntimeError,
    order_pairs, with_routed,
};
use crate::spec::ModelSpec;

/// Multiply-adds below which experts run one after the other.
const PARALLEL_FROM: usize = 1 << 18;

/// What an absent expert does to the gates of the others, see [`Alive`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    Masked,
    Removed,
}

/// Experts in f32.
pub struct PlainMoe {
    shape: MoeShape,
    /// Per entry of `shape.layers`, per original expert; `None` where it was dropped.
    experts: Vec<Vec<Option<Mlp>>>,
    /// What experts answer with that are not there but can be chosen; as `experts`, or empty.
    constants: Vec<Vec<Option<Vec<f32>>>>,
    alive: Vec<Vec<bool>>,
    absent: Absent,
}

impl PlainMoe {
    /// Loads every expert of a checkpoint.
    ///
    /// # Errors
    /// As [`TensorSource::load_f32`].
    pub fn load(spec: &ModelSpec, source: &dyn TensorSource) -> Result<Self, CheckpointError> {
        let shape = MoeShape {
            hidden: spec.hidden,
            rule: spec.routing,
            layers: spec.moe_layers(),
        };
        let ids = 0..u32::try_from(spec.routing.experts).expect("expert counts fit 32 bits");
        let experts = shape
            .layers
            .par_iter()
            .map(|&layer| {
                ids.clone()
                    .map(|expert| load_expert(spec, source, layer, ExpertId(expert)).map(Some))
                    .collect()
            })
            .collect::<Result<_, _>>()?;
        Ok(Self::from_experts(shape, experts, Absent::Masked))
    }

    /// From weights at hand: per layer of `shape`, per original expert, `None` where there is none.
    ///
    /// # Panics
    /// When the counts do not fit the shape.
    pub fn from_experts(shape: MoeShape, experts: Vec<Vec<Option<Mlp>>>, absent: Absent) -> Self {
        assert_eq!(experts.len(), shape.layers.len(), "one list per layer");
        for layer in &experts {
            assert_eq!(layer.len(), shape.rule.experts, "one entry per original expert");
        }
        Self {
            alive: experts
                .iter()
                .map(|layer| layer.iter().map(Option::is_some).collect())
                .collect(),
            shape,
            experts,
            constants: Vec::new(),
            absent,
        }
    }

    /// The same with constants `[hidden]` in the place of some experts that are absent, which are then chosen like any other.
    ///
    /// # Panics
    /// When the counts do not fit the shape.
    #[must_use]
    pub fn with_constants(mut self, constants: Vec<Vec<Option<Vec<f32>>>>) -> Self {
        assert_eq!(constants.len(), self.experts.len(), "one list per layer");
        for (alive, constants) in self.alive.iter_mut().zip(&constants) {
            assert_eq!(alive.len(), constants.len(), "one entry per original expert");
            for (alive, constant) in alive.iter_mut().zip(constants) {
                assert!(constant.as_ref().is_none_or(|values| values.len() == self.shape.hidden));
                *alive |= constant.is_some();
            }
        }
        self.constants = constants;
        self
    }

    /// What an expert that is not there answers with.
    fn constant(&self, layer: usize, expert: usize) -> Option<&[f32]> {
        self.constants.get(layer)?.get(expert)?.as_deref()
    }
}

/// One routed expert as f32.
///
/// # Errors
/// As [`TensorSource::load_f32`].
pub fn load_expert(
    spec: &ModelSpec,
    source: &dyn TensorSource,
    layer: LayerId,
    expert: ExpertId,
) -> Result<Mlp, CheckpointError> {
    let load = |matrix: Matrix| {
        let name = families::of(spec).tensor_name(Tensor::Layer(layer, LayerTensor::Expert(expert, matrix)));
        Linear::load(source, &name, matrix.shape(spec.hidden, spec.moe_intermediate))
    };
    Ok(Mlp {
        gate: load(Matrix::Gate)?,
        up: load(Matrix::Up)?,
        down: load(Matrix::Down)?,
    })
}

impl MoeRuntime for PlainMoe {
    fn shape(&self) -> &MoeShape {
        &self.shape
    }

    fn modes(&self) -> &[Mode] {
        &[Mode::Exact]
    }

    fn forward_into(
        &self,
        layer: LayerId,
        hidden: &[f32],
        router: RouterScores<'_>,
        mode: Mode,
        out: &mut [f32],
        record: &mut MoeRecord,
    ) -> Result<(), RuntimeError> {
        let at = self.check_call(layer, hidden, &router, mode, out)?;
        let alive = &self.alive[at];
        let alive = match self.absent {
            Absent::Masked => Alive::Masked(alive),
            Absent::Removed => Alive::Removed(alive),
        };
        with_routed(&router, alive, |routed| self.mix(at, hidden, routed, out, record));
        Ok(())
    }
}

impl PlainMoe {
    /// `out[t] = Σ gate · expert(hidden[t])` in slot order, of entry `at` of the shape's layers.
    fn mix(&self, at: usize, hidden: &[f32], routed: &Routed, out: &mut [f32], record: &mut MoeRecord) {
        let (width, slots) = (self.shape.hidden, routed.slots);
        let mut order = Vec::new();
        order_pairs(&routed.experts, &mut order);
        let groups: Vec<&[usize]> = order
            .chunk_by(|&a, &b| routed.experts[a] == routed.experts[b])
            .collect();
        // Rows of pairs by expert; where a group's begin.
        let mut rows = vec![0.0; order.len() * width];
        let begins: Vec<usize> = (groups.iter())
            .scan(0, |first, group| Some(std::mem::replace(first, *first + group.len())))
            .collect();
        {
            let tile = Tile::new(&mut rows, width.max(1));
            let run = |group: usize| {
                let pairs = groups[group];
                let expert = routed.experts[pairs[0]].index();
                let mut inputs = Vec::with_capacity(pairs.len() * width);
                for pair in pairs {
                    inputs.extend_from_slice(&hidden[pair / slots * width..][..width]);
                }
                let outputs = match &self.experts[at][expert] {
                    Some(mlp) => mlp.apply(&inputs),
                    None => {
                        let constant = self.constant(at, expert);
                        constant.expect("routing chooses the living").repeat(pairs.len())
                    }
                };
                // SAFETY: groups have rows of their own.
                let mut tile = unsafe { tile.part(begins[group], 0, pairs.len(), width) };
                for (row, output) in outputs.chunks_exact(width).enumerate() {
                    tile.row(row).copy_from_slice(output);
                }
            };
            let inner = groups.first().map_or(0, |pairs| {
                let mlp = self.experts[at][routed.experts[pairs[0]].index()].as_ref();
                mlp.map_or(0, |mlp| mlp.gate.outputs())
            });
            if order.len() * width * inner * 3 >= PARALLEL_FROM {
                team::run(groups.len(), run);
            } else {
                (0..groups.len()).for_each(run);
            }
        }

        // Each token sums its slots in order, whoever computed them.
        let mut row_of = vec![0; order.len()];
        order.iter().enumerate().for_each(|(row, &pair)| row_of[pair] = row);
        out.fill(0.0);
        for (pair, (&row, gate)) in row_of.iter().zip(&routed.gates).enumerate() {
            let out = &mut out[pair / slots * width..][..width];
            for (out, value) in out.iter_mut().zip(&rows[row * width..][..width]) {
                *out += gate * value;
            }
        }
        let uses = routed.experts.iter().zip(&routed.gates).map(|(&expert, &gate)| {
            let (bits, precision) = match self.experts[at][expert.index()] {
                Some(_) => (32, Precision::Full),
                None => (0, Precision::Constant),
            };
            ExpertUse {
                expert,
                gate,
                bits,
                precision,
            }
        });
        record.slots = slots;
        record.uses.clear();
        record.uses.extend(uses);
    }
}

#[cfg(test)]
mod tests {
    use cotk_run::seeds::Seeds;
    use rand::RngExt;

    use super::*;
    use crate::laws::{self, Subject};
    use crate::moe::{RoutingRule, route};

    /// The definition itself: token by token, expert by expert, in f64.
    struct Naive<'a>(&'a PlainMoe);

    impl MoeRuntime for Naive<'_> {
        fn shape(&self) -> &MoeShape {
            self.0.shape()
        }

        fn modes(&self) -> &[Mode] {
            &[Mode::Exact]
        }

        fn forward_into(
            &self,
            layer: LayerId,
            hidden: &[f32],
            router: RouterScores<'_>,
            mode: Mode,
            out: &mut [f32],
            record: &mut MoeRecord,
        ) -> Result<(), RuntimeError> {
            let at = self.check_call(layer, hidden, &router, mode, out)?;
            let routed = route(&router, Alive::Masked(&self.0.alive[at]));
            let width = self.shape().hidden;
            let dot = |a: &[f32], b: &[f64]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum::<f64>();
            let mut uses = Vec::new();
            for token in 0..router.tokens() {
                let x: Vec<f64> = hidden[token * width..][..width].iter().map(|v| f64::from(*v)).collect();
                let mut sum = vec![0.0; width];
                for slot in token * routed.slots..(token + 1) * routed.slots {
                    let (expert, gate) = (routed.experts[slot], routed.gates[slot]);
                    let mlp = self.0.experts[at][expert.index()].as_ref().unwrap();
                    let inner: Vec<f64> = (0..mlp.gate.outputs())
                        .map(|i| {
                            let g = dot(&mlp.gate.row(i), &x);
                            g / (1.0 + (-g).exp()) * dot(&mlp.up.row(i), &x)
                        })
                        .collect();
                    for (i, sum) in sum.iter_mut().enumerate() {
                        *sum += f64::from(gate) * dot(&mlp.down.row(i), &inner);
                    }
                    uses.push(ExpertUse {
                        expert,
                        gate,
                        bits: 32,
                        precision: Precision::Full,
                    });
                }
                for (out, sum) in out[token * width..][..width].iter_mut().zip(sum) {
                    *out = sum as f32;
                }
            }
            *record = MoeRecord {
                slots: routed.slots,
                uses,
            };
            Ok(())
        }
    }

    fn plain(norm_topk: bool, dropped: &[usize]) -> PlainMoe {
        let (hidden, inner, experts) = (24, 10, 7);
        let mut stream = Seeds::new(2).stream("experts");
        let mut linear = |outputs: usize, inputs: usize| {
            let weights = (0..outputs * inputs).map(|_| stream.random_range(-0.5..0.5f32));
            Linear::new(weights.collect(), outputs, inputs)
        };
        let mut layer = || -> Vec<Option<Mlp>> {
            let mut mlp = || Mlp {
                gate: linear(inner, hidden),
                up: linear(inner, hidden),
                down: linear(hidden, inner),
            };
            (0..experts)
                .map(|e| {
                    let mlp = mlp();
                    (!dropped.contains(&e)).then_some(mlp)
                })
                .collect()
        };
        let experts_of = vec![layer(), layer()];
        let shape = MoeShape {
            hidden,
            rule: RoutingRule {
                norm_topk,
                ..RoutingRule::softmax(experts, 3)
            },
            layers: vec![LayerId(1), LayerId(3)],
        };
        PlainMoe::from_experts(shape, experts_of, Absent::Masked)
    }

    #[test]
    fn plain_moe_keeps_the_laws_of_a_runtime() {
        for (norm_topk, dropped) in [
            (false, &[][..]),
            (true, &[]),
            (false, &[0, 5]),
            (true, &[1, 2, 3, 4, 5]),
        ] {
            let plain = plain(norm_topk, dropped);
            laws::check(&Subject {
                runtime: &plain,
                reference: &Naive(&plain),
                exact_error: 1e-6,
                split_error: 1e-6,
                seed: 1,
            })
            .unwrap();
        }
    }

    #[test]
    fn the_laws_notice_a_wrong_runtime() {
        let (right, wrong) = (plain(false, &[]), plain(false, &[2]));
        let broken = laws::check(&Subject {
            runtime: &wrong,
            reference: &Naive(&right),
            exact_error: 1e-2,
            split_error: 1e-6,
            seed: 1,
        });
        let broken = broken.unwrap_err();
        for law in ["exact_equals_the_reference", "the_record_tells_what_routing_chose"] {
            assert!(broken.contains(law), "{broken}");
        }
    }
}
