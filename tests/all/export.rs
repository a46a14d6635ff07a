//! `cotk export`: what the files hold, value by value, against the checkpoint or the container; and what the formats
//! cannot carry. Other programs read them in `benches/peers/check_exports.py`.

use std::path::Path;

use cotk_container::gguf::blocks::decode;
use cotk_container::gguf::read::Gguf;
use cotk_container::gguf::{TensorType, Value as GgufValue};
use serde_json::Value;

use crate::checkpoint::Parts;
use crate::program::{Workplace, in_repository};

const LIMIT_BYTES: u64 = 1 << 30;

/// The tiny checkpoint without its dense layer, which GGUF's `qwen2moe` has no place for.
pub(crate) fn all_experts(place: &Workplace) -> String {
    let folder = place.copy_of_tiny("model");
    let file = folder.join("model.safetensors");
    let mut parts = Parts::read(&file);
    for (name, entry) in std::mem::take(&mut parts.header) {
        let new = match name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
            Some(("1", _)) => continue,
            Some((layer @ ("2" | "3"), rest)) => format!("model.layers.{}.{rest}", layer.parse::<u32>().unwrap() - 1),
            _ => name,
        };
        parts.header.insert(new, entry);
    }
    // Tensors lie without gaps.
    let mut data = Vec::new();
    for (_, entry) in parts.header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
        let at = |i: usize| entry["data_offsets"][i].as_u64().unwrap() as usize;
        let bytes = &parts.data[at(0)..at(1)];
        entry["data_offsets"] = serde_json::json!([data.len(), data.len() + bytes.len()]);
        data.extend_from_slice(bytes);
    }
    parts.data = data;
    parts.write(&file);
    let config = folder.join("config.json");
    let mut value: Value = serde_json::from_slice(&fs_err::read(&config).unwrap()).unwrap();
    value["num_hidden_layers"] = 3.into();
    value["mlp_only_layers"] = Value::Array(Vec::new());
    fs_err::write(config, value.to_string()).unwrap();
    "model".to_owned()
}

/// Compresses it by the embedded recipe with these changes.
pub(crate) fn compress(place: &Workplace, out: &str, sets: &[&str]) {
    let text = in_repository("data/tiny-qwen2moe/train.txt");
    let mut args = ["compress", "--moe", "model", "-o", out, "--json", "--calibration"]
        .map(str::to_owned)
        .to_vec();
    args.push(text.to_str().unwrap().to_owned());
    for set in ["compress.calibration_tokens=1024"].iter().chain(sets) {
        args.extend(["--set".to_owned(), (*set).to_owned()]);
    }
    place.run(args).result(0);
}

