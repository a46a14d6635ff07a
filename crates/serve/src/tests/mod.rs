//! The laws of the server, over real sockets and the toy engine. Real clients and a real model: `tests/all/serve.rs`.

mod client;
mod toy;

use std::io::Read;
use std::time::Duration;

use cotk_model::moe::Mode;
use serde_json::{Value, json};

use self::client::{Setup, read};
use crate::Limits;
use crate::server::Bound;

fn text_of(chunks: &[Value], pointer: &str) -> String {
    chunks
        .iter()
        .filter_map(|chunk| chunk.pointer(pointer)?.as_str())
        .collect()
}

#[test]
fn the_pieces_of_a_stream_are_the_whole_reply() {
    let server = Setup::default().start();
    for prompt in ["abc>", "é€😀>", "ab.>", "€x.>"] {
        let mut body = json!({"prompt": prompt, "max_tokens": 40, "temperature": 0});
        let whole = server.complete(&body).json();
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let reply = server.complete(&body);
        assert!(reply.head.contains("content-type: text/event-stream"), "{}", reply.head);
        let chunks = reply.chunks();
        let (usage, chunks) = chunks.split_last().unwrap();
        assert_eq!(
            text_of(chunks, "/choices/0/text"),
            whole["choices"][0]["text"].as_str().unwrap()
        );
        assert_eq!(usage["usage"], whole["usage"]);
        assert_eq!(usage["choices"], json!([]));
        let last = chunks.last().unwrap();
        assert_eq!(
            last["choices"][0]["finish_reason"],
            whole["choices"][0]["finish_reason"]
        );
        assert_eq!(last["cotk"]["mode"], "exact");
        assert!(
            chunks
                .iter()
                .all(|chunk| chunk["usage"].is_null() && chunk["id"] == chunks[0]["id"])
        );
    }
}

#[test]
fn chat_opens_with_a_role_and_ends_with_an_empty_delta() {
    let server = Setup::default().start();
    // ChatML ends in a `>` long before the prompt does: the toy repeats the text before the first.
    let mut body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 6, "temperature": 0});
    let whole = server.chat(&body).json();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");
    body["stream"] = json!(true);
    let chunks = server.chat(&body).chunks();
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    assert_eq!(chunks.last().unwrap()["choices"][0]["delta"], json!({}));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(
        text_of(&chunks, "/choices/0/delta/content"),
        whole["choices"][0]["message"]["content"].as_str().unwrap()
    );
    assert!(server.warnings[0].contains("ChatML"), "{:?}", server.warnings);
}

#[test]
fn a_character_is_never_split_between_pieces() {
    let server = Setup::default().start();
    let body = json!({"prompt": "é€😀>", "max_tokens": 27, "temperature": 0, "stream": true});
    let chunks = server.complete(&body).chunks();
    assert_eq!(text_of(&chunks, "/choices/0/text"), "é€😀é€😀é€😀");
    // Cut inside a character: the rest reads as the replacement character, once.
    let body = json!({"prompt": "é€😀>", "max_tokens": 7, "temperature": 0});
    assert_eq!(server.complete(&body).json()["choices"][0]["text"], "é€\u{fffd}");
}

