//! Which path this CPU runs: asked once, here. A path is declared by one entry of `PATHS`; that registers it for
//! dispatch and for the whole test battery. `COTK_ISA=scalar|avx2|avx512vnni` forces a lower one.
//!
//! Law: owning an [`Isa`] is the proof that the CPU can run it.

use std::fmt;
use std::sync::OnceLock;

use super::activations::StepCodes;
use super::half_matrix::HalfMatrix;
use super::panels::Panel;
use super::tiles::Coded;
use super::{scalar, tiles};
use crate::KernelError;

/// Most tokens that one call of a kernel over rows of floats serves; calls come in 8, 4, 2 and 1.
pub(crate) const TOKENS: usize = 8;

/// Results of one row block for one token.
pub(crate) type BlockOut = [f32; 16];

/// One instruction set: its kernels, each unsafe to call unless `present` said yes.
pub(crate) struct Path {
    name: &'static str,
    present: fn() -> bool,
    /// 16 rows × the panel's tokens; `out` has the panel's width.
    pub(crate) block: unsafe fn(&Coded<'_>, block: usize, &Panel<'_>, out: &mut [BlockOut]),
    /// The same block of two matrices of one format in one pass: gate and up, whose tiles lie in turn.
    pub(crate) pair: unsafe fn([&Coded<'_>; 2], block: usize, &Panel<'_>, [&mut [BlockOut]; 2]),
    /// As `block`, over 16-bit weights.
    pub(crate) half_block: unsafe fn(&HalfMatrix<'_>, block: usize, &Panel<'_>, out: &mut [BlockOut]),
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
        pair: |both, block, panel, [one, two]| {
            scalar::block(both[0], block, panel, one);
            scalar::block(both[1], block, panel, two);
        },
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
        pair: super::x86::avx2::pair,
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
        pair: super::x86::avx512::pair,
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

    /// One row block for the tokens of a panel.
    pub(crate) fn block(self, coded: &Coded<'_>, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
        tiles::check(coded.steps, coded.row_blocks, block, panel, out.len());
        // SAFETY: `self` exists, so `present` has seen this path's features here.
        unsafe { (self.0.block)(coded, block, panel, out) }
    }

    /// One row block of two matrices of one format and width.
    pub(crate) fn pair(
        self,
        both: [&Coded<'_>; 2],
        block: usize,
        panel: &Panel<'_>,
        [first, second]: [&mut [BlockOut]; 2],
    ) {
        assert!(
            both[0].widths == both[1].widths && both[0].prefix().format() == both[1].prefix().format(),
            "a pair has one format and width"
        );
        for out in [&first, &second] {
            tiles::check(both[0].steps, both[0].row_blocks, block, panel, out.len());
        }
        // SAFETY: `self` exists, so `present` has seen this path's features here.
        unsafe { (self.0.pair)(both, block, panel, [first, second]) }
    }

    /// One row block of 16-bit weights for the tokens of a panel.
    pub(crate) fn half_block(self, half: &HalfMatrix<'_>, block: usize, panel: &Panel<'_>, out: &mut [BlockOut]) {
        let steps = half.cols().div_ceil(cotk_quant::layout::STEP);
        tiles::check(steps, half.row_blocks(), block, panel, out.len());
        // SAFETY: `self` exists, so `present` has seen this path's features here.
        unsafe { (self.0.half_block)(half, block, panel, out) }
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
