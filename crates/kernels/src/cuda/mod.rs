//! The GPU's side: one `.cu` text, the PTX that was made from it, and the check of a device against the CPU's reference.
//!
//! The driver is opened at run time and asked for before anything else: without one nothing here panics. The same text
//! runs as C++ in the tests (`shim.h`). Law: the GPU's results are the CPU reference's, bit for bit.

pub mod check;
pub mod compile;
pub mod links;
pub mod q4;

#[cfg(test)]
mod shim_laws;

/// The kernels' text; its head is their contract.
pub const SOURCE: &str = include_str!("expert_q4.cu");

/// What NVRTC 12.4 made of [`SOURCE`] for `compute_80`; loads on drivers of CUDA 12.4 and later. Its first line names the
/// text by hash; made by [`compile::ptx`].
pub const PTX: &str = include_str!("expert_q4.ptx");

/// First line of a PTX made from `source`.
pub fn ptx_head(source: &str) -> String {
    compile::head("expert_q4.cu", source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_ptx_is_of_the_committed_text() {
        let head = PTX.lines().next().unwrap();
        assert_eq!(
            head,
            ptx_head(SOURCE),
            "run `cotk gpu-check --emit-ptx crates/kernels/src/cuda/expert_q4.ptx`"
        );
        for kernel in ["expert_gate_up_q4", "expert_down_q4"] {
            assert!(PTX.contains(&format!(".entry {kernel}(")), "{kernel}");
        }
        assert!(PTX.contains(".version 8.4") && PTX.contains(".target sm_80"));
        assert!(PTX.contains("dp4a.u32.s32") && PTX.contains("fma.rn.f32"));
    }
}
