//! `cotk plan`: how long a network will take on this machine, and why it is not faster. Here: which kind of input it is,
//! what is shown; reading is `cotk_onnx::foreign`'s, predicting and explaining `cotk_latency`'s. Law: what `--measure`
//! measures stands beside the prediction and never enters it.

use std::path::{Path, PathBuf};

use cotk_latency::explain::text::{time, with_spread};
use cotk_latency::explain::{Bound, Choice, Layer, Report, Request, explain};
use cotk_latency::identity::Identity;
use cotk_latency::predict::{Flag, Prediction};
use cotk_latency::profile::{self, MOST_LOST_PCT, Profile};
use cotk_latency::walk;
use cotk_onnx::foreign::measure::Measured;
use cotk_onnx::foreign::{self, Network, Options};
use cotk_run::units::significant;
use cotk_search::SearchError;
use serde_json::{Value, json};

use crate::commands::plan_moe;
use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::table::Table;

/// Predict how long a network takes here, layer by layer, and say why it is not faster
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cotk plan resnet18.onnx --threads 1\n  cotk plan net.onnx --batch 8 --in-order --measure\n  cotk plan net.onnx --input-shape image=1x3x224x224\n  cotk plan models/ref-qwen2moe --bits 4 --context 512\n  cotk plan models/ref-qwen2moe --threads 2 --now\n  cotk plan out --budget-bytes 2000000000\n\nThe prediction needs a profile of this machine: `cotk profile --quick` takes a minute."
)]
pub struct Args {
    /// ONNX file of any origin (f32, QDQ or QLinear), or the folder of a mixture of experts
    #[arg(value_name = "ONNX|MODEL")]
    pub input: PathBuf,
    /// Batch size, where the file leaves it open
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub batch: u32,
    /// Shape of an input, where the file leaves more than the batch open: NAME=1x3x224x224; once for each
    #[arg(long, value_name = "NAME=SHAPE", value_parser = shape)]
    pub input_shape: Vec<(String, Vec<u64>)>,
    /// Layers that are listed
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub layers: usize,
    /// Worst layers that are explained at length
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub why: usize,
    /// List layers as they run, not the worst first
    #[arg(long)]
    pub in_order: bool,
    /// Refuse when unknown operators are more than this share of the time or of the operators, in percent
    #[arg(long, value_name = "PCT", default_value_t = 20.0, value_parser = percent)]
    pub max_unknown: f64,
    /// Run the file in ONNX Runtime too, and print what it took beside the prediction
    #[arg(long)]
    pub measure: bool,
    #[command(flatten)]
    pub moe: plan_moe::Args,
}

/// `NAME=1x3x224x224`.
fn shape(text: &str) -> Result<(String, Vec<u64>), String> {
    let expected = || format!("`{text}`: expected NAME=1x3x224x224");
    let (name, dims) = text.split_once('=').ok_or_else(expected)?;
    let dims = dims.split('x').map(|dim| dim.parse::<u64>().ok().filter(|&d| d > 0));
    let dims = dims.collect::<Option<Vec<u64>>>().ok_or_else(expected)?;
    Ok((name.to_owned(), dims))
}

fn percent(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("`{text}` is no number"))?;
    if (0.0..=100.0).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{text}: expected 0 to 100"))
    }
}

/// Lines of text wrap here.
const WIDTH: usize = 100;

/// Plans an ONNX file or a model folder.
///
/// # Errors
/// A file that is no network, too many unknown operators, no profile, ONNX Runtime with `--measure`.
pub fn run(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    if args.input.is_dir() {
        return plan_moe::run(&args.input, &args.moe, args.batch, cx);
    }
    if args.moe.now {
        return Err(Fault::usage(
            "--now: only what our engine reads from memory is corrected",
            "give the folder of a mixture of experts, or leave --now out",
        ));
    }
    onnx(args, cx)
}

/// Operators that nobody knows, with their share of the network.
struct Unknown {
    /// `(operator, how often, predicted ms)`.
    operators: Vec<(String, usize, f64)>,
    time_pct: f64,
    nodes_pct: f64,
}

