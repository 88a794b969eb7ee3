//! Prometheus metrics under vLLM's names, so that dashboards, autoscalers and gateways made for it
//! work.

use crate::engine::{Counters, FinishReason};
use crate::generate::Completed;
use crate::ops::BLOCK;
use axum::http::Method;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::collections::HashMap;
use std::time::Instant;

/// All metrics of a server, in a registry of their own.
pub struct ServerMetrics {
    registry: Registry,
    running: IntGauge,
    waiting: IntGauge,
    cache_usage: [Gauge; 2],
    /// Counters of the engine, each with how to read it.
    counters: Vec<(IntCounter, ReadCounter)>,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    success: IntCounterVec,
    iteration_tokens: Histogram,
    first_token: Histogram,
    inter_token: Histogram,
    time_per_output_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    request_max_tokens: Histogram,
    request_n: Histogram,
    restarts: IntCounter,
    http: HistogramVec,
}

type ReadCounter = fn(&Counters) -> u64;

const SECONDS: [f64; 20] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0, 30.0, 120.0,
];
const TOKENS: [f64; 12] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0];

/// Registers metrics with the labels that all of vLLM's have.
struct Maker {
    registry: Registry,
    labels: HashMap<String, String>,
}

impl Maker {
    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(format!("vllm:{name}"), help).const_labels(self.labels.clone())
    }

    fn add<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        made: prometheus::Result<C>,
    ) -> C {
        let c = made.expect("names and labels are fixed");
        self.registry.register(Box::new(c.clone())).expect("every name is used once");
        c
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::with_opts(self.opts(name, help)))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::with_opts(self.opts(name, help)))
    }

    /// What the engine counts itself.
    fn engine_counters(&self) -> Vec<(IntCounter, ReadCounter)> {
        let counter = |name: &str, help: &str, read: ReadCounter| (self.counter(name, help), read);
        vec![
            counter("num_preemptions_total", "Sequences that gave up their blocks.", |c| {
                c.preemptions
            }),
            counter("prefix_cache_queries_total", "Prompt tokens looked up.", |c| c.prefix_queries),
            counter("prefix_cache_hits_total", "Prompt tokens found computed.", |c| c.prefix_hits),
            counter("gpu_prefix_cache_queries_total", "Prompt tokens looked up.", |c| {
                c.prefix_queries
            }),
            counter("gpu_prefix_cache_hits_total", "Prompt tokens found computed.", |c| {
                c.prefix_hits
            }),
            counter("spec_decode_num_drafts_total", "Drafts checked.", |c| c.drafts),
            counter("spec_decode_num_draft_tokens_total", "Tokens drafted.", |c| c.drafted_tokens),
            counter("spec_decode_num_accepted_tokens_total", "Drafted tokens accepted.", |c| {
                c.accepted_tokens
            }),
        ]
    }

    fn describe_cache(&self, blocks: usize) {
        let info = IntGaugeVec::new(
            Opts::new("vllm:cache_config_info", "Sizes of the KV cache."),
            &["block_size", "num_gpu_blocks", "engine"],
        );
        self.add(info)
            .with_label_values(&[&BLOCK.to_string(), &blocks.to_string(), &"0".to_string()])
            .set(1);
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts { common_opts: self.opts(name, help), buckets: buckets.to_vec() };
        self.add(Histogram::with_opts(opts))
    }
}

impl ServerMetrics {
    /// Metrics of a server of `model`, whose KV cache has so many blocks.
    pub fn new(model: &str, blocks: usize) -> ServerMetrics {
        let labels =
            HashMap::from([("model_name".into(), model.into()), ("engine".into(), "0".into())]);
        let m = Maker { registry: Registry::new(), labels };
        let seconds = |name: &str, help: &str| m.histogram(name, help, &SECONDS);
        let tokens = |name: &str, help: &str| m.histogram(name, help, &TOKENS);
        let usage = |name: &str| {
            m.add(Gauge::with_opts(m.opts(name, "Part of the KV cache that sequences hold.")))
        };
        m.describe_cache(blocks);
        ServerMetrics {
            running: m.gauge("num_requests_running", "Sequences in the batch."),
            waiting: m.gauge("num_requests_waiting", "Sequences that wait for room."),
            // the second is the name of old, which some scrapers still ask for
            cache_usage: [usage("kv_cache_usage_perc"), usage("gpu_cache_usage_perc")],
            counters: m.engine_counters(),
            prompt_tokens: m.counter("prompt_tokens_total", "Tokens of prompts."),
            generation_tokens: m.counter("generation_tokens_total", "Tokens generated."),
            success: m.add(IntCounterVec::new(
                m.opts("request_success_total", "Requests done, by why they ended."),
                &["finished_reason"],
            )),
            iteration_tokens: tokens("iteration_tokens_total", "Tokens of a forward pass."),
            first_token: seconds("time_to_first_token_seconds", "From arrival to the first text."),
            inter_token: seconds(
                "inter_token_latency_seconds",
                "Between two pieces of a candidate's text.",
            ),
            time_per_output_token: seconds(
                "request_time_per_output_token_seconds",
                "A request's mean time for a token.",
            ),
            end_to_end: seconds("e2e_request_latency_seconds", "From arrival to the end."),
            queue: seconds("request_queue_time_seconds", "From arrival to the first computation."),
            inference: seconds(
                "request_inference_time_seconds",
                "From the first computation to the end.",
            ),
            prefill: seconds(
                "request_prefill_time_seconds",
                "From the first computation to the first text.",
            ),
            decode: seconds("request_decode_time_seconds", "From the first text to the end."),
            request_prompt_tokens: tokens("request_prompt_tokens", "Tokens of a request's prompt."),
            request_generation_tokens: tokens(
                "request_generation_tokens",
                "Tokens generated for a request.",
            ),
            request_max_tokens: tokens(
                "request_params_max_tokens",
                "Most tokens that a request asks for.",
            ),
            request_n: tokens("request_params_n", "Candidates that a request asks for."),
            // this one vLLM does not have
            restarts: m.add(IntCounter::with_opts(
                Opts::new(
                    "bprompt:engine_restarts_total",
                    "Times that the engine was emptied after a failure.",
                )
                .const_labels(m.labels.clone()),
            )),
            http: m.add(HistogramVec::new(
                HistogramOpts::new("http_request_duration_seconds", "Time to the response's head.")
                    .buckets(SECONDS.to_vec()),
                &["handler", "method", "status"],
            )),
            registry: m.registry,
        }
    }

