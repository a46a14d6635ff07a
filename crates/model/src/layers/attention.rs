//! Attention of one layer over a KV cache. Keys are read in blocks that begin at absolute multiples of [`KEY_BLOCK`];
//! each gives a partial (max, sum, mix), merged in order. Law: equal to softmax over all keys at once
//! (`attend_reference`), and the same bits whatever the thread count. How queries, keys and values come about:
//! `grouped` and `latent`.

use rayon::prelude::*;

use super::grouped::Grouped;
use super::latent::Latent;
use super::linear::Linear;
use super::product::{Tile, mix, product};
use super::norm::rms_norm;
use super::rope::Rope;
use super::router::max;
use crate::checkpoint::{CheckpointError, TensorSource};
use crate::families::{Family, LayerTensor, Tensor};
use crate::spec::{AttentionKind, AttentionSpec, ModelSpec};
use cotk_run::units::LayerId;

/// Keys of one block.
pub const KEY_BLOCK: usize = 64;
/// Queries of one job.
const QUERY_BLOCK: usize = 64;

/// Keys and values of one layer of one sequence.
#[derive(Debug, Clone)]
pub struct LayerCache {
    key_dim: usize,
    value_dim: usize,
    /// Per key head, `[positions, key_dim]`, turned.
    keys: Vec<Vec<f32>>,
    /// Per key head, `[positions, value_dim]`. None where a value is the first `value_dim` elements of its key
    /// (latent attention).
    values: Vec<Vec<f32>>,
}

impl LayerCache {
    /// Nothing cached: the next token stands at position 0.
    pub fn new(spec: &AttentionSpec) -> Self {
        Self::of(&Heads::new(spec, None))
    }

    fn of(heads: &Heads) -> Self {
        Self {
            key_dim: heads.key_dim,
            value_dim: heads.value_dim,
            keys: vec![Vec::new(); heads.kv_heads],
            values: vec![Vec::new(); if heads.values_are_keys { 0 } else { heads.kv_heads }],
        }
    }

    /// Positions cached.
    pub fn positions(&self) -> usize {
        self.keys[0].len() / self.key_dim
    }

    /// Forgets what follows the first `positions`.
    pub fn truncate(&mut self, positions: usize) {
        self.keys
            .iter_mut()
            .for_each(|rows| rows.truncate(positions * self.key_dim));
        self.values
            .iter_mut()
            .for_each(|rows| rows.truncate(positions * self.value_dim));
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let values: usize = self.keys.iter().chain(&self.values).map(Vec::len).sum();
        values as u64 * 4
    }

    /// Appends rows of `[tokens, kv_heads · key_dim]` and of `[tokens, kv_heads · value_dim]`; no values where keys
    /// hold them.
    fn append(&mut self, keys: &[f32], values: &[f32]) {
        for (rows, width, cached) in [
            (keys, self.key_dim, &mut self.keys),
            (values, self.value_dim, &mut self.values),
        ] {
            for row in rows.chunks_exact((width * cached.len()).max(1)) {
                for (head, cached) in row.chunks_exact(width).zip(cached.iter_mut()) {
                    cached.extend_from_slice(head);
                }
            }
        }
    }

    /// Values of some positions of one head, and how far their rows lie apart.
    fn values(&self, head: usize, positions: std::ops::Range<usize>) -> (&[f32], usize) {
        match self.values.get(head) {
            Some(values) => (
                &values[positions.start * self.value_dim..positions.end * self.value_dim],
                self.value_dim,
            ),
            None => (
                &self.keys[head][positions.start * self.key_dim..positions.end * self.key_dim],
                self.key_dim,
            ),
        }
    }
}

/// New tokens of one sequence, after what its cache holds.
pub struct Span<'a> {
    pub tokens: usize,
    pub cache: &'a mut LayerCache,
}

/// What stands between projections: widths as scores see them (latent attention has one key head that all query heads
/// share), and the window.
#[derive(Debug, Clone)]
pub struct Heads {
    heads: usize,
    /// Divides `heads`.
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    /// A value is the beginning of its key.
    values_are_keys: bool,
    /// Multiplies scores.
    scale: f32,
    window: Option<usize>,
}

