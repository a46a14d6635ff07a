//! What can be asked ([`Work`]), the complete key of each operator ([`Key`]) and its features ([`Key::features`]): a few
//! physical counts with units, on padded sizes, all of them monotone in size. No clock, no coefficients.

use serde::{Deserialize, Serialize};

use crate::moe::MoeStep;
use crate::graph::{Graph, Numerics};
use crate::walk::Network;

mod moe;
mod names;

pub use self::moe::{AttentionKey, DenseKey, ExpertKey, GlueKey};
pub(crate) use self::names::{heat_name, numerics_name, pool_name, tier_name};

/// Anything whose time on this machine can be asked for.
#[derive(Debug, Clone)]
pub enum Work<'a> {
    /// One call of one operator.
    Operator(Key),
    /// One inference of a CNN at the graph's batch size.
    Graph { graph: &'a Graph, threads: u32 },
    /// The same for any network that the walker knows.
    Network { network: &'a Network, threads: u32 },
    /// First to last byte of one read.
    Read(ReadKey),
    /// One step of a mixture-of-experts model under a placement: a decoding step of a batch, or a prefill.
    Step(&'a MoeStep),
}

/// One operator with everything that its time depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    /// The fixed cost of one call of a CNN session.
    Session {
        threads: u32,
    },
    Conv(ConvKey),
    Linear(LinearKey),
    /// Residual sum; in f32 it is part of the convolution before it, and this is what it adds.
    Add(PlaneKey),
    /// Mean over height and width.
    GlobalAvgPool(PlaneKey),
    /// Entering the layout that the first operator wants, as one figure: stands in for [`Key::Edge`] in profiles that did
    /// not measure edges apart.
    Entry(PlaneKey),
    /// A change of layout or of number format between two operators.
    Edge(EdgeKey),
    /// Largest or mean value of windows.
    Pool(PoolKey),
    /// A pass over activations: a function of each value, a sum of two tensors, a concatenation.
    Elementwise(ElementwiseKey),
    /// A low-rank convolution: 1x1 to `rank_in`, k x k to `rank_out`, 1x1, timed fused in a chain.
    LowRank(LowRankKey),
    /// Routed experts of a layer (gate, up, SwiGLU, down) in our kernels.
    Expert(ExpertKey),
    /// A dense f32 matrix of our engine.
    Dense(DenseKey),
    /// Attention of our engine, projections apart.
    Attention(AttentionKey),
    /// What is left of a decoder layer of our engine.
    Glue(GlueKey),
    Read(ReadKey),
}

/// Whether an operator is timed by itself or as part of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Context {
    /// A network of this operator alone, its edges and its session included: validates, is never summed.
    Alone,
    /// What one more copy adds to a network.
    Chain,
}

/// A convolution; a fused ReLU costs nothing and is not part of the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ConvKey {
    pub batch: u32,
    pub cin: u32,
    pub cout: u32,
    pub kernel: u32,
    pub stride: u32,
    pub groups: u32,
    /// Input height and width; output is ceil(height / stride).
    pub height: u32,
    pub width: u32,
    pub numerics: Numerics,
    pub threads: u32,
    pub context: Context,
}

/// A fully connected layer, `[batch, inputs] → [batch, outputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LinearKey {
    pub batch: u32,
    pub inputs: u32,
    pub outputs: u32,
    pub numerics: Numerics,
    pub threads: u32,
}

/// An operator whose cost is its activations, `[batch, channels, height, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PlaneKey {
    pub batch: u32,
    pub channels: u32,
    pub height: u32,
    pub width: u32,
    pub numerics: Numerics,
    pub threads: u32,
}

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

/// Whether weights come from cache (the same expert again) or from memory (another one each time).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Heat {
    Hot,
    Cold,
}

/// Where bytes are read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// A working set inside the second-level cache.
    L2,
    /// A working set inside the last-level cache.
    L3,
    /// A working set far beyond every cache.
    Memory,
    /// Direct reads, past the page cache.
    Disk,
    /// The same where direct reads are refused: through the page cache, so an upper bound of the disk.
    DiskBuffered,
}

/// One read of `bytes` bytes: by `threads` threads in memory, with `threads` requests in flight on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ReadKey {
    pub tier: Tier,
    pub bytes: u64,
    pub threads: u32,
}

/// The kernel path whose coefficients an operator uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path {
    pub family: Family,
    pub threads: u32,
}

