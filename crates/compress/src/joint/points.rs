//! Allocations tried end to end before one is built: fitted to a part of the calibration text, judged by KL on the sections
//! that nothing is fitted to. Law: what was tried stands in the journal, and the same choice comes out of it.

use cotk_runtime::store::alive;
use serde::{Deserialize, Serialize};

use super::choose;
use super::code::How;
use super::recipe::Joint;
use crate::choice::{Chooser, Fate, LayerFates, LayerOffers, Limits};
use crate::contest::judge::mean_kl;
use crate::partial::{Entry, Partial};
use crate::pipeline::Job;
use crate::states::Stream;
use crate::{CompressError, Result};

/// How much of the measured differences between layers is believed, in the order in which they are tried: the first alone
/// where nothing is measured end to end.
const TRUSTS: [f64; 4] = [1.0, 0.75, 0.5, 1.25];
/// Tokens that codes are fitted to for a trial: enough to rank allocations, a fraction of the time of a build.
const FIT_TOKENS: usize = 24_576;
/// Held-out tokens that judge a trial, at most.
const JUDGE_TOKENS: usize = 16_384;
/// Halvings of the range of bytes under a target of KL: to 1 / 64 of the range, by its logarithm.
const HALVINGS: usize = 6;

/// An allocation and what it lost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Tried {
    /// Power that measured sensitivities were raised to.
    pub trust: f64,
    /// Budget of the experts' codes; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record_bytes: Option<u64>,
    /// Sum of measured errors times sensitivities.
    pub expected_loss: f64,
    /// KL(source ‖ model), nats, over held-out calibration targets, with codes fitted to a part of the others.
    pub kl_nats: f64,
}

/// The stretch of text that trials run on: held-out windows first.
struct Bench<'a> {
    windows: Vec<&'a [u32]>,
    held_out: Vec<bool>,
    judges: usize,
    teacher: Stream,
}

