//! The way over the model: two sweeps over the source's calibration stream, the first for what every rank gains, the second
//! for the factors of the widths that were chosen. Law: one layer is in memory; what is written is of the types that the
//! source stores, and smaller than what it stands for.

use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;

use cotk_container::dense::{DenseTensor, write_dense};
use cotk_container::manifest::Checksum;
use cotk_model::checkpoint::DType;
use cotk_model::checkpoint::safetensors::Safetensors;
use cotk_model::families::{self, LayerTensor, Tensor};
use cotk_model::layers::attention::Span;
use cotk_model::layers::cache::{KvKind, LayerCache};
use cotk_model::layers::linear::Linear;
use cotk_model::spec::{AttentionKind, ModelSpec};
use cotk_run::files;
use cotk_run::units::{Bytes, significant};
use half::{bf16, f16};
use ndarray::{Array2, Axis, Slice};
use serde::{Deserialize, Serialize};

use super::factor::{Decomposed, Factors, Moments, Shape, part, put, widths};
use super::recipe::Attention;
use crate::partial::{Entry, Partial, layer_id};
use crate::pipeline::Job;
use crate::recipe::Recipe;
use crate::states::Stream;
use crate::{CompressError, Result};

/// Rows of one product.
const ROWS: usize = 512;

/// What became of attention; in the journal and in the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NarrowedAttention {
    pub layers: Vec<NarrowedLayer>,
    /// Of value and output projections, as stored.
    pub bytes_before: u64,
    pub bytes_after: u64,
    /// Of the file with the narrower tensors.
    pub file: Checksum,
}

/// Of one decoder layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NarrowedLayer {
    pub layer: usize,
    /// Width of a value head before and after.
    pub of: usize,
    pub width: usize,
    /// Σ w‖error‖² of attention's output on held-out tokens over that of the output, before and after the refit of outputs.
    pub held_out_truncated: f64,
    pub held_out: f64,
    pub is_refitted: bool,
    /// Why it stays as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole: Option<String>,
}

impl NarrowedAttention {
    /// For `report.md`.
    pub(crate) fn markdown(&self) -> String {
        let number = |x: f64| significant(x, 3);
        let mut text = format!(
            "\nAttention: value and output projections take {}, of {}. Queries and keys stay as they are: rotary positions \
             stand between them, so that their product is not one of two matrices. Errors: squared, of attention's output on \
             held-out tokens, relative to it.\n\n| layer | value head | error truncated | error refitted | left whole because \
             |\n|---:|---:|---:|---:|---|\n",
            Bytes(self.bytes_after),
            Bytes(self.bytes_before)
        );
        for layer in &self.layers {
            let whole = layer.whole.as_deref().unwrap_or_default();
            let refitted = if layer.is_refitted {
                number(layer.held_out)
            } else {
                "not kept".to_owned()
            };
            let errors = match &layer.whole {
                Some(_) => "| | ".to_owned(),
                None => format!("| {} | {refitted} ", number(layer.held_out_truncated)),
            };
            let _ = writeln!(
                text,
                "| {} | {} of {} {errors}| {whole} |",
                layer.layer, layer.width, layer.of
            );
        }
        text
    }
}

/// Comparisons and contests look at experts alone.
///
/// # Errors
/// [`CompressError::Contradiction`] where the recipe asks for narrower attention.
pub(crate) fn refuse_beside_comparison(recipe: &Recipe) -> Result<()> {
    match recipe.compress.attention {
        None => Ok(()),
        Some(_) => Err(CompressError::Contradiction {
            keys: ["compress.attention", "--compare"],
            found: "comparisons change experts alone".to_owned(),
            help: "leave [compress.attention] out of what is compared",
        }),
    }
}

/// One layer's projections in f64.
struct Pair {
    shape: Shape,
    /// `[hidden, heads · dim]`
    outputs: Array2<f64>,
}

