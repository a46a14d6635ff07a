//! `cotk serve` as a program: real clients against the running binary over a container compressed from the committed
//! tiny checkpoint. The laws of HTTP and scheduling stand in `crates/serve/src/tests`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::{Value, json};

use crate::program::{Ran, Workplace, in_repository, tiny_model};

/// A container of the tiny checkpoint, compressed once for all tests here.
fn container() -> PathBuf {
    static CONTAINER: OnceLock<Workplace> = OnceLock::new();
    let place = CONTAINER.get_or_init(|| {
        let place = Workplace::new();
        let text = in_repository("data/tiny-qwen2moe/train.txt");
        let (model, text) = (tiny_model(), text.to_str().expect("UTF-8").to_owned());
        let args = [
            "compress",
            "--moe",
            &model,
            "-o",
            "tiny",
            "--recipe",
            "moe-int4",
            "--calibration",
            &text,
            "--json",
        ];
        place.run(args).result(0);
        place
    });
    place.join("tiny")
}

/// A running server; stopped by SIGTERM at the end of its test, which must exit 0.
pub(crate) struct Server {
    child: Option<Child>,
    envelope: Value,
    _place: Workplace,
}

impl Server {
    pub(crate) fn start(model: &str, more: &[&str]) -> Self {
        let place = Workplace::new();
        let mut child = place.start(["serve", model, "--port", "0", "--json"].iter().chain(more));
        let mut line = String::new();
        let stdout = child.stdout.as_mut().expect("piped");
        // Nothing else comes on standard output, so that a buffer loses nothing.
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("standard output is readable");
        let envelope: Value = match serde_json::from_str(&line) {
            Ok(envelope) => envelope,
            Err(error) => {
                let ran = Ran::of(child.wait_with_output().expect("it ends"));
                panic!("{error}: {line:?} {ran:?}")
            }
        };
        assert_eq!(
            (&envelope["command"], &envelope["ok"]),
            (&json!("serve"), &json!(true)),
            "{envelope}"
        );
        Self {
            child: Some(child),
            envelope,
            _place: place,
        }
    }

    fn url(&self) -> &str {
        self.envelope["result"]["listening"].as_str().expect("an address")
    }

    fn model(&self) -> &str {
        self.envelope["result"]["model"].as_str().expect("a name")
    }

    /// Sends a request and leaves the answer unread.
    fn open(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let address = self.url().strip_prefix("http://").expect("http");
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .expect("a timeout");
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(format!("{head}{body}").as_bytes()).expect("it reads");
        stream
    }

    /// Status and whole text of an answer.
    pub(crate) fn call(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut text = String::new();
        self.open(method, path, body)
            .read_to_string(&mut text)
            .expect("an answer");
        let status = text
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .expect("a status");
        (status, text)
    }

    fn signal(&self, signal: libc::c_int) {
        let id = self.child.as_ref().expect("running").id();
        let id = libc::pid_t::try_from(id).expect("process ids are positive");
        // SAFETY: sends a signal to our own child, which has not been waited for: the id is still its.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
    }

