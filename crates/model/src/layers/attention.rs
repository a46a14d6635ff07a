//! Grouped-query attention over a KV cache. Keys are read in blocks that begin at absolute multiples of
//! [`KEY_BLOCK`]; each gives a partial (max, sum, mix), merged in order. Law: equal to softmax over all keys at once
//! (`attend_reference`), and the same bits whatever the thread count.

use rayon::prelude::*;

use super::linear::{Linear, Tile, mix, product};
use super::norm::rms_norm;
use super::rope::Rope;
use super::router::max;
use crate::checkpoint::{CheckpointError, TensorSource};
use crate::families::{Family, LayerTensor, Tensor};
use crate::spec::{AttentionSpec, ModelSpec};
use cotk_run::units::LayerId;

/// Keys of one block.
pub const KEY_BLOCK: usize = 64;
/// Queries of one job.
const QUERY_BLOCK: usize = 64;

/// Keys and values of one layer of one sequence.
#[derive(Debug, Clone)]
pub struct LayerCache {
    head_dim: usize,
    /// Per key head, `[positions, head_dim]`, turned.
    keys: Vec<Vec<f32>>,
    /// Per key head, `[positions, head_dim]`.
    values: Vec<Vec<f32>>,
}

impl LayerCache {
    /// Nothing cached: the next token stands at position 0.
    pub fn new(spec: &AttentionSpec) -> Self {
        Self {
            head_dim: spec.head_dim,
            keys: vec![Vec::new(); spec.kv_heads],
            values: vec![Vec::new(); spec.kv_heads],
        }
    }

    /// Positions cached.
    pub fn positions(&self) -> usize {
        self.keys[0].len() / self.head_dim
    }

    /// Forgets what follows the first `positions`.
    pub fn truncate(&mut self, positions: usize) {
        for rows in self.keys.iter_mut().chain(&mut self.values) {
            rows.truncate(positions * self.head_dim);
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let values: usize = self.keys.iter().chain(&self.values).map(Vec::len).sum();
        values as u64 * 4
    }

    /// Appends rows of `[tokens, kv_heads · head_dim]`.
    fn append(&mut self, keys: &[f32], values: &[f32]) {
        let width = self.keys.len() * self.head_dim;
        for (rows, cached) in [(keys, &mut self.keys), (values, &mut self.values)] {
            for row in rows.chunks_exact(width) {
                for (head, cached) in row.chunks_exact(self.head_dim).zip(cached.iter_mut()) {
                    cached.extend_from_slice(head);
                }
            }
        }
    }
}

/// New tokens of one sequence, after what its cache holds.
pub struct Span<'a> {
    pub tokens: usize,
    pub cache: &'a mut LayerCache,
}

/// Norm, projections and heads of one layer.
#[derive(Debug, Clone)]
pub struct Attention {
    spec: AttentionSpec,
    window: Option<usize>,
    eps: f32,
    norm: Vec<f32>,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
}

