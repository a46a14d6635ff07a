//! The OpenAI-compatible HTTP server: requests, scheduling, metrics.
