//! Which machine this is: what a profile must match to be used without `--force`. Reads `/proc` and `/sys`, once.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Difference;
use crate::work::Block;

/// What decides how fast things are, as far as the system tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Model name, family and model number.
    pub cpu: String,
    /// Instruction sets that kernels choose by: `avx2`, `avx512f`, `avx512vnni`, …
    pub instruction_sets: Vec<String>,
    /// Cores that this process may use.
    pub cores: u32,
    pub memory_bytes: u64,
    /// Largest cache, 0 if not told.
    pub cache_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
    /// Libraries whose kernels are measured, by name: `onnxruntime = "1.31.1"`.
    #[serde(default)]
    pub runtimes: BTreeMap<String, String>,
}

const LIMIT_BYTES: u64 = 1 << 24;

impl Identity {
    /// This machine, with the versions of the runtimes that the caller knows.
    pub fn here(runtimes: BTreeMap<String, String>) -> Self {
        let read = |path: &str| cotk_run::files::read_text(path, LIMIT_BYTES).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let field = |name: &str| {
            let line = cpuinfo
                .lines()
                .find(|l| l.split(':').next().is_some_and(|key| key.trim() == name));
            line.and_then(|l| l.split_once(':'))
                .map_or("?", |(_, value)| value.trim())
                .to_owned()
        };
        let memory_kib = read("/proc/meminfo")
            .lines()
            .find_map(|l| {
                l.strip_prefix("MemTotal:")?
                    .trim()
                    .strip_suffix("kB")?
                    .trim()
                    .parse::<u64>()
                    .ok()
            })
            .unwrap_or(0);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            cpu: format!(
                "{}, family {} model {}",
                field("model name"),
                field("cpu family"),
                field("model")
            ),
            instruction_sets: instruction_sets(),
            cores: u32::try_from(cores).unwrap_or(u32::MAX),
            memory_bytes: memory_limit(&read).map_or(memory_kib * 1024, |limit| limit.min(memory_kib * 1024)),
            cache_bytes: (0..6).map(|i| cache_bytes(i, &read)).max().unwrap_or(0),
            gpu: None,
            runtimes,
        }
    }

    /// A name for a folder: `amd-epyc-family-25-model-17-2c-avx512vnni`.
    pub fn id(&self) -> String {
        let mut id = String::new();
        for word in self
            .cpu
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|w| !w.is_empty())
        {
            id += &word.to_ascii_lowercase();
            id.push('-');
        }
        let best = self.instruction_sets.last().map_or("scalar", String::as_str);
        format!("{id}{}c-{best}", self.cores)
    }

    /// Channels in a block of ONNX Runtime's blocked layout.
    pub fn block(&self) -> Block {
        let has = |name: &str| self.instruction_sets.iter().any(|i| i == name);
        Block(if has("avx512f") { 16 } else { 8 })
    }

    /// Every field in which `here` differs from this profile's machine. A runtime counts only where both know it; memory
    /// only by more than a tenth (kernels keep a varying part to themselves).
    pub fn differences(&self, here: &Self) -> Vec<Difference> {
        let mut differences = Vec::new();
        let mut differ = |field, profile: String, here: String| {
            if profile != here {
                differences.push(Difference { field, profile, here });
            }
        };
        differ("cpu", self.cpu.clone(), here.cpu.clone());
        differ(
            "instruction sets",
            self.instruction_sets.join(" "),
            here.instruction_sets.join(" "),
        );
        differ("cores", self.cores.to_string(), here.cores.to_string());
        if self.memory_bytes.abs_diff(here.memory_bytes) > self.memory_bytes / 10 {
            differ(
                "memory bytes",
                self.memory_bytes.to_string(),
                here.memory_bytes.to_string(),
            );
        }
        if let (Some(profile), Some(here)) = (&self.gpu, &here.gpu) {
            differ("gpu", profile.clone(), here.clone());
        }
        for (name, profile) in &self.runtimes {
            if let Some(here) = here.runtimes.get(name) {
                let field = if name == "onnxruntime" {
                    "onnxruntime version"
                } else {
                    "runtime version"
                };
                differ(field, profile.clone(), here.clone());
            }
        }
        differences
    }
}

/// Those that some kernel of ours or of a runtime chooses by, narrow to wide.
fn instruction_sets() -> Vec<String> {
    let mut sets = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let mut push = |has: bool, name: &str| {
            if has {
                sets.push(name.to_owned());
            }
        };
        push(std::arch::is_x86_feature_detected!("avx2"), "avx2");
        push(std::arch::is_x86_feature_detected!("fma"), "fma");
        push(std::arch::is_x86_feature_detected!("avx512f"), "avx512f");
        push(std::arch::is_x86_feature_detected!("avx512vnni"), "avx512vnni");
    }
    sets
}

/// What a control group leaves of the memory, if it limits any. (Its share of cores is in `cores` already.)
fn memory_limit(read: &impl Fn(&str) -> String) -> Option<u64> {
    read("/sys/fs/cgroup/memory.max").trim().parse().ok()
}

fn cache_bytes(index: u32, read: &impl Fn(&str) -> String) -> u64 {
    let text = read(&format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size"));
    let text = text.trim();
    let (digits, factor) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 1 << 10),
        Some(b'M') => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    digits.parse::<u64>().unwrap_or(0) * factor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_equals_itself_and_differences_are_named() {
        let here = Identity::here(BTreeMap::from([("onnxruntime".into(), "1.31.1".into())]));
        assert!(here.differences(&here).is_empty());
        assert!(here.cores >= 1);
        let mut other = here.clone();
        other.cores += 1;
        other.runtimes.insert("onnxruntime".into(), "1.24.0".into());
        let fields: Vec<_> = other.differences(&here).into_iter().map(|d| d.field).collect();
        assert_eq!(fields, ["cores", "onnxruntime version"]);
        // Who does not open the runtime is not held to its version.
        other.cores = here.cores;
        assert!(
            other
                .differences(&Identity {
                    runtimes: BTreeMap::new(),
                    ..here.clone()
                })
                .is_empty()
        );
        assert!(
            here.id().chars().all(|c| c.is_ascii_alphanumeric() || c == '-'),
            "{}",
            here.id()
        );
    }
}
