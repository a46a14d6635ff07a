//! What can be asked ([`Work`]), the complete key of each operator ([`Key`]) and its features ([`Key::features`]): a few
//! physical counts with units, on padded sizes, all of them monotone in size. No clock, no coefficients.

use serde::{Deserialize, Serialize};

use crate::graph::{Graph, Numerics};
use crate::moe::MoeStep;
use crate::walk::Network;

mod cnn;
mod edges;
mod moe;
mod names;

use self::cnn::{
    conv_features, edge_features, element_bytes, elementwise_features, global_pool_features, plane_features,
    pool_features,
};

pub use self::edges::{EdgeKey, EdgeKind, ElementwiseKey, ElementwiseKind, LowRankKey, PoolKey, PoolKind};
pub use self::moe::{AttentionKey, DenseKey, ExpertKey, Form, GlueKey};
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
    /// A dense matrix of our engine.
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

/// Whether weights come from cache (the same expert again) or from memory (another one each time).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Heat {
    Hot,
    Cold,
}

/// Where bytes are read from, or between what they are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// A working set inside the second-level cache.
    L2,
    /// A working set inside the last-level cache.
    L3,
    /// A working set far beyond every cache.
    Memory,
    /// Direct reads, past the page cache; each region for the first time.
    Disk,
    /// The same where direct reads are refused: through the page cache, which was told to forget the file.
    DiskBuffered,
    /// A working set of any size, at the ends of levels too: shows where they end, and predicts nothing else.
    WorkingSet,
    /// Direct reads of a region that was read just before: what lies between this and [`Tier::Disk`] is somebody's cache.
    DiskAgain,
    /// From the memory of a GPU's host to its own, out of pages that stay where they are.
    HostToDevicePinned,
    /// The same out of ordinary pages.
    HostToDevice,
    DeviceToHostPinned,
    DeviceToHost,
    /// A GPU's own memory, read by all of it.
    DeviceMemory,
}

impl Tier {
    /// All of them, in the order of files.
    pub const ALL: [Self; 12] = [
        Self::L2,
        Self::L3,
        Self::Memory,
        Self::Disk,
        Self::DiskBuffered,
        Self::WorkingSet,
        Self::DiskAgain,
        Self::HostToDevicePinned,
        Self::HostToDevice,
        Self::DeviceToHostPinned,
        Self::DeviceToHost,
        Self::DeviceMemory,
    ];

