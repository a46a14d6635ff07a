//! Small random models of each family, written as GGUF and as a folder: every tensor by name, shape and value.

use std::collections::HashMap;
use std::path::Path;

use cotk_container::ContainerError;
use cotk_container::dense::{DenseTensor, write_dense};
use cotk_container::gguf::Value;
use cotk_container::gguf::blocks::decode;
use cotk_container::gguf::read::Gguf;
use cotk_run::cancel::Cancel;
use cotk_run::files;
use cotk_run::progress::Silent;
use cotk_run::seeds::Seeds;
use rand::RngExt;
use serde_json::{Value as Json, json};

use super::{ExportError, Exported, gguf, hf};
use crate::families::{self, parse_config};
use crate::folder::ModelFolder;
use crate::inventory;
use crate::tokenizer::tests::byte_level;

const HIDDEN: usize = 64;
const EXPERTS: usize = 4;
const INNER: usize = 32;
const HEAD: usize = 16;

/// Two layers, four heads; what a family has of its own on top.
fn config(model_type: &str, more: &Json) -> Json {
    let mut config = json!({
        "model_type": model_type, "vocab_size": 260, "hidden_size": HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_experts_per_tok": 2, "tie_word_embeddings": false,
        "eos_token_id": 256, "torch_dtype": "float32",
    });
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn mixtral() -> Json {
    config(
        "mixtral",
        &json!({"num_local_experts": EXPERTS, "intermediate_size": INNER}),
    )
}

fn olmoe() -> Json {
    config(
        "olmoe",
        &json!({"num_experts": EXPERTS, "intermediate_size": INNER, "num_key_value_heads": 4}),
    )
}

fn qwen2_moe() -> Json {
    config(
        "qwen2_moe",
        &json!({"num_experts": EXPERTS, "moe_intermediate_size": INNER, "shared_expert_intermediate_size": 96,
                "tie_word_embeddings": true}),
    )
}

/// Heads wider than hidden / heads.
fn qwen3_moe() -> Json {
    config(
        "qwen3_moe",
        &json!({"num_experts": EXPERTS, "moe_intermediate_size": INNER, "head_dim": 32, "norm_topk_prob": true}),
    )
}

/// One dense layer, then one with experts in groups; q with and without a narrow projection.
fn deepseek(model_type: &str, more: &Json) -> Json {
    let own = json!({
        "n_routed_experts": EXPERTS, "moe_intermediate_size": INNER, "intermediate_size": 96, "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 2, "q_lora_rank": null,
        "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16,
    });
    let mut config = config(model_type, &own);
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// A folder of random f32 weights.
fn model(folder: &Path, config: &Json) -> ModelFolder {
    let text = config.to_string();
    let spec = parse_config(Path::new("config.json"), &text).unwrap();
    let tensors: Vec<DenseTensor> = inventory::tensors(&spec)
        .into_iter()
        .map(|(tensor, shape)| DenseTensor {
            name: families::of(&spec).tensor_name(tensor),
            dtype: "F32",
            bytes: 4 * shape.iter().product::<usize>() as u64,
            shape,
        })
        .collect();
    files::write_atomic(folder.join("config.json"), text.as_bytes()).unwrap();
    files::write_atomic(folder.join("tokenizer.json"), byte_level().as_bytes()).unwrap();
    let draw = |tensor: &DenseTensor| {
        let mut stream = Seeds::new(1).stream(&tensor.name);
        let weights = (0..tensor.bytes / 4).map(|_| stream.random_range(-1.0f32..1.0));
        Ok::<_, ContainerError>(weights.flat_map(f32::to_le_bytes).collect())
    };
    write_dense(&folder.join("model.safetensors"), &tensors, draw).unwrap();
    ModelFolder::open(folder).unwrap()
}

fn to_gguf(model: &ModelFolder, bits: Option<u32>, dense_bits: Option<u32>) -> Result<(Gguf, Exported), ExportError> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m.gguf");
    let options = gguf::GgufOptions {
        name: "m".into(),
        bits,
        dense_bits,
        project: false,
    };
    let written = gguf::export(model, None, &out, &options, &Silent, &Cancel::new())?;
    Ok((Gguf::open(&out, 1 << 30).unwrap(), written))
}

fn hf_options(kind: hf::HfType) -> hf::HfOptions {
    hf::HfOptions {
        bits: None,
        kind,
        project: false,
    }
}

/// All tensors of a file as f32.
fn values(file: &Gguf) -> HashMap<String, (Vec<usize>, Vec<f32>)> {
    let of = |t: &cotk_container::gguf::GgufTensor| {
        let data = decode(t.kind, file.data(&t.name).unwrap());
        (t.name.clone(), (t.shape.clone(), data))
    };
    file.tensors().iter().map(of).collect()
}

fn source(model: &ModelFolder, name: &str, shape: &[usize]) -> Vec<f32> {
    model.source.load_f32(name, shape).unwrap()
}

/// Near enough for f16: weights are below 1.
#[track_caller]
fn assert_near(found: &[f32], expected: &[f32], within: f32) {
    assert_eq!(found.len(), expected.len());
    let worst = found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(worst <= within, "{worst}");
}

#[test]
fn each_family_has_the_tensors_that_llama_cpp_asks_for() {
    let attention = [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_norm",
        "ffn_gate_inp",
    ];
    let stacks = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"];
    let norms = ["attn_q_norm", "attn_k_norm"];
    let shared = ["ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"];
    for (arch, config, own, biases) in [
        ("llama", mixtral(), &[][..], false),
        ("olmoe", olmoe(), &norms[..], false),
        ("qwen2moe", qwen2_moe(), &shared[..], true),
        ("qwen3moe", qwen3_moe(), &norms[..], false),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path(), &config);
        let (file, written) = to_gguf(&model, None, None).unwrap();
        let mut expected: Vec<String> = ["token_embd.weight", "output_norm.weight", "output.weight"]
            .map(str::to_owned)
            .to_vec();
        for layer in 0..2 {
            let parts = attention.iter().chain(&stacks).chain(own);
            expected.extend(parts.map(|part| format!("blk.{layer}.{part}.weight")));
            if biases {
                expected.extend(["q", "k", "v"].map(|part| format!("blk.{layer}.attn_{part}.bias")));
            }
        }
        expected.sort();
        let found = values(&file);
        let mut names: Vec<&String> = found.keys().collect();
        names.sort();
        assert_eq!(names, expected.iter().collect::<Vec<_>>(), "{arch}");
        assert_eq!(written.tensors, expected.len());
        assert_eq!(file.get("general.architecture"), Some(&arch.into()));
        assert_eq!(file.get(&format!("{arch}.expert_used_count")), Some(&Value::U32(2)));
        let is_wide = file.get(&format!("{arch}.attention.key_length")) == Some(&Value::U32(32));
        assert_eq!(is_wide, arch == "qwen3moe");

        // Experts in their order, and the head: its own or the embedding's copy.
        let (shape, stack) = &found["blk.1.ffn_down_exps.weight"];
        assert_eq!(shape, &[EXPERTS, HIDDEN, INNER]);
        let part = if arch == "llama" {
            "block_sparse_moe.experts.3.w2"
        } else {
            "mlp.experts.3.down_proj"
        };
        let last = source(&model, &format!("model.layers.1.{part}.weight"), &[HIDDEN, INNER]);
        assert_near(&stack[3 * HIDDEN * INNER..], &last, 5e-4);
        let is_tied = found["output.weight"] == found["token_embd.weight"];
        assert_eq!(is_tied, arch == "qwen2moe");
        let lossy = written
            .projected
            .iter()
            .all(|p| p.reason == "rounded to F16" && p.loss < 5e-4);
        assert!(lossy, "f32 to F16 is said: {:?}", written.projected);
    }
}

