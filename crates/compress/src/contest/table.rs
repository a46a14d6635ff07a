//! The table of a contest: each entrant at each budget, against the best uniform code of that budget. Law: the uniform
//! code that a ratio is taken to is the one with the least KL on the deciding texts, whichever row it came from, so that
//! no choice among baselines can flatter what they are compared with.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::entrant::{Entrant, Method};
use super::judge::{Judges, TextFigure, WindowScore, interval, kl, mean_scores, perplexity, top1};

/// What building one row left: counts that no table may hide.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    pub experts: usize,
    pub experts_dropped: usize,
    /// Routed to, answering with their mean.
    pub experts_constant: usize,
    /// Experts that lost inner channels.
    pub experts_shrunk: usize,
    /// Matrices with a low-rank correction on top of their codes.
    pub matrices_corrected: usize,
    /// Experts whose Hessians had to lean on others': too few tokens came.
    pub hessians_shrunk: usize,
    /// Matrices by form, `plain2 g64`.
    pub matrices: BTreeMap<String, usize>,
}

/// One entrant at one budget with one seed, as the journal keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Contested {
    pub entrant: Entrant,
    /// As asked for, per weight of all experts of the source.
    pub budget_bits: f64,
    pub seed: u64,
    pub counts: Counts,
    /// What the chooser expected to lose.
    pub expected_loss: f64,
    /// Codes, scales, zero points, corrections.
    pub bits_per_expert_weight: f64,
    /// Of `experts.bin`, headers and padding included.
    pub expert_bytes: u64,
    /// Of all files.
    pub bytes: u64,
    pub decode_tokens_per_s: Option<f64>,
    /// Choosing and building, without the offers that all rows share and without judging.
    pub seconds: f64,
    /// While choosing and building this row.
    pub peak_rss_bytes: u64,
    /// All windows of all texts, in order.
    pub scores: Vec<WindowScore>,
}

/// One line: means over seeds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BudgetLine {
    pub budget_bits: f64,
    pub name: String,
    pub is_healed: bool,
    pub seeds: u64,
    /// Over all texts that decide.
    pub kl_nats: f64,
    /// 95 %, documents drawn.
    pub kl_ci95: [f64; 2],
    /// KL over that of the best uniform code, paired by windows; absent where no row is uniform.
    pub uniform_ratio: Option<f64>,
    pub uniform_ratio_ci95: Option<[f64; 2]>,
    /// The same over MC-style allocation, its best row without healing.
    pub mc_ratio: Option<f64>,
    pub mc_ratio_ci95: Option<[f64; 2]>,
    /// Texts whose KL is above that of the best uniform code.
    pub above_uniform_in: Vec<String>,
    pub perplexity: f64,
    pub top1_agreement: f64,
    pub bits_per_expert_weight: f64,
    pub expert_bytes: u64,
    pub bytes: u64,
    pub decode_tokens_per_s: Option<f64>,
    pub seconds: f64,
    pub peak_rss_bytes: u64,
    pub expected_loss: f64,
    pub counts: Counts,
    /// Each text, the second ones last.
    pub texts: Vec<TextFigure>,
}

/// An entrant that a budget leaves out, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Skipped {
    pub budget_bits: f64,
    pub name: String,
    pub why: String,
}

/// Whether expected losses put budgets and entrants in the order that KL does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ranking {
    pub rows: usize,
    /// Spearman's rank correlation.
    pub correlation: f64,
}

/// All lines in the order asked for.
pub(super) fn lines(entrants: &[Entrant], budgets: &[f64], done: &[Contested], judges: &Judges) -> Vec<BudgetLine> {
    let mut lines = Vec::new();
    for &budget in budgets {
        let at_budget: Vec<&Contested> = done.iter().filter(|row| row.budget_bits == budget).collect();
        let best = |is_wanted: &dyn Fn(&Entrant) -> bool| -> Option<Vec<WindowScore>> {
            let wanted = entrants.iter().filter(|entrant| is_wanted(entrant));
            let scored = wanted.filter_map(|entrant| of_entrant(entrant, &at_budget).map(|rows| rows.1));
            scored.min_by(|a, b| {
                let figure = |scores: &[WindowScore]| kl(&scores[..judges.deciding()]);
                figure(a).total_cmp(&figure(b))
            })
        };
        let uniform = best(&|entrant| entrant.is_uniform());
        let mc = best(&|entrant| entrant.method == Method::Mc && !entrant.is_healed);
        for entrant in entrants {
            if let Some((rows, scores)) = of_entrant(entrant, &at_budget) {
                lines.push(line(entrant, &rows, &scores, judges, uniform.as_deref(), mc.as_deref()));
            }
        }
    }
    lines
}

