//! From probes to a profile, top to bottom: canaries, memory, seeds, adaptive rounds, further sessions in other processes,
//! fit, freeze, held-out shapes in another process again. Keeps to its budget by construction: the first session takes its
//! share of the time, and the others repeat what that one reached. Resumes from its journal.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use cotk_run::cancel::Cancel;
use cotk_run::folder::{FolderLock, utc_rfc3339};
use cotk_run::journal::Journal;
use cotk_run::progress::Progress;
use cotk_run::seeds::Seeds;
use serde::{Deserialize, Serialize};

use super::adapt;
use super::core::{stolen_and_total, stolen_share};
use super::gather::{self, Job, Runner, Session, Settings, Subject, Threaded, Tools};
use super::order::{needed_s, order};
use super::{NetworkProbe, Probe, memory};
use crate::Result;
use crate::fit::fit;
use crate::fit::joint::{self, Fitted, fit_all};
use crate::identity::Identity;
use crate::predict::CostModel;
use crate::profile::{
    Conditions, GoodFor, Head, HeldOut, LeftOut, Noise, Profile, Provenance, Purpose, Row, Verdict, is_fitted,
    throttled, with_suffix,
};
use crate::work::{Block, Key, Work};

/// One probe with how much of it is wanted.
pub struct Wanted {
    pub probe: Box<dyn Probe>,
    /// Keys for the table, the probe's own seeds first.
    pub table: usize,
    /// Keys drawn from its distribution of use, kept out of the table, measured when the fit is frozen.
    pub heldout: usize,
    /// Keys that are prepared at once.
    pub live: usize,
    /// Whether more keys are drawn where the fit is worst, as long as there is time.
    pub adapt: bool,
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
    /// Whole networks that are timed beside the table.
    pub networks: Vec<Threaded>,
    /// What the noise floor is taken from: whole calls that every process repeats. Empty: some keys of the table.
    pub canaries: Vec<Key>,
}

/// Where things run.
#[derive(Clone, Copy)]
pub struct With<'a> {
    pub runner: &'a dyn Runner,
    pub networks: Option<&'a dyn NetworkProbe>,
}

/// Canaries for the noise floor.
const CANARIES: usize = 8;
/// Share of the budget for held-out shapes, and for what is no measuring.
const HELDOUT_SHARE: f64 = 0.10;
const REST_SHARE: f64 = 0.05;
/// Share of a pass for everything once; the rest is a second session of what is unsteady.
const MAIN_SHARE: f64 = 0.85;
/// Keys of one adaptive round: where the fit is worst, and where it rests on few.
const ROUND: usize = 24;
const THIN_ROUND: usize = 48;

