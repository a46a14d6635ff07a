//! Input that cannot be right, given to the whole program: each fault is one clear message with its place, the right
//! exit code, and nothing under a final name. (What a reader refuses in detail is tested beside the reader.)

use std::path::Path;

use serde_json::{Value, json};

use crate::checkpoint::{Parts, write_raw};
use crate::program::{Ran, Workplace, in_repository, tiny_model};

const DOWN: &str = "model.layers.2.mlp.experts.3.down_proj.weight";

/// One way to damage a copy of the tiny checkpoint, and words that the message must have.
struct Damage {
    name: &'static str,
    apply: fn(&Path),
    says: &'static [&'static str],
}

fn config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let file = folder.join("config.json");
    let mut value: Value = serde_json::from_str(&fs_err::read_to_string(&file).unwrap()).unwrap();
    change(&mut value);
    fs_err::write(file, value.to_string()).unwrap();
}

fn weights(folder: &Path, change: impl FnOnce(&mut Parts)) {
    let file = folder.join("model.safetensors");
    let mut parts = Parts::read(&file);
    change(&mut parts);
    parts.write(&file);
}

fn cut(file: &Path, keep: impl FnOnce(usize) -> usize) {
    let bytes = fs_err::read(file).unwrap();
    fs_err::write(file, &bytes[..keep(bytes.len())]).unwrap();
}

