//! "Why is it not faster?": every layer of a network with what bounds it, the terms behind that, the neighbour that breaks
//! its layout, and the neighbouring choices that would help, re-predicted in place (the whole network is walked again, so
//! that what a change does to its neighbours counts). Rules: the reference on latency, section 8. Pure: a function of a
//! [`CostModel`]. The words are `text`'s, the neighbours `choices`'. Law: layers and call add up to the network.

use std::collections::HashMap;

use crate::Result;
use crate::graph::{Numerics, Source};
use crate::predict::{CostModel, Flag, Origin, Prediction, Terms};
use crate::walk::{At, Kind, Network, Step, Walk, walk};
use crate::work::{Block, ConvKey, EdgeKind, Key, Work};

mod choices;
pub mod text;

#[cfg(test)]
mod tests;

pub use self::choices::{Axis, Choice};

/// What to explain.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// As read from a file or made from a graph.
    pub network: &'a Network,
    /// Threads of the session.
    pub threads: u32,
    /// The machine's channel block.
    pub block: Block,
    /// Repeat error of the machine's measurements, a fraction: gains below twice this cannot be seen.
    pub noise_floor: f64,
}

/// A network with its layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Of the whole network: as `predict` says it.
    pub total: Prediction,
    /// In running order.
    pub layers: Vec<Layer>,
    /// The call, and what the layers together take beyond their sum; may be negative.
    pub rest_ms: f64,
    /// Every layer that can be int8 in int8: what that would save; absent when most of it runs on codes already.
    pub int8: Option<Choice>,
}

/// Layers that get neighbouring choices, the largest first.
const EXPLAINED: usize = 300;

/// What most of a layer's time is spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Starting work.
    Launch,
    /// Changing layouts and number formats.
    Layout,
    /// Moving bytes.
    Memory,
    /// Multiplying and adding.
    Compute,
}

/// An edge that a layer pays for.
#[derive(Debug, Clone, PartialEq)]
pub struct Edge {
    pub kind: EdgeKind,
    pub ms: f64,
    /// The layer whose form makes it necessary.
    pub culprit: String,
    /// Why that layer does.
    pub why: String,
}

/// One finding about a layer, beside what bounds it.
#[derive(Debug, Clone, PartialEq)]
pub enum Finding {
    /// Channels are padded to whole blocks: `nominal` cost what `padded` cost.
    Padding {
        /// `input` or `output`.
        side: &'static str,
        nominal: u32,
        padded: u32,
        /// Padded over nominal multiply-adds.
        ratio: f64,
    },
    /// Channels that do not fit the fast kernel at all.
    SlowKernel { channels: u32, multiple: u32 },
    /// Weight codes of `bits` run as int8.
    NoKernel { bits: u32, fewer_bytes: f64 },
    /// The factors take as long as the layer they stand for.
    FactorisedNoGain {
        factors_ms: f64,
        dense_ms: f64,
        launches: usize,
        rank: u32,
    },
    /// The same layer in f32 takes no longer.
    Int8NoGain { int8_ms: f64, f32_ms: f64, edges: usize },
    /// The best neighbouring choice gains less than can be measured.
    NotMeasurable { best_gain: f64, floor: f64 },
    /// Not in the model: its bytes stand in for it.
    Unknown { op_type: String },
}

/// One layer: a node, what fused into it, and the edges that it pays for.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Place in the network's nodes.
    pub node: usize,
    pub name: String,
    /// `conv 3x3/1 16→20 at 32x32 f32`.
    pub what: String,
    /// Names of the nodes that run inside.
    pub joined: Vec<String>,
    pub ms: f64,
    /// Half of the interval that holds nine in ten.
    pub spread_ms: f64,
    pub terms: Terms,
    pub origin: Origin,
    pub flags: Vec<Flag>,
    pub edges: Vec<Edge>,
    pub bound: Bound,
    pub findings: Vec<Finding>,
    /// The best three, best first; only what is faster.
    pub choices: Vec<Choice>,
}

/// What bounds a layer of these terms (reference section 8): launches and edges at half of the time, edges at a quarter,
/// bytes at half of the rest, else arithmetic.
pub fn bound(terms: &Terms) -> Bound {
    let all = terms.sum_ms().max(f64::MIN_POSITIVE);
    let rest = terms.memory_ms + terms.compute_ms + terms.link_ms;
    if terms.launch_ms >= 0.5 * all {
        Bound::Launch
    } else if terms.layout_ms >= 0.25 * all {
        Bound::Layout
    } else if terms.launch_ms + terms.layout_ms >= 0.5 * all {
        Bound::Launch
    } else if terms.memory_ms + terms.link_ms >= 0.5 * rest {
        Bound::Memory
    } else {
        Bound::Compute
    }
}

