//! Operator by operator: what kind it is and what shape comes out (ONNX's operator specification, opsets 7 to 23). Pure;
//! the walk over the file is `build`'s. Law: shapes equal those of onnx's own inference on the goldens.

use super::constant::{Element, integers};
use super::moves::{
    depth_space, expand, flatten, gather, pad, reshape, resize, slice, split, squeeze, tile, transpose, unsqueeze,
};
use super::op::{Conv, Op, Pool, Window};
use super::wire::{Attribute, Node};

/// No dimension may be larger, no tensor may have more elements.
const LIMIT_DIM: u64 = 1 << 31;
const LIMIT_ELEMENTS: u64 = 1 << 40;

/// What was found, and what expected.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) what: &'static str,
    pub(super) found: String,
    pub(super) expected: String,
}

pub(super) fn refuse<T>(what: &'static str, found: impl ToString, expected: impl ToString) -> Result<T, Refusal> {
    Err(Refusal {
        what,
        found: found.to_string(),
        expected: expected.to_string(),
    })
}

/// An input as a shape rule sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand<'a> {
    pub(super) dims: &'a [u64],
    /// Values, if it is a small constant.
    pub(super) numbers: Option<&'a [f64]>,
    pub(super) is_constant: bool,
}

/// What a node is.
#[derive(Debug)]
pub(super) struct Inferred {
    pub(super) op: Op,
    /// Of each output; empty: nobody knows.
    pub(super) outputs: Vec<Vec<u64>>,
    /// Of the outputs; `None`: that of the first input.
    pub(super) element: Option<Element>,
    /// Places of the inputs that are activations (or could be), of all inputs when `None`.
    pub(super) data: Option<Vec<usize>>,
}

impl Inferred {
    pub(super) fn new(op: Op, dims: Vec<u64>) -> Self {
        Self {
            op,
            outputs: vec![dims],
            element: None,
            data: None,
        }
    }

    pub(super) fn reading(mut self, data: &[usize]) -> Self {
        self.data = Some(data.to_vec());
        self
    }
}

/// The inputs of a node; `None` where an optional one is left out.
pub(super) type Inputs<'a> = [Option<Operand<'a>>];