const DAMAGES: &[Damage] = &[
    Damage {
        name: "no config",
        apply: |folder| fs_err::remove_file(folder.join("config.json")).unwrap(),
        says: &["config.json"],
    },
    Damage {
        name: "config is not JSON",
        apply: |folder| fs_err::write(folder.join("config.json"), "{\"architectures\": [").unwrap(),
        says: &["config.json", "line 1"],
    },
    Damage {
        name: "unknown architecture",
        apply: |folder| {
            config(folder, |c| {
                c["architectures"] = json!(["ElephantForCausalLM"]);
                c["model_type"] = json!("elephant");
            })
        },
        says: &["config.json", "ElephantForCausalLM", "expected"],
    },
    Damage {
        name: "config key missing",
        apply: |folder| {
            config(folder, |c| {
                c.as_object_mut().unwrap().remove("moe_intermediate_size").unwrap();
            })
        },
        says: &["config.json", "moe_intermediate_size"],
    },
    Damage {
        name: "config key of another type",
        apply: |folder| config(folder, |c| c["num_experts"] = json!("eight")),
        says: &["config.json", "num_experts", "eight"],
    },
    Damage {
        name: "more experts per token than experts",
        apply: |folder| config(folder, |c| c["num_experts_per_tok"] = json!(9)),
        says: &["config.json", "num_experts_per_tok", "9"],
    },
    Damage {
        name: "config and weights of two models",
        apply: |folder| config(folder, |c| c["moe_intermediate_size"] = json!(48)),
        says: &["model.safetensors", "experts", "32", "48"],
    },
    Damage {
        name: "no weights",
        apply: |folder| fs_err::remove_file(folder.join("model.safetensors")).unwrap(),
        says: &["safetensors"],
    },
    Damage {
        name: "weights cut in the data",
        apply: |folder| cut(&folder.join("model.safetensors"), |length| length - 1000),
        says: &["model.safetensors", "bytes"],
    },
    Damage {
        name: "weights cut in the header",
        apply: |folder| cut(&folder.join("model.safetensors"), |_| 100),
        says: &["model.safetensors"],
    },
    Damage {
        name: "weights empty",
        apply: |folder| cut(&folder.join("model.safetensors"), |_| 0),
        says: &["model.safetensors"],
    },
    Damage {
        name: "header length beyond any file",
        apply: |folder| write_raw(&folder.join("model.safetensors"), u64::MAX, b"{}", &[0; 64]),
        says: &["model.safetensors", "header"],
    },
    Damage {
        name: "header is not JSON",
        apply: |folder| write_raw(&folder.join("model.safetensors"), 8, b"{\"a\":}  ", &[0; 64]),
        says: &["model.safetensors", "header"],
    },
    Damage {
        name: "header points outside the file",
        apply: |folder| {
            weights(folder, |parts| {
                let (from, to) = parts.span(DOWN);
                parts.entry(DOWN)["data_offsets"] = json!([from + (1 << 40), to + (1 << 40)]);
            })
        },
        says: &["model.safetensors"],
    },
    Damage {
        name: "header promises more than the shape has",
        apply: |folder| {
            weights(folder, |parts| {
                let (from, to) = parts.span(DOWN);
                parts.entry(DOWN)["data_offsets"] = json!([from, to - 2]);
            })
        },
        says: &["model.safetensors"],
    },
    Damage {
        name: "tensor of another shape",
        apply: |folder| weights(folder, |parts| parts.entry(DOWN)["shape"] = json!([32, 64])),
        says: &["model.safetensors", DOWN, "[32, 64]", "[64, 32]"],
    },
    Damage {
        name: "tensor of another type",
        apply: |folder| weights(folder, |parts| parts.entry(DOWN)["dtype"] = json!("I16")),
        says: &["model.safetensors", DOWN, "I16"],
    },
    Damage {
        name: "tensor missing",
        apply: |folder| {
            weights(folder, |parts| {
                let entry = parts.header.remove(DOWN).unwrap();
                parts.header.insert("model.unused.weight".into(), entry);
            })
        },
        says: &["model.safetensors", DOWN],
    },
    Damage {
        name: "a weight that is no number",
        apply: |folder| {
            weights(folder, |parts| {
                let (from, _) = parts.span(DOWN);
                parts.data[from..from + 2].copy_from_slice(&[0xc0, 0x7f]); // NaN in bf16
            })
        },
        says: &["model.safetensors", DOWN, "NaN"],
    },
    Damage {
        name: "a weight without bounds",
        apply: |folder| {
            weights(folder, |parts| {
                let (_, to) = parts.span(DOWN);
                parts.data[to - 2..to].copy_from_slice(&[0x80, 0xff]); // minus infinity in bf16
            })
        },
        says: &["model.safetensors", DOWN, "-inf", "2047"],
    },
    Damage {
        name: "a bias that the config does not know",
        apply: |folder| {
            weights(folder, |parts| {
                let at = parts.data.len();
                let entry = json!({ "dtype": "BF16", "shape": [64], "data_offsets": [at, at + 128] });
                parts
                    .header
                    .insert("model.layers.0.self_attn.o_proj.bias".into(), entry);
                parts.data.resize(at + 128, 0);
            })
        },
        says: &[
            "model.safetensors",
            "model.layers.0.self_attn.o_proj.bias",
            "not of this model",
        ],
    },
    Damage {
        name: "a position scaling that is not supported",
        apply: |folder| {
            config(folder, |c| {
                c["rope_parameters"] = Value::Null;
                c["rope_scaling"] = json!({ "type": "longrope", "factor": 4.0 });
            })
        },
        says: &["config.json", "rope_scaling", "longrope", "yarn"],
    },
    Damage {
        name: "quantized in a way that is not read",
        apply: |folder| {
            config(folder, |c| {
                c["quantization_config"] = json!({ "quant_method": "awq", "bits": 4 })
            })
        },
        says: &["config.json", "quantization_config.quant_method", "awq", "fp8"],
    },
    Damage {
        name: "an end of text outside the vocabulary",
        apply: |folder| config(folder, |c| c["eos_token_id"] = json!([0, 512])),
        says: &["config.json", "eos_token_id", "512"],
    },
    Damage {
        name: "generation ends outside the vocabulary",
        apply: |folder| fs_err::write(folder.join("generation_config.json"), "{\"eos_token_id\": 512}").unwrap(),
        says: &["generation_config.json", "eos_token_id", "512"],
    },
    Damage {
        name: "shard missing",
        apply: |folder| {
            let shards = Parts::read(&folder.join("model.safetensors")).write_sharded(folder);
            fs_err::remove_file(folder.join(shards[1])).unwrap();
        },
        says: &["model-00002-of-00002.safetensors"],
    },
    Damage {
        name: "shard cut",
        apply: |folder| {
            let shards = Parts::read(&folder.join("model.safetensors")).write_sharded(folder);
            cut(&folder.join(shards[1]), |length| length / 2);
        },
        says: &["model-00002-of-00002.safetensors", "bytes"],
    },
    Damage {
        name: "index names a tensor that its shard lacks",
        apply: |folder| {
            let shards = Parts::read(&folder.join("model.safetensors")).write_sharded(folder);
            let mut second = Parts::read(&folder.join(shards[1]));
            let last = second.header.keys().next_back().unwrap().clone();
            let entry = second.header.remove(&last).unwrap();
            second.header.insert("model.unused.weight".into(), entry);
            second.write(&folder.join(shards[1]));
        },
        says: &["model-00002-of-00002.safetensors"],
    },
    Damage {
        name: "no tokenizer",
        apply: |folder| fs_err::remove_file(folder.join("tokenizer.json")).unwrap(),
        says: &["tokenizer.json"],
    },
    Damage {
        name: "a tokenizer with more tokens than the model",
        apply: |folder| {
            let file = folder.join("tokenizer.json");
            let mut tokenizer: Value = serde_json::from_str(&fs_err::read_to_string(&file).unwrap()).unwrap();
            let added = tokenizer["added_tokens"].as_array_mut().unwrap();
            added.push(
                json!({ "id": 512, "content": "<|more|>", "single_word": false, "lstrip": false,
                               "rstrip": false, "normalized": false, "special": true }),
            );
            fs_err::write(file, tokenizer.to_string()).unwrap();
        },
        says: &["tokenizer.json", "512", "vocab_size"],
    },
    Damage {
        name: "tokenizer is not one",
        apply: |folder| fs_err::write(folder.join("tokenizer.json"), "{}").unwrap(),
        says: &["tokenizer.json"],
    },
];

