//! The bytes of an ONNX file that others made, as borrowed parts: nothing of the weights is copied, and what is wrong is
//! named with its place in the file. Field numbers as in ONNX's `onnx.proto`; unknown fields are skipped. What the parts
//! mean is `infer`'s. Laws: no bytes make it panic; what it allocates is bounded, whatever the file says.

/// A protobuf that cannot be read: where, and what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Broken {
    pub(super) offset: usize,
    pub(super) detail: String,
}

type Result<T, E = Broken> = std::result::Result<T, E>;

/// Repeated entries (nodes, attributes, names, numbers) that one file may have in all.
const LIMIT_ENTRIES: usize = 2_000_000;

/// A part of the file and where it begins.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Part<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) offset: usize,
}

/// The parts of a model that a plan needs.
#[derive(Debug, Default)]
pub(super) struct Model<'a> {
    pub(super) producer: &'a str,
    pub(super) producer_version: &'a str,
    /// `(domain, version)`.
    pub(super) opsets: Vec<(&'a str, i64)>,
    pub(super) graph: Option<Graph<'a>>,
    /// Names of functions that the file defines itself.
    pub(super) functions: Vec<&'a str>,
    /// `(key, value)`.
    pub(super) metadata: Vec<(&'a str, &'a str)>,
}

#[derive(Debug, Default)]
pub(super) struct Graph<'a> {
    pub(super) name: &'a str,
    pub(super) nodes: Vec<Node<'a>>,
    pub(super) initializers: Vec<Tensor<'a>>,
    pub(super) inputs: Vec<ValueInfo<'a>>,
    pub(super) outputs: Vec<ValueInfo<'a>>,
    pub(super) values: Vec<ValueInfo<'a>>,
}

#[derive(Debug, Default)]
pub(super) struct Node<'a> {
    pub(super) name: &'a str,
    pub(super) op: &'a str,
    pub(super) domain: &'a str,
    pub(super) inputs: Vec<&'a str>,
    pub(super) outputs: Vec<&'a str>,
    pub(super) attributes: Vec<Attribute<'a>>,
}

#[derive(Debug, Default)]
pub(super) struct Attribute<'a> {
    pub(super) name: &'a str,
    pub(super) int: i64,
    pub(super) float: f32,
    pub(super) text: &'a [u8],
    pub(super) ints: Vec<i64>,
    pub(super) floats: Vec<f32>,
    pub(super) tensor: Option<Tensor<'a>>,
    /// Holds a graph of its own (If, Loop, Scan).
    pub(super) is_graph: bool,
}

#[derive(Debug, Default)]
pub(super) struct Tensor<'a> {
    pub(super) offset: usize,
    pub(super) name: &'a str,
    pub(super) dims: Vec<i64>,
    pub(super) data_type: i64,
    /// Little endian.
    pub(super) raw: Option<Part<'a>>,
    /// Numbers in typed fields, at most [`SMALL`] of them: beyond that nobody needs their values.
    pub(super) ints: Vec<i64>,
    pub(super) floats: Vec<f64>,
    /// Its values lie in another file, which is never opened.
    pub(super) is_external: bool,
}

