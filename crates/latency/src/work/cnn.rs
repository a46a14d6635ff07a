//! Features of CNN operators in ONNX Runtime's CPU provider: which kernel runs, and what that kernel counts. Padded sizes,
//! whole register tiles, pointers of indirections: the machine's units, not the model's (reference 2.5 and 2.6; MLAS in
//! microsoft/onnxruntime, `snchwc.cpp`, `convsym.cpp`). Law: counts grow with every size within a path; in width by whole
//! tiles, since six columns at once cost less than five single ones, and so do eight channels of a plain depthwise kernel.

use super::{
    Block, Context, ConvKey, EdgeKey, EdgeKind, ElementwiseKey, ElementwiseKind, Family, Features, Key, PlaneKey,
    PoolKey, Term,
};
use crate::graph::Numerics;

impl Key {
    /// A CNN operator with another number of threads; `None` for what is no part of a CNN.
    pub(crate) fn with_threads(mut self, threads: u32) -> Option<Self> {
        let slot = match &mut self {
            Self::Session { threads } => threads,
            Self::Conv(c) => &mut c.threads,
            Self::Linear(l) => &mut l.threads,
            Self::Add(p) | Self::GlobalAvgPool(p) | Self::Entry(p) => &mut p.threads,
            Self::Edge(e) => &mut e.threads,
            Self::Pool(p) => &mut p.threads,
            Self::Elementwise(e) => &mut e.threads,
            Self::LowRank(l) => &mut l.conv.threads,
            Self::Expert(_) | Self::Dense(_) | Self::Attention(_) | Self::Glue(_) | Self::Read(_) => return None,
        };
        *slot = threads;
        Some(self)
    }
}

pub(super) fn element_bytes(numerics: Numerics) -> f64 {
    match numerics {
        Numerics::F32 => 4.0,
        Numerics::Int8 => 1.0,
    }
}

