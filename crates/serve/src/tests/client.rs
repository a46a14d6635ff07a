//! A server of the toy engine on a free port, and an HTTP client of a few lines.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use cotk_model::moe::Mode;
use cotk_run::cancel::Cancel;
use cotk_run::seeds::Seeds;
use serde_json::Value;

use super::toy::Toy;
use crate::Limits;
use crate::server::{Bound, Options, serve};
use crate::template::{ChatTemplate, SpecialTokens};

pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) toy: Arc<Toy>,
    pub(super) warnings: Vec<String>,
    pub(super) cancel: Cancel,
    thread: Option<JoinHandle<Result<(), crate::Error>>>,
}

pub(super) struct Setup {
    pub(super) context: usize,
    pub(super) step_time: Duration,
    pub(super) modes: Vec<Mode>,
    pub(super) api_key: Option<String>,
    pub(super) limits: Limits,
    pub(super) drain: Duration,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            context: 400,
            step_time: Duration::ZERO,
            modes: vec![Mode::Exact, Mode::Little],
            api_key: None,
            limits: Limits::default(),
            drain: Duration::from_secs(10),
        }
    }
}

impl Setup {
    pub(super) fn start(self) -> Server {
        let toy = Arc::new(Toy::new(self.context, self.step_time, &self.modes));
        let bound = Bound::bind("127.0.0.1", 0).unwrap();
        let (address, cancel) = (bound.address(), Cancel::new());
        let (engine, flag) = (Arc::clone(&toy), cancel.clone());
        let (told, heard) = mpsc::channel();
        let options = Options {
            api_key: self.api_key,
            limits: self.limits,
            drain: self.drain,
            seeds: Seeds::new(0),
            version: "test",
        };
        let thread = std::thread::spawn(move || {
            let template = ChatTemplate::chatml(SpecialTokens::new()).unwrap();
            serve(bound, engine, template, options, &flag, |ready| {
                told.send(ready.clone()).unwrap()
            })
        });
        let ready = heard.recv().unwrap();
        assert_eq!(ready.listening, format!("http://{address}"));
        Server {
            address,
            toy,
            warnings: ready.warnings,
            cancel,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.cancel.cancel();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap().unwrap();
            }
        }
    }
}

pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

impl Reply {
    #[track_caller]
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The data of each event.
    pub(super) fn events(&self) -> Vec<String> {
        let data = |event: &str| event.strip_prefix("data: ").map(str::to_owned);
        self.body.split("\n\n").filter_map(data).collect()
    }

    /// The events but `[DONE]`, which must be the last.
    #[track_caller]
    pub(super) fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.body);
        events
            .iter()
            .map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }
}

impl Server {
    /// Sends a request and leaves the answer unread.
    pub(super) fn open(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n");
        // One write each: the server may refuse and close before a long body is through.
        stream.write_all(format!("{head}{headers}\r\n").as_bytes()).unwrap();
        let _ = stream.write_all(body.as_bytes());
        stream
    }

    pub(super) fn call(&self, method: &str, path: &str, headers: &str, body: &str) -> Reply {
        read(self.open(method, path, headers, body))
    }

    pub(super) fn get(&self, path: &str) -> Reply {
        self.call("GET", path, "", "")
    }

    pub(super) fn complete(&self, body: &Value) -> Reply {
        self.call("POST", "/v1/completions", "", &body.to_string())
    }

    pub(super) fn chat(&self, body: &Value) -> Reply {
        self.call("POST", "/v1/chat/completions", "", &body.to_string())
    }

    /// Waits until `/metrics` has this line.
    #[track_caller]
    pub(super) fn wait_for(&self, line: &str) {
        for _ in 0..1000 {
            if self.get("/metrics").body.lines().any(|found| found == line) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{line} not in\n{}", self.get("/metrics").body);
    }
}

/// Reads a whole answer, chunked or not.
pub(super) fn read(stream: TcpStream) -> Reply {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(
            reader.read_line(&mut head).unwrap() > 0,
            "the answer ends in its head: {head}"
        );
    }
    let head = head.to_ascii_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut body = Vec::new();
    if head.contains("transfer-encoding: chunked") {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let Ok(size) = usize::from_str_radix(line.trim(), 16) else {
                break;
            };
            let start = body.len();
            body.resize(start + size, 0);
            reader.read_exact(&mut body[start..]).unwrap();
            reader.read_line(&mut line).unwrap();
            if size == 0 {
                break;
            }
        }
    } else {
        let _ = reader.read_to_end(&mut body);
    }
    Reply {
        status,
        head,
        body: String::from_utf8(body).unwrap(),
    }
}
