//! What a run leaves for people: `report.md`, `search.svg`, and the facts for the ledger. Decides nothing.

use std::fmt::Write as _;
use std::path::Path;

use cotk_run::facts::Fact;
use cotk_run::files;
use cotk_run::units::{Bytes, significant};
use plotters::prelude::*;

use crate::method::{Limit, Moment};
use crate::recipe::Recipe;
use crate::result::SearchResult;
use crate::space::{GateKind, Space};
use crate::{Result, SearchError};

/// Writes `report.md` and `search.svg` into the run's folder.
///
/// # Errors
/// [`SearchError::Run`], [`SearchError::Plot`].
pub fn write(folder: &Path, result: &SearchResult, history: &[Moment], limits: &[Limit], space: &Space) -> Result<()> {
    files::write_atomic(folder.join("report.md"), text(result).as_bytes())?;
    let path = folder.join("search.svg");
    let target = limits
        .iter()
        .find(|l| l.quantity == crate::cost::Quantity::Ms)
        .map(|l| l.target);
    let svg = plot(history, target, space).map_err(|detail| SearchError::Plot {
        file: path.clone(),
        detail,
    })?;
    Ok(files::write_atomic(&path, svg.as_bytes())?)
}

fn text(result: &SearchResult) -> String {
    let mut text = String::new();
    let ms = |value: f64, spread: f64| format!("{} ± {}", significant(value, 3), significant(spread, 2));
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    line(format!(
        "# Search on {} ({}, seed {})\n",
        result.data, result.method, result.seed
    ));
    line("| | network found | baseline |".into());
    line("|---|---|---|".into());
    line(format!(
        "| what | `{}`, int8 | {} |",
        result.network.encoding, result.baseline.name
    ));
    line(format!(
        "| test accuracy | {:.2} % | {:.2} % |",
        100.0 * result.accuracy_test,
        100.0 * result.baseline.accuracy_test
    ));
    line(format!(
        "| measured ms (batch 1, 1 thread) | {} | {} |",
        ms(result.measured_ms, result.measured_spread_ms),
        ms(result.baseline.measured_ms, result.baseline.measured_spread_ms)
    ));
    line(format!(
        "| predicted ms | {} | – |",
        ms(result.predicted_ms, result.predicted_spread_ms)
    ));
    line(format!(
        "| bytes of weights | {} | {} |",
        Bytes(result.network.bytes),
        Bytes(result.baseline.bytes)
    ));
    if let Some(target) = result.target_ms {
        let verdict = if result.meets_target == Some(true) {
            "met"
        } else {
            "missed"
        };
        line(format!("| target ms | {} ({verdict}) | – |", significant(target, 3)));
    }
    if let Some(target) = result.target_bytes {
        line(format!("| target bytes | {} | – |", Bytes(target as u64)));
    }
    line(format!(
        "\nValidation accuracy {:.2} %. {:.0} s of work.\n",
        100.0 * result.accuracy_val,
        result.seconds
    ));
    if let Some(refit) = &result.latency_refit {
        line(format!(
            "Measured {:+.1} % off the prediction: the network was added to `{}`, which is {:+.1} % off now.\n",
            refit.before_pct,
            refit.profile.display(),
            refit.after_pct
        ));
    }
    line("| layer | kernel | weight bits | channels | stride |".into());
    line("|---|--:|--:|--:|--:|".into());
    for layer in &result.network.layers {
        line(format!(
            "| {} | {} | {} | {} → {} | {} |",
            layer.name, layer.kernel, layer.weight_bits, layer.channels_in, layer.channels_out, layer.stride
        ));
    }
    let _ = write!(text, "\n![The search](search.svg)\n");
    text
}

/// Facts of a finished search, for the ledger.
pub fn facts(result: &SearchResult, recipe: &Recipe, name: &str, images: &u64) -> Vec<Fact> {
    let subject = format!("search:{name}:{}", recipe.data.name.as_str());
    let fact = |metric: &str, value: f64, unit: &str| Fact::new(subject.clone(), metric, value, unit);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
    let bytes = |bytes: u64| bytes as f64;
    vec![
        fact("accuracy_test", result.accuracy_test, "fraction").count(*images),
        fact("accuracy_val", result.accuracy_val, "fraction"),
        fact("bytes", bytes(result.network.bytes), "bytes"),
        fact("predicted_ms", result.predicted_ms, "ms").spread(result.predicted_spread_ms),
        fact("measured_ms", result.measured_ms, "ms").spread(result.measured_spread_ms),
        fact("baseline_accuracy_test", result.baseline.accuracy_test, "fraction").count(*images),
        fact("baseline_measured_ms", result.baseline.measured_ms, "ms").spread(result.baseline.measured_spread_ms),
        fact("baseline_bytes", bytes(result.baseline.bytes), "bytes"),
        fact("seconds", result.seconds, "s"),
    ]
}

