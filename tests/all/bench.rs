//! `cotk bench`: the rows of a synthetic model, of a checkpoint and of a container, and what it refuses. No speed is held
//! to anything.

use crate::program::{Ran, Workplace, in_repository};

const QUICK: [&str; 8] = [
    "--prompt",
    "16",
    "--generate",
    "8",
    "--repeats",
    "1",
    "--threads",
    "1,2",
];

#[track_caller]
fn fails(ran: &Ran, code: i32, says: &[&str]) {
    assert_eq!(ran.code, code, "{ran:?}");
    for word in says {
        assert!(
            ran.stderr.contains(word) || ran.stdout.contains(word),
            "no {word} in {ran:?}"
        );
    }
}

#[test]
fn a_synthetic_model_gives_a_row_for_each_test_and_thread_count() {
    let place = Workplace::new();
    let mut args = vec![
        "bench",
        "--synthetic",
        "ref-qwen2moe",
        "--layers",
        "1",
        "--bits",
        "4",
        "--json",
    ];
    args.extend(QUICK);
    args.extend(["--batch", "1,3", "--keep-disturbed"]);
    let result = place.run(args).result(0);
    let rows = result["rows"].as_array().unwrap();
    let keys = |row: &serde_json::Value| {
        let number = |key: &str| row[key].as_u64().unwrap();
        (
            row["name"].as_str().unwrap().to_owned(),
            [number("batch"), number("threads"), number("prompt"), number("generate")],
        )
    };
    let found: Vec<_> = rows.iter().map(keys).collect();
    let expected = [1, 2].map(|threads| {
        [
            ("pp16".to_owned(), [1, threads, 16, 0]),
            ("tg8".to_owned(), [1, threads, 0, 8]),
            ("tg8".to_owned(), [3, threads, 0, 8]),
        ]
    });
    assert_eq!(found, expected.concat());
    for row in rows {
        assert_eq!(
            (&row["model"], &row["bits"]),
            (&"ref-qwen2moe, 1 layers".into(), &4.into())
        );
        for key in [
            "tokens_per_s",
            "weight_gb_per_s",
            "pct_of_bandwidth",
            "gops",
            "peak_gops",
        ] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{key}: {row}");
        }
        let parts = row["parts_pct"].as_object().unwrap();
        assert!(
            (parts.values().map(|p| p.as_f64().unwrap()).sum::<f64>() - 100.0).abs() < 1e-6,
            "{row}"
        );
        assert!(
            ["dense", "attention", "experts", "head", "other"]
                .iter()
                .all(|p| parts.contains_key(*p)),
            "{row}"
        );
    }
    assert!(result["peak_rss_bytes"].as_u64().unwrap() > 0);
    // Making the weights is no opening.
    assert!(
        result["load_s"].is_null() && result["first_token_s"].is_null(),
        "{result}"
    );
}

#[test]
fn a_checkpoint_is_coded_on_the_way_and_a_container_runs_as_it_is() {
    let place = Workplace::new();
    place.copy_of_tiny("model");
    let text = in_repository("data/tiny-qwen2moe/train.txt");
    let compress = [
        "compress",
        "--moe",
        "model",
        "-o",
        "out",
        "--json",
        "--set",
        "compress.calibration_tokens=1024",
    ];
    let calibration = ["--calibration".to_owned(), text.to_str().unwrap().to_owned()];
    place
        .run(compress.map(str::to_owned).into_iter().chain(calibration))
        .result(0);
    let bench = |model: &'static str, more: &[&'static str]| {
        let mut args = vec!["bench", model, "--json"];
        args.extend(QUICK);
        args.extend(more);
        place.run(args)
    };
    let opened = bench("out", &["--kv-cache", "int8"]).result(0);
    let seconds = ["load_s", "first_token_s"].map(|key| opened[key].as_f64().unwrap());
    assert!(0.0 < seconds[0] && seconds[0] < seconds[1], "{opened}");
    assert!(opened["first_token_peak_rss_bytes"].as_u64() <= opened["peak_rss_bytes"].as_u64());
    assert_eq!(opened["kv_cache"], "int8");
    // All of it was used once before anything was measured; what it weighs is what lies in its files.
    let bytes = |key: &str| opened[key].as_u64().unwrap_or_else(|| panic!("no {key}: {opened}"));
    let stored: u64 = ["experts.bin", "dense.safetensors"]
        .map(|file| place.join("out").join(file).metadata().unwrap().len())
        .iter()
        .sum();
    assert!(
        bytes("whole_weight_bytes").abs_diff(stored) < stored / 10,
        "{stored}: {opened}"
    );
    assert!(bytes("whole_peak_rss_bytes") <= bytes("peak_rss_bytes") && bytes("whole_own_bytes") > 0);
    assert!(bytes("whole_mapped_bytes") > 0);
    fails(&bench("out", &["--kv-cache", "int4"]), 2, &["int4", "int8"]);
    let of = |result: serde_json::Value| (result["rows"][0]["model"].clone(), result["rows"][0]["bits"].clone());
    assert_eq!(
        of(bench("model", &["--bits", "4"]).result(0)),
        ("model".into(), 4.into())
    );
    let (name, bits) = of(bench("out", &[]).result(0));
    assert_eq!(name, "out");
    assert!(bits.is_u64(), "{bits}");
    fails(&bench("out", &["--bits", "4"]), 2, &["container"]);
}

