//! The whole program on tiny random models of every family: their golden configs, weights drawn here, a tokenizer of
//! characters. What the logits must be, the goldens in `cotk-model` say; here every command must know every family.

use std::path::{Path, PathBuf};

use cotk_container::dense::{DenseTensor, write_dense};
use cotk_model::families::{self, parse_config};
use cotk_model::inventory;
use cotk_run::seeds::Seeds;
use rand::RngExt;
use serde_json::{Value, json};

use crate::program::{Workplace, in_repository};

/// `model_type`, a golden case, and whether its experts are to lie in stacks.
const MODELS: [(&str, &str, Form); 6] = [
    ("mixtral", "published", Form::Stacked),
    ("olmoe", "clip", Form::Single),
    ("qwen2_moe", "norm_topk", Form::Stacked),
    ("qwen3_moe", "published", Form::Single),
    ("deepseek_v2", "groups", Form::Single),
    ("deepseek_v3", "published", Form::Fp8),
];

/// How a checkpoint is stored.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Single,
    Stacked,
    Fp8,
}

/// 48 tokens: letters, some marks, an unknown one.
fn tokenizer() -> String {
    let characters = " abcdefghijklmnopqrstuvwxyzANTE.,:;!?'-0123456789\n";
    let vocab: serde_json::Map<String, Value> = std::iter::once("<unk>".to_owned())
        .chain(characters.chars().map(String::from))
        .take(48)
        .enumerate()
        .map(|(id, token)| (token, id.into()))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": { "type": "Fuse" },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                   "vocab": vocab, "merges": [] },
    })
    .to_string()
}

