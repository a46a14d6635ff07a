//! Laws of measuring: operators and clocks of the test's own in, medians and noise out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cotk_run::cancel::Cancel;
use cotk_run::progress::Silent;
use cotk_run::seeds::Seeds;
use rand::RngExt;

use super::disk::DiskProbe;
use super::gather::{InProcess, Job, Runner, Settings, Subject, Tools};
use super::measure::{Plan, Wanted, With, measure};
use super::memory::MemoryProbe;
use super::rounds::Pace;
use super::*;
use crate::graph::Numerics;
use crate::identity::Identity;
use crate::profile::{Profile, Purpose};
use crate::work::{LinearKey, Tier};

/// A made-up machine: a linear layer costs 5 µs and 1 µs per 1,000 weights, waited for by the clock.
struct Clockwork {
    runs: Arc<AtomicU32>,
    cancel_at: Option<(u32, Cancel)>,
}

fn us(key: &Key) -> f64 {
    let Key::Linear(l) = key else { panic!("{key}") };
    5.0 + f64::from(l.inputs * l.outputs) / 1000.0
}

impl Probe for Clockwork {
    fn name(&self) -> &str {
        "clockwork"
    }
    fn candidates(&self, count: usize, rng: &mut Stream) -> Vec<Key> {
        let mut key = || {
            Key::Linear(LinearKey {
                batch: 1,
                inputs: rng.random_range(16..400),
                outputs: rng.random_range(16..400),
                numerics: Numerics::F32,
                threads: 1,
            })
        };
        (0..count).map(|_| key()).collect()
    }
    fn measures(&self, key: &Key) -> bool {
        matches!(key, Key::Linear(_))
    }
    fn prepare(&self, key: &Key, _session: u32) -> Result<Box<dyn Prepared>> {
        if let Some((at, cancel)) = &self.cancel_at
            && self.runs.fetch_add(1, Ordering::Relaxed) + 1 == *at
        {
            cancel.cancel();
        }
        self.runs
            .fetch_add(u32::from(self.cancel_at.is_none()), Ordering::Relaxed);
        Ok(Box::new(Wait(us(key))))
    }
}

/// Two pieces, of which one is the overhead that the other has too.
struct Wait(f64);

impl Prepared for Wait {
    fn weights(&self) -> Vec<f64> {
        vec![1.0, -1.0]
    }
    fn run(&mut self, piece: usize) -> Result<()> {
        let until = if piece == 0 { self.0 + 10.0 } else { 10.0 };
        let begin = Instant::now();
        while begin.elapsed().as_secs_f64() * 1e6 < until {}
        Ok(())
    }
}

const PACE: Pace = Pace {
    rounds: 3,
    slice: Duration::from_micros(50),
    patience: Duration::ZERO,
};

const HERE: With<'static> = With {
    runner: &InProcess,
    networks: None,
};

fn plan() -> Plan {
    Plan {
        settings: Settings {
            sessions: 2,
            per_path: 0,
            pace: PACE,
            network_pace: PACE,
            budget: None,
        },
        seeds: Seeds::new(7),
        quick: true,
        purpose: Purpose::Machine,
        identity: Identity::here(BTreeMap::new()),
        cotk_version: "0".into(),
        commit: None,
        networks: Vec::new(),
        canaries: Vec::new(),
    }
}

fn wanted(cancel_at: Option<(u32, Cancel)>) -> (Vec<Wanted>, Arc<AtomicU32>) {
    let runs = Arc::new(AtomicU32::new(0));
    let probe = Clockwork {
        runs: Arc::clone(&runs),
        cancel_at,
    };
    let probe = Box::new(probe);
    (
        vec![Wanted {
            probe,
            table: 20,
            heldout: 5,
            live: 4,
            adapt: false,
        }],
        runs,
    )
}

#[test]
fn a_machine_of_known_times_is_measured_fitted_and_judged() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("machine");
    let measured = measure(wanted(None).0, &plan(), HERE, &folder, &Cancel::new(), &Silent).unwrap();
    assert_eq!((measured.profile.rows.len(), measured.profile.heldout.len()), (20, 5));
    // Not that it is quiet here: only that rows are the keys' own times and not each other's.
    let ranks = |values: Vec<f64>| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
        order
    };
    let (found, truth): (Vec<f64>, Vec<f64>) = measured.profile.rows.iter().map(|r| (r.median_us, us(&r.key))).unzip();
    let agree = ranks(found)
        .into_iter()
        .zip(ranks(truth))
        .filter(|(a, b)| a == b)
        .count();
    assert!(agree >= 5, "{agree} of 20 in the same place");
    for held in &measured.profile.heldout {
        assert!(!measured.profile.rows.iter().any(|r| r.key == held.key), "{}", held.key);
        assert!(held.lo_us <= held.predicted_us && held.predicted_us <= held.hi_us);
    }
    assert_eq!(Profile::load(&folder).unwrap().rows, measured.profile.rows);
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "nothing is left beside it"
    );
}

#[test]
fn an_interrupted_measurement_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("machine");
    let cancel = Cancel::new();
    let error = measure(
        wanted(Some((10, cancel.clone()))).0,
        &plan(),
        HERE,
        &folder,
        &cancel,
        &Silent,
    )
    .err()
    .unwrap();
    assert!(matches!(error, Error::Run(cotk_run::Error::Cancelled)), "{error}");
    assert!(!folder.exists());
    let (again, runs) = wanted(None);
    let measured = measure(again, &plan(), HERE, &folder, &Cancel::new(), &Silent).unwrap();
    assert!(measured.resumed >= 8, "{}", measured.resumed);
    // Two sessions a key and a third where they disagree; what the journal has is not run again.
    let most = 3 * (20 + 5) - u32::try_from(measured.resumed).unwrap();
    let ran = runs.load(Ordering::Relaxed);
    assert!(ran <= most, "{ran} of at most {most}");
    assert_eq!(measured.profile.rows.len(), 20);
    // Another seed has other keys: times do not mix.
    let other = Plan {
        seeds: Seeds::new(8),
        ..plan()
    };
    let measured = measure(wanted(None).0, &other, HERE, &folder, &Cancel::new(), &Silent).unwrap();
    assert_eq!(measured.resumed, 0);
}

