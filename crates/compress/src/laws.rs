//! Laws of whole compressions, on the committed tiny checkpoint: same bytes whatever the threads and wherever killed,
//! figures that `cotk eval` confirms, budgets that hold, refusals that leave everything as it was.
//!
//! Kills are real: the test program starts itself again, and the child dies by SIGKILL or by an injected I/O fault.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cotk_container::manifest::REPORT;
use cotk_container::reader::Container;
use cotk_model::eval::{EvalOptions, Evaluation, evaluate};
use cotk_model::moe::Mode;
use cotk_run::cancel::Cancel;
use cotk_run::facts::FactList;
use cotk_run::files;
use cotk_run::progress::{Progress, Silent};
use cotk_run::seeds::Seeds;
use rand::RngExt;

use crate::CompressError;
use crate::partial::partial_path;
use crate::pipeline::{Plan, Request, Surroundings, check_disk, compress, plan};
use crate::recipe::Recipe;
use crate::report::Report;

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../data/tiny-qwen2moe")
        .join(name)
}

const SMALL: [&str; 2] = ["compress.calibration_tokens=2000", "compress.drop_ratio=0.25"];

/// A short text to judge by, beside `out`: most of a run's time is measuring.
fn judge(out: &Path) -> PathBuf {
    let path = out.parent().unwrap().join("judge.txt");
    if !path.exists() {
        let text = fs_err::read_to_string(tiny("heldout.txt")).unwrap();
        fs_err::write(&path, &text[..2500]).unwrap();
    }
    path
}

fn request(out: &Path, sets: &[&str]) -> Request {
    let sets: Vec<String> = SMALL.iter().chain(sets).map(|s| (*s).to_owned()).collect();
    Request {
        model: tiny(""),
        out: out.to_owned(),
        recipe_name: "moe-int4".to_owned(),
        recipe: Recipe::load("moe-int4", &sets, None, None).unwrap(),
        calibration: tiny("train.txt"),
        eval_text: Some(judge(out)),
    }
}

fn run_with(request: &Request, progress: &dyn Progress, cancel: &Cancel) -> Result<(Report, FactList), CompressError> {
    let facts = FactList::default();
    let with = Surroundings {
        progress,
        cancel,
        facts: &facts,
        cost: None,
        threads: 2,
    };
    let report = compress(request, &with)?;
    Ok((report, facts))
}

fn run(request: &Request) -> Result<Report, CompressError> {
    Ok(run_with(request, &Silent, &Cancel::new())?.0)
}

/// Every file but the report, by name.
fn bytes_of(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = fs_err::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name != REPORT)
        .map(|name| (name.clone(), fs_err::read(folder.join(name)).unwrap()))
        .collect();
    files.sort();
    files
}

fn assert_same(found: &Path, expected: &Path, what: &str) {
    let (found, expected) = (bytes_of(found), bytes_of(expected));
    for ((name, a), (other, b)) in found.iter().zip(&expected) {
        assert_eq!(name, other, "{what}");
        assert!(a == b, "{what}: {name} differs");
    }
    assert_eq!(found.len(), expected.len(), "{what}");
}

/// Two seeds, allocation under a budget, every path of the pipeline.
const ALLOCATED: [&str; 3] = [
    "compress.codes=['nested2+2+4', 'nested4+4', 'plain4', 'plain2']",
    "compress.drop_shape=usage",
    "budget.bytes=340000",
];

fn evaluation(path: &Path, text: &Path, reference: Option<&Path>, mode: Mode) -> Evaluation {
    let opened = cotk_runtime::open::open(path).unwrap();
    let reference = reference.map(|path| cotk_runtime::open::open(path).unwrap());
    let tokens = opened
        .files
        .tokenizer
        .encode(&fs_err::read_to_string(text).unwrap())
        .unwrap();
    let options = EvalOptions {
        max_tokens: Some(crate::text::QUALITY_TOKENS),
        mode,
        ..EvalOptions::default()
    };
    let reference = reference.as_ref().map(|opened| &opened.model);
    evaluate(&opened.model, &tokens, &options, reference, &Silent, &Cancel::new()).unwrap()
}