#[test]
fn a_damaged_checkpoint_is_refused_by_name_and_leaves_nothing() {
    for damage in DAMAGES {
        let place = Workplace::new();
        let folder = place.copy_of_tiny("model");
        (damage.apply)(&folder);
        let before = place.bytes_below("model");
        let run = ["run", "model", "--prompt", "Anna", "--max-tokens", "1", "--json"].map(str::to_owned);
        let mut compress = compress_args(&place, "out");
        compress[2] = "model".into();
        for args in [run.to_vec(), compress] {
            let error = place.run(&args).fault(2);
            let message = error["message"].as_str().unwrap();
            for word in damage.says {
                assert!(
                    message.contains(word),
                    "{}, {}: no `{word}` in: {message}",
                    damage.name,
                    args[0]
                );
            }
            // Finished files are as they were, and nothing half-made stands under the final name.
            assert!(!place.join("out").exists(), "{}", damage.name);
        }
        assert!(place.bytes_below("model") == before, "{}", damage.name);
    }
}

/// The sharded form of an undamaged checkpoint must work, or the tests above would pass for the wrong reason.
#[test]
fn a_checkpoint_in_shards_runs_as_the_whole_does() {
    let place = Workplace::new();
    let folder = place.copy_of_tiny("model");
    let args = |model: &str| ["run", model, "--prompt", "Anna", "--max-tokens", "8", "--json"].map(str::to_owned);
    let whole = place.run(args(&tiny_model())).result(0);
    Parts::read(&folder.join("model.safetensors")).write_sharded(&folder);
    let sharded = place.run(args("model")).result(0);
    assert_eq!(whole["token_ids"], sharded["token_ids"]);
    assert_eq!(whole["generated_tokens"], 8);
}

