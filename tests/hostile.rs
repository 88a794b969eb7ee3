//! Requests and clients that would have the server end, stop answering, or answer wrongly.

mod served;

use serde_json::{Value, json};
use served::{Answer, Server, answer, long};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

const JSON: &str = "Content-Type: application/json\r\n";

/// The texts and the reasons of choices that came in pieces.
fn choices(events: &[Value]) -> BTreeMap<u64, (String, Option<String>)> {
    let mut choices: BTreeMap<u64, (String, Option<String>)> = BTreeMap::new();
    for choice in events.iter().filter_map(|e| e["choices"].as_array()).flatten() {
        let (text, finish) = choices.entry(choice["index"].as_u64().unwrap()).or_default();
        text.push_str(
            choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default(),
        );
        assert!(finish.is_none(), "nothing comes after the end");
        *finish = choice["finish_reason"].as_str().map(str::to_owned);
    }
    choices
}

/// A rewrite that is refused is so before the first piece, and else keeps each text once.
fn is_answered_whole_and_in_pieces(server: &Server, body: &Value) {
    let ask = |stream: bool| {
        let mut body = body.clone();
        body["stream"] = json!(stream);
        let a = server.post("/v1/rewrite", body);
        assert!(a.status == 200 || a.status == 400, "{}: {}", a.status, a.body);
        a
    };
    let (whole, pieces) = (ask(false), ask(true));
    let refused = whole.status == 400;
    assert_eq!(pieces.status == 400, refused, "{body}: {}", pieces.body);
    if refused {
        return;
    }
    let fine = pieces.events().iter().all(|e| e.get("error").is_none());
    assert!(fine, "{body}: {}", pieces.body);
    for c in whole.json()["results"][0]["candidates"].as_array().unwrap() {
        assert!(c["finish_reason"].is_string());
        let text = c["text"].as_str().unwrap();
        for keep in body["keep"].as_array().into_iter().flatten() {
            let count = text.matches(keep.as_str().unwrap()).count();
            assert_eq!(count, 1, "once, not again and again: {text}");
        }
    }
}

/// Requests that once ended the server, or never ended.
#[test]
fn no_request_ends_the_server() {
    let server = Server::start(&[]);
    for seed in 0..2 {
        let mut body = json!({
            "messages": [{ "role": "user", "content": "a wizard portrait" }],
            "n": 32, "seed": seed, "temperature": 1,
            "bad_words": ["by", "art", "highly", "detailed", "digital painting", "intricate",
                "elegant", "sharp focus", "illustration", "concept art", "fantasy"],
            "ignore_eos": true, "max_tokens": 200, "stream": true,
        });
        let pieces = choices(&server.post("/v1/chat/completions", body.clone()).events());
        assert_eq!(pieces.len(), 32);
        body["stream"] = json!(false);
        let whole = server.post("/v1/chat/completions", body).json();
        for c in whole["choices"].as_array().unwrap() {
            let (text, finish) = &pieces[&c["index"].as_u64().unwrap()];
            assert_eq!(
                c["message"]["content"],
                text.as_str(),
                "what was given out is what there is"
            );
            assert_eq!(c["finish_reason"].as_str(), finish.as_deref());
            assert!(finish.is_some(), "every candidate has a reason");
        }
    }
    let rewrites = [
        json!({ "prompt": "a wizard portrait", "seed": 43, "ban": ["digital painting", "art"] }),
        json!({ "prompt": "a red cat", "seed": 13, "ban": ["highly detailed"], "stop": [", by"] }),
        json!({ "prompt": "x", "keep": ["by"], "stop": [", "] }),
        json!({ "prompt": "a cat", "keep": ["red umbrella"], "stop": "umbrella" }),
        json!({
            "prompt": "a cat", "keep": ["red umbrella"], "stop": "umbrella",
            "include_stop_str_in_output": true,
        }),
        json!({
            "prompt": "a fast car", "keep": ["100 mph"], "ban": ["fast", "speed"], "n": 8,
            "seed": 1,
        }),
    ];
    rewrites.iter().for_each(|body| is_answered_whole_and_in_pieces(&server, body));
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(
        server.post("/v1/completions", json!({ "prompt": "a cat", "max_tokens": 4 })).status,
        200
    );
    server.wait_for("all blocks are free", Server::is_idle);
    assert_eq!(
        server.metric("bprompt:engine_restarts_total"),
        0.0,
        "none of them was caught by the second line only"
    );
}