#[test]
fn a_synthetic_container_is_opened_like_any_other() {
    let place = Workplace::new();
    let export = |more: &[&'static str]| {
        let mut args = vec![
            "export",
            "--synthetic",
            "ref-qwen2moe",
            "--layers",
            "1",
            "--container",
            "made",
            "--json",
        ];
        args.extend(more);
        place.run(args)
    };
    fails(&export(&["--bits", "5"]), 2, &["5 bits", "2, 3, 4 or 8"]);
    let made = export(&["--bits", "4"]).result(0);
    assert_eq!((&made["format"], &made["tensors"]), (&"container".into(), &32.into()));
    fails(&export(&["--bits", "4"]), 2, &["made", "where nothing is"]);
    fails(
        &place.run(["export", "made", "--container", "again"]),
        2,
        &["--synthetic"],
    );
    let mut args = vec!["bench", "made", "--json"];
    args.extend(QUICK);
    assert_eq!(place.run(args).result(0)["rows"][0]["bits"], 4);
}

/// Law: a CPU without fast integers is said to be one, once, wherever weights are computed with.
#[test]
fn the_scalar_path_says_so_once() {
    let place = Workplace::new();
    place.copy_of_tiny("model");
    let scalar = |args: &[&str]| place.run_with(&[("COTK_ISA", "scalar")], args);
    let said = |text: &str| text.matches("computing on the scalar path").count();
    let args = ["run", "model", "--prompt", "he was", "--max-tokens", "2"];
    let ran = scalar(&args);
    assert_eq!((ran.code, said(&ran.stderr), said(&ran.stdout)), (0, 1, 0), "{ran:?}");
    let ran = scalar(&[&args[..], &["--json"]].concat());
    assert_eq!(said(&ran.json()["warnings"].to_string()), 1, "{ran:?}");
    assert_eq!(said(&ran.stderr), 0, "{ran:?}");
    // Nothing is computed here.
    let ran = scalar(&["inspect", "model"]);
    assert_eq!((ran.code, said(&ran.stderr)), (0, 0), "{ran:?}");
    let ran = place.run_with(&[("COTK_ISA", "sse9")], args);
    assert_eq!((ran.code, said(&ran.stderr)), (2, 0), "{ran:?}");
    assert!(ran.stderr.contains("sse9") && ran.stderr.contains("scalar"), "{ran:?}");
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    let place = Workplace::new();
    for (args, says) in [
        (vec![], &["--synthetic"][..]),
        (vec!["--synthetic", "gpt-9"], &["gpt-9", "olmoe-1b-7b"]),
        (
            vec!["--synthetic", "ref-qwen2moe", "--bits", "5"],
            &["--bits 5", "2, 3, 4 or 8"],
        ),
        (
            vec!["--synthetic", "ref-qwen2moe", "--threads", "1,0"],
            &["--threads 0"],
        ),
        (vec!["--synthetic", "ref-qwen2moe", "--batch", "0"], &["--batch 0"]),
        (vec!["--synthetic", "ref-qwen2moe", "--repeats", "0"], &["--repeats 0"]),
        (vec!["--synthetic", "ref-qwen2moe", "--layers", "0"], &["--layers 0"]),
        (
            vec!["--synthetic", "ref-qwen2moe", "--prompt", "0", "--generate", "0"],
            &["nothing to measure"],
        ),
        (
            vec!["--synthetic", "ref-qwen2moe", "--prompt", "2000"],
            &["2000", "1024"],
        ),
        (vec!["model", "--synthetic", "ref-qwen2moe"], &["cannot be used with"]),
        (vec!["nowhere"], &["nowhere"]),
    ] {
        let args: Vec<&str> = ["bench"].into_iter().chain(args).collect();
        fails(&place.run(args), 2, says);
    }
    // What does not fit is said with numbers, before anything is made.
    let huge = ["bench", "--synthetic", "qwen3-30b-a3b", "--layers", "4096", "--json"];
    fails(&place.run(huge), 4, &["bytes of memory", "available"]);
}
