//! The model that is compressed: its files, what its bytes are, what of them is dense.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cotk_container::dense::{DenseTensor, PLANES};
use cotk_container::manifest::{Checksum, Matrix, SourceModel};
use cotk_container::reader::is_container;
use cotk_model::checkpoint::TensorSource;
use cotk_model::checkpoint::coded::CodingSource;
use cotk_model::folder::ModelFolder;
use cotk_model::inventory;
use cotk_model::spec::ModelSpec;
use cotk_run::files;
use cotk_run::units::{ExpertId, LayerId};

use crate::attention::Narrowed;
use crate::recipe::DenseBits;
use crate::{CompressError, Result};

/// Copied beside the dense part where the source has them; names as in Hugging Face folders.
const COPIED: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
];

/// An open source model.
pub struct Source {
    pub files: ModelFolder,
    /// The config as JSON, for the manifest.
    pub config: serde_json::Value,
    pub origin: SourceModel,
    /// The dense part as the container will hold it.
    pub dense: Vec<DenseTensor>,
    /// What it is read from: the source itself, or some matrices narrower or coded on the way.
    pub student: Arc<dyn TensorSource>,
    /// Shapes of the dense part as the container will hold it.
    pub student_spec: ModelSpec,
    /// Whether some of it is narrower than in the source.
    is_narrowed: bool,
    /// Those, as the manifest describes them.
    pub coded: BTreeMap<String, Matrix>,
    /// Of its files: weights, config, tokenizer.
    pub bytes: u64,
}

impl Source {
    /// Opens a Hugging Face folder and reads all of it once, for its hash. `dense_bits` as [`DenseBits::coded`].
    ///
    /// # Errors
    /// What is missing or broken; a model without routed experts; a container.
    pub fn open(path: &Path, dense_bits: DenseBits) -> Result<Self> {
        if is_container(path) {
            return Err(CompressError::AlreadyCompressed { file: path.to_owned() });
        }
        let files = ModelFolder::open(path)?;
        let spec = &files.spec;
        let layers = spec.moe_layers();
        if layers.is_empty() {
            return Err(CompressError::NoExperts {
                file: path.join("config.json"),
                family: spec.family,
            });
        }
        let source = files.source.as_ref();
        let mut expert_bytes = 0;
        for &layer in &layers {
            for expert in (0..).map(ExpertId).take(spec.routing.experts) {
                expert_bytes += inventory::expert_storage(spec, source, layer, expert)?.0;
            }
        }
        let (student, coded) = student_of(files.source.clone(), spec, dense_bits)?;
        let dense = dense_of(spec, student.as_ref());
        let bytes = file_bytes(&files)?;
        let per_expert = 3 * spec.hidden as u64 * spec.moe_intermediate as u64;
        let origin = SourceModel {
            hash: hash(&files)?,
            bytes: source.bytes(),
            expert_bytes,
            expert_weights: per_expert * (layers.len() * spec.routing.experts) as u64,
        };
        let config = serde_json::from_str(&files.config_text).map_err(|e| cotk_run::Error::Io {
            action: "read",
            file: path.join("config.json"),
            source: e.into(),
        })?;
        Ok(Self {
            config,
            origin,
            dense,
            student,
            coded,
            bytes,
            student_spec: files.spec.clone(),
            is_narrowed: false,
            files,
        })
    }

    /// Takes the tensors of `own` in the place of the source's, whose shapes are then those of `spec`.
    ///
    /// # Errors
    /// A shape that no code has.
    pub(crate) fn narrow(&mut self, own: Arc<dyn TensorSource>, spec: ModelSpec, dense_bits: DenseBits) -> Result<()> {
        let narrowed = Arc::new(Narrowed::new(self.files.source.clone(), own));
        (self.student, self.coded) = student_of(narrowed, &spec, dense_bits)?;
        self.dense = dense_of(&spec, self.student.as_ref());
        (self.student_spec, self.is_narrowed) = (spec, true);
        Ok(())
    }

    /// Whether the container's dense part is the source's, bit for bit.
    pub fn is_dense_as_stored(&self) -> bool {
        self.coded.is_empty() && !self.is_narrowed
    }

    /// Files to copy as they are: those that the source has.
    pub fn copied(&self) -> Vec<&'static str> {
        COPIED
            .into_iter()
            .filter(|name| self.files.path.join(name).is_file())
            .collect()
    }

    /// Layers with experts, ascending.
    pub fn moe_layers(&self) -> Vec<LayerId> {
        self.files.spec.moe_layers()
    }
}

/// What a container's dense part is read from, and what of it is coded.
fn student_of(
    source: Arc<dyn TensorSource>,
    spec: &ModelSpec,
    dense_bits: DenseBits,
) -> Result<(Arc<dyn TensorSource>, BTreeMap<String, Matrix>)> {
    Ok(match dense_bits.coded() {
        None => (source, BTreeMap::new()),
        Some(bits) => {
            let coding = CodingSource::new(source, &inventory::codable(spec), bits)?;
            let coded = coding.matrices().clone();
            (Arc::new(coding), coded)
        }
    })
}

fn dense_of(spec: &ModelSpec, student: &dyn TensorSource) -> Vec<DenseTensor> {
    let names = inventory::dense_names(spec, student).into_iter();
    names.filter_map(|name| dense_tensor(name, student)).collect()
}

/// A tensor of the dense part as it will be written.
fn dense_tensor(name: String, source: &dyn TensorSource) -> Option<DenseTensor> {
    if let Some(matrix) = source.codes(&name) {
        let bytes = matrix.format.total_bytes();
        return Some(DenseTensor {
            name: format!("{name}{PLANES}"),
            dtype: "U8",
            shape: vec![bytes],
            bytes: bytes as u64,
        });
    }
    let info = source.info(&name)?;
    Some(DenseTensor {
        name,
        dtype: info.dtype.name(),
        bytes: info.bytes(),
        shape: info.shape,
    })
}

/// Config, copied files and the files that hold tensors.
fn file_bytes(folder: &ModelFolder) -> Result<u64> {
    let names = folder.source.names();
    let mut paths: Vec<PathBuf> = names.iter().map(|name| folder.source.file(name).to_owned()).collect();
    paths.push(folder.path.join("config.json"));
    paths.extend(
        COPIED
            .iter()
            .map(|name| folder.path.join(name))
            .filter(|path| path.is_file()),
    );
    paths.sort();
    paths.dedup();
    let bytes = |path: &PathBuf| {
        let length = files::open(path)?.metadata().map(|m| m.len());
        length.map_err(cotk_run::Error::io("read", path))
    };
    paths.iter().map(|path| Ok(bytes(path)?)).sum()
}

/// Of config, tokenizer and every tensor's bytes, whatever files they are cut into.
fn hash(folder: &ModelFolder) -> Result<Checksum> {
    let mut sums = files::checksum(folder.config_text.as_bytes()).to_le_bytes().to_vec();
    for name in COPIED {
        let path = folder.path.join(name);
        if path.is_file() {
            sums.extend_from_slice(name.as_bytes());
            sums.extend_from_slice(&files::checksum_file(&path)?.to_le_bytes());
        }
    }
    for name in folder.source.names() {
        sums.extend_from_slice(name.as_bytes());
        sums.extend_from_slice(&files::checksum(&folder.source.raw(&name)?).to_le_bytes());
        // Memory is that of a layer, also here.
        folder.source.release();
    }
    Ok(Checksum(files::checksum(&sums)))
}