/// A family of operators that one kernel (or one set of terms) runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    Session,
    /// A single convolution with session and edges, for validation.
    ConvAlone(Numerics),
    /// f32, blocked channels: `cin` at least one block and a multiple of 4.
    ConvBlocked,
    /// f32, straight from the unblocked input: few input channels.
    ConvFromNchw,
    /// f32, patches and a matrix product: channels that do not block.
    ConvPatches,
    DepthwiseBlocked,
    DepthwisePlain,
    /// Grouped, neither dense nor depthwise.
    ConvGrouped,
    ConvInt8,
    DepthwiseInt8,
    Linear(Numerics),
    Add(Numerics),
    Pool(Numerics),
    Entry(Numerics),
    Edge(EdgeKind),
    Window(PoolKind, Numerics),
    Elementwise(ElementwiseKind, Numerics),
    /// Never fitted: a triple that is not in the table is the sum of its parts.
    LowRank(Numerics),
    Expert {
        bits: u32,
        planes: u32,
        heat: Heat,
    },
    /// `many`: more than one row of activations.
    Dense {
        many: bool,
        heat: Heat,
    },
    Attention {
        heat: Heat,
    },
    Glue,
    Read(Tier),
}

/// One physical count of a call. Coefficients are µs per unit and never negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Term {
    /// 1: dispatch and set-up.
    Call,
    /// Millions of multiply-adds on padded channels, kernels above 1x1.
    MegaMacs,
    /// Millions of multiply-adds on padded channels, 1x1 kernels and matrix products.
    MegaMacsPointwise,
    /// Thousands of accumulator reloads: one per output value and block of input channels.
    KiloReloads,
    /// Thousands of row starts: output rows times padded output channels.
    KiloRows,
    /// KiB of activations read and written once.
    ActivationKib,
    /// KiB of weights (codes, scales, offsets) read once.
    WeightKib,
    /// KiB that only change their layout or number format.
    EdgeKib,
    /// KiB from a memory tier.
    ReadKib,
    /// KiB over a link or from a disk.
    LinkKib,
    /// Calls of inner kernels, one after another on the busiest thread.
    KernelCalls,
    /// Millions of weights unpacked, once per pass over them.
    MegaWeights,
    /// Thousands of group scales applied, once per pass.
    KiloGroups,
    /// Thousands of scores through a softmax.
    KiloScores,
}

/// What a term's time is spent on: the `terms` of a prediction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TermGroup {
    Launch,
    Layout,
    Memory,
    Compute,
    Link,
}

impl Term {
    /// All of them, in the order of files.
    pub const ALL: [Self; 14] = [
        Self::Call,
        Self::MegaMacs,
        Self::MegaMacsPointwise,
        Self::KiloReloads,
        Self::KiloRows,
        Self::ActivationKib,
        Self::WeightKib,
        Self::EdgeKib,
        Self::ReadKib,
        Self::LinkKib,
        Self::KernelCalls,
        Self::MegaWeights,
        Self::KiloGroups,
        Self::KiloScores,
    ];

    /// What its time is spent on.
    pub fn group(self) -> TermGroup {
        match self {
            Self::Call | Self::KernelCalls => TermGroup::Launch,
            Self::MegaMacs
            | Self::MegaMacsPointwise
            | Self::KiloReloads
            | Self::KiloRows
            | Self::MegaWeights
            | Self::KiloGroups
            | Self::KiloScores => TermGroup::Compute,
            Self::ActivationKib | Self::WeightKib | Self::ReadKib => TermGroup::Memory,
            Self::EdgeKib => TermGroup::Layout,
            Self::LinkKib => TermGroup::Link,
        }
    }

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Call => "call",
            Self::MegaMacs => "mega_macs",
            Self::MegaMacsPointwise => "mega_macs_pointwise",
            Self::KiloReloads => "kilo_reloads",
            Self::KiloRows => "kilo_rows",
            Self::ActivationKib => "activation_kib",
            Self::WeightKib => "weight_kib",
            Self::EdgeKib => "edge_kib",
            Self::ReadKib => "read_kib",
            Self::LinkKib => "link_kib",
            Self::KernelCalls => "kernel_calls",
            Self::MegaWeights => "mega_weights",
            Self::KiloGroups => "kilo_groups",
            Self::KiloScores => "kilo_scores",
        }
    }
}

/// The counts of one call, and whose coefficients they meet. At most eight terms: no allocation on the way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Features {
    pub path: Path,
    terms: [(Term, f64); 8],
    count: usize,
}

impl Features {
    fn new(family: Family, threads: u32, terms: &[(Term, f64)]) -> Self {
        let mut kept = [(Term::Call, 0.0); 8];
        kept[..terms.len()].copy_from_slice(terms);
        Self {
            path: Path { family, threads },
            terms: kept,
            count: terms.len(),
        }
    }