#[test]
fn figures_are_those_of_evaluating_the_finished_container() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let request = Request {
        eval_text: Some(tiny("heldout.txt")),
        ..request(&out, &[])
    };
    let (report, facts) = run_with(&request, &Silent, &Cancel::new()).unwrap();
    Container::open(&out).unwrap().verify().unwrap();
    let exact = evaluation(&out, &tiny("heldout.txt"), Some(&tiny("")), Mode::Exact);
    let against = exact.reference.unwrap();
    let close = |found: f64, expected: f64, tolerance: f64| {
        assert!(
            (found - expected).abs() <= tolerance * expected.abs(),
            "{found}, expected {expected}"
        );
    };
    // The same arithmetic; only the batches that windows travel in differ.
    close(report.perplexity_after, exact.perplexity, 1e-5);
    close(report.perplexity_before, against.perplexity, 1e-5);
    close(report.kl_nats, against.kl_nats, 1e-3);
    close(report.top1_agreement, against.top1_agreement, 1e-2);
    assert_eq!(report.quality.tokens, exact.tokens);
    assert!(report.kl_nats > 0.0 && report.perplexity_after > report.perplexity_before * 0.9);
    let little = evaluation(&out, &tiny("heldout.txt"), Some(&tiny("")), Mode::Little);
    assert!((little.low_bit_fraction - 1.0).abs() < 1e-9);
    assert!(little.reference.unwrap().kl_nats > against.kl_nats);

    let container = Container::open(&out).unwrap();
    let on_disk: u64 = bytes_of(&out).iter().map(|(_, bytes)| bytes.len() as u64).sum();
    assert_eq!(report.bytes_after, on_disk);
    assert_eq!(
        report.expert_bytes_after,
        container.manifest().files["experts.bin"].bytes
    );
    assert!(
        facts
            .facts()
            .iter()
            .all(|f| f.subject.starts_with("compress:moe-int4:tiny-qwen2moe"))
    );
    let value = |metric: &str| facts.facts().into_iter().find(|f| f.metric == metric).unwrap().value;
    assert_eq!(value("perplexity_after"), report.perplexity_after);
    assert_eq!(value("bytes_after"), on_disk as f64);
    assert!(!partial_path(&out).exists());
    // Nothing but the report tells where or when it was made.
    let here = folder.path().to_string_lossy().into_owned();
    let manifest = fs_err::read_to_string(out.join("manifest.json")).unwrap();
    assert!(!manifest.contains(&here) && !manifest.contains("tiny-qwen2moe"));
    assert!(fs_err::read_to_string(out.join(REPORT)).unwrap().contains(&here));
}

#[test]
fn same_recipe_and_seed_same_bytes_whatever_the_threads_and_other_seeds_other_figures() {
    let folder = tempfile::tempdir().unwrap();
    for sets in [&[][..], &ALLOCATED] {
        let mut reports = Vec::new();
        for (name, threads) in [("one", 1), ("three", 3)] {
            let out = folder.path().join(format!("{name}{}", sets.len()));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            reports.push(pool.install(|| run(&request(&out, sets))).unwrap());
        }
        let out = |name| folder.path().join(format!("{name}{}", sets.len()));
        assert_same(&out("three"), &out("one"), "threads");
        assert_eq!(reports[0].kl_nats.to_bits(), reports[1].kl_nats.to_bits());

        let seeded = Request {
            out: out("seeded"),
            ..request(&out("seeded"), &[sets, &["seed=1"]].concat())
        };
        let other = run(&seeded).unwrap();
        assert_ne!(other.perplexity_after, reports[0].perplexity_after);
        assert_ne!(other.kl_nats, reports[0].kl_nats);
    }
}

#[test]
fn a_budget_is_kept_and_more_of_it_loses_less() {
    let folder = tempfile::tempdir().unwrap();
    let mut last: Option<Report> = None;
    for budget in [310_000, 340_000, 370_000] {
        let set = format!("budget.bytes={budget}");
        let out = folder.path().join(budget.to_string());
        let report = run(&request(&out, &[ALLOCATED[0], &set])).unwrap();
        let container = Container::open(&out).unwrap();
        let weights = ["dense.safetensors", "experts.bin"].map(|name| container.manifest().files[name].bytes);
        assert!(weights.iter().sum::<u64>() <= budget, "{weights:?} in {budget}");
        if let Some(last) = &last {
            assert!(report.kl_nats < last.kl_nats && report.bytes_after > last.bytes_after);
        }
        last = Some(report);
    }
    let out = folder.path().join("impossible");
    for sets in [&["budget.bytes=100000"][..], &[ALLOCATED[0], "budget.bytes=100000"]] {
        let error = run(&request(&out, sets)).unwrap_err();
        assert!(
            matches!(error, CompressError::Budget { budget: 100_000, .. }),
            "{error}"
        );
    }
    assert!(!out.exists() && !partial_path(&out).exists());
}