fn onnx(args: &Args, cx: &Context) -> Result<Outcome, Fault> {
    let file = args.input.display().to_string();
    let bytes = cotk_run::files::read(&args.input, foreign::LIMIT_BYTES)?;
    let options = Options {
        batch: args.batch,
        shapes: args.input_shape.clone(),
    };
    let network = foreign::read(&file, &bytes, &options).map_err(SearchError::Onnx)?;
    let walked = network.to_walk();

    let request = profile::Request {
        flag: cx.profile.clone(),
        recipe: None,
        force: cx.force,
    };
    let found = profile::find(&request, &Identity::here(std::collections::BTreeMap::new()))?;
    let model = found.model();
    let threads = u32::try_from(cx.threads).unwrap_or(1);
    let request = Request {
        network: &walked,
        threads,
        block: found.profile.head.identity.block(),
        noise_floor: found.profile.noise_of(threads),
    };
    let report = explain(&model, &request)?;
    let unknown = unknown(&walked, &report);
    let share_pct = unknown.time_pct.max(unknown.nodes_pct);
    if share_pct > args.max_unknown {
        let list = unknown.operators.iter().map(|(op, count, _)| format!("{op} ×{count}"));
        let operators = list.collect::<Vec<_>>().join(", ");
        return Err(SearchError::Onnx(cotk_onnx::Error::TooUnknown {
            file,
            operators,
            share_pct,
            limit_pct: args.max_unknown,
        })
        .into());
    }
    let measured = if args.measure {
        let timed = foreign::measure::time(&file, &bytes, &network, cx.threads, &cx.seeds(0));
        Some(timed.map_err(SearchError::Onnx)?)
    } else {
        None
    };

    let mut warnings: Vec<String> = model
        .flags()
        .iter()
        .map(|flag| format!("predicted from {}: {flag}", found.folder.display()))
        .collect();
    let lost_pct = lost_pct(&found.profile, threads, &mut warnings);
    for (op, count, ms) in &unknown.operators {
        warnings.push(format!(
            "unknown operator {op}: {count} of {} operators, {} % of the time by its bytes alone",
            walked.nodes.len(),
            significant(100.0 * ms / report.total.ms.max(f64::MIN_POSITIVE), 2)
        ));
    }
    let assumed = network.nodes.iter().filter(|n| n.is_shape_assumed).count();
    if assumed > 0 {
        warnings.push(format!(
            "the shape behind {assumed} operators is assumed: neither a rule nor the file says it"
        ));
    }
    let plan = Plan {
        args,
        file: &args.input,
        network: &network,
        report: &report,
        unknown: &unknown,
        measured,
        profile: &found.folder,
        threads,
        lost_pct,
    };
    Ok(Outcome::new(plan.json(), plan.text()).warn(warnings))
}

/// What others took of several threads while the profile was measured, in percent, for predictions with several; a warning
/// where that is too much.
pub(crate) fn lost_pct(profile: &Profile, threads: u32, warnings: &mut Vec<String>) -> Option<f64> {
    let lost_pct = profile.lost_with_several_threads_pct().filter(|_| threads > 1);
    if let Some(pct) = lost_pct.filter(|pct| *pct > MOST_LOST_PCT) {
        warnings.push(format!(
            "others took {} % of the time while several threads were measured (at most {MOST_LOST_PCT}): gains below that \
             are called not measurable",
            significant(pct, 2)
        ));
    }
    lost_pct
}

fn unknown(network: &walk::Network, report: &Report) -> Unknown {
    let mut operators: Vec<(String, usize, f64)> = Vec::new();
    for layer in &report.layers {
        let walk::Kind::Unknown { op_type } = &network.nodes[layer.node].kind else {
            continue;
        };
        match operators.iter_mut().find(|(op, ..)| op == op_type) {
            Some((_, count, ms)) => (*count, *ms) = (*count + 1, *ms + layer.ms),
            None => operators.push((op_type.clone(), 1, layer.ms)),
        }
    }
    let ms: f64 = operators.iter().map(|(_, _, ms)| ms).sum();
    let count: usize = operators.iter().map(|(_, count, _)| count).sum();
    #[expect(clippy::cast_precision_loss, reason = "numbers of operators")]
    let nodes_pct = 100.0 * count as f64 / network.nodes.len().max(1) as f64;
    Unknown {
        operators,
        time_pct: 100.0 * ms / report.total.ms.max(f64::MIN_POSITIVE),
        nodes_pct,
    }
}

