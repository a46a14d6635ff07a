//! Driving the built `cotk`: `--json` in, values out. Used by demo and bench.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::shell;

/// The program under the one profile, built when needed.
pub(crate) struct Program {
    pub(crate) binary: PathBuf,
    root: PathBuf,
}

impl Program {
    pub(crate) fn build(root: &Path) -> Result<Self> {
        shell::run(shell::cargo(root).args(["build", "--quiet", "--bins"]))?;
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        Ok(Self {
            binary: target.join("debug/cotk"),
            root: root.to_owned(),
        })
    }

    /// Runs `cotk ARGS --json` in the checkout; its progress stays visible. Returns `result` and the seconds it took.
    pub(crate) fn json(&self, args: &[&str]) -> Result<(Value, f64)> {
        let start = Instant::now();
        let output = Command::new(&self.binary)
            .current_dir(&self.root)
            .args(args)
            .arg("--json")
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("{} does not start", self.binary.display()))?;
        let line = String::from_utf8_lossy(&output.stdout);
        let envelope: Value = serde_json::from_str(line.trim())
            .with_context(|| format!("`cotk {}` printed no JSON object: {line:?}", args.join(" ")))?;
        if envelope["ok"] != true {
            bail!(
                "`cotk {}` failed: {}",
                args.join(" "),
                envelope["error"]["message"].as_str().unwrap_or("no message")
            );
        }
        Ok((envelope["result"].clone(), start.elapsed().as_secs_f64()))
    }

    /// Starts `cotk serve MODEL` on a free port and waits until it is ready.
    pub(crate) fn serve(&self, model: &Path) -> Result<Server> {
        let start = Instant::now();
        let mut child = Command::new(&self.binary)
            .current_dir(&self.root)
            .arg("serve")
            .arg(model)
            .args(["--port", "0", "--json"])
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().context("stdout was piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let ready_s = start.elapsed().as_secs_f64();
        let envelope: Value = serde_json::from_str(line.trim()).with_context(|| format!("serve printed {line:?}"))?;
        let listening = envelope["result"]["listening"]
            .as_str()
            .context("serve did not say where it listens")?;
        let address = listening.trim_start_matches("http://").to_owned();
        Ok(Server {
            child,
            address,
            ready_s,
            model: envelope["result"]["model"].as_str().unwrap_or_default().to_owned(),
        })
    }
}

/// A running server; stopped with SIGTERM by [`stop`](Self::stop), killed when dropped.
pub(crate) struct Server {
    child: Child,
    address: String,
    /// From start to the ready line, seen from outside.
    pub(crate) ready_s: f64,
    pub(crate) model: String,
}

impl Server {
    /// One POST with a JSON body; the parsed reply.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let body = body.to_string();
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(Duration::from_mins(1)))?;
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            self.address,
            body.len()
        )?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply)?;
        let (head, body) = reply.split_once("\r\n\r\n").context("no end of headers in the reply")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{path}: {}", reply.trim());
        serde_json::from_str(body).with_context(|| format!("{path}: {body:?} is not JSON"))
    }

    /// SIGTERM; the server must drain and exit 0.
    pub(crate) fn stop(mut self) -> Result<()> {
        let id = libc::pid_t::try_from(self.child.id())?;
        // SAFETY: a plain system call on a child that has not been waited for.
        unsafe { libc::kill(id, libc::SIGTERM) };
        let status = self.child.wait()?;
        ensure!(status.success(), "serve ended with {status} after SIGTERM");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
