//! The seam [`TensorSource`]: tensors by name and shape, lazily, wherever they lie. Knows nothing of families.
//! Law: what a source hands out has exactly the asked shape and holds no NaN or infinity. A matrix `X` in FP8 is read
//! with its scales in `X_scale_inv`, one per block of [`SCALE_BLOCK`]² (DeepSeek-V3).

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use cotk_container::dense::decode;
use cotk_container::manifest::Matrix;

pub use self::bytes::SharedBytes;
pub use self::decode::decode_f32;

mod bytes;
pub mod coded;
mod decode;
pub mod safetensors;
pub mod views;

/// Why a checkpoint cannot be read. Every variant says where; what can be compared says found and expected.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file is missing or cannot be read.
    #[error(transparent)]
    File(#[from] cotk_run::Error),
    /// No file of the checkpoint holds this tensor.
    #[error("{}: no tensor `{tensor}`{}", file.display(), nearest.as_ref().map_or(String::new(), |n| format!(" (nearest: `{n}`)")))]
    Missing {
        file: PathBuf,
        tensor: String,
        nearest: Option<String>,
    },
    #[error("{}: tensor `{tensor}` has shape {found:?}, expected {expected:?}", file.display())]
    Shape {
        file: PathBuf,
        tensor: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("{}: tensor `{tensor}` has type {found}, expected {expected}", file.display())]
    Type {
        file: PathBuf,
        tensor: String,
        found: String,
        expected: String,
    },
    /// A weight is NaN or infinite.
    #[error("{}: tensor `{tensor}` holds {found} at index {index}, expected a finite number", file.display())]
    NotFinite {
        file: PathBuf,
        tensor: String,
        index: usize,
        found: f32,
    },
    /// A tensor that no part of the model reads.
    #[error("{}: tensor `{tensor}` is not of this model{}", file.display(), nearest.as_ref().map_or(String::new(), |n| format!(" (nearest: `{n}`)")))]
    Unknown {
        file: PathBuf,
        tensor: String,
        nearest: Option<String>,
    },
    #[error("{}: ends after {found} bytes, its header promises {expected}", file.display())]
    Truncated { file: PathBuf, found: u64, expected: u64 },
    /// A header or index that contradicts itself or its file.
    #[error("{}: {what}: found {found}, expected {expected}", file.display())]
    Header {
        file: PathBuf,
        what: String,
        found: String,
        expected: String,
    },
}

impl CheckpointError {
    pub(crate) fn not_a_weight(file: &Path, tensor: &str, found: DType) -> Self {
        Self::Type {
            file: file.to_owned(),
            tensor: tensor.to_owned(),
            found: found.name().to_owned(),
            expected: "F32, F16 or BF16".to_owned(),
        }
    }
}

/// Element types of stored tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F16,
    BF16,
    /// e4m3fn: a matrix in blocks with scales, see [`scales_of`].
    F8E4M3,
    /// Bytes: codes of a quantized matrix, described elsewhere.
    U8,
    /// A type that exists but that no weight of ours has; kept so that headers can name it.
    Other(OtherType),
}

/// The safetensors types that are sized but never read as weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OtherType {
    Bool,
    I8,
    F8E5M2,
    F8E8M0,
    I16,
    U16,
    I32,
    U32,
    I64,
    U64,
    F64,
}

impl DType {
    const NAMES: [(&'static str, Self); 16] = [
        ("F32", Self::F32),
        ("F16", Self::F16),
        ("BF16", Self::BF16),
        ("U8", Self::U8),
        ("BOOL", Self::Other(OtherType::Bool)),
        ("I8", Self::Other(OtherType::I8)),
        ("F8_E4M3", Self::F8E4M3),
        ("F8_E5M2", Self::Other(OtherType::F8E5M2)),
        ("F8_E8M0", Self::Other(OtherType::F8E8M0)),
        ("I16", Self::Other(OtherType::I16)),
        ("U16", Self::Other(OtherType::U16)),
        ("I32", Self::Other(OtherType::I32)),
        ("U32", Self::Other(OtherType::U32)),
        ("I64", Self::Other(OtherType::I64)),
        ("U64", Self::Other(OtherType::U64)),
        ("F64", Self::Other(OtherType::F64)),
    ];

    /// From its safetensors name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(n, _)| *n == name).map(|(_, d)| *d)
    }

    /// Its safetensors name.
    pub fn name(self) -> &'static str {
        Self::NAMES
            .iter()
            .find(|(_, d)| *d == self)
            .map(|(n, _)| *n)
            .expect("every variant stands in the table")
    }

    /// Whether [`TensorSource::load_f32`] reads it.
    pub fn is_weight(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16 | Self::F8E4M3)
    }

    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::U8 | Self::F8E4M3 => 1,
            Self::Other(other) => match other {
                OtherType::Bool | OtherType::I8 | OtherType::F8E5M2 | OtherType::F8E8M0 => 1,
                OtherType::I16 | OtherType::U16 => 2,
                OtherType::I32 | OtherType::U32 => 4,
                OtherType::I64 | OtherType::U64 | OtherType::F64 => 8,
            },
        }
    }
}

