//! Finds a GPU, measures its links and memory, and runs the expert kernels against the CPU's reference.
//!
//! A machine without a GPU gets a report that says so: nothing here panics or fails for want of one.

use std::sync::Arc;
use std::time::Instant;

use cotk_quant::code::{Bits, Code};
use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg, sys};
use cudarc::nvrtc::Ptx;
use serde::Serialize;

use super::PTX;
use super::q4::{Q4Matrix, SplitActivations, sample_expert};
use crate::KernelError;
use crate::cpu::activations::Activations;
use crate::cpu::dispatch::Isa;
use crate::cpu::reference;

/// Bytes of one copy when bandwidth is measured: far beyond caches, well inside any card.
const COPY_BYTES: usize = 256 << 20;
/// Copies of which the median counts.
const COPIES: usize = 5;
/// Weight bytes that the timed kernel rotates over: beyond every L2.
const ROTATE_BYTES: usize = 1 << 30;

/// What was found and measured. GB are 10⁹ bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GpuReport {
    pub present: bool,
    /// Why no device was found; absent where one was.
    pub absent_because: Option<String>,
    pub device: Option<Device>,
    pub bandwidths: Option<Bandwidths>,
    pub kernels: Vec<KernelCheck>,
    /// A device is there and every kernel is right on it.
    pub ok: bool,
}

/// The first device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Device {
    pub name: String,
    pub memory_bytes: u64,
    pub free_bytes: u64,
    /// Major and minor.
    pub compute_capability: [i32; 2],
    /// How many devices there are; the first is used.
    pub count: i32,
}

/// Medians of five copies of 256 MiB.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bandwidths {
    pub host_to_device_pinned_gb_per_s: f64,
    pub host_to_device_pageable_gb_per_s: f64,
    pub device_to_host_pinned_gb_per_s: f64,
    /// Read plus write inside the device's memory.
    pub device_copy_gb_per_s: f64,
}

/// One kernel against its reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KernelCheck {
    pub name: String,
    /// Largest absolute difference; the kernels promise 0.
    pub max_error: Option<f64>,
    pub ok: bool,
    /// Weight bytes per second at one token, experts in turn.
    pub gb_per_s: Option<f64>,
    /// Why it could not run.
    pub error: Option<String>,
}

impl GpuReport {
    /// The first kernel that failed or is wrong, as an error.
    ///
    /// # Errors
    /// [`KernelError::WrongKernel`].
    pub fn verdict(&self) -> Result<(), KernelError> {
        match self.kernels.iter().find(|k| !k.ok) {
            None => Ok(()),
            Some(kernel) => Err(KernelError::WrongKernel {
                kernel: kernel.name.clone(),
                device: self.device.as_ref().map_or_else(String::new, |d| d.name.clone()),
                found: match (&kernel.error, kernel.max_error) {
                    (Some(error), _) => error.clone(),
                    (None, error) => format!("largest error {}", error.unwrap_or(f64::NAN)),
                },
            }),
        }
    }

    fn absent(because: impl Into<String>) -> Self {
        Self {
            present: false,
            absent_because: Some(because.into()),
            device: None,
            bandwidths: None,
            kernels: Vec::new(),
            ok: false,
        }
    }
}

/// Looks, measures, compares.
///
/// # Errors
/// A device is there and a driver call on it fails, other than loading or running a kernel: those are reported.
pub fn gpu_check() -> Result<GpuReport, KernelError> {
    // SAFETY: opens a library by its system name and closes it.
    if !unsafe { sys::is_culib_present() } {
        return Ok(GpuReport::absent("no NVIDIA driver (libcuda is not on this machine)"));
    }
    let count = match CudaContext::device_count() {
        Ok(0) => return Ok(GpuReport::absent("the NVIDIA driver lists no device")),
        Ok(count) => count,
        Err(e) => return Ok(GpuReport::absent(format!("the NVIDIA driver does not start: {e}"))),
    };
    let context = CudaContext::new(0).map_err(|e| failed("open device 0", e))?;
    let stream = context.default_stream();
    let device = describe(&context, count).map_err(|e| failed("describe device 0", e))?;
    let bandwidths = bandwidths(&context, &stream).map_err(|e| failed("copy", e))?;
    let kernels = vec![
        check_expert(&context, &stream, "expert_q4", (2048, 1408, 1)),
        check_expert(&context, &stream, "expert_q4 (odd sizes, 3 tokens)", (328, 77, 3)),
    ];
    Ok(GpuReport {
        present: true,
        absent_because: None,
        device: Some(device),
        bandwidths: Some(bandwidths),
        ok: kernels.iter().all(|k| k.ok),
        kernels,
    })
}

fn failed(call: &str, error: DriverError) -> KernelError {
    KernelError::Gpu {
        library: "cuda",
        call: call.to_owned(),
        detail: error.to_string(),
    }
}

