//! `bprompt serve`: rewrites over HTTP.

use super::engine::EngineArgs;
use super::hosted::{HostOptions, Hosted};
use super::model::ModelArgs;
use crate::serve::{HttpOptions, app, pool, serve};
use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use std::io::IsTerminal;
use std::net::SocketAddr;
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
    #[arg(
        long,
        value_name = "KEYS",
        value_delimiter = ',',
        env = "BPROMPT_API_KEY",
        hide_env_values = true
    )]
    api_key: Vec<String>,
    /// Web origins that may call, separated by commas; * for all. None if not given.
    #[arg(long, value_name = "ORIGINS", value_delimiter = ',', env = "BPROMPT_CORS_ORIGIN")]
    cors_origin: Vec<String>,
    /// Prompts that may wait beyond those that run, 0 for none; more are refused with status 429.
    #[arg(long, default_value_t = 1024, env = "BPROMPT_MAX_QUEUE")]
    max_queue: usize,
    /// Longest time for a request in seconds; 0 for no limit.
    #[arg(long, default_value_t = 300.0, env = "BPROMPT_REQUEST_TIMEOUT")]
    request_timeout: f64,
    /// Maximum bytes of a request's body, at least 1.
    #[arg(long, default_value_t = 1 << 20, env = "BPROMPT_BODY_LIMIT")]
    body_limit: usize,
    /// Longest time in seconds, above 0, for a request's head, and for a connection without a
    /// request.
    #[arg(long, default_value_t = 60.0, env = "BPROMPT_HEADER_TIMEOUT")]
    header_timeout: f64,
    /// Longest time in seconds, above 0, for a request's body.
    #[arg(long, default_value_t = 30.0, env = "BPROMPT_BODY_TIMEOUT")]
    body_timeout: f64,
    /// Longest time in seconds for which a client may take nothing of its answer; its connection is
    /// closed then, and the work for it ends. 0 for no limit.
    #[arg(long, default_value_t = 60.0, env = "BPROMPT_WRITE_TIMEOUT")]
    write_timeout: f64,
    /// Seconds for which the engine may stand still in its work before /health fails; 0 for no
    /// limit.
    #[arg(long, default_value_t = 120.0, env = "BPROMPT_STALL_TIMEOUT")]
    stall_timeout: f64,
    /// Seconds for which /ready fails before connections are refused, so that balancers notice; 0
    /// refuses at once.
    #[arg(long, default_value_t = 0.0, env = "BPROMPT_SHUTDOWN_DELAY")]
    shutdown_delay: f64,
    /// Seconds that accepted requests have to end after SIGTERM; 0 leaves them unanswered.
    #[arg(long, default_value_t = 30.0, env = "BPROMPT_SHUTDOWN_TIMEOUT")]
    shutdown_timeout: f64,
    /// How the log is written.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, env = "BPROMPT_LOG_FORMAT")]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, or a filter such as
    /// "info,beautiful_prompt::serve=debug".
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

fn seconds(flag: &str, value: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| anyhow::anyhow!("{flag} {value}: expected seconds, 0 or more"))
}

/// A time in seconds without which nothing could be answered.
fn above_zero(flag: &str, value: f64) -> anyhow::Result<Duration> {
    let time = seconds(flag, value)?;
    ensure!(!time.is_zero(), "{flag} {value}: expected seconds, more than 0");
    Ok(time)
}

/// A time in seconds, 0 for none.
fn limit(flag: &str, value: f64) -> anyhow::Result<Option<Duration>> {
    Ok(Some(seconds(flag, value)?).filter(|d| !d.is_zero()))
}

impl ServeArgs {
    fn begin_log(&self) -> anyhow::Result<()> {
        let filter =
            EnvFilter::try_new(&self.log).with_context(|| format!("--log {}", self.log))?;
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            // it would be told of on the same standard error, and panic
            .log_internal_errors(false)
            .with_ansi(std::io::stderr().is_terminal());
        match self.log_format {
            LogFormat::Text => log.with_target(false).init(),
            LogFormat::Json => log.json().flatten_event(true).with_target(false).init(),
        }
        Ok(())
    }

    fn http_options(&self) -> anyhow::Result<HttpOptions> {
        ensure!(
            self.max_queue <= 1 << 20,
            "--max-queue {} is too many; {} at most",
            self.max_queue,
            1 << 20
        );
        ensure!(self.body_limit > 0, "--body-limit must be at least 1");
        ensure!(self.api_key.iter().all(|k| !k.is_empty()), "--api-key: a key is empty");
        Ok(HttpOptions {
            body_limit: self.body_limit,
            header_timeout: above_zero("--header-timeout", self.header_timeout)?,
            body_timeout: above_zero("--body-timeout", self.body_timeout)?,
            write_timeout: limit("--write-timeout", self.write_timeout)?,
            cors_origins: self.cors_origin.clone(),
            shutdown_delay: seconds("--shutdown-delay", self.shutdown_delay)?,
            shutdown_timeout: seconds("--shutdown-timeout", self.shutdown_timeout)?,
        })
    }

    pub fn run(self) -> anyhow::Result<()> {
        super::ignore_broken_pipes();
        self.begin_log()?;
        let http = self.http_options()?;
        let request_timeout = limit("--request-timeout", self.request_timeout)?;
        let stall_timeout = limit("--stall-timeout", self.stall_timeout)?;
        let options = self.engine.options()?;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let address = format!("{}:{}", self.host, self.port);
        let listener =
            runtime.block_on(tokio::net::TcpListener::bind(&address)).with_context(|| {
                format!("cannot listen at {address}; --host and --port choose another address")
            })?;

        let host = HostOptions {
            model: self.model,
            name: self.served_model_name,
            template: self.template,
            engine: options,
            max_queue: self.max_queue,
            most_bodies: pool::MAX_WAITING,
            request_timeout,
            stall_timeout,
            api_keys: self.api_key,
        };
        let Hosted { shared, thread: engine_thread, .. } = host.start()?;
        let router = app(shared.clone(), &http)?;
        let local: SocketAddr = listener.local_addr()?;
        tracing::info!(
            model = shared.name,
            "listening at http://{local}{}",
            if local.ip().is_loopback() {
                " (this machine alone; --host 0.0.0.0 for others)"
            } else {
                ""
            }
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
            let result =
                engine_thread.join().map_err(|_| anyhow::anyhow!("the engine panicked"))?;
            result.context("the engine stopped")?;
        }
        runtime.shutdown_background();
        if left > 0 {
            tracing::warn!("--shutdown-timeout was too short for {left} requests");
        }
        tracing::info!("stopped");
        Ok(())
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