#[test]
fn only_llama_turns_neighbours() {
    for (config, is_paired) in [(mixtral(), true), (olmoe(), false)] {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path(), &config);
        let (file, _) = to_gguf(&model, None, None).unwrap();
        let found = &values(&file)["blk.0.attn_q.weight"].1;
        let ours = source(&model, "model.layers.0.self_attn.q_proj.weight", &[HIDDEN, HIDDEN]);
        let row = |all: &[f32], at: usize| all[at * HIDDEN..][..HIDDEN].to_vec();
        for at in 0..HIDDEN {
            // Row j of a head comes from half j % 2, place j / 2.
            let (head, j) = (at / HEAD * HEAD, at % HEAD);
            let from = if is_paired {
                head + (j % 2) * HEAD / 2 + j / 2
            } else {
                at
            };
            assert_near(&row(found, at), &row(&ours, from), 5e-4);
        }
    }
}

#[test]
fn latent_projections_are_cut_into_keys_and_values() {
    let v3 = json!({"q_lora_rank": 24, "n_group": 2, "topk_group": 1, "rope_interleave": true});
    let yarn = json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "mscale": 0.707, "mscale_all_dim": 0.707}});
    for config in [deepseek("deepseek_v3", &v3), deepseek("deepseek_v2", &yarn)] {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path(), &config);
        let (file, _) = to_gguf(&model, None, None).unwrap();
        let get = |key: &str| file.get(&format!("deepseek2.{key}")).cloned();
        let is_v3 = model.spec.family == "deepseek_v3";
        for (key, value) in [
            ("leading_dense_block_count", Value::U32(1)),
            ("feed_forward_length", Value::U32(96)),
            ("expert_shared_count", Value::U32(2)),
            ("expert_gating_func", Value::U32(if is_v3 { 2 } else { 1 })),
            ("attention.head_count_kv", Value::U32(1)),
            ("attention.key_length", Value::U32(36)),
            ("attention.key_length_mla", Value::U32(12)),
            ("attention.value_length_mla", Value::U32(16)),
            ("attention.q_lora_rank", Value::U32(if is_v3 { 24 } else { 0 })),
        ] {
            assert_eq!(get(key), Some(value), "{key}");
        }
        assert_eq!(get("expert_group_used_count"), is_v3.then_some(Value::U32(1)));
        assert_eq!(
            get("rope.scaling.yarn_log_multiplier"),
            (!is_v3).then_some(Value::F32(0.0707))
        );
        let found = values(&file);
        assert_eq!(found.contains_key("blk.1.exp_probs_b.bias"), is_v3);
        assert_eq!(found.contains_key("blk.0.attn_q_a_norm.weight"), is_v3);
        assert_eq!(found.contains_key("blk.0.attn_q.weight"), !is_v3);
        assert!(found.contains_key("blk.0.ffn_gate.weight") && found.contains_key("blk.1.ffn_gate_shexp.weight"));
        // [heads · (8 + 16), 32]: keys of a head transposed, its values as they are.
        let whole = source(&model, "model.layers.1.self_attn.kv_b_proj.weight", &[4 * 24, 32]);
        let (shape, keys) = &found["blk.1.attn_k_b.weight"];
        assert_eq!(shape, &[4, 32, 8]);
        let (shape, values) = &found["blk.1.attn_v_b.weight"];
        assert_eq!(shape, &[4, 16, 32]);
        for head in 0..4 {
            for rank in 0..32 {
                let row = |row: usize| whole[(head * 24 + row) * 32 + rank];
                let of_keys: Vec<f32> = (0..8).map(row).collect();
                assert_near(&keys[(head * 32 + rank) * 8..][..8], &of_keys, 5e-4);
                let of_values: Vec<f32> = (0..16).map(|v| values[(head * 16 + v) * 32 + rank]).collect();
                assert_near(&of_values, &(8..24).map(row).collect::<Vec<_>>(), 5e-4);
            }
        }
    }
}

