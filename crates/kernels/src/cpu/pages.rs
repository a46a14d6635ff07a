//! Memory for weights in large pages: a stream of weights crosses a page of 4 KiB every 0.1 µs, and the CPU's own
//! prefetching ends with each. All of it is advice: a system that has no large pages gives small ones.

use std::ops::{Deref, DerefMut};

/// A large page.
const LARGE: usize = 2 << 20;

/// Bytes at a multiple of 64, zero at first, in large pages where there are enough of them.
pub struct Pages {
    /// Longer than what is shown: a start is chosen inside.
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Pages {
    /// `len` zeros; no page of them is touched before it is written.
    pub fn zeroed(len: usize) -> Self {
        let align = if len >= LARGE { LARGE } else { 64 };
        let bytes = vec![0; len + align];
        let start = bytes.as_ptr().align_offset(align).min(align);
        let pages = Self { bytes, start, len };
        advise_large(&pages);
        pages
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl Clone for Pages {
    fn clone(&self) -> Self {
        Self::from(&**self)
    }
}

impl From<&[u8]> for Pages {
    fn from(bytes: &[u8]) -> Self {
        let mut pages = Self::zeroed(bytes.len());
        pages.copy_from_slice(bytes);
        pages
    }
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pages({} bytes)", self.len)
    }
}

/// Says of the whole large pages inside `bytes` that they are wanted as such: memory that is not yet touched comes in large
/// pages then. Changes no byte.
pub fn advise_large(bytes: &[u8]) {
    #[cfg(target_os = "linux")]
    advise(bytes, libc::MADV_HUGEPAGE);
    #[cfg(not(target_os = "linux"))]
    let _ = bytes;
}

/// Asks for large pages now, of memory that is touched or a mapped file that is in the page cache. The system copies page
/// by page, which takes about as long as reading, and needs no more memory. Whether it could is not said: nothing depends
/// on it but speed.
pub fn collapse(bytes: &[u8]) {
    /// Linux 6.1; older systems refuse it.
    #[cfg(target_os = "linux")]
    const MADV_COLLAPSE: i32 = 25;
    #[cfg(target_os = "linux")]
    advise(bytes, MADV_COLLAPSE);
    #[cfg(not(target_os = "linux"))]
    let _ = bytes;
}

#[cfg(target_os = "linux")]
fn advise(bytes: &[u8], advice: i32) {
    let start = bytes.as_ptr().align_offset(LARGE);
    let whole = bytes.len().saturating_sub(start) / LARGE * LARGE;
    if whole > 0 {
        let inner = &bytes[start..start + whole];
        // SAFETY: the range is memory of this process, in whole pages; this advice changes no byte of it.
        unsafe { libc::madvise(inner.as_ptr().cast_mut().cast(), inner.len(), advice) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_zero_aligned_and_hold_what_is_written() {
        for len in [0, 1, 63, 4096, LARGE - 1, LARGE, 3 * LARGE + 5] {
            let mut pages = Pages::zeroed(len);
            assert_eq!(pages.len(), len);
            assert!(pages.iter().all(|b| *b == 0) && (len == 0 || (pages.as_ptr() as usize).is_multiple_of(64)));
            pages.iter_mut().zip(0usize..).for_each(|(b, i)| *b = i as u8);
            collapse(&pages);
            let copy = pages.clone();
            assert!(copy.iter().zip(0usize..).all(|(b, i)| *b == i as u8));
            assert_eq!(&*copy, &*pages);
        }
    }

    #[test]
    fn advice_on_any_range_changes_nothing() {
        let bytes: Vec<u8> = (0..5 * LARGE).map(|i| i as u8).collect();
        for range in [0..0, 0..1, 5..LARGE, 7..3 * LARGE, LARGE - 1..5 * LARGE] {
            advise_large(&bytes[range.clone()]);
            collapse(&bytes[range]);
        }
        assert!(bytes.iter().zip(0usize..).all(|(b, i)| *b == i as u8));
    }
}
