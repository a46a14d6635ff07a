//! `cotk search` as a whole program: stopped and killed at any moment it ends as one that was not. Only with
//! `cotk-train`, which has libtorch.
#![cfg(feature = "search")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::program::{Ran, Workplace, in_repository};

fn args(more: &[&str]) -> Vec<String> {
    let path = |path: &str| in_repository(path).to_str().expect("UTF-8").to_owned();
    // A committed profile, and a recipe without a target in ms: no measured time decides anything.
    let (recipe, profile) = (
        path("tests/recipes/search-guarded.toml"),
        path("profiles/reference/epyc-2c-avx512vnni"),
    );
    let mut args = vec![
        "search".to_owned(),
        recipe,
        "--profile".to_owned(),
        profile,
        "--json".to_owned(),
    ];
    args.extend(more.iter().map(|&arg| arg.to_owned()));
    args
}

/// What must not depend on the way there: network, accuracies, exported bytes.
fn essence(place: &Workplace, ran: &Ran) -> (String, Vec<u8>, Vec<u8>) {
    let result = ran.result(0);
    let export = |kind: &str| {
        let path = result["exports"][kind].as_str().expect("a path");
        fs_err::read(place.join(Path::new(path))).expect("the export that the result names")
    };
    let numbers = [
        &result["network"]["encoding"],
        &result["accuracy_val"],
        &result["accuracy_test"],
        &result["predicted_ms"],
    ];
    (format!("{numbers:?}"), export("onnx"), export("safetensors"))
}

#[test]
fn stopped_and_killed_a_search_ends_in_the_same_network() {
    let clean = Workplace::new();
    let began = Instant::now();
    let whole = clean.run(args(&[]));
    let took = began.elapsed();
    let expected = essence(&clean, &whole);

    let place = Workplace::new();
    let mut finished = None;
    let mut stops = 0;
    for (at, signal) in [(0.2, "INT"), (0.3, "KILL"), (0.3, "INT")] {
        let child = place.start(args(&[]));
        std::thread::sleep(took.mul_f64(at));
        let _ = Command::new("kill")
            .args([format!("-{signal}"), child.id().to_string()])
            .status();
        let ran = Ran::of(child.wait_with_output().expect("it was started"));
        if ran.code == 0 {
            finished = Some(ran); // what was left took less than that
            break;
        }
        assert_eq!(ran.code, if signal == "INT" { 130 } else { 128 + 9 }, "{ran:?}");
        stops += 1;
    }
    assert!(stops > 0, "never stopped in {took:?}");
    let finished = finished.unwrap_or_else(|| place.run(args(&[])));
    let runs = fs_err::read_dir(place.join("runs")).expect("the runs folder");
    let names: Vec<String> = runs
        .map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(
        names.iter().filter(|name| name.starts_with("search-guarded-")).count(),
        1,
        "{names:?}"
    );
    let resumed = essence(&place, &finished);
    assert_eq!(resumed.0, expected.0);
    assert!(resumed.1 == expected.1 && resumed.2 == expected.2, "exports differ");
}

#[test]
fn a_target_that_nothing_meets_exits_4_with_the_fastest() {
    let place = Workplace::new();
    let began = Instant::now();
    let fault = place.run(args(&["--set", "latency.target_ms=0.00001"])).fault(4);
    assert!(fault["found"].is_string() && fault["expected"].is_string(), "{fault}");
    assert!(
        began.elapsed() < Duration::from_mins(1),
        "said before anything was trained"
    );
}
