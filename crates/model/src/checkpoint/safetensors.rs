//! Safetensors by memory map: one file, or the shards that `model.safetensors.index.json` names. One gate,
//! `File::open`, checks a whole header; behind it every range is known to lie in its file.
//! Format: <https://huggingface.co/docs/safetensors> (8 bytes header length, JSON header, tensors without gaps).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cotk_run::files;
use memmap2::{Mmap, UncheckedAdvice};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::{CheckpointError, DType, SharedBytes, TensorInfo, TensorSource};

/// The format's own cap.
const HEADER_LIMIT_BYTES: u64 = 100 << 20;
const INDEX_LIMIT_BYTES: u64 = 100 << 20;
/// More axes than any weight has.
const AXES_LIMIT: usize = 8;

/// A checkpoint in safetensors: tensors of one or several mapped files.
pub struct Safetensors {
    /// The file or the index: where a tensor is missing when no file has it.
    path: PathBuf,
    files: Vec<File>,
    /// Which file holds a tensor.
    holder: BTreeMap<String, usize>,
}

impl Safetensors {
    /// Opens a file, or a folder with `model.safetensors` or `model.safetensors.index.json`.
    ///
    /// # Errors
    /// A missing shard, a file that is not whole, a header or index that contradicts itself or its file.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        if !path.is_dir() {
            return Self::open_file(path);
        }
        let single = path.join("model.safetensors");
        let index = path.join("model.safetensors.index.json");
        if single.exists() || !index.exists() {
            return Self::open_file(&single);
        }
        Self::open_shards(path, &index)
    }

    /// Opens one file.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_file(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path)?;
        Ok(Self {
            path: path.to_owned(),
            holder: file.tensors.keys().map(|name| (name.clone(), 0)).collect(),
            files: vec![file],
        })
    }

    fn open_shards(folder: &Path, index: &Path) -> Result<Self, CheckpointError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let bad = |what: String, found: String, expected: &str| CheckpointError::Header {
            file: index.to_owned(),
            what,
            found,
            expected: expected.to_owned(),
        };
        let text = files::read(index, INDEX_LIMIT_BYTES)?;
        let Index { weight_map } = serde_json::from_slice(&text).map_err(|e| {
            bad(
                "index".into(),
                e.to_string(),
                "JSON with `weight_map`: tensor names to file names",
            )
        })?;
        let mut files: Vec<File> = Vec::new();
        let mut number: BTreeMap<&str, usize> = BTreeMap::new();
        let mut holder = BTreeMap::new();
        for (tensor, shard) in &weight_map {
            let at = if let Some(&at) = number.get(shard.as_str()) {
                at
            } else {
                if Path::new(shard).file_name() != Some(shard.as_ref()) {
                    return Err(bad(
                        format!("shard of `{tensor}`"),
                        format!("{shard:?}"),
                        "a file name in this folder",
                    ));
                }
                files.push(File::open(&folder.join(shard))?);
                number.insert(shard, files.len() - 1);
                files.len() - 1
            };
            if !files[at].tensors.contains_key(tensor) {
                return Err(CheckpointError::Missing {
                    file: files[at].path.clone(),
                    tensor: tensor.clone(),
                    nearest: cotk_run::recipe::nearest_of(tensor, files[at].tensors.keys().map(String::as_str)),
                });
            }
            holder.insert(tensor.clone(), at);
        }
        if files.is_empty() {
            return Err(bad(
                "`weight_map`".into(),
                "no tensors".into(),
                "the tensors of a model",
            ));
        }
        Ok(Self {
            path: index.to_owned(),
            files,
            holder,
        })
    }

    /// The files behind it, in the order they were opened.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    fn find(&self, name: &str) -> Option<(&File, &Entry)> {
        let file = &self.files[*self.holder.get(name)?];
        Some((file, &file.tensors[name]))
    }
}

impl TensorSource for Safetensors {
    fn names(&self) -> Vec<String> {
        self.holder.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.find(name).map(|(_, entry)| entry.info.clone())
    }

    fn file(&self, name: &str) -> &Path {
        self.find(name).map_or(&self.path, |(file, _)| &file.path)
    }

