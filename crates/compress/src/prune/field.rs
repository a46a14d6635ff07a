//! MoE-I²'s reception field: blocks of a few MoE layers, a few masks each, every combination run through the real decoder
//! layers, and the one kept that is nearest to the uncompressed model at the block's end. Combinations share what they
//! have in common: K + K² + … + K^T layer runs, each layer loaded once.

use cotk_run::units::LayerId;

use super::experts::Dropped;
use super::plan::{Surveyed, Wish};
use super::search::Found;
use crate::Result;
use crate::partial::Partial;
use crate::pipeline::Job;
use crate::states::Stream;

/// Combinations that go on to the next layer, at most; the best so far.
const BEAM: usize = 27;

/// One way through the layers so far.
struct Way {
    stream: Stream,
    /// Candidate of each MoE layer of the block.
    chosen: Vec<usize>,
}

impl Job<'_> {
    /// Which candidate of each layer; and how many layer runs that took.
    pub(super) fn fields(
        &self,
        partial: &Partial,
        surveyed: &[(LayerId, &Surveyed)],
        found: &[Found],
        wish: &Wish,
    ) -> Result<(Vec<usize>, usize)> {
        let windows = self.probe_windows(wish.end_tokens);
        let lengths: Vec<usize> = windows.iter().map(|w| w.len()).collect();
        let hidden = self.source.files.spec.hidden;
        let mut names = 0u32;
        let mut stream = || {
            names += 1;
            Stream::new(&partial.states(), &format!("field-{names}"), hidden, lengths.clone())
        };
        let teacher = stream();
        self.embed(&teacher, &windows)?;
        let first = stream();
        self.embed(&first, &windows)?;
        let mut ways = vec![Way {
            stream: first,
            chosen: Vec::new(),
        }];
        let mut all = Vec::with_capacity(found.len());
        let mut runs = 0;
        self.with
            .progress
            .begin("reception fields", self.layers() as u64, "layers");
        for index in 0..self.layers() {
            let (layer, experts) = self.load_whole(index)?;
            self.step_under(&layer, experts.as_ref(), None, index, &teacher, &teacher)?;
            teacher.forget(index);
            let moe = all.len() + ways[0].chosen.len();
            if experts.is_some() {
                let (id, surveyed) = surveyed[moe];
                let survey = self.read_survey(partial, id, surveyed)?;
                let mut next = Vec::new();
                for way in &ways {
                    for (candidate, (mask, _)) in found[moe].masks.iter().enumerate() {
                        let dropped = Dropped {
                            mask,
                            semantics: wish.semantics,
                            constants: &survey.constants,
                        };
                        let stream = stream();
                        self.step_under(&layer, experts.as_ref(), Some(dropped), index, &way.stream, &stream)?;
                        runs += 1;
                        let chosen = way.chosen.iter().copied().chain([candidate]).collect();
                        next.push(Way { stream, chosen });
                    }
                }
                ways.iter().for_each(|way| way.stream.forget(index));
                ways = next;
            } else {
                for way in &ways {
                    self.step_under(&layer, None, None, index, &way.stream, &way.stream)?;
                    way.stream.forget(index);
                }
            }
            let is_end = ways[0].chosen.len() == wish.field_layers || index + 1 == self.layers();
            let keep = if is_end { 1 } else { BEAM };
            if ways.len() > keep {
                let mut judged = Vec::with_capacity(ways.len());
                for way in ways {
                    judged.push((self.distance(&teacher, &way.stream, index + 1)?, way));
                }
                judged.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.chosen.cmp(&b.1.chosen)));
                for (_, way) in judged.drain(keep..) {
                    way.stream.forget(index + 1);
                }
                ways = judged.into_iter().map(|(_, way)| way).collect();
            }
            if is_end {
                all.append(&mut ways[0].chosen);
            }
            self.with.progress.advance(1);
        }
        self.with.progress.end();
        teacher.forget(self.layers());
        ways.iter().for_each(|way| way.stream.forget(self.layers()));
        Ok((all, runs))
    }

    /// Σ w ‖h − h_T‖² over the tokens, w = 1 / mean square of the teacher's state: what the next norm divides by. First
    /// tokens of windows are left out, as everywhere.
    fn distance(&self, teacher: &Stream, student: &Stream, layer: usize) -> Result<f64> {
        let hidden = self.source.files.spec.hidden;
        let (mut before, mut after) = (teacher.rows(layer)?, student.rows(layer)?);
        let mut sum = 0.0;
        for &window in teacher.windows() {
            self.with.cancel.check()?;
            let (before, after) = (before.next(window)?, after.next(window)?);
            let rows = before.chunks_exact(hidden).zip(after.chunks_exact(hidden));
            for (truth, own) in rows.skip(1) {
                let square = |x: f64| x * x;
                let size: f64 = truth.iter().map(|&x| square(f64::from(x))).sum();
                let off: f64 = truth
                    .iter()
                    .zip(own)
                    .map(|(&a, &b)| square(f64::from(a) - f64::from(b)))
                    .sum();
                sum += if size > 0.0 { off / size } else { 0.0 };
            }
        }
        Ok(sum)
    }
}
