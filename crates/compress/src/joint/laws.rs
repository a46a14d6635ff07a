//! Laws of the joint allocation on the committed tiny checkpoint: the same bytes whatever the threads and wherever
//! interrupted, budgets that hold, caps that contradict, less loss than rounding to nearest.

use std::path::{Path, PathBuf};

use cotk_container::manifest::State;
use cotk_container::reader::Container;
use cotk_latency::predict::{CostModel, Origin, Prediction, Terms};
use cotk_latency::work::{Key, Work};
use cotk_run::cancel::Cancel;
use cotk_run::facts::FactList;
use cotk_run::progress::{Progress, Silent};

use crate::partial::partial_path;
use crate::pipeline::{Request, Surroundings, compress};
use crate::recipe::Recipe;
use crate::report::Report;
use crate::{CompressError, Result};

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../data/tiny-qwen2moe")
        .join(name)
}

/// Seconds instead of minutes.
const SMALL: [&str; 4] = [
    "compress.calibration_tokens=3000",
    "compress.joint.sensitivity_tokens=600",
    "compress.joint.groups=[32, \"row\"]",
    "compress.joint.points=2",
];

fn request(out: &Path, recipe: &str, sets: &[&str]) -> Result<Request> {
    let judge = out.parent().unwrap().join("judge.txt");
    if !judge.exists() {
        let text = fs_err::read_to_string(tiny("heldout.txt")).unwrap();
        fs_err::write(&judge, &text[..2500]).unwrap();
    }
    let sets: Vec<String> = SMALL.iter().chain(sets).map(|s| (*s).to_owned()).collect();
    Ok(Request {
        model: tiny(""),
        out: out.to_owned(),
        recipe_name: recipe.to_owned(),
        recipe: Recipe::load(recipe, &sets, None, None)?,
        calibration: tiny("train.txt"),
        eval_text: Some(judge),
    })
}

fn run_with(request: &Request, progress: &dyn Progress, cancel: &Cancel) -> Result<Report> {
    run_at(request, progress, cancel, None)
}

fn run_at(request: &Request, progress: &dyn Progress, cancel: &Cancel, cost: Option<&dyn CostModel>) -> Result<Report> {
    let facts = FactList::default();
    let with = Surroundings {
        progress,
        cancel,
        facts: &facts,
        cost,
        threads: 2,
    };
    compress(request, &with)
}

fn run(out: &Path, recipe: &str, sets: &[&str]) -> Result<Report> {
    run_with(&request(out, recipe, sets)?, &Silent, &Cancel::new())
}

fn weights(out: &Path) -> [Vec<u8>; 2] {
    ["experts.bin", "manifest.json"].map(|name| fs_err::read(out.join(name)).unwrap())
}

/// Cancels after so many steps.
struct StopAfter {
    left: std::sync::Mutex<usize>,
    cancel: Cancel,
}

impl Progress for StopAfter {
    fn begin(&self, _what: &str, _total: u64, _unit: &str) {}

    fn advance(&self, _steps: u64) {
        let mut left = self.left.lock().unwrap();
        *left = left.saturating_sub(1);
        if *left == 0 {
            self.cancel.cancel();
        }
    }

    fn end(&self) {}

    fn note(&self, text: &str) {
        panic!("{text}");
    }
}