/// Bans, stops and ends of all kinds: what came in pieces is what comes whole, and every token is
/// among the pieces.
#[test]
fn pieces_make_the_whole() {
    let server = Server::start(&["--sequences", "8"]);
    let ids: Vec<u64> = server.post("/tokenize", json!({ "prompt": "東é" })).json()["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_u64().unwrap())
        .collect();
    // tokens that are parts of characters, likely enough to come often
    let bias: serde_json::Map<String, Value> =
        ids.iter().map(|id| (id.to_string(), json!(15))).collect();
    let bodies = [
        json!({ "prompt": "a cat, ", "stop": [" a", ", "], "bad_words": ["the"] }),
        json!({
            "prompt": "a cat, ", "bad_words": ["by", "art", "digital painting"], "min_tokens": 5,
        }),
        json!({ "prompt": "a cat, ", "logit_bias": bias, "ignore_eos": true }),
        json!({ "prompt": "東京 tower, \
            ", "logit_bias": bias, "stop": ["é"], "include_stop_str_in_output": true }),
        json!({ "prompt": "東京 tower</s> é", "echo": true, "logit_bias": bias }),
    ];
    for (seed, body) in bodies.into_iter().enumerate() {
        let mut body = body;
        for (name, value) in [
            ("n", json!(4)),
            ("seed", json!(seed)),
            ("logprobs", json!(1)),
            ("max_tokens", json!(40)),
        ] {
            body[name] = value;
        }
        let whole = server.post("/v1/completions", body.clone()).json();
        body["stream"] = json!(true);
        let events = server.post("/v1/completions", body.clone()).events();
        let pieces = choices(&events);
        for c in whole["choices"].as_array().unwrap() {
            let index = c["index"].as_u64().unwrap();
            let text = c["text"].as_str().unwrap();
            assert_eq!(
                (text, c["finish_reason"].as_str()),
                (pieces[&index].0.as_str(), pieces[&index].1.as_deref())
            );
            let own = |name: &str| -> Vec<Value> {
                let of = |e: &Value| e["choices"].as_array().cloned().unwrap_or_default();
                let all = events.iter().flat_map(of).filter(|c| c["index"] == index);
                all.filter_map(|c| c["logprobs"][name].as_array().cloned()).flatten().collect()
            };
            // log-probabilities of an echoed prompt come with the whole alone
            let list = |name: &str| c["logprobs"][name].as_array().unwrap().clone();
            let prompt = list("tokens").len() - own("tokens").len();
            assert_eq!(prompt > 0, body["echo"] == true, "{body}");
            for name in ["tokens", "token_logprobs", "text_offset"] {
                assert_eq!(list(name)[prompt..], own(name), "{name} of {body}");
            }
            check_offsets(text, &list("tokens"), &list("text_offset"));
        }
        let tokens: usize = whole["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| tokens(c, body["echo"] == true, &whole))
            .sum();
        assert_eq!(whole["usage"]["completion_tokens"], tokens);
    }
}

/// Output tokens of a choice.
fn tokens(choice: &Value, echo: bool, whole: &Value) -> usize {
    let all = choice["logprobs"]["tokens"].as_array().unwrap().len();
    if echo { all - whole["usage"]["prompt_tokens"].as_u64().unwrap() as usize } else { all }
}

/// Offsets count characters, never fall, and where one is that of a token that is whole text, the
/// text goes on with it.
fn check_offsets(text: &str, tokens: &[Value], offsets: &[Value]) {
    let characters: Vec<char> = text.chars().collect();
    let offsets: Vec<usize> = offsets.iter().map(|o| o.as_u64().unwrap() as usize).collect();
    assert!(
        offsets.is_sorted() && offsets.iter().all(|&o| o <= characters.len()),
        "{offsets:?} of {text:?}"
    );
    for (i, (token, &at)) in tokens.iter().zip(&offsets).enumerate() {
        let token: Vec<char> = token.as_str().unwrap().chars().collect();
        let next = offsets.get(i + 1).copied().unwrap_or(characters.len());
        // the last ones may have been cut by a stop, others are no text or a part of a character
        if next - at == token.len() && !token.contains(&'\u{fffd}') {
            assert_eq!(characters[at..next], token, "{offsets:?} of {text:?}");
        }
    }
}

#[test]
fn a_prompt_alone_is_scored_without_an_output() {
    let server = Server::start(&[]);
    let mut body =
        json!({ "prompt": ["a cat", "東京"], "max_tokens": 0, "echo": true, "logprobs": 0 });
    let a = server.post("/v1/completions", body.clone()).json();
    assert_eq!(a["usage"]["completion_tokens"], 0);
    assert_eq!(a["usage"]["total_tokens"], a["usage"]["prompt_tokens"]);
    assert_eq!(
        (&a["choices"][1]["text"], &a["choices"][1]["finish_reason"]),
        (&json!("東京"), &json!("length"))
    );
    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    let events = server.post("/v1/completions", body).events();
    assert_eq!(choices(&events)[&1], ("東京".to_owned(), Some("length".to_owned())));
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 0);
}

#[test]
fn tokens_that_end_a_candidate() {
    let server = Server::start(&[]);
    let id = server.post("/tokenize", json!({ "prompt": " cat" })).json()["tokens"][0].clone();
    // nothing but this token comes
    let bias = json!({ id.to_string(): 100 });
    let base = json!({ "prompt": "a", "temperature": 0, "max_tokens": 8, "logit_bias": bias });
    let ask = |more: Value| {
        let mut body = base.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let a = server.post("/v1/completions", body).json();
        let c = &a["choices"][0];
        let text = c["text"].as_str().unwrap().to_owned();
        (
            text,
            c["finish_reason"].as_str().unwrap().to_owned(),
            a["usage"]["completion_tokens"].as_u64().unwrap(),
        )
    };
    assert_eq!(ask(json!({})), (" cat".repeat(8), "length".into(), 8));
    assert_eq!(ask(json!({ "stop_token_ids": [id] })), (String::new(), "stop".into(), 1));
    let shown = json!({ "stop_token_ids": [id], "include_stop_str_in_output": true });
    assert_eq!(ask(shown), (" cat".into(), "stop".into(), 1));
    assert_eq!(
        ask(json!({ "stop": " cat cat", "include_stop_str_in_output": true })).0,
        " cat cat"
    );
    assert_eq!(ask(json!({ "stop": " cat cat" })), (String::new(), "stop".into(), 2));
    let (_, reason, tokens) = ask(json!({ "stop_token_ids": [id], "min_tokens": 4 }));
    assert_eq!(reason, if tokens == 8 { "length" } else { "stop" });
    assert!(tokens >= 4, "stops are held back");
    let chat =
        json!({ "messages": [{ "role": "user", "content": "a" }], "stop_token_ids": [1_000_000] });
    assert_eq!(server.refusal("/v1/chat/completions", chat), (400, "stop_token_ids".into()));
    let many = json!({ "prompt": "a", "stop_token_ids": vec![5; 1000] });
    assert_eq!(server.refusal("/v1/rewrite", many), (400, "stop_token_ids".into()));
}

#[test]
fn errors_name_the_field() {
    let server = Server::start(&[]);
    let user = json!([{ "role": "user", "content": "a cat" }]);
    for (path, base) in [
        ("/v1/completions", json!({ "prompt": "a cat", "max_tokens": 2 })),
        ("/v1/chat/completions", json!({ "messages": user, "max_tokens": 2 })),
        ("/v1/rewrite", json!({ "prompt": "a cat", "max_tokens": 2 })),
    ] {
        for (field, value) in [
            ("n", json!(-1)),
            ("n", json!("two")),
            ("n", json!(0)),
            ("seed", json!(1.5)),
            ("temperature", json!("hot")),
            ("top_k", json!({})),
            ("stop", json!([1])),
            ("stop", json!("x".repeat(2000))),
            ("stop_token_ids", json!("x")),
            ("bad_words", json!("x")),
            ("bad_words", json!(vec!["x"; 40_000])),
            ("max_tokens", json!(-3)),
            ("stream", json!("yes")),
            ("tools", json!([{ "type": "function", "function": { "name": "f" } }])),
            ("tool_choice", json!("required")),
            ("tool_choice", json!("auto")),
            ("response_format", json!({ "type": "json_object" })),
            ("suffix", json!(" end")),
            ("best_of", json!(4)),
            ("functions", json!([{ "name": "f" }])),
            ("guided_json", json!({})),
        ] {
            let mut body = base.clone();
            body[field] = value.clone();
            assert_eq!(server.refusal(path, body), (400, field.to_owned()), "{path} {value}");
        }
        let mut body = base.clone();
        let harmless = json!({
            "user": "me", "metadata": { "a": "b" }, "store": false, "tools": null,
            "tool_choice": "none", "best_of": 1, "response_format": { "type": "text" },
            "suffix": null, "temperature": 1e-38, "parallel_tool_calls": true,
            "stream_options": { "include_usage": true }, "service_tier": "auto",
        });
        body.as_object_mut().unwrap().extend(harmless.as_object().unwrap().clone());
        let a = server.post(path, body);
        assert_eq!(a.status, 200, "{path}: {}", a.body);
    }
    let message = server.post("/v1/completions", json!({ "prompt": "x", "n": -1 })).json()["error"]
        ["message"]
        .clone();
    assert!(
        message.as_str().unwrap().starts_with("n: invalid value: integer `-1`, expected"),
        "{message}"
    );
    assert_eq!(
        server.refusal("/v1/completions", json!({ "prompt": { "a": 1 } })),
        (400, "prompt".into())
    );
}

/// Texts that are long, deep or many are refused by their length, or read beside the threads that
/// answer everybody.
#[test]
fn heavy_texts_hold_up_nobody() {
    let server = Server::start(&["--body-limit", "8000000"]);
    let names = |n: usize| (0..n).map(|i| format!("word{i}")).collect::<Vec<_>>();
    let chat = |text: String| json!({ "messages": [{ "role": "user", "content": text }] });
    let bodies = [
        ("/v1/rewrite", json!({ "prompt": "(".repeat(80_000) })),
        ("/v1/rewrite", json!({ "prompt": "<lora:x>".repeat(40_000) })),
        ("/v1/rewrite", json!({ "prompt": "a BREAK ".repeat(40_000) })),
        ("/v1/rewrite", json!({ "prompt": "a", "template": "(".repeat(3_000_000) + "{raw}" })),
        ("/v1/rewrite", json!({ "prompt": vec!["[".repeat(8000) + "a"; 200] })),
        ("/v1/rewrite", json!({ "prompt": "a", "keep": names(40_000) })),
        ("/v1/rewrite", json!({ "prompt": "a", "ban": names(40_000) })),
        ("/v1/completions", json!({ "prompt": "a", "bad_words": names(40_000) })),
        ("/v1/completions", json!({ "prompt": "a".repeat(4_000_000) })),
        ("/v1/completions", json!({ "prompt": vec!["a"; 400_000] })),
        ("/v1/completions", json!({ "prompt": "a", "stop": "a".repeat(1_000_000) })),
        ("/v1/chat/completions", chat("(".repeat(1_000_000))),
        ("/beautifulprompt/generate_prompt", json!({ "raw_prompt": "((".repeat(100_000) })),
        ("/tokenize", json!({ "prompt": "东京 tower ".repeat(100_000) })),
    ];
    let hostile: Vec<(&str, TcpStream)> =
        bodies.iter().map(|(path, body)| (*path, server.send_json(path, body))).collect();
    // once the quadratic ones alone took 6.5 s each
    let started = Instant::now();
    for _ in 0..20 {
        assert_eq!(server.get("/health").status, 200);
    }
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    for ((path, stream), (_, body)) in hostile.into_iter().zip(&bodies) {
        let status = answer(stream).status;
        let shown: String = body.to_string().chars().take(60).collect();
        assert_eq!(status, if path == "/tokenize" { 200 } else { 400 }, "{path} {shown}");
    }
    // what is allowed is served: many bans, and a prompt full of brackets
    let many = json!({ "prompt": "a cat", "max_tokens": 4, "bad_words": names(9_000) });
    assert_eq!(server.post("/v1/completions", many).status, 200);
    let deep = json!({ "prompt": "(".repeat(400) + "cat" + &")".repeat(400), "max_tokens": 4 });
    assert_eq!(server.post("/v1/rewrite", deep).status, 200);
}

/// A client that takes nothing of its answer, and has little room for it.
fn deaf(server: &Server, body: &Value) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let address: std::net::SocketAddr = server.address.parse().unwrap();
    socket.connect(&address.into()).unwrap();
    let mut stream = TcpStream::from(socket);
    let body = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    stream
}

