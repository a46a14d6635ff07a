//! From probes to a profile, top to bottom: gather, noise floor, fit, freeze, held-out shapes, summary. Resumes from its
//! journal: what is measured is not measured again.

use std::path::Path;
use std::time::{Instant, SystemTime};

use cotk_run::cancel::Cancel;
use cotk_run::folder::{FolderLock, utc_rfc3339};
use cotk_run::journal::Journal;
use cotk_run::progress::Progress;
use cotk_run::seeds::Seeds;
use serde::{Deserialize, Serialize};

use super::Probe;
use super::gather::{self, Session, Settings, Surroundings};
use crate::Result;
use crate::fit::fit;
use crate::identity::Identity;
use crate::predict::CostModel;
use crate::profile::{GoodFor, Head, HeldOut, Noise, Profile, Provenance, Purpose, Row, Verdict, with_suffix};
use crate::work::{Key, Work};

/// One probe with how much of it is wanted.
pub struct Wanted {
    pub probe: Box<dyn Probe>,
    /// Keys for the table.
    pub table: usize,
    /// Keys drawn from its distribution of use, kept out of the table, measured when the fit is frozen.
    pub heldout: usize,
    /// Keys that are prepared at once.
    pub live: usize,
}

/// What to measure and how it is written down.
pub struct Plan {
    pub settings: Settings,
    pub seeds: Seeds,
    pub quick: bool,
    pub purpose: Purpose,
    pub identity: Identity,
    pub cotk_version: String,
    pub commit: Option<String>,
}

/// Canaries for the noise floor.
const CANARIES: usize = 8;

/// First line of a journal: what must be equal to go on with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Begun {
    identity: Identity,
    seed: u64,
    quick: bool,
    keys: usize,
}

/// What [`measure`] did.
pub struct Measured {
    pub profile: Profile,
    /// Sessions found in the journal of an earlier start.
    pub resumed: usize,
}