struct Stored {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Writes the golden config of a case with widths that codes like better, and weights for it: so many bytes.
fn write_model(folder: &Path, family: &str, case: &str, form: Form) -> u64 {
    fs_err::create_dir(folder).unwrap();
    let golden = in_repository(format!("tests/goldens/{family}/{case}.json"));
    let mut config: Value = serde_json::from_str(&fs_err::read_to_string(golden).unwrap()).unwrap();
    let width = if config.get("moe_intermediate_size").is_some() {
        "moe_intermediate_size"
    } else {
        "intermediate_size"
    };
    config[width] = json!(32);
    config["hidden_size"] = json!(32);
    let text = config.to_string();
    fs_err::write(folder.join("config.json"), &text).unwrap();
    fs_err::write(folder.join("tokenizer.json"), tokenizer()).unwrap();

    let spec = parse_config(&folder.join("config.json"), &text).unwrap();
    let names = families::of(&spec);
    let mut random = Seeds::new(3).stream("weights");
    let mut tensors: Vec<Stored> = Vec::new();
    for (tensor, shape) in inventory::tensors(&spec) {
        let name = names.tensor_name(tensor);
        let count = shape.iter().product();
        if form == Form::Fp8 && shape.len() == 2 && name.contains("_proj") {
            let bytes = (0..count)
                .map(|_| random.random_range(0u8..0x7f) | (random.random::<u8>() & 0x80))
                .collect();
            let blocks = vec![shape[0].div_ceil(128), shape[1].div_ceil(128)];
            let scales = (0..blocks.iter().product())
                .flat_map(|_| 8e-4f32.to_le_bytes())
                .collect();
            tensors.push(Stored {
                name: format!("{name}_scale_inv"),
                dtype: "F32",
                shape: blocks,
                bytes: scales,
            });
            tensors.push(Stored {
                name,
                dtype: "F8_E4M3",
                shape,
                bytes,
            });
            continue;
        }
        let size = if name.ends_with("norm.weight") {
            (0.5, 1.5)
        } else {
            (-0.35f32, 0.35)
        };
        let bytes = (0..count)
            .flat_map(|_| random.random_range(size.0..size.1).to_le_bytes())
            .collect();
        tensors.push(Stored {
            name,
            dtype: "F32",
            shape,
            bytes,
        });
    }
    if form == Form::Stacked {
        tensors = stacked(tensors);
    }
    let list: Vec<DenseTensor> = tensors
        .iter()
        .map(|t| DenseTensor {
            name: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            bytes: t.bytes.len() as u64,
        })
        .collect();
    let bytes = |wanted: &DenseTensor| {
        let found = tensors.iter().find(|t| t.name == wanted.name).unwrap();
        Ok::<_, cotk_container::ContainerError>(found.bytes.clone())
    };
    write_dense(&folder.join("model.safetensors"), &list, bytes).unwrap();
    list.iter().map(|t| t.bytes).sum()
}

/// Experts as transformers 5 holds them: per layer one tensor for gate and up and one for down.
fn stacked(tensors: Vec<Stored>) -> Vec<Stored> {
    let mut rest: Vec<Stored> = Vec::new();
    for mut tensor in tensors {
        let Some((layer, part)) = tensor.name.split_once(".experts.") else {
            tensor.name = tensor.name.replace(".block_sparse_moe.", ".mlp.");
            rest.push(tensor);
            continue;
        };
        // Experts come in order, each with gate, up and down.
        let is_down = part.contains("down") || part.contains("w2");
        let is_up = part.contains("up") || part.contains("w3");
        let stack = if is_down { "down_proj" } else { "gate_up_proj" };
        let name = format!("{}.experts.{stack}", layer.replace("block_sparse_moe", "mlp"));
        let [rows, columns] = tensor.shape[..] else {
            panic!("a matrix")
        };
        match rest.iter_mut().find(|t| t.name == name) {
            None => {
                let rows = if is_down { rows } else { 2 * rows };
                rest.push(Stored {
                    name,
                    dtype: tensor.dtype,
                    shape: vec![1, rows, columns],
                    bytes: tensor.bytes,
                });
            }
            Some(found) => {
                found.shape[0] += usize::from(!is_up);
                found.bytes.extend(tensor.bytes);
            }
        }
    }
    rest
}

fn text(place: &Workplace) -> PathBuf {
    let sentences = [
        "the cat sat on the mat. ",
        "a fox ran to the river, and back again. ",
        "who knows what the owl said? ",
        "nine ducks swam by; one of them was red. ",
    ];
    let mut random = Seeds::new(5).stream("text");
    let text: String = (0..120).map(|_| sentences[random.random_range(0..4usize)]).collect();
    let file = place.join("text.txt");
    fs_err::write(&file, text).unwrap();
    file
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn every_family_is_inspected_evaluated_compressed_and_run() {
    for (family, case, form) in MODELS {
        let place = Workplace::new();
        let stored = write_model(&place.join("model"), family, case, form);
        let text = text(&place);
        let text = text.to_str().unwrap();

        let found = place.run(["inspect", "model", "--experts", "--json"]).result(0);
        assert_eq!(found["family"], family);
        assert_eq!(found["bytes"], stored, "{family}");
        let bits = if form == Form::Fp8 { 8 } else { 32 };
        let last = found["per_layer"].as_array().unwrap().last().unwrap();
        assert_eq!(last["experts"][1]["bits"]["up"], bits, "{family}");

        let eval = |model: &str, more: &[&str]| {
            let args = ["eval", model, "--text", text, "--max-tokens", "400", "--json"];
            place.run(args.iter().chain(more)).result(0)
        };
        let whole = eval("model", &[]);
        assert!(number(&whole["perplexity"]) > 1.0, "{family}");

        let compress = [
            "compress",
            "--moe",
            "model",
            "-o",
            "out",
            "--calibration",
            text,
            "--json",
        ];
        place.run(compress).result(0);
        let held = place.run(["inspect", "out", "--json"]).result(0);
        assert_eq!((&held["family"], &held["format"]), (&family.into(), &"cotk".into()));
        assert!(
            number(&held["expert_bytes"]) < 0.4 * number(&found["expert_bytes"]) || form == Form::Fp8,
            "{family}"
        );

        let coded = eval("out", &["--reference", "model"]);
        let kl = number(&coded["reference"]["kl_nats"]);
        assert!(kl > 0.0 && kl < 0.3, "{family}: {kl}");

        for model in ["model", "out"] {
            let args = ["run", model, "--prompt", "the cat", "--max-tokens", "6", "--json"];
            let ran = place.run(args).result(0);
            assert_eq!(ran["token_ids"].as_array().unwrap().len(), 6, "{family}: {ran}");
        }
        // Positions end where the config says.
        let long = "the cat ".repeat(20);
        let error = place.run(["run", "model", "--prompt", &long, "--json"]).fault(2);
        assert!(
            error["message"].as_str().unwrap().contains("context is 96"),
            "{family}: {error}"
        );
    }
}