/// Values of a constant are kept up to this count: shapes, axes, scales.
pub(super) const SMALL: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct ValueInfo<'a> {
    pub(super) name: &'a str,
    pub(super) element: i64,
    /// `None`: no shape given.
    pub(super) dims: Option<Vec<Dim<'a>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dim<'a> {
    Fixed(i64),
    /// Symbolic; an empty name where none is given.
    Open(&'a str),
}

/// Reads a whole file.
pub(super) fn model(bytes: &[u8]) -> Result<Model<'_>> {
    let mut model = Model::default();
    let mut budget = LIMIT_ENTRIES;
    Part { bytes, offset: 0 }.fields("model", |field| {
        match (field.number, field.value) {
            (2, Value::Bytes(part)) => model.producer = part.text("producer_name")?,
            (3, Value::Bytes(part)) => model.producer_version = part.text("producer_version")?,
            (7, Value::Bytes(part)) => model.graph = Some(graph(part, &mut budget)?),
            (8, Value::Bytes(part)) => {
                spend(&mut budget, part.offset)?;
                model.opsets.push(opset(part)?);
            }
            (14, Value::Bytes(part)) => {
                spend(&mut budget, part.offset)?;
                let mut entry = ("", "");
                part.fields("metadata_props", |inner| {
                    match (inner.number, inner.value) {
                        (1, Value::Bytes(key)) => entry.0 = key.text("key of the metadata")?,
                        (2, Value::Bytes(value)) => entry.1 = value.text("value of the metadata")?,
                        _ => {}
                    }
                    Ok(())
                })?;
                model.metadata.push(entry);
            }
            (25, Value::Bytes(part)) => {
                spend(&mut budget, part.offset)?;
                part.fields("function", |inner| {
                    if let (1, Value::Bytes(name)) = (inner.number, inner.value) {
                        model.functions.push(name.text("function name")?);
                    }
                    Ok(())
                })?;
            }
            (2 | 3 | 7 | 8 | 25, _) => return Err(field.wrong("a length-delimited field")),
            _ => {}
        }
        Ok(())
    })?;
    Ok(model)
}

fn spend(budget: &mut usize, offset: usize) -> Result<()> {
    *budget = budget.checked_sub(1).ok_or_else(|| Broken {
        offset,
        detail: format!("more than {LIMIT_ENTRIES} entries"),
    })?;
    Ok(())
}

fn opset(part: Part<'_>) -> Result<(&str, i64)> {
    let mut entry = ("", 0);
    part.fields("opset_import", |field| {
        match (field.number, field.value) {
            (1, Value::Bytes(text)) => entry.0 = text.text("domain")?,
            (2, Value::Number(version)) => entry.1 = version,
            _ => {}
        }
        Ok(())
    })?;
    Ok(entry)
}

fn graph<'a>(part: Part<'a>, budget: &mut usize) -> Result<Graph<'a>> {
    let mut graph = Graph::default();
    part.fields("graph", |field| {
        let Value::Bytes(inner) = field.value else {
            return match field.number {
                1 | 2 | 5 | 11..=13 => Err(field.wrong("a length-delimited field")),
                _ => Ok(()),
            };
        };
        if matches!(field.number, 1 | 5 | 11..=13) {
            spend(budget, inner.offset)?;
        }
        match field.number {
            1 => graph.nodes.push(node(inner, budget)?),
            2 => graph.name = inner.text("graph name")?,
            5 => graph.initializers.push(tensor(inner, budget)?),
            11 => graph.inputs.push(value_info(inner, budget)?),
            12 => graph.outputs.push(value_info(inner, budget)?),
            13 => graph.values.push(value_info(inner, budget)?),
            _ => {}
        }
        Ok(())
    })?;
    Ok(graph)
}