/// Kind and output shapes of a node, standard domain and what onnxruntime's quantizer writes.
pub(super) fn infer(node: &Node<'_>, inputs: &Inputs<'_>, opset: i64) -> Result<Inferred, Refusal> {
    let same = |op| Ok(Inferred::new(op, input(inputs, 0)?.dims.to_vec()));
    let standard = matches!(node.domain, "" | "ai.onnx");
    let quantizer = node.domain == "com.microsoft";
    let inferred = match node.op {
        "Conv" if standard => conv(node, inputs, [0, 1]),
        "QLinearConv" if standard => conv(node, inputs, [0, 3]),
        "BatchNormalization" if standard => {
            Ok(Inferred::new(Op::BatchNorm, input(inputs, 0)?.dims.to_vec()).reading(&[0]))
        }
        "Relu" | "Clip" if standard => same(Op::Clamp),
        "LeakyRelu" | "Sigmoid" | "HardSigmoid" | "Tanh" if standard => same(Op::Activation),
        "QLinearLeakyRelu" | "QLinearSigmoid" if quantizer => {
            Ok(Inferred::new(Op::Activation, input(inputs, 0)?.dims.to_vec()).reading(&[0]))
        }
        "HardSwish"
        | "Elu"
        | "Selu"
        | "Celu"
        | "Softplus"
        | "Softsign"
        | "Mish"
        | "Gelu"
        | "Erf"
        | "Exp"
        | "Log"
        | "Sqrt"
        | "Reciprocal"
        | "Abs"
        | "Neg"
        | "Sign"
        | "Floor"
        | "Ceil"
        | "Round"
        | "Sin"
        | "Cos"
        | "Not"
        | "IsNaN"
        | "PRelu"
        | "LRN"
        | "InstanceNormalization"
        | "GroupNormalization"
        | "LayerNormalization"
        | "MeanVarianceNormalization"
        | "LpNormalization"
        | "CumSum"
            if standard =>
        {
            same(Op::Elementwise)
        }
        "Gelu" | "QuickGelu" | "FastGelu" if quantizer => same(Op::Elementwise),
        "Cast" | "CastLike" if standard => {
            let to = attribute_int(node, "to", 1);
            Ok(Inferred {
                element: Some(Element::of(to)),
                ..same(Op::Elementwise)?
            })
        }
        "Add" if standard => binary(inputs, [0, 1], true),
        "Sub" | "Mul" | "Div" | "Pow" | "Mod" if standard => binary(inputs, [0, 1], false),
        "QLinearAdd" if quantizer => binary(inputs, [0, 3], true),
        "QLinearMul" if quantizer => binary(inputs, [0, 3], false),
        "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or" | "Xor" if standard => {
            Ok(Inferred {
                element: Some(Element::Bool),
                ..binary(inputs, [0, 1], false)?
            })
        }
        "Sum" | "Max" | "Min" | "Mean" | "Where" if standard => {
            let mut dims = input(inputs, 0)?.dims.to_vec();
            for i in 1..inputs.len() {
                dims = broadcast(&dims, input(inputs, i)?.dims)?;
            }
            let all_equal = inputs.iter().flatten().all(|o| o.dims == dims && !o.is_constant);
            let is_sum = node.op == "Sum" && inputs.len() == 2 && all_equal;
            Ok(Inferred::new(if is_sum { Op::Add } else { Op::Binary }, dims))
        }
        "Concat" if standard => {
            let all: Vec<usize> = (0..inputs.len()).collect();
            concat(node, inputs, &all)
        }
        "QLinearConcat" if quantizer => {
            let data: Vec<usize> = (2..inputs.len()).step_by(3).collect();
            concat(node, inputs, &data)
        }
        "MaxPool" | "AveragePool" if standard => pool(node, inputs),
        "QLinearAveragePool" if quantizer => Ok(pool(node, inputs)?.reading(&[0])),
        "GlobalAveragePool" if standard => global(inputs, Pool::Average),
        "GlobalMaxPool" if standard => global(inputs, Pool::Max),
        "QLinearGlobalAveragePool" if quantizer => Ok(global(inputs, Pool::Average)?.reading(&[0])),
        "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin" | "ReduceProd" | "ReduceL1" | "ReduceL2"
        | "ReduceSumSquare" | "ReduceLogSumExp" | "ArgMax" | "ArgMin"
            if standard =>
        {
            reduce(node, inputs)
        }
        "Gemm" if standard => gemm(node, inputs, [0, 1]),
        "QGemm" if quantizer => gemm(node, inputs, [0, 3]),
        "MatMul" if standard => matmul(inputs, [0, 1]),
        "QLinearMatMul" if standard => matmul(inputs, [0, 3]),
        "Softmax" | "LogSoftmax" if standard => same(Op::Softmax),
        "QLinearSoftmax" if quantizer => Ok(Inferred::new(Op::Softmax, input(inputs, 0)?.dims.to_vec()).reading(&[0])),
        "Identity" | "Dropout" if standard => Ok(same(Op::View)?.reading(&[0])),
        "Flatten" if standard => flatten(node, inputs),
        "Reshape" if standard => reshape(inputs, node),
        "Squeeze" if standard => squeeze(node, inputs),
        "Unsqueeze" if standard => unsqueeze(node, inputs),
        "Transpose" if standard => transpose(node, inputs),
        "Slice" if standard => slice(node, inputs),
        "Split" if standard => split(node, inputs),
        "Pad" if standard => pad(node, inputs, opset),
        "Resize" | "Upsample" if standard => resize(node, inputs),
        "Expand" if standard => expand(inputs),
        "Tile" if standard => tile(inputs),
        "Gather" if standard => gather(node, inputs),
        "DepthToSpace" | "SpaceToDepth" if standard => depth_space(node, inputs),
        _ => Ok(Inferred {
            op: Op::Unknown,
            outputs: Vec::new(),
            element: None,
            data: None,
        }),
    }?;
    for dims in &inferred.outputs {
        bounded(dims)?;
    }
    Ok(inferred)
}

