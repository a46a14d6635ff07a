//! Checkpoint reading, families, attention, KV cache, tokenizer, sampling, evaluation, and the MoeRuntime seam.

pub mod checkpoint;
pub mod laws;
pub mod moe;
pub mod spec;
