//! Data sets and loaders: CIFAR-10, the built-in glyphs, text, zero-shot tasks, HELP's latency tables. Knows no model.
//! Law: a data set is a value: the same section, seed and files give the same bytes; a file that cannot be right is
//! refused with what was found.

#![forbid(unsafe_code)]

pub mod cifar;
pub mod glyphs;
pub mod help;
pub mod images;
pub mod loader;
pub mod task;
pub mod text;
pub mod zeroshot;

mod error;
mod locate;

pub use self::error::{DataError, Result};
pub use self::locate::{folders, locate};
