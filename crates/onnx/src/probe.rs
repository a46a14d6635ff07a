//! CNN operators in ONNX Runtime, timed as parts of networks: what one more copy adds. Shape-preserving convolutions stand in
//! a chain; others fan out from one tensor, each into a pool whose own cost is measured beside it and taken off. Decides
//! nothing about rounds and slices: that is the gathering loop's.

use std::collections::BTreeMap;

use cotk_latency::graph::{
    Activation, Conv, Graph, Linear, Node, Numerics, Op, RawGraph, Shape, Source, WeightBits, Weights,
};
use cotk_latency::probe::{Prepared, Probe, refused};
use cotk_latency::walk;
use cotk_latency::work::{
    Block, Context, ConvKey, EdgeKey, EdgeKind, ElementwiseKind, Family, Key, LowRankKey, PlaneKey,
};
use cotk_run::seeds::{Seeds, Stream};
use ort::value::Tensor;

use crate::session::Session;
use crate::write::to_onnx_with_outputs;
use crate::zoo::{RELU, SIGNED, random_weights, uniform};
use crate::{Error, Result};

mod draw;
mod passes;

/// Copies in the long model; the short one has 1.
const COPIES: usize = 5;

/// Times sessions, convolutions, triples, linear layers, sums, pools, entries and edges.
#[derive(Debug, Clone)]
pub struct OnnxProbe {
    seeds: Vec<Key>,
    block: Block,
    /// Numbers of threads that draws have.
    threads: Vec<u32>,
}

impl OnnxProbe {
    /// Measures `seeds` (the operators of the networks at hand) first, then draws convolutions like them. `block` is the
    /// machine's, see [`cotk_latency::identity::Identity::block`].
    ///
    /// # Errors
    /// [`Error::NoLibrary`] and [`Error::Load`] at once, not after minutes.
    pub fn new(mut seeds: Vec<Key>, block: Block) -> Result<Self> {
        crate::runtime::library()?;
        let mut seen = std::collections::HashSet::new();
        seeds.retain(|key| is_ours(key) && seen.insert(*key));
        Ok(Self {
            seeds,
            block,
            threads: vec![1],
        })
    }

    /// Draws keys with these numbers of threads, the first one mostly.
    #[must_use]
    pub fn with_threads(self, threads: Vec<u32>) -> Self {
        Self { threads, ..self }
    }

    /// `per_path` keys of every path and kernel size with so many threads, over all sizes; seeds count.
    fn spread_of(&self, threads_each: u32, per_path: usize, rng: &mut Stream) -> Vec<Key> {
        let only = [threads_each];
        let mut draw = draw::Draw::new(&self.seeds, self.block, &only, rng);
        let mut counts: std::collections::HashMap<(Family, u32), usize> = std::collections::HashMap::new();
        let stratum = |key: &Key| {
            let kernel = if let Key::Conv(c) = key { c.kernel } else { 0 };
            (key.path(self.block).family, kernel)
        };
        let mut keys: Vec<Key> = Vec::new();
        let is_chain = |key: &&Key| threads(key) == threads_each && !is_alone(key);
        for seed in self.seeds.iter().filter(is_chain) {
            *counts.entry(stratum(seed)).or_default() += 1;
        }
        for _ in 0..400 * per_path {
            let key = draw.key();
            let wanted = match key {
                // Never fitted: their own times and those of their neighbours are all that is known.
                Key::LowRank(_) => 2 * per_path,
                _ => per_path,
            };
            let count = counts.entry(stratum(&key)).or_default();
            if is_ours(&key) && *count < wanted && !keys.contains(&key) && !self.seeds.contains(&key) {
                *count += 1;
                keys.push(key);
            }
        }
        keys
    }

    /// What the long model of a key has more than its short one, by operator of the optimized graph: the kernels that its
    /// time is the sum of. Empty for a key that is no slope.
    ///
    /// # Errors
    /// As [`Probe::prepare`].
    pub fn added(&self, key: &Key) -> Result<BTreeMap<String, i64>> {
        let mut counts = BTreeMap::<String, i64>::new();
        for ((_, model), sign) in self.models(key)?.into_iter().zip([1, -1]) {
            for (_, op, _) in crate::session::optimized_operators("probe", &model.bytes(0)?)? {
                *counts.entry(op).or_default() += sign;
            }
        }
        counts.retain(|_, count| *count != 0);
        Ok(counts)
    }

