//! A synthetic model as a container on disk: how fast a container is opened, and what memory it takes, does not depend on
//! what its weights say. One layer is in memory at a time. Law: it computes what `synthetic::routed_model` of the same
//! seed computes.

use std::fmt::Write as _;
use std::path::Path;

use cotk_container::dense::{DenseTensor, PLANES, plain_matrix, write_dense};
use cotk_container::manifest::{Checksum, DENSE, DroppedMeaning, Manifest, Origin, Prefix, SourceModel, Why};
use cotk_container::writer::{CodedExpert, ContainerWriter, Head, NewExpert};
use cotk_kernels::cpu::noise;
use cotk_model::checkpoint::{CheckpointError, TensorSource};
use cotk_model::spec::ModelSpec;
use cotk_model::{ModelError, inventory};
use cotk_run::cancel::Cancel;
use cotk_run::files;
use cotk_run::progress::Progress;
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::coded_dense::stored_bytes;
use crate::synthetic::{self, Source};
use crate::{Error, Result};

const TOKENIZER: &str = "tokenizer.json";

/// Writes `layers` (all where it is absent) layers of the shape `name` with experts in plain codes of `bits` bits into the
/// new folder `out`, which is there once it is whole: a call that fails leaves nothing.
///
/// # Errors
/// A shape or width that there is not; a folder that is there; a disk without room; the file system's;
/// [`cotk_run::Error::Cancelled`].
pub fn write(
    name: &str,
    layers: Option<usize>,
    bits: u32,
    seed: u64,
    out: &Path,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Manifest> {
    let spec = synthetic::spec(name, layers)?;
    let wrong = |what, found: String, expected: &str| Error::Synthetic {
        what,
        found,
        expected: expected.to_owned(),
    };
    if ![2, 3, 4, 8].contains(&bits) {
        return Err(wrong("width", format!("{bits} bits"), "2, 3, 4 or 8"));
    }
    if out.exists() {
        return Err(wrong("folder", out.display().to_string(), "a path where nothing is"));
    }
    let needed = {
        let routed = (spec.moe_layers().len() * spec.routing.experts) as u64 * inventory::expert_params(&spec);
        // A scale of 16 bits for each 32 weights.
        routed * u64::from(2 * bits + 1) / 16 + stored_bytes(&spec, &Source::new(&spec, seed)).0
    };
    let free = files::free_bytes(out).map_err(ModelError::from)?;
    if free < needed {
        return Err(wrong(
            "room",
            format!("{free} bytes at {}", out.display()),
            &format!("{needed} bytes"),
        ));
    }
    let partial = {
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(format!(".partial-{}", std::process::id()));
        out.with_file_name(name)
    };
    files::create_folder(&partial).map_err(ModelError::from)?;
    let written = write_files(&spec, (name, layers), bits, seed, &partial, (progress, cancel)).and_then(|manifest| {
        files::publish_folder(&partial, out).map_err(ModelError::from)?;
        Ok(manifest)
    });
    if written.is_err() {
        // Half a container helps nobody; the error says why.
        let _ = std::fs::remove_dir_all(&partial);
    }
    written
}

fn write_files(
    spec: &ModelSpec,
    (name, layers): (&str, Option<usize>),
    bits: u32,
    seed: u64,
    out: &Path,
    (progress, cancel): (&dyn Progress, &Cancel),
) -> Result<Manifest> {
    let moe_layers = spec.moe_layers();
    progress.begin("writing layers", moe_layers.len() as u64, "layers");
    let mut writer = ContainerWriter::resume(out, Vec::new())?;
    for (index, &layer) in moe_layers.iter().enumerate() {
        cancel.check().map_err(ModelError::from)?;
        let experts = (0..spec.routing.experts).into_par_iter();
        let experts: Result<Vec<NewExpert>> = experts.map(|e| expert(spec, bits, seed, index, e)).collect();
        writer.append_layer(layer, 1.0, experts?)?;
        progress.advance(1);
    }
    progress.end();
    let source = Source::new(spec, seed);
    dense(&source, &out.join(DENSE))?;
    files::write_atomic(out.join(TOKENIZER), tokenizer(spec.vocab).to_string().as_bytes()).map_err(ModelError::from)?;
    let head = Head {
        source: SourceModel {
            hash: Checksum(0),
            bytes: 0,
            expert_bytes: 0,
            expert_weights: 0,
        },
        config: synthetic::config(name, layers)?,
        recipe: Origin {
            hash: Checksum(0),
            seed,
            calibration: Checksum(0),
            calibration_tokens: 0,
        },
        little_bits: None,
        dropped: DroppedMeaning::Masked,
        hidden: spec.hidden,
        dense: (source.names().iter())
            .filter_map(|name| Some((name.clone(), source.codes(name)?.clone())))
            .collect(),
    };
    Ok(writer.finish(head, &[DENSE, TOKENIZER])?)
}

/// The matrices of [`synthetic::one_expert`], as a record takes them.
fn expert(spec: &ModelSpec, bits: u32, seed: u64, layer: usize, expert: usize) -> Result<NewExpert> {
    let (hidden, inner) = (spec.hidden, spec.moe_intermediate);
    let first = synthetic::expert_seed(spec, seed, layer, expert);
    let matrix = |rows, cols, number| {
        let plain = plain_matrix(rows, cols, bits).map_err(|e| Error::Synthetic {
            what: "matrix",
            found: e.to_string(),
            expected: "sizes that a format has".to_owned(),
        })?;
        Ok::<_, Error>(noise::matrix(plain.format, noise::matrix_seed(first, number)))
    };
    let prefix = Prefix {
        bits,
        delta: None,
        rho: None,
        tokens: 0,
    };
    let coded = CodedExpert {
        prefixes: vec![prefix],
        ..CodedExpert::new(
            matrix(inner, hidden, 0)?,
            matrix(inner, hidden, 1)?,
            matrix(hidden, inner, 2)?,
        )
    };
    let why = Why {
        tokens: 0,
        share: 0.0,
        gate_share: 0.0,
    };
    Ok(NewExpert::new(why, coded))
}

fn dense(source: &Source, path: &Path) -> Result<()> {
    let tensor = |name: &String| {
        let info = source.info(name).expect("one of its own names");
        match source.codes(name) {
            Some(matrix) => {
                let bytes = matrix.format.total_bytes();
                DenseTensor {
                    name: format!("{name}{PLANES}"),
                    dtype: info.dtype.name(),
                    shape: vec![bytes],
                    bytes: bytes as u64,
                }
            }
            None => DenseTensor {
                name: name.clone(),
                dtype: info.dtype.name(),
                bytes: info.bytes(),
                shape: info.shape,
            },
        }
    };
    let tensors: Vec<DenseTensor> = source.names().iter().map(tensor).collect();
    write_dense(path, &tensors, |tensor| {
        let name = tensor.name.strip_suffix(PLANES).unwrap_or(&tensor.name);
        let bytes = source.raw(name).map_err(|e: CheckpointError| ModelError::from(e))?;
        Ok::<_, Error>(bytes.into_owned())
    })
}

/// A byte-level BPE of `vocab` tokens, as large as a real one: bytes, then pairs of bytes, then pairs and a byte.
fn tokenizer(vocab: usize) -> Value {
    // The characters that byte-level BPE writes for the 256 bytes (Radford et al., 2019).
    let mut next = 0x100;
    let alphabet: Vec<char> = (0..=u8::MAX)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap_or_default()
            }
        })
        .collect();
    let mut tokens: Vec<String> = alphabet.iter().take(vocab).map(char::to_string).collect();
    let mut merges = Vec::new();
    let mut left = 0;
    while tokens.len() < vocab {
        for &right in &alphabet {
            if tokens.len() == vocab {
                break;
            }
            merges.push(format!("{} {right}", tokens[left]));
            let mut token = tokens[left].clone();
            let _ = write!(token, "{right}");
            tokens.push(token);
        }
        left += 1;
    }
    let vocab: serde_json::Map<String, Value> = tokens.into_iter().zip((0..).map(Value::from)).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": bytes,
        "post_processor": null,
        "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    })
}