#[test]
fn a_client_that_does_not_read_keeps_no_place() {
    let server = Server::start(&["--sequences", "1", "--max-queue", "1", "--write-timeout", "0"]);
    let mut body = json!({
        "prompt": "a", "max_tokens": 200, "ignore_eos": true, "logprobs": 20, "stream": true,
        "n": 4,
    });
    let streams: Vec<TcpStream> = (0..2).map(|_| deaf(&server, &body)).collect();
    body["stream"] = json!(false);
    server.wait_for("the engine is done with them", |s| {
        s.metric("vllm:e2e_request_latency_seconds_count") == 2.0
    });
    let both = json!({ "prompt": ["x", "y"], "max_tokens": 1 });
    assert_eq!(server.post("/v1/completions", both).status, 200, "both places are free");
    drop(streams);
}

#[test]
fn a_client_that_does_not_read_is_left() {
    let server = Server::start(&["--write-timeout", "0.3"]);
    let body = json!({
        "prompt": "a", "max_tokens": 480, "ignore_eos": true, "logprobs": 20, "stream": true,
        "n": 64,
    });
    let mut stream = deaf(&server, &body);
    server.wait_for("its work is cancelled", |s| {
        s.get("/metrics")
            .body
            .contains("finished_reason=\"abort\",model_name=\"beautiful-prompt\"} 1")
    });
    server.wait_for("nothing is left of it", Server::is_idle);
    let mut rest = Vec::new();
    // the connection is closed, or reset
    let _ = stream.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
}