/// First line of a journal: what must be equal to go on with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Begun {
    identity: Identity,
    seed: u64,
    settings: Settings,
    keys: usize,
    networks: usize,
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
    with: With<'_>,
    folder: &Path,
    cancel: &Cancel,
    progress: &dyn Progress,
) -> Result<Measured> {
    let begin = Instant::now();
    let before = stolen_and_total();
    let mut conditions = Conditions::here();
    let work = with_suffix(folder, ".partial");
    cotk_run::files::create_folder(&work)?;
    let lock = FolderLock::take(&work)?;

    // Keys: held-out ones from a stream of their own, then the table's without them. A probe's seeds are never held out.
    let mut table: Vec<Key> = Vec::new();
    let mut drawn: Vec<Vec<Key>> = Vec::new();
    for wanted in &wanted {
        let mut rng = plan.seeds.stream(&format!("profile {}", wanted.probe.name()));
        let mut keys = wanted.probe.candidates(wanted.table, &mut rng);
        keys.extend(wanted.probe.spread(plan.settings.per_path, &mut rng));
        drawn.push(keys);
    }
    let mut heldout: Vec<Key> = Vec::new();
    for (wanted, table) in wanted.iter().zip(&drawn).filter(|(w, _)| w.heldout > 0) {
        let mut rng = plan.seeds.stream(&format!("held out {}", wanted.probe.name()));
        let wishes = wanted.probe.candidates(wanted.table + 4 * wanted.heldout, &mut rng);
        let mut taken = 0;
        for key in wishes {
            if taken < wanted.heldout && !table.contains(&key) && !heldout.contains(&key) {
                heldout.push(key);
                taken += 1;
            }
        }
    }
    for key in drawn.into_iter().flatten() {
        if !table.contains(&key) {
            table.push(key);
        }
    }
    let live: Vec<usize> = wanted.iter().map(|w| w.live).collect();
    let adapts: Vec<bool> = wanted.iter().map(|w| w.adapt).collect();
    let probes: Vec<Box<dyn Probe>> = wanted.into_iter().map(|w| w.probe).collect();
    let tools = Tools {
        probes: &probes,
        live: &live,
        networks: with.networks,
    };

    let begun = Begun {
        identity: plan.identity.clone(),
        seed: plan.seeds.seed(),
        // How long it may take changes no time of a key.
        settings: Settings {
            budget: None,
            ..plan.settings
        },
        keys: table.len() + heldout.len(),
        networks: plan.networks.len(),
    };
    let begun_path = work.join("begun.json");
    let text = serde_json::to_string(&begun).expect("plain data");
    let journal_path = work.join("sessions.jsonl");
    if cotk_run::files::read_text(&begun_path, 1 << 20).ok().as_deref() != Some(text.as_str()) {
        // Begun on another machine, or with other keys: times do not mix.
        let _ = std::fs::remove_file(&journal_path);
        cotk_run::files::write_atomic(&begun_path, text.as_bytes())?;
    }
    let (journal, done): (Journal<Session>, Vec<Session>) = Journal::open(&journal_path)?;
    let resumed = done.len();
    let mut run = Run {
        plan,
        with,
        tools,
        cancel,
        progress,
        begin,
        before_s: done.iter().map(|s| s.at_s).fold(0.0, f64::max),
        process: done.iter().map(|s| s.process + 1).max().unwrap_or(0),
        sessions: done,
        journal,
        needed_until: None,
    };

    // The first session reaches as far as its share of the time; what it reached is the table.
    let canaries = match &plan.canaries[..] {
        [] => canaries(&table),
        given => given.to_vec(),
    };
    let networks = (0..plan.networks.len()).map(Subject::Network);
    let first = order(&canaries, table.iter().copied().map(Subject::Key).chain(networks));
    let sessions = plan.settings.sessions.max(1);
    let share = (1.0 - HELDOUT_SHARE - REST_SHARE) / f64::from(sessions);
    // A minute has no time for more sessions of anything.
    let main_share = if plan.quick { share } else { MAIN_SHARE * share };
    run.needed_until = needed_s(&plan.settings);
    run.job("measuring", 0, first.groups, first.needed, run.until(main_share))?;
    run.needed_until = None;
    adapt_rounds(&mut run, &adapts, &table, &heldout, main_share)?;
    let mut reached: Vec<Subject> = run.reached();
    reached.retain(|s| !matches!(s, Subject::Key(key) if !table.contains(key) && plan.canaries.contains(key)));
    let no_time_for = table
        .iter()
        .filter(|key| !reached.contains(&Subject::Key(**key)))
        .count();
    let is_short = |s: &&Subject| !plan.quick && gather::is_unsteady(**s);
    let short: Vec<Subject> = reached.iter().filter(is_short).copied().collect();
    let between = |session: u32| sessions + 1 + session;
    run.job("measuring again", between(0), vec![short.clone()], 0, run.until(share))?;
    // Again in other processes, canaries first: what one placement or one minute does shows.
    for session in 1..sessions {
        let again = order(&canaries, reached.iter().copied());
        let limit = run.until(1.0 - HELDOUT_SHARE - REST_SHARE);
        run.job("measuring again", session, again.groups, again.needed, limit)?;
        let limit = run.until(1.0 - HELDOUT_SHARE - REST_SHARE);
        run.job("measuring again", between(session), vec![short.clone()], 0, limit)?;
    }
    // One more session for those whose sessions disagree: an unlucky placement stays for a whole session.
    let apart: Vec<Subject> = { reached.iter() }
        .filter(|s| gather::is_apart(&run.sessions, **s))
        .copied()
        .collect();
    let limit = run.until(1.0 - HELDOUT_SHARE - REST_SHARE);
    run.job("measuring what differs", sessions, vec![apart], 0, limit)?;

    let of_table: Vec<Session> = { run.sessions.iter() }
        .filter(|s| !matches!(s.subject, Subject::Key(key) if heldout.contains(&key)))
        .copied()
        .collect();
    let (floor, p90) = gather::noise_floor(&of_table, &canaries);
    let mut rows = gather::rows(&of_table);
    let networks = gather::network_rows(&of_table, &plan.networks);
    // A slope may hold more than its operator: what the fit of all says of the rest is taken off.
    let block = plan.identity.block();
    let timed = { rows.iter() }
        .map(|row| slope(run.tools.probes, row))
        .collect::<Result<Vec<joint::Measured>>>()?;
    let whole = networks.iter().map(|network| network.measured(block));
    let is_kept = kept(run.tools.probes, &rows, block);
    let all: Vec<joint::Measured> = { is_kept.iter().zip(&timed) }
        .filter(|(is_kept, timed)| **is_kept && timed.key.is_none_or(|key| is_fitted(&key)))
        .map(|(_, timed)| joint::Measured {
            // Within noise of nothing, or below: a cost that is too small to see is not none.
            us: timed.us.max(LEAST_US / 3.0),
            ..timed.clone()
        })
        .chain(whole)
        .collect();
    let fitted = fit_all(&all, block, if floor.is_finite() { floor } else { 0.05 });
    let is_own: Vec<bool> = { rows.iter_mut().zip(&timed) }
        .map(|(row, slope)| own(row, slope, &fitted, block))
        .collect();
    // Of those that the fit had: one that is hardly any of its slope says nothing of itself.
    let is_own = is_own.iter().zip(&is_kept).map(|(is_own, is_kept)| *is_own && *is_kept);
    let own_kept = priced(&rows, is_own.collect(), block);
    let is_kept: Vec<bool> = is_kept
        .iter()
        .zip(own_kept)
        .map(|(is_kept, own)| *is_kept && own)
        .collect();
    let mut left_out: Vec<LeftOut> = { rows.iter().zip(&is_kept) }
        .filter(|(_, is_kept)| !**is_kept)
        .map(|(row, _)| lost_in_noise(row, block, false))
        .collect();
    let mut is_kept = is_kept.into_iter();
    rows.retain(|_| is_kept.next().expect("one of each row"));
    let steal_pct = 100.0 * stolen_share(before, stolen_and_total());
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
            carried: Vec::new(),
            good_for: GoodFor::default(),
            conditions: Conditions::default(),
            left_out: Vec::new(),
            edited: None,
            files: std::collections::BTreeMap::new(),
        },
        rows,
        fits: Vec::new(),
        calibrations: Vec::new(),
        corrections: Vec::new(),
        heldout: Vec::new(),
        networks,
    };
    profile.refit();

    // Frozen: predictions come before the measurements that judge them.
    let coeffs = profile.coeffs_checksum();
    let model = profile.model(&[]);
    // A kind that the table lacks altogether cannot be judged.
    heldout.retain(|key| model.predict(&Work::Operator(*key)).is_ok());
    let predicted: Vec<_> = heldout
        .iter()
        .map(|key| model.predict(&Work::Operator(*key)))
        .collect::<Result<_>>()?;
    assert!(
        !heldout.iter().any(|key| profile.rows.iter().any(|r| r.key == *key)),
        "a held-out key was measured for the table"
    );
    let each = run.left(1.0) / f64::from(2 * sessions);
    for session in 0..sessions {
        let limit = plan.settings.budget.map(|_| Duration::from_secs_f64(each.max(0.5)));
        run.job("held-out shapes", session, vec![subjects(heldout.iter())], 0, limit)?;
        let heldout = subjects(heldout.iter());
        let short = heldout.iter().filter(is_short).copied().collect();
        run.job("held-out shapes", between(session), vec![short], 0, limit)?;
    }
    for (key, p) in heldout.iter().zip(predicted) {
        let of_key: Vec<Session> = { run.sessions.iter() }
            .filter(|s| s.subject == Subject::Key(*key))
            .copied()
            .collect();
        if let Some(mut row) = gather::rows(&of_key).pop() {
            let slope = slope(run.tools.probes, &row)?;
            let is_own = own(&mut row, &slope, &fitted, block);
            if !is_own || !is_measurable(run.tools.probes, &row) {
                left_out.push(lost_in_noise(&row, block, true));
                continue;
            }
            profile.heldout.push(HeldOut {
                key: *key,
                predicted_us: p.ms * 1e3,
                lo_us: p.lo_ms * 1e3,
                hi_us: p.hi_ms * 1e3,
                measured_us: row.median_us.max(1e-3),
                repeat_us: Some(row.mad_us),
                coeffs: Some(coeffs),
            });
        }
    }
    let (undisturbed, disturbed_factor) = gather::disturbance(&run.sessions);
    conditions.undisturbed_pct = Some(100.0 * undisturbed);
    conditions.disturbed_factor = Some(disturbed_factor);
    conditions.no_time_for = Some(no_time_for as u64);
    conditions.throttled =
        { conditions.throttled.zip(throttled()) }.map(|(before, after)| after.saturating_sub(before));
    for probe in run.tools.probes {
        conditions.facts.extend(probe.facts());
    }
    for threads in profile.good_for().threads {
        conditions.levels.extend(memory::levels(&profile.rows, threads));
    }
    profile.head.conditions = conditions;
    profile.head.left_out = left_out;
    profile.head.provenance.seconds = run.before_s + begin.elapsed().as_secs_f64();
    progress.end();
    drop(run);
    drop(probes);
    profile.save(folder)?;
    // Whole now: nothing of the work folder is needed. It goes before its lock does.
    let _ = std::fs::remove_dir_all(&work);
    drop(lock);
    Ok(Measured { profile, resumed })
}

