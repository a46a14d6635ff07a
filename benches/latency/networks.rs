//! 100 random networks that the profile has not seen, 25 each dense, depthwise, low-rank and int8: predicted first, then
//! timed in processes of their own; with the rivals on the same list.

use anyhow::{Result, ensure};
use cotk_latency::graph::Graph;
use cotk_latency::judge::Judgement;
use cotk_latency::predict::CostModel;
use cotk_latency::work::Work;
use cotk_onnx::zoo::{Kind, random_networks};
use cotk_run::seeds::Seeds;
use serde::Serialize;

use crate::Args;
use crate::bars::Bar;
use crate::list;
use crate::output::{round, write};
use crate::profile::{Frozen, Judged};

#[derive(Serialize)]
struct Figures {
    profile: Judged,
    seed: u64,
    threads: u32,
    sessions: u32,
    timed: String,
    repeat_floor_pct: f64,
    repeat_p90_pct: f64,
    /// Shares of nominal 90 % intervals that hold the measurement.
    covered_pct: f64,
    bar: Bars,
    judged: Vec<Judged1>,
    network: Vec<Network>,
}

/// What is to be reached.
#[derive(Serialize)]
struct Bars {
    mape_pct_at_most: f64,
    within_10_pct_at_least: f64,
    spearman_at_least: f64,
    covered_pct_between: [f64; 2],
}

/// One method on one part of the list.
#[derive(Serialize)]
pub(crate) struct Judged1 {
    pub(crate) method: String,
    pub(crate) list: String,
    pub(crate) count: usize,
    pub(crate) mape_pct: f64,
    pub(crate) within_5_pct: f64,
    pub(crate) within_10_pct: f64,
    pub(crate) within_15_pct: f64,
    pub(crate) worst_pct: f64,
    pub(crate) bias_pct: f64,
    pub(crate) spearman: f64,
    pub(crate) regret_pct: f64,
    /// What repeats of the measurement differ by, in percent: median over the list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) repeat_pct: Option<f64>,
}

impl Judged1 {
    pub(crate) fn new(method: &str, list: &str, j: &Judgement) -> Self {
        Self {
            method: method.to_owned(),
            list: list.to_owned(),
            count: j.count,
            mape_pct: round(j.mape_pct),
            within_5_pct: round(j.within_5_pct),
            within_10_pct: round(j.within_10_pct),
            within_15_pct: round(j.within_15_pct),
            worst_pct: round(j.worst_pct),
            bias_pct: round(j.bias_pct),
            spearman: round(j.spearman),
            regret_pct: round(j.regret_pct),
            repeat_pct: None,
        }
    }

    /// The same, with what repeats of the measurement differ by.
    pub(crate) fn beside(self, repeat_pct: Option<f64>) -> Self {
        Self {
            repeat_pct: repeat_pct.map(round),
            ..self
        }
    }

    pub(crate) fn print(&self) {
        println!(
            "  {:24} {:24} {:4}  error {:6.2} %  within 10 %: {:5.1}  15 %: {:5.1}  bias {:+6.2}  spearman {:.4}",
            self.method,
            self.list,
            self.count,
            self.mape_pct,
            self.within_10_pct,
            self.within_15_pct,
            self.bias_pct,
            self.spearman
        );
    }
}

#[derive(Serialize)]
struct Network {
    kind: &'static str,
    nodes: usize,
    mega_macs: f64,
    predicted_ms: f64,
    lo_ms: f64,
    hi_ms: f64,
    measured_ms: f64,
    off_pct: f64,
}

/// The held-out list: in no profile's table of networks.
pub(crate) fn held_out(frozen: &Frozen, seed: u64, count: usize) -> Result<Vec<(Kind, Graph)>> {
    // Profiles draw theirs from another stream.
    let list = random_networks(count, &[], &mut Seeds::new(seed).stream("held-out networks"));
    for (_, graph) in &list {
        let known = frozen.found.profile.networks.iter();
        let seen = known
            .clone()
            .any(|known| known.graph.input() == graph.input() && known.graph.nodes() == graph.nodes());
        ensure!(
            !seen,
            "a held-out network stands in the profile's table: {}",
            graph.name()
        );
    }
    Ok(list)
}

