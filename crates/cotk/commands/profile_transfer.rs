//! `cotk profile --from OTHER`: a profile of this machine from another one and a few whole networks timed here. Here: which
//! networks, how they are timed, what is said; the arithmetic is `cotk_latency::transfer::profile`'s.

use std::path::Path;
use std::time::{Instant, SystemTime};

use cotk_latency::graph::Graph;
use cotk_latency::identity::Identity;
use cotk_latency::predict::{CostModel, Model};
use cotk_latency::probe::rounds::{Pace, stolen_and_total, time};
use cotk_latency::probe::{NetworkProbe, Prepared, median, quantile};
use cotk_latency::profile::{self, Carried, Conditions, Noise, Profile, Provenance, Purpose, Verdict};
use cotk_latency::transfer::profile::{Sample, Source, nearest_threads};
use cotk_latency::work::Work;
use cotk_onnx::zoo::{OnnxNetworks, random_networks};
use cotk_run::folder::utc_rfc3339;
use cotk_run::progress::Progress;
use cotk_run::units::significant;
use cotk_search::SearchError;
use serde_json::json;

use crate::commands::profile::Args;
use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::sibling;
use crate::table::Table;

/// Random networks to choose from.
const CANDIDATES: usize = 200;
const SESSIONS: u32 = 3;

/// Chooses, measures, scales, writes, reports.
///
/// # Errors
/// A source that is none, a folder that holds a measured profile, no ONNX Runtime; interrupted.
pub(crate) fn run(args: &Args, cx: &Context, from: &Path) -> Result<Outcome, Fault> {
    let began = Instant::now();
    let source = Profile::load(from).map_err(latency)?;
    let version = cotk_onnx::runtime::version().map_err(|e| Fault::from(SearchError::Onnx(e)))?;
    let here = Identity::here([("onnxruntime".to_owned(), version)].into_iter().collect());
    let folder = args.out.clone().unwrap_or_else(|| profile::home(&here));
    if let Ok(old) = Profile::load(&folder)
        && old.head.transfer.is_none()
    {
        return Err(Fault::usage(
            format!(
                "{}: holds a profile that was measured operator by operator, which is better",
                folder.display()
            ),
            "name another folder with --out",
        ));
    }
    let threads = u32::try_from(cx.threads).unwrap_or(1);
    let from_threads = nearest_threads(&source, threads).unwrap_or(threads);
    let scaled = Source::new(&source, from_threads, &here, threads).map_err(latency)?;
    let candidates = random_networks(CANDIDATES, &[], &mut cx.seeds(0).stream("transfer candidates"));
    let candidates: Vec<Graph> = candidates.into_iter().map(|(_, graph)| graph).collect();
    let chosen: Vec<&Graph> = scaled
        .choose(&candidates, args.samples)
        .map_err(latency)?
        .into_iter()
        .map(|i| &candidates[i])
        .collect();

    let (stolen, total) = stolen_and_total();
    let mut sessions: Vec<Vec<f64>> = Vec::new();
    cx.ui.begin("measuring networks", u64::from(SESSIONS), "sessions");
    for session in 0..SESSIONS {
        cx.cancel.check()?;
        sessions.push(measure(&chosen, threads, session, cx).map_err(latency)?);
        cx.ui.advance(1);
    }
    cx.ui.end();
    let of = |network: usize| sessions.iter().map(|s| s[network]).collect::<Vec<f64>>();
    let samples: Vec<Sample> = chosen
        .iter()
        .enumerate()
        .map(|(i, graph)| Sample {
            graph: (*graph).clone(),
            ms: median(&of(i)) / 1e3,
        })
        .collect();
    let repeats: Vec<f64> = (0..chosen.len())
        .flat_map(|i| {
            let of = of(i);
            let middle = median(&of);
            of.into_iter()
                .filter(|us| *us != middle)
                .map(|us| (us / middle).ln().abs())
                .collect::<Vec<_>>()
        })
        .collect();
    let (stolen, total) = (stolen_and_total().0 - stolen, stolen_and_total().1 - total);
    #[expect(clippy::cast_precision_loss, reason = "jiffies of seconds")]
    let steal_pct = 100.0 * stolen as f64 / total.max(1) as f64;

    let mut carried = scaled.carry(&samples).map_err(latency)?;
    let floor_pct = 100.0 * median(&repeats);
    let commit = sibling::commit();
    carried.head.purpose = if args.reference {
        Purpose::Reference
    } else {
        Purpose::Machine
    };
    carried.head.provenance = Provenance {
        date: utc_rfc3339(SystemTime::now()),
        cotk_version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: (!commit.is_empty()).then(|| commit.to_owned()),
        seed: cx.seed.unwrap_or(0),
        quick: source.head.provenance.quick,
        seconds: began.elapsed().as_secs_f64(),
    };
    carried.head.conditions = Conditions::here();
    carried.head.left_out.clear();
    carried.head.carried.clear();
    carried.head.edited = None;
    carried.head.noise = Noise {
        floor_pct,
        p90_pct: 100.0 * quantile(&repeats, 0.9),
        steal_pct,
        verdict: Verdict::of(floor_pct, steal_pct),
        canaries: chosen.iter().map(|graph| graph.name().to_owned()).collect(),
    };
    // What it rests on, by name.
    let (over_there, over_here) = (source.model(&[]), carried.model(&[]));
    for (i, graph) in chosen.iter().enumerate() {
        let ms = |model: &Model, threads| -> Result<f64, Fault> {
            let work = Work::Graph { graph, threads };
            Ok(model.predict(&work).map_err(latency)?.ms)
        };
        let sessions = of(i);
        carried.head.carried.push(Carried {
            network: graph.name().to_owned(),
            threads,
            source_ms: ms(&over_there, from_threads)?,
            measured_ms: samples[i].ms,
            repeat_ms: (quantile(&sessions, 1.0) - quantile(&sessions, 0.0)) / 2e3,
            predicted_ms: ms(&over_here, threads)?,
        });
    }
    if let Some(parent) = folder.parent().filter(|p| !p.as_os_str().is_empty()) {
        cotk_run::files::create_folder(parent)?;
    }
    carried.save(&folder).map_err(latency)?;
    report(&carried, &folder)
}