/// Explains a network.
///
/// # Errors
/// As [`CostModel::predict`].
pub fn explain(model: &dyn CostModel, request: &Request<'_>) -> Result<Report> {
    let network = request.network;
    let total = model.predict(&Work::Network {
        network,
        threads: request.threads,
    })?;
    let mut known = Known {
        model,
        threads: request.threads,
        block: request.block,
        predictions: HashMap::new(),
    };
    let walk = walk(network, request.threads, request.block);
    let sum_ms = known.sum_ms(&walk)?;
    let homes = homes(&walk);
    let mut joined: Vec<Vec<String>> = vec![Vec::new(); network.nodes.len()];
    for (node, &home) in homes.iter().enumerate().filter(|(node, home)| *node != **home) {
        joined[home].push(network.nodes[node].name.clone());
    }
    let mut layers = Vec::new();
    for (node, steps) in by_layer(network, &walk, &homes) {
        let joined = std::mem::take(&mut joined[node]);
        layers.push(layer(&mut known, request, node, joined, &steps)?);
    }
    // The largest alone get neighbours: a network of thousands of layers is walked anew for each of them.
    let mut smallest_ms: Vec<f64> = layers.iter().map(|l| l.ms).collect();
    smallest_ms.sort_by(|a, b| b.total_cmp(a));
    let least_ms = smallest_ms.get(EXPLAINED).copied().unwrap_or(0.0);
    for layer in layers.iter_mut().filter(|l| l.ms > least_ms) {
        let found = choices::of(&mut known, request, &walk, layer)?;
        findings(&mut known, request, &walk, layer, &found)?;
        layer.choices = found.into_iter().filter(|c| c.gain_ms > 0.0).take(3).collect();
    }
    factorised(&mut known, request, &walk, sum_ms, &mut layers)?;
    let rest_ms = total.ms - layers.iter().map(|l| l.ms).sum::<f64>();
    Ok(Report {
        int8: choices::int8_throughout(&mut known, request, &walk)?,
        total,
        layers,
        rest_ms,
    })
}

/// Predictions of operators, each asked for once.
struct Known<'a> {
    model: &'a dyn CostModel,
    threads: u32,
    block: Block,
    predictions: HashMap<Key, Prediction>,
}

impl Known<'_> {
    fn operator(&mut self, key: Key) -> Result<&Prediction> {
        if !self.predictions.contains_key(&key) {
            let prediction = self.model.predict(&Work::Operator(key))?;
            self.predictions.insert(key, prediction);
        }
        Ok(&self.predictions[&key])
    }

    fn ms(&mut self, key: Key) -> Result<f64> {
        self.operator(key).map(|p| p.ms)
    }

    fn sum_ms(&mut self, walk: &Walk) -> Result<f64> {
        walk.keys().try_fold(0.0, |sum, key| Ok(sum + self.ms(key)?))
    }

    fn walk(&self, network: &Network) -> Walk {
        walk(network, self.threads, self.block)
    }
}

/// The node that stands for each: itself, or what it became a part of, which comes before it.
fn homes(walk: &Walk) -> Vec<usize> {
    let mut homes: Vec<usize> = Vec::with_capacity(walk.fused_into.len());
    for (node, into) in walk.fused_into.iter().enumerate() {
        homes.push(into.map_or(node, |into| homes.get(into).copied().unwrap_or(into)));
    }
    homes
}

/// Steps by the layer that pays for them, in running order; those of the call alone are left out.
fn by_layer(network: &Network, walk: &Walk, homes: &[usize]) -> Vec<(usize, Vec<Step>)> {
    let mut steps: Vec<Vec<Step>> = vec![Vec::new(); network.nodes.len()];
    for &step in &walk.steps {
        let payer = match step.at {
            At::Session => None,
            At::Node(node) => Some(node),
            At::Edge { to: Some(to), .. } => Some(to),
            At::Edge {
                from: Source::Node(from),
                to: None,
            } => Some(from),
            // An input that is quantized at once: whoever reads it first.
            At::Edge {
                from: Source::Input, ..
            } => network.nodes.iter().position(|n| n.inputs.contains(&Source::Input)),
        };
        if let Some(payer) = payer {
            steps[homes[payer]].push(step);
        }
    }
    steps.into_iter().enumerate().filter(|(_, s)| !s.is_empty()).collect()
}