#[test]
fn asked_widths_are_what_the_file_holds() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), &qwen2_moe());
    for (bits, dense_bits, file_type) in [(Some(8), Some(8), 7), (Some(4), None, 2), (None, Some(8), 1)] {
        let (file, _) = to_gguf(&model, bits, dense_bits).unwrap();
        let kind = |name: &str| file.tensors().iter().find(|t| t.name == name).unwrap().kind.name();
        let of = |bits: Option<u32>| bits.map_or("F16".to_owned(), |bits| format!("Q{bits}_0"));
        assert_eq!(kind("blk.0.ffn_gate_exps.weight"), of(bits));
        assert_eq!(kind("blk.0.attn_q.weight"), of(dense_bits));
        assert_eq!(
            (kind("blk.0.ffn_gate_inp.weight"), kind("blk.0.attn_q.bias")),
            ("F32", "F32")
        );
        assert_eq!(file.get("general.file_type"), Some(&Value::U32(file_type)));
        // Half a step of the widest group.
        let found = values(&file);
        let expert = source(
            &model,
            "model.layers.0.mlp.experts.0.gate_proj.weight",
            &[INNER, HIDDEN],
        );
        let within = bits.map_or(5e-4, |bits| if bits == 8 { 0.6 / 127.0 } else { 1.1 / 8.0 });
        assert_near(
            &found["blk.0.ffn_gate_exps.weight"].1[..INNER * HIDDEN],
            &expert,
            within,
        );
    }
    assert!(matches!(
        to_gguf(&model, Some(3), None),
        Err(ExportError::Refused { .. })
    ));
}

