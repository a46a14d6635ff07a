//! Checkpoints: named f32 tensors and one JSON value in a safetensors file, replaced whole. Law: what is written reads
//! back bit for bit; a torn or foreign file is an error with its name.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use cotk_run::files;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Result, SearchError};

/// No checkpoint of ours comes near this.
const LIMIT_BYTES: u64 = 8 << 30;

/// The metadata key of the JSON value.
const KEY: &str = "cotk.search";

/// One tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    pub shape: Vec<usize>,
    /// Row major.
    pub values: Vec<f32>,
}

/// Tensors by name.
pub type State = BTreeMap<String, Array>;

/// Writes `meta` and `state` to `path`.
///
/// # Errors
/// [`SearchError::Run`] when the file cannot be written.
pub fn save<T: Serialize>(path: &Path, meta: &T, state: &State) -> Result<()> {
    let refuse = |detail: String| SearchError::Checkpoint {
        file: path.to_owned(),
        detail,
        found: "a value that cannot be written".into(),
        expected: "tensors and JSON".into(),
    };
    let meta = serde_json::to_string(meta).map_err(|e| refuse(e.to_string()))?;
    let bytes: Vec<(&String, Vec<u8>, &Array)> = state
        .iter()
        .map(|(name, array)| (name, array.values.iter().flat_map(|v| v.to_le_bytes()).collect(), array))
        .collect();
    let views = bytes
        .iter()
        .map(|(name, bytes, array)| {
            TensorView::new(Dtype::F32, array.shape.clone(), bytes)
                .map(|view| (name.as_str(), view))
                .map_err(|e| refuse(format!("tensor `{name}`: {e}")))
        })
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([(KEY.to_owned(), meta)]);
    let file = safetensors::serialize(views, Some(metadata)).map_err(|e| refuse(e.to_string()))?;
    Ok(files::write_atomic(path, &file)?)
}

/// Reads a checkpoint back.
///
/// # Errors
/// [`SearchError::Checkpoint`] for a file that is none of ours.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<(T, State)> {
    let refuse = |detail: String| SearchError::Checkpoint {
        file: path.to_owned(),
        detail,
        found: "something else".into(),
        expected: "a checkpoint of a search".into(),
    };
    let bytes = files::read(path, LIMIT_BYTES)?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| refuse(e.to_string()))?;
    let meta = header.metadata().as_ref().and_then(|m| m.get(KEY));
    let meta = meta.ok_or_else(|| refuse(format!("no `{KEY}` in its header")))?;
    let meta = serde_json::from_str(meta).map_err(|e| refuse(e.to_string()))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| refuse(e.to_string()))?;
    let mut state = State::new();
    for (name, view) in tensors.iter() {
        if view.dtype() != Dtype::F32 {
            return Err(refuse(format!("tensor `{name}` is {:?}", view.dtype())));
        }
        let values = view
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        state.insert(
            name.to_owned(),
            Array {
                shape: view.shape().to_vec(),
                values,
            },
        );
    }
    Ok((meta, state))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let array = |shape: &[usize], from: f32| Array {
            shape: shape.to_vec(),
            values: (0..shape.iter().product()).map(|i| from / (1.0 + i as f32)).collect(),
        };
        State::from([("a.weight".into(), array(&[2, 3], 0.1)), ("b".into(), array(&[], -7.3))])
    }

    #[test]
    fn a_checkpoint_reads_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.safetensors");
        save(&path, &("meta", 0.1f64 + 0.2), &state()).unwrap();
        let ((name, number), read): ((String, f64), State) = load(&path).unwrap();
        assert_eq!(
            (name.as_str(), number.to_bits(), read),
            ("meta", (0.1f64 + 0.2).to_bits(), state())
        );
    }

    #[test]
    fn a_cut_checkpoint_is_an_error_at_every_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.safetensors");
        save(&path, &1, &state()).unwrap();
        let whole = files::read(&path, 1 << 20).unwrap();
        for cut in 0..whole.len() {
            files::write_atomic(&path, &whole[..cut]).unwrap();
            assert!(load::<i32>(&path).is_err(), "cut at {cut}");
        }
    }
}