    /// Number of seed keys.
    pub fn seeds(&self) -> usize {
        self.seeds.len()
    }
}

fn is_ours(key: &Key) -> bool {
    match key {
        Key::Session { .. } | Key::Conv(_) | Key::Linear(_) | Key::LowRank(_) => true,
        Key::Add(_) | Key::GlobalAvgPool(_) | Key::Entry(_) => true,
        // Others stand beside an operator in whatever network they are in: whole networks say what they take.
        Key::Edge(e) => match e.kind {
            EdgeKind::ReorderIn | EdgeKind::Quantize => true,
            EdgeKind::ReorderOut => e.channels.is_multiple_of(4) && e.channels >= 16,
            EdgeKind::Dequantize => true,
            // Of channels that stay in a region of codes.
            EdgeKind::TransposeInt8 => e.channels.is_multiple_of(4) && e.channels >= 16,
            EdgeKind::TransposeF32 | EdgeKind::View => false,
        },
        // In a chain: a stride would change the shape.
        Key::Pool(p) => p.numerics == Numerics::F32 && p.stride == 1,
        Key::Elementwise(e) => e.numerics == Numerics::F32 && e.kind != ElementwiseKind::Concat,
        Key::Expert(_) | Key::Dense(_) | Key::Attention(_) | Key::Glue(_) | Key::Read(_) => false,
    }
}

/// Whether a key is timed as one call, not as what one more copy adds.
fn is_alone(key: &Key) -> bool {
    match key {
        Key::Session { .. } => true,
        Key::Conv(c) => c.context == Context::Alone,
        _ => false,
    }
}

/// Cores that a key keeps busy.
fn threads(key: &Key) -> u32 {
    match *key {
        Key::Session { threads } => threads,
        Key::Conv(c) => c.threads,
        Key::Linear(l) => l.threads,
        Key::Add(p) | Key::GlobalAvgPool(p) | Key::Entry(p) => p.threads,
        Key::Edge(e) => e.threads,
        Key::LowRank(l) => l.conv.threads,
        Key::Pool(p) => p.threads,
        Key::Elementwise(e) => e.threads,
        Key::Expert(_) | Key::Dense(_) | Key::Attention(_) | Key::Glue(_) | Key::Read(_) => 1,
    }
}

impl Probe for OnnxProbe {
    fn name(&self) -> &str {
        "onnx"
    }

    fn candidates(&self, count: usize, rng: &mut Stream) -> Vec<Key> {
        let mut keys: Vec<Key> = self.seeds.iter().copied().take(count).collect();
        let mut draw = draw::Draw::new(&self.seeds, self.block, &self.threads, rng);
        let mut seen: std::collections::HashSet<Key> = keys.iter().copied().collect();
        let mut tries = 0;
        while keys.len() < count && tries < 100 * count {
            tries += 1;
            let key = draw.key();
            if is_ours(&key) && seen.insert(key) {
                keys.push(key);
            }
        }
        keys
    }

    fn measures(&self, key: &Key) -> bool {
        is_ours(key)
    }

    /// For one thread; half as many for several, of which more is known by what they share with one.
    fn spread(&self, per_path: usize, rng: &mut Stream) -> Vec<Key> {
        let mut keys: Vec<Key> = Vec::new();
        for (at, &count) in self.threads.iter().enumerate() {
            let per_path = if at == 0 { per_path } else { per_path / 2 };
            keys.extend(self.spread_of(count, per_path, rng));
        }
        keys
    }

    fn is_slope(&self, key: &Key) -> bool {
        !is_alone(key)
    }