#[test]
fn half_closed_connections_get_their_answers() {
    let server = Server::start(&[]);
    for (version, pause, stream) in [
        ("1.1", 0, false),
        ("1.1", 0, true),
        ("1.1", 600, false),
        ("1.0", 0, true),
        ("1.0", 600, false),
    ] {
        let n = if pause > 0 { 16 } else { 1 };
        let mut body = json!({ "prompt": "a", "max_tokens": 300, "ignore_eos": true, "n": n });
        body["stream"] = json!(stream);
        let connection = server.send_json_as(version, "/v1/completions", &body);
        std::thread::sleep(Duration::from_millis(pause));
        connection.shutdown(Shutdown::Write).unwrap();
        let a = answer(connection);
        assert_eq!(a.status, 200);
        assert!(a.head.starts_with(&format!("HTTP/{version} 200")), "{}", a.head);
        if stream {
            assert!(choices(&a.events())[&0].1.is_some());
        } else {
            assert_eq!(a.json()["choices"][0]["finish_reason"], "length");
        }
    }
}

#[test]
fn made_up_methods_and_paths_make_no_metrics() {
    let server = Server::start(&[]);
    for i in 0..300 {
        server.request(&format!("MADEUP{i}"), "/v1/completions", "", b"");
        server.request("GET", &format!("/madeup{i}"), "", b"");
        server.request("GET", &format!("/v1/models/madeup{i}/x"), "", b"");
    }
    let text = server.get("/metrics").body;
    assert!(!text.to_lowercase().contains("madeup"));
    assert!(text.contains("method=\"other\""), "{text}");
    assert!(text.len() < 100_000, "{} bytes", text.len());
}

