//! What the machine gives while something is measured: how much of it others take, how fast memory is read, how fast
//! integers are multiplied, how much memory is free. Law: a share is between 0 and 1, whatever the counters do.

use std::hint::black_box;
use std::time::{Duration, Instant};

use cotk_kernels::cpu::bandwidth::read_once;
use cotk_kernels::cpu::dispatch::Isa;
use cotk_kernels::cpu::gemm::Threads;
use cotk_kernels::cpu::noise;
use cotk_kernels::cpu::peak::integer_ops;
use cotk_run::files;

/// What the kernel's counters said at one moment, in ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Of all cores, idle ones included.
    whole: u64,
    busy: u64,
    /// Of this process.
    own: u64,
}

const LIMIT_BYTES: u64 = 1 << 20;

impl Load {
    /// Now; `None` where `/proc` does not tell.
    pub fn now() -> Option<Self> {
        let machine = files::read_text("/proc/stat", LIMIT_BYTES).ok()?;
        let process = files::read_text("/proc/self/stat", LIMIT_BYTES).ok()?;
        Self::parse(&machine, &process)
    }

    /// From the text of `/proc/stat` and `/proc/self/stat` (`man 5 proc`).
    fn parse(machine: &str, process: &str) -> Option<Self> {
        let line = machine.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let ticks: Vec<u64> = line.split_whitespace().map_while(|n| n.parse().ok()).collect();
        // user, nice, system, idle, iowait, irq, softirq, steal; what guests use is part of user.
        let ticks = ticks.get(..8)?;
        let whole = ticks.iter().sum();
        let idle = ticks[3] + ticks[4];
        // The name in brackets may hold anything; state is the field after it, user and system time the 12th and 13th.
        let fields: Vec<&str> = process.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |at: usize| fields.get(at)?.parse::<u64>().ok();
        Some(Self {
            whole,
            busy: whole - idle,
            own: field(11)? + field(12)?,
        })
    }

    /// Share of the machine that others used since `before`, 0..1; what a hypervisor took counts as others'.
    #[expect(clippy::cast_precision_loss, reason = "ticks of a few seconds")]
    pub fn others_since(self, before: Self) -> f64 {
        let own = self.own.saturating_sub(before.own);
        let others = self.busy.saturating_sub(before.busy).saturating_sub(own);
        let whole = self.whole.saturating_sub(before.whole);
        (others as f64 / whole.max(1) as f64).min(1.0)
    }
}

/// Memory that programs can still get without swapping, in bytes; `None` where `/proc` does not tell.
pub fn available_bytes() -> Option<u64> {
    let text = files::read_text("/proc/meminfo", LIMIT_BYTES).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// What this process holds of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Its own: nobody else has it, and it must be written somewhere before it can be used otherwise.
    pub own_bytes: u64,
    /// Mapped from files: the page cache, which other processes share and the system takes back when it needs it.
    pub mapped_bytes: u64,
}

/// What this process holds now; `None` where `/proc` does not tell.
pub fn held() -> Option<Held> {
    parse_held(&files::read_text("/proc/self/status", LIMIT_BYTES).ok()?)
}

/// From the text of `/proc/self/status` (`man 5 proc`).
fn parse_held(status: &str) -> Option<Held> {
    let of = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    };
    Some(Held {
        own_bytes: of("RssAnon:")? + of("RssShmem:")?,
        mapped_bytes: of("RssFile:")?,
    })
}

/// Size of the last cache in bytes; `None` where the system does not tell.
pub fn last_level_cache_bytes() -> Option<u64> {
    let of = |index: u32| {
        let file = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = files::read_text(file, 4096).ok()?;
        let text = text.trim();
        match text.strip_suffix('K') {
            Some(kib) => Some(kib.parse::<u64>().ok()? << 10),
            None => Some(text.strip_suffix('M')?.parse::<u64>().ok()? << 20),
        }
    };
    (0..8).filter_map(of).max()
}

/// Involuntary switches of all threads of this process so far: how often somebody else wanted its cores.
pub fn involuntary_switches() -> u64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else {
        return 0;
    };
    let of = |task: std::io::Result<std::fs::DirEntry>| {
        let text = files::read_text(task.ok()?.path().join("status"), LIMIT_BYTES).ok()?;
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix("nonvoluntary_ctxt_switches:"))?;
        line.trim().parse::<u64>().ok()
    };
    tasks.filter_map(of).sum()
}