    /// As files and tables call it.
    pub fn name(self) -> &'static str {
        tier_name(self)
    }

    /// Whether it is a disk.
    pub fn is_disk(self) -> bool {
        matches!(self, Self::Disk | Self::DiskBuffered | Self::DiskAgain)
    }

    /// Whether a GPU is one end of it.
    pub fn is_of_a_gpu(self) -> bool {
        match self {
            Self::HostToDevicePinned
            | Self::HostToDevice
            | Self::DeviceToHostPinned
            | Self::DeviceToHost
            | Self::DeviceMemory => true,
            Self::L2
            | Self::L3
            | Self::Memory
            | Self::Disk
            | Self::DiskBuffered
            | Self::WorkingSet
            | Self::DiskAgain => false,
        }
    }
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
    /// f32, blocked channels, 1x1.
    ConvPointwise,
    /// f32, 1x1 with channels that do not block.
    ConvPatchesPointwise,
    /// int8 with prepacked symmetric weights: input channels a multiple of 4, 16 outputs or more.
    ConvInt8,
    ConvInt8Pointwise,
    /// int8 by patches and a matrix product: other channels.
    ConvInt8Patches,
    ConvInt8PatchesPointwise,
    /// 3x3 and 5x5 on multiples of 16 channels.
    DepthwiseInt8,
    DepthwiseInt8Plain,
    Linear(Numerics),
    Add(Numerics),
    Pool(Numerics),
    /// f32 global pool on channels that do not fill their blocks.
    PoolPlain,
    Entry(Numerics),
    Edge(EdgeKind),
    Window(PoolKind, Numerics),
    Elementwise(ElementwiseKind, Numerics),
    /// Never fitted: a triple that is not in the table is the sum of its parts.
    LowRank(Numerics),
    /// `codes`: group codes, unpacked and multiplied as integers; else 16-bit floats.
    Expert {
        codes: bool,
        heat: Heat,
    },
    /// `many`: more than one row of activations.
    Dense {
        form: Form,
        many: bool,
        heat: Heat,
    },
    /// `kv_bits` of the cache: 32, 16 or 8.
    Attention {
        kv_bits: u32,
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
    /// Millions of weights read as floats, once per pass over them.
    MegaWeights,
    /// Millions of weights unpacked from one plane of 2, 3, 4 or 8 bits, once per pass over them.
    MegaWeightsB2,
    MegaWeightsB3,
    MegaWeightsB4,
    MegaWeightsB8,
    /// The same from nested planes: 4 bits of two, 8 of two, 8 of three.
    MegaWeightsB4P2,
    MegaWeightsB8P2,
    MegaWeightsB8P3,
    /// Thousands of group scales applied, once per pass.
    KiloGroups,
    /// Thousands of scores through a softmax.
    KiloScores,
    /// Millions of cycles of the blocked kernel's register tiles.
    MegaSteps,
    /// Millions of tile steps for columns whose window leaves the image.
    MegaSideSteps,
    /// Millions of multiply-adds with output channels padded to four blocks.
    MegaMacsWide,
    /// Millions of multiply-adds at strides above 1.
    MegaMacsStrided,
    /// Millions of multiply-adds of kernels above 3x3.
    MegaMacsLarge,
    /// Thousands of output values on padded channels.
    KiloOutputs,
    /// Thousands of output points times taps: addresses that are looked up.
    KiloTaps,
    /// Thousands of output points.
    KiloPoints,
    /// Thousands of channels, once per image.
    KiloChannels,
    /// KiB of patches copied out of the input.
    PatchKib,
    /// Thousands of weights packed on every call.
    KiloPacked,
    /// KiB reordered whose channels do not fill their blocks.
    RaggedKib,
    /// Thousands of runs of consecutive weights that are begun: whatever fetches ahead begins anew.
    KiloRuns,
    /// KiB of weights beyond half of the second-level cache.
    FarWeightKib,
    /// KiB of outputs beyond half of the second-level cache.
    FarOutputKib,
    /// MiB of weights, once per output row.
    StreamMib,
    /// The same where one set of filters does not stay near.
    FarStreamMib,
    /// Thousands of vector steps.
    KiloVectors,
    /// Thousands of steps without vectors.
    KiloScalars,
    /// Thousands of pointers written for an indirection.
    KiloPointers,
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
    pub const ALL: [Self; 41] = [
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
        Self::MegaWeightsB2,
        Self::MegaWeightsB3,
        Self::MegaWeightsB4,
        Self::MegaWeightsB8,
        Self::MegaWeightsB4P2,
        Self::MegaWeightsB8P2,
        Self::MegaWeightsB8P3,
        Self::KiloGroups,
        Self::KiloScores,
        Self::MegaSteps,
        Self::MegaSideSteps,
        Self::MegaMacsWide,
        Self::MegaMacsStrided,
        Self::MegaMacsLarge,
        Self::KiloOutputs,
        Self::KiloTaps,
        Self::KiloPoints,
        Self::KiloChannels,
        Self::PatchKib,
        Self::KiloPacked,
        Self::RaggedKib,
        Self::KiloRuns,
        Self::FarWeightKib,
        Self::FarOutputKib,
        Self::StreamMib,
        Self::FarStreamMib,
        Self::KiloVectors,
        Self::KiloScalars,
        Self::KiloPointers,
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
            | Self::MegaWeightsB2
            | Self::MegaWeightsB3
            | Self::MegaWeightsB4
            | Self::MegaWeightsB8
            | Self::MegaWeightsB4P2
            | Self::MegaWeightsB8P2
            | Self::MegaWeightsB8P3
            | Self::KiloGroups
            | Self::KiloScores
            | Self::MegaSteps
            | Self::MegaSideSteps
            | Self::MegaMacsWide
            | Self::MegaMacsStrided
            | Self::MegaMacsLarge
            | Self::KiloTaps
            | Self::KiloPoints
            | Self::KiloChannels
            | Self::KiloVectors
            | Self::KiloScalars
            | Self::KiloPointers => TermGroup::Compute,
            Self::ActivationKib
            | Self::WeightKib
            | Self::ReadKib
            | Self::KiloOutputs
            | Self::PatchKib
            | Self::KiloPacked
            | Self::KiloRuns
            | Self::FarWeightKib
            | Self::FarOutputKib
            | Self::StreamMib
            | Self::FarStreamMib => TermGroup::Memory,
            Self::EdgeKib | Self::RaggedKib => TermGroup::Layout,
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
            Self::MegaWeightsB2 => "mega_weights_b2",
            Self::MegaWeightsB3 => "mega_weights_b3",
            Self::MegaWeightsB4 => "mega_weights_b4",
            Self::MegaWeightsB8 => "mega_weights_b8",
            Self::MegaWeightsB4P2 => "mega_weights_b4p2",
            Self::MegaWeightsB8P2 => "mega_weights_b8p2",
            Self::MegaWeightsB8P3 => "mega_weights_b8p3",
            Self::KiloGroups => "kilo_groups",
            Self::KiloScores => "kilo_scores",
            Self::MegaSteps => "mega_steps",
            Self::MegaSideSteps => "mega_side_steps",
            Self::MegaMacsWide => "mega_macs_wide",
            Self::MegaMacsStrided => "mega_macs_strided",
            Self::MegaMacsLarge => "mega_macs_large",
            Self::KiloOutputs => "kilo_outputs",
            Self::KiloTaps => "kilo_taps",
            Self::KiloPoints => "kilo_points",
            Self::KiloChannels => "kilo_channels",
            Self::PatchKib => "patch_kib",
            Self::KiloPacked => "kilo_packed",
            Self::RaggedKib => "ragged_kib",
            Self::KiloRuns => "kilo_runs",
            Self::FarWeightKib => "far_weight_kib",
            Self::FarOutputKib => "far_output_kib",
            Self::StreamMib => "stream_mib",
            Self::FarStreamMib => "far_stream_mib",
            Self::KiloVectors => "kilo_vectors",
            Self::KiloScalars => "kilo_scalars",
            Self::KiloPointers => "kilo_pointers",
        }
    }
}

