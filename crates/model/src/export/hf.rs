//! A folder that transformers loads: `config.json`, one safetensors file with every expert by its published name,
//! tokenizer and defaults as they were. Codes are decoded; f32 keeps every value, f16 and bf16 round.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cotk_container::dense::{DenseTensor, dense_file_bytes, write_dense};
use cotk_container::reader::Container;
use cotk_run::cancel::Cancel;
use cotk_run::files;
use cotk_run::progress::Progress;
use cotk_run::units::Bytes;
use half::{bf16, f16};
use serde_json::Value;

use super::{ExportError, Exported, Loss, Projected, Subject};
use crate::config::ConfigError;
use crate::families::{self, LayerTensor, Tensor};
use crate::folder::ModelFolder;
use crate::inventory;

/// As errors call the format.
const HF: &str = "the Hugging Face layout";
const COPIED: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
];
const COPY_LIMIT_BYTES: u64 = 256 << 20;

/// Element type of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HfType {
    F32,
    F16,
    BF16,
}

impl HfType {
    /// In safetensors.
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
        }
    }

    /// In `config.json`.
    fn torch(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Its bytes, and the values that they hold.
    fn round(self, weights: &[f32]) -> (Vec<u8>, Vec<f32>) {
        match self {
            Self::F32 => (weights.iter().flat_map(|w| w.to_le_bytes()).collect(), weights.to_vec()),
            Self::F16 => {
                let halves: Vec<f16> = weights.iter().map(|&w| f16::from_f32(w)).collect();
                let bytes = halves.iter().flat_map(|h| h.to_le_bytes()).collect();
                (bytes, halves.iter().map(|h| h.to_f32()).collect())
            }
            Self::BF16 => {
                let halves: Vec<bf16> = weights.iter().map(|&w| bf16::from_f32(w)).collect();
                let bytes = halves.iter().flat_map(|h| h.to_le_bytes()).collect();
                (bytes, halves.iter().map(|h| h.to_f32()).collect())
            }
        }
    }
}

/// What is written.
#[derive(Debug, Clone, Copy)]
pub struct HfOptions {
    /// The prefix of a container's codes; absent: all of them.
    pub bits: Option<u32>,
    pub kind: HfType,
    /// Put experts of zeros in the place of constants.
    pub project: bool,
}

