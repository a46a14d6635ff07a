//! Whole-program tests, in one binary: each integration-test file would link again.

mod check;
mod elf;
mod program;
mod tidy;
