//! The words of an explanation: what a layer is, whose fault an edge is, one line and one paragraph per layer. Decides
//! nothing. Times below a millisecond are said in µs; gains are those of the whole network.

use cotk_run::units::significant;

use super::{Bound, Choice, Edge, Finding, Layer};
use crate::graph::{Numerics, Shape, Source};
use crate::walk::{Kind, Network};
use crate::work::{Block, EdgeKind};

/// A time for people: `31 µs`, `4.2 ms`.
pub fn time(ms: f64) -> String {
    if ms.abs() < 5e-6 {
        "0 µs".into()
    } else if ms.abs() < 0.9995 {
        format!("{} µs", significant(1e3 * ms, 3))
    } else {
        format!("{} ms", significant(ms, 3))
    }
}

/// A time with its spread in one unit: `31.2 ± 2.1 µs`.
pub fn with_spread(ms: f64, spread_ms: f64) -> String {
    if spread_ms > 0.995 * ms.abs() {
        return format!("{} ± >100 %", time(ms));
    }
    let (factor, unit) = if ms.abs() < 0.9995 { (1e3, "µs") } else { (1.0, "ms") };
    format!(
        "{} ± {} {unit}",
        significant(factor * ms, 3),
        significant(factor * spread_ms, 2)
    )
}

fn shape_of(network: &Network, source: Source) -> Shape {
    match source {
        Source::Input => network.input.shape,
        Source::Node(from) => network.nodes[from].output.shape,
    }
}

/// `conv 3x3/1 16→20 at 32x32 int8`.
pub(super) fn what(network: &Network, at: usize) -> String {
    let node = &network.nodes[at];
    let input = node
        .inputs
        .first()
        .map_or(network.input.shape, |s| shape_of(network, *s));
    let out = node.output.shape;
    let plane = |name: &str| {
        if input.height * input.width > 1 {
            format!("{name} {} at {}x{}", input.channels, input.height, input.width)
        } else {
            format!("{name} {}", input.channels)
        }
    };
    let mut text = match &node.kind {
        Kind::Conv {
            kernel, stride, groups, ..
        } => {
            let [kh, kw] = kernel;
            let (name, channels) = if *groups > 1 && *groups == input.channels && *groups == out.channels {
                ("depthwise", input.channels.to_string())
            } else {
                ("conv", format!("{}→{}", input.channels, out.channels))
            };
            let size = format!("{}x{}", input.height, input.width);
            let split = if *groups > 1 && name == "conv" {
                format!(" in {groups} groups")
            } else {
                String::new()
            };
            format!("{name} {kh}x{kw}/{stride} {channels}{split} at {size}")
        }
        Kind::Linear { rows, inputs, outputs } if *rows > 1 => format!("linear {inputs}→{outputs} on {rows} rows"),
        Kind::Linear { inputs, outputs, .. } => format!("linear {inputs}→{outputs}"),
        Kind::Add(_) => plane("add"),
        Kind::GlobalAvgPool => plane("global pool"),
        Kind::Pool { kernel, stride, .. } => format!("pool {kernel}x{kernel}/{stride} {}", &plane("")[1..]),
        Kind::Activation => plane("activation"),
        Kind::BatchNorm => plane("batch norm"),
        Kind::Elementwise(kind) => plane(kind.name()),
        Kind::Concat => format!("concat → {} at {}x{}", out.channels, out.height, out.width),
        Kind::View => "reshape".into(),
        Kind::Transpose => plane("transpose"),
        Kind::Reduce => plane("reduce"),
        Kind::Input => plane("input"),
        Kind::Unknown { op_type } => format!("{op_type} (unknown)"),
    };
    if node.numerics == Numerics::Int8 {
        text.push_str(" int8");
    }
    text
}

/// Past what fused: the node that wrote a tensor.
fn writer(network: &Network, source: Source) -> Source {
    let mut at = source;
    while let Source::Node(index) = at
        && matches!(network.nodes[index].kind, Kind::Activation | Kind::BatchNorm)
        && let Some(before) = network.nodes[index].inputs.first()
    {
        at = *before;
    }
    at
}

