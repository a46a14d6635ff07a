//! A GGUF file that llama.cpp runs: names and keys by `families::gguf`, the vocabulary by `vocabulary`, bytes by
//! `cotk_container::gguf`. Plain codes of groups keep every value in Q8_0 or Q4_0; what has no codes becomes F16, norms
//! and routers F32.

use std::path::Path;

use cotk_container::gguf::blocks::{coded_rows, decode, holds, weight_rows};
use cotk_container::gguf::{GgufTensor, Sink, TensorType, Value, write};
use cotk_container::reader::Container;
use cotk_container::view::ExpertView;
use cotk_run::cancel::Cancel;
use cotk_run::progress::Progress;
use cotk_run::units::{Bytes, LayerId};
use rayon::prelude::*;

use super::{Experts, ExportError, Exported, Loss, Made, Projected, Subject, part, vocabulary};
use crate::families::gguf::{self as names, Arch, Refusal};
use crate::families::{self, LayerTensor, Matrix, Tensor};
use crate::folder::ModelFolder;
use crate::inventory;
use crate::spec::AttentionKind;

/// As errors call the format.
const GGUF: &str = "GGUF";
/// Experts coded at once: bounds memory.
const EXPERTS_AT_ONCE: usize = 8;
/// Rows of a coded dense matrix written at once.
const ROWS_AT_ONCE: usize = 8192;

/// What a file is to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GgufOptions {
    /// `general.name`.
    pub name: String,
    /// Of experts: 8 or 4 for a checkpoint without codes (absent: F16); a container's prefix (absent: all of it).
    pub bits: Option<u32>,
    /// Of all other matrices: 8 or 4 (absent: F16).
    pub dense_bits: Option<u32>,
    /// Round what the format cannot carry to what it can, rather than refuse it.
    pub project: bool,
}

/// Where a tensor's values come from.
#[derive(Debug, Clone, Copy)]
enum Origin {
    /// One of the dense part. The embedding stands in for a tied head.
    Dense(Tensor),
    /// The part of a latent projection that makes keys, transposed head by head, or the part that makes values.
    Latent(Tensor, Half),
    /// One matrix of all experts of a layer.
    Stack(LayerId, Matrix),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Keys,
    Values,
}

/// How a tensor's values become bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    /// Codes as they are.
    Codes,
    /// From f32. `Some`: why that is a projection.
    Weights(Option<String>),
    /// As asked for: rounding is what was wanted.
    Asked,
}

struct Planned {
    tensor: GgufTensor,
    origin: Origin,
    way: Way,
    /// Loss-free changes that the reader should know of.
    note: Option<String>,
}

