//! The golden models as files: whatever form a checkpoint has (one file, shards, stacked experts, FP8), the logits are
//! those of its weights; what does not belong is refused by name.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use cotk_run::files;
use safetensors::tensor::{Dtype, TensorView, serialize};

use super::{drawn, logits, model, spec, tokens};
use crate::checkpoint::safetensors::Safetensors;
use crate::checkpoint::{CheckpointError, TensorSource, scale_shape, scales_of};
use crate::families::{self, LayerTensor, Matrix, Tensor};
use crate::inventory;
use crate::layers::cache::KvKind;
use crate::model::Model;
use crate::reference::PlainMoe;
use crate::spec::ModelSpec;

/// One case of each family.
const MODELS: [(&str, &str); 6] = [
    ("mixtral", "window"),
    ("olmoe", "clip"),
    ("qwen2_moe", "dense_between"),
    ("qwen3_moe", "biases"),
    ("deepseek_v2", "groups"),
    ("deepseek_v3", "published"),
];

/// A stored tensor.
#[derive(Clone)]
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

type Tensors = BTreeMap<String, Stored>;

fn f32s(shape: &[usize], values: &[f32]) -> Stored {
    Stored {
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// Every tensor of the model as published, in f32.
fn published(spec: &ModelSpec) -> Tensors {
    let tensor = |(tensor, shape): (Tensor, Vec<usize>)| {
        let name = families::of(spec).tensor_name(tensor);
        let values = drawn(&name, shape.iter().product());
        (name, f32s(&shape, &values))
    };
    inventory::tensors(spec).into_iter().map(tensor).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    files::write_atomic(path, &serialize(views, None).unwrap()).unwrap();
}

fn open(spec: &ModelSpec, folder: &Path) -> Result<Arc<dyn TensorSource>, CheckpointError> {
    let source = families::unstack(spec, Arc::new(Safetensors::open(folder)?))?;
    inventory::check(spec, source.as_ref(), true)?;
    Ok(source)
}

fn load(spec: &ModelSpec, folder: &Path) -> Result<Model, CheckpointError> {
    let source = open(spec, folder)?;
    let experts = PlainMoe::load(spec, source.as_ref())?;
    Ok(Model::load(spec.clone(), source.as_ref(), Arc::new(experts))?.with_kv(KvKind::F32))
}

fn written(spec: &ModelSpec, tensors: &Tensors) -> Result<Model, CheckpointError> {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("model.safetensors"), tensors);
    load(spec, folder.path())
}

fn same(case: &str, found: &Model, truth: &Model) {
    let tokens = tokens(case, truth.spec().vocab);
    assert_eq!(logits(found, &tokens, &[80]), logits(truth, &tokens, &[80]), "{case}");
}

fn refused(spec: &ModelSpec, tensors: &Tensors, says: &[&str]) {
    let error = written(spec, tensors).err().expect("must be refused").to_string();
    for part in says.iter().chain(&["model.safetensors"]) {
        assert!(error.contains(part), "`{error}` does not say `{part}`");
    }
}

#[test]
fn files_and_shards_give_the_weights_themselves() {
    for (family, case) in MODELS {
        let spec = spec(family, case);
        let truth = model(spec.clone(), &|_, _| {});
        let tensors = published(&spec);
        same(case, &written(&spec, &tensors).unwrap(), &truth);

        let folder = tempfile::tempdir().unwrap();
        let mut shards = [Tensors::new(), Tensors::new(), Tensors::new()];
        let mut index = serde_json::Map::new();
        for (at, (name, tensor)) in tensors.into_iter().enumerate() {
            index.insert(name.clone(), format!("model-{}.safetensors", at % 3).into());
            shards[at % 3].insert(name, tensor);
        }
        for (at, shard) in shards.iter().enumerate() {
            write(&folder.path().join(format!("model-{at}.safetensors")), shard);
        }
        let index = serde_json::json!({ "weight_map": index }).to_string();
        let index_file = folder.path().join("model.safetensors.index.json");
        files::write_atomic(&index_file, index.as_bytes()).unwrap();
        same(case, &load(&spec, folder.path()).unwrap(), &truth);
        std::fs::remove_file(folder.path().join("model-1.safetensors")).unwrap();
        let error = load(&spec, folder.path()).err().expect("must be refused").to_string();
        assert!(error.contains("model-1.safetensors"), "{error}");
    }
}

/// Rows `[outputs, inputs]` of one expert as they lie in a stack.
fn laid(rows: &Stored, is_exchanged: bool) -> Vec<u8> {
    if !is_exchanged {
        return rows.bytes.clone();
    }
    let (outputs, inputs) = (rows.shape[0], rows.shape[1]);
    let at = |row: usize, column: usize| &rows.bytes[(row * inputs + column) * 4..][..4];
    (0..inputs)
        .flat_map(|column| (0..outputs).flat_map(move |row| at(row, column).to_vec()))
        .collect()
}

/// The same model with stacked experts, as transformers 5 holds it.
fn stacked(spec: &ModelSpec, ending: &str, is_exchanged: bool) -> Tensors {
    let family = families::of(spec);
    let mut tensors = published(spec);
    for layer in spec.moe_layers() {
        let mut stacks = [Vec::new(), Vec::new()];
        for expert in (0..spec.routing.experts).map(inventory::expert_id) {
            let [gate, up, down] = Matrix::ALL.map(|matrix| {
                let tensor = Tensor::Layer(layer, LayerTensor::Expert(expert, matrix));
                tensors.remove(&family.tensor_name(tensor)).unwrap()
            });
            let both = Stored {
                dtype: Dtype::F32,
                shape: vec![2 * gate.shape[0], gate.shape[1]],
                bytes: [gate.bytes, up.bytes].concat(),
            };
            stacks[0].extend(laid(&both, is_exchanged));
            stacks[1].extend(laid(&down, is_exchanged));
        }
        let (inner, hidden) = (spec.moe_intermediate, spec.hidden);
        for (part, (bytes, [rows, columns])) in ["gate_up_proj", "down_proj"]
            .into_iter()
            .zip(stacks.into_iter().zip([[2 * inner, hidden], [hidden, inner]]))
        {
            let axes = if is_exchanged { [columns, rows] } else { [rows, columns] };
            let stack = Stored {
                dtype: Dtype::F32,
                shape: [&[spec.routing.experts][..], &axes].concat(),
                bytes,
            };
            tensors.insert(format!("model.layers.{}.mlp.experts.{part}{ending}", layer.0), stack);
        }
        let published = format!("model.layers.{}.block_sparse_moe.gate.weight", layer.0);
        if let Some(router) = tensors.remove(&published) {
            tensors.insert(format!("model.layers.{}.mlp.gate.weight", layer.0), router);
        }
    }
    tensors
}

#[test]
fn stacked_experts_are_the_experts() {
    for (family, case) in MODELS {
        let spec = spec(family, case);
        let truth = model(spec.clone(), &|_, _| {});
        for (ending, is_exchanged) in [("", false), (".weight", false), ("", true)] {
            let found = written(&spec, &stacked(&spec, ending, is_exchanged)).unwrap();
            same(case, &found, &truth);
        }
    }
}

/// The two shapes of a stack are told apart where one of them is square.
#[test]
fn square_stacks_are_told_apart_by_the_other() {
    for inner in [12, 24] {
        let mut spec = spec("qwen3_moe", "biases");
        assert_eq!(spec.hidden, 24);
        spec.moe_intermediate = inner;
        let truth = model(spec.clone(), &|_, _| {});
        for is_exchanged in [false, true] {
            let found = written(&spec, &stacked(&spec, "", is_exchanged)).unwrap();
            same("biases", &found, &truth);
        }
    }
}

#[test]
fn a_stack_that_does_not_fit_is_refused_by_name() {
    let spec = spec("olmoe", "published");
    let good = stacked(&spec, "", false);
    let (gate_up, down) = (
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    );
    let mut tensors = good.clone();
    tensors.remove(down);
    refused(&spec, &tensors, &["no tensor", down]);
    tensors.remove(gate_up);
    refused(
        &spec,
        &tensors,
        &["no tensor", "model.layers.1.mlp.experts.0.gate_proj.weight"],
    );
    let mut tensors = good.clone();
    tensors.insert(gate_up.into(), f32s(&[6, 24, 12], &[0.0; 6 * 24 * 12]));
    refused(&spec, &tensors, &[gate_up, "[6, 24, 12]", "expected [6, 24, 24]"]);
    let mut tensors = good.clone();
    tensors.insert(down.into(), f32s(&[6, 24, 13], &[0.0; 6 * 24 * 13]));
    refused(&spec, &tensors, &[down, "[6, 24, 13]", "expected [6, 24, 12]"]);
    let mut tensors = good.clone();
    let codes = Stored {
        dtype: Dtype::F8_E4M3,
        shape: vec![6, 24, 12],
        bytes: vec![0; 6 * 24 * 12],
    };
    tensors.insert(down.into(), codes);
    refused(&spec, &tensors, &[down, "F8_E4M3", "F32, F16 or BF16"]);
    let mut tensors = good;
    let stack = tensors.get_mut(down).unwrap();
    stack.bytes[(2 * 24 * 12 + 5) * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    refused(
        &spec,
        &tensors,
        &["model.layers.1.mlp.experts.2.down_proj.weight", "NaN at index 5"],
    );
}

/// What a byte of e4m3fn says, by moving its bits into those of an f32.
fn e4m3(byte: u8) -> f32 {
    let (sign, rest) = (u32::from(byte >> 7) << 31, u32::from(byte & 0x7f) << 20);
    // 2^120 mends the bias, subnormal numbers too.
    f32::from_bits(sign | rest) * 2f32.powi(120)
}

/// Bytes that are numbers, and scales, by name.
fn codes(name: &str, count: usize) -> Vec<u8> {
    super::uniform(&format!("codes of {name}"), count)
        .map(|u| (u * 256.0) as u8)
        .map(|byte| if byte & 0x7f == 0x7f { byte & 0x80 } else { byte })
        .collect()
}

fn scales(name: &str, count: usize) -> Vec<f32> {
    super::uniform(name, count).map(|u| (u + 0.5) / 700.0).collect()
}

/// Projections are in FP8; embeddings, norms, biases, router and head stay.
fn is_fp8(name: &str, shape: &[usize]) -> bool {
    shape.len() == 2 && name.contains("_proj") && !name.ends_with(".bias")
}

#[test]
fn fp8_is_dequantised_by_its_scales() {
    let mut spec = spec("deepseek_v3", "published");
    // Blocks of 128 and cut ones, on both axes.
    spec.moe_intermediate = 130;
    spec.layers.truncate(2);
    let shapes: BTreeMap<String, Vec<usize>> = published(&spec).into_iter().map(|(name, t)| (name, t.shape)).collect();
    let mut tensors = published(&spec);
    let names: Vec<String> = shapes
        .iter()
        .filter(|(n, s)| is_fp8(n, s))
        .map(|(n, _)| n.clone())
        .collect();
    assert!(names.len() > 20);
    for name in &names {
        let [rows, columns] = shapes[name][..] else {
            unreachable!()
        };
        let [high, wide] = scale_shape(rows, columns);
        let stored = Stored {
            dtype: Dtype::F8_E4M3,
            shape: vec![rows, columns],
            bytes: codes(name, rows * columns),
        };
        tensors.insert(name.clone(), stored);
        let scales = scales(&scales_of(name), high * wide);
        tensors.insert(scales_of(name), f32s(&[high, wide], &scales));
    }
    let truth = model(spec.clone(), &|name, values| {
        if let Some(&[rows, columns]) = shapes.get(name).map(Vec::as_slice).filter(|s| is_fp8(name, s)) {
            let [high, wide] = scale_shape(rows, columns);
            let scales = scales(&scales_of(name), high * wide);
            for (at, (value, code)) in values.iter_mut().zip(codes(name, rows * columns)).enumerate() {
                *value = e4m3(code) * scales[at / columns / 128 * wide + at % columns / 128];
            }
        }
    });
    same("published", &written(&spec, &tensors).unwrap(), &truth);

    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let mut lacking = tensors.clone();
    lacking.remove(&scales_of(name));
    refused(&spec, &lacking, &["no tensor", &scales_of(name)]);
    let mut short = tensors.clone();
    short.insert(scales_of(name), f32s(&[1, 1], &[1.0]));
    refused(&spec, &short, &[&scales_of(name), "[1, 1]", "expected [2, 1]"]);
    let mut other = tensors.clone();
    let exponents = Stored {
        dtype: Dtype::F8_E8M0,
        shape: vec![2, 1],
        bytes: vec![127; 2],
    };
    other.insert(scales_of(name), exponents);
    refused(&spec, &other, &[&scales_of(name), "F8_E8M0", "F32"]);
    let mut damaged = tensors.clone();
    damaged.get_mut(name).unwrap().bytes[7] = 0xff;
    refused(&spec, &damaged, &[name, "NaN at index 7"]);
    let mut unbounded = tensors;
    unbounded.insert(scales_of(name), f32s(&[2, 1], &[1.0, f32::INFINITY]));
    refused(&spec, &unbounded, &[&scales_of(name), "inf at index 1"]);
}

#[test]
fn a_tensor_that_no_part_reads_is_refused() {
    let spec = spec("mixtral", "published");
    let good = published(&spec);
    for (name, is_refused) in [
        // A bias that the config does not promise would be left out in silence.
        ("model.layers.0.self_attn.q_proj.bias", true),
        ("model.layers.2.input_layernorm.weight", true),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", false),
    ] {
        let mut tensors = good.clone();
        tensors.insert(name.into(), f32s(&[24], &[0.0; 24]));
        if is_refused {
            refused(&spec, &tensors, &[name, "not of this model"]);
        } else {
            written(&spec, &tensors).unwrap();
        }
    }
}

#[test]
fn layers_for_further_tokens_and_a_second_head_are_left_out() {
    for (family, case, name) in [
        ("deepseek_v3", "published", "model.layers.3.eh_proj.weight"),
        ("deepseek_v3", "plain_gates", "lm_head.weight"),
    ] {
        let spec = spec(family, case);
        let mut tensors = published(&spec);
        tensors.insert(name.into(), f32s(&[2], &[0.0; 2]));
        same(
            case,
            &written(&spec, &tensors).unwrap(),
            &model(spec.clone(), &|_, _| {}),
        );
    }
    let spec = spec("deepseek_v3", "published");
    let mut tensors = published(&spec);
    tensors.insert("model.layers.4.eh_proj.weight".into(), f32s(&[2], &[0.0; 2]));
    refused(&spec, &tensors, &["model.layers.4.eh_proj.weight"]);
}

#[test]
fn half_precision_files_load_exactly() {
    for dtype in [Dtype::F16, Dtype::BF16] {
        let spec = spec("olmoe", "published");
        let round = move |v: f32| match dtype {
            Dtype::F16 => half::f16::from_f32(v).to_f32(),
            _ => half::bf16::from_f32(v).to_f32(),
        };
        let mut tensors = published(&spec);
        for tensor in tensors.values_mut() {
            let values = tensor.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            tensor.bytes = match dtype {
                Dtype::F16 => values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
                _ => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
            };
            tensor.dtype = dtype;
        }
        let truth = model(spec.clone(), &|_, values| {
            values.iter_mut().for_each(|v| *v = round(*v))
        });
        same("published", &written(&spec, &tensors).unwrap(), &truth);
    }
}
