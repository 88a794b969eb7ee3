//! The server as its clients meet it.

mod served;

use serde_json::{Value, json};
use served::{Answer, Server, answer, long};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

#[test]
fn a_seed_gives_the_same_text_whatever_else_is_asked() {
    let server =
        Server::start(&["--sequences", "6", "--cache-tokens", "160", "--batch-tokens", "40"]);
    let request = |i: i64| {
        json!({ "prompt": format!("a cat and {i} dogs in the rain, \
        "), "max_tokens": 40, "seed": i, "n": 2 })
    };
    let texts = |a: Answer| {
        assert_eq!(a.status, 200, "{}", a.body);
        a.json()["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["text"].clone())
            .collect::<Vec<_>>()
    };
    let alone: Vec<_> = (0..8).map(|i| texts(server.post("/v1/completions", request(i)))).collect();
    let together: Vec<_> = (0..8)
        .map(|i| {
            server.send(
                "POST",
                "/v1/completions",
                "Content-Type: application/json\r\n",
                request(i).to_string().as_bytes(),
            )
        })
        .collect();
    let together: Vec<_> = together.into_iter().map(|s| texts(answer(s))).collect();
    assert_eq!(alone, together);
    assert!(
        server.metric("vllm:num_preemptions_total") > 0.0,
        "the cache was meant to be too small"
    );
}

#[test]
fn a_full_queue_refuses_and_says_when_to_come_back() {
    let server = Server::start(&["--sequences", "1", "--max-queue", "1"]);
    let json = "Content-Type: application/json\r\n";
    let running: Vec<TcpStream> = (0..2)
        .map(|_| server.send("POST", "/v1/completions", json, long().to_string().as_bytes()))
        .collect();
    server.wait_for("both are in", |s| s.metric("vllm:num_requests_running") > 0.0);
    let refused = server.post("/v1/completions", json!({ "prompt": "x" }));
    assert_eq!(refused.status, 429);
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    assert_eq!(
        server.post("/v1/completions", json!({ "prompt": vec!["x"; 3] })).status,
        400,
        "more than ever fit"
    );
    assert_eq!(server.get("/health").status, 200);
    drop(running);
    server.wait_for("room again", |s| {
        s.post("/v1/completions", json!({ "prompt": "x", "max_tokens": 1 })).status == 200
    });
}

#[test]
fn who_goes_away_frees_what_was_held() {
    let server = Server::start(&[]);
    for (version, stream) in [("1.1", true), ("1.1", false), ("1.0", true), ("1.0", false)] {
        let mut body = long();
        body["stream"] = json!(stream);
        let mut connection = server.send_json_as(version, "/v1/completions", &body);
        server.wait_for("it runs", |s| s.metric("vllm:kv_cache_usage_perc") > 0.0);
        if stream {
            connection.read_exact(&mut [0; 200]).unwrap();
        }
        drop(connection);
        server.wait_for("its blocks are free", |s| {
            s.metric("vllm:kv_cache_usage_perc") == 0.0
                && s.metric("vllm:num_requests_running") == 0.0
        });
    }
    assert!(
        server
            .get("/metrics")
            .body
            .contains("finished_reason=\"abort\",model_name=\"beautiful-prompt\"} 4")
    );
}

#[test]
fn keys_limits_and_wrong_requests() {
    let server = Server::start(&[
        "--api-key",
        "one,two",
        "--body-limit",
        "2000",
        "--header-timeout",
        "1",
        "--body-timeout",
        "1",
        "--cors-origin",
        "https://a.example",
    ]);
    assert_eq!(server.get("/v1/models").status, 401);
    assert_eq!(
        server.request("GET", "/v1/models", "Authorization: Bearer on\r\n", b"").status,
        401
    );
    let models = server.request(
        "GET",
        "/v1/models",
        "Authorization: Bearer two\r\nX-Request-Id: abc\r\n",
        b"",
    );
    assert_eq!((models.status, models.header("x-request-id")), (200, Some("abc")));
    for open in ["/", "/health", "/ping", "/ready", "/version", "/metrics", "/openapi.json"] {
        assert_eq!(server.get(open).status, 200, "{open}");
    }
    let key = "Authorization: Bearer one\r\nContent-Type: application/json\r\n";
    let status = |path: &str, headers: &str, body: &[u8]| {
        let a = server.request("POST", path, headers, body);
        let error = a.json()["error"].clone();
        assert!(error["message"].is_string() && error["type"].is_string(), "{}", a.body);
        (a.status, error)
    };
    assert_eq!(status("/v1/completions", key, &[b'x'; 3000]).0, 413);
    assert_eq!(status("/v1/completions", "Authorization: Bearer one\r\n", b"{}").0, 415);
    assert_eq!(status("/v1/completions", key, b"{").0, 400);
    let (code, error) = status("/v1/rewrite", key, br#"{"prompt": "x", "min_kept": "all"}"#);
    assert_eq!((code, error["param"].as_str()), (400, Some("min_kept")));
    assert_eq!(status("/nothing", key, b"{}").0, 404);
    assert_eq!(status("/health", key, b"{}").0, 405);
    let cors = server.request("GET", "/health", "Origin: https://a.example\r\n", b"");
    assert_eq!(cors.header("access-control-allow-origin"), Some("https://a.example"));
    assert_eq!(
        server
            .request("GET", "/health", "Origin: https://b.example\r\n", b"")
            .header("access-control-allow-origin"),
        None
    );

    // a head, and a body, that never end
    let mut slow = server.connect();
    slow.write_all(b"GET /health HTTP/1.1\r\nHost:").unwrap();
    let started = Instant::now();
    assert_ne!(answer(slow).status, 200);
    let mut slow = server.connect();
    slow.write_all(
        format!(
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\nConnection: \
            close\r\n{key}\r\n{{"
        )
        .as_bytes(),
    )
    .unwrap();
    assert_eq!(answer(slow).status, 408);
    assert!(started.elapsed() < Duration::from_secs(20));
    // and a connection without a request
    let started = Instant::now();
    assert_eq!(answer(server.connect()).status, 0);
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn termination_answers_everybody_first() {
    let mut server = Server::start(&["--shutdown-delay", "0.5"]);
    let json = "Content-Type: application/json\r\n";
    let body =
        json!({ "prompt": "a cat", "max_tokens": 400, "ignore_eos": true, "n": 4 }).to_string();
    let running: Vec<TcpStream> =
        (0..4).map(|_| server.send("POST", "/v1/completions", json, body.as_bytes())).collect();
    server.wait_for("they run", |s| s.metric("vllm:num_requests_running") > 0.0);
    server.terminate();
    server.wait_for("it says so first", |s| s.get("/ready").status == 503);
    assert_eq!(
        server.post("/v1/completions", json!({ "prompt": "x", "max_tokens": 1 })).status,
        200,
        "still served"
    );
    for stream in running {
        let a = answer(stream);
        assert_eq!(a.status, 200);
        assert_eq!(a.json()["usage"]["completion_tokens"], 1600);
    }
    assert!(server.child.wait().unwrap().success());
}

#[test]
fn deadlines_end_with_what_there_is() {
    let server = Server::start(&[]);
    let mut body = long();
    body["timeout"] = json!(0.1);
    body["stream"] = json!(false);
    let a = server.post("/v1/completions", body).json();
    assert_eq!(a["choices"][0]["finish_reason"], "abort");
    assert!(a["usage"]["completion_tokens"].as_u64().unwrap() < 8 * 480);
}

#[test]
fn metrics_have_the_names_that_dashboards_ask_for() {
    let server = Server::start(&[]);
    let prompt =
        "a long prompt whose first blocks a second request finds again, because it has more than \
        sixteen tokens "
            .repeat(2);
    let ask = || {
        server
            .post(
                "/v1/completions",
                json!({ "prompt": prompt, "max_tokens": 20, "temperature": 0 }),
            )
            .json()
    };
    let (first, second) = (ask(), ask());
    assert_eq!(first["choices"][0]["text"], second["choices"][0]["text"]);
    let cached = |a: &Value| a["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let prompt_tokens = first["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(
        (cached(&first), cached(&second)),
        (0, (prompt_tokens - 1) / 16 * 16),
        "all full blocks"
    );
    let text = server.get("/metrics").body;
    for name in
        "num_requests_running num_requests_waiting kv_cache_usage_perc gpu_cache_usage_perc \
        prompt_tokens_total \
                 generation_tokens_total request_success_total num_preemptions_total \
                 prefix_cache_queries_total \
                 prefix_cache_hits_total time_to_first_token_seconds_bucket \
                 inter_token_latency_seconds_count \
                 e2e_request_latency_seconds_sum request_queue_time_seconds_bucket \
                 request_prompt_tokens_bucket \
                 request_generation_tokens_bucket request_time_per_output_token_seconds_count \
                 cache_config_info \
                 spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total \
                 iteration_tokens_total_count"
            .split_whitespace()
    {
        assert!(text.contains(&format!("\nvllm:{name}{{")), "{name}");
    }
    assert_eq!(server.metric("vllm:prefix_cache_hits_total") as u64, cached(&second));
    assert_eq!(server.metric("vllm:prompt_tokens_total") as u64, 2 * prompt_tokens);
}

#[test]
fn rewrites_hold_and_lack_what_is_asked() {
    let server = Server::start(&[]);
    let body = json!({
        "prompt": ["two cats in the (heavy rain:1.3) <lora:ink:0.6>", "a dog without a leash BREAK \
        a red house"],
        "n": 3, "seed": 5, "keep": ["film grain"], "ban": ["artstation", "highly detailed", "by"],
        "min_kept": 1, "max_clip_tokens": 60,
    });
    let a = server.post("/v1/rewrite", body.clone()).json();
    let results = a["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    for (result, parts) in
        results.iter().zip([&["(heavy rain:1.3)", "<lora:ink:0.6>"][..], &["leash", " BREAK "][..]])
    {
        let candidates = result["candidates"].as_array().unwrap();
        assert_eq!(candidates.len(), 3);
        for c in candidates {
            let text = c["text"].as_str().unwrap();
            assert!(parts.iter().all(|p| text.contains(p)), "{text}");
            assert!(text.contains("film grain"), "{text}");
            let words =
                format!(" {} ", text.to_lowercase().replace(|c: char| !c.is_alphanumeric(), " "));
            assert!(
                [" artstation ", " highly detailed ", " by "].iter().all(|b| !words.contains(b)),
                "{text}"
            );
            assert_eq!(c["kept"], 1.0);
            assert!(c["clip_tokens"].as_u64().unwrap() <= 60);
        }
    }
    assert_eq!(
        a["results"],
        server.post("/v1/rewrite", body).json()["results"],
        "the seed repeats it"
    );

    // in pieces: the last word on each prompt is the same
    let mut stream = json!({ "prompt": "a cat in the rain", "n": 2, "seed": 5, "min_kept": 0 });
    let whole = server.post("/v1/rewrite", stream.clone()).json()["results"][0].clone();
    stream["stream"] = json!(true);
    let pieces = server.post("/v1/rewrite", stream);
    let events = pieces.events();
    assert!(events.contains(&whole));
    let text = |i: u64| {
        events
            .iter()
            .filter(|e| e["candidate"] == i)
            .filter_map(|e| e["text"].as_str())
            .collect::<String>()
    };
    assert_eq!(text(1).trim(), whole["candidates"][1]["text"].as_str().unwrap());

    let extension = json!({
        "raw_prompt": "a cat", "model_name": "any", "num_return_sequences": 3, "max_length": 60,
    });
    let a = server.post("/beautifulprompt/generate_prompt", extension).json();
    assert_eq!((a["prompts"].as_array().unwrap().len(), &a["success"]), (3, &json!(true)));
}

fn requests_to_mutate() -> [(&'static str, Value); 5] {
    [
        (
            "/v1/completions",
            json!({
                "prompt": "a cat", "max_tokens": 4, "logprobs": 2, "stop": ["x"], "echo": true,
                "logit_bias": { "5": 1.5 },
            }),
        ),
        (
            "/v1/chat/completions",
            json!({
                "messages": [{ "role": "user", "content": "a cat" }], "max_tokens": 4,
                "stream": true,
            }),
        ),
        (
            "/v1/rewrite",
            json!({
                "prompt": ["a (cat:1.2)"], "keep": ["b"], "ban": ["c"], "min_kept": 0.5,
                "max_tokens": 9, "template": "x {raw}",
            }),
        ),
        ("/tokenize", json!({ "prompt": "a cat" })),
        ("/detokenize", json!({ "tokens": [5, 6] })),
    ]
}

/// Whatever is sent, the answer is no failure of the server's.
#[test]
fn mutated_requests_get_answers() {
    let server = Server::start(&["--max-queue", "64", "--request-timeout", "0.3"]);
    let seeds = requests_to_mutate();
    let odd = [
        "null",
        "-1",
        "1e308",
        "[]",
        "{}",
        "\"\"",
        "\"\\u0000\"",
        "18446744073709551616",
        "[[[]]]",
        "true",
        "\"BREAK((((\"",
        "NaN",
        "0.5",
        "\"\\ud83d\"",
        "[99999999]",
        "\"<lora:\"",
    ];
    let mut words = beautiful_prompt::random::PhiloxStream::new(3, 0);
    for i in 0..300 {
        let (path, seed) = &seeds[i % seeds.len()];
        let mut text = seed.to_string().into_bytes();
        match words.below(4) {
            0 => {
                let at = words.below(text.len());
                text[at] = words.below(256) as u8;
            }
            1 => text.truncate(words.below(text.len())),
            _ => {
                // another value for one of the fields
                let mut value = seed.clone();
                let keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
                value[&keys[words.below(keys.len())]] = json!("PLACE");
                text = value
                    .to_string()
                    .replace("\"PLACE\"", odd[words.below(odd.len())])
                    .into_bytes();
            }
        }
        let a = server.request("POST", path, "Content-Type: application/json\r\n", &text);
        assert!(
            (200..500).contains(&a.status),
            "{} for {path} {}",
            a.status,
            String::from_utf8_lossy(&text)
        );
    }
    assert_eq!(server.get("/health").status, 200);
    server.wait_for("nothing is left", |s| s.metric("vllm:kv_cache_usage_perc") == 0.0);
}
