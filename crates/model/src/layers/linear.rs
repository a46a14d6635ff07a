//! Matrices and their products with rows of activations. Weights are held as they are stored: f32, 16 bit, or the codes of
//! a container's plane; codes meet activations in 8 bit, the others f32. Law: chunks have fixed sizes, so the bits do not
//! depend on the number of threads; up to [`FEW_ROWS`] rows, a row's result does not depend on its neighbours.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use cotk_container::dense::{decode, decode_row};
use cotk_container::finite::bad_scale_of;
use cotk_container::manifest::Matrix;
use cotk_kernels::cpu::activations::Activations;
use cotk_kernels::cpu::dispatch::Isa;
use cotk_kernels::cpu::gemm::{self, Product, Threads};
use cotk_kernels::cpu::rows::{self, RowKind, Rows};
use cotk_kernels::cpu::team;
use cotk_kernels::cpu::weights::Weights;
use rayon::prelude::*;

use super::product::{Tile, product};
use crate::checkpoint::{CheckpointError, DType, SharedBytes, TensorSource, not_codes};

/// Rows and outputs of one chunk of a product of many rows.
const CHUNK_ROWS: usize = 256;
const CHUNK_OUTPUTS: usize = 128;
/// Rows that are multiplied one by one with weights as they are stored.
pub const FEW_ROWS: usize = 8;
/// Bytes of weights, read once per [`FEW_ROWS`] rows, below which a thread costs more than it brings (about 5 µs of one).
/// Decides who works, not what comes out.
const PARALLEL_FROM: u64 = 1 << 18;
/// Rows of f32 that lie a multiple of so many bytes apart fall into few sets of a cache and throw each other out while they
/// are packed; a line more between them ends that.
const ALIAS_BYTES: usize = 2048;
const PAD: usize = 16;

/// From one row of widened weights to the next.
const fn padded(inputs: usize) -> usize {
    if (4 * inputs).is_multiple_of(ALIAS_BYTES) {
        inputs + PAD
    } else {
        inputs
    }
}

/// How a matrix is held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DenseForm {
    F32,
    /// f16 or bf16, as stored.
    Half,
    /// Codes with an f16 scale per `group` weights.
    Coded {
        bits: u32,
        group: usize,
    },
}

impl DenseForm {
    /// How [`Linear::load`] holds a tensor of this source; f32 for one that is not there.
    pub fn of(source: &dyn TensorSource, name: &str) -> Self {
        if let Some(matrix) = source.codes(name) {
            return Self::of_codes(matrix);
        }
        match source.info(name).map(|info| info.dtype) {
            Some(DType::F16 | DType::BF16) => Self::Half,
            _ => Self::F32,
        }
    }

    fn of_codes(matrix: &Matrix) -> Self {
        Self::Coded {
            bits: matrix.format.code().full().get(),
            group: matrix.format.group(),
        }
    }

    /// Width of one weight, scales not counted.
    pub fn bits(self) -> u32 {
        match self {
            Self::F32 => 32,
            Self::Half => 16,
            Self::Coded { bits, .. } => bits,
        }
    }

    /// Weights per scale; 0 where there are none.
    pub fn group(self) -> usize {
        match self {
            Self::F32 | Self::Half => 0,
            Self::Coded { group, .. } => group,
        }
    }
}

/// `y = x · Wᵀ + b`, weights `[outputs, inputs]`.
#[derive(Debug, Clone)]
pub struct Linear {
    outputs: usize,
    inputs: usize,
    held: Held,
    bias: Option<Vec<f32>>,
}

#[derive(Debug, Clone)]
enum Held {
    F32(Vec<f32>),
    /// Row major, little endian.
    Half(RowKind, SharedBytes),
    Coded(Matrix, SharedBytes),
}

/// The path that this process runs on; a forced one that this CPU lacks is for those to refuse who open models.
pub(crate) fn isa() -> Isa {
    Isa::selected().unwrap_or_else(|_| Isa::present()[0])
}