fn lost_in_noise(row: &Row, block: Block, is_heldout: bool) -> LeftOut {
    LeftOut {
        path: row.key.path(block).to_string(),
        key: row.key.to_string(),
        median_us: row.median_us,
        mad_us: row.mad_us,
        is_heldout,
    }
}

/// A row as the sum that its probe says it is.
fn slope(probes: &[Box<dyn Probe>], row: &Row) -> Result<joint::Measured> {
    let mut measured = joint::Measured::operator(&row.sample());
    if let Some(probe) = probes.iter().find(|p| p.measures(&row.key)) {
        measured.parts = probe.parts(&row.key)?;
    }
    Ok(measured)
}

/// Slopes below this are within the noise of the times that they are differences of, whatever their sessions say; and
/// sessions further apart than this share say nothing.
const LEAST_US: f64 = 0.3;
const MOST_SPREAD: f64 = 0.5;

fn is_measurable(probes: &[Box<dyn Probe>], row: &Row) -> bool {
    let is_slope = { probes.iter() }
        .find(|p| p.measures(&row.key))
        .is_some_and(|p| p.is_slope(&row.key));
    !is_slope || (row.median_us >= LEAST_US && row.relative_spread() <= MOST_SPREAD)
}

/// Which rows the table and the fit keep: those that can be measured, and all of a path that has none of these.
fn kept(probes: &[Box<dyn Probe>], rows: &[Row], block: Block) -> Vec<bool> {
    priced(rows, rows.iter().map(|row| is_measurable(probes, row)).collect(), block)
}

