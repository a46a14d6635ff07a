//! Every tensor that a model must have, from its spec alone: counts of parameters, and one look over a checkpoint
//! before anything is loaded.

use cotk_run::units::{ExpertId, LayerId};

use crate::checkpoint::{CheckpointError, TensorSource};
use crate::families::{self, LayerTensor, Matrix, Tensor};
use crate::spec::{LayerKind, ModelSpec};

/// All tensors with their shapes, in the order of the forward pass.
pub fn tensors(spec: &ModelSpec) -> Vec<(Tensor, Vec<usize>)> {
    let mut list = vec![(Tensor::Embedding, vec![spec.vocab, spec.hidden])];
    for (id, layer) in (0..).map(LayerId).zip(&spec.layers) {
        let mut add = |tensor, shape: &[usize]| list.push((Tensor::Layer(id, tensor), shape.to_vec()));
        let attention = &spec.attention;
        let (q, kv) = (
            attention.heads * attention.head_dim,
            attention.kv_heads * attention.head_dim,
        );
        add(LayerTensor::AttentionNorm, &[spec.hidden]);
        for (weight, bias, outputs) in [
            (LayerTensor::Query, LayerTensor::QueryBias, q),
            (LayerTensor::Key, LayerTensor::KeyBias, kv),
            (LayerTensor::Value, LayerTensor::ValueBias, kv),
        ] {
            add(weight, &[outputs, spec.hidden]);
            if attention.qkv_bias {
                add(bias, &[outputs]);
            }
        }
        add(LayerTensor::Output, &[spec.hidden, q]);
        add(LayerTensor::MixerNorm, &[spec.hidden]);
        match layer.kind {
            LayerKind::Dense { intermediate } => {
                for matrix in Matrix::ALL {
                    add(LayerTensor::Dense(matrix), &matrix.shape(spec.hidden, intermediate));
                }
            }
            LayerKind::Moe { shared_intermediate } => {
                add(LayerTensor::Router, &[spec.routing.experts, spec.hidden]);
                for expert in (0..spec.routing.experts).map(expert_id) {
                    for matrix in Matrix::ALL {
                        let shape = matrix.shape(spec.hidden, spec.moe_intermediate);
                        add(LayerTensor::Expert(expert, matrix), &shape);
                    }
                }
                if let Some(width) = shared_intermediate {
                    for matrix in Matrix::ALL {
                        add(LayerTensor::Shared(matrix), &matrix.shape(spec.hidden, width));
                    }
                    add(LayerTensor::SharedGate, &[1, spec.hidden]);
                }
            }
        }
    }
    list.push((Tensor::FinalNorm, vec![spec.hidden]));
    if !spec.tied_embeddings {
        list.push((Tensor::Head, vec![spec.vocab, spec.hidden]));
    }
    list
}

/// Parameters of everything but routed experts.
pub fn dense_params(spec: &ModelSpec) -> u64 {
    tensors(spec)
        .iter()
        .filter(|(tensor, _)| !is_expert(*tensor))
        .map(|(_, shape)| shape.iter().product::<usize>() as u64)
        .sum()
}

/// Parameters of one routed expert as trained.
pub fn expert_params(spec: &ModelSpec) -> u64 {
    (3 * spec.hidden * spec.moe_intermediate) as u64
}

/// Holds a checkpoint to its config without reading a weight: every tensor there, of its shape, of a type that holds
/// weights. A container's dense part has no experts: `has_experts` false.
///
/// # Errors
/// The first tensor that is missing, ill-shaped or of another type.
pub fn check(spec: &ModelSpec, source: &dyn TensorSource, has_experts: bool) -> Result<(), CheckpointError> {
    let family = families::of(spec);
    for (tensor, shape) in tensors(spec) {
        if has_experts || !is_expert(tensor) {
            let name = family.tensor_name(tensor);
            let info = source.require(&name, &shape)?;
            if !info.dtype.is_weight() {
                return Err(CheckpointError::not_a_weight(source.file(&name), &name, info.dtype));
            }
        }
    }
    Ok(())
}

/// Stored bytes and bits per weight of gate, up and down of one expert in a checkpoint.
///
/// # Errors
/// [`CheckpointError::Missing`], [`CheckpointError::Shape`].
pub fn expert_storage(
    spec: &ModelSpec,
    source: &dyn TensorSource,
    layer: LayerId,
    expert: ExpertId,
) -> Result<(u64, [u32; 3]), CheckpointError> {
    let mut bytes = 0;
    let mut bits = [0; 3];
    for (slot, matrix) in bits.iter_mut().zip(Matrix::ALL) {
        let name = families::of(spec).tensor_name(Tensor::Layer(layer, LayerTensor::Expert(expert, matrix)));
        let info = source.require(&name, &matrix.shape(spec.hidden, spec.moe_intermediate))?;
        bytes += info.bytes();
        *slot = u32::try_from(8 * info.dtype.size_bytes()).expect("at most 64");
    }
    Ok((bytes, bits))
}

fn is_expert(tensor: Tensor) -> bool {
    matches!(tensor, Tensor::Layer(_, LayerTensor::Expert(..)))
}

/// An expert's number as its id.
pub(crate) fn expert_id(expert: usize) -> ExpertId {
    ExpertId(u32::try_from(expert).expect("expert counts fit 32 bits"))
}
