//! [`InMemory`]: experts that were made or coded in this process, laid out as in a record. Tokens go where the router sends
//! them, or to experts drawn anew for each token: what decides speed is which bytes are read, and a router of noise
//! repeats itself. Law: the same seed draws the same experts.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use cotk_kernels::cpu::expert::Expert;
use cotk_kernels::cpu::noise::NoiseExpert;
use cotk_model::checkpoint::TensorSource;
use cotk_model::families::{self, LayerTensor, Matrix, Tensor};
use cotk_model::moe::{
    Alive, ExpertUse, Mode, MoeRecord, MoeRuntime, MoeShape, Precision, Routed, RouterScores, RuntimeError,
    order_pairs, with_routed,
};
use cotk_model::spec::ModelSpec;
use cotk_run::cancel::Cancel;
use cotk_run::progress::Progress;
use cotk_run::units::{ExpertId, LayerId};
use rayon::prelude::*;

use crate::mix::{Cpu, run_groups};
use crate::{Error, Result};

/// Weights per scale of what is coded on the way.
pub const GROUP: usize = 32;

/// Who chooses experts.
#[derive(Debug)]
pub enum Routing {
    /// The router, as the model says.
    Router,
    /// Chance, token by token; the router's cost is paid and its gates are used.
    Drawn {
        seed: u64,
        /// Tokens that each layer has routed.
        routed: Vec<AtomicU64>,
    },
}

