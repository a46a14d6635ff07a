//! A checkpoint of three times the memory that compressing it may take.

use std::io::Write;

use serde_json::{Map, Value, json};

use crate::program::{Workplace, in_repository};

const LAYERS: usize = 40;
const EXPERTS: usize = 128;
const HIDDEN: usize = 64;
const INNER: usize = 256;

/// The tiny checkpoint with many layers of many experts, each weight drawn.
fn write_large(place: &Workplace) -> u64 {
    let folder = place.copy_of_tiny("large");
    let mut config: Value = serde_json::from_str(&fs_err::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    config["num_hidden_layers"] = json!(LAYERS);
    config["num_experts"] = json!(EXPERTS);
    config["moe_intermediate_size"] = json!(INNER);
    config["mlp_only_layers"] = json!([]);
    fs_err::write(folder.join("config.json"), config.to_string()).unwrap();
    let heads = 64;
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![512, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let mut tensor = |name: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        };
        tensor("input_layernorm.weight", &[HIDDEN]);
        tensor("post_attention_layernorm.weight", &[HIDDEN]);
        for (name, rows) in [("q", heads), ("k", 32), ("v", 32)] {
            tensor(&format!("self_attn.{name}_proj.weight"), &[rows, HIDDEN]);
            tensor(&format!("self_attn.{name}_proj.bias"), &[rows]);
        }
        tensor("self_attn.o_proj.weight", &[HIDDEN, heads]);
        tensor("mlp.gate.weight", &[EXPERTS, HIDDEN]);
        tensor("mlp.shared_expert_gate.weight", &[1, HIDDEN]);
        for (prefix, inner) in [("mlp.shared_expert".to_owned(), 32)]
            .into_iter()
            .chain((0..EXPERTS).map(|expert| (format!("mlp.experts.{expert}"), INNER)))
        {
            tensor(&format!("{prefix}.gate_proj.weight"), &[inner, HIDDEN]);
            tensor(&format!("{prefix}.up_proj.weight"), &[inner, HIDDEN]);
            tensor(&format!("{prefix}.down_proj.weight"), &[HIDDEN, inner]);
        }
    }
    let (mut header, mut offset) = (Map::new(), 0usize);
    for (name, shape) in &tensors {
        let bytes = 2 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + bytes]});
        header.insert(name.clone(), entry);
        offset += bytes;
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = std::io::BufWriter::new(fs_err::File::create(folder.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (f32::from(u16::try_from(state >> 16).unwrap()) / 65_536.0 - 0.5) * 0.2
    };
    for (name, shape) in &tensors {
        let shift = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        for _ in 0..shape.iter().product::<usize>() {
            let bits = (next() + shift).to_bits() >> 16;
            file.write_all(&u16::try_from(bits).unwrap().to_le_bytes()).unwrap();
        }
    }
    file.flush().unwrap();
    offset as u64
}

#[test]
fn a_checkpoint_of_three_times_the_memory_is_compressed() {
    let place = Workplace::new();
    let bytes = write_large(&place);
    let train = in_repository("data/tiny-qwen2moe/train.txt");
    let run = |model: &str, out: &str| {
        let args = [
            "compress",
            "--moe",
            model,
            "-o",
            out,
            "--calibration",
            train.to_str().unwrap(),
            "--recipe",
            "moe-gptq-uniform",
            "--set",
            "compress.calibration_tokens=400",
            "--set",
            "compress.joint.rounding=nearest",
            "--set",
            "compress.joint.groups=[32]",
            "--set",
            "compress.joint.scales=['f16']",
            "--json",
        ];
        place.run(args).result(0)
    };
    let peak = run("large", "out")["peak_rss_bytes"].as_u64().unwrap();
    assert!(bytes >= 3 * peak, "{bytes} bytes of weights, {peak} of memory");
}