    fn parts(&self, key: &Key) -> cotk_latency::Result<Vec<(Key, f64)>> {
        let fail = |e: Error| refused("onnx", key, &e.to_string());
        let mut parts: BTreeMap<Key, f64> = BTreeMap::new();
        for (weight, model) in self.models(key).map_err(fail)? {
            // A chain of passes is passes alone; what is timed alone stands for itself, session and edges included.
            let chain = match model {
                Model::Chain(chain) => chain,
                Model::Known { each, copies, .. } => {
                    #[expect(clippy::cast_precision_loss, reason = "a handful of copies")]
                    let times = weight * copies as f64;
                    *parts.entry(each).or_default() += times;
                    continue;
                }
                Model::Pass(_) => return Ok(vec![(*key, 1.0)]),
            };
            let graph = chain.graph().map_err(fail)?;
            let mut network = walk::Network::from(&graph);
            network.outputs = chain.outputs.iter().map(|&at| Source::Node(at)).collect();
            for part in walk::walk(&network, threads(key), self.block).keys() {
                *parts.entry(part).or_default() += weight;
            }
        }
        if is_alone(key) {
            return Ok(vec![(*key, 1.0)]);
        }
        parts.retain(|_, weight| weight.abs() > 1e-9);
        Ok(parts.into_iter().collect())
    }

    fn prepare(&self, key: &Key, session: u32) -> cotk_latency::Result<Box<dyn Prepared>> {
        let models = self.models(key).map_err(|e| refused("onnx", key, &e.to_string()))?;
        let threads = threads(key);
        let open = |(weight, model): (f64, Model)| -> Result<(f64, Session, Tensor<f32>)> {
            let bytes = model.bytes(u64::from(session))?;
            let session = Session::from_bytes("probe", &bytes, threads as usize)?;
            let input = uniform(session.input_len(), 1.0, &mut Seeds::new(1).stream("input"));
            let input = session.input(&input)?;
            Ok((weight, session, input))
        };
        let pieces: Result<Vec<_>> = models.into_iter().map(open).collect();
        let pieces = pieces.map_err(|e| refused("onnx", key, &e.to_string()))?;
        Ok(Box::new(Pieces {
            key: *key,
            threads,
            pieces,
        }))
    }
}

struct Pieces {
    key: Key,
    threads: u32,
    pieces: Vec<(f64, Session, Tensor<f32>)>,
}

impl Prepared for Pieces {
    fn weights(&self) -> Vec<f64> {
        self.pieces.iter().map(|p| p.0).collect()
    }

    fn threads(&self) -> u32 {
        self.threads
    }

    fn run(&mut self, piece: usize) -> cotk_latency::Result<()> {
        let (_, session, input) = &mut self.pieces[piece];
        session
            .call(input)
            .map_err(|e| refused("onnx", &self.key, &e.to_string()))
    }
}

/// One thing that runs as a piece of a key.
enum Model {
    Chain(Chain),
    /// An ONNX file.
    Pass(Vec<u8>),
    /// An ONNX file with so many copies of an operator, and else what a file of another number of copies has too.
    Known {
        bytes: Vec<u8>,
        each: Key,
        copies: usize,
    },
}

impl Model {
    fn bytes(self, seed: u64) -> Result<Vec<u8>> {
        match self {
            Self::Chain(chain) => chain.bytes(seed),
            Self::Pass(bytes) | Self::Known { bytes, .. } => Ok(bytes),
        }
    }
}

/// A graph under construction whose listed nodes are outputs.
struct Chain {
    input: Shape,
    numerics: Numerics,
    nodes: Vec<Node>,
    outputs: Vec<usize>,
}

/// Slope and intercept of a family of models in its number of copies.
struct Line(Box<dyn Fn(usize) -> Model>);

impl Line {
    /// What one more copy adds, `times` over.
    #[expect(clippy::cast_precision_loss, reason = "a handful of copies")]
    fn slope(&self, times: f64) -> [(f64, Model); 2] {
        let per_copy = times / (COPIES - 1) as f64;
        [(per_copy, (self.0)(COPIES)), (-per_copy, (self.0)(1))]
    }
}

