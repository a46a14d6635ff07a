//! Attention of one layer over a KV cache. Keys are read in blocks that begin at absolute multiples of [`KEY_BLOCK`], each
//! with a running maximum and sum; blocks of [`KEY_CHUNK`] keys make a partial result, merged in order. Law: equal to
//! softmax over all keys at once (`attend_reference`), and the same bits whatever the thread count. How queries, keys and
//! values come about: `grouped` and `latent`; how they are held: `cache`.

use std::cell::RefCell;
use std::ops::Range;

use cotk_kernels::cpu::gemm::Threads;
use cotk_kernels::cpu::rows;
use cotk_kernels::cpu::team;

use super::cache::{KvKind, LayerCache};
use super::clock::Part;
use super::grouped::Grouped;
use super::latent::Latent;
use super::linear::{Linear, isa, with_scratch};
use super::norm::rms_norm_to;
use super::product::{Tile, mix, product};
use super::rope::{Angles, Rope};
use super::router::max;
use super::running::{Running, decay, divide, merge};
use super::{Scratch, add};
use crate::checkpoint::{CheckpointError, TensorSource};
use crate::families::{Family, LayerTensor, Tensor};
use crate::spec::{AttentionKind, AttentionSpec, LayerSpec, ModelSpec};
use cotk_run::units::LayerId;

/// Keys of one block.
pub const KEY_BLOCK: usize = 64;
/// Keys of one partial result: what one thread reads of a long context for one token.
pub const KEY_CHUNK: usize = 4 * KEY_BLOCK;
/// Queries of one job.
const QUERY_BLOCK: usize = 64;
/// Rows of queries up to which keys are read as they are held; more are worth widening keys once.
const FEW_ROWS: usize = 16;
/// Multiply-adds below which a thread costs more than it brings. Decides who works, not what comes out.
const PARALLEL_FROM: usize = 1 << 18;

/// New tokens of one sequence, after what its cache holds.
pub struct Span<'a> {
    pub tokens: usize,
    pub cache: &'a mut LayerCache,
}

/// New tokens of several sequences, whose rows follow each other.
pub trait Spans: Sync {
    /// How many sequences.
    fn count(&self) -> usize;
    /// New tokens of one.
    fn tokens(&self, at: usize) -> usize;
    /// What it has cached in this layer.
    fn cache(&self, at: usize) -> &LayerCache;
    /// The same, to add to.
    fn cache_mut(&mut self, at: usize) -> &mut LayerCache;
}

impl Spans for [Span<'_>] {
    fn count(&self) -> usize {
        self.len()
    }

    fn tokens(&self, at: usize) -> usize {
        self[at].tokens
    }

    fn cache(&self, at: usize) -> &LayerCache {
        self[at].cache
    }

    fn cache_mut(&mut self, at: usize) -> &mut LayerCache {
        self[at].cache
    }
}

/// What stands between projections: widths as scores see them (latent attention has one key head that all query heads
/// share), and the window.
#[derive(Debug, Clone)]
pub struct Heads {
    pub(super) heads: usize,
    /// Divides `heads`.
    pub(super) kv_heads: usize,
    pub(super) key_dim: usize,
    pub(super) value_dim: usize,
    /// A value is the beginning of its key.
    pub(super) values_are_keys: bool,
    /// Multiplies scores.
    pub(super) scale: f32,
    pub(super) window: Option<usize>,
}

/// One job: queries of one sequence under one key head.
#[derive(Debug, Clone, Copy)]
struct Job {
    span: usize,
    /// First of the queries' rows.
    row: usize,
    tokens: usize,
    /// Of the first query.
    position: usize,
    kv_head: usize,
    /// The one chunk of keys of a lone query; `None`: all of them.
    chunk: Option<usize>,
}

/// What a thread needs for one job.
#[derive(Debug, Default)]
struct BlockScratch {
    /// `[rows, key_dim]`, scaled.
    queries: Vec<f32>,
    /// `[rows, keys of a block]`
    scores: Vec<f32>,
    /// What a row's earlier sum is multiplied by.
    keep: Vec<f32>,
    /// Keys and values of a block in f32.
    wide: Vec<f32>,
    partial: Vec<f32>,
    chunk: Running,
    whole: Running,
}