fn layer(
    known: &mut Known<'_>,
    request: &Request<'_>,
    node: usize,
    joined: Vec<String>,
    steps: &[Step],
) -> Result<Layer> {
    let network = request.network;
    let (mut ms, mut terms) = (0.0, Terms::default());
    let (mut sum, mut squares) = (0.0, 0.0);
    let (mut origin, mut flags, mut edges) = (Origin::Table, Vec::new(), Vec::new());
    for step in steps {
        let p = known.operator(step.key)?.clone();
        ms += p.ms;
        terms.launch_ms += p.terms.launch_ms;
        terms.layout_ms += p.terms.layout_ms;
        terms.memory_ms += p.terms.memory_ms;
        terms.compute_ms += p.terms.compute_ms;
        terms.link_ms += p.terms.link_ms;
        sum += p.spread_ms();
        squares += p.spread_ms().powi(2);
        origin = origin.max(p.origin);
        flags.extend(p.flags);
        if let (At::Edge { from, to }, Key::Edge(edge)) = (step.at, step.key) {
            // All of an edge is layout, its launch too: without the edge there is none.
            terms.layout_ms += p.terms.launch_ms + p.terms.memory_ms + p.terms.compute_ms;
            terms.launch_ms -= p.terms.launch_ms;
            terms.memory_ms -= p.terms.memory_ms;
            terms.compute_ms -= p.terms.compute_ms;
            let (culprit, why) = text::culprit(network, request.block, from, to, edge.kind);
            edges.push(Edge {
                kind: edge.kind,
                ms: p.ms,
                culprit,
                why,
            });
        }
    }
    flags.sort();
    flags.dedup();
    Ok(Layer {
        node,
        name: network.nodes[node].name.clone(),
        what: text::what(network, node),
        joined,
        ms,
        // Errors within a layer are correlated by half (as `predict` sums them).
        spread_ms: (0.5 * sum * sum + 0.5 * squares).sqrt(),
        bound: bound(&terms),
        terms,
        origin,
        flags,
        edges,
        findings: Vec::new(),
        choices: Vec::new(),
    })
}

/// The convolution that a layer is, as it was walked.
fn conv_of(walk: &Walk, node: usize) -> Option<ConvKey> {
    walk.steps.iter().find_map(|step| match (step.at, step.key) {
        (At::Node(at), Key::Conv(conv)) if at == node => Some(conv),
        _ => None,
    })
}

/// Padded over nominal channels of a dense f32 convolution, `(side, nominal, padded)`, the worse side first.
fn padding(conv: &ConvKey, block: Block) -> Vec<(&'static str, u32, u32)> {
    let is_blocked = conv.cin >= block.0 && conv.cin.is_multiple_of(4);
    if conv.groups > 1 || conv.numerics == Numerics::Int8 || conv.cin >= block.0 && !is_blocked {
        return Vec::new();
    }
    let pad = |channels: u32| channels.next_multiple_of(block.0);
    let mut sides = vec![("output", conv.cout, pad(conv.cout))];
    if is_blocked {
        sides.push(("input", conv.cin, pad(conv.cin)));
    }
    let ratio = |(_, nominal, padded): &(&str, u32, u32)| f64::from(*padded) / f64::from(*nominal);
    sides.sort_by(|a, b| ratio(b).total_cmp(&ratio(a)));
    sides
}

/// What else there is to say about a layer; `found` are its neighbouring choices, best first, slower ones too.
fn findings(
    known: &mut Known<'_>,
    request: &Request<'_>,
    walk: &Walk,
    layer: &mut Layer,
    found: &[Choice],
) -> Result<()> {
    let node = &request.network.nodes[layer.node];
    if let Kind::Unknown { op_type } = &node.kind {
        layer.findings.push(Finding::Unknown {
            op_type: op_type.clone(),
        });
    }
    let conv = conv_of(walk, layer.node);
    if let Some(conv) = conv {
        let sides = padding(&conv, request.block);
        let ratio: f64 = sides.iter().map(|&(_, n, p)| f64::from(p) / f64::from(n)).product();
        if ratio >= 1.25
            && let Some(&(side, nominal, padded)) = sides.first()
        {
            layer.findings.push(Finding::Padding {
                side,
                nominal,
                padded,
                ratio,
            });
        }
        // Depthwise or dense, channels that are no multiple of four leave the blocked kernels.
        let is_depthwise = conv.groups > 1 && conv.groups == conv.cin;
        let is_slow = conv.numerics == Numerics::F32
            && !conv.cin.is_multiple_of(4)
            && (is_depthwise || conv.groups == 1 && conv.cin >= request.block.0);
        if is_slow {
            layer.findings.push(Finding::SlowKernel {
                channels: conv.cin,
                multiple: 4,
            });
        }
    }
    if let Some(bits) = coded_bits(request.network, layer.node) {
        layer.findings.push(Finding::NoKernel {
            bits,
            fewer_bytes: 8.0 / f64::from(bits),
        });
    }
    let own = walk.steps.iter().find(|s| s.at == At::Node(layer.node)).map(|s| s.key);
    if node.numerics == Numerics::Int8
        && let Some(own) = own
        && let Some(float) = with_numerics(own, Numerics::F32)
    {
        let f32_ms = known.ms(float)?;
        if layer.ms >= 0.95 * f32_ms {
            layer.findings.push(Finding::Int8NoGain {
                int8_ms: layer.ms,
                f32_ms,
                edges: layer.edges.len(),
            });
        }
    }
    let best = found.first().map(|c| c.gain_ms / layer.ms.max(f64::MIN_POSITIVE));
    if let Some(best_gain) = best.filter(|&gain| gain > 0.0 && gain < 2.0 * request.noise_floor) {
        layer.findings.push(Finding::NotMeasurable {
            best_gain,
            floor: request.noise_floor,
        });
    }
    Ok(())
}

