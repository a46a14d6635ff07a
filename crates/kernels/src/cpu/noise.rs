//! Experts whose weights are noise, laid out and aligned as in a record: for timing shapes without a checkpoint. Nothing
//! is timed here. Widths come from the table of codes and forms, so that a new one is measured without being listed again.

use std::ops::Range;

use cotk_quant::QuantError;
use cotk_quant::code::{Bits, Code};
use cotk_quant::coded::{CodedMatrix, CodedView};
use cotk_quant::encode::encode;
use cotk_quant::layout::{MAX_PLANES, MatrixFormat, Placement};
use cotk_quant::noise;

use super::expert::Expert;
use super::half_matrix::{HalfKind, HalfMatrix, half_bytes};
use super::weights::{Matrix, Weights};
use crate::KernelError;

/// What lies in memory at some width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Code(Code, Bits),
    Half(HalfKind),
}

/// A width that weights are read at, by what it costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Width {
    form: Form,
    planes: u32,
}

impl Width {
    /// Every width that kernels read, each once: prefixes of codes, nested ones first, then 16 bits.
    pub fn all() -> Vec<Self> {
        let mut found: Vec<Self> = Vec::new();
        for code in Code::ALL.into_iter().rev() {
            for (bits, planes) in code.prefixes().iter().zip(1..) {
                let form = Form::Code(code, *bits);
                if !found.iter().any(|w| (w.bits(), w.planes) == (bits.get(), planes)) {
                    found.push(Self { form, planes });
                }
            }
        }
        // f16 and bf16 cost the same; checkpoints come in the second.
        found.push(Self {
            form: Form::Half(HalfKind::Bf16),
            planes: 1,
        });
        found
    }

    /// That of a plain code, which is no prefix of another.
    pub fn plain(bits: u32) -> Option<Self> {
        let bits = Bits::try_from(bits).ok()?;
        Some(Self {
            form: Form::Code(Code::Plain(bits), bits),
            planes: 1,
        })
    }

    /// The one that reads `planes` planes of a prefix of `bits` bits.
    pub fn find(bits: u32, planes: u32) -> Option<Self> {
        Self::all().into_iter().find(|w| (w.bits(), w.planes) == (bits, planes))
    }

    /// Bits per weight, scales apart.
    pub fn bits(self) -> u32 {
        match self.form {
            Form::Code(_, bits) => bits.get(),
            Form::Half(_) => 16,
        }
    }

    /// Planes that are touched.
    pub fn planes(self) -> u32 {
        self.planes
    }
}

/// Shape of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoiseShape {
    pub hidden: usize,
    pub inner: usize,
    pub width: Width,
    /// Weights per scale, of codes.
    pub group: usize,
    /// 0: whole matrices.
    pub rank: usize,
}

/// Fills `values` with noise of the same deviation as an expert's weights.
pub fn floats(values: &mut [f32], seed: u64) {
    let mut bytes = [0u8; 4096];
    let size = WEIGHT_STD * 3f32.sqrt();
    for (chunk, block) in values.chunks_mut(bytes.len() / 4).zip(0u64..) {
        noise::fill(&mut bytes, seed.wrapping_mul(1_000_003).wrapping_add(block));
        for (value, word) in chunk.iter_mut().zip(bytes.as_chunks::<4>().0) {
            // 23 bits as a float in 1..2: uniform.
            let unit = f32::from_bits(u32::from_le_bytes(*word) >> 9 | 0x3f80_0000) - 1.5;
            *value = 2.0 * size * unit;
        }
    }
}

/// A coded matrix of noise of the same deviation.
pub fn matrix(format: MatrixFormat, seed: u64) -> CodedMatrix {
    noise::matrix(format, scale_of(format.code()), seed)
}

/// The seed of the matrix number `number` (gate, up, down) of a [`NoiseExpert`].
pub fn matrix_seed(expert: u64, number: u64) -> u64 {
    expert.wrapping_mul(7) + number
}

/// The zero points that come with it: nothing was fitted.
pub fn zero_points(format: MatrixFormat) -> Vec<f32> {
    let code = format.code();
    code.prefixes()
        .iter()
        .map(|bits| code.default_zero_point(*bits))
        .collect()
}

/// Uniform codes of b bits have a standard deviation of 2^b / √12.
#[expect(clippy::cast_precision_loss, reason = "at most 256")]
fn scale_of(code: Code) -> f32 {
    WEIGHT_STD * 12f32.sqrt() / (1u32 << code.full().get()) as f32
}

