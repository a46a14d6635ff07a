//! Few-shot transfer on HELP's public tables, by HELP's protocol but for its use of the target: at most 10 times of the
//! target are read, all from cells 0 to 899; cells 900 to 1,899 judge and choose nothing.

use anyhow::{Context, Result};
use cotk_data::help::{self, Tables};
use cotk_latency::judge::{Judgement, spearman};
use cotk_latency::transfer::cells::{Regression, counts};
use cotk_latency::transfer::few_shot::Known;
use cotk_run::seeds::{Seeds, Stream};
use rand::seq::index::sample;
use serde::Serialize;

use crate::Args;
use crate::bars::Bar;
use crate::output::{rounded, write};

const TRAIN: [&str; 9] = [
    "1080ti_1",
    "1080ti_32",
    "1080ti_256",
    "silver_4114",
    "silver_4210r",
    "samsung_a50",
    "pixel3",
    "essential_ph_1",
    "samsung_s7",
];
/// With what HELP states for each (its table 3, ten samples and ten references).
const TEST: [(&str, f64); 6] = [
    ("titan_rtx_256", 0.987),
    ("gold_6226", 0.989),
    ("fpga", 0.985),
    ("pixel2", 0.802),
    ("raspi4", 0.890),
    ("eyeriss", 0.940),
];
const HELP_MEAN: f64 = 0.932;
const POOL: usize = 900;
const CELLS: usize = 1900;
const SAMPLES: usize = 10;
const SEED: u64 = 12;
/// The ten that the reference names for the pool.
const STATED_PICK: [usize; SAMPLES] = [440, 3, 756, 2, 465, 544, 138, 215, 432, 867];

#[derive(Serialize)]
struct Figures {
    seed: u64,
    samples: usize,
    random_draws: usize,
    designed_half_pools: usize,
    designed_pick: Vec<usize>,
    designed_pick_is_the_stated_one: bool,
    protocol: &'static str,
    mean: Vec<Mean>,
    device: Vec<Row>,
    family_held_out_mean: Vec<Mean>,
    family_held_out: Vec<Row>,
}

/// Mean over devices.
#[derive(Serialize)]
struct Mean {
    method: &'static str,
    #[serde(serialize_with = "rounded")]
    spearman: f64,
    /// The figure to reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    bar_at_least: Option<f64>,
    /// Over draws of the mean over devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    sd: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worst_draw: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mape_pct: Option<f64>,
}

#[derive(Serialize)]
struct Row {
    device: String,
    method: &'static str,
    sources: usize,
    #[serde(serialize_with = "rounded")]
    spearman: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    sd: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mape_pct: Option<f64>,
}

