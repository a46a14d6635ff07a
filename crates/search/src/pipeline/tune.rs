//! Fine-tuning of one derived network, from its checkpoint on, and its accuracy on validation images.

use std::path::Path;
use std::sync::Arc;

use cotk_data::images::Images;
use cotk_data::loader::Source;
use cotk_data::task::Task;

use super::journal::Which;
use crate::method::{Drive, calibration, cosine};
use crate::trainable::Subnet;
use crate::{Result, SearchError, checkpoint};

/// Batches of 128 images behind the final statistics and ranges.
pub(super) const SETTLE: usize = 16;

/// Steps `done..total`, then the final statistics. A checkpoint of step `total + 1` is the settled network.
pub(super) fn fine_tune(
    drive: &Drive<'_>,
    which: Which,
    subnet: &mut dyn Subnet,
    done: u64,
    path: &Path,
) -> Result<()> {
    let total = drive.plan.fine_tune;
    let batches = Source::shuffled(
        Arc::clone(&drive.halves.all),
        drive.task.normalisation,
        Some(drive.task.augment),
        drive.seeds,
        &format!("fine-tune {}", which.name()),
        drive.recipe.train.batch,
    );
    let mut batches = batches.start(usize::try_from(done).expect("steps are few"));
    let what = match which {
        Which::Network => "fine-tuning",
        Which::Baseline => "training baseline",
    };
    drive.progress.begin(what, total, "steps");
    drive.progress.advance(done);
    for step in done..total {
        if drive.cancel.is_cancelled() {
            checkpoint::save(path, &step, &subnet.state())?;
            drive.cancel.check()?;
        }
        if step > 0 && step.is_multiple_of(drive.recipe.train.checkpoint_every) && step != done {
            checkpoint::save(path, &step, &subnet.state())?;
        }
        let rate = drive.recipe.train.fine_tune_rate * cosine(step, total, 0.0);
        let loss = subnet.step(&batches.next_batch(), rate)?;
        if !loss.is_finite() {
            return Err(SearchError::Diverged {
                phase: "fine-tuning",
                step,
                loss,
            });
        }
        drive.progress.advance(1);
    }
    subnet.settle(&calibration(&drive.halves.all, drive.task, SETTLE))?;
    checkpoint::save(path, &(total + 1), &subnet.state())?;
    drive.progress.end();
    Ok(())
}

pub(super) fn evaluate(subnet: &dyn Subnet, images: &Images, task: &Task) -> Result<f64> {
    let mut score = crate::trainable::Score::default();
    for from in (0..images.len()).step_by(256) {
        let range = from..(from + 256).min(images.len());
        score = score.plus(subnet.evaluate(&cotk_data::loader::plain_batch(images, task.normalisation, range))?);
    }
    Ok(score.accuracy())
}
