//! The joint allocation: what each expert's rows say of every way to store it, one choice per matrix over all layers
//! under one budget, codes by GPTQ. Law: what is fitted to some tokens is judged on others, and nothing here knows a
//! model family.

pub mod build;
pub mod choose;
pub mod code;
pub mod decision;
mod heal;
pub mod offers;
pub mod points;
pub mod recipe;
pub mod rows;
pub mod sensitivity;
pub(crate) mod stored;
pub(crate) mod variants;

#[cfg(test)]
mod laws;
