//! Shapes of what moves or renames elements: reshape, transpose, slice, pad, resize and their kin. Pure; the table of
//! operators is `shapes`'.

use super::constant::integers;
use super::op::Op;
use super::shapes::{
    Inferred, Inputs, Refusal, attribute, attribute_int, attribute_ints, axis, bounded, broadcast, input, ints_of,
    refuse,
};
use super::wire::Node;

pub(super) fn flatten(node: &Node<'_>, inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    let rank = x.dims.len();
    let at = attribute_int(node, "axis", 1);
    let at = if usize::try_from(at) == Ok(rank) {
        rank
    } else {
        axis(at, rank)?
    };
    let (left, right) = x.dims.split_at(at);
    Ok(Inferred::new(Op::View, vec![bounded(left)?, bounded(right)?]))
}

pub(super) fn reshape(inputs: &Inputs<'_>, node: &Node<'_>) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    let Some(wanted) = ints_of(node, inputs, "shape", 1)? else {
        return refuse("shape", "none", "a constant input");
    };
    let zero_copies = attribute_int(node, "allowzero", 0) == 0;
    let mut dims = Vec::with_capacity(wanted.len().min(9));
    let mut open = None;
    for (i, &d) in wanted.iter().enumerate().take(9) {
        dims.push(match d {
            -1 if open.is_none() => {
                open = Some(i);
                1
            }
            0 if zero_copies => match x.dims.get(i) {
                Some(&d) => d,
                None => return refuse("shape", format!("{wanted:?}"), "0 only where the input has a dimension"),
            },
            d => match u64::try_from(d) {
                Ok(d) => d,
                Err(_) => return refuse("shape", format!("{wanted:?}"), "dimensions of 0 or more and one -1"),
            },
        });
    }
    let (total, given) = (bounded(x.dims)?, bounded(&dims)?);
    if let Some(open) = open {
        if given == 0 || total % given != 0 {
            return refuse("shape", format!("{wanted:?}"), format!("a divisor of {total} elements"));
        }
        dims[open] = total / given;
    } else if given != total {
        return refuse("shape", format!("{wanted:?}"), format!("{total} elements"));
    }
    Ok(Inferred::new(Op::View, dims).reading(&[0]))
}

pub(super) fn squeeze(node: &Node<'_>, inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    let rank = x.dims.len();
    let axes = ints_of(node, inputs, "axes", 1)?;
    let mut gone: Vec<bool> = vec![axes.is_none(); rank];
    for a in axes.unwrap_or_default() {
        gone[axis(a, rank)?] = true;
    }
    if (0..rank).any(|i| gone[i] && x.dims[i] != 1 && attribute_ints(node, "axes").is_some()) {
        return refuse("axes", format!("of {:?}", x.dims), "dimensions of 1");
    }
    let dims = (0..rank)
        .filter(|&i| !(gone[i] && x.dims[i] == 1))
        .map(|i| x.dims[i])
        .collect();
    Ok(Inferred::new(Op::View, dims).reading(&[0]))
}

pub(super) fn unsqueeze(node: &Node<'_>, inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    let axes = ints_of(node, inputs, "axes", 1)?.unwrap_or_default();
    let rank = x.dims.len() + axes.len();
    if rank > 8 {
        return refuse("dimensions", rank, "8 or fewer");
    }
    let mut is_new = vec![false; rank];
    for a in axes {
        is_new[axis(a, rank)?] = true;
    }
    let mut old = x.dims.iter();
    let dims: Option<Vec<u64>> = is_new
        .iter()
        .map(|&n| if n { Some(1) } else { old.next().copied() })
        .collect();
    match dims {
        Some(dims) => Ok(Inferred::new(Op::View, dims).reading(&[0])),
        None => refuse("axes", "one twice", "different ones"),
    }
}

pub(super) fn transpose(node: &Node<'_>, inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    let rank = x.dims.len();
    let order = match attribute_ints(node, "perm") {
        Some(perm) => perm.iter().map(|&p| axis(p, rank)).collect::<Result<Vec<usize>, _>>()?,
        None => (0..rank).rev().collect(),
    };
    let mut seen = order.clone();
    seen.sort_unstable();
    if seen != (0..rank).collect::<Vec<_>>() {
        return refuse("perm", format!("{order:?}"), format!("an order of {rank} dimensions"));
    }
    // Dimensions of 1 that move carry nothing with them.
    let large = |i: &&usize| x.dims[**i] > 1;
    let moves = order.iter().filter(large).is_sorted();
    let dims = order.iter().map(|&i| x.dims[i]).collect();
    Ok(Inferred::new(if moves { Op::View } else { Op::Transpose }, dims))
}

