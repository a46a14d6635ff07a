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
    /// A GPU was demanded and there is none.
    #[error("no GPU: {because}")]
    NoDevice { because: String },
    /// A kernel does not do on the device what its reference does.
    #[error("kernel {kernel} on {device}: {found}, expected the CPU's results bit for bit")]
    WrongKernel {
        kernel: String,
        device: String,
        found: String,
    },
    /// NVRTC is not where it was looked for.
    #[error("NVRTC cannot be opened at {looked_at}: {detail}")]
    NoCompiler { looked_at: String, detail: String },
    /// A kernel's coded matrix could not be made.
    #[error(transparent)]
    Quant(#[from] cotk_quant::QuantError),
}