impl Attention {
    pub(super) fn load(
        spec: &ModelSpec,
        family: &dyn Family,
        source: &dyn TensorSource,
        layer: LayerId,
    ) -> Result<Self, CheckpointError> {
        let name = |part| family.tensor_name(Tensor::Layer(layer, part));
        let AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            qkv_bias,
            ..
        } = spec.attention;
        let linear = |weight, bias, outputs| {
            let linear = Linear::load(source, &name(weight), [outputs, spec.hidden])?;
            if qkv_bias {
                linear.with_bias(source, &name(bias))
            } else {
                Ok(linear)
            }
        };
        Ok(Self {
            window: spec.layers[layer.index()].window,
            eps: spec.norm_eps,
            norm: source.load_f32(&name(LayerTensor::AttentionNorm), &[spec.hidden])?,
            query: linear(LayerTensor::Query, LayerTensor::QueryBias, heads * head_dim)?,
            key: linear(LayerTensor::Key, LayerTensor::KeyBias, kv_heads * head_dim)?,
            value: linear(LayerTensor::Value, LayerTensor::ValueBias, kv_heads * head_dim)?,
            output: Linear::load(source, &name(LayerTensor::Output), [spec.hidden, heads * head_dim])?,
            spec: spec.attention.clone(),
        })
    }

    /// `hidden += attention(norm(hidden))` for the new tokens of all spans, whose rows follow each other in `hidden`
    /// `[tokens, hidden]`; their keys and values go into the caches.
    pub fn attend(&self, rope: &Rope, hidden: &mut [f32], spans: &mut [Span<'_>]) {
        let normed = rms_norm(hidden, &self.norm, self.eps);
        let mut queries = self.query.apply(&normed);
        let mut keys = self.key.apply(&normed);
        let values = self.value.apply(&normed);
        let (q_width, kv_width) = (self.query.outputs(), self.key.outputs());
        let mut row = 0;
        for span in &mut *spans {
            let start = span.cache.positions();
            let rows = row..row + span.tokens;
            rope.turn(&mut queries[rows.start * q_width..rows.end * q_width], start, q_width);
            let kv = rows.start * kv_width..rows.end * kv_width;
            rope.turn(&mut keys[kv.clone()], start, kv_width);
            span.cache.append(&keys[kv.clone()], &values[kv]);
            row = rows.end;
        }
        assert_eq!(row * q_width, queries.len(), "spans cover the rows of hidden");

        let mut mixed = vec![0.0; queries.len()];
        let mut jobs = Vec::new();
        let (mut rest_q, mut rest_out) = (queries.as_slice(), mixed.as_mut_slice());
        for span in spans.iter() {
            let mut position = span.cache.positions() - span.tokens;
            let mut left = span.tokens;
            while left > 0 {
                // Query blocks end at absolute multiples too: a token meets the same blocks however it is batched.
                let tokens = left.min(QUERY_BLOCK - position % QUERY_BLOCK);
                let (q, q_after) = rest_q.split_at(tokens * q_width);
                let (out, out_after) = rest_out.split_at_mut(tokens * q_width);
                jobs.push((&*span.cache, position, q, out));
                (rest_q, rest_out) = (q_after, out_after);
                position += tokens;
                left -= tokens;
            }
        }
        jobs.into_par_iter()
            .for_each(|(cache, position, q, out)| self.block(cache, position, q, out));

        for (hidden, add) in hidden.iter_mut().zip(self.output.apply(&mixed)) {
            *hidden += add;
        }
    }

    /// Attention of one block of queries, the first at `position`; `q` and `out` are `[tokens, heads · head_dim]`.
    fn block(&self, cache: &LayerCache, position: usize, q: &[f32], out: &mut [f32]) {
        let AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.spec;
        let width = heads * head_dim;
        let (tokens, group) = (q.len() / width, heads / kv_heads);
        let rows = tokens * group;
        let first_key = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let last_key = position + tokens; // exclusive
        #[expect(clippy::cast_precision_loss, reason = "head widths are small")]
        let scale = (head_dim as f32).powf(-0.5);
        let mut block_q = vec![0.0; rows * head_dim]; // [tokens · group, head_dim], scaled
        let mut scores = vec![0.0; rows * KEY_BLOCK];
        let mut partial = vec![0.0; rows * head_dim];
        let mut merged = Merged::new(rows, head_dim);
        for kv_head in 0..kv_heads {
            let columns = kv_head * group * head_dim..(kv_head + 1) * group * head_dim;
            for (to, row) in block_q.chunks_exact_mut(group * head_dim).zip(q.chunks_exact(width)) {
                for (to, from) in to.iter_mut().zip(&row[columns.clone()]) {
                    *to = from * scale;
                }
            }
            merged.clear();
            for start in (first_key / KEY_BLOCK * KEY_BLOCK..last_key).step_by(KEY_BLOCK) {
                let end = last_key.min(start + KEY_BLOCK);
                let keys = &cache.keys[kv_head][start * head_dim..end * head_dim];
                let values = &cache.values[kv_head][start * head_dim..end * head_dim];
                let count = end - start;
                let scores = &mut scores[..rows * count];
                product(&block_q, keys, head_dim, &mut Tile::new(scores, count));
                for (row, scores) in scores.chunks_exact_mut(count).enumerate() {
                    let query = position + row / group;
                    let seen_from = self.window.map_or(0, |window| (query + 1).saturating_sub(window));
                    merged.weigh(
                        row,
                        scores,
                        seen_from.max(start) - start,
                        (query + 1).clamp(start, end) - start,
                    );
                }
                mix(scores, values, count, &mut Tile::new(&mut partial, head_dim));
                merged.add(&partial);
            }
            for (row, to) in out.chunks_exact_mut(width).enumerate() {
                let from = &merged.mixes[row * group * head_dim..][..group * head_dim];
                let sums = &merged.sums[row * group..][..group];
                let to = to[columns.clone()].chunks_exact_mut(head_dim);
                for ((to, from), sum) in to.zip(from.chunks_exact(head_dim)).zip(sums) {
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = from / sum);
                }
            }
        }
    }
}

/// Softmax over blocks of keys, one row per query and head (Milakov and Gimelshein, 2018).
struct Merged {
    head_dim: usize,
    /// Largest score so far.
    maxima: Vec<f32>,
    /// Σ exp(score − max).
    sums: Vec<f32>,
    /// Σ exp(score − max) · value, `[rows, head_dim]`.
    mixes: Vec<f32>,
    /// Of the block at hand.
    block_maxima: Vec<f32>,
    block_sums: Vec<f32>,
}

impl Merged {
    fn new(rows: usize, head_dim: usize) -> Self {
        Self {
            head_dim,
            maxima: vec![f32::NEG_INFINITY; rows],
            sums: vec![0.0; rows],
            mixes: vec![0.0; rows * head_dim],
            block_maxima: vec![f32::NEG_INFINITY; rows],
            block_sums: vec![0.0; rows],
        }
    }

    fn clear(&mut self) {
        self.maxima.fill(f32::NEG_INFINITY);
        self.sums.fill(0.0);
        self.mixes.fill(0.0);
    }