/// Where planes begin: as in a record, no line of 64 bytes straddles two of the cache.
const ALIGN: usize = 64;

/// Weights with a standard deviation near this keep a random network's activations tame.
const WEIGHT_STD: f32 = 0.02;

/// One expert in memory of its own.
#[derive(Debug)]
pub struct NoiseExpert {
    bytes: Vec<u8>,
    /// Whole: gate, up, down; else left and right factor of each.
    parts: Vec<Part>,
}

#[derive(Debug)]
enum Part {
    Coded {
        format: MatrixFormat,
        bits: Bits,
        placement: Placement,
        /// Of the planes that the prefix reads.
        planes: Vec<Range<usize>>,
        zero_points: Vec<f32>,
    },
    Half {
        rows: usize,
        cols: usize,
        kind: HalfKind,
        bytes: Range<usize>,
    },
}

impl NoiseExpert {
    /// Gate and up tile by tile in turn where they are whole codes, then down; else matrix after matrix.
    ///
    /// # Errors
    /// A size or group that no format has.
    pub fn new(shape: &NoiseShape, seed: u64) -> Result<Self, QuantError> {
        let NoiseShape {
            hidden: h,
            inner: i,
            rank: r,
            ..
        } = *shape;
        let shapes = if r == 0 {
            vec![(i, h), (i, h), (h, i)]
        } else {
            vec![(i, r), (r, h), (i, r), (r, h), (h, r), (r, i)]
        };
        let mut store = Store(Vec::new());
        let mut parts = Vec::with_capacity(shapes.len());
        match shape.width.form {
            Form::Half(kind) => {
                for ((rows, cols), seed) in shapes.into_iter().zip(seed..) {
                    // Rejects sizes before anything is allocated.
                    MatrixFormat::try_new(rows, cols, Code::Plain(Bits::B8), 32)?;
                    parts.push(Part::Half {
                        rows,
                        cols,
                        kind,
                        bytes: store.put(&half_noise(rows, cols, kind, seed)),
                    });
                }
            }
            Form::Code(code, bits) => {
                let matrix = |(rows, cols), seed| -> Result<CodedMatrix, QuantError> {
                    Ok(self::matrix(
                        MatrixFormat::try_new(rows, cols, code, shape.group)?,
                        seed,
                    ))
                };
                let made: Vec<CodedMatrix> = shapes
                    .into_iter()
                    .zip(0..)
                    .map(|(shape, number)| matrix(shape, matrix_seed(seed, number)))
                    .collect::<Result<_, _>>()?;
                return Self::laid(&made, bits, r == 0);
            }
        }
        Ok(Self {
            bytes: aligned(&store.0),
            parts,
        })
    }

    /// An expert's own weights, coded: gate and up `[inner, hidden]`, down `[hidden, inner]`, in plain codes of `bits` bits
    /// with a scale for each `group` weights.
    ///
    /// # Errors
    /// Bits that no plain code has, a size or a group that no format has, weights that are not finite.
    pub fn coded(
        [gate, up, down]: [&[f32]; 3],
        hidden: usize,
        inner: usize,
        bits: u32,
        group: usize,
    ) -> Result<Self, KernelError> {
        let bits = Bits::try_from(bits)?;
        let code = Code::Plain(bits);
        let matrix = |weights: &[f32], rows, cols| encode(weights, MatrixFormat::try_new(rows, cols, code, group)?);
        let made = [
            matrix(gate, inner, hidden)?,
            matrix(up, inner, hidden)?,
            matrix(down, hidden, inner)?,
        ];
        Ok(Self::laid(&made, bits, true)?)
    }

