//! `cotk profile` as a whole program: stopped, killed, with a full disk, twice at once, without ONNX Runtime; and its hidden
//! worker. Measured without ONNX Runtime and in seconds: what is measured is none of these tests' concern.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::program::{Ran, Workplace, in_repository};

/// Where there is none.
const NO_RUNTIME: (&str, &str) = ("COTK_ORT_LIB", "/nowhere/libonnxruntime.so");

const QUICK: [&str; 8] = [
    "profile",
    "--quick",
    "--seconds",
    "4",
    "--threads",
    "1",
    "--out",
    "measured",
];

fn start(place: &Workplace) -> Child {
    let mut command = place.command(QUICK.iter().chain(&["--json"]));
    command
        .env(NO_RUNTIME.0, NO_RUNTIME.1)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("cotk starts")
}

fn measure(place: &Workplace) -> Ran {
    place.run_with(&[NO_RUNTIME], QUICK.iter().chain(&["--json"]))
}

/// Waits until some timings are in the journal.
fn until_measuring(place: &Workplace, child: &mut Child) {
    let journal = place.join("measured.partial/sessions.jsonl");
    let begin = Instant::now();
    while std::fs::metadata(&journal).map_or(0, |found| found.len()) < 500 {
        assert!(begin.elapsed() < Duration::from_mins(2), "nothing was measured");
        assert!(
            child.try_wait().expect("it was started").is_none(),
            "it ended before it measured"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signal(child: &Child, signal: &str) {
    let _ = Command::new("kill")
        .args([format!("-{signal}"), child.id().to_string()])
        .status();
}

fn nothing_is_left(place: &Workplace) {
    let left: Vec<String> = { place.names().into_iter() }
        .filter(|name| name.contains("partial") || name.contains(".tmp"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Ctrl-C says how to go on, a kill says nothing; the same command goes on where it was, and another one meanwhile is told
/// that it is not alone.
#[test]
fn stopped_and_killed_a_profile_goes_on_and_two_at_once_are_refused() {
    let place = Workplace::new();
    let mut child = start(&place);
    until_measuring(&place, &mut child);
    let second = measure(&place);
    let error = second.fault(second.code);
    assert_eq!(error["kind"], "locked", "{error}");
    signal(&child, "INT");
    let error = Ran::of(child.wait_with_output().expect("it was started")).fault(130);
    assert!(
        error["help"].as_str().is_some_and(|help| help.contains("resumes")),
        "{error}"
    );
    assert!(!place.join("measured").exists());

    let mut child = start(&place);
    // What was taken before is still there: this waits for the lock to be somebody's, no more.
    until_measuring(&place, &mut child);
    signal(&child, "KILL");
    let _ = child.wait_with_output();
    assert!(!place.join("measured").exists());

    let ran = measure(&place);
    let warnings = ran.json()["warnings"].to_string();
    assert!(warnings.contains("went on"), "{warnings}");
    let result = ran.result(0);
    assert!(result["timings"].as_u64().is_some_and(|n| n > 0), "{result}");
    for file in [
        "profile.toml",
        "timings.csv",
        "coeffs.toml",
        "heldout.csv",
        "networks.jsonl",
    ] {
        assert!(place.join("measured").join(file).exists(), "{file}");
    }
    nothing_is_left(&place);
}

#[test]
fn a_full_disk_is_said_with_its_file_and_the_same_command_goes_on() {
    let place = Workplace::new();
    for fault in ["open:40", "write:300", "sync:9", "rename:2"] {
        let variables = [NO_RUNTIME, ("COTK_IO_FAULT", fault)];
        let ran = place.run_with(&variables, QUICK.iter().chain(&["--json"]));
        if ran.code != 0 {
            let error = ran.fault(1);
            assert_eq!(error["kind"], "disk-full", "{fault}: {error}");
            assert!(error["file"].is_string(), "{fault}: {error}");
        }
    }
    measure(&place).result(0);
    nothing_is_left(&place);
}

/// Without ONNX Runtime the CNN part is refused with a hint, and the rest works.
#[test]
fn without_onnx_runtime_the_rest_is_measured() {
    let place = Workplace::new();
    let ran = measure(&place);
    let warnings = ran.json()["warnings"].to_string();
    assert!(
        warnings.contains("CNN operators are not measured") && warnings.contains("help"),
        "{warnings}"
    );
    ran.result(0);
    let head = fs_err::read_to_string(place.join("measured/profile.toml")).unwrap();
    assert!(head.contains("[conditions]") && head.contains("pinned = "), "{head}");
    assert!(head.contains("gpu = "), "what was found of a GPU is said: {head}");
    // A CNN cannot be planned on it, and is told why.
    let vgg = in_repository("tests/goldens/onnx/vgg11.onnx").display().to_string();
    let ran = place.run(["plan", &vgg, "--threads", "1", "--profile", "measured", "--json"]);
    let error = ran.fault(ran.code);
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|m| m.contains("no measurement of")),
        "{error}"
    );
    // Nor can another profile be carried over.
    let reference = in_repository("profiles/reference/epyc-2c-avx512vnni")
        .display()
        .to_string();
    let ran = place.run_with(
        &[NO_RUNTIME],
        ["profile", "--from", &reference, "--out", "here", "--json"],
    );
    let error = ran.fault(ran.code);
    assert!(error["help"].as_str().is_some_and(|help| !help.is_empty()), "{error}");
    assert!(!place.join("here").exists());
}

/// Runs the hidden worker on what another process would hand it.
fn worker(place: &Workplace, order: &[u8]) -> Ran {
    let mut child = place
        .command(["profile", "--worker", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("cotk starts");
    // It may have refused already.
    let _ = child.stdin.take().expect("piped").write_all(order);
    Ran::of(child.wait_with_output().expect("it was started"))
}

#[test]
fn a_worker_refuses_what_is_no_job() {
    let place = Workplace::new();
    let job = r#"{"session":0,"process":0,"seed":0,"settings":{"sessions":1,"per_path":0,"pace":{"rounds":1,"slice":{"secs":0,"nanos":1000},"patience":{"secs":0,"nanos":0}},"network_pace":{"rounds":1,"slice":{"secs":0,"nanos":1000},"patience":{"secs":0,"nanos":0}},"budget":null},"subjects":SUBJECTS,"networks":[],"limit":null,"needed":0,"needed_limit":null}"#;
    let order = |subjects: &str, threads: &str| {
        let job = job.replace("SUBJECTS", subjects);
        format!(r#"{{"job":{job},"threads":{threads},"block":16,"cache_bytes":0}}"#)
    };
    let whole = order("[]", "1");
    let ran = worker(&place, whole.as_bytes());
    assert_eq!((ran.code, ran.stdout.trim()), (0, "\"done\""), "{ran:?}");
    for wrong in [
        "",
        "{}",
        "[1,2",
        "null",
        &whole[..whole.len() / 2],
        &order("[]", "0"),
        &order("[]", "4000000000"),
        &order("[]", "-1"),
    ] {
        let error = worker(&place, wrong.as_bytes()).fault(2);
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|m| m.contains("--worker reads a job")),
            "{wrong}: {error}"
        );
    }
    worker(&place, b"\xff\xfe\x00").fault(2);
    // A job that nobody can do is answered in the worker's own language: its owner reads lines.
    for subject in [
        r#"[[{"network":7}]]"#,
        r#"[[{"key":{"read":{"tier":"memory","bytes":18446744073709551615,"threads":1}}}]]"#,
        r#"[[{"key":{"read":{"tier":"memory","bytes":8,"threads":1}}}]]"#,
    ] {
        let ran = worker(&place, order(subject, "1").as_bytes());
        assert!(ran.code == 0 && ran.stdout.starts_with("{\"failed\":"), "{ran:?}");
        assert!(!ran.stderr.contains("panicked"), "{ran:?}");
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let place = Workplace::new();
    for wrong in [
        &["--seconds", "1"][..],
        &["--seconds", "many"],
        &["--seconds", "100000"],
        &["--from", "x", "--seconds", "9"],
        &["--for", "no-such-recipe"],
    ] {
        place.run([&["profile"], wrong, &["--json"]].concat()).fault(2);
    }
    assert!(!Path::new(&place.join("profiles")).exists());
}
