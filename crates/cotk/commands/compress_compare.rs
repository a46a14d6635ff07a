//! `cotk compress --compare`: one table of several ways to choose experts, at the same ratios on the same texts; which
//! rows are masks and which are ways to spend a budget of bits (`compress_contest`).

use std::path::PathBuf;

use cotk_compress::contest::entrant::Entrant;
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
    /// Write no container, but one table of several ways, in OUT/comparison.json too. To choose experts at --ratios:
    /// METHOD, METHOD:SPREAD or METHOD:SPREAD:field separated by commas, SPREAD being equal, unequal or paper; channels,
    /// rank, mix and mix-rank make experts smaller instead, paper is MoE-I² with both its stages and paper:experts its
    /// masks alone; :healed refits what is left. To spend
    /// bits at --budgets: rtn, gptq-uniform, mc, mop, joint, each also with :healed, :plain or :refit (GPTQ without or with
    /// the recipe's scale factors and refits), gptq-uniform also with :g32, :g16-two-level, … (default: all of the one, or,
    /// with --budgets, of the other)
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
    /// Bits per expert weight, scales included, separated by commas: each row is built at each (default: 4.5,3.5,2.5,2.25)
    #[arg(long, value_name = "BITS", requires = "compare", value_delimiter = ',')]
    pub budgets: Vec<f64>,
    /// Also decode N tokens with every container that a budget gives, and show tokens/s: wants the machine to itself
    #[arg(long, value_name = "N", requires = "compare")]
    pub decode_tokens: Option<usize>,
    /// Text that is shown beside those that decide; may be given several times
    #[arg(long, value_name = "F", requires = "compare")]
    pub second_text: Vec<PathBuf>,
    /// Tokens of each text, in windows spread over it
    #[arg(long, value_name = "N", requires = "compare", default_value_t = 8192)]
    pub text_tokens: usize,
}

/// What `--compare` names.
pub(super) enum Rows {
    /// Ways to choose which experts go.
    Masks(Vec<RowWish>),
    /// Ways to spend a budget of bits.
    Budgets(Vec<Entrant>),
}

/// `None` without `--compare`.
///
/// # Errors
/// Rows that cannot be, or that do not go into one table.
pub(super) fn rows(args: &Args) -> Result<Option<Rows>, Fault> {
    let Some(named) = args.compare.as_deref() else {
        return Ok(None);
    };
    let is_named = |word: &str| Entrant::is_named(word);
    let (some, all) = (named.split(',').any(is_named), named.split(',').all(is_named));
    let rows = match named {
        "" if args.budgets.is_empty() => Rows::Masks(RowWish::usual()),
        "" => Rows::Budgets(Entrant::usual()),
        _ if some && !all => {
            return Err(Fault::usage(
                format!("{named}: masks of experts and budgets of bits do not go into one table"),
                "compare them one after the other",
            ));
        }
        _ if some || !args.budgets.is_empty() => Rows::Budgets(parsed(
            named,
            Entrant::parse,
            "as in --compare gptq-uniform,mc,joint,joint:healed --budgets 2.5",
        )?),
        _ => Rows::Masks(parsed(
            named,
            RowWish::parse,
            "as in --compare reap,swap:unequal,genetic:equal:field; without a value: all",
        )?),
    };
    if matches!(rows, Rows::Masks(_)) && args.decode_tokens.is_some() {
        return Err(Fault::usage(
            "--decode-tokens beside masks, which write no container".to_owned(),
            "leave it out, or compare budgets",
        ));
    }
    Ok(Some(rows))
}

fn parsed<T>(rows: &str, parse: impl Fn(&str) -> Result<T, String>, help: &'static str) -> Result<Vec<T>, Fault> {
    rows.split(',')
        .map(parse)
        .collect::<Result<_, _>>()
        .map_err(|message| Fault::usage(message, help))
}

/// A comparison of masks needs a section that its rows vary; a recipe's own keys and `--set` come after.
///
/// # Errors
/// Ratios or budgets that cannot be.
pub(super) fn sets(args: &Args, rows: Option<&Rows>) -> Result<Vec<String>, Fault> {
    let first = match (rows, args.ratios.first()) {
        (Some(Rows::Budgets(_)), _) => {
            return match args.budgets.iter().find(|&&bits| !(bits > 0.0 && bits <= 16.0)) {
                None => Ok(Vec::new()),
                Some(wrong) => Err(Fault::usage(
                    format!("{wrong} is not a budget of bits per weight, expected above 0 and at most 16"),
                    "as in --budgets 4.5,2.5",
                )),
            };
        }
        (Some(Rows::Masks(_)), Some(first)) => first,
        _ => return Ok(Vec::new()),
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
/// As `cotk compress`.
pub(super) fn run(
    args: &compress::Args,
    rows: Vec<RowWish>,
    request: Request,
    with: &Surroundings<'_>,
    mut warnings: Vec<String>,
) -> Result<Outcome, Fault> {
    let own = &args.compare;
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
        "x paper",
        "perplexity",
        "bytes",
    ]);
    let interval = |[lo, hi]: [f64; 2]| format!("{}-{}", significant(lo, 2), significant(hi, 2));
    let overfit = |line: &Line| match line.chosen_loss > 0.0 {
        true => format!("{:.0}", (line.loss / line.chosen_loss - 1.0) * 100.0),
        false => String::new(),
    };
    for line in &found.lines {
        main.row([
            show(line.gone),
            line.name.clone(),
            show(line.kl_nats),
            interval(line.kl_ci95),
            line.kl_ratio.map_or_else(String::new, show),
            line.kl_ratio_ci95.map_or_else(String::new, interval),
            line.kl_of_paper.map_or_else(String::new, show),
            significant(line.perplexity, 4),
            Bytes(line.bytes).to_string(),
        ]);
    }
    let names: Vec<&str> = found.texts_before.iter().map(|text| text.text.as_str()).collect();
    let mut domains = Table::new(&[&["gone", "KL of experts by"], &names[..]].concat());
    let mut counts = Table::new(&[
        "gone",
        "experts by",
        "dropped per layer",
        "loss",
        "overfit, %",
        "healed",
        "masks tried",
        "s",
    ]);
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
            show(line.loss),
            overfit(line),
            line.healed.map_or_else(String::new, |[downs, scales, routers]| {
                format!("{downs}+{scales}+{routers}")
            }),
            line.masks_tried.to_string(),
            show(line.search_seconds),
        ]);
    }
    format!(
        "{}\n{}\n{}\nDropped experts are {}. {} targets in {} windows; perplexity before {}; intervals draw documents. \
         Healed: layers whose refit, whose scales and whose router were kept. Masks are chosen on one half of a sample of calibration tokens, loss is that of the other, overfit how much more.\n",
        main.render(),
        domains.render(),
        counts.render(),
        found.semantics.name(),
        found.targets,
        found.windows,
        significant(found.perplexity_before, 4),
    )
}
