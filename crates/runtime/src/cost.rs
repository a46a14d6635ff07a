//! What a step of a model runs, in the terms of the shared hardware model. Predicts nothing itself: the answer is a
//! `cotk_latency::predict::Model`'s. Law: compress, serve and plan ask with the same numbers.

use cotk_container::low_rank::{LowRank, Role};
use cotk_container::manifest::{Manifest, Record, State};
use cotk_latency::moe::{Home, LayerStep, MoeStep, RoutedExpert};
use cotk_latency::work::{AttentionKey, DenseKey, ExpertKey, GlueKey, Heat, Key};
use cotk_model::checkpoint::TensorSource;
use cotk_model::families::{self, LayerTensor, Matrix, Tensor};
use cotk_model::inventory;
use cotk_model::layers::cache::KvKind;
use cotk_model::layers::linear::DenseForm;
use cotk_model::model::KvCache;
use cotk_model::moe::Mode;
use cotk_model::spec::{AttentionKind, LayerKind, ModelSpec};
use cotk_run::units::LayerId;

/// Context of the step that is asked about where nobody says another, in tokens (or the model's, where that is less).
pub const POSITIONS: usize = 512;

/// One pass over all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// One new token of each of `batch` sequences, which then are `context` long.
    Decode { context: usize, batch: usize },
    /// A prompt of so many tokens.
    Prefill { tokens: usize },
}

/// How the engine holds what is not a routed expert.
#[derive(Clone, Copy)]
pub struct Held<'a> {
    /// Of a dense matrix by its place and shape.
    pub dense: &'a dyn Fn(Tensor, &[usize]) -> DenseForm,
    pub kv: KvKind,
}

impl Held<'_> {
    /// All of it f32.
    pub const F32: Self = Held {
        dense: &|_, _| DenseForm::F32,
        kv: KvKind::F32,
    };
}

/// As a model of this source is held when it is loaded.
pub fn forms_of<'a>(spec: &'a ModelSpec, source: &'a dyn TensorSource) -> impl Fn(Tensor, &[usize]) -> DenseForm + 'a {
    move |tensor, _| DenseForm::of(source, &families::of(spec).tensor_name(tensor))
}

/// As a container's manifest says; matrices that it does not code are 16 bit.
pub fn forms_in<'a>(spec: &'a ModelSpec, manifest: &'a Manifest) -> impl Fn(Tensor, &[usize]) -> DenseForm + 'a {
    move |tensor, _| match manifest.dense.get(&families::of(spec).tensor_name(tensor)) {
        Some(matrix) => DenseForm::Coded {
            bits: matrix.format.code().full().get(),
            group: matrix.format.group(),
        },
        None => DenseForm::Half,
    }
}

/// Bytes of the dense part as it is held, embedding and norms too.
pub fn held_bytes(spec: &ModelSpec, held: &Held<'_>) -> u64 {
    let bytes = |(tensor, shape): &(Tensor, Vec<usize>)| match (tensor, &shape[..]) {
        (Tensor::Layer(_, LayerTensor::Expert(..)), _) => 0,
        (tensor, &[outputs, inputs]) => matrix_bytes((held.dense)(*tensor, shape), outputs, inputs),
        (_, shape) => 4 * shape.iter().product::<usize>() as u64,
    };
    inventory::tensors(spec).iter().map(bytes).sum()
}

fn matrix_bytes(form: DenseForm, outputs: usize, inputs: usize) -> u64 {
    let scales = match form.group() {
        0 => 0,
        group => 2 * outputs * inputs.div_ceil(group),
    };
    (outputs * inputs) as u64 * u64::from(form.bits()) / 8 + scales as u64
}

fn small(n: usize) -> u32 {
    u32::try_from(n).expect("model sizes fit 32 bits")
}

/// One token at one expert that reads `planes` planes of a `bits`-bit prefix, its weights in memory and not in cache.
pub fn expert_key(hidden: usize, inner: usize, bits: u32, planes: usize, group: usize, threads: u32) -> ExpertKey {
    ExpertKey {
        hidden: small(hidden),
        inner: small(inner),
        bits,
        planes: small(planes),
        group: small(group),
        rank: 0,
        experts: 1,
        tokens: 1,
        threads,
        heat: Heat::Cold,
    }
}

/// The experts of a layer of the source model that nobody has compressed, as plain codes in groups of 32 (or 16-bit
/// floats), each used alike.
#[expect(clippy::cast_precision_loss, reason = "counts of experts")]
pub fn uniform_experts(spec: &ModelSpec, bits: u32, threads: u32) -> Vec<RoutedExpert> {
    let experts = spec.routing.experts;
    let one = RoutedExpert {
        key: expert_key(spec.hidden, spec.moe_intermediate, bits, 1, 32, threads),
        share: spec.routing.top_k.min(experts) as f64 / experts.max(1) as f64,
        home: Home::Memory,
    };
    vec![one; experts]
}