/// Which layer makes an edge necessary, and why.
pub(super) fn culprit(
    network: &Network,
    block: Block,
    from: Source,
    to: Option<usize>,
    kind: EdgeKind,
) -> (String, String) {
    let from = writer(network, from);
    let writes = || match from {
        Source::Input => ("the input".to_owned(), "it comes in NCHW, as f32".to_owned()),
        Source::Node(at) => (network.nodes[at].name.clone(), plain_reason(network, block, at)),
    };
    let reads = || match to {
        None => ("the output".to_owned(), "it leaves in NCHW, as f32".to_owned()),
        Some(at) => (network.nodes[at].name.clone(), plain_reason(network, block, at)),
    };
    let float = |at: usize| {
        let node = &network.nodes[at];
        let why = match &node.kind {
            Kind::Conv { .. } | Kind::Linear { .. } => "it runs in f32 among int8 layers",
            _ => "it has no int8 form here: an f32 island",
        };
        (node.name.clone(), why.to_owned())
    };
    match kind {
        EdgeKind::ReorderIn => writes(),
        EdgeKind::ReorderOut => reads(),
        EdgeKind::Quantize => match from {
            Source::Input => writes(),
            Source::Node(at) => float(at),
        },
        EdgeKind::Dequantize => to.map_or_else(reads, float),
        EdgeKind::TransposeInt8 => match from {
            Source::Input => ("the input".into(), "int8 kernels want NHWC".into()),
            Source::Node(at) if network.nodes[at].numerics == Numerics::F32 => float(at),
            Source::Node(_) => reads(),
        },
        EdgeKind::TransposeF32 | EdgeKind::View => reads(),
    }
}

/// Why a node reads or writes plain NCHW.
fn plain_reason(network: &Network, block: Block, at: usize) -> String {
    let node = &network.nodes[at];
    let cin = node.inputs.first().map_or(0, |s| shape_of(network, *s).channels);
    let block = block.0;
    if node.numerics == Numerics::Int8 {
        return "it works in NCHW, int8 convolutions in NHWC".into();
    }
    match &node.kind {
        Kind::Conv { groups, .. } if *groups > 1 => {
            format!("{cin} channels in {groups} groups do not block")
        }
        Kind::Conv { .. } if cin < block => format!("{cin} input channels are fewer than a block of {block}"),
        Kind::Conv { .. } if !cin.is_multiple_of(4) => format!("{cin} input channels are no multiple of 4"),
        Kind::Conv { .. } => "its result is read in NCHW".into(),
        Kind::Concat => format!("its parts do not fill whole blocks of {block} channels"),
        Kind::Pool { .. } | Kind::GlobalAvgPool => format!("{cin} channels do not fill whole blocks of {block}"),
        Kind::Reduce => "a mean written as ReduceMean works in NCHW, GlobalAveragePool would not".into(),
        Kind::Linear { .. } => "a matrix product works on rows".into(),
        Kind::View | Kind::Transpose | Kind::Input => "it works on NCHW".into(),
        Kind::Add(_) | Kind::Elementwise(_) | Kind::Activation | Kind::BatchNorm => {
            "its inputs do not all lie in blocks".into()
        }
        Kind::Unknown { op_type } => format!("{op_type} is unknown and taken to work in NCHW"),
    }
}

impl Bound {
    /// As in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Launch => "launch-bound",
            Self::Layout => "layout-bound",
            Self::Memory => "byte-bound",
            Self::Compute => "FLOP-bound",
        }
    }
}

