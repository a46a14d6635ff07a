//! What ONNX Runtime's CPU provider makes of a network: the operators that it runs, and the layout and number format of
//! every tensor between them. Predicts nothing; `predict` sums what the walk lists. Law: the list equals the optimized graph
//! of the runtime (its rules are in `nchwc_transformer.cc`, `conv_add_act_fusion.cc` and `nhwc_transformer.cc` of
//! microsoft/onnxruntime; a test in the crate `onnx` holds them to what a session really contains).

use crate::graph::{Activation, Graph, Numerics, Op, Shape, Source};
use crate::work::{
    Block, Context, ConvKey, EdgeKey, EdgeKind, ElementwiseKey, ElementwiseKind, Key, LinearKey, PlaneKey, PoolKey,
    PoolKind,
};

/// A network as far as time is concerned: our own typed graphs and those of others convert to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    pub name: String,
    pub input: Tensor,
    /// In running order.
    pub nodes: Vec<Node>,
    /// What the caller gets, as f32.
    pub outputs: Vec<Source>,
}

/// A value between operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    pub shape: Shape,
    /// A quantize/dequantize pair stands behind it.
    pub is_quantized: bool,
}

/// One operator as written, before anything fuses.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub name: String,
    pub kind: Kind,
    /// Tensors only, no weights.
    pub inputs: Vec<Source>,
    pub output: Tensor,
    /// The form that it runs in.
    pub numerics: Numerics,
    /// Multiply-adds of the whole batch.
    pub macs: u64,
    /// Bytes of weights.
    pub weight_bytes: u64,
}

/// What a node computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Conv {
        kernel: [u32; 2],
        stride: u32,
        groups: u32,
        activation: Activation,
    },
    /// A matrix product with weights; `rows` vectors of `inputs` values.
    Linear {
        rows: u32,
        inputs: u32,
        outputs: u32,
    },
    /// Sum of two tensors of one shape.
    Add(Activation),
    GlobalAvgPool,
    Pool {
        kind: PoolKind,
        kernel: u32,
        stride: u32,
    },
    /// ReLU, clip and the like: fuses into the convolution before it.
    Activation,
    /// Folds into the weights of the convolution before it.
    BatchNorm,
    /// Another function of each value.
    Elementwise(ElementwiseKind),
    Concat,
    /// Flatten, reshape, squeeze: moves nothing.
    View,
    /// A permutation of dimensions.
    Transpose,
    /// Not in the model: predicted from its bytes, and named.
    Unknown {
        op_type: String,
    },
}

/// Where a step of a walk belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The fixed cost of a call.
    Session,
    /// Node `index` itself.
    Node(usize),
    /// An edge on the way from `from` to node `to`; `None`: to the caller. Made once, for the first reader that needs it.
    Edge { from: Source, to: Option<usize> },
}

/// One thing that takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub at: At,
    pub key: Key,
}

/// The steps of one inference, and which nodes vanished into others.
#[derive(Debug, Clone, PartialEq)]
pub struct Walk {
    /// In running order.
    pub steps: Vec<Step>,
    /// By node: the node that it became a part of, if any.
    pub fused_into: Vec<Option<usize>>,
}

impl Walk {
    /// The keys, in running order.
    pub fn keys(&self) -> impl Iterator<Item = Key> + '_ {
        self.steps.iter().map(|step| step.key)
    }
}

