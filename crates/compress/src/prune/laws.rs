//! Laws of pruning on the committed tiny checkpoint: the loss of a mask is what the layer loses, masks and tables are the
//! same whatever the threads and wherever it stopped, and what cannot be is refused.

use std::path::{Path, PathBuf};

use cotk_container::manifest::{DroppedMeaning, State};
use cotk_container::reader::Container;
use cotk_run::cancel::Cancel;
use cotk_run::facts::FactList;
use cotk_run::progress::{Progress, Silent};

use super::compare::{Compare, Comparison, RowWish, compare};
use super::gram::Semantics;
use crate::CompressError;
use crate::partial::partial_path;
use crate::pipeline::{Request, Surroundings, compress};
use crate::recipe::Recipe;
use crate::report::Report;

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../data/tiny-qwen2moe")
        .join(name)
}

const SMALL: [&str; 6] = [
    "compress.calibration_tokens=2000",
    "compress.drop_ratio=0",
    "compress.codes=['plain8']",
    "compress.prune.ratio=0.5",
    "compress.prune.gram_tokens=200",
    "compress.prune.end_tokens=500",
];

fn judge(folder: &Path) -> PathBuf {
    let path = folder.join("judge.txt");
    let text = fs_err::read_to_string(tiny("heldout.txt")).unwrap();
    fs_err::write(&path, &text[..2500]).unwrap();
    path
}

fn request(folder: &Path, name: &str, sets: &[&str]) -> Request {
    let sets: Vec<String> = SMALL.iter().chain(sets).map(|s| (*s).to_owned()).collect();
    Request {
        model: tiny(""),
        out: folder.join(name),
        recipe_name: "moe-int4".to_owned(),
        recipe: Recipe::load("moe-int4", &sets, None, None).unwrap(),
        calibration: tiny("train.txt"),
        eval_text: Some(judge(folder)),
    }
}

/// Runs under a progress that may stop it.
fn with<T>(progress: &dyn Progress, cancel: &Cancel, run: impl FnOnce(&Surroundings<'_>) -> T) -> T {
    let facts = FactList::default();
    run(&Surroundings {
        progress,
        cancel,
        facts: &facts,
        cost: None,
        threads: 2,
    })
}

fn run(request: &Request) -> Result<Report, CompressError> {
    with(&Silent, &Cancel::new(), |with| compress(request, with))
}

/// Dropped experts per MoE layer.
fn dropped(out: &Path) -> Vec<usize> {
    let container = Container::open(out).unwrap();
    let count = |layer: &cotk_container::manifest::Layer| {
        layer
            .experts
            .iter()
            .filter(|e| matches!(e.state, State::Dropped | State::Constant(_)))
            .count()
    };
    container.manifest().layers.iter().map(count).collect()
}

/// Cancels after some steps of progress.
struct Stop<'a> {
    cancel: &'a Cancel,
    left: std::sync::atomic::AtomicI64,
}

impl Progress for Stop<'_> {
    fn begin(&self, _: &str, _: u64, _: &str) {}
    fn advance(&self, steps: u64) {
        let steps = i64::try_from(steps).unwrap();
        if self.left.fetch_sub(steps, std::sync::atomic::Ordering::Relaxed) <= steps {
            self.cancel.cancel();
        }
    }
    fn end(&self) {}
    fn note(&self, _: &str) {}
}

#[test]
fn half_of_the_experts_go_and_the_container_says_what_that_means() {
    let folder = tempfile::tempdir().unwrap();
    let meanings = [
        ("masked", DroppedMeaning::Masked),
        ("removed", DroppedMeaning::Removed),
        ("novice", DroppedMeaning::Novice),
    ];
    for (semantics, meaning) in meanings {
        for spread in ["equal", "unequal", "paper"] {
            if semantics != "masked" && spread != "unequal" {
                continue;
            }
            let name = format!("{semantics}-{spread}");
            let sets = [
                format!("compress.prune.semantics={semantics}"),
                format!("compress.prune.spread={spread}"),
                "compress.prune.method=swap".to_owned(),
            ];
            let request = request(folder.path(), &name, &sets.each_ref().map(String::as_str));
            let report = run(&request).unwrap();
            let counts = dropped(&request.out);
            assert_eq!(counts.iter().sum::<usize>(), 12, "{name}: {counts:?}");
            assert!(spread != "equal" || counts == [4, 4, 4], "{name}: {counts:?}");
            let container = Container::open(&request.out).unwrap();
            assert_eq!(container.manifest().dropped, meaning);
            let routable = container
                .manifest()
                .layers
                .iter()
                .map(cotk_container::manifest::Layer::routable);
            assert_eq!(routable.sum::<usize>(), if semantics == "novice" { 24 } else { 12 });
            assert!(report.kl_nats > 0.0);
        }
    }
}