/// Three charts below each other: loss, expected ms against the target, probabilities of the gates.
fn plot(history: &[Moment], target: Option<f64>, space: &Space) -> Result<String, String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (900, 960)).into_drawing_area();
        root.fill(&WHITE).map_err(|e| e.to_string())?;
        let areas = root.split_evenly((3, 1));
        let last = history.last().map_or(1.0, |m| m.step as f64);
        let begins = history
            .iter()
            .find(|m| m.expected_ms.is_some())
            .map_or(0.0, |m| m.step as f64);
        let losses: Vec<(f64, f64)> = history.iter().map(|m| (m.step as f64, m.loss)).collect();
        let most = losses.iter().fold(0.1, |most: f64, l| most.max(l.1));
        chart(
            &areas[0],
            "training loss (nats)",
            (0.0..last, 0.0..most),
            &[("loss", &BLUE, losses)],
        )?;
        let pick = |of: &dyn Fn(&Moment) -> Option<f64>| -> Vec<(f64, f64)> {
            history.iter().filter_map(|m| Some((m.step as f64, of(m)?))).collect()
        };
        let (expected, hard) = (pick(&|m| m.expected_ms), pick(&|m| m.hard_ms));
        let all = expected.iter().chain(&hard).map(|v| v.1).chain(target);
        let (least, most) = all.fold((f64::INFINITY, 0.0f64), |(a, b), v| (a.min(v), b.max(v)));
        let range = if least.is_finite() {
            0.9 * least..1.1 * most
        } else {
            0.0..1.0
        };
        let line = target.map(|t| vec![(begins, t), (last, t)]).unwrap_or_default();
        chart(
            &areas[1],
            "predicted time (ms)",
            (begins..last.max(begins + 1.0), range),
            &[
                ("expected", &BLUE, expected),
                ("as the gates stand", &GREEN, hard),
                ("target", &RED, line),
            ],
        )?;
        let gate = |index: usize| pick(&|m: &Moment| m.gates.get(index).copied());
        let lines: Vec<Line<'_>> = space
            .gates()
            .iter()
            .enumerate()
            .map(|(i, g)| match g.kind {
                GateKind::Kernel => (if i == 0 { "kernels" } else { "" }, &MAGENTA, gate(i)),
                GateKind::Bits => (if i == space.kernels().len() - 1 { "bits" } else { "" }, &CYAN, gate(i)),
            })
            .collect();
        chart(
            &areas[2],
            "chance of each gate to be open",
            (begins..last.max(begins + 1.0), 0.0..1.0),
            &lines,
        )?;
        root.present().map_err(|e| e.to_string())?;
    }
    Ok(svg)
}

type Line<'a> = (&'a str, &'a RGBColor, Vec<(f64, f64)>);

fn chart(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    (x, y): (std::ops::Range<f64>, std::ops::Range<f64>),
    lines: &[Line<'_>],
) -> Result<(), String> {
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(60)
        .build_cartesian_2d(x, y)
        .map_err(|e| e.to_string())?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("step")
        .draw()
        .map_err(|e| e.to_string())?;
    for (name, colour, points) in lines {
        let colour = **colour;
        let series = chart
            .draw_series(LineSeries::new(points.iter().copied(), &colour))
            .map_err(|e| e.to_string())?;
        if !name.is_empty() && !points.is_empty() {
            series
                .label(*name)
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour));
        }
    }
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()
        .map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::tests::tiny_space;

    #[test]
    fn a_plot_is_drawn_from_any_history() {
        let space = tiny_space();
        let moment = |step: u64, gates: bool| Moment {
            step,
            loss: 2.0 / step as f64,
            expected_ms: gates.then_some(0.2),
            expected_bytes: gates.then_some(2e4),
            hard_ms: gates.then_some(0.25),
            gates: if gates { vec![0.5; space.gates().len()] } else { vec![] },
        };
        for history in [
            vec![],
            vec![moment(1, false)],
            vec![moment(1, false), moment(2, true), moment(3, true)],
        ] {
            for target in [None, Some(0.2)] {
                let svg = plot(&history, target, &space).unwrap();
                assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
            }
        }
    }
}
