//! The neighbours of a layer: one step along each axis (kernel, width, alignment, number format, rank), as edits of the
//! network that is then walked and summed again. Says nothing; `text` does.

use std::collections::{HashMap, HashSet};

use super::{Known, Layer, Request, conv_of, with_numerics};
use crate::Result;
use crate::graph::{Activation, Numerics, Source};
use crate::walk::{At, Kind, Network, Node, Walk};
use crate::work::{ConvKey, Key};

/// Along which axis a choice lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    Kernel,
    Width,
    /// Channels that fit the kernels.
    Alignment,
    /// Number format.
    Bits,
    /// Factors, or a dense layer in their place.
    Rank,
}

/// One change of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    pub axis: Axis,
    /// In words: `16 output channels`, `rank 32`, `int8 with its neighbours`.
    pub what: String,
    /// What the whole network would save.
    pub gain_ms: f64,
    /// Half of the 90 % interval of that.
    pub spread_ms: f64,
    /// What the layer would take, its neighbours' gain or loss included.
    pub layer_ms: f64,
    /// At least twice the repeat error of a measurement of this layer.
    pub is_measurable: bool,
}

/// All neighbours of a layer, best first; slower ones stand last.
pub(super) fn of(known: &mut Known<'_>, request: &Request<'_>, walk: &Walk, layer: &Layer) -> Result<Vec<Choice>> {
    let mut found: Vec<Choice> = Vec::new();
    for (axis, what, network) in edits(request, walk, layer.node) {
        let changed = known.walk(&network);
        // A kernel that was never measured is no choice to offer.
        let Ok((gain_ms, spread_ms)) = difference(known, walk, &changed) else {
            continue;
        };
        let next = choice(request, layer, axis, what, gain_ms, spread_ms);
        // The nearest rank that gains something is the neighbour; smaller ones cost more accuracy.
        let known_rank = found.iter_mut().find(|c| axis == Axis::Rank && c.axis == Axis::Rank);
        match known_rank {
            Some(nearer) if nearer.gain_ms < 0.1 * layer.ms && next.gain_ms > nearer.gain_ms => *nearer = next,
            Some(_) => {}
            None => found.push(next),
        }
    }
    // In another number format with neighbours that follow: the operator alone, no edges.
    let own = walk.steps.iter().find(|s| s.at == At::Node(layer.node)).map(|s| s.key);
    let numerics = request.network.nodes[layer.node].numerics;
    let (other, what) = match numerics {
        Numerics::F32 => (Numerics::Int8, "int8 with its neighbours"),
        Numerics::Int8 => (Numerics::F32, "f32 with its neighbours"),
    };
    if let Some((own, key)) = own.and_then(|own| Some((own, with_numerics(own, other)?)))
        && let Ok(after) = known.operator(key).cloned()
    {
        let before = known.operator(own)?.clone();
        let spread = between(before.spread_ms(), after.spread_ms());
        // Edges that stand there now would go with the neighbours.
        let edges_ms: f64 = layer.edges.iter().map(|e| e.ms).sum();
        let gain_ms = match numerics {
            Numerics::F32 => before.ms - after.ms,
            Numerics::Int8 => before.ms + edges_ms - after.ms,
        };
        found.push(choice(request, layer, Axis::Bits, what.into(), gain_ms, spread));
    }
    found.sort_by(|a, b| b.gain_ms.total_cmp(&a.gain_ms));
    // One along each axis.
    let mut seen = HashSet::new();
    found.retain(|c| seen.insert(c.axis));
    Ok(found)
}

fn choice(request: &Request<'_>, layer: &Layer, axis: Axis, what: String, gain_ms: f64, spread_ms: f64) -> Choice {
    Choice {
        axis,
        what,
        gain_ms,
        spread_ms,
        layer_ms: (layer.ms - gain_ms).max(0.0),
        is_measurable: gain_ms >= 2.0 * request.noise_floor * layer.ms,
    }
}

