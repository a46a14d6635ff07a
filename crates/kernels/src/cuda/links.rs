//! A GPU's links and memory as a probe of the profile: copies of every size both ways, out of pinned and of ordinary pages,
//! and reads of its own memory. Timed by events on the copy's own stream. Behind the driver that is opened at run time: a
//! machine without one says so, and everything else is measured all the same. A copy of n bytes takes `t0 + n / BW`.

use std::sync::{Arc, Mutex, PoisonError};

use cotk_latency::probe::{Prepared, Probe, refused};
use cotk_latency::work::{Key, ReadKey, Tier};
use cotk_run::seeds::Stream;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PinnedHostSlice, PushKernelArg, sys,
};
use cudarc::nvrtc::Ptx;

/// The reading kernel's text, and what NVRTC 12.4 made of it for `compute_80`, as [`super::PTX`].
pub const SOURCE: &str = include_str!("links.cu");
pub const PTX: &str = include_str!("links.ptx");

/// Sizes of copies, from the first to the last, two to an octave at the small end where `t0` is most of it.
const FIRST_BYTES: u64 = 4 << 10;
const LAST_BYTES: u64 = 64 << 20;
/// Working sets of the device's memory: far beyond its caches.
const MEMORY_BYTES: [u64; 4] = [128 << 20, 256 << 20, 512 << 20, 1 << 30];
/// Share of a device's free memory that is taken.
const FREE_SHARE: u64 = 4;

/// A device as far as its links go: bytes move, and a clock of its own says how long it took.
pub trait Device: Send {
    /// Its name and driver, for the profile.
    fn name(&self) -> String;

    /// Largest read of its own memory, 0 for none.
    fn memory_bytes(&self) -> u64;

    /// Moves or reads `bytes` once: µs by the device's clock.
    ///
    /// # Errors
    /// What the driver says.
    fn take(&mut self, tier: Tier, bytes: u64) -> Result<f64, String>;
}

/// Measures the links of one device.
pub struct LinkProbe {
    device: Arc<Mutex<dyn Device>>,
    name: String,
    memory_bytes: u64,
}

impl LinkProbe {
    /// Of this machine's first GPU.
    ///
    /// # Errors
    /// Why there is none: no driver, no device, or one that does not start.
    pub fn find() -> Result<Self, String> {
        // SAFETY: opens a library by its system name and closes it.
        if !unsafe { sys::is_culib_present() } {
            return Err("no NVIDIA driver (libcuda is not on this machine)".to_owned());
        }
        match CudaContext::device_count() {
            Ok(0) => return Err("the NVIDIA driver lists no device".to_owned()),
            Ok(_) => {}
            Err(e) => return Err(format!("the NVIDIA driver does not start: {e}")),
        }
        Gpu::open()
            .map(Self::new)
            .map_err(|e| format!("the GPU cannot be used: {e}"))
    }

    /// Of any device.
    pub fn new(device: impl Device + 'static) -> Self {
        Self {
            name: device.name(),
            memory_bytes: device.memory_bytes(),
            device: Arc::new(Mutex::new(device)),
        }
    }

    /// Its name and driver.
    pub fn device(&self) -> &str {
        &self.name
    }
}

/// The four links.
const LINKS: [Tier; 4] = [
    Tier::HostToDevicePinned,
    Tier::HostToDevice,
    Tier::DeviceToHostPinned,
    Tier::DeviceToHost,
];

impl Probe for LinkProbe {
    fn name(&self) -> &str {
        "gpu"
    }

    fn candidates(&self, count: usize, _rng: &mut Stream) -> Vec<Key> {
        let mut sizes = Vec::new();
        let mut octave = FIRST_BYTES;
        while octave < LAST_BYTES {
            sizes.extend([octave, octave * 3 / 2]);
            octave *= 2;
        }
        sizes.push(LAST_BYTES);
        let key = |tier, bytes| {
            Key::Read(ReadKey {
                tier,
                bytes,
                threads: 1,
            })
        };
        let copies = LINKS
            .into_iter()
            .flat_map(|tier| sizes.iter().map(move |&bytes| key(tier, bytes)));
        let reads = MEMORY_BYTES.into_iter().filter(|bytes| *bytes <= self.memory_bytes);
        copies
            .chain(reads.map(|bytes| key(Tier::DeviceMemory, bytes)))
            .take(count)
            .collect()
    }