/// Its rows at this budget, and the mean of their scores.
fn of_entrant<'a>(entrant: &Entrant, rows: &[&'a Contested]) -> Option<(Vec<&'a Contested>, Vec<WindowScore>)> {
    let own: Vec<&Contested> = rows.iter().copied().filter(|row| row.entrant == *entrant).collect();
    let scores: Vec<&[WindowScore]> = own.iter().map(|row| row.scores.as_slice()).collect();
    (!own.is_empty()).then(|| (own, mean_scores(&scores)))
}

#[expect(clippy::cast_precision_loss, reason = "counts are small")]
fn line(
    entrant: &Entrant,
    rows: &[&Contested],
    scores: &[WindowScore],
    judges: &Judges,
    uniform: Option<&[WindowScore]>,
    mc: Option<&[WindowScore]>,
) -> BudgetLine {
    let deciding = judges.deciding();
    let own = &scores[..deciding];
    let kl_nats = kl(own);
    let against = |reference: Option<&[WindowScore]>| {
        let ratio = reference.map(|reference| kl_nats / kl(&reference[..deciding]));
        let drawn = judges.resample(scores, reference);
        (ratio, ratio.map(|_| interval(drawn.iter().map(|(_, ratio)| *ratio))))
    };
    let (uniform_ratio, uniform_ratio_ci95) = against(uniform);
    let (mc_ratio, mc_ratio_ci95) = against(mc);
    let texts = judges.by_text(scores);
    let of_uniform = uniform.map(|uniform| judges.by_text(uniform)).unwrap_or_default();
    let above = texts
        .iter()
        .zip(&of_uniform)
        .filter(|(own, uniform)| own.kl_nats > uniform.kl_nats)
        .map(|(own, _)| own.text.clone());
    let count = rows.len() as f64;
    let mean = |of: &dyn Fn(&Contested) -> f64| rows.iter().map(|row| of(row)).sum::<f64>() / count;
    let first = rows[0];
    let speeds: Option<Vec<f64>> = rows.iter().map(|row| row.decode_tokens_per_s).collect();
    BudgetLine {
        budget_bits: first.budget_bits,
        name: entrant.name(),
        is_healed: entrant.is_healed,
        seeds: rows.len() as u64,
        kl_nats,
        kl_ci95: interval(judges.resample(scores, None).iter().map(|(kl, _)| *kl)),
        uniform_ratio,
        uniform_ratio_ci95,
        mc_ratio,
        mc_ratio_ci95,
        above_uniform_in: above.collect(),
        perplexity: perplexity(own),
        top1_agreement: top1(own),
        bits_per_expert_weight: mean(&|row| row.bits_per_expert_weight),
        expert_bytes: rows.iter().map(|row| row.expert_bytes).max().unwrap_or(0),
        bytes: rows.iter().map(|row| row.bytes).max().unwrap_or(0),
        decode_tokens_per_s: speeds.map(|speeds| speeds.iter().sum::<f64>() / count),
        seconds: mean(&|row| row.seconds),
        peak_rss_bytes: rows.iter().map(|row| row.peak_rss_bytes).max().unwrap_or(0),
        expected_loss: mean(&|row| row.expected_loss),
        counts: first.counts.clone(),
        texts,
    }
}

