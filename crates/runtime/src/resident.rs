//! [`Resident`]: every expert of a container in memory (mapped), modes `exact` and `little`. Law: passes
//! `cotk_model::laws` against the decoded weights in f32.

use std::sync::Arc;

use cotk_container::reader::Container;
use cotk_model::moe::{Mode, MoeRecord, MoeRuntime, MoeShape, RouterScores, RuntimeError, with_routed};
use cotk_model::spec::ModelSpec;
use cotk_run::units::LayerId;

use crate::mix::{Cpu, Mix};
use crate::policy::{AllHit, CachePolicy, Exact, Little, RoutingMode};
use crate::store::alive;
use crate::{Error, Result};

/// A container served from memory.
#[derive(Debug)]
pub struct Resident {
    container: Arc<Container>,
    shape: MoeShape,
    /// Per entry of `shape.layers`, per original expert.
    living: Vec<Vec<bool>>,
    modes: Vec<Mode>,
    little: Option<Little>,
    cpu: Cpu,
}

impl Resident {
    /// Over a container whose config gave `spec`.
    ///
    /// # Errors
    /// [`Error::Model`] where records and config differ, [`Error::Kernel`].
    pub fn new(container: Arc<Container>, spec: &ModelSpec) -> Result<Self> {
        let manifest = container.manifest();
        let wrong = |what: String, found: String, expected: String| Error::Model {
            file: container.folder().join(cotk_container::manifest::MANIFEST),
            what,
            found,
            expected,
        };
        let layers: Vec<LayerId> = manifest.layers.iter().map(|l| l.layer).collect();
        if layers != spec.moe_layers() {
            let expected = format!("{:?}", spec.moe_layers());
            return Err(wrong("layers with experts".into(), format!("{layers:?}"), expected));
        }
        if manifest.hidden != spec.hidden {
            let (found, expected) = (manifest.hidden.to_string(), spec.hidden.to_string());
            return Err(wrong("hidden size".into(), found, expected));
        }
        if let Some(layer) = manifest.layers.iter().find(|l| l.experts.len() != spec.routing.experts) {
            let (found, expected) = (layer.experts.len().to_string(), spec.routing.experts.to_string());
            return Err(wrong(format!("experts of {}", layer.layer), found, expected));
        }
        let living = manifest
            .layers
            .iter()
            .map(|l| l.experts.iter().map(|e| e.state.is_routable()).collect())
            .collect();
        let little = manifest.little_bits.map(|bits| Little { bits });
        let modes = if little.is_some() {
            vec![Mode::Exact, Mode::Little]
        } else {
            vec![Mode::Exact]
        };
        let shape = MoeShape {
            hidden: spec.hidden,
            rule: spec.routing,
            layers,
        };
        Ok(Self {
            container,
            shape,
            living,
            modes,
            little,
            cpu: Cpu::selected()?,
        })
    }

    /// What it serves from.
    pub fn container(&self) -> &Arc<Container> {
        &self.container
    }
}

impl MoeRuntime for Resident {
    fn shape(&self) -> &MoeShape {
        &self.shape
    }

    fn modes(&self) -> &[Mode] {
        &self.modes
    }

    fn forward_into(
        &self,
        layer: LayerId,
        hidden: &[f32],
        router: RouterScores<'_>,
        mode: Mode,
        out: &mut [f32],
        record: &mut MoeRecord,
    ) -> Result<(), RuntimeError> {
        let at = self.check_call(layer, hidden, &router, mode, out)?;
        let alive = alive(self.container.manifest().dropped, &self.living[at]);
        let mode: &dyn RoutingMode = match (mode, &self.little) {
            (Mode::Exact, _) => &Exact,
            (Mode::Little, Some(little)) => little,
            (Mode::Little, None) => unreachable!("not offered: refused above"),
        };
        let mix = Mix {
            store: self.container.as_ref(),
            mode,
            held_bits: &|place, stored| AllHit.held_bits(place, stored),
            cpu: self.cpu,
            layer,
            hidden_size: self.shape.hidden,
        };
        with_routed(&router, alive, |routed| mix.forward_into(hidden, routed, out, record))
    }
}
