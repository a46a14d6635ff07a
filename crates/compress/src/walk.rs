//! Steps that both passes share: one stream through one layer, experts of the source in f32.
//! Law: one layer's weights are in memory, never two.

use cotk_model::layers::{Layer, Mlp};
use cotk_model::moe::{Alive, Mode, MoeRuntime, MoeShape, route};
use cotk_model::reference::{Absent, PlainMoe, load_expert};
use cotk_run::units::{ExpertId, LayerId};
use rayon::prelude::*;

use crate::Result;
use crate::layer::{LayerView, Observer, Samples, Usage};
use crate::pipeline::Job;
use crate::states::{Stream, attend};

impl Job<'_> {
    pub(crate) fn view<'v>(&'v self, layer: LayerId, usage: &'v Usage, samples: &'v Samples) -> LayerView<'v> {
        LayerView {
            layer,
            spec: &self.source.files.spec,
            source: self.source.files.source.as_ref(),
            usage,
            samples,
        }
    }

    /// How the stream that enters a MoE layer uses its experts, if the router had its way.
    pub(crate) fn observe(&self, layer: &Layer, stream: &Stream, index: usize) -> Result<(Usage, Samples)> {
        let spec = &self.source.files.spec;
        let mut observer = Observer::new(spec.hidden, spec.routing.experts);
        stream.read(index, self.with.cancel, |mut hidden, windows| {
            attend(spec, &self.rope, layer, &mut hidden, windows);
            let normed = layer.mixer_input(&hidden);
            let scores = layer.router_scores(&normed).expect("a MoE layer has a router");
            let routed = route(&layer.routing(&scores)?, Alive::All);
            observer.see(&hidden, &normed, &routed);
            Ok(())
        })?;
        Ok(observer.finish())
    }

    /// One layer's experts in f32: the only ones of the source in memory.
    pub(crate) fn plain_layer(&self, layer: LayerId) -> Result<PlainMoe> {
        let (spec, source) = (&self.source.files.spec, self.source.files.source.as_ref());
        let ids: Vec<ExpertId> = (0..).map(ExpertId).take(spec.routing.experts).collect();
        let load = |expert| Ok(Some(load_expert(spec, source, layer, expert)?));
        let experts: Vec<Option<Mlp>> = ids.into_par_iter().map(load).collect::<Result<_>>()?;
        let shape = MoeShape {
            hidden: spec.hidden,
            rule: spec.routing,
            layers: vec![layer],
        };
        Ok(PlainMoe::from_experts(shape, vec![experts], Absent::Masked))
    }

    pub(crate) fn step_dense(&self, layer: &Layer, stream: &Stream, index: usize) -> Result<()> {
        stream.step(index, self.with.cancel, |hidden, windows| {
            attend(&self.source.files.spec, &self.rope, layer, hidden, windows);
            let normed = layer.mixer_input(hidden);
            layer.add_dense(&normed, hidden);
            Ok(())
        })
    }

    pub(crate) fn step_plain(&self, layer: &Layer, plain: &PlainMoe, stream: &Stream, index: usize) -> Result<()> {
        let spec = &self.source.files.spec;
        stream.step(index, self.with.cancel, |hidden, windows| {
            attend(spec, &self.rope, layer, hidden, windows);
            let normed = layer.mixer_input(hidden);
            let mixed = run_plain(layer, plain, &normed)?;
            add(hidden, &mixed);
            layer.add_dense(&normed, hidden);
            Ok(())
        })
    }
}

pub(crate) fn run_plain(layer: &Layer, plain: &PlainMoe, normed: &[f32]) -> Result<Vec<f32>> {
    let scores = layer.router_scores(normed).expect("a MoE layer has a router");
    let router = layer.routing(&scores)?;
    let mut mixed = vec![0.0; normed.len()];
    plain.forward(layer.id(), normed, router, Mode::Exact, &mut mixed)?;
    Ok(mixed)
}

pub(crate) fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}
