//! The joint allocation, smaller experts and contests, stopped by SIGKILL, SIGINT and a full disk: the same command goes on
//! to the same bytes, or the same table.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::compress_args::compress_of;
use crate::compress_budgets::{contest, figures};
use crate::program::{Ran, Workplace, tiny_model};
use crate::shrink;

/// All files but the report and the times in it.
fn files(place: &Workplace) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let all = place.bytes_below("out").into_iter();
    all.filter(|(path, _)| path.as_os_str() != "report.md").collect()
}

/// Offers, sensitivities, two trials, a healed build.
fn joint() -> Vec<String> {
    let more = [
        "--recipe",
        "moe-joint",
        "--set",
        "budget.bits_per_expert_weight=3",
        "--set",
        "compress.joint.groups=[32, \"row\"]",
        "--set",
        "compress.joint.sensitivity_tokens=500",
        "--set",
        "compress.joint.points=2",
        "--set",
        "compress.joint.heal=true",
    ];
    compress_of(&tiny_model(), 2000, &more)
}

fn smaller() -> Vec<String> {
    shrink::args(&[
        "--set",
        "compress.shrink.ratio=0.5",
        "--set",
        "compress.shrink.multiple=4",
    ])
}

/// Runs until `after`, and sends a signal.
fn stop(place: &Workplace, arguments: &[String], after: Duration, signal: &str) -> Ran {
    let child = place.start(arguments);
    std::thread::sleep(after);
    // Fails when the child is gone already, which its exit code then tells.
    let _ = Command::new("kill")
        .args([format!("-{signal}"), child.id().to_string()])
        .status();
    Ran::of(child.wait_with_output().expect("it was started"))
}

/// Stops a command at several moments, then by a disk that is full: what it ends in never differs.
fn goes_on<T: PartialEq>(arguments: &[String], result: impl Fn(&Workplace) -> T) {
    let clean = Workplace::new();
    let began = Instant::now();
    clean.run(arguments).result(0);
    let whole = began.elapsed();
    let expected = result(&clean);
    for (at, signal) in [(0.25, "KILL"), (0.5, "INT"), (0.7, "KILL"), (0.9, "KILL")] {
        let place = Workplace::new();
        let ran = stop(&place, arguments, whole.mul_f64(at), signal);
        if signal == "INT" && ran.code != 0 {
            let help = ran.fault(130)["help"].clone();
            assert!(help.as_str().is_some_and(|help| help.contains("resume")), "{help}");
        }
        if ran.code != 0 && !place.join("out").exists() {
            place.run(arguments).result(0);
        }
        assert!(result(&place) == expected, "{signal} at {at}");
        assert!(!place.join("out.partial").exists());
    }
    let mut faults = 0;
    for write in [3, 30, 120, 500] {
        let place = Workplace::new();
        let ran = place.run_with(&[("COTK_IO_FAULT", &format!("write:{write}"))], arguments);
        if ran.code != 0 {
            faults += 1;
            let error = ran.fault(1);
            assert!(error["kind"] == "disk-full" && error["file"].is_string(), "{error}");
            if !place.join("out").exists() {
                place.run(arguments).result(0);
            }
        }
        assert!(result(&place) == expected, "write {write}");
    }
    assert!(faults >= 2, "{faults} faults reached the program");
}

#[test]
fn the_joint_allocation_goes_on_to_the_same_bytes() {
    goes_on(&joint(), files);
}

#[test]
fn smaller_experts_go_on_to_the_same_bytes() {
    goes_on(&smaller(), files);
}

#[test]
fn a_contest_goes_on_to_the_same_table() {
    goes_on(&contest("gptq-uniform,joint:healed", "3.5"), figures);
}

#[test]
fn a_healed_joint_output_tells_what_was_tried_and_healed() {
    let place = Workplace::new();
    let all = place.run(joint()).json();
    assert_eq!(all["ok"], true, "{all}");
    let found = &all["result"];
    assert_eq!(found["tried"].as_array().unwrap().len(), 2);
    let matrices = found["matrices"].as_object().unwrap().values();
    assert_eq!(matrices.map(|count| count.as_u64().unwrap()).sum::<u64>(), 3 * 8 * 3);
    assert!(found["hessians_shrunk"].is_u64());
    let warnings = all["warnings"].to_string();
    assert!(!warnings.contains("no budget"), "{warnings}");
    let shown = place.run(["inspect", "out", "--expert", "0.0", "--json"]).result(0);
    let shown = &shown["expert"];
    let steps: Vec<&str> = (shown["healed"].as_array().unwrap().iter())
        .map(|step| step["step"].as_str().unwrap())
        .collect();
    assert!(steps.contains(&"ridge") && steps.contains(&"scale"), "{steps:?}");
    let prefix = &shown["prefixes"].as_array().unwrap()[0];
    assert!(prefix["delta"].is_f64() && prefix["rho"].is_f64(), "{prefix}");
    assert!(shown["matrices"]["gate"]["error"].is_f64() && shown["matrices"]["gate"]["lambda"].is_f64());
    let text = place.run(["inspect", "out"]);
    assert!(text.stdout.contains("matrices of experts"), "{}", text.stdout);
}
