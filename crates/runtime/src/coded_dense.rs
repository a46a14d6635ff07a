//! [`CodedDense`]: the dense part of a checkpoint with its matrices coded on the way, as a container holds them. Routers,
//! gates of shared experts, norms and biases stay as they are stored. Law: codes are those that a container would get.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use cotk_container::dense::{code_matrix, dense_bits};
use cotk_container::manifest::Matrix;
use cotk_model::ModelError;
use cotk_model::checkpoint::{CheckpointError, DType, SharedBytes, TensorInfo, TensorSource};
use cotk_model::families::{self, LayerTensor, Tensor};
use cotk_model::inventory;
use cotk_model::spec::ModelSpec;
use cotk_run::cancel::Cancel;
use cotk_run::progress::Progress;
use rayon::prelude::*;

use crate::{Error, Result};

/// Whether a tensor is a dense matrix that is coded: two axes, and not one that chooses or weighs.
pub(crate) fn is_coded(tensor: Tensor, shape: &[usize]) -> bool {
    shape.len() == 2
        && !matches!(
            tensor,
            Tensor::Layer(
                _,
                LayerTensor::Router | LayerTensor::SharedGate | LayerTensor::Expert(..)
            )
        )
}

/// A source whose dense matrices are plain codes in groups of 32.
pub struct CodedDense {
    inner: Arc<dyn TensorSource>,
    matrices: BTreeMap<String, (Matrix, SharedBytes)>,
}

impl CodedDense {
    /// Codes all dense matrices at `bits` (8 or 4).
    ///
    /// # Errors
    /// Other bits; tensors that are missing or ill-shaped; weights that no code reaches; [`cotk_run::Error::Cancelled`].
    pub fn new(
        spec: &ModelSpec,
        inner: Arc<dyn TensorSource>,
        bits: u32,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Self> {
        if dense_bits(bits).is_none() {
            return Err(Error::Synthetic {
                what: "bits of dense matrices",
                found: bits.to_string(),
                expected: "8 or 4".to_owned(),
            });
        }
        let family = families::of(spec);
        let listed: Vec<(String, [usize; 2])> = (inventory::tensors(spec).into_iter())
            .filter(|(tensor, shape)| is_coded(*tensor, shape))
            .map(|(tensor, shape)| (family.tensor_name(tensor), [shape[0], shape[1]]))
            .collect();
        progress.begin("coding the dense part", listed.len() as u64, "matrices");
        let code = |(name, [rows, cols]): (String, [usize; 2])| -> Result<(String, (Matrix, SharedBytes))> {
            cancel.check().map_err(ModelError::from)?;
            let weights = inner.load_f32(&name, &[rows, cols])?;
            let (matrix, plane) = code_matrix(&weights, rows, cols, bits).map_err(|source| Error::Coding {
                what: name.clone(),
                source: source.into(),
            })?;
            progress.advance(1);
            Ok((name, (matrix, plane.into())))
        };
        let matrices = listed.into_par_iter().map(code).collect::<Result<_>>()?;
        progress.end();
        Ok(Self { inner, matrices })
    }
}

impl TensorSource for CodedDense {
    fn names(&self) -> Vec<String> {
        self.inner.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        match self.matrices.get(name) {
            Some((matrix, _)) => Some(TensorInfo {
                dtype: DType::U8,
                shape: vec![matrix.format.rows(), matrix.format.cols()],
            }),
            None => self.inner.info(name),
        }
    }

    fn file(&self, name: &str) -> &Path {
        self.inner.file(name)
    }

    fn raw(&self, name: &str) -> std::result::Result<Cow<'_, [u8]>, CheckpointError> {
        match self.matrices.get(name) {
            Some((_, plane)) => Ok(plane[..].into()),
            None => self.inner.raw(name),
        }
    }

    fn shared(&self, name: &str) -> std::result::Result<SharedBytes, CheckpointError> {
        match self.matrices.get(name) {
            Some((_, plane)) => Ok(plane.clone()),
            None => self.inner.shared(name),
        }
    }

    fn codes(&self, name: &str) -> Option<&Matrix> {
        self.matrices.get(name).map(|(matrix, _)| matrix)
    }
}

/// Bytes of the dense part as it is stored: of all of it, and of the matrices that one token reads (the embedding only
/// where it is the head).
pub fn stored_bytes(spec: &ModelSpec, source: &dyn TensorSource) -> (u64, u64) {
    let family = families::of(spec);
    let (mut all, mut read) = (0, 0);
    for (tensor, shape) in inventory::tensors(spec) {
        if matches!(tensor, Tensor::Layer(_, LayerTensor::Expert(..))) {
            continue;
        }
        let name = family.tensor_name(tensor);
        let bytes = match source.codes(&name) {
            Some(matrix) => matrix.format.total_bytes() as u64,
            None => source.info(&name).map_or(0, |info| info.bytes()),
        };
        all += bytes;
        if shape.len() == 2 && (tensor != Tensor::Embedding || spec.tied_embeddings) {
            read += bytes;
        }
    }
    (all, read)
}

#[cfg(test)]
mod tests {
    use cotk_run::progress::Silent;

    use super::*;
    use crate::synthetic::{self, Source};

    #[test]
    fn matrices_are_coded_and_what_chooses_is_not() {
        let mut spec = synthetic::spec("ref-qwen2moe", Some(2)).unwrap();
        spec.vocab = 96;
        let source: Arc<dyn TensorSource> = Arc::new(Source::new(&spec, 3));
        let coded = CodedDense::new(&spec, source.clone(), 8, &Silent, &Cancel::new()).unwrap();
        let name = "model.layers.0.self_attn.q_proj.weight";
        let (was, is) = (source.load_f32(name, &[256, 256]), coded.load_f32(name, &[256, 256]));
        let (was, is) = (was.unwrap(), is.unwrap());
        let worst = was.iter().zip(&is).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Half a step of a group whose largest weight is below 0.07.
        assert!(worst <= 0.07 / 254.0, "{worst}");
        assert!(coded.codes("model.layers.0.mlp.gate.weight").is_none());
        let (all, read) = stored_bytes(&spec, &coded);
        // The head is tied: everything but norms and biases is read.
        let small = 2 * (2 * 256 + 256 + 2 * 128) + 256;
        assert_eq!(all - read, 4 * small);
        assert!(CodedDense::new(&spec, source, 2, &Silent, &Cancel::new()).is_err());
    }
}
