//! Models in the files of other programs: [`gguf`] for llama.cpp, [`hf`] for transformers. What a format cannot carry
//! is refused, or projected onto what it can, with the loss measured. Law: what is not listed as projected keeps every
//! value that our own runtime computes with.

use std::collections::BTreeSet;
use std::sync::Arc;

use cotk_container::ContainerError;
use cotk_container::manifest::{DroppedMeaning, State};
use cotk_container::reader::Container;
use cotk_container::view::{ExpertView, MatrixView};
use cotk_kernels::cpu::noise::NoiseExpert;
use cotk_kernels::cpu::weights::Weights;
use cotk_run::units::{ExpertId, LayerId};

use crate::ModelError;
use crate::checkpoint::TensorSource;
use crate::families::{self, LayerTensor, Matrix, Tensor};
use crate::folder::ModelFolder;
use crate::inventory::expert_id;
use crate::spec::ModelSpec;

pub mod gguf;
pub mod hf;
mod vocabulary;

#[cfg(test)]
mod tests;

/// Why a model cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// The format has no place for it; `what` is a tensor, a config key or a part of the tokenizer.
    #[error("{format} cannot carry {what}: found {found}, expected {expected}{}", also(*others))]
    Refused {
        format: &'static str,
        what: String,
        found: String,
        expected: String,
        /// How many further tensors are like it.
        others: usize,
        /// What to do.
        help: String,
    },
    /// A weight that the format's numbers do not reach.
    #[error("`{tensor}`: {detail}")]
    Weight { tensor: String, detail: String },
}

fn also(others: usize) -> String {
    if others == 0 {
        String::new()
    } else {
        format!(" (and {others} more)")
    }
}

impl From<cotk_run::Error> for ExportError {
    fn from(error: cotk_run::Error) -> Self {
        Self::Model(error.into())
    }
}

impl From<crate::checkpoint::CheckpointError> for ExportError {
    fn from(error: crate::checkpoint::CheckpointError) -> Self {
        Self::Model(error.into())
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Exported {
    /// Of all files.
    pub bytes: u64,
    pub tensors: usize,
    pub projected: Vec<Projected>,
}

/// A tensor that the format holds in another form.
#[derive(Debug, Clone, PartialEq)]
pub struct Projected {
    /// Its name in the export.
    pub tensor: String,
    pub reason: String,
    /// ‖written − ours‖ / ‖ours‖; 0 where every value is kept.
    pub loss: f64,
}

/// Squared sums that make a [`Projected::loss`].
#[derive(Debug, Clone, Copy, Default)]
struct Loss {
    lost: f64,
    whole: f64,
}

impl Loss {
    fn of(ours: &[f32], written: &[f32]) -> Self {
        let mut loss = Self::default();
        for (&ours, &written) in ours.iter().zip(written) {
            let (ours, written) = (f64::from(ours), f64::from(written));
            loss.lost += (written - ours) * (written - ours);
            loss.whole += ours * ours;
        }
        loss
    }

    fn add(&mut self, other: Self) {
        self.lost += other.lost;
        self.whole += other.whole;
    }

    fn relative(self) -> f64 {
        if self.lost == 0.0 {
            0.0
        } else {
            (self.lost / self.whole).sqrt()
        }
    }
}

/// A model that is made rather than read, as a synthetic one: it has no tokenizer, its experts are coded alike.
pub struct Made<'a> {
    pub spec: &'a ModelSpec,
    /// The dense part.
    pub source: &'a dyn TensorSource,
    /// One expert, whole and in plain codes; asked for layer by layer.
    pub expert: &'a (dyn Fn(LayerId, ExpertId) -> Result<Arc<NoiseExpert>, ExportError> + Sync),
}

/// Where routed experts come from.
enum Experts<'a> {
    /// Weights of a checkpoint.
    Weights,
    Container(&'a Container),
    Made(&'a Made<'a>),
}

/// A model as exports see it: the experts that are left, renumbered, the same count in all layers.
struct Subject<'a> {
    /// The dense part.
    source: &'a dyn TensorSource,
    experts: Experts<'a>,
    /// Experts of a layer of the source.
    all: usize,
    /// The spec of what is left.
    spec: ModelSpec,
    /// Of each MoE layer, in the numbering of the source: who can be routed to.
    kept: Vec<(LayerId, Vec<ExpertId>)>,
    /// Of them, those that answer with a constant: experts of zeros in the export.
    constants: BTreeSet<(LayerId, ExpertId)>,
    /// The width that a container's experts are taken at; absent: all of it.
    bits: Option<u32>,
}

