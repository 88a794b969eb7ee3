//! Load on an OpenAI server: open-loop (requests arrive as a Poisson process) or closed-loop (so
//! many at once), reported under the names of `vllm bench serve`.

mod client;
mod report;

pub use client::Server;
pub use report::{Goodput, ServeReport};

use crate::random::PhiloxStream;
use report::Measured;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// What requests ask for.
#[derive(Clone, Debug)]
pub enum Prompts {
    /// Texts, taken in turn.
    Texts(Vec<String>),
    /// Random token ids below `vocabulary`.
    Random {
        /// Tokens of each prompt.
        tokens: usize,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
}

/// Which of OpenAI's APIs requests use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`, each prompt as a user's message.
    Chat,
}

/// The load to put on a server.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where requests go.
    pub endpoint: Endpoint,
    /// The model that requests name.
    pub model: String,
    /// What they ask for.
    pub prompts: Prompts,
    /// How many are sent in all.
    pub requests: usize,
    /// Requests a second, in a Poisson process; all at once if none.
    pub rate: Option<f64>,
    /// Maximum requests at once.
    pub concurrency: Option<usize>,
    /// Maximum tokens of an output.
    pub max_tokens: usize,
    /// Exactly so many tokens, whatever the model says.
    pub ignore_eos: bool,
    /// Temperature that requests ask for.
    pub temperature: f32,
    /// Seed of arrivals and of random prompts; the request `i` asks for sampling with `seed + i`.
    pub seed: u64,
    /// Limits that a good request keeps.
    pub goodput: Goodput,
}

impl LoadOptions {
    fn body(&self, i: usize) -> Value {
        let mut words = PhiloxStream::new(self.seed, i as u64 + 1);
        let mut body = json!({
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed + i as u64,
            "ignore_eos": self.ignore_eos,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        let prompt = match &self.prompts {
            Prompts::Texts(texts) => json!(texts[i % texts.len()]),
            Prompts::Random { tokens, vocabulary } => {
                // the first few are special in most vocabularies
                let id =
                    |_| 100.min(vocabulary / 2) + words.below(vocabulary - 100.min(vocabulary / 2));
                json!((0..*tokens).map(id).collect::<Vec<_>>())
            }
        };
        match self.endpoint {
            Endpoint::Completions => body["prompt"] = prompt,
            Endpoint::Chat => body["messages"] = json!([{ "role": "user", "content": prompt }]),
        }
        body
    }

    fn path(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Completions => "/v1/completions",
            Endpoint::Chat => "/v1/chat/completions",
        }
    }
}

/// Puts the load on a server.
pub async fn run(
    server: &Server,
    options: LoadOptions,
    on_done: impl Fn(usize),
) -> anyhow::Result<ServeReport> {
    let options = Arc::new(options);
    let room = Arc::new(Semaphore::new(options.concurrency.unwrap_or(Semaphore::MAX_PERMITS)));
    let mut gaps = PhiloxStream::new(options.seed, 0);
    let started = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    let mut due = started;
    let mut results: Vec<Measured> = Vec::new();
    for i in 0..options.requests {
        if let Some(rate) = options.rate {
            tokio::time::sleep_until(due.into()).await;
            due += Duration::from_secs_f64(-(gaps.uniform() as f64).ln() / rate);
        }
        let permit = room.clone().acquire_owned().await?;
        let (server, options) = (server.clone(), options.clone());
        tasks.spawn(async move {
            let result = one(&server, &options, i).await;
            drop(permit);
            result
        });
        while let Some(done) = tasks.try_join_next() {
            results.push(done?);
            on_done(results.len());
        }
    }
    while let Some(done) = tasks.join_next().await {
        results.push(done?);
        on_done(results.len());
    }
    Ok(ServeReport::new(&results, started, options.goodput))
}

async fn one(server: &Server, options: &LoadOptions, i: usize) -> Measured {
    let body = options.body(i);
    let mut m = Measured::new(Instant::now());
    let result = server.stream(options.path(), &body, |event, now| {
        if let Some(usage) = event.get("usage").filter(|u| !u.is_null()) {
            let count = |key: &str| usage.get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
            m.tokens = Some((count("prompt_tokens"), count("completion_tokens")));
        }
        let choice = event.get("choices").and_then(|c| c.get(0));
        let text = choice.and_then(|c| c.get("text").or_else(|| c.get("delta")?.get("content")));
        if text.and_then(Value::as_str).is_some_and(|t| !t.is_empty()) {
            m.pieces.push(now);
        }
    });
    m.error = result.await.err().map(|e| format!("{e:#}"));
    m.ended = Instant::now();
    m
}