#[test]
fn the_same_bytes_whatever_the_threads_and_wherever_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let sets = ["budget.bits_per_expert_weight=3"];
    let whole = folder.path().join("whole");
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let report = one.install(|| run(&whole, "moe-joint", &sets)).unwrap();
    assert!(report.bits_per_expert_weight <= 3.0 && report.bits_per_expert_weight > 2.8);
    // What was tried and chosen is told, and nothing that is not so.
    assert_eq!(report.tried.len(), 2);
    let matrices: usize = report.layers.iter().map(|layer| 3 * layer.experts).sum();
    assert!(report.matrices.len() > 1 && report.matrices.values().sum::<usize>() == matrices);
    assert!(
        report.warnings.iter().all(|w| !w.contains("no budget")),
        "{:?}",
        report.warnings
    );
    let text = fs_err::read_to_string(whole.join("report.md")).unwrap();
    assert!(
        text.contains("| trust |") && text.contains("| form | matrices |"),
        "{text}"
    );
    Container::open(&whole).unwrap().verify().unwrap();

    let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let out = folder.path().join("out");
    let request = request(&out, "moe-joint", &sets).unwrap();
    // Every stretch ends somewhere else: in the first pass, while layers are weighed, in trials, in the second pass.
    for steps in [2, 3, 5, 7] {
        let cancel = Cancel::new();
        let stop = StopAfter {
            left: std::sync::Mutex::new(steps),
            cancel: cancel.clone(),
        };
        let stopped = three.install(|| run_with(&request, &stop, &cancel));
        assert!(matches!(stopped, Err(CompressError::Run(cotk_run::Error::Cancelled))));
    }
    three.install(|| run_with(&request, &Silent, &Cancel::new())).unwrap();
    assert!(weights(&out) == weights(&whole));
}

#[test]
fn budgets_hold_and_more_bits_lose_less() {
    let folder = tempfile::tempdir().unwrap();
    let mut last = f64::INFINITY;
    for bits in ["1.5", "2.5", "4.5"] {
        let set = format!("budget.bits_per_expert_weight={bits}");
        let report = run(&folder.path().join(bits), "moe-joint", &[&set]).unwrap();
        assert!(report.bits_per_expert_weight <= bits.parse().unwrap());
        assert!(report.kl_nats < last, "{bits}: {} after {last}", report.kl_nats);
        last = report.kl_nats;
    }
    let out = folder.path().join("none");
    let error = run(&out, "moe-joint", &["budget.bits_per_expert_weight=0.5"]).unwrap_err();
    match error {
        CompressError::Budget { budget, least } => assert!(least > budget),
        other => panic!("{other}"),
    }
    assert!(!out.exists() && partial_path(&out).exists());
}

#[test]
fn a_target_of_kl_gives_the_smallest_output_that_meets_it() {
    let folder = tempfile::tempdir().unwrap();
    let run = |key: &str, value: f64| {
        let set = format!("budget.{key}={value}");
        run(&folder.path().join(&set), "moe-joint", &[&set])
    };
    let three = run("bits_per_expert_weight", 3.0).unwrap();
    let met = run("max_kl_nats", three.kl_nats).unwrap();
    let smallest = run("max_kl_nats", 1e9).unwrap();
    assert!(smallest.bits_per_expert_weight < met.bits_per_expert_weight);
    assert!(met.bits_per_expert_weight < 8.0 && met.kl_nats < smallest.kl_nats);
    assert!(matches!(run("max_kl_nats", 0.0), Err(CompressError::TargetKl { .. })));
}

#[test]
fn gptq_loses_less_than_rounding_to_nearest() {
    let folder = tempfile::tempdir().unwrap();
    let sets = ["compress.codes=[\"plain2\"]", "compress.joint.groups=[32]"];
    let kl = |name: &str, rounding: &str| {
        let rounding = format!("compress.joint.rounding={rounding}");
        let sets = [&sets[..], &[rounding.as_str()]].concat();
        let report = run(&folder.path().join(name), "moe-gptq-uniform", &sets).unwrap();
        (report.kl_nats, report.bits_per_expert_weight)
    };
    let (gptq, nearest) = (kl("gptq", "gptq"), kl("nearest", "nearest"));
    assert_eq!(gptq.1, nearest.1);
    assert!(gptq.0 < 0.9 * nearest.0, "{gptq:?} {nearest:?}");
}