/// What the caller keeps between calls.
#[derive(Debug, Default)]
struct CallScratch {
    jobs: Vec<Job>,
    /// Of jobs of one chunk: maximum, sum and mix of each query head.
    partials: Vec<f32>,
}

thread_local! {
    static BLOCK: RefCell<BlockScratch> = RefCell::default();
    static CALL: RefCell<CallScratch> = RefCell::default();
}

impl Heads {
    /// For layers of `spec`; `window` as in [`LayerSpec`].
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

    /// For one layer, whose values may be narrower than the model's.
    pub fn of_layer(spec: &ModelSpec, layer: &LayerSpec) -> Self {
        let heads = Self::new(&spec.attention, layer.window);
        match spec.attention.kind {
            AttentionKind::Grouped { .. } => Self {
                value_dim: spec.value_dim(layer),
                ..heads
            },
            // What is cached and mixed are latent vectors, whatever values are made of them.
            AttentionKind::Latent { .. } => heads,
        }
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Appends the keys and values of the new tokens of all spans to their caches, and mixes values by softmax:
    /// `[tokens, heads · value_dim]`, where latent attention's value is the latent vector.
    ///
    /// # Panics
    /// When the spans do not cover the rows.
    pub fn attend(&self, rows: &Rows, spans: &mut [Span<'_>]) -> Vec<f32> {
        let mut mixed = Vec::new();
        self.attend_to(rows, spans, &mut mixed);
        mixed
    }

    /// [`attend`](Self::attend) into `mixed`, which is overwritten. Single tokens allocate nothing once threads have seen
    /// the like.
    ///
    /// # Panics
    /// As [`attend`](Self::attend).
    pub fn attend_to<S: Spans + ?Sized>(&self, rows: &Rows, spans: &mut S, mixed: &mut Vec<f32>) {
        let (q_width, k_width) = (self.heads * self.key_dim, self.kv_heads * self.key_dim);
        let v_width = if self.values_are_keys {
            0
        } else {
            self.kv_heads * self.value_dim
        };
        let mut row = 0;
        for at in 0..spans.count() {
            let end = row + spans.tokens(at);
            spans.cache_mut(at).append(
                &rows.keys[row * k_width..end * k_width],
                &rows.values[row * v_width..end * v_width],
            );
            row = end;
        }
        assert_eq!(row * q_width, rows.queries.len(), "spans cover the rows of hidden");
        mixed.clear();
        mixed.resize(row * self.heads * self.value_dim, 0.0);
        let spans: &S = spans;
        with_scratch(&CALL, |CallScratch { jobs, partials }| {
            let work = self.list_jobs(spans, jobs);
            let width = self.group() * (self.value_dim + 2);
            partials.resize(jobs.iter().filter(|job| job.chunk.is_some()).count() * width, 0.0);
            let (out, parts) = (
                Tile::new(mixed, self.heads * self.value_dim),
                Tile::new(partials, width.max(1)),
            );
            // Jobs of one chunk come first: their number is that of their partial result.
            let run = |at: usize| {
                let job = &jobs[at];
                let cache = spans.cache(job.span);
                with_scratch(&BLOCK, |scratch| {
                    self.gather(job, &rows.queries, scratch);
                    if let Some(chunk) = job.chunk {
                        let keys = chunk * KEY_CHUNK..((chunk + 1) * KEY_CHUNK).min(job.position + 1);
                        self.run_chunk(cache, job, keys, scratch);
                        // SAFETY: each job has a row of its own.
                        let mut part = unsafe { parts.part(at, 0, 1, width) };
                        self.put_partial(&scratch.chunk, part.row(0));
                    } else {
                        let group_width = self.group() * self.value_dim;
                        // SAFETY: jobs differ in rows or in key head.
                        let mut out = unsafe { out.part(job.row, job.kv_head * group_width, job.tokens, group_width) };
                        self.run_all(cache, job, scratch, &mut out);
                    }
                });
            };
            if work < PARALLEL_FROM {
                (0..jobs.len()).for_each(run);
            } else {
                team::run(jobs.len(), run);
            }
            self.merge_partials(jobs, partials, mixed);
        });
    }

    /// Fills `jobs`, those of lone queries first; returns multiply-adds.
    fn list_jobs<S: Spans + ?Sized>(&self, spans: &S, jobs: &mut Vec<Job>) -> usize {
        jobs.clear();
        let mut work = 0;
        for is_lone in [true, false] {
            let mut row = 0;
            for span in 0..spans.count() {
                let tokens = spans.tokens(span);
                let mut position = spans.cache(span).positions() - tokens;
                let mut left = tokens;
                while left > 0 {
                    // Query blocks end at absolute multiples too: a token meets the same blocks however it is batched.
                    let tokens = left.min(QUERY_BLOCK - position % QUERY_BLOCK);
                    if (tokens == 1) == is_lone {
                        let keys = self.first_key(position)..position + tokens;
                        work += tokens * keys.len() * self.heads * (self.key_dim + self.value_dim);
                        let job = Job {
                            span,
                            row,
                            tokens,
                            position,
                            kv_head: 0,
                            chunk: None,
                        };
                        for kv_head in 0..self.kv_heads {
                            if is_lone {
                                let chunks = keys.start / KEY_CHUNK..keys.end.div_ceil(KEY_CHUNK);
                                jobs.extend(chunks.map(|chunk| Job {
                                    kv_head,
                                    chunk: Some(chunk),
                                    ..job
                                }));
                            } else {
                                jobs.push(Job { kv_head, ..job });
                            }
                        }
                    }
                    row += tokens;
                    position += tokens;
                    left -= tokens;
                }
            }
        }
        work
    }

    /// The first key that a query sees.
    fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The queries of a job, `[tokens · group, key_dim]`, scaled.
    fn gather(&self, job: &Job, queries: &[f32], scratch: &mut BlockScratch) {
        let width = self.group() * self.key_dim;
        scratch.queries.clear();
        for row in job.row..job.row + job.tokens {
            let from = row * self.heads * self.key_dim + job.kv_head * width;
            let scaled = queries[from..from + width].iter().map(|q| q * self.scale);
            scratch.queries.extend(scaled);
        }
    }

    /// All keys that a job's queries see, chunk by chunk.
    fn run_all(&self, cache: &LayerCache, job: &Job, scratch: &mut BlockScratch, out: &mut Tile<'_>) {
        let (group, value_dim) = (self.group(), self.value_dim);
        scratch.whole.begin(job.tokens * group, value_dim);
        let (first, last) = (self.first_key(job.position), job.position + job.tokens);
        for chunk in first / KEY_CHUNK..last.div_ceil(KEY_CHUNK) {
            self.run_chunk(
                cache,
                job,
                chunk * KEY_CHUNK..((chunk + 1) * KEY_CHUNK).min(last),
                scratch,
            );
            let BlockScratch { whole, chunk, .. } = scratch;
            for row in 0..job.tokens * group {
                let to = &mut whole.mixes[row * value_dim..][..value_dim];
                let from = &chunk.mixes[row * value_dim..][..value_dim];
                merge(
                    (&mut whole.maxima[row], &mut whole.sums[row], to),
                    (chunk.maxima[row], chunk.sums[row], from),
                );
            }
        }
        for token in 0..job.tokens {
            let out = out.row(token);
            let rows = token * group..(token + 1) * group;
            let mixes = &scratch.whole.mixes[token * group * value_dim..][..group * value_dim];
            divide(mixes, &scratch.whole.sums[rows], value_dim, out);
        }
    }

    /// Softmax of a job's queries over some keys of one chunk, into `scratch.chunk`.
    fn run_chunk(&self, cache: &LayerCache, job: &Job, keys: Range<usize>, scratch: &mut BlockScratch) {
        let rows = job.tokens * self.group();
        scratch.chunk.begin(rows, self.value_dim);
        let first = self.first_key(job.position).max(keys.start);
        for start in (first / KEY_BLOCK * KEY_BLOCK..keys.end).step_by(KEY_BLOCK) {
            let block = start..keys.end.min(start + KEY_BLOCK);
            if rows <= FEW_ROWS {
                self.block_as_held(cache, job, block, scratch);
            } else {
                self.block_widened(cache, job, block, scratch);
            }
        }
    }

    /// One block of keys, read as it is held.
    fn block_as_held(&self, cache: &LayerCache, job: &Job, block: Range<usize>, scratch: &mut BlockScratch) {
        let BlockScratch {
            queries,
            scores,
            keep,
            chunk,
            ..
        } = scratch;
        let (rows, count) = (job.tokens * self.group(), block.len());
        scores.resize(rows * count, 0.0);
        let (keys, key_scales) = cache.keys(job.kv_head, block.clone());
        rows::dot(isa(), keys, queries, scores, Threads::One);
        multiply(scores, key_scales);
        self.weigh(job, &block, scores, keep, chunk);
        let (values, value_scales) = cache.values(job.kv_head, block);
        multiply(scores, value_scales);
        rows::mix(isa(), values, scores, keep, &mut chunk.mixes);
    }

    /// One block of keys for many queries, in f32.
    fn block_widened(&self, cache: &LayerCache, job: &Job, block: Range<usize>, scratch: &mut BlockScratch) {
        let BlockScratch {
            queries,
            scores,
            keep,
            wide,
            partial,
            chunk,
            ..
        } = scratch;
        let (rows, count) = (job.tokens * self.group(), block.len());
        scores.resize(rows * count, 0.0);
        wide.resize(count * self.key_dim, 0.0);
        let (keys, scales) = cache.keys(job.kv_head, block.clone());
        keys.widen(isa(), wide);
        product(queries, wide, self.key_dim, self.key_dim, &mut Tile::new(scores, count));
        multiply(scores, scales);
        self.weigh(job, &block, scores, keep, chunk);
        // Where keys hold the values their block is at hand.
        let stride = if self.values_are_keys {
            multiply(scores, scales);
            self.key_dim
        } else {
            let (values, scales) = cache.values(job.kv_head, block);
            wide.resize(count * self.value_dim, 0.0);
            values.widen(isa(), wide);
            multiply(scores, scales);
            self.value_dim
        };
        partial.resize(rows * self.value_dim, 0.0);
        mix(scores, wide, count, stride, &mut Tile::new(partial, self.value_dim));
        let mixes = chunk.mixes.chunks_exact_mut(self.value_dim);
        for ((mixed, partial), keep) in mixes.zip(partial.chunks_exact(self.value_dim)).zip(&*keep) {
            for (mixed, partial) in mixed.iter_mut().zip(partial) {
                *mixed = *mixed * keep + partial;
            }
        }
    }

    /// Turns scores `[rows, block]` into weights exp(score − running maximum), 0 for keys that a query does not see, and
    /// counts them in; `keep` is what each row's mix so far is to be multiplied by.
    fn weigh(&self, job: &Job, block: &Range<usize>, scores: &mut [f32], keep: &mut Vec<f32>, chunk: &mut Running) {
        let group = self.group();
        keep.clear();
        for (row, scores) in scores.chunks_exact_mut(block.len()).enumerate() {
            let query = job.position + row / group;
            let from = self.first_key(query).clamp(block.start, block.end) - block.start;
            let to = (query + 1).clamp(block.start, block.end) - block.start;
            let to = to.max(from);
            scores[..from].fill(0.0);
            scores[to..].fill(0.0);
            let seen = &mut scores[from..to];
            let before = chunk.maxima[row];
            let largest = max(seen).max(before);
            if seen.is_empty() || largest == f32::NEG_INFINITY {
                keep.push(1.0);
                continue;
            }
            let kept = decay(before, largest);
            keep.push(kept);
            chunk.maxima[row] = largest;
            chunk.sums[row] = chunk.sums[row] * kept + rows::weigh(isa(), seen, largest);
        }
    }

    /// Maximum, sum and mix of each query head, as [`merge_partials`](Self::merge_partials) reads them.
    fn put_partial(&self, chunk: &Running, part: &mut [f32]) {
        let group = self.group();
        part[..group].copy_from_slice(&chunk.maxima);
        part[group..2 * group].copy_from_slice(&chunk.sums);
        part[2 * group..].copy_from_slice(&chunk.mixes);
    }

    /// Partial results of lone queries, chunks in order.
    fn merge_partials(&self, jobs: &[Job], partials: &[f32], mixed: &mut [f32]) {
        let (group, value_dim) = (self.group(), self.value_dim);
        let lone = jobs.iter().take_while(|job| job.chunk.is_some()).count();
        let mut parts = partials.chunks_exact((group * (value_dim + 2)).max(1));
        for same in jobs[..lone].chunk_by(|a, b| (a.row, a.kv_head) == (b.row, b.kv_head)) {
            let at = same[0].row * self.heads * value_dim + same[0].kv_head * group * value_dim;
            let out = &mut mixed[at..at + group * value_dim];
            with_scratch(&BLOCK, |scratch| {
                let whole = &mut scratch.whole;
                whole.begin(group, value_dim);
                for part in parts.by_ref().take(same.len()) {
                    for row in 0..group {
                        let to = &mut whole.mixes[row * value_dim..][..value_dim];
                        let from = &part[2 * group + row * value_dim..][..value_dim];
                        merge(
                            (&mut whole.maxima[row], &mut whole.sums[row], to),
                            (part[row], part[group + row], from),
                        );
                    }
                }
                divide(&whole.mixes, &whole.sums, value_dim, out);
            });
        }
    }
}

/// Each row times one scale per column; no scales: nothing.
fn multiply(scores: &mut [f32], scales: &[f32]) {
    for row in scores
        .chunks_exact_mut(scales.len().max(1))
        .take_while(|_| !scales.is_empty())
    {
        row.iter_mut().zip(scales).for_each(|(score, scale)| *score *= scale);
    }
}

/// What new tokens ask and leave, positions turned in: rows of `[tokens, heads · key_dim]`, `[tokens, kv_heads · key_dim]` and
/// `[tokens, kv_heads · value_dim]` (empty where keys hold the values).
#[derive(Debug, Default)]
pub struct Rows {
    pub queries: Vec<f32>,
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "one for each layer; a box would be one more step per token"
)]
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
        let own = &spec.layers[layer.index()];
        let value_dim = spec.value_dim(own);
        let (projections, has_bias) = match spec.attention.kind {
            AttentionKind::Grouped { output_bias, .. } => (
                Projections::Grouped(Grouped::load(spec, value_dim, source, name)?),
                output_bias,
            ),
            AttentionKind::Latent { bias, .. } => {
                (Projections::Latent(Latent::load(spec, value_dim, source, name)?), bias)
            }
        };
        let value_width = spec.attention.heads * value_dim;
        let mut output = Linear::load(source, &name(LayerTensor::Output), [spec.hidden, value_width])?;
        if has_bias {
            output = output.with_bias(source, &name(LayerTensor::OutputBias))?;
        }
        Ok(Self {
            heads: Heads::of_layer(spec, own),
            eps: spec.norm_eps,
            norm: source.load_f32(&name(LayerTensor::AttentionNorm), &[spec.hidden])?,
            projections,
            output,
        })
    }

    /// Bytes of its matrices as held: what one token reads.
    pub(super) fn bytes(&self) -> u64 {
        let projections = match &self.projections {
            Projections::Grouped(grouped) => grouped.bytes(),
            Projections::Latent(latent) => latent.bytes(),
        };
        projections + self.output.bytes()
    }

    /// `hidden += attention(norm(hidden))` for the new tokens of all spans, whose rows follow each other in `hidden`
    /// `[tokens, hidden]`; their keys and values go into the caches.
    pub fn attend(&self, rope: &Rope, hidden: &mut [f32], spans: &mut [Span<'_>]) {
        let mut scratch = Scratch::default();
        let positions = spans
            .iter()
            .flat_map(|s| s.cache.positions()..s.cache.positions() + s.tokens);
        rope.angles(positions, &mut scratch.angles);
        self.attend_with(hidden, spans, &mut scratch);
    }

    /// What the output projection sees of the new tokens: each head's values mixed, `[tokens, heads · value_dim]`. As
    /// [`attend`](Self::attend) otherwise; `hidden` stays as it is.
    pub(super) fn mixed_values(&self, rope: &Rope, hidden: &[f32], spans: &mut [Span<'_>]) -> Vec<f32> {
        let mut scratch = Scratch::default();
        let positions = spans
            .iter()
            .flat_map(|s| s.cache.positions()..s.cache.positions() + s.tokens);
        rope.angles(positions, &mut scratch.angles);
        self.mix_with(hidden, spans, &mut scratch).to_vec()
    }

    /// An empty cache of this layer.
    pub(super) fn cache(&self, kind: KvKind) -> LayerCache {
        LayerCache::of(&self.heads, kind)
    }

    /// The same with the angles of the rows' positions in `scratch`.
    pub(super) fn attend_with<S: Spans + ?Sized>(&self, hidden: &mut [f32], spans: &mut S, scratch: &mut Scratch) {
        self.mix_with(hidden, spans, scratch);
        let Scratch {
            wide,
            mixed,
            out,
            clock,
            ..
        } = scratch;
        let values: &[f32] = match &self.projections {
            Projections::Grouped(_) => mixed,
            Projections::Latent(_) => wide,
        };
        out.resize(hidden.len(), 0.0);
        self.output.apply_to(values, out);
        clock.lap(Part::Dense);
        add(hidden, out);
    }

    /// Norm, projections, and the values mixed by softmax, where they lie in `scratch`.
    fn mix_with<'s, S: Spans + ?Sized>(&self, hidden: &[f32], spans: &mut S, scratch: &'s mut Scratch) -> &'s [f32] {
        let Scratch {
            angles,
            normed,
            rows,
            wide,
            mixed,
            clock,
            ..
        } = scratch;
        let angles: &Angles = angles;
        normed.resize(hidden.len(), 0.0);
        rms_norm_to(hidden, &self.norm, self.eps, normed);
        clock.lap(Part::Other);
        match &self.projections {
            Projections::Grouped(grouped) => grouped.rows(angles, normed, rows),
            Projections::Latent(latent) => latent.rows(angles, normed, wide, rows),
        }
        clock.lap(Part::Dense);
        self.heads.attend_to(rows, spans, mixed);
        clock.lap(Part::Attention);
        match &self.projections {
            Projections::Grouped(_) => mixed,
            Projections::Latent(latent) => {
                latent.values(mixed, wide);
                wide
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
    seen: Range<usize>,
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
    use cotk_kernels::cpu::team::Team;
    use cotk_run::seeds::Seeds;
    use proptest::prelude::*;
    use rand::RngExt;

    use super::super::cache::KvKind;
    use super::*;

    /// What a cache holds of one head, in f32.
    fn widened((rows, scales): (rows::Rows<'_>, &[f32])) -> Vec<f32> {
        let scale = |r: usize| scales.get(r).copied().unwrap_or(1.0);
        (0..rows.rows())
            .flat_map(|r| (0..rows.cols()).map(move |c| (r, c)))
            .map(|(r, c)| rows.at(r, c) * scale(r))
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        /// Law: blocks and chunks merged in order equal softmax over all seen keys at once, over what the cache holds: with
        /// and without a window, values apart from keys or inside them, every kind of cache, one token or many, and
        /// several sequences at once; on any team with the same bits.
        #[test]
        fn blocks_equal_reference(
            past in 0usize..600, tokens in 1usize..90, kv_heads in 1usize..3, group in 1usize..4,
            key_dim in 2usize..40, value_dim in 1usize..40, values_are_keys: bool,
            window in proptest::option::of(1usize..450), sharp: bool, kind in 0usize..3, is_lone: bool,
        ) {
            let kind = KvKind::ALL[kind];
            let tokens = if is_lone { 1 } else { tokens };
            let value_dim = if values_are_keys { value_dim.min(key_dim) } else { value_dim };
            let scale = 0.4;
            let heads = Heads { heads: kv_heads * group, kv_heads, key_dim, value_dim, values_are_keys, scale, window };
            let mut stream = Seeds::new(5).stream("attention");
            let mut draw = |count: usize, size: f32| -> Vec<f32> {
                (0..count).map(|_| stream.random_range(-size..size)).collect()
            };
            let size = if sharp { 20.0 } else { 1.0 };
            let values_of = |count: usize| if values_are_keys { 0 } else { count * kv_heads * value_dim };
            let mut before = LayerCache::of(&heads, kind);
            before.append(&draw(past * kv_heads * key_dim, size), &draw(values_of(past), 1.0));
            prop_assert_eq!(before.positions(), past);
            // A second sequence beside it must change nothing.
            let lengths = [tokens, 1];
            let rows = Rows {
                queries: draw((tokens + 1) * heads.heads * key_dim, 2.0),
                keys: draw((tokens + 1) * kv_heads * key_dim, size),
                values: draw(values_of(tokens + 1), 1.0),
            };
            let run = |threads: usize| {
                let mut caches = [before.clone(), LayerCache::of(&heads, kind)];
                let mut spans: Vec<Span<'_>> =
                    caches.iter_mut().zip(lengths).map(|(cache, tokens)| Span { tokens, cache }).collect();
                let out = Team::new(threads).install(|| heads.attend(&rows, &mut spans));
                (out, caches)
            };
            let (out, caches) = run(1);
            prop_assert_eq!(&out, &run(3).0);
            let bound = if values_are_keys && sharp { 8e-4 } else { 4e-5 };
            for token in 0..tokens + 1 {
                let (cache, at) = if token < tokens { (&caches[0], past + token) } else { (&caches[1], 0) };
                for head in 0..heads.heads {
                    let kv = head / group;
                    let from = window.map_or(0, |w| (at + 1).saturating_sub(w));
                    let keys = widened(cache.keys(kv, 0..at + 1));
                    let values = widened(cache.values(kv, 0..at + 1));
                    let q = &rows.queries[(token * heads.heads + head) * key_dim..][..key_dim];
                    let truth = attend_reference(q, &keys, (&values, value_dim, value_dim), scale, from..at + 1);
                    let found = &out[(token * heads.heads + head) * value_dim..][..value_dim];
                    for (found, truth) in found.iter().zip(truth) {
                        prop_assert!((f64::from(*found) - truth).abs() < bound, "{} {}", found, truth);
                    }
                }
            }
        }
    }

    /// Law: a token's result is the same bits alone and beside tokens of other sequences.
    #[test]
    fn sequences_do_not_see_each_other() {
        let heads = Heads {
            heads: 4,
            kv_heads: 2,
            key_dim: 24,
            value_dim: 24,
            values_are_keys: false,
            scale: 0.2,
            window: None,
        };
        let draw = |count: usize, salt: usize| -> Vec<f32> {
            (0..count).map(|i| ((i * 31 + salt * 7) as f32 * 0.137).sin()).collect()
        };
        let filled = |past: usize| {
            let mut cache = LayerCache::of(&heads, KvKind::F16);
            cache.append(&draw(past * 48, past), &draw(past * 48, past + 1));
            cache
        };
        let pasts = [3, 300, 64, 700];
        let rows = |from: usize, count: usize| Rows {
            queries: draw(4 * 96, 9)[from * 96..][..count * 96].to_vec(),
            keys: draw(4 * 48, 10)[from * 48..][..count * 48].to_vec(),
            values: draw(4 * 48, 11)[from * 48..][..count * 48].to_vec(),
        };
        let mut caches: Vec<LayerCache> = pasts.iter().map(|&p| filled(p)).collect();
        let mut spans: Vec<Span<'_>> = caches.iter_mut().map(|cache| Span { tokens: 1, cache }).collect();
        let together = heads.attend(&rows(0, 4), &mut spans);
        for (at, &past) in pasts.iter().enumerate() {
            let mut cache = filled(past);
            let mut span = [Span {
                tokens: 1,
                cache: &mut cache,
            }];
            assert_eq!(heads.attend(&rows(at, 1), &mut span), together[at * 96..][..96]);
        }
    }
}
