//! `cotk plan` on ONNX files made elsewhere (`tests/goldens/onnx/make.py`), on the committed reference profile: no test here
//! depends on this machine's speed.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::program::{Ran, Workplace};

fn profile() -> String {
    format!("{}/profiles/reference/epyc-2c-avx512vnni", env!("CARGO_MANIFEST_DIR"))
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/goldens/onnx/{name}.onnx"))
}

fn plan(place: &Workplace, file: &str, more: &[&str]) -> Ran {
    let profile = profile();
    let mut args = vec!["plan", file, "--threads", "1", "--profile", &profile];
    args.extend(more);
    place.run(args)
}

/// A copy in the workplace: messages name a short path.
fn copied(place: &Workplace, name: &str) -> String {
    let file = format!("{name}.onnx");
    fs_err::copy(golden(name), place.join(&file)).unwrap();
    file
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} in {value}"))
}

#[test]
fn a_plan_in_json_adds_up_and_explains_every_layer() {
    let place = Workplace::new();
    let file = copied(&place, "resnet18");
    let result = plan(&place, &file, &["--json"]).result(0);
    let p = &result["prediction"];
    let (ms, lo, hi) = (number(p, "ms"), number(p, "lo_ms"), number(p, "hi_ms"));
    assert!(lo < ms && ms < hi && (number(p, "spread_ms") - (hi - lo) / 2.0).abs() < 1e-9);
    let terms = p["terms"].as_object().unwrap();
    let sum: f64 = terms.values().map(|v| v.as_f64().unwrap()).sum();
    assert!((sum / ms - 1.0).abs() < 0.05, "{terms:?} {ms}");
    assert!(
        p["flags"]
            .as_array()
            .unwrap()
            .iter()
            .any(|f| f.as_str().unwrap().contains("reference"))
    );
    let layers = result["per_layer"].as_array().unwrap();
    let sum: f64 = layers.iter().map(|l| number(l, "ms")).sum::<f64>() + number(&result, "rest_ms");
    assert!((sum / ms - 1.0).abs() < 1e-9, "{sum} {ms}");
    assert!(layers.is_sorted_by(|a, b| number(a, "ms") >= number(b, "ms")));
    for layer in layers {
        let bound = layer["bound_by"].as_str().unwrap();
        assert!(["launch", "layout", "memory", "compute"].contains(&bound), "{layer}");
        assert!(
            layer["note"].as_str().unwrap().len() > 40 && layer["verdicts"][0].is_string(),
            "{layer}"
        );
        assert!(layer["choices"].as_array().unwrap().len() <= 3, "{layer}");
    }
    // torch counts 1.814 G multiply-adds and 11.69 M parameters.
    assert_eq!(result["macs"], 1_814_073_344u64);
    assert!((11_600_000..11_800_000).contains(&result["params"].as_u64().unwrap()));
    assert_eq!(result["unknown"]["operators"], serde_json::json!([]));
    assert!(result["measured"].is_null());
}

