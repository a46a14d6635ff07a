//! Dense matrices as codes and caches of every kind, through the whole program: what `compress --dense-bits` measures is
//! what `eval` measures of its output, and what cannot be is refused.

use std::path::Path;

use crate::program::{Workplace, in_repository, tiny_model};

fn text(name: &str) -> String {
    let path = in_repository("data/tiny-qwen2moe").join(name);
    path.to_str().expect("UTF-8").to_owned()
}

fn compress(place: &Workplace, out: &str, bits: &str) -> serde_json::Value {
    let ran = place.run([
        "compress",
        "--moe",
        &tiny_model(),
        "-o",
        out,
        "--calibration",
        &text("train.txt"),
        "--set",
        "compress.calibration_tokens=1024",
        "--set",
        "compress.drop_ratio=0.0",
        "--dense-bits",
        bits,
        "--json",
    ]);
    ran.result(0)
}

#[test]
fn a_coded_dense_part_is_smaller_and_close_and_told_by_inspect() {
    let place = Workplace::new();
    let plain = compress(&place, "plain", "16");
    let coded = compress(&place, "coded", "8");
    let number = |value: &serde_json::Value, key: &str| value[key].as_f64().expect("a number");
    assert!(number(&coded, "weight_bytes_after") < number(&plain, "weight_bytes_after"));
    assert!((number(&coded, "kl_nats") - number(&plain, "kl_nats")).abs() < 0.01);

    let found = place.run(["inspect", "coded", "--json"]).result(0);
    let dense = found["dense"].as_array().expect("a list");
    let at = |bits: u64| dense.iter().find(|d| d["bits"] == bits).cloned();
    assert!(at(8).is_some_and(|d| d["matrices"].as_u64() > Some(5)), "{found}");
    assert!(at(4).is_none() && dense.len() == 2, "{found}");

    // A cache of each kind runs, and f16 says what f32 says.
    let run = |kind: &str| {
        let args = [
            "run",
            "coded",
            "--prompt",
            "The city",
            "--max-tokens",
            "12",
            "--kv-cache",
            kind,
            "--json",
        ];
        place.run(args).result(0)["token_ids"].clone()
    };
    assert_eq!(run("f16"), run("f32"));
    assert_eq!(
        run("int8").as_array().map(Vec::len),
        run("f32").as_array().map(Vec::len)
    );

    let exported = place.run(["export", "coded", "--hf", "hf", "--json"]);
    assert!(exported.code == 0, "{exported:?}");
    assert!(Path::new(&place.join("hf/config.json")).is_file());
    let score = |model: &str| {
        let text = text("heldout.txt");
        let args = [
            "eval",
            model,
            "--text",
            &text,
            "--max-tokens",
            "256",
            "--kv-cache",
            "f32",
            "--json",
        ];
        place.run(args).result(0)["perplexity"].as_f64().expect("a number")
    };
    let (ours, theirs) = (score("coded"), score("hf"));
    assert!((ours / theirs).ln().abs() < 0.01, "{ours} {theirs}");
}

#[test]
fn widths_and_kinds_that_there_are_not_are_refused() {
    let place = Workplace::new();
    let (model, train) = (tiny_model(), text("train.txt"));
    let ran = place.run([
        "compress",
        "--moe",
        &model,
        "-o",
        "o",
        "--calibration",
        &train,
        "--dense-bits",
        "5",
        "--json",
    ]);
    let fault = ran.fault(2);
    let message = fault["message"].as_str().expect("a message");
    assert!(message.contains("expected 4, 8 or 16"), "{message}");
    let fault = place
        .run(["run", &model, "--prompt", "a", "--kv-cache", "int4", "--json"])
        .fault(2);
    let message = fault["message"].as_str().expect("a message");
    assert!(
        message.contains("int4") && message.contains("f32, f16 or int8"),
        "{message}"
    );
    assert!(!place.names().contains(&"o".to_owned()));
}
