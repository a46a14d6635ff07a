//! Where coded experts come from, as far as the arithmetic cares: a mapped container, or a layer that was just coded.

use cotk_container::ContainerError;
use cotk_container::layout::prefixes;
use cotk_container::manifest::DroppedMeaning;
use cotk_container::reader::Container;
use cotk_container::view::ExpertView;
use cotk_container::writer::{CodedExpert, Constant};
use cotk_model::moe::Alive;
use cotk_run::units::{ExpertId, LayerId};

/// Coded experts by place.
pub trait ExpertStore: Send + Sync {
    /// One expert at `bits` or its nearest prefix; `None`: dropped, or a constant.
    ///
    /// # Errors
    /// A damaged record.
    fn expert(&self, layer: LayerId, expert: ExpertId, bits: u32) -> Result<Option<ExpertView<'_>>, ContainerError>;

    /// Its widest width; `None`: dropped, or a constant.
    fn stored_bits(&self, layer: LayerId, expert: ExpertId) -> Option<u32>;

    /// What it answers with in the place of weights: `hidden` f16, little endian; `None`: it is no constant.
    ///
    /// # Errors
    /// A damaged record.
    fn constant(&self, layer: LayerId, expert: ExpertId) -> Result<Option<&[u8]>, ContainerError>;
}

impl ExpertStore for Container {
    fn expert(&self, layer: LayerId, expert: ExpertId, bits: u32) -> Result<Option<ExpertView<'_>>, ContainerError> {
        Self::expert(self, layer, expert, bits)
    }

    fn stored_bits(&self, layer: LayerId, expert: ExpertId) -> Option<u32> {
        Self::stored_bits(self, layer, expert)
    }

    fn constant(&self, layer: LayerId, expert: ExpertId) -> Result<Option<&[u8]>, ContainerError> {
        Self::constant(self, layer, expert)
    }
}

/// One layer in memory, as it is about to be written.
#[derive(Debug)]
pub struct CodedLayer<'a> {
    pub layer: LayerId,
    /// In original numbering; `None`: dropped, or a constant.
    pub experts: &'a [Option<CodedExpert>],
    /// In original numbering, or empty: what stands in the place of experts that are not there.
    pub constants: &'a [Option<Constant>],
}

impl ExpertStore for CodedLayer<'_> {
    fn expert(&self, layer: LayerId, expert: ExpertId, bits: u32) -> Result<Option<ExpertView<'_>>, ContainerError> {
        debug_assert_eq!(layer, self.layer);
        let Some(coded) = self.experts.get(expert.index()).and_then(Option::as_ref) else {
            return Ok(None);
        };
        Ok(Some(coded.view(bits)))
    }

    fn stored_bits(&self, _layer: LayerId, expert: ExpertId) -> Option<u32> {
        let coded = self.experts.get(expert.index())?.as_ref()?;
        prefixes(coded.formats()).last().copied()
    }

    fn constant(&self, layer: LayerId, expert: ExpertId) -> Result<Option<&[u8]>, ContainerError> {
        debug_assert_eq!(layer, self.layer);
        let found = self.constants.get(expert.index()).and_then(Option::as_ref);
        Ok(found.map(Constant::bytes))
    }
}

/// What routing may choose from; `living`: with weights, or constants.
pub fn alive(meaning: DroppedMeaning, living: &[bool]) -> Alive<'_> {
    match meaning {
        DroppedMeaning::Masked => Alive::Masked(living),
        DroppedMeaning::Removed => Alive::Removed(living),
        DroppedMeaning::Novice => {
            debug_assert!(
                living.iter().all(|&is_there| is_there),
                "every expert is a constant at least"
            );
            Alive::All
        }
    }
}