#[test]
fn arguments_that_cannot_be_right_are_json_too() {
    let place = Workplace::new();
    let tiny = tiny_model();
    // Arguments, and what the message must name.
    for (args, named) in [
        (&["frobnicate"][..], "frobnicate"),
        (&["--seed", "5", "frob"], "frob"),
        (&["run"], "<MODEL>"),
        (&["run", &tiny], "--prompt"),
        (&["run", &tiny, "--prompt", "a", "--max-tokens", "many"], "many"),
        (&["run", &tiny, "--prompt", "a", "--nonsense"], "--nonsense"),
        (&["run", &tiny, "--prompt", "a", "--temperature", "-1"], "-1"),
        (&["run", &tiny, "--prompt", "a", "--top-p", "2"], "2"),
        (&["run", &tiny, "--prompt", ""], "prompt"),
        (&["run", &tiny, "--prompt", "a", "--threads", "0"], "--threads"),
        (&["run", &tiny, "--prompt", "a", "--seed", "x"], "--seed"),
        (&["run", "nowhere", "--prompt", "a"], "nowhere"),
        (&["inspect", "nowhere"], "nowhere"),
        (&["eval", &tiny], "--text"),
        (&["eval", &tiny, "--text", "nowhere.txt"], "nowhere.txt"),
        (
            &["eval", &tiny, "--text", "nowhere.txt", "--max-tokens", "0"],
            "--max-tokens",
        ),
        (&["compress", "--moe", &tiny], "--output"),
        (&["compress", "--moe", "nowhere", "-o", "out"], "--calibration"),
        (&["check", "--baseline"], "--baseline"),
        (&["profile", "--profile", "here"], "--profile"),
        (&["compress", "--moe", &tiny, "-o", "out", "--force"], "--profile"),
    ] {
        let error = place.run(args.iter().chain(&["--json"])).fault(2);
        assert!(error["message"].as_str().unwrap().contains(named), "{args:?}: {error}");
        assert!(!place.join("out").exists(), "{args:?}");
    }
    // Without --json the message is text on standard error, and standard output stays empty.
    let ran = place.run(["run", "nowhere", "--prompt", "a"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{ran:?}");
    assert!(
        ran.stderr.starts_with("error: ") && ran.stderr.contains("nowhere"),
        "{ran:?}"
    );
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_with_both_numbers() {
    let place = Workplace::new();
    let prompt = "Anna went to the river. ".repeat(200);
    let error = place
        .run(["run", &tiny_model(), "--prompt", &prompt, "--json"])
        .fault(2);
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("256") && message.contains("tokens"), "{message}");
    assert!(error["found"].is_string() && error["expected"].is_string(), "{error}");
}

#[test]
fn a_text_that_is_none_is_refused() {
    let place = Workplace::new();
    fs_err::write(place.join("empty.txt"), "").unwrap();
    fs_err::write(place.join("latin1.txt"), [b'a', 0xe9, b'b']).unwrap();
    fs_err::create_dir(place.join("folder.txt")).unwrap();
    for (file, says) in [("empty.txt", ""), ("latin1.txt", "UTF-8"), ("folder.txt", "folder")] {
        let error = place.run(["eval", &tiny_model(), "--text", file, "--json"]).fault(2);
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains(says) && (message.contains(file) || file == "empty.txt"),
            "{file}: {message}"
        );
    }
}

#[test]
fn a_damaged_container_is_refused_by_layer_and_expert() {
    let place = Workplace::new();
    compress(&place, "out");
    let whole = place.bytes_below("out");
    let run = [
        "run",
        "out",
        "--prompt",
        "Anna went to the",
        "--max-tokens",
        "24",
        "--json",
    ];
    let good = place.run(run).result(0);

    // Any byte of an expert's record: header or section.
    let records = place.join("out/experts.bin");
    let bytes = fs_err::read(&records).unwrap();
    let mut refused = 0;
    for at in [3, 100, 300, bytes.len() / 2, bytes.len() * 3 / 4] {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x40;
        fs_err::write(&records, &damaged).unwrap();
        let ran = place.run(run);
        if ran.code == 0 {
            // A section is checked before its first use: this prompt did not use it, and the answer is unharmed.
            assert_eq!(ran.result(0)["token_ids"], good["token_ids"], "byte {at}");
            let eval = ["eval", "out", "--text", "heldout.txt", "--max-tokens", "2000", "--json"];
            fs_err::copy(
                in_repository("data/tiny-qwen2moe/heldout.txt"),
                place.join("heldout.txt"),
            )
            .unwrap();
            let ran = place.run(eval);
            if ran.code != 0 {
                refused += 1;
                assert!(ran.fault(2)["message"].as_str().unwrap().contains("expert"), "{ran:?}");
            }
        } else {
            refused += 1;
            let error = ran.fault(2);
            let message = error["message"].as_str().unwrap();
            for word in ["experts.bin", "layer", "expert"] {
                assert!(message.contains(word), "byte {at}: no `{word}` in: {message}");
            }
        }
    }
    // One may lie in an expert that even the long text never reaches, or between two records.
    assert!(refused >= 4, "{refused} of 5 damaged bytes were found");
    fs_err::write(&records, &bytes).unwrap();

    for (file, at) in [
        ("dense.safetensors", 2000),
        ("manifest.json", 40),
        ("tokenizer.json", 500),
    ] {
        let path = place.join("out").join(file);
        let bytes = fs_err::read(&path).unwrap();
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x01;
        fs_err::write(&path, &damaged).unwrap();
        let error = place.run(run).fault(2);
        assert!(error["message"].as_str().unwrap().contains(file), "{error}");
        fs_err::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let error = place.run(run).fault(2);
        assert!(error["message"].as_str().unwrap().contains(file), "{error}");
        fs_err::write(&path, &bytes).unwrap();
    }
    assert!(place.bytes_below("out") == whole);
    assert_eq!(place.run(run).result(0)["token_ids"], good["token_ids"]);
}

#[test]
fn compress_into_a_folder_that_is_not_its_own_is_refused() {
    let place = Workplace::new();
    fs_err::create_dir(place.join("out")).unwrap();
    fs_err::write(place.join("out/thesis.txt"), "years of work").unwrap();
    let error = place.run(compress_args(&place, "out")).fault(2);
    assert!(error["message"].as_str().unwrap().contains("out"), "{error}");
    assert_eq!(
        fs_err::read_to_string(place.join("out/thesis.txt")).unwrap(),
        "years of work"
    );
}

/// The tiny checkpoint compressed into `out`.
pub(crate) fn compress(place: &Workplace, out: &str) -> Value {
    place.run(compress_args(place, out)).result(0)
}

/// Few tokens to calibrate and to judge on: seconds are what these tests spend.
pub(crate) fn compress_args(place: &Workplace, out: &str) -> Vec<String> {
    let text = fs_err::read_to_string(in_repository("data/tiny-qwen2moe/heldout.txt")).expect("the committed text");
    let documents: Vec<&str> = text.split_inclusive("<|endoftext|>").take(12).collect();
    fs_err::write(place.join("judge.txt"), documents.concat()).expect("written");
    let (tiny, text) = (tiny_model(), in_repository("data/tiny-qwen2moe/train.txt"));
    let text = text.to_str().expect("UTF-8");
    let few = "compress.calibration_tokens=1024";
    let args = [
        "compress",
        "--moe",
        &tiny,
        "-o",
        out,
        "--calibration",
        text,
        "--eval-text",
        "judge.txt",
        "--set",
        few,
        "--json",
    ];
    args.map(str::to_owned).to_vec()
}

/// What was computed did not arrive: that is no success. `/dev/full` is a disk that is always full.
#[test]
fn a_full_disk_behind_standard_output_is_a_failure() {
    let place = Workplace::new();
    let tiny = tiny_model();
    for args in [
        &["inspect", &tiny, "--json"][..],
        &["inspect", &tiny],
        &["run", &tiny, "--prompt", "a", "--max-tokens", "4"],
    ] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let ran = Ran::of(place.command(args).stdout(full).output().unwrap());
        assert_eq!(ran.code, 1, "{args:?}: {ran:?}");
        assert!(ran.stderr.contains("standard output"), "{ran:?}");
    }
}

/// A profile that somebody named and that is not there is their error, however it was named.
#[test]
fn a_profile_that_is_named_must_be_there() {
    let place = Workplace::new();
    let (tiny, text) = (tiny_model(), in_repository("data/tiny-qwen2moe/train.txt"));
    let text = text.to_str().unwrap();
    let compress = [
        "compress",
        "--moe",
        &tiny,
        "-o",
        "out",
        "--calibration",
        text,
        "--dry-run",
        "--json",
    ];
    let named = place.run(compress.iter().chain(&["--profile", "nowhere"])).fault(2);
    let variable = place.run_with(&[("COTK_PROFILE", "nowhere")], compress).fault(2);
    for error in [named, variable] {
        assert!(error["message"].as_str().unwrap().contains("nowhere"), "{error}");
        assert!(error["file"].is_string(), "{error}");
    }
}
