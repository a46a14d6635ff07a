//! Where coded experts come from, as far as the arithmetic cares: a mapped container, or a layer that was just coded.

use cotk_container::ContainerError;
use cotk_container::layout::{prefix_at, prefixes};
use cotk_container::manifest::DroppedMeaning;
use cotk_container::reader::{Container, ExpertView};
use cotk_container::writer::CodedExpert;
use cotk_model::moe::Alive;
use cotk_run::units::{ExpertId, LayerId};

/// Coded experts by place.
pub trait ExpertStore: Send + Sync {
    /// One expert at `bits` or its nearest prefix; `None`: dropped.
    ///
    /// # Errors
    /// A damaged record.
    fn expert(&self, layer: LayerId, expert: ExpertId, bits: u32) -> Result<Option<ExpertView<'_>>, ContainerError>;

    /// Its widest width; `None`: dropped.
    fn stored_bits(&self, layer: LayerId, expert: ExpertId) -> Option<u32>;
}

impl ExpertStore for Container {
    fn expert(&self, layer: LayerId, expert: ExpertId, bits: u32) -> Result<Option<ExpertView<'_>>, ContainerError> {
        Self::expert(self, layer, expert, bits)
    }

    fn stored_bits(&self, layer: LayerId, expert: ExpertId) -> Option<u32> {
        Self::stored_bits(self, layer, expert)
    }
}

/// One layer in memory, as it is about to be written.
#[derive(Debug)]
pub struct CodedLayer<'a> {
    pub layer: LayerId,
    /// In original numbering; `None`: dropped.
    pub experts: &'a [Option<CodedExpert>],
}

impl ExpertStore for CodedLayer<'_> {
    fn expert(&self, layer: LayerId, expert: ExpertId, bits: u32) -> Result<Option<ExpertView<'_>>, ContainerError> {
        debug_assert_eq!(layer, self.layer);
        let Some(coded) = self.experts.get(expert.index()).and_then(Option::as_ref) else {
            return Ok(None);
        };
        let [gate, up, down] = [&coded.gate, &coded.up, &coded.down].map(|matrix| {
            let width = prefix_at(&matrix.format, bits);
            matrix
                .prefix(width)
                .expect("one of its own prefixes, all planes are there")
        });
        Ok(Some(ExpertView { gate, up, down }))
    }

    fn stored_bits(&self, _layer: LayerId, expert: ExpertId) -> Option<u32> {
        let coded = self.experts.get(expert.index())?.as_ref()?;
        prefixes([coded.gate.format, coded.up.format, coded.down.format])
            .last()
            .copied()
    }
}

/// What routing may choose from.
pub fn alive(meaning: DroppedMeaning, living: &[bool]) -> Alive<'_> {
    match meaning {
        DroppedMeaning::Masked => Alive::Masked(living),
        DroppedMeaning::Removed => Alive::Removed(living),
    }
}