/// Refuses what no memory holds.
pub(super) fn bounded(dims: &[u64]) -> Result<u64, Refusal> {
    if dims.len() > 8 {
        return refuse("dimensions", dims.len(), "8 or fewer");
    }
    let elements = dims.iter().try_fold(1u64, |n, &d| {
        n.checked_mul(d).filter(|&n| n <= LIMIT_ELEMENTS && d <= LIMIT_DIM)
    });
    elements.map_or_else(|| refuse("shape", format!("{dims:?}"), "fewer than 2^40 elements"), Ok)
}

pub(super) fn input<'a>(inputs: &Inputs<'a>, at: usize) -> Result<Operand<'a>, Refusal> {
    match inputs.get(at) {
        Some(Some(operand)) => Ok(*operand),
        _ => refuse("inputs", inputs.iter().flatten().count(), format!("{} or more", at + 1)),
    }
}

pub(super) fn attribute<'n, 'a>(node: &'n Node<'a>, name: &str) -> Option<&'n Attribute<'a>> {
    node.attributes.iter().find(|a| a.name == name)
}

pub(super) fn attribute_int(node: &Node<'_>, name: &str, default: i64) -> i64 {
    attribute(node, name).map_or(default, |a| a.int)
}

pub(super) fn attribute_ints(node: &Node<'_>, name: &str) -> Option<Vec<i64>> {
    attribute(node, name).map(|a| a.ints.clone())
}

/// Integers that stand in an attribute (older opsets) or in a constant input (newer ones).
pub(super) fn ints_of(
    node: &Node<'_>,
    inputs: &Inputs<'_>,
    name: &'static str,
    at: usize,
) -> Result<Option<Vec<i64>>, Refusal> {
    match inputs.get(at) {
        Some(Some(operand)) => match operand.numbers {
            Some(numbers) => Ok(Some(integers(numbers))),
            None => refuse(name, "values that are computed", "constant ones"),
        },
        _ => Ok(attribute_ints(node, name)),
    }
}

/// An axis from −rank..rank.
pub(super) fn axis(value: i64, rank: usize) -> Result<usize, Refusal> {
    let rank_i = i64::try_from(rank).unwrap_or(i64::MAX);
    let at = if value < 0 { value.saturating_add(rank_i) } else { value };
    usize::try_from(at)
        .ok()
        .filter(|&a| a < rank)
        .map_or_else(|| refuse("axis", value, format!("-{rank}..{rank}")), Ok)
}

fn small(what: &'static str, value: u64) -> Result<u32, Refusal> {
    u32::try_from(value)
        .ok()
        .filter(|&v| v < 1 << 24)
        .map_or_else(|| refuse(what, value, "fewer than 2^24"), Ok)
}