pub(super) fn slice(node: &Node<'_>, inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    let starts = ints_of(node, inputs, "starts", 1)?.unwrap_or_default();
    let ends = ints_of(node, inputs, "ends", 2)?.unwrap_or_default();
    let default: Vec<i64> = (0..i64::try_from(starts.len()).unwrap_or(0)).collect();
    let axes = ints_of(node, inputs, "axes", 3)?.unwrap_or(default);
    let steps = ints_of(node, inputs, "steps", 4)?.unwrap_or_else(|| vec![1; starts.len()]);
    if ends.len() != starts.len() || axes.len() != starts.len() || steps.len() != starts.len() {
        return refuse(
            "slice",
            format!("{} starts, {} ends", starts.len(), ends.len()),
            "as many of each",
        );
    }
    let mut dims = x.dims.to_vec();
    for (i, &a) in axes.iter().enumerate() {
        let at = axis(a, dims.len())?;
        let length = i64::try_from(dims[at]).unwrap_or(i64::MAX);
        let place = |v: i64| if v < 0 { v.saturating_add(length) } else { v };
        let count = match steps[i] {
            0 => return refuse("step", 0, "another number"),
            step if step > 0 => {
                let (from, to) = (place(starts[i]).clamp(0, length), place(ends[i]).clamp(0, length));
                (to - from).max(0).cast_unsigned().div_ceil(step.cast_unsigned())
            }
            step => {
                let (from, to) = (
                    place(starts[i]).clamp(-1, length - 1),
                    place(ends[i]).clamp(-1, length - 1),
                );
                (from - to).max(0).cast_unsigned().div_ceil(step.unsigned_abs())
            }
        };
        dims[at] = count;
    }
    Ok(Inferred::new(Op::Copy, dims).reading(&[0]))
}

pub(super) fn split(node: &Node<'_>, inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    let at = axis(attribute_int(node, "axis", 0), x.dims.len())?;
    let count = node.outputs.len().max(1) as u64;
    let parts = match ints_of(node, inputs, "split", 1)? {
        Some(parts) => parts.iter().map(|&p| u64::try_from(p).unwrap_or(u64::MAX)).collect(),
        None => {
            let whole = x.dims[at].div_ceil(count).max(1);
            (0..count)
                .map(|i| x.dims[at].saturating_sub(i * whole).min(whole))
                .collect::<Vec<u64>>()
        }
    };
    let sum = parts.iter().try_fold(0u64, |n, &p| n.checked_add(p));
    if sum != Some(x.dims[at]) || parts.len() < node.outputs.len() {
        return refuse(
            "split",
            format!("{parts:?}"),
            format!("{count} parts of {}", x.dims[at]),
        );
    }
    let dims = |&part: &u64| {
        let mut dims = x.dims.to_vec();
        dims[at] = part;
        dims
    };
    Ok(Inferred {
        outputs: parts.iter().map(dims).collect(),
        ..Inferred::new(Op::Copy, Vec::new()).reading(&[0])
    })
}

pub(super) fn pad(node: &Node<'_>, inputs: &Inputs<'_>, opset: i64) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    let rank = x.dims.len();
    let name = if opset == 1 { "paddings" } else { "pads" };
    let pads = ints_of(node, inputs, name, 1)?.unwrap_or_default();
    let axes: Vec<usize> = match ints_of(node, inputs, "axes", 3)? {
        Some(axes) => axes.iter().map(|&a| axis(a, rank)).collect::<Result<_, _>>()?,
        None => (0..rank).collect(),
    };
    if pads.len() != 2 * axes.len() {
        return refuse("pads", format!("{pads:?}"), format!("{} numbers", 2 * axes.len()));
    }
    let mut dims = x.dims.to_vec();
    for (i, &at) in axes.iter().enumerate() {
        let by = pads[i].saturating_add(pads[axes.len() + i]);
        match dims[at].checked_add_signed(by) {
            Some(size) => dims[at] = size,
            None => return refuse("pads", format!("{pads:?}"), format!("no more than {:?} away", x.dims)),
        }
    }
    Ok(Inferred::new(Op::Copy, dims).reading(&[0]))
}