thread_local! {
    static CODES: RefCell<Activations> = RefCell::default();
    /// Weights of a chunk, widened, in rows of [`padded`] length.
    static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
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
            held: Held::F32(weights),
            bias: None,
        }
    }

    /// From 16-bit weights `[outputs, inputs]`, row major, little endian; `is_bf16` or else f16.
    ///
    /// # Panics
    /// When their number is another.
    pub fn half(is_bf16: bool, bytes: impl Into<SharedBytes>, outputs: usize, inputs: usize) -> Self {
        let bytes = bytes.into();
        assert_eq!(bytes.len(), 2 * outputs * inputs, "weights are [{outputs}, {inputs}]");
        let kind = if is_bf16 { RowKind::Bf16 } else { RowKind::F16 };
        Self {
            outputs,
            inputs,
            held: Held::Half(kind, bytes),
            bias: None,
        }
    }

    /// From a plain code and its plane.
    ///
    /// # Errors
    /// A plane that does not fit.
    pub fn coded(matrix: Matrix, plane: impl Into<SharedBytes>) -> Result<Self, cotk_container::QuantError> {
        let plane = plane.into();
        matrix.plain(&plane)?;
        Ok(Self {
            outputs: matrix.format.rows(),
            inputs: matrix.format.cols(),
            held: Held::Coded(matrix, plane),
            bias: None,
        })
    }

    /// Reads `name` as `[outputs, inputs]`, held as [`DenseForm::of`] says.
    ///
    /// # Errors
    /// As [`TensorSource::load_f32`].
    pub fn load(source: &dyn TensorSource, name: &str, [outputs, inputs]: [usize; 2]) -> Result<Self, CheckpointError> {
        if let Some(matrix) = source.codes(name) {
            source.require(name, &[outputs, inputs])?;
            let plane = source.shared(name)?;
            let held = Self::coded(matrix.clone(), plane).map_err(|e| not_codes(source.file(name), name, &e))?;
            return match held.scale_not_finite() {
                None => Ok(held),
                Some((index, found)) => Err(CheckpointError::NotFinite {
                    file: source.file(name).to_owned(),
                    tensor: name.to_owned(),
                    index,
                    found,
                }),
            };
        }
        let is_bf16 = match source.info(name).map(|info| info.dtype) {
            Some(DType::BF16) => true,
            Some(DType::F16) => false,
            _ => {
                let weights = source.load_f32(name, &[outputs, inputs])?;
                return Ok(Self::new(weights, outputs, inputs));
            }
        };
        source.require(name, &[outputs, inputs])?;
        let bytes = source.shared(name)?;
        match not_finite(&bytes, is_bf16) {
            None => Ok(Self::half(is_bf16, bytes, outputs, inputs)),
            Some((index, found)) => Err(CheckpointError::NotFinite {
                file: source.file(name).to_owned(),
                tensor: name.to_owned(),
                index,
                found,
            }),
        }
    }

    /// The first weight of a group whose scale is NaN or infinite, and that scale: codes themselves cannot be. Reads one
    /// value in 32.
    fn scale_not_finite(&self) -> Option<(usize, f32)> {
        let Held::Coded(matrix, plane) = &self.held else {
            return None;
        };
        let plain = matrix.plain(plane).expect("checked when it was made");
        let format = plain.format();
        let bad = (0..format.row_blocks())
            .into_par_iter()
            .find_map_first(|block| bad_scale_of(&plain, block))?;
        // Which weights it belongs to matters only now.
        let scale = |group: usize| {
            (
                bad.row * format.cols() + group * format.group(),
                plain.scale_at(bad.row, group),
            )
        };
        let groups = if bad.row < format.rows() { format.groups() } else { 0 };
        let named = (0..groups).map(scale).find(|(_, scale)| !scale.is_finite());
        Some(named.unwrap_or((bad.row * format.cols(), bad.found)))
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

    /// How the weights are held.
    pub fn form(&self) -> DenseForm {
        match &self.held {
            Held::F32(_) => DenseForm::F32,
            Held::Half(..) => DenseForm::Half,
            Held::Coded(matrix, _) => DenseForm::of_codes(matrix),
        }
    }

    /// Bytes of the weights as held: what one token reads.
    pub fn bytes(&self) -> u64 {
        match &self.held {
            Held::F32(weights) => 4 * weights.len() as u64,
            Held::Half(_, bytes) | Held::Coded(_, bytes) => bytes.len() as u64,
        }
    }

    /// `[outputs, inputs]`, row major: what products are made with.
    pub fn weights(&self) -> Cow<'_, [f32]> {
        match &self.held {
            Held::F32(weights) => Cow::Borrowed(weights),
            Held::Half(kind, bytes) => {
                let mut weights = vec![0.0; self.outputs * self.inputs];
                rows::widen(isa(), *kind, bytes, &mut weights);
                Cow::Owned(weights)
            }
            Held::Coded(matrix, plane) => Cow::Owned(decode(matrix, plane).expect("checked when it was made")),
        }
    }

    /// One row of the weights, `[inputs]`.
    pub fn row(&self, output: usize) -> Cow<'_, [f32]> {
        match &self.held {
            Held::F32(weights) => Cow::Borrowed(&weights[output * self.inputs..][..self.inputs]),
            Held::Half(..) | Held::Coded(..) => {
                let mut row = vec![0.0; self.inputs];
                self.row_to(output, &mut row);
                Cow::Owned(row)
            }
        }
    }

    /// [`row`](Self::row) into `to`.
    ///
    /// # Panics
    /// No such row, another width.
    pub fn row_to(&self, output: usize, to: &mut [f32]) {
        match &self.held {
            Held::F32(weights) => to.copy_from_slice(&weights[output * self.inputs..][..self.inputs]),
            Held::Half(kind, bytes) => {
                let width = kind.bytes() * self.inputs;
                rows::widen(isa(), *kind, &bytes[output * width..][..width], to);
            }
            Held::Coded(matrix, plane) => {
                decode_row(matrix, plane, output, to).expect("checked when it was made");
            }
        }
    }

    /// Some rows as they are stored, for products that read part of a matrix; `None` where they are coded.
    pub(crate) fn stored(&self, range: Range<usize>) -> Option<Rows<'_>> {
        let stored = |kind: RowKind, bytes| {
            let width = kind.bytes() * self.inputs;
            let bytes: &[u8] = bytes;
            Rows::new(kind, &bytes[range.start * width..range.end * width], self.inputs)
        };
        match &self.held {
            Held::F32(weights) => Some(stored(RowKind::F32, bytes_of(weights))),
            Held::Half(kind, bytes) => Some(stored(*kind, bytes)),
            Held::Coded(..) => None,
        }
    }

    /// The codes as kernels read them; `None` where weights are held otherwise.
    pub(crate) fn codes(&self) -> Option<Weights<'_>> {
        match &self.held {
            Held::Coded(matrix, plane) => Some(matrix.plain(plane).expect("checked when it was made").into()),
            Held::F32(_) | Held::Half(..) => None,
        }
    }

    /// `x` is `[rows, inputs]`; returns `[rows, outputs]`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.inputs;
        let mut y = vec![0.0; rows * self.outputs];
        self.apply_to(x, &mut y);
        y
    }

    /// [`apply`](Self::apply) into `y` `[rows, outputs]`, which is overwritten. Nothing is allocated for up to
    /// [`FEW_ROWS`] rows once a thread has seen the like.
    ///
    /// # Panics
    /// Lengths that are not whole rows.
    pub fn apply_to(&self, x: &[f32], y: &mut [f32]) {
        apply_all(x, [(self, y)]);
    }

    /// The product on its own.
    fn multiply(&self, x: &[f32], y: &mut [f32]) {
        let rows = x.len() / self.inputs;
        let is_small = self.bytes() * rows.div_ceil(FEW_ROWS) as u64 <= PARALLEL_FROM;
        let threads = if is_small { Threads::One } else { Threads::Pool };
        match &self.held {
            Held::Coded(..) => return apply_all(x, [(self, y)]),
            Held::F32(_) | Held::Half(..) if rows <= FEW_ROWS => {
                let weights = self.stored(0..self.outputs).expect("not coded");
                rows::dot(isa(), weights, x, y, threads);
            }
            Held::F32(_) | Held::Half(..) => self.multiply_many(x, rows, y, is_small),
        }
        if let Some(bias) = &self.bias {
            for y in y.chunks_exact_mut(self.outputs) {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
    }

    fn multiply_many(&self, x: &[f32], rows: usize, y: &mut [f32], is_small: bool) {
        let y = Tile::new(y, self.outputs);
        let chunk = |chunk: usize| {
            let output = chunk * CHUNK_OUTPUTS;
            let outputs = CHUNK_OUTPUTS.min(self.outputs - output);
            self.with_wide(output..output + outputs, |weights, stride| {
                for row in (0..rows).step_by(CHUNK_ROWS) {
                    let rows = CHUNK_ROWS.min(rows - row);
                    // SAFETY: chunks do not overlap, and `y` is [rows, outputs] (`apply_all`).
                    let mut tile = unsafe { y.part(row, output, rows, outputs) };
                    let x = &x[row * self.inputs..][..rows * self.inputs];
                    product(x, weights, self.inputs, stride, &mut tile);
                }
            });
        };
        let chunks = self.outputs.div_ceil(CHUNK_OUTPUTS);
        if is_small {
            (0..chunks).for_each(chunk);
        } else {
            team::run(chunks, chunk);
        }
    }

    /// Rows of the weights in f32 and the distance from each to the next, in memory of this thread where they are stored
    /// otherwise or would alias.
    pub(crate) fn with_wide<R>(&self, range: Range<usize>, f: impl FnOnce(&[f32], usize) -> R) -> R {
        let stride = padded(self.inputs);
        if let Held::F32(weights) = &self.held
            && stride == self.inputs
        {
            return f(&weights[range.start * self.inputs..range.end * self.inputs], stride);
        }
        with_scratch(&WIDE, |wide| {
            wide.resize(range.len() * stride, 0.0);
            for (row, wide) in range.zip(wide.chunks_exact_mut(stride)) {
                self.row_to(row, &mut wide[..self.inputs]);
            }
            f(wide, stride)
        })
    }
}

/// Several matrices times the same `x` `[rows, inputs]`, each into its own `[rows, outputs]`: queries, keys and values of a
/// layer, gate and up of an MLP. `x` becomes codes once.
///
/// # Panics
/// Widths and lengths that do not fit.
pub fn apply_all<const N: usize>(x: &[f32], mut products: [(&Linear, &mut [f32]); N]) {
    let inputs = products.first().map_or(1, |(linear, _)| linear.inputs);
    let rows = x.len() / inputs;
    assert_eq!(x.len(), rows * inputs, "x is [rows, {inputs}]");
    for (linear, y) in &products {
        assert_eq!(linear.inputs, inputs, "products of the same x");
        assert_eq!(y.len(), rows * linear.outputs, "y is [rows, {}]", linear.outputs);
    }
    if rows == 0 {
        return;
    }
    if products.iter().all(|(linear, _)| linear.codes().is_some()) {
        with_scratch(&CODES, |acts| {
            acts.quantize_on(isa(), x, inputs, Threads::Pool);
            let mut products = products.map(|(linear, out)| Product {
                weights: linear.codes().expect("looked at above"),
                bias: linear.bias.as_deref(),
                out,
            });
            gemm::products(isa(), acts, &mut products, Threads::Pool);
        });
    } else {
        for (linear, y) in &mut products {
            linear.multiply(x, y);
        }
    }
}

/// What a thread keeps between calls, where it lies: to move a dozen lists out and in again costs as much as a small job. A
/// call inside a call gets its own.
pub(crate) fn with_scratch<T: Default, R>(
    key: &'static std::thread::LocalKey<RefCell<T>>,
    f: impl FnOnce(&mut T) -> R,
) -> R {
    key.with(|kept| match kept.try_borrow_mut() {
        Ok(mut scratch) => f(&mut scratch),
        Err(_) => f(&mut T::default()),
    })
}

fn bytes_of(weights: &[f32]) -> &[u8] {
    // SAFETY: floats are plain bytes, four each.
    unsafe { std::slice::from_raw_parts(weights.as_ptr().cast(), size_of_val(weights)) }
}

/// Index and value of the first 16-bit weight that is NaN or infinite.
fn not_finite(bytes: &[u8], is_bf16: bool) -> Option<(usize, f32)> {
    /// Looked through without branches, then again where something was found.
    const PIECE: usize = 4096;
    let exponent: u16 = if is_bf16 { 0x7f80 } else { 0x7c00 };
    let is_bad = |b: &[u8; 2]| u16::from_le_bytes(*b) & exponent == exponent;
    let pieces = bytes.as_chunks::<2>().0.chunks(PIECE).enumerate();
    for (piece, values) in pieces {
        if values.iter().fold(false, |any, b| any | is_bad(b)) {
            let at = values.iter().position(is_bad)?;
            let bits = u16::from_le_bytes(values[at]);
            let found = if is_bf16 {
                half::bf16::from_bits(bits).to_f32()
            } else {
                half::f16::from_bits(bits).to_f32()
            };
            return Some((piece * PIECE + at, found));
        }
    }
    None
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
    use cotk_container::dense::code_matrix;
    use cotk_kernels::cpu::team::Team;
    use cotk_run::seeds::Seeds;
    use half::{bf16, f16};
    use proptest::prelude::*;
    use rand::RngExt;

    use super::*;

    fn draw(count: usize, purpose: &str) -> Vec<f32> {
        let mut stream = Seeds::new(3).stream(purpose);
        (0..count).map(|_| stream.random_range(-1.0..1.0f32)).collect()
    }

    /// The same weights in each form.
    fn forms(w: &[f32], outputs: usize, inputs: usize) -> Vec<Linear> {
        let narrow = |is_bf16: bool| -> Vec<u8> {
            let bytes = |w: &f32| {
                if is_bf16 {
                    bf16::from_f32(*w).to_le_bytes()
                } else {
                    f16::from_f32(*w).to_le_bytes()
                }
            };
            w.iter().flat_map(bytes).collect()
        };
        let coded = |bits| {
            let (matrix, plane) = code_matrix(w, outputs, inputs, bits).unwrap();
            Linear::coded(matrix, plane).unwrap()
        };
        vec![
            Linear::new(w.to_vec(), outputs, inputs),
            Linear::half(true, narrow(true), outputs, inputs),
            Linear::half(false, narrow(false), outputs, inputs),
            coded(8),
            coded(4),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Law: every form and shape, odd ones and chunk borders too, equals the reference of its own weights: within
        /// γₙ Σ|xw|, and codes within what rounding activations to 8 bit may cost.
        #[test]
        fn product_equals_reference(rows in 0usize..20, outputs in 1usize..40, inputs in 1usize..70, edge in 0usize..3) {
            let rows = [rows, rows + CHUNK_ROWS - 5, rows][edge];
            let outputs = [outputs, outputs, outputs + CHUNK_OUTPUTS - 5][edge];
            let (x, w, b) = (draw(rows * inputs, "x"), draw(outputs * inputs, "w"), draw(outputs, "b"));
            for mut linear in forms(&w, outputs, inputs) {
                linear.bias = Some(b.clone());
                let y = linear.apply(&x);
                let weights = linear.weights();
                let truth = apply_reference(&weights, Some(&b), inputs, &x);
                prop_assert_eq!(y.len(), truth.len());
                let exact = 1.2e-7 * (inputs as f64 + 2.0) * (inputs as f64 + 1.0);
                let bound = match linear.form() {
                    DenseForm::Coded { .. } => exact + inputs as f64 / 254.0,
                    DenseForm::F32 | DenseForm::Half => exact,
                };
                for (y, truth) in y.iter().zip(&truth) {
                    prop_assert!((f64::from(*y) - truth).abs() <= bound, "{:?} {} {}", linear.form(), y, truth);
                }
                for row in [0, outputs - 1] {
                    prop_assert_eq!(&*linear.row(row), &weights[row * inputs..][..inputs]);
                }
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let w = draw(700 * 96, "w");
        for linear in forms(&w, 700, 96) {
            for rows in [1, 5, 600] {
                let x = draw(rows * 96, "x");
                let run = |threads| Team::new(threads).install(|| linear.apply(&x));
                assert_eq!(run(1), run(3), "{:?}", linear.form());
            }
        }
    }

    #[test]
    fn a_few_rows_equal_each_row_alone() {
        let w = draw(130 * 96, "w");
        for linear in forms(&w, 130, 96) {
            let x = draw(FEW_ROWS * 96, "x");
            let whole = linear.apply(&x);
            for (x, y) in x.chunks(96).zip(whole.chunks(130)) {
                assert_eq!(linear.apply(x), y, "{:?}", linear.form());
            }
        }
    }

    #[test]
    fn a_scale_that_is_not_finite_is_found() {
        let weights: Vec<f32> = (0..40 * 100).map(|i| (i as f32 * 0.3).sin()).collect();
        let (matrix, mut plane) = cotk_container::dense::code_matrix(&weights, 40, 100, 8).unwrap();
        assert_eq!(
            Linear::coded(matrix.clone(), plane.clone()).unwrap().scale_not_finite(),
            None
        );
        let at = matrix.format.locate_scale(33, 2);
        plane[at..at + 2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
        let found = Linear::coded(matrix, plane).unwrap().scale_not_finite();
        assert_eq!(found, Some((33 * 100 + 64, f32::INFINITY)));
    }

    #[test]
    fn what_is_not_finite_is_found_in_16_bit_too() {
        for (is_bf16, bad) in [
            (true, bf16::NAN.to_le_bytes()),
            (true, bf16::INFINITY.to_le_bytes()),
            (false, f16::NEG_INFINITY.to_le_bytes()),
            (false, f16::NAN.to_le_bytes()),
        ] {
            let mut bytes = vec![0u8; 2 * 9000];
            assert_eq!(not_finite(&bytes, is_bf16), None);
            for at in [0, 4095, 4096, 8999] {
                bytes[2 * at..2 * at + 2].copy_from_slice(&bad);
                assert_eq!(not_finite(&bytes, is_bf16).unwrap().0, at);
                bytes[2 * at..2 * at + 2].fill(0);
            }
        }
    }
}
