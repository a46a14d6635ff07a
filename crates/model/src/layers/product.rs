//! Products of f32 matrices by the `gemm` crate, on one thread each: many rows of activations at once. Few rows go through
//! `cotk_kernels::cpu::rows`, which reads weights as they are stored.

/// A rectangle of a row-major matrix that one thread writes.
pub(crate) struct Tile<'a> {
    start: *mut f32,
    rows: usize,
    columns: usize,
    stride: usize,
    matrix: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: a tile is an exclusive borrow of plain numbers; sharing it gives access only through `part`, whose caller
// promises disjoint rectangles.
unsafe impl Send for Tile<'_> {}
// SAFETY: as above.
unsafe impl Sync for Tile<'_> {}

impl<'a> Tile<'a> {
    /// A whole matrix `[_, columns]`.
    pub(crate) fn new(matrix: &'a mut [f32], columns: usize) -> Self {
        Self {
            start: matrix.as_mut_ptr(),
            rows: matrix.len() / columns,
            columns,
            stride: columns,
            matrix: std::marker::PhantomData,
        }
    }

    /// A rectangle inside.
    ///
    /// # Safety
    /// No two rectangles that live at the same time may overlap.
    pub(crate) unsafe fn part(&self, row: usize, column: usize, rows: usize, columns: usize) -> Tile<'a> {
        assert!(row + rows <= self.rows && column + columns <= self.columns, "inside");
        Tile {
            // SAFETY: inside the matrix by the line above.
            start: unsafe { self.start.add(row * self.stride + column) },
            rows,
            columns,
            stride: self.stride,
            matrix: std::marker::PhantomData,
        }
    }

    /// One row.
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "inside");
        // SAFETY: the row lies inside the rectangle, which is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.columns) }
    }
}

/// `y[r, o] = Σ x[r, i] · w[o, i]` on this thread; `x` is `[y.rows, inputs]`, `w` is `[y.columns, stride]` of which the
/// first `inputs` are read.
pub(crate) fn product(x: &[f32], w: &[f32], inputs: usize, stride: usize, y: &mut Tile<'_>) {
    assert_eq!(x.len(), y.rows * inputs, "x is [rows, inputs]");
    assert_eq!(w.len(), y.columns * stride, "w is [outputs, stride]");
    assert!(inputs <= stride, "inputs lie in a row of w");
    multiply(x, [inputs, 1], w, [1, stride], inputs, y);
}

/// `y[r, c] = Σ p[r, k] · v[k, c]` on this thread; `p` is `[y.rows, inner]`, `v` is `[inner, stride]` of which the
/// first `y.columns` are read.
pub(crate) fn mix(p: &[f32], v: &[f32], inner: usize, stride: usize, y: &mut Tile<'_>) {
    assert_eq!(p.len(), y.rows * inner, "p is [rows, inner]");
    assert_eq!(v.len(), inner * stride, "v is [inner, stride]");
    assert!(y.columns <= stride, "columns lie in a row of v");
    multiply(p, [inner, 1], v, [stride, 1], inner, y);
}

/// Strides are `[row, column]`.
fn multiply(a: &[f32], a_strides: [usize; 2], b: &[f32], b_strides: [usize; 2], inner: usize, y: &mut Tile<'_>) {
    let stride = |s: usize| isize::try_from(s).expect("a slice is shorter than isize::MAX");
    // SAFETY: the callers have checked the lengths of `a` and `b` against the shapes that the strides walk; `y` is
    // an exclusive rectangle of `y.rows` × `y.columns`. Single-threaded inside.
    unsafe {
        gemm::gemm(
            y.rows,
            y.columns,
            inner,
            y.start,
            1,
            stride(y.stride),
            false,
            a.as_ptr(),
            stride(a_strides[1]),
            stride(a_strides[0]),
            b.as_ptr(),
            stride(b_strides[1]),
            stride(b_strides[0]),
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