/// The kept experts of a container's layer: at full width (`exact`) or at the manifest's `little_bits`, each as often as
/// calibration used it, all in memory.
pub fn container_experts(
    manifest: &Manifest,
    spec: &ModelSpec,
    layer: LayerId,
    mode: Mode,
    threads: u32,
) -> Vec<RoutedExpert> {
    let Some(layer) = manifest.layers.iter().find(|l| l.layer == layer) else {
        return Vec::new();
    };
    let kept = layer.experts.iter().filter_map(|e| match &e.state {
        State::Kept(record) => Some((record.as_ref(), e.why.tokens)),
        State::Constant(_) | State::Dropped => None,
    });
    // A constant takes its share of the calls, and no time to speak of.
    let routable = layer.experts.iter().filter(|e| e.state.is_routable());
    let tokens: u64 = routable.map(|e| e.why.tokens).sum();
    let calls = spec.routing.top_k.min(layer.routable());
    let expert = |(record, used): (&Record, u64)| {
        // Traffic of dropped experts goes to the kept ones, in proportion; each is thought used once more.
        #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^53")]
        let share = (calls as f64 * (used + 1) as f64 / (tokens + layer.routable() as u64) as f64).min(1.0);
        let of = move |key| RoutedExpert {
            key,
            share,
            home: Home::Memory,
        };
        let key = record_key(manifest, spec, record, mode, threads);
        let (whole, factors) = match factor_key(&key, record) {
            // In factors alone.
            Some((factors, true)) => (None, Some(factors)),
            // What corrects an expert is an expert of its own, of that rank.
            Some((factors, false)) => (Some(key), Some(factors)),
            None => (Some(key), None),
        };
        whole.into_iter().chain(factors).map(of)
    };
    kept.flat_map(expert).collect()
}

/// The factors of an expert as an expert of their mean rank, and whether there is nothing else.
fn factor_key(key: &ExpertKey, record: &Record) -> Option<(ExpertKey, bool)> {
    let factors = [&record.gate, &record.up, &record.down].map(|matrix| matrix.rank);
    let first = factors.iter().flatten().next()?;
    let rank = factors
        .iter()
        .flatten()
        .map(LowRank::rank)
        .sum::<usize>()
        .div_ceil(factors.len());
    let is_product = |factors: &Option<LowRank>| factors.is_some_and(|f| f.role == Role::Product);
    let factor = ExpertKey {
        rank: small(rank),
        bits: first.left.code().full().get(),
        planes: 1,
        group: small(first.left.group()),
        ..*key
    };
    Some((factor, factors.iter().all(is_product)))
}

fn record_key(manifest: &Manifest, spec: &ModelSpec, record: &Record, mode: Mode, threads: u32) -> ExpertKey {
    let format = record.gate.format;
    let bits = match (mode, manifest.little_bits) {
        (Mode::Little, Some(bits)) => bits,
        _ => format.code().full().get(),
    };
    let planes = format
        .code()
        .prefixes()
        .iter()
        .take_while(|prefix| prefix.get() <= bits)
        .count()
        .max(1);
    let bits = format.code().prefixes()[planes - 1].get();
    expert_key(spec.hidden, format.rows(), bits, planes, format.group(), threads)
}

/// One token with every weight in memory, at a context of [`POSITIONS`].
pub fn decode_step(manifest: &Manifest, spec: &ModelSpec, mode: Mode, threads: u32) -> MoeStep {
    let pass = Pass::Decode {
        context: POSITIONS.min(spec.context),
        batch: 1,
    };
    let held = Held {
        dense: &forms_in(spec, manifest),
        kv: KvKind::default(),
    };
    step(spec, pass, threads, &held, |layer| {
        container_experts(manifest, spec, layer, mode, threads)
    })
}