/// Measures, fits and saves `folder`. Works in `<folder>.partial` until it is whole.
///
/// # Errors
/// What a probe reports; [`crate::Error::Run`] for files and when interrupted: the journal stays for the next start.
pub fn measure(
    wanted: Vec<Wanted>,
    plan: &Plan,
    folder: &Path,
    cancel: &Cancel,
    progress: &dyn Progress,
) -> Result<Measured> {
    let begin = Instant::now();
    let (stolen, total) = gather::stolen_and_total();
    let work = with_suffix(folder, ".partial");
    cotk_run::files::create_folder(&work)?;
    let lock = FolderLock::take(&work)?;

    // Keys: the table's first, then held-out ones from another stream, never one that the table has.
    let mut table: Vec<(usize, Key)> = Vec::new();
    let mut heldout: Vec<(usize, Key)> = Vec::new();
    for (index, wanted) in wanted.iter().enumerate() {
        let mut rng = plan.seeds.stream(&format!("profile {}", wanted.probe.name()));
        for key in wanted.probe.candidates(wanted.table, &mut rng) {
            if !table.contains(&(index, key)) {
                table.push((index, key));
            }
        }
    }
    for (index, wanted) in wanted.iter().enumerate().filter(|(_, w)| w.heldout > 0) {
        let mut rng = plan.seeds.stream(&format!("held out {}", wanted.probe.name()));
        let drawn = wanted.probe.candidates(wanted.table + 4 * wanted.heldout, &mut rng);
        let new = drawn
            .into_iter()
            .map(|key| (index, key))
            .filter(|key| !table.contains(key));
        let mut new: Vec<(usize, Key)> = new.take(wanted.heldout).collect();
        new.dedup();
        heldout.extend(new);
    }
    let live: Vec<usize> = wanted.iter().map(|w| w.live).collect();
    let probes: Vec<Box<dyn Probe>> = wanted.into_iter().map(|w| w.probe).collect();

    let begun = Begun {
        identity: plan.identity.clone(),
        seed: plan.seeds.seed(),
        quick: plan.quick,
        keys: table.len() + heldout.len(),
    };
    let begun_path = work.join("begun.json");
    let text = serde_json::to_string(&begun).expect("plain data");
    let journal_path = work.join("sessions.jsonl");
    if cotk_run::files::read_text(&begun_path, 1 << 20).ok().as_deref() != Some(text.as_str()) {
        // Begun on another machine, or with other keys: times do not mix.
        let _ = std::fs::remove_file(&journal_path);
        cotk_run::files::write_atomic(&begun_path, text.as_bytes())?;
    }
    let (mut journal, done): (Journal<Session>, Vec<Session>) = Journal::open(&journal_path)?;
    let resumed = done.len();
    let mut order = plan.seeds.stream("order of measuring");
    let mut around = Surroundings {
        cancel,
        progress,
        live: &live,
        journal: &mut journal,
        done,
    };

    let sessions = gather::gather(&probes, &table, &plan.settings, &mut order, &mut around)?;
    let rows = gather::rows(&sessions);

    // Canaries: evenly over the table's times, those that cost enough to be timed.
    let mut by_time: Vec<&Row> = rows.iter().filter(|r| r.median_us >= 2.0).collect();
    by_time.sort_by(|a, b| a.median_us.total_cmp(&b.median_us));
    let canaries: Vec<Key> = (0..CANARIES.min(by_time.len()))
        .map(|i| by_time[i * by_time.len() / CANARIES.min(by_time.len())].key)
        .collect();
    let (floor, p90) = gather::noise_floor(&sessions, &canaries);

    let samples: Vec<_> = rows.iter().map(Row::sample).collect();
    let fits = fit(
        &samples,
        plan.identity.block(),
        if floor.is_finite() { floor } else { 0.05 },
    );

    let (stolen_now, total_now) = gather::stolen_and_total();
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    let steal_pct = 100.0 * (stolen_now - stolen) as f64 / (total_now - total).max(1) as f64;
    let mut profile = Profile {
        head: Head {
            format: Profile::FORMAT,
            purpose: plan.purpose,
            provenance: Provenance {
                date: utc_rfc3339(SystemTime::now()),
                cotk_version: plan.cotk_version.clone(),
                commit: plan.commit.clone(),
                seed: plan.seeds.seed(),
                quick: plan.quick,
                seconds: 0.0,
            },
            identity: plan.identity.clone(),
            noise: Noise {
                floor_pct: 100.0 * if floor.is_finite() { floor } else { 1.0 },
                p90_pct: 100.0 * if p90.is_finite() { p90 } else { 1.0 },
                steal_pct,
                verdict: Verdict::of(100.0 * floor, steal_pct),
                canaries: canaries.iter().map(Key::to_string).collect(),
            },
            transfer: None,
            good_for: GoodFor::default(),
            files: std::collections::BTreeMap::new(),
        },
        rows,
        fits,
        heldout: Vec::new(),
        networks: Vec::new(),
    };

    // Frozen: predictions come before the measurements that judge them.
    let model = profile.model(&[]);
    // A kind that the table lacks altogether cannot be judged.
    heldout.retain(|(_, key)| model.predict(&Work::Operator(*key)).is_ok());
    let predicted: Vec<_> = heldout
        .iter()
        .map(|(_, key)| model.predict(&Work::Operator(*key)))
        .collect::<Result<_>>()?;
    let judged = gather::rows(&gather::gather(
        &probes,
        &heldout,
        &plan.settings,
        &mut order,
        &mut around,
    )?);
    for ((_, key), p) in heldout.iter().zip(predicted) {
        if let Some(row) = judged.iter().find(|r| r.key == *key) {
            profile.heldout.push(HeldOut {
                key: *key,
                predicted_us: p.ms * 1e3,
                lo_us: p.lo_ms * 1e3,
                hi_us: p.hi_ms * 1e3,
                measured_us: row.median_us.max(1e-3),
            });
        }
    }
    profile.head.provenance.seconds = begin.elapsed().as_secs_f64();
    drop(probes);
    profile.save(folder)?;
    drop(lock);
    // Whole now: nothing of the work folder is needed.
    let _ = std::fs::remove_dir_all(&work);
    Ok(Measured { profile, resumed })
}