/// The counts of one call, and whose coefficients they meet. At most thirteen terms: no allocation on the way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Features {
    pub path: Path,
    terms: [(Term, f64); 13],
    count: usize,
}

impl Features {
    fn new(family: Family, threads: u32, terms: &[(Term, f64)]) -> Self {
        let mut kept = [(Term::Call, 0.0); 13];
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
            Self::GlobalAvgPool(key) => global_pool_features(&key, block),
            // One read and one write of f32, or of f32 and u8.
            Self::Entry(key) => {
                let bytes_per_element = match key.numerics {
                    Numerics::F32 => 2.0,
                    Numerics::Int8 => 5.0,
                };
                plane_features(Family::Entry(key.numerics), &key, Term::EdgeKib, bytes_per_element)
            }
            Self::Edge(key) => edge_features(&key, block),
            Self::Pool(key) => pool_features(&key, block),
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
                    Tier::L2 | Tier::L3 | Tier::Memory | Tier::WorkingSet | Tier::DeviceMemory => Term::ReadKib,
                    Tier::Disk
                    | Tier::DiskBuffered
                    | Tier::DiskAgain
                    | Tier::HostToDevicePinned
                    | Tier::HostToDevice
                    | Tier::DeviceToHostPinned
                    | Tier::DeviceToHost => Term::LinkKib,
                };
                #[expect(clippy::cast_precision_loss, reason = "sizes of reads stay far below 2^52")]
                let kib = key.bytes as f64 / 1024.0;
                Features::new(Family::Read(key.tier), key.threads, &[(Term::Call, 1.0), (term, kib)])
            }
        }
    }
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
        /// Law: every count grows with every size, so that non-negative coefficients make monotone predictions; in width by
        /// whole register tiles of six columns: real staircases are real.
        #[test]
        fn features_are_monotone_within_a_path(
            small in sizes(), grow in 0usize..5, by in 1u32..9, numerics in prop_oneof![Just(Numerics::F32), Just(Numerics::Int8)],
        ) {
            // Multiples of four from one block up: the blocked and the prepacked paths.
            let whole = |channels: u32| 16 + channels.div_ceil(4) * 4;
            let small = ConvKey { numerics, cin: whole(small.cin), cout: whole(small.cout), ..small };
            let mut large = small;
            match grow {
                0 => large.cin += 4 * by,
                1 => large.cout += 4 * by,
                // A pointwise convolution takes the whole image for one row.
                2 if small.kernel == 1 => large.height += 6 * by * small.stride,
                2 => large.height += by,
                3 => large.width += 6 * by * small.stride,
                _ => large.batch += by,
            }
            let (a, b) = (Key::Conv(small).features(Block(16)), Key::Conv(large).features(Block(16)));
            prop_assert_eq!(a.path, b.path);
            for (x, y) in a.terms().iter().zip(b.terms()) {
                prop_assert_eq!(x.0, y.0);
                prop_assert!(y.1 >= x.1 - 1e-12, "{:?} {:?}", x, y);
            }
        }
    }

    #[test]
    fn channels_choose_the_path_as_onnx_runtime_does() {
        let family = |cin, cout, numerics| Key::Conv(key(cin, cout, numerics)).path(Block(16)).family;
        assert_eq!(family(3, 16, Numerics::F32), Family::ConvFromNchw);
        assert_eq!(family(16, 20, Numerics::F32), Family::ConvBlocked);
        assert_eq!(family(18, 20, Numerics::F32), Family::ConvPatches);
        assert_eq!(family(4, 16, Numerics::Int8), Family::ConvInt8);
        assert_eq!(family(3, 16, Numerics::Int8), Family::ConvInt8Patches);
        assert_eq!(family(16, 18, Numerics::Int8), Family::ConvInt8Patches);
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
            codes: false,
            heat: Heat::Cold,
        };
        for family in [
            Family::ConvInt8,
            Family::Pool(Numerics::F32),
            Family::Read(Tier::DiskBuffered),
            Family::Glue,
            Family::Attention {
                kv_bits: 8,
                heat: Heat::Hot,
            },
            Family::Dense {
                form: Form::Half,
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
            "expert.codes.warm/t1",
            "nothing/t1",
        ] {
            assert!(wrong.parse::<Path>().is_err(), "{wrong}");
        }
    }
}
