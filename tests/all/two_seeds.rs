//! The demo's jobs under two seeds. Law: another seed gives other measured numbers (times do not count), the same seed
//! the same ones: a figure that no seed moves is not measured.

use serde_json::Value;

#[cfg(feature = "search")]
use crate::program::in_repository;
use crate::program::{Workplace, tiny_model};

fn compress(seed: &str, sets: &[&str]) -> Value {
    let place = Workplace::new();
    let tiny = tiny_model();
    let (train, heldout) = (format!("{tiny}/train.txt"), format!("{tiny}/heldout.txt"));
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    place
        .run(
            [
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
                "--seed",
                seed,
                "--json",
            ]
            .into_iter()
            .chain(sets),
        )
        .result(0)
}

#[test]
fn compress_measures_other_numbers_under_another_seed() {
    // Few windows: which ones are drawn decides which experts count as little used.
    let few = ["compress.calibration_tokens=512", "compress.drop_ratio=0.4"];
    let (one, again, two) = (compress("1", &few), compress("1", &few), compress("2", &few));
    for key in ["perplexity_after", "kl_nats"] {
        assert_eq!(one[key], again[key], "{key}: the same seed");
        assert_ne!(one[key], two[key], "{key}: another seed");
    }
    assert_eq!(
        one["perplexity_before"], two["perplexity_before"],
        "the model before is not drawn"
    );
}

/// As the demo runs it: the recipe as it is, nothing set.
#[test]
fn compress_as_in_the_demo_measures_other_numbers_under_another_seed() {
    let (one, two) = (compress("0", &[]), compress("1", &[]));
    for key in ["perplexity_after", "kl_nats"] {
        assert_ne!(one[key], two[key], "{key}");
    }
}

#[cfg(feature = "search")]
#[test]
fn search_measures_other_numbers_under_another_seed() {
    let path = |path: &str| in_repository(path).to_str().expect("UTF-8").to_owned();
    let recipe = path("tests/recipes/search-tiny.toml");
    let profile = path("profiles/reference/epyc-2c-avx512vnni");
    let search = |seed: &str| {
        let place = Workplace::new();
        // A target that any profile can meet: what is searched is not the point here.
        let wide = ["--set", "latency.target_of_largest=0.95"];
        let args = ["search", &recipe, "--profile", &profile, "--seed", seed, "--json"];
        place.run(args.iter().chain(&wide)).result(0)
    };
    let (one, two) = (search("1"), search("2"));
    let accuracies = |result: &Value| {
        // One accuracy over some hundred images may agree by chance; all three do not.
        let found = [
            &result["accuracy_val"],
            &result["accuracy_test"],
            &result["baseline"]["accuracy_test"],
        ];
        found.map(Value::to_string)
    };
    assert_ne!(accuracies(&one), accuracies(&two));
}
