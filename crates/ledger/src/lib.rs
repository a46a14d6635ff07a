//! Append-only rows of measured facts, baselines and tolerances: the only crate with polars.