/// Writes the folder `out`, which must not exist.
///
/// # Errors
/// [`ExportError::Refused`] for what the layout cannot carry, a folder that exists; what reading and writing meet;
/// [`cotk_run::Error::Cancelled`]. `out` does not exist then.
pub fn export(
    model: &ModelFolder,
    container: Option<&Container>,
    out: &Path,
    options: &HfOptions,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Exported, ExportError> {
    let kind = options.kind;
    let subject = Subject::new(model, container, options.bits, options.project, HF)?;
    if out.exists() {
        return Err(ExportError::Refused {
            format: HF,
            what: "the output".to_owned(),
            found: format!("{} exists", out.display()),
            expected: "a folder to be made".to_owned(),
            others: 0,
            help: "name another folder, or remove this one".to_owned(),
        });
    }
    subject.check_sizes(HF)?;
    let family = families::of(&subject.spec);
    let listed = inventory::tensors(&subject.spec);
    let tensors: Vec<DenseTensor> = listed
        .iter()
        .map(|(tensor, shape)| DenseTensor {
            name: family.tensor_name(*tensor),
            dtype: kind.name(),
            shape: shape.clone(),
            bytes: shape.iter().product::<usize>() as u64 * kind.bytes(),
        })
        .collect();
    let by_name: BTreeMap<String, Tensor> = listed.iter().map(|(t, _)| (family.tensor_name(*t), *t)).collect();
    let needed = dense_file_bytes(&tensors);
    progress.note(&format!("writing {} to {}", Bytes(needed), out.display()));
    super::check_room(out, needed, HF)?;

    let partial = partial(out);
    files::create_folder(&partial)?;
    let written = (|| -> Result<Exported, ExportError> {
        let mut bytes = copy_files(model, &partial)?;
        let config = config(model, &subject, kind)?;
        files::write_atomic(partial.join("config.json"), config.as_bytes())?;
        bytes += config.len() as u64 + needed;
        progress.begin("exporting", tensors.len() as u64, "tensors");
        let mut projected: Vec<Projected> = subject.projected_constants().collect();
        write_dense(&partial.join("model.safetensors"), &tensors, |tensor| {
            cancel.check()?;
            let mut note = None;
            let weights = match by_name[&tensor.name] {
                Tensor::Layer(layer, LayerTensor::Expert(expert, matrix)) => {
                    let source = subject.kept(layer)[expert.0 as usize];
                    let inner = subject.inner(layer, source)?;
                    if inner.is_some_and(|inner| inner < subject.spec.moe_intermediate) {
                        note = Some("fewer channels, filled up with zeros: same values");
                    }
                    subject.expert(layer, source, matrix)?
                }
                dense => subject.dense(dense, &tensor.shape)?,
            };
            let (bytes, held) = kind.round(&weights);
            if let Some(at) = held.iter().position(|w| !w.is_finite()) {
                return Err(ExportError::Weight {
                    tensor: tensor.name.clone(),
                    detail: format!("{} at index {at} is beyond {}", weights[at], kind.name()),
                });
            }
            let loss = Loss::of(&weights, &held).relative();
            let rounded = (loss > 0.0).then(|| format!("rounded to {}", kind.name()));
            if let Some(reason) = rounded.or(note.map(str::to_owned)) {
                projected.push(Projected {
                    tensor: tensor.name.clone(),
                    reason,
                    loss,
                });
            }
            progress.advance(1);
            Ok::<_, ExportError>(bytes)
        })?;
        progress.end();
        projected.sort_by(|a, b| a.tensor.cmp(&b.tensor));
        files::publish_folder(&partial, out)?;
        Ok(Exported {
            bytes,
            tensors: tensors.len(),
            projected,
        })
    })();
    if written.is_err() {
        // Half a folder helps nobody; the error says why.
        let _ = fs_err::remove_dir_all(&partial);
    }
    written
}

/// Beside `out`, so that the last step is a rename.
fn partial(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(format!(".partial-{}", std::process::id()));
    out.with_file_name(name)
}

fn copy_files(model: &ModelFolder, to: &Path) -> Result<u64, ExportError> {
    let mut bytes = 0;
    for name in COPIED {
        let from = model.path.join(name);
        if from.is_file() {
            let content = files::read(&from, COPY_LIMIT_BYTES)?;
            files::write_atomic(to.join(name), &content)?;
            bytes += content.len() as u64;
        }
    }
    Ok(bytes)
}

/// The model's own config with the type, and the number of experts, of what is left.
fn config(model: &ModelFolder, subject: &Subject<'_>, kind: HfType) -> Result<String, ExportError> {
    let mut config: Value = serde_json::from_str(&model.config_text).map_err(|e| {
        crate::ModelError::from(ConfigError::Json {
            file: model.path.join("config.json"),
            detail: e.to_string(),
        })
    })?;
    if let Some(map) = config.as_object_mut() {
        for key in ["num_experts", "num_local_experts", "n_routed_experts"] {
            if map.contains_key(key) {
                map.insert(key.to_owned(), subject.spec.routing.experts.into());
            }
        }
        if map.contains_key("num_experts_per_tok") {
            map.insert("num_experts_per_tok".to_owned(), subject.spec.routing.top_k.into());
        }
        // Said of the source's weights, not of these.
        map.remove("quantization_config");
        let key = if map.contains_key("dtype") {
            "dtype"
        } else {
            "torch_dtype"
        };
        map.insert(key.to_owned(), kind.torch().into());
    }
    let mut text = serde_json::to_string_pretty(&config).expect("a value has a JSON form");
    text.push('\n');
    Ok(text)
}
