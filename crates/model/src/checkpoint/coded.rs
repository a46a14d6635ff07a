//! [`CodedSource`]: the dense part of a container, where a matrix `X` may be codes: the U8 tensor `X.planes` and what the
//! manifest says of it. Law: `load_f32` gives the weights that the codes stand for; planes of another length, planes
//! without a description and descriptions without planes are refused by name.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use cotk_container::dense::{PLANES, code_matrix, plain_matrix};
use cotk_container::manifest::Matrix;

use super::{CheckpointError, DType, SharedBytes, TensorInfo, TensorSource, not_codes};

/// A source some of whose matrices are coded.
pub struct CodedSource {
    inner: Arc<dyn TensorSource>,
    matrices: BTreeMap<String, Matrix>,
}

impl CodedSource {
    /// `matrices` by their names without [`PLANES`].
    ///
    /// # Errors
    /// Planes that are missing, of another type or of another length than their matrix needs.
    pub fn new(inner: Arc<dyn TensorSource>, matrices: BTreeMap<String, Matrix>) -> Result<Self, CheckpointError> {
        for (name, matrix) in &matrices {
            let planes = planes_of(name);
            let info = inner.require(&planes, &[matrix.format.total_bytes()])?;
            if info.dtype != DType::U8 {
                return Err(CheckpointError::Type {
                    file: inner.file(&planes).to_owned(),
                    tensor: planes,
                    found: info.dtype.name().to_owned(),
                    expected: DType::U8.name().to_owned(),
                });
            }
            // The gate of codes: zero points too.
            let bytes = inner.raw(&planes)?;
            matrix
                .plain(&bytes)
                .map_err(|e| not_codes(inner.file(&planes), name, &e))?;
        }
        Ok(Self { inner, matrices })
    }
}

fn planes_of(name: &str) -> String {
    format!("{name}{PLANES}")
}

impl TensorSource for CodedSource {
    fn names(&self) -> Vec<String> {
        let is_plane = |name: &String| {
            let matrix = name.strip_suffix(PLANES);
            matrix.is_some_and(|matrix| self.matrices.contains_key(matrix))
        };
        let mut names = self.inner.names();
        names.retain(|name| !is_plane(name));
        names.extend(self.matrices.keys().cloned());
        names.sort();
        names
    }

    fn release(&self) {
        self.inner.release();
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        match self.matrices.get(name) {
            Some(matrix) => Some(TensorInfo {
                dtype: DType::U8,
                shape: vec![matrix.format.rows(), matrix.format.cols()],
            }),
            None => self.inner.info(name),
        }
    }

    fn file(&self, name: &str) -> &Path {
        match self.matrices.get(name) {
            Some(_) => self.inner.file(&planes_of(name)),
            None => self.inner.file(name),
        }
    }

    fn raw(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        match self.matrices.get(name) {
            Some(_) => self.inner.raw(&planes_of(name)),
            None => self.inner.raw(name),
        }
    }

    fn shared(&self, name: &str) -> Result<SharedBytes, CheckpointError> {
        match self.matrices.get(name) {
            Some(_) => self.inner.shared(&planes_of(name)),
            None => self.inner.shared(name),
        }
    }

    fn codes(&self, name: &str) -> Option<&Matrix> {
        self.matrices.get(name)
    }

    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }
}

/// A source some of whose matrices are coded on the way, as a container will hold them: plain codes of groups of 32. Law:
/// what is loaded is what the container's own source gives.
pub struct CodingSource {
    inner: Arc<dyn TensorSource>,
    matrices: BTreeMap<String, Matrix>,
    bits: u32,
}

impl CodingSource {
    /// Codes `matrices` (names and shapes, see [`crate::inventory::codable`]) at 8 or 4 bits.
    ///
    /// # Errors
    /// Another width, a shape that no code has.
    pub fn new(
        inner: Arc<dyn TensorSource>,
        matrices: &[(String, [usize; 2])],
        bits: u32,
    ) -> Result<Self, CheckpointError> {
        let matrices = matrices
            .iter()
            .map(|(name, [rows, cols])| match plain_matrix(*rows, *cols, bits) {
                Ok(matrix) => Ok((name.clone(), matrix)),
                Err(error) => Err(not_codes(inner.file(name), name, &error)),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { inner, matrices, bits })
    }

    /// What is coded, as a manifest says it.
    pub fn matrices(&self) -> &BTreeMap<String, Matrix> {
        &self.matrices
    }
}

impl TensorSource for CodingSource {
    fn names(&self) -> Vec<String> {
        let is_scales = |name: &String| {
            let matrix = name.strip_suffix("_scale_inv");
            matrix.is_some_and(|matrix| self.matrices.contains_key(matrix))
        };
        let mut names = self.inner.names();
        names.retain(|name| !is_scales(name));
        names
    }

    fn release(&self) {
        self.inner.release();
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let mut info = self.inner.info(name)?;
        if self.matrices.contains_key(name) {
            info.dtype = DType::U8;
        }
        Some(info)
    }

    fn file(&self, name: &str) -> &Path {
        self.inner.file(name)
    }

