//! A model on a thread of its own, with the server's handlers around it.

use super::hub::is_name;
use super::model::ModelArgs;
use crate::engine::EngineOptions;
use crate::rewrite::Prompter;
use crate::serve::Shared;
use crate::serve::engine::{self, Inbox};
use crate::serve::metrics::ServerMetrics;
use crate::serve::pool::TextPool;
use crate::serve::worker;
use anyhow::{Context, anyhow};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

/// What to host, and how.
pub struct HostOptions {
    pub model: ModelArgs,
    /// What clients call the model; its folder's name if not given.
    pub name: Option<String>,
    pub template: Option<String>,
    pub engine: EngineOptions,
    /// Prompts that may wait beyond those that run.
    pub max_queue: usize,
    /// Requests whose bodies may wait to be read.
    pub most_bodies: usize,
    pub request_timeout: Option<Duration>,
    /// How long the engine may stand still before it counts as stuck.
    pub stall_timeout: Option<Duration>,
    pub api_keys: Vec<String>,
}

pub struct Hosted {
    pub shared: Arc<Shared>,
    /// Tells the model's weights from others, wherever they lie.
    pub fingerprint: String,
    /// Ends by itself when nobody holds `shared` any more, or if something is wrong.
    pub thread: JoinHandle<anyhow::Result<()>>,
}

impl HostOptions {
    pub fn start(self) -> anyhow::Result<Hosted> {
        let name = self.model_name();
        let HostOptions { mut model, template, engine: options, .. } = self;
        model.long_running = true;
        // not every device's handles can move to another thread, so the model is loaded on its own
        let (facts_in, facts) = channel();
        let (start, started) = channel::<(Inbox, Arc<ServerMetrics>)>();
        let thread = std::thread::Builder::new().name("engine".into()).spawn(
            move || -> anyhow::Result<()> {
                // whoever waits for the facts is told why there are none
                let fail = |e: anyhow::Error| {
                    let _ = facts_in.send(Err(e));
                };
                let loaded = match model.load() {
                    Ok(loaded) => loaded,
                    Err(e) => {
                        fail(e);
                        return Ok(());
                    }
                };
                let prepared = loaded
                    .template(template.as_deref())
                    .and_then(|t| Ok((t, loaded.session(options)?)));
                let (template, mut session) = match prepared {
                    Ok(prepared) => prepared,
                    Err(e) => {
                        fail(e);
                        return Ok(());
                    }
                };
                let prompter = Prompter { tokenizer: loaded.tokenizer.clone(), template };
                let facts = (
                    prompter,
                    loaded.defaults,
                    loaded.config.clone(),
                    loaded.fingerprint.clone(),
                    session.blocks().1,
                );
                if facts_in.send(Ok(facts)).is_err() {
                    return Ok(());
                }
                let Ok((inbox, metrics)) = started.recv() else { return Ok(()) };
                Ok(worker::run(&mut *session, inbox, &metrics)?)
            },
        )?;
        let (prompter, defaults, config, fingerprint, blocks) =
            facts.recv().context("the engine stopped while loading")??;
        let metrics = Arc::new(ServerMetrics::new(&name, blocks));
        let (engine, inbox) = engine::engine(options.sequences + self.max_queue);
        start
            .send((inbox, metrics.clone()))
            .map_err(|_| anyhow!("the engine stopped while loading"))?;
        let ids = 0..config.vocab_size as u32;
        let longest_token =
            ids.map(|id| prompter.tokenizer.token_bytes(id).len()).max().unwrap_or(0);
        let created = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let shared = Arc::new(Shared {
            engine,
            tokenizer: prompter.tokenizer.clone(),
            prompter,
            defaults,
            config,
            name,
            created: created.map_or(0, |d| d.as_secs()),
            metrics,
            request_timeout: self.request_timeout,
            stall_timeout: self.stall_timeout,
            api_keys: self.api_keys,
            draining: Default::default(),
            texts: TextPool::new(self.most_bodies),
            longest_token,
        });
        Ok(Hosted { shared, fingerprint, thread })
    }

    fn model_name(&self) -> String {
        if let (None, Some(model)) = (&self.name, &self.model.model)
            && is_name(model)
        {
            return model.display().to_string();
        }
        let folder = self.model.model.as_ref().and_then(|m| m.canonicalize().ok());
        let folder = folder.and_then(|f| f.file_name().map(|n| n.to_string_lossy().into_owned()));
        self.name.clone().or(folder).unwrap_or_else(|| "beautiful-prompt".into())
    }
}