    fn raw(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let Some((file, entry)) = self.find(name) else {
            return Err(CheckpointError::Missing {
                file: self.path.clone(),
                tensor: name.to_owned(),
                nearest: cotk_run::recipe::nearest_of(name, self.holder.keys().map(String::as_str)),
            });
        };
        Ok(Cow::Borrowed(&file.map[entry.range.clone()]))
    }

    fn shared(&self, name: &str) -> Result<SharedBytes, CheckpointError> {
        match self.find(name) {
            Some((file, entry)) => Ok(SharedBytes::mapped(file.map.clone(), entry.range.clone())),
            None => Ok(self.raw(name)?.into_owned().into()),
        }
    }

    fn release(&self) {
        for file in &self.files {
            // SAFETY: the map is of a file, shared and read-only: a page that is gone comes back from the file with the
            // same bytes, so nobody who holds a reference into it can tell.
            // Memory alone is lost if this fails.
            let _ = unsafe { file.map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }
}

struct File {
    path: PathBuf,
    map: Arc<Mmap>,
    tensors: BTreeMap<String, Entry>,
}

struct Entry {
    info: TensorInfo,
    /// In the file, not in its data section.
    range: Range<usize>,
}

impl File {
    fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = files::open(path)?;
        let length = file.metadata().map_err(cotk_run::Error::io("read", path))?.len();
        if length < 8 {
            return Err(CheckpointError::Truncated {
                file: path.to_owned(),
                found: length,
                expected: 8,
            });
        }
        // SAFETY: a map is sound while nobody shortens or rewrites the file. Checkpoints are replaced by rename (our
        // own writer does, and so do download tools), which leaves the mapped file as it was.
        let map = unsafe { Mmap::map(&file) }.map_err(cotk_run::Error::io("map", path))?;
        let tensors = parse_header(path, &map)?;
        Ok(Self {
            path: path.to_owned(),
            map: Arc::new(map),
            tensors,
        })
    }
}

fn parse_header(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Entry>, CheckpointError> {
    let truncated = |expected| CheckpointError::Truncated {
        file: path.to_owned(),
        found: bytes.len() as u64,
        expected,
    };
    let bad = |what: String, found: String, expected: String| CheckpointError::Header {
        file: path.to_owned(),
        what,
        found,
        expected,
    };
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| truncated(8))?;
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > HEADER_LIMIT_BYTES {
        return Err(bad(
            "header length".into(),
            format!("{header_bytes} bytes"),
            format!("at most {HEADER_LIMIT_BYTES}"),
        ));
    }
    let header_len = usize::try_from(header_bytes).expect("at most 100 MiB");
    let header = rest.get(..header_len).ok_or_else(|| truncated(8 + header_bytes))?;
    let Header(mut entries) = serde_json::from_slice(header)
        .map_err(|e| bad("header".into(), e.to_string(), "JSON of tensor names to entries".into()))?;

    entries.sort_by(|a, b| a.1.data_offsets.cmp(&b.1.data_offsets).then_with(|| a.0.cmp(&b.0)));
    let data_start = 8 + header_len;
    let mut tensors = BTreeMap::new();
    let mut next: u64 = 0;
    for (name, raw) in entries {
        let of = |what: &str| format!("{what} of tensor `{name}`");
        let dtype = DType::from_name(&raw.dtype)
            .ok_or_else(|| bad(of("type"), raw.dtype.clone(), "a safetensors type".into()))?;
        if raw.shape.len() > AXES_LIMIT {
            return Err(bad(
                of("axes"),
                raw.shape.len().to_string(),
                format!("at most {AXES_LIMIT}"),
            ));
        }
        let size = raw
            .shape
            .iter()
            .try_fold(dtype.size_bytes() as u64, |size, &axis| size.checked_mul(axis))
            .ok_or_else(|| bad(of("size"), format!("{:?}", raw.shape), "less than 2^64 bytes".into()))?;
        let [start, end] = raw.data_offsets;
        if start != next {
            return Err(bad(
                of("offset"),
                start.to_string(),
                format!("{next}, where the last one ended"),
            ));
        }
        if end.checked_sub(start) != Some(size) {
            return Err(bad(
                of("bytes"),
                format!("offsets {start} to {end}"),
                format!("{size} for {} {:?}", dtype.name(), raw.shape),
            ));
        }
        next = end;
        let to_file = |at: u64| usize::try_from(at).ok().and_then(|at| at.checked_add(data_start));
        let (Some(from), Some(to)) = (to_file(start), to_file(end)) else {
            return Err(truncated(end));
        };
        let shape = raw
            .shape
            .iter()
            .map(|&axis| usize::try_from(axis))
            .collect::<Result<_, _>>();
        let Ok(shape) = shape else {
            return Err(bad(
                of("shape"),
                format!("{:?}", raw.shape),
                "axes that fit memory".into(),
            ));
        };
        let entry = Entry {
            info: TensorInfo { dtype, shape },
            range: from..to,
        };
        if tensors.insert(name.clone(), entry).is_some() {
            return Err(bad(of("entry"), "two".into(), "one".into()));
        }
    }
    let expected = (data_start as u64).saturating_add(next);
    match (bytes.len() as u64).cmp(&expected) {
        std::cmp::Ordering::Less => Err(truncated(expected)),
        std::cmp::Ordering::Equal => Ok(tensors),
        std::cmp::Ordering::Greater => Err(bad(
            "file length".into(),
            format!("{} bytes", bytes.len()),
            format!("{expected}, where the last tensor ends"),
        )),
    }
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// In file order with repeated names kept: a map would hide them.
struct Header(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of one f32 tensor `a` [2, 2] and one bf16 tensor `b` [3], made by the reference implementation.
    fn sample() -> Vec<u8> {
        let a: Vec<u8> = [1.0f32, -2.0, 3.5, 0.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let b: Vec<u8> = [1.0f32, 0.5, -4.0]
            .iter()
            .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
            .collect();
        let view = |dtype, shape, data| safetensors::tensor::TensorView::new(dtype, shape, data).unwrap();
        let tensors = [
            ("a", view(safetensors::Dtype::F32, vec![2, 2], &a)),
            ("b", view(safetensors::Dtype::BF16, vec![3], &b)),
        ];
        safetensors::serialize(tensors, None).unwrap()
    }

    fn file_of(header: &str, data_bytes: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data_bytes, 0);
        bytes
    }

    /// Writes `bytes` as the one file of a checkpoint and opens it.
    fn open(bytes: &[u8]) -> Result<(Safetensors, tempfile::TempDir), CheckpointError> {
        let dir = tempfile::tempdir().unwrap();
        files::write_atomic(dir.path().join("model.safetensors"), bytes).unwrap();
        Ok((Safetensors::open(dir.path())?, dir))
    }

    fn refused(bytes: &[u8], says: &[&str]) {
        let error = open(bytes).err().expect("must be refused").to_string();
        for part in says.iter().chain(&["model.safetensors"]) {
            assert!(error.contains(part), "`{error}` does not say `{part}`");
        }
    }

    #[test]
    fn reads_what_the_reference_implementation_wrote() {
        let (source, _dir) = open(&sample()).unwrap();
        assert_eq!(source.names(), ["a", "b"]);
        assert_eq!(source.load_f32("a", &[2, 2]).unwrap(), [1.0, -2.0, 3.5, 0.0]);
        assert_eq!(source.load_f32("b", &[3]).unwrap(), [1.0, 0.5, -4.0]);
        assert_eq!(source.bytes(), 22);
    }

    #[test]
    fn a_file_cut_at_any_length_is_refused() {
        let whole = sample();
        for cut in 0..whole.len() {
            let error = open(&whole[..cut]).err().expect("must be refused");
            assert!(
                matches!(error, CheckpointError::Truncated { .. }),
                "cut at {cut}: {error}"
            );
        }
        let longer = [whole.as_slice(), &[0]].concat();
        refused(&longer, &["file length", "where the last tensor ends"]);
    }

    #[test]
    fn no_changed_byte_makes_it_panic_or_read_outside() {
        let whole = sample();
        for at in 0..whole.len() {
            for value in [0, 1, 0x7f, 0xff, whole[at] ^ 1, b'9', b'"'] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                if let Ok((source, _dir)) = open(&bytes) {
                    for name in source.names() {
                        let shape = source.info(&name).unwrap().shape;
                        let _ = source.load_f32(&name, &shape);
                    }
                }
            }
        }
    }

    #[test]
    fn a_header_that_lies_is_refused_with_what_it_says() {
        let entry = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let mut long = (200u64 << 20).to_le_bytes().to_vec();
        long.extend_from_slice(b"{}");
        refused(&long, &["header length", "209715200", "104857600"]);
        refused(&file_of("{", 0), &["header", "EOF"]);
        refused(&file_of("[]", 0), &["an object of tensors"]);
        refused(
            &file_of(&entry("F99", "[1]", "[0,4]"), 4),
            &["type of tensor `w`", "F99"],
        );
        refused(
            &file_of(&entry("F32", "[2]", "[0,4]"), 4),
            &["bytes of tensor `w`", "0 to 4", "8 for F32 [2]"],
        );
        refused(&file_of(&entry("F32", "[1]", "[4,0]"), 4), &["offset of tensor `w`"]);
        refused(&file_of(&entry("F32", "[1]", "[4,8]"), 8), &["offset of tensor `w`"]);
        refused(&file_of(&entry("F32", "[-1]", "[0,4]"), 4), &["header"]);
        refused(
            &file_of(&entry("F32", "[18446744073709551615,2]", "[0,4]"), 4),
            &["size of tensor `w`"],
        );
        refused(
            &file_of(&entry("F32", "[4611686018427387903]", "[0,18446744073709551612]"), 4),
            &["ends after"],
        );
        refused(
            &file_of(&entry("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4),
            &["axes of tensor `w`"],
        );
        let twice = r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        refused(&file_of(twice, 2), &["entry of tensor `w`", "two"]);
    }

    #[test]
    fn a_tensor_is_refused_by_name_shape_type_and_value() {
        let data: Vec<u8> = [1.0f32, f32::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
        let header = r#"{"model.a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"model.q":{"dtype":"I8","shape":[2],"data_offsets":[8,10]}}"#;
        let mut bytes = file_of(header, 0);
        bytes.extend_from_slice(&data);
        bytes.extend_from_slice(&[0, 0]);
        let (source, _dir) = open(&bytes).unwrap();
        let says = |name: &str, shape: &[usize], parts: &[&str]| {
            let error = source.load_f32(name, shape).unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "`{error}` does not say `{part}`");
            }
        };
        says("model.b", &[2], &["no tensor `model.b`", "nearest: `model.a`"]);
        says(
            "model.a",
            &[3],
            &["model.safetensors", "`model.a`", "shape [2]", "expected [3]"],
        );
        says("model.q", &[2], &["`model.q`", "type I8", "F32, F16 or BF16"]);
        says("model.a", &[2], &["`model.a`", "NaN at index 1"]);
    }

    fn sharded(dir: &Path, index: &str) -> Result<Safetensors, CheckpointError> {
        files::write_atomic(dir.join("one.safetensors"), &sample()).unwrap();
        files::write_atomic(dir.join("model.safetensors.index.json"), index.as_bytes()).unwrap();
        Safetensors::open(dir)
    }

    #[test]
    fn shards_read_as_one_and_a_missing_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let check = |index: &str, says: &str| {
            let error = sharded(dir.path(), index).err().expect("must be refused").to_string();
            assert!(error.contains(says), "`{error}` does not say `{says}`");
        };
        let source = sharded(
            dir.path(),
            r#"{"metadata":{},"weight_map":{"a":"one.safetensors","b":"one.safetensors"}}"#,
        )
        .unwrap();
        assert_eq!(source.load_f32("b", &[3]).unwrap(), [1.0, 0.5, -4.0]);
        assert!(source.file("b").ends_with("one.safetensors"));
        check(r#"{"weight_map":{"a":"two.safetensors"}}"#, "two.safetensors");
        check(r#"{"weight_map":{"c":"one.safetensors"}}"#, "no tensor `c`");
        check(
            r#"{"weight_map":{"a":"../one.safetensors"}}"#,
            "a file name in this folder",
        );
        check(r#"{"weight_map":{}}"#, "no tensors");
        check(r#"{"weights":{}}"#, "weight_map");
    }

    #[test]
    fn a_folder_without_weights_names_the_file_it_wants() {
        let dir = tempfile::tempdir().unwrap();
        let error = Safetensors::open(dir.path())
            .err()
            .expect("must be refused")
            .to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }
}