    /// Term and count, in a fixed order per path.
    pub fn terms(&self) -> &[(Term, f64)] {
        &self.terms[..self.count]
    }
}

/// The SIMD block of channels in ONNX Runtime's blocked layout: 16 floats with AVX-512, 8 with AVX2 or less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Block(pub u32);

impl Key {
    /// The path whose coefficients apply.
    pub fn path(&self, block: Block) -> Path {
        self.features(block).path
    }

    /// Short name of the operator: the first column of `timings.csv`.
    pub fn operator(&self) -> &'static str {
        match self {
            Self::Session { .. } => "session",
            Self::Conv(_) => "conv",
            Self::Linear(_) => "linear",
            Self::Add(_) => "add",
            Self::GlobalAvgPool(_) => "global_avg_pool",
            Self::Entry(_) => "entry",
            Self::Edge(_) => "edge",
            Self::Pool(_) => "pool",
            Self::Elementwise(_) => "elementwise",
            Self::LowRank(_) => "low_rank",
            Self::Expert(_) => "expert",
            Self::Dense(_) => "dense",
            Self::Attention(_) => "attention",
            Self::Glue(_) => "glue",
            Self::Read(_) => "read",
        }
    }

    /// The counts of one call, see `Term`.
    pub fn features(&self, block: Block) -> Features {
        match *self {
            Self::Session { threads } => Features::new(Family::Session, threads, &[(Term::Call, 1.0)]),
            Self::Conv(key) => conv_features(&key, block),
            Self::Linear(key) => {
                let (b, m, n) = (f64::from(key.batch), f64::from(key.inputs), f64::from(key.outputs));
                let element = element_bytes(key.numerics);
                Features::new(
                    Family::Linear(key.numerics),
                    key.threads,
                    &[
                        (Term::Call, 1.0),
                        (Term::MegaMacsPointwise, b * m * n / 1e6),
                        (Term::ActivationKib, element * b * (m + n) / 1024.0),
                        (Term::WeightKib, (element * m * n + 4.0 * n) / 1024.0),
                    ],
                )
            }
            // Two inputs, one output.
            Self::Add(key) => plane_features(Family::Add(key.numerics), &key, Term::ActivationKib, 3.0),
            Self::GlobalAvgPool(key) => plane_features(Family::Pool(key.numerics), &key, Term::ActivationKib, 1.0),
            // One read and one write of f32, or of f32 and u8.
            Self::Entry(key) => {
                let bytes_per_element = match key.numerics {
                    Numerics::F32 => 2.0,
                    Numerics::Int8 => 5.0,
                };
                plane_features(Family::Entry(key.numerics), &key, Term::EdgeKib, bytes_per_element)
            }
            Self::Edge(key) => edge_features(&key),
            Self::Pool(key) => pool_features(&key),
            Self::Elementwise(key) => elementwise_features(&key),
            Self::LowRank(key) => {
                let family = Family::LowRank(key.conv.numerics);
                Features::new(family, key.conv.threads, &[(Term::Call, 1.0)])
            }
            Self::Expert(key) => key.features(),
            Self::Dense(key) => key.features(),
            Self::Attention(key) => key.features(),
            Self::Glue(key) => key.features(),
            Self::Read(key) => {
                let term = match key.tier {
                    Tier::L2 | Tier::L3 | Tier::Memory => Term::ReadKib,
                    Tier::Disk | Tier::DiskBuffered => Term::LinkKib,
                };
                #[expect(clippy::cast_precision_loss, reason = "sizes of reads stay far below 2^52")]
                let kib = key.bytes as f64 / 1024.0;
                Features::new(Family::Read(key.tier), key.threads, &[(Term::Call, 1.0), (term, kib)])
            }
        }
    }
}

fn element_bytes(numerics: Numerics) -> f64 {
    match numerics {
        Numerics::F32 => 4.0,
        Numerics::Int8 => 1.0,
    }
}

fn plane_features(family: Family, key: &PlaneKey, term: Term, per_element: f64) -> Features {
    let elements = f64::from(key.batch) * f64::from(key.channels) * f64::from(key.height) * f64::from(key.width);
    let element = if term == Term::EdgeKib && key.numerics == Numerics::Int8 {
        1.0
    } else {
        element_bytes(key.numerics)
    };
    let kib = element * per_element * elements / 1024.0;
    Features::new(family, key.threads, &[(Term::Call, 1.0), (term, kib)])
}