#[test]
fn what_stands_already_is_never_touched() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let refused = |request: &Request| match run(request).unwrap_err() {
        CompressError::OutputExists { folder } => folder,
        other => panic!("{other}"),
    };
    // A folder, a file, a stranger's `.partial`.
    fs_err::create_dir(&out).unwrap();
    fs_err::write(out.join("precious"), "x").unwrap();
    assert_eq!(refused(&request(&out, &[])), out);
    assert_eq!(fs_err::read(out.join("precious")).unwrap(), b"x");
    fs_err::remove_dir_all(&out).unwrap();
    fs_err::create_dir(partial_path(&out)).unwrap();
    fs_err::write(partial_path(&out).join("precious"), "x").unwrap();
    assert_eq!(refused(&request(&out, &[])), partial_path(&out));
    fs_err::remove_dir_all(partial_path(&out)).unwrap();

    // A finished output, by the very same command.
    run(&request(&out, &[])).unwrap();
    let before = bytes_of(&out);
    assert_eq!(refused(&request(&out, &[])), out);
    assert_eq!(bytes_of(&out), before);
}

#[test]
fn an_unfinished_output_of_other_inputs_is_refused_with_both_hashes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let cancel = Cancel::new();
    cancel.cancel();
    let cancelled = run_with(&request(&out, &[]), &Silent, &cancel);
    assert!(matches!(cancelled, Err(CompressError::Run(cotk_run::Error::Cancelled))));
    assert!(partial_path(&out).exists() && !out.exists());
    let other_text = Request {
        calibration: tiny("heldout.txt"),
        ..request(&out, &[])
    };
    for (other, expected) in [(request(&out, &["seed=9"]), "recipe"), (other_text, "model or text")] {
        match run(&other).unwrap_err() {
            CompressError::Run(cotk_run::Error::OtherInput {
                what,
                found,
                expected: wanted,
                ..
            }) => {
                assert_eq!(what, expected);
                assert!(found.len() == 16 && wanted.len() == 16 && found != wanted);
            }
            other => panic!("{other}"),
        }
    }
    assert!(run(&request(&out, &[])).is_ok());
}

#[test]
fn bad_inputs_are_named_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let short = folder.path().join("short.txt");
    fs_err::write(&short, "Too short.").unwrap();
    let bad = [
        (
            Request {
                calibration: short.clone(),
                ..request(&out, &[])
            },
            "short.txt",
        ),
        (
            Request {
                eval_text: Some(short),
                ..request(&out, &[])
            },
            "short.txt",
        ),
        (
            Request {
                calibration: "gone.txt".into(),
                ..request(&out, &[])
            },
            "gone.txt",
        ),
        (
            Request {
                model: folder.path().join("gone"),
                ..request(&out, &[])
            },
            "gone",
        ),
    ];
    for (request, name) in bad {
        let error = run(&request).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        assert!(!out.exists() && !partial_path(&out).exists(), "{name}");
    }
    run(&request(&out, &[])).unwrap();
    let again = Request {
        model: out.clone(),
        ..request(&folder.path().join("twice"), &[])
    };
    assert!(matches!(run(&again), Err(CompressError::AlreadyCompressed { .. })));
}

#[test]
fn without_a_text_to_judge_by_the_last_documents_are_kept_back() {
    let folder = tempfile::tempdir().unwrap();
    let request = Request {
        eval_text: None,
        ..request(&folder.path().join("out"), &["compress.calibration_tokens=1000000"])
    };
    let report = run(&request).unwrap();
    assert_eq!(report.quality.text, "last fifth of train.txt");
    assert!(report.quality.tokens * 2 < report.calibration_tokens);
    assert!(
        report.warnings.iter().any(|w| w.contains("1000000 were asked for")),
        "{:?}",
        report.warnings
    );
}

