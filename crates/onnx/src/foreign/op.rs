//! What a node of a foreign network does, in the few kinds that matter for its time. Which ONNX operators become which
//! kind is `shapes`'s.

/// Size, step and border of a sliding window; `[height, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    /// Taps.
    pub kernel: [u32; 2],
    /// Step between outputs.
    pub stride: [u32; 2],
    /// Distance between taps.
    pub dilation: [u32; 2],
    /// Top, left, bottom, right.
    pub pads: [u32; 4],
}

/// A convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Conv {
    /// Input channels, of all groups.
    pub cin: u32,
    /// Output channels, of all groups.
    pub cout: u32,
    /// Channels split into this many independent parts.
    pub groups: u32,
    /// Its window.
    pub window: Window,
}

/// How a pool reduces its window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pool {
    /// The largest.
    Max,
    /// The mean.
    Average,
}

/// Kinds of operators, by what their time depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// A convolution with constant weights.
    Conv(Conv),
    /// `[rows, inputs] · [inputs, outputs]`, weights constant.
    Linear {
        /// Rows of all leading dimensions.
        rows: u64,
        /// Inner dimension.
        inputs: u32,
        /// Columns.
        outputs: u32,
    },
    /// A product of two activations, `batch` times `[rows, inner] · [inner, columns]`.
    MatMul {
        /// Independent products.
        batch: u64,
        /// Rows of each.
        rows: u64,
        /// Inner dimension.
        inner: u64,
        /// Columns of each.
        columns: u64,
    },
    /// Scale and shift per channel; behind a convolution a runtime folds it away.
    BatchNorm,
    /// Clamping at zero or at two bounds (Relu, Clip): free behind a convolution.
    Clamp,
    /// Another function that runtimes fuse behind a convolution (Sigmoid, HardSigmoid, Tanh, LeakyRelu).
    Activation,
    /// A function of each element that stays a pass of its own (HardSwish, Exp, Cast, normalisations, …).
    Elementwise,
    /// Sum of two activations of one shape.
    Add,
    /// Two inputs, element by element, one of them broadcast or constant, or no sum (Mul, Sub, Div, …).
    Binary,
    /// Inputs beside each other along the channels.
    Concat,
    /// A sliding pool.
    Pool(Pool, Window),
    /// Over all of height and width.
    GlobalPool(Pool),
    /// Over other axes.
    Reduce,
    /// Over the last axis.
    Softmax,
    /// Elements move: Transpose.
    Transpose,
    /// Elements are copied: Slice, Split, Pad, Resize, Gather, Expand.
    Copy,
    /// The same bytes under another shape: free.
    View,
    /// Not known here.
    Unknown,
}

impl Op {
    /// Short name for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Conv(_) => "conv",
            Self::Linear { .. } => "linear",
            Self::MatMul { .. } => "matmul",
            Self::BatchNorm => "batch norm",
            Self::Clamp => "clamp",
            Self::Activation => "activation",
            Self::Elementwise => "elementwise",
            Self::Add => "add",
            Self::Binary => "binary",
            Self::Concat => "concat",
            Self::Pool(Pool::Max, _) => "max pool",
            Self::Pool(Pool::Average, _) => "average pool",
            Self::GlobalPool(_) => "global pool",
            Self::Reduce => "reduce",
            Self::Softmax => "softmax",
            Self::Transpose => "transpose",
            Self::Copy => "copy",
            Self::View => "view",
            Self::Unknown => "unknown",
        }
    }
}
