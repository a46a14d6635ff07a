//! The Trainable on tch: super-kernels, bit ladder, training loop, checkpoints.
