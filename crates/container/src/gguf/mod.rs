//! GGUF version 3, the file of llama.cpp: written tensor by tensor, and read back for checks. Knows no family: names
//! and keys are `cotk_model::export`'s; [`blocks`] turns weights and codes into the types of the format, [`read`] is
//! the reader. Law: what was written reads back as it was given; a file that is cut or damaged is refused.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. All numbers little endian: magic, version u32,
//! counts of tensors and of keys u64; keys (name, type u32, value); tensors (name, axes u32, sizes u64 fastest first,
//! type u32, offset u64); zeros up to a multiple of 32; data, each tensor at a multiple of 32.

use std::io::Write;
use std::path::Path;

use cotk_run::Error;
use cotk_run::files::AtomicFile;

use crate::{ContainerError, Result};

pub mod blocks;
pub mod read;

pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
pub(crate) const VERSION: u32 = 3;
/// `general.alignment` where a file does not say otherwise; ours never do.
pub(crate) const ALIGNMENT: u64 = 32;

/// A value of the head.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    U64(u64),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Texts(Vec<String>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// The format's numbers of value types.
pub(crate) mod value_type {
    pub(crate) const U32: u32 = 4;
    pub(crate) const I32: u32 = 5;
    pub(crate) const F32: u32 = 6;
    pub(crate) const BOOL: u32 = 7;
    pub(crate) const TEXT: u32 = 8;
    pub(crate) const ARRAY: u32 = 9;
    pub(crate) const U64: u32 = 10;
}

/// Element types that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorType {
    F32,
    F16,
    /// Blocks of 32: an f16 scale and 32 nibbles, w = scale · (q − 8).
    Q4_0,
    /// Blocks of 32: an f16 scale and 32 signed bytes, w = scale · q.
    Q8_0,
}

impl TensorType {
    pub(crate) const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Q4_0, Self::Q8_0];

    /// As ggml spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Q4_0 => "Q4_0",
            Self::Q8_0 => "Q8_0",
        }
    }

    /// ggml's number.
    pub(crate) fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
        }
    }

    /// Weights of a block, and its bytes.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 => (1, 2),
            Self::Q4_0 => (blocks::BLOCK, blocks::Q4_0_BYTES),
            Self::Q8_0 => (blocks::BLOCK, blocks::Q8_0_BYTES),
        }
    }
}

/// One tensor of the head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    pub name: String,
    /// Slowest axis first, as everywhere here: `[experts, rows, columns]`. (The file has the fastest first.)
    pub shape: Vec<usize>,
    pub kind: TensorType,
}

impl GgufTensor {
    /// Bytes of its data. Rows that are no whole blocks are refused by [`write()`].
    pub fn bytes(&self) -> u64 {
        let (weights, bytes) = self.kind.block();
        let count: u64 = self.shape.iter().map(|&n| n as u64).product();
        count / weights as u64 * bytes as u64
    }
}

/// Takes one tensor's bytes, in any number of pieces.
pub struct Sink<'a> {
    file: &'a mut AtomicFile,
    written: u64,
}

impl Sink<'_> {
    /// Appends a piece.
    ///
    /// # Errors
    /// The file system's.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let path = self.file.path().to_owned();
        self.file.write_all(bytes).map_err(Error::io("write", path))?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

