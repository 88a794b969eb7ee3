//! Requests, their running sequences, and what the engine tells about them.

use super::Sampling;
use crate::ops::BLOCK;
use std::collections::HashSet;
use std::sync::Arc;

/// One prompt and how to continue it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The caller's name for it; unique among requests in flight.
    pub id: u64,
    pub prompt: Vec<u32>,
    /// Continuations that share the prompt's computation.
    pub candidates: u32,
    pub sampling: Sampling,
    /// Most new tokens of a candidate, at least 1.
    pub max_new: usize,
    pub eos: u32,
    /// Goes on after the end-of-sequence token.
    pub ignore_eos: bool,
    /// Also reports the log-probabilities of the prompt's tokens but the first.
    pub prompt_logprobs: bool,
}

impl Request {
    /// Blocks that all candidates together may come to use.
    pub fn blocks(&self) -> usize {
        // the last token chosen is never computed
        let each = (self.prompt.len() + self.max_new.max(1) - 1).div_ceil(BLOCK);
        let shared = self.prompt.len() / BLOCK;
        shared + (each - shared) * self.candidates.max(1) as usize
    }
}

/// Why a candidate ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The end-of-sequence token or a stop string.
    Stop,
    /// As many tokens as were asked for.
    Length,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Log-probabilities of some of the prompt's tokens, in order over all such events of a request.
    Prompt { request: u64, logprobs: Vec<f32> },
    /// The next token of a candidate. `logprob` is that of the model, before penalties and temperature.
    Token { request: u64, candidate: u32, token: u32, logprob: f32, finish: Option<Finish> },
}

/// All candidates of a request.
pub(super) struct Group {
    pub left: u32,
    pub reserved: usize,
}

/// One running generation.
pub(super) struct Sequence {
    pub request: Arc<Request>,
    pub candidate: u32,
    /// Prompt and output; the first `computed` are in the cache.
    pub tokens: Vec<u32>,
    pub prompt: usize,
    pub computed: usize,
    pub blocks: Vec<u32>,
    /// Candidates to split into when the prompt is done; 0 afterwards.
    pub fork: u32,
    /// Tokens that the repetition penalty counts, each once.
    pub seen: Vec<u32>,
    known: HashSet<u32>,
    pub done: bool,
}

impl Sequence {
    pub fn new(request: Request) -> Sequence {
        let tokens = request.prompt.clone();
        let mut s = Sequence {
            candidate: 0,
            prompt: tokens.len(),
            computed: 0,
            blocks: Vec::new(),
            fork: request.candidates.max(1),
            seen: Vec::new(),
            known: HashSet::new(),
            done: false,
            request: Arc::new(request),
            tokens: Vec::new(),
        };
        if s.request.sampling.penalize_prompt {
            tokens.iter().for_each(|&t| s.note(t));
        }
        s.tokens = tokens;
        s
    }

    fn note(&mut self, token: u32) {
        if self.request.sampling.repetition_penalty != 1.0 && self.known.insert(token) {
            self.seen.push(token);
        }
    }

    pub fn push(&mut self, token: u32) {
        self.note(token);
        self.tokens.push(token);
    }

    pub fn forked(&self, candidate: u32, blocks: Vec<u32>) -> Sequence {
        Sequence {
            request: self.request.clone(),
            candidate,
            tokens: self.tokens.clone(),
            prompt: self.prompt,
            computed: self.computed,
            blocks,
            fork: 0,
            seen: self.seen.clone(),
            known: self.known.clone(),
            done: false,
        }
    }
}