/// Rows that are good, and all of a path that has no good one: a path that nobody can price is worse than one whose price
/// is uncertain.
fn priced(rows: &[Row], is_good: Vec<bool>, block: Block) -> Vec<bool> {
    let paths: Vec<_> = rows.iter().map(|row| row.key.path(block)).collect();
    let priced: std::collections::BTreeSet<_> = { paths.iter().zip(&is_good) }
        .filter(|(_, is)| **is)
        .map(|(path, _)| *path)
        .collect();
    { paths.iter().zip(&is_good) }
        .map(|(path, is)| *is || !priced.contains(path))
        .collect()
}

/// Leaves a row its own operator's time; whether that is more than a tenth of its slope, so that it can be told from the
/// rest. One that is no part of its own sum (a triple) stays whole.
fn own(row: &mut Row, slope: &joint::Measured, fitted: &Fitted, block: Block) -> bool {
    let times: f64 = { slope.parts.iter() }
        .filter(|part| part.0 == row.key)
        .map(|part| part.1)
        .sum();
    if slope.parts.len() < 2 || times <= 0.0 {
        return true;
    }
    let own_us = fitted.own_us(slope, block);
    let ratio = own_us / row.median_us.max(1e-9);
    (row.median_us, row.q10_us) = (own_us, row.q10_us * ratio);
    own_us * times > 0.101 * slope.us
}

