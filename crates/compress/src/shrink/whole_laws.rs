//! Laws of smaller experts on the committed tiny checkpoint: the share that was asked for is gone, rows are judged as
//! they are named, and a container holds experts of the planned inner sizes.

use std::path::{Path, PathBuf};

use cotk_container::manifest::State;
use cotk_container::reader::Container;
use cotk_run::cancel::Cancel;
use cotk_run::facts::FactList;
use cotk_run::progress::Silent;

use crate::CompressError;
use crate::pipeline::{Request, Surroundings, compress};
use crate::prune::compare::{Compare, RowWish, compare};
use crate::recipe::Recipe;

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../data/tiny-qwen2moe")
        .join(name)
}

fn request(folder: &Path, name: &str, recipe: &str, sets: &[&str]) -> Request {
    let small = ["compress.calibration_tokens=4000"];
    let sets: Vec<String> = small.iter().chain(sets).map(|s| (*s).to_owned()).collect();
    let judge = folder.join("judge.txt");
    let text = fs_err::read_to_string(tiny("heldout.txt")).unwrap();
    fs_err::write(&judge, &text[..2500]).unwrap();
    Request {
        model: tiny(""),
        out: folder.join(name),
        recipe_name: recipe.to_owned(),
        recipe: Recipe::load(recipe, &sets, None, None).unwrap(),
        calibration: tiny("train.txt"),
        eval_text: Some(judge),
    }
}

fn with<T>(run: impl FnOnce(&Surroundings<'_>) -> T) -> T {
    run(&Surroundings {
        progress: &Silent,
        cancel: &Cancel::new(),
        facts: &FactList::default(),
        cost: None,
        threads: 2,
    })
}

#[test]
fn every_row_takes_what_was_asked_for_and_healing_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let rows = [
        "reap",
        "channels:equal",
        "channels",
        "rank",
        "mix",
        "paper",
        "reap:healed",
        "channels:healed",
        "channels:router",
    ];
    let sets = [
        "compress.drop_ratio=0",
        "compress.prune.ratio=0.5",
        "compress.prune.gram_tokens=200",
        "compress.prune.end_tokens=500",
    ];
    let request = Compare {
        request: request(folder.path(), "table", "moe-int4", &sets),
        rows: rows.iter().map(|row| RowWish::parse(row).unwrap()).collect(),
        ratios: vec![0.5],
        texts: vec![folder.path().join("judge.txt")],
        second_texts: Vec::new(),
        text_tokens: 1000,
    };
    let found = with(|with| compare(&request, with)).unwrap();
    assert_eq!(found.lines.len(), rows.len());
    for line in &found.lines {
        assert!(line.gone > 0.499 && line.gone < 0.56, "{}: {}", line.name, line.gone);
        assert!(line.kl_nats > 0.0 && line.kl_nats.is_finite(), "{}", line.name);
        assert_eq!(line.healed.is_some(), line.name.contains("healed"), "{}", line.name);
    }
    let of = |name: &str| found.lines.iter().find(|line| line.name == name).unwrap();
    assert_eq!(of("paper field").kl_of_paper, Some(1.0));
    assert_eq!(of("reap equal healed").kl_ratio, Some(1.0));
    assert!(of("channels unequal healed").kl_of_paper.is_none());
    assert_eq!(of("channels unequal").dropped, [0, 0, 0]);
}

fn inner_sizes(out: &Path) -> Vec<Vec<usize>> {
    let container = Container::open(out).unwrap();
    let size = |state: &State| match state {
        State::Kept(record) => record.gate.format.rows(),
        State::Constant(_) | State::Dropped => 0,
    };
    let layers = container.manifest().layers.iter();
    layers
        .map(|layer| layer.experts.iter().map(|expert| size(&expert.state)).collect())
        .collect()
}

#[test]
fn containers_hold_experts_of_the_planned_sizes_whatever_the_threads() {
    let folder = tempfile::tempdir().unwrap();
    let sets = [
        "compress.shrink.end_tokens=500",
        "compress.shrink.multiple=4",
        "compress.shrink.heal_router=true",
    ];
    let files = |name: &str| -> Vec<Vec<u8>> {
        let file = |file: &str| fs_err::read(folder.path().join(name).join(file)).unwrap();
        ["manifest.json", "experts.bin"].map(file).to_vec()
    };
    for (name, threads) in [("one", 1), ("three", 3)] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let request = request(folder.path(), name, "moe-shrink", &sets);
        let report = pool.install(|| with(|with| compress(&request, with))).unwrap();
        assert!(report.kl_nats > 0.0);
    }
    assert!(files("one") == files("three"), "threads");
    let sizes = inner_sizes(&folder.path().join("one"));
    assert_eq!((sizes.len(), sizes[0].len()), (3, 8));
    let all: usize = sizes.iter().flatten().sum();
    assert!(all <= 3 * 8 * 16 && all > 3 * 8 * 13, "{sizes:?}");
    assert!(
        sizes.iter().flatten().all(|size| size % 4 == 0 && *size > 0),
        "{sizes:?}"
    );

    // Whole experts count towards the share; one size for the others.
    let more = [
        "compress.shrink.spread=equal",
        "compress.shrink.heal=false",
        "compress.shrink.heal_router=false",
        "compress.prune.ratio=0.25",
        "compress.prune.spread=equal",
        "compress.prune.method=greedy",
        "compress.prune.gram_tokens=200",
    ];
    let mixed = request(folder.path(), "mixed", "moe-shrink", &[&sets[..], &more].concat());
    with(|with| compress(&mixed, with)).unwrap();
    for layer in inner_sizes(&mixed.out) {
        assert_eq!(layer.iter().filter(|size| **size == 0).count(), 2);
        assert!(layer.iter().all(|size| [0, 20].contains(size)), "{layer:?}");
    }
}

#[test]
fn shares_that_contradict_each_other_are_refused() {
    for sets in [
        &["compress.drop_ratio=0.25"][..],
        &["compress.prune.ratio=0.5"],
        &["compress.dropped=novice"],
        &["compress.joint.points=1"],
    ] {
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        let error = Recipe::load("moe-shrink", &sets, None, None).unwrap_err();
        assert!(
            matches!(error, CompressError::Contradiction { .. }),
            "{sets:?}: {error}"
        );
    }
    let wrong = ["compress.shrink.multiple=0".to_owned()];
    assert!(Recipe::load("moe-shrink", &wrong, None, None).is_err());
}
