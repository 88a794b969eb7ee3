//! OpenAI's batch files: each line a request with `custom_id`, `method`, `url` and `body`, each result the answer that the
//! server would give.

use super::super::print::note;
use super::input::{Lines, RawLine};
use super::output::{Output, Report, Written};
use crate::cli::hosted::{HostOptions, Hosted};
use crate::cli::rewrite::RewriteArgs;
use crate::serve::{HttpOptions, app};
use anyhow::{Context, bail};
use axum::Router;
use axum::body::Body;
use axum::http::{Request, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::task::JoinSet;
use tower::ServiceExt;

pub fn run(args: &RewriteArgs, mut lines: Lines) -> anyhow::Result<()> {
    let mut before = 0;
    if args.resume {
        before = Written::read(&args.output, 1)?.results;
        lines.skip(before)?;
    }
    let engine = args.engine.options()?;
    let host = HostOptions {
        model: args.model.clone(),
        name: None,
        template: args.template.clone(),
        engine,
        // a request may hold hundreds of prompts
        max_queue: 1 << 16,
        request_timeout: None,
        api_keys: vec![],
    };
    let Hosted { shared, thread } = host.start()?;
    let router = app(shared, &HttpOptions { body_limit: 64 << 20, ..HttpOptions::default() })?;
    let mut out = Output::open(&args.output, args.resume)?;
    let stop = crate::cli::interrupt_flag()?;
    let report = Report::new(before);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let done = runtime.block_on(async {
        let mut requests = JoinSet::new();
        let mut end = false;
        loop {
            while !end && requests.len() < 4 * engine.sequences && out.pending() < 4096 {
                let Some(line) = lines.next()? else {
                    end = true;
                    break;
                };
                let request = match parse(&line) {
                    Ok(request) => request,
                    Err(e) if args.skip_bad_lines => {
                        out.expect(line.number);
                        let error = json!({ "code": "invalid_line", "message": format!("{e:#}") });
                        out.finish(line.number, result(line.number, Value::Null, Value::Null, error));
                        continue;
                    }
                    Err(e) => bail!("{}: {e:#}; --skip-bad-lines goes on", line.place),
                };
                out.expect(line.number);
                requests.spawn(answer(router.clone(), line.number, request));
            }
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            // a signal must not wait for the next answer
            let pause = tokio::time::sleep(Duration::from_millis(200));
            tokio::select! {
                answered = requests.join_next(), if !requests.is_empty() => {
                    let (number, text) = answered.expect("there are requests").context("a request failed")?;
                    out.finish(number, text);
                    out.write_ready()?;
                    report.update(out.written, 0);
                }
                () = pause, if !requests.is_empty() => {}
                else => return Ok(true),
            }
        }
    });
    out.write_ready()?;
    report.summary(out.written);
    let done = done?;
    drop((router, runtime));
    if done {
        thread.join().map_err(|_| anyhow::anyhow!("the engine panicked"))?.context("the engine stopped")?;
    } else {
        note!("interrupted; the same command with --resume goes on");
        std::process::exit(130);
    }
    Ok(())
}

/// A line's request.
struct Parsed {
    custom_id: Value,
    url: String,
    body: Value,
}

fn parse(line: &RawLine) -> anyhow::Result<Parsed> {
    let value: Value = serde_json::from_slice(&line.bytes).context("is not JSON")?;
    let custom_id = value.get("custom_id").filter(|v| v.is_string()).context("has no text under \"custom_id\"")?;
    let url = value.get("url").and_then(Value::as_str).context("has no text under \"url\"")?;
    let known = ["/v1/completions", "/v1/chat/completions", "/v1/rewrite"];
    if !known.contains(&url) {
        bail!("has the url \"{url}\"; expected one of {}", known.join(", "));
    }
    if value.get("method").is_some_and(|m| m != "POST") {
        bail!("has the method {}; expected \"POST\"", value["method"]);
    }
    let mut body = value.get("body").filter(|b| b.is_object()).context("has no object under \"body\"")?.clone();
    // an answer in pieces makes no sense in a file
    body["stream"] = json!(false);
    Ok(Parsed { custom_id: custom_id.clone(), url: url.to_owned(), body })
}

async fn answer(router: Router, number: u64, request: Parsed) -> (u64, String) {
    let body = Body::from(request.body.to_string());
    let http = Request::post(&request.url).header(header::CONTENT_TYPE, "application/json").body(body);
    let response = router.oneshot(http.expect("a known path")).await.expect("the router answers everything");
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let response = json!({ "status_code": status, "request_id": format!("req-{number}"), "body": body });
    (number, result(number, request.custom_id, response, Value::Null))
}

fn result(number: u64, custom_id: Value, response: Value, error: Value) -> String {
    format!(
        "{}\n",
        json!({ "id": format!("batch_req_{number}"), "custom_id": custom_id, "response": response, "error": error })
    )
}