pub(super) fn plane_features(family: Family, key: &PlaneKey, term: Term, per_element: f64) -> Features {
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

pub(super) fn edge_features(key: &EdgeKey, block: Block) -> Features {
    // Read and written once, in their formats.
    let bytes = match key.kind {
        EdgeKind::ReorderIn | EdgeKind::ReorderOut | EdgeKind::TransposeF32 => 8.0,
        EdgeKind::Quantize | EdgeKind::Dequantize => 5.0,
        EdgeKind::TransposeInt8 => 2.0,
        EdgeKind::View => 0.0,
    };
    let moved = kib(key.batch, key.channels, key.height, key.width, bytes);
    // A block that its channels do not fill is copied value by value.
    let is_reorder = matches!(key.kind, EdgeKind::ReorderIn | EdgeKind::ReorderOut);
    let ragged = if is_reorder && !key.channels.is_multiple_of(block.0) {
        moved
    } else {
        0.0
    };
    let family = Family::Edge(key.kind);
    let terms = [(Term::Call, 1.0), (Term::EdgeKib, moved), (Term::RaggedKib, ragged)];
    Features::new(family, key.threads, &terms)
}

pub(super) fn pool_features(key: &PoolKey, block: Block) -> Features {
    let element = element_bytes(key.numerics);
    let (height, width) = (key.height.div_ceil(key.stride), key.width.div_ceil(key.stride));
    let taps = f64::from(key.kernel).powi(2);
    let read = kib(key.batch, key.channels, key.height, key.width, element);
    let written = kib(key.batch, key.channels, height, width, element);
    let looked_at = f64::from(key.batch) * f64::from(height) * f64::from(width) * f64::from(key.channels) * taps;
    let features = |terms: &[(Term, f64)]| Features::new(Family::Window(key.kind, key.numerics), key.threads, terms);
    if key.numerics == Numerics::F32 && !key.channels.is_multiple_of(block.0) {
        // Channels that do not fill their blocks: another kernel, one channel after the other, row by row.
        let planes = f64::from(key.batch) * f64::from(key.channels);
        let rows = planes * f64::from(height);
        return features(&[
            (Term::Call, 1.0),
            (Term::KiloChannels, planes / 1e3),
            (Term::KiloRows, rows / 1e3),
            (Term::KiloOutputs, rows * f64::from(width) / 1e3),
            (Term::MegaMacsWide, looked_at / 1e6),
        ]);
    }
    features(&[
        (Term::Call, 1.0),
        (Term::MegaMacs, looked_at / 1e6),
        (Term::ActivationKib, read + written),
    ])
}

pub(super) fn elementwise_features(key: &ElementwiseKey) -> Features {
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

/// Which kernel ONNX Runtime's CPU provider takes (reference 2.5; the rules of its `nchwc_transformer.cc`, and of
/// `MlasConvSymPackWSize` for int8).
pub(crate) fn conv_family(key: &ConvKey, block: Block) -> Family {
    let depthwise = key.groups > 1 && key.groups == key.cin && key.groups == key.cout;
    let is_pointwise = key.kernel == 1;
    match key.numerics {
        _ if key.context == Context::Alone => Family::ConvAlone(key.numerics),
        Numerics::Int8 if depthwise && key.cin.is_multiple_of(16) && matches!(key.kernel, 3 | 5) => {
            Family::DepthwiseInt8
        }
        Numerics::Int8 if depthwise => Family::DepthwiseInt8Plain,
        Numerics::F32 if depthwise && key.cin.is_multiple_of(4) => Family::DepthwiseBlocked,
        Numerics::F32 if depthwise => Family::DepthwisePlain,
        Numerics::Int8 | Numerics::F32 if key.groups > 1 => Family::ConvGrouped,
        Numerics::Int8 => match (
            key.cin.is_multiple_of(4) && key.cout.is_multiple_of(4) && key.cout >= 16,
            is_pointwise,
        ) {
            (true, false) => Family::ConvInt8,
            (true, true) => Family::ConvInt8Pointwise,
            (false, false) => Family::ConvInt8Patches,
            (false, true) => Family::ConvInt8PatchesPointwise,
        },
        Numerics::F32 if key.cin < block.0 => Family::ConvFromNchw,
        Numerics::F32 => match (key.cin.is_multiple_of(4), is_pointwise) {
            (true, false) => Family::ConvBlocked,
            (true, true) => Family::ConvPointwise,
            (false, false) => Family::ConvPatches,
            (false, true) => Family::ConvPatchesPointwise,
        },
    }
}

/// The sizes of a convolution, as numbers.
struct Sizes {
    batch: f64,
    cin: f64,
    cout: f64,
    taps: f64,
    /// Taps whose row of the kernel lies on the image, in the mean: what kernels skip that step over padded rows.
    seen: f64,
    rows: f64,
    points: f64,
    /// KiB that are read, written, and of weights.
    read: f64,
    written: f64,
    weights: f64,
    strided: bool,
    large: bool,
}

impl Sizes {
    fn of(key: &ConvKey) -> Self {
        let (height, width) = (key.height.div_ceil(key.stride), key.width.div_ceil(key.stride));
        let batch = f64::from(key.batch);
        let rows = batch * f64::from(height);
        let points = rows * f64::from(width);
        let taps = f64::from(key.kernel).powi(2);
        let element = element_bytes(key.numerics);
        let (cin, cout) = (f64::from(key.cin), f64::from(key.cout));
        // A 1x1 kernel skips what its stride skips.
        let looked_at = if key.kernel == 1 {
            points
        } else {
            batch * f64::from(key.height) * f64::from(key.width)
        };
        Self {
            batch,
            cin,
            cout,
            taps,
            seen: taps * rows_seen(key),
            rows,
            points,
            read: element * looked_at * cin / 1024.0,
            written: element * points * cout / 1024.0,
            weights: element * taps * cin / f64::from(key.groups) * cout / 1024.0,
            strided: key.stride > 1,
            large: key.kernel > 3,
        }
    }
}

fn pad(channels: u32, to: u32) -> f64 {
    f64::from(channels.div_ceil(to)) * f64::from(to)
}

/// A count that exists under a condition only.
fn when(condition: bool, count: f64) -> f64 {
    if condition { count } else { 0.0 }
}

/// Output columns of a row (or of a whole plane), and how many of them look beyond the image.
fn columns(key: &ConvKey) -> (u32, u32) {
    let padding = key.kernel / 2;
    let width = key.width.div_ceil(key.stride);
    let left = padding.div_ceil(key.stride);
    // Columns whose window ends inside: (width + padding - kernel) / stride is the last one.
    let inside = (key.width + padding).checked_sub(key.kernel);
    let right = width.saturating_sub(inside.map_or(0, |last| last / key.stride + 1));
    (width, (left + right).min(width))
}

/// Share of a kernel's rows that lie on the image, over all output rows ("same" padding): on small images less than all.
fn rows_seen(key: &ConvKey) -> f64 {
    /// No kernel has more rows than what edges are counted over.
    const MOST: u64 = 64;
    let (kernel, height, stride) = (
        u64::from(key.kernel),
        u64::from(key.height),
        u64::from(key.stride.max(1)),
    );
    let rows = height.div_ceil(stride);
    let above = kernel / 2;
    // Rows of outputs whose window leaves the image are among the first and the last few.
    let first = 0..rows.min(MOST);
    let last = first.end.max(rows.saturating_sub(MOST))..rows;
    let unseen = |row: u64| {
        let from = row * stride;
        let lost_above = above.saturating_sub(from);
        let lost_below = (from + kernel).saturating_sub(above + height);
        (lost_above + lost_below).min(kernel)
    };
    let lost: u64 = first.chain(last).map(unseen).sum();
    #[expect(clippy::cast_precision_loss, reason = "sizes of images")]
    let share = 1.0 - lost as f64 / (rows * kernel).max(1) as f64;
    share
}

/// Cycles of the register tiles over one row, for one tap and one input channel: six output columns at a time, the rest and
/// those at the sides one by one, each with up to four blocks of filters. A step takes no less than the latency of a
/// multiply-add (four cycles), and two multiply-adds start in each cycle.
fn row_steps(columns: u32, side: u32, cout: u32, block: Block) -> f64 {
    let inner = columns - side;
    let (tiles, single) = (f64::from(inner / 6), f64::from(inner % 6 + side));
    let cost = |columns: f64, filters: f64| (columns * filters / 2.0).max(4.0);
    let set = |filters: f64| tiles * cost(6.0, filters) + single * cost(1.0, filters);
    let blocks = cout.div_ceil(block.0);
    let last = if blocks.is_multiple_of(4) {
        0.0
    } else {
        set(f64::from(blocks % 4))
    };
    f64::from(blocks / 4) * set(4.0) + last
}

/// KiB of a tensor beyond what stays in the second-level cache beside everything else.
fn beyond(kib: f64, cache_kib: f64) -> f64 {
    (kib - cache_kib).max(0.0)
}

/// Half of a second-level cache of our time.
const NEAR_KIB: f64 = 512.0;

pub(super) fn conv_features(key: &ConvKey, block: Block) -> Features {
    let family = conv_family(key, block);
    let s = Sizes::of(key);
    let features = |terms: &[(Term, f64)]| Features::new(family, key.threads, terms);
    let (cin_padded, cout_padded) = (pad(key.cin, block.0), pad(key.cout, block.0));
    let lanes = f64::from(block.0);
    let sets = f64::from(key.cout.div_ceil(4 * block.0));
    let (width, side) = columns(key);
    let steps = row_steps(width, side, key.cout, block);
    let side_steps = f64::from(side) * sets;
    match family {
        Family::ConvBlocked => {
            let macs = s.points * s.seen * cin_padded * cout_padded / 1e6;
            let per_row = s.seen * cin_padded * s.rows / 1e6;
            let stream = s.rows * s.weights * (s.seen / s.taps) / 1024.0;
            let one_set = f64::from(key.cout.div_ceil(block.0).min(4)) * lanes * cin_padded * s.taps * 4.0 / 1024.0;
            features(&[
                (Term::Call, 1.0),
                (Term::MegaMacs, macs),
                (Term::MegaSteps, steps * per_row),
                (Term::MegaSideSteps, side_steps * per_row),
                (Term::KiloReloads, s.points * cout_padded * cin_padded / lanes / 1e3),
                (Term::KiloRows, s.rows * sets * cin_padded / lanes / 1e3),
                (Term::ActivationKib, s.read + s.written),
                (Term::WeightKib, s.weights),
                (Term::FarWeightKib, beyond(s.weights, NEAR_KIB)),
                (Term::StreamMib, stream),
                (Term::FarStreamMib, when(one_set > NEAR_KIB, stream)),
                (Term::MegaMacsStrided, when(s.strided, macs)),
                (Term::MegaMacsLarge, when(s.large, macs)),
            ])
        }
        Family::ConvPointwise => {
            let macs = s.points * cin_padded * cout_padded / 1e6;
            // Without a stride a whole plane is one row.
            let height = key.height.div_ceil(key.stride);
            let (columns, rows) = if s.strided {
                (width, s.rows)
            } else {
                (width.saturating_mul(height), s.batch)
            };
            let steps = row_steps(columns, 0, key.cout, block);
            features(&[
                (Term::Call, 1.0),
                (Term::MegaMacsPointwise, macs),
                (
                    Term::MegaMacsWide,
                    s.points * cin_padded * pad(key.cout, 4 * block.0) / 1e6,
                ),
                (Term::MegaSteps, steps * cin_padded * rows / 1e6),
                // Eight blocks of input channels to a pass.
                (
                    Term::KiloReloads,
                    s.points * cout_padded * (cin_padded / lanes / 8.0).ceil() / 1e3,
                ),
                (Term::KiloRows, rows * sets * cin_padded / lanes / 1e3),
                (Term::ActivationKib, s.read + s.written),
                (Term::WeightKib, s.weights),
                (Term::FarWeightKib, beyond(s.weights, NEAR_KIB)),
                (
                    Term::FarOutputKib,
                    beyond(s.points * cout_padded * 4.0 / 1024.0, NEAR_KIB),
                ),
                (Term::MegaMacsStrided, when(s.strided, macs)),
            ])
        }
        Family::ConvFromNchw => {
            // One input channel after the other: sums are read back for each.
            let macs = s.points * s.seen * s.cin * cout_padded / 1e6;
            let per_row = s.seen * s.cin * s.rows / 1e6;
            features(&[
                (Term::Call, 1.0),
                (Term::MegaMacs, macs),
                (Term::MegaSteps, steps * per_row),
                (Term::MegaSideSteps, side_steps * per_row),
                (Term::KiloReloads, s.points * cout_padded * s.cin / 1e3),
                (Term::KiloRows, s.rows * sets * s.cin / 1e3),
                (Term::KiloOutputs, s.points * cout_padded / 1e3),
                (Term::ActivationKib, s.read + s.written),
                (Term::WeightKib, s.weights),
                (
                    Term::FarOutputKib,
                    beyond(s.points * cout_padded * 4.0 / 1024.0, NEAR_KIB),
                ),
                (Term::MegaMacsStrided, when(s.strided, macs)),
            ])
        }
        Family::ConvPatches | Family::ConvPatchesPointwise | Family::ConvGrouped => {
            let depth = s.taps * s.cin / f64::from(key.groups);
            let copies = key.kernel > 1 || s.strided;
            let points_padded = s.batch * (s.points / s.batch / 16.0).ceil() * 16.0;
            features(&[
                (Term::Call, 1.0),
                (Term::MegaMacs, s.points * depth * s.cout / 1e6),
                (Term::MegaMacsWide, s.points * depth * pad(key.cout, 16) / 1e6),
                (Term::MegaMacsPointwise, points_padded * depth * s.cout / 1e6),
                (Term::PatchKib, when(copies, 4.0 * s.points * s.taps * s.cin / 1024.0)),
                // For every image anew.
                (Term::KiloPacked, s.batch * depth * s.cout / 1e3),
                (Term::ActivationKib, s.read + s.written),
                (Term::WeightKib, s.weights),
            ])
        }
        Family::DepthwiseBlocked | Family::DepthwisePlain | Family::DepthwiseInt8 => {
            let channels = if family == Family::DepthwisePlain {
                s.cin
            } else {
                pad(key.cin, 16.max(block.0))
            };
            let taps = if family == Family::DepthwiseBlocked {
                s.seen
            } else {
                s.taps
            };
            let macs = s.points * taps * channels / 1e6;
            features(&[
                (Term::Call, 1.0),
                (Term::MegaMacs, macs),
                (Term::MegaSideSteps, f64::from(side) * s.rows * taps * channels / 1e6),
                (Term::KiloOutputs, s.points * channels / 1e3),
                (Term::KiloTaps, s.points * taps / 1e3),
                (Term::KiloRows, s.rows * channels / 1e3),
                (Term::KiloChannels, s.batch * channels / 1e3),
                (Term::ActivationKib, s.read + s.written),
                (Term::MegaMacsStrided, when(s.strided, macs)),
                (Term::MegaMacsLarge, when(s.large, macs)),
            ])
        }
        Family::DepthwiseInt8Plain => features(&[
            (Term::Call, 1.0),
            // Eight channels at once, what is left one by one.
            (Term::KiloVectors, s.points * s.taps * f64::from(key.cin / 8) / 1e3),
            (Term::KiloScalars, s.points * s.taps * f64::from(key.cin % 8) / 1e3),
            (Term::KiloTaps, s.points * s.taps / 1e3),
            (Term::KiloOutputs, s.points * s.cin / 1e3),
            (Term::KiloPoints, s.points / 1e3),
            (Term::ActivationKib, s.read + s.written),
        ]),
        Family::ConvInt8 | Family::ConvInt8Pointwise => {
            let depth = s.taps * s.cin;
            let padded = pad(key.cout, 16);
            let macs = s.points * depth * padded / 1e6;
            let is_indirect = key.kernel > 1 || s.strided;
            features(&[
                (Term::Call, 1.0),
                (Term::MegaMacs, macs),
                (Term::MegaMacsWide, s.points * depth * pad(key.cout, 64) / 1e6),
                (Term::KiloOutputs, s.points * padded / 1e3),
                (
                    Term::KiloTaps,
                    s.points * s.taps * f64::from(key.cout.div_ceil(64)) / 1e3,
                ),
                (Term::KiloPointers, when(is_indirect, s.points * s.taps / 1e3)),
                (Term::KiloPoints, s.points / 1e3),
                (Term::KiloRows, s.rows / 1e3),
                (Term::ActivationKib, s.read),
                (Term::WeightKib, s.weights),
                (Term::FarWeightKib, beyond(s.weights, NEAR_KIB / 2.0)),
                (Term::MegaMacsStrided, when(s.strided, macs)),
            ])
        }
        Family::ConvInt8Patches | Family::ConvInt8PatchesPointwise => {
            let depth = s.taps * s.cin;
            let padded = pad(key.cout, 16);
            let copies = key.kernel > 1 || s.strided;
            features(&[
                (Term::Call, 1.0),
                (Term::MegaMacs, s.points * depth * s.cout / 1e6),
                (Term::MegaMacsWide, s.points * (depth / 4.0).ceil() * 4.0 * padded / 1e6),
                (Term::KiloPacked, s.points * depth / 1e3),
                (Term::PatchKib, when(copies, s.points * depth / 1024.0)),
                (Term::KiloTaps, s.points * s.taps / 1e3),
                (Term::KiloPoints, s.points / 1e3),
                (Term::KiloOutputs, s.points * padded / 1e3),
                (Term::ActivationKib, s.written),
                (Term::WeightKib, s.weights),
            ])
        }
        // Alone: the broad terms, session and edges among them.
        _ => {
            let to = if key.numerics == Numerics::F32 { block.0 } else { 4 };
            let per_group = f64::from(key.cin / key.groups.max(1));
            let term = if key.kernel > 1 {
                Term::MegaMacs
            } else {
                Term::MegaMacsPointwise
            };
            features(&[
                (Term::Call, 1.0),
                (term, s.points * s.taps * per_group * pad(key.cout, to) / 1e6),
                (Term::KiloReloads, s.points * cout_padded * (s.cin / lanes).ceil() / 1e3),
                (Term::KiloRows, s.rows * pad(key.cout, to) / 1e3),
                (Term::ActivationKib, s.read + s.written),
                (Term::WeightKib, s.weights),
            ])
        }
    }
}

/// Mean over a plane: whole blocks, or channel by channel where they do not fill.
pub(super) fn global_pool_features(key: &PlaneKey, block: Block) -> Features {
    let family = match key.numerics {
        Numerics::F32 if !key.channels.is_multiple_of(block.0) => Family::PoolPlain,
        numerics => Family::Pool(numerics),
    };
    let read = kib(
        key.batch,
        key.channels,
        key.height,
        key.width,
        element_bytes(key.numerics),
    );
    let channels = f64::from(key.batch) * f64::from(key.channels) / 1e3;
    let terms = [
        (Term::Call, 1.0),
        (Term::ActivationKib, read),
        (Term::KiloChannels, channels),
    ];
    Features::new(family, key.threads, &terms)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Law: the share of kernel rows on the image is that of counting them one by one.
        #[test]
        fn rows_on_the_image_are_counted(kernel in 1u32..12, stride in 1u32..4, height in 1u32..200) {
            let key = ConvKey { batch: 1, cin: 16, cout: 16, kernel, stride, groups: 1, height, width: height, numerics: Numerics::F32, threads: 1, context: Context::Chain };
            let (mut seen, mut all) = (0u32, 0u32);
            for out in 0..height.div_ceil(stride) {
                for row in 0..kernel {
                    let at = i64::from(out * stride + row) - i64::from(kernel / 2);
                    seen += u32::from(at >= 0 && at < i64::from(height));
                    all += 1;
                }
            }
            prop_assert!((rows_seen(&key) - f64::from(seen) / f64::from(all)).abs() < 1e-12);
        }
    }
}
