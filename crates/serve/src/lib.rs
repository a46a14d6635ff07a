//! The OpenAI-compatible HTTP server: requests, scheduling, metrics. No arithmetic: that is the model's and its runtime's.
//!
//! The way of a request: `http` (key, body) → `request` (fields) → `http::App::resolve` (template, tokens) → `schedule`
//! (queue, slots, rounds: one step of all who decode, one chunk of each prompt) → `sequence` (prompt, tokens, text) → `reply` (JSON) → `http` (whole or streamed).

#![forbid(unsafe_code)]

mod clock;
pub mod engine;
mod error;
mod http;
mod likely;
pub mod metrics;
pub mod model_batch;
pub mod model_engine;
mod reply;
mod request;
mod schedule;
mod sequence;
pub mod server;
mod stop;
pub mod template;

#[cfg(test)]
mod tests;

pub use self::error::{ApiError, Error};
pub use self::schedule::Limits;
