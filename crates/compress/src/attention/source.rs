//! A source some of whose tensors are others. Law: every other tensor is read as before.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use cotk_container::manifest::Matrix;
use cotk_model::checkpoint::{CheckpointError, SharedBytes, TensorInfo, TensorSource};

/// `inner`, with the tensors of `own` in the place of those of the same names.
pub(crate) struct Narrowed {
    inner: Arc<dyn TensorSource>,
    own: Arc<dyn TensorSource>,
}

impl Narrowed {
    pub(crate) fn new(inner: Arc<dyn TensorSource>, own: Arc<dyn TensorSource>) -> Self {
        Self { inner, own }
    }

    fn of(&self, name: &str) -> &dyn TensorSource {
        match self.own.info(name) {
            Some(_) => self.own.as_ref(),
            None => self.inner.as_ref(),
        }
    }
}

impl TensorSource for Narrowed {
    fn names(&self) -> Vec<String> {
        // The FP8 scales of a matrix that is another now belong to nothing.
        let is_left = |name: &String| {
            let matrix = name.strip_suffix("_scale_inv");
            matrix.is_none_or(|matrix| self.own.info(matrix).is_none())
        };
        let mut names = self.inner.names();
        names.retain(is_left);
        names
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.of(name).info(name)
    }

    fn file(&self, name: &str) -> &Path {
        self.of(name).file(name)
    }

    fn raw(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        self.of(name).raw(name)
    }

    fn shared(&self, name: &str) -> Result<SharedBytes, CheckpointError> {
        self.of(name).shared(name)
    }

    fn release(&self) {
        self.inner.release();
        self.own.release();
    }

    fn codes(&self, name: &str) -> Option<&Matrix> {
        self.of(name).codes(name)
    }
}
