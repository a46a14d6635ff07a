//! The profile's own held-out operators: predicted when the fit was frozen, then timed in another process by `cotk profile`;
//! judged here, with the rivals fitted on the same table.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use cotk_latency::judge::Judgement;
use cotk_latency::probe::median;
use cotk_latency::profile::HeldOut;
use cotk_latency::work::{Context, Key};
use serde::Serialize;

use crate::Args;
use crate::bars::Bar;
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
    /// What drew the keys: the profile's own seed.
    seed: u64,
    /// What the profile left out, for its slope is lost in noise: of its table, and of the held-out list. Judged by nothing.
    unmeasurable_of_table: usize,
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
    /// What its own repeats differ by.
    #[serde(skip_serializing_if = "Option::is_none")]
    repeat_pct: Option<f64>,
}

/// All of it.
pub(crate) fn run(args: &Args) -> Result<Vec<Bar>> {
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
    let left_out = &profile.head.left_out;
    let of_heldout = left_out.iter().filter(|l| l.is_heldout).count();
    let unmeasurable = of_heldout + heldout.iter().filter(|h| h.measured_us < UNMEASURABLE_US).count();
    let heldout: Vec<HeldOut> = heldout
        .iter()
        .filter(|h| h.measured_us >= UNMEASURABLE_US)
        .copied()
        .collect();
    let mut lists: BTreeMap<String, Vec<&HeldOut>> = BTreeMap::new();
    for held in &heldout {
        let kind = if is_cnn(&held.key) { "cnn" } else { "engine" };
        let threads = held.key.path(block).threads;
        let is_long = held.measured_us >= LONG_US;
        let mut names = vec![
            "all".to_owned(),
            kind.to_owned(),
            format!("{kind}, {threads} threads"),
            held.key.operator().to_owned(),
        ];
        if is_long {
            names.push("all, 3 us or more".to_owned());
            names.push(format!("{kind}, {threads} threads, 3 us or more"));
        }
        for name in names {
            lists.entry(name).or_default().push(held);
        }
    }
    let mut judged = Vec::new();
    let mut add = |method: &str, list: &str, pairs: &[(f64, f64)], repeat_pct: Option<f64>| {
        if let Some(j) = Judgement::of(pairs) {
            let row = Judged1::new(method, list, &j).beside(repeat_pct);
            row.print();
            judged.push(row);
        }
    };
    for (name, of) in &lists {
        let pairs: Vec<(f64, f64)> = of.iter().map(|h| (h.predicted_us, h.measured_us)).collect();
        add("cotk", name, &pairs, repeat(of));
    }
    // Rivals know plain operators only, not edges: on those, both.
    let plain =
        |h: &&HeldOut| matches!(h.key, Key::Conv(c) if c.context == Context::Chain) || matches!(h.key, Key::Linear(_));
    let plain: Vec<&HeldOut> = heldout
        .iter()
        .filter(plain)
        .filter(|h| h.key.path(block).threads == 1)
        .collect();
    let ours: Vec<(f64, f64)> = plain.iter().map(|h| (h.predicted_us, h.measured_us)).collect();
    add("cotk", "conv, linear, 1 thread", &ours, repeat(&plain));
    let keys: Vec<Key> = plain.iter().map(|held| held.key).collect();
    for (name, predicted_us) in crate::rivals::operators(&frozen, &keys, 1) {
        let pairs: Vec<(f64, f64)> = predicted_us
            .into_iter()
            .zip(plain.iter().map(|h| h.measured_us))
            .collect();
        add(name, "conv, linear, 1 thread", &pairs, None);
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
        seed: profile.head.provenance.seed,
        unmeasurable_of_table: left_out.len() - of_heldout,
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
                repeat_pct: repeat(&[h]).map(round),
            })
            .collect(),
    };
    write(
        args,
        "latency-operators",
        "Operators held out of the profile's table: predicted, then timed",
        &figures,
    )?;
    let mut bars = Vec::new();
    for row in figures.judged.iter().filter(|row| row.method == "cotk") {
        let is_part = ["cnn, ", "engine, "].iter().any(|kind| row.list.starts_with(kind));
        if row.list == "all" || (is_part && row.list.ends_with("threads")) {
            let name = |what: &str| format!("operators, {} ({}): {what}", row.list, row.count);
            let (mape, within) = (figures.mape_pct_at_most, figures.within_15_pct_at_least);
            bars.push(Bar::at_most(name("mean error"), row.mape_pct, "%", mape).beside(row.repeat_pct));
            bars.push(Bar::at_least(name("within 15 %"), row.within_15_pct, "%", within));
        }
    }
    bars.push(Bar::between(
        "operators, all: covered by nominal 90 %",
        covered_pct,
        "%",
        85.0,
        95.0,
    ));
    Ok(bars)
}

/// Median of what repeats differ by, in percent of the time; `None` where no profile recorded it.
fn repeat(of: &[&HeldOut]) -> Option<f64> {
    let known = of.iter().filter_map(|h| Some(100.0 * h.repeat_us? / h.measured_us));
    let known: Vec<f64> = known.collect();
    (!known.is_empty()).then(|| median(&known))
}

fn is_cnn(key: &Key) -> bool {
    !matches!(
        key,
        Key::Expert(_) | Key::Dense(_) | Key::Attention(_) | Key::Glue(_) | Key::Read(_)
    )
}
