//! The shared hardware model: profiles, the Probe trait, predictions, expectation tables.
