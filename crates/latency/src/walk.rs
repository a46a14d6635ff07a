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
    /// A mean or sum over dimensions by another operator: never blocked, never int8.
    Reduce,
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
    /// A further input of the network: there when the call begins, and reads nothing.
    Input,
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
    /// Of the input, then of each node: the form that its operator wrote, and all that it exists in by now.
    native: Vec<Form>,
    forms: Vec<Forms>,
    /// How many nodes and callers read a tensor.
    uses: Vec<usize>,
    steps: Vec<Step>,
    /// The node whose result stands for this one's.
    fused_into: Vec<Option<usize>>,
    /// By convolution: what has become a part of it.
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
        native: vec![Form::Plain; count + 1],
        forms: vec![Forms::only(Form::Plain); count + 1],
        uses,
        steps: vec![Step {
            at: At::Session,
            key: Key::Session { threads },
        }],
        fused_into: vec![None; count],
        has_activation: vec![false; count],
        has_sum: vec![false; count],
    };
    for index in 0..count {
        if let Some(home) = walker.fuses(index) {
            walker.fused_into[index] = Some(home);
        } else {
            let form = walker.node(index);
            walker.native[index + 1] = form;
            walker.forms[index + 1] = Forms::only(form);
        }
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

    /// The form that a tensor's operator wrote: what comes by a reorder does not make its other readers blocked.
    fn native(&self, source: Source) -> Form {
        if self.tensor(source).is_quantized && self.native[slot(self.home(source))] == Form::Blocked {
            return Form::Int8Plain;
        }
        self.native[slot(self.home(source))]
    }

    /// The f32 convolution whose result a tensor is, if nobody else reads it.
    fn sole_conv(&self, source: Source) -> Option<usize> {
        let Source::Node(home) = self.home(source) else {
            return None;
        };
        let node = &self.network.nodes[home];
        let is_conv = matches!(node.kind, Kind::Conv { .. }) && node.numerics == Numerics::F32;
        (is_conv && self.uses[slot(source)] == 1 && !self.tensor(source).is_quantized).then_some(home)
    }

    /// The node that this one becomes a part of, with what that adds to it.
    fn fuses(&mut self, index: usize) -> Option<usize> {
        let node = &self.network.nodes[index];
        match node.kind {
            Kind::BatchNorm => self
                .sole_conv(node.inputs[0])
                .filter(|&c| !self.activated(c) && !self.has_sum[c]),
            // The range of the codes does it.
            Kind::Activation if node.numerics == Numerics::Int8 => match node.inputs[0] {
                Source::Node(from) => Some(from),
                Source::Input => None,
            },
            Kind::Activation => {
                let conv = self.sole_conv(node.inputs[0]).filter(|&c| !self.activated(c))?;
                self.has_activation[conv] = true;
                Some(conv)
            }
            Kind::Add(activation) if node.numerics == Numerics::F32 => {
                let [a, b] = node.inputs[..] else { return None };
                let (conv, other) = self.sum_host(a, b).or_else(|| self.sum_host(b, a))?;
                // In a plain convolution the other tensor must be plain too.
                self.need(other, self.native[conv + 1], Some(index));
                self.has_sum[conv] = true;
                self.has_activation[conv] = activation == Activation::Relu;
                self.push(index, Key::Add(self.plane(node.output.shape, Numerics::F32)));
                Some(conv)
            }
            Kind::Add(_)
            | Kind::Conv { .. }
            | Kind::Linear { .. }
            | Kind::GlobalAvgPool
            | Kind::Reduce
            | Kind::Pool { .. }
            | Kind::Elementwise(_)
            | Kind::Concat
            | Kind::View
            | Kind::Transpose
            | Kind::Input
            | Kind::Unknown { .. } => None,
        }
    }

    /// The convolution behind `host`, if the sum with `other` can become a part of it: both blocked, or it is plain.
    fn sum_host(&self, host: Source, other: Source) -> Option<(usize, Source)> {
        let conv = self
            .sole_conv(host)
            .filter(|&c| !self.activated(c) && !self.has_sum[c])?;
        let same_shape = self.tensor(host).shape == self.tensor(other).shape;
        let fits = self.native(host) == Form::Plain || self.native(other) == Form::Blocked;
        (fits && same_shape).then_some((conv, other))
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

    fn all_blocked(&self, inputs: &[Source]) -> bool {
        inputs.iter().all(|&s| self.native(s) == Form::Blocked)
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

    /// Makes sure that a tensor exists in a form, by the edges that it takes: each is made once.
    fn need(&mut self, source: Source, form: Form, to: Option<usize>) {
        let home = slot(self.home(source));
        let mut forms = self.forms[home];
        if self.tensor(source).is_quantized && !forms.has(Form::Int8) && !forms.has(Form::Int8Plain) {
            // f32 with a quantize/dequantize pair behind it: all that read it see codes.
            self.edge(source, Form::Plain, EdgeKind::ReorderOut, to);
            self.edge(source, Form::Int8Plain, EdgeKind::Quantize, to);
            forms = Forms::only(Form::Int8Plain);
            self.forms[home] = forms;
        }
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
        self.edge(source, form, kind, to);
    }

    /// Adds a form to a tensor that lacks it.
    fn edge(&mut self, source: Source, form: Form, kind: EdgeKind, to: Option<usize>) {
        let home = slot(self.home(source));
        if self.forms[home].has(form) {
            return;
        }
        let shape = self.tensor(source).shape;
        self.steps.push(Step {
            at: At::Edge { from: source, to },
            key: Key::Edge(self.edge_key(kind, shape)),
        });
        self.forms[home].0[form as usize] = true;
    }

    fn edge_key(&self, kind: EdgeKind, shape: Shape) -> EdgeKey {
        EdgeKey {
            kind,
            batch: shape.batch,
            channels: shape.channels,
            height: shape.height,
            width: shape.width,
            threads: self.threads,
        }
    }

    /// Lists what a node that stands for itself takes, and says in which form it writes.
    fn node(&mut self, index: usize) -> Form {
        let node = &self.network.nodes[index];
        let int8 = node.numerics == Numerics::Int8;
        let plain = if int8 { Form::Int8Plain } else { Form::Plain };
        match &node.kind {
            Kind::Conv {
                kernel, stride, groups, ..
            } => self.conv(index, *kernel, *stride, *groups),
            Kind::Linear { rows, inputs, outputs } => {
                let from = node.inputs[0];
                self.need(from, plain, Some(index));
                // A tensor of more than two dimensions is flattened first: our exporter always writes that.
                if self.tensor(from).shape.elements_per_sample() == u64::from(*inputs) {
                    self.view(index, from);
                }
                let key = LinearKey {
                    batch: *rows,
                    inputs: *inputs,
                    outputs: *outputs,
                    numerics: node.numerics,
                    threads: self.threads,
                };
                self.push(index, Key::Linear(key));
                // The last layer may give f32 itself.
                if node.output.is_quantized { plain } else { Form::Plain }
            }
            Kind::Add(activation) => self.add(index, *activation),
            Kind::GlobalAvgPool => {
                let shape = self.tensor(node.inputs[0]).shape;
                // Unlike windows, it never has its input blocked for it.
                let form = if !int8 && self.native(node.inputs[0]) != Form::Blocked {
                    self.need(node.inputs[0], Form::Plain, Some(index));
                    Form::Plain
                } else {
                    self.pool_form(index, shape)
                };
                self.push(index, Key::GlobalAvgPool(self.plane(shape, node.numerics)));
                form
            }
            Kind::Input => Form::Plain,
            Kind::Reduce => {
                self.need(node.inputs[0], Form::Plain, Some(index));
                let shape = self.tensor(node.inputs[0]).shape;
                self.push(index, self.pass(shape, ElementwiseKind::Unary, Numerics::F32));
                Form::Plain
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
            Kind::Activation | Kind::BatchNorm => self.elementwise(index, ElementwiseKind::Unary),
            Kind::Elementwise(kind) => self.elementwise(index, *kind),
            Kind::Concat => self.concat(index),
            Kind::View => {
                let from = node.inputs[0];
                self.need(from, plain, Some(index));
                self.view(index, from);
                plain
            }
            Kind::Transpose => {
                let kind = if int8 {
                    EdgeKind::TransposeInt8
                } else {
                    EdgeKind::TransposeF32
                };
                self.need(node.inputs[0], plain, Some(index));
                self.push(index, Key::Edge(self.edge_key(kind, node.output.shape)));
                plain
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
        }
    }

    /// A node that only renames dimensions.
    fn view(&mut self, index: usize, source: Source) {
        let shape = self.tensor(source).shape;
        self.push(index, Key::Edge(self.edge_key(EdgeKind::View, shape)));
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
        self.push(index, Key::Conv(key));
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
        // A factor per channel is no blocked operand.
        let equal = node.inputs.iter().all(|&s| self.tensor(s).shape == node.output.shape);
        let form = match node.numerics {
            Numerics::Int8 if kind == ElementwiseKind::Binary => Form::Int8,
            Numerics::Int8 => Form::Int8Plain,
            Numerics::F32 if self.all_blocked(&node.inputs) && equal => Form::Blocked,
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
        let from = self.native(node.inputs[0]);
        let form = match node.numerics {
            Numerics::Int8 if from == Form::Int8Plain => Form::Int8Plain,
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