fn subjects<'a>(keys: impl Iterator<Item = &'a Key>) -> Vec<Subject> {
    keys.map(|key| Subject::Key(*key)).collect()
}

/// Evenly over the table as it was asked for: every probe has some, none that reads a disk.
fn canaries(table: &[Key]) -> Vec<Key> {
    let fit: Vec<&Key> = table.iter().filter(|k| is_canary(k)).collect();
    let count = CANARIES.min(fit.len());
    (0..count).map(|i| *fit[i * fit.len() / count]).collect()
}

fn is_canary(key: &Key) -> bool {
    match key {
        // Whole calls whose time is far above the timer's.
        Key::Conv(c) => c.threads == 1 && c.groups == 1 && c.height >= 8,
        Key::Expert(e) => e.threads == 1,
        Key::Linear(l) => l.threads == 1 && l.inputs * l.outputs > 2000,
        _ => false,
    }
}

/// A measurement under way.
struct Run<'a> {
    plan: &'a Plan,
    with: With<'a>,
    tools: Tools<'a>,
    cancel: &'a Cancel,
    progress: &'a dyn Progress,
    begin: Instant,
    /// Seconds of earlier starts.
    before_s: f64,
    /// The next process.
    process: u32,
    sessions: Vec<Session>,
    journal: Journal<Session>,
    /// Seconds of measuring until which what is needed may be begun, while a session has time reserved for it.
    needed_until: Option<f64>,
}