/// DESIGN 4's `prediction`.
pub fn prediction_json(p: &Prediction, tokens_per_s: Option<f64>) -> Value {
    json!({
        "ms": p.ms,
        "lo_ms": p.lo_ms,
        "hi_ms": p.hi_ms,
        "spread_ms": p.spread_ms(),
        "tokens_per_s": tokens_per_s,
        "terms": p.terms,
        "origin": p.origin,
        "flags": flags(&p.flags),
    })
}

fn flags(flags: &[Flag]) -> Vec<String> {
    flags.iter().map(ToString::to_string).collect()
}

struct Plan<'a> {
    args: &'a Args,
    file: &'a Path,
    network: &'a Network,
    report: &'a Report,
    unknown: &'a Unknown,
    measured: Option<Measured>,
    profile: &'a Path,
    threads: u32,
    lost_pct: Option<f64>,
}

impl Plan<'_> {
    /// Layers as they are to be listed.
    fn ordered(&self) -> Vec<&Layer> {
        let mut layers: Vec<&Layer> = self.report.layers.iter().collect();
        if !self.args.in_order {
            layers.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        }
        layers
    }

    fn samples_per_s(&self) -> f64 {
        let batch = self
            .network
            .inputs
            .first()
            .and_then(|i| i.dims.first())
            .copied()
            .unwrap_or(1);
        #[expect(clippy::cast_precision_loss, reason = "a batch")]
        let batch = batch as f64;
        batch * 1e3 / self.report.total.ms.max(f64::MIN_POSITIVE)
    }

    fn json(&self) -> Value {
        let choice = |c: &Choice| {
            json!({
                "what": c.what,
                "layer_ms": c.layer_ms,
                "gain_ms": c.gain_ms,
                "spread_ms": c.spread_ms,
                "measurable": c.is_measurable,
            })
        };
        let layer = |l: &&Layer| {
            json!({
                "layer": l.name,
                "what": l.what,
                "fused": l.joined,
                "ms": l.ms,
                "spread_ms": l.spread_ms,
                "terms": l.terms,
                "origin": l.origin,
                "flags": flags(&l.flags),
                "bound_by": l.bound,
                "verdicts": std::iter::once(l.bound.name()).chain(l.findings.iter().map(|f| f.name())).collect::<Vec<_>>(),
                "headline": l.headline(WIDTH),
                "note": l.note(),
                "edges": l.edges.iter().map(|e| json!({
                    "kind": e.kind.name(), "ms": e.ms, "because_of": e.culprit, "why": e.why
                })).collect::<Vec<_>>(),
                "choices": l.choices.iter().map(choice).collect::<Vec<_>>(),
            })
        };
        let total = &self.report.total;
        json!({
            "input": self.file,
            "kind": "onnx",
            "producer": self.network.producer,
            "opset": self.network.opset,
            "batch": self.args.batch,
            "threads": self.threads,
            "operators": self.network.nodes.len(),
            "macs": self.network.macs(),
            "params": self.network.constants,
            "profile": self.profile,
            "lost_with_several_threads_pct": self.lost_pct,
            "prediction": prediction_json(total, None),
            "samples_per_s": self.samples_per_s(),
            "per_layer": self.ordered().iter().map(layer).collect::<Vec<_>>(),
            "rest_ms": self.report.rest_ms,
            "int8_throughout": self.report.int8.as_ref().map(choice),
            "unknown": {
                "time_pct": self.unknown.time_pct,
                "nodes_pct": self.unknown.nodes_pct,
                "limit_pct": self.args.max_unknown,
                "operators": self.unknown.operators.iter()
                    .map(|(op, count, ms)| json!({ "op": op, "count": count, "ms": ms })).collect::<Vec<_>>(),
            },
            "measured": self.measured.map(|m| json!({
                "ms": m.ms, "spread_ms": m.spread_ms, "sessions": m.sessions, "undisturbed": m.is_quiet,
                "predicted_over_measured": total.ms / m.ms,
            })),
            "placement": null,
            "pareto": [],
        })
    }

    fn text(&self) -> String {
        let mut text = self.head();
        text.push('\n');
        text.push_str(&self.table());
        text.push_str(&self.rest());
        text.push_str(&self.explained());
        text
    }

    fn head(&self) -> String {
        #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
        let millions = |count: u64| format!("{} M", significant(count as f64 / 1e6, 3));
        let producer = if self.network.producer.is_empty() {
            String::new()
        } else {
            format!("{}, ", self.network.producer)
        };
        let plural = |n: u32, what: &str| {
            if n == 1 {
                format!("1 {what}")
            } else {
                format!("{n} {what}s")
            }
        };
        let mut text = paragraph(
            "",
            &format!(
                "{}: {producer}opset {}, {} operators, {} multiply-adds, {} weights; batch {}, {}",
                self.file.display(),
                self.network.opset,
                self.network.nodes.len(),
                millions(self.network.macs()),
                millions(self.network.constants),
                self.args.batch,
                plural(self.threads, "thread"),
            ),
        );
        let total = &self.report.total;
        let origin = format!("{:?}", total.origin).to_lowercase();
        let profile = self
            .profile
            .file_name()
            .unwrap_or(self.profile.as_os_str())
            .to_string_lossy();
        text.push_str(&paragraph(
            "",
            &format!(
                "predicted {} (nine in ten: {} to {}), {} inferences per second; from the {origin} of {}",
                with_spread(total.ms, total.spread_ms()),
                time(total.lo_ms),
                time(total.hi_ms),
                significant(1e3 / total.ms.max(f64::MIN_POSITIVE), 3),
                profile
            ),
        ));
        let t = &total.terms;
        let all = t.sum_ms().max(f64::MIN_POSITIVE);
        let share = |name: &str, ms: f64| format!("{name} {} ({:.0} %)", time(ms), 100.0 * ms / all);
        let layers_layout: f64 = self.report.layers.iter().map(|l| l.terms.layout_ms).sum();
        let parts = [
            share("arithmetic", t.compute_ms),
            share("bytes", t.memory_ms + t.link_ms),
            // An edge's launch is the layout's, as in the layers below.
            share("launches", (t.launch_ms + t.layout_ms - layers_layout).max(0.0)),
            share("layout changes", layers_layout),
        ];
        text.push_str(&paragraph("", &format!("spent on {}", parts.join(", "))));
        let beyond: Vec<&str> = total
            .flags
            .iter()
            .filter_map(|flag| match flag {
                Flag::Extrapolated { path } => Some(path.as_str()),
                _ => None,
            })
            .collect();
        if !beyond.is_empty() {
            text.push_str(&paragraph(
                "",
                &format!("beyond what was measured, so with a wide spread: {}", beyond.join(", ")),
            ));
        }
        if let Some(m) = &self.measured {
            let off = 100.0 * (total.ms / m.ms - 1.0);
            let noisy = if m.is_quiet { "" } else { "; the machine was disturbed" };
            text.push_str(&paragraph(
                "",
                &format!(
                    "measured {} in ONNX Runtime ({} sessions{noisy}): the prediction is {} % {}",
                    with_spread(m.ms, m.spread_ms),
                    m.sessions,
                    significant(off.abs(), 2),
                    if off < 0.0 { "too low" } else { "too high" }
                ),
            ));
        }
        text
    }

    fn table(&self) -> String {
        let mut table = Table::new(&["layer", "predicted", "of which, %", "verdict"]);
        let shown: Vec<[String; 3]> = self
            .ordered()
            .into_iter()
            .take(self.args.layers)
            .map(|l| [shortened(&l.name, 24), with_spread(l.ms, l.spread_ms), l.of_which()])
            .collect();
        // What the other columns leave is the verdict's.
        let widest = |i: usize| shown.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
        let left = WIDTH.saturating_sub((0..3).map(|i| widest(i).max(11) + 2).sum());
        for (row, layer) in shown.iter().zip(self.ordered()) {
            table.row(row.iter().cloned().chain([layer.headline(left)]));
        }
        table.render()
    }

    /// What the table leaves out.
    fn rest(&self) -> String {
        let mut text = String::new();
        let ordered = self.ordered();
        if ordered.len() > self.args.layers {
            let hidden = &ordered[self.args.layers..];
            let ms: f64 = hidden.iter().map(|l| l.ms).sum();
            text.push_str(&format!(
                "and {} layers of {} in all: --layers {} shows them\n",
                hidden.len(),
                time(ms),
                ordered.len()
            ));
        }
        text.push_str(&format!(
            "the call itself and what layers take together: {}\n",
            time(self.report.rest_ms)
        ));
        let bound = |bound: Bound| {
            let layers = self.report.layers.iter().filter(|l| l.bound == bound);
            layers.map(|l| l.ms).sum::<f64>()
        };
        let shares = [Bound::Compute, Bound::Memory, Bound::Layout, Bound::Launch].map(|b| {
            let pct = 100.0 * bound(b) / self.report.total.ms.max(f64::MIN_POSITIVE);
            format!("{} {:.0} %", b.name(), pct.max(0.0))
        });
        text.push_str(&format!("time by what binds its layer: {}\n", shares.join(", ")));
        if let Some(int8) = &self.report.int8 {
            let total = self.report.total.ms.max(f64::MIN_POSITIVE);
            text.push_str(&if int8.gain_ms > 0.0 {
                format!(
                    "int8 throughout would take {} (−{} %)\n",
                    with_spread(total - int8.gain_ms, int8.spread_ms),
                    significant(100.0 * int8.gain_ms / total, 2)
                )
            } else {
                format!("int8 throughout would gain nothing: {}\n", time(total - int8.gain_ms))
            });
        }
        text
    }

    /// The worst layers at length.
    fn explained(&self) -> String {
        let mut worst: Vec<&Layer> = self.report.layers.iter().collect();
        worst.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        // Layers of one shape and one verdict are said once.
        let mut said: Vec<(&Layer, String, usize)> = Vec::new();
        for layer in worst {
            let alike = |other: &&mut (&Layer, String, usize)| {
                other.0.what == layer.what && other.0.bound == layer.bound && other.0.findings == layer.findings
            };
            match said.iter_mut().find(alike) {
                Some((_, _, more)) => *more += 1,
                None => said.push((layer, layer.note(), 0)),
            }
        }
        let mut text = String::new();
        for (layer, note, more) in said.into_iter().take(self.args.why) {
            if text.is_empty() {
                text.push_str("\nWhy is it not faster?\n");
            }
            let joined = match layer.joined.len() {
                0 => String::new(),
                1 => format!(" with {}", layer.joined[0]),
                n => format!(" with {} and {} more fused in", layer.joined[0], n - 1),
            };
            let alike = if more > 0 {
                format!(" (and {more} alike)")
            } else {
                String::new()
            };
            let first = format!("{}{alike}: {}{joined}, {}.", layer.name, layer.what, time(layer.ms));
            text.push_str(&paragraph("  ", &format!("{first} {note}")));
        }
        text
    }
}