#[test]
fn caps_that_contradict_are_refused_before_anything_is_read() {
    for (recipe, sets) in [
        (
            "moe-joint",
            &["budget.bytes=100", "budget.bits_per_expert_weight=2"][..],
        ),
        ("moe-int4", &["budget.max_kl_nats=0.1"]),
        ("moe-joint", &["compress.drop_ratio=0.5"]),
        ("moe-joint", &["compress.prune={ratio=0.5}"]),
        ("moe-joint", &["compress.shrink={ratio=0.5}"]),
        ("moe-joint", &["compress.joint.heal_router=true"]),
        (
            "moe-shrink",
            &["compress.shrink.heal=false", "compress.shrink.heal_router=true"],
        ),
        (
            "moe-joint",
            &["compress.joint.groups=[16]", "compress.joint.scales=[\"f16\"]"],
        ),
    ] {
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        let error = Recipe::load(recipe, &sets, None, None).unwrap_err();
        assert!(matches!(error, CompressError::Contradiction { .. }), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    for set in [
        "budget.target_ms=1",
        // 64 x 32 / (64 + 32) = 21.3.
        "compress.joint.ranks=[16, 17]",
        "compress.joint.channels=[0.03]",
    ] {
        let error = run(&folder.path().join("out"), "moe-joint", &[set]).unwrap_err();
        assert!(matches!(error, CompressError::Contradiction { .. }), "{error}");
    }
}

#[test]
fn ranks_and_channels_are_offered_once_as_they_are_stored() {
    let sets = [
        "compress.joint.ranks=[16, 5, 16, 20]".to_owned(),
        "compress.joint.channels=[0.5, 0.75, 0.5]".to_owned(),
    ];
    let recipe = Recipe::load("moe-joint", &sets, None, None).unwrap();
    let joint = recipe.compress.joint.unwrap();
    assert_eq!(joint.stored_ranks(), [16, 32]);
    assert_eq!(joint.inner_sizes(32), [24, 16]);
}

#[test]
fn a_budget_of_bytes_that_dropping_or_cutting_reaches_is_met_and_a_refusal_names_the_smallest_that_is() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, bytes: u64, sets: &[&str]| {
        let budget = format!("budget.bytes={bytes}");
        let sets = [&[budget.as_str(), "compress.joint.groups=[\"row\"]"], sets].concat();
        run(&folder.path().join(name), "moe-joint", &sets)
    };
    let least = |error: CompressError| match error {
        CompressError::Budget { budget: 1000, least } => least,
        other => panic!("{other}"),
    };
    let whole = least(run("whole", 1000, &[]).unwrap_err());
    for (name, sets) in [
        ("dropped", &["compress.joint.max_dropped=0.5"][..]),
        ("novice", &["compress.joint.max_dropped=0.5", "compress.dropped=novice"]),
        ("channels", &["compress.joint.channels=[0.5]"]),
    ] {
        let least = least(run("none", 1000, sets).unwrap_err());
        assert!(least < whole, "{name}: {least} of {whole}");
        let report = run(name, least, sets).unwrap();
        assert!(report.weight_bytes_after <= least, "{name}");
        // Known only once what there is to choose from is measured.
        match run("less", least - 1, sets).unwrap_err() {
            CompressError::Budget { budget, least: named } => assert_eq!((budget, named), (least - 1, least), "{name}"),
            other => panic!("{other}"),
        }
        fs_err::remove_dir_all(partial_path(&folder.path().join("less"))).unwrap();
    }
}

#[test]
fn narrower_attention_that_is_lost_on_the_way_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let sets = [
        "compress.attention.ratio=0.25",
        "compress.attention.multiple=2",
        "compress.joint.groups=[32]",
        "compress.codes=[\"plain2\"]",
    ];
    let whole = folder.path().join("whole");
    run(&whole, "moe-joint", &sets).unwrap();
    let request = request(&folder.path().join("out"), "moe-joint", &sets).unwrap();
    let partial = partial_path(&request.out);
    let stop = StopAt {
        journal: partial.join("journal.jsonl"),
        key: "\"attention\":",
        cancel: Cancel::new(),
    };
    let stopped = run_with(&request, &stop, &stop.cancel);
    assert!(matches!(stopped, Err(CompressError::Run(cotk_run::Error::Cancelled))));
    fs_err::remove_file(partial.join("states/attention.safetensors")).unwrap();
    run_with(&request, &Silent, &Cancel::new()).unwrap();
    assert!(weights(&request.out) == weights(&whole));
    let dense = |out: &Path| fs_err::read(out.join("dense.safetensors")).unwrap();
    assert!(dense(&request.out) == dense(&whole));
}

