//! CPU kernels per instruction set with their plain references, dispatch, and the CUDA kernel.
