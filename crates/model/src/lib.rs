//! Checkpoint reading, families, attention, KV cache, tokenizer, sampling, evaluation, and the MoeRuntime seam.