/// What is known of a tensor without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub dtype: DType,
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes as stored.
    pub fn bytes(&self) -> u64 {
        self.elements() as u64 * self.dtype.size_bytes() as u64
    }
}

/// Tensors by name: one file, shards, or the dense part of a container.
pub trait TensorSource: Send + Sync {
    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// Type and shape, without touching the data.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// The file that holds the tensor, or the checkpoint itself for a name that no file holds.
    fn file(&self, name: &str) -> &Path;

    /// The stored bytes, little endian, row major.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`], or what reading meets.
    fn raw(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError>;

    /// The same with an owner of their own: of a mapped file, without a copy.
    ///
    /// # Errors
    /// As [`raw`](Self::raw).
    fn shared(&self, name: &str) -> Result<SharedBytes, CheckpointError> {
        Ok(self.raw(name)?.into_owned().into())
    }

    /// Lets go of the memory that pages of mapped files take: they are read again when they are asked for. For passes
    /// that see a checkpoint once, layer by layer, whatever its size.
    fn release(&self) {}

    /// How a matrix is coded; `None` where its stored bytes are its weights. Of a coded matrix [`raw`](Self::raw) is the
    /// plane, and [`info`](Self::info) says U8 and the shape of its weights.
    fn codes(&self, _name: &str) -> Option<&Matrix> {
        None
    }

    /// Bytes of all tensors as stored, headers not counted.
    fn bytes(&self) -> u64 {
        self.names()
            .iter()
            .filter_map(|name| self.info(name))
            .map(|i| i.bytes())
            .sum()
    }

    /// The tensor as f32, row major, in exactly the `expected` shape. FP8 is multiplied by its scales, codes are decoded.
    ///
    /// # Errors
    /// Missing, another shape, a type that is no weight's, or a value that is not finite.
    fn load_f32(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        let info = self.require(name, expected)?;
        let bytes = self.raw(name)?;
        if let Some(matrix) = self.codes(name) {
            let values = decode(matrix, &bytes).map_err(|e| not_codes(self.file(name), name, &e))?;
            return match values.iter().position(|v| !v.is_finite()) {
                None => Ok(values),
                Some(index) => Err(CheckpointError::NotFinite {
                    file: self.file(name).to_owned(),
                    tensor: name.to_owned(),
                    index,
                    found: values[index],
                }),
            };
        }
        let (values, not_finite) = match (info.dtype, expected) {
            (DType::F8E4M3, &[rows, columns]) => {
                let scales = self.load_f32(&scales_of(name), &scale_shape(rows, columns))?;
                decode::fp8(&bytes, columns, &scales)
            }
            (dtype, _) => decode::checked(&bytes, dtype)
                .ok_or_else(|| CheckpointError::not_a_weight(self.file(name), name, dtype))?,
        };
        match not_finite {
            None => Ok(values),
            Some(index) => Err(CheckpointError::NotFinite {
                file: self.file(name).to_owned(),
                tensor: name.to_owned(),
                index,
                found: values[index],
            }),
        }
    }

    /// Type and shape of a tensor that must be there in the `expected` shape.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] with the nearest name, [`CheckpointError::Shape`].
    fn require(&self, name: &str, expected: &[usize]) -> Result<TensorInfo, CheckpointError> {
        let Some(info) = self.info(name) else {
            let names = self.names();
            return Err(CheckpointError::Missing {
                file: self.file(name).to_owned(),
                tensor: name.to_owned(),
                nearest: cotk_run::recipe::nearest_of(name, names.iter().map(String::as_str)),
            });
        };
        if info.shape != expected {
            return Err(CheckpointError::Shape {
                file: self.file(name).to_owned(),
                tensor: name.to_owned(),
                found: info.shape,
                expected: expected.to_vec(),
            });
        }
        Ok(info)
    }
}

/// A plane that its description does not fit.
pub(crate) fn not_codes(file: &Path, name: &str, error: &dyn std::fmt::Display) -> CheckpointError {
    CheckpointError::Header {
        file: file.to_owned(),
        what: format!("codes of `{name}`"),
        found: error.to_string(),
        expected: "a plain code with its zero point".to_owned(),
    }
}

/// Side of the blocks of an FP8 matrix that share a scale; those at its edges may be cut.
pub const SCALE_BLOCK: usize = 128;

/// The name of an FP8 matrix's scales. Says inverse, multiplies.
pub fn scales_of(name: &str) -> String {
    format!("{name}_scale_inv")
}

/// The shape of an FP8 matrix's scales.
pub fn scale_shape(rows: usize, columns: usize) -> [usize; 2] {
    [rows.div_ceil(SCALE_BLOCK), columns.div_ceil(SCALE_BLOCK)]
}
