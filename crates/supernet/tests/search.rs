//! The whole way of a search on the tiny recipe: resumed runs equal whole ones, seeds differ, a target out of reach is
//! told at once. Kills are panics inside a progress call: nothing is saved on the way out, as under `kill -9`.

#![expect(clippy::unwrap_used, reason = "a test may")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cotk_run::cancel::Cancel;
use cotk_run::files;
use cotk_run::progress::{Progress, Silent};
use cotk_run::recipe::{Source, parse};
use cotk_search::SearchError;
use cotk_search::pipeline::{self, Request};
use cotk_search::recipe::Recipe;
use cotk_search::result::Finished;
use cotk_supernet::{Settings, Supernet};

const RECIPE: &str = include_str!("../../../tests/recipes/search-tiny.toml");

/// Timings of one test would disturb another's, and libtorch has one thread pool.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn recipe(sets: &[&str]) -> Recipe {
    let source = Source {
        name: "search-tiny".into(),
        text: RECIPE.into(),
    };
    let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    parse(&source, &sets).unwrap()
}

/// One profile for all tests: measured once, so that what differs is not the clock's doing.
fn profile() -> &'static Path {
    static PROFILE: OnceLock<PathBuf> = OnceLock::new();
    PROFILE.get_or_init(|| {
        let runs = tempfile::tempdir().unwrap().keep();
        let finished = run(recipe(&["budget.steps=20"]), &runs, None, &Silent).unwrap();
        finished.result.run.join("profile")
    })
}

fn run(recipe: Recipe, runs: &Path, profile: Option<&Path>, progress: &dyn Progress) -> Result<Finished, SearchError> {
    cotk_supernet::set_threads(1);
    let request = Request {
        recipe,
        name: "search-tiny".into(),
        runs: runs.to_owned(),
        resume: None,
        restart: false,
        force: false,
        profile: profile.map(Path::to_owned),
        threads: 1,
        cotk_version: "test".into(),
        commit: "test".into(),
        make: &|space, normalisation, recipe, seeds| {
            let settings = Settings {
                normalisation,
                momentum: recipe.train.momentum,
                weight_decay: recipe.train.weight_decay,
            };
            Box::new(Supernet::new(space, settings, seeds))
        },
        cancel: &Cancel::new(),
        progress,
    };
    pipeline::run(&request, |_, facts| {
        assert!(facts.iter().any(|f| f.metric == "accuracy_test"));
        Ok(())
    })
}

/// Panics at the n-th call that says something was done.
struct KillAt {
    at: u64,
    calls: AtomicU64,
}

impl Progress for KillAt {
    fn begin(&self, _: &str, _: u64, _: &str) {
        self.advance(0);
    }
    fn advance(&self, _: u64) {
        assert!(self.calls.fetch_add(1, Ordering::Relaxed) + 1 != self.at, "killed");
    }
    fn end(&self) {}
    fn note(&self, _: &str) {}
}

/// What must not depend on clocks or paths.
fn essence(finished: &Finished) -> (String, f64, f64, f64, Vec<u8>, Vec<u8>) {
    let result = &finished.result;
    (
        result.network.encoding.clone(),
        result.accuracy_val,
        result.accuracy_test,
        result.baseline.accuracy_test,
        files::read(&result.exports.onnx, 1 << 26).unwrap(),
        files::read(&result.exports.safetensors, 1 << 26).unwrap(),
    )
}