impl Routing {
    /// Drawn from the beginning.
    pub fn drawn(seed: u64, layers: usize) -> Self {
        Self::Drawn {
            seed,
            routed: (0..layers).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

/// All experts of a model, each of one width.
#[derive(Debug)]
pub struct InMemory {
    shape: MoeShape,
    /// Per MoE layer, per expert.
    experts: Vec<Vec<NoiseExpert>>,
    bits: u8,
    routing: Routing,
    cpu: Cpu,
}

impl InMemory {
    /// Of experts at hand: per MoE layer, per expert.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn new(spec: &ModelSpec, experts: Vec<Vec<NoiseExpert>>, bits: u32, routing: Routing) -> Result<Self> {
        Ok(Self {
            shape: MoeShape {
                hidden: spec.hidden,
                rule: spec.routing,
                layers: spec.moe_layers(),
            },
            experts,
            bits: u8::try_from(bits).expect("at most 32"),
            routing,
            cpu: Cpu::selected()?,
        })
    }

    /// Codes the experts of a checkpoint: plain codes in groups of 32.
    ///
    /// # Errors
    /// Tensors that are missing or ill-shaped; weights that are not finite, by tensor; [`cotk_run::Error::Cancelled`].
    pub fn coded(
        spec: &ModelSpec,
        source: &dyn TensorSource,
        bits: u32,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Self> {
        let layers = spec.moe_layers();
        progress.begin("coding experts", layers.len() as u64, "layers");
        let mut experts = Vec::with_capacity(layers.len());
        for &layer in &layers {
            cancel.check().map_err(cotk_model::ModelError::from)?;
            let ids = (0..u32::try_from(spec.routing.experts).expect("expert counts fit 32 bits")).map(ExpertId);
            let one = |expert| coded_expert(spec, source, layer, expert, bits);
            let made: Result<Vec<NoiseExpert>> = ids.collect::<Vec<_>>().into_par_iter().map(one).collect();
            experts.push(made?);
            progress.advance(1);
        }
        progress.end();
        Self::new(spec, experts, bits, Routing::Router)
    }

    /// Bytes of all experts.
    pub fn bytes(&self) -> u64 {
        self.experts.iter().flatten().map(|e| e.len() as u64).sum()
    }

    /// Bytes of one expert; 0 where there is none.
    pub fn expert_bytes(&self, layer: LayerId, expert: ExpertId) -> u64 {
        let at = self.shape.layers.iter().position(|&l| l == layer);
        let found = at.and_then(|at| self.experts[at].get(expert.index()));
        found.map_or(0, |e| e.len() as u64)
    }

    /// Adds the experts that token number `token` of a layer is sent to: distinct, in random order.
    fn draw(&self, seed: u64, layer: usize, token: u64, drawn: &mut Vec<usize>) {
        let count = self.shape.rule.experts;
        let slots = self.shape.rule.top_k.min(count);
        // splitmix64 (Steele, Lea and Flood, 2014); what was drawn before is drawn again.
        let mut state = seed ^ (layer as u64) << 48 ^ token.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let first = drawn.len();
        while drawn.len() < first + slots {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            #[expect(clippy::cast_possible_truncation, reason = "below the number of experts")]
            let expert = ((z ^ z >> 31) % count as u64) as usize;
            if !drawn[first..].contains(&expert) {
                drawn.push(expert);
            }
        }
    }

    /// Distinct expert bytes of the next 100 tokens where experts are drawn (else of all): many times the last-level cache,
    /// or experts were not read from memory.
    pub fn distinct_bytes_per_100_tokens(&self) -> u64 {
        let Routing::Drawn { seed, routed } = &self.routing else {
            return self.bytes();
        };
        let of = |(layer, (experts, routed)): (usize, (&Vec<NoiseExpert>, &AtomicU64))| -> u64 {
            let from = routed.load(Ordering::Relaxed);
            let (mut touched, mut drawn) = (vec![false; experts.len()], Vec::new());
            (from..from + 100).for_each(|token| self.draw(*seed, layer, token, &mut drawn));
            drawn.into_iter().for_each(|e| touched[e] = true);
            let of_touched = experts.iter().zip(touched).filter(|(_, touched)| *touched);
            of_touched.map(|(expert, _)| expert.len() as u64).sum()
        };
        self.experts.iter().zip(routed).enumerate().map(of).sum()
    }
}

fn coded_expert(
    spec: &ModelSpec,
    source: &dyn TensorSource,
    layer: LayerId,
    expert: ExpertId,
    bits: u32,
) -> Result<NoiseExpert> {
    let load = |matrix: Matrix| {
        let name = families::of(spec).tensor_name(Tensor::Layer(layer, LayerTensor::Expert(expert, matrix)));
        source.load_f32(&name, &matrix.shape(spec.hidden, spec.moe_intermediate))
    };
    let (gate, up, down) = (load(Matrix::Gate)?, load(Matrix::Up)?, load(Matrix::Down)?);
    let (hidden, inner) = (spec.hidden, spec.moe_intermediate);
    NoiseExpert::coded([&gate, &up, &down], hidden, inner, bits, GROUP).map_err(|source| Error::Coding {
        what: format!("{layer}, {expert}"),
        source,
    })
}

impl MoeRuntime for InMemory {
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
    ) -> std::result::Result<(), RuntimeError> {
        let at = self.check_call(layer, hidden, &router, mode, out)?;
        with_routed(&router, Alive::All, |routed| self.mix(at, hidden, routed, out, record));
        Ok(())
    }
}

/// What a thread keeps between calls.
#[derive(Default)]
struct Scratch {
    /// `[tokens, slots]`
    chosen: Vec<usize>,
    /// Pairs by expert.
    order: Vec<usize>,
}

impl InMemory {
    /// `out[t] = Σ gate · expert(hidden[t])` of MoE layer number `at`.
    fn mix(&self, at: usize, hidden: &[f32], routed: &Routed, out: &mut [f32], record: &mut MoeRecord) {
        thread_local! {
            static SCRATCH: RefCell<Scratch> = RefCell::default();
        }
        // Taken, not borrowed: whoever runs inside has its own.
        let mut scratch = SCRATCH.take();
        let Scratch { chosen, order } = &mut scratch;
        let slots = routed.slots;
        chosen.clear();
        match &self.routing {
            Routing::Router => chosen.extend(routed.experts.iter().map(|e| e.index())),
            Routing::Drawn { seed, routed: drawn } => {
                let tokens = (hidden.len() / self.shape.hidden.max(1)) as u64;
                let first = drawn[at].fetch_add(tokens, Ordering::Relaxed);
                (first..first + tokens).for_each(|token| self.draw(*seed, at, token, chosen));
            }
        }
        order_pairs(chosen, order);
        let groups: Vec<(Expert<'_>, &[usize])> = order
            .chunk_by(|&a, &b| chosen[a] == chosen[b])
            .map(|pairs| (self.experts[at][chosen[pairs[0]]].expert(), pairs))
            .collect();
        out.fill(0.0);
        run_groups(self.cpu, &groups, hidden, slots, &routed.gates, out);
        record.slots = slots;
        record.uses.clear();
        let uses = chosen.iter().zip(&routed.gates).map(|(&expert, &gate)| ExpertUse {
            expert: ExpertId(u32::try_from(expert).expect("expert counts fit 32 bits")),
            gate,
            bits: self.bits,
            precision: Precision::Full,
        });
        record.uses.extend(uses);
        SCRATCH.set(scratch);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::synthetic::{self, Experts};

    #[test]
    fn routing_is_distinct_within_a_token_and_uniform_over_tokens() {
        let mut spec = synthetic::spec("ref-qwen2moe", Some(2)).unwrap();
        spec.routing.experts = 8;
        let experts = synthetic::experts(&spec, Experts::plain(2), 3).unwrap();
        let all = InMemory::new(&spec, experts, 2, Routing::drawn(3, 2)).unwrap();
        let mut counts = [0u32; 8];
        for token in 0..1000 {
            let mut drawn = Vec::new();
            all.draw(3, 1, token, &mut drawn);
            assert_eq!(drawn.iter().collect::<BTreeSet<_>>().len(), 4);
            drawn.iter().for_each(|&e| counts[e] += 1);
        }
        assert!(counts.iter().all(|&c| (430..570).contains(&c)), "{counts:?}");
        assert_eq!(all.distinct_bytes_per_100_tokens(), all.bytes());
        let one = all.expert_bytes(LayerId(0), ExpertId(7));
        assert_eq!(one * 16, all.bytes());
        assert_eq!(all.expert_bytes(LayerId(2), ExpertId(0)), 0);
    }
}
