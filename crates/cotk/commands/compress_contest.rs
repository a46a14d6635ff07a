//! `cotk compress --compare … --budgets …`: one table of several ways to spend a budget of bits, at the same budgets, on
//! the same texts, from the same calibration tokens.

use cotk_compress::contest::budgets::{Contest, Standings, contest};
use cotk_compress::contest::entrant::Entrant;
use cotk_compress::contest::table::BudgetLine;
use cotk_compress::pipeline::{Request, Surroundings};
use cotk_run::units::{Bytes, significant};
use serde_json::Value;

use crate::commands::compress;
use crate::context::Outcome;
use crate::fault::Fault;
use crate::table::Table;

/// Where none are named.
const BUDGETS: [f64; 4] = [4.5, 3.5, 2.5, 2.25];

/// # Errors
/// A recipe without `[compress.joint]`; as `cotk compress`.
pub(super) fn run(
    args: &compress::Args,
    entrants: Vec<Entrant>,
    request: Request,
    with: &Surroundings<'_>,
    mut warnings: Vec<String>,
) -> Result<Outcome, Fault> {
    if request.recipe.compress.joint.is_none() {
        return Err(Fault::usage(
            format!(
                "{}: no [compress.joint], which budgets are compared by",
                request.recipe_name
            ),
            "leave --recipe out, or use moe-joint",
        ));
    }
    let own = &args.compare;
    let budgets = match own.budgets.as_slice() {
        [] => BUDGETS.to_vec(),
        budgets => budgets.to_vec(),
    };
    let found = contest(
        &Contest {
            request,
            entrants,
            budgets,
            plot_budgets: Vec::new(),
            texts: args.eval_text.clone(),
            second_texts: own.second_text.clone(),
            text_tokens: own.text_tokens,
            decode_tokens: own.decode_tokens,
        },
        with,
    )?;
    warnings.extend(found.warnings.clone());
    warnings.extend(found.skipped.iter().map(|skipped| {
        format!(
            "{} at {} bits is left out: {}",
            skipped.name, skipped.budget_bits, skipped.why
        )
    }));
    let mut result = serde_json::to_value(&found).unwrap_or(Value::Null);
    if let Value::Object(fields) = &mut result {
        fields.remove("warnings");
    }
    Ok(Outcome::new(result, table(&found)).warn(warnings))
}

fn table(found: &Standings) -> String {
    let show = |value: f64| significant(value, 3);
    let interval = |[lo, hi]: [f64; 2]| format!("{}-{}", significant(lo, 2), significant(hi, 2));
    let ratio = |value: Option<f64>| value.map_or_else(String::new, show);
    let mut main = Table::new(&[
        "budget",
        "bits by",
        "bits",
        "KL, nats",
        "95 %",
        "x uniform",
        "95 %",
        "x mc",
        "perplexity",
    ]);
    for line in &found.lines {
        main.row([
            show(line.budget_bits),
            line.name.clone(),
            significant(line.bits_per_expert_weight, 4),
            show(line.kl_nats),
            interval(line.kl_ci95),
            ratio(line.uniform_ratio),
            line.uniform_ratio_ci95.map_or_else(String::new, interval),
            ratio(line.mc_ratio),
            significant(line.perplexity, 4),
        ]);
    }
    let names: Vec<&str> = found.texts_before.iter().map(|text| text.text.as_str()).collect();
    let mut domains = Table::new(&[&["budget", "KL of bits by"], &names[..], &["above uniform in"]].concat());
    let mut costs = Table::new(&[
        "budget",
        "bits by",
        "top-1",
        "experts",
        "all files",
        "tokens/s",
        "s",
        "memory",
        "gone",
        "shrunk",
        "few tokens",
    ]);
    for line in &found.lines {
        let head = [show(line.budget_bits), line.name.clone()];
        let texts = line.texts.iter().map(|text| show(text.kl_nats));
        let above = match line.above_uniform_in.as_slice() {
            [] if line.uniform_ratio.is_none() => String::new(),
            [] => "none".to_owned(),
            names => names.join(" "),
        };
        domains.row(head.iter().cloned().chain(texts).chain([above]));
        costs.row(head.into_iter().chain(cost(line)));
    }
    let ranking = found.ranking.map_or_else(String::new, |ranking| {
        format!(
            "Expected losses and KL of {} rows rank alike by {}. ",
            ranking.rows,
            show(ranking.correlation)
        )
    });
    format!(
        "{}\n{}\n{}\n{} targets in {} windows of {} documents; perplexity before {}; intervals draw documents, ratios are \
         paired over windows and taken to the uniform code that is best there. A nominal form may take {} bits more than its \
         budget. {ranking}Offers took {} s and {}.\n",
        main.render(),
        domains.render(),
        costs.render(),
        found.targets,
        found.windows,
        found.documents,
        significant(found.perplexity_before, 4),
        found.allowance_bits,
        show(found.offers_seconds),
        Bytes(found.offers_peak_rss_bytes),
    )
}

/// What a row takes, and what of it is not as a plain code is.
fn cost(line: &BudgetLine) -> [String; 9] {
    let counts = &line.counts;
    let gone = counts.experts_dropped + counts.experts_constant;
    [
        significant(line.top1_agreement, 3),
        Bytes(line.expert_bytes).to_string(),
        Bytes(line.bytes).to_string(),
        line.decode_tokens_per_s
            .map_or_else(String::new, |speed| significant(speed, 3)),
        significant(line.seconds, 3),
        Bytes(line.peak_rss_bytes).to_string(),
        format!("{gone} of {}", counts.experts),
        counts.experts_shrunk.to_string(),
        counts.hessians_shrunk.to_string(),
    ]
}
