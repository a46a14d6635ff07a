//! PTX from the `.cu` text, on a machine with NVRTC and no need of a GPU.
//!
//! NVRTC is looked for in the folder that `COTK_NVRTC` names (that of the wheel `nvidia-cuda-nvrtc-cu12==12.4.127`:
//! `nvidia/cuda_nvrtc/lib`), else where the loader finds it. Another version writes PTX that other drivers load.

use std::path::{Path, PathBuf};

use cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};

use super::SOURCE;
use crate::KernelError;

/// The two libraries of the wheel, in the order in which they must be opened.
const LIBRARIES: [&str; 2] = ["libnvrtc-builtins.so.12.4", "libnvrtc.so.12"];

/// PTX of [`SOURCE`] with its head line, comments stripped: the same text for the same compiler, byte for byte.
///
/// # Errors
/// NVRTC is not found, or refuses the text: then with its log.
pub fn ptx() -> Result<String, KernelError> {
    ptx_of("expert_q4.cu", SOURCE)
}

/// First line of a PTX made from `source`, the text of `file`.
pub fn head(file: &str, source: &str) -> String {
    let hash = xxhash_rust::xxh3::xxh3_64(source.as_bytes());
    format!("// {file} {hash:016x}, NVRTC for compute_80, no contraction")
}

/// As [`ptx`], of any text.
///
/// # Errors
/// NVRTC is not found, or refuses the text: then with its log.
pub fn ptx_of(file: &str, source: &str) -> Result<String, KernelError> {
    open(std::env::var_os("COTK_NVRTC").map(PathBuf::from).as_deref())?;
    let options = CompileOptions {
        // Every fused multiply-add is written out: the compiler may not add one.
        fmad: Some(false),
        ftz: Some(false),
        prec_div: Some(true),
        arch: Some("compute_80"),
        // Ends up in symbols of some versions: always the same.
        name: Some(file.to_owned()),
        ..CompileOptions::default()
    };
    let text = compile_ptx_with_opts(source, options)
        .map_err(|e| refused(file, e))?
        .to_src();
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let kept: Vec<&str> = lines.map(str::trim_end).filter(|line| !line.is_empty()).collect();
    Ok(format!("{}\n{}\n", head(file, source), kept.join("\n")))
}

/// Opens NVRTC from `folder` for good, so that later look-ups by name find it.
fn open(folder: Option<&Path>) -> Result<(), KernelError> {
    if let Some(folder) = folder {
        for name in LIBRARIES {
            let file = folder.join(name);
            let flags = libloading::os::unix::RTLD_NOW | libloading::os::unix::RTLD_GLOBAL;
            // SAFETY: the user names the folder of NVIDIA's compiler; its initialisers touch nothing of ours.
            let opened = unsafe { libloading::os::unix::Library::open(Some(&file), flags) };
            let library = opened.map_err(|e| KernelError::NoCompiler {
                looked_at: file.display().to_string(),
                detail: e.to_string(),
            })?;
            // Not closed: functions of it are kept.
            std::mem::forget(library);
        }
    }
    // SAFETY: opens a library by its system name and closes it.
    if unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        Ok(())
    } else {
        Err(KernelError::NoCompiler {
            looked_at: "COTK_NVRTC and the loader's path".to_owned(),
            detail: "no libnvrtc".to_owned(),
        })
    }
}

fn refused(file: &str, error: CompileError) -> KernelError {
    let detail = match &error {
        CompileError::CompileError { log, .. } => log.to_string_lossy().into_owned(),
        other => format!("{other:?}"),
    };
    KernelError::Gpu {
        library: "nvrtc",
        call: format!("compile {file}"),
        detail,
    }
}