    /// Turns a row's scores of one block into weights exp(score − block max); keys outside `from..to` get 0.
    fn weigh(&mut self, row: usize, scores: &mut [f32], from: usize, to: usize) {
        let to = to.max(from).min(scores.len());
        let from = from.min(to);
        scores[..from].fill(0.0);
        scores[to..].fill(0.0);
        let seen = &mut scores[from..to];
        let max = max(seen);
        let mut sum = 0.0;
        for score in seen {
            *score = (*score - max).exp();
            sum += *score;
        }
        self.block_maxima[row] = max;
        self.block_sums[row] = sum;
    }

    /// Merges the block at hand; `partial` is its Σ weight · value.
    fn add(&mut self, partial: &[f32]) {
        let rows = self
            .mixes
            .chunks_exact_mut(self.head_dim)
            .zip(partial.chunks_exact(self.head_dim));
        for (row, (mixed, partial)) in rows.enumerate() {
            let block_max = self.block_maxima[row];
            if block_max == f32::NEG_INFINITY {
                continue; // the row sees no key of this block
            }
            let max = self.maxima[row].max(block_max);
            let (keep, take) = ((self.maxima[row] - max).exp(), (block_max - max).exp());
            self.maxima[row] = max;
            self.sums[row] = self.sums[row] * keep + self.block_sums[row] * take;
            for (mixed, partial) in mixed.iter_mut().zip(partial) {
                *mixed = *mixed * keep + partial * take;
            }
        }
    }
}

/// The plain reference of one head at one position: softmax over all seen keys at once, in f64.
/// `keys` and `values` are `[positions, q.len()]`.
pub fn attend_reference(q: &[f32], keys: &[f32], values: &[f32], seen: std::ops::Range<usize>) -> Vec<f64> {
    let width = q.len();
    #[expect(clippy::cast_precision_loss, reason = "head widths are small")]
    let scale = (width as f64).powf(-0.5);
    let dot = |key: &[f32]| -> f64 { q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum() };
    let scores: Vec<f64> = seen.clone().map(|j| dot(&keys[j * width..][..width]) * scale).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; width];
    for (j, weight) in seen.zip(&weights) {
        for (out, value) in out.iter_mut().zip(&values[j * width..][..width]) {
            *out += weight / sum * f64::from(*value);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use cotk_run::seeds::Seeds;
    use proptest::prelude::*;
    use rand::RngExt;

    use super::*;
    use crate::spec::{RopeScaling, RopeSpec};

    fn attention(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> Attention {
        let hidden = 4;
        let zeros = |outputs: usize, inputs: usize| Linear::new(vec![0.0; outputs * inputs], outputs, inputs);
        Attention {
            spec: AttentionSpec {
                heads,
                kv_heads,
                head_dim,
                qkv_bias: false,
                rope: RopeSpec {
                    theta: 1e4,
                    scaling: RopeScaling::None,
                },
            },
            window,
            eps: 1e-6,
            norm: vec![1.0; hidden],
            query: zeros(heads * head_dim, hidden),
            key: zeros(kv_heads * head_dim, hidden),
            value: zeros(kv_heads * head_dim, hidden),
            output: zeros(hidden, heads * head_dim),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Law: blocks merged in order equal softmax over all seen keys at once, with and without a window.
        #[test]
        fn blocks_equal_reference(
            past in 0usize..200, tokens in 1usize..64, kv_heads in 1usize..3, group in 1usize..3,
            half in 1usize..6, window in proptest::option::of(1usize..150), sharp: bool,
        ) {
            let tokens = tokens.min(QUERY_BLOCK - past % QUERY_BLOCK);
            let (heads, head_dim) = (kv_heads * group, 2 * half);
            let attention = attention(heads, kv_heads, head_dim, window);
            let mut stream = Seeds::new(5).stream("attention");
            let mut draw = |count: usize, size: f32| -> Vec<f32> {
                (0..count).map(|_| stream.random_range(-size..size)).collect()
            };
            let mut cache = LayerCache::new(&attention.spec);
            let count = (past + tokens) * kv_heads * head_dim;
            cache.append(&draw(count, if sharp { 20.0 } else { 1.0 }), &draw(count, 1.0));
            let q = draw(tokens * heads * head_dim, 2.0);
            let mut out = vec![f32::NAN; q.len()];
            attention.block(&cache, past, &q, &mut out);
            for token in 0..tokens {
                for head in 0..heads {
                    let at = (token * heads + head) * head_dim;
                    let to = past + token + 1;
                    let from = window.map_or(0, |w| to.saturating_sub(w));
                    let kv = head / group;
                    let truth = attend_reference(&q[at..at + head_dim], &cache.keys[kv], &cache.values[kv], from..to);
                    for (found, truth) in out[at..at + head_dim].iter().zip(truth) {
                        prop_assert!((f64::from(*found) - truth).abs() < 2e-5, "{} {}", found, truth);
                    }
                }
            }
        }
    }
}
