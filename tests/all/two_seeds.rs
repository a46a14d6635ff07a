//! The demo's jobs under two seeds. Law: another seed gives other measured numbers (times do not count), the same seed
//! the same ones: a figure that no seed moves is not measured.

use serde_json::Value;

use crate::program::{Workplace, in_repository, tiny_model};

fn compress(seed: &str) -> Value {
    let place = Workplace::new();
    let tiny = tiny_model();
    let (train, heldout) = (format!("{tiny}/train.txt"), format!("{tiny}/heldout.txt"));
    // Few windows: which ones are drawn decides which experts count as little used.
    place
        .run([
            "compress",
            "--moe",
            &tiny,
            "-o",
            "out",
            "--recipe",
            "moe-int4",
            "--calibration",
            &train,
            "--eval-text",
            &heldout,
            "--set",
            "compress.calibration_tokens=512",
            "--set",
            "compress.drop_ratio=0.4",
            "--seed",
            seed,
            "--json",
        ])
        .result(0)
}

#[test]
fn compress_measures_other_numbers_under_another_seed() {
    let (one, again, two) = (compress("1"), compress("1"), compress("2"));
    for key in ["perplexity_after", "kl_nats"] {
        assert_eq!(one[key], again[key], "{key}: the same seed");
        assert_ne!(one[key], two[key], "{key}: another seed");
    }
    assert_eq!(
        one["perplexity_before"], two["perplexity_before"],
        "the model before is not drawn"
    );
}

#[cfg(feature = "search")]
#[test]
fn search_measures_other_numbers_under_another_seed() {
    let recipe = in_repository("tests/recipes/search-tiny.toml");
    let search = |seed: &str| {
        let place = Workplace::new();
        place
            .run(["search", recipe.to_str().expect("UTF-8"), "--seed", seed, "--json"])
            .result(0)
    };
    let (one, two) = (search("1"), search("2"));
    let accuracies = |result: &Value| [&result["accuracy_val"], &result["accuracy_test"]].map(Value::to_string);
    assert_ne!(accuracies(&one), accuracies(&two));
}

#[cfg(not(feature = "search"))]
const _: fn(&str) -> std::path::PathBuf = |path| in_repository(path);