/// Writes a whole file, only one piece of one tensor in memory at a time. `data` is asked for each tensor in turn.
/// Gives the file's size.
///
/// # Errors
/// Those of `data`; the file system's; [`ContainerError::Gguf`] for rows that are no whole blocks, a name that comes
/// twice, a tensor of another length than its shape promises. Nothing stands under `path` then.
pub fn write<E: From<ContainerError>>(
    path: &Path,
    metadata: &[(String, Value)],
    tensors: &[GgufTensor],
    mut data: impl FnMut(usize, &mut Sink<'_>) -> Result<(), E>,
) -> Result<u64, E> {
    check(path, metadata, tensors)?;
    let io = |e| ContainerError::from(Error::io("write", path)(e));
    let mut file = AtomicFile::create(path).map_err(ContainerError::from)?;
    let head = head(metadata, tensors);
    file.write_all(&head).map_err(io)?;
    let mut end = head.len() as u64;
    for (index, tensor) in tensors.iter().enumerate() {
        let start = file.position();
        debug_assert_eq!(start, end);
        let mut sink = Sink {
            file: &mut file,
            written: 0,
        };
        data(index, &mut sink)?;
        let (found, expected) = (sink.written, tensor.bytes());
        if found != expected {
            return Err(fault(
                path,
                &tensor.name,
                format!("{found} bytes"),
                format!("{expected} bytes"),
            )
            .into());
        }
        end = aligned(start + found);
        let padding = usize::try_from(end - start - found).expect("below 32");
        file.write_all(&[0; ALIGNMENT as usize][..padding]).map_err(io)?;
    }
    file.commit().map_err(ContainerError::from)?;
    Ok(end)
}

pub(crate) fn fault(path: &Path, what: &str, found: impl ToString, expected: impl ToString) -> ContainerError {
    ContainerError::Gguf {
        file: path.to_owned(),
        what: what.to_owned(),
        found: found.to_string(),
        expected: expected.to_string(),
    }
}

pub(crate) fn aligned(at: u64) -> u64 {
    at.next_multiple_of(ALIGNMENT)
}

fn check(path: &Path, metadata: &[(String, Value)], tensors: &[GgufTensor]) -> Result<()> {
    let keys = metadata.iter().map(|(key, _)| key);
    for names in [keys.collect::<Vec<_>>(), tensors.iter().map(|t| &t.name).collect()] {
        let mut sorted = names.clone();
        sorted.sort();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(fault(path, twice[0], "the name twice", "once"));
        }
    }
    for tensor in tensors {
        let block = tensor.kind.block().0;
        let columns = tensor.shape.last().copied().unwrap_or(0);
        if columns == 0 || !columns.is_multiple_of(block) {
            let expected = format!("a multiple of {block}, the block of {}", tensor.kind.name());
            return Err(fault(path, &tensor.name, format!("rows of {columns}"), expected));
        }
    }
    Ok(())
}

/// Everything before the data.
fn head(metadata: &[(String, Value)], tensors: &[GgufTensor]) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut head, key);
        put_value(&mut head, value);
    }
    let mut offset = 0;
    for tensor in tensors {
        put_text(&mut head, &tensor.name);
        put_u32(&mut head, tensor.shape.len());
        for &size in tensor.shape.iter().rev() {
            head.extend((size as u64).to_le_bytes());
        }
        head.extend(tensor.kind.id().to_le_bytes());
        head.extend(u64::to_le_bytes(offset));
        offset = aligned(offset + tensor.bytes());
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);
    head
}

fn put_u32(head: &mut Vec<u8>, number: usize) {
    head.extend(u32::try_from(number).expect("a few axes").to_le_bytes());
}

fn put_text(head: &mut Vec<u8>, text: &str) {
    head.extend((text.len() as u64).to_le_bytes());
    head.extend(text.as_bytes());
}

fn put_value(head: &mut Vec<u8>, value: &Value) {
    let put_type = |head: &mut Vec<u8>, kind: u32| head.extend(kind.to_le_bytes());
    let put_array = |head: &mut Vec<u8>, kind: u32, length: usize| {
        put_type(head, value_type::ARRAY);
        put_type(head, kind);
        head.extend((length as u64).to_le_bytes());
    };
    match value {
        Value::U32(n) => {
            put_type(head, value_type::U32);
            head.extend(n.to_le_bytes());
        }
        Value::I32(n) => {
            put_type(head, value_type::I32);
            head.extend(n.to_le_bytes());
        }
        Value::F32(x) => {
            put_type(head, value_type::F32);
            head.extend(x.to_le_bytes());
        }
        Value::Bool(is) => {
            put_type(head, value_type::BOOL);
            head.push(u8::from(*is));
        }
        Value::Text(text) => {
            put_type(head, value_type::TEXT);
            put_text(head, text);
        }
        Value::U64(n) => {
            put_type(head, value_type::U64);
            head.extend(n.to_le_bytes());
        }
        Value::I32s(list) => {
            put_array(head, value_type::I32, list.len());
            head.extend(list.iter().flat_map(|n| n.to_le_bytes()));
        }
        Value::F32s(list) => {
            put_array(head, value_type::F32, list.len());
            head.extend(list.iter().flat_map(|x| x.to_le_bytes()));
        }
        Value::Texts(list) => {
            put_array(head, value_type::TEXT, list.len());
            list.iter().for_each(|text| put_text(head, text));
        }
    }
}

#[cfg(test)]
mod laws {
    use proptest::prelude::*;

    use super::read::Gguf;
    use super::*;