fn node<'a>(part: Part<'a>, budget: &mut usize) -> Result<Node<'a>> {
    let mut node = Node::default();
    part.fields("node", |field| {
        let Value::Bytes(inner) = field.value else {
            return match field.number {
                1..=5 | 7 => Err(field.wrong("a length-delimited field")),
                _ => Ok(()),
            };
        };
        match field.number {
            1 => {
                spend(budget, inner.offset)?;
                node.inputs.push(inner.text("input of a node")?);
            }
            2 => {
                spend(budget, inner.offset)?;
                node.outputs.push(inner.text("output of a node")?);
            }
            3 => node.name = inner.text("name of a node")?,
            4 => node.op = inner.text("operator of a node")?,
            5 => {
                spend(budget, inner.offset)?;
                node.attributes.push(attribute(inner, budget)?);
            }
            7 => node.domain = inner.text("domain of a node")?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(node)
}

fn attribute<'a>(part: Part<'a>, budget: &mut usize) -> Result<Attribute<'a>> {
    let mut found = Attribute::default();
    part.fields("attribute", |field| {
        match (field.number, field.value) {
            (1, Value::Bytes(text)) => found.name = text.text("name of an attribute")?,
            (2, Value::Four(bits)) => found.float = f32::from_le_bytes(bits),
            (3, Value::Number(number)) => found.int = number,
            (4, Value::Bytes(text)) => found.text = text.bytes,
            (5, Value::Bytes(inner)) => found.tensor = Some(tensor(inner, budget)?),
            (6 | 11, _) => found.is_graph = true,
            (7, Value::Four(bits)) => {
                spend(budget, field.offset)?;
                found.floats.push(f32::from_le_bytes(bits));
            }
            (7, Value::Bytes(packed)) => {
                for bits in packed.fours()? {
                    spend(budget, packed.offset)?;
                    found.floats.push(f32::from_le_bytes(*bits));
                }
            }
            (8, Value::Number(number)) => {
                spend(budget, field.offset)?;
                found.ints.push(number);
            }
            (8, Value::Bytes(packed)) => packed.numbers(|number| {
                spend(budget, packed.offset)?;
                found.ints.push(number);
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(found)
}

fn tensor<'a>(part: Part<'a>, budget: &mut usize) -> Result<Tensor<'a>> {
    let mut found = Tensor {
        offset: part.offset,
        ..Tensor::default()
    };
    part.fields("tensor", |field| {
        match (field.number, field.value) {
            (1, Value::Number(number)) => {
                spend(budget, field.offset)?;
                found.dims.push(number);
            }
            (1, Value::Bytes(packed)) => packed.numbers(|number| {
                spend(budget, packed.offset)?;
                found.dims.push(number);
                Ok(())
            })?,
            (2, Value::Number(number)) => found.data_type = number,
            (4, Value::Four(bits)) => push_small(&mut found.floats, f64::from(f32::from_le_bytes(bits))),
            (4, Value::Bytes(packed)) => {
                for bits in packed.fours()? {
                    push_small(&mut found.floats, f64::from(f32::from_le_bytes(*bits)));
                }
            }
            // int32_data, int64_data, uint64_data.
            (5 | 7 | 11, Value::Number(number)) => push_small(&mut found.ints, number),
            (5 | 7 | 11, Value::Bytes(packed)) => packed.numbers(|number| {
                push_small(&mut found.ints, number);
                Ok(())
            })?,
            (8, Value::Bytes(text)) => found.name = text.text("name of a tensor")?,
            (9, Value::Bytes(raw)) => found.raw = Some(raw),
            (10, Value::Eight(bits)) => push_small(&mut found.floats, f64::from_le_bytes(bits)),
            (10, Value::Bytes(packed)) => {
                for bits in packed.bytes.as_chunks::<8>().0 {
                    push_small(&mut found.floats, f64::from_le_bytes(*bits));
                }
            }
            (13, _) => found.is_external = true,
            (14, Value::Number(location)) => found.is_external |= location == 1,
            _ => {}
        }
        Ok(())
    })?;
    Ok(found)
}

/// One more than [`SMALL`] is kept, so that too many can be told from enough.
fn push_small<T>(list: &mut Vec<T>, value: T) {
    if list.len() <= SMALL {
        list.push(value);
    }
}

fn value_info<'a>(part: Part<'a>, budget: &mut usize) -> Result<ValueInfo<'a>> {
    let mut found = ValueInfo::default();
    part.fields("value_info", |field| {
        match (field.number, field.value) {
            (1, Value::Bytes(text)) => found.name = text.text("name of a value")?,
            (2, Value::Bytes(inner)) => inner.fields("type", |field| {
                let (1, Value::Bytes(tensor)) = (field.number, field.value) else {
                    return Ok(());
                };
                tensor.fields("tensor_type", |field| {
                    match (field.number, field.value) {
                        (1, Value::Number(number)) => found.element = number,
                        (2, Value::Bytes(shape)) => found.dims = Some(dims(shape, budget)?),
                        _ => {}
                    }
                    Ok(())
                })
            })?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(found)
}

fn dims<'a>(shape: Part<'a>, budget: &mut usize) -> Result<Vec<Dim<'a>>> {
    let mut dims = Vec::new();
    shape.fields("shape", |field| {
        let (1, Value::Bytes(inner)) = (field.number, field.value) else {
            return Ok(());
        };
        spend(budget, inner.offset)?;
        let mut dim = Dim::Open("");
        inner.fields("dimension", |field| {
            match (field.number, field.value) {
                (1, Value::Number(number)) => dim = Dim::Fixed(number),
                (2, Value::Bytes(text)) => dim = Dim::Open(text.text("name of a dimension")?),
                _ => {}
            }
            Ok(())
        })?;
        dims.push(dim);
        Ok(())
    })?;
    Ok(dims)
}

/// One field as it stands in the file.
#[derive(Debug, Clone, Copy)]
struct Field<'a> {
    number: u64,
    value: Value<'a>,
    offset: usize,
    place: &'static str,
}

#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Number(i64),
    Four([u8; 4]),
    Eight([u8; 8]),
    Bytes(Part<'a>),
}

impl Field<'_> {
    fn wrong(&self, expected: &str) -> Broken {
        Broken {
            offset: self.offset,
            detail: format!("field {} of a {}: expected {expected}", self.number, self.place),
        }
    }
}

