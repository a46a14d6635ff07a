//! A whole decoder: embedding, layers, head, over a [`MoeRuntime`] that holds the routed experts. Forward is a loop
//! over `Layer::forward`; walking a model layer by layer uses the same layers without this type.

use std::sync::Arc;

use cotk_run::units::LayerId;

use crate::ModelError;
use crate::checkpoint::{CheckpointError, TensorSource};
use crate::families::{self, Tensor};
use crate::layers::attention::{LayerCache, Span};
use crate::layers::linear::Linear;
use crate::layers::norm::rms_norm;
use crate::layers::rope::Rope;
use crate::layers::{self, Layer};
use crate::moe::{Mode, MoeRecord, MoeRuntime};
use crate::spec::ModelSpec;

/// The dense part in memory as f32, and a runtime for the rest. Cheap to share behind an [`Arc`].
pub struct Model {
    spec: ModelSpec,
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
        for &token in tokens {
            if token as usize >= self.embedding.outputs() {
                return Err(ModelError::TokenId {
                    found: token,
                    vocab: self.embedding.outputs(),
                });
            }
            hidden.extend_from_slice(&self.embedding.row(token as usize));
        }
        Ok(hidden)
    }

    /// Final norm and head: `[rows, hidden]` to `[rows, vocab]`.
    pub fn logits(&self, states: &[f32]) -> Vec<f32> {
        let normed = rms_norm(states, &self.final_norm, self.norm_eps);
        self.head.as_ref().unwrap_or(&self.embedding).apply(&normed)
    }
}

/// Keys and values of one sequence, all layers.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerCache>,
}

impl KvCache {
    /// An empty sequence.
    pub fn new(spec: &ModelSpec) -> Self {
        Self {
            layers: spec.layers.iter().map(|_| LayerCache::new(&spec.attention)).collect(),
        }
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
    pub fn bytes_for(spec: &ModelSpec, positions: usize) -> u64 {
        (spec.layers.len() * spec.attention.cached_per_token() * positions) as u64 * 4
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

/// Runs on a thread of the current pool: entering it wakes a thread (15 µs and more), which parallel loops would do anew
/// each, ten times a layer.
fn on_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
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
        })
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
        KvCache::new(&self.spec)
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
        on_pool(|| self.hidden_here(sequences, mode))
    }

    fn hidden_here(&self, sequences: &mut [Sequence<'_>], mode: Mode) -> Result<Hidden, ModelError> {
        let mut states = Vec::new();
        for sequence in &*sequences {
            let found = sequence.cache.positions() + sequence.tokens.len();
            if found > self.spec.context {
                return Err(ModelError::ContextFull {
                    found,
                    context: self.spec.context,
                });
            }
            states.extend(self.embed(sequence.tokens)?);
        }
        let before: Vec<usize> = sequences.iter().map(|s| s.cache.positions()).collect();
        let mut records = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let mut spans: Vec<Span<'_>> = sequences
                .iter_mut()
                .map(|s| Span {
                    tokens: s.tokens.len(),
                    cache: &mut s.cache.layers[index],
                })
                .collect();
            match layer.forward(&self.rope, &mut states, &mut spans, self.runtime.as_ref(), mode) {
                Ok(record) => records.extend(record.map(|record| (layer.id(), record))),
                Err(error) => {
                    for (sequence, positions) in sequences.iter_mut().zip(before) {
                        sequence.cache.truncate(positions);
                    }
                    return Err(error.into());
                }
            }
        }
        Ok(Hidden { states, records })
    }

    /// See [`Ends::logits`].
    pub fn logits(&self, states: &[f32]) -> Vec<f32> {
        on_pool(|| self.ends.logits(states))
    }

    /// [`hidden`](Self::hidden), then [`logits`](Self::logits) of the rows asked for. A sequence without new tokens
    /// has no last row.
    ///
    /// # Errors
    /// As [`hidden`](Self::hidden).
    pub fn forward(&self, sequences: &mut [Sequence<'_>], mode: Mode, which: Logits) -> Result<Forward, ModelError> {
        on_pool(|| self.forward_here(sequences, mode, which))
    }

    fn forward_here(&self, sequences: &mut [Sequence<'_>], mode: Mode, which: Logits) -> Result<Forward, ModelError> {
        let Hidden { mut states, records } = self.hidden_here(sequences, mode)?;
        if which == Logits::Last {
            let width = self.spec.hidden;
            let mut last = Vec::with_capacity(sequences.len() * width);
            let mut end = 0;
            for sequence in sequences.iter().filter(|s| !s.tokens.is_empty()) {
                end += sequence.tokens.len();
                last.extend_from_slice(&states[(end - 1) * width..end * width]);
            }
            states = last;
        }
        Ok(Forward {
            logits: self.ends.logits(&states),
            records,
        })
    }
}