impl Finding {
    /// kebab-case, for machines.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Padding { .. } => "padding-waste",
            Self::SlowKernel { .. } => "slow-kernel",
            Self::NoKernel { .. } => "no-kernel-for-bits",
            Self::FactorisedNoGain { .. } => "factorised-no-gain",
            Self::Int8NoGain { .. } => "int8-no-gain",
            Self::NotMeasurable { .. } => "not-measurable",
            Self::Unknown { .. } => "unknown-operator",
        }
    }

    /// A few words.
    fn short(&self) -> String {
        match self {
            Self::Padding { nominal, padded, .. } => format!("{nominal} channels cost what {padded} cost"),
            Self::SlowKernel { channels, .. } => format!("{channels} channels: slow kernel"),
            Self::NoKernel { bits, .. } => format!("{bits}-bit codes run as int8"),
            Self::FactorisedNoGain { launches, rank, .. } => format!("{launches} factors of rank {rank} gain nothing"),
            Self::Int8NoGain { .. } => "int8 gains nothing".into(),
            Self::NotMeasurable { .. } => "gains not measurable here".into(),
            Self::Unknown { op_type } => format!("unknown operator {op_type}"),
        }
    }

    /// A sentence with the numbers.
    pub fn sentence(&self) -> String {
        match self {
            Self::Padding {
                side,
                nominal,
                padded,
                ratio,
            } => format!(
                "{nominal} {side} channels cost what {padded} cost: {} % of the arithmetic is padding.",
                significant(100.0 * (1.0 - 1.0 / ratio), 2)
            ),
            Self::SlowKernel { channels, multiple } => format!(
                "{channels} channels are no multiple of {multiple}: a slower kernel runs it, and its neighbours reorder."
            ),
            Self::NoKernel { bits, fewer_bytes } => format!(
                "{bits}-bit weights: {} times fewer bytes on disk than int8, the same time: they run as int8.",
                significant(*fewer_bytes, 2)
            ),
            Self::FactorisedNoGain {
                factors_ms,
                dense_ms,
                launches,
                rank,
            } => format!(
                "The factors of rank {rank} take {}, one dense layer would take {}: {launches} launches and the \
                 activations between them eat what the arithmetic saves.",
                time(*factors_ms),
                time(*dense_ms)
            ),
            Self::Int8NoGain { int8_ms, f32_ms, edges } => {
                let why = if *edges > 0 {
                    format!("{edges} edges around it")
                } else {
                    "too little arithmetic per byte".into()
                };
                format!(
                    "int8 takes {}, f32 would take {}: {why}.",
                    time(*int8_ms),
                    time(*f32_ms)
                )
            }
            Self::NotMeasurable { best_gain, floor } => format!(
                "The best neighbouring choice gains {} %: not measurable here (repeats differ by {} %).",
                significant(100.0 * best_gain, 2),
                significant(100.0 * floor, 2)
            ),
            Self::Unknown { op_type } => {
                format!("`{op_type}` is not in the model: one pass over its bytes stands in for it.")
            }
        }
    }
}

impl Choice {
    /// `rank 32 −87 %` of the layer's time.
    fn short(&self, layer_ms: f64) -> String {
        let pct = 100.0 * self.gain_ms / layer_ms.max(f64::MIN_POSITIVE);
        let what = self.what.strip_suffix(" with its neighbours").unwrap_or(&self.what);
        format!("{what} −{:.0} %", pct.min(100.0))
    }
}

impl Edge {
    /// `reorder_out 6 µs: head works on rows`.
    fn sentence(&self) -> String {
        let name = match self.kind {
            EdgeKind::ReorderIn => "a reorder into blocks",
            EdgeKind::ReorderOut => "a reorder out of blocks",
            EdgeKind::Quantize => "a quantization",
            EdgeKind::Dequantize => "a dequantization",
            EdgeKind::TransposeInt8 | EdgeKind::TransposeF32 => "a transpose",
            EdgeKind::View => "a reshape",
        };
        format!(
            "It pays {} for {name} because of `{}`: {}.",
            time(self.ms),
            self.culprit,
            self.why
        )
    }
}