    /// Waits for its end.
    fn ended(mut self) -> Ran {
        let child = self.child.take().expect("running");
        Ran::of(child.wait_with_output().expect("it ends"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.signal(libc::SIGTERM);
            let status = self.child.take().map(|mut child| child.wait());
            if !std::thread::panicking() {
                assert!(
                    status.is_some_and(|status| status.is_ok_and(|status| status.success())),
                    "SIGTERM ends it well"
                );
            }
        }
    }
}

/// The folder with the `openai` package: `cargo xtask test` names it, plain `cargo test` finds it in the cache.
/// `None`: left out by `COTK_SKIP=openai`.
fn python_packages() -> Option<PathBuf> {
    let skips = std::env::var("COTK_SKIP").unwrap_or_default();
    if skips.split(',').any(|skip| skip == "openai") {
        // Not by `println!`, which the test harness keeps to itself.
        writeln!(std::io::stderr(), "skipped: COTK_SKIP names openai").expect("standard error is open");
        return None;
    }
    if let Some(folder) = std::env::var_os("COTK_PYTHON_PACKAGES") {
        return Some(folder.into());
    }
    let base = std::env::var_os("XDG_CACHE_HOME")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let cache = base.expect("HOME or XDG_CACHE_HOME is set").join("cotk");
    // The stamp holds the pinned list that the folder was made from.
    let pinned = fs_err::read_to_string(in_repository("tools/python-tests.txt")).expect("the list is committed");
    let is_whole = |folder: &PathBuf| fs_err::read_to_string(folder.join("stamp")).is_ok_and(|stamp| stamp == pinned);
    let folders = std::fs::read_dir(&cache)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let found = folders.into_iter().find(is_whole);
    assert!(
        found.is_some(),
        "no openai package of tools/python-tests.txt in {}: `cargo xtask setup --python` fetches it, COTK_SKIP=openai leaves this test out",
        cache.display()
    );
    found
}

/// What `cotk run` generates greedily: the text, and the number of tokens.
fn greedy_run(model: &str, prompt: &str, max_tokens: u64, mode: &str) -> (String, u64) {
    let count = max_tokens.to_string();
    let args = [
        "run",
        model,
        "--prompt",
        prompt,
        "--max-tokens",
        &count,
        "--temperature",
        "0",
        "--mode",
        mode,
        "--json",
    ];
    let result = Workplace::new().run(args).result(0);
    (
        result["text"].as_str().expect("a text").to_owned(),
        result["generated_tokens"].as_u64().expect("a count"),
    )
}

const PROMPT: &str = "The ";
const MAX_TOKENS: u64 = 24;

#[test]
fn the_openai_client_gets_what_cotk_run_prints() {
    let Some(packages) = python_packages() else { return };
    let container = container();
    let container = container.to_str().expect("UTF-8");
    let server = Server::start(container, &[]);
    let (_, info) = server.call("GET", "/v1/cotk/", "");
    let info: Value = serde_json::from_str(info.split("\r\n\r\n").nth(1).expect("a body")).expect("JSON");
    assert_eq!(info["modes"], json!(["exact", "little"]));
    let context = info["context"].as_u64().expect("a number");

    let output = Command::new("python3")
        .arg(in_repository("tests/clients/openai_client.py"))
        .args([
            server.url(),
            server.model(),
            PROMPT,
            &MAX_TOKENS.to_string(),
            &context.to_string(),
        ])
        .env("PYTHONPATH", packages)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("python3 starts: the tests need Python 3.11 or newer, COTK_SKIP=openai leaves this one out");
    let ran = Ran::of(output);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let got: Value = serde_json::from_str(&ran.stdout).expect("one JSON object");

    assert_eq!(got["models"], json!([server.model()]));
    assert_eq!(got["model"], server.model());

    // Greedy: what `cotk run` prints, whole and streamed, in both modes.
    for mode in ["exact", "little"] {
        let reply = &got[mode];
        let (text, tokens) = greedy_run(container, PROMPT, MAX_TOKENS, mode);
        assert_eq!(reply["text"], text, "{mode}");
        assert_eq!(reply["streamed"]["text"], text, "{mode}");
        assert_eq!(reply["streamed"]["finish"], reply["finish"]);
        assert_eq!(reply["streamed"]["usage"], reply["usage"]);
        let sampled = reply["usage"]["completion_tokens"].as_u64().expect("a count");
        // The end token is sampled and counted, but is no part of the text.
        assert_eq!(sampled, tokens + u64::from(reply["finish"] == "stop"), "{mode}");
        let joined: String = reply["tokens"]
            .as_array()
            .expect("tokens")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        assert_eq!(joined, text, "{mode}");
        assert_eq!(reply["cotk"]["mode"], mode);
        assert_eq!(reply["streamed"]["cotk"]["mode"], mode);
    }
    // `little` is another computation, all of it at low bits.
    assert_ne!(got["exact"]["logprobs"], got["little"]["logprobs"]);
    assert_eq!(got["exact"]["cotk"]["low_bit_fraction"], 0.0);
    let fraction = got["little"]["cotk"]["low_bit_fraction"].as_f64().expect("a fraction");
    assert!((fraction - 1.0).abs() < 1e-6, "{fraction}");

    // The model has no chat template: ChatML, said once.
    let chat = &got["chat"];
    assert_eq!(
        (&chat["role"], &chat["streamed"]["text"]),
        (&json!("assistant"), &chat["text"])
    );
    assert_eq!(chat["streamed"]["usage"], chat["usage"]);
    assert!(
        chat["top_logprobs"]
            .as_array()
            .expect("a list")
            .iter()
            .all(|count| *count == 3)
    );
    let framed = format!(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(chat["text"], greedy_run(container, &framed, MAX_TOKENS, "exact").0);
    let warnings = server.envelope["warnings"].as_array().expect("a list");
    assert_eq!(
        warnings
            .iter()
            .filter(|warning| warning.to_string().contains("ChatML"))
            .count(),
        1
    );

    assert_eq!(got["seeds"][0], got["seeds"][1]);
    assert_ne!(got["seeds"][0], got["seeds"][2]);

    let (stop, text) = (
        got["stop"]["stop"].as_str().expect("a string"),
        got["exact"]["text"].as_str().expect("a text"),
    );
    assert_eq!(got["stop"]["text"], text.split(stop).next().expect("a part"));
    assert_eq!(got["stop"]["finish"], "stop");

    for (name, class, param) in [
        ("model", "NotFoundError", "model"),
        ("n", "BadRequestError", "n"),
        ("mode", "BadRequestError", "cotk.mode"),
        ("temperature", "BadRequestError", "temperature"),
        ("context", "BadRequestError", "prompt"),
        ("messages", "BadRequestError", "messages"),
        ("stream", "BadRequestError", "n"),
    ] {
        let refusal = &got["refusals"][name];
        assert_eq!(
            (&refusal["class"], &refusal["param"]),
            (&json!(class), &json!(param)),
            "{refusal}"
        );
    }
    let refusal = &got["refusals"]["context"];
    assert_eq!(refusal["code"], "context_length_exceeded");
    let numbers = format!("{} tokens, expected at most {}", context + 5, context - 1);
    assert!(
        refusal["message"].as_str().expect("a message").contains(&numbers),
        "{refusal}"
    );

    // Two streams at once, in different modes, each as if it were alone.
    for (index, mode) in ["exact", "little"].into_iter().enumerate() {
        assert_eq!(
            got["concurrent"][index],
            greedy_run(container, PROMPT, context, mode).0,
            "{mode}"
        );
    }
}

#[test]
fn a_port_in_use_is_refused_before_the_model_is_read() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let error = Workplace::new()
        .run(["serve", "no/such/model", "--port", &port, "--json"])
        .fault(1);
    assert_eq!((&error["kind"], &error["found"]), (&json!("port-in-use"), &json!(port)));
    assert!(error["help"].as_str().expect("help").contains("--port 0"), "{error}");
}

#[test]
fn ctrl_c_lets_a_stream_end_and_exits_0() {
    let server = Server::start(&tiny_model(), &[]);
    let body = json!({"prompt": PROMPT, "max_tokens": 100_000, "temperature": 0, "stream": true}).to_string();
    let mut stream = server.open("POST", "/v1/completions", &body);
    let mut text = vec![0; 1];
    stream.read_exact(&mut text).expect("it has begun");
    server.signal(libc::SIGINT);
    stream.read_to_end(&mut text).expect("it ends");
    let text = String::from_utf8(text).expect("UTF-8");
    assert!(text.contains("data: [DONE]"), "{text}");
    let ran = server.ended();
    assert_eq!((ran.code, ran.stdout.as_str()), (0, ""), "{ran:?}");
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
}

#[test]
fn a_request_that_cannot_be_right_is_refused_by_field() {
    let server = Server::start(&tiny_model(), &["--api-key", "s3cret"]);
    let (status, text) = server.call("GET", "/v1/models", "");
    assert_eq!(status, 401, "{text}");
    drop(server);

    let server = Server::start(&tiny_model(), &[]);
    let check = |body: &str, status: u16, words: &str| {
        let (found, text) = server.call("POST", "/v1/completions", body);
        assert_eq!(found, status, "{text}");
        assert!(text.contains(words), "{text}");
    };
    check("{\"prompt\": \"a\",}", 400, "line 1 column 16");
    check(
        &json!({"prompt": "a", "model": "gpt"}).to_string(),
        404,
        "model_not_found",
    );
    check(
        &json!({"prompt": "a ".repeat(20_000)}).to_string(),
        400,
        "context_length_exceeded",
    );
    // A checkpoint that was not compressed has one width only.
    check(
        &json!({"prompt": "a", "cotk": {"mode": "little"}}).to_string(),
        400,
        "mode_not_available",
    );
    let (status, text) = server.call("GET", "/metrics", "");
    assert_eq!(status, 200);
    let line = "cotk_http_requests_total{endpoint=\"/v1/completions\",status=\"400\"} 3";
    assert!(text.lines().any(|found| found == line), "{text}");
}

#[test]
fn a_damaged_expert_record_is_refused_by_name() {
    let place = Workplace::new();
    let damaged = place.join("tiny");
    fs_err::create_dir(&damaged).expect("a folder");
    for entry in fs_err::read_dir(container()).expect("a container") {
        let from = entry.expect("an entry").path();
        fs_err::copy(&from, damaged.join(from.file_name().expect("a name"))).expect("a copy");
    }
    let file = damaged.join("experts.bin");
    let mut bytes = fs_err::read(&file).expect("records");
    // Within the codes of the first record, behind its header of 256 bytes.
    bytes[300] ^= 1;
    fs_err::write(&file, bytes).expect("written");
    let error = place.run(["serve", "tiny", "--port", "0", "--json"]).fault(2);
    assert_eq!(error["kind"], "expert-record");
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("experts.bin: layer 0, expert "), "{message}");
}

#[test]
fn a_template_that_does_not_parse_is_refused_by_line() {
    let place = Workplace::new();
    fs_err::write(place.join("broken.jinja"), "{{ a }}\n{% for %}").expect("written");
    let args = [
        "serve",
        &tiny_model(),
        "--port",
        "0",
        "--chat-template",
        "broken.jinja",
        "--json",
    ];
    let error = place.run(args).fault(2);
    assert_eq!(
        (&error["kind"], &error["found"]),
        (&json!("chat-template"), &json!("line 2")),
        "{error}"
    );
}

#[test]
fn a_server_open_to_others_without_a_key_warns() {
    let server = Server::start(&tiny_model(), &["--host", "0.0.0.0"]);
    let warnings = server.envelope["warnings"].to_string();
    assert!(warnings.contains("--api-key"), "{warnings}");
    drop(server);
    let server = Server::start(&tiny_model(), &["--host", "0.0.0.0", "--api-key", "s3cret"]);
    let warnings = server.envelope["warnings"].to_string();
    assert!(!warnings.contains("--api-key KEY"), "{warnings}");
}