impl Heads {
    /// For layers of `spec`; `window` as in [`LayerSpec`](crate::spec::LayerSpec).
    pub fn new(spec: &AttentionSpec, window: Option<usize>) -> Self {
        let (heads, scale) = (spec.heads, spec.scale);
        match spec.kind {
            AttentionKind::Grouped { .. } => Self {
                heads,
                kv_heads: spec.kv_heads,
                key_dim: spec.head_dim,
                value_dim: spec.head_dim,
                values_are_keys: false,
                scale,
                window,
            },
            AttentionKind::Latent { kv_rank, .. } => Self {
                heads,
                kv_heads: 1,
                key_dim: kv_rank + spec.rope.dim,
                value_dim: kv_rank,
                values_are_keys: true,
                scale,
                window,
            },
        }
    }

    /// Appends the keys and values of the new tokens of all spans to their caches, and mixes values by softmax:
    /// `[tokens, heads · value_dim]`, where latent attention's value is the latent vector.
    ///
    /// # Panics
    /// When the spans do not cover the rows.
    pub fn attend(&self, rows: &Rows, spans: &mut [Span<'_>]) -> Vec<f32> {
        let Heads {
            heads,
            kv_heads,
            key_dim,
            value_dim,
            ..
        } = *self;
        let (q_width, k_width, out_width) = (heads * key_dim, kv_heads * key_dim, heads * value_dim);
        let v_width = if self.values_are_keys { 0 } else { kv_heads * value_dim };
        let Rows { queries, keys, values } = rows;
        let mut row = 0;
        for span in &mut *spans {
            let end = row + span.tokens;
            span.cache.append(
                &keys[row * k_width..end * k_width],
                &values[row * v_width..end * v_width],
            );
            row = end;
        }
        assert_eq!(row * q_width, queries.len(), "spans cover the rows of hidden");

        let mut mixed = vec![0.0; row * out_width];
        let mut jobs = Vec::new();
        let (mut rest_q, mut rest_out) = (queries.as_slice(), mixed.as_mut_slice());
        for span in spans.iter() {
            let mut position = span.cache.positions() - span.tokens;
            let mut left = span.tokens;
            while left > 0 {
                // Query blocks end at absolute multiples too: a token meets the same blocks however it is batched.
                let tokens = left.min(QUERY_BLOCK - position % QUERY_BLOCK);
                let (q, q_after) = rest_q.split_at(tokens * q_width);
                let (out, out_after) = rest_out.split_at_mut(tokens * out_width);
                jobs.push((&*span.cache, position, q, out));
                (rest_q, rest_out) = (q_after, out_after);
                position += tokens;
                left -= tokens;
            }
        }
        jobs.into_par_iter()
            .for_each(|(cache, position, q, out)| self.block(cache, position, q, out));
        mixed
    }

    /// Attention of one block of queries, the first at `position`; `q` is `[tokens, heads · key_dim]` and `out`
    /// `[tokens, heads · value_dim]`.
    fn block(&self, cache: &LayerCache, position: usize, q: &[f32], out: &mut [f32]) {
        let Heads {
            heads,
            kv_heads,
            key_dim,
            value_dim,
            scale,
            ..
        } = *self;
        let (q_width, out_width) = (heads * key_dim, heads * value_dim);
        let (tokens, group) = (q.len() / q_width, heads / kv_heads);
        let rows = tokens * group;
        let first_key = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let last_key = position + tokens; // exclusive
        let mut block_q = vec![0.0; rows * key_dim]; // [tokens · group, key_dim], scaled
        let mut scores = vec![0.0; rows * KEY_BLOCK];
        let mut partial = vec![0.0; rows * value_dim];
        let mut merged = Merged::new(rows, value_dim);
        for kv_head in 0..kv_heads {
            let from = kv_head * group * key_dim..(kv_head + 1) * group * key_dim;
            for (to, row) in block_q.chunks_exact_mut(group * key_dim).zip(q.chunks_exact(q_width)) {
                for (to, from) in to.iter_mut().zip(&row[from.clone()]) {
                    *to = from * scale;
                }
            }
            merged.clear();
            for start in (first_key / KEY_BLOCK * KEY_BLOCK..last_key).step_by(KEY_BLOCK) {
                let end = last_key.min(start + KEY_BLOCK);
                let keys = &cache.keys[kv_head][start * key_dim..end * key_dim];
                let (values, stride) = cache.values(kv_head, start..end);
                let count = end - start;
                let scores = &mut scores[..rows * count];
                product(&block_q, keys, key_dim, &mut Tile::new(scores, count));
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
                mix(scores, values, count, stride, &mut Tile::new(&mut partial, value_dim));
                merged.add(&partial);
            }
            let to = kv_head * group * value_dim..(kv_head + 1) * group * value_dim;
            for (row, out) in out.chunks_exact_mut(out_width).enumerate() {
                let from = &merged.mixes[row * group * value_dim..][..group * value_dim];
                let sums = &merged.sums[row * group..][..group];
                let out = out[to.clone()].chunks_exact_mut(value_dim);
                for ((out, from), sum) in out.zip(from.chunks_exact(value_dim)).zip(sums) {
                    out.iter_mut().zip(from).for_each(|(out, from)| *out = from / sum);
                }
            }
        }
    }
}

/// What new tokens ask and leave, positions turned in: rows of `[tokens, heads · key_dim]`, `[tokens, kv_heads · key_dim]` and
/// `[tokens, kv_heads · value_dim]` (empty where keys hold the values).
pub struct Rows {
    pub queries: Vec<f32>,
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

#[derive(Debug, Clone)]
enum Projections {
    Grouped(Grouped),
    Latent(Latent),
}

/// Norm, projections and heads of one layer.
#[derive(Debug, Clone)]
pub struct Attention {
    heads: Heads,
    eps: f32,
    norm: Vec<f32>,
    projections: Projections,
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
        let attention = &spec.attention;
        let (projections, value_width, has_bias) = match attention.kind {
            AttentionKind::Grouped { output_bias, .. } => (
                Projections::Grouped(Grouped::load(spec, source, name)?),
                attention.heads * attention.head_dim,
                output_bias,
            ),
            AttentionKind::Latent { value_dim, bias, .. } => (
                Projections::Latent(Latent::load(spec, source, name)?),
                attention.heads * value_dim,
                bias,
            ),
        };
        let mut output = Linear::load(source, &name(LayerTensor::Output), [spec.hidden, value_width])?;
        if has_bias {
            output = output.with_bias(source, &name(LayerTensor::OutputBias))?;
        }
        Ok(Self {
            heads: Heads::new(attention, spec.layers[layer.index()].window),
            eps: spec.norm_eps,
            norm: source.load_f32(&name(LayerTensor::AttentionNorm), &[spec.hidden])?,
            projections,
            output,
        })
    }

