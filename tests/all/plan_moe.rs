//! `cotk plan` on the committed tiny mixture of experts and the committed reference profile: forms, sums, budgets, refusals.
//! No test here depends on this machine's speed.

use serde_json::Value;

use crate::program::{Ran, Workplace, tiny_model};

fn plan(place: &Workplace, more: &[&str]) -> Ran {
    let profile = format!("{}/profiles/reference/epyc-2c-avx512vnni", env!("CARGO_MANIFEST_DIR"));
    let model = tiny_model();
    let mut args = vec![
        "plan",
        model.as_str(),
        "--threads",
        "1",
        "--profile",
        profile.as_str(),
        "--force",
        "--json",
    ];
    args.extend(more);
    place.run(args)
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} in {value}"))
}

#[test]
fn a_plan_of_a_model_adds_up() {
    let place = Workplace::new();
    let result = plan(&place, &["--context", "64"]).result(0);
    let p = &result["prediction"];
    let ms = number(p, "ms");
    assert!(number(p, "lo_ms") < ms && ms < number(p, "hi_ms"));
    assert!((number(p, "tokens_per_s") * ms / 1e3 - 1.0).abs() < 1e-9);
    let terms: f64 = p["terms"]
        .as_object()
        .unwrap()
        .values()
        .map(|v| v.as_f64().unwrap())
        .sum();
    assert!((terms / ms - 1.0).abs() < 1e-6, "{terms} {ms}");
    let layers = result["per_layer"].as_array().unwrap();
    let sum: f64 = layers.iter().map(|l| number(l, "ms")).sum();
    assert!((sum / ms - 1.0).abs() < 1e-6, "{sum} {ms}");
    let place = &result["placement"];
    assert_eq!(place["shares"], "uniform");
    assert_eq!(number(place, "expert_bytes"), number(place, "expert_bytes_in_memory"));
    // A quick profile holds nothing of many tokens: then there is no prefill, and that is said.
    assert!(result["prefill"].is_null() || number(&result["prefill"], "tokens") == 64.0);
}

/// However fast this machine's memory is now, a plan adds up.
#[test]
fn what_memory_gives_now_is_counted_into_a_plan_that_adds_up() {
    let place = Workplace::new();
    let result = plan(&place, &["--context", "64", "--now"]).result(0);
    let ms = number(&result["prediction"], "ms");
    let terms = result["prediction"]["terms"].as_object().unwrap();
    let sum: f64 = terms.values().map(|v| v.as_f64().unwrap()).sum();
    assert!((sum / ms - 1.0).abs() < 1e-6, "{sum} {ms}");
    let layers = result["per_layer"].as_array().unwrap();
    let layers: f64 = layers.iter().map(|l| number(l, "ms")).sum();
    assert!((layers / ms - 1.0).abs() < 1e-6, "{layers} {ms}");
}

#[test]
fn less_memory_is_never_faster_and_too_little_is_refused_with_the_numbers() {
    let place = Workplace::new();
    let all = plan(&place, &[]).result(0);
    let bytes = number(&all["placement"], "memory_bytes");
    let mut last = 0.0;
    for part in [1.0, 0.9, 0.8] {
        let budget = format!("{}", (bytes * part) as u64);
        let ran = plan(&place, &["--budget-bytes", &budget]);
        if part < 0.9 && ran.code == 4 {
            continue; // the least that a step needs may be more than that
        }
        let ms = number(&ran.result(0)["prediction"], "ms");
        assert!(ms >= last, "{ms} {last}");
        last = ms;
    }
    let fault = plan(&place, &["--budget-bytes", "1000"]).fault(4);
    assert_eq!(
        (fault["kind"].as_str(), fault["found"].as_str()),
        (Some("budget"), Some("1000"))
    );
    assert!(fault["expected"].as_str().unwrap().starts_with("at least "));
}

#[test]
fn choices_are_beaten_by_none() {
    let result = plan(&Workplace::new(), &[]).result(0);
    let choices = result["pareto"].as_array().unwrap();
    assert!(!choices.is_empty());
    let of = |c: &Value| (number(c, "bits"), number(c, "budget_bytes"), number(c, "tokens_per_s"));
    for a in choices {
        for b in choices {
            let ((bits, bytes, rate), (other_bits, other_bytes, other_rate)) = (of(a), of(b));
            let beats = other_bits >= bits && other_bytes <= bytes && other_rate >= rate;
            assert!(a == b || !beats || of(a) == of(b), "{b} beats {a}");
        }
    }
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let place = Workplace::new();
    for (args, text) in [
        (vec!["--bits", "5"], "2, 3, 4, 8 or 16"),
        (vec!["--context", "0"], "--context"),
        (vec!["--context", "99999999"], "context"),
    ] {
        let fault = plan(&place, &args).fault(2);
        assert!(fault["message"].as_str().unwrap().contains(text), "{fault}");
    }
}
