//! What a change of one layer costs at the model's end: the uncompressed stream forks in that layer, and the forks walk on
//! beside each other, so that every layer is loaded once. Law: a fork that changes nothing costs nothing.

use cotk_model::layers::Layer;

use super::experts::{Dropped, Experts};
use super::walk::mean_kl;
use crate::Result;
use crate::partial::Partial;
use crate::pipeline::Job;
use crate::states::Stream;

/// Shares of a layer that its probes take away: its cost is not proportional to its loss.
pub(crate) const PROBE_SHARES: [f64; 3] = [0.25, 0.5, 0.7];

/// Steps the teacher's stream through changed experts: once for each fork.
pub(crate) type Fork<'a> = dyn FnMut(&Experts, Option<Dropped<'_>>) -> Result<()> + 'a;

impl Job<'_> {
    /// KL at the model's end, nats, of each fork of each MoE layer: `variants` is called with the number among MoE layers,
    /// the layer, its experts and its place, and takes as many forks as it wants.
    pub(crate) fn forks(
        &self,
        partial: &Partial,
        tokens: usize,
        mut variants: impl FnMut(usize, &Layer, &Experts, usize, &mut Fork<'_>) -> Result<()>,
    ) -> Result<Vec<Vec<f64>>> {
        let windows = self.probe_windows(tokens);
        let lengths: Vec<usize> = windows.iter().map(|w| w.len()).collect();
        let hidden = self.source.files.spec.hidden;
        let stream = |name: &str| Stream::new(&partial.states(), name, hidden, lengths.clone());
        let teacher = stream("probe-teacher");
        self.with
            .progress
            .begin("measuring sensitivity", self.layers() as u64, "layers");
        self.embed(&teacher, &windows)?;
        let mut forks: Vec<Vec<Stream>> = Vec::new();
        for index in 0..self.layers() {
            let (layer, experts) = self.load_whole(index)?;
            for fork in forks.iter().flatten() {
                self.step_under(&layer, experts.as_ref(), None, index, fork, fork)?;
                fork.forget(index);
            }
            if let Some(experts) = &experts {
                let mut own = Vec::new();
                let at = forks.len();
                variants(at, &layer, experts, index, &mut |changed, dropped| {
                    let fork = stream(&format!("probe-{at}-{}", own.len()));
                    self.step_under(&layer, Some(changed), dropped, index, &teacher, &fork)?;
                    own.push(fork);
                    Ok(())
                })?;
                forks.push(own);
            }
            self.step_under(&layer, experts.as_ref(), None, index, &teacher, &teacher)?;
            teacher.forget(index);
            self.with.progress.advance(1);
        }
        let mut found = Vec::with_capacity(forks.len());
        for layer in &forks {
            let mut own = Vec::with_capacity(layer.len());
            for fork in layer {
                own.push(mean_kl(&self.score_windows(&windows, &teacher, fork)?));
                fork.forget(self.layers());
            }
            found.push(own);
        }
        teacher.forget(self.layers());
        self.with.progress.end();
        Ok(found)
    }
}
