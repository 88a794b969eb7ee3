//! `bprompt bench serve`: load on this program's server or any other of OpenAI's API.

use super::engine::EngineArgs;
use super::hosted::{HostOptions, Hosted};
use super::model::ModelArgs;
use super::print::{self, print_line};
use super::within;
use crate::bench::serve::{Endpoint, Goodput, LoadOptions, Prompts, ServeReport, Server, run};
use crate::data::records::read_prompts;
use crate::models::bloom::{MAX_CONTEXT, MAX_VOCABULARY};
use crate::serve::{HttpOptions, app, serve};
use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use std::io::IsTerminal;
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EndpointChoice {
    Completions,
    Chat,
}

#[derive(Args)]
pub struct ServeBenchArgs {
    /// The server, as http://HOST:PORT; if not given, one that runs in this process.
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// What the server calls the model; its first if not given.
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    #[arg(long, value_enum, default_value_t = EndpointChoice::Completions)]
    endpoint: EndpointChoice,
    /// Prompts to send in turn: JSON lines with "prompt", or text with one a line.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Tokens of prompts made of random ids, if there is no --input; at least 1.
    #[arg(long, default_value_t = 128)]
    random_input_len: usize,
    /// Ids of random prompts are below this, at least 2.
    #[arg(long, default_value_t = 6144)]
    random_vocabulary: usize,
    /// Maximum new tokens of a request, at least 1.
    #[arg(long, default_value_t = 32)]
    output_len: usize,
    /// Let the model end before that.
    #[arg(long)]
    stop_at_eos: bool,
    /// Temperature of the requests; 0 takes the most likely token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Requests in all, at least 1.
    #[arg(long, default_value_t = 100)]
    num_prompts: usize,
    /// Requests a second, above 0, at random times (a Poisson process); all at once if not given.
    #[arg(long)]
    request_rate: Option<f64>,
    /// Maximum requests at once, at least 1; no limit if not given.
    #[arg(long)]
    max_concurrency: Option<usize>,
    /// Limits in milliseconds that a good request keeps, such as ttft:200,tpot:20,e2el:1000.
    #[arg(long, value_name = "LIMITS", value_delimiter = ',')]
    goodput: Vec<String>,
    /// Begins the random prompts and times.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    model: ModelArgs,
}

impl ServeBenchArgs {
    fn goodput(&self) -> anyhow::Result<Goodput> {
        let mut limits = Goodput::default();
        for item in &self.goodput {
            let parsed =
                item.split_once(':').and_then(|(name, ms)| Some((name, ms.parse::<f64>().ok()?)));
            let slot = match parsed {
                Some(("ttft", _)) => &mut limits.ttft,
                Some(("tpot", _)) => &mut limits.tpot,
                Some(("e2el", _)) => &mut limits.e2el,
                _ => anyhow::bail!("--goodput {item}: expected ttft:MS, tpot:MS or e2el:MS"),
            };
            let limit = parsed.map_or(f64::NAN, |p| p.1);
            ensure!(limit >= 0.0, "--goodput {item}: expected milliseconds, 0 or more");
            *slot = Some(limit);
        }
        Ok(limits)
    }

    fn check(&self) -> anyhow::Result<()> {
        within("--num-prompts", self.num_prompts, 1..=10_000_000, "[1, 10000000]")?;
        within("--output-len", self.output_len, 1..=MAX_CONTEXT, "[1, 16777216]")?;
        within("--random-input-len", self.random_input_len, 1..=MAX_CONTEXT, "[1, 16777216]")?;
        within("--random-vocabulary", self.random_vocabulary, 2..=MAX_VOCABULARY, "[2, 16777216]")?;
        within("--temperature", self.temperature, 0.0..=100.0, "[0, 100]")?;
        // a request in eleven days at the least
        within("--request-rate", self.request_rate.unwrap_or(1.0), 1e-6..=1e9, "[1e-6, 1e9]")?;
        within("--max-concurrency", self.max_concurrency.unwrap_or(1), 1..=1 << 20, "[1, 1048576]")
    }

    fn prompts(&self) -> anyhow::Result<Prompts> {
        Ok(match &self.input {
            Some(file) => {
                let prompts = read_prompts(file)?;
                ensure!(!prompts.is_empty(), "{}: holds no prompts", file.display());
                Prompts::Texts(prompts)
            }
            None => Prompts::Random {
                tokens: self.random_input_len,
                vocabulary: self.random_vocabulary,
            },
        })
    }