    fn measures(&self, key: &Key) -> bool {
        matches!(key, Key::Read(read) if read.tier.is_of_a_gpu())
    }

    fn facts(&self) -> Vec<(String, String)> {
        vec![("gpu".to_owned(), self.name.clone())]
    }

    fn prepare(&self, key: &Key, _session: u32) -> cotk_latency::Result<Box<dyn Prepared>> {
        let wrong = |detail: &str| refused(self.name(), key, detail);
        let Key::Read(read) = *key else {
            return Err(wrong("not a copy"));
        };
        let most = if read.tier == Tier::DeviceMemory {
            self.memory_bytes
        } else {
            LAST_BYTES
        };
        if !read.tier.is_of_a_gpu() || read.bytes == 0 || read.bytes > most {
            return Err(wrong(&format!(
                "expected 1 to {most} bytes of a link or of the device's memory"
            )));
        }
        Ok(Box::new(Move {
            device: Arc::clone(&self.device),
            read,
            last_us: None,
        }))
    }
}

/// One copy, ready.
struct Move {
    device: Arc<Mutex<dyn Device>>,
    read: ReadKey,
    last_us: Option<f64>,
}

impl Prepared for Move {
    fn run(&mut self, _piece: usize) -> cotk_latency::Result<()> {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        let took = device.take(self.read.tier, self.read.bytes);
        self.last_us = Some(took.map_err(|e| refused("gpu", &Key::Read(self.read), &e))?);
        Ok(())
    }

    fn own_us(&mut self) -> Option<f64> {
        self.last_us.take()
    }
}

/// The real one, with buffers of the largest size on both sides.
struct Gpu {
    name: String,
    stream: Arc<CudaStream>,
    pinned: PinnedHostSlice<u8>,
    pageable: Vec<u8>,
    here: CudaSlice<u8>,
    memory: CudaSlice<u8>,
    memory_bytes: u64,
    read_all: CudaFunction,
    blocks: u32,
    out: CudaSlice<u32>,
    // Last: everything above is of it.
    context: Arc<CudaContext>,
}

impl Gpu {
    fn open() -> Result<Self, DriverError> {
        let context = CudaContext::new(0)?;
        let stream = context.new_stream()?;
        let (free, _) = context.mem_get_info()?;
        let memory_bytes = { MEMORY_BYTES.into_iter().rev() }
            .find(|bytes| *bytes <= free as u64 / FREE_SHARE)
            .unwrap_or(0);
        // Not write-combined: copies come back into it.
        // SAFETY: bytes have no invalid value, and every one is written below before it is read.
        let mut pinned =
            unsafe { context.alloc_pinned_with_flags::<u8>(bytes_of(LAST_BYTES), sys::CU_MEMHOSTALLOC_PORTABLE)? };
        pinned.as_mut_slice()?.fill(2);
        let read_all = context.load_module(Ptx::from_src(PTX))?.load_function("read_all")?;
        let units = context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let mut driver = 0;
        // SAFETY: the driver is open, and writes one number where it is told to.
        unsafe { sys::cuDriverGetVersion(&raw mut driver) }.result()?;
        Ok(Self {
            name: format!("{}, driver {}.{}", context.name()?, driver / 1000, driver % 1000 / 10),
            pinned,
            pageable: vec![1; bytes_of(LAST_BYTES)],
            here: stream.alloc_zeros(bytes_of(LAST_BYTES))?,
            memory: stream.alloc_zeros(bytes_of(memory_bytes.max(16)))?,
            memory_bytes,
            read_all,
            blocks: 8 * u32::try_from(units).unwrap_or(1).max(1),
            out: stream.alloc_zeros(1)?,
            stream,
            context,
        })
    }