#[test]
fn what_judges_does_not_calibrate() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let write = |name: &str, documents: &[String]| {
        let path = folder.path().join(name);
        fs_err::write(&path, documents.join("<|endoftext|>")).unwrap();
        path
    };
    let document = |i: usize| format!("{i}: ") + &"The quick brown fox jumps over the lazy dog. ".repeat(4);
    let documents: Vec<String> = (0..30).map(document).collect();
    let texts = |calibration: &Path, eval_text: &Path| Request {
        calibration: calibration.to_owned(),
        eval_text: Some(eval_text.to_owned()),
        ..request(&out, &[])
    };
    let (all, copy) = (write("all.txt", &documents), write("copy.txt", &documents));
    // The same file, the same bytes, and a part of what judges.
    let part = write("part.txt", &documents[3..9]);
    for (calibration, eval_text) in [(&all, &all), (&all, &copy), (&part, &all)] {
        let error = run(&texts(calibration, eval_text)).unwrap_err();
        assert!(matches!(error, CompressError::SameText { .. }), "{error}");
        let names = [calibration, eval_text].map(|path| path.display().to_string());
        assert!(names.iter().all(|name| error.to_string().contains(name)), "{error}");
    }
    assert!(!out.exists() && !partial_path(&out).exists());

    let others: Vec<String> = (28..60).map(document).collect();
    let (shared, apart) = (write("shared.txt", &documents), write("apart.txt", &documents[..28]));
    let judge = write("others.txt", &others);
    let report = run(&texts(&shared, &judge)).unwrap();
    let warning = "2 documents of shared.txt also stand in others.txt";
    assert!(
        report.warnings.iter().any(|w| w.contains(warning)),
        "{:?}",
        report.warnings
    );
    let apart = run(&Request {
        out: folder.path().join("apart"),
        ..texts(&apart, &judge)
    });
    assert_eq!(apart.unwrap().kl_nats.to_bits(), report.kl_nats.to_bits());
}

#[test]
fn a_share_that_cannot_be_dropped_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let report = run(&request(&out, &["compress.drop_ratio=0.95"])).unwrap();
    let warning = report.warnings.iter().find(|w| w.contains("compress.drop_ratio"));
    assert!(
        warning.is_some_and(|w| w.contains("0.95 of 8 experts")),
        "{:?}",
        report.warnings
    );
    assert!(report.layers.iter().all(|layer| layer.experts_kept == 2));
}

#[test]
fn a_plan_writes_nothing_and_bounds_what_comes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let request = request(&out, &[]);
    let facts = FactList::default();
    let with = Surroundings {
        progress: &Silent,
        cancel: &Cancel::new(),
        facts: &facts,
        cost: None,
        threads: 1,
    };
    let plan = plan(&request, &with).unwrap();
    assert_eq!(fs_err::read_dir(folder.path()).unwrap().count(), 1, "the judge alone");
    let full = Plan {
        disk_bytes_free: plan.disk_bytes_needed - 1,
        ..plan.clone()
    };
    match check_disk(&full, &request).unwrap_err() {
        CompressError::DiskSpace { need, have, .. } => assert_eq!((need, have), (plan.disk_bytes_needed, need - 1)),
        other => panic!("{other}"),
    }
    let report = run(&request).unwrap();
    let container = Container::open(&out).unwrap();
    let weights = ["dense.safetensors", "experts.bin"].map(|name| container.manifest().files[name].bytes);
    assert!(weights.iter().sum::<u64>() <= plan.weight_bytes_after);
    assert_eq!(weights.iter().sum::<u64>(), report.weight_bytes_after);
    assert_eq!(
        plan.experts - plan.experts_dropped,
        report.experts_kept.iter().sum::<usize>()
    );
    assert_eq!(plan.calibration_tokens, report.calibration_tokens);
    assert_eq!(plan.quality_tokens, report.quality.tokens);
}

#[test]
fn masked_and_removed_drops_differ_where_gates_are_not_normalised() {
    let folder = tempfile::tempdir().unwrap();
    let report = |meaning: &str| {
        let set = format!("compress.dropped={meaning}");
        run(&request(
            &folder.path().join(meaning),
            &["compress.drop_ratio=0.5", &set],
        ))
        .unwrap()
    };
    assert_ne!(report("masked").kl_nats, report("removed").kl_nats);
}