#[test]
fn the_plan_for_people_fits_its_columns_and_says_why() {
    let place = Workplace::new();
    let file = copied(&place, "resnet18");
    let text = plan(&place, &file, &[]).stdout;
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    for part in [
        "predicted ",
        " ms",
        "verdict",
        "Why is it not faster?",
        "FLOP-bound",
        "layer4.",
        "Instead: ",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let few = plan(&place, &file, &["--layers", "3", "--why", "0"]).stdout;
    assert!(
        few.contains("and 21 layers of ") && few.contains("--layers 24"),
        "{few}"
    );
    assert!(!few.contains("Why is it"), "{few}");
    let in_order = plan(&place, &file, &["--in-order", "--json"]).result(0);
    assert_eq!(
        in_order["per_layer"][0]["layer"], "conv1",
        "{}",
        in_order["per_layer"][0]
    );
}

#[test]
fn batches_cost_more_and_a_file_is_planned_alike_twice() {
    let place = Workplace::new();
    let file = copied(&place, "squeezenet");
    let at = |batch: &str| plan(&place, &file, &["--batch", batch, "--json"]).result(0);
    let (one, four) = (at("1"), at("4"));
    assert_eq!(4 * one["macs"].as_u64().unwrap(), four["macs"].as_u64().unwrap());
    assert!(number(&four["prediction"], "ms") > number(&one["prediction"], "ms"));
    assert_eq!(one, at("1"));
    // Another number of threads than was measured is flagged.
    let profile = profile();
    let result = place
        .run(["plan", &file, "--threads", "7", "--profile", &profile, "--json"])
        .result(0);
    let flags = result["prediction"]["flags"].to_string();
    assert!(flags.contains("threads"), "{flags}");
    // With the time of the nearest number of threads, not with none.
    let nearest = place
        .run(["plan", &file, "--threads", "2", "--profile", &profile, "--json"])
        .result(0);
    let ratio = number(&result["prediction"], "ms") / number(&nearest["prediction"], "ms");
    assert!((0.5..2.0).contains(&ratio), "{ratio}");
}

#[test]
fn unknown_operators_are_named_with_their_share_and_refused_above_it() {
    let place = Workplace::new();
    let few = copied(&place, "unknown-few");
    let ran = plan(&place, &few, &["--json"]);
    let warnings = ran.json()["warnings"].to_string();
    assert!(
        warnings.contains("example.org.Mystery: 1 of 10 operators") && warnings.contains('%'),
        "{warnings}"
    );
    let result = ran.result(0);
    assert_eq!(result["unknown"]["operators"][0]["op"], "example.org.Mystery");
    let layers = result["per_layer"].as_array().unwrap();
    assert!(
        layers
            .iter()
            .any(|l| l["verdicts"].to_string().contains("unknown-operator")),
        "{layers:?}"
    );

    let many = copied(&place, "unknown-many");
    let error = plan(&place, &many, &["--json"]).fault(2);
    assert_eq!(error["kind"], "unknown-operators");
    assert_eq!(
        (&error["file"], &error["expected"]),
        (&many.clone().into(), &"at most 20 %".into())
    );
    assert!(
        error["message"].as_str().unwrap().contains("example.org.Mystery ×6"),
        "{error}"
    );
    assert!(error["help"].as_str().unwrap().contains("--max-unknown"), "{error}");
    assert!(
        number(
            &plan(&place, &many, &["--json", "--max-unknown", "90"]).result(0)["unknown"],
            "nodes_pct"
        ) > 39.0
    );
    assert_eq!(
        plan(&place, &few, &["--json", "--max-unknown", "1"]).fault(2)["kind"],
        "unknown-operators"
    );
}

#[test]
fn a_file_cut_short_is_refused_by_name_and_place() {
    let place = Workplace::new();
    let whole = fs_err::read(golden("resnet18")).unwrap();
    for length in [
        0,
        1,
        2,
        17,
        100,
        1000,
        5000,
        whole.len() / 2,
        whole.len() - 200,
        whole.len() - 20,
    ] {
        fs_err::write(place.join("cut.onnx"), &whole[..length]).unwrap();
        let error = plan(&place, "cut.onnx", &["--json"]).fault(2);
        assert_eq!(
            (&error["kind"], &error["file"]),
            (&"onnx".into(), &"cut.onnx".into()),
            "{length}: {error}"
        );
    }
    let error = plan(&place, "cut.onnx", &["--json"]).fault(2);
    assert!(error["message"].as_str().unwrap().contains("at byte "), "{error}");
    fs_err::write(place.join("text.onnx"), "this is no protobuf, by any reading of it").unwrap();
    assert_eq!(plan(&place, "text.onnx", &["--json"]).fault(2)["kind"], "onnx");
}

/// A changed byte may leave a network or not: the program says so either way.
#[test]
fn changed_bytes_never_panic() {
    let place = Workplace::new();
    let whole = fs_err::read(golden("unknown-few")).unwrap();
    for at in (0..whole.len()).step_by(whole.len() / 24) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xa5;
        fs_err::write(place.join("changed.onnx"), &bytes).unwrap();
        let ran = plan(&place, "changed.onnx", &["--json"]);
        assert!([0, 2].contains(&ran.code), "byte {at}: {ran:?}");
    }
}

#[test]
fn planning_needs_no_onnx_runtime_and_no_weights() {
    let place = Workplace::new();
    let file = copied(&place, "vgg11");
    let profile = profile();
    let args = ["plan", &file, "--threads", "1", "--profile", &profile, "--json"];
    let nowhere = [("COTK_ORT_LIB", "/nowhere/libonnxruntime.so")];
    assert!(number(&place.run_with(&nowhere, args).result(0)["prediction"], "ms") > 0.0);
    // Its weights lie in a file that does not exist: it can be planned, not run.
    let mut measured = args.to_vec();
    measured.push("--measure");
    let error = place.run(measured).fault(2);
    assert!(error["message"].as_str().unwrap().contains("other files"), "{error}");
}

#[test]
fn without_a_profile_the_next_command_is_named() {
    let place = Workplace::new();
    let file = copied(&place, "resnet18");
    let error = place.run(["plan", &file, "--json"]).fault(2);
    assert_eq!(error["kind"], "no-profile");
    assert!(
        error["help"].as_str().unwrap().contains("`cotk profile --quick`"),
        "{error}"
    );
}

