//! Queries, keys and values of multi-head latent attention (DeepSeek-V2, 2024, section 2.1), absorbed: the matrices
//! that would make keys and values of every head from the cached latent vector are applied to queries and results
//! instead, so that all heads share one key of `kv_rank` + positions and its beginning is the value.
//! Law: scores and values equal those of keys and values made per head.

use rayon::prelude::*;

use super::attention::Rows;
use super::linear::Linear;
use super::product::{Tile, mix, product};
use super::norm::rms_norm;
use super::rope::Rope;
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
    /// Per head, from latent vector to the part of the key without positions, `[plain, kv_rank]`.
    key_up: Vec<Vec<f32>>,
    /// Per head, from latent vector to value, `[value_dim, kv_rank]`.
    value_up: Vec<Vec<f32>>,
    /// Elements of a query or key head without positions.
    plain: usize,
    /// And with them.
    rope: usize,
    value_dim: usize,
}

#[derive(Debug, Clone)]
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
        source: &dyn TensorSource,
        name: impl Fn(LayerTensor) -> String,
    ) -> Result<Self, CheckpointError> {
        let AttentionKind::Latent {
            q_rank,
            kv_rank,
            value_dim,
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
        // [heads · (plain + value_dim), kv_rank]: per head the rows of its key, then those of its value.
        let up = source.load_f32(&name(LayerTensor::KeyValueUp), &[heads * (plain + value_dim), kv_rank])?;
        let (key_up, value_up) = up
            .chunks_exact((plain + value_dim) * kv_rank)
            .map(|head| head.split_at(plain * kv_rank))
            .map(|(key, value)| (key.to_vec(), value.to_vec()))
            .unzip();
        Ok(Self {
            query,
            key_value_down: down(LayerTensor::KeyValueDown, LayerTensor::KeyValueDownBias, kv_rank + rope)?,
            norm: source.load_f32(&name(LayerTensor::KeyValueNorm), &[kv_rank])?,
            eps: norm_eps,
            key_up,
            value_up,
            plain,
            rope,
            value_dim,
        })
    }

    /// Of normed hidden states `[tokens, hidden]`; `spans` are first positions and numbers of tokens.
    pub(super) fn rows(&self, rope: &Rope, normed: &[f32], spans: &[(usize, usize)]) -> Rows {
        let mut queries = match &self.query {
            Query::Whole(query) => query.apply(normed),
            Query::LowRank(down, norm, up) => up.apply(&rms_norm(&down.apply(normed), norm, self.eps)),
        };
        let (rank, head_dim) = (self.norm.len(), self.plain + self.rope);
        let (q_width, k_width) = (self.key_up.len() * head_dim, rank + self.rope);
        let mut keys = self.key_value_down.apply(normed);
        for row in keys.chunks_exact_mut(k_width) {
            let latent = rms_norm(&row[..rank], &self.norm, self.eps);
            row[..rank].copy_from_slice(&latent);
        }
        for (rows, width, head) in [(&mut queries, q_width, head_dim), (&mut keys, k_width, k_width)] {
            let mut rest = rows.as_mut_slice();
            for &(start, tokens) in spans {
                let (span, after) = rest.split_at_mut(tokens * width);
                rope.turn(span, start, width, head);
                rest = after;
            }
        }
        Rows {
            queries: self.absorb(&queries),
            keys,
            values: Vec::new(),
        }
    }

    /// Turned queries `[tokens, heads · head_dim]` to `[tokens, heads · (kv_rank + rope)]`: q · (W c) = (Wᵀ q) · c.
    fn absorb(&self, queries: &[f32]) -> Vec<f32> {
        let (heads, rank, head_dim) = (self.key_up.len(), self.norm.len(), self.plain + self.rope);
        let tokens = queries.len() / (heads * head_dim);
        let per_head = |(head, up): (usize, &Vec<f32>)| {
            let mut plain = Vec::with_capacity(tokens * self.plain);
            for row in queries.chunks_exact(heads * head_dim) {
                plain.extend_from_slice(&row[head * head_dim..][..self.plain]);
            }
            let mut latent = vec![0.0; tokens * rank];
            if tokens > 0 {
                mix(&plain, up, self.plain, rank, &mut Tile::new(&mut latent, rank));
            }
            latent
        };
        let latent: Vec<Vec<f32>> = self.key_up.par_iter().enumerate().map(per_head).collect();
        let mut absorbed = Vec::with_capacity(tokens * heads * (rank + self.rope));
        for (token, row) in queries.chunks_exact(heads * head_dim).enumerate() {
            for (latent, head) in latent.iter().zip(row.chunks_exact(head_dim)) {
                absorbed.extend_from_slice(&latent[token * rank..][..rank]);
                absorbed.extend_from_slice(&head[self.plain..]);
            }
        }
        absorbed
    }

    /// Mixed latent vectors `[tokens, heads · kv_rank]` to values `[tokens, heads · value_dim]`.
    pub(super) fn values(&self, mixed: &[f32]) -> Vec<f32> {
        let (heads, rank) = (self.value_up.len(), self.norm.len());
        let tokens = mixed.len() / (heads * rank);
        let per_head = |(head, up): (usize, &Vec<f32>)| {
            let mut latent = Vec::with_capacity(tokens * rank);
            for row in mixed.chunks_exact(heads * rank) {
                latent.extend_from_slice(&row[head * rank..][..rank]);
            }
            let mut values = vec![0.0; tokens * self.value_dim];
            if tokens > 0 {
                product(&latent, up, rank, &mut Tile::new(&mut values, self.value_dim));
            }
            values
        };
        let values: Vec<Vec<f32>> = self.value_up.par_iter().enumerate().map(per_head).collect();
        let mut rows = Vec::with_capacity(tokens * heads * self.value_dim);
        for token in 0..tokens {
            for values in &values {
                rows.extend_from_slice(&values[token * self.value_dim..][..self.value_dim]);
            }
        }
        rows
    }
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
        let (heads, plain, rope, rank, value_dim, tokens) = (3, 5, 4, 7, 6, 2);
        let zeros = |outputs: usize| Linear::new(vec![0.0; outputs], outputs, 1);
        let latent = Latent {
            query: Query::Whole(zeros(heads * (plain + rope))),
            key_value_down: zeros(rank + rope),
            norm: vec![1.0; rank],
            eps: 0.0,
            key_up: (0..heads).map(|h| draw(plain * rank, h)).collect(),
            value_up: (0..heads).map(|h| draw(value_dim * rank, h + 10)).collect(),
            plain,
            rope,
            value_dim,
        };
        let (queries, key) = (draw(tokens * heads * (plain + rope), 20), draw(rank + rope, 21));
        let absorbed = latent.absorb(&queries);
        let mixed = draw(tokens * heads * rank, 22);
        let values = latent.values(&mixed);
        let dot = |a: &[f32], b: &[f64]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum::<f64>();
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        for at in 0..tokens * heads {
            let head = at % heads;
            let mut whole_key = apply_reference(&latent.key_up[head], None, rank, &key[..rank]);
            whole_key.extend(wide(&key[rank..]));
            let truth = dot(&queries[at * (plain + rope)..][..plain + rope], &whole_key);
            let found = dot(&absorbed[at * (rank + rope)..][..rank + rope], &wide(&key));
            assert!((found - truth).abs() < 1e-5, "{found} {truth}");
            let truth = apply_reference(&latent.value_up[head], None, rank, &mixed[at * rank..][..rank]);
            for (found, truth) in values[at * value_dim..].iter().zip(truth) {
                assert!((f64::from(*found) - truth).abs() < 1e-5);
            }
        }
        assert!(latent.absorb(&[]).is_empty() && latent.values(&[]).is_empty());
    }
}
