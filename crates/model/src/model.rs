//! A whole decoder: embedding, layers, head, over a [`MoeRuntime`] that holds the routed experts. Forward is a loop
//! over `Layer::forward`; walking a model layer by layer uses the same layers without this type.

use std::sync::Arc;

use cotk_run::units::LayerId;

use crate::ModelError;
use crate::checkpoint::{CheckpointError, TensorSource};
use crate::families::{self, Tensor};
use crate::layers::attention::Spans;
use crate::layers::cache::{KvKind, LayerCache};
use crate::layers::clock::{Part, PassTimes};
use crate::layers::linear::Linear;
use crate::layers::norm::rms_norm_to;
use crate::layers::rope::Rope;
use crate::layers::{self, Layer, Scratch};
use crate::moe::{Mode, MoeRecord, MoeRuntime};
use crate::spec::ModelSpec;

/// The dense part as it is held, and a runtime for the rest. Cheap to share behind an [`Arc`].
pub struct Model {
    spec: ModelSpec,
    kv: KvKind,
    ends: Ends,
    layers: Vec<Layer>,
    rope: Rope,
    runtime: Arc<dyn MoeRuntime>,
}

/// Embedding, final norm and head: all that a model has outside its layers.
#[derive(Debug, Clone)]
pub struct Ends {
    embedding: Linear,
    final_norm: Vec<f32>,
    norm_eps: f32,
    /// Absent when tied to the embedding.
    head: Option<Linear>,
}

impl Ends {
    /// Loads them alone.
    ///
    /// # Errors
    /// As [`TensorSource::load_f32`].
    pub fn load(spec: &ModelSpec, source: &dyn TensorSource) -> Result<Self, CheckpointError> {
        let name = |tensor| families::of(spec).tensor_name(tensor);
        let shape = [spec.vocab, spec.hidden];
        Ok(Self {
            embedding: Linear::load(source, &name(Tensor::Embedding), shape)?,
            final_norm: source.load_f32(&name(Tensor::FinalNorm), &[spec.hidden])?,
            norm_eps: spec.norm_eps,
            head: if spec.tied_embeddings {
                None
            } else {
                Some(Linear::load(source, &name(Tensor::Head), shape)?)
            },
        })
    }

    /// Rows of the embedding, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`ModelError::TokenId`].
    pub fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        let mut hidden = Vec::with_capacity(tokens.len() * self.embedding.inputs());
        self.embed_more(tokens, &mut hidden)?;
        Ok(hidden)
    }

    fn embed_more(&self, tokens: &[u32], hidden: &mut Vec<f32>) -> Result<(), ModelError> {
        let width = self.embedding.inputs();
        for &token in tokens {
            if token as usize >= self.embedding.outputs() {
                return Err(ModelError::TokenId {
                    found: token,
                    vocab: self.embedding.outputs(),
                });
            }
            let start = hidden.len();
            hidden.resize(start + width, 0.0);
            self.embedding.row_to(token as usize, &mut hidden[start..]);
        }
        Ok(())
    }

    fn head(&self) -> &Linear {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Final norm and head: `[rows, hidden]` to `[rows, vocab]`.
    pub fn logits(&self, states: &[f32]) -> Vec<f32> {
        let (mut normed, mut logits) = (Vec::new(), Vec::new());
        self.logits_to(states, &mut normed, &mut logits);
        logits
    }

    fn logits_to(&self, states: &[f32], normed: &mut Vec<f32>, logits: &mut Vec<f32>) {
        normed.resize(states.len(), 0.0);
        rms_norm_to(states, &self.final_norm, self.norm_eps, normed);
        logits.resize(states.len() / self.embedding.inputs() * self.embedding.outputs(), 0.0);
        self.head().apply_to(normed, logits);
    }
}

/// Keys and values of one sequence, all layers.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerCache>,
}

impl KvCache {
    /// An empty sequence.
    pub fn new(spec: &ModelSpec, kind: KvKind) -> Self {
        let layer = |layer| LayerCache::of_layer(spec, layer, kind);
        Self {
            layers: spec.layers.iter().map(layer).collect(),
        }
    }

    /// Makes room for `positions` more, so that adding them allocates nothing.
    pub fn reserve(&mut self, positions: usize) {
        self.layers.iter_mut().for_each(|layer| layer.reserve(positions));
    }

    /// Tokens cached: the position of the next one.
    pub fn positions(&self) -> usize {
        self.layers.first().map_or(0, LayerCache::positions)
    }

