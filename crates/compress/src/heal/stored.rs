//! Routers as checkpoints store them: what a fitted row becomes, and where a build keeps it until the dense part is
//! written. Law: never below 16 bit, and what is judged is what is written.

use std::path::PathBuf;

use cotk_container::manifest::Checksum;
use cotk_model::checkpoint::DType;
use cotk_model::families::{self, LayerTensor, Tensor};
use cotk_model::layers::Layer;
use cotk_model::layers::linear::Linear;
use cotk_model::moe::Alive;
use cotk_run::files;
use half::{bf16, f16};

use super::{HealOptions, HealTokens, Part, Router, Step, heal_router};
use crate::partial::Partial;
use crate::pipeline::Job;
use crate::{CompressError, Result};

/// Of which a router may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    F32,
    F16,
    Bf16,
}

impl Stored {
    fn round(self, weight: f32) -> f32 {
        match self {
            Self::F32 => weight,
            Self::F16 => f16::from_f32(weight).to_f32(),
            Self::Bf16 => bf16::from_f32(weight).to_f32(),
        }
    }

    fn bytes(self, rows: &[f32]) -> Vec<u8> {
        let rows = rows.iter().copied();
        match self {
            Self::F32 => rows.flat_map(f32::to_le_bytes).collect(),
            Self::F16 => rows.flat_map(|w| f16::from_f32(w).to_le_bytes()).collect(),
            Self::Bf16 => rows.flat_map(|w| bf16::from_f32(w).to_le_bytes()).collect(),
        }
    }
}

impl Job<'_> {
    fn router_name(&self, layer: &Layer) -> String {
        families::of(&self.source.files.spec).tensor_name(Tensor::Layer(layer.id(), LayerTensor::Router))
    }

    /// `None`: stored in a type that nothing is written in.
    fn router_stored(&self, layer: &Layer) -> Option<Stored> {
        match self.source.files.source.info(&self.router_name(layer))?.dtype {
            DType::F32 => Some(Stored::F32),
            DType::F16 => Some(Stored::F16),
            DType::BF16 => Some(Stored::Bf16),
            DType::F8E4M3 | DType::U8 | DType::Other(_) => None,
        }
    }

    /// A layer's router fitted to what its experts have become; no rows where the step is not kept.
    pub(crate) fn recalibrated(
        &self,
        layer: &Layer,
        tokens: &HealTokens<'_>,
        alive: Alive<'_>,
        parts: &[Part<'_>],
        options: &HealOptions,
    ) -> Result<Option<(Option<Vec<f32>>, Step)>> {
        let (Some((rows, bias)), Some(stored)) = (layer.router(), self.router_stored(layer)) else {
            return Ok(None);
        };
        let router = Router {
            rows: &rows,
            bias,
            rule: &self.source.files.spec.routing,
            alive,
            stored: &|weight| stored.round(weight),
        };
        let (rows, step) = heal_router(tokens, &router, parts, options)?;
        Ok(Some((step.is_kept.then_some(rows), step)))
    }

    /// The layer with these rows in its router, held as they will be stored.
    pub(crate) fn with_router(&self, layer: Layer, rows: Vec<f32>) -> Layer {
        let spec = &self.source.files.spec;
        let (experts, hidden) = (spec.routing.experts, spec.hidden);
        let linear = match self.router_stored(&layer) {
            Some(stored @ (Stored::F16 | Stored::Bf16)) => {
                Linear::half(stored == Stored::Bf16, stored.bytes(&rows), experts, hidden)
            }
            Some(Stored::F32) | None => Linear::new(rows, experts, hidden),
        };
        layer.with_router(linear)
    }

    pub(crate) fn router_path(partial: &Partial, layer: u32) -> PathBuf {
        partial.states().join(format!("router-{layer}.bin"))
    }

    /// Keeps rows until the dense part is written.
    pub(crate) fn keep_router(&self, partial: &Partial, layer: &Layer, rows: &[f32]) -> Result<Checksum> {
        let stored = self.router_stored(layer).expect("what was fitted is stored in floats");
        let bytes = stored.bytes(rows);
        files::write_atomic(Self::router_path(partial, layer.id().0), &bytes)?;
        Ok(Checksum(files::checksum(&bytes)))
    }

    /// Names and bytes of the routers that the build fitted anew.
    pub(crate) fn kept_routers(&self, partial: &Partial) -> Result<Vec<(String, Vec<u8>)>> {
        let family = families::of(&self.source.files.spec);
        let mut kept = Vec::new();
        for moe in partial.built().into_iter().filter_map(|built| built.moe.as_ref()) {
            let Some(checksum) = moe.router else { continue };
            let layer = moe.entry.layer;
            let path = Self::router_path(partial, layer.0);
            let bytes = files::read(&path, 1 << 32)?;
            if Checksum(files::checksum(&bytes)) != checksum {
                return Err(CompressError::Survey { file: path });
            }
            kept.push((family.tensor_name(Tensor::Layer(layer, LayerTensor::Router)), bytes));
        }
        Ok(kept)
    }
}