#[test]
fn a_profile_of_another_machine_needs_force() {
    let place = Workplace::new();
    let file = copied(&place, "resnet18");
    fs_err::create_dir(place.join("other")).unwrap();
    for entry in fs_err::read_dir(profile()).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), place.join("other").join(entry.file_name())).unwrap();
    }
    let head = place.join("other/profile.toml");
    let text = fs_err::read_to_string(&head).unwrap();
    let text = text.replace("purpose = \"reference\"", "purpose = \"machine\"");
    let begin = text.find("cpu = \"").expect("a CPU");
    let end = begin + text[begin..].find('\n').expect("a line");
    fs_err::write(
        &head,
        format!("{}cpu = \"a CPU of nobody\"{}", &text[..begin], &text[end..]),
    )
    .unwrap();
    let args = ["plan", &file, "--threads", "1", "--profile", "other", "--json"];
    let error = place.run(args).fault(2);
    assert_eq!(error["kind"], "other-machine");
    assert!(
        error["message"].as_str().unwrap().contains("a CPU of nobody"),
        "{error}"
    );
    let forced = place.run(args.iter().copied().chain(["--force"])).result(0);
    assert!(
        forced["prediction"]["flags"].to_string().contains("another machine"),
        "{forced}"
    );
}

#[test]
fn wrong_arguments_are_refused() {
    let place = Workplace::new();
    let file = copied(&place, "unknown-few");
    assert_eq!(
        plan(&place, "nothing.onnx", &["--json"]).fault(2)["kind"],
        "no-such-file"
    );
    for wrong in [
        ["--batch", "0"],
        ["--max-unknown", "101"],
        ["--max-unknown", "many"],
        ["--layers", "-1"],
        ["--input-shape", "1x3x8x8"],
        ["--input-shape", "x=1x0"],
        ["--input-shape", "nobody=1x3x8x8"],
    ] {
        plan(&place, &file, &[wrong[0], wrong[1], "--json"]).fault(2);
    }
    // What memory gives now corrects our engine's operators only.
    plan(&place, &file, &["--now", "--json"]).fault(2);
}

/// A profile for a file reads it before it measures anything.
#[test]
fn a_profile_for_a_file_that_is_none_is_refused_at_once() {
    let place = Workplace::new();
    let profile = |file: &str| {
        place
            .run(["profile", "--quick", "--for", file, "--out", "p", "--json"])
            .fault(2)
    };
    assert_eq!(profile("nothing.onnx")["kind"], "no-such-file");
    fs_err::write(place.path().join("cut.onnx"), [0x08, 0x08, 0x12]).unwrap();
    assert!(profile("cut.onnx")["message"].as_str().unwrap().contains("cut.onnx"));
}

/// Networks of every family of layers, f32 and both int8 forms, as torch and onnxruntime export them.
#[test]
fn every_export_is_planned_whole() {
    let place = Workplace::new();
    for name in [
        "tiny",
        "tiny-dynamo",
        "tiny-qdq",
        "tiny-qlinear",
        "mobilenet-v2",
        "mobilenet-v3-small",
        "vgg11",
    ] {
        let file = copied(&place, name);
        let result = plan(&place, &file, &["--json"]).result(0);
        let ms = number(&result["prediction"], "ms");
        let layers = result["per_layer"].as_array().unwrap();
        let sum: f64 = layers.iter().map(|l| number(l, "ms")).sum::<f64>() + number(&result, "rest_ms");
        assert!(ms > 0.0 && (sum / ms - 1.0).abs() < 1e-9, "{name}: {sum} {ms}");
        assert_eq!(number(&result["unknown"], "nodes_pct"), 0.0, "{name}");
        let text = plan(&place, &file, &[]).stdout;
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }
}

/// HardSwish has no int8 form: what is dequantized before it and quantized behind it is laid at its door.
#[test]
fn an_f32_island_is_named_as_the_reason_of_its_edges() {
    let place = Workplace::new();
    let file = copied(&place, "tiny-qdq");
    let result = plan(&place, &file, &["--json"]).result(0);
    let layers = result["per_layer"].as_array().unwrap();
    let edges = layers.iter().flat_map(|l| l["edges"].as_array().unwrap());
    let dequantize = edges.filter(|e| e["kind"] == "dequantize");
    let names: Vec<&str> = dequantize.map(|e| e["because_of"].as_str().unwrap()).collect();
    assert!(names.iter().any(|n| n.starts_with("HardSwish")), "{names:?}");
}

#[test]
fn a_measured_time_stands_beside_the_prediction_and_never_enters_it() {
    let place = Workplace::new();
    let file = copied(&place, "tiny");
    let bare = plan(&place, &file, &["--json"]).result(0);
    let both = plan(&place, &file, &["--json", "--measure"]).result(0);
    assert_eq!(bare["prediction"], both["prediction"]);
    let measured = number(&both["measured"], "ms");
    let ratio = number(&both["measured"], "predicted_over_measured");
    assert!(measured > 0.0 && (ratio * measured / number(&both["prediction"], "ms") - 1.0).abs() < 1e-9);
    // Another batch than the export's own is run too.
    assert!(
        number(
            &plan(&place, &file, &["--json", "--measure", "--batch", "3"]).result(0)["measured"],
            "ms"
        ) > 0.0
    );
}
