//! Which path this CPU runs: asked once, here. A path is declared by one entry of `PATHS`; that registers it for
//! dispatch and for the whole test battery. `COTK_ISA=scalar|avx2|avx512vnni` forces a lower one.
//!
//! Law: owning an [`Isa`] is the proof that the CPU can run it.

use std::fmt;
use std::sync::OnceLock;

use cotk_quant::coded::Prefix;

use super::activations::{Activations, StepCodes};
use super::half_matrix::HalfMatrix;
use super::{scalar, tiles};
use crate::KernelError;

/// Most tokens that one call of a block kernel serves; calls come in 8, 4, 2 and 1.
pub(crate) const TOKENS: usize = 8;

/// Results of one row block for one token.
pub(crate) type BlockOut = [f32; 16];

/// One instruction set: its kernels, each unsafe to call unless `present` said yes.
pub(crate) struct Path {
    name: &'static str,
    present: fn() -> bool,
    /// 16 rows × `out.len()` (8, 4, 2 or 1) tokens from `first_token`.
    pub(crate) block: unsafe fn(&Prefix<'_>, block: usize, &Activations, first_token: usize, out: &mut [BlockOut]),
    /// The same over 16-bit weights.
    pub(crate) half_block:
        unsafe fn(&HalfMatrix<'_>, block: usize, &Activations, first_token: usize, out: &mut [BlockOut]),
    /// One step of 32 activations.
    pub(crate) quantize: unsafe fn(&[f32; 32]) -> StepCodes,
    /// `silu(gate) · up`, quantized, for one step of an expert's inner channels.
    pub(crate) swiglu: unsafe fn(gate: &[f32; 32], up: &[f32; 32]) -> StepCodes,
    /// Sum of all bytes as u64 lanes: reads memory as fast as the path can.
    pub(crate) read: unsafe fn(&[u8]) -> u64,
}

/// Every path, lowest first.
static PATHS: &[Path] = &[
    Path {
        name: "scalar",
        present: || true,
        block: scalar::block,
        half_block: scalar::half_block,
        quantize: scalar::quantize,
        swiglu: scalar::swiglu,
        read: scalar::read,
    },
    #[cfg(target_arch = "x86_64")]
    Path {
        name: "avx2",
        present: super::x86::avx2::present,
        block: super::x86::avx2::block,
        half_block: super::x86::avx2::half_block,
        quantize: super::x86::avx2::quantize,
        swiglu: super::x86::avx2::swiglu,
        read: super::x86::avx2::read,
    },
    #[cfg(target_arch = "x86_64")]
    Path {
        name: "avx512vnni",
        present: super::x86::avx512::present,
        block: super::x86::avx512::block,
        half_block: super::x86::avx512::half_block,
        quantize: super::x86::avx512::quantize,
        swiglu: super::x86::avx512::swiglu,
        read: super::x86::avx512::read,
    },
];

/// A path that this CPU has. Only [`Isa::present`] and [`Isa::selected`] make one.
#[derive(Clone, Copy)]
pub struct Isa(&'static Path);

impl Isa {
    /// Every path of this CPU, lowest first.
    pub fn present() -> Vec<Self> {
        PATHS.iter().filter(|p| (p.present)()).map(Self).collect()
    }

    /// The best path, or the one that `COTK_ISA` names; the environment is read once.
    ///
    /// # Errors
    /// `COTK_ISA` names a path that does not exist or that this CPU lacks.
    pub fn selected() -> Result<Self, KernelError> {
        static SELECTED: OnceLock<Result<Isa, String>> = OnceLock::new();
        let selected = SELECTED.get_or_init(|| Self::choose(std::env::var("COTK_ISA").ok().as_deref()));
        selected.clone().map_err(|found| KernelError::Isa {
            found,
            present: Self::present().iter().map(|isa| isa.name()).collect(),
        })
    }

    fn choose(forced: Option<&str>) -> Result<Self, String> {
        let present = Self::present();
        match forced {
            None | Some("") => Ok(present[present.len() - 1]),
            Some(name) => present
                .into_iter()
                .find(|isa| isa.name() == name)
                .ok_or_else(|| name.to_owned()),
        }
    }

    /// `scalar`, `avx2`, `avx512vnni`.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// One row block for up to 8 tokens (8, 4, 2 or 1).
    pub(crate) fn block(
        self,
        prefix: &Prefix<'_>,
        block: usize,
        acts: &Activations,
        first_token: usize,
        out: &mut [BlockOut],
    ) {
        tiles::check(prefix, block, acts, first_token, out.len());
        // SAFETY: `self` exists, so `present` has seen this path's features here.
        unsafe { (self.0.block)(prefix, block, acts, first_token, out) }
    }

    /// One row block of 16-bit weights for up to 8 tokens (8, 4, 2 or 1).
    pub(crate) fn half_block(
        self,
        half: &HalfMatrix<'_>,
        block: usize,
        acts: &Activations,
        first_token: usize,
        out: &mut [BlockOut],
    ) {
        tiles::check_shape(half.cols(), half.row_blocks(), block, acts, first_token, out.len());
        // SAFETY: `self` exists, so `present` has seen this path's features here.
        unsafe { (self.0.half_block)(half, block, acts, first_token, out) }
    }

    pub(crate) fn quantize(self, x: &[f32; 32]) -> StepCodes {
        // SAFETY: `self` exists, so `present` has seen this path's features here.
        unsafe { (self.0.quantize)(x) }
    }

    pub(crate) fn swiglu(self, gate: &[f32; 32], up: &[f32; 32]) -> StepCodes {
        // SAFETY: `self` exists, so `present` has seen this path's features here.
        unsafe { (self.0.swiglu)(gate, up) }
    }

    pub(crate) fn read(self, bytes: &[u8]) -> u64 {
        // SAFETY: `self` exists, so `present` has seen this path's features here.
        unsafe { (self.0.read)(bytes) }
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lower_path_can_be_forced_and_a_missing_one_is_refused() {
        assert_eq!(Isa::choose(Some("scalar")).unwrap().name(), "scalar");
        let best = Isa::present().last().unwrap().name();
        assert_eq!(Isa::choose(None).unwrap().name(), best);
        assert_eq!(Isa::choose(Some("sse9")).unwrap_err(), "sse9");
    }
}