    fn metadata() -> Vec<(String, Value)> {
        [
            ("general.architecture", Value::from("qwen2moe")),
            ("a.u32", Value::U32(7)),
            ("a.i32", Value::I32(-7)),
            ("a.f32", Value::F32(1e-6)),
            ("a.bool", Value::Bool(true)),
            ("a.u64", Value::U64(1 << 40)),
            ("a.types", Value::I32s(vec![1, 3, 4])),
            ("a.scores", Value::F32s(vec![-1.0, 0.5])),
            ("a.tokens", Value::Texts(vec!["Ġa".into(), String::new(), "é".into()])),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .to_vec()
    }

    fn tensors() -> Vec<GgufTensor> {
        let of = |name: &str, shape: &[usize], kind| GgufTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            kind,
        };
        vec![
            of("a.weight", &[3], TensorType::F32),
            of("b.weight", &[2, 5], TensorType::F16),
            of("c.weight", &[2, 3, 64], TensorType::Q8_0),
            of("d.weight", &[1, 32], TensorType::Q4_0),
        ]
    }

    fn data(tensor: &GgufTensor) -> Vec<u8> {
        (0..tensor.bytes())
            .map(|i| (i % 251) as u8 ^ tensor.name.as_bytes()[0])
            .collect()
    }

    fn written() -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let tensors = tensors();
        let size = write(&path, &metadata(), &tensors, |index, sink| {
            // In two pieces: a sink takes any number.
            let bytes = data(&tensors[index]);
            let (first, second) = bytes.split_at(bytes.len() / 2);
            sink.put(first)?;
            sink.put(second)
        });
        let bytes = fs_err::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, size.unwrap());
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Gguf> {
        Gguf::parse(bytes.to_vec(), Path::new("m.gguf"))
    }

    #[test]
    fn what_was_written_reads_back() {
        let read = parse(&written()).unwrap();
        assert_eq!(read.metadata(), metadata());
        assert_eq!(read.tensors(), tensors());
        for tensor in tensors() {
            assert_eq!(read.data(&tensor.name).unwrap(), data(&tensor));
        }
        assert_eq!(read.get("a.u32"), Some(&Value::U32(7)));
        assert!(read.data("e.weight").is_none());
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let bytes = written();
        // Only the zeros behind the last tensor can be missed.
        let last = tensors()[3].bytes() as usize;
        let whole = bytes.len() - (last.next_multiple_of(32) - last);
        for length in 0..whole {
            assert!(parse(&bytes[..length]).is_err(), "{length} of {}", bytes.len());
        }
        assert!(parse(&bytes[..whole]).is_ok());
    }

    #[test]
    fn counts_and_lengths_beyond_the_file_are_refused_before_they_are_used() {
        let bytes = written();
        for huge in [u64::MAX, 1 << 62, bytes.len() as u64 + 1] {
            for at in (0..bytes.len() - 8).step_by(4) {
                let mut bytes = bytes.clone();
                bytes[at..at + 8].copy_from_slice(&huge.to_le_bytes());
                // Never a panic nor memory beyond the file's size; whether it is refused depends on where it hit.
                let _ = parse(&bytes);
            }
        }
        let mut other = bytes.clone();
        other[4] = 2;
        let text = parse(&other).unwrap_err().to_string();
        assert!(text.contains("version") && text.contains("found 2"), "{text}");
        other = bytes;
        other[0] = b'g';
        assert!(parse(&other).is_err());
    }

    proptest! {
        /// Law: a changed byte of the head gives another head or a refusal, never a panic.
        #[test]
        fn a_changed_byte_never_panics(at in 0usize..800, byte in any::<u8>()) {
            let mut bytes = written();
            let at = at % bytes.len();
            let before = bytes[at];
            bytes[at] = byte;
            if let Ok(read) = parse(&bytes) && byte == before {
                prop_assert_eq!(read.metadata(), metadata());
            }
        }
    }

    #[test]
    fn what_the_format_cannot_hold_is_refused_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let refuse = |tensors: &[GgufTensor], metadata: &[(String, Value)]| {
            let found = write(&path, metadata, tensors, |_, sink| sink.put(&[0; 4]));
            found.unwrap_err().to_string()
        };
        let mut tensors = tensors();
        assert!(refuse(&tensors, &[]).contains("`a.weight`: found 4 bytes, expected 12 bytes"));
        tensors[3].shape = vec![1, 33];
        assert!(refuse(&tensors, &[]).contains("`d.weight`: found rows of 33, expected a multiple of 32"));
        tensors[3] = tensors[0].clone();
        assert!(refuse(&tensors, &[]).contains("`a.weight`: found the name twice"));
        let twice = [metadata(), metadata()].concat();
        assert!(refuse(&[], &twice).contains("the name twice"));
        assert_eq!(fs_err::read_dir(folder.path()).unwrap().count(), 0);
    }
}