/// Cancels once the journal says so.
struct StopAt {
    journal: PathBuf,
    key: &'static str,
    cancel: Cancel,
}

impl Progress for StopAt {
    fn begin(&self, _what: &str, _total: u64, _unit: &str) {}

    fn advance(&self, _steps: u64) {
        if fs_err::read_to_string(&self.journal).unwrap().contains(self.key) {
            self.cancel.cancel();
        }
    }

    fn end(&self) {}

    fn note(&self, text: &str) {
        assert!(text.contains("beginning anew"), "{text}");
    }
}

/// A millisecond for each whole expert and for each correction, less for fewer channels; a whole token takes ten.
struct Slow;

impl CostModel for Slow {
    fn predict(&self, work: &Work<'_>) -> cotk_latency::Result<Prediction> {
        let ms = match work {
            Work::Operator(Key::Expert(key)) => f64::from(key.inner) / 32.0,
            _ => 10.0,
        };
        Ok(Prediction {
            ms,
            lo_ms: ms,
            hi_ms: ms,
            terms: Terms::default(),
            origin: Origin::Table,
            flags: Vec::new(),
        })
    }
}

#[test]
fn corrections_cost_predicted_time_and_channels_that_go_save_it() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, sets: &[&str]| {
        let narrow = ["budget.bits_per_expert_weight=6", "compress.codes=[\"plain1\"]"];
        let request = request(&folder.path().join(name), "moe-joint", &[&narrow, sets].concat())?;
        run_at(&request, &Silent, &Cancel::new(), Some(&Slow))
    };
    let corrections = |name: &str| {
        let container = Container::open(&folder.path().join(name)).unwrap();
        let experts = container.manifest().layers.iter().flat_map(|layer| &layer.experts);
        let of = |state: &State| match state {
            State::Kept(record) => [&record.gate, &record.up, &record.down]
                .iter()
                .filter(|m| m.rank() > 0)
                .count(),
            _ => 0,
        };
        experts.map(|expert| of(&expert.state)).sum::<usize>()
    };
    // Two experts of a token in each of three layers.
    let report = run("free", &["compress.joint.ranks=[16]", "budget.target_ms=13"]).unwrap();
    assert!(
        report.warnings.iter().all(|w| !w.contains("above the target")),
        "{:?}",
        report.warnings
    );
    let report = run("slow", &["compress.joint.ranks=[16]", "budget.target_ms=7"]).unwrap();
    let said = report.warnings.iter().find(|w| w.contains("above the target")).unwrap();
    assert!(said.contains("10.00 ms") && said.contains("7 ms"), "{said}");
    let (all, few) = (corrections("free"), corrections("slow"));
    assert!(few < all, "{few} of {all}");

    let short = run("short", &["budget.target_ms=5"]).unwrap_err();
    assert!(matches!(short, CompressError::TargetTime { .. }), "{short}");
    run("cut", &["budget.target_ms=5", "compress.joint.channels=[0.5]"]).unwrap();
    assert!(kinds(&folder.path().join("cut")).2);
}

/// Inner channels of the checkpoint's experts.
const INNER: usize = 32;

