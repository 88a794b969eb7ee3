//! Requests, their running sequences, and what the engine tells about them.

use super::kv_blocks::{Node, ROOT};
use super::{Sampling, Top};
use crate::ops::BLOCK;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

/// One prompt and how to continue it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The caller's name for it; unique among requests in flight.
    pub id: u64,
    /// Whose request it is; those of one owner share one share of the places. Its own id if nobody
    /// says.
    pub owner: u64,
    pub prompt: Vec<u32>,
    /// Continuations that share the prompt's computation.
    pub candidates: u32,
    pub sampling: Sampling,
    /// Added to the logits of tokens.
    pub bias: Vec<(u32, f32)>,
    /// Fewest and most new tokens of a candidate; the most is at least 1.
    pub min_new: usize,
    pub max_new: usize,
    pub eos: u32,
    /// Goes on after the end-of-sequence token.
    pub ignore_eos: bool,
    /// Tokens that end a candidate too.
    pub stop_token_ids: Vec<u32>,
    /// Also reports the log-probabilities of the prompt's tokens but the first.
    pub prompt_logprobs: bool,
    /// Likely tokens to report with each.
    pub top_logprobs: usize,
    /// Ends the candidates that are not done then.
    pub deadline: Option<Instant>,
}

impl Request {
    /// A greedy request for `max_new` tokens.
    pub fn new(id: u64, prompt: Vec<u32>, max_new: usize, eos: u32) -> Request {
        Request {
            id,
            owner: id,
            prompt,
            candidates: 1,
            sampling: Sampling::default(),
            bias: Vec::new(),
            min_new: 0,
            max_new,
            eos,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            prompt_logprobs: false,
            top_logprobs: 0,
            deadline: None,
        }
    }

    /// Whether the token ends a candidate.
    pub fn is_stop(&self, token: u32) -> bool {
        (token == self.eos && !self.ignore_eos) || self.stop_token_ids.contains(&token)
    }

    /// Blocks that one candidate may come to use.
    pub fn blocks(&self) -> usize {
        // the last token chosen is never computed
        (self.prompt.len() + self.max_new.max(1) - 1).div_ceil(BLOCK)
    }
}

/// Why a candidate ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = FinishReason)]
pub enum Finish {
    /// The end-of-sequence token or a stop string.
    Stop,
    /// As many tokens as were asked for.
    Length,
    /// The request's time was over.
    #[serde(rename = "abort")]
    Deadline,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A request's first tokens are about to be computed, but for `cached` that are there already.
    Started { request: u64, cached: usize },
    /// Some of the prompt's tokens, in order over all such events of a request: log-probability and
    /// likely tokens.
    Prompt { request: u64, scores: Vec<(f32, Top)> },
    /// The next token of a candidate. `logprob` is that of the model, before penalties and
    /// temperature.
    Token {
        request: u64,
        candidate: u32,
        token: u32,
        logprob: f32,
        top: Top,
        finish: Option<Finish>,
    },
    /// A candidate ended without a token.
    Ended { request: u64, candidate: u32, finish: Finish },
}

/// What is to become of a candidate after an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Go,
    End,
    /// Takes back all but `keep` output tokens; at that place `ban` is not chosen again.
    Rewind {
        keep: usize,
        ban: u32,
    },
    /// Keeps `keep` output tokens and goes on with these.
    Force {
        keep: usize,
        tokens: Vec<u32>,
    },
}

