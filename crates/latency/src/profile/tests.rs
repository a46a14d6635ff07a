//! Laws of profiles on disk: round trips, damage by line, whose machine it is.

use super::*;
use crate::fit::fit;
use crate::graph::Numerics;
use crate::predict::CostModel;
use crate::work::{
    AttentionKey, Context, ConvKey, DenseKey, ExpertKey, GlueKey, Heat, LinearKey, PlaneKey, ReadKey, Tier, Work,
};

fn keys() -> Vec<Key> {
    let conv = |c, h, numerics, context| {
        Key::Conv(ConvKey {
            batch: 1,
            cin: c,
            cout: 2 * c,
            kernel: 3,
            stride: 2,
            groups: 1,
            height: h,
            width: h,
            numerics,
            threads: 1,
            context,
        })
    };
    let plane = PlaneKey {
        batch: 1,
        channels: 16,
        height: 8,
        width: 8,
        numerics: Numerics::F32,
        threads: 2,
    };
    let expert = ExpertKey {
        hidden: 512,
        inner: 256,
        bits: 4,
        planes: 2,
        group: 32,
        rank: 16,
        experts: 4,
        tokens: 1,
        threads: 2,
        heat: Heat::Cold,
    };
    let read = ReadKey {
        tier: Tier::Memory,
        bytes: 1 << 28,
        threads: 1,
    };
    let linear = LinearKey {
        batch: 1,
        inputs: 64,
        outputs: 10,
        numerics: Numerics::Int8,
        threads: 1,
    };
    let mut keys = vec![
        Key::Session { threads: 1 },
        Key::Linear(linear),
        Key::Expert(expert),
        Key::Expert(ExpertKey { rank: 0, ..expert }),
        Key::Dense(DenseKey {
            inputs: 64,
            outputs: 48,
            bits: 8,
            group: 32,
            tokens: 3,
            threads: 2,
            heat: Heat::Hot,
        }),
        Key::Attention(AttentionKey {
            heads: 8,
            kv_heads: 2,
            head_dim: 32,
            value_dim: 24,
            values_in_keys: true,
            kv_bits: 16,
            keys: 100,
            tokens: 1,
            sequences: 2,
            threads: 1,
            heat: Heat::Cold,
        }),
        Key::Glue(GlueKey {
            hidden: 64,
            experts: 8,
            top_k: 2,
            inner: 0,
            tokens: 1,
            threads: 1,
        }),
        Key::Read(read),
    ];
    keys.extend([Key::Add(plane), Key::GlobalAvgPool(plane), Key::Entry(plane)]);
    for c in [16, 32, 48] {
        for h in [8, 16] {
            keys.push(conv(c, h, Numerics::Int8, Context::Chain));
            keys.push(conv(c, h, Numerics::F32, Context::Alone));
        }
    }
    keys
}

pub(crate) fn profile() -> Profile {
    let row = |(key, i): (Key, u32)| Row {
        key,
        sessions: 3,
        count: 60 + i,
        median_us: 10.0 + f64::from(i) / 3.0,
        q10_us: 9.9,
        mad_us: 0.1,
        taken: match i % 3 {
            0 => Taken::default(),
            _ => Taken {
                dropped: Some(i),
                is_quiet: Some(i % 2 == 0),
                steal_pct: Some(f64::from(i) / 7.0),
                lost_pct: Some(0.0),
                switches: Some(3),
            },
        },
    };
    let rows: Vec<Row> = keys().into_iter().zip(0..).map(row).collect();
    let samples: Vec<Sample> = rows.iter().map(Row::sample).collect();
    let identity = Identity::here(BTreeMap::new());
    let fits = fit(&samples, identity.block(), 0.02);
    let heldout = vec![HeldOut {
        key: Key::Session { threads: 1 },
        predicted_us: 10.0,
        lo_us: 9.0,
        hi_us: 11.0,
        measured_us: 10.5,
        repeat_us: Some(0.25),
        coeffs: Some(0xdead_beef),
    }];
    Profile {
        head: Head {
            format: Profile::FORMAT,
            purpose: Purpose::Machine,
            provenance: Provenance {
                date: "2026-11-21T00:00:00Z".into(),
                cotk_version: "0.1.0".into(),
                commit: None,
                seed: 0,
                quick: true,
                seconds: 1.5,
            },
            identity,
            noise: Noise {
                floor_pct: 1.0,
                p90_pct: 2.0,
                steal_pct: 0.0,
                verdict: Verdict::Good,
                canaries: vec!["session, 1 threads".into()],
            },
            transfer: None,
            carried: vec![Carried {
                network: "dense 3".into(),
                threads: 2,
                source_ms: 1.5,
                measured_ms: 1.25,
                repeat_ms: 0.01,
                predicted_ms: 1.3,
            }],
            good_for: GoodFor::default(),
            conditions: Conditions {
                levels: vec![Level {
                    threads: 1,
                    bytes: Some(1 << 15),
                    gb_per_s: 90.5,
                }],
                facts: BTreeMap::from([("disk".into(), "direct reads".into())]),
                ..Conditions::here()
            },
            left_out: vec![LeftOut {
                path: "add.f32/t1".into(),
                key: "add 8 at 8x8".into(),
                median_us: 0.01,
                mad_us: 0.2,
                is_heldout: true,
            }],
            edited: None,
            files: BTreeMap::new(),
        },
        rows,
        fits,
        calibrations: Vec::new(),
        corrections: Vec::new(),
        heldout,
        networks: Vec::new(),
    }
}