/// Spread of a difference of two times whose errors are correlated by half.
fn between(a: f64, b: f64) -> f64 {
    (a * a + b * b - a * b).max(0.0).sqrt()
}

/// What a walk saves against another one, and its spread: of the steps that differ.
fn difference(known: &mut Known<'_>, before: &Walk, after: &Walk) -> Result<(f64, f64)> {
    let mut counts: HashMap<Key, i32> = HashMap::new();
    before.keys().for_each(|key| *counts.entry(key).or_default() += 1);
    after.keys().for_each(|key| *counts.entry(key).or_default() -= 1);
    let mut differing: Vec<(Key, i32)> = counts.into_iter().filter(|(_, n)| *n != 0).collect();
    differing.sort();
    let mut gain = 0.0;
    // Sum and sum of squares of the spreads, of what goes and of what comes: correlated by half on each side.
    let mut sides = [(0.0, 0.0); 2];
    for (key, count) in differing {
        let p = known.operator(key)?;
        gain += f64::from(count) * p.ms;
        let spread = f64::from(count.abs()) * p.spread_ms();
        let side = &mut sides[usize::from(count < 0)];
        side.0 += spread;
        side.1 += spread * spread;
    }
    let [removed, added] = sides.map(|(sum, squares): (f64, f64)| (0.5 * sum * sum + 0.5 * squares).sqrt());
    Ok((gain, between(removed, added)))
}

/// All layers that have an int8 kernel in int8, with pairs on every edge; `None` when most weights are codes already.
pub(super) fn int8_throughout(known: &mut Known<'_>, request: &Request<'_>, walk: &Walk) -> Result<Option<Choice>> {
    let network = request.network;
    let macs = |only: Numerics| -> u64 {
        let nodes = network.nodes.iter().filter(|n| n.numerics == only);
        nodes.map(|n| n.macs).sum()
    };
    if macs(Numerics::F32) < macs(Numerics::Int8) || macs(Numerics::F32) == 0 {
        return Ok(None);
    }
    let mut coded = network.clone();
    coded.input.is_quantized = true;
    for node in &mut coded.nodes {
        let has_kernel = match &node.kind {
            Kind::Conv { .. }
            | Kind::Linear { .. }
            | Kind::Add(_)
            | Kind::GlobalAvgPool
            | Kind::Pool { .. }
            | Kind::Activation
            | Kind::BatchNorm
            | Kind::Concat
            | Kind::View
            | Kind::Transpose
            | Kind::Input => true,
            Kind::Elementwise(_) | Kind::Reduce | Kind::Unknown { .. } => false,
        };
        if has_kernel {
            node.numerics = Numerics::Int8;
        }
        node.output.is_quantized = true;
    }
    let changed = known.walk(&coded);
    let sum_ms = known.sum_ms(walk)?;
    // A profile without int8 kernels cannot say.
    let Ok((gain_ms, spread_ms)) = difference(known, walk, &changed) else {
        return Ok(None);
    };
    Ok(Some(Choice {
        axis: Axis::Bits,
        what: "int8 throughout".into(),
        gain_ms,
        spread_ms,
        layer_ms: sum_ms - gain_ms,
        is_measurable: gain_ms >= 2.0 * request.noise_floor * sum_ms,
    }))
}

