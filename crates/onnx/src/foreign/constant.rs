//! Constants of a foreign network: their dimensions always, their values where they are few enough to be shapes, axes or
//! scales; and the arithmetic on those that exporters emit around Reshape. Values are `f64`: exact for every dimension.

use super::shapes::{attribute_int, attribute_ints};
use super::wire::{Node, SMALL, Tensor};

/// ONNX's `data_type` numbers, as far as a plan tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    F32,
    F64,
    Half,
    U8,
    I8,
    I16,
    I32,
    I64,
    Bool,
    Other,
}

impl Element {
    pub(super) fn of(data_type: i64) -> Self {
        match data_type {
            1 => Self::F32,
            2 => Self::U8,
            3 => Self::I8,
            4 | 5 => Self::I16,
            6 | 12 => Self::I32,
            7 | 13 => Self::I64,
            9 => Self::Bool,
            10 | 16 => Self::Half,
            11 => Self::F64,
            _ => Self::Other,
        }
    }

    pub(super) fn bytes(self) -> u32 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::Half | Self::I16 => 2,
            Self::F32 | Self::I32 | Self::Other => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// Codes of activations and weights.
    pub(super) fn is_code(self) -> bool {
        matches!(self, Self::U8 | Self::I8)
    }
}

/// A value that is known when the file is read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Constant {
    /// Row major; `None`: too many, or in another file.
    pub(super) numbers: Option<Vec<f64>>,
    /// Behind a `DequantizeLinear`: 8-bit codes with scales.
    pub(super) is_coded: bool,
}

/// The values of a tensor of `count` elements; `Err` when it holds another number of them.
pub(super) fn values(tensor: &Tensor<'_>, count: u64) -> Result<Option<Vec<f64>>, String> {
    if tensor.is_external {
        return Ok(None);
    }
    let element = Element::of(tensor.data_type);
    if let Some(raw) = tensor.raw {
        let width = u64::from(element.bytes());
        if element != Element::Other && count.checked_mul(width) != Some(raw.bytes.len() as u64) {
            return Err(format!(
                "{} bytes for {count} elements of {width} bytes",
                raw.bytes.len()
            ));
        }
        if count > SMALL as u64 {
            return Ok(None);
        }
        return Ok(raw_values(element, raw.bytes));
    }
    let found = tensor.ints.len().max(tensor.floats.len());
    if found <= SMALL && found as u64 != count {
        // 4-bit and complex kinds pack differently: nobody asks for their values.
        let is_packed = matches!(element, Element::Other);
        return if is_packed {
            Ok(None)
        } else {
            Err(format!("{found} values for {count} elements"))
        };
    }
    if found > SMALL {
        return Ok(None);
    }
    #[expect(
        clippy::cast_precision_loss,
        reason = "dimensions and axes; ends of slices may round"
    )]
    let ints = tensor.ints.iter().map(|&i| i as f64);
    Ok(Some(if tensor.floats.is_empty() {
        ints.collect()
    } else {
        tensor.floats.clone()
    }))
}

fn raw_values(element: Element, bytes: &[u8]) -> Option<Vec<f64>> {
    #[expect(
        clippy::cast_precision_loss,
        reason = "dimensions and axes; ends of slices may round"
    )]
    let values = match element {
        Element::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f64::from(f32::from_le_bytes(*b)))
            .collect(),
        Element::F64 => bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| f64::from_le_bytes(*b))
            .collect(),
        Element::I64 => bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b) as f64)
            .collect(),
        Element::I32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f64::from(i32::from_le_bytes(*b)))
            .collect(),
        Element::U8 | Element::Bool => bytes.iter().map(|&b| f64::from(b)).collect(),
        Element::I8 => bytes.iter().map(|&b| f64::from(i8::from_le_bytes([b]))).collect(),
        Element::Half | Element::I16 | Element::Other => return None,
    };
    Some(values)
}

/// As integers, for dimensions and axes.
#[expect(
    clippy::cast_possible_truncation,
    reason = "saturates: bounds are checked where they are used"
)]
pub(super) fn integers(numbers: &[f64]) -> Vec<i64> {
    numbers.iter().map(|&v| v as i64).collect()
}

/// The values of a node whose inputs are all known: what stands around Reshape, Resize and Expand. `None`: not folded.
pub(super) fn fold(node: &Node<'_>, inputs: &[Option<&[f64]>]) -> Option<Vec<f64>> {
    let at = |i: usize| inputs.get(i).copied().flatten();
    let x = at(0)?;
    let binary = |f: fn(f64, f64) -> f64| {
        let (a, b) = (x, at(1)?);
        let length = if a.len() == 1 || b.len() == 1 {
            a.len().max(b.len())
        } else {
            a.len()
        };
        if b.len() != length && b.len() != 1 || a.len() != length && a.len() != 1 {
            return None;
        }
        let one = |list: &[f64], i: usize| if list.len() == 1 { list[0] } else { list[i] };
        Some((0..length).map(|i| f(one(a, i), one(b, i))).collect::<Vec<f64>>())
    };
    match node.op {
        "Identity" | "Cast" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => Some(x.to_vec()),
        "Neg" => Some(x.iter().map(|v| -v).collect()),
        "Floor" => Some(x.iter().map(|v| v.floor()).collect()),
        "Ceil" => Some(x.iter().map(|v| v.ceil()).collect()),
        "Sqrt" => Some(x.iter().map(|v| v.sqrt()).collect()),
        "Add" => binary(|a, b| a + b),
        "Sub" => binary(|a, b| a - b),
        "Mul" => binary(|a, b| a * b),
        // Integer division truncates; on real numbers nobody asks for the digits.
        "Div" => binary(|a, b| {
            if a.fract() == 0.0 && b.fract() == 0.0 {
                (a / b).trunc()
            } else {
                a / b
            }
        }),
        "Min" => binary(f64::min),
        "Max" => binary(f64::max),
        "ReduceProd" => Some(vec![x.iter().product()]),
        "Gather" if attribute_int(node, "axis", 0) == 0 => {
            let length = i64::try_from(x.len()).ok()?;
            let pick = |i: i64| {
                let i = if i < 0 { i + length } else { i };
                usize::try_from(i).ok().and_then(|i| x.get(i)).copied()
            };
            integers(at(1)?).into_iter().map(pick).collect()
        }
        "Concat" => {
            let mut all = Vec::new();
            for input in inputs {
                all.extend_from_slice((*input)?);
            }
            (all.len() <= SMALL).then_some(all)
        }
        "Slice" => {
            let given = |i: usize, name: &str| at(i).map(integers).or_else(|| attribute_ints(node, name));
            let (starts, ends) = (given(1, "starts")?, given(2, "ends")?);
            let steps = given(4, "steps").unwrap_or_else(|| vec![1]);
            let ([start], [end], [step]) = (starts.as_slice(), ends.as_slice(), steps.as_slice()) else {
                return None;
            };
            let length = i64::try_from(x.len()).ok()?;
            let place = |i: i64| if i < 0 { i.saturating_add(length) } else { i }.clamp(0, length);
            let step = usize::try_from(*step).ok().filter(|&s| s > 0)?;
            let (from, to) = (usize::try_from(place(*start)).ok()?, usize::try_from(place(*end)).ok()?);
            Some(x.get(from..to.max(from))?.iter().step_by(step).copied().collect())
        }
        _ => None,
    }
}
