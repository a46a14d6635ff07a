//! Reads GGUF files, ours and others' of the types that we write: for checks, not for running. Law: no length from
//! the file is used before it was held against the file's size.

use std::path::Path;

use cotk_run::files;

use super::{GgufTensor, MAGIC, TensorType, VERSION, Value, aligned, fault, value_type};
use crate::Result;

/// More axes than ggml has.
const AXES_LIMIT: usize = 4;

/// A whole file in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    metadata: Vec<(String, Value)>,
    tensors: Vec<GgufTensor>,
    /// Of each tensor, in `bytes`.
    offsets: Vec<usize>,
    bytes: Vec<u8>,
}

impl Gguf {
    /// Reads a file of at most `limit_bytes`.
    ///
    /// # Errors
    /// The file system's; [`crate::ContainerError::Gguf`] for a file that is not whole, not GGUF 3, or of types that
    /// we do not write.
    pub fn open(path: &Path, limit_bytes: u64) -> Result<Self> {
        Self::parse(files::read(path, limit_bytes)?, path)
    }

    /// The same from bytes; `path` is named in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn parse(bytes: Vec<u8>, path: &Path) -> Result<Self> {
        let mut cursor = Cursor {
            path,
            bytes: &bytes,
            at: 0,
        };
        if cursor.take("magic", 4)? != MAGIC {
            return Err(fault(path, "magic", bytes[..4].escape_ascii(), "GGUF"));
        }
        let version = cursor.u32("version")?;
        if version != VERSION {
            return Err(fault(path, "version", version, VERSION));
        }
        // The shortest tensor takes 24 bytes of the head, the shortest key 13.
        let tensor_count = cursor.count("number of tensors", 24)?;
        let key_count = cursor.count("number of keys", 13)?;
        let mut metadata = Vec::with_capacity(key_count);
        for _ in 0..key_count {
            let key = cursor.text("key")?;
            let kind = cursor.u32(&key)?;
            let value = cursor.value(&key, kind)?;
            metadata.push((key, value));
        }
        let mut tensors = Vec::with_capacity(tensor_count);
        let mut starts = Vec::with_capacity(tensor_count);
        for _ in 0..tensor_count {
            let (tensor, start) = cursor.tensor()?;
            tensors.push(tensor);
            starts.push(start);
        }
        let data = aligned(cursor.at as u64);
        let mut offsets = Vec::with_capacity(tensor_count);
        for (tensor, start) in tensors.iter().zip(starts) {
            let end = data.checked_add(start).and_then(|at| at.checked_add(tensor.bytes()));
            let Some(end) = end.filter(|&end| end <= bytes.len() as u64) else {
                let expected = format!("data within the {} bytes of the file", bytes.len());
                let found = format!("{} bytes from {start}", tensor.bytes());
                return Err(fault(path, &tensor.name, found, expected));
            };
            offsets.push(usize::try_from(end - tensor.bytes()).expect("inside the file"));
        }
        Ok(Self {
            metadata,
            tensors,
            offsets,
            bytes,
        })
    }

    /// Keys and values, in the file's order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, value)| value)
    }

    /// Names, shapes and types, in the file's order.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The bytes of a tensor.
    pub fn data(&self, name: &str) -> Option<&[u8]> {
        let index = self.tensors.iter().position(|t| t.name == name)?;
        let bytes = usize::try_from(self.tensors[index].bytes()).expect("inside the file");
        Some(&self.bytes[self.offsets[index]..][..bytes])
    }
}

struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, what: &str, count: usize) -> Result<&'a [u8]> {
        let left = self.bytes.len() - self.at;
        if count > left {
            let expected = format!("{count} bytes from {}", self.at);
            return Err(fault(
                self.path,
                what,
                format!("a file that ends after {left}"),
                expected,
            ));
        }
        let taken = &self.bytes[self.at..][..count];
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        Ok(self.take(what, N)?.try_into().expect("that many bytes"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    /// A number of things of which each takes `least` bytes or more.
    fn count(&mut self, what: &str, least: usize) -> Result<usize> {
        let found = u64::from_le_bytes(self.array(what)?);
        let limit = (self.bytes.len() - self.at) / least;
        match usize::try_from(found) {
            Ok(count) if count <= limit => Ok(count),
            _ => Err(fault(self.path, what, found, format!("at most {limit} in this file"))),
        }
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let length = self.count(what, 1)?;
        let bytes = self.take(what, length)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(fault(self.path, what, bytes.escape_ascii(), "UTF-8")),
        }
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            value_type::U32 => Value::U32(self.u32(key)?),
            value_type::I32 => Value::I32(i32::from_le_bytes(self.array(key)?)),
            value_type::F32 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            value_type::BOOL => match self.take(key, 1)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                found => return Err(fault(self.path, key, found, "0 or 1")),
            },
            value_type::TEXT => Value::Text(self.text(key)?),
            value_type::U64 => Value::U64(u64::from_le_bytes(self.array(key)?)),
            value_type::ARRAY => self.list(key)?,
            found => return Err(fault(self.path, key, format!("type {found}"), "4 to 10")),
        })
    }

    fn list(&mut self, key: &str) -> Result<Value> {
        let kind = self.u32(key)?;
        Ok(match kind {
            value_type::I32 => {
                let count = self.count(key, 4)?;
                let numbers = self.take(key, 4 * count)?.as_chunks::<4>().0;
                Value::I32s(numbers.iter().map(|b| i32::from_le_bytes(*b)).collect())
            }
            value_type::F32 => {
                let count = self.count(key, 4)?;
                let numbers = self.take(key, 4 * count)?.as_chunks::<4>().0;
                Value::F32s(numbers.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
            value_type::TEXT => {
                let count = self.count(key, 8)?;
                Value::Texts((0..count).map(|_| self.text(key)).collect::<Result<_>>()?)
            }
            found => return Err(fault(self.path, key, format!("a list of type {found}"), "5, 6 or 8")),
        })
    }

    /// With the offset of its data.
    fn tensor(&mut self) -> Result<(GgufTensor, u64)> {
        let name = self.text("tensor name")?;
        let axes = self.u32(&name)? as usize;
        if !(1..=AXES_LIMIT).contains(&axes) {
            return Err(fault(
                self.path,
                &name,
                format!("{axes} axes"),
                format!("1 to {AXES_LIMIT}"),
            ));
        }
        let mut shape = Vec::with_capacity(axes);
        let mut elements = 1u64;
        for _ in 0..axes {
            let size = u64::from_le_bytes(self.array(&name)?);
            // No type takes less than half a byte a weight.
            let limit = 2 * self.bytes.len() as u64;
            elements = elements.saturating_mul(size);
            match usize::try_from(size) {
                Ok(size) if size > 0 && elements <= limit => shape.push(size),
                _ => {
                    return Err(fault(
                        self.path,
                        &name,
                        format!("a size of {size}"),
                        "what the file has room for",
                    ));
                }
            }
        }
        shape.reverse();
        let id = self.u32(&name)?;
        let Some(kind) = TensorType::ALL.into_iter().find(|kind| kind.id() == id) else {
            return Err(fault(self.path, &name, format!("type {id}"), "0, 1, 2 or 8"));
        };
        let block = kind.block().0;
        if !shape[axes - 1].is_multiple_of(block) {
            return Err(fault(
                self.path,
                &name,
                format!("rows of {}", shape[axes - 1]),
                format!("blocks of {block}"),
            ));
        }
        let start = u64::from_le_bytes(self.array(&name)?);
        if !start.is_multiple_of(super::ALIGNMENT) {
            return Err(fault(self.path, &name, format!("data at {start}"), "a multiple of 32"));
        }
        Ok((GgufTensor { name, shape, kind }, start))
    }
}