pub(super) fn resize(node: &Node<'_>, inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    let rank = x.dims.len();
    let is_resize = node.op == "Resize";
    // Resize(x, roi, scales, sizes) since opset 11, (x, scales) before and in Upsample.
    let scales_at = if is_resize && inputs.len() > 2 { 2 } else { 1 };
    let numbers = |at: usize| inputs.get(at).copied().flatten().map(|o| (o.dims, o.numbers));
    if is_resize && let Some((_, sizes)) = numbers(3) {
        let sizes = sizes.map(integers).unwrap_or_default();
        let sizes: Vec<u64> = sizes.iter().map(|&s| u64::try_from(s).unwrap_or(0)).collect();
        if sizes.len() != rank || sizes.contains(&0) {
            return refuse("sizes", format!("{sizes:?}"), format!("{rank} constant ones"));
        }
        return Ok(Inferred::new(Op::Copy, sizes).reading(&[0]));
    }
    let in_attribute = attribute(node, "scales").map(|a| a.floats.iter().map(|&f| f64::from(f)).collect());
    let scales: Vec<f64> = match numbers(scales_at) {
        Some((_, Some(scales))) => scales.to_vec(),
        _ => in_attribute.unwrap_or_default(),
    };
    if scales.len() != rank || scales.iter().any(|s| !(s.is_finite() && *s > 0.0 && *s < 1e4)) {
        return refuse("scales", format!("{scales:?}"), format!("{rank} constant ones above 0"));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "both bounded"
    )]
    let dims = x
        .dims
        .iter()
        .zip(&scales)
        .map(|(&d, &s)| (d as f64 * s).floor() as u64)
        .collect();
    Ok(Inferred::new(Op::Copy, dims).reading(&[0]))
}

pub(super) fn expand(inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let (x, shape) = (input(inputs, 0)?, input(inputs, 1)?);
    let Some(wanted) = shape.numbers else {
        return refuse("shape", "values that are computed", "constant ones");
    };
    let wanted: Vec<u64> = integers(wanted)
        .iter()
        .map(|&d| u64::try_from(d).unwrap_or(0))
        .collect();
    Ok(Inferred::new(Op::Copy, broadcast(x.dims, &wanted)?).reading(&[0]))
}

pub(super) fn tile(inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let (x, repeats) = (input(inputs, 0)?, input(inputs, 1)?);
    let repeats = repeats.numbers.map(integers).unwrap_or_default();
    if repeats.len() != x.dims.len() {
        return refuse(
            "repeats",
            format!("{repeats:?}"),
            format!("{} constant ones", x.dims.len()),
        );
    }
    let dims = x.dims.iter().zip(&repeats);
    let dims = dims
        .map(|(&d, &r)| d.saturating_mul(u64::try_from(r).unwrap_or(0)))
        .collect();
    Ok(Inferred::new(Op::Copy, dims).reading(&[0]))
}

pub(super) fn gather(node: &Node<'_>, inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let (x, indices) = (input(inputs, 0)?, input(inputs, 1)?);
    let at = axis(attribute_int(node, "axis", 0), x.dims.len())?;
    let mut dims = x.dims[..at].to_vec();
    dims.extend_from_slice(indices.dims);
    dims.extend_from_slice(&x.dims[at + 1..]);
    Ok(Inferred::new(Op::Copy, dims))
}

pub(super) fn depth_space(node: &Node<'_>, inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    let block = u64::try_from(attribute_int(node, "blocksize", 0)).unwrap_or(0);
    let (&[n, c, h, w], true) = (x.dims, (1..1 << 12).contains(&block)) else {
        return refuse(
            "input",
            format!("{:?} in blocks of {block}", x.dims),
            "4 dimensions, blocks of 1 or more",
        );
    };
    let dims = if node.op == "DepthToSpace" {
        (c % (block * block) == 0).then(|| vec![n, c / (block * block), h * block, w * block])
    } else {
        (h % block == 0 && w % block == 0).then(|| vec![n, c * block * block, h / block, w / block])
    };
    match dims {
        Some(dims) => Ok(Inferred::new(Op::Copy, dims)),
        None => refuse("blocksize", block, format!("a divisor of {:?}", x.dims)),
    }
}
