//! The compressed checkpoint: manifest, dense part, expert records.
//!
//! [`manifest`] is the only truth about bits and shapes, [`decision`] says why, [`record`] the header before each expert, `layout` where
//! planes lie; [`writer`] writes layer by layer, [`reader`] maps and checks;
//! [`gguf`] writes and reads llama.cpp's file. Not here: what to keep and at which width
//! (`cotk-compress`), what a config means (`cotk-model`). Law: a damaged byte is refused by name, never a panic.

pub mod decision;
pub mod dense;
pub mod finite;
pub mod gguf;
pub mod layout;
pub mod low_rank;
pub mod manifest;
pub mod reader;
pub mod record;
pub mod view;
pub mod writer;

pub use self::error::{ContainerError, Result};
/// Why a code cannot be read.
pub use cotk_quant::QuantError;

mod error;
#[cfg(test)]
mod laws;