fn describe(context: &Arc<CudaContext>, count: i32) -> Result<Device, DriverError> {
    let (free, total) = context.mem_get_info()?;
    let (major, minor) = context.compute_capability()?;
    Ok(Device {
        name: context.name()?,
        memory_bytes: total as u64,
        free_bytes: free as u64,
        compute_capability: [major, minor],
        count,
    })
}

/// Median GB/s of `copy`, which moves `bytes`; one run before counts for nothing.
fn rate(
    stream: &CudaStream,
    bytes: usize,
    mut copy: impl FnMut() -> Result<(), DriverError>,
) -> Result<f64, DriverError> {
    copy()?;
    stream.synchronize()?;
    let mut seconds = [0.0; COPIES];
    for s in &mut seconds {
        let start = Instant::now();
        copy()?;
        stream.synchronize()?;
        *s = start.elapsed().as_secs_f64();
    }
    seconds.sort_by(f64::total_cmp);
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let gigabytes = bytes as f64 / 1e9;
    Ok(gigabytes / seconds[COPIES / 2])
}

fn bandwidths(context: &Arc<CudaContext>, stream: &Arc<CudaStream>) -> Result<Bandwidths, DriverError> {
    let pageable = vec![1u8; COPY_BYTES];
    // Not write-combined: the CPU reads it back.
    // SAFETY: bytes have no invalid value, and every one is written below before it is read.
    let mut pinned = unsafe { context.alloc_pinned_with_flags::<u8>(COPY_BYTES, sys::CU_MEMHOSTALLOC_PORTABLE)? };
    pinned.as_mut_slice()?.fill(2);
    let mut device = stream.alloc_zeros::<u8>(COPY_BYTES)?;
    let mut other = stream.alloc_zeros::<u8>(COPY_BYTES)?;
    Ok(Bandwidths {
        host_to_device_pinned_gb_per_s: rate(stream, COPY_BYTES, || stream.memcpy_htod(&pinned, &mut device))?,
        host_to_device_pageable_gb_per_s: rate(stream, COPY_BYTES, || stream.memcpy_htod(&pageable, &mut device))?,
        device_to_host_pinned_gb_per_s: rate(stream, COPY_BYTES, || stream.memcpy_dtoh(&device, &mut pinned))?,
        device_copy_gb_per_s: rate(stream, 2 * COPY_BYTES, || stream.memcpy_dtod(&device, &mut other))?,
    })
}

/// A plain 4-bit expert of `(hidden, inner, tokens)` on the device and on the CPU.
fn check_expert(
    context: &Arc<CudaContext>,
    stream: &Arc<CudaStream>,
    name: &str,
    shape: (usize, usize, usize),
) -> KernelCheck {
    match run_expert(context, stream, shape) {
        Ok((max_error, gb_per_s)) => KernelCheck {
            name: name.to_owned(),
            max_error: Some(max_error),
            ok: max_error == 0.0,
            gb_per_s: Some(gb_per_s),
            error: None,
        },
        Err(error) => KernelCheck {
            name: name.to_owned(),
            max_error: None,
            ok: false,
            gb_per_s: None,
            error: Some(error.to_string()),
        },
    }
}

/// Device buffers of one expert.
struct OnDevice {
    gate: CudaSlice<u8>,
    up: CudaSlice<u8>,
    down: CudaSlice<u8>,
}

fn run_expert(
    context: &Arc<CudaContext>,
    stream: &Arc<CudaStream>,
    (hidden, inner, tokens): (usize, usize, usize),
) -> Result<(f64, f64), KernelError> {
    let at = |call: &'static str| move |e: DriverError| failed(call, e);
    let module = context.load_module(Ptx::from_src(PTX)).map_err(at("load PTX"))?;
    let gate_up = module
        .load_function("expert_gate_up_q4")
        .map_err(at("expert_gate_up_q4"))?;
    let down = module.load_function("expert_down_q4").map_err(at("expert_down_q4"))?;

    let matrices = sample_expert(hidden, inner, Code::Plain(Bits::B4), 1)?;
    let [g, u, d] = &matrices;
    let (g, u, d) = (g.prefix(Bits::B4)?, u.prefix(Bits::B4)?, d.prefix(Bits::B4)?);
    #[expect(clippy::cast_precision_loss, reason = "any values do")]
    let x: Vec<f32> = (0..tokens * hidden).map(|i| (i as f32 * 0.37).sin() * 2.0).collect();
    let acts = Activations::of(Isa::selected()?, &x, hidden);
    let mut expected = vec![0.0; tokens * hidden];
    reference::expert(&g.into(), &u.into(), &d.into(), &acts, &mut expected);

    let (g, u, d) = (Q4Matrix::try_new(&g)?, Q4Matrix::try_new(&u)?, Q4Matrix::try_new(&d)?);
    let bytes = g.plane.len() + u.plane.len() + d.plane.len();
    let upload = || -> Result<OnDevice, DriverError> {
        Ok(OnDevice {
            gate: stream.clone_htod(g.plane)?,
            up: stream.clone_htod(u.plane)?,
            down: stream.clone_htod(d.plane)?,
        })
    };
    let copies = (ROTATE_BYTES / bytes).clamp(1, 512);
    let experts: Result<Vec<OnDevice>, DriverError> = (0..copies).map(|_| upload()).collect();
    let experts = experts.map_err(at("upload experts"))?;
    let split = SplitActivations::of(&acts);
    let mut call = Call::new(stream, &split, (hidden, inner, tokens)).map_err(at("upload activations"))?;
    let zeros = [g.zero_point, u.zero_point, d.zero_point];

    call.launch(&gate_up, &down, &experts[0], zeros, g.cell)
        .map_err(at("launch"))?;
    let y = stream.clone_dtoh(&call.y).map_err(at("read results"))?;
    // A NaN on one side only must not pass as equal.
    let error = y.iter().zip(&expected).map(|(a, b)| {
        let difference = (f64::from(*a) - f64::from(*b)).abs();
        if a.to_bits() == b.to_bits() {
            0.0
        } else if difference.is_nan() {
            f64::INFINITY
        } else {
            difference
        }
    });
    let max_error = error.fold(0.0, f64::max);

    let gb_per_s = rate(stream, bytes * experts.len(), || {
        experts
            .iter()
            .try_for_each(|expert| call.launch(&gate_up, &down, expert, zeros, g.cell))
    });
    Ok((max_error, gb_per_s.map_err(at("time kernels"))?))
}