    fn raw(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let Some(matrix) = self.matrices.get(name) else {
            return self.inner.raw(name);
        };
        let (rows, cols) = (matrix.format.rows(), matrix.format.cols());
        let weights = self.inner.load_f32(name, &[rows, cols])?;
        match code_matrix(&weights, rows, cols, self.bits) {
            Ok((_, plane)) => Ok(Cow::Owned(plane)),
            Err(error) => Err(not_codes(self.inner.file(name), name, &error)),
        }
    }

    fn shared(&self, name: &str) -> Result<SharedBytes, CheckpointError> {
        match self.matrices.get(name) {
            Some(_) => Ok(self.raw(name)?.into_owned().into()),
            None => self.inner.shared(name),
        }
    }

    fn codes(&self, name: &str) -> Option<&Matrix> {
        self.matrices.get(name)
    }
}

#[cfg(test)]
mod tests {
    use cotk_container::ContainerError;
    use cotk_container::dense::{DenseTensor, decode, write_dense};

    use super::*;
    use crate::checkpoint::safetensors::Safetensors;

    const SHAPE: [usize; 2] = [20, 70];

    fn coded() -> (Vec<f32>, Matrix, Vec<u8>) {
        let weights: Vec<f32> = (0..SHAPE[0] * SHAPE[1]).map(|i| (i as f32 * 0.3).sin()).collect();
        let (matrix, plane) = code_matrix(&weights, SHAPE[0], SHAPE[1], 8).unwrap();
        (weights, matrix, plane)
    }

    fn source(folder: &Path, name: &str, dtype: &'static str, plane: &[u8]) -> Arc<dyn TensorSource> {
        let file = folder.join("dense.safetensors");
        let tensor = DenseTensor {
            name: name.to_owned(),
            dtype,
            shape: vec![plane.len()],
            bytes: plane.len() as u64,
        };
        write_dense(&file, &[tensor], |_| Ok::<_, ContainerError>(plane.to_vec())).unwrap();
        Arc::new(Safetensors::open_file(&file).unwrap())
    }

    #[test]
    fn a_coded_matrix_is_shown_as_its_weights() {
        let folder = tempfile::tempdir().unwrap();
        let (weights, matrix, plane) = coded();
        let inner = source(folder.path(), "w.planes", "U8", &plane);
        let source = CodedSource::new(inner, [("w".to_owned(), matrix.clone())].into()).unwrap();
        assert_eq!(source.names(), ["w"]);
        assert_eq!(source.info("w").unwrap().shape, SHAPE);
        assert!(source.info("w.planes").is_some() && source.codes("w.planes").is_none());
        let loaded = source.load_f32("w", &SHAPE).unwrap();
        assert_eq!(loaded, decode(&matrix, &plane).unwrap());
        assert!(loaded.iter().zip(&weights).all(|(a, b)| (a - b).abs() < 0.005));
        let shared = source.shared("w").unwrap();
        assert!(shared.is_mapped());
        assert_eq!(
            (&*shared, &*source.raw("w").unwrap()),
            (plane.as_slice(), plane.as_slice())
        );
        assert_eq!(source.bytes(), plane.len() as u64);
        assert!(matches!(
            source.load_f32("w", &[70, 20]),
            Err(CheckpointError::Shape { .. })
        ));
    }

    #[test]
    fn planes_that_are_not_what_the_manifest_says_are_refused() {
        let (_, matrix, plane) = coded();
        let mut odd = matrix.clone();
        odd.zero_points = vec![f32::NAN];
        for (name, dtype, bytes, matrix) in [
            ("w.planes", "U8", &plane[1..], &matrix),
            ("v.planes", "U8", &plane, &matrix),
            ("w.planes", "I8", &plane, &matrix),
            ("w.planes", "U8", &plane, &odd),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let inner = source(folder.path(), name, dtype, bytes);
            let text = match CodedSource::new(inner, [("w".to_owned(), matrix.clone())].into()) {
                Ok(_) => panic!("{name} {dtype} was believed"),
                Err(error) => error.to_string(),
            };
            assert!(text.contains("`w"), "{text}");
        }
    }

    #[test]
    fn what_is_coded_on_the_way_is_what_a_container_holds() {
        let folder = tempfile::tempdir().unwrap();
        let (weights, matrix, plane) = coded();
        let file = folder.path().join("model.safetensors");
        let tensor = DenseTensor {
            name: "w".to_owned(),
            dtype: "F32",
            shape: SHAPE.to_vec(),
            bytes: 4 * weights.len() as u64,
        };
        let bytes = || weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        write_dense(&file, &[tensor], |_| Ok::<_, ContainerError>(bytes())).unwrap();
        let inner = Arc::new(Safetensors::open_file(&file).unwrap());
        let source = CodingSource::new(inner.clone(), &[("w".to_owned(), SHAPE)], 8).unwrap();
        assert_eq!(source.codes("w"), Some(&matrix));
        assert_eq!(*source.raw("w").unwrap(), plane);
        assert_eq!(source.load_f32("w", &SHAPE).unwrap(), decode(&matrix, &plane).unwrap());
        assert!(CodingSource::new(inner, &[("w".to_owned(), SHAPE)], 5).is_err());
    }
}
