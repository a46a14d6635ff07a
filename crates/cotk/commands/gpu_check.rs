//! `cotk gpu-check`: is there a GPU, how fast are its links and memory, and are our kernels right on it? The checking is
//! `cotk_kernels::cuda::check`'s; here its report becomes a table, a file and an exit code.

use std::path::PathBuf;

use cotk_kernels::KernelError;
use cotk_kernels::cuda::check::{Bandwidths, GpuReport, gpu_check};
use cotk_kernels::cuda::compile;
use cotk_run::files;
use cotk_run::folder::runs_root;
use cotk_run::units::{Bytes, significant};
use serde_json::{Value, json};

use crate::context::{Context, Outcome};
use crate::fault::Fault;
use crate::table::Table;

/// Find the GPU, measure its bandwidths, and hold our kernels on it to their CPU reference
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  cotk gpu-check\n  cotk gpu-check --require --out runs/gpu-check.json")]
pub struct Args {
    /// Where the report goes (default: gpu-check.json in $COTK_RUNS, else in runs)
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Exit 1 when there is no GPU (a GPU whose kernels are wrong always does)
    #[arg(long)]
    pub require: bool,
    /// Compile the kernels' text to FILE with NVRTC (found by $COTK_NVRTC; needs no GPU) and do nothing else
    #[arg(long, value_name = "FILE")]
    pub emit_ptx: Option<PathBuf>,
}

/// # Errors
/// A kernel that is wrong on the device; with `--require`, no device: both after the report is written. A report that cannot be written, NVRTC that is missing or refuses the text, a device that fails.
pub fn run(args: &Args, _cx: &Context) -> Result<Outcome, Fault> {
    if let Some(file) = &args.emit_ptx {
        let ptx = compile::ptx()?;
        files::write_atomic(file, ptx.as_bytes())?;
        let text = format!("{}: {}\n", file.display(), Bytes(ptx.len() as u64));
        return Ok(Outcome::new(json!({ "ptx": file, "bytes": ptx.len() }), text));
    }
    let report = gpu_check()?;
    let mut result = to_json(&report);
    let out = args.out.clone().unwrap_or_else(|| runs_root().join("gpu-check.json"));
    if let Some(folder) = out.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        files::create_folder(folder)?;
    }
    files::write_atomic(&out, format!("{result:#}\n").as_bytes())?;
    result["report"] = json!(out);

    report.verdict()?;
    let mut outcome = Outcome::new(result, table(&report));
    if let Some(because) = report.absent_because {
        if args.require {
            return Err(KernelError::NoDevice { because }.into());
        }
        let warning = format!("NO GPU: {because}; no kernel ran on a device, nothing was measured");
        outcome.warnings.push(warning);
    }
    Ok(outcome)
}

fn to_json(report: &GpuReport) -> Value {
    let device = report.device.as_ref();
    json!({
        "present": report.present,
        "absent_because": report.absent_because,
        "device": device.map(|d| d.name.clone()),
        "devices": device.map_or(0, |d| d.count),
        "memory_bytes": device.map(|d| d.memory_bytes),
        "free_bytes": device.map(|d| d.free_bytes),
        "compute_capability": device.map(|d| d.compute_capability),
        "bandwidths": report.bandwidths.as_ref().map_or_else(|| json!({}), |b| json!(b)),
        "kernels": report.kernels,
        "ok": report.ok,
    })
}

fn table(report: &GpuReport) -> String {
    let Some(device) = &report.device else {
        let because = report.absent_because.as_deref().unwrap_or("no device");
        return format!("NO GPU: {because}\n");
    };
    let [major, minor] = device.compute_capability;
    let memory = Bytes(device.memory_bytes);
    let mut text = format!("{}, {memory}, compute capability {major}.{minor}\n\n", device.name);
    if let Some(Bandwidths {
        host_to_device_pinned_gb_per_s,
        host_to_device_pageable_gb_per_s,
        device_to_host_pinned_gb_per_s,
        device_copy_gb_per_s,
    }) = report.bandwidths
    {
        let mut links = Table::new(&["copy of 256 MiB", "GB/s"]);
        for (name, rate) in [
            ("host to device, pinned", host_to_device_pinned_gb_per_s),
            ("host to device, pageable", host_to_device_pageable_gb_per_s),
            ("device to host, pinned", device_to_host_pinned_gb_per_s),
            ("device to device (read + write)", device_copy_gb_per_s),
        ] {
            links.row([name.to_owned(), significant(rate, 3)]);
        }
        text += &links.render();
        text.push('\n');
    }
    let mut kernels = Table::new(&["kernel", "max error", "GB/s", "verdict"]);
    for kernel in &report.kernels {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| significant(v, 3));
        let verdict = match (&kernel.error, kernel.ok) {
            (Some(error), _) => format!("failed: {error}"),
            (None, true) => "equals the CPU".to_owned(),
            (None, false) => "WRONG".to_owned(),
        };
        kernels.row([
            kernel.name.clone(),
            number(kernel.max_error),
            number(kernel.gb_per_s),
            verdict,
        ]);
    }
    text + &kernels.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_form_holds_with_and_without_a_gpu() {
        let report = gpu_check().unwrap();
        let value = to_json(&report);
        assert!(value["present"].is_boolean() && value["ok"].is_boolean());
        assert!(value["bandwidths"].is_object() && value["kernels"].is_array());
        assert_eq!(value["device"].is_string(), report.present);
        assert_eq!(table(&report).contains("NO GPU"), !report.present);
    }
}
