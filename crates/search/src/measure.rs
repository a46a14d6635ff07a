//! A network in ONNX Runtime: accuracy on images, median time of one call. Law: nothing here is predicted.

use std::time::Duration;

use cotk_data::images::Images;
use cotk_data::loader::{Batch, plain_batch};
use cotk_data::task::Normalisation;
use cotk_onnx::session::{Session, Timing};
use cotk_onnx::weights::Network;
use cotk_onnx::write::to_onnx;

use crate::Result;
use crate::trainable::Score;

/// Slices of a session in [`latencies`].
pub const SLICES: usize = 25;
/// Images a call when only verdicts matter.
const BATCH: usize = 50;

/// Loss and accuracy of a network on all `images`.
///
/// # Errors
/// [`crate::SearchError::Onnx`].
pub fn accuracy(network: &Network, images: &Images, normalisation: Normalisation, threads: usize) -> Result<Score> {
    let batch = BATCH.min(images.len()).max(1);
    let model = to_onnx(&network.with_batch(u32::try_from(batch).expect("at most 50"))?);
    let mut session = Session::from_bytes("network", &model, threads)?;
    let mut score = Score::default();
    for from in (0..images.len()).step_by(batch) {
        let batch = plain_batch(images, normalisation, from..(from + batch).min(images.len()));
        let logits = session.run_all(&planes(&batch, images.shape().channels))?;
        score = score.plus(judge(&logits, &batch.labels));
    }
    Ok(score)
}

/// Time of one inference at batch 1 on one thread: the median of `runs` slices of about 2 ms each.
///
/// # Errors
/// [`crate::SearchError::Onnx`].
pub fn latency(network: &Network, runs: usize) -> Result<Timing> {
    let mut session = Session::from_bytes("network", &to_onnx(network), 1)?;
    let input: Vec<f32> = (0..session.input_len()).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
    Ok(session.time(&input, runs, Duration::from_millis(2))?)
}

/// Several networks in turns, so that what disturbs one disturbs all: per network the median of its medians.
///
/// # Errors
/// [`crate::SearchError::Onnx`].
pub fn latencies(networks: &[&Network], rounds: usize) -> Result<Vec<Timing>> {
    let mut timings: Vec<Vec<Timing>> = vec![Vec::new(); networks.len()];
    for _ in 0..rounds {
        for (network, timings) in networks.iter().zip(&mut timings) {
            // A fresh session each round: placement in memory is fixed per session.
            timings.push(latency(network, SLICES)?);
        }
    }
    let middle = |timings: &Vec<Timing>| {
        let medians: Vec<f64> = timings.iter().map(|t| t.ms).collect();
        let of_sessions = cotk_latency::probe::Statistics::of(&medians);
        let within = cotk_latency::probe::median(&timings.iter().map(|t| t.spread_ms).collect::<Vec<_>>());
        Timing {
            ms: of_sessions.median,
            spread_ms: of_sessions.mad.max(within),
            q10_ms: of_sessions.q10,
            runs: timings.iter().map(|t| t.runs).sum(),
            calls: timings.iter().map(|t| t.calls).min().unwrap_or(0),
        }
    };
    Ok(timings.iter().map(middle).collect())
}

/// `[images, height, width, channels]` to `[images, channels, height, width]`.
fn planes(batch: &Batch, channels: usize) -> Vec<f32> {
    let image = batch.pixels.len() / batch.labels.len().max(1);
    let mut values = Vec::with_capacity(batch.pixels.len());
    for image in batch.pixels.chunks_exact(image) {
        for channel in 0..channels {
            values.extend(image.iter().skip(channel).step_by(channels));
        }
    }
    values
}

/// Cross entropy and verdicts of `[images, classes]` logits; ties go to the lower class.
fn judge(logits: &[f32], labels: &[i64]) -> Score {
    let classes = logits.len() / labels.len().max(1);
    let mut score = Score::default();
    for (row, &label) in logits.chunks_exact(classes).zip(labels) {
        let best = row
            .iter()
            .enumerate()
            .fold(0, |best, (i, v)| if *v > row[best] { i } else { best });
        let largest = f64::from(row[best]);
        let sum: f64 = row.iter().map(|&v| (f64::from(v) - largest).exp()).sum();
        let label = usize::try_from(label).expect("labels are classes");
        score.loss_sum += sum.ln() + largest - f64::from(row[label]);
        score.right += u64::from(best == label);
        score.count += 1;
    }
    score
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_and_losses_are_those_of_the_formula() {
        let score = judge(&[1.0, 1.0, 0.0, 3.0, 0.0, 0.0], &[1, 0]);
        assert_eq!((score.right, score.count), (1, 2));
        let first = (2.0 * 1f64.exp() + 1.0).ln() - 1.0;
        let second = (3f64.exp() + 2.0).ln() - 3.0;
        assert!((score.loss_sum - first - second).abs() < 1e-9);
    }

    #[test]
    fn planes_follow_each_other() {
        let batch = Batch {
            pixels: vec![1.0, 10.0, 2.0, 20.0, 3.0, 30.0, 4.0, 40.0],
            labels: vec![0, 1],
        };
        assert_eq!(planes(&batch, 2), [1.0, 2.0, 10.0, 20.0, 3.0, 4.0, 30.0, 40.0]);
    }
}