/// Window attributes of a node for `spatial` dimensions (one or two), and the output size.
fn window(node: &Node<'_>, kernel: &[u64], size: &[u64]) -> Result<(Window, Vec<u64>), Refusal> {
    let spatial = size.len();
    let list = |name: &'static str, length: usize, default: u64| -> Result<Vec<u64>, Refusal> {
        let Some(found) = attribute_ints(node, name) else {
            return Ok(vec![default; length]);
        };
        let small = |&v: &i64| u64::try_from(v).ok().filter(|&v| v < 1 << 20);
        match found.iter().map(small).collect::<Option<Vec<u64>>>() {
            Some(list) if list.len() == length => Ok(list),
            _ => refuse(name, format!("{found:?}"), format!("{length} numbers of 0 or more")),
        }
    };
    let (strides, dilations) = (list("strides", spatial, 1)?, list("dilations", spatial, 1)?);
    let mut pads = list("pads", 2 * spatial, 0)?;
    if strides.contains(&0) || dilations.contains(&0) || kernel.contains(&0) {
        return refuse("window", "a step or size of 0", "1 or more");
    }
    let auto = attribute(node, "auto_pad").map_or(&b"NOTSET"[..], |a| a.text);
    let is_ceil = attribute_int(node, "ceil_mode", 0) != 0;
    let mut out = Vec::with_capacity(spatial);
    for i in 0..spatial {
        let reach = (kernel[i] - 1) * dilations[i] + 1;
        if auto == b"SAME_UPPER" || auto == b"SAME_LOWER" {
            let wanted = size[i].div_ceil(strides[i]);
            let total = (wanted.saturating_sub(1) * strides[i] + reach).saturating_sub(size[i]);
            let (less, more) = (total / 2, total - total / 2);
            (pads[i], pads[spatial + i]) = if auto == b"SAME_UPPER" {
                (less, more)
            } else {
                (more, less)
            };
            out.push(wanted);
            continue;
        }
        if auto == b"VALID" {
            (pads[i], pads[spatial + i]) = (0, 0);
        }
        let padded = size[i] + pads[i] + pads[spatial + i];
        let Some(room) = padded.checked_sub(reach) else {
            let found = format!("a window of {reach} on {} padded to {padded}", size[i]);
            return refuse("window", found, "one that fits");
        };
        let mut steps = if is_ceil {
            room.div_ceil(strides[i])
        } else {
            room / strides[i]
        };
        // A last window that begins behind the data is dropped (as torch and onnxruntime do).
        if is_ceil && steps * strides[i] >= size[i] + pads[i] {
            steps = steps.saturating_sub(1);
        }
        out.push(steps + 1);
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "bounded by 2^20 above; kernels by their weights"
    )]
    let pair = |list: &[u64], rest: u32| [list[0] as u32, list.get(1).map_or(rest, |&v| v as u32)];
    let (begin, end) = pads.split_at(spatial);
    let (begin, end) = (pair(begin, 0), pair(end, 0));
    let window = Window {
        kernel: pair(kernel, 1),
        stride: pair(&strides, 1),
        dilation: pair(&dilations, 1),
        pads: [begin[0], begin[1], end[0], end[1]],
    };
    Ok((window, out))
}

fn conv(node: &Node<'_>, inputs: &Inputs<'_>, [x, w]: [usize; 2]) -> Result<Inferred, Refusal> {
    let (x_at, x, w) = (x, input(inputs, x)?, input(inputs, w)?);
    if !(3..=4).contains(&x.dims.len()) {
        return Ok(Inferred {
            op: Op::Unknown,
            outputs: Vec::new(),
            element: None,
            data: None,
        });
    }
    if w.dims.len() != x.dims.len() {
        return refuse(
            "weights",
            format!("{:?}", w.dims),
            format!("{} dimensions", x.dims.len()),
        );
    }
    let groups = u64::try_from(attribute_int(node, "group", 1)).unwrap_or(0);
    let (cin, cout) = (x.dims[1], w.dims[0]);
    if groups == 0 || w.dims[1].checked_mul(groups) != Some(cin) || cout % groups != 0 {
        let found = format!("{cin} → {cout} channels, weights {:?}, {groups} groups", w.dims);
        return refuse("channels", found, "weights [cout, cin / groups, …]");
    }
    let kernel = &w.dims[2..];
    if kernel.iter().any(|&k| k > 1 << 12) {
        return refuse("kernel", format!("{kernel:?}"), "4096 or less");
    }
    let declared = attribute_ints(node, "kernel_shape");
    let fits = declared
        .as_ref()
        .is_none_or(|d| d.len() == kernel.len() && d.iter().zip(kernel).all(|(&d, &k)| u64::try_from(d) == Ok(k)));
    if !fits {
        return refuse("kernel_shape", format!("{declared:?}"), format!("{kernel:?}"));
    }
    let (window, out) = window(node, kernel, &x.dims[2..])?;
    let conv = Conv {
        cin: small("channels", cin)?,
        cout: small("channels", cout)?,
        groups: small("groups", groups)?,
        window,
    };
    let mut dims = vec![x.dims[0], cout];
    dims.extend(out);
    Ok(Inferred::new(Op::Conv(conv), dims).reading(&[x_at]))
}