/// The network after one step along each axis of a layer.
fn edits(request: &Request<'_>, walk: &Walk, node: usize) -> Vec<(Axis, String, Network)> {
    let network = request.network;
    let mut found: Vec<(Axis, String, Network)> = Vec::new();
    let mut edit = |axis: Axis, what: String, change: &dyn Fn(&mut Network)| {
        let mut copy = network.clone();
        change(&mut copy);
        found.push((axis, what, copy));
    };
    if let Some(conv) = conv_of(walk, node) {
        let step = step(&conv, request.block.0);
        let dense = conv.groups == 1;
        let from = network.nodes[node].inputs.first().copied();
        if dense {
            // The next narrower step, and the multiple of four above for what fits no block.
            let narrower = (conv.cout - 1) / step * step;
            if narrower >= step {
                edit(Axis::Width, format!("{narrower} output channels"), &|n| {
                    output(n, node, narrower)
                });
            }
            if conv.cout % 4 != 0 && conv.cout > 4 {
                let whole = conv.cout.next_multiple_of(4);
                edit(Axis::Alignment, format!("{whole} output channels"), &|n| {
                    output(n, node, whole)
                });
            }
        }
        if !conv.cin.is_multiple_of(4)
            && conv.cin > 4
            && let Some(Source::Node(from)) = from
        {
            let whole = conv.cin.next_multiple_of(4);
            edit(Axis::Alignment, format!("{whole} input channels"), &|n| {
                output(n, from, whole);
                if !dense {
                    output(n, node, whole);
                }
            });
        }
        if conv.kernel >= 3 {
            let kernel = conv.kernel - 2;
            edit(Axis::Kernel, format!("kernel {kernel}x{kernel}"), &|n| {
                if let Kind::Conv { kernel: k, .. } = &mut n.nodes[node].kind {
                    *k = [kernel; 2];
                }
            });
        }
        if conv.numerics == Numerics::F32 {
            edit(Axis::Bits, "int8 alone, edges included".into(), &|n| {
                n.nodes[node].numerics = Numerics::Int8;
                n.nodes[node].output.is_quantized = true;
            });
        }
        if dense {
            for rank in ranks(conv.cin.min(conv.cout), step) {
                if let Some(factors) = factor(network, node, rank) {
                    found.push((Axis::Rank, format!("rank {rank}"), factors));
                }
            }
        }
    } else if let Kind::Linear { inputs, outputs, .. } = network.nodes[node].kind {
        for rank in ranks(inputs.min(outputs), 16) {
            // Below the break-even rank there is something to gain at all.
            if u64::from(rank) * (u64::from(inputs) + u64::from(outputs)) < u64::from(inputs) * u64::from(outputs)
                && let Some(factors) = factor(network, node, rank)
            {
                found.push((Axis::Rank, format!("rank {rank}"), factors));
            }
        }
    }
    found
}

/// The width at which a kernel's time changes: whole blocks in f32, four channels in int8.
fn step(conv: &ConvKey, block: u32) -> u32 {
    match conv.numerics {
        Numerics::F32 => block,
        Numerics::Int8 => 4,
    }
}

/// Half, a quarter and an eighth, in whole steps, each once.
fn ranks(full: u32, step: u32) -> Vec<u32> {
    let mut ranks: Vec<u32> = [2, 4, 8].iter().map(|d| (full / d) / step * step).collect();
    ranks.retain(|&r| r >= step && r < full);
    ranks.dedup();
    ranks
}

/// Another number of output channels; what keeps its channels (depthwise, activations, pools) follows.
fn output(network: &mut Network, node: usize, channels: u32) {
    let mut changed = vec![false; network.nodes.len()];
    for at in node..network.nodes.len() {
        let reads = |source: &Source| matches!(source, Source::Node(from) if changed[*from]);
        let follows = at == node
            || network.nodes[at].inputs.iter().any(reads)
                && match network.nodes[at].kind {
                    Kind::Conv { groups, .. } => groups > 1,
                    Kind::Activation | Kind::BatchNorm | Kind::GlobalAvgPool | Kind::Pool { .. } | Kind::Reduce => true,
                    Kind::Linear { .. }
                    | Kind::Add(_)
                    | Kind::Elementwise(_)
                    | Kind::Concat
                    | Kind::View
                    | Kind::Transpose
                    | Kind::Input
                    | Kind::Unknown { .. } => false,
                };
        if follows {
            changed[at] = true;
            network.nodes[at].output.shape.channels = channels;
            if let Kind::Conv { groups, .. } = &mut network.nodes[at].kind
                && *groups > 1
            {
                *groups = channels;
            }
        }
    }
}

