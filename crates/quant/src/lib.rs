//! Group codes, the byte layout of planes, GPTQ, and the allocator of choices under budgets.
//!
//! [`code`] says which codes exist, [`layout`] where each of their bits lies, [`encode`] and [`decode`] are the plain
//! reference of every kernel that reads the layout. No file is touched here and nothing multiplies: that is
//! `cotk-container`'s and `cotk-kernels`'. Law: a prefix of the planes decodes alone, to the nearest that its bits allow.
#![forbid(unsafe_code)]

pub mod allocate;
pub mod code;
pub mod coded;
pub mod decode;
pub mod encode;
pub mod gptq;
pub mod hessian;
pub mod layout;
pub mod noise;
pub mod scales;

#[cfg(test)]
mod laws;

pub use self::error::QuantError;

mod error;