fn saved() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("machine");
    profile().save(&folder).unwrap();
    (dir, folder)
}

#[test]
fn what_is_saved_loads_to_the_same_predictions() {
    let (dir, folder) = saved();
    let loaded = Profile::load(&folder).unwrap();
    let original = profile();
    assert_eq!(loaded.rows, original.rows);
    assert_eq!(loaded.heldout, original.heldout);
    assert_eq!(loaded.head.good_for, original.good_for());
    for key in keys() {
        let work = Work::Operator(key);
        let (a, b) = (
            loaded.model(&[]).predict(&work).unwrap(),
            original.model(&[]).predict(&work).unwrap(),
        );
        assert_eq!(a, b, "{key}");
    }
    // Again over itself: nothing is left beside it.
    loaded.save(&folder).unwrap();
    assert_eq!(Profile::load(&folder).unwrap().rows, loaded.rows);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_edited_line_is_refused_by_its_number() {
    let (_dir, folder) = saved();
    let file = folder.join("timings.csv");
    let text = files::read_text(&file, LIMIT_BYTES).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines[4] = lines[4].replacen(",63,", ",64,", 1);
    files::write_atomic(&file, (lines.join("\n") + "\n").as_bytes()).unwrap();
    let error = Profile::load(&folder).unwrap_err().to_string();
    assert!(error.contains("timings.csv:5: checksum"), "{error}");
}

/// Law: cut anywhere, each file is refused with a message, never read as something smaller.
#[test]
fn a_cut_file_is_refused_at_every_length() {
    let (_dir, folder) = saved();
    for name in ["timings.csv", "heldout.csv", "coeffs.toml", "profile.toml"] {
        let file = folder.join(name);
        let whole = files::read(&file, LIMIT_BYTES).unwrap();
        for cut in (0..whole.len()).step_by(31).chain([whole.len() - 1]) {
            files::write_atomic(&file, &whole[..cut]).unwrap();
            let error = Profile::load(&folder).unwrap_err().to_string();
            assert!(error.contains(name), "{name} at {cut}: {error}");
        }
        files::write_atomic(&file, &whole).unwrap();
    }
}

#[test]
fn wrong_cells_are_named() {
    let check = |from: &str, to: &str, expect: &str| {
        let (_dir, folder) = saved();
        let file = folder.join("timings.csv");
        let text = files::read_text(&file, LIMIT_BYTES).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let at = lines.iter().position(|l| l.contains(from)).unwrap();
        let body = lines[at].rsplit_once(',').unwrap().0.replacen(from, to, 1);
        let sum = format!("{:08x}", files::checksum(body.as_bytes()) >> 32);
        lines[at] = format!("{body},{sum}");
        files::write_atomic(&file, (lines.join("\n") + "\n").as_bytes()).unwrap();
        let error = Profile::load(&folder).unwrap_err().to_string();
        assert!(
            error.contains(&format!("timings.csv:{}", at + 1)) && error.contains(expect),
            "{error}"
        );
    };
    check("session,", "sesion,", "`operator`: found `sesion`");
    check(
        "conv,1,16,32",
        "conv,1,-16,32",
        "`cin`: found `-16`, expected a whole number above 0",
    );
    check("conv,1,16,32", "conv,1,0,32", "`cin`: found `0`");
    check(",60,10,9.9,", ",60,nan,9.9,", "`median_us`: found `nan`");
    check(",60,10,9.9,", ",60,1e13,9.9,", "`median_us`: found `1e13`");
    check(
        ",1,false,0.",
        ",1,perhaps,0.",
        "`quiet`: found `perhaps`, expected true or false, or nothing",
    );
    check(",1,false,0.", ",1,false,-0.", "`steal_pct`: found `-0.");
    check(",int8,", ",int4,", "`numerics`: found `int4`, expected f32, int8");
    check("conv,1,16,32", "conv,1,16,32,5", "cells: found");
}

#[test]
fn another_machine_needs_force_and_a_reference_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let here = Identity::here(BTreeMap::new());
    let mut other = profile();
    other.head.identity.cores += 6;
    let folder = dir.path().join("other");
    other.save(&folder).unwrap();
    let request = |force| Request {
        flag: Some(folder.clone()),
        recipe: None,
        force,
    };
    let error = find(&request(false), &here).unwrap_err().to_string();
    assert!(
        error.contains(&format!("cores is {} there, {} here", here.cores + 6, here.cores)),
        "{error}"
    );
    assert_eq!(find(&request(true), &here).unwrap().flags, [Flag::OtherMachine]);
    other.head.purpose = Purpose::Reference;
    other.save(&folder).unwrap();
    let found = find(&request(false), &here).unwrap();
    assert!(found.flags.is_empty() && found.model().flags().contains(&Flag::Reference));
}

#[test]
fn a_missing_profile_names_the_places() {
    let here = Identity::here(BTreeMap::new());
    let request = Request {
        flag: Some("/nowhere/profile".into()),
        ..Request::default()
    };
    assert!(
        find(&request, &here)
            .unwrap_err()
            .to_string()
            .contains("/nowhere/profile")
    );
}

#[test]
fn verdicts_follow_the_floor() {
    assert_eq!(Verdict::of(1.9, 0.0), Verdict::Good);
    assert_eq!(Verdict::of(3.0, 0.0), Verdict::Usable);
    assert_eq!(Verdict::of(1.0, 4.0), Verdict::Noisy);
    assert_eq!(Verdict::of(f64::NAN, 0.0), Verdict::Noisy);
}
