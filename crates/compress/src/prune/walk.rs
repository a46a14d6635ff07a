//! Whole models under masks, before anything is coded: a stream through all layers, and what stands at their end
//! against the uncompressed model. Law: without a mask the end is the teacher's own, bit for bit.

use cotk_model::eval::score;
use cotk_model::layers::Layer;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::experts::{Dropped, Experts};
use crate::Result;
use crate::pipeline::Job;
use crate::states::{Stream, attend};
use crate::walk::add;

/// Rows whose logits are in memory at once, per model.
const LOGIT_ROWS: usize = 512;

/// Sums over the scored targets of one window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct WindowScore {
    pub targets: usize,
    /// Σ KL(teacher ‖ student), nats.
    pub kl: f64,
    /// Σ −ln p of the token that came, nats: the student's.
    pub nll: f64,
    /// The teacher's.
    pub teacher_nll: f64,
}

impl Job<'_> {
    /// One stream through one layer, from `from` into `to`.
    pub(crate) fn step_under(
        &self,
        layer: &Layer,
        experts: Option<&Experts>,
        dropped: Option<Dropped<'_>>,
        index: usize,
        from: &Stream,
        to: &Stream,
    ) -> Result<()> {
        let spec = &self.source.files.spec;
        from.step_to(to, index, self.with.cancel, |hidden, windows| {
            attend(spec, &self.rope, layer, hidden, windows);
            let normed = layer.mixer_input(hidden);
            if let Some(experts) = experts {
                add(hidden, &experts.mix(layer, &normed, dropped)?);
            }
            layer.add_dense(&normed, hidden);
            Ok(())
        })
    }

    /// A layer and, where it has them, its experts.
    pub(crate) fn load_whole(&self, index: usize) -> Result<(Layer, Option<Experts>)> {
        let layer = self.load_layer(index)?;
        let experts = if layer.is_moe() {
            Some(self.experts(&layer)?)
        } else {
            None
        };
        Ok((layer, experts))
    }

    /// The states behind the last layer, scored window by window against the tokens that came and the teacher's states.
    pub(crate) fn score_windows(
        &self,
        windows: &[&[u32]],
        teacher: &Stream,
        student: &Stream,
    ) -> Result<Vec<WindowScore>> {
        let last = self.layers();
        let (mut teacher, mut student) = (teacher.rows(last)?, student.rows(last)?);
        let spec = &self.source.files.spec;
        let mut scores = Vec::with_capacity(windows.len());
        // Several short windows share a batch of logits.
        let mut at = 0;
        while at < windows.len() {
            self.with.cancel.check()?;
            let mut rows = windows[at].len();
            let mut end = at + 1;
            while end < windows.len() && rows + windows[end].len() <= LOGIT_ROWS {
                rows += windows[end].len();
                end += 1;
            }
            let [before, after] = [teacher.next(rows)?, student.next(rows)?];
            // The last row of a window has nobody to predict: it is scored against token 0 and left out below.
            let next: Vec<u32> = windows[at..end]
                .iter()
                .flat_map(|w| w[1..].iter().copied().chain([0]))
                .collect();
            let mut targets = Vec::with_capacity(rows);
            for (chunk, next) in next.chunks(LOGIT_ROWS).enumerate() {
                let rows = chunk * LOGIT_ROWS * spec.hidden..(chunk * LOGIT_ROWS + next.len()) * spec.hidden;
                let truth = self.ends.logits(&before[rows.clone()]);
                let own = self.ends.logits(&after[rows]);
                let teacher_nll: Vec<f64> = score(&truth, None, next, spec.vocab)
                    .iter()
                    .map(|t| t.nll_nats())
                    .collect();
                let own = score(&own, Some(&truth), next, spec.vocab);
                targets.extend(own.into_iter().zip(teacher_nll));
            }
            let mut rest = targets.as_slice();
            for window in &windows[at..end] {
                let (own, after) = rest.split_at(window.len());
                rest = after;
                let scored = &own[..window.len() - 1];
                scores.push(WindowScore {
                    targets: scored.len(),
                    kl: scored.iter().filter_map(|(t, _)| t.kl_nats()).sum(),
                    nll: scored.iter().map(|(t, _)| t.nll_nats()).sum(),
                    teacher_nll: scored.iter().map(|(_, nll)| nll).sum(),
                });
            }
            at = end;
        }
        Ok(scores)
    }

    /// All experts of a layer in f32.
    pub(crate) fn experts(&self, layer: &Layer) -> Result<Experts> {
        let (spec, source) = (&self.source.files.spec, self.source.files.source.as_ref());
        let ids: Vec<u32> = (0..).take(spec.routing.experts).collect();
        let load = |id| cotk_model::reference::load_expert(spec, source, layer.id(), cotk_run::units::ExpertId(id));
        Ok(Experts {
            mlps: ids.into_par_iter().map(load).collect::<Result<_, _>>()?,
            hidden: spec.hidden,
        })
    }

    /// The first calibration windows, up to about `tokens`: windows are spread over the text, so these are too.
    pub(crate) fn probe_windows(&self, tokens: usize) -> Vec<&[u32]> {
        let mut total = 0;
        let windows = self.texts.calibration.iter().take_while(|window| {
            let is_first = total == 0;
            total += window.len();
            is_first || total <= tokens
        });
        windows.map(Vec::as_slice).collect()
    }
}

/// Mean over all targets.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
pub fn mean_kl(scores: &[WindowScore]) -> f64 {
    let targets: usize = scores.iter().map(|s| s.targets).sum();
    scores.iter().map(|s| s.kl).sum::<f64>() / targets.max(1) as f64
}