/// All of it.
pub(crate) fn run(args: &Args) -> Result<Vec<Bar>> {
    let frozen = Frozen::load(args.profile.clone())?;
    let count = if args.small { 8 } else { 100 };
    let list = held_out(&frozen, args.seed, count)?;
    let graphs: Vec<Graph> = list.iter().map(|(_, graph)| graph.clone()).collect();
    // Before anything is timed.
    let threads = 1;
    let predict = |graph| frozen.model.predict(&Work::Graph { graph, threads });
    let predictions = graphs.iter().map(predict).collect::<cotk_latency::Result<Vec<_>>>()?;
    let pace = if args.small { (2, 5) } else { (4, 12) };
    let times = list::measure(args, "networks", &graphs, threads, pace)?;

    let mut judged = Vec::new();
    let mut judge = |method: &str, predicted: &[f64]| {
        let pairs = |of: &dyn Fn(Kind) -> bool| -> Vec<(f64, f64)> {
            let rows = list.iter().zip(predicted.iter().zip(&times.ms));
            rows.filter(|(network, _)| of(network.0))
                .map(|(_, (p, m))| (*p, *m))
                .collect()
        };
        let mut add = |name: &str, of: &dyn Fn(Kind) -> bool| {
            if let Some(j) = Judgement::of(&pairs(of)) {
                let row = Judged1::new(method, name, &j);
                row.print();
                judged.push(row);
            }
        };
        add("all", &|_| true);
        if method == "cotk" {
            Kind::ALL.iter().for_each(|kind| add(kind.name(), &|k| k == *kind));
        }
    };
    let ours: Vec<f64> = predictions.iter().map(|p| p.ms).collect();
    judge("cotk", &ours);
    for (name, predicted) in crate::rivals::networks(&frozen, &graphs, threads) {
        judge(name, &predicted);
    }
    let covered = predictions
        .iter()
        .zip(&times.ms)
        .filter(|(p, m)| (p.lo_ms..=p.hi_ms).contains(m))
        .count();
    #[expect(clippy::cast_precision_loss, reason = "counts")]
    let covered_pct = 100.0 * covered as f64 / count as f64;
    println!(
        "  covered {covered_pct:.1} %, repeats differ by {:.2} %",
        times.floor_pct
    );
    let row = |((kind, graph), (p, m)): (&(Kind, Graph), (&cotk_latency::predict::Prediction, &f64))| Network {
        kind: kind.name(),
        nodes: graph.nodes().len(),
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        mega_macs: round(graph.macs() as f64 / 1e6),
        predicted_ms: round(p.ms),
        lo_ms: round(p.lo_ms),
        hi_ms: round(p.hi_ms),
        measured_ms: round(*m),
        off_pct: round(100.0 * (p.ms / m - 1.0)),
    };
    let figures = Figures {
        profile: frozen.judged(),
        seed: args.seed,
        threads,
        sessions: times.sessions,
        timed: times.timed.clone(),
        repeat_floor_pct: round(times.floor_pct),
        repeat_p90_pct: round(times.floor_p90_pct),
        covered_pct: round(covered_pct),
        bar: Bars {
            mape_pct_at_most: 4.0,
            within_10_pct_at_least: 97.0,
            spearman_at_least: 0.98,
            covered_pct_between: [85.0, 95.0],
        },
        judged,
        network: list.iter().zip(predictions.iter().zip(&times.ms)).map(row).collect(),
    };
    write(
        args,
        "latency-networks",
        "Random networks that the profile has not seen: predicted, then timed",
        &figures,
    )?;
    let (bar, all) = (&figures.bar, &figures.judged[0]);
    let repeat = Some(times.floor_pct);
    let [low, high] = bar.covered_pct_between;
    Ok(vec![
        Bar::at_most("networks: mean error", all.mape_pct, "%", bar.mape_pct_at_most).beside(repeat),
        Bar::at_least(
            "networks: within 10 %",
            all.within_10_pct,
            "%",
            bar.within_10_pct_at_least,
        ),
        Bar::at_least("networks: Spearman", all.spearman, "", bar.spearman_at_least),
        Bar::between("networks: covered by nominal 90 %", covered_pct, "%", low, high),
    ])
}