/// µs of each network in one session.
fn measure(graphs: &[&Graph], threads: u32, session: u32, cx: &Context) -> cotk_latency::Result<Vec<f64>> {
    let open = |graph: &&Graph| OnnxNetworks.prepare(graph, threads, session);
    let prepared: Vec<Box<dyn Prepared>> = graphs.iter().map(open).collect::<cotk_latency::Result<_>>()?;
    let mut order = cx.seeds(0).stream(&format!("order of session {session}"));
    Ok(time(prepared, &Pace::CAREFUL, &mut order)?
        .into_iter()
        .map(|timed| timed.median_us)
        .collect())
}

fn report(profile: &Profile, folder: &Path) -> Result<Outcome, Fault> {
    let head = &profile.head;
    let transfer = head.transfer.as_ref().expect("`carry` fills it in");
    let mut warnings = vec![
        "carried over: CNN operators only, for this number of threads; `cotk profile` measures everything".to_owned(),
    ];
    if transfer.broken > 0 {
        warnings.push(format!(
            "{} networks were left aside: ten times off the others",
            transfer.broken
        ));
    }
    if head.noise.verdict == Verdict::Noisy {
        let floor = significant(head.noise.floor_pct, 2);
        warnings.push(format!(
            "too noisy to be called good: repeats differ by {floor} % (at most 5)"
        ));
    }
    let result = json!({
        "device": head.identity.id(),
        "path": folder,
        "quick": head.provenance.quick,
        "good": head.noise.verdict != Verdict::Noisy,
        "verdict": head.noise.verdict,
        "noise_floor_pct": head.noise.floor_pct,
        "timings": profile.rows.len(),
        "heldout": serde_json::Value::Null,
        "transfer": transfer,
        "networks": head.carried.iter().map(|c| json!({
            "name": c.network,
            "threads": c.threads,
            "source_ms": c.source_ms,
            "measured_ms": c.measured_ms,
            "repeat_ms": c.repeat_ms,
            "predicted_ms": c.predicted_ms,
        })).collect::<Vec<_>>(),
        "seconds": head.provenance.seconds,
    });
    let mut table = Table::new(&["what time goes into", "here over there"]);
    for (group, scale) in &transfer.scales {
        let name = serde_json::to_value(group)
            .ok()
            .and_then(|v| v.as_str().map(str::to_owned));
        table.row([name.unwrap_or_default(), significant(*scale, 3)]);
    }
    let mut networks = Table::new(&["network", "there, ms", "here, ms", "repeats %", "predicted, ms"]);
    for c in &head.carried {
        networks.row([
            c.network.clone(),
            significant(c.source_ms, 3),
            significant(c.measured_ms, 3),
            significant(100.0 * c.repeat_ms / c.measured_ms, 2),
            significant(c.predicted_ms, 3),
        ]);
    }
    let text = format!(
        "{}\n{}\n{} networks timed with {} threads, carried over from {} ({} threads)\nleft-out error {} %, 90 % within {} %; \
         written to {}\n",
        networks.render(),
        table.render(),
        transfer.networks,
        transfer.threads,
        transfer.from,
        transfer.from_threads,
        significant(transfer.left_out_mape_pct, 3),
        significant(100.0 * transfer.spread_ln.exp_m1(), 3),
        folder.display()
    );
    Ok(Outcome::new(result, text).warn(warnings))
}

fn latency(error: cotk_latency::Error) -> Fault {
    SearchError::Latency(error).into()
}