/// Everything of a launch but the weights, allocated once.
struct Call {
    stream: Arc<CudaStream>,
    hidden: u32,
    inner: u32,
    tokens: u32,
    codes: CudaSlice<u32>,
    scales: CudaSlice<f32>,
    sums: CudaSlice<f32>,
    middle_codes: CudaSlice<u32>,
    middle_scales: CudaSlice<f32>,
    middle_sums: CudaSlice<f32>,
    y: CudaSlice<f32>,
}

impl Call {
    fn new(
        stream: &Arc<CudaStream>,
        acts: &SplitActivations,
        (hidden, inner, tokens): (usize, usize, usize),
    ) -> Result<Self, DriverError> {
        let middle = tokens * inner.div_ceil(32);
        let small = |n: usize| u32::try_from(n).expect("shapes of this file");
        Ok(Self {
            stream: stream.clone(),
            hidden: small(hidden),
            inner: small(inner),
            tokens: small(tokens),
            codes: stream.clone_htod(&acts.codes)?,
            scales: stream.clone_htod(&acts.scales)?,
            sums: stream.clone_htod(&acts.sums)?,
            middle_codes: stream.alloc_zeros(8 * middle)?,
            middle_scales: stream.alloc_zeros(middle)?,
            middle_sums: stream.alloc_zeros(middle)?,
            y: stream.alloc_zeros(tokens * hidden)?,
        })
    }

    /// Both kernels, gate and up not interleaved.
    fn launch(
        &mut self,
        gate_up: &CudaFunction,
        down: &CudaFunction,
        expert: &OnDevice,
        [gate_zero, up_zero, down_zero]: [f32; 3],
        cell: f32,
    ) -> Result<(), DriverError> {
        let (hidden_steps, inner_steps) = (self.hidden.div_ceil(32), self.inner.div_ceil(32));
        let (turns, second) = (1u32, 0u32);
        let grid = |x: u32, threads: u32| LaunchConfig {
            grid_dim: (x, self.tokens, 1),
            block_dim: (threads, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut launch = self.stream.launch_builder(gate_up);
        launch
            .arg(&expert.gate)
            .arg(&expert.up)
            .arg(&turns)
            .arg(&second)
            .arg(&gate_zero)
            .arg(&up_zero)
            .arg(&cell);
        launch
            .arg(&hidden_steps)
            .arg(&self.inner)
            .arg(&self.codes)
            .arg(&self.scales)
            .arg(&self.sums);
        launch
            .arg(&mut self.middle_codes)
            .arg(&mut self.middle_scales)
            .arg(&mut self.middle_sums);
        // SAFETY: arguments and grid are those of the contract at the head of expert_q4.cu; buffers have its sizes.
        unsafe { launch.launch(grid(inner_steps, 128))? };
        let mut launch = self.stream.launch_builder(down);
        launch
            .arg(&expert.down)
            .arg(&down_zero)
            .arg(&cell)
            .arg(&inner_steps)
            .arg(&self.hidden);
        launch
            .arg(&self.middle_codes)
            .arg(&self.middle_scales)
            .arg(&self.middle_sums)
            .arg(&mut self.y);
        // SAFETY: as above.
        unsafe { launch.launch(grid(self.hidden.div_ceil(16), 32))? };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_gets_a_report_and_one_with_it_a_right_kernel() {
        let report = gpu_check().unwrap();
        assert_eq!(report.present, report.absent_because.is_none());
        assert_eq!(report.ok, report.present && report.kernels.iter().all(|k| k.ok));
        assert!(!report.present || report.ok, "{report:?}");
    }
}