/// All of it.
pub(crate) fn run(args: &Args) -> Result<Vec<Bar>> {
    let tables = help::nasbench201(&help::folder()?)?;
    let draws = if args.small { 4 } else { 100 };
    let seeds = Seeds::new(SEED);
    let pool: Vec<usize> = (0..POOL).collect();
    let cells = &tables.cells[..CELLS];
    let counted: Vec<Vec<f64>> = cells.iter().map(counts).collect();
    let regression = Regression::new(cells, &pool);
    let learnt: Vec<(String, Vec<f64>)> = tables
        .devices
        .iter()
        .map(|device| (device.name.clone(), regression.learn(|i| device.ms[i])))
        .collect();
    let known = |of: &dyn Fn(&str) -> bool| -> (Known, usize, Vec<Vec<f64>>) {
        let sources: Vec<&Vec<f64>> = learnt.iter().filter(|(name, _)| of(name)).map(|(_, s)| s).collect();
        let rows: Vec<Vec<f64>> = (0..CELLS).map(|i| sources.iter().map(|s| s[i]).collect()).collect();
        (Known::new(&rows, &counted, &pool), sources.len(), rows)
    };

    let (nine, count, rows) = known(&|name| TRAIN.contains(&name));
    let pick = nine.choose(&pool, SAMPLES);
    let test: Vec<Target> = TEST
        .iter()
        .map(|(name, _)| Target::new(&tables, name))
        .collect::<Result<_>>()?;
    let random = draw_sets(draws, &mut seeds.stream("random samples"), &pool);
    let half_pools = draw_halves(draws, &mut seeds.stream("half pools"), &pool, &nine);
    let mut figures = Figures {
        seed: SEED,
        samples: SAMPLES,
        random_draws: draws,
        designed_half_pools: draws,
        designed_pick_is_the_stated_one: pick == STATED_PICK,
        designed_pick: pick.clone(),
        protocol: "sources learnt on cells 0..899 of nine meta-train devices; 10 cells of 0..899 read of the target in all; \
                   judged on cells 900..1899 with the slowest and fastest tenth cut, as HELP does (HELP reads up to 20)",
        mean: Vec::new(),
        device: Vec::new(),
        family_held_out_mean: Vec::new(),
        family_held_out: Vec::new(),
    };

    let of_random = Draws::judge(&nine, &test, &random)?;
    let of_halves = Draws::judge(&nine, &test, &half_pools)?;
    let of_pick = Draws::judge(&nine, &test, &[pick])?;
    let (mut flops, mut mean_of_sources) = (Vec::new(), Vec::new());
    for (target, &(name, stated)) in test.iter().zip(&TEST) {
        let plain = |method, spearman, sources| Row {
            device: name.to_owned(),
            method,
            sources,
            spearman,
            sd: None,
            mape_pct: None,
        };
        flops.push(target.rank(|i| tables.macs[i]));
        // Each source in units of its own mean over the pool.
        let means: Vec<f64> = (0..count).map(|d| (0..POOL).map(|i| rows[i][d]).sum::<f64>()).collect();
        mean_of_sources.push(target.rank(|i| rows[i].iter().zip(&means).map(|(s, mean)| s / mean).sum()));
        figures.device.extend([
            plain("flops", flops[flops.len() - 1], 0),
            plain("mean of sources, no sample", mean_of_sources[flops.len() - 1], count),
            plain("help, stated", stated, count),
        ]);
    }
    let plain = |method, spearman| Mean {
        method,
        spearman,
        bar_at_least: None,
        sd: None,
        worst_draw: None,
        mape_pct: None,
    };
    figures.mean.extend([
        of_random.mean("10 random samples", Some(0.947)),
        of_halves.mean("10 designed samples, random half pools", Some(0.953)),
        of_pick.mean("10 designed samples, whole pool", Some(0.953)),
        plain("help, stated (up to 20 samples)", HELP_MEAN),
        plain("mean of sources, no sample", mean(&mean_of_sources)),
        plain("flops", mean(&flops)),
    ]);
    for (method, judged) in [
        ("10 random samples", &of_random),
        ("10 designed samples, random half pools", &of_halves),
        ("10 designed samples, whole pool", &of_pick),
    ] {
        figures.device.extend(judged.rows(&test, method, count));
    }

    // Every table as target, all devices of its kind held out of the sources.
    let (mut random_means, mut designed_means) = (Vec::new(), Vec::new());
    for device in &tables.devices {
        let same_kind = |name: &str| tables.device(name).is_some_and(|d| d.kind == device.kind);
        let (others, count, _) = known(&|name| !same_kind(name));
        let target = [Target::new(&tables, &device.name)?];
        let few = &random[..draws.min(20)];
        let judged = Draws::judge(&others, &target, few)?;
        let designed = Draws::judge(&others, &target, &[others.choose(&pool, SAMPLES)])?;
        random_means.push(judged.mean("", None));
        designed_means.push(designed.mean("", None));
        figures
            .family_held_out
            .extend(judged.rows(&target, "10 random samples", count));
        figures
            .family_held_out
            .extend(designed.rows(&target, "10 designed samples", count));
    }
    for (method, means) in [
        ("10 random samples", &random_means),
        ("10 designed samples", &designed_means),
    ] {
        let of = |value: &dyn Fn(&Mean) -> f64| mean(&means.iter().map(value).collect::<Vec<_>>());
        figures.family_held_out_mean.push(Mean {
            mape_pct: Some(crate::output::round(of(&|m| m.mape_pct.unwrap_or(f64::NAN)))),
            ..plain(method, of(&|m| m.spearman))
        });
    }

    for row in figures.mean.iter().chain(&figures.family_held_out_mean) {
        println!("{:40} {:.4}", row.method, row.spearman);
    }
    write(
        args,
        "latency-transfer",
        "Few-shot transfer on HELP's NAS-Bench-201 tables (rank correlation)",
        &figures,
    )?;
    let bar = |mean: &Mean| {
        let bar = mean.bar_at_least?;
        Some(Bar::at_least(
            format!("HELP, {}: mean Spearman", mean.method),
            mean.spearman,
            "",
            bar,
        ))
    };
    Ok(figures.mean.iter().filter_map(bar).collect())
}

/// A device whose query cells judge.
struct Target<'a> {
    name: String,
    ms: &'a [f64],
    query: Vec<usize>,
}