impl Layer {
    /// The verdict in one line of at most `width` characters: what is the matter, and the best that can be done about it.
    pub fn headline(&self, width: usize) -> String {
        // What is wrong says more than what bounds it; "not measurable" says less.
        let telling = self
            .findings
            .iter()
            .find(|f| !matches!(f, Finding::NotMeasurable { .. }));
        let verdict = match (telling, self.bound) {
            (Some(finding), _) => finding.short(),
            (None, Bound::Layout) => match self.worst_edge() {
                Some(edge) => format!("layout-bound by {}", edge.culprit),
                None => Bound::Layout.name().into(),
            },
            (None, bound) => bound.name().into(),
        };
        let mut measurable: Vec<String> = self
            .choices
            .iter()
            .filter(|c| c.is_measurable)
            .map(|c| c.short(self.ms))
            .collect();
        if measurable.is_empty() {
            return format!("{verdict}: nothing nearby helps");
        }
        loop {
            let line = format!("{verdict}: {}", measurable.join(", "));
            if line.chars().count() <= width || measurable.len() == 1 {
                return line;
            }
            measurable.pop();
        }
    }

    fn worst_edge(&self) -> Option<&Edge> {
        self.edges.iter().max_by(|a, b| a.ms.total_cmp(&b.ms))
    }

    /// The two largest terms in percent: `macs 71, layout 19`.
    pub fn of_which(&self) -> String {
        let all = self.terms.sum_ms().max(f64::MIN_POSITIVE);
        let mut shares = [
            ("launch", self.terms.launch_ms),
            ("layout", self.terms.layout_ms),
            ("bytes", self.terms.memory_ms + self.terms.link_ms),
            ("macs", self.terms.compute_ms),
        ];
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        let share = |(name, ms): &(&str, f64)| format!("{name} {:.0}", 100.0 * ms / all);
        let large = shares.iter().take(2).filter(|(_, ms)| *ms >= 0.005 * all);
        large.map(share).collect::<Vec<_>>().join(", ")
    }

    /// Sentences with the numbers: what bounds the layer, its edges, findings and choices.
    pub fn note(&self) -> String {
        let all = self.terms.sum_ms().max(f64::MIN_POSITIVE);
        let pct = |ms: f64| format!("{:.0} %", 100.0 * ms / all);
        let t = &self.terms;
        let mut text = match self.bound {
            Bound::Launch => format!(
                "Launch-bound: {} of it is starting kernels{}. Fewer or larger layers or a batch help; bits and rank do not.",
                pct(t.launch_ms),
                if t.layout_ms > 0.0 {
                    format!(", {} edges", pct(t.layout_ms))
                } else {
                    String::new()
                }
            ),
            Bound::Layout => format!(
                "Layout-bound: {} of it moves data between layouts or formats.",
                pct(t.layout_ms)
            ),
            Bound::Memory => format!(
                "Byte-bound: {} of it is moving weights and activations. Fewer bits or smaller activations help; fewer multiply-adds do not.",
                pct(t.memory_ms + t.link_ms)
            ),
            Bound::Compute => format!(
                "FLOP-bound: {} of it is arithmetic. Width, kernel, rank and int8 help.",
                pct(t.compute_ms)
            ),
        };
        let mut say = |sentence: String| {
            text.push(' ');
            text.push_str(&sentence);
        };
        self.edges.iter().for_each(|edge| say(edge.sentence()));
        self.findings.iter().for_each(|finding| say(finding.sentence()));
        if self.choices.is_empty() {
            say("No neighbouring choice is faster.".into());
        } else {
            let one = |c: &Choice| {
                let noise = if c.is_measurable { "" } else { ", not measurable here" };
                format!(
                    "{} would take {} (−{} ± {}{noise})",
                    c.what,
                    time(c.layer_ms),
                    time(c.gain_ms),
                    time(c.spread_ms)
                )
            };
            let list: Vec<String> = self.choices.iter().map(one).collect();
            say(format!("Instead: {}.", list.join("; ")));
        }
        text
    }
}