const CHILD: &str = "COTK_TEST_COMPRESS_INTO";

/// Not a law: what the killed children run.
#[test]
fn child_that_is_killed() {
    let Some(out) = std::env::var_os(CHILD) else { return };
    if let Err(error) = run(&request(Path::new(&out), &ALLOCATED)) {
        panic!("{error}");
    }
}

fn child(out: &Path, fault: Option<&str>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "laws::child_that_is_killed", "--nocapture"]);
    command.env(CHILD, out).env("RAYON_NUM_THREADS", "1");
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    if let Some(fault) = fault {
        command.env("COTK_IO_FAULT", fault);
    }
    command.spawn().unwrap()
}

fn allocated(out: &Path) -> Request {
    request(out, &ALLOCATED)
}

#[test]
fn killed_inside_each_phase_and_resumed_the_bytes_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let expected = folder.path().join("expected");
    run(&allocated(&expected)).unwrap();
    let mut stream = Seeds::new(1).stream("kills");
    let mut kills = 0;
    // Enough lines in the journal to be inside that phase: measuring, building, finishing.
    let layers = cotk_runtime::open::open_folder(&tiny(""))
        .unwrap()
        .files
        .spec
        .layers
        .len();
    for (phase, lines) in [("measure", 0), ("build", layers), ("finish", 2 * layers)] {
        for round in 0..3 {
            let out = folder.path().join(format!("{phase}-{round}"));
            let journal = partial_path(&out).join("journal.jsonl");
            let mut child = child(&out, None);
            let count = || files::read(&journal, 1 << 30).map_or(0, |b| b.iter().filter(|&&b| b == b'\n').count());
            while child.try_wait().unwrap().is_none() && (count() < lines || !journal.exists()) {
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(Duration::from_micros(stream.random_range(0..20_000)));
            child.kill().unwrap();
            kills += usize::from(!child.wait().unwrap().success());
            if !out.exists() || partial_path(&out).exists() {
                run(&allocated(&out)).unwrap();
            }
            assert_same(&out, &expected, phase);
            assert!(!partial_path(&out).exists());
        }
    }
    assert!(kills > 0, "no child was caught at work");
}

#[test]
fn any_failing_file_operation_is_named_and_the_next_run_ends_well() {
    let folder = tempfile::tempdir().unwrap();
    let expected = folder.path().join("expected");
    run(&allocated(&expected)).unwrap();
    for op in ["open", "read", "write", "sync", "rename"] {
        // 1, 4, 13, 40, …; the program's own tests walk them more densely.
        let mut at = 1;
        loop {
            let out = folder.path().join(format!("{op}-{at}"));
            let output = child(&out, Some(&format!("{op}:{at}"))).wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.success() {
                break;
            }
            assert!(
                said.contains("No space left on device") && said.contains('/'),
                "{op} {at}: {said}"
            );
            if !out.exists() {
                run(&allocated(&out)).unwrap_or_else(|e| panic!("{op} {at}: {e}"));
            }
            assert_same(&out, &expected, op);
            at = 1 + at * 3;
        }
    }
}

#[test]
fn constants_in_the_place_of_dropped_experts_count_in_a_budget_of_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str, bytes: u64| {
        let budget = format!("budget.bytes={bytes}");
        let sets = [
            "compress.codes=['plain2', 'plain8']",
            "compress.dropped=novice",
            "compress.drop_ratio=0.5",
            budget.as_str(),
        ];
        run(&request(&folder.path().join(name), &sets))
    };
    let least = match make("none", 1000).unwrap_err() {
        CompressError::Budget { budget: 1000, least } => least,
        other => panic!("{other}"),
    };
    for bytes in [least, least + 2500, least + 10_000] {
        let name = bytes.to_string();
        let report = make(&name, bytes).unwrap();
        let size = |file: &str| fs_err::metadata(folder.path().join(&name).join(file)).unwrap().len();
        let on_disk = size("dense.safetensors") + size("experts.bin");
        assert_eq!(report.weight_bytes_after, on_disk);
        assert!(on_disk <= bytes, "{on_disk} of {bytes}");
    }
}
