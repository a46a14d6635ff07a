//! Queries, keys and values of grouped-query attention: one projection each, norms, clip, positions.

use super::attention::Rows;
use super::linear::{Linear, apply_all};
use super::norm::rms_norm_in_place;
use super::rope::Angles;
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
        value_dim: usize,
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
            value: linear(LayerTensor::Value, LayerTensor::ValueBias, kv_heads * value_dim)?,
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

    /// Bytes of its matrices as held.
    pub(super) fn bytes(&self) -> u64 {
        self.query.bytes() + self.key.bytes() + self.value.bytes()
    }

    /// Of normed hidden states `[tokens, hidden]`, whose positions are those of `angles`; `rows` is overwritten.
    pub(super) fn rows(&self, angles: &Angles, normed: &[f32], rows: &mut Rows) {
        let tokens = normed.len() / self.query.inputs();
        let Rows { queries, keys, values } = rows;
        queries.resize(tokens * self.query.outputs(), 0.0);
        keys.resize(tokens * self.key.outputs(), 0.0);
        values.resize(tokens * self.value.outputs(), 0.0);
        apply_all(
            normed,
            [
                (&self.query, &mut queries[..]),
                (&self.key, &mut keys[..]),
                (&self.value, &mut values[..]),
            ],
        );
        if let Some([query, key]) = &self.norms {
            rms_norm_in_place(queries, query, self.eps);
            rms_norm_in_place(keys, key, self.eps);
        }
        if let Some(clip) = self.clip {
            for rows in [&mut *queries, &mut *keys, &mut *values] {
                rows.iter_mut().for_each(|x| *x = x.clamp(-clip, clip));
            }
        }
        angles.turn(queries, self.query.outputs(), self.head_dim);
        angles.turn(keys, self.key.outputs(), self.head_dim);
    }
}