/// A layer as a chain of factors of one rank: three for a kernel above 1x1, else two.
fn factor(network: &Network, node: usize, rank: u32) -> Option<Network> {
    let whole = &network.nodes[node];
    let input = match whole.inputs.first()? {
        Source::Input => network.input,
        Source::Node(from) => network.nodes[*from].output,
    };
    let part = |name: &str, kind: Kind, channels: u32, shape_of: crate::graph::Shape, like: crate::walk::Tensor| Node {
        name: format!("{}.{name}", whole.name),
        kind,
        inputs: Vec::new(),
        output: crate::walk::Tensor {
            shape: crate::graph::Shape { channels, ..shape_of },
            is_quantized: like.is_quantized,
        },
        numerics: whole.numerics,
        macs: 0,
        weight_bytes: 0,
    };
    let out = whole.output;
    let point = |activation| Kind::Conv {
        kernel: [1; 2],
        stride: 1,
        groups: 1,
        activation,
    };
    let parts = match whole.kind {
        Kind::Conv {
            kernel,
            stride,
            groups: 1,
            activation,
        } if kernel != [1; 2] => {
            let middle = Kind::Conv {
                kernel,
                stride,
                groups: 1,
                activation: Activation::None,
            };
            vec![
                part("in", point(Activation::None), rank, input.shape, out),
                part("core", middle, rank, out.shape, out),
                part("out", point(activation), out.shape.channels, out.shape, out),
            ]
        }
        Kind::Conv {
            stride: 1,
            groups: 1,
            activation,
            ..
        } => vec![
            part("in", point(Activation::None), rank, out.shape, out),
            part("out", point(activation), out.shape.channels, out.shape, out),
        ],
        Kind::Linear { rows, inputs, outputs } => {
            let first = Kind::Linear {
                rows,
                inputs,
                outputs: rank,
            };
            let second = Kind::Linear {
                rows,
                inputs: rank,
                outputs,
            };
            vec![
                part("in", first, rank, out.shape, out),
                part("out", second, out.shape.channels, out.shape, out),
            ]
        }
        _ => return None,
    };
    Some(splice(network, &[node], parts))
}

/// Puts a chain in the place of nodes that form one: the first reads what the first of them read, whoever read the last of
/// them reads the last of the chain.
fn splice(network: &Network, nodes: &[usize], parts: Vec<Node>) -> Network {
    let last = *nodes.last().unwrap_or(&0);
    let mut places: Vec<usize> = Vec::with_capacity(network.nodes.len());
    let mut spliced = Network {
        nodes: Vec::with_capacity(network.nodes.len() + parts.len()),
        ..network.clone()
    };
    let mut parts = Some(parts);
    for (at, node) in network.nodes.iter().enumerate() {
        let moved = |source: &Source, places: &[usize]| match *source {
            Source::Input => Source::Input,
            Source::Node(from) => Source::Node(places[from]),
        };
        if at == last
            && let Some(parts) = parts.take()
        {
            let first = &network.nodes[nodes[0]].inputs;
            let mut inputs: Vec<Source> = first.iter().map(|s| moved(s, &places)).collect();
            for mut part in parts {
                part.inputs = inputs;
                spliced.nodes.push(part);
                inputs = vec![Source::Node(spliced.nodes.len() - 1)];
            }
        } else if !nodes.contains(&at) {
            let mut node = node.clone();
            node.inputs = node.inputs.iter().map(|s| moved(s, &places)).collect();
            spliced.nodes.push(node);
        }
        places.push(spliced.nodes.len().saturating_sub(1));
    }
    let outputs = network.outputs.iter();
    spliced.outputs = outputs
        .map(|source| match *source {
            Source::Input => Source::Input,
            Source::Node(from) => Source::Node(places[from]),
        })
        .collect();
    spliced
}

/// Linear layers behind each other that one could stand for.
pub(super) struct Chain {
    /// In running order.
    pub(super) nodes: Vec<usize>,
    /// The narrowest width between them.
    pub(super) rank: u32,
}

