//! Queries, keys and values of multi-head latent attention (DeepSeek-V2, 2024, section 2.1), absorbed: the matrices
//! that would make keys and values of every head from the cached latent vector are applied to queries and results
//! instead, so that all heads share one key of `kv_rank` + positions and its beginning is the value.
//! Law: scores and values equal those of keys and values made per head.

use std::cell::RefCell;

use cotk_kernels::cpu::gemm::Threads;
use cotk_kernels::cpu::rows;
use cotk_kernels::cpu::team;

use super::attention::Rows;
use super::linear::{FEW_ROWS, Linear, isa, with_scratch};
use super::norm::{rms_norm_in_place, rms_norm_to};
use super::product::{Tile, mix, product};
use super::rope::Angles;
use crate::checkpoint::{CheckpointError, TensorSource};
use crate::families::LayerTensor;
use crate::spec::{AttentionKind, ModelSpec};

/// Projections of one layer.
#[derive(Debug, Clone)]
pub(super) struct Latent {
    query: Query,
    /// `[kv_rank + rope, hidden]`
    key_value_down: Linear,
    /// `[kv_rank]`
    norm: Vec<f32>,
    eps: f32,
    /// `[heads · (plain + value_dim), kv_rank]`: per head the rows that make the part of a key without positions from a
    /// latent vector, then those that make its value. Never codes: parts of it are read transposed.
    key_value_up: Linear,
    heads: usize,
    /// Elements of a query or key head without positions.
    plain: usize,
    /// And with them.
    rope: usize,
    value_dim: usize,
}

#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "one for each layer; a box would be one more step per token"
)]
enum Query {
    Whole(Linear),
    /// Down, norm, up.
    LowRank(Linear, Vec<f32>, Linear),
}

impl Latent {
    /// # Panics
    /// When the model has other attention.
    pub(super) fn load(
        spec: &ModelSpec,
        value_dim: usize,
        source: &dyn TensorSource,
        name: impl Fn(LayerTensor) -> String,
    ) -> Result<Self, CheckpointError> {
        let AttentionKind::Latent {
            q_rank,
            kv_rank,
            value_dim: _,
            bias,
            norm_eps,
        } = spec.attention.kind
        else {
            panic!("the caller has matched the kind");
        };
        let (heads, rope) = (spec.attention.heads, spec.attention.rope.dim);
        let plain = spec.attention.head_dim - rope;
        let down = |weight, bias_name, outputs| {
            let linear = Linear::load(source, &name(weight), [outputs, spec.hidden])?;
            if bias {
                linear.with_bias(source, &name(bias_name))
            } else {
                Ok(linear)
            }
        };
        let q_width = heads * spec.attention.head_dim;
        let query = match q_rank {
            None => Query::Whole(Linear::load(source, &name(LayerTensor::Query), [q_width, spec.hidden])?),
            Some(rank) => Query::LowRank(
                down(LayerTensor::QueryDown, LayerTensor::QueryDownBias, rank)?,
                source.load_f32(&name(LayerTensor::QueryNorm), &[rank])?,
                Linear::load(source, &name(LayerTensor::QueryUp), [q_width, rank])?,
            ),
        };
        let up_name = name(LayerTensor::KeyValueUp);
        let up_shape = [heads * (plain + value_dim), kv_rank];
        let key_value_up = match source.codes(&up_name) {
            None => Linear::load(source, &up_name, up_shape)?,
            Some(_) => Linear::new(source.load_f32(&up_name, &up_shape)?, up_shape[0], up_shape[1]),
        };
        Ok(Self {
            query,
            key_value_down: down(LayerTensor::KeyValueDown, LayerTensor::KeyValueDownBias, kv_rank + rope)?,
            norm: source.load_f32(&name(LayerTensor::KeyValueNorm), &[kv_rank])?,
            eps: norm_eps,
            key_value_up,
            heads,
            plain,
            rope,
            value_dim,
        })
    }

    /// Bytes of its matrices as held.
    pub(super) fn bytes(&self) -> u64 {
        let query = match &self.query {
            Query::Whole(query) => query.bytes(),
            Query::LowRank(down, _, up) => down.bytes() + up.bytes(),
        };
        query + self.key_value_down.bytes() + self.key_value_up.bytes()
    }