fn kib(batch: u32, channels: u32, height: u32, width: u32, bytes_per_element: f64) -> f64 {
    let elements = f64::from(batch) * f64::from(channels) * f64::from(height) * f64::from(width);
    elements * bytes_per_element / 1024.0
}

fn edge_features(key: &EdgeKey) -> Features {
    // Read and written once, in their formats.
    let bytes = match key.kind {
        EdgeKind::ReorderIn | EdgeKind::ReorderOut | EdgeKind::TransposeF32 => 8.0,
        EdgeKind::Quantize | EdgeKind::Dequantize => 5.0,
        EdgeKind::TransposeInt8 => 2.0,
        EdgeKind::View => 0.0,
    };
    let moved = kib(key.batch, key.channels, key.height, key.width, bytes);
    let family = Family::Edge(key.kind);
    Features::new(family, key.threads, &[(Term::Call, 1.0), (Term::EdgeKib, moved)])
}

fn pool_features(key: &PoolKey) -> Features {
    let element = element_bytes(key.numerics);
    let (height, width) = (key.height.div_ceil(key.stride), key.width.div_ceil(key.stride));
    let taps = f64::from(key.kernel).powi(2);
    let read = kib(key.batch, key.channels, key.height, key.width, element);
    let written = kib(key.batch, key.channels, height, width, element);
    let looked_at = f64::from(key.batch) * f64::from(height) * f64::from(width) * f64::from(key.channels) * taps;
    Features::new(
        Family::Window(key.kind, key.numerics),
        key.threads,
        &[
            (Term::Call, 1.0),
            (Term::MegaMacs, looked_at / 1e6),
            (Term::ActivationKib, read + written),
        ],
    )
}

fn elementwise_features(key: &ElementwiseKey) -> Features {
    let tensors = match key.kind {
        ElementwiseKind::Unary | ElementwiseKind::Transcendental | ElementwiseKind::Concat => 2.0,
        ElementwiseKind::Binary => 3.0,
    };
    let bytes = tensors * element_bytes(key.numerics);
    let moved = kib(key.batch, key.channels, key.height, key.width, bytes);
    Features::new(
        Family::Elementwise(key.kind, key.numerics),
        key.threads,
        &[(Term::Call, 1.0), (Term::ActivationKib, moved)],
    )
}

/// Which kernel ONNX Runtime's CPU provider takes (reference 2.5; the rules of its `nchwc_transformer.cc`).
pub(crate) fn conv_family(key: &ConvKey, block: Block) -> Family {
    let depthwise = key.groups > 1 && key.groups == key.cin && key.groups == key.cout;
    match key.numerics {
        _ if key.context == Context::Alone => Family::ConvAlone(key.numerics),
        Numerics::Int8 if depthwise => Family::DepthwiseInt8,
        Numerics::Int8 if key.groups == 1 => Family::ConvInt8,
        Numerics::F32 if depthwise && key.cin.is_multiple_of(4) => Family::DepthwiseBlocked,
        Numerics::F32 if depthwise => Family::DepthwisePlain,
        Numerics::Int8 | Numerics::F32 if key.groups > 1 => Family::ConvGrouped,
        Numerics::Int8 | Numerics::F32 if key.cin < block.0 => Family::ConvFromNchw,
        Numerics::Int8 | Numerics::F32 if key.cin.is_multiple_of(4) => Family::ConvBlocked,
        Numerics::Int8 | Numerics::F32 => Family::ConvPatches,
    }
}