impl From<&Graph> for Network {
    fn from(graph: &Graph) -> Self {
        let node = |(index, node): (usize, &crate::graph::Node)| {
            let input = graph.shape_of(node.inputs[0]);
            let kind = match node.op {
                Op::Conv(c) => Kind::Conv {
                    kernel: [c.kernel; 2],
                    stride: c.stride,
                    groups: c.groups,
                    activation: c.activation,
                },
                Op::Linear(l) => Kind::Linear {
                    rows: input.batch,
                    inputs: l.inputs,
                    outputs: l.outputs,
                },
                Op::Add(activation) => Kind::Add(activation),
                Op::GlobalAvgPool => Kind::GlobalAvgPool,
            };
            Node {
                name: node.name.clone(),
                kind,
                inputs: node.inputs.clone(),
                output: Tensor {
                    shape: graph.shapes()[index],
                    is_quantized: node.output.is_some(),
                },
                numerics: graph.numerics(index),
                macs: graph.node_macs(index),
                weight_bytes: node.op.bytes(),
            }
        };
        Self {
            name: graph.name().to_owned(),
            input: Tensor {
                shape: graph.input(),
                is_quantized: graph.input_quant().is_some(),
            },
            nodes: graph.nodes().iter().enumerate().map(node).collect(),
            outputs: vec![Source::Node(graph.nodes().len() - 1)],
        }
    }
}

/// The operators that a graph runs, in order, session and edges included: `predict` sums exactly these.
pub fn operators(graph: &Graph, threads: u32, block: Block) -> Vec<Key> {
    walk(&Network::from(graph), threads, block).keys().collect()
}

/// How a tensor lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// f32, NCHW.
    Plain,
    /// f32, channels in blocks.
    Blocked,
    /// u8, NHWC.
    Int8,
    /// u8, NCHW.
    Int8Plain,
}

/// The forms in which a tensor exists by now.
#[derive(Debug, Clone, Copy, Default)]
struct Forms([bool; 4]);

impl Forms {
    fn only(form: Form) -> Self {
        let mut forms = Self::default();
        forms.0[form as usize] = true;
        forms
    }

    fn has(self, form: Form) -> bool {
        self.0[form as usize]
    }
}

struct Walker<'a> {
    network: &'a Network,
    threads: u32,
    block: Block,
    /// Of the input, then of each node.
    forms: Vec<Forms>,
    /// How many nodes and callers read a tensor.
    uses: Vec<usize>,
    steps: Vec<Step>,
    /// The node whose result stands for this one's.
    fused_into: Vec<Option<usize>>,
    /// By convolution: another node has become a part of it already, so that a sum cannot.
    has_activation: Vec<bool>,
    has_sum: Vec<bool>,
}

/// Lists what runs. `block` is the machine's, see [`crate::identity::Identity::block`].
pub fn walk(network: &Network, threads: u32, block: Block) -> Walk {
    let count = network.nodes.len();
    let mut uses = vec![0; count + 1];
    let readers = network.nodes.iter().flat_map(|n| &n.inputs).chain(&network.outputs);
    readers.for_each(|&source| uses[slot(source)] += 1);
    let mut walker = Walker {
        network,
        threads,
        block,
        forms: vec![Forms::default(); count + 1],
        uses,
        steps: vec![Step {
            at: At::Session,
            key: Key::Session { threads },
        }],
        fused_into: vec![None; count],
        has_activation: vec![false; count],
        has_sum: vec![false; count],
    };
    walker.forms[0] = Forms::only(Form::Plain);
    walker.settle(Source::Input, network.input);
    // Sums and activations join the convolution before them: known before that convolution runs.
    for index in 0..count {
        walker.fuse(index);
    }
    for index in 0..count {
        walker.node(index);
    }
    for &source in &network.outputs {
        walker.need(source, Form::Plain, None);
    }
    Walk {
        steps: walker.steps,
        fused_into: walker.fused_into,
    }
}

fn slot(source: Source) -> usize {
    match source {
        Source::Input => 0,
        Source::Node(index) => index + 1,
    }
}