    /// Forgets what follows the first `positions`.
    pub fn truncate(&mut self, positions: usize) {
        self.layers.iter_mut().for_each(|layer| layer.truncate(positions));
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(LayerCache::bytes).sum()
    }

    /// Bytes that `positions` tokens of a model take.
    pub fn bytes_for(spec: &ModelSpec, kind: KvKind, positions: usize) -> u64 {
        let widths = spec.layers.iter().flat_map(|layer| spec.cached_widths(layer));
        let per_token: usize = widths.map(|width| kind.row_bytes(width)).sum();
        (per_token * positions) as u64
    }
}

/// New tokens of one sequence and what came before them.
pub struct Sequence<'a> {
    pub tokens: &'a [u32],
    pub cache: &'a mut KvCache,
}

/// Which positions get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None: a part of a prompt that more follows.
    None,
    /// The last token of each sequence.
    Last,
    /// Every token.
    All,
}

/// What a forward pass gives.
#[derive(Debug, Clone)]
pub struct Forward {
    /// `[rows, vocab]`: one row per sequence or per token.
    pub logits: Vec<f32>,
    /// One per MoE layer, ascending.
    pub records: Vec<(LayerId, MoeRecord)>,
}

/// Hidden states after the last layer, before the final norm.
#[derive(Debug, Clone)]
pub struct Hidden {
    /// `[tokens, hidden]`
    pub states: Vec<f32>,
    /// One per MoE layer, ascending.
    pub records: Vec<(LayerId, MoeRecord)>,
}

/// What a forward pass leaves, and the buffers it needs: kept by whoever decodes, so that a token allocates nothing.
#[derive(Debug, Default)]
pub struct Workspace {
    scratch: Scratch,
    states: Vec<f32>,
    normed: Vec<f32>,
    last: Vec<f32>,
    before: Vec<usize>,
    logits: Vec<f32>,
    records: Vec<(LayerId, MoeRecord)>,
}

impl Workspace {
    /// One that takes the times of the parts of its passes.
    pub fn timed() -> Self {
        let mut work = Self::default();
        work.scratch.clock.runs = true;
        work
    }

    /// What its passes took since it was asked last; nothing unless it is [`timed`](Self::timed).
    pub fn take_times(&mut self) -> PassTimes {
        std::mem::take(&mut self.scratch.clock.times)
    }

    /// `[rows, vocab]` of the last [`Model::step`]: one row per sequence or per token.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// What was done for the last pass, one per MoE layer, ascending.
    pub fn records(&self) -> &[(LayerId, MoeRecord)] {
        &self.records
    }
}

/// One layer of several sequences.
struct OfLayer<'a, 'b> {
    sequences: &'a mut [Sequence<'b>],
    layer: usize,
}

impl Spans for OfLayer<'_, '_> {
    fn count(&self) -> usize {
        self.sequences.len()
    }

    fn tokens(&self, at: usize) -> usize {
        self.sequences[at].tokens.len()
    }

    fn cache(&self, at: usize) -> &LayerCache {
        &self.sequences[at].cache.layers[self.layer]
    }

    fn cache_mut(&mut self, at: usize) -> &mut LayerCache {
        &mut self.sequences[at].cache.layers[self.layer]
    }
}

impl Model {
    /// Loads the dense part; `runtime` holds the experts.
    ///
    /// # Errors
    /// As [`TensorSource::load_f32`].
    pub fn load(
        spec: ModelSpec,
        source: &dyn TensorSource,
        runtime: Arc<dyn MoeRuntime>,
    ) -> Result<Self, CheckpointError> {
        Ok(Self {
            ends: Ends::load(&spec, source)?,
            layers: layers::load_all(&spec, source)?,
            rope: Rope::new(&spec.attention.rope),
            runtime,
            spec,
            kv: KvKind::default(),
        })
    }

    /// The same with caches of another kind.
    #[must_use]
    pub fn with_kv(mut self, kind: KvKind) -> Self {
        self.kv = kind;
        self
    }

    /// How its caches are held.
    pub fn kv(&self) -> KvKind {
        self.kv
    }

    /// Bytes of the dense matrices that one token reads, as held: those of all layers and the head.
    pub fn dense_bytes_per_token(&self) -> u64 {
        self.layers.iter().map(Layer::dense_bytes).sum::<u64>() + self.ends.head().bytes()
    }

    /// Shapes and rules.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Who computes the routed experts.
    pub fn runtime(&self) -> &dyn MoeRuntime {
        self.runtime.as_ref()
    }

