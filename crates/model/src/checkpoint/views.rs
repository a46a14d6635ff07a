//! Tensors shown under other names, or cut out of larger ones: what stacked experts look like to who reads them one by
//! one. Knows nothing of families. Law: a view equals the elements that its strides walk, and what is shown in parts is
//! not shown whole.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use cotk_container::manifest::Matrix;

use super::{CheckpointError, SharedBytes, TensorInfo, TensorSource};

/// Where a shown tensor lies in a stored one, in elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Name of the stored tensor.
    pub stored: String,
    pub start: usize,
    pub shape: [usize; 2],
    /// From one row, and from one column, to the next.
    pub strides: [usize; 2],
}

impl View {
    fn end(&self) -> usize {
        let last = |axis: usize| self.shape[axis].saturating_sub(1) * self.strides[axis];
        self.start + last(0) + last(1) + 1
    }
}

/// A source with views over it.
pub struct Views {
    inner: Arc<dyn TensorSource>,
    views: BTreeMap<String, View>,
    /// Other names, shown → stored.
    renamed: BTreeMap<String, String>,
    /// Stored names that are shown in another way only.
    hidden: BTreeSet<String>,
}

impl Views {
    /// Shows `views` in place of the tensors that they are cut from, and `renamed` (shown → stored) under new names.
    ///
    /// # Panics
    /// When a view leaves its tensor: whoever makes views has checked the shape.
    pub fn new(inner: Arc<dyn TensorSource>, views: BTreeMap<String, View>, renamed: BTreeMap<String, String>) -> Self {
        for view in views.values() {
            let elements = inner.info(&view.stored).map_or(0, |info| info.elements());
            assert!(view.end() <= elements, "{} leaves its tensor", view.stored);
        }
        let hidden = views
            .values()
            .map(|v| &v.stored)
            .chain(renamed.values())
            .cloned()
            .collect();
        Self {
            inner,
            views,
            renamed,
            hidden,
        }
    }

    fn stored<'a>(&'a self, name: &'a str) -> &'a str {
        match self.views.get(name) {
            Some(view) => &view.stored,
            None => self.renamed.get(name).map_or(name, String::as_str),
        }
    }
}

impl TensorSource for Views {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.inner.names();
        names.retain(|name| !self.hidden.contains(name));
        names.extend(self.views.keys().chain(self.renamed.keys()).cloned());
        names.sort();
        names
    }

    fn release(&self) {
        self.inner.release();
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let info = self.inner.info(self.stored(name))?;
        Some(match self.views.get(name) {
            Some(view) => TensorInfo {
                dtype: info.dtype,
                shape: view.shape.to_vec(),
            },
            None => info,
        })
    }

    fn file(&self, name: &str) -> &Path {
        self.inner.file(self.stored(name))
    }

    fn raw(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let stored = match (self.views.get(name), self.renamed.get(name)) {
            (Some(view), _) => view.stored.as_str(),
            (None, Some(stored)) => stored.as_str(),
            (None, None) => return self.inner.raw(name),
        };
        let bytes = self.inner.raw(stored)?;
        let (Some(view), Some(info)) = (self.views.get(name), self.inner.info(stored)) else {
            return Ok(bytes);
        };
        let size = info.dtype.size_bytes();
        let [rows, columns] = view.shape;
        if view.strides == [columns, 1] {
            let range = view.start * size..view.end() * size;
            return Ok(match bytes {
                Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[range]),
                Cow::Owned(bytes) => Cow::Owned(bytes[range].to_vec()),
            });
        }
        let mut gathered = Vec::with_capacity(rows * columns * size);
        for row in 0..rows {
            for column in 0..columns {
                let at = (view.start + row * view.strides[0] + column * view.strides[1]) * size;
                gathered.extend_from_slice(&bytes[at..at + size]);
            }
        }
        Ok(Cow::Owned(gathered))
    }

    fn shared(&self, name: &str) -> Result<SharedBytes, CheckpointError> {
        let Some(view) = self.views.get(name) else {
            return self.inner.shared(self.stored(name));
        };
        let Some(info) = self
            .inner
            .info(&view.stored)
            .filter(|_| view.strides == [view.shape[1], 1])
        else {
            return Ok(self.raw(name)?.into_owned().into());
        };
        let size = info.dtype.size_bytes();
        let whole = self.inner.shared(&view.stored)?;
        Ok(whole.slice(view.start * size..view.end() * size))
    }

    fn codes(&self, name: &str) -> Option<&Matrix> {
        match self.views.get(name) {
            Some(_) => None,
            None => self.inner.codes(self.stored(name)),
        }
    }
}
