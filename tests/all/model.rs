//! `inspect`, `run`, `eval` and `logits` on the committed tiny checkpoint: the JSON forms, and that they agree with
//! each other.

use serde_json::Value;

use crate::program::{Workplace, in_repository, tiny_model};

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn inspect_counts_what_the_checkpoint_holds() {
    let place = Workplace::new();
    let found = place.run(["inspect", &tiny_model(), "--json"]).result(0);
    for (key, value) in [
        ("format", Value::from("hf")),
        ("family", "qwen2_moe".into()),
        ("layers", 4.into()),
        ("hidden", 64.into()),
        ("vocab", 512.into()),
        ("experts", 8.into()),
        ("top_k", 2.into()),
        ("moe_intermediate", 32.into()),
        ("params_total", 275_200.into()),
        ("expert_bytes", (3 * 8 * 3 * 64 * 32 * 2).into()),
        ("bytes", (275_200 * 2).into()),
    ] {
        assert_eq!(found[key], value, "{key}");
    }
    // Two of eight experts in three layers.
    assert_eq!(found["params_active"], 275_200 - 3 * 6 * 3 * 64 * 32);
    let kinds: Vec<&str> = (0..4)
        .map(|i| found["per_layer"][i]["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["moe", "dense", "moe", "moe"]);
    assert!(found["per_layer"][0]["experts"].is_null());

    let listed = place.run(["inspect", &tiny_model(), "--experts", "--json"]).result(0);
    let expert = &listed["per_layer"][2]["experts"][7];
    assert_eq!(expert["id"], 7);
    assert_eq!(expert["bytes"], 3 * 64 * 32 * 2);
    assert_eq!(expert["bits"]["down"], 16);
    assert!(expert["rank"].is_null());
    assert_eq!(listed["per_layer"][1]["experts"].as_array().unwrap().len(), 0);

    let ran = place.run(["inspect", &tiny_model()]);
    assert!(
        ran.stdout.contains("275") && ran.stdout.lines().all(|l| l.chars().count() <= 100),
        "{}",
        ran.stdout
    );
}

#[test]
fn run_says_the_same_with_and_without_json() {
    let place = Workplace::new();
    let args = |more: &[&str]| -> Vec<String> {
        [
            "run",
            &tiny_model(),
            "--prompt",
            "Some animals:\n- cat\n- dog\n- fox\nThere are",
        ]
        .iter()
        .chain(more)
        .map(|s| (*s).to_owned())
        .collect()
    };
    let found = place.run(args(&["--json"])).result(0);
    assert_eq!(found["text"], " 3 animals.\n");
    assert_eq!(found["finish_reason"], "stop");
    assert_eq!(found["generated_tokens"], found["token_ids"].as_array().unwrap().len());
    for key in [
        "prompt_tokens",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "peak_rss_bytes",
    ] {
        assert!(number(&found[key]) > 0.0, "{key}");
    }
    let ran = place.run(args(&[]));
    assert_eq!((ran.code, ran.stdout.trim()), (0, "3 animals."));
    let short = place.run(args(&["--json", "--max-tokens", "2"])).result(0);
    assert_eq!(
        (&short["generated_tokens"], &short["finish_reason"]),
        (&Value::from(2), &"length".into())
    );
    let sampled = |seed: &str| {
        let ran = place.run(args(&["--json", "--temperature", "2", "--seed", seed]));
        ran.result(0)["token_ids"].clone()
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
}

#[test]
fn eval_has_the_promised_form_and_does_not_diverge_from_itself() {
    let place = Workplace::new();
    let (tiny, text) = (tiny_model(), in_repository("data/tiny-qwen2moe/heldout.txt"));
    let text = text.to_str().unwrap();
    let args = ["eval", &tiny, "--text", text, "--max-tokens", "1500", "--json"];
    // A reference has its cache in f32: so has the model here, and then nothing may differ.
    let itself = ["--reference", tiny.as_str(), "--kv-cache"];
    let found = place.run(args.iter().chain(&itself).chain(&["f32"])).result(0);
    assert_eq!(
        (&found["tokens"], &found["window"], &found["stride"]),
        (&1500.into(), &256.into(), &128.into())
    );
    let perplexity = number(&found["perplexity"]);
    assert!((perplexity - number(&found["nll_nats"]).exp()).abs() < 1e-9);
    assert!(number(&found["perplexity_ci95"][0]) < perplexity && perplexity < number(&found["perplexity_ci95"][1]));
    assert!(perplexity < 5.0, "far below the 512 of chance: {perplexity}");
    assert!(number(&found["reference"]["kl_nats"]) < 1e-9);
    assert_eq!(number(&found["reference"]["top1_agreement"]), 1.0);
    assert!(number(&found["reference"]["kl_ci95"][1]) < 1e-9);
    // By default it has f16: a difference that is there, and small.
    let found = place.run(args.iter().chain(&itself[..2])).result(0);
    let kl = number(&found["reference"]["kl_nats"]);
    assert!(kl > 1e-12 && kl < 1e-6, "{kl}");
    assert_eq!(found["tasks"], Value::Array(Vec::new()));
    assert!(place.run(args).result(0)["reference"].is_null());
    let error = place.run(args.iter().chain(&["--window", "999"])).fault(2);
    assert_eq!((&error["key"], &error["found"]), (&"window".into(), &"999".into()));
}

#[test]
fn logits_are_those_that_generation_follows() {
    let place = Workplace::new();
    let tiny = tiny_model();
    let found = place.run(["logits", &tiny, "--tokens", "10,20,30", "--json"]).result(0);
    assert_eq!(found["shape"], serde_json::json!([3, 512]));
    let logits: Vec<f64> = found["logits"].as_array().unwrap().iter().map(number).collect();
    assert_eq!(logits.len(), 3 * 512);

    let written = place
        .run(["logits", &tiny, "--tokens", "10,20,30", "--out", "l.npy", "--json"])
        .result(0);
    assert_eq!(written["shape"], found["shape"]);
    let bytes = fs_err::read(place.join("l.npy")).unwrap();
    let data = &bytes[bytes.len() - 3 * 512 * 4..];
    let stored = data
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f64::from(f32::from_le_bytes(*b)));
    for (stored, shown) in stored.zip(&logits) {
        assert!((stored - shown).abs() < 1e-6);
    }
    let error = place.run(["logits", &tiny, "--tokens", "1,512", "--json"]).fault(2);
    assert_eq!(
        (&error["found"], &error["expected"]),
        (&"512".into(), &"below 512".into())
    );
    let many = vec!["1"; 300].join(",");
    assert!(
        place.run(["logits", &tiny, "--tokens", &many, "--json"]).fault(2)["message"]
            .as_str()
            .unwrap()
            .contains("300")
    );
}
