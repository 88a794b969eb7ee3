//! OpenAI's batch files: each line a request with `custom_id`, `method`, `url` and `body`, each
//! result the answer that the server would give.

use super::begin::{Begun, note_interrupted, note_partial};
use super::input::{Lines, RawLine};
use super::output::Output;
use super::progress::Progress;
use super::settings::Settings;
use super::{BatchArgs, PENDING, record};
use crate::cli::hosted::{HostOptions, Hosted};
use crate::cli::print::note;
use crate::random::{Derived, derived_seed};
use crate::serve::{HttpOptions, Shared, app};
use anyhow::{Context, anyhow, bail, ensure};
use axum::Router;
use axum::body::Body;
use axum::http::{Request, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet};
use tower::ServiceExt;

/// Answers a file of requests; `false` if somebody interrupted.
pub fn run(args: &BatchArgs, mut begun: Begun) -> anyhow::Result<bool> {
    let engine = args.rewriter.engine.options()?;
    let host = HostOptions {
        model: args.rewriter.model.clone(),
        name: args.served_model_name.map(str::to_owned),
        template: args.rewriter.template.clone(),
        engine,
        // a request may hold hundreds of prompts
        max_queue: 1 << 16,
        // it takes no more lines at once than it can answer
        most_bodies: usize::MAX,
        request_timeout: None,
        stall_timeout: None,
        api_keys: vec![],
    };
    let Hosted { shared, fingerprint, thread } = host.start()?;
    begun.settle(settings(args, &shared, &fingerprint))?;
    let written = begun.written(1)?;
    let Begun { target, mut lines, begin, .. } = begun;
    let total = lines.count()?;
    lines.skip(written.results)?;
    let model = shared.name.clone();
    let limit = args.max_prompt_bytes.saturating_mul(16).saturating_add(super::BESIDE_PROMPT);
    let router = app(shared, &HttpOptions { body_limit: limit, ..HttpOptions::default() })?;
    let stop = crate::cli::interrupt_flag()?;
    let mut progress = Progress::new(written.results, total, "prompts");
    let mut run = Run {
        router,
        model,
        skip_bad_lines: args.files.skip_bad_lines,
        at_once: 4 * engine.sequences,
        out: Output::new(target),
        requests: JoinSet::new(),
        handles: vec![],
        other_models: BTreeSet::new(),
        seed: args.rewriter.sampling.seed,
        failures: 0,
        first_failure: None,
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(run.all(lines, &stop, &mut progress));
    run.out.flush()?;
    progress.summary(run.out.written);
    run.report();
    note_partial(&run.out, begin, !matches!(result, Ok(true)));
    let Run { router, out, failures, first_failure, .. } = run;
    drop((router, runtime));
    let done = result?;
    if !done {
        note_interrupted();
        return Ok(false);
    }
    thread.join().map_err(|_| anyhow!("the engine panicked"))?.context("the engine stopped")?;
    let requests = out.written;
    // answers that are all failures replace no good ones
    ensure!(
        failures == 0 || failures < requests,
        "all of {requests} requests failed; the first: {}",
        first_failure.map_or_else(String::new, |(line, message)| format!("line {line}: {message}"))
    );
    out.target.complete()?;
    Ok(true)
}

/// What the answers depend on besides the requests. How tokens are drawn is the model's
/// recommendation, which holds where a request says nothing.
fn settings(args: &BatchArgs, shared: &Shared, fingerprint: &str) -> Settings {
    let mut settings = Settings::default();
    let values = [
        ("format", json!("openai")),
        ("shard", json!(args.files.shard.unwrap_or_default().to_string())),
        ("model", json!(fingerprint)),
        ("dtype", json!(format!("{:?}", args.rewriter.model.dtype).to_lowercase())),
        ("template", json!(shared.prompter.template.text())),
        ("seed", json!(args.rewriter.sampling.seed)),
    ];
    settings.0.extend(values.map(|(flag, value)| (flag.to_owned(), value)));
    settings.add_sampling(&shared.defaults.sampling, shared.defaults.length);
    settings
}

struct Run {
    router: Router,
    /// What the seeds of requests without one are derived from.
    seed: Option<u64>,
    /// What the model is called here.
    model: String,
    skip_bad_lines: bool,
    /// Maximum requests at once.
    at_once: usize,
    out: Output,
    requests: JoinSet<Answer>,
    /// The requests that are not answered yet, by line.
    handles: Vec<(u64, AbortHandle)>,
    /// Names of models that requests asked for and that are not this one's.
    other_models: BTreeSet<String>,
    failures: u64,
    /// That of the lowest line, whichever failed first.
    first_failure: Option<(u64, String)>,
}

/// A line's result, with the message if its request failed.
struct Answer {
    line: u64,
    text: String,
    failure: Option<String>,
}

impl Run {
    async fn all(
        &mut self,
        lines: Lines,
        stop: &AtomicBool,
        progress: &mut Progress,
    ) -> anyhow::Result<bool> {
        let input = lines.read_ahead()?;
        let (mut end, mut interrupted) = (false, false);
        let mut failure = None;
        loop {
            if stop.load(Ordering::Relaxed) && !interrupted {
                interrupted = true;
                // what is finished can be written once the requests before it are
                let wanted = self.out.last_ready().unwrap_or(0);
                self.handles
                    .iter()
                    .filter(|(line, _)| *line > wanted)
                    .for_each(|(_, handle)| handle.abort());
            }
            if !end
                && !interrupted
                && failure.is_none()
                && let Err(e) = self.read(&input, &mut end)
            {
                failure = Some(e);
            }
            self.out.write_ready()?;
            // neither a signal nor a slow pipe must wait for the next answer
            let pause = tokio::time::sleep(Duration::from_millis(if self.requests.is_empty() {
                20
            } else {
                200
            }));
            tokio::select! {
                answered = self.requests.join_next(), if !self.requests.is_empty() => {
                    match answered.expect("there are requests") {
                        Ok(answer) => self.finish(answer),
                        Err(e) if e.is_cancelled() => {}
                        Err(e) => bail!("a request failed: {e}"),
                    }
                    self.handles.retain(|(_, handle)| !handle.is_finished());
                    self.out.write_ready()?;
                    progress.update(self.out.finished, 0);
                }
                () = pause => {}
            }
            if self.requests.is_empty() {
                match failure.take() {
                    Some(e) => return Err(e),
                    None if interrupted || end => return Ok(!interrupted),
                    None => {}
                }
            }
        }
    }

    /// Reads requests until there are enough at once.
    fn read(
        &mut self,
        input: &Receiver<anyhow::Result<RawLine>>,
        end: &mut bool,
    ) -> anyhow::Result<()> {
        while self.requests.len() < self.at_once && self.out.pending() < PENDING {
            let line = match input.try_recv() {
                Ok(line) => line?,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    *end = true;
                    break;
                }
            };
            match self.parse(&line) {
                Ok(request) => {
                    self.out.expect(line.number);
                    let handle =
                        self.requests.spawn(answer(self.router.clone(), line.number, request));
                    self.handles.push((line.number, handle));
                }
                // who gave a line a name finds its error under it
                Err((custom_id, e)) if self.skip_bad_lines || custom_id.is_string() => {
                    let message = format!("{e:#}");
                    let error = json!({ "code": "invalid_line", "message": message });
                    let text = result(line.number, custom_id, Value::Null, error);
                    self.out.expect(line.number);
                    self.finish(Answer { line: line.number, text, failure: Some(message) });
                }
                Err((_, e)) => bail!("{}: {e:#}; --skip-bad-lines goes on", line.place),
            }
        }
        Ok(())
    }

    fn finish(&mut self, answer: Answer) {
        if let Some(message) = answer.failure {
            self.failures += 1;
            if self.first_failure.as_ref().is_none_or(|(line, _)| answer.line < *line) {
                self.first_failure = Some((answer.line, message));
            }
        }
        self.out.finish(answer.line, answer.text);
    }

    /// A line's request, or what is wrong with it, with its id as far as it has one.
    fn parse(&mut self, line: &RawLine) -> Result<Parsed, (Value, anyhow::Error)> {
        if line.too_long {
            return Err((
                Value::Null,
                anyhow!("is longer than --max-prompt-bytes allows sixteen prompts"),
            ));
        }
        let value = record::text(&line.bytes)
            .and_then(|t| serde_json::from_str::<Value>(t).context("is not JSON"));
        let value = value.map_err(|e| (Value::Null, e))?;
        let custom_id = value.get("custom_id").cloned().unwrap_or_default();
        let mut request = self.request(&value).map_err(|e| (custom_id, e))?;
        if let (Some(seed), true) = (self.seed, request.body.get("seed").is_none_or(Value::is_null))
        {
            request.body["seed"] = json!(derived_seed(seed, Derived::Prompt, line.number));
        }
        Ok(request)
    }

    fn request(&mut self, value: &Value) -> anyhow::Result<Parsed> {
        let custom_id = value
            .get("custom_id")
            .filter(|v| v.is_string())
            .context("has no text under \"custom_id\"")?;
        let url = value.get("url").and_then(Value::as_str).context("has no text under \"url\"")?;
        let known = ["/v1/completions", "/v1/chat/completions", "/v1/rewrite"];
        if !known.contains(&url) {
            bail!("has the url \"{url}\"; expected one of {}", known.join(", "));
        }
        if value.get("method").is_some_and(|m| m != "POST") {
            bail!("has the method {}; expected \"POST\"", value["method"]);
        }
        let mut body = value
            .get("body")
            .filter(|b| b.is_object())
            .context("has no object under \"body\"")?
            .clone();
        // an answer in pieces makes no sense in a file
        body["stream"] = json!(false);
        if let Some(model) = body.get("model").and_then(Value::as_str)
            && model != self.model
        {
            if self.other_models.len() < 3 {
                self.other_models.insert(model.to_owned());
            }
            body["model"] = json!(self.model);
        }
        Ok(Parsed { custom_id: custom_id.clone(), url: url.to_owned(), body })
    }

    /// Says what did not go as the requests asked for.
    fn report(&self) {
        if !self.other_models.is_empty() {
            let names: Vec<&str> = self.other_models.iter().map(String::as_str).collect();
            note!(
                "requests for the model {} were answered by {}; --served-model-name gives it \
                another name",
                names.join(", "),
                self.model
            );
        }
        if let (Some((line, message)), true) =
            (&self.first_failure, self.failures < self.out.finished)
        {
            note!(
                "{} of {} requests failed; the first: line {line}: {message}",
                self.failures,
                self.out.finished
            );
        }
    }
}

/// A line's request.
struct Parsed {
    custom_id: Value,
    url: String,
    body: Value,
}

async fn answer(router: Router, number: u64, request: Parsed) -> Answer {
    let body = Body::from(request.body.to_string());
    let http =
        Request::post(&request.url).header(header::CONTENT_TYPE, "application/json").body(body);
    let response =
        router.oneshot(http.expect("a known path")).await.expect("the router answers everything");
    let status = response.status();
    let bytes = response.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let failure = (!status.is_success()).then(|| {
        let message = body["error"]["message"].as_str().unwrap_or("no message");
        format!("status {}: {message}", status.as_u16())
    });
    let response = json!({
        "status_code": status.as_u16(),
        "request_id": format!("req-{number}"),
        "body": body,
    });
    Answer { line: number, text: result(number, request.custom_id, response, Value::Null), failure }
}

fn result(number: u64, custom_id: Value, response: Value, error: Value) -> String {
    let line = json!({
        "id": format!("batch_req_{number}"),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    });
    format!("{line}\n")
}