impl OnnxProbe {
    /// Whether one more copy in a chain is one more operator and nothing else. Few f32 channels are read unblocked and
    /// written blocked: between two such there is a reorder.
    fn chains(&self, c: &ConvKey) -> bool {
        let reorders = c.numerics == Numerics::F32 && c.groups == 1 && c.cin < self.block.0;
        c.cin == c.cout && c.stride == 1 && !reorders
    }

    fn models(&self, key: &Key) -> Result<Vec<(f64, Model)>> {
        Ok(match *key {
            Key::Session { .. } => vec![(1.0, empty())],
            Key::Conv(c) if c.context == Context::Alone => {
                let mut model = Chain::new(input(&c), c.numerics);
                let out = model.conv(Source::Input, op(&c));
                model.outputs = vec![out];
                vec![(1.0, Model::Chain(model))]
            }
            Key::Conv(c) if self.chains(&c) => chain(c).slope(1.0).into(),
            Key::Conv(c) => {
                let mut models: Vec<(f64, Model)> = fan(vec![c], self.block).slope(1.0).into();
                models.extend(pool_models(&pool_behind(&c), -1.0, self.block));
                models
            }
            Key::LowRank(l) if l.conv.cin == l.conv.cout && l.conv.stride == 1 => triples(l).slope(1.0).into(),
            Key::LowRank(l) => {
                let mut models: Vec<(f64, Model)> = fan(l.parts().into(), self.block).slope(1.0).into();
                models.extend(pool_models(&pool_behind(&l.conv), -1.0, self.block));
                models
            }
            Key::Pool(p) => Line(Box::new(move |copies| Model::Pass(passes::pool(&p, copies))))
                .slope(1.0)
                .into(),
            Key::Elementwise(e) => Line(Box::new(move |copies| Model::Pass(passes::elementwise(&e, copies))))
                .slope(1.0)
                .into(),
            Key::GlobalAvgPool(p) => pool_models(&p, 1.0, self.block),
            Key::Add(p) => {
                let carrier = pointwise(&p, p.channels);
                let with_sums = Line(Box::new(move |copies| {
                    let mut model = Chain::new(input(&carrier), carrier.numerics);
                    let mut x = Source::Node(model.conv(Source::Input, op(&carrier)));
                    for _ in 0..copies {
                        let mut inner = op(&carrier);
                        inner.activation = Activation::None;
                        let conv = model.conv(x, inner);
                        x = Source::Node(model.push(Op::Add(Activation::Relu), vec![Source::Node(conv), x]));
                    }
                    model.outputs = vec![model.nodes.len() - 1];
                    Model::Chain(model)
                }));
                let mut models: Vec<(f64, Model)> = with_sums.slope(1.0).into();
                models.extend(chain(carrier).slope(-1.0));
                models
            }
            Key::Linear(l) => {
                let shape = Shape {
                    batch: l.batch,
                    channels: l.inputs,
                    height: 1,
                    width: 1,
                };
                let line = Line(Box::new(move |copies| {
                    let mut model = Chain::new(shape, l.numerics);
                    for _ in 0..copies {
                        let linear = Linear {
                            inputs: l.inputs,
                            outputs: l.outputs,
                            activation: Activation::None,
                            weights: weights(l.numerics),
                        };
                        let at = model.push(Op::Linear(linear), vec![Source::Input]);
                        model.nodes[at].output = None; // the last layer gives f32
                        model.outputs.push(at);
                    }
                    Model::Chain(model)
                }));
                line.slope(1.0).into()
            }
            Key::Entry(p) => {
                // What is left of one call when its copies and its session are taken off.
                let line = fan(vec![pointwise(&p, self.block.0)], Block(u32::MAX));
                let mut models: Vec<(f64, Model)> = line.slope(-1.0).into();
                models[1].0 += 1.0;
                models.push((-1.0, empty()));
                models
            }
            Key::Edge(e) if e.kind == EdgeKind::ReorderOut => {
                let carrier = pointwise(&edge_plane(&e, Numerics::F32), e.channels);
                let mut models: Vec<(f64, Model)> = outputs(carrier, self.block).slope(1.0).into();
                models.extend(chain(carrier).slope(-1.0));
                models
            }
            Key::Edge(e) if e.kind == EdgeKind::Dequantize => dequantizers(e).slope(1.0).into(),
            Key::Edge(e) if e.kind == EdgeKind::TransposeInt8 => {
                // What a convolution's result takes to leave a region of codes, less the convolution and less making floats.
                let carrier = pointwise(&edge_plane(&e, Numerics::Int8), e.channels);
                let mut models: Vec<(f64, Model)> = outputs(carrier, self.block).slope(1.0).into();
                models.extend(chain(carrier).slope(-1.0));
                models.extend(dequantizers(e).slope(-1.0));
                models
            }
            Key::Edge(e) if is_ours(key) => {
                let numerics = if e.kind == EdgeKind::Quantize {
                    Numerics::Int8
                } else {
                    Numerics::F32
                };
                return self.models(&Key::Entry(edge_plane(&e, numerics)));
            }
            _ => {
                return Err(Error::Runtime {
                    action: "measure",
                    model: key.to_string(),
                    detail: "not an operator of a CNN".into(),
                });
            }
        })
    }
}