#[test]
fn rows_that_are_no_whole_blocks_stay_f16_and_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = olmoe();
    config["intermediate_size"] = 40.into();
    let model = model(folder.path(), &config);
    let (file, written) = to_gguf(&model, Some(8), None).unwrap();
    let kind = |name: &str| file.tensors().iter().find(|t| t.name == name).unwrap().kind.name();
    assert_eq!(kind("blk.0.ffn_down_exps.weight"), "F16");
    assert_eq!(kind("blk.0.ffn_up_exps.weight"), "Q8_0");
    let said = written.projected.iter().filter(|p| p.tensor.contains("down_exps"));
    assert_eq!(said.count(), 2);
}

#[test]
fn what_llama_cpp_takes_for_granted_is_checked() {
    let v2 = || deepseek("deepseek_v2", &json!({"n_group": 2, "topk_group": 1}));
    let v3 = || deepseek("deepseek_v3", &json!({"n_group": 2, "topk_group": 1}));
    let cases: [(Json, &str, Json, &str); 11] = [
        (
            v2(),
            "topk_method",
            "group_limited_greedy".into(),
            "`topk_method`: found group_limited_greedy",
        ),
        (v3(), "attention_bias", true.into(), "`attention_bias`: found true"),
        (v3(), "rms_norm_eps", json!(1e-5), "`rms_norm_eps`: found 0.00001"),
        (olmoe(), "norm_topk_prob", true.into(), "`norm_topk_prob`: found true"),
        (olmoe(), "clip_qkv", json!(8.0), "`clip_qkv`: found 8"),
        (
            olmoe(),
            "num_key_value_heads",
            2.into(),
            "`num_key_value_heads`: found 2",
        ),
        (
            qwen3_moe(),
            "norm_topk_prob",
            false.into(),
            "`norm_topk_prob`: found false",
        ),
        (qwen3_moe(), "attention_bias", true.into(), "biases of q, k, v"),
        (mixtral(), "sliding_window", 32.into(), "`sliding_window`: found 32"),
        (
            mixtral(),
            "rope_scaling",
            json!({"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
            "found llama3",
        ),
        (qwen2_moe(), "mlp_only_layers", json!([0]), "found layer 0 dense"),
    ];
    for (mut config, key, value, says) in cases {
        let folder = tempfile::tempdir().unwrap();
        config[key] = value;
        config["intermediate_size"] = INNER.into();
        let model = model(folder.path(), &config);
        let error = to_gguf(&model, None, None).unwrap_err().to_string();
        assert!(error.contains(says), "{key}: {error}");
    }
}

#[test]
fn a_folder_exported_and_opened_again_is_the_same_model() {
    for config in [mixtral(), olmoe(), qwen2_moe(), qwen3_moe()] {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path(), &config);
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("hf");
        let written = hf::export(
            &model,
            None,
            &out,
            &hf_options(hf::HfType::F32),
            &Silent,
            &Cancel::new(),
        )
        .unwrap();
        assert!(written.projected.is_empty());
        let again = ModelFolder::open(&out).unwrap();
        assert_eq!(again.spec, model.spec);
        for name in model.source.names() {
            assert_eq!(
                again.source.raw(&name).unwrap(),
                model.source.raw(&name).unwrap(),
                "{name}"
            );
        }
        assert_eq!(again.source.names(), model.source.names());
        let size: u64 = fs_err::read_dir(&out)
            .unwrap()
            .map(|e| e.unwrap().metadata().unwrap().len())
            .sum();
        assert_eq!(size, written.bytes);
    }
}

#[test]
fn a_cancelled_export_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), &olmoe());
    let out = tempfile::tempdir().unwrap();
    let cancel = Cancel::new();
    cancel.cancel();
    let options = gguf::GgufOptions::default();
    assert!(gguf::export(&model, None, &out.path().join("m.gguf"), &options, &Silent, &cancel).is_err());
    assert!(
        hf::export(
            &model,
            None,
            &out.path().join("hf"),
            &hf_options(hf::HfType::F16),
            &Silent,
            &cancel
        )
        .is_err()
    );
    assert_eq!(fs_err::read_dir(out.path()).unwrap().count(), 0);
}