    /// Lays matrices out, gate and up in turn where they are whole.
    fn laid(made: &[CodedMatrix], bits: Bits, is_whole: bool) -> Result<Self, QuantError> {
        let planes = made[0].format.code().prefix_index(bits)? + 1;
        let mut store = Store(Vec::new());
        let mut parts = Vec::with_capacity(made.len());
        let mut part = |matrix: &CodedMatrix, placement, planes| {
            parts.push(Part::Coded {
                format: matrix.format,
                bits,
                placement,
                planes,
                zero_points: matrix.zero_points.clone(),
            });
        };
        let mut alone = made;
        let mut paired = Vec::new();
        if let ([gate, up, down], true) = (made, is_whole) {
            paired = CodedMatrix::interleave(gate, up)?;
            paired.truncate(planes);
            alone = std::slice::from_ref(down);
        }
        // Plane by plane, as sections follow each other.
        let mut ranges = vec![Vec::new(); alone.len() + 1];
        for plane in 0..planes {
            if let Some(pair) = paired.get(plane) {
                ranges[0].push(store.put(pair));
            }
            for (matrix, ranges) in alone.iter().zip(&mut ranges[1..]) {
                ranges.push(store.put(&matrix.planes[plane]));
            }
        }
        let mut ranges = ranges.into_iter();
        let pair = ranges.next().expect("one more than matrices");
        if !pair.is_empty() {
            part(&made[0], Placement::PairFirst, pair.clone());
            part(&made[1], Placement::PairSecond, pair);
        }
        for (matrix, ranges) in alone.iter().zip(ranges) {
            part(matrix, Placement::Alone, ranges);
        }
        Ok(Self {
            bytes: aligned(&store.0),
            parts,
        })
    }

    /// The same weights in memory of their own.
    pub fn again(&self) -> Self {
        let part = |part: &Part| match part {
            Part::Coded {
                format,
                bits,
                placement,
                planes,
                zero_points,
            } => Part::Coded {
                format: *format,
                bits: *bits,
                placement: *placement,
                planes: planes.clone(),
                zero_points: zero_points.clone(),
            },
            Part::Half {
                rows,
                cols,
                kind,
                bytes,
            } => Part::Half {
                rows: *rows,
                cols: *cols,
                kind: *kind,
                bytes: bytes.clone(),
            },
        };
        Self {
            bytes: aligned(&self.aligned_bytes()[..self.len()]),
            parts: self.parts.iter().map(part).collect(),
        }
    }

    /// Bytes that one pass over it reads, padding between planes included.
    pub fn len(&self) -> usize {
        self.bytes.len() - ALIGN
    }

    /// Never: a matrix has at least one weight.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn aligned_bytes(&self) -> &[u8] {
        &self.bytes[self.bytes.as_ptr().align_offset(ALIGN)..]
    }

    /// Matrix number `part`: gate, up, down; or left and right factor of each.
    pub fn weights(&self, part: usize) -> Weights<'_> {
        let bytes = self.aligned_bytes();
        match &self.parts[part] {
            Part::Half {
                rows,
                cols,
                kind,
                bytes: range,
            } => HalfMatrix::try_new(*rows, *cols, *kind, &bytes[range.clone()])
                .expect("laid out by `new`")
                .into(),
            Part::Coded {
                format,
                bits,
                placement,
                planes: ranges,
                zero_points,
            } => {
                let mut planes: [&[u8]; MAX_PLANES] = [&[]; MAX_PLANES];
                for (plane, range) in planes.iter_mut().zip(ranges) {
                    *plane = &bytes[range.clone()];
                }
                CodedView::try_new(*format, &planes[..ranges.len()], zero_points, *placement)
                    .and_then(|view| view.prefix(*bits))
                    .expect("laid out by `new`")
                    .into()
            }
        }
    }

    /// Ready to run.
    pub fn expert(&self) -> Expert<'_> {
        let matrix = |i: usize| match self.parts.len() {
            3 => Matrix::Whole(self.weights(i)),
            _ => Matrix::product(self.weights(2 * i), self.weights(2 * i + 1)).expect("one rank"),
        };
        Expert::try_new(matrix(0), matrix(1), matrix(2)).expect("built with shapes that fit")
    }
}

/// Bytes in the making.
struct Store(Vec<u8>);

impl Store {
    fn put(&mut self, plane: &[u8]) -> Range<usize> {
        let from = self.0.len();
        self.0.extend_from_slice(plane);
        self.0.resize(self.0.len().next_multiple_of(ALIGN), 0);
        from..from + plane.len()
    }
}

/// Both signs, any mantissa, one exponent: numbers near the deviation of all others.
fn half_noise(rows: usize, cols: usize, kind: HalfKind, seed: u64) -> Vec<u8> {
    let (free, exponent) = match kind {
        HalfKind::F16 => (0x83ff, (15 - 6) << 10),
        HalfKind::Bf16 => (0x807f, (127 - 6) << 7),
    };
    let mut bytes = vec![0; half_bytes(rows, cols)];
    noise::fill(&mut bytes, seed);
    for weight in bytes.as_chunks_mut::<2>().0 {
        *weight = (u16::from_le_bytes(*weight) & free | exponent).to_le_bytes();
    }
    bytes
}