impl<'a> Subject<'a> {
    fn new(
        files: &'a ModelFolder,
        container: Option<&'a Container>,
        bits: Option<u32>,
        project: bool,
        format: &'static str,
    ) -> Result<Self, ExportError> {
        let refused = |what: &str, found: String, expected: &str, help: &str| {
            Err(ExportError::Refused {
                format,
                what: what.to_owned(),
                found,
                expected: expected.to_owned(),
                others: 0,
                help: help.to_owned(),
            })
        };
        if let Some(layer) = files.spec.layers.iter().find(|layer| layer.value_dim.is_some()) {
            return refused(
                "attention",
                format!("value heads of {}", files.spec.value_dim(layer)),
                "the width that the config names, in all layers",
                "compress without [compress.attention]: cotk alone runs narrower values",
            );
        }
        let all = files.spec.routing.experts;
        let kept: Vec<(LayerId, Vec<ExpertId>)> = match container {
            None => {
                let experts: Vec<ExpertId> = (0..all).map(expert_id).collect();
                let layers = files.spec.moe_layers().into_iter();
                layers.map(|layer| (layer, experts.clone())).collect()
            }
            Some(container) => (container.manifest().layers.iter())
                .map(|layer| {
                    let kept = layer.experts.iter().filter(|e| e.state.is_routable());
                    (layer.layer, kept.map(|e| e.expert).collect())
                })
                .collect(),
        };
        let layers = container.map_or(&[][..], |container| &container.manifest().layers);
        let all_experts = layers.iter().flat_map(|l| l.experts.iter().map(|e| (l.layer, e)));
        let constants = all_experts.filter(|(_, e)| matches!(e.state, State::Constant(_)));
        let constants: BTreeSet<_> = constants.map(|(layer, e)| (layer, e.expert)).collect();
        if let (Some((layer, expert)), false) = (constants.first(), project) {
            return refused(
                "constants in the place of experts",
                format!("{} of them, the first is {expert} of {layer}", constants.len()),
                "weights: no tensor answers the same whatever it is asked",
                "--project puts experts of zeros in their place and prints the loss",
            );
        }
        let mut counts: Vec<usize> = kept.iter().map(|(_, experts)| experts.len()).collect();
        counts.dedup();
        let &[count] = counts.as_slice() else {
            if counts.is_empty() {
                return refused("experts", "none".into(), "a model with experts", "");
            }
            let counts: Vec<String> = kept.iter().map(|(_, experts)| experts.len().to_string()).collect();
            return refused(
                "unequal numbers of experts",
                format!("{} by layer", counts.join(", ")),
                "the same in all layers: a padded expert could not be made unselectable",
                "compress again with the same number of experts in every layer, or serve it with `cotk serve`",
            );
        };
        if count < all {
            let is_masked = container.is_some_and(|c| c.manifest().dropped == DroppedMeaning::Masked);
            if is_masked && !files.spec.routing.norm_topk {
                return refused(
                    "dropped experts whose router rows are kept",
                    "`masked`".into(),
                    "`removed`: the softmax runs over the experts that are left",
                    "compress again with experts removed, or serve it with `cotk serve`",
                );
            }
            if files.spec.routing.groups.is_some() {
                return refused(
                    "dropped experts in a model with groups of experts",
                    format!("{count} of {all}"),
                    "all of them",
                    "compress again without dropping experts, or serve it with `cotk serve`",
                );
            }
        }
        let mut spec = files.spec.clone();
        spec.routing.experts = count;
        spec.routing.top_k = spec.routing.top_k.min(count);
        Ok(Self {
            source: files.source.as_ref(),
            experts: container.map_or(Experts::Weights, Experts::Container),
            all,
            spec,
            kept,
            constants,
            bits,
        })
    }

    /// A made model: all of its experts.
    fn made(made: &'a Made<'a>) -> Self {
        let all = made.spec.routing.experts;
        let experts: Vec<ExpertId> = (0..all).map(expert_id).collect();
        let layers = made.spec.moe_layers().into_iter();
        Self {
            source: made.source,
            experts: Experts::Made(made),
            all,
            kept: layers.map(|layer| (layer, experts.clone())).collect(),
            constants: BTreeSet::new(),
            spec: made.spec.clone(),
            bits: None,
        }
    }

    /// The experts that are left of a layer.
    fn kept(&self, layer: LayerId) -> &[ExpertId] {
        let found = self.kept.iter().find(|(id, _)| *id == layer);
        found.map_or(&[], |(_, experts)| experts)
    }

    /// A tensor of the dense part in f32; router rows and biases of the experts that are left.
    fn dense(&self, tensor: Tensor, shape: &[usize]) -> Result<Vec<f32>, ExportError> {
        let name = families::of(&self.spec).tensor_name(tensor);
        let source = self.source;
        let Tensor::Layer(layer, LayerTensor::Router | LayerTensor::RouterBias) = tensor else {
            return Ok(source.load_f32(&name, shape)?);
        };
        let mut whole = shape.to_vec();
        whole[0] = self.all;
        let rows = source.load_f32(&name, &whole)?;
        let width: usize = shape[1..].iter().product();
        let kept = self.kept(layer).iter();
        Ok(kept
            .flat_map(|e| &rows[e.0 as usize * width..][..width])
            .copied()
            .collect())
    }

