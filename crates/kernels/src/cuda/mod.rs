//! The GPU's side.
