//! How good a list of predictions is: error, bias, rank correlation, coverage, regret. Pure figures of pairs
//! `(predicted, measured)`; who predicted and who measured is not known here.

/// What a list of predictions is worth.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Judgement {
    pub count: usize,
    /// Mean of |predicted / measured − 1|, in percent.
    pub mape_pct: f64,
    /// Share within 5, 10 and 15 % of the measurement, in percent.
    pub within_5_pct: f64,
    pub within_10_pct: f64,
    pub within_15_pct: f64,
    /// Largest |predicted / measured − 1|, in percent.
    pub worst_pct: f64,
    /// `exp(mean ln(predicted / measured)) − 1` in percent: above 0 is too slow.
    pub bias_pct: f64,
    /// Rank correlation, see [`spearman`].
    pub spearman: f64,
    /// How much slower the network predicted fastest is than the fastest one, in percent of it.
    pub regret_pct: f64,
}

impl Judgement {
    /// Of pairs `(predicted, measured)`, both above 0. `None` for an empty list.
    pub fn of(pairs: &[(f64, f64)]) -> Option<Self> {
        if pairs.is_empty() {
            return None;
        }
        #[expect(clippy::cast_precision_loss, reason = "counts of predictions")]
        let n = pairs.len() as f64;
        let errors: Vec<f64> = pairs.iter().map(|(p, m)| (p / m - 1.0).abs()).collect();
        #[expect(clippy::cast_precision_loss, reason = "counts of predictions")]
        let within = |limit: f64| 100.0 * errors.iter().filter(|e| **e <= limit).count() as f64 / n;
        let (predicted, measured): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
        let fastest = measured.iter().copied().fold(f64::INFINITY, f64::min);
        let top = pairs.iter().min_by(|a, b| a.0.total_cmp(&b.0)).map_or(fastest, |p| p.1);
        Some(Self {
            count: pairs.len(),
            mape_pct: 100.0 * errors.iter().sum::<f64>() / n,
            within_5_pct: within(0.05),
            within_10_pct: within(0.10),
            within_15_pct: within(0.15),
            worst_pct: 100.0 * errors.iter().copied().fold(0.0, f64::max),
            bias_pct: 100.0 * ((pairs.iter().map(|(p, m)| (p / m).ln()).sum::<f64>() / n).exp() - 1.0),
            spearman: spearman(&predicted, &measured),
            regret_pct: 100.0 * (top / fastest - 1.0),
        })
    }
}

/// Spearman's rank correlation: Pearson's of the ranks, ties at their mean rank. 0 when one side is constant.
pub fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (ranks(a), ranks(b));
    #[expect(clippy::cast_precision_loss, reason = "counts of predictions")]
    let mean = (a.len() as f64 - 1.0) / 2.0;
    let product = |x: &[f64], y: &[f64]| -> f64 { x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum() };
    let both = (product(&a, &a) * product(&b, &b)).sqrt();
    if both > 0.0 { product(&a, &b) / both } else { 0.0 }
}

/// Rank of each value from 0, equal values at the mean of their ranks.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut at = 0;
    for equal in order.chunk_by(|&i, &j| values[i] == values[j]) {
        #[expect(clippy::cast_precision_loss, reason = "counts of predictions")]
        let rank = at as f64 + (equal.len() as f64 - 1.0) / 2.0;
        equal.iter().for_each(|&i| ranks[i] = rank);
        at += equal.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_do_not_see_the_scale_and_share_ties() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0]), [2.5, 0.0, 2.5, 1.0]);
        let a = [0.1, 0.4, 0.2, 9.0];
        assert!((spearman(&a, &a.map(f64::ln)) - 1.0).abs() < 1e-12);
        assert!((spearman(&a, &a.map(|x| -x)) + 1.0).abs() < 1e-12);
        assert_eq!(spearman(&a, &[1.0; 4]), 0.0);
        // By hand: ranks 0 1 2 3 against 1 0 2 3: 1 − 6·2/(4·15).
        assert!((spearman(&[1.0, 2.0, 3.0, 4.0], &[2.0, 1.0, 3.0, 4.0]) - 0.8).abs() < 1e-12);
    }

    #[test]
    fn a_judgement_is_its_formulas() {
        let judged = Judgement::of(&[(1.0, 1.0), (1.1, 1.0), (3.0, 4.0), (0.9, 2.0)]).unwrap();
        assert!((judged.mape_pct - 100.0 * (0.0 + 0.1 + 0.25 + 0.55) / 4.0).abs() < 1e-9);
        assert_eq!((judged.within_5_pct, judged.within_15_pct), (25.0, 50.0));
        assert!((judged.worst_pct - 55.0).abs() < 1e-9 && (judged.regret_pct - 100.0).abs() < 1e-9);
        assert!(judged.bias_pct < 0.0);
        assert_eq!(Judgement::of(&[]), None);
    }
}
