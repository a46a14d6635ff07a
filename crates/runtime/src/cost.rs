//! What one decoding step reads and computes, in the terms of the shared hardware model. Predicts nothing itself: the
//! answer is a `CostModel`'s. Law: compress and serve ask with the same numbers.

use cotk_container::manifest::{Manifest, State};
use cotk_latency::work::{DecodeStep, ExpertKey, Heat};
use cotk_model::families::{self, Tensor};
use cotk_model::folder::ModelFolder;
use cotk_model::model::KvCache;
use cotk_model::moe::Mode;
use cotk_model::spec::ModelSpec;

/// Context of the step that is asked about, in tokens (or the model's, where that is less).
pub const POSITIONS: usize = 512;

/// One token at one expert that reads `planes` planes of a `bits`-bit prefix, its weights in memory and not in cache.
pub fn expert_key(hidden: usize, inner: usize, bits: u32, planes: usize, group: usize, threads: u32) -> ExpertKey {
    let small = |n: usize| u32::try_from(n).expect("model sizes fit 32 bits");
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

/// Weights of a container's dense part that one token reads: all but the rows of an embedding that is not the head.
pub fn dense_weights_per_token(files: &ModelFolder) -> u64 {
    let spec = &files.spec;
    let embedding = families::of(spec).tensor_name(Tensor::Embedding);
    let is_read = |name: &String| spec.tied_embeddings || *name != embedding;
    let weights = |name: String| files.source.info(&name).map_or(0, |tensor| tensor.elements() as u64);
    files.source.names().into_iter().filter(is_read).map(weights).sum()
}

/// One token with every weight in memory: dense weights as the engine holds them (f32), experts at full width
/// (`exact`) or at the manifest's `little_bits`; each expert as often as calibration used it.
#[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^53")]
pub fn decode_step(manifest: &Manifest, spec: &ModelSpec, dense_weights: u64, mode: Mode, threads: u32) -> DecodeStep {
    let mut experts: Vec<(ExpertKey, f64)> = Vec::new();
    for layer in &manifest.layers {
        let kept = layer.experts.iter().filter_map(|e| match &e.state {
            State::Kept(record) => Some((record, e.why.tokens)),
            State::Dropped => None,
        });
        let tokens: u64 = kept.clone().map(|(_, tokens)| tokens).sum();
        let calls = spec.routing.top_k.min(layer.kept()) as f64;
        for (record, used) in kept {
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
            let key = expert_key(spec.hidden, format.rows(), bits, planes, format.group(), threads);
            // Traffic of dropped experts goes to the kept ones, in proportion; each is thought used once more.
            let share = calls * (used + 1) as f64 / (tokens + layer.kept() as u64) as f64;
            match experts.iter_mut().find(|(known, _)| *known == key) {
                Some((_, count)) => *count += share,
                None => experts.push((key, share)),
            }
        }
    }
    DecodeStep {
        dense_bytes: 4 * dense_weights + KvCache::bytes_for(spec, POSITIONS.min(spec.context)),
        experts,
        threads,
    }
}
