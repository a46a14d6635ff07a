//! A model with all of its inputs at hand, of whatever numbers they are: what a timing loop calls for a file that others made.
//! Floats are noise; whole numbers, which may choose rows or positions, are zeros and ones: valid in any table of two rows.

use std::borrow::Cow;

use cotk_run::seeds::Seeds;
use ort::session::SessionInputValue;
use ort::value::{DynValue, PrimitiveTensorElementType, Tensor, TensorElementType, ValueType};
use rand::RngExt;

use super::{builder, failed};
use crate::{Error, Result};

/// A session and one value for each of its inputs.
pub(crate) struct Fed {
    name: String,
    inner: ort::session::Session,
    values: Vec<(String, DynValue)>,
}

impl Fed {
    /// From the bytes of a model; `dims` gives each input's dimensions by its name, as they are to be run: the model may leave
    /// them open, or have the same.
    ///
    /// # Errors
    /// As [`super::Session::from_bytes`]; [`Error::Runtime`] for an input that `dims` lacks or contradicts, and for one whose
    /// numbers cannot be made up (text, 16-bit floats, sequences).
    pub(crate) fn new(
        name: &str,
        bytes: &[u8],
        threads: usize,
        dims: &[(String, Vec<i64>)],
        seeds: &Seeds,
    ) -> Result<Self> {
        let inner = builder(threads, name)?.commit_from_memory(bytes);
        let inner = inner.map_err(|e: ort::Error| failed("load", name, &e))?;
        let mut values = Vec::with_capacity(inner.inputs().len());
        for input in inner.inputs() {
            let wrong = |detail: String| Error::Runtime {
                action: "use",
                model: name.to_owned(),
                detail: format!("input {}: {detail}", input.name()),
            };
            let ValueType::Tensor { ty, shape, .. } = input.dtype() else {
                return Err(wrong("not a tensor".into()));
            };
            let wanted = dims.iter().find(|(of, _)| of == input.name()).map(|(_, dims)| dims);
            let wanted = wanted.ok_or_else(|| wrong("nothing says its shape".into()))?;
            let fits = |(found, wanted): (&i64, &i64)| *found < 1 || found == wanted;
            if shape.len() != wanted.len() || !shape.iter().zip(wanted).all(fits) {
                return Err(wrong(format!("shape {:?}, expected {wanted:?}", &shape[..])));
            }
            if wanted.iter().any(|&d| d < 1) {
                return Err(wrong(format!("shape {wanted:?}, expected fixed dimensions")));
            }
            let value = made_up(*ty, wanted, input.name(), seeds);
            let value = value.ok_or_else(|| wrong(format!("numbers of kind {ty:?}, expected f32, f64 or integers")))?;
            values.push((
                input.name().to_owned(),
                value.map_err(|e| failed("take an input for", name, &e))?,
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            inner,
            values,
        })
    }

    /// One call; its outputs are dropped.
    ///
    /// # Errors
    /// [`Error::Runtime`].
    pub(crate) fn call(&mut self) -> Result<()> {
        let inputs = self.values.iter();
        let inputs: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = inputs
            .map(|(name, value)| (name.as_str().into(), value.into()))
            .collect();
        let done = self.inner.run(inputs);
        done.map(drop).map_err(|e| failed("run", &self.name, &e))
    }
}

/// A tensor of made-up numbers; `None` for kinds that nothing is made up for.
fn made_up(ty: TensorElementType, dims: &[i64], name: &str, seeds: &Seeds) -> Option<ort::Result<DynValue>> {
    let count = dims.iter().map(|&d| usize::try_from(d).unwrap_or(0)).product();
    let mut rng = seeds.stream(&format!("plan: input {name}"));
    let mut floats = || -> Vec<f32> { (0..count).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect() };
    Some(match ty {
        TensorElementType::Float32 => tensor(dims, floats()),
        TensorElementType::Float64 => tensor(dims, floats().into_iter().map(f64::from).collect()),
        TensorElementType::Int64 => tensor(dims, bits::<i64>(count)),
        TensorElementType::Int32 => tensor(dims, bits::<i32>(count)),
        TensorElementType::Int16 => tensor(dims, bits::<i16>(count)),
        TensorElementType::Int8 => tensor(dims, bits::<i8>(count)),
        TensorElementType::Uint64 => tensor(dims, bits::<u64>(count)),
        TensorElementType::Uint32 => tensor(dims, bits::<u32>(count)),
        TensorElementType::Uint16 => tensor(dims, bits::<u16>(count)),
        TensorElementType::Uint8 => tensor(dims, bits::<u8>(count)),
        TensorElementType::Bool => tensor(dims, (0..count).map(|i| i % 2 == 1).collect()),
        _ => return None,
    })
}

/// 0, 1, 0, 1, …
fn bits<T: From<bool>>(count: usize) -> Vec<T> {
    (0..count).map(|i| T::from(i % 2 == 1)).collect()
}

fn tensor<T: PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static>(
    dims: &[i64],
    values: Vec<T>,
) -> ort::Result<DynValue> {
    Tensor::from_array((dims.to_vec(), values)).map(Tensor::into_dyn)
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::proto::{self, data_type};

    /// `sum = image + mask`, `rows = table[ids]`: three inputs of two kinds, a batch that is open.
    fn model() -> Vec<u8> {
        let value = |name: &str, elem_type: i32, dims: &[Option<i64>]| proto::ValueInfo {
            name: name.into(),
            r#type: Some(proto::Type {
                tensor_type: Some(proto::TensorType {
                    elem_type,
                    shape: Some(proto::TensorShape {
                        dim: dims
                            .iter()
                            .map(|dim| proto::Dimension {
                                dim_value: *dim,
                                dim_param: dim.is_none().then(|| "n".into()),
                            })
                            .collect(),
                    }),
                }),
            }),
        };
        let node = |op_type: &str, input: [&str; 2], output: &str| proto::Node {
            input: input.map(str::to_owned).into(),
            output: vec![output.into()],
            name: output.into(),
            op_type: op_type.into(),
            ..Default::default()
        };
        let table: Vec<u8> = (0..6u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
        proto::Model {
            ir_version: 8,
            graph: Some(proto::Graph {
                node: vec![
                    node("Add", ["image", "mask"], "sum"),
                    node("Gather", ["table", "ids"], "rows"),
                ],
                name: "three inputs".into(),
                initializer: vec![proto::Tensor {
                    dims: vec![2, 3],
                    data_type: data_type::FLOAT,
                    name: "table".into(),
                    raw_data: table,
                    ..Default::default()
                }],
                input: vec![
                    value("image", data_type::FLOAT, &[None, Some(3)]),
                    value("mask", data_type::FLOAT, &[None, Some(3)]),
                    value("ids", data_type::INT64, &[None, Some(4)]),
                ],
                output: vec![
                    value("sum", data_type::FLOAT, &[None, Some(3)]),
                    value("rows", data_type::FLOAT, &[None, Some(4), Some(3)]),
                ],
            }),
            opset_import: vec![proto::OperatorSetId {
                domain: String::new(),
                version: 17,
            }],
            ..Default::default()
        }
        .encode_to_vec()
    }