    fn head_dim(&self) -> usize {
        self.plain + self.rope
    }

    /// Of normed hidden states `[tokens, hidden]`, whose positions are those of `angles`; `rows` is overwritten, `wide` is
    /// scratch.
    pub(super) fn rows(&self, angles: &Angles, normed: &[f32], wide: &mut Vec<f32>, rows: &mut Rows) {
        let tokens = normed.len() / self.key_value_down.inputs();
        let (rank, head_dim) = (self.norm.len(), self.head_dim());
        let (q_width, k_width) = (self.heads * head_dim, rank + self.rope);
        let Rows { queries, keys, values } = rows;
        values.clear();
        // The turned queries, [tokens, heads · head_dim].
        wide.resize(tokens * q_width, 0.0);
        match &self.query {
            Query::Whole(query) => query.apply_to(normed, wide),
            Query::LowRank(down, norm, up) => {
                with_scratch(&BETWEEN, |[between, _]| {
                    between.resize(tokens * down.outputs(), 0.0);
                    down.apply_to(normed, between);
                    rms_norm_in_place(between, norm, self.eps);
                    up.apply_to(between, wide);
                });
            }
        }
        angles.turn(wide, q_width, head_dim);
        keys.resize(tokens * k_width, 0.0);
        self.key_value_down.apply_to(normed, keys);
        with_scratch(&BETWEEN, |[latent, _]| {
            latent.resize(rank, 0.0);
            for row in keys.chunks_exact_mut(k_width) {
                rms_norm_to(&row[..rank], &self.norm, self.eps, latent);
                row[..rank].copy_from_slice(latent);
            }
        });
        angles.turn(keys, k_width, k_width);
        self.absorb(wide, queries);
    }

    /// Turned queries `[tokens, heads · head_dim]` to `[tokens, heads · (kv_rank + rope)]`: q · (W c) = (Wᵀ q) · c.
    fn absorb(&self, turned: &[f32], absorbed: &mut Vec<f32>) {
        let (rank, head_dim) = (self.norm.len(), self.head_dim());
        let (from_width, to_width) = (self.heads * head_dim, self.heads * (rank + self.rope));
        let tokens = turned.len() / from_width;
        absorbed.resize(tokens * to_width, 0.0);
        let out = Tile::new(absorbed, to_width);
        let per_head = |head: usize| {
            let up = self.head_rows(head).start..self.head_rows(head).start + self.plain;
            // SAFETY: heads have columns of their own.
            let mut out = unsafe { out.part(0, head * (rank + self.rope), tokens, rank + self.rope) };
            with_scratch(&BETWEEN, |[plain, latent]| {
                plain.clear();
                for row in turned.chunks_exact(from_width) {
                    plain.extend_from_slice(&row[head * head_dim..][..self.plain]);
                }
                latent.clear();
                latent.resize(tokens * rank, 0.0);
                match self.key_value_up.stored(up.clone()) {
                    Some(stored) if tokens <= FEW_ROWS => {
                        let mut keep = [0.0; FEW_ROWS];
                        keep[..tokens].fill(1.0);
                        rows::mix(isa(), stored, plain, &keep[..tokens], latent);
                    }
                    _ => self.key_value_up.with_wide(up, |up, stride| {
                        mix(plain, up, self.plain, stride, &mut Tile::new(latent, rank));
                    }),
                }
                for (token, row) in turned.chunks_exact(from_width).enumerate() {
                    let to = out.row(token);
                    to[..rank].copy_from_slice(&latent[token * rank..][..rank]);
                    to[rank..].copy_from_slice(&row[head * head_dim + self.plain..][..self.rope]);
                }
            });
        };
        if tokens > 0 {
            team::run(self.heads, per_head);
        }
    }

    /// The rows of the up-projection that belong to a head.
    fn head_rows(&self, head: usize) -> std::ops::Range<usize> {
        let rows = self.plain + self.value_dim;
        head * rows..(head + 1) * rows
    }

