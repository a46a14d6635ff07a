//! `cotk search` where libtorch is: joins the search with the supernet, and renders what it found.

use cotk_program::commands::search::Args;
use cotk_program::context::{Context, Outcome};
use cotk_program::fault::Fault;
use cotk_program::provenance::{self, Run};
use cotk_program::sibling;
use cotk_program::table::Table;
use cotk_run::facts::FactSink;
use cotk_run::folder::runs_root;
use cotk_run::recipe;
use cotk_run::units::{Bytes, significant};
use cotk_search::pipeline::{self, DryRun, Request};
use cotk_search::result::SearchResult;
use cotk_supernet::{Settings, Supernet};
use serde_json::json;

/// Runs or resumes the search of a recipe.
///
/// # Errors
/// As the libraries report them.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    let (recipe, name) = args.load(cx.seed)?;
    cotk_supernet::set_threads(cx.threads);
    let request = Request {
        recipe,
        name,
        runs: runs_root(),
        resume: args.resume.clone(),
        restart: args.restart,
        profile: cx.profile.clone(),
        force: cx.force,
        threads: cx.threads,
        cotk_version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: sibling::commit().to_owned(),
        make: &|space, normalisation, recipe, seeds| {
            let settings = Settings {
                normalisation,
                momentum: recipe.train.momentum,
                weight_decay: recipe.train.weight_decay,
            };
            Box::new(Supernet::new(space, settings, seeds))
        },
        cancel: &cx.cancel,
        progress: &cx.ui,
    };
    if args.dry_run {
        let plan = pipeline::dry_run(&request)?;
        return Ok(Outcome::new(json!({ "plan": plan }), plan_table(&plan)));
    }
    let hash = recipe::hash(&request.recipe)?;
    let finished = pipeline::run(&request, |folder, facts| {
        let run = Run {
            recipe_hash: Some(hash),
            seed: Some(request.recipe.seed),
            folder: Some(folder),
        };
        let ledger = provenance::ledger(cx, run)?;
        for fact in facts {
            ledger.record(fact.clone())?;
        }
        Ok::<(), Fault>(())
    })?;
    let result = serde_json::to_value(&finished.result).map_err(|e| Fault::usage(e.to_string(), ""))?;
    Ok(Outcome::new(result, result_table(&finished.result)).warn(finished.warnings))
}

fn plan_table(dry: &DryRun) -> String {
    let mut table = Table::new(&["plan", "value"]);
    let ms = |value: Option<f64>| value.map_or("not known yet".to_owned(), |v| format!("{} ms", significant(v, 3)));
    let plan = &dry.plan;
    table
        .row(["networks in the space", &significant(dry.networks, 3)])
        .row(["warm-up steps", &plan.warm_up.to_string()])
        .row(["search steps", &plan.choose.to_string()])
        .row(["fine-tuning steps, twice", &plan.fine_tune.to_string()])
        .row(["one step", &format!("{} ms (20 timed)", significant(plan.step_ms, 3))])
        .row(["predicted time", &format!("{:.0} s", plan.predicted_s)])
        .row([
            "largest network, int8",
            &format!("{}, {}", ms(dry.largest_ms), Bytes(dry.largest_bytes)),
        ])
        .row([
            "smallest network",
            &format!("{}, {}", ms(dry.smallest_ms), Bytes(dry.smallest_bytes)),
        ])
        .row(["target", &ms(dry.target_ms)])
        .row([
            "byte budget",
            &dry.target_bytes
                .map_or("none".to_owned(), |b| Bytes(b as u64).to_string()),
        ])
        .row(["profile", &dry.profile])
        .row(["disk", &Bytes(dry.disk_bytes).to_string()]);
    table.render()
}

fn result_table(result: &SearchResult) -> String {
    let mut table = Table::new(&[
        "network",
        "test acc. %",
        "measured ms",
        "± ms",
        "predicted ms",
        "weights",
    ]);
    let percent = |v: f64| format!("{:.2}", 100.0 * v);
    table.row([
        "found, int8".to_owned(),
        percent(result.accuracy_test),
        significant(result.measured_ms, 3),
        significant(result.measured_spread_ms, 2),
        format!(
            "{} ± {}",
            significant(result.predicted_ms, 3),
            significant(result.predicted_spread_ms, 2)
        ),
        Bytes(result.network.bytes).to_string(),
    ]);
    table.row([
        result.baseline.name.clone(),
        percent(result.baseline.accuracy_test),
        significant(result.baseline.measured_ms, 3),
        significant(result.baseline.measured_spread_ms, 2),
        String::new(),
        Bytes(result.baseline.bytes).to_string(),
    ]);
    let mut text = format!("{}\n{}", result.network.encoding, table.render());
    if let Some(target) = result.target_ms {
        let verdict = if result.meets_target == Some(true) {
            "met"
        } else {
            "missed"
        };
        text += &format!("target {} ms: {verdict}\n", significant(target, 3));
    }
    text += &format!(
        "{:.1} times faster than the baseline, {:.1} times smaller; {:.0} s\n{}\n",
        result.baseline.measured_ms / result.measured_ms,
        result.baseline.bytes as f64 / result.network.bytes as f64,
        result.seconds,
        result.run.join("report.md").display()
    );
    text
}
