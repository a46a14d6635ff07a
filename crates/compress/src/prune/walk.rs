//! Whole models under masks, before anything is coded: a stream through all layers, and what stands at their end
//! against the uncompressed model. Law: without a mask the end is the teacher's own, bit for bit.

use cotk_model::layers::Layer;
use rayon::prelude::*;

use super::experts::{Dropped, Experts};
use crate::Result;
pub use crate::contest::judge::{WindowScore, mean_kl};
use crate::pipeline::Job;
use crate::states::{Stream, attend};
use crate::walk::add;

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
