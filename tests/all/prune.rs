//! `cotk compress` with `[compress.prune]` and `--compare`: the promised form, and what cannot be right.

use crate::compress_args::{compress_of, text};
use crate::program::{Workplace, tiny_model};

/// `cotk compress` of the tiny model with few tokens.
fn args(more: &[&str]) -> Vec<String> {
    compress_of(&tiny_model(), 1500, more)
}

#[test]
fn a_pruned_container_says_which_experts_went_and_why() {
    let place = Workplace::new();
    let found = place
        .run(args(&["--recipe", "moe-prune", "--set", "compress.prune.ratio=0.5"]))
        .result(0);
    let layers = found["pruned"]["layers"].as_array().unwrap();
    let dropped: usize = layers
        .iter()
        .map(|l| l["mask"]["dropped"].as_array().unwrap().len())
        .sum();
    assert_eq!((layers.len(), dropped), (3, 12));
    for layer in layers {
        assert!(layer["loss"].as_f64().unwrap() >= 0.0 && layer["kl_per_loss"].as_f64().unwrap() >= 0.0);
    }
    let kept: u64 = found["experts_kept"]
        .as_array()
        .unwrap()
        .iter()
        .map(|k| k.as_u64().unwrap())
        .sum();
    assert_eq!(kept, 12);
    let report = fs_err::read_to_string(place.path().join("out/report.md")).unwrap();
    assert!(report.contains("Experts were dropped by genetic, counts per layer unequal; dropped means masked"));

    let inspected = place.run(["inspect", "out", "--experts", "--json"]).result(0);
    let expert = &inspected["per_layer"][0]["experts"][0];
    assert!(expert["tokens"].is_u64() && expert["share"].is_f64() && expert["is_starved"].is_boolean());
}

#[test]
fn a_comparison_has_the_promised_form() {
    let place = Workplace::new();
    let judge = text("heldout.txt");
    let found = place
        .run(args(&[
            "--compare",
            "reap,swap:unequal",
            "--ratios",
            "0.25",
            "--eval-text",
            &judge,
            "--text-tokens",
            "1000",
            "--set",
            "compress.prune.semantics=novice",
        ]))
        .result(0);
    assert_eq!(found["semantics"], "novice");
    let lines = found["lines"].as_array().unwrap();
    let names: Vec<&str> = lines.iter().map(|line| line["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["reap equal", "swap unequal"]);
    for line in lines {
        assert!(line["kl_nats"].as_f64().unwrap() > 0.0 && line["kl_ratio"].as_f64().unwrap() > 0.0);
        assert_eq!(line["texts"][0]["text"], "heldout");
    }
    assert!(place.path().join("out/comparison.json").is_file() && !place.path().join("out.partial").exists());
}

#[test]
fn what_cannot_be_pruned_or_compared_is_refused_by_name() {
    let place = Workplace::new();
    let (judge, train) = (text("heldout.txt"), text("train.txt"));
    let compare = |rows: &'static str, ratios: &'static str, judge: &str| -> Vec<String> {
        args(&["--compare", rows, "--ratios", ratios, "--eval-text", judge])
    };
    let prune = |set: &str| args(&["--recipe", "moe-prune", "--set", set]);
    let none = place.path().join("none.txt");
    fs_err::write(&none, [0xff, 0xfe, 0x00]).unwrap();
    let binary = none.to_str().unwrap().to_owned();
    for (arguments, says) in [
        (compare("reep", "0.5", &judge), "expected one of random"),
        (compare("reap:even", "0.5", &judge), "expected equal, unequal"),
        (compare("reap", "1.5", &judge), "expected above 0 and below 1"),
        (compare("reap", "0.5", &train), "is also what would judge"),
        (compare("reap", "0.5", &binary), "none.txt"),
        (args(&["--compare", "reap"]), "--eval-text"),
        (args(&["--eval-text", &judge, "--eval-text", &judge]), "expected one"),
        (prune("compress.drop_ratio=0.25"), "contradict"),
        (prune("compress.prune.method=reep"), "reap"),
        (prune("compress.prune.metod=reap"), "method"),
        (prune("compress.prune.field_masks=0"), "expected 1 to 8"),
    ] {
        let error = place.run(&arguments).fault(2);
        let shown = error.to_string();
        assert!(shown.contains(says), "{arguments:?}: {shown}");
        assert!(
            !place.path().join("out").exists() && !place.path().join("out.partial").exists(),
            "{says}"
        );
    }
}