impl<'a> Part<'a> {
    /// Calls `each` for every field, in order.
    fn fields(self, place: &'static str, mut each: impl FnMut(Field<'a>) -> Result<()>) -> Result<()> {
        let mut at = 0;
        while at < self.bytes.len() {
            let offset = self.offset + at;
            let broken = |detail: String| Broken {
                offset,
                detail: format!("{place}: {detail}"),
            };
            let key = self
                .varint(&mut at)
                .ok_or_else(|| broken("ends inside a field".into()))?;
            let rest = self.bytes.len() - at;
            let take = |at: &mut usize, length: usize| {
                let from = *at;
                *at += length;
                &self.bytes[from..*at]
            };
            let short = |wanted: u64| broken(format!("a field of {wanted} bytes, {rest} are left"));
            let value = match key & 7 {
                0 => Value::Number(
                    self.varint(&mut at)
                        .ok_or_else(|| broken("ends inside a number".into()))?
                        .cast_signed(),
                ),
                1 => Value::Eight(take(&mut at, 8.min(rest)).try_into().map_err(|_| short(8))?),
                2 => {
                    let length = self
                        .varint(&mut at)
                        .ok_or_else(|| broken("ends inside a length".into()))?;
                    let rest = self.bytes.len() - at;
                    let fits = usize::try_from(length).ok().filter(|&l| l <= rest);
                    let length = fits.ok_or_else(|| broken(format!("a field of {length} bytes, {rest} are left")))?;
                    let offset = self.offset + at;
                    Value::Bytes(Part {
                        bytes: take(&mut at, length),
                        offset,
                    })
                }
                5 => Value::Four(take(&mut at, 4.min(rest)).try_into().map_err(|_| short(4))?),
                other => return Err(broken(format!("wire type {other}, expected 0, 1, 2 or 5"))),
            };
            each(Field {
                number: key >> 3,
                value,
                offset,
                place,
            })?;
        }
        Ok(())
    }

    /// Packed numbers.
    fn numbers(self, mut each: impl FnMut(i64) -> Result<()>) -> Result<()> {
        let mut at = 0;
        while at < self.bytes.len() {
            let offset = self.offset + at;
            let number = self.varint(&mut at).ok_or_else(|| Broken {
                offset,
                detail: "ends inside a packed number".into(),
            })?;
            each(number.cast_signed())?;
        }
        Ok(())
    }

    fn fours(self) -> Result<&'a [[u8; 4]]> {
        match self.bytes.as_chunks::<4>() {
            (chunks, []) => Ok(chunks),
            _ => Err(Broken {
                offset: self.offset,
                detail: format!("{} bytes of packed floats", self.bytes.len()),
            }),
        }
    }

    fn varint(self, at: &mut usize) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.bytes.get(*at)?;
            *at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn text(self, what: &str) -> Result<&'a str> {
        std::str::from_utf8(self.bytes).map_err(|e| Broken {
            offset: self.offset + e.valid_up_to(),
            detail: format!("{what}: not UTF-8"),
        })
    }
}
