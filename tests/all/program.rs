//! Runs the built program in a folder of its own and reads what it says. Shared by the whole-program tests; holds no
//! test itself.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// A fresh folder to work in; `runs/` in it takes the ledger and the run folders.
pub(crate) struct Workplace(tempfile::TempDir);

impl Workplace {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// `path` inside.
    pub(crate) fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.path().join(path)
    }

    /// `cotk` with these arguments, here, untouched by the caller's environment.
    pub(crate) fn command<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cotk"));
        command.args(args).current_dir(self.path()).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("COTK_") && name != "COTK_ORT_LIB" && name != "COTK_ISA" {
                command.env_remove(name);
            }
        }
        // A profile of the user's must not change a test.
        command
            .env("COTK_RUNS", self.join("runs"))
            .env("XDG_DATA_HOME", self.join("xdg-data"));
        command
    }

    /// Runs to the end.
    pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Ran {
        Ran::of(self.command(args).output().expect("cotk starts"))
    }

    /// As [`run`](Self::run), with variables set.
    pub(crate) fn run_with<S: AsRef<std::ffi::OsStr>>(
        &self,
        variables: &[(&str, &str)],
        args: impl IntoIterator<Item = S>,
    ) -> Ran {
        Ran::of(
            self.command(args)
                .envs(variables.iter().copied())
                .output()
                .expect("cotk starts"),
        )
    }

    /// Starts without waiting.
    pub(crate) fn start<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Child {
        let mut command = self.command(args);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("cotk starts")
    }

    /// A copy of the tiny checkpoint to damage, at `name`.
    pub(crate) fn copy_of_tiny(&self, name: &str) -> PathBuf {
        let folder = self.join(name);
        fs_err::create_dir(&folder).expect("a fresh folder");
        for file in [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ] {
            fs_err::copy(Path::new(&tiny_model()).join(file), folder.join(file)).expect("the committed checkpoint");
        }
        folder
    }

    /// Every file below `folder` with its bytes, by relative path, sorted.
    pub(crate) fn bytes_below(&self, folder: impl AsRef<Path>) -> Vec<(PathBuf, Vec<u8>)> {
        let root = self.join(folder);
        let mut found = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let bytes = fs_err::read(&path).expect("a file that was listed");
                    found.push((path.strip_prefix(&root).expect("below").to_owned(), bytes));
                }
            }
        }
        found.sort();
        found
    }

    /// Names in the folder itself, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.path())
            .expect("the folder is there")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

/// A finished run of the program.
#[derive(Debug)]
pub(crate) struct Ran {
    /// 128 + n for signal n, as a shell says it.
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn of(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let status = output.status;
        Self {
            code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout: String::from_utf8(output.stdout).expect("standard output is UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("standard error is UTF-8"),
        }
    }

    /// The one JSON object on standard output: one line, with the keys that DESIGN 4 names.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let lines: Vec<&str> = self.stdout.lines().collect();
        assert_eq!(lines.len(), 1, "one line of JSON, not {self:?}");
        let value: Value = serde_json::from_str(lines[0]).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        assert_eq!(value["cotk"], env!("CARGO_PKG_VERSION"), "{value}");
        assert!(value["command"].is_string() && value["ok"].is_boolean(), "{value}");
        value
    }

    /// The `result` of a `--json` run that ended with `code`.
    #[track_caller]
    pub(crate) fn result(&self, code: i32) -> Value {
        assert_eq!(self.code, code, "{self:?}");
        let mut value = self.json();
        assert_eq!(value["ok"], true, "{value}");
        assert!(value["warnings"].is_array(), "{value}");
        value["result"].take()
    }

    /// The `error` of a `--json` run that failed with `code`: its kind is kebab-case, its message one clear line.
    #[track_caller]
    pub(crate) fn fault(&self, code: i32) -> Value {
        assert_eq!(self.code, code, "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        let mut value = self.json();
        assert_eq!(value["ok"], false, "{value}");
        let error = value["error"].take();
        let kind = error["kind"].as_str().expect("a kind");
        assert!(
            kind.chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'),
            "{kind}"
        );
        let message = error["message"].as_str().expect("a message");
        assert!(
            !message.is_empty() && !message.ends_with('.') && !message.contains("Error {"),
            "{message}"
        );
        error
    }
}

/// `path` in the repository.
pub(crate) fn in_repository(path: impl AsRef<Path>) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The committed tiny checkpoint.
pub(crate) fn tiny_model() -> String {
    let path = in_repository("data/tiny-qwen2moe");
    path.to_str().expect("UTF-8").to_owned()
}