    /// `hidden += attention(norm(hidden))` for the new tokens of all spans, whose rows follow each other in `hidden`
    /// `[tokens, hidden]`; their keys and values go into the caches.
    pub fn attend(&self, rope: &Rope, hidden: &mut [f32], spans: &mut [Span<'_>]) {
        let normed = rms_norm(hidden, &self.norm, self.eps);
        let starts: Vec<(usize, usize)> = spans.iter().map(|s| (s.cache.positions(), s.tokens)).collect();
        let rows = match &self.projections {
            Projections::Grouped(grouped) => grouped.rows(rope, &normed, &starts),
            Projections::Latent(latent) => latent.rows(rope, &normed, &starts),
        };
        let mixed = self.heads.attend(&rows, spans);
        let mixed = match &self.projections {
            Projections::Grouped(_) => mixed,
            Projections::Latent(latent) => latent.values(&mixed),
        };
        for (hidden, add) in hidden.iter_mut().zip(self.output.apply(&mixed)) {
            *hidden += add;
        }
    }
}

/// Softmax over blocks of keys, one row per query and head (Milakov and Gimelshein, 2018).
struct Merged {
    value_dim: usize,
    /// Largest score so far.
    maxima: Vec<f32>,
    /// Σ exp(score − max).
    sums: Vec<f32>,
    /// Σ exp(score − max) · value, `[rows, value_dim]`.
    mixes: Vec<f32>,
    /// Of the block at hand.
    block_maxima: Vec<f32>,
    block_sums: Vec<f32>,
}

impl Merged {
    fn new(rows: usize, value_dim: usize) -> Self {
        Self {
            value_dim,
            maxima: vec![f32::NEG_INFINITY; rows],
            sums: vec![0.0; rows],
            mixes: vec![0.0; rows * value_dim],
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
            .chunks_exact_mut(self.value_dim)
            .zip(partial.chunks_exact(self.value_dim));
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

/// The plain reference of one head at one position: softmax over all seen keys at once, in f64, scores times `scale`.
/// `keys` is `[positions, q.len()]`; row j of the values is the first `value_dim` elements at `values[j * stride]`.
pub fn attend_reference(
    q: &[f32],
    keys: &[f32],
    (values, stride, value_dim): (&[f32], usize, usize),
    scale: f32,
    seen: std::ops::Range<usize>,
) -> Vec<f64> {
    let (width, scale) = (q.len(), f64::from(scale));
    let dot = |key: &[f32]| -> f64 { q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum() };
    let scores: Vec<f64> = seen.clone().map(|j| dot(&keys[j * width..][..width]) * scale).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; value_dim];
    for (j, weight) in seen.zip(&weights) {
        for (out, value) in out.iter_mut().zip(&values[j * stride..][..value_dim]) {
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Law: blocks merged in order equal softmax over all seen keys at once: with and without a window, values
        /// apart from keys or inside them.
        #[test]
        fn blocks_equal_reference(
            past in 0usize..200, tokens in 1usize..64, kv_heads in 1usize..3, group in 1usize..3,
            key_dim in 2usize..12, value_dim in 1usize..12, values_are_keys: bool,
            window in proptest::option::of(1usize..150), sharp: bool,
        ) {
            let tokens = tokens.min(QUERY_BLOCK - past % QUERY_BLOCK);
            let value_dim = if values_are_keys { value_dim.min(key_dim) } else { value_dim };
            let scale = 0.4;
            let heads = Heads { heads: kv_heads * group, kv_heads, key_dim, value_dim, values_are_keys, scale, window };
            let mut stream = Seeds::new(5).stream("attention");
            let mut draw = |count: usize, size: f32| -> Vec<f32> {
                (0..count).map(|_| stream.random_range(-size..size)).collect()
            };
            let mut cache = LayerCache::of(&heads);
            let keys = (past + tokens) * kv_heads * key_dim;
            let values = if values_are_keys { 0 } else { (past + tokens) * kv_heads * value_dim };
            cache.append(&draw(keys, if sharp { 20.0 } else { 1.0 }), &draw(values, 1.0));
            prop_assert_eq!(cache.positions(), past + tokens);
            let q = draw(tokens * heads.heads * key_dim, 2.0);
            let mut out = vec![f32::NAN; tokens * heads.heads * value_dim];
            heads.block(&cache, past, &q, &mut out);
            let bound = if values_are_keys && sharp { 4e-4 } else { 2e-5 };
            for token in 0..tokens {
                for head in 0..heads.heads {
                    let at = token * heads.heads + head;
                    let to = past + token + 1;
                    let from = window.map_or(0, |w| to.saturating_sub(w));
                    let kv = head / group;
                    let (values, stride) = cache.values(kv, 0..to);
                    let q = &q[at * key_dim..][..key_dim];
                    let truth = attend_reference(q, &cache.keys[kv], (values, stride, value_dim), scale, from..to);
                    for (found, truth) in out[at * value_dim..][..value_dim].iter().zip(truth) {
                        prop_assert!((f64::from(*found) - truth).abs() < bound, "{} {}", found, truth);
                    }
                }
            }
        }
    }

    #[test]
    fn a_truncated_cache_is_the_shorter_one() {
        for values_are_keys in [false, true] {
            let heads = Heads {
                heads: 2,
                kv_heads: 2,
                key_dim: 3,
                value_dim: 2,
                values_are_keys,
                scale: 1.0,
                window: None,
            };
            let keys: Vec<f32> = (0..30u8).map(f32::from).collect();
            let values = if values_are_keys { &[] } else { &keys[..20] };
            let (mut long, mut short) = (LayerCache::of(&heads), LayerCache::of(&heads));
            long.append(&keys, values);
            short.append(&keys[..18], &values[..values.len() * 3 / 5]);
            long.truncate(3);
            assert_eq!((long.positions(), long.bytes()), (3, short.bytes()));
            assert_eq!((&long.keys, &long.values), (&short.keys, &short.values));
        }
    }
}
