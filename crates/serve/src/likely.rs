//! Log-probabilities for reports: over the raw logits, before temperature and nucleus, as OpenAI defines them.

use cotk_model::layers::router::log_sum_exp;

/// Natural logarithms of the softmax of `[vocab]` logits.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let sum = log_sum_exp(logits);
    logits.iter().map(|&logit| f64::from(logit) - sum).collect()
}

/// The `count` likeliest tokens, best first, ties by index.
pub(crate) fn top(logprobs: &[f64], count: usize) -> Vec<u32> {
    let mut best: Vec<usize> = Vec::with_capacity(count + 1);
    for (token, logprob) in logprobs.iter().enumerate() {
        // A later token must be strictly better.
        let at = best.partition_point(|&other| logprobs[other].total_cmp(logprob).is_ge());
        if at < count {
            best.insert(at, token);
            best.truncate(count);
        }
    }
    best.into_iter().filter_map(|token| u32::try_from(token).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_the_best_come_first() {
        let logprobs = log_softmax(&[0.0, 2.0, -1.0, 2.0]);
        assert!((logprobs.iter().map(|l| l.exp()).sum::<f64>() - 1.0).abs() < 1e-6);
        assert_eq!(top(&logprobs, 3), [1, 3, 0]);
        assert_eq!(top(&logprobs, 0), [0; 0]);
        assert_eq!(top(&logprobs, 9), [1, 3, 0, 2]);
    }
}
