//! A model of one machine from those of others and a handful of measurements. `few_shot`: whole networks by source models and
//! counts; `cells`: NAS-Bench-201, where that is judged against HELP; `profile`: one `cotk` profile from another. Pure: who
//! measures is elsewhere.

pub mod cells;
pub mod few_shot;
pub mod profile;

mod gaussian;
mod mix;
