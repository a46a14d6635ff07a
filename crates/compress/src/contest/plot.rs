//! KL against bytes of the routed experts, every entrant a line over its budgets: `pareto.svg`.

use plotters::prelude::*;

use super::table::BudgetLine;

const SIZE: (u32, u32) = (900, 600);
const MIB: f64 = 1_048_576.0;

/// The plot; KL runs along a logarithm.
///
/// # Errors
/// What the plotter says.
pub(super) fn pareto(lines: &[BudgetLine]) -> Result<String, String> {
    let mut names: Vec<&str> = Vec::new();
    for line in lines.iter().filter(|line| line.kl_nats > 0.0) {
        if !names.contains(&line.name.as_str()) {
            names.push(&line.name);
        }
    }
    let points = |name: &str| -> Vec<(f64, f64)> {
        let own = lines.iter().filter(|line| line.name == name && line.kl_nats > 0.0);
        let mut points: Vec<(f64, f64)> = own.map(|line| (mib(line.expert_bytes), line.kl_nats)).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    let all: Vec<(f64, f64)> = names.iter().flat_map(|name| points(name)).collect();
    let range = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let values = all.iter().map(of);
        values.fold((f64::INFINITY, 0.0f64), |(least, most), x| (least.min(x), most.max(x)))
    };
    let ((left, right), (low, high)) = (range(&|p| p.0), range(&|p| p.1));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(|e| e.to_string())?;
        if !all.is_empty() {
            let mut chart = ChartBuilder::on(&root)
                .caption("KL against bytes of the routed experts", ("sans-serif", 20))
                .margin(16)
                .x_label_area_size(40)
                .y_label_area_size(64)
                .build_cartesian_2d(0.95 * left..1.02 * right, (0.8 * low..1.25 * high).log_scale())
                .map_err(|e| e.to_string())?;
            chart
                .configure_mesh()
                .x_desc("MiB of experts, scales and headers included")
                .y_desc("KL on the test texts, nats")
                .y_label_formatter(&|kl| format!("{kl:.4}"))
                .draw()
                .map_err(|e| e.to_string())?;
            for (at, name) in names.iter().enumerate() {
                let color = Palette99::pick(at).to_rgba();
                let series = LineSeries::new(points(name), color.stroke_width(2)).point_size(3);
                chart
                    .draw_series(series)
                    .map_err(|e| e.to_string())?
                    .label(*name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.4))
                .draw()
                .map_err(|e| e.to_string())?;
        }
        root.present().map_err(|e| e.to_string())?;
    }
    Ok(svg)
}

#[expect(clippy::cast_precision_loss, reason = "byte counts are far below 2^53")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contest::table::Counts;

    #[test]
    fn every_entrant_is_on_the_plot() {
        let line = |name: &str, budget_bits: f64, kl_nats: f64| BudgetLine {
            budget_bits,
            name: name.into(),
            is_healed: false,
            seeds: 1,
            kl_nats,
            kl_ci95: [kl_nats; 2],
            uniform_ratio: None,
            uniform_ratio_ci95: None,
            mc_ratio: None,
            mc_ratio_ci95: None,
            above_uniform_in: Vec::new(),
            perplexity: 10.0,
            top1_agreement: 0.9,
            bits_per_expert_weight: budget_bits,
            expert_bytes: (budget_bits * 1e6) as u64,
            bytes: 0,
            decode_tokens_per_s: None,
            seconds: 0.0,
            peak_rss_bytes: 0,
            expected_loss: 0.0,
            counts: Counts::default(),
            texts: Vec::new(),
        };
        let svg = pareto(&[line("rtn", 2.5, 0.3), line("rtn", 4.5, 0.01), line("joint", 2.5, 0.02)]).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(["rtn", "joint", "nats"].iter().all(|text| svg.contains(text)));
        assert!(pareto(&[]).is_ok());
    }
}
