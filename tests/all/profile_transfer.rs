//! `cotk profile --from`: another profile carried over by a few networks, and what it refuses.

use serde_json::Value;

use crate::program::{Workplace, in_repository};

fn reference() -> String {
    in_repository("profiles/reference/epyc-2c-avx512vnni")
        .display()
        .to_string()
}

#[test]
fn three_networks_carry_a_profile_over() {
    let place = Workplace::new();
    let args = [
        "profile",
        "--from",
        &reference(),
        "--samples",
        "3",
        "--threads",
        "1",
        "--out",
        "here",
        "--json",
    ];
    let ran = place.run(args.map(str::to_owned));
    let result = ran.result(0);
    let transfer = &result["transfer"];
    assert_eq!(
        (&transfer["threads"], &transfer["networks"]),
        (&Value::from(1), &Value::from(3)),
        "{result}"
    );
    assert!(
        transfer["scales"]
            .as_object()
            .is_some_and(|s| s.values().all(|v| v.as_f64().is_some_and(|v| v > 0.0)))
    );
    assert!(result["heldout"].is_null());
    // What it rests on is listed by name, in the profile too.
    let networks = result["networks"].as_array().expect("a list");
    assert_eq!(networks.len(), 3);
    let head = fs_err::read_to_string(place.join("here/profile.toml")).expect("it was written");
    for network in networks {
        for ms in ["source_ms", "measured_ms", "predicted_ms"] {
            assert!(network[ms].as_f64().is_some_and(|ms| ms > 0.0), "{network}");
        }
        let name = network["name"].as_str().expect("a name");
        assert!(head.contains(&format!("network = \"{name}\"")), "{name}");
    }
    // What was carried over may be carried over again, but nothing else is overwritten by it.
    let again = place.run(args.map(str::to_owned));
    assert_eq!(again.result(0)["transfer"]["networks"], 3);
}

#[test]
fn a_measured_profile_is_not_overwritten_and_wrong_use_is_told() {
    let place = Workplace::new();
    let run = |args: &[&str]| {
        let args = [&["profile"][..], args, &["--json"]].concat();
        place.run(args.into_iter().map(str::to_owned))
    };
    let own = run(&["--from", &reference(), "--out", &reference()]).fault(2);
    assert!(
        own["message"]
            .as_str()
            .is_some_and(|m| m.contains("operator by operator")),
        "{own}"
    );
    let missing = run(&["--from", "nowhere", "--out", "here"]);
    assert!(
        missing.fault(missing.code)["message"]
            .as_str()
            .is_some_and(|m| m.contains("nowhere"))
    );
    for args in [
        &["--from", "x", "--samples", "2"][..],
        &["--from", "x", "--samples", "many"],
        &["--samples", "10"],
        &["--from", "x", "--quick"],
    ] {
        run(args).fault(2);
    }
    assert!(!place.join("here").exists());
}
