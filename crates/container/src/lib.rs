//! The compressed checkpoint: manifest, dense part, expert records.