fn conv_features(key: &ConvKey, block: Block) -> Features {
    let family = conv_family(key, block);
    // int8 kernels work on groups of four channels, f32 ones on whole blocks.
    let pad_to = match family {
        Family::ConvBlocked | Family::DepthwiseBlocked | Family::ConvFromNchw | Family::ConvAlone(Numerics::F32) => {
            block.0
        }
        _ => 4,
    };
    let pad = |channels: u32| f64::from(channels.div_ceil(pad_to) * pad_to);
    let depthwise = key.groups > 1;
    let cin = match family {
        _ if depthwise => f64::from(key.cin / key.groups),
        Family::ConvFromNchw | Family::ConvPatches => f64::from(key.cin),
        _ => pad(key.cin),
    };
    let (height, width) = (key.height.div_ceil(key.stride), key.width.div_ceil(key.stride));
    let rows = f64::from(key.batch) * f64::from(height);
    let points = rows * f64::from(width);
    let taps = f64::from(key.kernel).powi(2);
    let element = element_bytes(key.numerics);
    let (inputs, outputs) = (f64::from(key.cin), f64::from(key.cout));
    let macs = points * taps * cin * pad(key.cout) / 1e6;
    let read = f64::from(key.batch) * f64::from(key.height) * f64::from(key.width) * inputs;
    let mut activations = element * (read + points * outputs);
    if family == Family::ConvPatches {
        activations += 2.0 * element * points * taps * inputs;
    }
    let weights = element * taps * inputs / f64::from(key.groups) * outputs + 4.0 * outputs;
    Features::new(
        family,
        key.threads,
        &[
            (Term::Call, 1.0),
            (
                if key.kernel > 1 {
                    Term::MegaMacs
                } else {
                    Term::MegaMacsPointwise
                },
                macs,
            ),
            (
                Term::KiloReloads,
                points * pad(key.cout) * (cin / f64::from(block.0)).ceil() / 1e3,
            ),
            (Term::KiloRows, rows * pad(key.cout) / 1e3),
            (Term::ActivationKib, activations / 1024.0),
            (Term::WeightKib, weights / 1024.0),
        ],
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(cin: u32, cout: u32, numerics: Numerics) -> ConvKey {
        ConvKey {
            batch: 1,
            cin,
            cout,
            kernel: 3,
            stride: 1,
            groups: 1,
            height: 16,
            width: 16,
            numerics,
            threads: 1,
            context: Context::Chain,
        }
    }

    fn sizes() -> impl Strategy<Value = ConvKey> {
        (1u32..130, 1u32..130, 0u32..3, 1u32..3, 1u32..40, 1u32..5).prop_map(|(cin, cout, k, stride, h, batch)| {
            ConvKey {
                batch,
                cin,
                cout,
                kernel: 2 * k + 1,
                stride,
                height: h,
                width: h,
                ..key(1, 1, Numerics::Int8)
            }
        })
    }

    proptest! {
        /// Law: every count grows with every size, so that non-negative coefficients make monotone predictions.
        #[test]
        fn features_are_monotone_within_a_path(small in sizes(), grow in 0usize..4, by in 1u32..9, f32_path in any::<bool>()) {
            let mut small = small;
            if f32_path {
                // Multiples of four from one block up: the blocked path.
                small.numerics = Numerics::F32;
                small.cin = 16 + small.cin.div_ceil(4) * 4;
            }
            let mut large = small;
            match grow {
                0 => large.cin += 4 * by,
                1 => large.cout += by,
                2 => (large.height, large.width) = (large.height + by, large.width + by),
                _ => large.batch += by,
            }
            let (a, b) = (Key::Conv(small).features(Block(16)), Key::Conv(large).features(Block(16)));
            prop_assert_eq!(a.path, b.path);
            for (x, y) in a.terms().iter().zip(b.terms()) {
                prop_assert_eq!(x.0, y.0);
                prop_assert!(y.1 >= x.1, "{:?} {:?}", x, y);
            }
        }
    }

    #[test]
    fn channels_choose_the_path_as_onnx_runtime_does() {
        let family = |cin, cout, numerics| Key::Conv(key(cin, cout, numerics)).path(Block(16)).family;
        assert_eq!(family(3, 16, Numerics::F32), Family::ConvFromNchw);
        assert_eq!(family(16, 20, Numerics::F32), Family::ConvBlocked);
        assert_eq!(family(18, 20, Numerics::F32), Family::ConvPatches);
        assert_eq!(family(3, 16, Numerics::Int8), Family::ConvInt8);
        let depthwise = |c| {
            Key::Conv(ConvKey {
                groups: c,
                ..key(c, c, Numerics::F32)
            })
            .path(Block(16))
            .family
        };
        assert_eq!(depthwise(32), Family::DepthwiseBlocked);
        assert_eq!(depthwise(30), Family::DepthwisePlain);
    }

    #[test]
    fn a_path_reads_back_from_its_name() {
        let expert = Family::Expert {
            bits: 4,
            planes: 2,
            heat: Heat::Cold,
        };
        for family in [
            Family::ConvInt8,
            Family::Pool(Numerics::F32),
            Family::Read(Tier::DiskBuffered),
            Family::Glue,
            Family::Attention { heat: Heat::Hot },
            Family::Dense {
                many: true,
                heat: Heat::Cold,
            },
            expert,
        ] {
            let path = Path { family, threads: 12 };
            assert_eq!(path.to_string().parse::<Path>(), Ok(path));
        }
        for wrong in [
            "conv.blocked",
            "conv.blocked/t",
            "expert.b4/t1",
            "expert.bxp1.hot/t1",
            "nothing/t1",
        ] {
            assert!(wrong.parse::<Path>().is_err(), "{wrong}");
        }
    }
}
