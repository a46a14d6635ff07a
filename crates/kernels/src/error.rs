//! What can fail outside of arithmetic: choosing a path, finding a device, writing its report.

/// A choice or a device that is not there.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// `COTK_ISA` names something unknown, or what this CPU lacks.
    #[error("COTK_ISA is `{found}`, this CPU has {}", present.join(", "))]
    Isa { found: String, present: Vec<&'static str> },
    /// A driver or compiler call failed.
    #[error("{library}: {call}: {detail}")]
    Gpu {
        library: &'static str,
        call: String,
        detail: String,
    },
    /// NVRTC is not where it was looked for.
    #[error("NVRTC cannot be opened at {looked_at}: {detail}")]
    NoCompiler { looked_at: String, detail: String },
    /// A kernel's coded matrix could not be made.
    #[error(transparent)]
    Quant(#[from] cotk_quant::QuantError),
}
