//! Names for people: `layer4.0.conv2` instead of `/layer4/layer4.0/conv2/Conv` or `node_conv2d_17`. Law: labels are unique
//! in a network; a node whose label would not be keeps its name.

use std::collections::HashMap;

use super::Node;
use super::wire;

/// The module that owns the weights, where the exporter kept its name; else the path in the node's own name.
pub(super) fn of(node: &wire::Node<'_>, name: &str) -> String {
    let weight = node.inputs.iter().find_map(|input| {
        let input = input.strip_suffix("_quantized").unwrap_or(input);
        let input = input.strip_suffix("_DequantizeLinear_Output").unwrap_or(input);
        input.strip_suffix(".weight").filter(|module| !module.is_empty())
    });
    match weight {
        Some(module) => module.to_owned(),
        None => path(name, node.op),
    }
}

/// `/a/a.0/conv/Conv_1` → `a.0.conv.Conv_1` → `a.0.conv`: a part that the next one repeats goes, the operator at the end too.
fn path(name: &str, op: &str) -> String {
    let Some(inner) = name.strip_prefix('/') else {
        return name.to_owned();
    };
    let parts: Vec<&str> = inner.split('/').collect();
    let mut kept: Vec<&str> = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        let next = parts.get(i + 1);
        let is_repeated = next.is_some_and(|n| n.strip_prefix(part).is_some_and(|rest| rest.starts_with('.')));
        let is_operator = i > 0 && next.is_none() && *part == op;
        if !is_repeated && !is_operator {
            kept.push(part);
        }
    }
    kept.join(".")
}

/// Gives nodes that share a label their operator as well, or their own name back.
pub(super) fn make_unique(nodes: &mut [Node]) {
    for round in 0..2 {
        let mut counts: HashMap<String, usize> = HashMap::new();
        for node in nodes.iter() {
            *counts.entry(node.label.clone()).or_default() += 1;
        }
        for node in nodes.iter_mut().filter(|n| counts[&n.label] > 1) {
            node.label = if round == 0 {
                format!("{}.{}", node.label, node.op_type.to_lowercase())
            } else {
                node.name.clone()
            };
        }
    }
}