    /// Mixed latent vectors `[tokens, heads · kv_rank]` to values `[tokens, heads · value_dim]`.
    pub(super) fn values(&self, mixed: &[f32], values: &mut Vec<f32>) {
        let rank = self.norm.len();
        let tokens = mixed.len() / (self.heads * rank);
        values.resize(tokens * self.heads * self.value_dim, 0.0);
        let out = Tile::new(values, self.heads * self.value_dim);
        let per_head = |head: usize| {
            let up = self.head_rows(head).start + self.plain..self.head_rows(head).end;
            // SAFETY: heads have columns of their own.
            let mut out = unsafe { out.part(0, head * self.value_dim, tokens, self.value_dim) };
            with_scratch(&BETWEEN, |[latent, values]| {
                latent.clear();
                for row in mixed.chunks_exact(self.heads * rank) {
                    latent.extend_from_slice(&row[head * rank..][..rank]);
                }
                values.resize(tokens * self.value_dim, 0.0);
                match self.key_value_up.stored(up.clone()) {
                    Some(stored) if tokens <= FEW_ROWS => rows::dot(isa(), stored, latent, values, Threads::One),
                    _ => self.key_value_up.with_wide(up, |up, stride| {
                        product(latent, up, rank, stride, &mut Tile::new(values, self.value_dim));
                    }),
                }
                for (token, values) in values.chunks_exact(self.value_dim).enumerate() {
                    out.row(token).copy_from_slice(values);
                }
            });
        };
        if tokens > 0 {
            team::run(self.heads, per_head);
        }
    }
}

thread_local! {
    static BETWEEN: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::linear::apply_reference;

    fn draw(count: usize, salt: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7 + salt * 13) as f32 * 0.37).sin()).collect()
    }

    /// Law: (Wᵀ q) · c is q · (W c), and values of a mix of latent vectors are the mix of their values.
    #[test]
    fn absorbed_equals_keys_and_values_per_head() {
        for tokens in [2, FEW_ROWS + 3] {
            let (heads, plain, rope, rank, value_dim) = (3, 5, 4, 7, 6);
            let up = draw(heads * (plain + value_dim) * rank, 5);
            let part = |head: usize, from: usize, rows: usize| {
                &up[(head * (plain + value_dim) + from) * rank..][..rows * rank]
            };
            let zeros = |outputs: usize| Linear::new(vec![0.0; outputs], outputs, 1);
            let latent = Latent {
                query: Query::Whole(zeros(heads * (plain + rope))),
                key_value_down: zeros(rank + rope),
                norm: vec![1.0; rank],
                eps: 0.0,
                key_value_up: Linear::new(up.clone(), heads * (plain + value_dim), rank),
                heads,
                plain,
                rope,
                value_dim,
            };
            let (queries, key) = (draw(tokens * heads * (plain + rope), 20), draw(rank + rope, 21));
            let (mut absorbed, mut values) = (Vec::new(), Vec::new());
            latent.absorb(&queries, &mut absorbed);
            let mixed = draw(tokens * heads * rank, 22);
            latent.values(&mixed, &mut values);
            let dot = |a: &[f32], b: &[f64]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum::<f64>();
            let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
            for at in 0..tokens * heads {
                let head = at % heads;
                let mut whole_key = apply_reference(part(head, 0, plain), None, rank, &key[..rank]);
                whole_key.extend(wide(&key[rank..]));
                let truth = dot(&queries[at * (plain + rope)..][..plain + rope], &whole_key);
                let found = dot(&absorbed[at * (rank + rope)..][..rank + rope], &wide(&key));
                assert!((found - truth).abs() < 1e-5, "{found} {truth}");
                let truth = apply_reference(part(head, plain, value_dim), None, rank, &mixed[at * rank..][..rank]);
                for (found, truth) in values[at * value_dim..].iter().zip(truth) {
                    assert!((f64::from(*found) - truth).abs() < 1e-5);
                }
            }
            latent.absorb(&[], &mut absorbed);
            latent.values(&[], &mut values);
            assert!(absorbed.is_empty() && values.is_empty());
        }
    }
}
