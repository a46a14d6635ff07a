//! Queries, keys and values of grouped-query attention: one projection each, norms, clip, positions.

use super::attention::Rows;
use super::linear::Linear;
use super::norm::rms_norm;
use super::rope::Rope;
use crate::checkpoint::{CheckpointError, TensorSource};
use crate::families::LayerTensor;
use crate::spec::{AttentionKind, AttentionSpec, ModelSpec, QkNorm};

/// Projections of one layer.
#[derive(Debug, Clone)]
pub(super) struct Grouped {
    head_dim: usize,
    query: Linear,
    key: Linear,
    value: Linear,
    /// Weights over queries and over keys: of one head's width, shared by the heads, or as wide as all of them.
    norms: Option<[Vec<f32>; 2]>,
    eps: f32,
    clip: Option<f32>,
}

impl Grouped {
    /// # Panics
    /// When the model has other attention.
    pub(super) fn load(
        spec: &ModelSpec,
        source: &dyn TensorSource,
        name: impl Fn(LayerTensor) -> String,
    ) -> Result<Self, CheckpointError> {
        let AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            ..
        } = spec.attention;
        let AttentionKind::Grouped {
            qkv_bias,
            qk_norm,
            clip,
            output_bias: _,
        } = spec.attention.kind
        else {
            panic!("the caller has matched the kind");
        };
        let linear = |weight, bias, outputs| {
            let linear = Linear::load(source, &name(weight), [outputs, spec.hidden])?;
            if qkv_bias {
                linear.with_bias(source, &name(bias))
            } else {
                Ok(linear)
            }
        };
        let widths = match qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some([head_dim, head_dim]),
            QkNorm::Whole => Some([heads * head_dim, kv_heads * head_dim]),
        };
        Ok(Self {
            head_dim,
            query: linear(LayerTensor::Query, LayerTensor::QueryBias, heads * head_dim)?,
            key: linear(LayerTensor::Key, LayerTensor::KeyBias, kv_heads * head_dim)?,
            value: linear(LayerTensor::Value, LayerTensor::ValueBias, kv_heads * head_dim)?,
            norms: match widths {
                None => None,
                Some([query, key]) => Some([
                    source.load_f32(&name(LayerTensor::QueryNorm), &[query])?,
                    source.load_f32(&name(LayerTensor::KeyNorm), &[key])?,
                ]),
            },
            eps: spec.norm_eps,
            clip,
        })
    }

    /// Of normed hidden states `[tokens, hidden]`; `spans` are first positions and numbers of tokens.
    pub(super) fn rows(&self, rope: &Rope, normed: &[f32], spans: &[(usize, usize)]) -> Rows {
        let mut queries = self.query.apply(normed);
        let mut keys = self.key.apply(normed);
        let mut values = self.value.apply(normed);
        if let Some([query, key]) = &self.norms {
            queries = rms_norm(&queries, query, self.eps);
            keys = rms_norm(&keys, key, self.eps);
        }
        if let Some(clip) = self.clip {
            for rows in [&mut queries, &mut keys, &mut values] {
                rows.iter_mut().for_each(|x| *x = x.clamp(-clip, clip));
            }
        }
        for (rows, width) in [(&mut queries, self.query.outputs()), (&mut keys, self.key.outputs())] {
            let mut rest = rows.as_mut_slice();
            for &(start, tokens) in spans {
                let (span, after) = rest.split_at_mut(tokens * width);
                rope.turn(span, start, width, self.head_dim);
                rest = after;
            }
        }
        Rows { queries, keys, values }
    }
}