#[test]
fn termination_ends_while_connections_keep_coming() {
    let mut server = Server::start(&["--shutdown-timeout", "3"]);
    let address = server.address.clone();
    let flood = std::thread::spawn(move || {
        let mut held = Vec::new();
        while let Ok(stream) = TcpStream::connect(&address) {
            held.push(stream);
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    std::thread::sleep(Duration::from_millis(200));
    server.terminate();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = server.child.try_wait().unwrap() {
            break status;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "it does not end");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(status.success());
    flood.join().unwrap();
}

#[test]
fn bodies_are_refused_before_they_are_sent() {
    let server = Server::start(&["--body-limit", "1000", "--body-timeout", "1"]);
    let first_line = |head: &str| {
        let mut stream = server.connect();
        stream.write_all(head.as_bytes()).unwrap();
        let mut bytes = [0; 12];
        stream.read_exact(&mut bytes).unwrap();
        (String::from_utf8_lossy(&bytes).into_owned(), stream)
    };
    let head = |n: usize| {
        format!(
            "POST /tokenize HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: \
            100-continue\r\n{JSON}Content-Length: {n}\r\n\r\n"
        )
    };
    assert_eq!(first_line(&head(5000)).0, "HTTP/1.1 413", "no word of going on");
    let (line, mut stream) = first_line(&head(15));
    assert_eq!(line, "HTTP/1.1 100");
    stream.write_all(br#"{"prompt":"ab"}"#).unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("HTTP/1.1 200"), "{rest}");
    // a large body that is sent all the same is read to its end, so that the answer arrives
    let large = server.request("POST", "/tokenize", JSON, &vec![b'x'; 3_000_000]);
    assert_eq!(
        (large.status, large.json()["error"]["type"].as_str()),
        (413, Some("invalid_request_error"))
    );
    let chunked = format!("Transfer-Encoding: chunked\r\n{JSON}");
    let mut stream = server.connect();
    let head = format!(
        "POST /tokenize HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{chunked}\r\n5\r\n{{\"pro\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    assert_eq!(answer(stream).status, 408, "the rest never comes");
}

#[test]
fn keys_origins_and_names_are_read_as_the_standards_say() {
    let server = Server::start(&[
        "--api-key",
        "one",
        "--cors-origin",
        "*",
        "--served-model-name",
        "org/team/name",
    ]);
    for scheme in ["Bearer", "bearer", "BEARER"] {
        let a =
            server.request("GET", "/v1/models", &format!("Authorization: {scheme} one\r\n"), b"");
        assert_eq!(a.status, 200, "{scheme}");
    }
    assert_eq!(
        server.request("GET", "/v1/models", "Authorization: Basic one\r\n", b"").status,
        401
    );
    let key = "Authorization: Bearer one\r\n";
    let get = |path: &str| server.request("GET", path, key, b"");
    for path in ["/v1/models/org/team/name", "/v1/models/org%2Fteam%2Fname"] {
        assert_eq!(get(path).json()["id"], "org/team/name", "{path}");
    }
    assert_eq!(get("/v1/models/org/other").status, 404);
    assert_eq!(server.get("/v1/models/org/team/name").status, 401);
    let asked = "Origin: https://a.example\r\nAccess-Control-Request-Method: POST\r\n\
                 Access-Control-Request-Headers: authorization, content-type\r\n";
    let preflight = server.request("OPTIONS", "/v1/rewrite", asked, b"");
    let allowed =
        preflight.header("access-control-allow-headers").unwrap_or_default().to_lowercase();
    assert!(
        allowed.contains("authorization") && allowed.contains("content-type"),
        "{}",
        preflight.head
    );
    let a = server.request("GET", "/health", "Origin: https://a.example\r\n", b"");
    let exposed = a.header("access-control-expose-headers").unwrap_or_default().to_lowercase();
    assert!(exposed.contains("x-request-id"), "{}", a.head);
}

/// A request for very many candidates leaves room for one that wants little.
#[test]
fn long_requests_do_not_starve_short_ones() {
    let server = Server::start(&["--sequences", "16"]);
    let body =
        json!({ "prompt": "a", "max_tokens": 400, "ignore_eos": true, "n": 128, "stream": true });
    let mut running = server.send_json("/v1/completions", &body);
    running.read_exact(&mut [0; 400]).unwrap();
    for _ in 0..3 {
        let short = server
            .post("/v1/completions", json!({ "prompt": "b", "max_tokens": 5, "ignore_eos": true }));
        assert_eq!(short.json()["usage"]["completion_tokens"], 5);
    }
    // the order says it, not the time: of the long one's 51,200 tokens most are still to come
    let done = server.metric("vllm:e2e_request_latency_seconds_count");
    assert_eq!(done, 3.0, "the long one is not done");
    drop(running);
    server.wait_for("its blocks are free", Server::is_idle);
}

/// Whatever bytes come, and however the connection is treated, the server goes on.
#[test]
fn broken_connections_leave_nothing_behind() {
    let server =
        Server::start(&["--header-timeout", "2", "--body-timeout", "2", "--request-timeout", "2"]);
    let mut words = beautiful_prompt::random::PhiloxStream::new(11, 0);
    let body = long().to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut held = Vec::new();
    for _ in 0..60 {
        let mut stream = server.connect();
        let mut bytes = request.repeat(1 + words.below(3)).into_bytes();
        match words.below(6) {
            0 => bytes.truncate(words.below(bytes.len())),
            1 => {
                let at = words.below(bytes.len());
                bytes[at] = words.below(256) as u8;
            }
            2 => bytes = (0..200).map(|_| words.below(256) as u8).collect(),
            _ => {}
        }
        // the server may have closed it
        let _ = stream.write_all(&bytes);
        match words.below(4) {
            0 => drop(stream),
            1 => {
                let _ = stream.shutdown(Shutdown::Write);
                held.push(stream);
            }
            2 => {
                let _ = stream.read(&mut [0; 300]);
            }
            _ => held.push(stream),
        }
    }
    assert_eq!(server.get("/health").status, 200);
    drop(held);
    server.wait_for("nothing is left", Server::is_idle);
    let a: Answer = server.post("/v1/completions", json!({ "prompt": "a cat", "max_tokens": 3 }));
    assert_eq!(a.status, 200, "{}", a.body);
    assert_eq!(server.metric("bprompt:engine_restarts_total"), 0.0);
}
