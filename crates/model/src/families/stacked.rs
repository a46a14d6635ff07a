//! Experts in stacks, one tensor per layer for gate and up and one for down, as transformers 5 holds them:
//! `[experts, 2 · inner, hidden]` (gate rows first) and `[experts, hidden, inner]`, or both with their last axes
//! exchanged. Shown under the published names, expert by expert.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Family, LayerTensor, Matrix, Tensor, of};
use crate::checkpoint::views::{View, Views};
use crate::checkpoint::{CheckpointError, DType, TensorSource};
use crate::inventory::expert_id;
use crate::spec::{LayerKind, ModelSpec};
use cotk_run::units::LayerId;

/// `source` with stacked experts and other names under the published names; itself where it has neither.
///
/// # Errors
/// One stack without the other, a stack of another shape or of a type that cannot be cut.
pub fn unstack(spec: &ModelSpec, source: Arc<dyn TensorSource>) -> Result<Arc<dyn TensorSource>, CheckpointError> {
    let family = of(spec);
    let mut views = BTreeMap::new();
    let mut renamed = BTreeMap::new();
    for (id, layer) in (0..).map(LayerId).zip(&spec.layers) {
        if let LayerKind::Moe { .. } = layer.kind {
            cut(spec, family, source.as_ref(), id, &mut views)?;
        }
    }
    for (tensor, _) in crate::inventory::tensors(spec) {
        if let Some(other) = family.other_name(tensor) {
            let name = family.tensor_name(tensor);
            if source.info(&name).is_none() && source.info(&other).is_some() {
                renamed.insert(name, other);
            }
        }
    }
    if views.is_empty() && renamed.is_empty() {
        return Ok(source);
    }
    Ok(Arc::new(Views::new(source, views, renamed)))
}

fn cut(
    spec: &ModelSpec,
    family: &dyn Family,
    source: &dyn TensorSource,
    layer: LayerId,
    views: &mut BTreeMap<String, View>,
) -> Result<(), CheckpointError> {
    let (experts, inner, hidden) = (spec.routing.experts, spec.moe_intermediate, spec.hidden);
    let stacks = family.stacks(layer);
    let found = stacks.each_ref().map(|stem| {
        [stem.clone(), format!("{stem}.weight")]
            .into_iter()
            .find_map(|name| source.info(&name).map(|info| (name, info)))
    });
    let [(gate_up, gate_up_info), (down, down_info)] = match found {
        [None, None] => return Ok(()),
        [Some(gate_up), Some(down)] => [gate_up, down],
        [one, other] => {
            let missing = if one.is_none() { &stacks[0] } else { &stacks[1] };
            return Err(CheckpointError::Missing {
                file: source.file(missing).to_owned(),
                tensor: missing.clone(),
                nearest: one.or(other).map(|(name, _)| name),
            });
        }
    };
    for (name, info) in [(&gate_up, &gate_up_info), (&down, &down_info)] {
        if !matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(CheckpointError::not_a_weight(source.file(name), name, info.dtype));
        }
    }
    let straight = [[experts, 2 * inner, hidden], [experts, hidden, inner]];
    let exchanged = [[experts, hidden, 2 * inner], [experts, inner, hidden]];
    let shapes = [&gate_up_info.shape, &down_info.shape];
    // Never both: if 2 · inner = hidden the down stack tells them apart, if inner = hidden the other.
    let is_straight = straight
        .iter()
        .zip(shapes)
        .all(|(expected, found)| expected[..] == **found);
    if !is_straight
        && !exchanged
            .iter()
            .zip(shapes)
            .all(|(expected, found)| expected[..] == **found)
    {
        let at = usize::from(straight[0][..] == **shapes[0]);
        let (name, info, expected) = [(&gate_up, &gate_up_info, straight[0]), (&down, &down_info, straight[1])][at];
        return Err(CheckpointError::Shape {
            file: source.file(name).to_owned(),
            tensor: name.clone(),
            found: info.shape.clone(),
            expected: expected.to_vec(),
        });
    }
    for expert in 0..experts {
        for matrix in Matrix::ALL {
            let (stored, columns, first) = match matrix {
                Matrix::Gate => (&gate_up, 2 * inner, 0),
                Matrix::Up => (&gate_up, 2 * inner, inner),
                Matrix::Down => (&down, hidden, 0),
            };
            let shape = matrix.shape(hidden, inner);
            // Outputs of one expert in its stack: `columns`; of this matrix among them: from `first` on.
            let (start, strides) = if is_straight {
                (first * shape[1], [shape[1], 1])
            } else {
                (first, [1, columns])
            };
            let name = family.tensor_name(Tensor::Layer(layer, LayerTensor::Expert(expert_id(expert), matrix)));
            let view = View {
                stored: stored.clone(),
                start: expert * columns * shape[1] + start,
                shape,
                strides,
            };
            views.insert(name, view);
        }
    }
    Ok(())
}