/// One measurement of a made-up machine, in a process of its own: what fails there is said on its standard error. By itself
/// it measures nothing.
#[test]
fn measured_in_a_process() {
    let Some(folder) = std::env::var_os("COTK_TEST_FOLDER") else {
        return;
    };
    let mut wanted = wanted(None).0;
    (wanted[0].table, wanted[0].heldout) = (4, 2);
    measure(wanted, &plan(), HERE, folder.as_ref(), &Cancel::new(), &Silent).unwrap();
}

/// Law: whichever operation on files fails, the profile is whole or not there, and the same command again makes it whole.
#[test]
fn full_disks_leave_things_whole_and_a_restart_finishes() {
    let run = |folder: &std::path::Path, fault: &str| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "probe::tests::measured_in_a_process"]);
        command.env("COTK_TEST_FOLDER", folder).env("COTK_IO_FAULT", fault);
        command.output().unwrap()
    };
    std::thread::scope(|scope| {
        for op in ["write", "sync", "rename", "open"] {
            scope.spawn(move || {
                let mut faults = 0;
                for doubling in 0..8 {
                    let fault = format!("{op}:{}", 1u32 << doubling);
                    let dir = tempfile::tempdir().unwrap();
                    let folder = dir.path().join("machine");
                    let ran = run(&folder, &fault);
                    if ran.status.success() {
                        assert_eq!(Profile::load(&folder).unwrap().rows.len(), 4, "{fault}");
                        // The first operations only ask what machine this is: they may fail unnoticed.
                        if doubling > 5 {
                            break;
                        }
                        continue;
                    }
                    faults += 1;
                    let said =
                        String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
                    assert!(said.contains("StorageFull"), "{fault}: {said}");
                    if folder.exists() {
                        Profile::load(&folder).unwrap();
                    }
                    assert!(run(&folder, "").status.success(), "{fault}, again");
                    assert_eq!(Profile::load(&folder).unwrap().rows.len(), 4, "{fault}, again");
                    assert_eq!(
                        std::fs::read_dir(dir.path()).unwrap().count(),
                        1,
                        "{fault}: something is left"
                    );
                }
                assert!(faults >= 1, "{op} failed {faults} times: the faults do not reach it");
            });
        }
    });
}

/// Law: groups that are needed have a limit of their own, whatever time the others have left.
#[test]
fn what_is_needed_is_measured_where_no_time_is_left_for_the_rest() {
    let probe: Vec<Box<dyn Probe>> = vec![Box::new(Clockwork {
        runs: Arc::default(),
        cancel_at: None,
    })];
    let key = |inputs| {
        Subject::Key(Key::Linear(LinearKey {
            batch: 1,
            inputs,
            outputs: 16,
            numerics: Numerics::F32,
            threads: 1,
        }))
    };
    let job = |needed| Job {
        session: 0,
        process: 0,
        seed: 1,
        settings: plan().settings,
        subjects: vec![vec![key(16), key(17), key(18)], vec![key(19), key(20)]],
        networks: Vec::new(),
        limit: Some(Duration::ZERO),
        needed,
        needed_limit: None,
    };
    let tools = Tools {
        probes: &probe,
        live: &[1],
        networks: None,
    };
    for (needed, expected) in [(0, 0), (1, 3), (2, 5)] {
        let mut done = 0;
        let mut each = |_| {
            done += 1;
            Ok(())
        };
        InProcess.run(&job(needed), &tools, &Cancel::new(), &mut each).unwrap();
        assert_eq!(done, expected, "{needed} groups needed");
    }
}

#[test]
fn memory_and_disk_read_what_they_are_asked() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Seeds::new(1).stream("test");
    let memory = MemoryProbe::new(vec![1, 2], 0);
    for key in memory.candidates(8, &mut rng).into_iter().take(4) {
        assert!(memory.measures(&key));
        memory.prepare(&key, 0).unwrap().run(0).unwrap();
    }
    let disk = DiskProbe::new(dir.path(), 64 << 20, vec![1 << 16, 1 << 20], vec![1, 3]).unwrap();
    assert!(matches!(disk.tier(), Tier::Disk | Tier::DiskBuffered));
    for key in disk.candidates(8, &mut rng) {
        let mut prepared = disk.prepare(&key, 0).unwrap();
        (0..10).for_each(|_| prepared.run(0).unwrap());
    }
    let odd = Key::Read(crate::work::ReadKey {
        tier: disk.tier(),
        bytes: 1000,
        threads: 1,
    });
    assert!(
        disk.prepare(&odd, 0)
            .err()
            .unwrap()
            .to_string()
            .contains("multiple of 4096")
    );
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "whoever is killed leaves no file"
    );
}

#[test]
fn statistics_of_a_list() {
    let s = Statistics::of(&[5.0, 1.0, 3.0, 2.0, 100.0]);
    assert_eq!((s.median, s.mad), (3.0, 2.0));
    assert!((s.q10 - 1.4).abs() < 1e-12);
    assert!(median(&[]).is_nan());
}