/// Bits of weight codes that are narrower than any kernel of the runtime: 8 is the narrowest.
fn coded_bits(network: &Network, node: usize) -> Option<u32> {
    let node = &network.nodes[node];
    let (count, channels) = match node.kind {
        Kind::Conv { kernel, groups, .. } => {
            let cin = match node.inputs.first()? {
                Source::Input => network.input.shape.channels,
                Source::Node(from) => network.nodes[*from].output.shape.channels,
            };
            let taps = u64::from(kernel[0]) * u64::from(kernel[1]);
            let cout = node.output.shape.channels;
            (u64::from(cin / groups.max(1)) * taps * u64::from(cout), cout)
        }
        Kind::Linear { inputs, outputs, .. } => (u64::from(inputs) * u64::from(outputs), outputs),
        _ => return None,
    };
    if node.numerics != Numerics::Int8 || count == 0 {
        return None;
    }
    // A scale and a bias of four bytes per channel stand beside the codes.
    let codes = node.weight_bytes.saturating_sub(8 * u64::from(channels));
    let bits = u32::try_from((8 * codes).div_ceil(count)).ok()?;
    (1..=7).contains(&bits).then_some(bits)
}

/// The same operator in another number format.
fn with_numerics(key: Key, numerics: Numerics) -> Option<Key> {
    match key {
        Key::Conv(conv) => Some(Key::Conv(ConvKey { numerics, ..conv })),
        Key::Linear(mut linear) => {
            linear.numerics = numerics;
            Some(Key::Linear(linear))
        }
        _ => None,
    }
}

/// Chains of two or three linear layers without an activation between them, against the one that they stand for.
fn factorised(
    known: &mut Known<'_>,
    request: &Request<'_>,
    walk: &Walk,
    sum_ms: f64,
    layers: &mut [Layer],
) -> Result<()> {
    for chain in choices::chains(request.network, walk) {
        let Some(dense) = choices::undo(request.network, &chain) else {
            continue;
        };
        let dense_walk = known.walk(&dense);
        let gain_ms = sum_ms - known.sum_ms(&dense_walk)?;
        let ms_of = |node: usize| layers.iter().find(|l| l.node == node).map_or(0.0, |l| l.ms);
        let factors_ms: f64 = chain.nodes.iter().map(|&n| ms_of(n)).sum();
        let dense_ms = factors_ms - gain_ms;
        if factors_ms < 0.97 * dense_ms {
            continue;
        }
        // The chain's heaviest part says it.
        let heaviest = chain
            .nodes
            .iter()
            .copied()
            .max_by(|&a, &b| ms_of(a).total_cmp(&ms_of(b)));
        let Some(layer) = layers.iter_mut().find(|l| Some(l.node) == heaviest) else {
            continue;
        };
        layer.findings.push(Finding::FactorisedNoGain {
            factors_ms,
            dense_ms,
            launches: chain.nodes.len(),
            rank: chain.rank,
        });
        if gain_ms > 0.0 {
            layer.choices.insert(
                0,
                Choice {
                    axis: Axis::Rank,
                    what: "dense, unfactorised".into(),
                    gain_ms,
                    spread_ms: layer.spread_ms,
                    layer_ms: dense_ms,
                    is_measurable: gain_ms >= 2.0 * request.noise_floor * factors_ms,
                },
            );
            layer.choices.truncate(3);
        }
    }
    Ok(())
}