/// Bytes that [`Probe`] holds: many times any last-level cache.
pub const PROBE_BYTES: usize = 256 << 20;
/// How long one burst of multiplications lasts.
const BURST: Duration = Duration::from_millis(10);

/// Reads memory and multiplies integers as fast as this machine can, on the threads of the current pool.
pub struct Probe {
    isa: Isa,
    buffer: Vec<u8>,
}

impl Probe {
    /// Takes [`PROBE_BYTES`] of memory.
    pub fn new(isa: Isa) -> Self {
        // In pieces: twice the buffer would be the peak of a small model's memory.
        let mut buffer = Vec::with_capacity(PROBE_BYTES);
        let mut floats = vec![0.0; 1 << 16];
        for seed in (1..).take(PROBE_BYTES / size_of_val(floats.as_slice())) {
            noise::floats(&mut floats, seed);
            buffer.extend(floats.iter().flat_map(|f| f.to_le_bytes()));
        }
        Self { isa, buffer }
    }

    /// One pass over the buffer, in GB/s.
    #[expect(clippy::cast_precision_loss, reason = "a few hundred megabytes")]
    pub fn read_gb_per_s(&self) -> f64 {
        let begin = Instant::now();
        black_box(read_once(self.isa, &self.buffer, Threads::Pool));
        self.buffer.len() as f64 / begin.elapsed().as_secs_f64().max(1e-9) / 1e9
    }

    /// Integer operations of all threads together, in 10⁹ per second; a multiply-add is two.
    #[expect(clippy::cast_precision_loss, reason = "operations of some milliseconds")]
    pub fn gops(&self) -> f64 {
        let burst = |_: rayon::BroadcastContext<'_>| {
            let begin = Instant::now();
            let mut ops = 0;
            while begin.elapsed() < BURST {
                let (done, sum) = integer_ops(self.isa, 4096);
                black_box(sum);
                ops += done;
            }
            ops as f64 / begin.elapsed().as_secs_f64() / 1e9
        };
        rayon::broadcast(burst).into_iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(busy: u64, idle: u64, own: u64) -> Load {
        let machine = format!("cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3\n");
        let process = format!("1 (a) b) R 1 1 1 0 -1 0 0 0 0 0 {own} 0 0 0 20 0 1 0 5 0 0");
        Load::parse(&machine, &process).unwrap()
    }

    #[test]
    fn what_others_used_is_what_is_busy_and_not_ours() {
        let before = load(1000, 1000, 500);
        assert_eq!(load(1100, 1100, 600).others_since(before), 0.0);
        assert_eq!(load(1100, 1100, 550).others_since(before), 0.25);
        // Ticks are rounded: ours may be ahead of the machine's.
        assert_eq!(load(1100, 1100, 602).others_since(before), 0.0);
        assert_eq!(before.others_since(before), 0.0);
        assert!(Load::parse("cpu  1 2\n", "1 (a) R").is_none());
    }

    #[test]
    fn memory_is_own_or_mapped() {
        let text = "VmHWM:\t 99 kB\nRssAnon:\t    6 kB\nRssFile:\t   4 kB\nRssShmem:\t  1 kB\n";
        let expected = Held {
            own_bytes: 7 << 10,
            mapped_bytes: 4 << 10,
        };
        assert_eq!(parse_held(text), Some(expected));
        assert_eq!(parse_held("VmHWM: 99 kB\n"), None);
        assert!(held().is_some_and(|held| held.own_bytes > 0));
    }

    #[test]
    fn this_machine_tells_and_is_probed() {
        let load = Load::now().unwrap();
        assert!((0.0..=1.0).contains(&Load::now().unwrap().others_since(load)));
        assert!(available_bytes().unwrap() > 0);
        let probe = Probe {
            isa: Isa::selected().unwrap(),
            buffer: vec![1; 1 << 20],
        };
        assert!(probe.read_gb_per_s() > 0.0 && probe.gops() > 0.0);
    }
}
