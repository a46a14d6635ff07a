//! `cotk compress` under budgets, and `--compare` of ways to spend them: the promised forms, what cannot be right, a
//! contest that goes on where it was killed.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::checkpoint::Parts;
use crate::compress_args::{compress_of, text};
use crate::program::{Ran, Workplace, tiny_model};

/// `cotk compress` of `model` with few tokens.
fn args_of(model: &str, more: &[&str]) -> Vec<String> {
    compress_of(model, 2000, more)
}

fn args(more: &[&str]) -> Vec<String> {
    args_of(&tiny_model(), more)
}

const FEW_FORMS: [&str; 4] = [
    "--set",
    "compress.joint.groups=[32, 128]",
    "--set",
    "compress.joint.sensitivity_tokens=500",
];

/// A contest of these rows at these budgets.
pub(crate) fn contest(rows: &str, budgets: &str) -> Vec<String> {
    let judge = text("heldout.txt");
    let more = [
        "--compare",
        rows,
        "--budgets",
        budgets,
        "--eval-text",
        &judge,
        "--text-tokens",
        "1000",
    ];
    args(&[&more[..], &FEW_FORMS].concat())
}

#[test]
fn a_contest_has_the_promised_form() {
    let place = Workplace::new();
    let found = place.run(contest("rtn,gptq-uniform,mc,mop,joint", "2.5")).result(0);
    let lines = found["lines"].as_array().unwrap();
    let names: Vec<&str> = lines.iter().map(|line| line["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["rtn", "gptq-uniform", "mc", "mop", "joint"]);
    let allowed = 2.5 + found["allowance_bits"].as_f64().unwrap();
    for line in lines {
        let number = |key: &str| line[key].as_f64().unwrap_or_else(|| panic!("{key}: {line}"));
        // Zero points, four bytes a matrix, are in the figure and not in the budget of baselines.
        assert!(number("bits_per_expert_weight") <= allowed + 0.02, "{line}");
        assert!(number("kl_nats") > 0.0 && number("uniform_ratio") > 0.0 && number("mc_ratio") > 0.0);
        assert!(number("top1_agreement") > 0.5 && number("peak_rss_bytes") > 0.0 && number("bytes") > 0.0);
        assert!(line["uniform_ratio_ci95"].is_array() && line["above_uniform_in"].is_array());
        assert_eq!(line["texts"][0]["text"], "heldout");
        let matrices = line["counts"]["matrices"].as_object().unwrap();
        let count: u64 = matrices.values().map(|count| count.as_u64().unwrap()).sum();
        assert_eq!(count, 3 * 8 * 3, "three matrices of eight experts in three layers");
    }
    assert_eq!(
        (lines[1]["uniform_ratio"].as_f64(), lines[3]["seeds"].as_u64()),
        (Some(1.0), Some(3))
    );
    let out = place.join("out");
    assert!(out.join("comparison.json").is_file());
    assert!(
        fs_err::read_to_string(out.join("pareto.svg"))
            .unwrap()
            .contains("gptq-uniform")
    );
    assert!(!place.join("out.partial").exists());
}

#[test]
fn a_budget_that_no_row_meets_is_out_of_reach_and_one_that_some_miss_is_said() {
    let place = Workplace::new();
    // One bit and an f16 for 32 are 1.5 bits, for a whole row less.
    let found = place.run(contest("gptq-uniform:g32,mc", "1.4")).json();
    assert_eq!(found["ok"], true, "{found}");
    let warnings = found["warnings"].to_string();
    assert!(
        warnings.contains("at 1.4 bits is left out") && warnings.contains("smallest"),
        "{warnings}"
    );

    let place = Workplace::new();
    let error = place.run(contest("rtn,mc", "0.5")).fault(4);
    assert!(error["expected"].as_str().unwrap().starts_with("at least"), "{error}");
    assert!(!place.join("out").exists());
}

#[test]
fn a_container_meets_its_budget_of_bits_or_says_the_smallest() {
    let place = Workplace::new();
    let joint = |bits: &'static str| {
        let more = ["--recipe", "moe-joint", "--budget-bits-per-weight", bits];
        args(&[&more[..], &FEW_FORMS].concat())
    };
    let found = place.run(joint("2.5")).result(0);
    let bits = found["bits_per_expert_weight"].as_f64().unwrap();
    assert!((1.5..=2.5).contains(&bits), "{bits}");
    let inspected = place.run(["inspect", "out", "--experts", "--json"]).result(0);
    assert!(inspected["per_layer"][0]["experts"][0]["bits"].is_object());

    let place = Workplace::new();
    let error = place.run(joint("0.5")).fault(4);
    assert!(error["expected"].as_str().unwrap().starts_with("at least"), "{error}");
    assert!(!place.join("out").exists());
}

#[test]
fn what_cannot_be_right_is_refused_by_name() {
    let place = Workplace::new();
    let judge = text("heldout.txt");
    let binary = place.join("binary.txt");
    fs_err::write(&binary, [0xff, 0xfe, 0x00]).unwrap();
    let mut not_text = args(&["--recipe", "moe-joint"]);
    let at = not_text.iter().position(|arg| arg == "--calibration").unwrap();
    not_text[at + 1] = binary.to_str().unwrap().to_owned();
    let compare = |rows: &str, more: &[&str]| args(&[&["--compare", rows, "--eval-text", &judge][..], more].concat());
    for (arguments, says) in [
        (compare("rtm", &["--budgets", "2.5"]), "expected one of rtn"),
        (compare("mc:g32", &[]), "expected healed"),
        (compare("reap,joint", &[]), "do not go into one table"),
        (compare("joint", &["--budgets", "0"]), "above 0 and at most 16"),
        (compare("joint", &["--budgets", "17"]), "above 0 and at most 16"),
        (compare("joint", &["--recipe", "moe-int4"]), "[compress.joint]"),
        (compare("joint", &["--max-kl", "0.1"]), "leave --budget-bytes"),
        (compare("reap", &["--decode-tokens", "8"]), "write no container"),
        (args(&["--budgets", "2.5"]), "--compare"),
        (
            args(&["--budget-bytes", "300000", "--budget-bits-per-weight", "2.5"]),
            "cannot be used with",
        ),
        (
            args(&["--recipe", "moe-joint", "--budget-bits-per-weight", "-1"]),
            "expected",
        ),
        (
            args(&["--recipe", "moe-joint", "--set", "compress.joint.groups=[48]"]),
            "16, 32, 64, 128",
        ),
        (not_text, "binary.txt"),
    ] {
        let error = place.run(&arguments).fault(2);
        let shown = error.to_string();
        assert!(shown.contains(says), "{arguments:?}: {shown}");
        assert!(
            !place.join("out").exists() && !place.join("out.partial").exists(),
            "{says}"
        );
    }
}

#[test]
fn a_text_too_short_for_statistics_says_what_each_expert_lacks() {
    let place = Workplace::new();
    let mut arguments = args(&["--recipe", "moe-joint", "--budget-bits-per-weight", "2.5"]);
    let at = arguments
        .iter()
        .position(|arg| arg.starts_with("compress.calibration_tokens"))
        .unwrap();
    arguments[at] = "compress.calibration_tokens=120".to_owned();
    let error = place.run(arguments).fault(2);
    assert_eq!(error["kind"], "few-tokens");
    let lacking = error["found"].as_str().unwrap();
    assert!(lacking.contains("expert 0 lacks"), "{error}");
    assert!(error["expected"].as_str().unwrap().contains("tokens"), "{error}");
    assert!(!place.join("out").exists());
}

/// Two experts' rows of the router become large, and two others' their opposites: two scores of four are large for every
/// token, and the other experts are never among the greatest two.
#[test]
fn an_expert_that_never_fires_is_coded_counted_and_named() {
    let place = Workplace::new();
    let folder = place.copy_of_tiny("model");
    let file = folder.join("model.safetensors");
    let mut parts = Parts::read(&file);
    let (from, to) = parts.span("model.layers.0.mlp.gate.weight");
    let row = (to - from) / 8;
    for (of, opposite) in [(0, 1), (2, 4)] {
        for column in 0..row / 2 {
            let at = |expert: usize| from + expert * row + 2 * column;
            let stored = u16::from_le_bytes([parts.data[at(of)], parts.data[at(of) + 1]]);
            // 2^13 times in bf16: the exponent lies above seven bits.
            let large = if stored & 0x7f80 == 0 {
                stored
            } else {
                stored + (13 << 7)
            };
            let (own, other) = (at(of), at(opposite));
            parts.data[own..own + 2].copy_from_slice(&large.to_le_bytes());
            parts.data[other..other + 2].copy_from_slice(&(large ^ 0x8000).to_le_bytes());
        }
    }
    parts.write(&file);
    let more = ["--recipe", "moe-joint", "--budget-bits-per-weight", "3"];
    let ran = place.run(args_of(folder.to_str().unwrap(), &[&more[..], &FEW_FORMS].concat()));
    let found = ran.json();
    assert_eq!(found["ok"], true, "{found}");
    assert!(
        found["result"]["experts_without_tokens"].as_u64().unwrap() >= 1,
        "{found}"
    );
    assert!(
        found["warnings"].to_string().contains("saw no calibration token"),
        "{found}"
    );
    let inspected = place.run(["inspect", "out", "--experts", "--json"]).result(0);
    let expert = &inspected["per_layer"][0]["experts"][3];
    assert_eq!(
        (&expert["tokens"], &expert["is_starved"]),
        (&Value::from(0), &Value::from(true))
    );
}

/// Everything that does not tell how long it took.
pub(crate) fn figures(place: &Workplace) -> Value {
    let text = fs_err::read_to_string(place.join("out/comparison.json")).unwrap();
    let mut found: Value = serde_json::from_str(&text).unwrap();
    let forget = |value: &mut Value| {
        let fields = value.as_object_mut().unwrap();
        fields.retain(|key, _| !key.contains("seconds") && !key.contains("rss"));
    };
    forget(&mut found);
    found["lines"].as_array_mut().unwrap().iter_mut().for_each(forget);
    found
}

#[test]
fn a_contest_that_was_killed_goes_on_to_the_same_table() {
    let clean = Workplace::new();
    let arguments = contest("rtn,gptq-uniform,joint", "3.5,2.5");
    let began = Instant::now();
    clean.run(&arguments).result(0);
    let whole = began.elapsed();
    let expected = figures(&clean);
    for at in [0.3, 0.6, 0.85] {
        let place = Workplace::new();
        let child = place.start(&arguments);
        std::thread::sleep(whole.mul_f64(at).min(Duration::from_secs(20)));
        // Fails when the child is gone already.
        let _ = Command::new("kill")
            .args(["-KILL".to_owned(), child.id().to_string()])
            .status();
        let ran = Ran::of(child.wait_with_output().expect("it was started"));
        if ran.code != 0 {
            place.run(&arguments).result(0);
        }
        assert_eq!(figures(&place), expected, "killed at {at}");
        assert!(!place.join("out.partial").exists());
    }
}
