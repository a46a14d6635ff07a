//! One profile from another: the times of one thread, carried over to two by ten whole networks, judged on held-out networks
//! that were timed with two threads. Beside it: one common scale, and the profile's own times of two threads if it has them.

use anyhow::Result;
use cotk_latency::graph::Graph;
use cotk_latency::judge::Judgement;
use cotk_latency::predict::CostModel;
use cotk_latency::probe::median;
use cotk_latency::transfer::profile::{Sample, Source, Transfer};
use cotk_latency::work::Work;
use cotk_onnx::zoo::random_networks;
use cotk_run::seeds::Seeds;
use serde::Serialize;

use crate::Args;
use crate::bars::Bar;
use crate::list;
use crate::networks::{Judged1, held_out};
use crate::output::{round, write};
use crate::profile::{Frozen, Judged};

const SAMPLES: usize = 10;

#[derive(Serialize)]
struct Figures {
    profile: Judged,
    seed: u64,
    from_threads: u32,
    threads: u32,
    samples: usize,
    candidates: usize,
    timed: String,
    repeat_floor_pct: f64,
    repeat_p90_pct: f64,
    covered_pct: f64,
    mape_pct_at_most: f64,
    judged: Vec<Judged1>,
    designed: Transfer,
    random: Transfer,
}

/// All of it.
pub(crate) fn run(args: &Args) -> Result<Vec<Bar>> {
    let frozen = Frozen::load(args.profile.clone())?;
    let (from_threads, threads) = (1, 2);
    let profile = &frozen.found.profile;
    let source = Source::new(profile, from_threads, &frozen.here, threads)?;
    let count = if args.small { 8 } else { 60 };
    let judges: Vec<Graph> = held_out(&frozen, args.seed, 100)?
        .into_iter()
        .take(count)
        .map(|n| n.1)
        .collect();
    let stream = &mut Seeds::new(args.seed).stream("transfer candidates");
    let candidates: Vec<Graph> = random_networks(200, &judges, stream).into_iter().map(|n| n.1).collect();
    let designed = source.choose(&candidates, SAMPLES)?;
    // The first ten of the list are as random as any.
    let random: Vec<usize> = (0..SAMPLES).collect();

    let chosen: Vec<Graph> = designed.iter().chain(&random).map(|&i| candidates[i].clone()).collect();
    let pace = if args.small { (2, 5) } else { (3, 12) };
    let few = list::measure(args, "samples", &chosen, threads, pace)?;
    let sample = |(graph, ms): (&Graph, &f64)| Sample {
        graph: graph.clone(),
        ms: *ms,
    };
    let samples: Vec<Sample> = chosen.iter().zip(&few.ms).map(sample).collect();
    let by_design = source.carry(&samples[..SAMPLES])?;
    let at_random = source.carry(&samples[SAMPLES..])?;

    // Frozen before the judges are timed.
    let predict = |model: &dyn CostModel, threads| -> Result<Vec<cotk_latency::predict::Prediction>> {
        let of = |graph| model.predict(&Work::Graph { graph, threads });
        Ok(judges.iter().map(of).collect::<cotk_latency::Result<_>>()?)
    };
    let ours = predict(&by_design.model(&[]), threads)?;
    let random = predict(&at_random.model(&[]), threads)?;
    let one = predict(&frozen.model, from_threads)?;
    let own = predict(&frozen.model, threads)?;
    let ratio = |s: &Sample| -> Result<f64> {
        let work = Work::Graph {
            graph: &s.graph,
            threads: from_threads,
        };
        Ok(s.ms / frozen.model.predict(&work)?.ms)
    };
    let ratios = samples[..SAMPLES].iter().map(ratio).collect::<Result<Vec<f64>>>()?;
    let times = list::measure(args, "judges", &judges, threads, pace)?;

    let mut judged = Vec::new();
    let mut add = |method: &str, predicted: Vec<f64>| {
        let pairs: Vec<(f64, f64)> = predicted.into_iter().zip(times.ms.iter().copied()).collect();
        if let Some(j) = Judgement::of(&pairs) {
            let row = Judged1::new(method, "networks", &j);
            row.print();
            judged.push(row);
        }
    };
    add("10 designed samples", ours.iter().map(|p| p.ms).collect());
    add("10 random samples", random.iter().map(|p| p.ms).collect());
    let common = median(&ratios);
    add("one scale, 10 samples", one.iter().map(|p| common * p.ms).collect());
    add("source as it is", one.iter().map(|p| p.ms).collect());
    if own.iter().all(|p| {
        !p.flags
            .iter()
            .any(|f| matches!(f, cotk_latency::predict::Flag::OtherThreads { .. }))
    }) {
        add("whole profile of 2 threads", own.iter().map(|p| p.ms).collect());
    }
    let covered = ours
        .iter()
        .zip(&times.ms)
        .filter(|(p, m)| (p.lo_ms..=p.hi_ms).contains(m))
        .count();
    #[expect(clippy::cast_precision_loss, reason = "counts")]
    let covered_pct = 100.0 * covered as f64 / judges.len() as f64;
    println!(
        "  covered {covered_pct:.1} %, repeats differ by {:.2} %",
        times.floor_pct
    );
    let transfer = |profile: cotk_latency::profile::Profile| profile.head.transfer.expect("a carried profile");
    let figures = Figures {
        profile: frozen.judged(),
        seed: args.seed,
        from_threads,
        threads,
        samples: SAMPLES,
        candidates: candidates.len(),
        timed: times.timed.clone(),
        repeat_floor_pct: round(times.floor_pct),
        repeat_p90_pct: round(times.floor_p90_pct),
        covered_pct: round(covered_pct),
        mape_pct_at_most: 15.0,
        judged,
        designed: transfer(by_design),
        random: transfer(at_random),
    };
    write(
        args,
        "latency-transfer-threads",
        "One thread's profile carried over to two by ten networks",
        &figures,
    )?;
    let repeat = Some(times.floor_pct);
    let bar = figures.mape_pct_at_most;
    Ok({ figures.judged.iter() }
        .filter_map(|row| {
            let what = format!("1 to 2 threads, {}: mean error", row.method);
            Some(match row.method.as_str() {
                "10 designed samples" | "10 random samples" => {
                    Bar::at_most(what, row.mape_pct, "%", bar).beside(repeat)
                }
                "whole profile of 2 threads" => Bar::none(what, row.mape_pct, "%").beside(repeat),
                _ => return None,
            })
        })
        .chain([Bar::between(
            "1 to 2 threads, designed: covered by nominal 90 %",
            covered_pct,
            "%",
            85.0,
            95.0,
        )])
        .collect())
}
