//! Laws of profiles that are edited, and of several writers and readers at once.

use super::tests::profile;
use super::*;
use crate::predict::CostModel;

fn saved() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("machine");
    profile().save(&folder).unwrap();
    (dir, folder)
}

fn edit(file: &FilePath, change: impl Fn(&str) -> String) {
    let text = files::read_text(file, LIMIT_BYTES).unwrap();
    let changed = change(&text);
    assert_ne!(text, changed, "nothing was edited");
    files::write_atomic(file, changed.as_bytes()).unwrap();
}

fn line_of(file: &FilePath, what: &str) -> usize {
    let text = files::read_text(file, LIMIT_BYTES).unwrap();
    1 + text.lines().position(|line| line.contains(what)).unwrap()
}

#[test]
fn an_edited_coefficient_is_refused_by_its_line() {
    let (_dir, folder) = saved();
    let file = folder.join("coeffs.toml");
    let line = line_of(&file, "us_per_unit");
    edit(&file, |text| text.replacen("us_per_unit = ", "us_per_unit = 1", 1));
    let error = Profile::load(&folder).unwrap_err().to_string();
    assert!(
        error.contains(&format!("coeffs.toml:{line}: line: found `us_per_unit")),
        "{error}"
    );
}

#[test]
fn an_edited_held_out_row_is_refused_by_its_line() {
    let (_dir, folder) = saved();
    let file = folder.join("heldout.csv");
    edit(&file, |text| text.replacen(",10.5,", ",10.1,", 1));
    let error = Profile::load(&folder).unwrap_err().to_string();
    assert!(error.contains("heldout.csv:2: checksum of the line"), "{error}");
}

/// What it says of the machine may be corrected by hand; that it was stays with every prediction.
#[test]
fn an_edited_head_is_said_with_every_prediction() {
    let (_dir, folder) = saved();
    let file = folder.join("profile.toml");
    let line = line_of(&file, "cores = ");
    edit(&file, |text| text.replacen("cores = ", "cores = 1", 1));
    let loaded = Profile::load(&folder).unwrap();
    let flag = Flag::Edited { line: line as u64 };
    assert!(loaded.model(&[]).flags().contains(&flag), "{:?}", loaded.head.edited);
    let prediction = loaded
        .model(&[])
        .predict(&crate::work::Work::Operator(loaded.rows[0].key))
        .unwrap();
    assert!(prediction.flags.contains(&flag));
    // A key that there is none of is refused with line and caret.
    edit(&file, |text| text.replacen("cores = ", "corse = ", 1));
    let error = Profile::load(&folder).unwrap_err().to_string();
    assert!(
        error.contains("profile.toml") && error.contains(&format!("line {line}")) && error.contains("corse"),
        "{error}"
    );
}

#[test]
fn another_format_is_refused_by_its_number() {
    let (_dir, folder) = saved();
    let format = format!("format = {}", Profile::FORMAT);
    edit(&folder.join("profile.toml"), |text| {
        text.replacen(&format, "format = 2", 1)
    });
    let error = Profile::load(&folder).unwrap_err().to_string();
    assert!(
        error.contains("format 2, expected") && error.contains("cotk profile"),
        "{error}"
    );
}

/// Law: no byte of any file can change unnoticed.
#[test]
fn every_changed_byte_is_refused_or_said() {
    let (_dir, folder) = saved();
    let original = Profile::load(&folder).unwrap();
    for name in ["timings.csv", "heldout.csv", "coeffs.toml", "profile.toml"] {
        let file = folder.join(name);
        let whole = files::read(&file, LIMIT_BYTES).unwrap();
        for at in (0..whole.len()).step_by(37) {
            let mut bytes = whole.clone();
            bytes[at] ^= 2;
            files::write_atomic(&file, &bytes).unwrap();
            if let Ok(loaded) = Profile::load(&folder) {
                assert!(
                    name == "profile.toml" && loaded.head.edited.is_some(),
                    "{name}, byte {at}"
                );
            }
        }
        files::write_atomic(&file, &whole).unwrap();
    }
    assert_eq!(Profile::load(&folder).unwrap(), original);
}

/// Law: writers take turns, so that nothing that one of them added is lost; readers find a whole profile at every moment.
#[test]
fn writers_take_turns_and_readers_never_wait() {
    let (dir, folder) = saved();
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let folder = &folder;
            scope.spawn(move || {
                for turn in 0..5 {
                    let name = format!("{writer} {turn}");
                    Profile::update(folder, |profile| {
                        profile.head.noise.canaries.push(name);
                        Ok::<_, Error>(())
                    })
                    .unwrap();
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..40 {
                    Profile::load(&folder).unwrap();
                }
            });
        }
    });
    assert_eq!(Profile::load(&folder).unwrap().head.noise.canaries.len(), 1 + 4 * 5);
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "nothing is left beside it"
    );
}

#[test]
fn a_change_that_fails_leaves_the_old_profile() {
    let (_dir, folder) = saved();
    let before = Profile::load(&folder).unwrap();
    let failed = Profile::update(&folder, |profile| {
        profile.rows.clear();
        Err::<(), _>(Error::NoProfile { looked_at: Vec::new() })
    });
    assert!(failed.is_err());
    assert_eq!(Profile::load(&folder).unwrap(), before);
}

#[test]
fn held_out_rows_name_the_coefficients_that_they_judge() {
    let mut judged = profile();
    judged.heldout[0].coeffs = Some(judged.coeffs_checksum());
    let summary = judged.heldout_summary().unwrap();
    assert!(summary.is_of_these_coefficients);
    assert_eq!((summary.covered_pct, summary.within_15_pct), (100.0, 100.0));
    assert!((summary.repeat_pct.unwrap() - 100.0 * 0.25 / 10.5).abs() < 1e-9);
    judged.fits[0].coefficients[0].us_per_unit += 1.0;
    assert!(!judged.heldout_summary().unwrap().is_of_these_coefficients);
}