/// Of every expert of a container: kept, constant, dropped; and whether some matrix has a correction, some expert fewer
/// channels.
fn kinds(out: &Path) -> ([usize; 3], bool, bool) {
    let container = Container::open(out).unwrap();
    container.verify().unwrap();
    let experts = container.manifest().layers.iter().flat_map(|layer| &layer.experts);
    let (mut counts, mut corrected, mut sizes) = ([0; 3], false, std::collections::BTreeSet::new());
    for expert in experts {
        match &expert.state {
            State::Kept(record) => {
                counts[0] += 1;
                corrected |= record.gate.rank() + record.up.rank() + record.down.rank() > 0;
                sizes.insert(record.gate.format.rows());
            }
            State::Constant(_) => counts[1] += 1,
            State::Dropped => counts[2] += 1,
        }
    }
    (counts, corrected, sizes.first().is_some_and(|least| *least < INNER))
}

#[test]
fn experts_go_shrink_or_are_corrected_only_where_the_recipe_offers_it() {
    let folder = tempfile::tempdir().unwrap();
    let tight = "budget.bits_per_expert_weight=0.9";
    let out = |name: &str| folder.path().join(name);
    // Below what the narrowest codes of all experts take.
    assert!(matches!(
        run(&out("all"), "moe-joint", &[tight]),
        Err(CompressError::Budget { .. })
    ));

    // What may go counts in the range that a target of KL is searched in, which this budget is below without.
    let sets = [
        "budget.max_kl_nats=10",
        "compress.joint.max_dropped=0.5",
        "compress.joint.groups=[\"row\"]",
    ];
    let report = run(&out("target"), "moe-joint", &[&[tight][..], &sets].concat()).unwrap();
    let ([_, _, dropped], ..) = kinds(&out("target"));
    assert!(report.bits_per_expert_weight <= 0.9 && dropped > 0);

    let report = run(&out("gone"), "moe-joint", &[tight, "compress.joint.max_dropped=0.5"]).unwrap();
    let ([kept, constant, dropped], ..) = kinds(&out("gone"));
    assert!(report.bits_per_expert_weight <= 0.9 && kept > 0 && dropped > 0 && constant == 0);

    // Constants have bytes, too.
    let novice = [
        "budget.bits_per_expert_weight=1.0",
        "compress.joint.max_dropped=0.5",
        "compress.dropped=novice",
        "compress.joint.heal=true",
    ];
    run(&out("novice"), "moe-joint", &novice).unwrap();
    let ([kept, constant, dropped], ..) = kinds(&out("novice"));
    assert!(kept > 0 && constant > 0 && dropped == 0);

    let sets = [
        "budget.bits_per_expert_weight=1.0",
        "compress.joint.channels=[0.5, 0.75]",
        "compress.joint.heal=true",
    ];
    let report = run(&out("channels"), "moe-joint", &sets).unwrap();
    let (_, corrected, shrunk) = kinds(&out("channels"));
    let bits = report.bits_per_expert_weight;
    assert!(bits <= 1.0 && shrunk && !corrected, "{bits} {shrunk}");

    // With one code alone more bytes can only go into corrections.
    let sets = [
        "budget.bits_per_expert_weight=6",
        "compress.codes=[\"plain1\"]",
        "compress.joint.ranks=[16]",
    ];
    let corrected = run(&out("ranks"), "moe-joint", &sets).unwrap();
    assert!(kinds(&out("ranks")).1);
    let plain = run(&out("plain"), "moe-joint", &sets[..2]).unwrap();
    assert!(
        corrected.kl_nats < plain.kl_nats,
        "{} {}",
        corrected.kl_nats,
        plain.kl_nats
    );

    let removed = [
        "compress.joint.max_dropped=0.5".to_owned(),
        "compress.dropped=removed".to_owned(),
    ];
    let error = Recipe::load("moe-joint", &removed, None, None).unwrap_err();
    assert!(matches!(error, CompressError::Contradiction { .. }), "{error}");
}