/// A pass of a model whose routed experts are what `experts` says, and whose dense part and cache are `held`.
pub fn step(
    spec: &ModelSpec,
    pass: Pass,
    threads: u32,
    held: &Held<'_>,
    experts: impl Fn(LayerId) -> Vec<RoutedExpert>,
) -> MoeStep {
    let (tokens, sequences, keys) = match pass {
        Pass::Decode { context, batch } => (batch.max(1), batch.max(1), context.max(1)),
        Pass::Prefill { tokens } => (tokens.max(1), 1, tokens.max(1)),
    };
    let dense = |tensor: Tensor, shape: &[usize], tokens: usize| {
        let form = (held.dense)(tensor, shape);
        Key::Dense(DenseKey {
            inputs: small(shape[1]),
            outputs: small(shape[0]),
            bits: form.bits(),
            group: small(form.group()),
            tokens: small(tokens),
            threads,
            heat: Heat::Cold,
        })
    };
    let mut layers: Vec<LayerStep> = Vec::with_capacity(spec.layers.len());
    for (id, layer) in (0..).map(LayerId).zip(&spec.layers) {
        let (is_moe, inner, gate) = match layer.kind {
            LayerKind::Dense { intermediate } => (false, intermediate, LayerTensor::Dense(Matrix::Gate)),
            LayerKind::Moe { shared } => {
                let inner = shared.map_or(0, |s| s.intermediate);
                (true, inner, LayerTensor::Shared(Matrix::Gate))
            }
        };
        // An MLP of codes is an expert, its activation included.
        let shape = Matrix::Gate.shape(spec.hidden, inner);
        let is_coded = matches!((held.dense)(Tensor::Layer(id, gate), &shape), DenseForm::Coded { .. });
        let inner = if is_coded { 0 } else { inner };
        let seen = layer.window.map_or(keys, |window| keys.min(window));
        let (kv_heads, head_dim, value_dim, values_in_keys) = match spec.attention.kind {
            AttentionKind::Grouped { .. } => {
                let width = spec.attention.head_dim;
                (spec.attention.kv_heads, width, spec.value_dim(layer), false)
            }
            // One key head that all query heads share; its beginning is the value.
            AttentionKind::Latent { kv_rank, .. } => (1, kv_rank + spec.attention.rope.dim, kv_rank, true),
        };
        layers.push(LayerStep {
            keys: vec![
                Key::Glue(GlueKey {
                    hidden: small(spec.hidden),
                    experts: if is_moe { small(spec.routing.experts) } else { 1 },
                    top_k: if is_moe { small(spec.routing.top_k) } else { 1 },
                    inner: small(inner),
                    tokens: small(tokens),
                    threads: 1,
                }),
                Key::Attention(AttentionKey {
                    heads: small(spec.attention.heads),
                    kv_heads: small(kv_heads),
                    head_dim: small(head_dim),
                    value_dim: small(value_dim),
                    values_in_keys,
                    kv_bits: held.kv.bits(),
                    keys: small(seen),
                    tokens: small((tokens / sequences).min(seen)),
                    sequences: small(sequences),
                    threads,
                    heat: Heat::Cold,
                }),
            ],
            experts: if is_moe { experts(id) } else { Vec::new() },
            top_k: small(spec.routing.top_k),
        });
    }
    let mut ends = Vec::new();
    for (tensor, shape) in inventory::tensors(spec).iter().filter(|(_, shape)| shape.len() == 2) {
        let tensor = *tensor;
        match tensor {
            Tensor::Layer(_, LayerTensor::Expert(..)) => {}
            Tensor::Layer(id, LayerTensor::Dense(matrix) | LayerTensor::Shared(matrix)) => {
                let keys = &mut layers[id.index()].keys;
                match ((held.dense)(tensor, shape), matrix) {
                    (DenseForm::Coded { bits, group }, Matrix::Gate) => keys.push(Key::Expert(ExpertKey {
                        tokens: small(tokens),
                        ..expert_key(shape[1], shape[0], bits, 1, group, threads)
                    })),
                    (DenseForm::Coded { .. }, _) => {}
                    _ => keys.push(dense(tensor, shape, tokens)),
                }
            }
            Tensor::Layer(id, _) => layers[id.index()].keys.push(dense(tensor, shape, tokens)),
            // One row of logits per sequence. Rows of the embedding are copied, not multiplied.
            Tensor::Head => ends.push(dense(tensor, shape, sequences)),
            Tensor::Embedding if spec.tied_embeddings => ends.push(dense(tensor, shape, sequences)),
            Tensor::Embedding | Tensor::FinalNorm => {}
        }
    }
    let mut step = MoeStep {
        layers,
        ends,
        tokens: small(tokens),
        threads,
        working_set_bytes: 0,
    };
    let in_memory = |expert: &&RoutedExpert| expert.home == Home::Memory;
    let routed = step.layers.iter().flat_map(|l| &l.experts).filter(in_memory);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bytes of a model"
    )]
    let expert_bytes = routed.map(|e| e.key.weight_bytes()).sum::<f64>() as u64;
    step.working_set_bytes =
        dense_bytes(&step) + expert_bytes + sequences as u64 * KvCache::bytes_for(spec, held.kv, keys);
    step
}

