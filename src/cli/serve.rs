//! `bprompt serve`: rewrites over HTTP.

use super::model::ModelArgs;
use crate::engine::EngineOptions;
use crate::ops::BLOCK;
use crate::rewrite::Prompter;
use crate::serve::metrics::Metrics;
use crate::serve::worker::{self, Inbox};
use crate::serve::{HttpOptions, Shared, app, serve};
use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;
use tracing_subscriber::EnvFilter;

#[derive(Args)]
pub struct ServeArgs {
    /// Address to listen at; 0.0.0.0 for every network.
    #[arg(long, default_value = "127.0.0.1", env = "BPROMPT_HOST")]
    host: String,
    /// Port to listen at; 0 takes a free one.
    #[arg(long, default_value_t = 8000, env = "BPROMPT_PORT")]
    port: u16,
    /// What clients call the model; its folder's name if not given.
    #[arg(long, value_name = "NAME", env = "BPROMPT_SERVED_MODEL_NAME")]
    served_model_name: Option<String>,
    /// v1, v2 or a file with {raw} in it; by default the model's own, else v1.
    #[arg(long, value_name = "NAME|FILE", env = "BPROMPT_TEMPLATE")]
    template: Option<String>,
    /// Keys that clients must bring one of, separated by commas.
    #[arg(long, value_name = "KEYS", value_delimiter = ',', env = "BPROMPT_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// Web origins that may call, separated by commas; * for all. None if not given.
    #[arg(long, value_name = "ORIGINS", value_delimiter = ',', env = "BPROMPT_CORS_ORIGIN")]
    cors_origin: Vec<String>,
    /// Prompts that may wait beyond those that run; more are refused with status 429.
    #[arg(long, default_value_t = 1024, env = "BPROMPT_MAX_QUEUE")]
    max_queue: usize,
    /// Longest time for a request in seconds; 0 for no limit.
    #[arg(long, default_value_t = 300.0, env = "BPROMPT_REQUEST_TIMEOUT")]
    request_timeout: f64,
    /// Most bytes of a request's body.
    #[arg(long, default_value_t = 1 << 20, env = "BPROMPT_BODY_LIMIT")]
    body_limit: usize,
    /// Longest time in seconds for a request's head, and for a connection without a request.
    #[arg(long, default_value_t = 60.0, env = "BPROMPT_HEADER_TIMEOUT")]
    header_timeout: f64,
    /// Longest time in seconds for a request's body.
    #[arg(long, default_value_t = 30.0, env = "BPROMPT_BODY_TIMEOUT")]
    body_timeout: f64,
    /// Seconds for which /ready fails before connections are refused, so that balancers notice.
    #[arg(long, default_value_t = 0.0, env = "BPROMPT_SHUTDOWN_DELAY")]
    shutdown_delay: f64,
    /// Seconds that accepted requests have to end after SIGTERM.
    #[arg(long, default_value_t = 30.0, env = "BPROMPT_SHUTDOWN_TIMEOUT")]
    shutdown_timeout: f64,
    /// How the log is written.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, env = "BPROMPT_LOG_FORMAT")]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, or a filter such as "info,beautiful_prompt::serve=debug".
    #[arg(long, default_value = "info", env = "BPROMPT_LOG")]
    log: String,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// How much the engine does at once.
#[derive(Args, Clone, Debug)]
pub struct EngineArgs {
    /// Most tokens of one forward pass.
    #[arg(long, default_value_t = 512, env = "BPROMPT_BATCH_TOKENS")]
    pub batch_tokens: usize,
    /// Most sequences that run at once.
    #[arg(long, default_value_t = 32, env = "BPROMPT_SEQUENCES")]
    pub sequences: usize,
    /// Positions that the KV cache holds; room for all sequences at 512 each if not given.
    #[arg(long, env = "BPROMPT_CACHE_TOKENS")]
    pub cache_tokens: Option<usize>,
    /// Compute every prompt from its beginning.
    #[arg(long, env = "BPROMPT_NO_PREFIX_CACHE")]
    pub no_prefix_cache: bool,
    /// Most tokens guessed ahead of a sequence, which changes no result; 0 for none.
    #[arg(long, default_value_t = 4, env = "BPROMPT_DRAFT_TOKENS")]
    pub draft_tokens: usize,
}

impl EngineArgs {
    pub fn options(&self) -> anyhow::Result<EngineOptions> {
        ensure!(self.batch_tokens > 0 && self.sequences > 0, "--batch-tokens and --sequences must be at least 1");
        ensure!(self.cache_tokens != Some(0), "--cache-tokens must be at least 1");
        ensure!(self.draft_tokens <= 64, "--draft-tokens {} is too many; 64 at most", self.draft_tokens);
        Ok(EngineOptions {
            cache_tokens: self.cache_tokens.unwrap_or(self.sequences.saturating_mul(512)),
            batch_tokens: self.batch_tokens,
            sequences: self.sequences,
            prefix_cache: !self.no_prefix_cache,
            draft_tokens: self.draft_tokens,
        })
    }
}

fn seconds(flag: &str, value: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(value).map_err(|_| anyhow::anyhow!("{flag} {value}: expected seconds, 0 or more"))
}

impl ServeArgs {
    pub fn run(self) -> anyhow::Result<()> {
        // a client that goes away must not end the server
        #[cfg(unix)]
        // SAFETY: no other thread has been started.
        unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        }
        let filter = EnvFilter::try_new(&self.log).with_context(|| format!("--log {}", self.log))?;
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal());
        match self.log_format {
            LogFormat::Text => log.with_target(false).init(),
            LogFormat::Json => log.json().flatten_event(true).with_target(false).init(),
        }
        ensure!(self.max_queue <= 1 << 20, "--max-queue {} is too many; {} at most", self.max_queue, 1 << 20);
        ensure!(self.api_key.iter().all(|k| !k.is_empty()), "--api-key: a key is empty");
        let http = HttpOptions {
            body_limit: self.body_limit,
            header_timeout: seconds("--header-timeout", self.header_timeout)?,
            body_timeout: seconds("--body-timeout", self.body_timeout)?,
            cors_origins: self.cors_origin.clone(),
            shutdown_delay: seconds("--shutdown-delay", self.shutdown_delay)?,
            shutdown_timeout: seconds("--shutdown-timeout", self.shutdown_timeout)?,
        };
        let timeout = seconds("--request-timeout", self.request_timeout)?;
        let options = self.engine.options()?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let address = format!("{}:{}", self.host, self.port);
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind(&address))
            .with_context(|| format!("cannot listen at {address}; --host and --port choose another address"))?;

        // the model lives on the engine's thread: not every device's handles can move
        let (facts_in, facts) = channel();
        let (start, started) = channel::<(Inbox, Arc<Metrics>)>();
        let (model, template) = (self.model.clone(), self.template.clone());
        let engine_thread =
            std::thread::Builder::new().name("engine".into()).spawn(move || -> anyhow::Result<()> {
                let loaded = match model.load() {
                    Ok(loaded) => loaded,
                    Err(e) => return Ok(drop(facts_in.send(Err(e)))),
                };
                let prepared = loaded.template(template.as_deref()).and_then(|t| Ok((t, loaded.session(options)?)));
                let (template, mut session) = match prepared {
                    Ok(prepared) => prepared,
                    Err(e) => return Ok(drop(facts_in.send(Err(e)))),
                };
                let prompter = Prompter { tokenizer: loaded.tokenizer.clone(), template };
                let facts = (prompter, loaded.defaults, loaded.config.clone(), session.blocks().1);
                if facts_in.send(Ok(facts)).is_err() {
                    return Ok(());
                }
                drop(facts_in);
                let Ok((inbox, metrics)) = started.recv() else { return Ok(()) };
                Ok(worker::run(&mut *session, inbox, &metrics)?)
            })?;
        let (prompter, defaults, config, blocks) = facts.recv().context("the engine stopped while loading")??;

        let name = self.name();
        let metrics = Arc::new(Metrics::new(&name, blocks));
        let (engine, inbox) = worker::engine(options.sequences + self.max_queue);
        let shared = Arc::new(Shared {
            engine,
            tokenizer: prompter.tokenizer.clone(),
            prompter,
            defaults,
            config,
            name,
            created: std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            metrics: metrics.clone(),
            request_timeout: (!timeout.is_zero()).then_some(timeout),
            api_keys: self.api_key.clone(),
            draining: Default::default(),
        });
        let router = app(shared.clone(), &http)?;
        let local: SocketAddr = listener.local_addr()?;
        start.send((inbox, metrics)).map_err(|_| anyhow::anyhow!("the engine stopped while loading"))?;
        tracing::info!(
            model = shared.name,
            cache_tokens = blocks * BLOCK,
            "listening at http://{local}{}",
            if local.ip().is_loopback() { " (this machine alone; --host 0.0.0.0 for others)" } else { "" }
        );
        let dead = async {
            // the engine's thread ends by itself only if something is wrong
            while !engine_thread.is_finished() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        let left = runtime.block_on(async {
            let stop = async {
                tokio::select! {
                    () = interrupted() => {}
                    () = dead => {}
                }
            };
            serve(listener, router, shared, http, stop).await
        });
        if engine_thread.is_finished() {
            let result = engine_thread.join().map_err(|_| anyhow::anyhow!("the engine panicked"))?;
            result.context("the engine stopped")?;
        }
        runtime.shutdown_background();
        if left > 0 {
            tracing::warn!("--shutdown-timeout was too short for {left} requests");
        }
        tracing::info!("stopped");
        Ok(())
    }

    fn name(&self) -> String {
        let folder = self.model.model.as_ref().and_then(|m| m.canonicalize().ok());
        let folder = folder.and_then(|f| f.file_name().map(|n| n.to_string_lossy().into_owned()));
        self.served_model_name.clone().or(folder).unwrap_or_else(|| "beautiful-prompt".into())
    }
}

/// Resolves at SIGTERM or Ctrl-C.
async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}