fn pool(node: &Node<'_>, inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    if !(3..=4).contains(&x.dims.len()) {
        return Ok(Inferred {
            op: Op::Unknown,
            outputs: Vec::new(),
            element: None,
            data: None,
        });
    }
    let kernel = attribute_ints(node, "kernel_shape").unwrap_or_default();
    let small = |&k: &i64| u64::try_from(k).ok().filter(|&k| k < 1 << 20);
    let kernel: Vec<u64> = match kernel.iter().map(small).collect::<Option<Vec<u64>>>() {
        Some(list) if list.len() == x.dims.len() - 2 => list,
        _ => {
            return refuse(
                "kernel_shape",
                format!("{kernel:?}"),
                format!("{} numbers", x.dims.len() - 2),
            );
        }
    };
    let (window, out) = window(node, &kernel, &x.dims[2..])?;
    let kind = if node.op == "MaxPool" { Pool::Max } else { Pool::Average };
    let mut dims = vec![x.dims[0], x.dims[1]];
    dims.extend(out);
    Ok(Inferred::new(Op::Pool(kind, window), dims))
}

fn global(inputs: &Inputs<'_>, kind: Pool) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    if x.dims.len() < 3 {
        return refuse("input", format!("{:?}", x.dims), "3 or more dimensions");
    }
    let mut dims = x.dims[..2].to_vec();
    dims.resize(x.dims.len(), 1);
    Ok(Inferred::new(Op::GlobalPool(kind), dims))
}

fn reduce(node: &Node<'_>, inputs: &Inputs<'_>) -> Result<Inferred, Refusal> {
    let x = input(inputs, 0)?;
    let rank = x.dims.len();
    let is_arg = node.op.starts_with("Arg");
    let axes = if is_arg {
        vec![attribute_int(node, "axis", 0)]
    } else {
        match ints_of(node, inputs, "axes", 1)? {
            Some(axes) if !axes.is_empty() => axes,
            _ if attribute_int(node, "noop_with_empty_axes", 0) != 0 => Vec::new(),
            _ => (0..i64::try_from(rank).unwrap_or(0)).collect(),
        }
    };
    let mut is_reduced = vec![false; rank];
    for a in axes {
        is_reduced[axis(a, rank)?] = true;
    }
    let keep = attribute_int(node, "keepdims", 1) != 0;
    let dims = (0..rank)
        .filter(|&i| keep || !is_reduced[i])
        .map(|i| if is_reduced[i] { 1 } else { x.dims[i] })
        .collect();
    let is_plane = rank == 4 && is_reduced == [false, false, true, true];
    let op = match node.op {
        "ReduceMean" if is_plane => Op::GlobalPool(Pool::Average),
        "ReduceMax" if is_plane => Op::GlobalPool(Pool::Max),
        _ => Op::Reduce,
    };
    let element = is_arg.then_some(Element::I64);
    Ok(Inferred {
        element,
        ..Inferred::new(op, dims).reading(&[0])
    })
}

fn gemm(node: &Node<'_>, inputs: &Inputs<'_>, [a, b]: [usize; 2]) -> Result<Inferred, Refusal> {
    let (a_at, b_at, a, b) = (a, b, input(inputs, a)?, input(inputs, b)?);
    let turned = |dims: &[u64], name| match (dims, attribute_int(node, name, 0)) {
        (&[m, n], 0) => Ok((m, n)),
        (&[m, n], _) => Ok((n, m)),
        _ => refuse("input", format!("{dims:?}"), "2 dimensions"),
    };
    let ((rows, inner), (k, columns)) = (turned(a.dims, "transA")?, turned(b.dims, "transB")?);
    if inner != k {
        return refuse("inner dimension", k, inner);
    }
    product(
        b.is_constant,
        1,
        rows,
        inner,
        columns,
        vec![rows, columns],
        [a_at, b_at],
    )
}