    /// So many seconds went by between two pieces of a candidate's text.
    pub fn inter_token(&self, seconds: f64) {
        self.inter_token.observe(seconds);
    }

    /// So many seconds went by from a prompt's arrival to its first text.
    pub fn first_token(&self, seconds: f64) {
        self.first_token.observe(seconds);
    }

    /// A prompt was cancelled before it was done.
    pub fn cancelled(&self) {
        self.success.with_label_values(&["abort"]).inc();
    }

    /// The engine failed while it served a request.
    pub fn failed(&self) {
        self.success.with_label_values(&["error"]).inc();
    }

    /// The engine's session was emptied after a failure.
    pub fn restarted(&self) {
        self.restarts.inc();
    }

    /// A request was answered. `handler` is a route; methods that nobody serves are counted
    /// together, because anybody can make up more of them.
    pub fn http(&self, handler: &str, method: &Method, status: u16, seconds: f64) {
        const KNOWN: [Method; 7] = [
            Method::GET,
            Method::POST,
            Method::HEAD,
            Method::OPTIONS,
            Method::PUT,
            Method::PATCH,
            Method::DELETE,
        ];
        let method = KNOWN.iter().find(|known| *known == method).map_or("other", Method::as_str);
        self.http.with_label_values(&[handler, method, &status.to_string()]).observe(seconds);
    }

    /// A request is done; the times are those of arrival, start, first text and end.
    pub fn finished(&self, completed: &Completed, max_tokens: usize, times: [Option<Instant>; 4]) {
        let generated: usize = completed.candidates.iter().map(|c| c.tokens.len()).sum();
        self.prompt_tokens.inc_by(completed.prompt_ids.len() as u64);
        self.generation_tokens.inc_by(generated as u64);
        self.request_prompt_tokens.observe(completed.prompt_ids.len() as f64);
        self.request_generation_tokens.observe(generated as f64);
        self.request_n.observe(completed.candidates.len() as f64);
        self.request_max_tokens.observe(max_tokens as f64);
        for c in &completed.candidates {
            let reason = match c.finish {
                FinishReason::Stop => "stop",
                FinishReason::Length => "length",
                FinishReason::Deadline => "abort",
            };
            self.success.with_label_values(&[reason]).inc();
        }
        let [arrived, started, first, end] = times;
        let observe = |histogram: &Histogram, from: Option<Instant>, to: Option<Instant>| {
            if let (Some(from), Some(to)) = (from, to) {
                histogram.observe((to - from).as_secs_f64());
            }
        };
        observe(&self.end_to_end, arrived, end);
        observe(&self.queue, arrived, started);
        observe(&self.inference, started, end);
        observe(&self.prefill, started, first);
        observe(&self.decode, first, end);
        let longest = completed.candidates.iter().map(|c| c.tokens.len()).max().unwrap_or(0);
        if let (Some(first), Some(end), true) = (first, end, longest > 1) {
            self.time_per_output_token.observe((end - first).as_secs_f64() / (longest - 1) as f64);
        }
    }

    /// A forward pass is done, or something was cancelled. `counted` are the engine's counters
    /// before and after.
    pub fn step(
        &self,
        running: usize,
        waiting: usize,
        blocks: (usize, usize),
        counted: (&Counters, &Counters),
    ) {
        let (before, after) = counted;
        let grown = |read: &ReadCounter| read(after).saturating_sub(read(before));
        self.running.set(running as i64);
        self.waiting.set(waiting as i64);
        self.cache_usage.iter().for_each(|g| g.set(blocks.0 as f64 / blocks.1 as f64));
        for (counter, read) in &self.counters {
            counter.inc_by(grown(read));
        }
        let tokens = after.computed_tokens.saturating_sub(before.computed_tokens);
        if tokens > 0 {
            self.iteration_tokens.observe(tokens as f64);
        }
    }

    /// The text that Prometheus reads.
    pub fn text(&self) -> String {
        let mut out = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut out).expect("writing to memory");
        String::from_utf8(out).expect("metrics are text")
    }
}