/// All values of an f32 or bf16 tensor of a safetensors file.
fn values(folder: &Path, tensor: &str) -> Vec<f32> {
    let mut parts = Parts::read(&folder.join("model.safetensors"));
    let (from, to) = parts.span(tensor);
    let is_bf16 = parts.entry(tensor)["dtype"] == "BF16";
    let bytes = &parts.data[from..to];
    if is_bf16 {
        let widen = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        return bytes.as_chunks::<2>().0.iter().map(widen).collect();
    }
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

fn read(gguf: &Gguf, tensor: &str) -> (TensorType, Vec<f32>) {
    let found = gguf.tensors().iter().find(|t| t.name == tensor);
    let kind = found.unwrap_or_else(|| panic!("no tensor {tensor}")).kind;
    (kind, decode(kind, gguf.data(tensor).unwrap()))
}

/// Each stack of experts in the file holds the experts of the folder, bit for bit.
#[track_caller]
fn stacks_equal(gguf: &Gguf, folder: &Path, experts: usize, kind: TensorType) {
    for layer in 0..3 {
        for part in ["gate", "up", "down"] {
            let (found, stack) = read(gguf, &format!("blk.{layer}.ffn_{part}_exps.weight"));
            assert_eq!(found, kind);
            let name = |e: usize| format!("model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight");
            let theirs: Vec<f32> = (0..experts).flat_map(|e| values(folder, &name(e))).collect();
            assert!(stack == theirs, "layer {layer} {part}");
        }
    }
}

#[test]
fn a_checkpoint_becomes_gguf_with_all_of_its_values() {
    let place = Workplace::new();
    let model = all_experts(&place);
    let result = place.run(["export", &model, "--gguf", "m.gguf", "--json"]).result(0);
    assert_eq!(
        (&result["format"], &result["output"]),
        (&"gguf".into(), &"m.gguf".into())
    );
    let file = place.join("m.gguf");
    assert_eq!(result["bytes"], file.metadata().unwrap().len());
    let gguf = Gguf::open(&file, LIMIT_BYTES).unwrap();
    // 3 layers of 17: 2 norms, q, k, v with biases, output, router, 3 stacks, 3 + 1 of the shared expert.
    assert_eq!((&result["tensors"], gguf.tensors().len()), (&54.into(), 54));
    for (key, value) in [
        ("general.architecture", GgufValue::from("qwen2moe")),
        ("general.name", "model".into()),
        ("general.file_type", GgufValue::U32(1)),
        ("qwen2moe.block_count", GgufValue::U32(3)),
        ("qwen2moe.expert_count", GgufValue::U32(8)),
        ("qwen2moe.expert_used_count", GgufValue::U32(2)),
        ("qwen2moe.expert_feed_forward_length", GgufValue::U32(32)),
        ("qwen2moe.attention.head_count_kv", GgufValue::U32(2)),
        ("qwen2moe.rope.freq_base", GgufValue::F32(1e4)),
        ("tokenizer.ggml.model", "gpt2".into()),
        ("tokenizer.ggml.pre", "smollm".into()),
        ("tokenizer.ggml.eos_token_id", GgufValue::U32(0)),
        ("tokenizer.ggml.add_bos_token", GgufValue::Bool(false)),
    ] {
        assert_eq!(gguf.get(key), Some(&value), "{key}");
    }
    let Some(GgufValue::Texts(tokens)) = gguf.get("tokenizer.ggml.tokens") else {
        panic!("no tokens");
    };
    assert_eq!((tokens.len(), tokens[0].as_str()), (512, "<|endoftext|>"));
    assert!(matches!(gguf.get("tokenizer.ggml.merges"), Some(GgufValue::Texts(m)) if m.len() == 255));
    assert!(matches!(gguf.get("tokenizer.ggml.token_type"), Some(GgufValue::I32s(t)) if t[0] == 3 && t[1] == 1));

    let folder = place.join("model");
    // bf16 fits f16 but for what is below its range.
    let embedding = values(&folder, "model.embed_tokens.weight");
    let (kind, found) = read(&gguf, "token_embd.weight");
    assert_eq!(kind, TensorType::F16);
    assert!(found.iter().zip(&embedding).all(|(a, b)| (a - b).abs() <= 6e-8));
    assert_eq!(
        gguf.data("output.weight"),
        gguf.data("token_embd.weight"),
        "tied: a copy"
    );
    for (ours, theirs) in [
        ("blk.1.attn_k.bias", "model.layers.1.self_attn.k_proj.bias"),
        ("blk.2.ffn_gate_inp.weight", "model.layers.2.mlp.gate.weight"),
        (
            "blk.0.ffn_gate_inp_shexp.weight",
            "model.layers.0.mlp.shared_expert_gate.weight",
        ),
        ("output_norm.weight", "model.norm.weight"),
    ] {
        assert_eq!(read(&gguf, ours), (TensorType::F32, values(&folder, theirs)), "{ours}");
    }
}

#[test]
fn codes_of_a_container_keep_every_value_in_both_formats() {
    let place = Workplace::new();
    all_experts(&place);
    for (code, kind, file_type) in [("plain4", TensorType::Q4_0, 2), ("nested2+2+4", TensorType::Q8_0, 7)] {
        let codes = format!("compress.codes=[\"{code}\"]");
        compress(
            &place,
            code,
            &[&codes, "compress.dropped=\"removed\"", "compress.drop_ratio=0.25"],
        );
        let (hf, gguf) = (format!("{code}-hf"), format!("{code}.gguf"));
        let result = place.run(["export", code, "--gguf", &gguf, "--json"]).result(0);
        let rounded = |p: &Value| p["reason"] == "rounded to F16" && p["loss"].as_f64().unwrap() < 1e-5;
        assert!(result["projected"].as_array().unwrap().iter().all(rounded), "{result}");
        let result = place.run(["export", code, "--hf", &hf, "--json"]).result(0);
        assert_eq!(
            (&result["format"], &result["projected"]),
            (&"hf".into(), &Value::Array(Vec::new()))
        );

        let gguf = Gguf::open(&place.join(gguf), LIMIT_BYTES).unwrap();
        assert_eq!(gguf.get("general.file_type"), Some(&GgufValue::U32(file_type)));
        assert_eq!(gguf.get("qwen2moe.expert_count"), Some(&GgufValue::U32(6)));
        stacks_equal(&gguf, &place.join(&hf), 6, kind);
        let (_, router) = read(&gguf, "blk.1.ffn_gate_inp.weight");
        assert_eq!(router, values(&place.join(&hf), "model.layers.1.mlp.gate.weight"));
        assert_eq!(router.len(), 6 * 64);

        // The exported folder is a model like any other, and says nearly the same: only activations were coded.
        let config: Value =
            serde_json::from_slice(&fs_err::read(place.join(&hf).join("config.json")).unwrap()).unwrap();
        assert_eq!(
            (&config["num_experts"], &config["torch_dtype"]),
            (&6.into(), &"float32".into())
        );
        let logits = |model: &str| -> Vec<f64> {
            let found = place
                .run(["logits", model, "--tokens", "0,50,60,70,80", "--json"])
                .result(0);
            found["logits"]
                .as_array()
                .unwrap()
                .iter()
                .map(|l| l.as_f64().unwrap())
                .collect()
        };
        let (ours, theirs) = (logits(code), logits(&hf));
        let distance: f64 = ours.iter().zip(&theirs).map(|(a, b)| (a - b) * (a - b)).sum();
        let norm: f64 = ours.iter().map(|a| a * a).sum();
        assert!((distance / norm).sqrt() < 0.05, "{}", (distance / norm).sqrt());
    }
}

#[test]
fn what_a_format_cannot_carry_is_refused_or_projected_with_its_loss() {
    let place = Workplace::new();
    all_experts(&place);
    let removed = ["compress.dropped=\"removed\"", "compress.drop_ratio=0.25"];
    compress(&place, "nested", &removed);
    compress(&place, "masked", &["compress.drop_ratio=0.25"]);
    compress(
        &place,
        "uneven",
        &[removed[0], removed[1], "compress.drop_shape=\"usage\""],
    );
    let mixed = [
        "compress.codes=[\"plain2\", \"plain8\"]",
        "compress.drop_ratio=0",
        "budget.bytes=290000",
    ];
    compress(&place, "mixed", &mixed);

    let refuse = |args: &[&str], says: &str| {
        let error = place.run(["export"].iter().chain(args).chain(&["--json"])).fault(2);
        assert_eq!(error["kind"], "export", "{error}");
        assert!(error["message"].as_str().unwrap().contains(says), "{says}: {error}");
        assert!(!error["help"].as_str().unwrap().is_empty());
        error
    };
    let dense = crate::program::tiny_model();
    assert_eq!(refuse(&[&dense, "--gguf", "x.gguf"], "layer 1 dense")["key"], "layers");
    refuse(&["masked", "--gguf", "x.gguf", "--project"], "router rows are kept");
    refuse(&["masked", "--hf", "x"], "router rows are kept");
    refuse(&["model", "--gguf", "x.gguf", "--bits", "3"], "--bits: found 3");
    refuse(
        &["model", "--gguf", "x.gguf", "--dense-bits", "5"],
        "--dense-bits: found 5",
    );
    refuse(&["model", "--hf", "mixed"], "mixed exists");
    let cut = refuse(&["nested", "--gguf", "x.gguf", "--bits", "4"], "half a cell off");
    assert!(cut["message"].as_str().unwrap().contains("and 8 more"), "{cut}");
    refuse(&["mixed", "--gguf", "x.gguf"], "experts of 2-bit and 8-bit");
    let counts = refuse(
        &["uneven", "--gguf", "x.gguf", "--project"],
        "unequal numbers of experts",
    );
    assert_eq!(
        refuse(&["uneven", "--hf", "x"], "unequal numbers of experts")["found"],
        counts["found"]
    );
    for args in [
        ["--gguf", "x.gguf", "--hf", "x"].as_slice(),
        &["--hf", "x", "--bits", "8"],
        &[],
    ] {
        let error = place
            .run(["export", "model"].iter().chain(args).chain(&["--json"]))
            .fault(2);
        assert_eq!(error["kind"], "usage");
    }
    assert!(
        !place.names().iter().any(|name| name.starts_with('x')),
        "{:?}",
        place.names()
    );

    let project = |model: &str, more: &[&str]| {
        let args = ["export", model, "--gguf", "p.gguf", "--project", "--json"];
        let result = place.run(args.iter().chain(more)).result(0);
        let stacks = result["projected"].as_array().unwrap().iter();
        let stacks: Vec<Value> = stacks
            .filter(|p| p["tensor"].as_str().unwrap().contains("_exps"))
            .cloned()
            .collect();
        stacks
    };
    let rounded = project("nested", &["--bits", "4"]);
    assert_eq!(rounded.len(), 9);
    for stack in rounded {
        let loss = stack["loss"].as_f64().unwrap();
        assert!(loss > 1e-3 && loss < 0.2, "{stack}");
    }
    // Codes of 2 bits fit 8: the stack grows and keeps every value.
    let widened = project("mixed", &[]);
    assert!(
        !widened.is_empty() && widened.iter().all(|p| p["loss"] == 0.0),
        "{widened:?}"
    );
    place.run(["export", "mixed", "--hf", "mixed-hf", "--json"]).result(0);
    let gguf = Gguf::open(&place.join("p.gguf"), LIMIT_BYTES).unwrap();
    let stack = widened[0]["tensor"].as_str().unwrap();
    let (layer, part) = (&stack[4..5], stack.split('_').nth(1).unwrap());
    let (kind, found) = read(&gguf, stack);
    assert_eq!(kind, TensorType::Q8_0);
    let name = |e: usize| format!("model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight");
    let theirs: Vec<f32> = (0..8).flat_map(|e| values(&place.join("mixed-hf"), &name(e))).collect();
    assert!(found == theirs, "{stack}");
    let ran = place.run(["export", "nested", "--gguf", "p.gguf", "--bits", "4", "--project"]);
    assert!(
        ran.stdout.contains("half a cell") && ran.stdout.lines().all(|l| l.chars().count() <= 100),
        "{ran:?}"
    );
}

#[test]
fn half_types_say_what_rounding_lost() {
    let place = Workplace::new();
    all_experts(&place);
    compress(&place, "out", &["compress.codes=[\"plain4\"]", "compress.drop_ratio=0"]);
    let result = place
        .run(["export", "out", "--hf", "half", "--dtype", "bf16", "--json"])
        .result(0);
    let projected = result["projected"].as_array().unwrap();
    assert!(!projected.is_empty());
    for tensor in projected {
        assert_eq!(tensor["reason"], "rounded to BF16");
        assert!(tensor["loss"].as_f64().unwrap() < 4e-3, "{tensor}");
    }
    let found = place.run(["inspect", "half", "--json"]).result(0);
    assert_eq!((&found["format"], &found["experts"]), (&"hf".into(), &8.into()));
}
