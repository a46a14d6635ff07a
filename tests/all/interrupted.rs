//! A full disk, a failing sync or rename, Ctrl-C and kill at any moment: what was finished stays whole, the message
//! names the file or says how to go on, and the same command then ends in the same bytes as one that met no fault.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::bad_input::{compress, compress_args};
use crate::program::{Ran, Workplace, in_repository, tiny_model};

type Files = Vec<(std::path::PathBuf, Vec<u8>)>;

/// Everything but `report.md`, which may hold times.
fn container(place: &Workplace) -> Files {
    place
        .bytes_below("out")
        .into_iter()
        .filter(|(path, _)| path.as_os_str() != "report.md")
        .collect()
}

#[test]
fn every_write_sync_and_rename_may_fail() {
    let clean = Workplace::new();
    compress(&clean, "out");
    let expected = container(&clean);
    std::thread::scope(|scope| {
        for op in ["write", "sync", "rename", "open"] {
            let expected = &expected;
            scope.spawn(move || walk_faults(op, "", "disk-full", expected));
        }
        scope.spawn(|| walk_faults("read", ":5", "io", &expected)); // EIO: a disk that dies
    });
}

/// The n-th operation fails, n = 1, 2, 4, … until a run meets no fault. (Every n would take minutes: a run has some
/// hundred operations. The first reads only ask what machine this is; they may fail unnoticed.)
fn walk_faults(op: &str, errno: &str, kind: &str, expected: &Files) {
    let mut faults = 0;
    for doubling in 0..10 {
        let fault = format!("{op}:{}{errno}", 1u64 << doubling);
        let place = Workplace::new();
        let ran = place.run_with(&[("COTK_IO_FAULT", &fault)], compress_args(&place, "out"));
        if ran.code == 0 {
            assert!(container(&place) == *expected, "{fault}: other bytes");
            if faults > 0 {
                break;
            }
            continue;
        }
        faults += 1;
        let error = ran.fault(1);
        assert_eq!(error["kind"], kind, "{fault}: {error}");
        assert!(error["file"].is_string(), "{fault}: {error}");
        // Published already (a ledger row failed), then it is whole; else the same command goes on.
        if !place.join("out").exists() {
            compress(&place, "out");
        }
        assert!(container(&place) == *expected, "{fault}: other bytes");
    }
    assert!(
        faults >= 2,
        "{op} failed {faults} times: the faults do not reach the program"
    );
}

/// SIGINT exits 130 and says how to go on; SIGKILL says nothing. After both the same command ends in the same bytes.
#[test]
fn stopped_at_any_moment_compress_resumes_to_the_same_bytes() {
    let clean = Workplace::new();
    let began = Instant::now();
    compress(&clean, "out");
    let whole = began.elapsed();
    let expected = container(&clean);
    for (at, signal) in [(0.15, "INT"), (0.4, "KILL"), (0.6, "INT"), (0.75, "KILL"), (0.9, "INT")] {
        let place = Workplace::new();
        let ran = stop(&place, whole.mul_f64(at), signal);
        match (signal, ran.code) {
            (_, 0) => {} // it was faster this time
            ("INT", code) => {
                assert_eq!(code, 130, "{ran:?}");
                let error = ran.fault(130);
                assert!(
                    error["help"].as_str().is_some_and(|help| help.contains("resume")),
                    "{error}"
                );
            }
            (_, code) => assert_eq!(code, 128 + 9, "{ran:?}"),
        }
        // Killed between the last rename and its exit, it has finished: what stands under the final name is whole.
        if ran.code != 0 && !place.join("out").exists() {
            compress(&place, "out");
        }
        assert!(container(&place) == expected, "{signal} at {at}: other bytes");
        let left: Vec<String> = place
            .names()
            .into_iter()
            .filter(|name| name.contains("partial") || name.contains(".tmp"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn stop(place: &Workplace, after: Duration, signal: &str) -> Ran {
    let child = place.start(compress_args(place, "out"));
    std::thread::sleep(after);
    // Fails when the child is gone already, which its exit code then tells.
    let _ = Command::new("kill")
        .args([format!("-{signal}"), child.id().to_string()])
        .status();
    Ran::of(child.wait_with_output().expect("it was started"))
}

#[test]
fn an_unfinished_output_of_another_recipe_is_refused_with_both() {
    let place = Workplace::new();
    let ran = place.run_with(&[("COTK_IO_FAULT", "write:6")], compress_args(&place, "out"));
    assert_eq!(ran.code, 1, "{ran:?}");
    let mut other = compress_args(&place, "out");
    other.extend(["--set".to_owned(), "compress.drop_ratio=0.25".to_owned()]);
    let error = place.run(other).fault(2);
    assert!(error["found"].is_string() && error["expected"].is_string(), "{error}");
    compress(&place, "out"); // the first recipe still resumes
}

/// Commands that only read or measure: Ctrl-C ends them with 130, one message, and nothing under a final name.
#[test]
fn ctrl_c_ends_eval_and_profile_with_130() {
    let place = Workplace::new();
    let tiny = tiny_model();
    let text = fs_err::read_to_string(in_repository("data/tiny-qwen2moe/train.txt")).unwrap();
    fs_err::write(place.join("long.txt"), text.repeat(40)).unwrap();
    for args in [
        &["eval", &tiny, "--text", "long.txt", "--json"][..],
        &["profile", "--quick", "--out", "measured", "--json"],
    ] {
        let child = place.start(args);
        std::thread::sleep(Duration::from_millis(900));
        let _ = Command::new("kill")
            .args(["-INT".to_owned(), child.id().to_string()])
            .status();
        let error = Ran::of(child.wait_with_output().expect("it was started")).fault(130);
        assert_eq!(error["kind"], "interrupted", "{args:?}");
        let resumes = error["help"].as_str().is_some_and(|help| help.contains("resumes"));
        assert_eq!(resumes, args[0] == "profile", "{args:?}: {error}");
    }
    assert!(
        !place.join("measured/profile.toml").exists(),
        "a profile that is not whole"
    );
}
