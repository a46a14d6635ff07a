//! Whole-program tests, in one binary: each integration-test file would link again.

#![allow(clippy::unwrap_used, reason = "clippy knows test functions, not their helpers")]

mod bad_input;
mod bench;
mod check;
mod checkpoint;
mod compress_args;
mod compress_budgets;
mod compress_memory;
mod compress_stopped;
mod dense;
mod elf;
mod export;
mod families;
mod gpu;
mod interrupted;
mod model;
mod odd_experts;
mod plan;
mod plan_moe;
mod profile;
mod profile_transfer;
mod program;
mod prune;
mod recipes;
mod search;
mod serve;
mod shrink;
mod tasks;
mod tidy;
mod two_seeds;
