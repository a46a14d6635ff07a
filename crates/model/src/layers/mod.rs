//! One decoder layer without its routed experts: attention, router, dense or shared MLP. The parts have a file
//! each; a layer loads alone, so that a model larger than memory can be walked layer by layer.

use cotk_run::units::LayerId;
use rayon::prelude::*;

pub mod attention;
pub mod cache;
pub mod clock;
mod grouped;
mod latent;
pub mod linear;
mod mlp;
pub mod norm;
pub(crate) mod product;
pub mod rope;
pub mod router;
mod running;

pub use self::mlp::{Mlp, sigmoid, silu};

use self::attention::{Attention, Rows, Span, Spans};
use self::cache::{KvKind, LayerCache};
use self::clock::{Clock, Part};
use self::linear::Linear;
use self::norm::{rms_norm, rms_norm_to};
use self::rope::{Angles, Rope};
use crate::checkpoint::{CheckpointError, TensorSource};
use crate::families::{self, LayerTensor, Tensor};
use crate::moe::{Mode, MoeRecord, MoeRuntime, RouterScores, RoutingRule, RuntimeError, Scoring};
use crate::spec::{LayerKind, ModelSpec, SharedGate};

/// What follows attention.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there is one per layer")]
enum Mixer {
    Dense(Mlp),
    Moe {
        router: Linear,
        /// `[experts]`, or empty: added to scores for the choice alone.
        bias: Vec<f32>,
        rule: RoutingRule,
        shared: Option<SharedExpert>,
    },
}

#[derive(Debug, Clone)]
struct SharedExpert {
    mlp: Mlp,
    /// `[1, hidden]`, its sigmoid scales the output.
    gate: Option<Linear>,
}

/// What a forward pass keeps between layers and tokens, so that it allocates nothing: sizes are those of the last rows.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Of the rows' positions.
    pub(crate) angles: Angles,
    normed: Vec<f32>,
    rows: Rows,
    /// Between two projections.
    wide: Vec<f32>,
    mixed: Vec<f32>,
    out: Vec<f32>,
    scores: Vec<f32>,
    pub(crate) clock: Clock,
}

/// The dense part of one decoder layer.
#[derive(Debug, Clone)]
pub struct Layer {
    id: LayerId,
    attention: Attention,
    mixer_norm: Vec<f32>,
    eps: f32,
    mixer: Mixer,
}

impl Layer {
    /// Loads the dense part of layer `id`.
    ///
    /// # Errors
    /// As [`TensorSource::load_f32`].
    ///
    /// # Panics
    /// When the model has no such layer.
    pub fn load(spec: &ModelSpec, source: &dyn TensorSource, id: LayerId) -> Result<Self, CheckpointError> {
        let family = families::of(spec);
        let name = |part| family.tensor_name(Tensor::Layer(id, part));
        let mixer = match spec.layers[id.index()].kind {
            LayerKind::Dense { intermediate } => Mixer::Dense(Mlp::load(source, spec.hidden, intermediate, |m| {
                name(LayerTensor::Dense(m))
            })?),
            LayerKind::Moe { shared } => Mixer::Moe {
                router: Linear::load(source, &name(LayerTensor::Router), [spec.routing.experts, spec.hidden])?,
                bias: if spec.router_bias {
                    source.load_f32(&name(LayerTensor::RouterBias), &[spec.routing.experts])?
                } else {
                    Vec::new()
                },
                rule: spec.routing,
                shared: match shared {
                    None => None,
                    Some(shared) => Some(SharedExpert {
                        mlp: Mlp::load(source, spec.hidden, shared.intermediate, |m| {
                            name(LayerTensor::Shared(m))
                        })?,
                        gate: match shared.gate {
                            SharedGate::Open => None,
                            SharedGate::Sigmoid => {
                                Some(Linear::load(source, &name(LayerTensor::SharedGate), [1, spec.hidden])?)
                            }
                        },
                    }),
                },
            },
        };
        Ok(Self {
            id,
            attention: Attention::load(spec, family, source, id)?,
            mixer_norm: source.load_f32(&name(LayerTensor::MixerNorm), &[spec.hidden])?,
            eps: spec.norm_eps,
            mixer,
        })
    }