/// The tensor of an edge.
fn edge_plane(e: &EdgeKey, numerics: Numerics) -> PlaneKey {
    PlaneKey {
        batch: e.batch,
        channels: e.channels,
        height: e.height,
        width: e.width,
        numerics,
        threads: e.threads,
    }
}

/// Codes made floats, beside each other.
fn dequantizers(e: EdgeKey) -> Line {
    let kind = EdgeKind::Dequantize;
    let each = EdgeKey { kind, ..e };
    Line(Box::new(move |copies| Model::Known {
        bytes: passes::dequantize(&each, copies),
        each: Key::Edge(each),
        copies,
    }))
}

/// A session with next to nothing in it.
fn empty() -> Model {
    let shape = Shape {
        batch: 1,
        channels: 4,
        height: 1,
        width: 1,
    };
    let mut model = Chain::new(shape, Numerics::F32);
    let sum = model.push(Op::Add(Activation::None), vec![Source::Input; 2]);
    model.outputs = vec![sum];
    Model::Chain(model)
}

/// A pool behind a 1x1 convolution, less that convolution. Fewer f32 channels than a block are pooled as a block.
fn pool_models(p: &PlaneKey, times: f64, block: Block) -> Vec<(f64, Model)> {
    let channels = match p.numerics {
        Numerics::F32 => p.channels.max(block.0),
        Numerics::Int8 => p.channels,
    };
    let carrier = pointwise(&PlaneKey { channels, ..*p }, channels);
    let mut models: Vec<(f64, Model)> = fan(vec![carrier], block).slope(times).into();
    models.extend(chain(carrier).slope(-times));
    models
}

/// A 1x1 convolution on a plane.
fn pointwise(p: &PlaneKey, cout: u32) -> ConvKey {
    ConvKey {
        batch: p.batch,
        cin: p.channels,
        cout,
        kernel: 1,
        stride: 1,
        groups: 1,
        height: p.height,
        width: p.width,
        numerics: p.numerics,
        threads: p.threads,
        context: Context::Chain,
    }
}

/// Copies one behind the other.
fn chain(c: ConvKey) -> Line {
    Line(Box::new(move |copies| {
        let mut model = Chain::new(input(&c), c.numerics);
        let mut x = Source::Input;
        for _ in 0..copies {
            x = Source::Node(model.conv(x, op(&c)));
        }
        model.outputs = vec![model.nodes.len() - 1];
        Model::Chain(model)
    }))
}

/// The same for triples.
fn triples(l: LowRankKey) -> Line {
    Line(Box::new(move |copies| {
        let mut model = Chain::new(input(&l.conv), l.conv.numerics);
        let mut x = Source::Input;
        for _ in 0..copies {
            x = model.row(x, &l.parts());
        }
        model.outputs = vec![model.nodes.len() - 1];
        Model::Chain(model)
    }))
}

