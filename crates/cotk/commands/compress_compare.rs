//! `cotk compress --compare`: one table of several ways to choose experts, at the same ratios on the same texts.

use std::path::PathBuf;

use cotk_compress::pipeline::{Request, Surroundings};
use cotk_compress::prune::compare::{Compare, Comparison, Line, RowWish, compare};
use cotk_run::units::{Bytes, significant};
use serde_json::Value;

use crate::commands::compress;
use crate::context::Outcome;
use crate::fault::Fault;
use crate::table::Table;

/// What is compared.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Write no container, but one table of several ways to choose experts, in OUT/comparison.json too:
    /// METHOD, METHOD:SPREAD or METHOD:SPREAD:field separated by commas, SPREAD being equal, unequal or paper (default:
    /// all)
    #[arg(long, value_name = "ROWS", num_args = 0..=1, default_missing_value = "", requires = "eval_text")]
    pub compare: Option<String>,
    /// Shares of experts to drop, separated by commas
    #[arg(
        long,
        value_name = "R",
        requires = "compare",
        default_value = "0.25,0.5",
        value_delimiter = ','
    )]
    pub ratios: Vec<f64>,
    /// Text that is shown beside those that decide; may be given several times
    #[arg(long, value_name = "F", requires = "compare")]
    pub second_text: Vec<PathBuf>,
    /// Tokens of each text, in windows spread over it
    #[arg(long, value_name = "N", requires = "compare", default_value_t = 8192)]
    pub text_tokens: usize,
}

/// A comparison needs a section that its rows vary; a recipe's own keys and `--set` come after.
///
/// # Errors
/// Ratios that cannot be.
pub(super) fn sets(args: &Args) -> Result<Vec<String>, Fault> {
    let (Some(_), Some(first)) = (&args.compare, args.ratios.first()) else {
        return Ok(Vec::new());
    };
    if let Some(wrong) = args.ratios.iter().find(|&&ratio| !(ratio > 0.0 && ratio < 1.0)) {
        return Err(Fault::usage(
            format!("{wrong} is not a share of experts to drop, expected above 0 and below 1"),
            "as in --ratios 0.25,0.5",
        ));
    }
    Ok(vec![
        "compress.drop_ratio=0".to_owned(),
        format!("compress.prune.ratio={first}"),
    ])
}

/// # Errors
/// Rows that cannot be; as `cotk compress`.
pub(super) fn run(
    args: &compress::Args,
    request: Request,
    with: &Surroundings<'_>,
    mut warnings: Vec<String>,
) -> Result<Outcome, Fault> {
    let own = &args.compare;
    let rows = match own.compare.as_deref() {
        None | Some("") => RowWish::usual(),
        Some(rows) => rows
            .split(',')
            .map(RowWish::parse)
            .collect::<Result<_, _>>()
            .map_err(|message| {
                Fault::usage(
                    message,
                    "as in --compare reap,swap:unequal,genetic:equal:field; without a value: all",
                )
            })?,
    };
    let found = compare(
        &Compare {
            request,
            rows,
            ratios: own.ratios.clone(),
            texts: args.eval_text.clone(),
            second_texts: own.second_text.clone(),
            text_tokens: own.text_tokens,
        },
        with,
    )?;
    warnings.extend(found.warnings.clone());
    let mut result = serde_json::to_value(&found).unwrap_or(Value::Null);
    if let Value::Object(fields) = &mut result {
        fields.remove("warnings");
    }
    Ok(Outcome::new(result, table(&found)).warn(warnings))
}

fn table(found: &Comparison) -> String {
    let show = |value: f64| significant(value, 3);
    let mut main = Table::new(&[
        "gone",
        "experts by",
        "KL, nats",
        "95 %",
        "x reap",
        "95 %",
        "perplexity",
        "loss",
        "overfit, %",
        "bytes",
    ]);
    let interval = |[lo, hi]: [f64; 2]| format!("{}-{}", show(lo), show(hi));
    let overfit = |line: &Line| match line.chosen_loss > 0.0 {
        true => format!("{:.0}", (line.loss / line.chosen_loss - 1.0) * 100.0),
        false => String::new(),
    };
    for line in &found.lines {
        main.row([
            show(line.ratio),
            line.name.clone(),
            show(line.kl_nats),
            interval(line.kl_ci95),
            line.kl_ratio.map_or_else(String::new, show),
            line.kl_ratio_ci95.map_or_else(String::new, interval),
            significant(line.perplexity, 4),
            show(line.loss),
            overfit(line),
            Bytes(line.bytes).to_string(),
        ]);
    }
    let names: Vec<&str> = found.texts_before.iter().map(|text| text.text.as_str()).collect();
    let mut domains = Table::new(&[&["gone", "KL of experts by"], &names[..]].concat());
    let mut counts = Table::new(&["gone", "experts by", "dropped per layer", "masks tried", "s"]);
    for line in &found.lines {
        let head = [show(line.ratio), line.name.clone()];
        domains.row(
            head.iter()
                .cloned()
                .chain(line.texts.iter().map(|text| show(text.kl_nats))),
        );
        let dropped: Vec<String> = line.dropped.iter().map(usize::to_string).collect();
        counts.row([
            show(line.ratio),
            line.name.clone(),
            dropped.join(" "),
            line.masks_tried.to_string(),
            show(line.search_seconds),
        ]);
    }
    format!(
        "{}\n{}\n{}\nDropped experts are {}. {} targets in {} windows; perplexity before {}; intervals are paired over windows. \
         Masks are chosen on one half of a sample of calibration tokens, loss is that of the other, overfit how much more.\n",
        main.render(),
        domains.render(),
        counts.render(),
        found.semantics.name(),
        found.targets,
        found.windows,
        significant(found.perplexity_before, 4),
    )
}