    /// Its place in the model.
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// Whether it has routed experts.
    pub fn is_moe(&self) -> bool {
        matches!(self.mixer, Mixer::Moe { .. })
    }

    /// The first half: `hidden += attention(norm(hidden))`, see [`Attention::attend`].
    pub fn attend(&self, rope: &Rope, hidden: &mut [f32], spans: &mut [Span<'_>]) {
        self.attention.attend(rope, hidden, spans);
    }

    /// What attention's output projection sees: each head's values mixed, `[tokens, heads · value_dim]`; `hidden` stays.
    pub fn mixed_values(&self, rope: &Rope, hidden: &[f32], spans: &mut [Span<'_>]) -> Vec<f32> {
        self.attention.mixed_values(rope, hidden, spans)
    }

    /// An empty cache of keys and values of this layer.
    pub fn cache(&self, kind: KvKind) -> LayerCache {
        self.attention.cache(kind)
    }

    /// What router and experts see: the normed state, `[tokens, hidden]`.
    pub fn mixer_input(&self, hidden: &[f32]) -> Vec<f32> {
        rms_norm(hidden, &self.mixer_norm, self.eps)
    }

    /// Scores of all experts, `[tokens, experts]`; `None` in a dense layer. `normed` is of
    /// [`mixer_input`](Self::mixer_input).
    pub fn router_scores(&self, normed: &[f32]) -> Option<Vec<f32>> {
        let mut scores = Vec::new();
        self.router_scores_to(normed, &mut scores).then_some(scores)
    }

    /// [`router_scores`](Self::router_scores) into `scores`; false in a dense layer.
    fn router_scores_to(&self, normed: &[f32], scores: &mut Vec<f32>) -> bool {
        match &self.mixer {
            Mixer::Dense(_) => false,
            Mixer::Moe { router, rule, .. } => {
                scores.resize(normed.len() / router.inputs() * router.outputs(), 0.0);
                router.apply_to(normed, scores);
                match rule.scoring {
                    Scoring::Softmax => router::softmax(scores, router.outputs()),
                    Scoring::Sigmoid => scores.iter_mut().for_each(|s| *s = sigmoid(*s)),
                }
                true
            }
        }
    }

    /// [`router_scores`](Self::router_scores) as what routing reads: with the layer's rule and bias.
    ///
    /// # Errors
    /// [`RuntimeError::Shape`] when the scores are not of this layer.
    ///
    /// # Panics
    /// In a dense layer, which has no scores.
    pub fn routing<'a>(&'a self, scores: &'a [f32]) -> Result<RouterScores<'a>, RuntimeError> {
        match &self.mixer {
            Mixer::Dense(_) => panic!("a dense layer routes nothing"),
            Mixer::Moe { bias, rule, .. } if bias.is_empty() => RouterScores::new(scores, rule),
            Mixer::Moe { bias, rule, .. } => RouterScores::new(scores, rule)?.with_bias(bias),
        }
    }

    /// Rows of the router `[experts, hidden]`, and what is added to its scores for the choice (empty: nothing); `None` in
    /// a dense layer.
    pub fn router(&self) -> Option<(std::borrow::Cow<'_, [f32]>, &[f32])> {
        match &self.mixer {
            Mixer::Dense(_) => None,
            Mixer::Moe { router, bias, .. } => Some((router.weights(), bias)),
        }
    }

    /// The same layer with another router.
    ///
    /// # Panics
    /// In a dense layer; a router of other shape.
    #[must_use]
    pub fn with_router(mut self, other: Linear) -> Self {
        match &mut self.mixer {
            Mixer::Dense(_) => panic!("a dense layer routes nothing"),
            Mixer::Moe { router, .. } => {
                let shape = |linear: &Linear| (linear.outputs(), linear.inputs());
                assert_eq!(shape(&other), shape(router), "a row for each expert");
                *router = other;
            }
        }
        self
    }

    /// `hidden +=` everything after attention but the routed experts: the shared expert, or the MLP of a dense layer.
    pub fn add_dense(&self, normed: &[f32], hidden: &mut [f32]) {
        self.add_dense_with(normed, hidden, &mut Vec::new(), &mut Vec::new());
    }

    /// The same with buffers for outputs and gates.
    fn add_dense_with(&self, normed: &[f32], hidden: &mut [f32], out: &mut Vec<f32>, gates: &mut Vec<f32>) {
        let (mlp, gate) = match &self.mixer {
            Mixer::Dense(mlp) => (mlp, None),
            Mixer::Moe { shared: None, .. } => return,
            Mixer::Moe {
                shared: Some(SharedExpert { mlp, gate }),
                ..
            } => (mlp, gate.as_ref()),
        };
        out.resize(hidden.len(), 0.0);
        mlp.apply_to(normed, out);
        let Some(gate) = gate else {
            return add(hidden, out);
        };
        let width = gate.inputs();
        gates.resize(normed.len() / width, 0.0);
        gate.apply_to(normed, gates);
        let rows = hidden.chunks_exact_mut(width).zip(out.chunks_exact(width));
        for ((hidden, output), gate) in rows.zip(gates) {
            let gate = sigmoid(*gate);
            hidden.iter_mut().zip(output).for_each(|(h, o)| *h += gate * o);
        }
    }

    /// Bytes of its dense matrices as held: what one token reads.
    pub fn dense_bytes(&self) -> u64 {
        let mixer = match &self.mixer {
            Mixer::Dense(mlp) => mlp.bytes(),
            Mixer::Moe { router, shared, .. } => {
                let shared = shared.as_ref();
                let gate = shared.and_then(|s| s.gate.as_ref()).map_or(0, Linear::bytes);
                router.bytes() + shared.map_or(0, |s| s.mlp.bytes()) + gate
            }
        };
        self.attention.bytes() + mixer
    }

    /// The whole layer; the record is `None` for a dense one.
    ///
    /// # Errors
    /// What the runtime refuses.
    pub fn forward(
        &self,
        rope: &Rope,
        hidden: &mut [f32],
        spans: &mut [Span<'_>],
        runtime: &dyn MoeRuntime,
        mode: Mode,
    ) -> Result<Option<MoeRecord>, RuntimeError> {
        let mut scratch = Scratch::default();
        let positions = spans
            .iter()
            .flat_map(|s| s.cache.positions()..s.cache.positions() + s.tokens);
        rope.angles(positions, &mut scratch.angles);
        let mut record = MoeRecord::default();
        self.forward_with(hidden, spans, runtime, mode, &mut scratch, &mut record)?;
        Ok(self.is_moe().then_some(record))
    }

    /// The same with the rows' angles in `scratch`; `record` is overwritten in a MoE layer.
    pub(crate) fn forward_with<S: Spans + ?Sized>(
        &self,
        hidden: &mut [f32],
        spans: &mut S,
        runtime: &dyn MoeRuntime,
        mode: Mode,
        scratch: &mut Scratch,
        record: &mut MoeRecord,
    ) -> Result<(), RuntimeError> {
        self.attention.attend_with(hidden, spans, scratch);
        let Scratch {
            normed,
            out,
            scores,
            clock,
            ..
        } = scratch;
        normed.resize(hidden.len(), 0.0);
        rms_norm_to(hidden, &self.mixer_norm, self.eps, normed);
        clock.lap(Part::Other);
        if self.router_scores_to(normed, scores) {
            clock.lap(Part::Dense);
            out.resize(hidden.len(), 0.0);
            runtime.forward_into(self.id, normed, self.routing(scores)?, mode, out, record)?;
            clock.lap(Part::Experts);
            add(hidden, out);
            clock.lap(Part::Other);
        }
        self.add_dense_with(normed, hidden, out, scores);
        clock.lap(Part::Dense);
        Ok(())
    }
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// Loads all layers, several at a time.
pub(crate) fn load_all(spec: &ModelSpec, source: &dyn TensorSource) -> Result<Vec<Layer>, CheckpointError> {
    (0..u32::try_from(spec.layers.len()).expect("layer counts are small"))
        .into_par_iter()
        .map(|layer| Layer::load(spec, source, LayerId(layer)))
        .collect()
}