    /// The dense parts of the layers.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Rotary positions, for walking layers by hand.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// A cache for a new sequence.
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(&self.spec, self.kv)
    }

    /// What stands before and after the layers.
    pub fn ends(&self) -> &Ends {
        &self.ends
    }

    /// See [`Ends::embed`].
    ///
    /// # Errors
    /// [`ModelError::TokenId`].
    pub fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        self.ends.embed(tokens)
    }

    /// Runs all layers over the new tokens of all sequences and extends their caches.
    ///
    /// # Errors
    /// A token outside the vocabulary, a sequence longer than the context, what the runtime refuses. The caches are
    /// then as they were.
    pub fn hidden(&self, sequences: &mut [Sequence<'_>], mode: Mode) -> Result<Hidden, ModelError> {
        let mut work = Workspace::default();
        self.run_layers(sequences, mode, &mut work)?;
        Ok(Hidden {
            states: work.states,
            records: work.records,
        })
    }

    fn run_layers(&self, sequences: &mut [Sequence<'_>], mode: Mode, work: &mut Workspace) -> Result<(), ModelError> {
        let Workspace {
            scratch,
            states,
            before,
            records,
            ..
        } = work;
        scratch.clock.begin();
        states.clear();
        before.clear();
        for sequence in &*sequences {
            let found = sequence.cache.positions() + sequence.tokens.len();
            if found > self.spec.context {
                return Err(ModelError::ContextFull {
                    found,
                    context: self.spec.context,
                });
            }
            self.ends.embed_more(sequence.tokens, states)?;
            before.push(sequence.cache.positions());
        }
        let positions = sequences.iter().flat_map(|s| {
            let start = s.cache.positions();
            start..start + s.tokens.len()
        });
        self.rope.angles(positions, &mut scratch.angles);
        let mut used = 0;
        for (index, layer) in self.layers.iter().enumerate() {
            if layer.is_moe() && used == records.len() {
                records.push((layer.id(), MoeRecord::default()));
            }
            let mut nothing = MoeRecord::default();
            let record = match records.get_mut(used) {
                Some((id, record)) if layer.is_moe() => {
                    *id = layer.id();
                    used += 1;
                    record
                }
                _ => &mut nothing,
            };
            let mut spans = OfLayer {
                sequences,
                layer: index,
            };
            let done = layer.forward_with(states, &mut spans, self.runtime.as_ref(), mode, scratch, record);
            if let Err(error) = done {
                for (sequence, positions) in sequences.iter_mut().zip(&*before) {
                    sequence.cache.truncate(*positions);
                }
                return Err(error.into());
            }
        }
        records.truncate(used);
        Ok(())
    }

    /// See [`Ends::logits`].
    pub fn logits(&self, states: &[f32]) -> Vec<f32> {
        self.ends.logits(states)
    }

    /// [`hidden`](Self::hidden), then [`logits`](Self::logits) of the rows asked for. A sequence without new tokens
    /// has no last row.
    ///
    /// # Errors
    /// As [`hidden`](Self::hidden).
    pub fn forward(&self, sequences: &mut [Sequence<'_>], mode: Mode, which: Logits) -> Result<Forward, ModelError> {
        let mut work = Workspace::default();
        self.step(sequences, mode, which, &mut work)?;
        Ok(Forward {
            logits: work.logits,
            records: work.records,
        })
    }

    /// [`forward`](Self::forward) with the buffers and into the results of `work`: a token of each of a few sequences
    /// allocates nothing, once steps like it have been made and while caches have room. Sequences of one step share one
    /// pass over each matrix.
    ///
    /// # Errors
    /// As [`hidden`](Self::hidden).
    pub fn step(
        &self,
        sequences: &mut [Sequence<'_>],
        mode: Mode,
        which: Logits,
        work: &mut Workspace,
    ) -> Result<(), ModelError> {
        self.run_layers(sequences, mode, work)?;
        let Workspace {
            scratch,
            states,
            normed,
            last,
            logits,
            ..
        } = work;
        let rows = match which {
            Logits::None => {
                logits.clear();
                return Ok(());
            }
            Logits::All => &*states,
            Logits::Last => {
                let width = self.spec.hidden;
                last.clear();
                let mut end = 0;
                for sequence in sequences.iter().filter(|s| !s.tokens.is_empty()) {
                    end += sequence.tokens.len();
                    last.extend_from_slice(&states[(end - 1) * width..end * width]);
                }
                &*last
            }
        };
        self.ends.logits_to(rows, normed, logits);
        scratch.clock.lap(Part::Head);
        Ok(())
    }
}
