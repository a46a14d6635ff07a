//! Whole-program tests, in one binary: each integration-test file would link again.

mod bad_input;
mod check;
mod checkpoint;
mod elf;
mod interrupted;
mod model;
mod program;
mod recipes;
mod serve;
mod tidy;