    /// What the load's requests call the model.
    async fn model_name(&self, server: &Server) -> anyhow::Result<String> {
        if let Some(name) = self.served_model_name.clone() {
            return Ok(name);
        }
        let models = server.json("/v1/models", None).await?;
        let first = models["data"][0]["id"].as_str();
        let first =
            first.context("the server lists no model; name one with --served-model-name")?;
        Ok(first.to_owned())
    }

    pub fn run(self) -> anyhow::Result<()> {
        super::ignore_broken_pipes();
        self.check()?;
        let prompts = self.prompts()?;
        let endpoint = match self.endpoint {
            EndpointChoice::Completions => Endpoint::Completions,
            EndpointChoice::Chat => Endpoint::Chat,
        };
        ensure!(
            endpoint == Endpoint::Completions || self.input.is_some(),
            "--endpoint chat sends texts; name a file of them with --input"
        );
        let goodput = self.goodput()?;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let server = match &self.base_url {
            Some(url) => Server::parse(url, self.api_key.clone())?,
            None => self.own_server(&runtime)?,
        };
        let bar = if std::io::stderr().is_terminal() {
            ProgressBar::new(self.num_prompts as u64)
        } else {
            ProgressBar::hidden()
        };
        let report = runtime.block_on(async {
            let model = self.model_name(&server).await?;
            let options = LoadOptions {
                endpoint,
                model,
                prompts,
                requests: self.num_prompts,
                rate: self.request_rate,
                concurrency: self.max_concurrency,
                max_tokens: self.output_len,
                ignore_eos: !self.stop_at_eos,
                temperature: self.temperature,
                seed: self.seed,
                goodput,
            };
            run(&server, options, |done| bar.set_position(done as u64)).await
        })?;
        bar.finish_and_clear();
        match self.json {
            true => print::json(&report)?,
            false => print(&report)?,
        }
        if report.completed == 0 {
            anyhow::bail!("no request succeeded: {}", report.error.unwrap_or_default());
        }
        Ok(())
    }

    /// A server in this process.
    fn own_server(&self, runtime: &tokio::runtime::Runtime) -> anyhow::Result<Server> {
        let host = HostOptions {
            model: self.model.clone(),
            name: None,
            template: None,
            engine: self.engine.options()?,
            max_queue: 1 << 16,
            most_bodies: usize::MAX,
            request_timeout: None,
            stall_timeout: None,
            api_keys: vec![],
        };
        let Hosted { shared, .. } = host.start()?;
        let http = HttpOptions::default();
        let router = app(shared.clone(), &http)?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let url = format!("http://{}", listener.local_addr()?);
        runtime.spawn(serve(listener, router, shared, http, std::future::pending()));
        Server::parse(&url, None)
    }
}

fn print(r: &ServeReport) -> std::io::Result<()> {
    print_line!("successful requests              {}", r.completed)?;
    print_line!("failed requests                  {}", r.failed)?;
    if let Some(e) = &r.error {
        print_line!("first failure                    {e}")?;
    }
    print_line!("duration (s)                     {:.2}", r.duration_seconds)?;
    print_line!(
        "input, output tokens             {}, {}",
        r.total_input_tokens,
        r.total_output_tokens
    )?;
    print_line!("request throughput (req/s)       {:.2}", r.request_throughput)?;
    if let Some(good) = r.request_goodput {
        print_line!("request goodput (req/s)          {good:.2}")?;
    }
    print_line!("output token throughput (tok/s)  {:.2}", r.output_throughput)?;
    print_line!("peak output throughput (tok/s)   {:.2}", r.peak_output_throughput)?;
    print_line!("peak concurrent requests         {}", r.peak_concurrent_requests)?;
    print_line!("total token throughput (tok/s)   {:.2}", r.total_token_throughput)?;
    for (name, l) in
        [("TTFT", r.ttft_ms), ("TPOT", r.tpot_ms), ("ITL", r.itl_ms), ("E2EL", r.e2el_ms)]
    {
        print_line!(
            "{name:<5}mean, median, p99 (ms)      {:.2}, {:.2}, {:.2}",
            l.mean,
            l.median,
            l.p99
        )?;
    }
    Ok(())
}
