//! Matrices in f32 and their products with rows of activations, by the `gemm` crate on one thread per chunk.
//! Law: chunks have fixed sizes, so the bits do not depend on the number of threads.

use rayon::prelude::*;

use crate::checkpoint::{CheckpointError, TensorSource};

/// Rows and outputs of one chunk of a product.
const CHUNK_ROWS: usize = 256;
const CHUNK_OUTPUTS: usize = 256;
/// Multiply-adds below which a thread costs more than it brings. Decides who works, not what comes out.
const PARALLEL_FROM: usize = 1 << 18;

/// `y = x · Wᵀ + b`, weights `[outputs, inputs]`.
#[derive(Debug, Clone)]
pub struct Linear {
    outputs: usize,
    inputs: usize,
    weights: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Linear {
    /// From weights `[outputs, inputs]`, row major, without a bias.
    ///
    /// # Panics
    /// When their number is another.
    pub fn new(weights: Vec<f32>, outputs: usize, inputs: usize) -> Self {
        assert_eq!(weights.len(), outputs * inputs, "weights are [{outputs}, {inputs}]");
        Self {
            outputs,
            inputs,
            weights,
            bias: None,
        }
    }

    /// Reads `name` as `[outputs, inputs]`.
    ///
    /// # Errors
    /// As [`TensorSource::load_f32`].
    pub fn load(source: &dyn TensorSource, name: &str, [outputs, inputs]: [usize; 2]) -> Result<Self, CheckpointError> {
        Ok(Self::new(source.load_f32(name, &[outputs, inputs])?, outputs, inputs))
    }

    /// The same with a bias read from `name`, `[outputs]`.
    ///
    /// # Errors
    /// As [`TensorSource::load_f32`].
    pub fn with_bias(mut self, source: &dyn TensorSource, name: &str) -> Result<Self, CheckpointError> {
        self.bias = Some(source.load_f32(name, &[self.outputs])?);
        Ok(self)
    }

    /// Width of a row of `y`.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Width of a row of `x`.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// `[outputs, inputs]`, row major.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// One row of the weights, `[inputs]`.
    pub fn row(&self, output: usize) -> &[f32] {
        &self.weights[output * self.inputs..][..self.inputs]
    }

    /// `x` is `[rows, inputs]`; returns `[rows, outputs]`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.inputs;
        let mut y = vec![0.0; rows * self.outputs];
        self.apply_to(x, &mut y);
        y
    }

    /// [`apply`](Self::apply) into `y` `[rows, outputs]`, which is overwritten.
    pub fn apply_to(&self, x: &[f32], y: &mut [f32]) {
        let rows = x.len() / self.inputs;
        assert_eq!(x.len(), rows * self.inputs, "x is [rows, {}]", self.inputs);
        assert_eq!(y.len(), rows * self.outputs, "y is [rows, {}]", self.outputs);
        if rows == 0 {
            return;
        }
        let y = Tile::new(y, self.outputs);
        let jobs: Vec<_> = (0..rows)
            .step_by(CHUNK_ROWS)
            .flat_map(|row| {
                (0..self.outputs)
                    .step_by(CHUNK_OUTPUTS)
                    .map(move |output| (row, output))
            })
            .collect();
        let chunk = |&(row, output): &(usize, usize)| {
            let rows = CHUNK_ROWS.min(rows - row);
            let outputs = CHUNK_OUTPUTS.min(self.outputs - output);
            // SAFETY: chunks do not overlap, and `y` is [rows, outputs] by the assertion above.
            let mut tile = unsafe { y.part(row, output, rows, outputs) };
            let weights = &self.weights[output * self.inputs..][..outputs * self.inputs];
            product(
                &x[row * self.inputs..][..rows * self.inputs],
                weights,
                self.inputs,
                &mut tile,
            );
            if let Some(bias) = &self.bias {
                let bias = &bias[output..][..outputs];
                for r in 0..rows {
                    tile.row(r).iter_mut().zip(bias).for_each(|(y, b)| *y += b);
                }
            }
        };
        if jobs.len() > 1 && rows * self.outputs * self.inputs >= PARALLEL_FROM {
            jobs.par_iter().for_each(chunk);
        } else {
            jobs.iter().for_each(chunk);
        }
    }
}

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
    unsafe fn part(&self, row: usize, column: usize, rows: usize, columns: usize) -> Tile<'a> {
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

    fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "inside");
        // SAFETY: the row lies inside the rectangle, which is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.columns) }
    }
}

/// `y[r, o] = Σ x[r, i] · w[o, i]` on this thread; `x` is `[y.rows, inputs]`, `w` is `[y.columns, inputs]`.
pub(crate) fn product(x: &[f32], w: &[f32], inputs: usize, y: &mut Tile<'_>) {
    assert_eq!(x.len(), y.rows * inputs, "x is [rows, inputs]");
    assert_eq!(w.len(), y.columns * inputs, "w is [outputs, inputs]");
    multiply(x, [inputs, 1], w, [1, inputs], inputs, y);
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

/// The plain reference of [`Linear::apply`], in f64.
pub fn apply_reference(weights: &[f32], bias: Option<&[f32]>, inputs: usize, x: &[f32]) -> Vec<f64> {
    let mut y = Vec::new();
    for row in x.chunks_exact(inputs) {
        for (output, weights) in weights.chunks_exact(inputs).enumerate() {
            let dot: f64 = row
                .iter()
                .zip(weights)
                .map(|(x, w)| f64::from(*x) * f64::from(*w))
                .sum();
            y.push(dot + bias.map_or(0.0, |b| f64::from(b[output])));
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use cotk_run::seeds::Seeds;
    use proptest::prelude::*;
    use rand::RngExt;

    use super::*;

    fn draw(count: usize, purpose: &str) -> Vec<f32> {
        let mut stream = Seeds::new(3).stream(purpose);
        (0..count).map(|_| stream.random_range(-1.0..1.0f32)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Law: every shape, odd ones and chunk borders too, equals the reference within γₙ Σ|xw|.
        #[test]
        fn product_equals_reference(rows in 0usize..20, outputs in 1usize..40, inputs in 1usize..70, edge in 0usize..3) {
            let rows = [rows, rows + CHUNK_ROWS - 5, rows][edge];
            let outputs = [outputs, outputs, outputs + CHUNK_OUTPUTS - 5][edge];
            let (x, w, b) = (draw(rows * inputs, "x"), draw(outputs * inputs, "w"), draw(outputs, "b"));
            let mut linear = Linear::new(w.clone(), outputs, inputs);
            linear.bias = Some(b.clone());
            let y = linear.apply(&x);
            let truth = apply_reference(&w, Some(&b), inputs, &x);
            prop_assert_eq!(y.len(), truth.len());
            let bound = 1.2e-7 * (inputs as f64 + 2.0) * (inputs as f64 + 1.0);
            for (y, truth) in y.iter().zip(&truth) {
                prop_assert!((f64::from(*y) - truth).abs() <= bound, "{} {}", y, truth);
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let linear = Linear::new(draw(700 * 96, "w"), 700, 96);
        let x = draw(600 * 96, "x");
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| linear.apply(&x))
        };
        assert_eq!(run(1), run(3));
    }
}
