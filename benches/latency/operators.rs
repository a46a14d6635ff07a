//! The profile's own held-out operators: predicted when the fit was frozen, then timed in another process by `cotk profile`;
//! judged here, with the rivals fitted on the same table.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use cotk_latency::judge::Judgement;
use cotk_latency::profile::HeldOut;
use cotk_latency::work::{Context, Key};
use serde::Serialize;

use crate::Args;
use crate::networks::Judged1;
use crate::output::{round, write};
use crate::profile::{Frozen, Judged};

/// Below this a time is what is left when two are subtracted that do not differ.
const UNMEASURABLE_US: f64 = 0.05;
/// From here on the floor of a µs or so does not decide.
const LONG_US: f64 = 3.0;

#[derive(Serialize)]
struct Figures {
    profile: Judged,
    unmeasurable: usize,
    covered_pct: f64,
    mape_pct_at_most: f64,
    within_15_pct_at_least: f64,
    judged: Vec<Judged1>,
    operator: Vec<Operator>,
}

#[derive(Serialize)]
struct Operator {
    key: String,
    path: String,
    predicted_us: f64,
    lo_us: f64,
    hi_us: f64,
    measured_us: f64,
    off_pct: f64,
}

/// All of it.
pub(crate) fn run(args: &Args) -> Result<()> {
    let frozen = Frozen::load(args.profile.clone())?;
    let profile = &frozen.found.profile;
    let block = profile.head.identity.block();
    let heldout = &profile.heldout;
    ensure!(
        !heldout.is_empty(),
        "{}: no held-out operators",
        frozen.found.folder.display()
    );
    for held in heldout {
        ensure!(
            !profile.rows.iter().any(|row| row.key == held.key),
            "{} stands in the table too",
            held.key
        );
    }
    // The slope of what costs nothing comes out as nothing: no error can be said of it.
    let unmeasurable = heldout.iter().filter(|h| h.measured_us < UNMEASURABLE_US).count();
    let heldout: Vec<HeldOut> = heldout
        .iter()
        .filter(|h| h.measured_us >= UNMEASURABLE_US)
        .copied()
        .collect();
    let mut lists: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    let (mut all, mut cnn) = (Vec::new(), Vec::new());
    for held in &heldout {
        let pair = (held.predicted_us, held.measured_us);
        all.push(pair);
        if is_cnn(&held.key) {
            cnn.push(pair);
        }
        lists.entry(held.key.operator()).or_default().push(pair);
    }
    let mut judged = Vec::new();
    let mut add = |method: &str, list: &str, pairs: &[(f64, f64)]| {
        if let Some(j) = Judgement::of(pairs) {
            let row = Judged1::new(method, list, &j);
            row.print();
            judged.push(row);
        }
    };
    add("cotk", "all", &all);
    add("cotk", "cnn", &cnn);
    let long = |h: &&HeldOut| h.measured_us >= LONG_US;
    let pairs = |of: &dyn Fn(&HeldOut) -> bool| -> Vec<(f64, f64)> {
        let rows = heldout.iter().filter(long).filter(|h| of(h));
        rows.map(|h| (h.predicted_us, h.measured_us)).collect()
    };
    add("cotk", "all, 3 us or more", &pairs(&|_| true));
    add("cotk", "cnn, 3 us or more", &pairs(&|h| is_cnn(&h.key)));
    add("cotk", "engine, 3 us or more", &pairs(&|h| !is_cnn(&h.key)));
    lists.iter().for_each(|(name, pairs)| add("cotk", name, pairs));
    // Rivals know plain operators only, not edges: on those, both.
    let plain =
        |h: &&HeldOut| matches!(h.key, Key::Conv(c) if c.context == Context::Chain) || matches!(h.key, Key::Linear(_));
    let plain: Vec<&HeldOut> = heldout
        .iter()
        .filter(plain)
        .filter(|h| h.key.path(block).threads == 1)
        .collect();
    let ours: Vec<(f64, f64)> = plain.iter().map(|h| (h.predicted_us, h.measured_us)).collect();
    add("cotk", "conv, linear, 1 thread", &ours);
    let keys: Vec<Key> = plain.iter().map(|held| held.key).collect();
    for (name, predicted_us) in crate::rivals::operators(&frozen, &keys, 1) {
        let pairs: Vec<(f64, f64)> = predicted_us
            .into_iter()
            .zip(plain.iter().map(|h| h.measured_us))
            .collect();
        add(name, "conv, linear, 1 thread", &pairs);
    }
    let covered = heldout
        .iter()
        .filter(|h| (h.lo_us..=h.hi_us).contains(&h.measured_us))
        .count();
    #[expect(clippy::cast_precision_loss, reason = "counts")]
    let covered_pct = 100.0 * covered as f64 / heldout.len() as f64;
    println!("  covered {covered_pct:.1} %");
    let figures = Figures {
        profile: frozen.judged(),
        unmeasurable,
        covered_pct: round(covered_pct),
        mape_pct_at_most: 7.0,
        within_15_pct_at_least: 90.0,
        judged,
        operator: heldout
            .iter()
            .map(|h| Operator {
                key: h.key.to_string(),
                path: h.key.path(block).to_string(),
                predicted_us: round(h.predicted_us),
                lo_us: round(h.lo_us),
                hi_us: round(h.hi_us),
                measured_us: round(h.measured_us),
                off_pct: round(100.0 * (h.predicted_us / h.measured_us - 1.0)),
            })
            .collect(),
    };
    write(
        args,
        "latency-operators",
        "Operators held out of the profile's table: predicted, then timed",
        &figures,
    )
}

fn is_cnn(key: &Key) -> bool {
    !matches!(
        key,
        Key::Expert(_) | Key::Dense(_) | Key::Attention(_) | Key::Glue(_) | Key::Read(_)
    )
}
