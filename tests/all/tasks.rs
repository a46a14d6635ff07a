//! `cotk eval --tasks` on the committed tiny checkpoint and its task files: the JSON form, the reference beside it,
//! and files that cannot be scored.

use serde_json::Value;

use crate::program::{Workplace, in_repository, tiny_model};

fn tasks() -> String {
    let path = in_repository("data/tiny-qwen2moe/tasks");
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn tasks_have_the_promised_form() {
    let place = Workplace::new();
    let (tiny, folder) = (tiny_model(), tasks());
    let found = place.run(["eval", &tiny, "--tasks", &folder, "--json"]).result(0);
    assert!(found["perplexity"].is_null() && found["tokens"].is_null() && found["reference"].is_null());
    let tasks = found["tasks"].as_array().unwrap();
    let of = |key: &str| tasks.iter().map(|t| t[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("name"), ["choice", "cloze", "pair"]);
    assert_eq!(of("rule"), ["per-byte", "greedy", "per-byte"]);
    assert_eq!(of("items"), [60, 40, 40]);
    assert_eq!(of("chance"), [0.25, 0.0, 0.5]);
    for task in tasks {
        let number = |value: &Value| value.as_f64().unwrap();
        let accuracy = number(&task["accuracy"]);
        let [lo, hi] = [0, 1].map(|i| number(&task["accuracy_ci95"][i]));
        assert!(
            lo <= accuracy && accuracy <= hi && lo > number(&task["chance"]),
            "{task}"
        );
        assert_eq!(task["measures"][0]["accuracy"], task["accuracy"]);
        let parts: u64 = (task["parts"].as_array().unwrap().iter())
            .map(|p| p["items"].as_u64().unwrap())
            .sum();
        assert_eq!(parts, task["items"].as_u64().unwrap());
        assert!(task["reference"].is_null());
    }

    let file = format!("{folder}/pair.jsonl,{folder}/cloze.jsonl");
    let args = [
        "eval",
        &tiny,
        "--tasks",
        &file,
        "--max-items",
        "7",
        "--reference",
        &tiny,
    ];
    let found = place.run(args.iter().chain(&["--json"])).result(0);
    assert_eq!(
        (&found["tasks"][0]["name"], &found["tasks"][1]["items"]),
        (&"pair".into(), &7.into())
    );
    for task in found["tasks"].as_array().unwrap() {
        assert_eq!(task["reference"]["agreement"], 1.0, "a model agrees with itself");
        assert_eq!(task["reference"]["accuracy"], task["accuracy"]);
    }
    let ran = place.run(args);
    assert!(
        ran.code == 0 && ran.stdout.contains("greedy") && ran.stdout.lines().all(|l| l.chars().count() <= 100),
        "{ran:?}"
    );
}

#[test]
fn text_and_tasks_stand_in_one_result_and_a_model_shares_every_choice_with_itself() {
    let place = Workplace::new();
    let (tiny, folder) = (tiny_model(), tasks());
    let text = in_repository("data/tiny-qwen2moe/heldout.txt");
    let args = [
        "eval",
        &tiny,
        "--tasks",
        &folder,
        "--max-items",
        "3",
        "--reference",
        &tiny,
        "--json",
    ];
    let text = ["--text", text.to_str().unwrap(), "--max-tokens", "300"];
    let found = place.run(args.iter().chain(&text)).result(0);
    assert_eq!(
        (&found["tokens"], found["tasks"].as_array().unwrap().len()),
        (&300.into(), 3)
    );
    assert_eq!(found["reference"]["routing_overlap"], 1.0);
}

#[test]
fn what_cannot_be_scored_is_refused_with_its_place() {
    let place = Workplace::new();
    let tiny = tiny_model();
    let long = "cat ".repeat(400);
    let long = format!("{{\"context\": \"{long}\", \"target\": \" dog\"}}");
    for (line, key, says) in [
        (
            "{\"context\": \"a\", \"endings\": [], \"label\": 0}",
            "endings",
            "0 of them",
        ),
        (
            "{\"context\": \"a\", \"ending\": \"b\"}",
            "endings",
            "only context, ending",
        ),
        ("{\"context\": \"a\", \"target\": 5}", "target", "5"),
        (&long, "context", "tokens with its ending"),
    ] {
        fs_err::write(place.join("t.jsonl"), line).unwrap();
        let error = place.run(["eval", &tiny, "--tasks", "t.jsonl", "--json"]).fault(2);
        assert_eq!(error["kind"], "task-item", "{error}");
        assert_eq!(
            (&error["file"], &error["key"]),
            (&"t.jsonl".into(), &key.into()),
            "{error}"
        );
        assert!(error["found"].as_str().unwrap().contains(says), "{error}");
        assert!(error["help"].as_str().unwrap().contains("line 1"), "{error}");
    }
    fs_err::write(place.join("t.jsonl"), "{\"context\": \"a\"").unwrap();
    let error = place.run(["eval", &tiny, "--tasks", "t.jsonl", "--json"]).fault(2);
    assert_eq!(
        (&error["kind"], &error["found"]),
        (&"task-line".into(), &"line 1".into())
    );
    fs_err::create_dir(place.join("empty")).unwrap();
    let error = place.run(["eval", &tiny, "--tasks", "empty", "--json"]).fault(2);
    assert!(error["message"].as_str().unwrap().contains("*.jsonl"), "{error}");
    for args in [
        ["eval", &tiny, "--json"].as_slice(),
        &["eval", &tiny, "--max-items", "3", "--text", "t.jsonl", "--json"],
    ] {
        assert_eq!(place.run(args).fault(2)["kind"], "usage");
    }
    let error = place
        .run(["eval", &tiny, "--tasks", "t.jsonl", "--window", "9", "--json"])
        .fault(2);
    assert_eq!(error["kind"], "usage");
}
