//! CPU kernels per instruction set with their plain references, dispatch, and the CUDA kernel.
//!
//! [`cpu::dispatch`] asks the CPU once; [`cpu::gemm`] multiplies coded matrices with quantized activations,
//! [`cpu::expert`] runs a whole expert, [`cpu::noise`] makes experts to time without weights, [`cuda`] holds the GPU's side. No
//! model lives here, and no file layout: that is `cotk-quant`'s. Law: every path gives the same bits.

pub mod cpu;
pub mod cuda;

pub use self::error::KernelError;

mod error;