impl Run<'_> {
    /// Seconds of the budget until `share` of it is over; infinite without a budget.
    fn left(&self, share: f64) -> f64 {
        let spent = self.before_s + self.begin.elapsed().as_secs_f64();
        let budget = self.plan.settings.budget;
        budget.map_or(f64::INFINITY, |b| (b.as_secs_f64() * share - spent).max(0.0))
    }

    fn until(&self, share: f64) -> Option<Duration> {
        let left = self.left(share);
        left.is_finite().then(|| Duration::from_secs_f64(left))
    }

    /// What the first session has.
    fn reached(&self) -> Vec<Subject> {
        let mut reached: Vec<Subject> = { self.sessions.iter() }
            .filter(|s| s.session == 0)
            .map(|s| s.subject)
            .collect();
        reached.sort_unstable();
        reached.dedup();
        reached
    }

    /// One process: everything of `groups` that this session does not have yet.
    /// The first `needed` groups have until [`Self::needed_until`] where that is longer than `limit`.
    fn job(
        &mut self,
        what: &str,
        session: u32,
        groups: Vec<Vec<Subject>>,
        needed: usize,
        limit: Option<Duration>,
    ) -> Result<()> {
        let mut seen: Vec<Subject> = { self.sessions.iter() }
            .filter(|s| s.session == session)
            .map(|s| s.subject)
            .collect();
        let mut left = groups;
        for group in &mut left {
            group.retain(|subject| {
                let is_new = !seen.contains(subject);
                if is_new {
                    seen.push(*subject);
                }
                is_new
            });
        }
        let count: usize = left.iter().map(Vec::len).sum();
        let spent_s = self.before_s + self.begin.elapsed().as_secs_f64();
        let reserved = { self.needed_until }.map(|until| Duration::from_secs_f64((until - spent_s).max(0.0)));
        let needed_limit = limit.map(|limit| limit.max(reserved.unwrap_or_default()));
        let left_of_needed: usize = left.iter().take(needed).map(Vec::len).sum();
        let has_time = |limit: Option<Duration>| limit.is_none_or(|l| !l.is_zero());
        if count == 0 || !(has_time(limit) || left_of_needed > 0 && has_time(needed_limit)) {
            return Ok(());
        }
        let job = Job {
            session,
            process: self.process,
            seed: self.plan.seeds.seed(),
            settings: self.plan.settings,
            subjects: left,
            networks: self.plan.networks.clone(),
            limit,
            needed,
            needed_limit,
        };
        self.process += 1;
        self.progress.begin(what, count as u64, "timings");
        let offset_s = self.before_s + self.begin.elapsed().as_secs_f64();
        let (sessions, journal, progress) = (&mut self.sessions, &mut self.journal, self.progress);
        let mut each = |mut done: Session| -> Result<()> {
            done.at_s += offset_s;
            journal.append(&done)?;
            sessions.push(done);
            progress.advance(1);
            Ok(())
        };
        self.with.runner.run(&job, &self.tools, self.cancel, &mut each)?;
        self.progress.end();
        Ok(())
    }
}

/// Keys where the fit is worst, a few at a time, until that stops helping; then of the paths that rest on the fewest keys,
/// until the first session's share of the time is over.
fn adapt_rounds(run: &mut Run<'_>, adapts: &[bool], table: &[Key], heldout: &[Key], share: f64) -> Result<()> {
    if run.plan.settings.budget.is_none() || !adapts.iter().any(|a| *a) {
        return Ok(());
    }
    let block = run.plan.identity.block();
    let mut progress = adapt::Stopping::default();
    let mut is_thin = false;
    for round in 0.. {
        let first: Vec<Session> = run.sessions.iter().filter(|s| s.session == 0).copied().collect();
        let rows = gather::rows(&first);
        // A round shorter than its process takes to begin is none.
        if run.left(share) < 1.5 {
            break;
        }
        let mut wishes = Vec::new();
        for (probe, _) in run.tools.probes.iter().zip(adapts).filter(|(_, adapts)| **adapts) {
            let mut rng = run.plan.seeds.stream(&format!("adapt {} {round}", probe.name()));
            let seeds = table.iter().filter(|k| probe.measures(k)).count();
            wishes.extend(probe.candidates(seeds + 20 * ROUND, &mut rng));
            if is_thin {
                wishes.extend(probe.spread(2 * run.plan.settings.per_path, &mut rng));
            }
        }
        wishes.retain(|key| !heldout.contains(key) && !rows.iter().any(|r| r.key == *key));
        let best = if is_thin {
            adapt::thinnest(&wishes, &rows, block, THIN_ROUND)
        } else {
            let samples: Vec<_> = rows.iter().map(Row::sample).collect();
            let fits = fit(&samples, block, 0.02);
            is_thin = progress.is_over(&fits);
            adapt::best(&wishes, &rows, &fits, block, ROUND)
        };
        if best.is_empty() {
            if is_thin {
                break;
            }
            is_thin = true;
            continue;
        }
        run.job("adding shapes", 0, vec![subjects(best.iter())], 0, run.until(share))?;
    }
    Ok(())
}
