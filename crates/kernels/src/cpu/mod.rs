//! The CPU's kernels: one table of paths, one algorithm each for quantizing, multiplying and running an expert.
//!
//! `y[r] = Σ_s scale[r,s] · a_scale[s] · (D[r,s] − z · A[s])` over steps `s` of 32 columns, ascending, one f32 accumulator
//! per row: `D` is an exact i32 dot product of codes, `A` the exact sum of the step's activations. `(D − z·A)` and the sum
//! over steps are fused multiply-adds on every path, which is why all paths agree bit for bit.

pub mod activations;
pub mod bandwidth;
pub mod dispatch;
pub mod expert;
pub mod experts;
pub mod gemm;
pub mod half_matrix;
pub mod noise;
pub mod pages;
pub mod panels;
pub mod peak;
pub mod reference;
pub mod rows;
pub mod team;
pub mod weights;

mod scalar;
mod swiglu;
pub mod tiles;
mod two_level;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod laws;
