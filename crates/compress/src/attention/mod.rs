//! Low rank of attention, per head: what a value projection makes and an output projection reads is a product, which is
//! truncated where it counts least (COMCAT's pairing; Xiao et al., 2023; reference: moe-compression 5). The narrower pair is
//! stored in their place, and the values' cache shrinks with it. Law: at full rank nothing changes; what is truncated costs
//! what its singular values say. Queries and keys are no such pair: rotary positions, and norms, stand between them.

mod factor;
mod narrow;
pub mod recipe;
mod source;

#[cfg(test)]
mod laws;

pub(crate) use self::narrow::refuse_beside_comparison;
pub use self::narrow::{NarrowedAttention, NarrowedLayer};
pub(crate) use self::source::Narrowed;