#[cfg(test)]
mod tests {
    use cotk_model::model::{Logits, Model, Sequence};
    use cotk_model::moe::Mode;
    use cotk_run::progress::Silent;

    use super::*;
    use crate::in_memory::Routing;
    use crate::open::open;
    use crate::synthetic::Experts;

    fn logits(model: &Model) -> Vec<f32> {
        let mut cache = model.new_cache();
        let mut sequences = [Sequence {
            tokens: &[1, 2, 3],
            cache: &mut cache,
        }];
        model.forward(&mut sequences, Mode::Exact, Logits::Last).unwrap().logits
    }

    #[test]
    fn it_computes_what_the_same_model_computes_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("model");
        let write = |bits| write("ref-qwen2moe", Some(1), bits, 5, &out, &Silent, &Cancel::new());
        assert!(write(5).unwrap_err().to_string().contains("5 bits"));
        let manifest = write(3).unwrap();
        assert!(write(3).is_err(), "a folder that is there stays as it is");
        let opened = open(&out).unwrap();
        opened.container.as_ref().unwrap().verify().unwrap();
        assert_eq!(opened.files.spec.layers.len(), 1);
        assert_eq!(manifest.files.len(), 3);
        let tokens = opened.files.tokenizer.encode("the same").unwrap();
        assert_eq!(opened.files.tokenizer.decode(&tokens), "the same");
        let spec = synthetic::spec("ref-qwen2moe", Some(1)).unwrap();
        let made = synthetic::routed_model(&spec, Experts::plain(3), 5, Routing::Router).unwrap();
        assert_eq!(logits(&opened.model), logits(&made.model));
    }

    #[test]
    fn an_interrupted_call_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let cancel = Cancel::new();
        cancel.cancel();
        let out = folder.path().join("model");
        assert!(write("ref-qwen2moe", Some(1), 4, 5, &out, &Silent, &cancel).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_vocabulary_of_any_size_has_a_merge_for_each_longer_token() {
        for vocab in [100, 256, 257, 4096, 66_000] {
            let tokenizer = tokenizer(vocab);
            assert_eq!(tokenizer["model"]["vocab"].as_object().unwrap().len(), vocab);
            assert_eq!(
                tokenizer["model"]["merges"].as_array().unwrap().len(),
                vocab.saturating_sub(256)
            );
        }
    }
}
