//! Decoding steps of mixtures of experts that are all in memory: shapes of real models at a depth that fits, predicted from
//! the frozen profile and from what memory gives at that minute, then measured. What the profile alone says stands beside it.

use anyhow::Result;
use cotk_latency::probe::now::memory_now;
use cotk_run::seeds::Seeds;
use cotk_runtime::figure::{Bench, Case};
use serde::Serialize;

use crate::Args;
use crate::bars::Bar;
use crate::output::{round, write};
use crate::profile::{Frozen, Judged};

/// Shape and depth: experts far beyond every cache, seconds to make.
const SHAPES: [(&str, u32); 3] = [("olmoe-1b-7b", 4), ("qwen1.5-moe-a2.7b", 3), ("qwen3-30b-a3b", 3)];
const BITS: [u32; 3] = [2, 4, 8];
const CONTEXT: usize = 128;
const SEED: u64 = 7;

#[derive(Serialize)]
struct Figures {
    profile: Judged,
    seed: u64,
    context: usize,
    within_pct: f64,
    mape_pct: f64,
    worst_pct: f64,
    covered_pct: f64,
    row: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    model: String,
    layers: u32,
    phase: &'static str,
    bits: u32,
    batch: u32,
    threads: u32,
    /// How many times as long as in the profile a pass over memory took before the step was predicted.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_now: Option<f64>,
    /// By the profile alone.
    profile_ms: f64,
    profile_off_pct: f64,
    predicted_ms: f64,
    lo_ms: f64,
    hi_ms: f64,
    measured_ms: f64,
    spread_ms: f64,
    /// What two sessions of the measurement differ by.
    repeat_pct: f64,
    off_pct: f64,
    /// Bytes over bandwidth, as a share of the measured step.
    floor_pct: f64,
    distinct_expert_bytes_per_100_tokens: u64,
}

/// All of it.
pub(crate) fn run(args: &Args) -> Result<Vec<Bar>> {
    let frozen = Frozen::load(args.profile.clone())?;
    let (shapes, widths) = if args.small {
        (&SHAPES[..1], &BITS[1..2])
    } else {
        (&SHAPES[..], &BITS[..])
    };
    let mut order = Seeds::new(SEED).stream("decode");
    let mut row: Vec<Row> = Vec::new();
    let mut covered = 0;
    for &(shape, layers) in shapes {
        for &bits in widths {
            let case = Case {
                shape: shape.to_owned(),
                layers: Some(layers as usize),
                bits,
                context: CONTEXT,
            };
            let bench = Bench::new(case, SEED)?;
            for threads in [1, 2] {
                let memory_now = memory_now(&frozen.model, threads, &mut order)?;
                let alone = bench.predict(threads, &frozen.model)?.whole;
                let model = match memory_now {
                    Some(ratio) => frozen.model.clone().with_memory_now(threads, ratio),
                    None => frozen.model.clone(),
                };
                let figure = bench.figure(threads, &model, &mut order)?;
                let p = &figure.predicted;
                let profile_off_pct = 100.0 * (alone.ms / figure.measured_ms - 1.0);
                covered += usize::from((p.lo_ms..=p.hi_ms).contains(&figure.measured_ms));
                let off_pct = 100.0 * (p.ms / figure.measured_ms - 1.0);
                println!(
                    "  {shape:16} {bits} bits {threads} threads: predicted {:8.3} ms, measured {:8.3} ({off_pct:+.1} %, repeat {:.1} %), memory x {:.3}; the profile alone {profile_off_pct:+.1} %",
                    p.ms,
                    figure.measured_ms,
                    figure.repeat_pct,
                    memory_now.unwrap_or(1.0)
                );
                row.push(Row {
                    model: shape.to_owned(),
                    layers,
                    phase: "decode",
                    bits,
                    batch: 1,
                    threads,
                    memory_now: memory_now.map(round),
                    profile_ms: round(alone.ms),
                    profile_off_pct: round(profile_off_pct),
                    predicted_ms: round(p.ms),
                    lo_ms: round(p.lo_ms),
                    hi_ms: round(p.hi_ms),
                    measured_ms: round(figure.measured_ms),
                    spread_ms: round(figure.spread_ms),
                    repeat_pct: round(figure.repeat_pct),
                    off_pct: round(off_pct),
                    floor_pct: round(100.0 * figure.floor_ms / figure.measured_ms),
                    distinct_expert_bytes_per_100_tokens: figure.distinct_expert_bytes_per_100_tokens,
                });
            }
        }
    }
    let off = |of: &dyn Fn(f64, f64) -> f64, start| row.iter().map(|r| r.off_pct.abs()).fold(start, of);
    #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
    let count = row.len() as f64;
    #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
    let covered_pct = 100.0 * covered as f64 / count;
    let figures = Figures {
        profile: frozen.judged(),
        seed: SEED,
        context: CONTEXT,
        within_pct: 10.0,
        mape_pct: round(off(&|a, b| a + b, 0.0) / count),
        worst_pct: round(off(&f64::max, 0.0)),
        covered_pct: round(covered_pct),
        row,
    };
    write(
        args,
        "latency-decode",
        "Decoding steps of mixtures of experts in memory: predicted, then measured",
        &figures,
    )?;
    let repeats: Vec<f64> = figures.row.iter().map(|row| row.repeat_pct).collect();
    let repeat = Some(cotk_latency::probe::median(&repeats));
    let within = { figures.row.iter() }
        .filter(|row| row.off_pct.abs() <= figures.within_pct)
        .count();
    #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
    let within_pct = 100.0 * within as f64 / count;
    let name = format!("decode steps: within {} %", figures.within_pct);
    let alone = { figures.row.iter() }
        .filter(|row| row.profile_off_pct.abs() <= figures.within_pct)
        .count();
    #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
    let alone_pct = 100.0 * alone as f64 / count;
    Ok(vec![
        Bar::at_least(name, within_pct, "%", 100.0).beside(repeat),
        Bar::none(
            format!("decode steps, by the profile alone: within {} %", figures.within_pct),
            alone_pct,
            "%",
        ),
        Bar::none("decode steps: mean error", figures.mape_pct, "%").beside(repeat),
        Bar::between("decode steps: covered by nominal 90 %", covered_pct, "%", 85.0, 95.0),
    ])
}