/// The end of a name says most: its beginning gives way.
fn shortened(name: &str, width: usize) -> String {
    let count = name.chars().count();
    if count <= width {
        return name.to_owned();
    }
    let kept: String = name.chars().skip(count + 1 - width).collect();
    format!("…{kept}")
}

/// Text in lines of at most 100 columns; all but the first are indented.
pub(crate) fn paragraph(indent: &str, text: &str) -> String {
    let mut lines = String::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        let wanted = line.chars().count() + 1 + word.chars().count();
        if !line.is_empty() && wanted > WIDTH {
            lines.push_str(&line);
            lines.push('\n');
            line = format!("{indent}  ");
            line.push_str(word);
        } else {
            if line.is_empty() {
                line.push_str(indent);
            } else {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines.push_str(&line);
    lines.push('\n');
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_keep_their_words_and_their_width() {
        let words = "one two three four five six seven eight nine ten ".repeat(20);
        let text = paragraph("  ", &words);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH));
        assert!(text.split_whitespace().eq(words.split_whitespace()));
        assert!(text.starts_with("  one") && text.lines().nth(1).unwrap().starts_with("    "));
    }

    #[test]
    fn long_names_keep_their_end() {
        assert_eq!(shortened("features.12.block.3.conv", 12), "…lock.3.conv");
        assert_eq!(shortened("conv", 12), "conv");
    }
}