/// Spearman's, over unhealed lines; `None` below three.
#[expect(clippy::cast_precision_loss, reason = "counts are small")]
pub(super) fn ranking(lines: &[BudgetLine]) -> Option<Ranking> {
    let plain: Vec<&BudgetLine> = lines.iter().filter(|line| !line.is_healed).collect();
    let count = plain.len();
    if count < 3 {
        return None;
    }
    let ranks = |of: &dyn Fn(&BudgetLine) -> f64| -> Vec<f64> {
        let values: Vec<f64> = plain.iter().map(|line| of(line)).collect();
        let rank = |value: &f64| {
            let below = values.iter().filter(|other| *other < value).count();
            let equal = values.iter().filter(|other| *other == value).count();
            below as f64 + (equal - 1) as f64 / 2.0
        };
        values.iter().map(rank).collect()
    };
    let (expected, found) = (ranks(&|line| line.expected_loss), ranks(&|line| line.kl_nats));
    let middle = (count - 1) as f64 / 2.0;
    let moment = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a - middle) * (b - middle)).sum() };
    let spread = (moment(&expected, &expected) * moment(&found, &found)).sqrt();
    (spread > 0.0).then(|| Ranking {
        rows: count,
        correlation: moment(&expected, &found) / spread,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judges() -> Judges {
        Judges {
            names: vec!["a".into(), "b".into(), "second".into()],
            counts: vec![2, 2, 1],
            texts_deciding: 2,
            windows: vec![vec![1, 2]; 5],
            documents: vec![0, 1, 2, 3, 4],
        }
    }

    fn row(name: &str, seed: u64, kls: [f64; 5], expected_loss: f64) -> Contested {
        let score = |kl: f64| WindowScore {
            targets: 10,
            kl: 10.0 * kl,
            nll: 10.0,
            teacher_nll: 10.0,
            same_top1: 8.0,
        };
        Contested {
            entrant: Entrant::parse(name).unwrap(),
            budget_bits: 2.5,
            seed,
            counts: Counts::default(),
            expected_loss,
            bits_per_expert_weight: 2.4,
            expert_bytes: 10,
            bytes: 20 + seed,
            decode_tokens_per_s: None,
            seconds: 1.0,
            peak_rss_bytes: 5,
            scores: kls.map(score).to_vec(),
        }
    }

    #[test]
    fn ratios_are_to_the_best_uniform_row_and_texts_above_it_are_named() {
        let names = ["gptq-uniform:g32:plain", "gptq-uniform", "mc", "mop", "joint"];
        let entrants: Vec<Entrant> = names.iter().map(|name| Entrant::parse(name).unwrap()).collect();
        let done = [
            row(names[0], 0, [0.8, 0.8, 0.8, 0.8, 0.8], 4.0),
            row(names[1], 0, [0.4, 0.4, 0.4, 0.4, 0.4], 2.0),
            row(names[2], 0, [0.5, 0.5, 0.5, 0.5, 0.5], 3.0),
            row(names[3], 0, [1.0, 1.0, 1.0, 1.0, 1.0], 5.0),
            row(names[3], 1, [3.0, 3.0, 3.0, 3.0, 3.0], 5.0),
            row(names[4], 0, [0.1, 0.1, 0.5, 0.5, 0.3], 1.0),
        ];
        let lines = lines(&entrants, &[2.5, 3.5], &done, &judges());
        assert_eq!(lines.iter().map(|line| line.name.as_str()).collect::<Vec<_>>(), names);
        let close = |found: Option<f64>, wanted: f64| assert!((found.unwrap() - wanted).abs() < 1e-12, "{found:?}");
        close(lines[0].uniform_ratio, 2.0);
        close(lines[1].uniform_ratio, 1.0);
        close(lines[4].uniform_ratio, 0.75);
        close(lines[4].mc_ratio, 0.6);
        close(Some(lines[3].kl_nats), 2.0);
        assert_eq!((lines[3].seeds, lines[3].bytes), (2, 21));
        assert_eq!(lines[4].above_uniform_in, ["b"]);
        assert_eq!(lines[1].above_uniform_in, Vec::<String>::new());
        assert_eq!(lines[4].texts.len(), 3);
        let ranking = ranking(&lines).unwrap();
        assert!(
            ranking.rows == 5 && (ranking.correlation - 0.9).abs() < 0.11,
            "{ranking:?}"
        );
    }
}
