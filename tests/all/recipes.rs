//! Every embedded recipe is the committed one and parses; what is not known is refused with the nearest known key.

use crate::program::{Workplace, in_repository, tiny_model};

/// The committed recipes: name and text.
fn recipes() -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = std::fs::read_dir(in_repository("recipes"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .map(|path| {
            (
                path.file_stem().unwrap().to_string_lossy().into_owned(),
                fs_err::read_to_string(path).unwrap(),
            )
        })
        .collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

fn is_search(text: &str) -> bool {
    text.contains("[search]") || text.contains("[space]")
}

/// The command that reads a recipe and then stops: a plan, or a model that is not there.
fn args(recipe: &str, text: &str) -> Vec<String> {
    let tiny = tiny_model();
    let args: &[&str] = if is_search(text) {
        &["search", recipe, "--dry-run", "--json"]
    } else {
        &[
            "compress",
            "--moe",
            &tiny,
            "-o",
            "out",
            "--recipe",
            recipe,
            "--calibration",
            "nowhere.txt",
            "--json",
        ]
    };
    args.iter().map(|arg| (*arg).to_owned()).collect()
}

#[test]
fn an_unknown_key_in_any_table_is_refused_with_its_line() {
    let place = Workplace::new();
    for (name, text) in recipes() {
        if is_search(&text) && cfg!(not(feature = "search")) {
            continue; // the trainer reads it; the law holds where it is built
        }
        let lines: Vec<&str> = text.lines().collect();
        let heads = (0..lines.len()).filter(|&at| lines[at].starts_with('[') && !lines[at].starts_with("[["));
        for at in heads.map(|at| at + 1).chain([0]) {
            let mut wrong = lines.clone();
            wrong.insert(at, "zebra_stripes = 3");
            fs_err::write(place.join("wrong.toml"), wrong.join("\n")).unwrap();
            let error = place.run(args("wrong.toml", &text)).fault(2);
            assert_eq!(error["key"], "zebra_stripes", "{name}, line {}: {error}", at + 1);
            let message = error["message"].as_str().unwrap();
            assert!(
                message.contains("wrong.toml") && message.contains(&format!("line {}", at + 1)),
                "{message}"
            );
        }
        // A slip of the pen gets its nearest key.
        let (key, _) = lines
            .iter()
            .find_map(|line| line.split_once(" = ").filter(|(k, _)| k.len() > 5))
            .unwrap();
        let slip = text.replacen(&format!("{key} ="), &format!("{}x =", &key[..key.len() - 1]), 1);
        fs_err::write(place.join("wrong.toml"), slip).unwrap();
        let error = place.run(args("wrong.toml", &text)).fault(2);
        assert!(
            error["help"]
                .as_str()
                .is_some_and(|help| help.contains(&format!("`{key}`"))),
            "{name}: {error}"
        );
    }
}

#[test]
fn a_recipe_is_found_by_its_bare_name_and_a_missing_one_lists_them() {
    let place = Workplace::new();
    for (name, text) in recipes() {
        if is_search(&text) && cfg!(not(feature = "search")) {
            continue;
        }
        let ran = place.run(args(&name, &text));
        if is_search(&text) {
            assert!(
                ran.result(0)["plan"].is_object() || ran.result(0)["plan"].is_array(),
                "{ran:?}"
            );
        } else {
            // Past the recipe: what is missing is the calibration text.
            assert!(
                ran.fault(2)["message"].as_str().unwrap().contains("nowhere.txt"),
                "{ran:?}"
            );
        }
        let error = place.run(args("no-such-recipe", &text)).fault(2);
        assert!(error["message"].as_str().unwrap().contains(&name), "{error}");
    }
}
