//! Every tensor that a model must have, from its spec alone: counts of parameters, and one look over a checkpoint
//! before anything is loaded.

use std::collections::HashSet;

use cotk_run::units::{ExpertId, LayerId};

use crate::checkpoint::{CheckpointError, DType, TensorSource, scale_shape, scales_of};
use crate::families::{self, LayerTensor, Matrix, Tensor};
use crate::spec::{AttentionKind, AttentionSpec, LayerKind, ModelSpec, QkNorm, SharedGate};

/// All tensors with their shapes, in the order of the forward pass.
pub fn tensors(spec: &ModelSpec) -> Vec<(Tensor, Vec<usize>)> {
    let mut list = vec![(Tensor::Embedding, vec![spec.vocab, spec.hidden])];
    for (id, layer) in (0..).map(LayerId).zip(&spec.layers) {
        let mut add = |tensor, shape: &[usize]| list.push((Tensor::Layer(id, tensor), shape.to_vec()));
        add(LayerTensor::AttentionNorm, &[spec.hidden]);
        for (tensor, shape) in attention(spec, spec.value_dim(layer)) {
            add(tensor, &shape);
        }
        add(LayerTensor::MixerNorm, &[spec.hidden]);
        match layer.kind {
            LayerKind::Dense { intermediate } => {
                for matrix in Matrix::ALL {
                    add(LayerTensor::Dense(matrix), &matrix.shape(spec.hidden, intermediate));
                }
            }
            LayerKind::Moe { shared } => {
                add(LayerTensor::Router, &[spec.routing.experts, spec.hidden]);
                if spec.router_bias {
                    add(LayerTensor::RouterBias, &[spec.routing.experts]);
                }
                for expert in (0..spec.routing.experts).map(expert_id) {
                    for matrix in Matrix::ALL {
                        let shape = matrix.shape(spec.hidden, spec.moe_intermediate);
                        add(LayerTensor::Expert(expert, matrix), &shape);
                    }
                }
                if let Some(shared) = shared {
                    for matrix in Matrix::ALL {
                        let shape = matrix.shape(spec.hidden, shared.intermediate);
                        add(LayerTensor::Shared(matrix), &shape);
                    }
                    match shared.gate {
                        SharedGate::Open => {}
                        SharedGate::Sigmoid => add(LayerTensor::SharedGate, &[1, spec.hidden]),
                    }
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

/// Projections and inner norms of one layer's attention.
fn attention(spec: &ModelSpec, value_dim: usize) -> Vec<(LayerTensor, Vec<usize>)> {
    let AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        ..
    } = spec.attention;
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let mut list = Vec::new();
    let mut add = |is_there: bool, tensor, shape: &[usize]| {
        if is_there {
            list.push((tensor, shape.to_vec()));
        }
    };
    match spec.attention.kind {
        AttentionKind::Grouped {
            qkv_bias,
            output_bias,
            qk_norm,
            clip: _,
        } => {
            for (weight, bias, outputs) in [
                (LayerTensor::Query, LayerTensor::QueryBias, q),
                (LayerTensor::Key, LayerTensor::KeyBias, kv),
                (LayerTensor::Value, LayerTensor::ValueBias, kv_heads * value_dim),
            ] {
                add(true, weight, &[outputs, spec.hidden]);
                add(qkv_bias, bias, &[outputs]);
            }
            let [query, key] = match qk_norm {
                QkNorm::None => [0, 0],
                QkNorm::PerHead => [head_dim, head_dim],
                QkNorm::Whole => [q, kv],
            };
            add(query > 0, LayerTensor::QueryNorm, &[query]);
            add(key > 0, LayerTensor::KeyNorm, &[key]);
            add(true, LayerTensor::Output, &[spec.hidden, heads * value_dim]);
            add(output_bias, LayerTensor::OutputBias, &[spec.hidden]);
        }
        AttentionKind::Latent {
            q_rank,
            kv_rank,
            value_dim: _,
            bias,
            norm_eps: _,
        } => {
            let rope = spec.attention.rope.dim;
            match q_rank {
                None => add(true, LayerTensor::Query, &[q, spec.hidden]),
                Some(rank) => {
                    add(true, LayerTensor::QueryDown, &[rank, spec.hidden]);
                    add(bias, LayerTensor::QueryDownBias, &[rank]);
                    add(true, LayerTensor::QueryNorm, &[rank]);
                    add(true, LayerTensor::QueryUp, &[q, rank]);
                }
            }
            add(true, LayerTensor::KeyValueDown, &[kv_rank + rope, spec.hidden]);
            add(bias, LayerTensor::KeyValueDownBias, &[kv_rank + rope]);
            add(true, LayerTensor::KeyValueNorm, &[kv_rank]);
            let up = heads * (head_dim - rope + value_dim);
            add(true, LayerTensor::KeyValueUp, &[up, kv_rank]);
            add(true, LayerTensor::Output, &[spec.hidden, heads * value_dim]);
            add(bias, LayerTensor::OutputBias, &[spec.hidden]);
        }
    }
    list
}

/// Takes the widths of value heads from the output projections of a container, whose values may be narrower than the
/// config's (their low rank); what does not fit is left for [`check`] to refuse.
pub fn narrow_values(spec: &mut ModelSpec, source: &dyn TensorSource) {
    let family = families::of(spec);
    for index in 0..spec.layers.len() {
        let layer = LayerId(u32::try_from(index).expect("layer counts are small"));
        let name = family.tensor_name(Tensor::Layer(layer, LayerTensor::Output));
        let (heads, whole) = (spec.attention.heads, spec.value_dim(&spec.layers[index]));
        let width = source.info(&name).and_then(|info| info.shape.get(1).copied());
        if let Some(width) = width.filter(|width| width % heads == 0 && (1..whole).contains(&(width / heads))) {
            spec.layers[index].value_dim = Some(width / heads);
        }
    }
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
/// weights, and no other. A container's dense part has no experts: `has_experts` false.
///
/// # Errors
/// The first tensor that is missing, ill-shaped, of another type or not of this model.
pub fn check(spec: &ModelSpec, source: &dyn TensorSource, has_experts: bool) -> Result<(), CheckpointError> {
    let mut known = HashSet::new();
    for (tensor, shape) in tensors(spec) {
        if has_experts || !is_expert(tensor) {
            for (name, shape) in stored(spec, source, tensor, &shape) {
                let info = source.require(&name, &shape)?;
                if !info.dtype.is_weight() && source.codes(&name).is_none() {
                    return Err(CheckpointError::not_a_weight(source.file(&name), &name, info.dtype));
                }
                known.insert(name);
            }
        }
    }
    let names = source.names();
    match names
        .iter()
        .find(|name| !known.contains(*name) && !is_leftover(spec, name))
    {
        None => Ok(()),
        Some(name) => Err(CheckpointError::Unknown {
            file: source.file(name).to_owned(),
            tensor: name.clone(),
            nearest: cotk_run::recipe::nearest_of(name, known.iter().map(String::as_str)),
        }),
    }
}

/// What lies in checkpoints and is no part of the model: a second copy of a tied head, frequencies that follow from the
/// config, layers that predict further tokens.
fn is_leftover(spec: &ModelSpec, name: &str) -> bool {
    let count = spec.layers.len();
    let is_further = |layer: usize| (count..count + spec.further_layers).contains(&layer);
    let layer = name
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split('.').next()?.parse().ok());
    layer.is_some_and(is_further)
        || name.ends_with("rotary_emb.inv_freq")
        || (spec.tied_embeddings && name == families::of(spec).tensor_name(Tensor::Head))
}

/// The names under which a checkpoint holds a tensor of this shape: its own, and its scales if it is in FP8.
fn stored(spec: &ModelSpec, source: &dyn TensorSource, tensor: Tensor, shape: &[usize]) -> Vec<(String, Vec<usize>)> {
    let name = families::of(spec).tensor_name(tensor);
    let scales = match (source.info(&name).map(|info| info.dtype), shape) {
        (Some(DType::F8E4M3), &[rows, columns]) => Some((scales_of(&name), scale_shape(rows, columns).to_vec())),
        _ => None,
    };
    std::iter::once((name, shape.to_vec())).chain(scales).collect()
}

/// Names of all stored tensors but those of routed experts, sorted.
pub fn dense_names(spec: &ModelSpec, source: &dyn TensorSource) -> Vec<String> {
    let mut names: Vec<String> = tensors(spec)
        .iter()
        .filter(|(tensor, _)| !is_expert(*tensor))
        .flat_map(|(tensor, shape)| stored(spec, source, *tensor, shape))
        .map(|(name, _)| name)
        .collect();
    names.sort_unstable();
    names
}

/// Matrices of the dense part that a container may hold as codes, with their shapes: all that a token is multiplied by, but
/// routers and gates of shared experts, which decide, and the latent up-projection, which is read in parts and transposed.
pub fn codable(spec: &ModelSpec) -> Vec<(String, [usize; 2])> {
    let is_codable = |tensor: &Tensor| match tensor {
        Tensor::Embedding | Tensor::Head => true,
        Tensor::FinalNorm => false,
        Tensor::Layer(_, part) => matches!(
            part,
            LayerTensor::Query
                | LayerTensor::Key
                | LayerTensor::Value
                | LayerTensor::Output
                | LayerTensor::QueryDown
                | LayerTensor::QueryUp
                | LayerTensor::KeyValueDown
                | LayerTensor::Dense(_)
                | LayerTensor::Shared(_)
        ),
    };
    tensors(spec)
        .into_iter()
        .filter(|(tensor, _)| is_codable(tensor))
        .filter_map(|(tensor, shape)| Some((families::of(spec).tensor_name(tensor), shape.try_into().ok()?)))
        .collect()
}

/// Stored bytes and bits per weight of gate, up and down of one expert in a checkpoint; scales count as bytes.
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
        let tensor = Tensor::Layer(layer, LayerTensor::Expert(expert, matrix));
        let shape = matrix.shape(spec.hidden, spec.moe_intermediate);
        for (at, (name, shape)) in stored(spec, source, tensor, &shape).iter().enumerate() {
            let info = source.require(name, shape)?;
            bytes += info.bytes();
            if at == 0 {
                *slot = u32::try_from(8 * info.dtype.size_bytes()).expect("at most 64");
            }
        }
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