#[test]
fn a_stop_string_ends_the_text_across_tokens() {
    let server = Setup::default().start();
    for (stop, text, finish) in [
        (json!("cda"), "ab", "stop"),
        (json!(["zz", "dab"]), "abc", "stop"),
        (json!("dd"), "abcdabcdab", "length"),
        (json!("bd"), "abcdabcdab", "length"),
    ] {
        let mut body = json!({"prompt": "abcd>", "max_tokens": 10, "temperature": 0, "stop": stop, "logprobs": 1});
        let choice = &server.complete(&body).json()["choices"][0];
        assert_eq!(
            (choice["text"].as_str(), choice["finish_reason"].as_str()),
            (Some(text), Some(finish))
        );
        let tokens: String = choice["logprobs"]["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
            .collect();
        assert_eq!(tokens, text);
        body["stream"] = json!(true);
        assert_eq!(text_of(&server.complete(&body).chunks(), "/choices/0/text"), text);
    }
}

#[test]
fn max_tokens_and_the_context_both_end_a_reply() {
    let server = Setup {
        context: 20,
        ..Setup::default()
    }
    .start();
    let reply = server
        .complete(&json!({"prompt": "abc>", "max_tokens": 5, "temperature": 0}))
        .json();
    assert_eq!(reply["choices"][0]["text"], "abcab");
    assert_eq!(
        reply["usage"],
        json!({"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9})
    );
    let reply = server
        .complete(&json!({"prompt": "abc>", "max_tokens": 500, "temperature": 0}))
        .json();
    assert_eq!(reply["usage"]["total_tokens"], 20);
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[test]
fn the_mode_is_the_requests_and_is_reported() {
    let server = Setup::default().start();
    for (mode, text, fraction) in [("exact", "abcab", 0.0), ("little", "ABCAB", 1.0)] {
        let body = json!({"prompt": "abc>", "max_tokens": 5, "temperature": 0, "cotk": {"mode": mode}});
        let reply = server.complete(&body).json();
        assert_eq!(reply["choices"][0]["text"], text);
        assert_eq!(reply["cotk"]["mode"], mode);
        assert_eq!(reply["cotk"]["low_bit_fraction"], fraction);
        assert!(reply["cotk"]["timings"]["prefill_ms"].as_f64().unwrap() >= 0.0);
    }
    assert!(
        server
            .get("/metrics")
            .body
            .contains("cotk_mode_tokens_total{mode=\"little\"} 5")
    );
    let exact = Setup {
        modes: vec![Mode::Exact],
        ..Setup::default()
    }
    .start();
    let reply = exact.complete(&json!({"prompt": "a>", "cotk": {"mode": "little"}}));
    assert_eq!(reply.status, 400);
    assert_eq!(reply.json()["error"]["param"], "cotk.mode");
    assert_eq!(
        reply.json()["error"]["cotk"],
        json!({"found": "little", "expected": ["exact"]})
    );
}

#[test]
fn a_seed_repeats_and_seeds_differ() {
    let server = Setup::default().start();
    let draw = |seed: Option<u64>| {
        let mut body = json!({"prompt": "abcdefgh>", "max_tokens": 60, "temperature": 2});
        body["seed"] = json!(seed);
        let reply = server.complete(&body).json();
        reply["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    assert_eq!(draw(Some(1)), draw(Some(1)));
    assert_ne!(draw(Some(1)), draw(Some(2)));
    assert_ne!(draw(None), draw(None));
}

#[test]
fn log_probabilities_are_those_of_the_model() {
    let server = Setup::default().start();
    let mut body = json!({"prompt": "abc>", "max_tokens": 3, "temperature": 0, "logprobs": 2});
    let logprobs = &server.complete(&body).json()["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["a", "b", "c"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));
    let others: f64 = (0..256)
        .filter(|&i| i != 97)
        .map(|i| (f64::from(i % 7) * 0.01).exp())
        .sum();
    let expected = 6.0 - (6f64.exp() + others).ln();
    assert!((logprobs["token_logprobs"][0].as_f64().unwrap() - expected).abs() < 1e-6);
    assert_eq!(logprobs["top_logprobs"][0].as_object().unwrap().len(), 2);
    body =
        json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "logprobs": true, "top_logprobs": 4});
    let content = &server.chat(&body).json()["choices"][0]["logprobs"]["content"];
    assert_eq!(content.as_array().unwrap().len(), 3);
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 4);
    assert!(content[0]["bytes"].is_array());
}

#[test]
fn several_prompts_give_as_many_choices() {
    let server = Setup::default().start();
    let mut body = json!({"prompt": ["ab>", [99, 62], "de>"], "max_tokens": 4, "temperature": 0});
    let reply = server.complete(&body).json();
    let texts: Vec<&str> = (0..3).filter_map(|i| reply["choices"][i]["text"].as_str()).collect();
    assert_eq!(texts, ["abab", "cccc", "dede"]);
    assert_eq!(reply["usage"]["completion_tokens"], 12);
    body["stream"] = json!(true);
    let chunks = server.complete(&body).chunks();
    let second: Vec<Value> = chunks
        .iter()
        .filter(|c| c["choices"][0]["index"] == 1)
        .cloned()
        .collect();
    assert_eq!(text_of(&second, "/choices/0/text"), "cccc");
    assert_eq!(chunks.iter().filter(|c| c.get("cotk").is_some()).count(), 1);
}

#[test]
fn concurrent_sequences_move_in_turn_and_do_not_see_each_other() {
    let server = Setup::default().start();
    // Fewer tokens than the channel to a client holds: no slot ever stands still for its reader.
    let body = |prompt: &str| json!({"prompt": prompt, "max_tokens": 28, "seed": 3, "logprobs": 1}).to_string();
    let alone: Vec<Value> = ["abc>", "xyz>"]
        .map(|prompt| server.call("POST", "/v1/completions", "", &body(prompt)).json()["choices"].clone())
        .to_vec();
    server.toy.steps.lock().unwrap().clear();
    server.toy.hold();
    let first = server.open("POST", "/v1/completions", "", &body("abc>"));
    server.wait_for("cotk_sequences_active 1");
    let second = server.open("POST", "/v1/completions", "", &body("xyz>"));
    server.wait_for("cotk_sequences_waiting 1");
    server.toy.release();
    let together = [first, second].map(|stream| read(stream).json()["choices"].clone());
    assert_eq!(alone, together);
    let steps = server.toy.steps.lock().unwrap();
    // The step that was held when the second came, then one round after the other.
    let rounds = &steps[1..];
    assert_eq!(rounds.len(), 55);
    assert!(
        rounds.chunks(2).take(27).all(|round| round == b"ax"),
        "not in turn: {steps:?}"
    );
}

#[test]
fn whoever_decodes_moves_in_one_step() {
    let server = Setup::default().start();
    let body = |prompt: &str, mode: &str| {
        json!({"prompt": prompt, "max_tokens": 9, "temperature": 0, "cotk": {"mode": mode}}).to_string()
    };
    let asked = [
        ("ab>", "exact"),
        ("cd>", "exact"),
        ("ef>", "little"),
        ("gh>", "exact"),
        ("ij>", "exact"),
        ("~k>", "exact"),
        ("^l>", "exact"),
    ];
    server.toy.hold();
    let open = |(prompt, mode): (&str, &str)| server.open("POST", "/v1/completions", "", &body(prompt, mode));
    let first = open(asked[0]);
    server.wait_for("cotk_sequences_active 1");
    let others = asked[1..].iter().map(|&asked| open(asked)).collect::<Vec<_>>();
    server.wait_for("cotk_sequences_waiting 6");
    server.toy.release();
    let replies: Vec<_> = std::iter::once(first).chain(others).map(read).collect();
    for (reply, text) in replies
        .iter()
        .zip(["ababababa", "cdcdcdcdc", "EFEFEFEFE", "ghghghghg", "ijijijiji"])
    {
        assert_eq!(reply.json()["choices"][0]["text"], text);
    }
    for (reply, why) in replies[5..].iter().zip(["checksum differs", "a bug in the engine"]) {
        assert_eq!(reply.status, 500);
        assert!(reply.body.contains(why), "{}", reply.body);
    }
    // Five decode exactly, one by its prefixes: the toy takes three at a time, and never two modes.
    let sizes = server.toy.sizes.lock().unwrap();
    assert!(
        sizes.iter().filter(|&&size| size == toy::WIDTH).count() >= 8,
        "{sizes:?}"
    );
}

#[test]
fn a_long_prompt_does_not_stop_the_others() {
    let limits = Limits {
        prefill_tokens: 4,
        ..Limits::default()
    };
    let server = Setup {
        limits,
        ..Setup::default()
    }
    .start();
    server.toy.hold();
    // Fewer tokens than the channel to a client holds: its slot never stands still for its reader.
    let body = json!({"prompt": "ab>", "max_tokens": 28}).to_string();
    let short = server.open("POST", "/v1/completions", "", &body);
    server.wait_for("cotk_sequences_active 1");
    let body = json!({"prompt": format!("{}>", "x".repeat(99)), "max_tokens": 1}).to_string();
    let long = server.open("POST", "/v1/completions", "", &body);
    server.wait_for("cotk_sequences_waiting 1");
    server.toy.release();
    assert_eq!(read(long).json()["usage"]["prompt_tokens"], 100);
    assert_eq!(read(short).json()["usage"]["completion_tokens"], 28);
    let steps = server.toy.steps.lock().unwrap();
    let chunks: Vec<usize> = steps
        .iter()
        .enumerate()
        .filter(|(_, b)| **b == b'x')
        .map(|(at, _)| at)
        .collect();
    assert_eq!(chunks.len(), 25);
    assert!(
        chunks.windows(2).all(|pair| pair[1] == pair[0] + 2),
        "a token of the other between any two chunks"
    );
}

#[test]
fn a_client_that_leaves_frees_its_slot() {
    let step_time = Duration::from_millis(1);
    let limits = Limits {
        slots: 1,
        queue: 1,
        ..Limits::default()
    };
    let server = Setup {
        step_time,
        limits,
        context: 1_000_000,
        ..Setup::default()
    }
    .start();
    for is_streamed in [true, false] {
        let body = json!({"prompt": "ab>", "max_tokens": 900_000, "stream": is_streamed});
        let mut stream = server.open("POST", "/v1/completions", "", &body.to_string());
        server.wait_for("cotk_sequences_active 1");
        if is_streamed {
            stream.read_exact(&mut [0; 300]).unwrap();
        }
        drop(stream);
        server.wait_for("cotk_sequences_active 0");
    }
    server.wait_for("cotk_sequences_cancelled_total 2");
    assert_eq!(server.complete(&json!({"prompt": "ab>", "max_tokens": 2})).status, 200);
}

#[test]
fn a_slow_client_holds_up_nobody_else() {
    let limits = Limits {
        slots: 2,
        queue: 0,
        ..Limits::default()
    };
    let server = Setup {
        limits,
        context: 10_000_000,
        ..Setup::default()
    }
    .start();
    // Never read: the socket fills, then the channel, then the slot stands still.
    let body = json!({"prompt": "ab>", "max_tokens": 9_000_000, "stream": true}).to_string();
    let slow = server.open("POST", "/v1/completions", "", &body);
    server.wait_for("cotk_sequences_active 1");
    let reply = server
        .complete(&json!({"prompt": "cd>", "max_tokens": 200, "temperature": 0}))
        .json();
    assert_eq!(reply["usage"]["completion_tokens"], 200);
    drop(slow);
    server.wait_for("cotk_sequences_active 0");
}

#[test]
fn a_full_queue_refuses_with_numbers() {
    let step_time = Duration::from_millis(1);
    let limits = Limits {
        slots: 1,
        queue: 1,
        ..Limits::default()
    };
    let server = Setup {
        step_time,
        limits,
        context: 100_000,
        ..Setup::default()
    }
    .start();
    let long = json!({"prompt": "ab>", "max_tokens": 90_000}).to_string();
    let first = server.open("POST", "/v1/completions", "", &long);
    server.wait_for("cotk_sequences_active 1");
    let second = server.open("POST", "/v1/completions", "", &long);
    server.wait_for("cotk_sequences_waiting 1");
    let refused = server.complete(&json!({"prompt": "ab>"}));
    assert_eq!(refused.status, 429);
    assert!(refused.head.contains("retry-after: 1"), "{}", refused.head);
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    assert_eq!(refused.json()["error"]["cotk"], json!({"found": 1, "expected": 1}));
    // A waiting client that leaves makes room.
    drop(second);
    let short = json!({"prompt": "ab>", "max_tokens": 1}).to_string();
    let third = (0..100).find_map(|_| {
        let stream = server.open("POST", "/v1/completions", "", &short);
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        // An answer now is another refusal: the server has not seen yet that the second left.
        stream.peek(&mut [0]).is_err().then_some(stream)
    });
    drop(first);
    let third = third.unwrap();
    third.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(read(third).status, 200);
}

#[test]
fn refusals_have_their_status_and_their_field() {
    let server = Setup {
        context: 20,
        ..Setup::default()
    }
    .start();
    let check = |method: &str, path: &str, body: &str, status: u16, param: Value, code: Value, words: &str| {
        let reply = server.call(method, path, "", body);
        let error = reply.json()["error"].clone();
        assert_eq!(reply.status, status, "{method} {path} {body}: {error}");
        assert_eq!((&error["param"], &error["code"]), (&param, &code), "{error}");
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
        assert!(error["type"].is_string(), "{error}");
    };
    let completions = "/v1/completions";
    check(
        "POST",
        completions,
        "{\"prompt\": }",
        400,
        Value::Null,
        json!("invalid_json"),
        "line 1 column 12",
    );
    check(
        "POST",
        completions,
        "",
        400,
        Value::Null,
        json!("invalid_json"),
        "line 1 column 0",
    );
    check(
        "POST",
        completions,
        r#"{"prompt":"a","n":2}"#,
        400,
        json!("n"),
        json!("unsupported_parameter"),
        "expected 1",
    );
    check(
        "POST",
        completions,
        r#"{"prompt":"a","echo":true}"#,
        400,
        json!("echo"),
        json!("unsupported_parameter"),
        "echo",
    );
    check(
        "POST",
        completions,
        r#"{"prompt":"a","model":"b"}"#,
        404,
        json!("model"),
        json!("model_not_found"),
        "`toy`",
    );
    check(
        "POST",
        completions,
        r#"{"prompt":""}"#,
        400,
        json!("prompt"),
        Value::Null,
        "0 tokens",
    );
    check(
        "POST",
        completions,
        r#"{"prompt":[999]}"#,
        400,
        json!("prompt"),
        Value::Null,
        "below 257",
    );
    let long = json!({"prompt": "a".repeat(30)}).to_string();
    check(
        "POST",
        completions,
        &long,
        400,
        json!("prompt"),
        json!("context_length_exceeded"),
        "30 tokens, expected at most 19",
    );
    let chat = json!({"messages": [{"role": "user", "content": "a"}]}).to_string();
    check(
        "POST",
        "/v1/chat/completions",
        &chat,
        400,
        json!("messages"),
        json!("context_length_exceeded"),
        "expected at most 19",
    );
    check(
        "GET",
        completions,
        "",
        405,
        Value::Null,
        json!("method_not_allowed"),
        "GET",
    );
    check(
        "GET",
        "/v2/nothing",
        "",
        404,
        Value::Null,
        json!("unknown_url"),
        "/v2/nothing",
    );
    check(
        "GET",
        "/v1/models/other",
        "",
        404,
        json!("model"),
        json!("model_not_found"),
        "other",
    );
}

#[test]
fn a_body_beyond_the_limit_is_refused() {
    let server = Setup::default().start();
    let body = json!({"prompt": "a".repeat(9 << 20)});
    let reply = server.complete(&body);
    assert_eq!(
        (reply.status, reply.json()["error"]["code"].clone()),
        (413, json!("request_too_large"))
    );
}

#[test]
fn the_key_opens_all_but_health() {
    let server = Setup {
        api_key: Some("s3cret".into()),
        ..Setup::default()
    }
    .start();
    assert_eq!(server.get("/health").status, 200);
    for (headers, status) in [
        ("", 401),
        ("Authorization: Bearer wrong\r\n", 401),
        ("Authorization: Bearer s3cret2\r\n", 401),
        ("Authorization: s3cret\r\n", 401),
        ("Authorization: Bearer s3cret\r\n", 200),
        ("authorization: bearer s3cret\r\n", 200),
    ] {
        let reply = server.call("GET", "/v1/models", headers, "");
        assert_eq!(reply.status, status, "{headers}");
        if status == 401 {
            assert_eq!(reply.json()["error"]["code"], "invalid_api_key");
        }
    }
    assert_eq!(server.get("/metrics").status, 401);
}

#[test]
fn a_failing_engine_fails_one_request_alone() {
    let server = Setup::default().start();
    let reply = server.complete(&json!({"prompt": "?>"}));
    assert_eq!(reply.status, 500);
    assert!(
        reply.json()["error"]["message"]
            .as_str()
            .unwrap()
            .contains("layer 1, expert 3")
    );
    let reply = server.complete(&json!({"prompt": "!>"}));
    assert_eq!(reply.status, 500);
    assert!(
        reply.json()["error"]["message"]
            .as_str()
            .unwrap()
            .contains("a bug in the engine")
    );
    // After the headers of a stream the error is a data line, and nothing follows.
    let reply = server.complete(&json!({"prompt": "?>", "stream": true}));
    assert_eq!(reply.status, 200);
    let events = reply.events();
    assert!(events.last().unwrap().contains("checksum differs"), "{events:?}");
    assert_eq!(server.complete(&json!({"prompt": "ab>", "max_tokens": 2})).status, 200);
}

#[test]
fn a_stop_finishes_what_runs_and_takes_nothing_new() {
    let server = Setup {
        step_time: Duration::from_millis(1),
        ..Setup::default()
    }
    .start();
    let body = json!({"prompt": "ab>", "max_tokens": 200, "temperature": 0, "stream": true}).to_string();
    let running = server.open("POST", "/v1/completions", "", &body);
    server.wait_for("cotk_sequences_active 1");
    server.cancel.cancel();
    let chunks = read(running).chunks();
    assert_eq!(text_of(&chunks, "/choices/0/text"), "ab".repeat(100));
    let address = server.address;
    drop(server);
    assert!(std::net::TcpStream::connect(address).is_err());
}

#[test]
fn a_stop_cuts_off_what_takes_too_long() {
    let setup = Setup {
        step_time: Duration::from_millis(1),
        drain: Duration::from_millis(50),
        context: 1_000_000,
        ..Setup::default()
    };
    let server = setup.start();
    let body = json!({"prompt": "ab>", "max_tokens": 900_000, "stream": true}).to_string();
    let running = server.open("POST", "/v1/completions", "", &body);
    server.wait_for("cotk_sequences_active 1");
    server.cancel.cancel();
    let events = read(running).events();
    assert!(events.last().unwrap().contains("shutting down"), "{:?}", events.last());
}

#[test]
fn what_is_served_is_said() {
    let server = Setup::default().start();
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));
    let models = server.get("/v1/models").json();
    assert_eq!(
        (&models["object"], &models["data"][0]["id"]),
        (&json!("list"), &json!("toy"))
    );
    assert_eq!(server.get("/v1/models/toy").json()["object"], "model");
    let own = server.get("/v1/cotk/").json();
    assert_eq!(own["modes"], json!(["exact", "little"]));
    assert_eq!(
        (&own["context"], &own["kv_bytes_limit"]),
        (&json!(400), &json!(400 * 4 * 8))
    );
    assert!(server.complete(&json!({"prompt": "ab>", "max_tokens": 3})).status == 200);
    let text = server.get("/metrics").body;
    for line in [
        "cotk_http_requests_total{endpoint=\"/v1/completions\",status=\"200\"} 1",
        "cotk_prompt_tokens_total 3",
        "cotk_generated_tokens_total 3",
        "cotk_time_to_first_token_seconds_count 1",
        "cotk_time_between_tokens_seconds_count 2",
        "cotk_sequences_finished_total 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} not in\n{text}");
    }
}

#[test]
fn a_port_in_use_is_named() {
    let bound = Bound::bind("127.0.0.1", 0).unwrap();
    let error = Bound::bind("127.0.0.1", bound.address().port()).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: the port is in use", bound.address()));
    assert!(
        Bound::bind("no such host", 0)
            .unwrap_err()
            .to_string()
            .contains("no such host")
    );
    assert!(!bound.is_wide() && Bound::bind("0.0.0.0", 0).unwrap().is_wide());
}