/// Writes `out`.
///
/// # Errors
/// [`ExportError::Refused`] for what the format or llama.cpp cannot carry, before anything is written; what reading and
/// writing meet; [`cotk_run::Error::Cancelled`]. Nothing stands under `out` then that was not there before.
pub fn export(
    files: &ModelFolder,
    container: Option<&Container>,
    out: &Path,
    options: &GgufOptions,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Exported, ExportError> {
    let subject = Subject::new(files, container, options.bits, options.project, GGUF)?;
    subject.check_sizes(GGUF)?;
    let vocabulary = vocabulary::metadata(files)?;
    put(&subject, vocabulary, out, options, progress, cancel)
}

/// Writes a model that has no tokenizer: llama.cpp runs it on token ids.
///
/// # Errors
/// As [`export`].
pub fn export_made(
    made: &Made<'_>,
    out: &Path,
    options: &GgufOptions,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Exported, ExportError> {
    let vocabulary = vec![("tokenizer.ggml.model".to_owned(), Value::from("none"))];
    put(&Subject::made(made), vocabulary, out, options, progress, cancel)
}

fn put(
    subject: &Subject<'_>,
    vocabulary: Vec<(String, Value)>,
    out: &Path,
    options: &GgufOptions,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Exported, ExportError> {
    let arch = families::of(&subject.spec).gguf(&subject.spec).map_err(refusal)?;
    let planned = plan(subject, options)?;
    let metadata = metadata(subject, &arch, options, &planned, vocabulary)?;
    let tensors: Vec<GgufTensor> = planned.iter().map(|p| p.tensor.clone()).collect();
    let needed: u64 = tensors.iter().map(GgufTensor::bytes).sum();
    progress.note(&format!("writing {} to {}", Bytes(needed), out.display()));
    super::check_room(out, needed, GGUF)?;

    progress.begin("exporting", tensors.len() as u64, "tensors");
    let mut projected: Vec<Projected> = subject.projected_constants().collect();
    let bytes = write(out, &metadata, &tensors, |index, sink| {
        cancel.check()?;
        let planned = &planned[index];
        let loss = match planned.origin {
            Origin::Dense(tensor) => put_dense(subject, &arch, planned, tensor, sink),
            Origin::Latent(tensor, half) => put_latent(subject, planned, tensor, half, sink),
            Origin::Stack(layer, matrix) => put_stack(subject, planned, layer, matrix, sink),
        }?;
        let reason = match &planned.way {
            Way::Weights(Some(reason)) => Some(reason.clone()),
            Way::Weights(None) if loss > 0.0 => Some(format!("rounded to {}", planned.tensor.kind.name())),
            Way::Codes | Way::Asked | Way::Weights(None) => planned.note.clone(),
        };
        if let Some(reason) = reason {
            projected.push(Projected {
                tensor: planned.tensor.name.clone(),
                reason,
                loss,
            });
        }
        progress.advance(1);
        Ok::<(), ExportError>(())
    })?;
    progress.end();
    Ok(Exported {
        bytes,
        tensors: tensors.len(),
        projected,
    })
}

fn refusal(refusal: Refusal) -> ExportError {
    ExportError::Refused {
        format: "llama.cpp",
        what: format!("`{}`", refusal.what),
        found: refusal.found,
        expected: refusal.expected,
        others: 0,
        help: "export with --hf, or serve it with `cotk serve`".to_owned(),
    }
}

/// Every tensor with its type, in the order of the forward pass.
fn plan(subject: &Subject<'_>, options: &GgufOptions) -> Result<Vec<Planned>, ExportError> {
    let asked = |key: &str, bits: Option<u32>| match bits {
        None => Ok(TensorType::F16),
        Some(8) => Ok(TensorType::Q8_0),
        Some(4) => Ok(TensorType::Q4_0),
        Some(other) => Err(ExportError::Refused {
            format: GGUF,
            what: key.to_owned(),
            found: other.to_string(),
            expected: "8 or 4, the widths of Q8_0 and Q4_0".to_owned(),
            others: 0,
            help: "compress the model to a container of that width and export that: its codes fit Q4_0".to_owned(),
        }),
    };
    let dense = asked("--dense-bits", options.dense_bits)?;
    let experts = match subject.experts {
        Experts::Weights => Some(asked("--bits", options.bits)?),
        Experts::Container(_) | Experts::Made(_) => None,
    };
    let mut planned = Vec::new();
    let mut refused: Vec<ExportError> = Vec::new();
    let mut stacked = None;
    for (tensor, mut shape) in inventory::tensors(&subject.spec) {
        if let Tensor::Layer(layer, LayerTensor::Expert(..)) = tensor {
            if stacked != Some(layer) {
                stacked = Some(layer);
                for matrix in Matrix::ALL {
                    match stack(subject, options, layer, matrix, experts) {
                        Ok(stack) => planned.push(stack),
                        Err(error @ ExportError::Refused { .. }) => refused.push(error),
                        Err(error) => return Err(error),
                    }
                }
            }
            continue;
        }
        if let Tensor::Layer(layer, LayerTensor::KeyValueUp) = tensor {
            planned.extend(latent(subject, layer, tensor, dense));
            continue;
        }
        let Some(name) = names::tensor_name(&subject.spec, tensor) else {
            continue;
        };
        if let Tensor::Layer(_, LayerTensor::SharedGate) = tensor {
            shape = vec![subject.spec.hidden];
        }
        let is_exact = matches!(tensor, Tensor::Layer(_, LayerTensor::Router));
        let kind = if shape.len() == 1 || is_exact {
            TensorType::F32
        } else {
            dense
        };
        let (kind, way, note) = match codes(subject, tensor)? {
            Some(kind) => (kind, Way::Codes, None),
            None => fit(kind, &shape),
        };
        let mut add = |name: String| {
            planned.push(Planned {
                tensor: GgufTensor {
                    name,
                    shape: shape.clone(),
                    kind,
                },
                origin: Origin::Dense(tensor),
                way: way.clone(),
                note: note.clone(),
            });
        };
        add(name);
        if tensor == Tensor::Embedding && subject.spec.tied_embeddings {
            // Several architectures demand it.
            add(names::tensor_name(&subject.spec, Tensor::Head).expect("stands alone"));
        }
    }
    let others = refused.len().saturating_sub(1);
    match refused.into_iter().next() {
        None => Ok(planned),
        Some(ExportError::Refused {
            format,
            what,
            found,
            expected,
            help,
            ..
        }) => Err(ExportError::Refused {
            format,
            what,
            found,
            expected,
            others,
            help,
        }),
        Some(error) => Err(error),
    }
}

/// The type that holds the codes of a dense matrix, where it has such.
fn codes(subject: &Subject<'_>, tensor: Tensor) -> Result<Option<TensorType>, ExportError> {
    // Rows of experts that are gone would have to be cut out.
    if matches!(tensor, Tensor::Layer(_, LayerTensor::Router | LayerTensor::RouterBias)) {
        return Ok(None);
    }
    let name = families::of(&subject.spec).tensor_name(tensor);
    let Some(matrix) = subject.source.codes(&name) else {
        return Ok(None);
    };
    let bytes = subject.source.raw(&name)?;
    let prefix = matrix.plain(&bytes).map_err(|e| ExportError::Weight {
        tensor: name.clone(),
        detail: e.to_string(),
    })?;
    let kinds = [TensorType::Q4_0, TensorType::Q8_0];
    Ok(kinds.into_iter().find(|kind| holds(*kind, &prefix)))
}

/// The two tensors that llama.cpp cuts a latent projection into.
fn latent(subject: &Subject<'_>, layer: LayerId, tensor: Tensor, kind: TensorType) -> Vec<Planned> {
    let (heads, plain, value, rank) = latent_widths(subject);
    let shapes = [vec![heads, rank, plain], vec![heads, value, rank]];
    let halves = names::latent_names(layer.0).into_iter().zip(shapes);
    halves
        .zip([Half::Keys, Half::Values])
        .map(|((name, shape), half)| {
            let (kind, way, note) = fit(kind, &shape);
            Planned {
                tensor: GgufTensor { name, shape, kind },
                origin: Origin::Latent(tensor, half),
                way,
                note,
            }
        })
        .collect()
}

/// Heads, and the widths of a key without positions, a value and a latent vector.
fn latent_widths(subject: &Subject<'_>) -> (usize, usize, usize, usize) {
    let attention = &subject.spec.attention;
    match attention.kind {
        AttentionKind::Latent { kv_rank, value_dim, .. } => (
            attention.heads,
            attention.head_dim - attention.rope.dim,
            value_dim,
            kv_rank,
        ),
        AttentionKind::Grouped { .. } => unreachable!("only latent attention has such a tensor"),
    }
}

/// Weights in a type of blocks need rows of whole blocks; F16 where they are not.
fn fit(kind: TensorType, shape: &[usize]) -> (TensorType, Way, Option<String>) {
    let columns = shape.last().copied().unwrap_or(0);
    if !columns.is_multiple_of(kind.block().0) {
        let reason = format!("rows of {columns} are no whole blocks of {}: F16", kind.name());
        return (TensorType::F16, Way::Weights(None), Some(reason));
    }
    match kind {
        TensorType::F32 | TensorType::F16 => (kind, Way::Weights(None), None),
        TensorType::Q4_0 | TensorType::Q8_0 => (kind, Way::Asked, None),
    }
}

/// One matrix of all experts of a layer: one type for all. `asked` is the type for weights without codes.
fn stack(
    subject: &Subject<'_>,
    options: &GgufOptions,
    layer: LayerId,
    matrix: Matrix,
    asked: Option<TensorType>,
) -> Result<Planned, ExportError> {
    let name = names::stack_name(layer.0, matrix);
    let [rows, columns] = matrix.shape(subject.spec.hidden, subject.spec.moe_intermediate);
    let planned = |kind, way, note| Planned {
        tensor: GgufTensor {
            name: name.clone(),
            shape: vec![subject.kept(layer).len(), rows, columns],
            kind,
        },
        origin: Origin::Stack(layer, matrix),
        way,
        note,
    };
    if let Some(kind) = asked {
        let (kind, way, note) = fit(kind, &[rows, columns]);
        return Ok(planned(kind, way, note));
    }
    // Widths of the experts' codes, narrowest first.
    let mut widths: Vec<u32> = Vec::new();
    let (mut is_held, mut has_factors, mut is_padded) = (true, false, false);
    for &expert in subject.kept(layer) {
        let of = |view: &ExpertView<'_>| {
            let view = view.part(part(matrix));
            let is_whole = view.codes().is_some_and(|codes| holds(TensorType::Q8_0, &codes));
            ([view.rows(), view.cols()], view.bits(), view.rank(), is_whole)
        };
        // Zeros stand for a constant, whatever the type.
        let Some((shape, bits, rank, is_whole)) = subject.coded(layer, expert, of)? else {
            continue;
        };
        is_padded |= shape != [rows, columns];
        widths.push(bits);
        has_factors |= rank > 0;
        is_held &= is_whole;
        if matches!(subject.experts, Experts::Made(_)) {
            break; // one is like all
        }
    }
    widths.sort_unstable();
    widths.dedup();
    let widest = widths.last().copied().unwrap_or(8);
    // Channels that were cut are zeros.
    let filled = is_padded.then(|| "fewer channels, filled up with zeros: same values".to_owned());
    let wanted = options.bits.unwrap_or(widest);
    let kind = if wanted <= 4 {
        TensorType::Q4_0
    } else {
        TensorType::Q8_0
    };
    let found: Vec<String> = widths.iter().map(|bits| format!("{bits}-bit")).collect();
    let found = found.join(" and ");
    let is_too_wide = kind == TensorType::Q4_0 && widest > 4;
    let reason = if !columns.is_multiple_of(kind.block().0) {
        Some((
            format!("{found} codes in rows of {columns}"),
            "rows of whole blocks of 32",
        ))
    } else if has_factors {
        Some((format!("{found} codes with low-rank factors"), "plain codes alone"))
    } else if !is_held {
        Some((
            format!("a {found} prefix of nested codes, half a cell off"),
            "plain codes",
        ))
    } else if is_too_wide {
        Some((format!("{found} plain codes"), "codes that have a prefix of that width"))
    } else if widths.len() > 1 {
        Some((format!("experts of {found}"), "one width: a stack has one type"))
    } else {
        None
    };
    let Some((found, expected)) = reason else {
        let note = (widest < 4).then(|| format!("{widest}-bit codes in Q4_0: same values, 4.5 bits each"));
        return Ok(planned(kind, Way::Codes, note.or(filled)));
    };
    if !options.project {
        return Err(ExportError::Refused {
            format: GGUF,
            what: format!("`{name}`"),
            found,
            expected: expected.to_owned(),
            others: 0,
            help: "--project rounds it to what the format has and prints the loss".to_owned(),
        });
    }
    let kind = if columns.is_multiple_of(kind.block().0) {
        kind
    } else {
        TensorType::F16
    };
    let reason = format!("{found}: {}", kind.name());
    if is_held && !is_too_wide && kind != TensorType::F16 {
        return Ok(planned(kind, Way::Codes, Some(reason)));
    }
    Ok(planned(kind, Way::Weights(Some(reason)), None))
}

fn put_dense(
    subject: &Subject<'_>,
    arch: &Arch,
    planned: &Planned,
    tensor: Tensor,
    sink: &mut Sink<'_>,
) -> Result<f64, ExportError> {
    let mut shape = planned.tensor.shape.clone();
    if let Tensor::Layer(_, LayerTensor::SharedGate) = tensor {
        shape.insert(0, 1);
    }
    let columns = *shape.last().expect("tensors have axes");
    let is_turned = arch.pairs_rope
        && matches!(
            tensor,
            Tensor::Layer(
                _,
                LayerTensor::Query | LayerTensor::QueryBias | LayerTensor::Key | LayerTensor::KeyBias
            )
        );
    let turned = |rows: usize| is_turned.then_some((rows, subject.spec.attention.head_dim));
    if planned.way == Way::Codes {
        let name = families::of(&subject.spec).tensor_name(tensor);
        let matrix = subject.source.codes(&name).expect("planned by its codes");
        let plane = subject.source.raw(&name)?;
        let prefix = matrix.plain(&plane).expect("looked at when it was planned");
        for rows in (0..shape[0]).step_by(ROWS_AT_ONCE) {
            // Whole heads at a time, where rows change places within a head.
            let rows = if is_turned {
                0..shape[0]
            } else {
                rows..(rows + ROWS_AT_ONCE).min(shape[0])
            };
            let end = rows.end;
            let chunks: Vec<std::ops::Range<usize>> = (rows.step_by(64)).map(|at| at..(at + 64).min(end)).collect();
            let blocks: Vec<Vec<u8>> = (chunks.into_par_iter())
                .map(|rows| coded_rows(planned.tensor.kind, &prefix, rows))
                .collect();
            let bytes = blocks.concat();
            match turned(end) {
                Some((rows, head_dim)) => {
                    sink.put(&paired(&bytes, rows, head_dim))?;
                    break;
                }
                None => sink.put(&bytes)?,
            }
        }
        return Ok(0.0);
    }
    let mut weights = subject.dense(tensor, &shape)?;
    if let Some((rows, head_dim)) = turned(shape[0]) {
        weights = paired(&weights, rows, head_dim);
    }
    let (bytes, loss) = encoded(planned, &weights, columns)?;
    sink.put(&bytes)?;
    Ok(loss.relative())
}

/// The projection is `[heads · (plain + value), rank]`, keys first in each head.
fn put_latent(
    subject: &Subject<'_>,
    planned: &Planned,
    tensor: Tensor,
    half: Half,
    sink: &mut Sink<'_>,
) -> Result<f64, ExportError> {
    let (heads, plain, value, rank) = latent_widths(subject);
    let whole = subject.dense(tensor, &[heads * (plain + value), rank])?;
    let mut weights = Vec::with_capacity(planned.tensor.shape.iter().product());
    for head in whole.chunks_exact((plain + value) * rank) {
        let (keys, values) = head.split_at(plain * rank);
        match half {
            Half::Keys => weights.extend((0..rank).flat_map(|r| (0..plain).map(move |p| keys[p * rank + r]))),
            Half::Values => weights.extend_from_slice(values),
        }
    }
    let columns = planned.tensor.shape[2];
    let (bytes, loss) = encoded(planned, &weights, columns)?;
    sink.put(&bytes)?;
    Ok(loss.relative())
}

/// Rows of each head from halves to neighbours: row j of the first half, row j of the second, for each j.
/// `whole` is all rows, one after another, of weights or of bytes.
fn paired<T: Copy>(whole: &[T], rows: usize, head_dim: usize) -> Vec<T> {
    let width = whole.len() / rows;
    let mut out = Vec::with_capacity(whole.len());
    for head in (0..rows).step_by(head_dim) {
        for j in 0..head_dim / 2 {
            for row in [head + j, head + head_dim / 2 + j] {
                out.extend_from_slice(&whole[row * width..][..width]);
            }
        }
    }
    out
}

fn encoded(planned: &Planned, weights: &[f32], columns: usize) -> Result<(Vec<u8>, Loss), ExportError> {
    let kind = planned.tensor.kind;
    let bytes = weight_rows(kind, weights, columns).map_err(|e| ExportError::Weight {
        tensor: planned.tensor.name.clone(),
        detail: e.to_string(),
    })?;
    let loss = match planned.way {
        Way::Weights(_) => Loss::of(weights, &decode(kind, &bytes)),
        Way::Codes | Way::Asked => Loss::default(),
    };
    Ok((bytes, loss))
}

fn put_stack(
    subject: &Subject<'_>,
    planned: &Planned,
    layer: LayerId,
    matrix: Matrix,
    sink: &mut Sink<'_>,
) -> Result<f64, ExportError> {
    let kind = planned.tensor.kind;
    let columns = planned.tensor.shape[2];
    let (block, block_bytes) = kind.block();
    let row_bytes = columns / block * block_bytes;
    let mut sum = Loss::default();
    for experts in subject.kept(layer).chunks(EXPERTS_AT_ONCE) {
        let coded: Vec<Result<(Vec<u8>, Loss), ExportError>> = experts
            .par_iter()
            .map(|&expert| {
                if planned.way == Way::Codes {
                    let rows = |view: &ExpertView<'_>| {
                        let codes = view.part(part(matrix)).codes().expect("planned by its codes");
                        let format = codes.format();
                        let blocks = coded_rows(kind, &codes, 0..format.rows());
                        // A block of zeros is zeros.
                        let mut whole = vec![0; row_bytes * planned.tensor.shape[1]];
                        let width = blocks.len() / format.rows();
                        for (into, row) in whole.chunks_exact_mut(row_bytes).zip(blocks.chunks_exact(width)) {
                            into[..width].copy_from_slice(row);
                        }
                        whole
                    };
                    let rows = subject.coded(layer, expert, rows)?;
                    let rows = rows.unwrap_or_else(|| vec![0; row_bytes * planned.tensor.shape[1]]);
                    return Ok((rows, Loss::default()));
                }
                encoded(planned, &subject.expert(layer, expert, matrix)?, columns)
            })
            .collect();
        for coded in coded {
            let (bytes, loss) = coded?;
            sink.put(&bytes)?;
            sum.add(loss);
        }
    }
    Ok(sum.relative())
}

fn metadata(
    subject: &Subject<'_>,
    arch: &Arch,
    options: &GgufOptions,
    planned: &[Planned],
    vocabulary: Vec<(String, Value)>,
) -> Result<Vec<(String, Value)>, ExportError> {
    let is = |kind| planned.iter().any(|p| p.tensor.kind == kind);
    // As llama.cpp counts them: by what most weights have.
    let of_experts = planned.iter().find(|p| matches!(p.origin, Origin::Stack(..)));
    let file_type = match of_experts.map_or(TensorType::F16, |p| p.tensor.kind) {
        TensorType::F32 => 0,
        TensorType::F16 => 1,
        TensorType::Q4_0 => 2,
        TensorType::Q8_0 => 7,
    };
    let mut keys = vec![
        ("general.architecture".to_owned(), Value::from(arch.name)),
        ("general.name".to_owned(), Value::from(options.name.as_str())),
        ("general.file_type".to_owned(), Value::U32(file_type)),
    ];
    if is(TensorType::Q4_0) || is(TensorType::Q8_0) {
        keys.push(("general.quantization_version".to_owned(), Value::U32(2)));
    }
    let common = names::common_keys(&subject.spec).map_err(refusal)?;
    for (key, value) in common.into_iter().chain(arch.keys.iter().cloned()) {
        keys.push((format!("{}.{key}", arch.name), value));
    }
    keys.extend(vocabulary);
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_neighbours_after_reordering() {
        // Two heads of 4 rows, one column: rows j and j + 2 become 2j and 2j + 1.
        let rows: Vec<f32> = (0..8).map(|i| i as f32).collect();
        assert_eq!(paired(&rows, 8, 4), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        let two: Vec<f32> = rows.iter().flat_map(|&x| [x, x + 0.5]).collect();
        assert_eq!(paired(&two, 8, 4)[..4], [0.0, 0.5, 2.0, 2.5]);
    }
}
