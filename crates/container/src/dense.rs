//! Writes `dense.safetensors`, tensor by tensor: only one is in memory at a time. Reading it is `cotk-model`'s. A matrix
//! `X` that is coded is the U8 tensor `X.planes` with the bytes that kernels read, described in the manifest's `dense`.
//! Law: any safetensors reader reads it back; equal tensors make equal bytes.

use std::cmp::Reverse;
use std::io::Write;
use std::path::Path;

use cotk_quant::QuantError;
use cotk_quant::code::{Bits, Code};
use cotk_quant::encode::encode;
use cotk_quant::layout::MatrixFormat;
use cotk_run::Error;
use cotk_run::files::AtomicFile;

use crate::manifest::Matrix;
use crate::{ContainerError, Result};

/// What the name of a coded matrix' tensor ends in.
pub const PLANES: &str = ".planes";

/// Planes begin at multiples of this: a cache line.
const LINE: usize = 64;

/// Codes weights `[rows, cols]` as one plain plane of groups of 32, at any of [`Bits::ALL`]: what the manifest says, and the
/// tensor's bytes.
///
/// # Errors
/// A width that there is not; a weight that is NaN or infinite or too large for its scale; a shape that no format has.
pub fn code_matrix(
    weights: &[f32],
    rows: usize,
    cols: usize,
    bits: u32,
) -> std::result::Result<(Matrix, Vec<u8>), QuantError> {
    let matrix = plain_matrix(rows, cols, bits)?;
    let mut coded = encode(weights, matrix.format)?;
    Ok((matrix, coded.planes.swap_remove(0)))
}

/// What [`code_matrix`] says of any weights: format and zero point of a plain code.
///
/// # Errors
/// A width that there is not, rows or columns outside `1..=2^24`.
pub fn plain_matrix(rows: usize, cols: usize, bits: u32) -> std::result::Result<Matrix, QuantError> {
    let bits = Bits::try_from(bits)?;
    let code = Code::Plain(bits);
    let zero_points = vec![code.default_zero_point(bits)];
    Ok(Matrix::new(plain_format(rows, cols, bits)?, zero_points))
}

/// The widths that a dense matrix is coded at: 8 and 4.
pub fn dense_bits(bits: u32) -> Option<Bits> {
    Bits::try_from(bits).ok().filter(|b| matches!(b, Bits::B4 | Bits::B8))
}

/// Plain codes in groups of 32.
///
/// # Errors
/// Rows or columns outside `1..=2^24`.
pub fn plain_format(rows: usize, cols: usize, bits: Bits) -> std::result::Result<MatrixFormat, QuantError> {
    MatrixFormat::try_new(rows, cols, Code::Plain(bits), 32)
}

/// What the header says about one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DenseTensor {
    pub name: String,
    /// Safetensors name of its type: `BF16`.
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: u64,
}

impl DenseTensor {
    fn element_bytes(&self) -> u64 {
        self.bytes / (self.shape.iter().map(|&n| n as u64).product::<u64>()).max(1)
    }
}

/// The weights `[rows, cols]` that a plane stands for.
///
/// # Errors
/// A plane of another length than the matrix needs.
pub fn decode(matrix: &Matrix, plane: &[u8]) -> std::result::Result<Vec<f32>, QuantError> {
    Ok(cotk_quant::decode::decode(&matrix.plain(plane)?))
}

/// One row of them, into `weights` `[cols]`.
///
/// # Errors
/// As [`decode`].
///
/// # Panics
/// No such row, another number of weights.
pub fn decode_row(
    matrix: &Matrix,
    plane: &[u8],
    row: usize,
    weights: &mut [f32],
) -> std::result::Result<(), QuantError> {
    cotk_quant::decode::decode_row(&matrix.plain(plane)?, row, weights);
    Ok(())
}

/// Size of the file that [`write_dense`] makes.
pub fn dense_file_bytes(tensors: &[DenseTensor]) -> u64 {
    let order = in_order(tensors);
    header(&order).len() as u64 + order.iter().map(|t| t.bytes).sum::<u64>()
}

/// Planes first, at lines; then the widest type, so that each tensor is aligned; then by name.
fn in_order(tensors: &[DenseTensor]) -> Vec<&DenseTensor> {
    let mut order: Vec<&DenseTensor> = tensors.iter().collect();
    let key = |t: &DenseTensor| (!t.name.ends_with(PLANES), Reverse(t.element_bytes()));
    order.sort_by(|a, b| (key(a), &a.name).cmp(&(key(b), &b.name)));
    order
}

/// Writes the tensors, planes first, then the widest type (so that each is aligned), then by name; `data` gives one's bytes.
///
/// # Errors
/// Those of `data`; the file system's; [`ContainerError::Value`] when `data` gives another length than promised.
/// Nothing stands under `path` then.
pub fn write_dense<E: From<ContainerError>>(
    path: &Path,
    tensors: &[DenseTensor],
    mut data: impl FnMut(&DenseTensor) -> Result<Vec<u8>, E>,
) -> Result<(), E> {
    let order = in_order(tensors);
    let io = |e| ContainerError::from(Error::io("write", path)(e));
    let mut file = AtomicFile::create(path).map_err(ContainerError::from)?;
    file.write_all(&header(&order)).map_err(io)?;
    for tensor in order {
        let bytes = data(tensor)?;
        if bytes.len() as u64 != tensor.bytes {
            return Err(E::from(ContainerError::Value {
                file: path.to_owned(),
                key: tensor.name.clone(),
                found: format!("{} bytes", bytes.len()),
                expected: format!("{} bytes", tensor.bytes),
            }));
        }
        file.write_all(&bytes).map_err(io)?;
    }
    file.commit().map_err(ContainerError::from)?;
    Ok(())
}

/// Length, then JSON padded by spaces so that the data begins at a line.
fn header(order: &[&DenseTensor]) -> Vec<u8> {
    let mut fields = serde_json::Map::new();
    let mut at = 0u64;
    for tensor in order {
        fields.insert(
            tensor.name.clone(),
            serde_json::json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.bytes]}),
        );
        at += tensor.bytes;
    }
    let mut json = serde_json::Value::Object(fields).to_string().into_bytes();
    json.resize((8 + json.len()).next_multiple_of(LINE) - 8, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_safetensors_reader_reads_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dense.safetensors");
        let tensors = [
            ("b", "BF16", vec![3], 6),
            ("a", "F32", vec![2, 1], 8),
            ("c", "BF16", vec![1], 2),
            ("z.planes", "U8", vec![544], 544),
        ]
        .map(|(name, dtype, shape, bytes)| DenseTensor {
            name: name.to_owned(),
            dtype,
            shape,
            bytes,
        });
        let data = |t: &DenseTensor| Ok::<_, ContainerError>(vec![t.name.as_bytes()[0]; t.bytes as usize]);
        write_dense(&path, &tensors, data).unwrap();
        let bytes = fs_err::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, dense_file_bytes(&tensors));
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.len(), 4);
        for tensor in &tensors {
            let view = read.tensor(&tensor.name).unwrap();
            assert_eq!(view.shape(), tensor.shape);
            assert_eq!(view.data(), data(tensor).unwrap());
        }
        let planes = read.tensor("z.planes").unwrap().data();
        let at = planes.as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(at % LINE, 0, "planes begin at a line");
        let short = |_: &DenseTensor| Ok::<_, ContainerError>(vec![0]);
        assert!(write_dense(&folder.path().join("other"), &tensors, short).is_err());
        assert_eq!(fs_err::read_dir(folder.path()).unwrap().count(), 1);
    }
}