impl Job<'_> {
    /// What becomes of every expert, and what that is expected to lose: the best of the allocations that the recipe has
    /// points for, or, under a target of KL, the smallest that meets it.
    pub(crate) fn joint_fates(
        &self,
        partial: &mut Partial,
        offers: &[LayerOffers],
        joint: &Joint,
        limits: &Limits,
    ) -> Result<(Vec<LayerFates>, f64)> {
        let target = self.request.recipe.budget.max_kl_nats.map(|kl| kl.get());
        let chooser = |trust| choose::Joint {
            trust,
            top_k: self.source.files.spec.routing.top_k,
            max_dropped: joint.max_dropped.get(),
        };
        let points = joint.points.clamp(1, TRUSTS.len());
        if let Some(target) = target {
            return self.smallest(partial, offers, joint, limits, target);
        }
        // Said before anything is tried.
        let first = chooser(1.0).choose(offers, limits, self.request.recipe.seed)?;
        if points == 1 || offers.is_empty() {
            return Ok(first);
        }
        let mut bench = None;
        let mut best: Option<(f64, (Vec<LayerFates>, f64))> = None;
        for &trust in &TRUSTS[..points] {
            let (fates, expected) = chooser(trust).choose(offers, limits, self.request.recipe.seed)?;
            let wanted = (trust, limits.record_bytes, expected);
            let tried = self.try_out(partial, &mut bench, joint, &fates, wanted)?;
            if best.as_ref().is_none_or(|(least, _)| tried.kl_nats < *least) {
                best = Some((tried.kl_nats, (fates, expected)));
            }
        }
        self.clear(bench);
        Ok(best.expect("at least one point").1)
    }

    /// By bisection over the bytes of codes.
    fn smallest(
        &self,
        partial: &mut Partial,
        offers: &[LayerOffers],
        joint: &Joint,
        limits: &Limits,
        target: f64,
    ) -> Result<(Vec<LayerFates>, f64)> {
        let chooser = choose::Joint {
            trust: 1.0,
            top_k: self.source.files.spec.routing.top_k,
            max_dropped: joint.max_dropped.get(),
        };
        let (least, most) = chooser.range_bytes(offers);
        let most = limits.record_bytes.map_or(most, |bytes| bytes.min(most));
        let least = least.min(most);
        let mut bench = None;
        let mut at = |partial: &mut Partial, bytes: u64| -> Result<(f64, (Vec<LayerFates>, f64))> {
            let limits = Limits {
                record_bytes: Some(bytes),
                ..*limits
            };
            let (fates, expected) = chooser.choose(offers, &limits, self.request.recipe.seed)?;
            let tried = self.try_out(partial, &mut bench, joint, &fates, (1.0, Some(bytes), expected))?;
            Ok((tried.kl_nats, (fates, expected)))
        };
        let (kl, mut best) = at(partial, most)?;
        if kl > target {
            return Err(CompressError::TargetKl {
                target,
                least: kl,
                bytes: most,
            });
        }
        #[expect(clippy::cast_precision_loss, reason = "bytes below 2^53")]
        let (mut low, mut high) = ((least as f64).ln(), (most as f64).ln());
        for _ in 0..HALVINGS {
            let middle = f64::midpoint(low, high);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between two counts of bytes"
            )]
            let bytes = (middle.exp() as u64).clamp(least, most);
            let (kl, fates) = at(partial, bytes)?;
            if kl <= target {
                (high, best) = (middle, fates);
            } else {
                low = middle;
            }
        }
        self.clear(bench);
        Ok(best)
    }

    /// From the journal, or by a trial.
    fn try_out<'b>(
        &'b self,
        partial: &mut Partial,
        bench: &mut Option<Bench<'b>>,
        joint: &Joint,
        fates: &[LayerFates],
        (trust, record_bytes, expected_loss): (f64, Option<u64>, f64),
    ) -> Result<Tried> {
        let is_this = |tried: &&Tried| tried.trust.to_bits() == trust.to_bits() && tried.record_bytes == record_bytes;
        if let Some(known) = partial.tried().iter().find(is_this) {
            return Ok(*known);
        }
        if bench.is_none() {
            *bench = Some(self.bench(partial)?);
        }
        let bench = bench.as_ref().expect("set above");
        let tried = Tried {
            trust,
            record_bytes,
            expected_loss,
            kl_nats: self.trial(partial, bench, fates, &How::of(joint).to_compare())?,
        };
        partial.finished(Entry::Tried(tried))?;
        Ok(tried)
    }

    fn bench(&self, partial: &Partial) -> Result<Bench<'_>> {
        let (mut windows, mut held_out) = (Vec::new(), Vec::new());
        let mut judges = 0;
        for (is_held, limit) in [(true, JUDGE_TOKENS), (false, FIT_TOKENS)] {
            let mut tokens = 0;
            for (window, &held) in self.texts.calibration.iter().zip(&self.texts.held_out) {
                if held == is_held && tokens < limit {
                    tokens += window.len();
                    windows.push(window.as_slice());
                    held_out.push(held);
                }
            }
            if is_held {
                judges = windows.len();
            }
        }
        let lengths = windows.iter().map(|w| w.len()).collect();
        let hidden = self.source.files.spec.hidden;
        let teacher = Stream::new(&partial.states(), "trial-teacher", hidden, lengths);
        self.embed(&teacher, &windows)?;
        for index in 0..self.layers() {
            let (layer, experts) = self.load_whole(index)?;
            self.step_under(&layer, experts.as_ref(), None, index, &teacher, &teacher)?;
            teacher.forget(index);
        }
        Ok(Bench {
            windows,
            held_out,
            judges,
            teacher,
        })
    }

    /// KL at the end of the model with these fates.
    fn trial(&self, partial: &Partial, bench: &Bench<'_>, fates: &[LayerFates], how: &How) -> Result<f64> {
        self.with.progress.begin("trying", self.layers() as u64, "layers");
        let lengths = bench.windows.iter().map(|w| w.len()).collect();
        let hidden = self.source.files.spec.hidden;
        let student = Stream::new(&partial.states(), "trial", hidden, lengths);
        self.embed_student(&student, &bench.windows)?;
        for index in 0..self.layers() {
            let layer = self.load_student_layer(index)?;
            if layer.is_moe() {
                let fates = fates.iter().find(|fates| fates.layer == layer.id());
                let fates = &fates.expect("every MoE layer has fates").experts;
                let living: Vec<bool> = fates.iter().map(|fate| *fate != Fate::Dropped).collect();
                let alive = alive(self.request.recipe.compress.dropped, &living);
                let rows = self.gather_parts(partial, &layer, &student, index, alive, &bench.held_out)?;
                let coded = self.code_layer(layer.id(), fates, &rows, how)?;
                rows.forget();
                let decoded = self.decoded_layer(layer.id(), &coded.experts, &coded.constants);
                self.step_plain(&layer, &decoded, &student, index)?;
            } else {
                self.step_dense(&layer, &student, index)?;
            }
            student.forget(index);
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        let scores = self.score_windows(&bench.windows[..bench.judges], &bench.teacher, &student)?;
        student.forget(self.layers());
        Ok(mean_kl(&scores))
    }

    fn clear(&self, bench: Option<Bench<'_>>) {
        if let Some(bench) = bench {
            bench.teacher.forget(self.layers());
        }
    }
}