    fn dims(of: &[(&str, &[i64])]) -> Vec<(String, Vec<i64>)> {
        of.iter()
            .map(|(name, dims)| ((*name).to_owned(), dims.to_vec()))
            .collect()
    }

    #[test]
    fn every_input_of_a_model_is_fed_by_its_name_and_kind() {
        let (bytes, seeds) = (model(), Seeds::new(1));
        let all = dims(&[("ids", &[2, 4]), ("image", &[2, 3]), ("mask", &[2, 3])]);
        let mut fed = Fed::new("test", &bytes, 1, &all, &seeds).unwrap();
        (0..3).for_each(|_| fed.call().unwrap());
        for (wrong, said) in [
            (
                dims(&[("image", &[2, 3]), ("mask", &[2, 3])]),
                "input ids: nothing says its shape",
            ),
            (
                dims(&[("ids", &[2, 5]), ("image", &[2, 3]), ("mask", &[2, 3])]),
                "input ids: shape",
            ),
            (
                dims(&[("ids", &[2, 4]), ("image", &[0, 3]), ("mask", &[2, 3])]),
                "input image: shape",
            ),
        ] {
            let error = Fed::new("test", &bytes, 1, &wrong, &seeds).err().unwrap().to_string();
            assert!(error.contains(said), "{error}");
        }
        let text = made_up(TensorElementType::String, &[1], "x", &seeds);
        assert!(text.is_none());
    }
}
