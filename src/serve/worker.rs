//! The engine's own thread, and the channels that the rest of the server talks to it through.

use super::errors::ApiError;
use super::metrics::Metrics;
use crate::engine::Finish;
use crate::engine::session::{Completed, Generate, GenerateOptions, Update};
use crate::engine::text::Token;
use crate::rewrite::Work;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What the engine tells about one prompt.
#[derive(Debug)]
pub enum Reply {
    /// New text of a candidate and its tokens; the last one has a `finish`.
    Text {
        candidate: u32,
        text: String,
        tokens: Vec<Token>,
        finish: Option<Finish>,
    },
    Done(Box<Completed>),
    /// It waits for its turn.
    Accepted,
    Refused(String),
    /// Its work failed.
    Failed(String),
}

enum Command {
    Submit {
        id: u64,
        prompt: Vec<u32>,
        options: Box<GenerateOptions>,
        replies: UnboundedSender<Reply>,
        arrived: Instant,
    },
    Cancel(u64),
}

/// Where requests go in.
#[derive(Clone)]
pub struct Engine {
    commands: Sender<Command>,
    room: Arc<Semaphore>,
    capacity: usize,
    ids: Arc<AtomicU64>,
}

/// The commands that come out at the engine's thread.
pub struct Inbox(Receiver<Command>);

/// A channel to an engine that takes at most `capacity` prompts at once, waiting ones included.
pub fn engine(capacity: usize) -> (Engine, Inbox) {
    let (commands, inbox) = channel();
    let room = Arc::new(Semaphore::new(capacity));
    (Engine { commands, room, capacity, ids: Arc::default() }, Inbox(inbox))
}

impl Engine {
    /// Hands in prompts, all or none, and waits until the engine has accepted them. Each answers on its own.
    pub async fn submit(&self, prompts: Work) -> Result<Vec<Generation>, ApiError> {
        self.fits(&prompts)?;
        let permits = self.room.clone().try_acquire_many_owned(prompts.len() as u32).map_err(|_| ApiError::busy())?;
        self.hand_in(prompts, permits).await
    }

    /// [`Engine::submit`] that waits for room: for the rest of what has begun.
    pub async fn submit_in_turn(&self, prompts: Work) -> Result<Vec<Generation>, ApiError> {
        self.fits(&prompts)?;
        let permits = self.room.clone().acquire_many_owned(prompts.len() as u32).await;
        self.hand_in(prompts, permits.map_err(|_| ApiError::internal("the engine has stopped"))?).await
    }

    fn fits(&self, prompts: &Work) -> Result<(), ApiError> {
        if prompts.len() > self.capacity {
            let message = format!("{} prompts are more than the {} that may wait", prompts.len(), self.capacity);
            return Err(ApiError::invalid(message));
        }
        Ok(())
    }

    async fn hand_in(&self, prompts: Work, mut permits: OwnedSemaphorePermit) -> Result<Vec<Generation>, ApiError> {
        let mut generations = Vec::with_capacity(prompts.len());
        for (prompt, options) in prompts {
            let id = self.ids.fetch_add(1, Ordering::Relaxed);
            let (replies, receiver) = unbounded_channel();
            let command = Command::Submit { id, prompt, options: Box::new(options), replies, arrived: Instant::now() };
            self.commands.send(command).map_err(|_| ApiError::internal("the engine has stopped"))?;
            let permit = permits.split(1).expect("one permit for each prompt");
            generations.push(Generation {
                id,
                receiver,
                commands: self.commands.clone(),
                done: false,
                _permit: permit,
            });
        }
        for g in &mut generations {
            g.next().await.transpose()?;
        }
        Ok(generations)
    }

    /// Prompts in flight.
    pub fn in_flight(&self) -> usize {
        self.capacity - self.room.available_permits()
    }
}

/// A prompt being worked on. Dropping it cancels the work.
pub struct Generation {
    id: u64,
    receiver: UnboundedReceiver<Reply>,
    commands: Sender<Command>,
    done: bool,
    _permit: OwnedSemaphorePermit,
}

