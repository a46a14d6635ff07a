//! Keys of what stands between and around convolutions: edges, windows, passes over activations, and low-rank triples. Their
//! features are in `cnn`.

use serde::{Deserialize, Serialize};

use super::{Block, ConvKey, Key};
use crate::graph::Numerics;

/// What an edge does to a tensor. f32 activations lie in NCHW or in channel blocks (NCHWc), int8 ones in NHWC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EdgeKind {
    /// f32, NCHW to blocks.
    ReorderIn,
    /// f32, blocks to NCHW.
    ReorderOut,
    /// f32 to u8.
    Quantize,
    /// u8 to f32.
    Dequantize,
    /// u8, NCHW to NHWC or back.
    TransposeInt8,
    /// f32, any permutation.
    TransposeF32,
    /// A node that only renames dimensions: flatten, reshape. Nothing but a launch.
    View,
}

impl EdgeKind {
    /// All of them, in the order of files.
    pub const ALL: [Self; 7] = [
        Self::ReorderIn,
        Self::ReorderOut,
        Self::Quantize,
        Self::Dequantize,
        Self::TransposeInt8,
        Self::TransposeF32,
        Self::View,
    ];

    /// Its name in files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::ReorderIn => "reorder_in",
            Self::ReorderOut => "reorder_out",
            Self::Quantize => "quantize",
            Self::Dequantize => "dequantize",
            Self::TransposeInt8 => "transpose_int8",
            Self::TransposeF32 => "transpose_f32",
            Self::View => "view",
        }
    }
}

/// An edge on a tensor `[batch, channels, height, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EdgeKey {
    pub kind: EdgeKind,
    pub batch: u32,
    pub channels: u32,
    pub height: u32,
    pub width: u32,
    pub threads: u32,
}

/// Which value of a window is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolKind {
    Max,
    Mean,
}

/// Pooling of square windows; output is ceil(height / stride).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PoolKey {
    pub kind: PoolKind,
    pub batch: u32,
    pub channels: u32,
    pub kernel: u32,
    pub stride: u32,
    pub height: u32,
    pub width: u32,
    pub numerics: Numerics,
    pub threads: u32,
}

/// What a pass over activations computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ElementwiseKind {
    /// A cheap function of one tensor that did not fuse: ReLU, clip, batch norm, a constant factor.
    Unary,
    /// Exponentials: sigmoid, tanh, softmax, GELU.
    Transcendental,
    /// A sum or product of two tensors that did not fuse.
    Binary,
    /// Tensors behind each other; the shape is the output's.
    Concat,
}

impl ElementwiseKind {
    /// All of them, in the order of files.
    pub const ALL: [Self; 4] = [Self::Unary, Self::Transcendental, Self::Binary, Self::Concat];

    /// Its name in files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unary => "unary",
            Self::Transcendental => "transcendental",
            Self::Binary => "binary",
            Self::Concat => "concat",
        }
    }
}

/// A pass over activations with an output of `[batch, channels, height, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ElementwiseKey {
    pub kind: ElementwiseKind,
    pub batch: u32,
    pub channels: u32,
    pub height: u32,
    pub width: u32,
    pub numerics: Numerics,
    pub threads: u32,
}

/// A Tucker-2 triple in place of a dense convolution, without activations between its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LowRankKey {
    /// The dense convolution that it stands for.
    pub conv: ConvKey,
    pub rank_in: u32,
    pub rank_out: u32,
}

impl LowRankKey {
    /// 1x1 to `rank_in`, the kernel (with the stride) to `rank_out`, 1x1 to the outputs.
    pub fn parts(&self) -> [ConvKey; 3] {
        let c = self.conv;
        let (height, width) = (c.height.div_ceil(c.stride), c.width.div_ceil(c.stride));
        let pointwise = ConvKey {
            kernel: 1,
            stride: 1,
            groups: 1,
            ..c
        };
        [
            ConvKey {
                cout: self.rank_in,
                ..pointwise
            },
            ConvKey {
                cin: self.rank_in,
                cout: self.rank_out,
                ..c
            },
            ConvKey {
                cin: self.rank_out,
                height,
                width,
                ..pointwise
            },
        ]
    }
}

impl LowRankKey {
    /// What a chain of such triples runs: the convolutions, and an edge wherever one writes another layout than the next
    /// reads (f32: see [`crate::walk`]; int8 keeps one layout).
    pub fn keys(&self, block: Block) -> Vec<Key> {
        let parts = self.parts();
        let mut keys = Vec::with_capacity(6);
        for (index, part) in parts.into_iter().enumerate() {
            keys.push(Key::Conv(part));
            let next = parts[(index + 1) % parts.len()];
            let reads_blocked = next.cin >= block.0 && next.cin.is_multiple_of(4);
            let writes_blocked = part.cin < block.0 || part.cin.is_multiple_of(4);
            let kind = match (writes_blocked, reads_blocked) {
                _ if part.numerics == Numerics::Int8 => continue,
                (true, false) => EdgeKind::ReorderOut,
                (false, true) => EdgeKind::ReorderIn,
                (true, true) | (false, false) => continue,
            };
            keys.push(Key::Edge(EdgeKey {
                kind,
                batch: part.batch,
                channels: part.cout,
                height: part.height.div_ceil(part.stride),
                width: part.width.div_ceil(part.stride),
                threads: part.threads,
            }));
        }
        keys
    }
}
