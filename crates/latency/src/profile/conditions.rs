//! What a machine was like while it was measured, as far as it is not its identity: kernel, caches, quota, whether threads
//! could be pinned, what probes noticed. Nothing is decided by it; whoever doubts a figure finds it here.

use std::collections::BTreeMap;

use cotk_run::files;
use cotk_run::system::Pinned;
use serde::{Deserialize, Serialize};

/// `[conditions]` of `profile.toml`. What was not recorded is absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Conditions {
    /// Release of the operating system's kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Whether the measuring thread stayed on its core while things of one thread were timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pinned: Option<bool>,
    /// Cores that a control group allows, where it limits their time; and how often it stopped the measurement for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota_cores: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttled: Option<u64>,
    /// Load of the machine over one minute, when measuring began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<f64>,
    /// Slices that nothing disturbed, in percent; and how many times as long things took in all slices as in those.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undisturbed_pct: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disturbed_factor: Option<f64>,
    /// Keys of the table that there was no time for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_time_for: Option<u64>,
    /// Caches as the system tells them: `L1 data` → bytes.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub caches: BTreeMap<String, u64>,
    /// What probes noticed, by probe.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub facts: BTreeMap<String, String>,
    /// Where reading speed falls, as measured.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub levels: Vec<Level>,
}

/// One level of the memory as a sweep over working sets shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    pub threads: u32,
    /// Largest working set that is read at this speed; absent of the last level, which has no end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    pub gb_per_s: f64,
}

/// A key that is in no table: what it costs beside its neighbours is less than can be told from noise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeftOut {
    /// Its kernel path.
    pub path: String,
    pub key: String,
    /// What came out, in µs, and how far apart its sessions were.
    pub median_us: f64,
    pub mad_us: f64,
    /// Of the held-out list; else of the table.
    pub is_heldout: bool,
}

/// A network that carried a profile over: timed here, predicted from there. ms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Carried {
    pub network: String,
    pub threads: u32,
    /// As the source predicts it, on its own machine and with its own number of threads.
    pub source_ms: f64,
    pub measured_ms: f64,
    /// Half the range of the sessions' medians.
    pub repeat_ms: f64,
    /// As the carried profile predicts it, which has seen it.
    pub predicted_ms: f64,
}

/// More than this is no list of ours.
const MOST_LEFT_OUT: usize = 100_000;

/// What is wrong with numbers from a file, if anything.
pub(super) fn complaint(head: &super::Head) -> Option<String> {
    let (conditions, left_out) = (&head.conditions, &head.left_out);
    let levels = conditions.levels.iter().map(|l| l.gb_per_s);
    let shares = [
        conditions.undisturbed_pct,
        conditions.disturbed_factor,
        conditions.quota_cores,
        conditions.load,
    ];
    let times = left_out.iter().flat_map(|l| [l.median_us, l.mad_us]);
    let carried = { head.carried.iter() }.flat_map(|c| [c.source_ms, c.measured_ms, c.repeat_ms, c.predicted_ms]);
    let mut all = levels.chain(shares.into_iter().flatten()).chain(times).chain(carried);
    if let Some(wrong) = all.find(|x| !(x.is_finite() && *x >= 0.0)) {
        return Some(format!("found {wrong}, expected numbers of 0 or more"));
    }
    let longest = left_out.len().max(head.carried.len());
    (longest > MOST_LEFT_OUT).then(|| format!("a list of {longest}, expected {MOST_LEFT_OUT} at most"))
}

const LIMIT_BYTES: u64 = 1 << 20;

impl Conditions {
    /// What the system tells of itself, now.
    pub fn here() -> Self {
        let read = |path: &str| files::read_text(path, LIMIT_BYTES).ok();
        let word = |text: String, at: usize| text.split_whitespace().nth(at).map(str::to_owned);
        let number = |path: &str, at: usize| read(path).and_then(|text| word(text, at)?.parse::<f64>().ok());
        // `max 100000` where nothing limits it.
        let quota = number("/sys/fs/cgroup/cpu.max", 0).zip(number("/sys/fs/cgroup/cpu.max", 1));
        Self {
            kernel: read("/proc/sys/kernel/osrelease").map(|text| text.trim().to_owned()),
            pinned: Some(Pinned::here().is_ok()),
            quota_cores: quota.filter(|q| q.1 > 0.0).map(|(quota, period)| quota / period),
            throttled: throttled(),
            load: number("/proc/loadavg", 0),
            caches: caches(),
            ..Self::default()
        }
    }
}

/// How often the control group has been stopped for its quota; `None` where there is no count.
pub fn throttled() -> Option<u64> {
    let text = files::read_text("/sys/fs/cgroup/cpu.stat", LIMIT_BYTES).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("nr_throttled "))?;
    line.trim().parse().ok()
}

fn caches() -> BTreeMap<String, u64> {
    let read = |index: u32, name: &str| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}");
        files::read_text(path, LIMIT_BYTES)
            .ok()
            .map(|text| text.trim().to_owned())
    };
    let one = |index: u32| {
        let size = read(index, "size")?;
        let (digits, factor) = match size.strip_suffix('K') {
            Some(digits) => (digits, 1 << 10),
            None => size
                .strip_suffix('M')
                .map_or((size.as_str(), 1), |digits| (digits, 1 << 20)),
        };
        let bytes = digits.parse::<u64>().ok()? * factor;
        let name = format!("L{} {}", read(index, "level")?, read(index, "type")?.to_lowercase());
        Some((name, bytes))
    };
    (0..8).filter_map(one).collect()
}
