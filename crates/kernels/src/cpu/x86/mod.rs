//! x86-64 paths. Each reads the same lines of 64 bytes; they differ in how many rows fit a register.

pub(super) mod avx2;
mod avx2_two_level;
pub(super) mod avx512;
mod avx512_stream;
mod avx512_two_level;