#[test]
fn a_run_killed_in_every_phase_ends_as_one_that_was_not() {
    let _one = one_at_a_time();
    // Without a latency target: measured times would be another input.
    let recipe = || {
        let mut recipe = recipe(&[]);
        recipe.latency.target_of_largest = None;
        recipe
    };
    let (whole_runs, killed_runs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let whole = run(recipe(), whole_runs.path(), Some(profile()), &Silent).unwrap();
    // 60 steps of warm-up and search, then repair, then twice 20 of fine-tuning: not at multiples of a checkpoint.
    for at in [12, 31, 33, 41, 5] {
        let killer = KillAt {
            at,
            calls: AtomicU64::new(0),
        };
        let killed = catch_unwind(AssertUnwindSafe(|| {
            run(recipe(), killed_runs.path(), Some(profile()), &killer)
        }));
        assert!(killed.is_err(), "not killed at {at}");
    }
    let resumed = run(recipe(), killed_runs.path(), Some(profile()), &Silent).unwrap();
    assert!(resumed.resumed);
    assert_eq!(std::fs::read_dir(killed_runs.path()).unwrap().count(), 1);
    let (a, b) = (essence(&whole), essence(&resumed));
    assert_eq!((&a.0, a.1, a.2, a.3), (&b.0, b.1, b.2, b.3));
    assert!(a.4 == b.4 && a.5 == b.5, "exports differ");
    let checkpoint =
        |f: &Finished| files::read(f.result.run.join("checkpoints/supernet.safetensors"), 1 << 26).unwrap();
    assert!(checkpoint(&whole) == checkpoint(&resumed), "shared weights differ");
}

#[test]
fn two_seeds_give_two_results() {
    let _one = one_at_a_time();
    let runs = tempfile::tempdir().unwrap();
    let [one, two] = ["seed=1", "seed=2"].map(|seed| {
        run(
            recipe(&[seed, "budget.steps=40"]),
            runs.path(),
            Some(profile()),
            &Silent,
        )
        .unwrap()
    });
    // One accuracy over some hundred images may agree by chance; all three do not.
    let accuracies = |f: &Finished| {
        let result = &f.result;
        [result.accuracy_val, result.accuracy_test, result.baseline.accuracy_test].map(f64::to_bits)
    };
    assert_ne!(accuracies(&one), accuracies(&two));
    assert_ne!(essence(&one).5, essence(&two).5);
}

#[test]
fn limits_are_kept_and_what_was_read_is_recorded() {
    let _one = one_at_a_time();
    let runs = tempfile::tempdir().unwrap();
    let finished = run(recipe(&["budget.steps=40"]), runs.path(), Some(profile()), &Silent).unwrap();
    let result = &finished.result;
    assert!(result.network.bytes as f64 <= result.target_bytes.unwrap());
    assert!(result.predicted_ms <= result.target_ms.unwrap());
    let journal = files::read_text(result.run.join("journal.jsonl"), 1 << 24).unwrap();
    let at = |what: &str| {
        let lines: Vec<usize> = journal
            .lines()
            .enumerate()
            .filter(|(_, l)| l.contains(what))
            .map(|(i, _)| i)
            .collect();
        assert_eq!(lines.len(), 1, "{what}: {journal}");
        lines[0]
    };
    assert!(at("\"predicted\"") < at("\"measured\"") && at("\"measured\"") < at("\"tested\""));
    for file in [
        "recipe.toml",
        "result.json",
        "report.md",
        "search.svg",
        "network.onnx",
        "network.safetensors",
    ] {
        assert!(result.run.join(file).exists(), "{file}");
    }
}

#[test]
fn a_target_out_of_reach_is_told_before_training_with_the_fastest() {
    let _one = one_at_a_time();
    let runs = tempfile::tempdir().unwrap();
    let error = run(
        recipe(&["latency.target_ms=0.000001"]),
        runs.path(),
        Some(profile()),
        &Silent,
    )
    .unwrap_err();
    let SearchError::OutOfReach {
        what, best, encoding, ..
    } = error
    else {
        panic!("{error}")
    };
    assert_eq!((what, encoding.contains('5')), ("target_ms", false));
    assert!(best > 0.001);
}

#[test]
fn another_recipe_or_thread_count_is_not_gone_on_with() {
    let _one = one_at_a_time();
    let runs = tempfile::tempdir().unwrap();
    let killer = KillAt {
        at: 10,
        calls: AtomicU64::new(0),
    };
    assert!(
        catch_unwind(AssertUnwindSafe(|| run(
            recipe(&[]),
            runs.path(),
            Some(profile()),
            &killer
        )))
        .is_err()
    );
    let unfinished = std::fs::read_dir(runs.path()).unwrap().next().unwrap().unwrap().path();
    cotk_supernet::set_threads(1);
    let request = |recipe: Recipe, threads: usize| Request {
        recipe,
        name: "search-tiny".into(),
        runs: runs.path().to_owned(),
        resume: Some(unfinished.clone()),
        restart: false,
        force: false,
        profile: Some(profile().to_owned()),
        threads,
        cotk_version: "test".into(),
        commit: "test".into(),
        make: &|_, _, _, _| unreachable!("refused before"),
        cancel: Box::leak(Box::new(Cancel::new())),
        progress: &Silent,
    };
    let refuse = |recipe: Recipe, threads: usize| {
        pipeline::run(&request(recipe, threads), |_, _| Ok::<(), SearchError>(()))
            .unwrap_err()
            .to_string()
    };
    assert!(refuse(recipe(&["seed=9"]), 1).contains("another recipe"));
    assert!(refuse(recipe(&[]), 2).contains("another number of threads"));
}