impl Walker<'_> {
    fn tensor(&self, source: Source) -> Tensor {
        match source {
            Source::Input => self.network.input,
            Source::Node(index) => self.network.nodes[index].output,
        }
    }

    /// A tensor's place, past nodes that became part of another.
    fn home(&self, source: Source) -> Source {
        let mut at = source;
        while let Source::Node(index) = at
            && let Some(into) = self.fused_into[index]
        {
            at = Source::Node(into);
        }
        at
    }

    /// Whether a node becomes part of the convolution that feeds it.
    fn fuse(&mut self, index: usize) {
        let node = &self.network.nodes[index];
        // The convolution behind one of the inputs, if nobody else reads it.
        let conv = |source: Source| {
            let Source::Node(from) = source else { return None };
            let Source::Node(home) = self.home(source) else {
                return None;
            };
            let producer = &self.network.nodes[home];
            let fits = matches!(producer.kind, Kind::Conv { .. }) && self.uses[slot(Source::Node(from))] == 1;
            fits.then_some(home)
        };
        let after_add = |source: Source| {
            let Source::Node(from) = source else { return None };
            let alone = self.uses[slot(source)] == 1;
            (alone && matches!(self.network.nodes[from].kind, Kind::Add(Activation::None))).then_some(from)
        };
        match node.kind {
            Kind::BatchNorm => {
                let before = conv(node.inputs[0]).filter(|&c| !self.has_activation[c] && !self.has_sum[c]);
                self.fused_into[index] = before;
            }
            Kind::Activation => {
                if let Some(c) = conv(node.inputs[0]).filter(|&c| !self.activated(c)) {
                    self.has_activation[c] = true;
                    self.fused_into[index] = Some(c);
                } else if node.numerics == Numerics::Int8 {
                    // The range of the codes does it.
                    if let Source::Node(from) = node.inputs[0] {
                        self.fused_into[index] = Some(from);
                    }
                } else if let Some(sum) = after_add(node.inputs[0])
                    && let Some(c) = self.fused_into[sum]
                    && !self.activated(c)
                {
                    self.has_activation[c] = true;
                    self.fused_into[index] = Some(c);
                }
            }
            Kind::Add(activation) if node.numerics == Numerics::F32 => {
                let [a, b] = node.inputs[..] else { return };
                let free = |source| conv(source).filter(|&c| !self.activated(c) && !self.has_sum[c]);
                // The sum becomes an input of the convolution: the other tensor must be there before it runs.
                let earlier = |other: Source, c: usize| slot(self.home(other)) <= c;
                let first = free(a).filter(|&c| earlier(b, c));
                let into = first.or_else(|| free(b).filter(|&c| earlier(a, c)));
                if let Some(c) = into {
                    self.has_sum[c] = true;
                    self.has_activation[c] = activation == Activation::Relu;
                    self.fused_into[index] = Some(c);
                }
            }
            Kind::Conv { .. }
            | Kind::Add(_)
            | Kind::Linear { .. }
            | Kind::GlobalAvgPool
            | Kind::Pool { .. }
            | Kind::Elementwise(_)
            | Kind::Concat
            | Kind::View
            | Kind::Transpose
            | Kind::Unknown { .. } => {}
        }
    }

    fn activated(&self, conv: usize) -> bool {
        let own = matches!(
            self.network.nodes[conv].kind,
            Kind::Conv {
                activation: Activation::Relu,
                ..
            }
        );
        own || self.has_activation[conv]
    }

    /// The sum that became part of convolution `index`: its other tensor.
    fn sum_of(&self, index: usize) -> Option<(usize, Source)> {
        if !self.has_sum[index] {
            return None;
        }
        let nodes = self.network.nodes.iter().enumerate();
        let mut sums = nodes.filter(|(i, n)| self.fused_into[*i] == Some(index) && matches!(n.kind, Kind::Add(_)));
        let (at, sum) = sums.next()?;
        let mine = |source: &&Source| self.home(**source) != Source::Node(index);
        // The convolution may not be asked about itself: before fusing, its own output was the other input.
        let other = sum.inputs.iter().find(mine).copied()?;
        Some((at, other))
    }

    /// Whether all of these lie in blocks of whole channels.
    fn all_blocked(&self, inputs: &[Source]) -> bool {
        inputs
            .iter()
            .all(|&s| self.forms[slot(self.home(s))].has(Form::Blocked))
    }

    fn whole_blocks(&self, channels: u32) -> bool {
        channels.is_multiple_of(self.block.0)
    }

    fn push(&mut self, index: usize, key: Key) {
        self.steps.push(Step {
            at: At::Node(index),
            key,
        });
    }

    /// Makes sure that a tensor exists in a form, by the edges that it takes.
    fn need(&mut self, source: Source, form: Form, to: Option<usize>) {
        let home = self.home(source);
        let forms = self.forms[slot(home)];
        if forms.has(form) {
            return;
        }
        let (before, kind) = match form {
            Form::Blocked => (Form::Plain, EdgeKind::ReorderIn),
            Form::Plain if forms.has(Form::Blocked) => (Form::Blocked, EdgeKind::ReorderOut),
            Form::Plain => (Form::Int8Plain, EdgeKind::Dequantize),
            Form::Int8 => (Form::Int8Plain, EdgeKind::TransposeInt8),
            Form::Int8Plain if forms.has(Form::Int8) => (Form::Int8, EdgeKind::TransposeInt8),
            Form::Int8Plain => (Form::Plain, EdgeKind::Quantize),
        };
        self.need(source, before, to);
        let shape = self.tensor(source).shape;
        self.steps.push(Step {
            at: At::Edge { from: source, to },
            key: Key::Edge(EdgeKey {
                kind,
                batch: shape.batch,
                channels: shape.channels,
                height: shape.height,
                width: shape.width,
                threads: self.threads,
            }),
        });
        self.forms[slot(home)].0[form as usize] = true;
    }

    /// An f32 tensor with a quantize/dequantize pair behind it: all that read it see codes.
    fn settle(&mut self, source: Source, tensor: Tensor) {
        let home = slot(self.home(source));
        let is_float = self.forms[home].has(Form::Plain) || self.forms[home].has(Form::Blocked);
        if tensor.is_quantized && is_float {
            self.need(source, Form::Int8Plain, None);
            self.forms[home] = Forms::only(Form::Int8Plain);
        }
    }

    fn node(&mut self, index: usize) {
        let node = &self.network.nodes[index];
        if self.fused_into[index].is_some() {
            // Its result is the convolution's; a pair behind it counts once it is complete.
            if !matches!(self.home(Source::Node(index)), Source::Node(home) if self.is_int8(home)) {
                self.settle(Source::Node(index), node.output);
            }
            return;
        }
        let int8 = node.numerics == Numerics::Int8;
        let form = match &node.kind {
            Kind::Conv {
                kernel, stride, groups, ..
            } => self.conv(index, *kernel, *stride, *groups),
            Kind::Linear { rows, inputs, outputs } => {
                let form = if int8 { Form::Int8Plain } else { Form::Plain };
                let flat = node.inputs[0];
                self.need(flat, form, Some(index));
                // The exporter writes Flatten before Gemm.
                if self.tensor(flat).shape.channels == *inputs
                    || self.tensor(flat).shape.elements_per_sample() == u64::from(*inputs)
                {
                    self.view(index, flat);
                }
                self.push(
                    index,
                    Key::Linear(LinearKey {
                        batch: *rows,
                        inputs: *inputs,
                        outputs: *outputs,
                        numerics: node.numerics,
                        threads: self.threads,
                    }),
                );
                form
            }
            Kind::Add(activation) => self.add(index, *activation),
            Kind::GlobalAvgPool => {
                let shape = self.tensor(node.inputs[0]).shape;
                let form = self.pool_form(index, shape);
                self.push(index, Key::GlobalAvgPool(self.plane(shape, node.numerics)));
                form
            }
            Kind::Pool { kind, kernel, stride } => {
                let shape = self.tensor(node.inputs[0]).shape;
                let form = self.pool_form(index, shape);
                let out = node.output.shape;
                let key = PoolKey {
                    kind: *kind,
                    batch: shape.batch,
                    channels: shape.channels,
                    kernel: *kernel,
                    stride: *stride,
                    height: same_height(shape.height, *stride, out.height),
                    width: same_height(shape.width, *stride, out.width),
                    numerics: node.numerics,
                    threads: self.threads,
                };
                self.push(index, Key::Pool(key));
                form
            }
            Kind::Activation => self.elementwise(index, ElementwiseKind::Unary),
            Kind::BatchNorm => self.elementwise(index, ElementwiseKind::Unary),
            Kind::Elementwise(kind) => self.elementwise(index, *kind),
            Kind::Concat => self.concat(index),
            Kind::View => {
                let source = node.inputs[0];
                let form = if int8 { Form::Int8Plain } else { Form::Plain };
                self.need(source, form, Some(index));
                self.view(index, source);
                form
            }
            Kind::Transpose => {
                let (form, kind) = if int8 {
                    (Form::Int8Plain, EdgeKind::TransposeInt8)
                } else {
                    (Form::Plain, EdgeKind::TransposeF32)
                };
                self.need(node.inputs[0], form, Some(index));
                let shape = node.output.shape;
                let key = EdgeKey {
                    kind,
                    batch: shape.batch,
                    channels: shape.channels,
                    height: shape.height,
                    width: shape.width,
                    threads: self.threads,
                };
                self.push(index, Key::Edge(key));
                form
            }
            Kind::Unknown { .. } => {
                for &source in &node.inputs {
                    self.need(source, Form::Plain, Some(index));
                }
                let kind = if node.inputs.len() > 1 {
                    ElementwiseKind::Binary
                } else {
                    ElementwiseKind::Unary
                };
                self.push(index, self.pass(node.output.shape, kind, Numerics::F32));
                Form::Plain
            }
        };
        self.forms[index + 1] = Forms::only(form);
        // A pair behind a node that others joined belongs to the last of them.
        let joined = self.fused_into.contains(&Some(index));
        if !joined || int8 {
            self.settle(Source::Node(index), node.output);
        }
    }

    fn is_int8(&self, index: usize) -> bool {
        self.network.nodes[index].numerics == Numerics::Int8
    }

    /// A node that only renames dimensions.
    fn view(&mut self, index: usize, source: Source) {
        let shape = self.tensor(source).shape;
        let key = EdgeKey {
            kind: EdgeKind::View,
            batch: shape.batch,
            channels: shape.channels,
            height: shape.height,
            width: shape.width,
            threads: self.threads,
        };
        self.push(index, Key::Edge(key));
    }

    fn plane(&self, shape: Shape, numerics: Numerics) -> PlaneKey {
        PlaneKey {
            batch: shape.batch,
            channels: shape.channels,
            height: shape.height,
            width: shape.width,
            numerics,
            threads: self.threads,
        }
    }

    fn pass(&self, shape: Shape, kind: ElementwiseKind, numerics: Numerics) -> Key {
        Key::Elementwise(ElementwiseKey {
            kind,
            batch: shape.batch,
            channels: shape.channels,
            height: shape.height,
            width: shape.width,
            numerics,
            threads: self.threads,
        })
    }

    fn conv(&mut self, index: usize, kernel: [u32; 2], stride: u32, groups: u32) -> Form {
        let node = &self.network.nodes[index];
        let (input, output) = (self.tensor(node.inputs[0]).shape, node.output.shape);
        let key = ConvKey {
            batch: input.batch,
            cin: input.channels,
            cout: output.channels,
            kernel: square(kernel),
            stride,
            groups,
            height: same_height(input.height, stride, output.height),
            width: same_height(input.width, stride, output.width),
            numerics: node.numerics,
            threads: self.threads,
            context: Context::Chain,
        };
        let (reads, writes) = self.conv_forms(&key);
        self.need(node.inputs[0], reads, Some(index));
        let sum = self.sum_of(index);
        if let Some((_, other)) = sum {
            self.need(other, writes, Some(index));
        }
        self.push(index, Key::Conv(key));
        if let Some((at, _)) = sum {
            let plane = self.plane(output, Numerics::F32);
            self.push(at, Key::Add(plane));
        }
        writes
    }

    /// What a convolution reads and writes (reference 2.5).
    fn conv_forms(&self, key: &ConvKey) -> (Form, Form) {
        let block = self.block.0;
        let depthwise = key.groups > 1 && key.groups == key.cin && key.groups == key.cout;
        let per_group = (key.cin / key.groups, key.cout / key.groups);
        match key.numerics {
            Numerics::Int8 => (Form::Int8, Form::Int8),
            Numerics::F32 if key.groups > 1 => {
                let whole = per_group.0.is_multiple_of(block) && per_group.1.is_multiple_of(block);
                if key.cout.is_multiple_of(4) && (depthwise || whole) {
                    (Form::Blocked, Form::Blocked)
                } else {
                    (Form::Plain, Form::Plain)
                }
            }
            Numerics::F32 if key.cin < block => (Form::Plain, Form::Blocked),
            Numerics::F32 if key.cin.is_multiple_of(4) => (Form::Blocked, Form::Blocked),
            Numerics::F32 => (Form::Plain, Form::Plain),
        }
    }

    fn add(&mut self, index: usize, activation: Activation) -> Form {
        let node = &self.network.nodes[index];
        if node.numerics == Numerics::Int8 {
            for &source in &node.inputs {
                self.need(source, Form::Int8, Some(index));
            }
            let plane = self.plane(node.output.shape, Numerics::Int8);
            self.push(index, Key::Add(plane));
            return Form::Int8;
        }
        let form = self.elementwise(index, ElementwiseKind::Binary);
        if activation == Activation::Relu {
            self.push(
                index,
                self.pass(node.output.shape, ElementwiseKind::Unary, Numerics::F32),
            );
        }
        form
    }

    /// A pass that keeps the layout of its inputs: blocks when all of them lie in blocks.
    fn elementwise(&mut self, index: usize, kind: ElementwiseKind) -> Form {
        let node = &self.network.nodes[index];
        let form = match node.numerics {
            Numerics::Int8 if kind == ElementwiseKind::Binary => Form::Int8,
            Numerics::Int8 => Form::Int8Plain,
            Numerics::F32 if self.all_blocked(&node.inputs) => Form::Blocked,
            Numerics::F32 => Form::Plain,
        };
        for &source in &node.inputs {
            self.need(source, form, Some(index));
        }
        self.push(index, self.pass(node.output.shape, kind, node.numerics));
        form
    }

    fn concat(&mut self, index: usize) -> Form {
        let node = &self.network.nodes[index];
        let whole = node
            .inputs
            .iter()
            .all(|&s| self.whole_blocks(self.tensor(s).shape.channels));
        let form = match node.numerics {
            Numerics::Int8 => Form::Int8,
            Numerics::F32 if whole && self.all_blocked(&node.inputs) => Form::Blocked,
            Numerics::F32 => Form::Plain,
        };
        for &source in &node.inputs {
            self.need(source, form, Some(index));
        }
        self.push(
            index,
            self.pass(node.output.shape, ElementwiseKind::Concat, node.numerics),
        );
        form
    }

    /// Pools work on blocks when their channels fill them.
    fn pool_form(&mut self, index: usize, shape: Shape) -> Form {
        let node = &self.network.nodes[index];
        let form = match node.numerics {
            Numerics::Int8 => Form::Int8,
            Numerics::F32 if self.whole_blocks(shape.channels) => Form::Blocked,
            Numerics::F32 => Form::Plain,
        };
        self.need(node.inputs[0], form, Some(index));
        form
    }
}

/// The side of a square kernel with as many taps.
fn square(kernel: [u32; 2]) -> u32 {
    let taps = f64::from(kernel[0]) * f64::from(kernel[1]);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the root of two u32 factors"
    )]
    let side = taps.sqrt().round() as u32;
    side.max(1)
}

/// The input height that gives this output with "same" padding: the input's own where it does.
fn same_height(input: u32, stride: u32, output: u32) -> u32 {
    if input.div_ceil(stride.max(1)) == output {
        input
    } else {
        output.saturating_mul(stride.max(1))
    }
}