/// Copies beside each other of convolutions behind each other, each copy into a pool. Where the input would be blocked, a
/// 1x1 convolution blocks it for all.
fn fan(row: Vec<ConvKey>, block: Block) -> Line {
    Line(Box::new(move |copies| {
        let (mut model, x) = behind_stem(&row[0], block);
        for _ in 0..copies {
            let last = model.row(x, &row);
            let pool = model.push(Op::GlobalAvgPool, vec![last]);
            model.outputs.push(pool);
        }
        Model::Chain(model)
    }))
}

/// Copies beside each other, each an output of the model.
fn outputs(c: ConvKey, block: Block) -> Line {
    Line(Box::new(move |copies| {
        let (mut model, x) = behind_stem(&c, block);
        for _ in 0..copies {
            let conv = model.conv(x, op(&c));
            model.outputs.push(conv);
        }
        Model::Chain(model)
    }))
}

fn behind_stem(c: &ConvKey, block: Block) -> (Chain, Source) {
    let mut model = Chain::new(input(c), c.numerics);
    let mut x = Source::Input;
    if c.cin >= block.0 {
        let mut stem = op(c);
        (stem.cout, stem.kernel, stem.stride, stem.groups) = (c.cin, 1, 1, 1);
        x = Source::Node(model.conv(x, stem));
    }
    (model, x)
}

/// The pool that a fan puts behind a convolution.
fn pool_behind(c: &ConvKey) -> PlaneKey {
    PlaneKey {
        batch: c.batch,
        channels: c.cout,
        height: c.height.div_ceil(c.stride),
        width: c.width.div_ceil(c.stride),
        numerics: c.numerics,
        threads: c.threads,
    }
}

fn op(c: &ConvKey) -> Conv {
    Conv {
        cin: c.cin,
        cout: c.cout,
        kernel: c.kernel,
        stride: c.stride,
        groups: c.groups,
        activation: Activation::Relu,
        weights: weights(c.numerics),
    }
}

fn input(c: &ConvKey) -> Shape {
    Shape {
        batch: c.batch,
        channels: c.cin,
        height: c.height,
        width: c.width,
    }
}

fn weights(numerics: Numerics) -> Weights {
    match numerics {
        Numerics::F32 => Weights::F32,
        Numerics::Int8 => Weights::Int(WeightBits::B8),
    }
}

impl Chain {
    fn new(input: Shape, numerics: Numerics) -> Self {
        Self {
            input,
            numerics,
            nodes: Vec::new(),
            outputs: Vec::new(),
        }
    }

    fn conv(&mut self, from: Source, op: Conv) -> usize {
        self.push(Op::Conv(op), vec![from])
    }

    /// Convolutions behind each other; those before the last one without an activation, as in a triple.
    fn row(&mut self, from: Source, row: &[ConvKey]) -> Source {
        let mut x = from;
        for (at, key) in row.iter().enumerate() {
            let mut conv = op(key);
            if at + 1 < row.len() {
                conv.activation = Activation::None;
            }
            x = Source::Node(self.conv(x, conv));
        }
        x
    }

    fn push(&mut self, op: Op, inputs: Vec<Source>) -> usize {
        let positive = op.activation() == Activation::Relu || op == Op::GlobalAvgPool;
        let quant = if positive { RELU } else { SIGNED };
        self.nodes.push(Node {
            name: format!("n{}", self.nodes.len()),
            op,
            inputs,
            output: (self.numerics == Numerics::Int8).then_some(quant),
        });
        self.nodes.len() - 1
    }

    fn graph(&self) -> Result<Graph> {
        let graph = Graph::new(RawGraph {
            name: "probe".into(),
            input: self.input,
            input_quant: (self.numerics == Numerics::Int8).then_some(SIGNED),
            nodes: self.nodes.clone(),
        })?;
        Ok(graph)
    }

    /// With random weights: other ones in each copy, or copies would be merged.
    fn bytes(&self, seed: u64) -> Result<Vec<u8>> {
        let network = random_weights(self.graph()?, seed)?;
        Ok(to_onnx_with_outputs(&network, &self.outputs))
    }
}

#[cfg(test)]
mod tests;