    fn moved(&mut self, tier: Tier, bytes: usize) -> Result<(), DriverError> {
        let stream = &self.stream;
        match tier {
            Tier::HostToDevicePinned => {
                stream.memcpy_htod(&self.pinned.as_slice()?[..bytes], &mut self.here.slice_mut(..bytes))
            }
            Tier::HostToDevice => stream.memcpy_htod(&self.pageable[..bytes], &mut self.here.slice_mut(..bytes)),
            Tier::DeviceToHostPinned => {
                stream.memcpy_dtoh(&self.here.slice(..bytes), &mut self.pinned.as_mut_slice()?[..bytes])
            }
            Tier::DeviceToHost => stream.memcpy_dtoh(&self.here.slice(..bytes), &mut self.pageable[..bytes]),
            _ => {
                let words = bytes as u64 / 16;
                let mut launch = stream.launch_builder(&self.read_all);
                launch.arg(&self.memory).arg(&words).arg(&mut self.out);
                let grid = LaunchConfig {
                    grid_dim: (self.blocks, 1, 1),
                    block_dim: (256, 1, 1),
                    shared_mem_bytes: 0,
                };
                // SAFETY: `memory` has at least `words` words of 16 bytes, and allocations are aligned to 256.
                unsafe { launch.launch(grid) }.map(|_| ())
            }
        }
    }

    fn timed(&mut self, tier: Tier, bytes: usize) -> Result<f64, DriverError> {
        self.context.bind_to_thread()?;
        let timing = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let begin = self.stream.record_event(timing)?;
        self.moved(tier, bytes)?;
        let end = self.stream.record_event(timing)?;
        Ok(1e3 * f64::from(begin.elapsed_ms(&end)?))
    }
}

fn bytes_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a GiB at most")
}

impl Device for Gpu {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    fn take(&mut self, tier: Tier, bytes: u64) -> Result<f64, String> {
        self.timed(tier, bytes_of(bytes)).map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cotk_latency::identity::Identity;
    use cotk_latency::predict::CostModel;
    use cotk_latency::probe::gather::{InProcess, Settings};
    use cotk_latency::probe::measure::{Plan, Wanted, With, measure};
    use cotk_latency::profile::{Profile, Purpose};
    use cotk_latency::work::Work;
    use cotk_run::cancel::Cancel;
    use cotk_run::progress::Silent;
    use cotk_run::seeds::Seeds;

    use super::*;

    /// A made-up card: each link has its set-up and its speed; ordinary pages are slower beyond a knee.
    struct Card;

    fn truth(tier: Tier) -> (f64, f64) {
        match tier {
            Tier::HostToDevicePinned => (4.0, 25e9),
            Tier::HostToDevice => (9.0, 6e9),
            Tier::DeviceToHostPinned => (5.0, 20e9),
            Tier::DeviceToHost => (11.0, 5e9),
            _ => (3.0, 3e12),
        }
    }

    fn us(tier: Tier, bytes: u64) -> f64 {
        let (t0, speed) = truth(tier);
        #[expect(clippy::cast_precision_loss, reason = "a test's sizes")]
        let us = t0 + bytes as f64 / speed * 1e6;
        us
    }

    impl Device for Card {
        fn name(&self) -> String {
            "a card, driver 0.0".to_owned()
        }
        fn memory_bytes(&self) -> u64 {
            1 << 30
        }
        fn take(&mut self, tier: Tier, bytes: u64) -> Result<f64, String> {
            Ok(us(tier, bytes))
        }
    }