impl Job<'_> {
    /// Makes values and outputs narrower as `[compress.attention]` says: from here on the container's dense part is another.
    ///
    /// # Errors
    /// A family whose values are clipped between both; what the journal promises and is not there; the file system's.
    pub(crate) fn narrow_attention(&mut self, partial: &mut Partial) -> Result<Option<NarrowedAttention>> {
        let Some(wanted) = self.request.recipe.compress.attention.clone() else {
            return Ok(None);
        };
        let path = Self::attention_path(partial);
        let known = partial.attention().cloned();
        let is_whole = |found: &NarrowedAttention| {
            files::checksum_file(&path).is_ok_and(|checksum| Checksum(checksum) == found.file)
        };
        let found = match known {
            Some(found) if is_whole(&found) => found,
            Some(_) => return Err(CompressError::Survey { file: path }),
            None => {
                let found = self.factor_attention(partial, &wanted, path.clone())?;
                partial.finished(Entry::Attention(Box::new(found.clone())))?;
                found
            }
        };
        if found.layers.iter().any(|layer| layer.width < layer.of) {
            let own = Arc::new(Safetensors::open_file(&path)?);
            let mut spec = self.source.files.spec.clone();
            for layer in found.layers.iter().filter(|layer| layer.width < layer.of) {
                spec.layers[layer.layer].value_dim = Some(layer.width);
            }
            let bits = self.request.recipe.compress.dense_bits;
            self.source.narrow(own, spec, bits)?;
        }
        Ok(Some(found))
    }

    /// Where the narrower tensors stand until the dense part is written.
    pub(crate) fn attention_path(partial: &Partial) -> PathBuf {
        partial.states().join("attention.safetensors")
    }

    fn factor_attention(&self, partial: &Partial, wanted: &Attention, path: PathBuf) -> Result<NarrowedAttention> {
        let spec = &self.source.files.spec;
        if let AttentionKind::Grouped { clip: Some(clip), .. } = spec.attention.kind {
            return Err(CompressError::Contradiction {
                keys: ["compress.attention", "clip_qkv"],
                found: format!("values are clipped at {clip} between their projection and the outputs'"),
                help: "leave [compress.attention] out: no product of two matrices stands for that",
            });
        }
        let whole = self.whole_stream(partial, &self.calibration_windows())?;
        self.with
            .progress
            .begin("ranks of attention", 2 * self.layers() as u64, "layers");
        let (mut gains, mut weights) = (Vec::new(), Vec::new());
        for index in 0..self.layers() {
            let pair = self.pair(index)?;
            let [fitted, _] = self.moments(index, &pair, &whole)?;
            gains.push(Decomposed::new(pair.outputs.view(), &fitted)?.gains());
            weights.push(pair.shape.groups * values_width(spec) + pair.shape.heads * spec.hidden);
            self.with.progress.advance(1);
        }
        let widths = widths(&gains, &weights, wanted.multiple.get(), wanted.ratio.get());
        let (mut layers, mut tensors, mut before, mut after) = (Vec::new(), Vec::new(), 0, 0);
        for (index, &width) in widths.iter().enumerate() {
            let names = self.names(index);
            let stored: u64 = names.iter().map(|name| self.stored(name)).sum();
            before += stored;
            let pair = self.pair(index)?;
            let mut layer = NarrowedLayer {
                layer: index,
                of: pair.shape.dim,
                width: pair.shape.dim,
                held_out_truncated: 0.0,
                held_out: 0.0,
                is_refitted: false,
                whole: Some("every rank earns more than those that go elsewhere".to_owned()),
            };
            if width < pair.shape.dim {
                let [fitted, held_out] = self.moments(index, &pair, &whole)?;
                let factors = Decomposed::new(pair.outputs.view(), &fitted)?.factors(width);
                let (better, [truncated, refitted]) = factors.refitted(pair.outputs.view(), &fitted, &held_out)?;
                layer.is_refitted = better.is_some();
                let own = self.narrower(index, &pair, &better.unwrap_or(factors))?;
                let bytes: u64 = own.iter().map(|(tensor, _)| tensor.bytes).sum();
                if bytes < stored {
                    (layer.width, layer.whole) = (width, None);
                    (layer.held_out_truncated, layer.held_out) = (truncated, refitted);
                    after += bytes;
                    tensors.extend(own);
                } else {
                    layer.is_refitted = false;
                    layer.whole = Some(format!("{bytes} bytes at width {width}, {stored} as it is stored"));
                }
            }
            if layer.whole.is_some() {
                after += stored;
            }
            layers.push(layer);
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        let described: Vec<DenseTensor> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
        write_dense(&path, &described, |tensor| {
            let own = tensors.iter().find(|(own, _)| own.name == tensor.name);
            Ok::<_, CompressError>(own.expect("one of these").1.clone())
        })?;
        Ok(NarrowedAttention {
            layers,
            bytes_before: before,
            bytes_after: after,
            file: Checksum(files::checksum_file(&path)?),
        })
    }

    fn name(&self, index: usize, part: LayerTensor) -> String {
        families::of(&self.source.files.spec).tensor_name(Tensor::Layer(layer_id(index), part))
    }

    /// Of what narrower values change: the values' projection, its bias where there is one, the outputs'.
    fn names(&self, index: usize) -> Vec<String> {
        let parts = match self.source.files.spec.attention.kind {
            AttentionKind::Grouped { qkv_bias: true, .. } => {
                vec![LayerTensor::Value, LayerTensor::ValueBias, LayerTensor::Output]
            }
            AttentionKind::Grouped { .. } => vec![LayerTensor::Value, LayerTensor::Output],
            AttentionKind::Latent { .. } => vec![LayerTensor::KeyValueUp, LayerTensor::Output],
        };
        parts.into_iter().map(|part| self.name(index, part)).collect()
    }

    /// Bytes of a tensor as the source stores it, without an FP8 matrix's scales.
    fn stored(&self, name: &str) -> u64 {
        let info = self.source.files.source.info(name);
        info.map_or(0, |info| info.bytes())
    }

    fn load(&self, name: &str, rows: usize, cols: usize) -> Result<Array2<f64>> {
        let weights = self.source.files.source.load_f32(name, &[rows, cols])?;
        let weights = weights.into_iter().map(f64::from).collect();
        Ok(Array2::from_shape_vec((rows, cols), weights).expect("loaded in this shape"))
    }

    fn pair(&self, index: usize) -> Result<Pair> {
        self.source.files.source.release();
        let spec = &self.source.files.spec;
        let (heads, dim) = (spec.attention.heads, spec.value_dim(&spec.layers[index]));
        let groups = match spec.attention.kind {
            AttentionKind::Grouped { .. } => spec.attention.kv_heads,
            AttentionKind::Latent { .. } => heads,
        };
        Ok(Pair {
            shape: Shape { heads, groups, dim },
            outputs: self.load(&self.name(index, LayerTensor::Output), spec.hidden, heads * dim)?,
        })
    }

    /// Second moments of mixed values: of the tokens that are fitted to, of those that judge. Each token counts as an error
    /// of it does in the state that it is added to; first tokens of windows are left out.
    fn moments(&self, index: usize, pair: &Pair, stream: &Stream) -> Result<[Moments; 2]> {
        let hidden = self.source.files.spec.hidden;
        let width = pair.shape.heads * pair.shape.dim;
        let layer = self.load_layer(index)?;
        #[expect(clippy::cast_possible_truncation, reason = "weights were f32")]
        let outputs = pair.outputs.iter().map(|&w| w as f32).collect();
        let outputs = Linear::new(outputs, hidden, width);
        let mut found = [Moments::new(pair.shape), Moments::new(pair.shape)];
        let mut window = 0;
        stream.read(index, self.with.cancel, |states, windows| {
            let mut caches: Vec<LayerCache> = windows.iter().map(|_| layer.cache(KvKind::default())).collect();
            let mut spans: Vec<Span<'_>> = (windows.iter().zip(&mut caches))
                .map(|(&tokens, cache)| Span { tokens, cache })
                .collect();
            let mut mixed = layer.mixed_values(&self.rope, &states, &mut spans);
            let said = outputs.apply(&mixed);
            let rows = (states.chunks_exact(hidden).zip(said.chunks_exact(hidden))).zip(mixed.chunks_exact_mut(width));
            for ((state, said), mixed) in rows {
                let square: f32 = state.iter().zip(said).map(|(h, o)| (h + o) * (h + o)).sum();
                let root = if square > 0.0 { square.sqrt().recip() } else { 0.0 };
                mixed.iter_mut().for_each(|x| *x *= root);
            }
            let mixed = Array2::from_shape_vec((mixed.len() / width, width), mixed).expect("whole rows");
            let mut from = 0;
            for &tokens in windows {
                let judges = self.texts.held_out.get(window).copied().unwrap_or(false);
                for start in (from + 1..from + tokens).step_by(ROWS) {
                    let rows = Slice::from(start..(start + ROWS).min(from + tokens));
                    found[usize::from(judges)].add(&mixed.slice_axis(Axis(0), rows).to_owned());
                }
                from += tokens;
                window += 1;
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The tensors of a narrower pair, in the source's types (FP8: bf16).
    fn narrower(&self, index: usize, pair: &Pair, factors: &Factors) -> Result<Vec<(DenseTensor, Vec<u8>)>> {
        let spec = &self.source.files.spec;
        let Shape { heads, groups, dim } = pair.shape;
        let rank = factors.turns[0].nrows();
        let mut own = Vec::new();
        match spec.attention.kind {
            AttentionKind::Grouped { qkv_bias, .. } => {
                for (tensor, cols) in [(LayerTensor::Value, spec.hidden), (LayerTensor::ValueBias, 1)] {
                    if cols == 1 && !qkv_bias {
                        continue;
                    }
                    let name = self.name(index, tensor);
                    let values = if cols == 1 {
                        let bias = self.source.files.source.load_f32(&name, &[groups * dim])?;
                        Array2::from_shape_fn((groups * dim, 1), |(at, _)| f64::from(bias[at]))
                    } else {
                        self.load(&name, groups * dim, cols)?
                    };
                    let mut narrow = Array2::zeros((groups * rank, cols));
                    for (group, turn) in factors.turns.iter().enumerate() {
                        let own = turn.dot(&part(values.view(), group * dim..(group + 1) * dim, 0..cols));
                        put(&mut narrow, group * rank..(group + 1) * rank, 0..cols, own.view());
                    }
                    let shape = if cols == 1 {
                        vec![groups * rank]
                    } else {
                        vec![groups * rank, cols]
                    };
                    own.push(self.tensor(name, shape, &narrow));
                }
            }
            AttentionKind::Latent { kv_rank, .. } => {
                let plain = spec.attention.head_dim - spec.attention.rope.dim;
                let name = self.name(index, LayerTensor::KeyValueUp);
                let up = self.load(&name, heads * (plain + dim), kv_rank)?;
                let mut narrow = Array2::zeros((heads * (plain + rank), kv_rank));
                for (head, turn) in factors.turns.iter().enumerate() {
                    let (from, to) = (head * (plain + dim), head * (plain + rank));
                    let all = 0..kv_rank;
                    let keys = part(up.view(), from..from + plain, all.clone());
                    put(&mut narrow, to..to + plain, all.clone(), keys);
                    let values = turn.dot(&part(up.view(), from + plain..from + plain + dim, all.clone()));
                    put(&mut narrow, to + plain..to + plain + rank, all, values.view());
                }
                own.push(self.tensor(name, vec![heads * (plain + rank), kv_rank], &narrow));
            }
        }
        let name = self.name(index, LayerTensor::Output);
        own.push(self.tensor(name, vec![spec.hidden, heads * rank], &factors.outputs));
        Ok(own)
    }

    fn tensor(&self, name: String, shape: Vec<usize>, values: &Array2<f64>) -> (DenseTensor, Vec<u8>) {
        #[expect(clippy::cast_possible_truncation, reason = "weights are held in 32 bits or fewer")]
        let narrow = values.iter().map(|&w| w as f32);
        let dtype = self.source.files.source.info(&name).map(|info| info.dtype);
        let (dtype, bytes): (_, Vec<u8>) = match dtype {
            Some(DType::F32) => ("F32", narrow.flat_map(f32::to_le_bytes).collect()),
            Some(DType::F16) => ("F16", narrow.flat_map(|w| f16::from_f32(w).to_le_bytes()).collect()),
            _ => ("BF16", narrow.flat_map(|w| bf16::from_f32(w).to_le_bytes()).collect()),
        };
        let tensor = DenseTensor {
            name,
            dtype,
            shape,
            bytes: bytes.len() as u64,
        };
        (tensor, bytes)
    }
}

/// Inputs of the values' projection.
fn values_width(spec: &ModelSpec) -> usize {
    match spec.attention.kind {
        AttentionKind::Grouped { .. } => spec.hidden,
        AttentionKind::Latent { kv_rank, .. } => kv_rank,
    }
}
