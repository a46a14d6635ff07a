//! `cotk gpu-check` as a user sees it, on machines with a GPU and without.

use crate::program::Workplace;

#[test]
fn a_missing_gpu_is_said_loudly_and_is_an_error_only_when_required() {
    let place = Workplace::new();
    let ran = place.run(["gpu-check", "--json"]);
    let report = ran.json();
    if report["result"]["present"] == true {
        assert_eq!((ran.code, &report["result"]["ok"]), (0, &true.into()), "{ran:?}");
        return;
    }
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(report["result"]["ok"], false, "what was not checked is not right");
    let warnings = report["warnings"].to_string();
    assert!(warnings.to_uppercase().contains("GPU"), "{warnings}");
    let written = std::fs::read_dir(place.join("runs"))
        .expect("the report's folder")
        .count();
    assert_eq!(written, 1, "the report is written without a GPU too");

    let fault = place.run(["gpu-check", "--require", "--json"]).fault(1);
    assert_eq!(fault["kind"], "no-gpu");
}
