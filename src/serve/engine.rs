//! The engine as the handlers see it: prompts go in over a channel, what became of them comes back
//! over others.

use super::errors::ApiError;
use crate::engine::FinishReason;
use crate::generate::text::Token;
use crate::generate::{Completed, GenerateOptions};
use crate::rewrite::Work;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What the engine tells about one prompt. How much of it can pile up is bounded by what the prompt
/// asks for.
#[derive(Debug)]
pub enum Reply {
    /// New text of a candidate and its tokens; the last one has a `finish`.
    Text {
        /// Which of the prompt's candidates, from 0.
        candidate: u32,
        /// The new text.
        text: String,
        /// The tokens that the text is made of.
        tokens: Vec<Token>,
        /// Why the candidate ended, if it did.
        finish: Option<FinishReason>,
    },
    /// The prompt is done; all of its candidates.
    Done(Box<Completed>),
    /// It waits for its turn.
    Accepted,
    /// It can never run; why.
    Refused(String),
    /// Something went wrong while it was served.
    Failed(String),
}

pub(super) enum Command {
    Submit(Box<Submission>),
    Cancel(u64),
}

/// A prompt on its way to the engine.
pub(super) struct Submission {
    pub id: u64,
    /// The id of the HTTP request it belongs to, for the log.
    pub request_id: Arc<str>,
    pub prompt: Vec<u32>,
    pub options: GenerateOptions,
    pub replies: UnboundedSender<Reply>,
    pub arrived: Instant,
    /// Its place in the queue, which is free again when the engine is done with it, whoever still
    /// reads.
    pub _permit: OwnedSemaphorePermit,
}

/// The HTTP request that prompts belong to: however many there are, they share one share of the
/// engine.
#[derive(Clone)]
pub struct Owner {
    id: u64,
    request_id: Arc<str>,
}

/// Where prompts go in.
#[derive(Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    room: Arc<Semaphore>,
    capacity: usize,
    ids: Arc<AtomicU64>,
    pulse: Arc<Pulse>,
}

/// The commands that come out at the engine's thread.
pub struct Inbox {
    pub(super) commands: Receiver<Command>,
    pub(super) pulse: Arc<Pulse>,
}

/// A channel to an engine that takes at most `capacity` prompts at once, waiting ones included.
pub fn engine(capacity: usize) -> (EngineHandle, Inbox) {
    let (commands, inbox) = channel();
    let room = Arc::new(Semaphore::new(capacity));
    let pulse = Arc::new(Pulse::default());
    let inbox = Inbox { commands: inbox, pulse: pulse.clone() };
    (EngineHandle { commands, room, capacity, ids: Arc::default(), pulse }, inbox)
}

impl EngineHandle {
    /// A new owner of prompts, with the id that the log knows it by.
    pub fn owner(&self, request_id: Arc<str>) -> Owner {
        Owner { id: self.ids.fetch_add(1, Ordering::Relaxed), request_id }
    }

    /// Hands in prompts, all or none, and waits until the engine has accepted them. Each answers on
    /// its own.
    pub async fn submit(&self, prompts: Work, owner: &Owner) -> Result<Vec<Generation>, ApiError> {
        self.check_count(prompts.len())?;
        let permits = self
            .room
            .clone()
            .try_acquire_many_owned(prompts.len() as u32)
            .map_err(|_| ApiError::busy())?;
        self.hand_in(prompts, permits, owner).await
    }

    /// [`EngineHandle::submit`] that waits for room: for the rest of what has begun.
    pub async fn submit_in_turn(
        &self,
        prompts: Work,
        owner: &Owner,
    ) -> Result<Vec<Generation>, ApiError> {
        self.check_count(prompts.len())?;
        let permits = self.room.clone().acquire_many_owned(prompts.len() as u32).await;
        self.hand_in(prompts, permits.map_err(|_| stopped())?, owner).await
    }

    /// Fails if so many prompts never fit into the queue.
    pub fn check_count(&self, prompts: usize) -> Result<(), ApiError> {
        if prompts > self.capacity {
            let message =
                format!("{prompts} prompts are more than the {} that may wait", self.capacity);
            return Err(ApiError::field("prompt", message));
        }
        Ok(())
    }

    async fn hand_in(
        &self,
        prompts: Work,
        mut permits: OwnedSemaphorePermit,
        owner: &Owner,
    ) -> Result<Vec<Generation>, ApiError> {
        let mut generations = Vec::with_capacity(prompts.len());
        for (prompt, mut options) in prompts {
            options.owner = Some(owner.id);
            let id = self.ids.fetch_add(1, Ordering::Relaxed);
            let (replies, receiver) = unbounded_channel();
            let permit = permits.split(1).expect("one permit for each prompt");
            let request_id = owner.request_id.clone();
            let arrived = Instant::now();
            let submission =
                Submission { id, request_id, prompt, options, replies, arrived, _permit: permit };
            self.commands.send(Command::Submit(Box::new(submission))).map_err(|_| stopped())?;
            generations.push(Generation {
                id,
                receiver,
                commands: self.commands.clone(),
                done: false,
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

    /// What is wrong with the engine's thread: it has ended, or has not moved for longer than
    /// `stall`.
    pub fn trouble(&self, stall: Option<Duration>) -> Option<String> {
        if self.pulse.gone.load(Ordering::Acquire) {
            return Some("the engine has stopped".into());
        }
        let still = self.pulse.still()?;
        let stuck = stall.is_some_and(|limit| still > limit);
        stuck.then(|| format!("the engine has not moved for {:.0} s", still.as_secs_f64()))
    }
}

fn stopped() -> ApiError {
    ApiError::internal("the engine has stopped")
}

/// A sign of life of the engine's thread.
pub(super) struct Pulse {
    start: Instant,
    /// Milliseconds from `start` to the last beat; 0 while the thread waits for work.
    beat: AtomicU64,
    gone: AtomicBool,
}

impl Default for Pulse {
    fn default() -> Pulse {
        Pulse { start: Instant::now(), beat: AtomicU64::new(0), gone: AtomicBool::new(false) }
    }
}

impl Pulse {
    pub fn beat(&self) {
        self.beat.store((self.start.elapsed().as_millis() as u64).max(1), Ordering::Relaxed);
    }

    pub fn rest(&self) {
        self.beat.store(0, Ordering::Relaxed);
    }

    pub fn end(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// How long there was no beat, if there is work.
    fn still(&self) -> Option<Duration> {
        match self.beat.load(Ordering::Relaxed) {
            0 => None,
            beat => Some(self.start.elapsed().saturating_sub(Duration::from_millis(beat))),
        }
    }
}

/// A prompt being worked on. Dropping it cancels the work.
pub struct Generation {
    id: u64,
    receiver: UnboundedReceiver<Reply>,
    commands: Sender<Command>,
    done: bool,
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
            None => Err(stopped()),
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
        Err(stopped())
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
