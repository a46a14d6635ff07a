//! `cotk compress --recipe moe-shrink`: containers whose experts have inner sizes of their own are run, evaluated and
//! inspected as any other, and what cannot be right is refused.

use crate::compress_args::{compress_of, text};
use crate::program::{Workplace, tiny_model};

/// `cotk compress` of the tiny model with few tokens.
pub(crate) fn args(more: &[&str]) -> Vec<String> {
    let own = ["--recipe", "moe-shrink", "--set", "compress.shrink.end_tokens=500"];
    compress_of(&tiny_model(), 1500, &[&own[..], more].concat())
}

#[test]
fn a_container_of_smaller_experts_runs_and_is_evaluated_and_inspected() {
    let place = Workplace::new();
    let built = place
        .run(args(&[
            "--set",
            "compress.shrink.ratio=0.5",
            "--set",
            "compress.shrink.multiple=4",
        ]))
        .result(0);
    assert!(built["kl_nats"].as_f64().unwrap() > 0.0);
    let heldout = text("heldout.txt");
    let eval = place
        .run(["eval", "out", "--text", &heldout, "--max-tokens", "1000", "--json"])
        .result(0);
    assert!(eval["perplexity"].as_f64().unwrap() > 1.0);
    let run = place
        .run(["run", "out", "--prompt", "Anna", "--max-tokens", "4", "--json"])
        .result(0);
    assert!(run.is_object());
    let inspected = place.run(["inspect", "out", "--experts", "--json"]).result(0);
    let experts = inspected["per_layer"][0]["experts"].as_array().unwrap();
    assert_eq!(experts.len(), 8);
    assert!(experts.iter().all(|expert| expert["kind"] == "kept"));
    let sizes: std::collections::BTreeSet<u64> = experts.iter().map(|e| e["bytes"].as_u64().unwrap()).collect();
    assert!(
        *sizes.first().unwrap() < 3 * 64 * 32,
        "half of 8-bit weights and their scales: {sizes:?}"
    );
}

#[test]
fn shares_that_contradict_each_other_are_refused_by_name() {
    let place = Workplace::new();
    for (set, says) in [
        ("compress.drop_ratio=0.25", "contradict"),
        ("compress.prune.ratio=0.5", "contradict"),
        ("compress.shrink.ratio=1.5", "1.5"),
        ("compress.shrink.multiple=0", "expected 1 to 1024"),
        ("compress.shrink.spread=paper", "equal"),
        ("compress.shrink.rato=0.5", "ratio"),
    ] {
        let error = place.run(args(&["--set", set])).fault(2);
        let shown = error.to_string();
        assert!(shown.contains(says), "{set}: {shown}");
        assert!(!place.path().join("out").exists(), "{set}");
    }
}