/// Chains of two or three convolutions or linear layers whose inner results nobody else reads, that hold no activation and
/// are narrower inside than at both ends.
pub(super) fn chains(network: &Network, walk: &Walk) -> Vec<Chain> {
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); network.nodes.len()];
    for (at, node) in network.nodes.iter().enumerate() {
        for source in &node.inputs {
            if let Source::Node(from) = source {
                readers[*from].push(at);
            }
        }
    }
    let mut is_output = vec![false; network.nodes.len()];
    for source in &network.outputs {
        if let Source::Node(node) = source {
            is_output[*node] = true;
        }
    }
    let mut is_joined = vec![false; network.nodes.len()];
    walk.fused_into
        .iter()
        .flatten()
        .for_each(|&into| is_joined[into] = true);
    // A bare linear map: nothing joined it, and its only reader is another one.
    let next = |node: usize| -> Option<usize> {
        let is_bare = !is_output[node] && !is_joined[node];
        let is_linear = match network.nodes[node].kind {
            Kind::Conv { groups, activation, .. } => groups == 1 && activation == Activation::None,
            Kind::Linear { .. } => true,
            _ => false,
        };
        let [reader] = readers[node][..] else { return None };
        let same =
            std::mem::discriminant(&network.nodes[reader].kind) == std::mem::discriminant(&network.nodes[node].kind);
        let is_dense = !matches!(network.nodes[reader].kind, Kind::Conv { groups, .. } if groups > 1);
        (is_bare && is_linear && same && is_dense).then_some(reader)
    };
    let width = |source: Source| match source {
        Source::Input => network.input.shape.channels,
        Source::Node(from) => network.nodes[from].output.shape.channels,
    };
    let mut taken = vec![false; network.nodes.len()];
    let mut found = Vec::new();
    for first in 0..network.nodes.len() {
        let mut nodes = vec![first];
        while nodes.len() < 3
            && let Some(reader) = nodes.last().and_then(|&n| next(n))
        {
            nodes.push(reader);
        }
        if taken[first] || nodes.len() < 2 {
            continue;
        }
        let Some(&from) = network.nodes[first].inputs.first() else {
            continue;
        };
        let (inner, last) = (&nodes[..nodes.len() - 1], nodes[nodes.len() - 1]);
        let rank = inner.iter().map(|&n| width(Source::Node(n))).min().unwrap_or(0);
        let wide = |node: &usize| matches!(network.nodes[*node].kind, Kind::Conv { kernel, .. } if kernel != [1; 2]);
        // Two kernels above 1x1 are no factors of one.
        let kernels = nodes.iter().filter(|n| wide(n)).count();
        if rank < width(from) && rank < width(Source::Node(last)) && kernels <= 1 {
            nodes.iter().for_each(|&n| taken[n] = true);
            found.push(Chain { nodes, rank });
        }
    }
    found
}

/// The network with one layer in the place of a chain of factors.
pub(super) fn undo(network: &Network, chain: &Chain) -> Option<Network> {
    let (first, last) = (*chain.nodes.first()?, *chain.nodes.last()?);
    let (head, tail) = (&network.nodes[first], &network.nodes[last]);
    let kind = match (&head.kind, &tail.kind) {
        (Kind::Linear { rows, inputs, .. }, Kind::Linear { outputs, .. }) => Kind::Linear {
            rows: *rows,
            inputs: *inputs,
            outputs: *outputs,
        },
        (Kind::Conv { .. }, Kind::Conv { activation, .. }) => {
            let (mut kernel, mut stride) = ([1, 1], 1);
            for &node in &chain.nodes {
                if let Kind::Conv {
                    kernel: k, stride: s, ..
                } = network.nodes[node].kind
                {
                    kernel = [kernel[0].max(k[0]), kernel[1].max(k[1])];
                    stride *= s;
                }
            }
            Kind::Conv {
                kernel,
                stride,
                groups: 1,
                activation: *activation,
            }
        }
        _ => return None,
    };
    let dense = Node {
        name: tail.name.clone(),
        kind,
        inputs: Vec::new(),
        output: tail.output,
        numerics: tail.numerics,
        macs: 0,
        weight_bytes: 0,
    };
    Some(splice(network, &chain.nodes, vec![dense]))
}