#[test]
fn pruning_gives_the_same_bytes_whatever_the_threads_and_wherever_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let sets = [
        "compress.prune.method=genetic",
        "compress.prune.field_masks=2",
        "compress.prune.field_layers=2",
    ];
    let files = |name: &str| -> Vec<Vec<u8>> {
        let file = |file: &str| fs_err::read(folder.path().join(name).join(file)).unwrap();
        ["manifest.json", "experts.bin", "dense.safetensors"].map(file).to_vec()
    };
    for (name, threads) in [("one", 1), ("three", 3)] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&request(folder.path(), name, &sets))).unwrap();
    }
    assert!(files("one") == files("three"), "threads");
    for steps in [2, 10, 20] {
        let name = format!("stopped-{steps}");
        let request = request(folder.path(), &name, &sets);
        let cancel = Cancel::new();
        let stop = Stop {
            cancel: &cancel,
            left: steps.into(),
        };
        let stopped = with(&stop, &cancel, |with| compress(&request, with));
        assert!(
            matches!(stopped, Err(CompressError::Run(cotk_run::Error::Cancelled))),
            "{steps}"
        );
        assert!(run(&request).unwrap().resumed, "{steps}");
        assert!(files(&name) == files("one"), "stopped after {steps}");
    }
}

fn comparison(folder: &Path, name: &str, rows: &[&str], sets: &[&str]) -> Compare {
    Compare {
        request: request(folder, name, sets),
        rows: rows.iter().map(|row| RowWish::parse(row).unwrap()).collect(),
        ratios: vec![0.25, 0.5],
        texts: vec![judge(folder)],
        second_texts: Vec::new(),
        text_tokens: 1000,
    }
}

fn compared(request: &Compare) -> Result<Comparison, CompressError> {
    with(&Silent, &Cancel::new(), |with| compare(request, with))
}

#[test]
fn a_table_has_every_row_and_searches_lose_less_than_chance() {
    let folder = tempfile::tempdir().unwrap();
    let rows = [
        "random",
        "reap",
        "greedy",
        "swap",
        "swap:unequal",
        "exhaustive",
        "paper:experts",
    ];
    for semantics in [Semantics::Masked, Semantics::Novice] {
        let set = format!("compress.prune.semantics={}", semantics.name());
        let found = compared(&comparison(folder.path(), semantics.name(), &rows, &[&set])).unwrap();
        assert_eq!(found.lines.len(), 2 * rows.len());
        assert_eq!(found.semantics, semantics);
        for lines in found.lines.chunks(rows.len()) {
            let of = |name: &str| lines.iter().find(|line| line.name.starts_with(name)).unwrap();
            assert_eq!(of("random").seeds, 3);
            assert_eq!(of("reap").kl_ratio, Some(1.0));
            assert!(of("swap equal").chosen_loss <= of("greedy").chosen_loss);
            assert!(of("exhaustive").chosen_loss <= of("swap equal").chosen_loss * (1.0 + 1e-12));
            assert!(of("swap equal").chosen_loss < of("random").chosen_loss);
            assert!(of("paper").field_runs > 0 && of("swap equal").field_runs == 0);
            for line in lines {
                assert_eq!(
                    line.dropped.iter().sum::<usize>(),
                    (24.0 * line.ratio) as usize,
                    "{}",
                    line.name
                );
                assert!(
                    line.kl_ci95[0] <= line.kl_nats && line.kl_nats <= line.kl_ci95[1],
                    "{}",
                    line.name
                );
                assert!(line.bytes < found.bytes_before && line.perplexity > 1.0);
                assert_eq!(line.texts.len(), 1);
            }
        }
        // Fewer experts, more loss.
        assert!(found.lines[3].kl_nats < found.lines[3 + rows.len()].kl_nats);
    }
}

#[test]
fn a_comparison_that_was_stopped_goes_on_to_the_same_table() {
    let folder = tempfile::tempdir().unwrap();
    let rows = ["reap", "swap:unequal"];
    let whole = compared(&comparison(folder.path(), "whole", &rows, &[])).unwrap();
    let stopped = comparison(folder.path(), "stopped", &rows, &[]);
    for steps in [3, 9, 14] {
        let cancel = Cancel::new();
        let stop = Stop {
            cancel: &cancel,
            left: steps.into(),
        };
        let error = with(&stop, &cancel, |with| compare(&stopped, with)).unwrap_err();
        assert!(
            matches!(error, CompressError::Run(cotk_run::Error::Cancelled)),
            "{error}"
        );
    }
    let resumed = compared(&stopped).unwrap();
    for (a, b) in resumed.lines.iter().zip(&whole.lines) {
        assert_eq!(
            (a.kl_nats.to_bits(), &a.dropped),
            (b.kl_nats.to_bits(), &b.dropped),
            "{}",
            a.name
        );
    }
    assert!(stopped.request.out.join("comparison.json").is_file() && !partial_path(&stopped.request.out).exists());
}

#[test]
fn what_cannot_be_pruned_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let sets = ["compress.drop_ratio=0.25", "compress.prune.ratio=0.25"].map(str::to_owned);
    let error = Recipe::load("moe-int4", &sets, None, None).unwrap_err();
    assert!(matches!(error, CompressError::Contradiction { .. }), "{error}");

    let shared = Compare {
        texts: vec![tiny("train.txt")],
        ..comparison(folder.path(), "shared", &["reap"], &[])
    };
    assert!(matches!(compared(&shared), Err(CompressError::SameText { .. })));
}
