//! [`SharedBytes`]: stored bytes that outlive their source. A piece of a mapped file costs no memory of its own, and is
//! what kernels read. Law: equal to what `raw` of the source gives.

use std::ops::{Deref, Range};
use std::sync::Arc;

use cotk_kernels::cpu::pages::Pages;
use memmap2::Mmap;

/// Bytes with an owner. Cheap to clone.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Owner,
    range: Range<usize>,
}

#[derive(Clone)]
enum Owner {
    Mapped(Arc<Mmap>),
    Own(Arc<Vec<u8>>),
    /// Weights made in this process: large pages stream faster.
    Pages(Arc<Pages>),
}

/// Bytes from which large pages are worth a copy.
const PAGED_FROM: usize = 1 << 20;

impl SharedBytes {
    /// A piece of a mapped file.
    ///
    /// # Panics
    /// When the range leaves the map.
    pub(super) fn mapped(map: Arc<Mmap>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= map.len(), "inside the map");
        Self {
            owner: Owner::Mapped(map),
            range,
        }
    }

    /// A piece of these bytes.
    ///
    /// # Panics
    /// When the range leaves them.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.range.len(), "inside");
        Self {
            owner: self.owner.clone(),
            range: self.range.start + range.start..self.range.start + range.end,
        }
    }

    /// Whether they lie in a mapped file.
    pub fn is_mapped(&self) -> bool {
        matches!(self.owner, Owner::Mapped(_))
    }
}

impl From<Vec<u8>> for SharedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            range: 0..bytes.len(),
            owner: if bytes.len() < PAGED_FROM {
                Owner::Own(Arc::new(bytes))
            } else {
                Owner::Pages(Arc::new(Pages::from(bytes.as_slice())))
            },
        }
    }
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.owner {
            Owner::Mapped(map) => map,
            Owner::Own(bytes) => bytes,
            Owner::Pages(pages) => pages,
        };
        &all[self.range.clone()]
    }
}

impl std::fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let whose = if self.is_mapped() { "mapped" } else { "own" };
        write!(f, "SharedBytes({} {whose})", self.len())
    }
}