/// `content` from the first byte at a multiple of [`ALIGN`], in a buffer that is [`ALIGN`] bytes longer.
fn aligned(content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; content.len() + ALIGN];
    let start = bytes.as_ptr().align_offset(ALIGN);
    bytes[start..start + content.len()].copy_from_slice(content);
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::activations::Activations;
    use super::super::dispatch::Isa;
    use super::super::expert::{ExpertScratch, forward};
    use super::super::gemm::Threads;
    use super::*;

    #[test]
    fn every_width_makes_an_expert_that_runs_whole_and_in_factors() {
        let isa = Isa::selected().unwrap();
        let x: Vec<f32> = (0..3 * 70).map(|i| (i as f32).sin()).collect();
        let acts = Activations::of(isa, &x, 70);
        for code in Code::ALL {
            for (planes, bits) in (1..).zip(code.prefixes()) {
                assert!(Width::find(bits.get(), planes).is_some(), "{code} at {bits}");
            }
        }
        for width in Width::all() {
            for rank in [0, 20] {
                let shape = NoiseShape {
                    hidden: 70,
                    inner: 50,
                    width,
                    group: 32,
                    rank,
                };
                let one = NoiseExpert::new(&shape, 5).unwrap();
                let run = |expert: &NoiseExpert| {
                    let mut out = vec![f32::NAN; 3 * 70];
                    forward(
                        isa,
                        &expert.expert(),
                        &acts,
                        &mut out,
                        &mut ExpertScratch::default(),
                        Threads::One,
                    );
                    out
                };
                let out = run(&one);
                assert!(
                    out.iter().all(|y| y.is_finite() && y.abs() < 10.0),
                    "{width:?} {rank}: {out:?}"
                );
                assert_eq!(out, run(&one.again()));
                assert_ne!(out, run(&NoiseExpert::new(&shape, 6).unwrap()));
            }
        }
        assert!(Width::find(5, 1).is_none() && Width::plain(5).is_none());
        assert!(
            Width::all()
                .iter()
                .all(|w| w.planes() > 1 || w.bits() == 16 || Width::plain(w.bits()).is_some())
        );
    }

    #[test]
    fn a_coded_expert_computes_with_its_own_weights() {
        let isa = Isa::selected().unwrap();
        let matrix = |seed| {
            let mut weights = vec![0.0; 64 * 96];
            floats(&mut weights, seed);
            weights
        };
        let (gate, up, down) = (matrix(1), matrix(2), matrix(3));
        let x: Vec<f32> = (0..96).map(|i| (i as f32).sin()).collect();
        let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
        let middle: Vec<f32> = (gate.chunks(96).zip(up.chunks(96)))
            .map(|(g, u)| dot(g, &x) / (1.0 + (-dot(g, &x)).exp()) * dot(u, &x))
            .collect();
        let truth: Vec<f32> = down.chunks(64).map(|d| dot(d, &middle)).collect();
        let norm = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>().sqrt();
        for (bits, bound) in [(8, 0.03), (4, 0.3)] {
            let expert = NoiseExpert::coded([&gate, &up, &down], 96, 64, bits, 32).unwrap();
            let acts = Activations::of(isa, &x, 96);
            let mut out = vec![f32::NAN; 96];
            forward(
                isa,
                &expert.expert(),
                &acts,
                &mut out,
                &mut ExpertScratch::default(),
                Threads::One,
            );
            let wrong: Vec<f32> = out.iter().zip(&truth).map(|(a, b)| a - b).collect();
            assert!(
                norm(&wrong) < bound * norm(&truth),
                "{bits} bits: {} of {}",
                norm(&wrong),
                norm(&truth)
            );
        }
        assert!(NoiseExpert::coded([&gate, &up, &down], 96, 64, 5, 32).is_err());
    }

    #[test]
    fn floats_have_the_deviation_that_is_promised() {
        let mut values = vec![0.0; 50_000];
        floats(&mut values, 3);
        let mean: f32 = values.iter().sum::<f32>() / 5e4;
        let variance: f32 = values.iter().map(|v| v * v).sum::<f32>() / 5e4;
        assert!(
            mean.abs() < 1e-3 && (variance.sqrt() / WEIGHT_STD - 1.0).abs() < 0.02,
            "{mean} {variance}"
        );
    }
}