impl<'a> Target<'a> {
    fn new(tables: &'a Tables, name: &str) -> Result<Self> {
        let device = tables
            .device(name)
            .with_context(|| format!("the tables have no device {name}"))?;
        let mut query: Vec<usize> = (POOL..CELLS).collect();
        query.sort_by(|&a, &b| device.ms[a].total_cmp(&device.ms[b]));
        let tenth = query.len() / 10;
        let query = query[tenth..query.len() - tenth].to_vec();
        Ok(Self {
            name: name.to_owned(),
            ms: &device.ms,
            query,
        })
    }

    fn rank(&self, predicted: impl Fn(usize) -> f64) -> f64 {
        let of = |value: &dyn Fn(usize) -> f64| self.query.iter().map(|&i| value(i)).collect::<Vec<f64>>();
        spearman(&of(&predicted), &of(&|i| self.ms[i]))
    }
}

/// Judgements by device and draw.
struct Draws(Vec<Vec<Judgement>>);

impl Draws {
    fn judge(known: &Known, targets: &[Target<'_>], sets: &[Vec<usize>]) -> Result<Self> {
        let one = |target: &Target<'_>, set: &Vec<usize>| -> Result<Judgement> {
            let measured: Vec<(usize, f64)> = set.iter().map(|&i| (i, target.ms[i])).collect();
            let predicted = known.predict(&measured).context("fewer than 3 whole rows")?;
            let pairs: Vec<(f64, f64)> = target.query.iter().map(|&i| (predicted[i], target.ms[i])).collect();
            Judgement::of(&pairs).context("no query cells")
        };
        let of = |target| sets.iter().map(|set| one(target, set)).collect::<Result<Vec<_>>>();
        Ok(Self(targets.iter().map(of).collect::<Result<_>>()?))
    }

    fn rows<'a>(
        &'a self,
        targets: &'a [Target<'_>],
        method: &'static str,
        sources: usize,
    ) -> impl Iterator<Item = Row> + 'a {
        targets.iter().zip(&self.0).map(move |(target, draws)| {
            let ranks: Vec<f64> = draws.iter().map(|j| j.spearman).collect();
            let errors: Vec<f64> = draws.iter().map(|j| j.mape_pct).collect();
            Row {
                device: target.name.clone(),
                method,
                sources,
                spearman: mean(&ranks),
                sd: (ranks.len() > 1).then(|| crate::output::round(deviation(&ranks))),
                mape_pct: Some(crate::output::round(mean(&errors))),
            }
        })
    }

    fn mean(&self, method: &'static str, bar_at_least: Option<f64>) -> Mean {
        let draws = self.0.first().map_or(0, Vec::len);
        let by_draw = |value: &dyn Fn(&Judgement) -> f64| -> Vec<f64> {
            (0..draws)
                .map(|draw| mean(&self.0.iter().map(|d| value(&d[draw])).collect::<Vec<_>>()))
                .collect()
        };
        let ranks = by_draw(&|j| j.spearman);
        let several = draws > 1;
        Mean {
            method,
            spearman: mean(&ranks),
            bar_at_least,
            sd: several.then(|| crate::output::round(deviation(&ranks))),
            worst_draw: several.then(|| crate::output::round(ranks.iter().copied().fold(f64::INFINITY, f64::min))),
            mape_pct: Some(crate::output::round(mean(&by_draw(&|j| j.mape_pct)))),
        }
    }
}

/// Sets of ten from the pool.
fn draw_sets(draws: usize, stream: &mut Stream, pool: &[usize]) -> Vec<Vec<usize>> {
    let one = |_| sample(stream, pool.len(), SAMPLES).iter().map(|i| pool[i]).collect();
    (0..draws).map(one).collect()
}

/// Designed sets from random halves of the pool.
fn draw_halves(draws: usize, stream: &mut Stream, pool: &[usize], known: &Known) -> Vec<Vec<usize>> {
    let one = |_| {
        let half: Vec<usize> = sample(stream, pool.len(), pool.len() / 2)
            .iter()
            .map(|i| pool[i])
            .collect();
        known.choose(&half, SAMPLES)
    };
    (0..draws).map(one).collect()
}

#[expect(clippy::cast_precision_loss, reason = "counts of draws")]
fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

#[expect(clippy::cast_precision_loss, reason = "counts of draws")]
fn deviation(values: &[f64]) -> f64 {
    let centre = mean(values);
    (values.iter().map(|v| (v - centre).powi(2)).sum::<f64>() / (values.len().max(2) - 1) as f64).sqrt()
}