    /// Law: what the profile says of a link is its set-up and its speed, whatever the wall clock did meanwhile; and it is
    /// the same after a round through its files.
    #[test]
    fn a_card_of_known_links_is_measured_and_predicted() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("machine");
        let probe = LinkProbe::new(Card);
        assert_eq!(probe.device(), "a card, driver 0.0");
        let wanted = vec![Wanted {
            probe: Box::new(probe),
            table: usize::MAX,
            heldout: 0,
            live: 4,
            adapt: false,
        }];
        let plan = Plan {
            settings: Settings {
                sessions: 1,
                per_path: 0,
                budget: None,
                ..Settings::QUICK
            },
            seeds: Seeds::new(0),
            quick: true,
            purpose: Purpose::Machine,
            identity: Identity::here(BTreeMap::new()),
            cotk_version: "0".into(),
            commit: None,
            networks: Vec::new(),
            canaries: Vec::new(),
        };
        let with = With {
            runner: &InProcess,
            networks: None,
        };
        measure(wanted, &plan, with, &folder, &Cancel::new(), &Silent).unwrap();
        let profile = Profile::load(&folder).unwrap();
        assert_eq!(profile.rows.len(), LINKS.len() * 29 + MEMORY_BYTES.len());
        assert_eq!(profile.head.good_for.kinds, ["gpu"]);
        assert_eq!(profile.head.conditions.facts["gpu"], "a card, driver 0.0");
        let model = profile.model(&[]);
        for tier in LINKS.into_iter().chain([Tier::DeviceMemory]) {
            let (_, speed) = truth(tier);
            let found = model.bytes_per_s(tier, 1).unwrap();
            assert!(
                (found / speed - 1.0).abs() < 0.02,
                "{}: {found} of {speed}",
                tier.name()
            );
            // A size that is in no table.
            let bytes = if tier == Tier::DeviceMemory {
                200 << 20
            } else {
                5_000_000
            };
            let read = ReadKey {
                tier,
                bytes,
                threads: 1,
            };
            let predicted = 1e3 * model.predict(&Work::Read(read)).unwrap().ms;
            assert!(
                (predicted / us(tier, bytes) - 1.0).abs() < 0.02,
                "{}: {predicted}",
                tier.name()
            );
        }
        // Only links are link time, and a copy's set-up is no part of its speed.
        let small = ReadKey {
            tier: Tier::HostToDevicePinned,
            bytes: 4096,
            threads: 1,
        };
        let predicted = model.predict(&Work::Read(small)).unwrap();
        assert!((1e3 * predicted.ms - us(small.tier, 4096)).abs() < 0.1, "{predicted:?}");
    }

    #[test]
    fn sizes_that_no_buffer_holds_are_refused_and_a_failing_card_is_named() {
        let probe = LinkProbe::new(Card);
        let key = |tier, bytes| {
            Key::Read(ReadKey {
                tier,
                bytes,
                threads: 1,
            })
        };
        for wrong in [
            key(Tier::HostToDevice, 0),
            key(Tier::HostToDevice, LAST_BYTES + 1),
            key(Tier::DeviceMemory, 2 << 30),
            key(Tier::Disk, 4096),
            Key::Session { threads: 1 },
        ] {
            assert!(probe.prepare(&wrong, 0).is_err(), "{wrong}");
        }
        struct Broken;
        impl Device for Broken {
            fn name(&self) -> String {
                "broken".to_owned()
            }
            fn memory_bytes(&self) -> u64 {
                0
            }
            fn take(&mut self, _: Tier, _: u64) -> Result<f64, String> {
                Err("CUDA_ERROR_ILLEGAL_ADDRESS".to_owned())
            }
        }
        let probe = LinkProbe::new(Broken);
        let keys = probe.candidates(usize::MAX, &mut Seeds::new(0).stream("test"));
        assert!(
            keys.iter()
                .all(|k| !matches!(k, Key::Read(r) if r.tier == Tier::DeviceMemory))
        );
        let error = probe.prepare(&keys[0], 0).unwrap().run(0).unwrap_err().to_string();
        assert!(
            error.contains("CUDA_ERROR_ILLEGAL_ADDRESS") && error.contains("gpu"),
            "{error}"
        );
    }

    #[test]
    fn without_a_gpu_it_is_said_why() {
        if let Err(why) = LinkProbe::find() {
            assert!(!why.is_empty());
        }
    }

    #[test]
    fn the_committed_ptx_is_of_the_committed_text() {
        assert_eq!(
            PTX.lines().next().unwrap(),
            crate::cuda::compile::head("links.cu", SOURCE)
        );
        assert!(PTX.contains(".entry read_all(") && PTX.contains("ld.global.v4.u32"));
        assert!(PTX.contains(".version 8.4") && PTX.contains(".target sm_80"));
    }

    /// With `COTK_EMIT_PTX` set: writes `links.ptx` anew; needs NVRTC, see [`crate::cuda::compile`].
    #[test]
    fn emit() {
        if std::env::var_os("COTK_EMIT_PTX").is_none() {
            return;
        }
        let text = crate::cuda::compile::ptx_of("links.cu", SOURCE).unwrap();
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/links.ptx");
        cotk_run::files::write_atomic(file, text.as_bytes()).unwrap();
    }
}