/// Bytes of all dense matrices of a step, as the engine holds them.
pub fn dense_bytes(step: &MoeStep) -> u64 {
    let keys = step.layers.iter().flat_map(|layer| &layer.keys).chain(&step.ends);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bytes of matrices"
    )]
    let bytes = |key: &Key| match key {
        Key::Dense(dense) => dense.weight_bytes() as u64,
        Key::Expert(mlp) => mlp.weight_bytes() as u64,
        _ => 0,
    };
    keys.map(bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic;

    /// Weights that one token reads, by kind.
    fn count(step: &MoeStep) -> (u64, f64) {
        let experts = step.layers.iter().flat_map(|l| &l.experts);
        (dense_bytes(step) / 4, experts.map(|e| e.share).sum())
    }

    #[test]
    fn a_step_counts_every_weight_that_a_token_reads() {
        for name in synthetic::names() {
            let spec = synthetic::spec(name, None).unwrap();
            let pass = Pass::Decode { context: 100, batch: 1 };
            let step = step(&spec, pass, 2, &Held::F32, |_| uniform_experts(&spec, 4, 2));
            let (dense, shares) = count(&step);
            let matrices = inventory::tensors(&spec).into_iter().filter(|(tensor, shape)| {
                let is_read = match tensor {
                    Tensor::Embedding => spec.tied_embeddings,
                    Tensor::Layer(_, LayerTensor::Expert(..)) => false,
                    _ => true,
                };
                shape.len() == 2 && is_read
            });
            let expected: usize = matrices.map(|(_, shape)| shape[0] * shape[1]).sum();
            assert_eq!(dense, expected as u64, "{name}");
            let calls = spec.moe_layers().len() * spec.routing.top_k;
            assert!((shares - calls as f64).abs() < 1e-9 * shares, "{name}");
            assert_eq!((step.tokens, step.layers.len()), (1, spec.layers.len()));
        }
    }

    #[test]
    fn codes_are_counted_as_they_are_held_and_mlps_of_codes_are_experts() {
        let spec = synthetic::spec("qwen1.5-moe-a2.7b", Some(2)).unwrap();
        let coded = |tensor, shape: &[usize]| {
            if crate::coded_dense::is_coded(tensor, shape) {
                DenseForm::Coded { bits: 8, group: 32 }
            } else {
                DenseForm::F32
            }
        };
        let held = Held {
            dense: &coded,
            kv: KvKind::F16,
        };
        let step = step(&spec, Pass::Decode { context: 64, batch: 1 }, 2, &held, |_| Vec::new());
        let keys = &step.layers[1].keys;
        let mlps: Vec<_> = keys
            .iter()
            .filter(|k| matches!(k, Key::Expert(e) if (e.experts, e.inner, e.bits) == (1, 5632, 8)))
            .collect();
        assert_eq!(mlps.len(), 1);
        assert!(keys.iter().any(|k| matches!(k, Key::Glue(g) if g.inner == 0)));
        assert!(keys.iter().any(|k| matches!(k, Key::Attention(a) if a.kv_bits == 16)));
        // All that is held but the embedding and vectors is read.
        let embedding = matrix_bytes(
            coded(Tensor::Embedding, &[spec.vocab, spec.hidden]),
            spec.vocab,
            spec.hidden,
        );
        let (read, all) = (dense_bytes(&step), held_bytes(&spec, &held));
        assert!(
            read < all - embedding && read > all - embedding - (1 << 20),
            "{read} {all} {embedding}"
        );
    }

    #[test]
    fn a_prefill_has_all_tokens_in_layers_and_one_row_of_logits() {
        let spec = synthetic::spec("olmoe-1b-7b", Some(1)).unwrap();
        let step = step(&spec, Pass::Prefill { tokens: 300 }, 1, &Held::F32, |_| {
            uniform_experts(&spec, 4, 1)
        });
        let tokens: Vec<u32> = step.layers[0]
            .keys
            .iter()
            .map(|key| match key {
                Key::Dense(d) => d.tokens,
                Key::Attention(a) => a.tokens,
                Key::Glue(g) => g.tokens,
                _ => 0,
            })
            .collect();
        assert!(tokens.iter().all(|&t| t == 300), "{tokens:?}");
        assert!(matches!(step.ends[..], [Key::Dense(d)] if d.tokens == 1 && d.outputs == 50304));
        let batch = self::step(&spec, Pass::Decode { context: 9, batch: 4 }, 1, &Held::F32, |_| {
            Vec::new()
        });
        assert!(
            batch.layers[0]
                .keys
                .iter()
                .any(|k| matches!(k, Key::Attention(a) if (a.sequences, a.tokens, a.keys) == (4, 1, 9)))
        );
    }
}