/// One generation, waiting or running.
pub(super) struct Sequence {
    pub request: Arc<Request>,
    pub candidate: u32,
    /// Prompt and output; the first `computed` are in the cache.
    pub tokens: Vec<u32>,
    pub prompt: usize,
    pub computed: usize,
    pub blocks: Vec<u32>,
    /// Places in the tree of prefixes of the leading blocks that are known.
    pub nodes: Vec<Node>,
    /// Candidates to split into when the prompt is done; 0 afterwards.
    pub fork: u32,
    pub started: bool,
    /// Prompt tokens whose log-probabilities were told.
    pub scored: usize,
    /// Tokens that must come next.
    pub forced: Vec<u32>,
    /// Tokens not to be chosen, with their positions.
    pub banned: Vec<(usize, u32)>,
    /// Tokens that the repetition penalty counts, each once.
    pub seen: Vec<u32>,
    known: HashSet<u32>,
    /// How often each token was put out; kept if a penalty needs it.
    pub counts: HashMap<u32, u32>,
    /// Most tokens of the next draft.
    pub draft: usize,
    pub done: bool,
}

impl Sequence {
    pub fn new(request: Request) -> Sequence {
        let request = Arc::new(request);
        let mut s = Sequence {
            candidate: 0,
            tokens: request.prompt.clone(),
            prompt: request.prompt.len(),
            computed: 0,
            blocks: Vec::new(),
            nodes: Vec::new(),
            fork: request.candidates.max(1),
            started: false,
            scored: 0,
            forced: Vec::new(),
            banned: Vec::new(),
            seen: Vec::new(),
            known: HashSet::new(),
            counts: HashMap::new(),
            draft: 1,
            done: false,
            request,
        };
        s.recount();
        s
    }

    /// Where the next known block would come in the tree of prefixes.
    pub fn node(&self) -> Node {
        self.nodes.last().copied().unwrap_or(ROOT)
    }

    /// Output tokens so far.
    pub fn outputs(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    fn recount(&mut self) {
        self.seen.clear();
        self.known.clear();
        self.counts.clear();
        for i in 0..self.tokens.len() {
            if i >= self.prompt || self.request.sampling.penalize_prompt {
                self.note(self.tokens[i], i >= self.prompt);
            }
        }
    }

    fn note(&mut self, token: u32, output: bool) {
        let s = &self.request.sampling;
        if s.repetition_penalty != 1.0 && self.known.insert(token) {
            self.seen.push(token);
        }
        if output && (s.presence_penalty != 0.0 || s.frequency_penalty != 0.0) {
            *self.counts.entry(token).or_default() += 1;
        }
    }

    pub fn push(&mut self, token: u32) {
        self.note(token, true);
        self.tokens.push(token);
    }

    /// Takes back all but `keep` output tokens. Returns the blocks that go with them: a known block
    /// stays as it is.
    pub fn truncate(&mut self, keep: usize) -> Vec<u32> {
        self.tokens.truncate(self.prompt + keep);
        self.forced.clear();
        self.recount();
        // the last token is computed again, for what comes after it
        let mut computed = self.computed.min(self.tokens.len() - 1);
        // candidates share the prompt's full blocks, and so may others the known ones
        if computed < self.nodes.len().max(self.prompt / BLOCK) * BLOCK {
            computed -= computed % BLOCK;
            self.nodes.truncate(computed / BLOCK);
        }
        self.computed = computed;
        self.blocks.split_off(computed.div_ceil(BLOCK))
    }

    /// Forgets what is in the cache; returns the blocks.
    pub fn preempt(&mut self) -> Vec<u32> {
        self.computed = 0;
        self.nodes.clear();
        std::mem::take(&mut self.blocks)
    }

    /// Another candidate of the same prompt, with nothing in the cache.
    pub fn sibling(&self, candidate: u32) -> Sequence {
        Sequence {
            request: self.request.clone(),
            candidate,
            tokens: self.tokens.clone(),
            prompt: self.prompt,
            computed: 0,
            blocks: Vec::new(),
            nodes: Vec::new(),
            fork: 0,
            started: self.started,
            scored: self.scored,
            forced: self.forced.clone(),
            banned: Vec::new(),
            seen: self.seen.clone(),
            known: self.known.clone(),
            counts: self.counts.clone(),
            draft: 1,
            done: false,
        }
    }
}