impl Generation {
    /// What comes next; nothing after [`Reply::Done`].
    pub async fn next(&mut self) -> Option<Result<Reply, ApiError>> {
        if self.done {
            return None;
        }
        let reply = match self.receiver.recv().await {
            Some(Reply::Refused(message)) => Err(ApiError::invalid(message)),
            Some(Reply::Failed(message)) => Err(ApiError::internal(message)),
            Some(reply) => Ok(reply),
            None => Err(ApiError::internal("the engine has stopped")),
        };
        self.done = matches!(reply, Err(_) | Ok(Reply::Done(_)));
        Some(reply)
    }

    /// The whole of it.
    pub async fn complete(mut self) -> Result<Completed, ApiError> {
        while let Some(reply) = self.next().await {
            if let Reply::Done(completed) = reply? {
                return Ok(*completed);
            }
        }
        Err(ApiError::internal("the engine has stopped"))
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.done {
            // the engine may have ended before
            let _ = self.commands.send(Command::Cancel(self.id));
        }
    }
}

/// A prompt as the engine's thread sees it.
struct Client {
    replies: UnboundedSender<Reply>,
    arrived: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
    /// When each candidate last had new text.
    last: Vec<Option<Instant>>,
    max_tokens: usize,
}

/// Serves until all [`Engine`]s and [`Generation`]s are gone.
pub fn run(session: &mut dyn Generate, inbox: Inbox, metrics: &Metrics) -> crate::error::Result<()> {
    let mut clients: HashMap<u64, Client> = HashMap::new();
    loop {
        let first = match session.is_idle() {
            true => match inbox.0.recv() {
                Ok(command) => Some(command),
                Err(_) => return Ok(()),
            },
            false => None,
        };
        for command in first.into_iter().chain(inbox.0.try_iter()) {
            match command {
                Command::Cancel(id) => {
                    session.cancel(id);
                    if clients.remove(&id).is_some() {
                        metrics.cancelled();
                    }
                }
                Command::Submit { id, prompt, options, replies, arrived } => {
                    if let Err(e) = session.submit(id, prompt, &options) {
                        // whoever asked may be gone
                        let _ = replies.send(Reply::Refused(e.to_string()));
                        continue;
                    }
                    let last = vec![None; options.candidates as usize];
                    let max_tokens = match options.length {
                        crate::engine::session::Length::New(n) | crate::engine::session::Length::Total(n) => n,
                    };
                    let _ = replies.send(Reply::Accepted);
                    clients.insert(id, Client { replies, arrived, started: None, first: None, last, max_tokens });
                }
            }
        }
        let before = session.counters().computed_tokens;
        let done = session.step(&mut |update| match update {
            Update::Started { id } => {
                if let Some(c) = clients.get_mut(&id) {
                    c.started = Some(Instant::now());
                }
            }
            Update::Text { id, candidate, text, tokens, finish } => {
                let Some(c) = clients.get_mut(&id) else { return };
                let now = Instant::now();
                match c.last[candidate as usize].replace(now) {
                    Some(last) => metrics.inter_token((now - last).as_secs_f64()),
                    None if c.first.is_none() => {
                        c.first = Some(now);
                        metrics.first_token((now - c.arrived).as_secs_f64());
                    }
                    None => {}
                }
                let reply = Reply::Text { candidate, text: text.to_owned(), tokens: tokens.to_vec(), finish };
                let _ = c.replies.send(reply);
            }
        })?;
        for outcome in done {
            let completed = match outcome {
                Ok(completed) => completed,
                Err(failed) => {
                    if let Some(c) = clients.remove(&failed.id) {
                        let _ = c.replies.send(Reply::Failed(failed.to_string()));
                    }
                    continue;
                }
            };
            let Some(c) = clients.remove(&completed.id) else { continue };
            let now = Instant::now();
            metrics.finished(&completed, c.max_tokens, [Some(c.arrived), c.started, c.first, Some(now)]);
            let _ = c.replies.send(Reply::Done(Box::new(completed)));
        }
        let computed = session.counters().computed_tokens - before;
        metrics.step(session.running(), session.waiting(), session.blocks(), session.counters(), computed);
    }
}