    /// `read` of one expert of the source's numbering, as coded; `None` in a checkpoint that codes nothing.
    fn coded<R>(
        &self,
        layer: LayerId,
        expert: ExpertId,
        read: impl FnOnce(&ExpertView<'_>) -> R,
    ) -> Result<Option<R>, ExportError> {
        match self.experts {
            Experts::Weights => Ok(None),
            Experts::Container(container) => {
                let view = container.expert(layer, expert, self.bits.unwrap_or(u32::MAX))?;
                Ok(view.as_ref().map(read))
            }
            Experts::Made(made) => {
                let held = (made.expert)(layer, expert)?;
                let prefix = |at: usize| match held.weights(at) {
                    Weights::Coded(coded) => *coded.prefix(),
                    Weights::Half(_) => unreachable!("made in plain codes"),
                };
                Ok(Some(read(&ExpertView {
                    gate: MatrixView::Codes(prefix(0)),
                    up: MatrixView::Codes(prefix(1)),
                    down: MatrixView::Codes(prefix(2)),
                })))
            }
        }
    }

    /// The weights of one matrix of one expert, as our runtime computes with them, `[rows, columns]` of the config: channels
    /// that were cut are zeros, which changes nothing. A constant is all zeros.
    fn expert(&self, layer: LayerId, expert: ExpertId, matrix: Matrix) -> Result<Vec<f32>, ExportError> {
        let shape = matrix.shape(self.spec.hidden, self.spec.moe_intermediate);
        if self.constants.contains(&(layer, expert)) {
            return Ok(vec![0.0; shape[0] * shape[1]]);
        }
        let view = |view: &ExpertView<'_>| (view.part(part(matrix)).cols(), view.weights(part(matrix)));
        if let Some((columns, weights)) = self.coded(layer, expert, view)? {
            return Ok(padded(weights, columns, shape));
        }
        let name = families::of(&self.spec).tensor_name(Tensor::Layer(layer, LayerTensor::Expert(expert, matrix)));
        Ok(self.source.load_f32(&name, &shape)?)
    }

    /// Inner channels of an expert; `None`: those of the config.
    fn inner(&self, layer: LayerId, expert: ExpertId) -> Result<Option<usize>, ExportError> {
        self.coded(layer, expert, |view| view.inner())
    }

    /// Refuses experts with more channels than the config says.
    fn check_sizes(&self, format: &'static str) -> Result<(), ExportError> {
        for (layer, experts) in &self.kept {
            for &expert in experts {
                let Some(inner) = self.inner(*layer, expert)? else {
                    continue;
                };
                if inner > self.spec.moe_intermediate {
                    return Err(ExportError::Refused {
                        format,
                        what: format!("{expert} of {layer}"),
                        found: format!("{inner} channels"),
                        expected: format!("{} at most, as the config says", self.spec.moe_intermediate),
                        others: 0,
                        help: "the container and its config disagree: compress again".to_owned(),
                    });
                }
            }
        }
        Ok(())
    }

    /// What became of constants, for the list of what was projected.
    fn projected_constants(&self) -> impl Iterator<Item = Projected> {
        self.constants.iter().map(|(layer, expert)| Projected {
            tensor: format!("{expert} of {layer}"),
            reason: "a constant (novice): an expert of zeros".to_owned(),
            loss: 1.0,
        })
    }
}

/// Rows of `columns` in a matrix of another shape, zeros beside and below.
fn padded(weights: Vec<f32>, columns: usize, [rows, width]: [usize; 2]) -> Vec<f32> {
    if columns == width {
        let mut whole = weights;
        whole.resize(rows * width, 0.0);
        return whole;
    }
    let mut whole = vec![0.0; rows * width];
    for (into, row) in whole.chunks_exact_mut(width).zip(weights.chunks_exact(columns)) {
        into[..columns].copy_from_slice(row);
    }
    whole
}

/// The same matrix in a record.
fn part(matrix: Matrix) -> cotk_container::layout::Part {
    match matrix {
        Matrix::Gate => cotk_container::layout::Part::Gate,
        Matrix::Up => cotk_container::layout::Part::Up,
        Matrix::Down => cotk_container::layout::Part::Down,
    }
}

/// Refuses to begin what the disk has no room for.
fn check_room(out: &std::path::Path, needed: u64, format: &'static str) -> Result<(), ExportError> {
    let free = cotk_run::files::free_bytes(out)?;
    if free >= needed {
        return Ok(());
    }
    Err(ExportError::Refused {
        format,
        what: out.display().to_string(),
        found: format!("{free} bytes free"),
        expected: format!("{needed} bytes"),
        others: 0,
        help: "free some space, or name another folder".to_owned(),
    })
}