fn matmul(inputs: &Inputs<'_>, [a, b]: [usize; 2]) -> Result<Inferred, Refusal> {
    let (a_at, b_at, a, b) = (a, b, input(inputs, a)?, input(inputs, b)?);
    // Vectors become matrices of one row or column, which is dropped again.
    let left: Vec<u64> = if a.dims.len() == 1 {
        vec![1, a.dims[0]]
    } else {
        a.dims.to_vec()
    };
    let right: Vec<u64> = if b.dims.len() == 1 {
        vec![b.dims[0], 1]
    } else {
        b.dims.to_vec()
    };
    let ([left_batch @ .., rows, inner], [right_batch @ .., k, columns]) = (left.as_slice(), right.as_slice()) else {
        return refuse("input", "a scalar", "1 or more dimensions");
    };
    if inner != k {
        return refuse("inner dimension", k, inner);
    }
    let mut dims = broadcast(left_batch, right_batch)?;
    let batch = bounded(&dims)?;
    if a.dims.len() > 1 {
        dims.push(*rows);
    }
    if b.dims.len() > 1 {
        dims.push(*columns);
    }
    let is_linear = b.is_constant && right_batch.iter().all(|&d| d == 1);
    let (batch, rows) = if is_linear {
        (1, batch.saturating_mul(*rows))
    } else {
        (batch, *rows)
    };
    product(is_linear, batch, rows, *inner, *columns, dims, [a_at, b_at])
}

fn product(
    is_linear: bool,
    batch: u64,
    rows: u64,
    inner: u64,
    columns: u64,
    dims: Vec<u64>,
    [a, b]: [usize; 2],
) -> Result<Inferred, Refusal> {
    bounded(&[batch, rows, inner.max(1), columns])?;
    Ok(if is_linear {
        let op = Op::Linear {
            rows,
            inputs: small("inputs", inner)?,
            outputs: small("outputs", columns)?,
        };
        Inferred::new(op, dims).reading(&[a])
    } else {
        let op = Op::MatMul {
            batch,
            rows,
            inner,
            columns,
        };
        Inferred::new(op, dims).reading(&[a, b])
    })
}

/// Numpy's rule: from the back, equal or one of them 1.
pub(super) fn broadcast(a: &[u64], b: &[u64]) -> Result<Vec<u64>, Refusal> {
    let rank = a.len().max(b.len());
    let at = |dims: &[u64], i: usize| {
        if i + dims.len() < rank {
            1
        } else {
            dims[i + dims.len() - rank]
        }
    };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (1, y) => Ok(y),
            _ => refuse("shapes", format!("{a:?} and {b:?}"), "dimensions that are equal or 1"),
        })
        .collect()
}

fn binary(inputs: &Inputs<'_>, [a, b]: [usize; 2], is_sum: bool) -> Result<Inferred, Refusal> {
    let (a_at, b_at, a, b) = (a, b, input(inputs, a)?, input(inputs, b)?);
    let dims = broadcast(a.dims, b.dims)?;
    let plain = a.dims == b.dims && !a.is_constant && !b.is_constant;
    Ok(Inferred::new(if is_sum && plain { Op::Add } else { Op::Binary }, dims).reading(&[a_at, b_at]))
}

fn concat(node: &Node<'_>, inputs: &Inputs<'_>, data: &[usize]) -> Result<Inferred, Refusal> {
    let first = input(inputs, *data.first().unwrap_or(&0))?;
    let along = axis(attribute_int(node, "axis", 0), first.dims.len())?;
    let mut dims = first.dims.to_vec();
    for &at in data.iter().skip(1) {
        let other = input(inputs, at)?.dims;
        let fits = other.len() == dims.len() && (0..dims.len()).all(|i| i == along || dims[i] == other[i]);
        if !fits {
            return refuse(
                "shapes",
                format!("{dims:?} and {other:?}"),
                format!("equal ones but for axis {along}"),
            );
        }
        dims[along] = dims[along].saturating_add(other[along]);
    }
    Ok(Inferred::new(Op::Concat, dims).reading(data))
}
